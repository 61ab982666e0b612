"""The cache of decoded images: the same pixels, whatever happens to its files."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from mini_set import HEIGHT, WIDTH, write_mini_set

from kdlab.config import AugmentConfig
from kdlab.data import image_cache
from kdlab.data.batch import Loader
from kdlab.data.files import read_image
from kdlab.data.image_cache import ImageCache
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.sample import CAMERAS

IMAGES = 6 * len(CAMERAS)  # of the mini set
Usage = namedtuple("Usage", ("total", "used", "free"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_set(tmp_path_factory.mktemp("mini") / "set")


@pytest.fixture
def image(root: Path, tmp_path: Path) -> Path:
    """An image of its own that a test may change."""
    return Path(shutil.copy(sorted(root.rglob("*.jpg"))[0], tmp_path / "image.jpg"))


def entries(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("decoded though the cache holds the image")

    monkeypatch.setattr(image_cache, "read_image", fail)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig.none()])
def test_batches_are_those_without_a_cache(root: Path, tmp_path: Path, workers: int, config: AugmentConfig) -> None:
    def images(folder: Path | str) -> list[torch.Tensor]:
        dataset = NuScenesDataset(root, frames=2, points=False, image_cache=folder)
        loader = Loader(dataset, image_size=(16, 40), augment=config, batch_size=2, workers=workers)
        found = [batch.images for epoch in (0, 0) for batch in loader.epoch(epoch)]
        loader.close()
        return found

    plain, cached = images(""), images(tmp_path)
    assert len(plain) == len(cached) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))
    assert len(entries(tmp_path)) == IMAGES


def test_a_second_reading_decodes_nothing(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ImageCache(tmp_path / "cache")
    first = {reduce: cache.read(image, reduce) for reduce in (1, 2, 4)}
    no_decoding(monkeypatch)
    for reduce, pixels in first.items():
        np.testing.assert_array_equal(pixels, read_image(image, reduce))
        out = np.empty_like(pixels)
        assert ImageCache(tmp_path / "cache").read(image, reduce, out) is out
        np.testing.assert_array_equal(out, pixels)
        other = np.zeros((3, 3, 3), np.uint8)
        np.testing.assert_array_equal(cache.read(image, reduce, other), pixels)
        assert not other.any()
    with pytest.raises(AssertionError, match="decoded"):
        cache.read(image, 8)


def test_a_changed_source_is_read_again(image: Path, tmp_path: Path) -> None:
    import cv2

    cache = ImageCache(tmp_path / "cache")
    cache.read(image)
    cv2.imwrite(str(image), np.full((HEIGHT, WIDTH, 3), 77, np.uint8))
    assert (cache.read(image) == 77).all() and len(entries(tmp_path / "cache")) == 1
    os.utime(image, ns=(1, 1))
    before = entries(tmp_path / "cache")[0].read_bytes()
    cache.read(image)
    assert entries(tmp_path / "cache")[0].read_bytes() != before  # Its header holds the new time.


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "empty", "folder"])
def test_damaged_entries_are_written_anew(
    image: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ImageCache(tmp_path / "cache")
    expected = cache.read(image)
    (entry,) = entries(tmp_path / "cache")
    whole = entry.read_bytes()
    if damage == "folder":
        shutil.rmtree(entry.parent)
    else:
        bad = {"cut": whole[:-1], "longer": whole + b"x", "header": b"y" + whole[1:], "empty": b""}
        entry.write_bytes(bad[damage])
    np.testing.assert_array_equal(cache.read(image), expected)
    assert [p.read_bytes() for p in entries(tmp_path / "cache")] == [whole]
    no_decoding(monkeypatch)
    np.testing.assert_array_equal(cache.read(image), expected)


def test_processes_may_race(root: Path, tmp_path: Path) -> None:
    script = f"""
import hashlib
from pathlib import Path
from kdlab.data.image_cache import ImageCache
cache, files = ImageCache({str(tmp_path)!r}), sorted(Path({str(root)!r}).rglob("*.jpg"))
print(hashlib.sha256(b"".join(cache.read(f, r).tobytes() for _ in range(2) for r in (2, 1) for f in files)).hexdigest())
"""
    racing = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {process.communicate(timeout=120)[0] for process in racing}
    assert len(found) == 1 and len(found.pop()) == 65
    assert len(entries(tmp_path)) == 2 * IMAGES and {p.suffix for p in entries(tmp_path)} == {".raw"}


def test_errors_are_those_without_a_cache(image: Path, tmp_path: Path) -> None:
    cache = ImageCache(tmp_path / "cache")
    data = image.read_bytes()
    image.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"image\.jpg .*cut off.*kdlab simulate"):
        cache.read(image)
    assert not entries(tmp_path / "cache")
    image.write_bytes(data)
    cache.read(image)
    image.unlink()
    with pytest.raises(FileNotFoundError, match=r"image\.jpg is missing.*data/README"):
        cache.read(image)


def test_a_read_only_folder_is_used_and_named_once(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    NuScenesDataset(root, points=False, image_cache=folder)[0]
    held = entries(folder)
    folder.chmod(0o555)
    try:
        dataset = NuScenesDataset(root, points=False, image_cache=folder)
        list(Loader(dataset, image_size=(HEIGHT, WIDTH), batch_size=2).epoch(0))
    finally:
        folder.chmod(0o755)
    assert entries(folder) == held and len(held) == len(CAMERAS)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert f"image cache {folder} is not written to (it is read-only)" in caplog.text
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_made(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ImageCache(image / "cache")
    np.testing.assert_array_equal(cache.read(image), read_image(image))
    assert cache.reserve([image], 1, (HEIGHT, WIDTH)) == "" and len(caplog.records) == 1


def test_unfinished_files_of_killed_processes_go(image: Path, tmp_path: Path) -> None:
    cache = ImageCache(tmp_path / "cache")
    cache.read(image)
    (entry,) = entries(tmp_path / "cache")
    old, new = (entry.with_name(f"{entry.name}.{name}.part") for name in ("old", "new"))
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    os.utime(entry, (0, 0))
    assert cache.reserve([image], 1, (HEIGHT, WIDTH)) == ""
    assert entry.exists() and new.exists() and not old.exists()


def test_the_size_is_told_once(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for expected in (IMAGES, 3 * len(CAMERAS), 0):
        dataset = NuScenesDataset(root, split="all", points=False, image_cache=tmp_path)
        loader = Loader(dataset, image_size=(HEIGHT // 2, WIDTH // 2), batch_size=1)
        told = [record.getMessage() for record in caplog.records]
        caplog.clear()
        if expected:
            size = f"{expected} images of {HEIGHT // 2} x {WIDTH // 2} pixels, "
            assert len(told) == 1 and told[0].startswith(f"image cache {tmp_path}: {size}")
            assert told[0].endswith(" MB to store")
        else:
            assert not told
        for step, _ in enumerate(loader.epoch(0)):
            if step == 2 and expected == IMAGES:
                break


def test_a_disk_that_is_too_small(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = NuScenesDataset(root, points=False, image_cache=tmp_path)
    needed = IMAGES * (64 + HEIGHT * WIDTH * 3)
    free = image_cache.RESERVE + needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    Loader(dataset, image_size=(HEIGHT, WIDTH), batch_size=2)
    free -= 1
    message = r"36 images of 56 x 96 pixels, 0\.6 MB are to be stored, but only 1\.1 GB are free.*a larger disk, or"
    with pytest.raises(ValueError, match=message):
        Loader(dataset, image_size=(HEIGHT, WIDTH), batch_size=2)


def test_a_disk_that_fills_up_later(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = NuScenesDataset(root, points=False, image_cache=tmp_path)
    dataset[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, image_cache.RESERVE))
    expected = NuScenesDataset(root, points=False)[1].images
    assert torch.equal(dataset[1].images, expected) and torch.equal(dataset[1].images, expected)
    assert len(entries(tmp_path)) == len(CAMERAS) and len(caplog.records) == 1
    assert "its disk has less than 1.1 GB left" in caplog.text


def test_a_failed_write_leaves_nothing_behind(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cache = ImageCache(tmp_path / "cache")
    monkeypatch.setattr(os, "replace", fail)
    np.testing.assert_array_equal(cache.read(image), read_image(image))
    assert not entries(tmp_path / "cache") and "No space left on device" in caplog.text


def test_images_of_two_sizes(root: Path, tmp_path: Path) -> None:
    import cv2

    copy = Path(shutil.copytree(root, tmp_path / "set"))
    image = sorted((copy / "samples/CAM_BACK").glob("*.jpg"))[0]
    cv2.imwrite(str(image), np.zeros((20, 30, 3), np.uint8))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{image.name} and .*differ in size: 20 x 30 and {HEIGHT} x {WIDTH}"):
            NuScenesDataset(copy, image_cache=tmp_path / "cache")[0]


def test_no_cache_without_images(root: Path, tmp_path: Path) -> None:
    dataset = NuScenesDataset(root, images=False, image_cache=tmp_path / "cache")
    assert len(dataset[0].points) and not (tmp_path / "cache").exists() and dataset.prepare(1) == ""


def test_config_fields() -> None:
    from kdlab.config import DataConfig, from_dict, to_dict

    config = DataConfig(images="exact", image_cache="somewhere")
    assert from_dict(DataConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert (DataConfig().images, DataConfig().image_cache) == ("fast", "")
    with pytest.raises(ValueError, match=r"DataConfig\.images: 'quick' is not one of 'fast', 'exact'"):
        from_dict(DataConfig, {"images": "quick"})
