"""A study as data: a base run, changes, seeds; and the trials that it expands to."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kdlab.checkpoint import RunFolder, deciding, load_run_config
from kdlab.config import DetectorConfig, RunConfig, from_dict, to_dict
from kdlab.data.simulate_config import SimulationConfig
from kdlab.distill import papers
from kdlab.pairing import distillation, fit_student, method_of
from kdlab.presets import PRESETS
from kdlab.presets.paper import leaves
from kdlab.studies.worlds import WORLDS, changed_world

BASE = "base"
"""Name of the change that changes nothing."""

SIMULATION = "simulation."
"""Keys with this in front are knobs of the simulated world."""

NO_METHOD = "none"
"""Value of ``distill.method`` that takes the base's distillation away."""

Mode = Literal["each-off", "each-alone", "subsets"]
"""Which changes are made of a method's terms, see `kdlab.studies.terms.term_changes`."""

_OPEN = [["distill", part] for part in ("weights", "scales", "options")]
"""Where a config takes any key."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Change:
    """What one line of a study does to the base.

    Attributes:
        name: also the name of its folder.
        set: values by dotted key of RunConfig (``distill.weights.feature``), or ``simulation.KEY`` for a knob of the
            simulated world. Empty for the base.
        base: name of the change that this one is judged against; where values are set, they are set on the study's base
            all the same.
    """

    name: str
    set: Mapping[str, Any]
    base: str = BASE


@dataclass(frozen=True)
class Terms:
    """The changes of a study that are made of a method's terms.

    Attributes:
        mode: which changes.
        method: name of the method; the base's where empty.
        teacher: run folder of the teacher; the base's where empty.
        terms: names; all of the method where empty.
    """

    mode: Mode = "each-off"
    method: str = ""
    teacher: str = ""
    terms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A base, the changes to compare with it, and the seeds to do it with.

    Attributes:
        name: of the study.
        base: config of the base; its seed does not count.
        changes: one after the other; the base itself need not be listed.
        seeds: each change is trained once with each.
        split: that the runs are scored on.
        out: the study's folder.
        cpu: train and score on the CPU although there is a GPU.
        terms: what made some of the changes; says which terms Shapley shares are of.

    Raises:
        ValueError: no seeds or one twice, two changes of one name, a name that cannot be a folder's, a change to be
            judged against one that is not there or against itself.
    """

    name: str
    base: RunConfig
    changes: tuple[Change, ...]
    seeds: tuple[int, ...]
    split: str
    out: Path
    cpu: bool = False
    terms: Terms | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds: a study wants at least one")
        _once("seeds", self.seeds)
        _once("changes", [change.name for change in self.changes])
        for name in (self.name, *(change.name for change in self.changes)):
            if not _NAME.fullmatch(name) or name == WORLDS:
                raise ValueError(
                    f"name {name!r}: take letters, digits and . _ + -, with a letter or digit in front; not {WORLDS!r}"
                )
        for change in self.changes:
            if change.name == BASE and change.set:
                raise ValueError(f"changes.{BASE}: that name is the unchanged base's; take another")
            if "train.seed" in change.set:
                raise ValueError(f"changes.{change.name}: train.seed comes from the study's seeds")
            others = [BASE, *(c.name for c in self.changes if c.name != change.name)]
            if change.base not in others:
                raise ValueError(f"changes.{change.name}: base {change.base!r} is not one of {', '.join(others)}")

    def trials(self) -> tuple[Trial, ...]:
        """See `expand`."""
        return expand(self)


@dataclass(frozen=True)
class Trial:
    """One training of a study and its evaluation.

    Attributes:
        change: name of the change.
        seed: of the training.
        config: of the run.
        folder: the run folder.
        split: that the run is scored on.
        command: the words that train it.
        evaluation: the words that score it.
        world: the simulated world that the study writes for it, into ``config.data.root``.
    """

    change: str
    seed: int
    config: RunConfig
    folder: Path
    split: str
    command: tuple[str, ...]
    evaluation: tuple[str, ...]
    world: SimulationConfig | None = None

    @property
    def name(self) -> str:
        """Change and seed."""
        return f"{self.change} seed {self.seed}"


def expand(study: Study) -> tuple[Trial, ...]:
    """The trials of a study, all changes of the first seed first.

    A trial's folder is STUDY/CHANGE/seedSEED-HASH, by a hash of its config: an edited study makes new runs and keeps
    the old ones apart. Trials of equal config have one folder, be it one that an earlier form of the study made, or an
    earlier kdlab, whose configs lacked keys that have taken a default since: the hash only names new folders.

    Raises:
        FileNotFoundError: a world's knob, and no data set at the base's root.
        ValueError: a change that does not fit the base, or whose student its method made another than that of the
            change that it is judged against; the message names change and key.
    """
    changes = study.changes if any(c.name == BASE for c in study.changes) else (Change(BASE, {}), *study.changes)
    configs = []
    for change in changes:
        try:
            configs.append(apply(change.set, study.base, study.out))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"changes.{change.name}: {error}") from error
    _same_students({change.name: (change, config) for change, (config, _) in zip(changes, configs, strict=True)})
    there = _stored(study.out)
    homes: dict[str, Path] = {}
    trials = []
    for seed in study.seeds:
        for change, (config, world) in zip(changes, configs, strict=True):
            seeded = replace(config, train=replace(config.train, seed=seed))
            name = f"seed{seed}-{trial_hash(seeded, world)}"
            folder = homes.get(name) or _home(study.out, change.name, name, _core(seeded), there)
            homes[name] = folder
            trials.append(_trial(study, change.name, seeded, folder, world))
    return tuple(trials)


def differing(ours: DetectorConfig, theirs: DetectorConfig) -> dict[str, Any]:
    """Fields in which a detector is not as another, by dotted key of RunConfig, with its own values."""
    other = leaves(theirs)
    return {f"detector.{name}": value for name, value in leaves(ours).items() if value != other[name]}


def _same_students(changes: Mapping[str, tuple[Change, RunConfig]]) -> None:
    """Refuse comparisons of two students that differ in what nobody asked for: what `apply` fitted to the methods."""
    for change, ours in changes.values():
        reference, theirs = changes[change.base]
        asked = {*change.set, *reference.set, *_quirks_asked((change, ours), (reference, theirs))}
        for name, value in differing(ours.detector, theirs.detector).items():
            if not any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for key in asked):
                raise ValueError(
                    f"changes.{change.name}: the student has {name} {json.dumps(value)}, that of {reference.name!r}, "
                    "which it is judged against, has not, only because their methods want them so; add a change that "
                    f"sets {name} alone, and give its name as base"
                )


def _quirks_asked(*pair: tuple[Change, RunConfig]) -> set[str]:
    """Fields of the student by the quirks that one of two changes names, where both are of one method."""
    if len({config.distill.method if config.distill is not None else "" for _, config in pair}) > 1:
        return set()
    named = {quirk for change, _ in pair for quirk in change.set.get("distill.quirks", ())}
    methods = (method_of(config) for _, config in pair)
    return {f"detector.{q.student}" for m in methods if m is not None for q in m.quirks if q.name in named}


def unique(trials: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """The first trial of each folder: what has to run."""
    first: dict[Path, Trial] = {}
    for trial in trials:
        first.setdefault(trial.folder, trial)
    return tuple(first.values())


def _home(out: Path, change: str, name: str, core: RunConfig, there: Mapping[Path, RunConfig | None]) -> Path:
    """The folder that holds this config already, a finished one first; else a new one."""
    same = [run for run, stored in there.items() if (stored == core if stored is not None else run.name == name)]
    own = out / change / name
    return min(same, key=lambda run: (not RunFolder(run).finished, run.parent != own.parent, run != own), default=own)


def _stored(out: Path) -> dict[Path, RunConfig | None]:
    """What decides the numbers of the runs in a study's folder; None where there is no config that can be read."""
    found: dict[Path, RunConfig | None] = {}
    for run in sorted(out.glob("*/seed*-*")):
        try:
            found[run] = _core(load_run_config(run))
        except (OSError, ValueError):
            found[run] = None
    return found


def _core(config: RunConfig) -> RunConfig:
    """A config with what does not decide a run's numbers as by default; a study's world is known by its digest."""
    plain = deciding(config)
    root = Path(config.data.root)
    if root.parent.name == WORLDS and re.fullmatch("[0-9a-f]+", root.name):
        plain["data"]["root"] = f"world {root.name}"
    return from_dict(RunConfig, plain)


def _trial(study: Study, change: str, config: RunConfig, folder: Path, world: SimulationConfig | None) -> Trial:
    cpu = ("--cpu",) if study.cpu else ()
    train = ("kdlab", "train", str(folder / "config.json"), "--out", str(folder), *cpu)
    evaluate = ("kdlab", "evaluate", "--run", str(folder), "--split", study.split)
    workers = ("--workers", str(config.data.workers))
    return Trial(change, config.train.seed, config, folder, study.split, train, (*evaluate, *workers, *cpu), world)


def trial_hash(config: RunConfig, world: SimulationConfig | None = None) -> str:
    """Eight hexadecimal digits of what decides a run's numbers.

    Args:
        config: of the run; keys that may change when a run goes on do not count.
        world: the simulated world in ``config.data.root``, which counts in place of the folder's name.
    """
    plain = deciding(config)
    if world is not None:
        plain["data"]["root"] = f"world {world.digest()}"
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def apply(values: Mapping[str, Any], base: RunConfig, out: Path = Path()) -> tuple[RunConfig, SimulationConfig | None]:
    """The config of a changed run, and the world that it needs where a knob of the world is turned.

    ``distill.method`` on a base without that method starts from the preset's scales for it. Where the values are about
    the distillation, a camera student is built as the method and its quirks want it, but for fields of the detector
    that the values name.

    Args:
        values: by dotted key, see `Change`.
        base: the config to change.
        out: the study's folder, where worlds go.

    Raises:
        FileNotFoundError: a world's knob, and no data set at the root.
        ValueError: unknown key, method, term or quirk, a value of the wrong type, a root that is not simulated.
    """
    knobs = {key.removeprefix(SIMULATION): value for key, value in values.items() if key.startswith(SIMULATION)}
    distill = {key: value for key, value in values.items() if key.startswith("distill.")}
    config = _put(base, {k: v for k, v in values.items() if k not in distill and not k.startswith(SIMULATION)})
    if distill:
        given = [key.removeprefix("detector.") for key in values if key.startswith("detector.")]
        config = fit_student(_distilled(config, distill), given)[0]
    method_of(config)
    if not knobs:
        return config, None
    world, root = changed_world(config.data, knobs, out)
    return replace(config, data=replace(config.data, root=root, version=None)) if world else config, world


def _put(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    plain = to_dict(config)
    for key, value in values.items():
        *sections, name = key.split(".")
        place: Any = plain
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ValueError(f"unknown key {key!r}")
        if name not in place and sections not in _OPEN:
            raise ValueError(f"unknown key {key!r}; known in {'.'.join(sections) or 'a run'}: {', '.join(place)}")
        place[name] = value
    return from_dict(RunConfig, plain)


def _distilled(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    rest = dict(values)
    method = rest.pop("distill.method", None)
    if method == NO_METHOD:
        config = replace(config, distill=None)
    elif method is not None and (config.distill is None or config.distill.method != method):
        try:
            papers(method)
        except ValueError as error:
            raise ValueError(f"distill.method: {error}, or {NO_METHOD}") from error
        teacher = config.distill.teacher if config.distill is not None else ""
        config = replace(config, distill=distillation(_preset(config.detector), method, teacher))
    if rest and config.distill is None:
        raise ValueError(f"{next(iter(rest))}: this run has no distillation; set distill.method beside it")
    return _put(config, rest)


def _preset(detector: DetectorConfig) -> str:
    """The preset whose BEV widths these are, which is what scales depend on; empty for others."""
    return next((name for name, make in PRESETS.items() if make(detector.modality).detector.bev == detector.bev), "")


def _once(what: str, values: Any) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{what}: {value!r} is there twice")
        seen.add(value)
