"""`kdlab train`."""

# No `from __future__ import annotations`: tyro reads the annotations of classes that are defined inside functions.
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from kdlab.commands.parse import parse

if TYPE_CHECKING:
    from kdlab.config import RunConfig


_DISTILL = ("quirks", "scale", "weights", "only", "options", "stage_epochs", "cache")
"""Options that are fields of `kdlab.config.DistillConfig`, beside --method, --teacher and --variant."""


_SHARED_DATA = ("root", "version", "train", "val", "images", "workers", "image_cache")
_SHARED_TRAIN = ("batch_size", "seed", "precision", "checkpoint_minutes")
"""What a teacher that is trained first takes from the words about the student."""


def train(args: Sequence[str]) -> int:
    """Train a detector, alone or distilled from a teacher.

    PRESET and MODALITY come first and set every default below; or a config.json (or a run folder, for its config)
    comes first and decides everything. The same command goes on after a kill. A paper's preset prints its sources and
    the plan of a step (see `kdlab plan`) before a new run.
    """
    if args and _is_config(args[0]):
        return _train_config(args)
    base = _preset(args)
    given = parse(_words(base), "train", args, str(train.__doc__))
    config = _run_config(args, given, base)
    _print_plan(config, given)
    if given.train_teacher:
        _teacher_first(config, given, base)
    return _start(config, given)


def _words(base: "RunConfig") -> type[Any]:
    """What `kdlab train` understands, with a preset's defaults."""
    from kdlab.config import DataConfig, DetectorConfig, TrainConfig
    from kdlab.presets import PRESETS

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
        """Distil by this method, or by several: unidistill+labeldistill (see `kdlab methods`); none where left out."""
        teacher: str = ""
        """Run folder of the teacher."""
        train_teacher: Literal["lidar", "camera", "fusion", ""] = ""
        """Sensors of a teacher that is trained first, into --teacher, where that is not finished: by the same preset,
        with the data, batch size, seed and precision that are given here."""
        teacher_epochs: int = 0
        """Epochs of such a teacher; 0: the preset's."""
        variant: Literal["intended", "paper", "released"] = "intended"
        """All quirks of the released code off (intended, paper) or on."""
        quirks: tuple[str, ...] = ()
        """Quirks to flip from the variant's setting."""
        scale: float = 1.0
        """One factor on every weight of the method, beside the preset's own scales."""
        weights: dict[str, float] = field(default_factory=dict)
        """Weights by term name that replace the method's own: --weights feature 5 relation 0."""
        only: tuple[str, ...] = ()
        """Terms to keep, all others are left out: --only feature relation."""
        options: dict[str, str] = field(default_factory=dict)
        """How the method is built (see `kdlab methods NAME`): --options attention none positions B1,H."""
        stage_epochs: int = 0
        """Epochs of each stage that comes before the student's; 0: the method's own."""
        cache: str = ""
        """Folder where the teacher's features are kept; wants --data.draws."""
        restart: bool = False
        """Throw away what OUT holds of an earlier run."""
        cpu: bool = False
        """Train on the CPU although there is a GPU."""
        detector: DetectorConfig = base.detector
        data: DataConfig = base.data
        train: TrainConfig = base.train

    return Train


def _teacher_first(config: "RunConfig", given: Any, base: "RunConfig") -> None:
    """Train a distillation's teacher where it is not there: the preset's, with what was changed for the student."""
    from kdlab.checkpoint import RunFolder, load_run_config, open_run
    from kdlab.presets import PRESETS
    from kdlab.train import check_student
    from kdlab.train import train as start

    out, place = RunFolder(given.out), RunFolder(Path(given.teacher))
    if out.path.resolve() == place.path.resolve():
        raise ValueError(f"--out and --teacher are one folder, {out.path}; each run has its own")
    if place.finished:
        there = load_run_config(place.path).detector.modality
        if there != given.train_teacher:
            raise ValueError(f"--train-teacher {given.train_teacher}: {place.path} holds a finished {there} detector")
        if _first():
            print(f"teacher: {place.path} is finished and taken as it is")
        return
    whole = PRESETS[given.preset](given.train_teacher)
    data = dataclasses.replace(whole.data, **_changed(config.data, base.data, _SHARED_DATA))
    recipe = dataclasses.replace(whole.train, **_changed(config.train, base.train, _SHARED_TRAIN))
    if given.teacher_epochs:
        recipe = dataclasses.replace(recipe, epochs=given.teacher_epochs)
    teacher = dataclasses.replace(whole, data=data, train=recipe)
    check_student(config, teacher)  # before the hours that a teacher takes
    if _first():
        if not given.restart:
            open_run(out, config)
        print(f"teacher: a {given.train_teacher} detector is trained first, into {place.path}", flush=True)
    start(teacher, place.path, cpu=given.cpu)


def _changed(now: Any, before: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(now, name) for name in names if getattr(now, name) != getattr(before, name)}


def _print_plan(config: "RunConfig", given: Any) -> None:
    """The plan of a paper's preset, before a new run."""
    from kdlab.checkpoint import RunFolder
    from kdlab.commands.plan import plan_of_run
    from kdlab.presets import PAPERS

    folder = RunFolder(given.out)
    fresh = given.restart or not (folder.finished or folder.checkpoint.exists())
    if _first() and fresh and given.preset in PAPERS:
        print(plan_of_run(given.preset, config), flush=True)


def _start(config: "RunConfig", given: Any) -> int:
    from kdlab.train import train as start

    run = start(config, given.out, resume=not given.restart, cpu=given.cpu)
    if _first():
        print(f"{run} is ready; try: kdlab evaluate --run {run}")
    return 0


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_config(word: str) -> bool:
    from kdlab.presets import PRESETS

    return word.endswith(".json") or (word not in PRESETS and (Path(word) / "config.json").exists())


def _train_config(args: Sequence[str]) -> int:
    """`kdlab train CONFIG.json --out RUN`."""

    @dataclass
    class Train:
        config: Annotated[Path, tyro.conf.Positional]
        """A config.json, or a run folder that holds one."""
        out: Path
        """Run folder."""
        restart: bool = False
        """Throw away what OUT holds of an earlier run."""
        cpu: bool = False
        """Train on the CPU although there is a GPU."""

    known = ("--out", "--restart", "--no-restart", "--cpu", "--no-cpu", "--help")
    other = [word for word in args[1:] if word.startswith("--") and word.partition("=")[0] not in known]
    if other:
        raise ValueError(f"{other[0]}: {args[0]} decides everything; beside it go --out, --restart and --cpu alone")
    given = parse(Train, "train", args, str(_train_config.__doc__))
    from kdlab.checkpoint import load_run_config
    from kdlab.config import RunConfig, load_config

    config = load_run_config(given.config) if given.config.is_dir() else load_config(RunConfig, given.config)
    return _start(config, given)


def _preset(args: Sequence[str]) -> "RunConfig":
    """The config that the two words in front name; tiny camera, for the help, where they do not."""
    from kdlab.presets import PRESETS

    name, modality = (*args[:2], "", "")[:2]
    known = name in PRESETS and modality in ("lidar", "camera", "fusion")
    return PRESETS[name](modality) if known else PRESETS["tiny"]("camera")


def _run_config(args: Sequence[str], given: Any, base: "RunConfig") -> "RunConfig":
    from kdlab.config import RunConfig
    from kdlab.pairing import distillation, fit_student

    if list(args[:2]) != [given.preset, given.modality] or given.detector.modality != given.modality:
        raise ValueError(
            "PRESET and MODALITY must be the first two words after `kdlab train`, and --detector.modality left out"
        )
    variant: Literal["intended", "released"] = "released" if given.variant == "released" else "intended"
    if given.train_teacher and not (given.method and given.teacher):
        raise ValueError("--train-teacher wants a --method to distil by, and the teacher's run folder in --teacher")
    if given.teacher_epochs and not given.train_teacher:
        raise ValueError("--teacher-epochs wants --train-teacher, the sensors of the teacher that is trained first")
    distill = None
    if given.method:
        distill = dataclasses.replace(
            distillation(given.preset, given.method, given.teacher),
            variant=variant,
            **{name: getattr(given, name) for name in _DISTILL},
        )
    elif any(getattr(given, name) for name in ("teacher", *_DISTILL) if name != "scale") or (
        given.variant != "intended" or given.scale != 1
    ):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in ("teacher", "variant", *_DISTILL[:-1]))
        raise ValueError(f"{options} and --{_DISTILL[-1]} want a distillation: name its --method (see `kdlab methods`)")
    data = dataclasses.replace(given.data, **_short(root=(given.root, base.data.root)))
    train = dataclasses.replace(
        given.train, **_short(epochs=(given.epochs, base.train.epochs), seed=(given.seed, base.train.seed))
    )
    config, said = fit_student(
        RunConfig(given.detector, data, train, distill), _given_fields(args), given.train_teacher or None
    )
    if said and _first():
        print(f"student: {'; '.join(said)}")
    return config


def _given_fields(args: Sequence[str]) -> set[str]:
    """Fields of the detector's config that the words set, such as ``camera.simulated_lidar``."""
    words = (word.partition("=")[0].replace("-", "_") for word in args if word.startswith("--detector."))
    return {word.removeprefix("__detector.").replace(".no_", ".") for word in words}


def _short(**pairs: tuple[Any, Any]) -> dict[str, Any]:
    """The short options that were given another value than the preset's."""
    return {name: value for name, (value, default) in pairs.items() if value != default}
