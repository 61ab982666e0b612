"""Frames of a data set, each seen once, and kept while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol, overload
from weakref import WeakSet

from torch import Tensor

from kdlab.data.nuscenes import NuScenesDataset
from kdlab.sample import Sample
from kdlab.view.sight.data import Sight

if TYPE_CHECKING:
    from kdlab.view.sight.observer import Observer

GRAPHS = 3
"""Sights of `Frames`, those used last, that keep what their gradients are made from."""

MEMORY = 2_000_000_000
"""Bytes of features, images and points that all `Frames` of a process keep together: a notebook that is run again makes
new ones beside the old."""


class Samples(Protocol):
    """What `Frames` needs of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass
class _Kept:
    sight: Sight
    size: int
    used: int = 0


class Frames(Sequence[Sight]):
    """Frames of a data set as an Observer sees them, each computed once; threads may share it.

    Args:
        dataset: samples.
        observer: looks at them.
        keep: how many sights stay, as far as there is `MEMORY`; those that were not used for longest go first.
    """

    def __init__(self, dataset: Samples, observer: Observer, keep: int = 64) -> None:
        self.dataset, self.observer, self.keep = dataset, observer, max(1, keep)
        self._sights: OrderedDict[int, _Kept] = OrderedDict()
        self._making = threading.RLock()
        self._scenes: dict[int, str] = {}
        if isinstance(dataset, NuScenesDataset):
            names = {token: name for name, tokens in dataset.scenes.items() for token in tokens}
            self._scenes = {index: names[token] for index, token in enumerate(dataset.tokens)}
        with _LOCK:
            _ALL.add(self)

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Sight: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sight]: ...

    def __getitem__(self, index: int | slice) -> Sight | list[Sight]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        index %= len(self)
        found = self._known(index)
        if found is not None:
            return found
        with self._making:
            found = self._known(index)  # another thread may have made it meanwhile
            if found is None:
                found = self.observer.see(self.dataset[index])
                self._store(index, found)
        return found

    def _known(self, index: int) -> Sight | None:
        with _LOCK:
            found = self._sights.get(index)
            if found is None:
                return None
            self._sights.move_to_end(index)
            found.used = next(_CLOCK)
            for left in list(self._sights.values())[:-GRAPHS]:
                left.sight.drop_graph()
            return found.sight

    def _store(self, index: int, sight: Sight) -> None:
        with _LOCK:
            self._sights[index] = _Kept(sight, _size(sight))
            self._scenes[index] = sight.sample.scene
            self._known(index)
            while len(self._sights) > self.keep:
                self._forget_oldest()
            _make_room()

    def _forget_oldest(self) -> None:
        self._sights.popitem(last=False)[1].sight.drop_graph()

    def ready(self, index: int) -> bool:
        """Whether a frame is at hand."""
        with _LOCK:
            return index % len(self) in self._sights

    def scene(self, index: int) -> str:
        """Name of the scene that a frame belongs to."""
        index %= len(self)
        if index not in self._scenes:
            self._scenes[index] = self.dataset[index].scene
        return self._scenes[index]


_ALL: WeakSet[Frames] = WeakSet()
_LOCK = threading.RLock()  # of what all of them keep
_CLOCK = count(1)


def _make_room() -> None:
    """Let the sights go that were not used for longest, of whichever `Frames`, until the rest fits; one stays."""
    holding = [frames for frames in _ALL if frames._sights]
    held = sum(kept.size for frames in holding for kept in frames._sights.values())
    while held > MEMORY and sum(len(frames._sights) for frames in holding) > 1:
        oldest = min((f for f in holding if f._sights), key=lambda f: next(iter(f._sights.values())).used)
        held -= next(iter(oldest._sights.values())).size
        oldest._forget_oldest()


def _size(value: Any) -> int:
    """Bytes of the tensors of a sight, without the graph that its gradients are made from."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, tuple):
        return sum(map(_size, value))
    if not is_dataclass(value):
        return 0
    return sum(_size(getattr(value, f.name)) for f in fields(value) if f.name not in ("live", "again"))
