"""Samples to batches: depth targets, collation, order and loader."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from kdlab.config import AugmentConfig
from kdlab.data.augment import augment, generator
from kdlab.data.depth import depth_targets
from kdlab.data.files import REDUCTIONS
from kdlab.data.tables_json import Array
from kdlab.sample import Batch, Boxes3D, Sample

_log = logging.getLogger(__name__)

__all__ = ["Loader", "Source", "augment", "balanced_order", "collate", "depth_targets"]


class Source(Protocol):
    """What a loader needs of a data set; `NuScenesDataset` is one."""

    points: bool
    images: bool

    def __len__(self) -> int: ...

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of stored images in pixels; (0, 0) where not known."""

    def prepare(self, reduce: int) -> str:
        """Check what loading will need; returns a line for the user, or nothing."""

    def load(self, index: int, reduce: int = 1) -> Sample:
        """Read a sample, its images decoded at 1/reduce of their size."""

    def class_presence(self) -> Array:
        """Which samples hold a box of which class, bool [samples, 10]."""


class Stored(Protocol):
    """Where a loader reads what frozen networks have made of a sample before; `kdlab.cache.FeatureCache` is one."""

    def read(self, tokens: Sequence[str], draws: Sequence[int]) -> dict[str, Tensor]:
        """The tensors [B, ...] of some samples, for `Batch.stored`."""


def collate(samples: list[Sample], *, depth_stride: int | None = None, max_depth: float = float("inf")) -> Batch:
    """Put samples into a batch.

    Args:
        samples: at least one, of one image size.
        depth_stride: pixels per cell of the depth targets; None for no depth targets.
        max_depth: bound of the depth targets, metres.

    Raises:
        ValueError: no samples, image shapes that differ, or depth targets asked for without images.
    """
    if not samples:
        raise ValueError("collate: no samples")
    shapes = {s.images.shape for s in samples}
    if len(shapes) > 1:
        found = sorted(map(tuple, shapes))
        raise ValueError(f"collate: images differ in shape: {found}; pass samples through augment() first")
    depth = None
    if depth_stride is not None:
        if samples[0].images.shape[1] == 0:
            raise ValueError("collate: depth targets need images; open the data set with images=True, or ask for none")
        size = samples[0].images.shape[-2], samples[0].images.shape[-1]
        cameras = [(s.points, s.image_from_camera[0], s.frame_from_camera[0]) for s in samples]
        depth = torch.stack([depth_targets(*c, size, depth_stride, max_depth) for c in cameras])
    return Batch(
        tokens=[s.token for s in samples],
        images=torch.stack([s.images.movedim(2, -1) for s in samples]).movedim(-1, 3),  # colours last in memory
        image_from_camera=torch.stack([s.image_from_camera for s in samples]),
        frame_from_camera=torch.stack([s.frame_from_camera for s in samples]),
        key_from_frame=torch.stack([s.key_from_frame for s in samples]),
        points=torch.cat([s.points for s in samples]),
        point_batch=torch.repeat_interleave(torch.tensor([len(s.points) for s in samples])),
        depth=depth,
        boxes=Boxes3D.pad(s.boxes for s in samples),
        global_from_key=torch.stack([s.global_from_key for s in samples]),
        bev_augmentation=torch.stack([s.bev_augmentation for s in samples]),
        draws=[s.draw for s in samples],
    )


def balanced_order(presence: Array, random: np.random.Generator) -> Array:
    """Class-balanced grouping and sampling (CBGS): sample indices in which every class has an equal share.

    For each class that occurs, the same number of samples is drawn, with replacement, from those that hold it. Over all
    classes as many are drawn as there are pairs of a sample and a class in it, rounded down per class.

    Args:
        presence: bool [samples, classes].
        random: where the draws come from.
    """
    held = [np.flatnonzero(column) for column in presence.T]
    held = [rows for rows in held if len(rows)]
    share = sum(map(len, held)) // max(len(held), 1)
    return np.concatenate([rows[random.integers(len(rows), size=share)] for rows in held] or [np.zeros(0, np.int64)])


class Loader:
    """Batches of a data set in an order that depends on (seed, epoch) only.

    The position in training is (epoch, step): an epoch that starts at a later step gives exactly the rest of the whole
    one, whatever the number of workers. A global batch is dealt out to the ranks in turn.

    Args:
        dataset: where samples come from.
        image_size: height and width of the network's input, pixels.
        augment: ranges of augmentation; none for evaluation.
        batch_size: samples per global batch, over all ranks.
        seed: of order and augmentation.
        workers: loader processes; 0 loads in this one.
        shuffle: random order.
        cbgs: class-balanced resampling, see `balanced_order`.
        drop_last: leave out a last batch that is not full. Keep it on for training on several ranks: they stay in step.
        depth_stride: pixels per cell of the depth targets; None for none.
        max_depth: bound of the depth targets, metres.
        rank: of this process.
        world: number of processes; divides batch_size.
        draws: number of random versions of a sample; None for a new one in each epoch.
        exact: decode images in full and resize them as Pillow does; slower, see `ImageTransform.apply_exact`.
        pin_memory: put batches where a GPU fetches them faster; takes effect with workers.
        stored: where each batch's `Batch.stored` is read.

    Raises:
        ValueError: sizes that do not fit, depth targets asked for without images or points, or no room for the image
            cache.
    """

    def __init__(
        self,
        dataset: Source,
        *,
        image_size: tuple[int, int],
        batch_size: int,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        workers: int = 0,
        shuffle: bool = False,
        cbgs: bool = False,
        drop_last: bool = False,
        depth_stride: int | None = None,
        max_depth: float = float("inf"),
        rank: int = 0,
        world: int = 1,
        draws: int | None = None,
        exact: bool = False,
        pin_memory: bool = False,
        stored: Stored | None = None,
    ) -> None:
        if batch_size < 1 or world < 1 or batch_size % world or not 0 <= rank < world:
            raise ValueError(
                f"Loader: batch_size {batch_size} must be a multiple of world {world}, and rank {rank} below it"
            )
        if draws is not None and draws < 1:
            raise ValueError(f"Loader: draws must be at least 1 or None, got {draws}")
        if depth_stride is not None and not (dataset.images and dataset.points):
            raise ValueError("Loader: depth targets need a data set opened with images=True and points=True")
        self.dataset, self.batch_size, self.seed, self.shuffle, self.cbgs = dataset, batch_size, seed, shuffle, cbgs
        self.drop_last, self.rank, self.world, self.draws, self.workers = drop_last, rank, world, draws, workers
        self._presence = dataset.class_presence() if cbgs else None
        self._pin_memory = pin_memory
        ranges = augment or AugmentConfig.none()
        self._items = _Items(dataset, ranges, image_size, seed, depth_stride, max_depth, exact, stored)
        self._plan = _Plan()
        self._processes: DataLoader[Any] | None = None
        self._newest = 0
        self._length = len(self.order(0))
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"Loader: {self._length} samples give no batch of {batch_size}; take a smaller batch or drop_last=False"
            )
        note = dataset.prepare(self._items.reduce)
        if note and rank == 0:
            _log.warning("%s", note)  # shown also where nobody set up logging: a disk is about to be filled

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        full, rest = divmod(self._length, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def draw(self, epoch: int) -> int:
        """Which random version of its samples an epoch shows."""
        return epoch if self.draws is None else epoch % self.draws

    def order(self, epoch: int) -> Array:
        """Sample indices of an epoch over all ranks, in order."""
        random = generator(self.seed, epoch, "order")
        order = np.arange(len(self.dataset)) if self._presence is None else balanced_order(self._presence, random)
        return random.permutation(order) if self.shuffle else order

    def shown(self, epochs: int) -> list[tuple[int, int]]:
        """Index and draw of all that the first epochs show, over all ranks, each once."""
        found: dict[int, set[int]] = {}
        for epoch in range(epochs):
            indices = self.order(epoch)[: self.steps_per_epoch * self.batch_size].tolist()
            found.setdefault(self.draw(epoch), set()).update(indices)
        return [(index, draw) for draw, indices in found.items() for index in sorted(indices)]

    def single(self, index: int, draw: int) -> Batch:
        """One sample as a batch.

        Raises:
            OSError: a file is missing.
            ValueError: a file is damaged.
        """
        return _checked(self._items.collate([self._items[index, draw]]))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from a step on, this rank's part of each.

        A rank whose part of an incomplete last batch is empty gets one batch less. With workers, starting another epoch
        ends the one before it.

        Raises:
            ValueError: start_step outside 0..steps_per_epoch.
            RuntimeError: this iterator is used on after a newer one has begun.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"Loader: start_step {start_step} is not in 0..{self.steps_per_epoch}")
        return self._batches(epoch, start_step)

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        order, draw = self.order(epoch), self.draw(epoch)
        steps = range(start_step, self.steps_per_epoch)
        parts = [order[s * self.batch_size : (s + 1) * self.batch_size][self.rank :: self.world] for s in steps]
        plan = [[(int(i), draw) for i in part] for part in parts if len(part)]
        if not self.workers:
            for keys in plan:
                yield _checked(self._items.collate([self._items[key] for key in keys]))
            return
        self._newest += 1
        mine = self._newest
        self._plan.batches = plan
        for batch in self._started():
            yield _checked(batch)
            if mine != self._newest:
                raise RuntimeError("Loader: a newer epoch has begun on the same workers; use a second Loader beside it")

    def _started(self) -> DataLoader[Any]:
        """The worker processes, started at first use and kept from epoch to epoch."""
        if self._processes is None:
            self._processes = DataLoader(
                self._items,
                batch_sampler=self._plan,
                collate_fn=self._items.collate,
                num_workers=self.workers,
                persistent_workers=True,
                worker_init_fn=_quiet_worker,
                pin_memory=self._pin_memory,
                generator=torch.Generator(),  # Its own, so that workers leave the global random state alone.
            )
        return self._processes

    def close(self) -> None:
        """End the worker processes; a later epoch starts new ones."""
        self._newest += 1
        self._processes = None


def _checked(batch: Batch | Exception) -> Batch:
    if isinstance(batch, Exception):
        raise batch
    return batch


class _Items(TorchDataset["Sample | Exception"]):
    """Augmented samples by (index, draw): what runs in a worker.

    Unreadable files come back as values: raised in a worker, their messages would reach the user inside a traceback.
    """

    def __init__(
        self,
        dataset: Source,
        config: AugmentConfig,
        size: tuple[int, int],
        seed: int,
        stride: int | None,
        max_depth: float,
        exact: bool,
        stored: Stored | None,
    ) -> None:
        self.dataset, self.config, self.size, self.seed = dataset, config, size, seed
        self.stride, self.max_depth, self.exact, self.stored = stride, max_depth, exact, stored
        self.reduce = 1 if exact else decode_reduction(dataset.image_size, size, config)

    def __getitem__(self, key: tuple[int, int]) -> Sample | Exception:
        index, draw = key
        try:
            sample = self.dataset.load(index, self.reduce)
            return augment(sample, self.config, self.size, seed=self.seed, draw=draw, exact=self.exact)
        except (OSError, ValueError) as error:
            return error

    def collate(self, samples: list[Sample | Exception]) -> Batch | Exception:
        whole: list[Sample] = []
        for sample in samples:
            if isinstance(sample, Exception):
                return sample
            whole.append(sample)
        try:
            batch = collate(whole, depth_stride=self.stride, max_depth=self.max_depth)
            return batch if self.stored is None else replace(batch, stored=self.stored.read(batch.tokens, batch.draws))
        except (OSError, ValueError) as error:
            return error


class _Plan:
    """The batch sampler: this epoch's batches as lists of (index, draw)."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def decode_reduction(source: tuple[int, int], size: tuple[int, int], config: AugmentConfig) -> int:
    """How much smaller images may be decoded: as much as divides their size and leaves no image to be enlarged.

    Args:
        source: height and width of stored images, pixels; (0, 0) where not known.
        size: height and width of the network's input, pixels.
        config: gives the largest scale.
    """
    largest = size[1] * (1 + max(0.0, config.resize[1]))
    fits = [r for r in REDUCTIONS if source[0] % r == 0 and source[1] % r == 0 and source[1] / r >= largest]
    return max(fits, default=1)


def _quiet_worker(_: int) -> None:
    """One thread per worker; Ctrl-C is the main process's business, which then ends its workers."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
