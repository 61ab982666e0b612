"""Collation, order and loader."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_scene import STRONG, scene
from mini_set import HEIGHT, WIDTH, write_mini_set

from kdlab.config import AugmentConfig
from kdlab.data.augment import generator
from kdlab.data.batch import Loader, balanced_order, collate
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.sample import CAMERAS, Batch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_set(tmp_path_factory.mktemp("mini") / "set")


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
