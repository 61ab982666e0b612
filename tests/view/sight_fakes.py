"""Pairs of tiny untrained detectors that an Observer looks through, and features without any detector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mini_run import mini_config
from student_kinds import kind
from torch import Tensor

from kdlab.config import DetectorConfig, DistillConfig, RunConfig
from kdlab.distill import Method, build_method
from kdlab.geometry import BEVGrid
from kdlab.models import Detector
from kdlab.models.labels import LabelEncoder
from kdlab.sample import Batch, Boxes3D, Features, Predictions, Sample, TaskPrediction
from kdlab.view.sight import Observer
from kdlab.view.sight.data import Sight

PAIRS = {
    "unidistill": ("BEVDepth", "LiDAR"),
    "distillbev": ("BEVDepth", "LiDAR"),
    "simdistill": ("simulated fusion", "fusion"),
    "labeldistill": ("BEVDepth", "LiDAR"),
}
"""Student and teacher by method, as `student_kinds` names them."""


def config_of(name: str, **bev: Any) -> RunConfig:
    """Run config of a kind of detector."""
    config = mini_config(Path(), "camera")
    detector = kind(config.detector, name)
    return replace(config, detector=replace(detector, bev=replace(detector.bev, **bev)))


def detector(config: DetectorConfig, seed: int) -> Detector:
    """Untrained, its batch norms with statistics of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Detector(config, load_pretrained=False).eval()
        for name, buffer in made.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
        for task in made.head.tasks:
            for parameter in task.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
    return made


def method_of(name: str, student: str, teacher: str) -> Method:
    """A method for a pair."""
    return build_method(DistillConfig(name), config_of(student).detector.modality, config_of(teacher).detector.modality)


def observer_of(name: str | None, student: str = "", teacher: str = "", **teacher_bev: Any) -> Observer:
    """An Observer of a method's pair, or another."""
    usual = PAIRS[name or "unidistill"]
    student, teacher = student or usual[0], teacher or usual[1]
    ours, theirs = config_of(student), config_of(teacher, **teacher_bev)
    taught = detector(theirs.detector, 1)
    method = method_of(name, student, teacher) if name is not None else None
    labels = None
    if method is not None and method.needs_labels:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            labels = LabelEncoder(taught.grid, taught.channels.stages).eval()
    return Observer(taught, detector(ours.detector, 0), method, labels, config=ours)


def features_of(seed: int, size: tuple[int, int], bev: int = 4, stages: tuple[int, ...] = (4, 6)) -> Features:
    """Random features of one sample."""
    g = torch.Generator().manual_seed(seed)

    def rand(channels: int, stride: int = 1) -> Tensor:
        return torch.randn(1, channels, size[0] // stride, size[1] // stride, generator=g)

    empty = (torch.zeros(1, 0, *size),) * 4
    return Features(
        bev=rand(bev),
        stages=tuple(rand(width, 2**i) for i, width in enumerate(stages)),
        predictions=Predictions((TaskPrediction(rand(10), rand(10), *empty),)),
    )


def batch_of(sample: Sample) -> Batch:
    """A batch that pictures without networks can do with."""
    from kdlab.data.batch import collate

    return collate([sample])


def sight_of(sample: Sample, grid: BEVGrid, **given: Any) -> Sight:
    """A sight without networks."""
    return Sight(sample, batch_of(sample), grid, **given)


def without_boxes(sample: Sample) -> Sample:
    """The sample, its annotations gone."""
    return replace(sample, boxes=Boxes3D.empty())
