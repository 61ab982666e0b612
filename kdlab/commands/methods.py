"""`kdlab methods` and `kdlab parity`."""

# No `from __future__ import annotations`: tyro reads the annotations of classes that are defined inside functions.
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from kdlab.commands.parse import parse


def methods(args: Sequence[str]) -> int:
    """The distillation methods; with a NAME, its terms, weights, sources and quirks."""

    @dataclass
    class Methods:
        name: Annotated[str | None, tyro.conf.Positional] = None
        """One method."""
        teacher: Literal["lidar", "camera", "fusion"] | None = None
        """Sensors of the teacher; the first that fits where left out."""
        student: Literal["lidar", "camera", "fusion"] | None = None
        """Sensors of the student; the first that fits where left out."""
        variant: Literal["intended", "paper", "released"] = "intended"
        """All quirks of the released code off (intended, paper) or on."""

    given = parse(Methods, "methods", args, str(methods.__doc__))
    from kdlab.distill import METHODS

    for name in [given.name] if given.name else METHODS:
        method = _first_method(name, given.student, given.teacher)
        if given.name:
            print(method.variant("intended" if given.variant == "paper" else given.variant).describe())
        else:
            print(f"{name:14s} {len(method.terms)} terms, {len(method.quirks)} quirks; more: kdlab methods {name}")
    return 0


def _first_method(name: str, student: str | None, teacher: str | None) -> Any:
    from kdlab.config import DistillConfig, Modality
    from kdlab.distill import build_method

    orders: dict[str, tuple[Modality, ...]] = {"s": ("camera", "lidar", "fusion"), "t": ("lidar", "fusion", "camera")}
    problem: ValueError | None = None
    for s in orders["s"]:
        for t in orders["t"]:
            if student in (None, s) and teacher in (None, t):
                try:
                    return build_method(DistillConfig(method=name), s, t)
                except ValueError as error:
                    problem = problem or error
    raise problem or ValueError(f"{name}: no such pair of modalities")


def parity(args: Sequence[str]) -> int:
    """Compare losses, regions and gradients with values that the papers' released code gave."""

    @dataclass
    class Parity:
        folder: Annotated[Path, tyro.conf.Positional]
        """Folder of the recorded values."""

    given = parse(Parity, "parity", args, str(parity.__doc__))
    from kdlab.parity import run

    return int(run(given.folder))
