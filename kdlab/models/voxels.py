"""Things sorted by the cell that they fall into: points by pillar or voxel, frustum points by BEV cell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Items by cell.

    Attributes:
        cell: int64 [V], the cells that hold an item, rising.
        order: int64 [P], the items cell after cell, those of one cell in their own order.
        starts: int64 [V], where each cell's items start in ``order``.
        counts: int64 [V], items per cell, at least 1.
    """

    cell: Tensor
    order: Tensor
    starts: Tensor
    counts: Tensor

    def of_items(self) -> Tensor:
        """Position in ``cell`` of each item of ``order``, int64 [P]."""
        numbers = torch.arange(len(self.cell), device=self.cell.device)
        return numbers.repeat_interleave(self.counts, output_size=len(self.order))


def group_by_cell(cell: Tensor) -> Groups:
    """Group items by their cells, int64 [P], not negative; no cap on cells or on items per cell."""
    ordered, order = sort_by_cell(cell, torch.arange(len(cell), device=cell.device), len(cell))
    occupied, counts = ordered.unique_consecutive(return_counts=True)
    return Groups(occupied, order, counts.cumsum(0) - counts, counts)


def sort_by_cell(cell: Tensor, item: Tensor, items: int) -> tuple[Tensor, Tensor]:
    """Sort pairs of cells and different items, both int64 [P], by cell and then by item.

    Args:
        cell: not negative; cells times ``items`` must stay below 2**62.
        item: below ``items``.
        items: bound on the items.
    """
    bits = max(1, items.bit_length())
    packed = _sorted((cell << bits) | item)  # one sort of unique keys: stable and quick
    return packed >> bits, packed & ((1 << bits) - 1)


def _sorted(keys: Tensor) -> Tensor:
    if keys.is_cuda:
        return keys.sort().values
    values = keys.numpy()
    values.sort()  # numpy's vectorised sort: several times faster than torch.sort on a CPU
    return torch.from_numpy(values)
