"""Features of frozen networks kept on disk: made once per sample and draw, read ever after, also by other runs.

A file per sample and draw holds the tensors that the runs' terms name, channels last. bfloat16 stays as it is. float32
becomes float16 (relative error at most 2**-11, absolute 2**-25); it stays float32 where a value is greater than 65504,
and in heat maps, since terms ask whether a score is above a threshold. What a run sees is always the stored form, also
in the step that makes it: so a kill changes nothing, and to that tolerance it does not matter which run made an entry
(another batch size may round otherwise).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kdlab.checkpoint import versions, write_json
from kdlab.config import RunConfig, to_dict
from kdlab.distill import Distiller, Method, TensorPath
from kdlab.distill.distiller import cacheable
from kdlab.precision import autocast, resolve
from kdlab.sample import Batch, Features

RESERVE = 2**30
"""Bytes of disk space that stay free."""
STALE = 24 * 3600
"""Age in seconds at which an unfinished file counts as left behind by a process that was killed."""
_DATA = ("augment", "batch", "files", "image_cache", "nuscenes", "tables", "tables_json")
_FORMAT = 1  # raise it when entries of before must not be read any more
_CODE = ("models/*.py", "geometry.py", "sample.py", "precision.py", *(f"data/{name}.py" for name in _DATA))
_log = logging.getLogger(__name__)

Key = tuple[str, int]
"""Sample token and draw."""


def check_cache(config: RunConfig, method: Method) -> None:
    """See that a run's features may be kept, where it asks for it.

    Raises:
        ValueError: every epoch shows new versions of the samples, or a quirk makes features depend on more than the
            sample.
    """
    if config.distill is None or not config.distill.cache:
        return
    if config.data.draws < 1:
        raise ValueError(
            "distill.cache keeps features of augmented samples, but data.draws is 0: every epoch shows new ones; "
            "give a number of versions, such as --data.draws 4, or leave the cache out"
        )
    if not cacheable(method):
        on = ", ".join(sorted(q.name for q in method.quirks if q.teacher_mode is not None and q.name in method.on))
        raise ValueError(
            f"distill.cache cannot keep features of {method.name}: they depend on the batch or change with the "
            f"training (quirks on: {on}); flip these, or leave the cache out"
        )


@dataclass(frozen=True)
class Side:
    """One frozen network.

    Attributes:
        name: ``teacher`` or ``labels``.
        paths: what the terms name of it, as stored (``stages[1]``), by path (``teacher.stages[-1]``).
        identity: all that its features depend on beside sample and draw.
    """

    name: str
    paths: Mapping[str, str]
    identity: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Its entries' folder."""
        text = json.dumps(self.identity, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@functools.cache
def code_digest() -> str:
    """Identity of the code between a data set's files and a frozen network's features, hexadecimal."""
    digest = hashlib.sha256()
    for pattern in _CODE:
        for path in sorted(Path(__file__).parent.glob(pattern)):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def sides(config: RunConfig, distiller: Distiller, data: str, device: torch.device) -> list[Side]:
    """The frozen networks that a run's terms name.

    What a network does not see is no part of its identity: a LiDAR teacher's features are the same whatever happens to
    the images, and a label encoder's whatever the sensors.

    Args:
        config: of the run.
        distiller: with teacher and label encoder.
        data: digest of the data set.
        device: where they run.
    """
    augment = to_dict(config.data.augment)
    common = {
        "format": _FORMAT,
        "kdlab": versions()["kdlab"],
        "code": code_digest(),
        "device": device.type,
        "data": data,
        "seed": config.train.seed,
        "precision": resolve(config.train.precision, device),
        **{key: value for key, value in augment.items() if key.startswith("bev_")},
    }
    found = []
    for name, network in distiller.frozen.items():
        paths = distiller.paths(name)
        if not paths:
            continue
        detector = getattr(network, "config", None)
        identity = {**common, "weights": weights_digest(network)}
        if detector is None:
            identity |= {"grid": to_dict(distiller.grid), "quirks": sorted(distiller.method.on)}
        else:
            identity["detector"] = to_dict(detector)
            if detector.sensors != "lidar":
                identity |= {**augment, "images": config.data.images}
        stages = len(getattr(network, "channels").stages)  # noqa: B009 - nn.Module knows no such attribute
        named = {text: stored for path in paths for text, stored in _stored_names(path, stages)}
        found.append(Side(name, named, identity))
    return found


def _stored_names(path: TensorPath, stages: int) -> Iterable[tuple[str, str]]:
    if path.name == "predictions" and not path.part:
        return [(f"{path.text}.{part}", f"predictions.{part}") for part in ("heatmap", "regression")]
    if path.name == "stages" and path.index is not None:
        return [(path.text, f"stages[{path.index % stages}]")]
    return [(path.text, path.text.partition(".")[2])]


def weights_digest(network: nn.Module) -> str:
    """Identity of a network's weights, hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value.detach().cpu().contiguous()))
    return digest.hexdigest()


class FeatureCache:
    """Features by sample and draw; any number of processes may share a folder.

    An entry appears whole or not at all. One that is damaged is removed, and made again like one that is missing; one
    that lacks a tensor of this run's terms is written again with it. Where nothing can be written any more, the
    networks run for what is not there.

    Args:
        folder: made where it does not exist; may be deleted between runs.
        sides: the networks.
    """

    def __init__(self, folder: Path | str, sides: Sequence[Side]) -> None:
        self.folder, self.sides = Path(folder).expanduser(), tuple(sides)
        self._writable = True

    def read(self, tokens: Sequence[str], draws: Sequence[int]) -> dict[str, Tensor]:
        """The tensors [B, ...] of some samples by path; see `kdlab.data.batch.Stored`.

        Raises:
            ValueError: an entry is missing, incomplete or damaged.
        """
        found: dict[str, Tensor] = {}
        keys = list(zip(tokens, draws, strict=True))
        for side in self.sides:
            wanted = set(side.paths.values())
            entries = {key: self._load(side, key, wanted) for key in keys}
            for key, entry in entries.items():
                if not entry.keys() >= wanted:
                    raise ValueError(
                        f"{self._place(side, key)}: this entry of the feature cache is gone or damaged; run the same "
                        "command again, which makes it anew"
                    )
            found |= _joined(side, [entries[key] for key in keys])
        return found

    def fill(self, batch: Batch, run: Callable[[str, Batch], Features]) -> Batch:
        """The batch with its stored tensors; a network runs, and entries are written, where one lacks something.

        Args:
            batch: on the networks' device.
            run: runs a network, by its side's name, on a batch.
        """
        if batch.stored or not self.sides:
            return batch
        found: dict[str, Tensor] = {}
        keys = list(zip(batch.tokens, batch.draws, strict=True))
        for side in self.sides:
            wanted = set(side.paths.values())
            entries = {key: self._load(side, key, wanted) for key in keys}
            if any(not entry.keys() >= wanted for entry in entries.values()):
                # All rows, though some are there: a row's last bits may depend on how many there are.
                made = _compact(side, run(side.name, batch))
                for row, key in enumerate(keys):
                    if not entries[key].keys() >= wanted:
                        kept = self._load(side, key)
                        entries[key] = {name: _stored(name, value[row]) for name, value in made.items()} | kept
                        self._store(side, key, entries[key])
            found |= _joined(side, [entries[key] for key in keys])
        device = batch.boxes.values.device
        batch.stored = {path: value.to(device, non_blocking=True) for path, value in found.items()}
        return batch

    def missing(self, keys: Sequence[Key]) -> int:
        """How many entries of these samples and draws are missing or lack a tensor, over all networks."""
        return sum(self._lacking(side, keys) for side in self.sides)

    def _lacking(self, side: Side, keys: Sequence[Key]) -> int:
        return sum(not self._names(side, key) >= set(side.paths.values()) for key in keys)

    def prepare(self, keys: Sequence[Key], entry: Callable[[], Mapping[str, int]]) -> tuple[bool, str]:
        """Make sure, before a training, that its entries can be stored.

        Args:
            keys: what the training shows.
            entry: measures the bytes of one sample's entries by network.

        Returns:
            Whether all is there already, and one line for the user.

        Raises:
            ValueError: the folder cannot be written, or there is not enough disk space.
        """
        lacking = {side.name: self._lacking(side, keys) for side in self.sides}
        count, missing = len(keys) * len(self.sides), sum(lacking.values())
        what = f"feature cache {self.folder}: {count - missing} of {count} entries are there"
        if not missing:
            return True, f"{what}; the teacher is not run"
        try:
            for side in self.sides:
                (self.folder / side.folder).mkdir(parents=True, exist_ok=True)
                write_json(self.folder / side.folder / "identity.json", side.identity)
        except OSError as error:
            raise ValueError(
                f"{what}, and the rest cannot be written ({error.strerror or error}); name another folder"
            ) from error
        self._sweep()
        each = entry()
        needed = sum(each[name] * number for name, number in lacking.items())
        free = shutil.disk_usage(self.folder).free
        what += f"; in all they take {_size(sum(each.values()) * len(keys))}"
        if needed > free - RESERVE:
            raise ValueError(
                f"{what}, {_size(needed)} of it still to be written, but only {_size(free)} are free there, of which "
                f"{_size(RESERVE)} stay so: name a folder on a larger disk, or take fewer --data.draws"
            )
        return False, f"{what}, {_size(needed)} of it still to be written"

    def measure(self, batch: Batch, run: Callable[[str, Batch], Features], precision: str) -> dict[str, int]:
        """Bytes of one sample's entry by network: they run on a batch of one."""
        size = {}
        with autocast(batch.boxes.values.device, precision):
            for side in self.sides:
                made = _compact(side, run(side.name, batch))
                size[side.name] = sum(_stored(name, value[0]).nbytes for name, value in made.items())
        return size

    def _place(self, side: Side, key: Key) -> Path:
        name = hashlib.blake2b(f"{key[0]} {key[1]}".encode(), digest_size=16).hexdigest()
        return self.folder / side.folder / name[:2] / f"{name[2:]}.safetensors"

    def _names(self, side: Side, key: Key) -> set[str]:
        """Tensors that an entry holds by its head; the file's length is checked against it."""
        try:
            with safe_open(self._place(side, key), "pt") as file:
                return set(file.keys())
        except (OSError, SafetensorError):
            return set()

    def _load(self, side: Side, key: Key, names: set[str] | None = None) -> dict[str, Tensor]:
        """An entry's tensors, all or those of these that it holds; a damaged one is removed and gives none."""
        place = self._place(side, key)
        try:
            with safe_open(place, "pt") as file:
                sums = file.metadata() or {}
                held = set(file.keys())
                entry = {name: file.get_tensor(name) for name in (held if names is None else held & names)}
            if all(sums.get(name) == str(zlib.crc32(_bytes(value))) for name, value in entry.items()):
                return entry
        except FileNotFoundError:
            return {}
        except (OSError, SafetensorError):
            pass
        with contextlib.suppress(OSError):
            place.unlink()
        return {}

    def _store(self, side: Side, key: Key, entry: Mapping[str, Tensor]) -> None:
        if not self._writable:
            return
        place = self._place(side, key)
        part = place.with_name(f"{place.name}.{secrets.token_hex(4)}.part")
        try:
            data = save(dict(entry), {name: str(zlib.crc32(_bytes(value))) for name, value in entry.items()})
            place.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(place.parent).free < RESERVE + len(data):
                raise OSError(f"its disk has less than {_size(RESERVE)} left")
            part.write_bytes(data)
            os.replace(part, place)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            self._writable = False
            _log.warning(
                "feature cache %s is not written to any more (%s): the teacher runs for what is not in it",
                self.folder,
                error.strerror or error,
            )

    def _sweep(self) -> None:
        """Remove what killed processes left half written."""
        for side in self.sides:
            for part in (self.folder / side.folder).glob("*/*.part"):
                with contextlib.suppress(OSError):  # its writer, or another process, was faster
                    if part.stat().st_mtime < time.time() - STALE:
                        part.unlink()


def _compact(side: Side, features: Features) -> dict[str, Tensor]:
    """What is stored of a network's features, [B, ..., H, W, C] on the CPU, by stored name."""
    found = {}
    for path, name in side.paths.items():
        value = TensorPath.parse(path).read(features)
        assert isinstance(value, Tensor)
        found[name] = value.detach().movedim(-3, -1).cpu()
    return found


def _stored(name: str, value: Tensor) -> Tensor:
    """One sample's tensor as it is stored."""
    halved = value.dtype == torch.float32 and name != "predictions.heatmap"
    if halved and float(value.abs().max()) <= torch.finfo(torch.float16).max:
        value = value.half()
    return value.contiguous()


def _joined(side: Side, entries: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The samples' tensors in a batch [B, ..., C, H, W], channels last in memory, by path."""
    joined = {}
    for path, name in side.paths.items():
        values = [entry[name] for entry in entries]
        if len({value.dtype for value in values}) > 1:  # one sample had a value too great for float16
            values = [value.float() for value in values]
        with torch.autocast("cpu", enabled=False):  # which knows no float16 there
            joined[path] = torch.stack(values).movedim(-1, -3)
    return joined


def _bytes(value: Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU, as what takes a buffer takes it."""
    return value.reshape(-1).view(torch.uint8).numpy()


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number < 1e9 else f"{number / 1e9:.1f} GB"
