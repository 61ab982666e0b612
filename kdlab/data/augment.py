"""Augmentation without hidden state: what a sample becomes depends on the seed, the draw and its token alone."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdlab.config import AugmentConfig
from kdlab.data.tables_json import Array
from kdlab.geometry import transform, transform_boxes, yaw_pose
from kdlab.sample import Sample


def generator(seed: int, *names: object) -> np.random.Generator:
    """Random numbers that depend only on the seed and the names."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def augment(
    sample: Sample, config: AugmentConfig, image_size: tuple[int, int], *, seed: int, draw: int, exact: bool = False
) -> Sample:
    """Bring a sample's images to the network's size and augment images and BEV.

    Images and BEV have random streams of their own, so either can be switched off without changing the other. All
    frames of a camera get the same image transform.

    Args:
        sample: as a data set gives it, not augmented before.
        config: ranges; `AugmentConfig.none()` for evaluation.
        image_size: height and width of the network's input, pixels.
        seed: of the run.
        draw: which of a sample's random versions; the epoch, or less where few versions are stored.
        exact: resize images as Pillow does, see `ImageTransform.apply_exact`.
    """
    images = generator(seed, draw, sample.token, "image")
    sample = replace(augment_images(sample, config, image_size, images, exact), draw=draw)
    return augment_bev(sample, bev_matrix(config, generator(seed, draw, sample.token, "bev")))


def bev_matrix(config: AugmentConfig, random: np.random.Generator) -> Tensor:
    """A random similarity of the ego frame, flip x scale x rotation, float64 [4, 4]."""
    turn, scale, flip_x, flip_y = random.random(4)
    degrees = (2 * turn - 1) * config.bev_rotate
    low, high = config.bev_scale
    stretch = torch.eye(4, dtype=torch.float64) * (low + scale * (high - low))
    stretch[3, 3] = 1
    if config.bev_flip:
        stretch[0] *= -1 if flip_x < 0.5 else 1
        stretch[1] *= -1 if flip_y < 0.5 else 1
    matrix: Tensor = stretch @ yaw_pose(math.radians(degrees))
    return matrix


def augment_bev(sample: Sample, matrix: Tensor) -> Sample:
    """Apply a similarity [4, 4] of the ego frame that keeps z up to everything in a sample but ``global_from_key``."""
    if torch.equal(matrix, torch.eye(4, dtype=matrix.dtype)):
        return sample
    single, inverse = matrix.float(), torch.linalg.inv(matrix)
    points = sample.points.clone()
    # `geometry.transform` in three long rows: adding to rows of three is slow.
    points[:, :3] = (single[:3, :3] @ points[:, :3].T + single[:3, 3:]).T
    boxes = replace(sample.boxes, values=transform_boxes(single, sample.boxes.values))
    return replace(
        sample,
        points=points,
        boxes=boxes,
        frame_from_camera=(matrix @ sample.frame_from_camera.double()).float(),
        key_from_frame=(matrix @ sample.key_from_frame.double() @ inverse).float(),
        bev_augmentation=(matrix @ sample.bev_augmentation.double()).float(),
        lidar_origin=transform(single, sample.lidar_origin[None])[0],
    )


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop, flip, rotate: how an image of one camera reaches the network's size.

    Attributes:
        resized: height and width after resizing, pixels.
        left: first column of the crop in the resized image; negative pads with black.
        top: first row of the crop, likewise.
        size: height and width of the crop.
        flip: mirror left and right.
        angle: rotation about the crop's middle, radians, clockwise as seen.
    """

    resized: tuple[int, int]
    left: int
    top: int
    size: tuple[int, int]
    flip: bool
    angle: float

    def matrix(self, height: int, width: int) -> Array:
        """The pixel transform of an image of this height and width, float64 [3, 3]; pixel centres lie at + 1/2."""
        scale = np.array(((self.resized[1] / width, 0, 0), (0, self.resized[0] / height, 0), (0, 0, 1)))
        mirror = np.array(((-1.0, 0, self.size[1]), (0, 1, 0), (0, 0, 1))) if self.flip else np.eye(3)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turn = np.array(((cos, -sin, 0), (sin, cos, 0), (0, 0, 1)))
        middle = self.size[1] / 2, self.size[0] / 2
        about = _shift(*middle) @ turn @ _shift(-middle[0], -middle[1])
        matrix: Array = about @ mirror @ _shift(-self.left, -self.top) @ scale
        return matrix

    def apply(self, image: Array, out: Array) -> None:
        """Transform an image uint8 [H, W, 3] into ``out`` uint8 [*size, 3]; black beyond the image's edge."""
        import cv2

        height, width = image.shape[:2]
        # Bilinear reading would skip pixels where an image shrinks by far: average blocks of pixels first.
        block = int(height / self.resized[0] + 0.25)
        if block > 1:
            small = max(1, width // block), max(1, height // block)
            image = np.asarray(cv2.resize(image, small, interpolation=cv2.INTER_AREA))
        _warp(image, self.matrix(*image.shape[:2]), out)

    def apply_exact(self, image: Array, out: Array) -> None:
        """As `apply`, but resize with Pillow, bicubic and antialiased, before the rest.

        Without rotation these are the very pixels of `Image.resize`, crop and flip, as BEVDet's pipeline takes them; a
        rotation reads the resized image bilinearly.
        """
        from PIL import Image

        height = image.shape[0]
        matrix = self.matrix(*self.resized)
        above = self._unseen(matrix, height)
        image = image[above * height // self.resized[0] :]
        small = Image.fromarray(image).resize((self.resized[1], self.resized[0] - above), Image.Resampling.BICUBIC)
        _warp(np.asarray(small), matrix @ _shift(0, above), out)

    def _unseen(self, matrix: Array, height: int) -> int:
        """Rows at the top of the resized image that need not be made.

        So many that a row of the resized image and one of the image, which is this high, begin together.
        """
        rows, columns = self.size
        corners = np.array(((0, columns, 0, columns), (0, 0, rows, rows), (1, 1, 1, 1)))
        highest = float(np.linalg.solve(matrix, corners)[1].min())
        support = 2 * max(1.0, self.resized[0] / height)  # of the bicubic kernel, rows of the resized image
        step = self.resized[0] // math.gcd(self.resized[0], height)
        return min(max(0, math.floor(highest - support - 1)), self.resized[0] - 1) // step * step


def _shift(x: float, y: float) -> Array:
    return np.array(((1.0, 0, x), (0, 1, y), (0, 0, 1)))


def _warp(image: Array, matrix: Array, out: Array) -> None:
    """Read an image at the places that a pixel transform [3, 3] gives; black beyond its edge."""
    import cv2

    change: Array = _shift(-0.5, -0.5) @ matrix @ _shift(0.5, 0.5)  # OpenCV puts the centre of the first pixel at 0.
    cv2.warpAffine(image, change[:2], out.shape[1::-1], dst=out, flags=cv2.INTER_LINEAR)


def image_transform(
    config: AugmentConfig, source: tuple[int, int], size: tuple[int, int], numbers: Array
) -> ImageTransform:
    """The transform of one camera.

    The image is scaled to fit the width and cut at the top, so that the sky goes. Training draws scale, horizontal
    place, flip and angle.

    Args:
        config: ranges.
        source: height and width of the image, pixels.
        size: height and width that the network takes.
        numbers: four random numbers in [0, 1).
    """
    low, high = config.resize
    scale = size[1] / source[1] * (1 + low + float(numbers[0]) * (high - low))
    resized = max(1, round(source[0] * scale)), max(1, round(source[1] * scale))
    left = round(float(numbers[1]) * (resized[1] - size[1]))
    angle = math.radians((2 * float(numbers[3]) - 1) * config.image_rotate)
    flip = config.image_flip and bool(numbers[2] < 0.5)
    return ImageTransform(resized, left, resized[0] - size[0], size, flip, angle)


def augment_images(
    sample: Sample, config: AugmentConfig, size: tuple[int, int], random: np.random.Generator, exact: bool = False
) -> Sample:
    """Resize, crop, flip and rotate a sample's images, each camera by its own draw, with ``image_from_camera``.

    Colours of the result are last in memory.
    """
    frames, cameras, _, height, width = sample.images.shape
    if cameras == 0:
        return replace(sample, images=sample.images.new_zeros(frames, 0, 3, *size))
    numbers = random.random((cameras, 4))
    source = sample.images.permute(0, 1, 3, 4, 2).contiguous().numpy()  # A data set keeps colours last: no copy.
    out = np.empty((frames, cameras, *size, 3), np.uint8)
    matrices = []
    for n in range(cameras):
        change = image_transform(config, (height, width), size, numbers[n])
        for t in range(frames):
            apply = change.apply_exact if exact else change.apply
            apply(source[t, n], out[t, n])
        matrices.append(change.matrix(height, width))
    image_from_camera = torch.from_numpy(np.stack(matrices)) @ sample.image_from_camera.double()
    images = torch.from_numpy(out).permute(0, 1, 4, 2, 3)
    return replace(sample, images=images, image_from_camera=image_from_camera.float())
