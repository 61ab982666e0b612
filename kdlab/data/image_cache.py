"""Decoded images kept on disk: from the second epoch on, a file's pixels are read, not decoded.

One file per image, as raw pixels. They are read straight into the sample's array; mapping them into memory was measured
and saves nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import struct
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kdlab.data.files import CURE, Bytes, read_image

RESERVE = 2**30
"""Bytes of disk space that the cache leaves free."""

STALE = 24 * 3600
"""Age in seconds at which an unfinished file counts as left behind by a process that was killed."""

_HEADER = struct.Struct("<8s4q24x")  # magic, size and time of the source, height, width; 64 bytes
_MAGIC = b"kdlab\0\0\1"
_log = logging.getLogger(__name__)


class ImageCache:
    """Images by file and reduction; the pixels are those of `read_image`.

    Any number of processes may share a folder: an entry appears whole or not at all, and the first to need it writes
    it. An entry whose source has changed, or that was cut off, is written anew. Where the folder cannot be written,
    what is in it is used and the rest decoded.

    Args:
        folder: made where it does not exist; may be deleted at any time.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser()
        self._writable = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error.strerror or str(error))
            return
        if not self.folder.stat().st_mode & 0o222 or not os.access(self.folder, os.W_OK):
            self._give_up("it is read-only")

    def read(self, path: Path, reduce: int = 1, out: Bytes | None = None) -> Bytes:
        """An image as `read_image` gives it, from the cache where it holds it.

        Raises:
            FileNotFoundError: no such file, even where the cache holds its image.
            ValueError: the file is cut off or cannot be decoded.
        """
        try:
            source = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{path} is missing, though the tables name it: {CURE}") from None
        place, stamp = self._place(path, reduce), (source.st_size, source.st_mtime_ns)
        image = _load(place, stamp, out)
        if image is None:
            image = read_image(path, reduce, out)
            if self._writable:
                self._store(place, stamp, image)
        return image

    def reserve(self, paths: Iterable[Path], reduce: int, size: tuple[int, int]) -> str:
        """Make sure that the images of these files fit on the disk; removes what killed processes left half written.

        Args:
            paths: of the sources.
            reduce: as in `read`.
            size: height and width of an image at 1/reduce, pixels.

        Returns:
            How much is still to be written, in one line; empty where it is nothing.

        Raises:
            ValueError: there is not enough disk space.
        """
        folders = [entry.path for entry in os.scandir(self.folder) if entry.is_dir()] if self._writable else []
        held = {f"{folder}/{name}" for folder in folders for name in os.listdir(folder)}
        for part in (place for place in held if place.endswith(".part")):
            with contextlib.suppress(OSError):  # Its writer, or another process, was faster.
                if os.stat(part).st_mtime < time.time() - STALE:
                    os.unlink(part)
        places = {self._place(path, reduce) for path in paths} if self._writable else set()
        images = len(places - held)
        if not images:
            return ""
        needed, free = images * (_HEADER.size + size[0] * size[1] * 3), shutil.disk_usage(self.folder).free
        what = f"image cache {self.folder}: {images} images of {size[0]} x {size[1]} pixels, {_size(needed)}"
        if needed > free - RESERVE:
            raise ValueError(
                f"{what} are to be stored, but only {_size(free)} are free there, of which {_size(RESERVE)} "
                'stay so: name a folder on a larger disk, or set data.image_cache to "" and decode every time'
            )
        return f"{what} to store"

    def _place(self, path: Path, reduce: int) -> str:
        name = hashlib.blake2b(f"{reduce} {os.path.abspath(path)}".encode(), digest_size=16).hexdigest()
        return f"{self.folder}/{name[:2]}/{name[2:]}.raw"

    def _store(self, place: str, stamp: tuple[int, int], image: Bytes) -> None:
        part = f"{place}.{secrets.token_hex(4)}.part"
        try:
            if shutil.disk_usage(self.folder).free < RESERVE + image.nbytes:
                self._give_up(f"its disk has less than {_size(RESERVE)} left")
                return
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with open(part, "wb") as file:
                file.write(_HEADER.pack(_MAGIC, *stamp, *image.shape[:2]))
                file.write(image.data)
            os.replace(part, place)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(part)
            self._give_up(error.strerror or str(error))

    def _give_up(self, why: str) -> None:
        self._writable = False
        _log.warning("image cache %s is not written to (%s): what is not in it is decoded every time", self.folder, why)


def _load(place: str, stamp: tuple[int, int], out: Bytes | None) -> Bytes | None:
    """The pixels of an entry, in ``out`` where they fit; None where there is no whole entry of this stamp."""
    try:
        with open(place, "rb", buffering=0) as file:
            magic, *found, height, width = _HEADER.unpack(file.read(_HEADER.size))
            shape, length = (height, width, 3), height * width * 3
            if (magic, *found) != (_MAGIC, *stamp) or os.fstat(file.fileno()).st_size != _HEADER.size + length:
                return None
            image = out if out is not None and out.shape == shape else np.empty(shape, np.uint8)
            return image if file.readinto(image.data.cast("B")) == length else None
    except (OSError, struct.error):
        return None


def _size(number: int) -> str:
    if number < 1e9:
        return f"{number / 1e6:.1f} MB"
    return f"{number / 1e9:.1f} GB"
