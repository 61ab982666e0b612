"""`kdlab simulate`, `kdlab doctor`, `kdlab demo` and `kdlab overfit`."""

# No `from __future__ import annotations`: tyro reads the annotations of classes that are defined inside functions.
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from kdlab.commands.parse import parse


def simulate(args: Sequence[str]) -> int:
    """Write a simulated driving data set in the nuScenes format."""
    from kdlab.data.simulate import SimulationConfig
    from kdlab.data.simulate import simulate as write

    @dataclass
    class Simulate:
        out: Annotated[Path, tyro.conf.Positional]
        """Folder of the new data set."""
        config: Annotated[SimulationConfig, tyro.conf.arg(name="")] = field(default_factory=SimulationConfig)
        workers: int = 0
        """Processes; 0: one per core."""

    given = parse(Simulate, "simulate", args, str(simulate.__doc__))
    write(given.out, given.config, workers=given.workers or os.cpu_count() or 1, progress=True)
    print(f"{given.out} is ready; try: kdlab train tiny lidar --data {given.out} --out runs/teacher")
    return 0


def doctor(args: Sequence[str]) -> int:
    """Say what this machine has, what is missing and the cure."""

    @dataclass
    class Doctor:
        pass

    parse(Doctor, "doctor", args, str(doctor.__doc__))
    from kdlab.doctor import doctor as look
    from kdlab.doctor import render

    checks = look()
    print(render(checks))
    return 0 if all(check.ok for check in checks) else 1


def demo(args: Sequence[str]) -> int:
    """The whole chain on a small simulated world: simulate, train, distil, evaluate, compare."""
    from kdlab.demo import demo as run

    parse(run, "demo", args, str(demo.__doc__))
    return 0


def overfit(args: Sequence[str]) -> int:
    """Train on one sample until its boxes are found: a check of the whole chain."""
    from kdlab.overfit import overfit as run

    parse(run, "overfit", args, str(overfit.__doc__))
    return 0
