from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kdlab.models import build_detector
from kdlab.presets import tiny
from kdlab.sample import Sample
from kdlab.view.sight.look import look_with


class OneSample:
    """As much of a data set as a look needs."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def load(self, index: int, reduce: int = 1) -> Sample:
        return self.sample


@pytest.mark.parametrize("modality", ["lidar", "camera"])
def test_a_detector_sees_only_its_sensor(modality: Any, sampler: Callable[..., Sample]) -> None:
    sample = sampler()
    config = tiny(modality)
    config = replace(config, train=replace(config.train, precision="fp32"))
    torch.manual_seed(0)
    detector = build_detector(config.detector).eval()
    seen = look_with(detector, config, OneSample(sample))  # type: ignore[arg-type]
    assert seen.sample is sample
    assert seen.batch.images.shape[-2:] == config.detector.camera.image_size
    assert (seen.features.lidar_bev is None) == (modality == "camera")
    assert not seen.features.bev.requires_grad
    blind = replace(sample, points=torch.zeros(0, 5), boxes=sample.boxes[:0])
    other = look_with(detector, config, OneSample(blind))  # type: ignore[arg-type]
    assert torch.equal(seen.features.bev, other.features.bev) == (modality == "camera")
