"""Augmentation, depth targets, collation, order and loader."""

import hashlib
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mini_set import HEIGHT, WIDTH, write_mini_set

from kdlab.config import AugmentConfig
from kdlab.data.augment import ImageTransform, augment_bev, bev_matrix, generator
from kdlab.data.batch import Loader, augment, balanced_order, collate, decode_reduction, depth_targets
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.geometry import points_in_boxes, pose, project, transform, unproject
from kdlab.sample import CAMERAS, Batch, Boxes3D, Sample

STRONG = AugmentConfig(resize=(-0.1, 0.3), image_rotate=10, bev_rotate=90, bev_scale=(0.8, 1.2))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_set(tmp_path_factory.mktemp("mini") / "set")


def scene(height: int = 90, width: int = 160, frames: int = 1) -> Sample:
    """A made-up sample: black images, six cameras, a few boxes and points in and around them."""
    random = torch.Generator().manual_seed(3)
    walker = [-8, -6, 0.8, 0.7, 0.6, 1.8, -2, math.nan, math.nan]
    values = torch.tensor([[10.0, 4, 1, 4.5, 1.9, 1.6, 0.5, 3, 1], walker])
    points = torch.rand(4000, 5, generator=random) - torch.tensor((0.5, 0.5, 0, 0, 0))
    points = points * torch.tensor((40, 40, 3, 1, 0))
    image_from_camera = torch.tensor([[width * 0.6, 0, width / 2], [0, width * 0.6, height / 2], [0, 0, 1]])
    optical = torch.tensor([[0.0, 0, 1, 1], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
    cameras = torch.stack([pose((math.cos(a / 2), 0, 0, math.sin(a / 2)), (0, 0, 0)).float() @ optical
                           for a in torch.arange(0, -6, -math.pi / 3).tolist()])  # fmt: skip
    past = pose((1, 0, 0, 0.05), (-3, 0.5, 0)).float()
    return Sample(
        token="token",
        scene="scene",
        timestamp=0.0,
        images=torch.zeros(frames, 6, 3, height, width, dtype=torch.uint8),
        image_from_camera=image_from_camera.expand(frames, 6, 3, 3).clone(),
        frame_from_camera=cameras.expand(frames, 6, 4, 4).clone(),
        key_from_frame=torch.stack([torch.eye(4)] + [past] * (frames - 1)),
        frame_times=torch.arange(frames) * 0.5,
        points=points,
        boxes=Boxes3D.make(values, torch.tensor((0, 8))),
        global_from_key=torch.eye(4, dtype=torch.float64),
        bev_augmentation=torch.eye(4),
        lidar_origin=torch.tensor((0.9, 0.0, 1.84)),
    )


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


def test_collate(root: Path) -> None:
    dataset = NuScenesDataset(root, sweeps=2, frames=2)
    samples = [dataset[i] for i in (1, 3, 5)]
    samples[1].points = samples[1].points[:0]
    batch = collate(samples, depth_stride=8)
    assert batch.size == 3 and batch.tokens == [s.token for s in samples]
    assert batch.images.shape == (3, 2, 6, 3, HEIGHT, WIDTH)
    assert batch.depth is not None and batch.depth.shape == (3, 6, HEIGHT // 8, WIDTH // 8)
    assert batch.depth[0].max() > 5 and batch.depth[1].max() == 0
    assert [(batch.point_batch == b).sum().item() for b in range(3)] == [len(s.points) for s in samples]
    assert batch.boxes.valid.tolist() == [[True, False], [True, True], [False, False]]
    assert batch.boxes.values[1, 1, 7:].isnan().all()  # Unknown velocities stay unknown.
    assert collate(samples).depth is None


def test_collate_errors(root: Path) -> None:
    with pytest.raises(ValueError, match="no samples"):
        collate([])
    with pytest.raises(ValueError, match=r"differ in shape.*augment\(\) first"):
        collate([scene(90, 160), scene(80, 160)])
    with pytest.raises(ValueError, match="depth targets need images"):
        collate([NuScenesDataset(root, images=False)[0]], depth_stride=8)


def loader(root: Path, **options: object) -> Loader:
    dataset = NuScenesDataset(root, sweeps=2)
    settings = {"image_size": (32, 88), "augment": STRONG, "batch_size": 2, "shuffle": True, "depth_stride": 8}
    return Loader(dataset, **(settings | options))  # type: ignore[arg-type]


def assert_same(a: Batch, b: Batch) -> None:
    assert a.tokens == b.tokens
    names = ("images", "image_from_camera", "frame_from_camera", "key_from_frame", "points", "point_batch", "depth")
    for name in (*names, "global_from_key", "bev_augmentation"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.boxes.values.nan_to_num(-1), b.boxes.values.nan_to_num(-1))


@pytest.mark.parametrize(
    ("config", "frames", "pixels", "sums"),
    [
        (STRONG, 1, "9aa8963edf6acd18", (6442.57626, 268.918882, 24.0, 43666.2894, 1808.61273)),
        (AugmentConfig.none(), 2, "7d7aa21b1163ee76", (11602.2857, 518.376991, 74.6785648, 42714.2923, 2176.16073)),
    ],
)
def test_batches_stay_what_they_were(
    root: Path, config: AugmentConfig, frames: int, pixels: str, sums: tuple[float, ...]
) -> None:
    """Against numbers stored when loading was last made faster: runs before and after then see the same."""
    import cv2

    dataset = NuScenesDataset(root, sweeps=2, frames=frames)
    batches = list(
        Loader(dataset, image_size=(32, 88), augment=config, batch_size=2, shuffle=True, depth_stride=8).epoch(0)
    )
    names = ("image_from_camera", "frame_from_camera", "key_from_frame", "points", "depth")
    found = [sum(getattr(b, name).double().abs().sum().item() for b in batches) for name in names]
    assert found == pytest.approx(sums, rel=1e-6)
    assert all(b.images.movedim(3, -1).is_contiguous() for b in batches)  # As the network reads them: no copy.
    if cv2.__version__ == "4.11.0":  # Others may write the set's JPEGs otherwise.
        digest = hashlib.sha256(b"".join(b.images.contiguous().numpy().tobytes() for b in batches))
        assert digest.hexdigest()[:16] == pixels


def test_resume_in_mid_epoch_whatever_the_workers(root: Path) -> None:
    whole = [list(loader(root).epoch(e)) for e in range(2)]
    assert [len(e) for e in whole] == [3, 3]
    assert [b.tokens for b in whole[0]] != [b.tokens for b in whole[1]]
    busy, state = loader(root, workers=2), torch.get_rng_state()
    for epoch, start in ((1, 1), (0, 2), (1, 0), (0, 3)):  # Workers stay from epoch to epoch.
        rest = list(busy.epoch(epoch, start))
        assert len(rest) == 3 - start
        for batch, expected in zip(rest, whole[epoch][start:], strict=True):
            assert_same(batch, expected)
    assert torch.equal(torch.get_rng_state(), state)
    busy.close()


def test_ctrl_c_ends_the_workers(root: Path) -> None:
    script = f"""
import multiprocessing, os, signal, threading
from kdlab.data.batch import Loader
from kdlab.data.nuscenes import NuScenesDataset
loader = Loader(NuScenesDataset({str(root)!r}), image_size=(32, 88), batch_size=2, workers=2)
try:
    for step in range(10000):
        for batch in loader.epoch(step):
            if step == 1:  # As a terminal does: the whole group is interrupted.
                os.killpg(0, signal.SIGINT)
except KeyboardInterrupt:
    children = multiprocessing.active_children()
    loader.close()
    print("stopped", len(children), len(multiprocessing.active_children()))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert done.stdout.split() == ["stopped", "2", "0"], done.stderr
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_an_abandoned_epoch_does_not_leak_into_the_next(root: Path) -> None:
    busy, calm = loader(root, workers=1), loader(root)
    old = busy.epoch(0)
    assert_same(next(old), next(calm.epoch(0)))
    for batch, expected in zip(busy.epoch(1), calm.epoch(1), strict=True):
        assert_same(batch, expected)
    with pytest.raises(RuntimeError, match="a newer epoch has begun"):
        next(old)
    busy.close()


def test_ranks_share_the_global_batch(root: Path) -> None:
    whole = list(loader(root, batch_size=4).epoch(0))
    ranks = [list(loader(root, batch_size=4, rank=r, world=2).epoch(0)) for r in range(2)]
    assert [b.size for b in whole] == [4, 2] and [[b.size for b in r] for r in ranks] == [[2, 1], [2, 1]]
    for step, batch in enumerate(whole):
        assert sorted(batch.tokens) == sorted(ranks[0][step].tokens + ranks[1][step].tokens)
        assert torch.equal(batch.images[0], ranks[0][step].images[0])
        assert torch.equal(batch.images[1], ranks[1][step].images[0])


def test_drop_last_and_draws(root: Path) -> None:
    short = loader(root, batch_size=4, drop_last=True)
    assert len(short) == 1 and [b.size for b in short.epoch(0)] == [4]
    repeated = loader(root, draws=2, shuffle=False, batch_size=6)
    first, second, third = (next(repeated.epoch(e)) for e in range(3))
    assert_same(first, third)
    assert not torch.equal(first.bev_augmentation, second.bev_augmentation)
    assert [repeated.draw(e) for e in range(4)] == [0, 1, 0, 1]


@pytest.mark.gpu
def test_pinned_batches_keep_their_layout(root: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pinned = loader(root, workers=1, pin_memory=True)
    for batch, expected in zip(pinned.epoch(0), loader(root).epoch(0), strict=True):
        assert batch.images.is_pinned() and batch.points.is_pinned() and batch.boxes.values.is_pinned()
        assert batch.images.stride() == expected.images.stride()
        assert_same(batch, expected)
    pinned.close()


def test_evaluation_order_and_camera_only(root: Path) -> None:
    dataset = NuScenesDataset(root, points=False)
    batches = list(Loader(dataset, image_size=(32, 88), batch_size=4).epoch(0))
    assert [t for b in batches for t in b.tokens] == dataset.tokens
    assert batches[0].points.shape == (0, 5) and batches[0].depth is None
    lidar = next(Loader(NuScenesDataset(root, images=False), image_size=(32, 88), batch_size=2).epoch(0))
    assert lidar.images.shape == (2, 1, 0, 3, 32, 88) and len(lidar.points) > 0


def test_loader_errors(root: Path) -> None:
    dataset = NuScenesDataset(root, points=False)
    for options, message in (
        ({"batch_size": 3, "world": 2}, "batch_size 3 must be a multiple of world 2"),
        ({"batch_size": 2, "world": 2, "rank": 2}, "rank 2 below it"),
        ({"batch_size": 2, "draws": 0}, "draws must be at least 1"),
        ({"batch_size": 2, "depth_stride": 8}, "images=True and points=True"),
        ({"batch_size": 7, "drop_last": True}, "6 samples give no batch of 7"),
    ):
        with pytest.raises(ValueError, match=message):
            Loader(dataset, image_size=(32, 88), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"start_step 4 is not in 0\.\.3"):
        loader(root).epoch(0, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_files_keep_their_message(root: Path, tmp_path: Path, workers: int) -> None:
    import shutil

    copy = shutil.copytree(root, tmp_path / "set")
    file = sorted((copy / "samples" / CAMERAS[0]).iterdir())[0]
    file.write_bytes(file.read_bytes()[:200])
    broken = loader(copy, workers=workers)
    for _ in range(2):  # The workers live on.
        with pytest.raises(ValueError, match=r"is cut off") as caught:
            list(broken.epoch(0))
        assert str(caught.value).startswith(f"{file} (200 bytes)") and "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(FileNotFoundError) as missing:
        list(broken.epoch(0))
    assert str(missing.value).startswith(f"{file} is missing") and "\n" not in str(missing.value)
    broken.close()


def test_class_balance() -> None:
    presence = np.zeros((100, 10), bool)
    presence[:90, 0] = presence[90:, 8] = presence[:5, 3] = True
    order = balanced_order(presence, generator(0, "x"))
    assert len(order) == 3 * (105 // 3)
    counts = np.bincount(order, minlength=100)
    assert counts[90:].sum() == 35 and counts[:5].sum() >= 35  # Rare classes get as many draws as cars.
    assert len(balanced_order(np.zeros((4, 10), bool), generator(0))) == 0


def test_class_balanced_loader_is_deterministic(root: Path) -> None:
    balanced = loader(root, cbgs=True)
    assert balanced.steps_per_epoch == 3 and balanced.order(0).tolist() == loader(root, cbgs=True).order(0).tolist()
    assert any(balanced.order(0).tolist() != balanced.order(e).tolist() for e in range(1, 4))
    tokens = [t for b in balanced.epoch(0) for t in b.tokens]
    assert tokens == [balanced.dataset.tokens[i] for i in balanced.order(0)]  # type: ignore[attr-defined]


def test_decode_reduction_never_enlarges() -> None:
    none = AugmentConfig.none()
    assert decode_reduction((900, 1600), (256, 704), none) == 2
    assert decode_reduction((900, 1600), (64, 176), none) == 4  # 8 does not divide 900.
    assert decode_reduction((198, 352), (64, 176), none) == 2
    assert decode_reduction((198, 352), (64, 176), AugmentConfig()) == 1
    assert decode_reduction((0, 0), (64, 176), none) == 1
