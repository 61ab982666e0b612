"""Reads the sensor files of a nuScenes-format data set; every error names the file and the cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]

REDUCTIONS = (1, 2, 4, 8)
"""Factors by which a JPEG can be made smaller while it is decoded."""

CURE = "unpack that part of the data set again (data/README.md), or write a simulated set anew with `kdlab simulate`"


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        FileNotFoundError: no such file.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing, though the tables name it: {CURE}") from None


def read_image(path: Path, reduce: int = 1, out: Bytes | None = None) -> Bytes:
    """Decode an image file to RGB, uint8 [H, W, 3].

    Args:
        path: a JPEG (or anything that OpenCV reads).
        reduce: 1, 2, 4 or 8: leave out fine detail while decoding, for 1/reduce of the height and width (rounded up).
        out: contiguous array to decode into; where its shape does not fit, the image comes in an array of its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut off or cannot be decoded.
    """
    import cv2

    data = read_bytes(path)
    # OpenCV silently fills the rest of a truncated JPEG with grey. FF D9 ends a JPEG and cannot occur in its pixels.
    cut = data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-64:]
    reduced = (cv2.IMREAD_COLOR, cv2.IMREAD_REDUCED_COLOR_2, cv2.IMREAD_REDUCED_COLOR_4, cv2.IMREAD_REDUCED_COLOR_8)
    flags = reduced[REDUCTIONS.index(reduce)] | cv2.IMREAD_IGNORE_ORIENTATION
    image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data and not cut else None
    if image is None:
        what = "cut off" if cut else "not an image that can be decoded"
        raise ValueError(f"{path} ({len(data)} bytes) is {what}: {CURE}")
    fits = out is not None and out.shape == image.shape
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out if fits else image), np.uint8)


def read_points(path: Path, near: float = 1.0) -> Floats:
    """Read a sweep: float32 [P, 5], x, y, z in the sensor's frame, metres, intensity 0..1 and the ring.

    Points with a value that is not finite are dropped, and those within ``near`` metres of the sensor in both x and y,
    which are returns from the ego vehicle.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the size is no multiple of 20 bytes (five float32).
    """
    data = read_bytes(path)
    if len(data) % 20:
        raise ValueError(f"{path} is cut off: {len(data)} bytes, no multiple of the 20 that a point takes; {CURE}")
    points = np.frombuffer(data, np.float32).reshape(-1, 5)
    finite = np.isfinite(points @ np.ones(5, np.float32))  # A sum is not finite where an entry is not.
    keep = finite & ((np.abs(points[:, 0]) >= near) | (np.abs(points[:, 1]) >= near))
    kept: Floats = points.compress(keep, 0)
    kept[:, 3] /= 255
    return kept
