"""`kdlab methods` and `kdlab parity`."""

# No `from __future__ import annotations`: tyro reads the annotations of classes that are defined inside functions.
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from kdlab.commands.parse import parse

if TYPE_CHECKING:
    from kdlab.distill import Method


def methods(args: Sequence[str]) -> int:
    """The distillation methods; with a NAME, its terms, weights, sources, adapters, options and quirks."""

    @dataclass
    class Methods:
        name: Annotated[str | None, tyro.conf.Positional] = None
        """One method, or several with + between them."""
        teacher: Literal["lidar", "camera", "fusion"] | None = None
        """Sensors of the teacher; the paper's first where left out."""
        student: Literal["lidar", "camera", "fusion"] | None = None
        """Sensors of the student; the paper's first where left out."""
        variant: Literal["intended", "paper", "released"] = "intended"
        """All quirks of the released code off (intended, paper) or on."""
        preset: str = ""
        """Show the weights with this preset's scales."""
        options: dict[str, str] = field(default_factory=dict)
        """Build the method with these options: attention none."""
        errata: bool = False
        """All methods' quirks and other differences between papers and released code, as Markdown."""

    given = parse(Methods, "methods", args, str(methods.__doc__))
    from kdlab.distill import METHODS, papers
    from kdlab.distill.describe import describe_options, errata

    if given.errata:
        print(errata(METHODS))
    elif given.name:
        print(_method(given).describe())
        print(describe_options([option for paper in papers(given.name) for option in paper.options]))
    else:
        for name in METHODS:
            method = _method(replace(given, name=name))
            print(f"{name:14s} {len(method.terms)} terms, {len(method.quirks)} quirks; more: kdlab methods {name}")
    return 0


def _method(given: Any) -> "Method":
    """The method of the options; the modalities that are left out are those of the papers' first pair that fits."""
    from kdlab.distill import build_method, usual_pair
    from kdlab.pairing import distillation
    from kdlab.presets import PRESETS

    if given.preset and given.preset not in PRESETS:
        raise ValueError(f"unknown preset {given.preset!r}; known: {', '.join(PRESETS)}")
    config = replace(
        distillation(given.preset, given.name, ""),
        variant="released" if given.variant == "released" else "intended",
        options=given.options,
    )
    return build_method(config, *usual_pair(given.name, given.student, given.teacher))


def parity(args: Sequence[str]) -> int:
    """Compare losses, regions and gradients with values that the papers' released code gave."""

    @dataclass
    class Parity:
        folder: Annotated[Path, tyro.conf.Positional]
        """Folder of the recorded values."""

    given = parse(Parity, "parity", args, str(parity.__doc__))
    from kdlab.parity import run

    return int(run(given.folder))
