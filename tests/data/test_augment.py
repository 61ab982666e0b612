"""Augmentation of images and of the ground, exact image loading, depth targets."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_scene import STRONG, scene

from kdlab.config import AugmentConfig
from kdlab.data.augment import ImageTransform, augment_bev, bev_matrix, generator
from kdlab.data.batch import Loader, augment, decode_reduction, depth_targets
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.geometry import points_in_boxes, project, transform, unproject
from kdlab.sample import CAMERAS, Sample


def to_pixels(sample: Sample, points: torch.Tensor, t: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and depths of points of frame t's ego frame in camera n."""
    return project(sample.image_from_camera[t, n], transform(torch.linalg.inv(sample.frame_from_camera[t, n]), points))


@pytest.mark.parametrize("draw", range(6))
@pytest.mark.parametrize("size", [(64, 176), (32, 88), (128, 176)])
def test_a_point_keeps_its_image_content(draw: int, size: tuple[int, int]) -> None:
    sample = scene(frames=2)
    point = torch.tensor([[9.0, 1.5, 0.4]])  # In the key ego frame, seen by the front camera.
    for t in range(2):
        place = transform(torch.linalg.inv(sample.key_from_frame[t]), point)
        u, v = to_pixels(sample, place, t, 0)[0][0]
        rows, columns = torch.arange(90)[:, None] + 0.5, torch.arange(160)[None] + 0.5
        dot = torch.exp(-((rows - v) ** 2 + (columns - u) ** 2) / (2 * 2.0**2)) * 255
        sample.images[t, 0] = dot.round().to(torch.uint8)
    after = augment(sample, STRONG, size, seed=5, draw=draw)
    matrix = after.bev_augmentation
    for t in range(2):
        place = transform(torch.linalg.inv(after.key_from_frame[t]), transform(matrix, point))
        (u, v), depth = (x[0] for x in to_pixels(after, place, t, 0))
        assert 0 < u < size[1] and 0 < v < size[0]
        picture = after.images[t, 0, 0].float()
        total = picture.sum()
        centre = ((picture.sum(0) * (torch.arange(size[1]) + 0.5)).sum() / total,
                  (picture.sum(1) * (torch.arange(size[0]) + 0.5)).sum() / total)  # fmt: skip
        assert abs(centre[0] - u) < 0.25 and abs(centre[1] - v) < 0.25
        before = to_pixels(sample, transform(torch.linalg.inv(sample.key_from_frame[t]), point), t, 0)[1]
        torch.testing.assert_close(depth, before[0], atol=1e-4, rtol=1e-5)


def test_evaluation_fits_the_width_and_cuts_the_top() -> None:
    sample = scene()
    sample.images[..., :45, :] = 200  # The upper half, of which 90 * 0.5 - 32 = 13 of 22.5 rows go.
    after = augment(sample, AugmentConfig.none(), (32, 80), seed=0, draw=3)
    assert after.images.shape == (1, 6, 3, 32, 80) and after.images.movedim(2, -1).is_contiguous()
    grey = after.images[0, 0, 0]
    assert (grey[:9] == 200).all() and (grey[10:] == 0).all()
    expected = torch.tensor([[48.0, 0, 40], [0, 48, 22.5 - 13], [0, 0, 1]])
    torch.testing.assert_close(after.image_from_camera[0, 2], expected)
    assert torch.equal(after.points, sample.points) and torch.equal(after.bev_augmentation, torch.eye(4))
    again = augment(sample, AugmentConfig.none(), (32, 80), seed=9, draw=0)
    assert torch.equal(again.images, after.images)


def test_shrinking_averages() -> None:
    sample = scene(64, 64)
    sample.images[..., ::2] = 200  # Stripes of one pixel: half of their brightness stays.
    for width in (32, 20):
        after = augment(sample, AugmentConfig.none(), (8, width), seed=0, draw=0)
        assert (after.images.float() - 100).abs().max() < 30


def street(height: int, width: int) -> np.ndarray:
    """A picture with detail of every size, uint8 [height, width, 3]."""
    random, picture = np.random.default_rng(0), np.zeros((height, width, 3))
    for size in (1, 4, 16):
        rough = random.normal(size=(height // size + 1, width // size + 1, 3)) * size**0.5
        picture += rough.repeat(size, 0).repeat(size, 1)[:height, :width]
    return np.clip(picture * 20 + 110, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("resized", [(198, 352), (180, 320), (181, 321), (500, 890)])
@pytest.mark.parametrize(("left", "flip"), [(0, False), (9, True), (-5, False)])
def test_exact_resizing_is_pillows(resized: tuple[int, int], left: int, flip: bool) -> None:
    from PIL import Image

    image, size = street(450, 800), (128, 304)
    out = np.empty((*size, 3), np.uint8)
    for top in (-6, 0, resized[0] - 128, resized[0] - 120):
        ImageTransform(resized, left, top, size, flip, 0).apply_exact(image, out)
        expected = Image.fromarray(image).resize(resized[::-1], Image.Resampling.BICUBIC)
        expected = expected.crop((left, top, left + size[1], top + size[0]))
        np.testing.assert_array_equal(out, np.asarray(expected)[:, :: -1 if flip else 1])


def test_exact_resizing_leaves_out_nothing_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    image = street(450, 800)
    changes = [
        ImageTransform((180, 320), 3, 40, (128, 304), flip, a) for flip in (False, True) for a in (0.09, -0.2, 2)
    ]
    out = np.empty((2, len(changes), 128, 304, 3), np.uint8)
    for change, place in zip(changes, out[0], strict=True):
        change.apply_exact(image, place)
    monkeypatch.setattr(ImageTransform, "_unseen", lambda *_: 0)
    for change, place in zip(changes, out[1], strict=True):
        change.apply_exact(image, place)
    np.testing.assert_array_equal(out[0], out[1])


def test_exact_loading_is_the_pipeline_of_bevdet(keyframe_root: Path) -> None:
    from PIL import Image

    dataset, size = NuScenesDataset(keyframe_root, points=False), (256, 704)
    exact = next(Loader(dataset, image_size=size, batch_size=1, exact=True).epoch(0))
    fast = next(Loader(dataset, image_size=size, batch_size=1).epoch(0))
    for n, camera in enumerate(CAMERAS):
        (file,) = (keyframe_root / "samples" / camera).iterdir()
        expected = Image.open(file).resize((704, 396), Image.Resampling.BICUBIC).crop((0, 140, 704, 396))
        np.testing.assert_array_equal(exact.images[0, 0, n].permute(1, 2, 0), np.asarray(expected))
    torch.testing.assert_close(fast.image_from_camera, exact.image_from_camera, atol=1e-3, rtol=1e-5)
    difference = fast.images.int() - exact.images.int()
    assert difference.abs().float().mean() < 1.2 and abs(difference.float().mean()) < 0.2  # Grey levels.


def test_image_transform_by_hand() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    image[1, 2] = 255
    out = np.empty((4, 6, 3), np.uint8)
    for change, place in (
        (ImageTransform((4, 6), 0, 0, (4, 6), False, 0), (1, 2)),
        (ImageTransform((4, 6), 1, -1, (4, 6), False, 0), (2, 1)),
        (ImageTransform((4, 6), 0, 0, (4, 6), True, 0), (1, 3)),
        (ImageTransform((4, 6), 0, 0, (4, 6), False, math.pi), (2, 3)),
    ):
        change.apply(image, out)
        assert np.argwhere(out[..., 0] == 255).tolist() == [list(place)] and out.sum() == 3 * 255
        u, v, _ = change.matrix(4, 6) @ (2.5, 1.5, 1)
        assert (v, u) == pytest.approx((place[0] + 0.5, place[1] + 0.5))


def test_all_frames_of_a_camera_share_their_transform_and_cameras_differ() -> None:
    after = augment(scene(frames=3), STRONG, (64, 176), seed=1, draw=0)
    assert torch.equal(after.image_from_camera[0], after.image_from_camera[2])
    assert len({tuple(m.flatten().tolist()) for m in after.image_from_camera[0]}) == 6


@pytest.mark.parametrize("draw", range(8))
def test_bev_augmentation_keeps_points_in_boxes(draw: int) -> None:
    sample = scene()
    sample.points[:40, :3] = sample.boxes.values[0, :3] + (torch.rand(40, 3) - 0.5) * 2
    matrix = bev_matrix(STRONG, generator(0, draw))
    after = augment_bev(sample, matrix)
    before = points_in_boxes(sample.points, sample.boxes.values)
    assert before.sum() > 10
    assert (points_in_boxes(after.points, after.boxes.values) != before).sum() <= 1
    torch.testing.assert_close(after.lidar_origin, transform(matrix.float(), sample.lidar_origin[None])[0])
    assert torch.equal(after.points[:, 3:], sample.points[:, 3:])
    assert torch.equal(after.global_from_key, sample.global_from_key)
    torch.testing.assert_close(after.bev_augmentation, matrix.float())


@pytest.mark.parametrize("draw", range(8))
def test_bev_augmentation_turns_velocity_with_the_box(draw: int) -> None:
    sample, matrix = scene(), bev_matrix(STRONG, generator(1, draw))
    after = augment_bev(sample, matrix)
    old, new = sample.boxes.values[0], after.boxes.values[0]
    later = transform(matrix.float(), (old[:3] + torch.cat((old[7:9], torch.zeros(1))))[None])[0]
    torch.testing.assert_close(new[7:9], later[:2] - new[:2], atol=1e-4, rtol=1e-4)
    nose = transform(matrix.float(), (old[:3] + torch.stack((old[6].cos(), old[6].sin(), old[0] * 0)))[None])[0]
    angle = torch.atan2(nose[1] - new[1], nose[0] - new[0])
    torch.testing.assert_close(torch.stack((new[6].cos(), new[6].sin())), torch.stack((angle.cos(), angle.sin())))
    scale = matrix[2, 2].float()
    torch.testing.assert_close(new[3:6], old[3:6] * scale)
    assert 0.8 <= scale <= 1.2
    assert after.boxes.velocity_known.tolist() == [True, False]


def test_bev_draws_cover_flips_and_ranges() -> None:
    matrices = [bev_matrix(STRONG, generator(2, draw)) for draw in range(60)]
    assert {float(torch.linalg.det(m).sign()) for m in matrices} == {-1.0, 1.0}
    calm = AugmentConfig(bev_rotate=10, bev_scale=(1, 1), bev_flip=False)
    for m in (bev_matrix(calm, generator(2, draw)) for draw in range(60)):
        assert math.degrees(abs(math.atan2(m[1, 0], m[0, 0]))) <= 10
        torch.testing.assert_close(m @ m.mT, torch.eye(4, dtype=torch.float64))


def test_randomness_depends_on_seed_draw_and_token_only() -> None:
    sample = scene()
    one = augment(sample, STRONG, (32, 88), seed=4, draw=2)
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(one.image_from_camera, augment(sample, STRONG, (32, 88), seed=4, draw=2).image_from_camera)
    for other in (dict(seed=5, draw=2), dict(seed=4, draw=3)):
        changed = augment(sample, STRONG, (32, 88), **other)
        assert not torch.equal(one.bev_augmentation, changed.bev_augmentation)
        assert not torch.equal(one.image_from_camera, changed.image_from_camera)
    renamed = augment(replace(sample, token="x"), STRONG, (32, 88), seed=4, draw=2)
    assert not torch.equal(one.bev_augmentation, renamed.bev_augmentation)
    calm = replace(STRONG, resize=(0, 0), image_flip=False, image_rotate=0)
    still = augment(sample, calm, (32, 88), seed=4, draw=2)
    assert torch.equal(one.bev_augmentation, still.bev_augmentation)  # Independent of the image's ranges.


@pytest.mark.parametrize("config", [AugmentConfig.none(), STRONG])
def test_depth_targets_are_metric_nearest_depths(config: AugmentConfig) -> None:
    plain = scene(96, 160)
    plain.points[:2000, 4] = 0.1  # Past sweeps do not count.
    sample = augment(plain, config, (64, 160), seed=2, draw=1)
    found = depth_targets(sample.points, sample.image_from_camera[0], sample.frame_from_camera[0], (64, 160), 8, 15.0)
    expected = torch.zeros(6, 8, 20)
    for n in range(6):
        own = torch.linalg.inv(plain.frame_from_camera[0, n])
        metric = transform(own, plain.points[:, :3])[:, 2]  # Depth before any augmentation.
        pixels, _ = to_pixels(sample, sample.points[:, :3], 0, n)
        for (u, v), depth, lag in zip(pixels.tolist(), metric.tolist(), sample.points[:, 4].tolist(), strict=True):
            if lag == 0 and 0 < depth < 15 and 0 <= u < 160 and 0 <= v < 64:
                cell = (n, int(v // 8), int(u // 8))
                expected[cell] = depth if expected[cell] == 0 else min(depth, float(expected[cell]))
    assert (found > 0).sum() > 100
    different = (found - expected).abs() > 1e-3
    assert different.sum() <= 2  # Points on a cell's border may fall either way in float32.


def test_depth_targets_without_points_and_with_a_bad_stride() -> None:
    sample = scene()
    cameras = (sample.image_from_camera[0], sample.frame_from_camera[0])
    assert torch.equal(depth_targets(sample.points[:0], *cameras, (64, 160), 8), torch.zeros(6, 8, 20))
    with pytest.raises(ValueError, match="stride 7 does not divide 64 x 160"):
        depth_targets(sample.points, *cameras, (64, 160), 7)


def test_depth_cell_unprojects_to_its_point() -> None:
    sample = augment(scene(), AugmentConfig.none(), (80, 160), seed=0, draw=0)
    sample.points = sample.points[:1].clone()
    sample.points[0, :3] = torch.tensor((12.0, 1, 1))
    cameras = (sample.image_from_camera[0], sample.frame_from_camera[0])
    depth = depth_targets(sample.points, *cameras, (80, 160), 1)
    n, row, column = depth.nonzero()[0].tolist()
    pixel = torch.tensor([[column + 0.5, row + 0.5]])
    back = transform(cameras[1][n], unproject(cameras[0][n], pixel, depth[n, row, column][None]))
    torch.testing.assert_close(back[0], sample.points[0, :3], atol=0.15, rtol=0)


def test_decode_reduction_never_enlarges() -> None:
    none = AugmentConfig.none()
    assert decode_reduction((900, 1600), (256, 704), none) == 2
    assert decode_reduction((900, 1600), (64, 176), none) == 4  # 8 does not divide 900.
    assert decode_reduction((198, 352), (64, 176), none) == 2
    assert decode_reduction((198, 352), (64, 176), AugmentConfig()) == 1
    assert decode_reduction((0, 0), (64, 176), none) == 1
