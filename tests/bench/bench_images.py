"""Six camera images from JPEG to the network's normalised input, against the pipelines of BEVDet (PIL) and mmcv (cv2).

kdlab's side is what training runs: `read_image` or `ImageCache.read`, `augment_images`, `CameraEncoder.normalise`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import timing
import torch
from PIL import Image
from timing import Row, interleaved, row
from torch import Tensor

from kdlab.config import AugmentConfig
from kdlab.data.augment import augment_images, generator
from kdlab.data.batch import decode_reduction
from kdlab.data.files import read_image
from kdlab.data.image_cache import ImageCache
from kdlab.models.camera import IMAGENET_MEAN, IMAGENET_STD, CameraEncoder
from kdlab.sample import Boxes3D, Sample

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
MEAN, STD = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
NUSCENES, SIMULATED = ((900, 1600), (256, 704)), ((198, 352), (64, 176))
PIL, CV2, HALF = "PIL, bicubic (BEVDet)", "cv2, bilinear (mmcv)", "simplejpeg at 1/2, cv2"
NONE = "none"


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Noise with detail of every size, so that a JPEG of it is as large as one of a street."""
    random, picture = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for size in (2, 4, 8, 16, 32, 64, 128, 256):
        rough = random.normal(size=(height // size + 2, width // size + 2, 3)).astype(np.float32)
        picture += cv2.resize(rough, (width, height), interpolation=cv2.INTER_CUBIC) * size**0.5
    return np.clip(picture / picture.std() * 45 + 110, 0, 255).astype(np.uint8)


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for the images; goes at exit."""
    return tempfile.TemporaryDirectory(prefix="kdlab-bench-")


@functools.cache
def files(height: int, width: int) -> list[Path]:
    """Six JPEGs, about 230 KB each at 1600 x 900."""
    folder = Path(scratch().name, f"{height}x{width}")
    folder.mkdir()
    paths = [folder / f"{n}.jpg" for n in range(6)]
    for n, path in enumerate(paths):
        cv2.imwrite(str(path), picture(n, height, width), [cv2.IMWRITE_JPEG_QUALITY, 86])
    return paths


class Rig:
    """The ways from six files to input of one size."""

    def __init__(self, source: tuple[int, int], size: tuple[int, int]) -> None:
        self.files, self.size, self.source = files(*source), size, source
        self.reduce = decode_reduction(source, size, AugmentConfig.none())
        self.resized = round(source[0] * size[1] / source[1]), size[1]
        self.cache = ImageCache(self.files[0].parent / "cache")
        cv2.setNumThreads(1)

    @property
    def shape(self) -> str:
        return f"6 x {self.source[1]}x{self.source[0]} to {self.size[1]}x{self.size[0]}"

    def kdlab(self, exact: bool = False, cached: bool = False) -> Tensor:
        reduce = 1 if exact else self.reduce
        height, width = -(-self.source[0] // reduce), -(-self.source[1] // reduce)
        pixels = np.empty((1, 6, height, width, 3), np.uint8)
        for path, place in zip(self.files, pixels[0], strict=True):
            (self.cache.read if cached else read_image)(path, reduce, place)
        sample = _sample(torch.from_numpy(pixels).movedim(-1, 2))
        sample = augment_images(sample, AugmentConfig.none(), self.size, generator(0), exact)
        return normalise(sample.images[0])

    def pil(self) -> Floats:
        box = (0, self.resized[0] - self.size[0], self.size[1], self.resized[0])
        out = np.empty((6, *self.size, 3), np.float32)
        for path, place in zip(self.files, out, strict=True):
            image = Image.open(path).resize(self.resized[::-1], Image.Resampling.BICUBIC).crop(box)
            np.divide(np.asarray(image, np.float32) - MEAN, STD, out=place)
        return out

    def cv2(self) -> Floats:
        out = np.empty((6, *self.size, 3), np.float32)
        for path, place in zip(self.files, out, strict=True):
            image = cv2.resize(cv2.imread(str(path)), self.resized[::-1])[self.resized[0] - self.size[0] :]
            place[:] = image
            cv2.cvtColor(place, cv2.COLOR_BGR2RGB, dst=place)
            cv2.subtract(place, np.array([IMAGENET_MEAN]), dst=place)  # As mmcv.imnormalize does.
            cv2.multiply(place, 1 / np.array([IMAGENET_STD]), dst=place)
        return out

    def half(self) -> Callable[[], Floats] | None:
        """The least work known of plain calls; None where simplejpeg is not installed."""
        simplejpeg = timing.peer("simplejpeg")
        if simplejpeg is None:
            return None
        table = ((np.arange(256, dtype=np.float32)[:, None] - MEAN) / STD)[None]
        rows = self.size[0] * self.source[1] // (2 * self.size[1])  # of the half image, that the crop shows

        def run() -> Floats:
            out = np.empty((6, *self.size, 3), np.float32)
            for path, place in zip(self.files, out, strict=True):
                least = {"min_height": self.source[0] // 2, "min_width": self.source[1] // 2}
                image = simplejpeg.decode_jpeg(path.read_bytes(), **least)
                cv2.LUT(cv2.resize(image[-rows:], self.size[::-1]), table, dst=place)
            return out

        return run


def _sample(images: Tensor) -> Sample:
    """A sample with nothing but images [1, 6, 3, H, W]."""
    one, none, camera = torch.eye(4), torch.zeros(0, 5), torch.eye(3).expand(1, 6, 3, 3)
    return Sample("", "", 0.0, images, camera, one.expand(1, 6, 4, 4), one[None], torch.zeros(1), none, Boxes3D.empty(),
                  one.double(), one, torch.zeros(3))  # fmt: skip


def normalise(images: Tensor) -> Tensor:
    """As the camera encoder does it, [6, 3, H, W]."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return CameraEncoder.normalise(SimpleNamespace(mean=mean, std=std), images)  # type: ignore[arg-type]


def grey(ours: Tensor, theirs: Floats) -> tuple[float, float]:
    """Mean absolute and mean difference, grey levels."""
    difference = (ours.permute(0, 2, 3, 1).numpy() - theirs) * STD
    return float(np.abs(difference).mean()), float(difference.mean())


def check_pixels(rig: Rig) -> None:
    """Exact is PIL's pipeline bit for bit, cached is uncached bit for bit, fast is close to both peers."""
    np.testing.assert_array_equal(rig.kdlab(exact=True).permute(0, 2, 3, 1).numpy(), rig.pil())
    for exact in (False, True):
        plain = rig.kdlab(exact)
        for _ in range(2):
            assert torch.equal(rig.kdlab(exact, cached=True), plain)
    for theirs in (rig.pil(), rig.cv2()):
        difference, bias = grey(rig.kdlab(), theirs)
        assert difference < 8 and abs(bias) < 0.5, (difference, bias)


def measure(rig: Rig, where: str, targets: tuple[float, float, float] | None) -> list[Row]:
    """Exact, fast and cached against every peer, all in one interleaved run; targets are against PIL."""
    check_pixels(rig)
    half = rig.half() if rig.reduce == 2 else None
    ways = [lambda: rig.kdlab(exact=True), rig.kdlab, lambda: rig.kdlab(cached=True), rig.pil, rig.cv2]
    *ours, pil, mmcv, least = [*interleaved(*ways, *([half] if half else []), rounds=20, seconds=15), None][:6]
    rows = []
    for k, way in enumerate(("exact", "fast", "cached")):
        for name, time in ((PIL, pil), (CV2, mmcv), (HALF, least)):
            if name == HALF and (way == "exact" or rig.source != NUSCENES[0]):
                continue
            measured = row(f"images {way}{where}", rig.shape, ours[k], name, time, 0.0)
            measured["target"] = targets[k] if targets and name == PIL else NONE
            rows.append(measured)
    return rows


def measure_nuscenes() -> list[Row]:
    """The size of nuScenes and of its usual camera detectors."""
    return measure(Rig(*NUSCENES), "", (1.0, 3.0, 6.0))


def measure_simulated() -> list[Row]:
    """The simulated world and the tiny preset: small images gain less."""
    return measure(Rig(*SIMULATED), ", simulated", None)


def measure_all() -> list[Row]:
    """Every row."""
    return [*measure_nuscenes(), *measure_simulated()]


def test_images() -> None:
    for measured in measure_all():
        print("{name:20} {shape:32} {ours_ms:7.2f} ms  {peer:24}".format(**measured), end="  ")
        if measured["ratio"] is None:
            print(measured["note"])
            continue
        print("{peer_ms:7.2f} ms  {ratio:.2f}x".format(**measured))
        assert measured["target"] == NONE or measured["ratio"] >= measured["target"]


def test_jpegs_are_as_large_as_those_of_nuscenes() -> None:
    sizes = [path.stat().st_size for path in files(900, 1600)]
    assert all(210_000 < size < 250_000 for size in sizes)
