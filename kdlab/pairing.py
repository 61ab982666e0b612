"""Which student, teacher and method go together: told from their configs, before anything is built or trained."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from kdlab.cache import check_cache
from kdlab.checkpoint import RunFolder, load_detector_config, load_run_config, taken_over
from kdlab.config import DetectorConfig, DistillConfig, Modality, RunConfig
from kdlab.distill import Method, TensorPath, build_method, papers, usual_teacher
from kdlab.distill.distiller import agree, check
from kdlab.models.detector import build_detector, channels_of
from kdlab.models.labels import label_channels
from kdlab.presets import distilled


@dataclass(frozen=True)
class Sensors:
    """What a run's data has to hold.

    Attributes:
        images: whether images are read.
        points: whether points are read.
        frames: keyframes of images.
        sweeps: LiDAR sweeps.
    """

    images: bool
    points: bool
    frames: int
    sweeps: int


def sensors_of(config: RunConfig, teacher: RunConfig | None) -> Sensors:
    """The union of what student and teacher see; of more frames than one of them has, it takes the first.

    Raises:
        ValueError: they want one sensor in different forms.
    """
    detectors = [config.detector, *([teacher.detector] if teacher is not None else [])]
    cameras = [d.camera for d in detectors if d.sensors != "lidar"]
    lidars = [d.lidar for d in detectors if d.sensors != "camera"]
    for what, values in (
        ("camera.image_size", {c.image_size for c in cameras}),
        ("lidar.sweeps", {c.sweeps for c in lidars}),
        ("grid.x and grid.y", {(d.grid.x, d.grid.y) for d in detectors}),
    ):
        if len(values) > 1:
            wanted, given = (" and ".join(map(str, values)), config.distill.teacher if config.distill else "")
            raise ValueError(f"student and teacher ({given}) must agree on detector.{what}, which is {wanted}")
    depth = config.detector.modality != "lidar" and config.detector.camera.depth_supervision
    return Sensors(
        bool(cameras),
        bool(lidars) or depth,
        max((c.frames for c in cameras), default=1),
        max((c.sweeps for c in lidars), default=1),
    )


def check_teacher(config: RunConfig) -> None:
    """See that a distillation's teacher is there and fits; nothing to do without one.

    Raises:
        FileNotFoundError: no teacher, or its training has not ended.
        ValueError: none is named, or see `check_pair`.
    """
    if config.distill is None:
        return
    if not config.distill.teacher:
        raise ValueError(
            f"{config.distill.method} needs a teacher: give its run folder with --teacher (distill.teacher in a config)"
        )
    try:
        teacher = load_run_config(config.distill.teacher)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no teacher: {error}") from error
    if not RunFolder(Path(config.distill.teacher)).finished:
        raise FileNotFoundError(
            f"no teacher: the run {config.distill.teacher} is not finished; run its `kdlab train` again to go on"
        )
    check_pair(config, teacher)


def check_camera_start(config: RunConfig) -> None:
    """See that the run that ``train.camera_start`` names is there and fits; nothing to do where it names none.

    Raises:
        FileNotFoundError: no such run, or its training has not ended.
        ValueError: a side has no cameras, or the branches are built differently; the message names the first tensor.
    """
    run = config.train.camera_start
    if not run:
        return
    try:
        other = load_detector_config(run)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"train.camera_start: {error}") from error
    if not RunFolder(Path(run)).finished:
        raise FileNotFoundError(f"train.camera_start: the run {run} is not finished; run its `kdlab train` again")
    with torch.random.fork_rng(devices=[]), init_empty_weights():
        ours, theirs = (build_detector(side, load_pretrained=False).camera for side in (config.detector, other))
    if ours is None or theirs is None:
        raise ValueError(f"train.camera_start: {run if theirs is None else 'the trained detector'} has no cameras")
    held = ours.state_dict()
    for name, value in taken_over(ours, theirs).items():
        if name not in held or held[name].shape != value.shape:
            here = tuple(held[name].shape) if name in held else "missing"
            raise ValueError(
                f"train.camera_start: camera.{name} is {tuple(value.shape)} in {run} and {here} in the detector; "
                "build both camera branches alike"
            )


def check_pair(config: RunConfig, teacher: RunConfig) -> None:
    """See that both sides have what a distillation compares, any pair that has goes; and that its cache is possible.

    Raises:
        ValueError: they want one sensor in different forms, no term is left, a term names a tensor that a side lacks,
            widths or cells differ and no adapter stands between, the student is not built as a quirk says, the teacher
            has not what is copied from it or trained in it, or features cannot be kept.
    """
    sensors_of(config, teacher)
    method = method_for(config, teacher.detector.modality)
    if not method.active:
        raise ValueError(f"{method.name} compares nothing: no term is left that counts; train without a method instead")
    sides = {"student": channels_of(config.detector), "teacher": channels_of(teacher.detector)}
    if method.stages:
        sides["labels"] = label_channels(teacher.detector.bev.stages)
    check(method, sides)
    agree(method, config.detector)
    sought = (_cells_differ, _start_differs, _parts_missing)
    problems = [text for found in sought for text in found(method, config.detector, teacher.detector)]
    if problems:
        raise ValueError("\n".join(problems))
    check_cache(config, method)


def method_for(config: RunConfig, teacher: Modality) -> Method:
    """The method of a distilling run's config for a teacher's modality; errors as `kdlab.distill.build_method`."""
    assert config.distill is not None
    return build_method(config.distill, config.detector.modality, teacher)


def method_of(config: RunConfig, teacher: Modality | None = None) -> Method | None:
    """The method of a run.

    Args:
        config: of the run.
        teacher: sensors of a teacher that is not there yet; the papers' usual ones where left out.

    Raises:
        ValueError: unknown method, option, term or quirk.
    """
    if config.distill is None:
        return None
    try:
        modality = load_run_config(config.distill.teacher).detector.modality
    except FileNotFoundError:
        modality = teacher or usual_teacher(config.distill.method, config.detector.modality)
    return method_for(config, modality)


def distillation(preset: str, method: str, teacher: str) -> DistillConfig:
    """Distillation by a method, or several with + between them, with the preset's scales of each.

    Args:
        preset: a name in `kdlab.presets.PRESETS`.
        method: see `kdlab.distill.papers`.
        teacher: run folder of the teacher.

    Raises:
        ValueError: an unknown method.
    """
    papers(method)
    parts = [distilled(preset, name.strip(), teacher).scales for name in method.split("+")]
    scales = {term: factor for part in parts for term, factor in part.items()}
    return replace(distilled(preset, method, teacher), scales=scales)


def fit_student(
    config: RunConfig, given: Collection[str] = (), teacher: Modality | None = None
) -> tuple[RunConfig, list[str]]:
    """Make a distilled camera student one that its method can be used on, and say what was changed.

    It simulates LiDAR where a term compares ``student.lidar_bev``, be that term switched off or not, so that all runs
    of an ablation have one student; and it is built as the quirks about it say.

    Args:
        config: of the run.
        given: fields of the detector's config that are left alone, such as ``camera.simulated_lidar``.
        teacher: as for `method_of`.

    Raises:
        ValueError: as `method_of`.
    """
    if config.distill is None or config.detector.modality != "camera":
        return config, []
    whole = method_of(replace(config, distill=replace(config.distill, only=(), weights={})), teacher)
    assert whole is not None
    wanted = {q.student: (q.name in whole.on, f"quirk {q.name}") for q in whole.quirks if q.student}
    term = next((t for t in whole.terms if any(p.text == "student.lidar_bev" for p in t.paths)), None)
    if term is not None:
        wanted["camera.simulated_lidar"] = (True, f"term {term.name} of {whole.name}")
    detector, said = config.detector, []
    for name, (value, why) in wanted.items():
        if name not in given and attrgetter(name)(detector) != value:
            detector = _with(detector, name, value)
            said.append(f"detector.{name} is {str(value).lower()}, for {why}")
    return replace(config, detector=detector), said


def _with(value: Any, name: str, new: Any) -> Any:
    first, _, rest = name.partition(".")
    return replace(value, **{first: _with(getattr(value, first), rest, new) if rest else new})


def _cells_differ(method: Method, student: DetectorConfig, teacher: DetectorConfig) -> Iterator[str]:
    adapters = {a.name: a for a in method.adapters}
    for term in method.active:
        if term.teacher is None or (term.adapter and adapters[term.adapter].resize != "no"):
            continue
        ours, theirs = (_cells(path, side) for path, side in ((term.student, student), (term.teacher, teacher)))
        if ours != theirs:
            yield (
                f"{method.name}, term {term.name}: {term.student} has {ours[0]} x {ours[1]} cells and {term.teacher} "
                f"has {theirs[0]} x {theirs[1]}; build both on one grid (detector.grid, detector.bev.stages), or go "
                f"without the term: --weights {term.name} 0"
            )


_SHAPED_BY = {"head.tasks": ("head.channels", "head.branch")}
"""Fields of a detector's config that shape a module which a student may start from."""


def _start_differs(method: Method, student: DetectorConfig, teacher: DetectorConfig) -> Iterator[str]:
    for start in method.start:
        for name in _SHAPED_BY[start.module]:
            ours, theirs = (attrgetter(name)(side) for side in (student, teacher))
            if ours != theirs:
                yield (
                    f"{method.name}: {start.module} cannot be copied from the teacher: detector.{name} is {theirs} "
                    f"there and {ours} in the student; build both alike, or go without the copy: {start.without}"
                )


def _parts_missing(method: Method, _: DetectorConfig, teacher: DetectorConfig) -> Iterator[str]:
    widths = channels_of(teacher)
    there = {"fuser": bool(widths.camera_bev and widths.lidar_bev)}
    for quirk in method.quirks:
        mode = quirk.teacher_mode if quirk.name in method.on else None
        for part in mode.trainable if mode is not None else ():
            if not there[part]:
                yield (
                    f"{method.name}: quirk {quirk.name} trains the teacher's {part}, but this {teacher.modality} "
                    f"teacher has none; flip the quirk: --quirks {quirk.name}"
                )


def _cells(text: str, config: DetectorConfig) -> tuple[int, int]:
    """Rows and columns of a tensor; of the teacher's stages for a label encoder's."""
    path = TensorPath.parse(text)
    if path.name in ("image", "depth"):
        height, width = config.camera.image_size
        return height // config.camera.stride, width // config.camera.stride
    stages, (rows, columns) = config.bev.stages, config.grid.shape
    stride = config.bev.first_stride * 2 ** ((path.index or 0) % len(stages)) if path.name == "stages" else 1
    return math.ceil(rows / stride), math.ceil(columns / stride)
