"""Run a trained detector on one sample and keep everything: what pictures are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kdlab.checkpoint import load_detector, load_run_config
from kdlab.config import AugmentConfig, RunConfig
from kdlab.data.augment import augment
from kdlab.data.batch import collate
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.models import Detector
from kdlab.precision import autocast
from kdlab.sample import Batch, Detections, Features, Sample, to_device


@dataclass
class Look:
    """One sample as one detector sees it; everything is on the CPU.

    Attributes:
        sample: images at their stored size, points of the detector's sweeps, annotations.
        batch: the sample alone, images at the network's size; a camera detector was given ``batch.images_only()``.
        features: every stage.
        detections: final boxes, best first.
        config: of the detector's run.
    """

    sample: Sample
    batch: Batch
    features: Features
    detections: Detections
    config: RunConfig


@torch.no_grad()
def look_with(detector: Detector, config: RunConfig, dataset: NuScenesDataset, index: int = 0) -> Look:
    """Run a detector on one sample.

    Args:
        detector: in eval mode, on any device.
        config: of its run.
        dataset: opened with images and points, and with the detector's numbers of frames and sweeps.
        index: place of the sample in the data set.
    """
    device = next(detector.parameters()).device
    sample = dataset.load(index)
    size, exact = config.detector.camera.image_size, config.data.images == "exact"
    batch = collate([augment(sample, AugmentConfig.none(), size, seed=0, draw=0, exact=exact)])
    given = batch.images_only() if config.detector.sensors == "camera" else batch
    with autocast(device, config.train.precision):
        features = detector(given.to(device))
    found = detector.predict(features)[0]
    return Look(sample, batch, to_device(features, "cpu", False), to_device(found, "cpu", False), config)


def look(
    run: Path | str,
    root: Path | str | None = None,
    split: str | None = None,
    index: int = 0,
    *,
    version: str | None = None,
    device: str | None = None,
) -> Look:
    """Run a finished run's detector on one sample of a split.

    Args:
        run: run folder or shipped weights.
        root: data set; the run's own where left out.
        split: the run's validation split where left out.
        index: place of the sample in the split; negative counts from the end.
        version: version folder; inferred where there is a single one.
        device: CUDA where there is one, else the CPU.

    Raises:
        FileNotFoundError: no such run or data set.
        ValueError: no such split.
        IndexError: no such sample.
    """
    config = load_run_config(run)
    data, camera, lidar = config.data, config.detector.camera, config.detector.lidar
    if root is None:
        root, version = data.root, data.version
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dataset = NuScenesDataset(root, version, split or data.val, frames=camera.frames, sweeps=lidar.sweeps)
    return look_with(load_detector(run, device), config, dataset, index)
