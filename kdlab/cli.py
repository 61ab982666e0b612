"""The command line: one function per command; whatever is slow to import is imported by the command that needs it."""

# No `from __future__ import annotations`: tyro reads the annotations of classes that are defined inside functions.
import dataclasses
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

if TYPE_CHECKING:
    from kdlab.config import RunConfig

A = TypeVar("A")


def _parse(kind: Callable[..., A], command: str, args: Sequence[str], description: str) -> A:
    # A config's alternatives (`None` or a dataclass) are plain flags here, never subcommands.
    marks = (tyro.conf.AvoidSubcommands,)
    parsed: A = tyro.cli(kind, prog=f"kdlab {command}", args=list(args), description=description, config=marks)
    return parsed


def _simulate(args: Sequence[str]) -> int:
    """Write a simulated driving data set in the nuScenes format."""
    from kdlab.data.simulate import SimulationConfig, simulate

    @dataclass
    class Simulate:
        out: Annotated[Path, tyro.conf.Positional]
        """Folder of the new data set."""
        config: Annotated[SimulationConfig, tyro.conf.arg(name="")] = field(default_factory=SimulationConfig)
        workers: int = 0
        """Processes; 0: one per core."""

    given = _parse(Simulate, "simulate", args, str(_simulate.__doc__))
    simulate(given.out, given.config, workers=given.workers or os.cpu_count() or 1, progress=True)
    print(f"{given.out} is ready; try: kdlab train tiny lidar --data {given.out} --out runs/teacher")
    return 0


def _preset(args: Sequence[str]) -> "RunConfig":
    """The config that the two words in front name; tiny camera, for the help, where they do not."""
    from kdlab.presets import PRESETS

    name, modality = (*args[:2], "", "")[:2]
    known = name in PRESETS and modality in ("lidar", "camera", "fusion")
    return PRESETS[name](modality) if known else PRESETS["tiny"]("camera")


def _train(args: Sequence[str]) -> int:
    """Train a detector, alone or distilled from a teacher.

    PRESET and MODALITY come first and set every default below. The same command goes on after a kill.
    """
    from kdlab.config import DataConfig, DetectorConfig, TrainConfig
    from kdlab.presets import PRESETS

    base = _preset(args)

    choices = tyro.extras.literal_type_from_choices(list(PRESETS))

    @dataclass
    class Train:
        preset: Annotated[choices, tyro.conf.Positional]  # type: ignore[valid-type]
        """Size of everything."""
        modality: Annotated[Literal["lidar", "camera", "fusion"], tyro.conf.Positional]
        """Sensors of the trained detector."""
        out: Path
        """Run folder."""
        root: Annotated[str, tyro.conf.arg(name="data")] = base.data.root
        """Data set; short for --data.root."""
        epochs: int = base.train.epochs
        """Short for --train.epochs."""
        seed: int = base.train.seed
        """Short for --train.seed."""
        method: str = ""
        """Distil by this method (see `kdlab methods`); none where left out."""
        teacher: str = ""
        """Run folder of the teacher."""
        variant: Literal["intended", "paper", "released"] = "intended"
        """All quirks of the released code off (intended, paper) or on."""
        quirks: tuple[str, ...] = ()
        """Quirks to flip from the variant's setting."""
        scale: float = 1.0
        """One factor on every weight of the method, beside the preset's own scales."""
        weights: dict[str, float] = field(default_factory=dict)
        """Weights by term name that replace the method's own: --weights feature 5 relation 0."""
        restart: bool = False
        """Throw away what OUT holds of an earlier run."""
        cpu: bool = False
        """Train on the CPU although there is a GPU."""
        detector: DetectorConfig = base.detector
        data: DataConfig = base.data
        train: TrainConfig = base.train

    given = _parse(Train, "train", args, str(_train.__doc__))
    config = _run_config(args, given, base)
    from kdlab.train import train

    run = train(config, given.out, resume=not given.restart, cpu=given.cpu)
    if os.environ.get("RANK", "0") == "0":
        print(f"{run} is ready; try: kdlab evaluate --run {run}")
    return 0


def _run_config(args: Sequence[str], given: Any, base: "RunConfig") -> "RunConfig":
    from kdlab.config import RunConfig
    from kdlab.presets import distilled

    if list(args[:2]) != [given.preset, given.modality] or given.detector.modality != given.modality:
        raise ValueError(
            "PRESET and MODALITY must be the first two words after `kdlab train`, and --detector.modality left out"
        )
    variant: Literal["intended", "released"] = "released" if given.variant == "released" else "intended"
    distill = None
    if given.method:
        distill = dataclasses.replace(
            distilled(given.preset, given.method, given.teacher),
            variant=variant,
            quirks=given.quirks,
            scale=given.scale,
            weights=given.weights,
        )
    elif given.teacher or given.quirks or given.weights or given.variant != "intended":
        raise ValueError(
            "--teacher, --variant, --quirks and --weights want a distillation: name its --method (see `kdlab methods`)"
        )
    data = dataclasses.replace(given.data, **_short(root=(given.root, base.data.root)))
    train = dataclasses.replace(
        given.train, **_short(epochs=(given.epochs, base.train.epochs), seed=(given.seed, base.train.seed))
    )
    return RunConfig(given.detector, data, train, distill)


def _short(**pairs: tuple[Any, Any]) -> dict[str, Any]:
    """The short options that were given another value than the preset's."""
    return {name: value for name, (value, default) in pairs.items() if value != default}


def _evaluate(args: Sequence[str]) -> int:
    """MAP, NDS and true-positive errors of finished runs by the official nuScenes code."""

    @dataclass
    class Evaluate:
        run: tuple[Path, ...]
        """Run folders, or shipped weights."""
        data: Path | None = None
        """Data set; the runs' own where left out."""
        split: str | None = None
        """Split; the runs' validation split where left out."""
        version: str | None = None
        """Version folder; inferred where there is a single one."""
        out: Path | None = None
        """Folder for metrics and results; the run folder where left out."""
        workers: int = 2
        """Loader processes."""
        cpu: bool = False
        """Run on the CPU although there is a GPU."""

    given = _parse(Evaluate, "evaluate", args, str(_evaluate.__doc__))
    from kdlab.checkpoint import load_run_config
    from kdlab.evaluate import Scorer, evaluate_run

    if given.out is not None and len(given.run) > 1:
        raise ValueError("--out goes with a single --run")
    scorers: dict[tuple[str, str | None], Scorer] = {}
    for run in given.run:
        data = load_run_config(run).data
        place = (data.root, data.version) if given.data is None else (str(given.data), given.version)
        scorers[place] = scorers.get(place) or Scorer(*place)
        metrics = evaluate_run(
            run,
            place[0],
            given.split,
            version=place[1],
            device="cpu" if given.cpu else None,
            workers=given.workers,
            scorer=scorers[place],
            out=given.out,
        )
        print(f"{run}\n{metrics}")
    return 0


def _compare(args: Sequence[str]) -> int:
    """Set evaluated runs side by side."""

    @dataclass
    class Compare:
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
        """Run folders."""
        split: str | None = None
        """Split; one that all runs were evaluated on where left out."""
        markdown: bool = False
        """Print Markdown."""
        figure: Path = Path("compare.png")
        """Where to draw the same as bars (.png, .svg, .pdf)."""

    given = _parse(Compare, "compare", args, str(_compare.__doc__))
    from kdlab.runs import compare
    from kdlab.view.curves import metric_comparison

    comparison = compare(given.runs, given.split)
    print(comparison.markdown() if given.markdown else comparison.text())
    metric_comparison(comparison.metrics).savefig(given.figure)
    print(f"\ndrawn in {given.figure}")
    return 0


def _methods(args: Sequence[str]) -> int:
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

    given = _parse(Methods, "methods", args, str(_methods.__doc__))
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


def _parity(args: Sequence[str]) -> int:
    """Compare losses, regions and gradients with values that the papers' released code gave."""

    @dataclass
    class Parity:
        folder: Annotated[Path, tyro.conf.Positional]
        """Folder of the recorded values."""

    given = _parse(Parity, "parity", args, str(_parity.__doc__))
    from kdlab.parity import run

    return int(run(given.folder))


def _doctor(args: Sequence[str]) -> int:
    """Say what this machine has, what is missing and the cure."""

    @dataclass
    class Doctor:
        pass

    _parse(Doctor, "doctor", args, str(_doctor.__doc__))
    from kdlab.doctor import doctor, render

    checks = doctor()
    print(render(checks))
    return 0 if all(check.ok for check in checks) else 1


def _demo(args: Sequence[str]) -> int:
    """The whole chain on a small simulated world: simulate, train, distil, evaluate, compare."""
    from kdlab.demo import demo

    _parse(demo, "demo", args, str(_demo.__doc__))
    return 0


def _overfit(args: Sequence[str]) -> int:
    """Train on one sample until its boxes are found: a check of the whole chain."""
    from kdlab.overfit import overfit

    _parse(overfit, "overfit", args, str(_overfit.__doc__))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": _demo,
    "simulate": _simulate,
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "methods": _methods,
    "parity": _parity,
    "doctor": _doctor,
    "overfit": _overfit,
}
"""The commands, in the order of the help."""


def _help() -> str:
    lines = [
        "usage: kdlab COMMAND ...",
        "",
        "Cross-modal knowledge distillation for BEV 3D object detection.",
        "",
        "commands:",
    ]
    lines += [f"  {name:10s} {str(command.__doc__).splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "kdlab COMMAND --help shows a command's options and their defaults.",
        "--debug (or KDLAB_DEBUG=1) shows tracebacks.",
    ]
    return "\n".join(lines)


def _say(error: BaseException) -> None:
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    print(f"kdlab: error: {text}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code.

    Args:
        argv: the words after ``kdlab``; those of the process where left out.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("KDLAB_DEBUG", "") not in ("", "0") or "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0 if args else 2
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"kdlab {version('kdlab')}")
        return 0
    if args[0] not in COMMANDS:
        close = difflib.get_close_matches(args[0], COMMANDS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        print(f"kdlab: error: no command {args[0]!r}; {hint}known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[args[0]](args[1:])
    except KeyboardInterrupt as error:
        if str(error):
            print(f"kdlab: {error}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `kdlab methods | head`
        sys.stdout = None
        return 1
    except (OSError, ValueError, RuntimeError, ArithmeticError, ImportError) as error:
        if debug:
            traceback.print_exc()
        _say(error)
        return 1


if __name__ == "__main__":  # accelerate launch -m kdlab.cli
    sys.exit(main())
