from __future__ import annotations

import pytest
import torch

from kdlab.models.voxels import group_by_cell, sort_by_cell


@pytest.mark.parametrize("count", [0, 1, 300])
def test_groups_hold_every_item_once_under_its_cell_in_its_own_order(count: int) -> None:
    cell = torch.randint(0, 40, (count,), generator=torch.Generator().manual_seed(count)) * 10**9
    groups = group_by_cell(cell)
    wanted: dict[int, list[int]] = {}
    for item, c in enumerate(cell.tolist()):
        wanted.setdefault(c, []).append(item)
    spans = zip(groups.cell.tolist(), groups.starts.tolist(), groups.counts.tolist(), strict=True)
    assert [(c, groups.order[s : s + n].tolist()) for c, s, n in spans] == sorted(wanted.items())
    assert torch.equal(groups.cell[groups.of_items()], cell[groups.order])


def test_pairs_are_sorted_by_cell_and_then_by_item() -> None:
    cell, item = torch.tensor([5, 0, 5, 2]), torch.tensor([7, 3, 1, 0])
    ordered, items = sort_by_cell(cell, item, 8)
    assert ordered.tolist() == [0, 2, 5, 5] and items.tolist() == [3, 0, 1, 7]
    assert cell.tolist() == [5, 0, 5, 2]  # the arguments stay
