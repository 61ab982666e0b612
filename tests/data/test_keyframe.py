"""One real nuScenes keyframe: boxes hold the points that the tables count, LiDAR and images agree."""

from pathlib import Path

import pytest
import torch

from kdlab.config import AugmentConfig
from kdlab.data.batch import Loader, augment, collate
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.geometry import points_in_boxes, project, transform
from kdlab.sample import CLASSES, Sample


@pytest.fixture(scope="module")
def sample(keyframe_root: Path) -> Sample:
    return NuScenesDataset(keyframe_root, split="keyframe")[0]


def test_content(sample: Sample) -> None:
    assert sample.scene == "scene-0061" and sample.images.shape == (1, 6, 3, 900, 1600)
    assert len(sample.boxes) == 65 and 20_000 < len(sample.points) < 36_000
    counts = torch.bincount(sample.boxes.labels, minlength=10)
    assert counts[CLASSES.index("pedestrian")] > 20 and counts[CLASSES.index("barrier")] > 10
    assert sample.points[:, 3].min() >= 0 and sample.points[:, 3].max() <= 1
    assert not sample.boxes.velocity_known.any()  # A single keyframe has no neighbours.


def test_boxes_hold_the_points_of_the_tables(sample: Sample) -> None:
    """The tables were counted before rounding and without the cut around the sensor: nearly all counts are equal."""
    counted = points_in_boxes(sample.points, sample.boxes.values).sum(0)
    difference = (counted - sample.boxes.points).abs()
    assert (difference == 0).float().mean() >= 0.9
    assert (difference <= 2 + 0.05 * sample.boxes.points).all()


def test_the_ground_is_at_zero(sample: Sample) -> None:
    near = sample.points[sample.points[:, :2].norm(dim=1) < 15]
    assert abs(near[near[:, 2] < 0.5, 2].median()) < 0.15
    assert abs(sample.lidar_origin[2] - 1.84) < 0.01
    bottoms = sample.boxes.values[:, 2] - sample.boxes.values[:, 5] / 2
    assert abs(bottoms[sample.boxes.values[:, :2].norm(dim=1) < 20].median()) < 0.4


def test_cameras_look_where_their_names_say(sample: Sample) -> None:
    axes = sample.frame_from_camera[0, :, :2, 2]
    degrees = torch.rad2deg(torch.atan2(axes[:, 1], axes[:, 0]))
    expected = torch.tensor((0.0, -55, -110, 180, 110, 55))
    assert (((degrees - expected + 180) % 360 - 180).abs() < 5).all()


def test_boxes_are_seen_by_some_camera(sample: Sample) -> None:
    centres = sample.boxes.values[:, :3]
    seen = torch.zeros(len(centres), dtype=torch.bool)
    for n in range(6):
        camera = transform(torch.linalg.inv(sample.frame_from_camera[0, n]), centres)
        (pixels, depth) = project(sample.image_from_camera[0, n], camera)
        seen |= (depth > 0) & (pixels >= 0).all(-1) & (pixels < torch.tensor((1600, 900))).all(-1)
    assert seen.float().mean() >= 0.95


@pytest.mark.parametrize("config", [AugmentConfig.none(), AugmentConfig()])
def test_batch(keyframe_root: Path, config: AugmentConfig) -> None:
    dataset = NuScenesDataset(keyframe_root)
    loader = Loader(dataset, image_size=(64, 176), batch_size=1, augment=config, depth_stride=8)
    batch = next(loader.epoch(0))
    assert batch.images.shape == (1, 1, 6, 3, 64, 176) and batch.depth is not None
    assert (batch.depth > 0).float().mean() > 0.9 and 2 < batch.depth[batch.depth > 0].median() < 30
    counted = points_in_boxes(batch.points, batch.boxes.values[0]).sum(0)
    assert ((counted - batch.boxes.points[0]).abs() <= 2 + 0.05 * batch.boxes.points[0]).all()


def test_reduced_decoding_is_close_to_full(sample: Sample, keyframe_root: Path) -> None:
    fast = NuScenesDataset(keyframe_root).load(0, 4)
    size, none = (64, 176), AugmentConfig.none()
    full, fast = augment(sample, none, size, seed=0, draw=0), augment(fast, none, size, seed=0, draw=0)
    torch.testing.assert_close(full.image_from_camera, fast.image_from_camera, atol=1e-3, rtol=1e-5)
    assert (full.images.float() - fast.images.float()).abs().mean() < 2.0
    assert collate([full, fast]).images.shape[0] == 2


@pytest.mark.parametrize(("size", "bound"), [((256, 704), 1.0), ((64, 176), 2.5)])
def test_fast_images_are_close_to_exact(keyframe_root: Path, size: tuple[int, int], bound: float) -> None:
    dataset = NuScenesDataset(keyframe_root)
    exact, fast = (next(Loader(dataset, image_size=size, batch_size=1, exact=e).epoch(0)).images for e in (True, False))
    difference = (exact.float() - fast.float()).abs().mean()
    assert 0 < difference < bound, difference
