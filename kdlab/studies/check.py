"""What has to be there before the first trial starts: teachers, data, room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from kdlab.checkpoint import RunFolder
from kdlab.config import RunConfig
from kdlab.data.batch import Loader
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.models import build_detector
from kdlab.pairing import check_camera_start, check_teacher
from kdlab.studies.plan import Study, Trial
from kdlab.studies.worlds import world_ready

BOX_BYTES = 350
"""Of one detection in a result file."""

CHECKPOINTS = 8
"""More checkpoints than this are not on the disk at once; one is three times the weights."""


def check(study: Study, todo: Sequence[Trial]) -> None:
    """See that every trial can start.

    Args:
        study: the study.
        todo: its trials that are not finished.

    Raises:
        FileNotFoundError: a teacher, a camera start or a data set is missing, or one of the runs is not finished.
        ValueError: a teacher or a split does not fit.
        OSError: too little room on the disk.
    """
    for trial in todo:
        try:
            folder = RunFolder(trial.folder)
            if not folder.finished:
                check_teacher(trial.config)
            if not (folder.finished or folder.checkpoint.exists()):
                check_camera_start(trial.config)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{trial.change}: {error}") from error
    written = [trial for trial in todo if trial.world is None or world_ready(trial.config.data.root, trial.world)]
    total_steps(written)
    _check_disk(study, todo, written)


def total_steps(trials: Sequence[Trial]) -> dict[Path, int]:
    """Steps of each trial's whole training, by its folder.

    Raises:
        FileNotFoundError: no data set at a trial's root.
        ValueError: it lacks a split, or the split is smaller than a batch.
    """
    epoch: dict[tuple[object, ...], int] = {}
    for trial in trials:
        data, batch = trial.config.data, trial.config.train.batch_size
        key = _epoch_key(trial)
        if key not in epoch:
            _dataset(trial, trial.split)
            train = _dataset(trial, data.train)
            loader = Loader(train, image_size=(32, 32), batch_size=batch, cbgs=data.cbgs, drop_last=True)
            epoch[key] = loader.steps_per_epoch
    return {trial.folder: epoch[_epoch_key(trial)] * trial.config.train.epochs for trial in trials}


def _epoch_key(trial: Trial) -> tuple[object, ...]:
    data = trial.config.data
    return data.root, data.version, data.train, data.cbgs, trial.config.train.batch_size


def _dataset(trial: Trial, split: str) -> NuScenesDataset:
    data = trial.config.data
    return NuScenesDataset(data.root, data.version, split, images=False, points=False)


def _check_disk(study: Study, todo: Sequence[Trial], written: Sequence[Trial]) -> None:
    """See that weights, results, checkpoints and worlds will fit, roughly: all runs taken to be like the first."""
    if not todo:
        return
    first, root = todo[0], Path(study.base.data.root)
    weights = _weight_bytes(first.config)
    samples = len(_dataset(first, first.split)) if first in written else 0
    need = len(todo) * (weights + samples * first.config.detector.head.max_detections * BOX_BYTES)
    need += 3 * weights * min(len(todo), CHECKPOINTS)
    worlds = {trial.config.data.root for trial in todo} - {trial.config.data.root for trial in written}
    if worlds:
        files = (file for part in ("samples", "sweeps") for file in (root / part).rglob("*"))
        need += len(worlds) * sum(os.path.getsize(file) for file in files if file.is_file())
    place = study.out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need > free:
        raise OSError(
            f"{study.out}: {len(todo)} runs and {len(worlds)} worlds want about {need / 1e9:.1f} GB of disk, "
            f"{free / 1e9:.1f} GB are free; free some, or give another --out"
        )


def _weight_bytes(config: RunConfig) -> int:
    with torch.random.fork_rng(devices=[]):
        detector = build_detector(config.detector, load_pretrained=False)
    return sum(value.nbytes for value in detector.state_dict().values())
