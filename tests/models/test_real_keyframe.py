"""On a real nuScenes keyframe: pixels lifted at the depth that LiDAR measured land where LiDAR saw something."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdlab.config import AugmentConfig
from kdlab.data.augment import augment
from kdlab.data.batch import collate
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.models import build_detector
from kdlab.models.lift import Frustum, lift_index, splat
from kdlab.presets import tiny


@pytest.mark.parametrize("config", [AugmentConfig.none(), AugmentConfig()], ids=["plain", "augmented"])
def test_true_depths_lift_to_where_the_points_are(keyframe_root: Path, config: AugmentConfig) -> None:
    detector = dataclasses.replace(tiny("camera").detector, z=(-1.0, 3.0))
    camera, grid = detector.camera, detector.grid
    sample = augment(NuScenesDataset(keyframe_root)[0], config, camera.image_size, seed=1, draw=0)
    batch = collate([sample], depth_stride=camera.stride)
    depth, bins = batch.depth, (1.0, 41.0, 0.25)
    frustum = Frustum(depth.shape[-2:], camera.stride, bins)
    points = frustum.points(batch.image_from_camera[:, 0], batch.frame_from_camera[:, 0])
    known = (depth >= bins[0]) & (depth < bins[1])
    index = ((depth - bins[0]) / bins[2]).long().clamp(0, frustum.bins - 1)
    weights = F.one_hot(index, frustum.bins).float() * known.unsqueeze(-1)
    lifted = splat(
        known[0].float().unsqueeze(1), weights[0].permute(0, 3, 1, 2), lift_index(points, grid, detector.z), 1, grid
    )
    column, row, inside = grid.locate(batch.points[:, :2])
    inside &= (batch.points[:, 2] >= detector.z[0]) & (batch.points[:, 2] < detector.z[1])
    occupied = torch.zeros(1, 1, *grid.shape)
    occupied[0, 0, row[inside], column[inside]] = 1
    near = F.max_pool2d(occupied, 3, 1, 1)
    assert known.sum() > 300 and lifted.sum() > 200
    assert float((lifted * near).sum() / lifted.sum()) > 0.95  # a feature cell is 8 pixels wide: one cell of slack


@pytest.mark.parametrize("modality", ["lidar", "camera", "fusion"])
def test_a_detector_reads_the_keyframe(keyframe_root: Path, modality: str) -> None:
    config = tiny(modality).detector
    sample = augment(NuScenesDataset(keyframe_root)[0], AugmentConfig.none(), config.camera.image_size, seed=0, draw=0)
    batch = collate([sample], depth_stride=config.camera.stride)
    detector = build_detector(config)
    features = detector(batch)
    losses = detector.loss(features, batch)
    assert all(value.isfinite() and float(value.detach()) > 0 for value in losses.values())
    assert len(detector.predict(features)) == 1
