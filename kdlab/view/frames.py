"""Frames of a data set, each seen once, and kept while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, overload

from kdlab.data.nuscenes import NuScenesDataset
from kdlab.sample import Sample
from kdlab.view.sight_data import Sight

if TYPE_CHECKING:
    from kdlab.view.sight import Observer

GRAPHS = 3
"""Sights of `Frames` that keep what their gradients are made from."""


class Samples(Protocol):
    """What `Frames` needs of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class Frames(Sequence[Sight]):
    """Frames of a data set as an Observer sees them, each computed once; threads may share it.

    Args:
        dataset: samples.
        observer: looks at them.
        keep: how many sights stay; those that were not used for longest go first.
    """

    def __init__(self, dataset: Samples, observer: Observer, keep: int = 64) -> None:
        self.dataset, self.observer, self.keep = dataset, observer, max(1, keep)
        self._sights: OrderedDict[int, Sight] = OrderedDict()
        self._lock, self._making = threading.RLock(), threading.RLock()
        self._scenes: dict[int, str] = {}
        if isinstance(dataset, NuScenesDataset):
            names = {token: name for name, tokens in dataset.scenes.items() for token in tokens}
            self._scenes = {index: names[token] for index, token in enumerate(dataset.tokens)}

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
        with self._lock:
            if index in self._sights:
                self._sights.move_to_end(index)
            return self._sights.get(index)

    def _store(self, index: int, sight: Sight) -> None:
        with self._lock:
            self._sights[index] = sight
            self._scenes[index] = sight.sample.scene
            while len(self._sights) > self.keep:
                self._sights.popitem(last=False)[1].drop_graph()
            for left in list(self._sights.values())[:-GRAPHS]:
                left.drop_graph()

    def ready(self, index: int) -> bool:
        """Whether a frame is at hand."""
        with self._lock:
            return index % len(self) in self._sights

    def scene(self, index: int) -> str:
        """Name of the scene that a frame belongs to."""
        index %= len(self)
        if index not in self._scenes:
            self._scenes[index] = self.dataset[index].scene
        return self._scenes[index]
