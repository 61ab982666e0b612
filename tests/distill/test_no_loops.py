"""Regions, masks, targets and losses loop over no boxes and no cells: torch is called as often for many as for few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from all_methods import CASES, found_by, method_of, some_boxes
from distill_fakes import GRID
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdlab.distill.distillbev
import kdlab.distill.unidistill
import kdlab.models.targets
from kdlab.config import HeadConfig
from kdlab.distill import total
from kdlab.distill.regions import footprint_owner, gaussian_mask
from kdlab.geometry import BEVGrid
from kdlab.models.head import CenterHead
from kdlab.models.labels import label_maps
from kdlab.models.targets import draw_gaussians, targets
from kdlab.sample import Boxes3D

# Not coarser: where the largest Gaussian is one cell, torch flattens windows without a copy, and calls differ by that.
FINER = BEVGrid(GRID.x, GRID.y, GRID.cell / 2)
FEW, MANY = 2, 30
Work = Callable[[int, BEVGrid], Tensor]


class Calls(TorchDispatchMode):
    """Counts what torch is called for, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def boxes_in(grid: BEVGrid, many: int) -> Boxes3D:
    return some_boxes(1, (many, many), grid)


def calls(work: Work, many: int, grid: BEVGrid) -> Counter[str]:
    with Calls() as counter:
        work(many, grid)
    return counter.found


def assert_no_loops(work: Work) -> None:
    few = calls(work, FEW, GRID)
    assert few
    for what, many, grid in (("boxes", MANY, GRID), ("cells", FEW, FINER), ("both", MANY, FINER)):
        found = calls(work, many, grid)
        assert found == few, f"more {what}: {found - few} more, {few - found} fewer"


def distil(name: str, variant: str = "intended") -> Work:
    """A method's terms and gradients; making features and adapters beside them takes calls that are always as many."""

    def work(many: int, grid: BEVGrid) -> Tensor:
        results, _ = found_by(method_of(name, variant), boxes_in(grid, many), grid)
        loss = total(results)
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss.detach()

    return work


def detect(many: int, grid: BEVGrid) -> Tensor:
    """Targets and the detector's loss."""
    torch.manual_seed(0)
    head = CenterHead(4, HeadConfig(channels=8), grid)
    aims = targets(boxes_in(grid, many), grid, head.config)
    loss = torch.stack(list(head.loss(head(torch.randn(2, 4, *grid.shape)), aims).values())).sum()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(("name", "variant"), CASES, ids=lambda v: v.replace(" ", "-"))
def test_terms(name: str, variant: str) -> None:
    assert_no_loops(distil(name, variant))


def test_targets_and_the_detection_loss() -> None:
    assert_no_loops(detect)


@pytest.mark.parametrize("released", [False, True])
def test_label_maps(released: bool) -> None:
    assert_no_loops(lambda many, grid: label_maps(boxes_in(grid, many), grid, released).box)


def mask_by_box(boxes: Tensor, drawn: Tensor, grid: BEVGrid, **how: Any) -> Tensor:
    parts = zip(boxes.split(1, 1), drawn.split(1, 1), strict=True)
    return torch.stack([gaussian_mask(box, one, grid, **how) for box, one in parts]).amax(0)


def owner_by_box(boxes: Tensor, counted: Tensor, grid: BEVGrid, at: float = 0.5) -> Tensor:
    many = boxes.shape[1]
    parts = enumerate(zip(boxes.split(1, 1), counted.split(1, 1), strict=True))
    return torch.stack([torch.where(footprint_owner(*one, grid, at) == 0, m, many) for m, one in parts]).amin(0)


def error_by_row(student: Tensor, teacher: Tensor, mask: Tensor, eps: float = 1e-4) -> Tensor:
    rows = zip(student.unbind(2), teacher.unbind(2), mask.unbind(1), strict=True)
    return torch.stack([m * (s - t).abs().mean(1) for s, t, m in rows], 1) / (mask.sum() + eps)


def heat_by_box(cell: Tensor, radius: Tensor, labels: Tensor, mask: Tensor, grid: BEVGrid) -> Tensor:
    parts = zip(*(rows.split(1, 1) for rows in (cell, radius, labels, mask)), strict=True)
    return torch.stack([draw_gaussians(*one, grid) for one in parts]).amax(0)


@pytest.mark.parametrize(
    ("module", "name", "loop", "work", "what"),
    [
        (kdlab.distill.unidistill, "gaussian_mask", mask_by_box, distil("unidistill L2C"), "boxes"),
        (kdlab.distill.unidistill, "masked_mean_l1", error_by_row, distil("unidistill L2C"), "cells"),
        (kdlab.distill.distillbev, "footprint_owner", owner_by_box, distil("distillbev"), "boxes"),
        (kdlab.models.targets, "draw_gaussians", heat_by_box, detect, "boxes"),
    ],
    ids=["mask", "error", "owner", "heat"],
)
def test_a_loop_is_seen(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, loop: Callable[..., Tensor], work: Work, what: str
) -> None:
    """One that changes no number, so that only the calls tell."""
    before = work(MANY, GRID)
    monkeypatch.setattr(module, name, loop)
    torch.testing.assert_close(work(MANY, GRID), before)
    with pytest.raises(AssertionError, match=f"more {what}: "):
        assert_no_loops(work)
