from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlab.config import HeadConfig
from kdlab.geometry import BEVGrid
from kdlab.models.targets import CenterTargets, decode_boxes, encode_boxes, gaussian_radius, targets
from kdlab.sample import TASKS, Boxes3D

GRID = BEVGrid((-8.0, 8.0), (-4.8, 4.8), 0.8)
CONFIG = HeadConfig()


def naive_radius(length: float, width: float, overlap: float) -> float:
    """By definition: bisect the shift in each of CornerNet's three cases."""

    def bisect(iou, high: float) -> float:
        low = 0.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if iou(middle) >= overlap else (low, middle)
        return low

    area = length * width

    def moved(r: float) -> float:
        shared = max(length - r, 0) * max(width - r, 0)
        return shared / (2 * area - shared)

    inward = bisect(lambda r: max(length - 2 * r, 0) * max(width - 2 * r, 0) / area, 1e3)
    outward = bisect(lambda r: area / ((length + 2 * r) * (width + 2 * r)), 1e3)
    return min(bisect(moved, 1e3), inward, outward)


def naive_targets(boxes: Boxes3D, grid: BEVGrid, config: HeadConfig) -> CenterTargets:
    """The same with a loop over boxes and cells."""
    batch, most = boxes.labels.shape
    heatmap = torch.zeros(batch, 10, grid.height, grid.width)
    cell, task = torch.zeros(batch, most, dtype=torch.long), torch.zeros(batch, most, dtype=torch.long)
    codes, known = torch.zeros(batch, most, 10), torch.zeros(batch, most, 10, dtype=torch.bool)
    mask = torch.zeros(batch, most, dtype=torch.bool)
    for b in range(batch):
        for m in range(most):
            label = int(boxes.labels[b, m])
            task[b, m] = next(t for t, classes in enumerate(TASKS) if label in classes)
            _, _, z, l, w, h, yaw, vx, vy = boxes.values[b, m].tolist()
            u, v = ((boxes.values[b, m, :2] - torch.tensor([grid.x[0], grid.y[0]])) / grid.cell).tolist()
            column, row = math.floor(u), math.floor(v)
            if not (boxes.valid[b, m] and 0 <= column < grid.width and 0 <= row < grid.height):
                continue
            mask[b, m], cell[b, m] = True, row * grid.width + column
            codes[b, m, :8] = torch.tensor(
                [u - column, v - row, z, math.log(l), math.log(w), math.log(h), math.sin(yaw), math.cos(yaw)]
            )
            known[b, m, :8] = True
            if not (math.isnan(vx) or math.isnan(vy)):
                codes[b, m, 8:], known[b, m, 8:] = torch.tensor([vx, vy]), True
            radius = max(config.min_radius, int(naive_radius(l / grid.cell, w / grid.cell, config.overlap)))
            sigma = (2 * radius + 1) / 6
            for r in range(max(0, row - radius), min(grid.height, row + radius + 1)):
                for c in range(max(0, column - radius), min(grid.width, column + radius + 1)):
                    value = math.exp(-((r - row) ** 2 + (c - column) ** 2) / (2 * sigma * sigma))
                    heatmap[b, label, r, c] = max(float(heatmap[b, label, r, c]), value)
    return CenterTargets(heatmap, cell, task, codes, known, mask)


@st.composite
def box_batches(draw: st.DrawFn) -> Boxes3D:
    seed, count = draw(st.integers(0, 2**31)), draw(st.integers(0, 7))
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(2, count, 9, generator=generator)
    values[..., :2] = (values[..., :2] * 2 - 1) * 10  # some outside
    values[..., 3:6] = 0.3 + values[..., 3:6] * 12
    values[..., 6] = values[..., 6] * 6 - 3
    values[..., 7:][torch.rand(2, count, generator=generator) < 0.3] = float("nan")
    labels = torch.randint(0, 10, (2, count), generator=generator)
    return Boxes3D.make(values, labels, torch.rand(2, count, generator=generator) < 0.8)


@settings(max_examples=40, deadline=None)
@given(box_batches())
def test_targets_equal_the_naive_loop(boxes: Boxes3D) -> None:
    fast, slow = targets(boxes, GRID, CONFIG), naive_targets(boxes, GRID, CONFIG)
    assert torch.equal(fast.mask, slow.mask) and torch.equal(fast.cell, slow.cell) and torch.equal(fast.task, slow.task)
    assert torch.equal(fast.known, slow.known)
    torch.testing.assert_close(fast.heatmap, slow.heatmap, atol=1e-6, rtol=0)
    torch.testing.assert_close(fast.codes, slow.codes, atol=1e-5, rtol=1e-5)
    assert torch.equal(fast.heatmap == 1, slow.heatmap == 1)
    assert fast.codes.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.floats(0.2, 30), st.floats(0.2, 30), st.floats(0.05, 0.95))
def test_radius_keeps_the_overlap_of_every_case(length: float, width: float, overlap: float) -> None:
    radius = gaussian_radius(torch.tensor(length).double(), torch.tensor(width).double(), overlap)
    assert float(radius) == pytest.approx(naive_radius(length, width, overlap), rel=1e-6, abs=1e-9)
    released = gaussian_radius(torch.tensor(length).double(), torch.tensor(width).double(), overlap, released=True)
    assert released.isfinite()


def test_the_peak_is_in_the_cell_that_holds_the_centre() -> None:
    centres = GRID.centres().flatten(0, 1)[:, None]  # every cell's centre, pushed almost to the cell's upper corner
    values = torch.cat((centres + 0.39, torch.ones(len(centres), 1, 7)), -1)
    made = targets(Boxes3D.make(values, torch.zeros(len(centres), 1, dtype=torch.long)), GRID, CONFIG)
    assert made.mask.all()
    assert torch.equal(made.cell[:, 0], torch.arange(len(centres)))
    assert torch.equal(made.heatmap[:, 0].flatten(1).argmax(1), torch.arange(len(centres)))


def test_codes_decode_to_the_boxes() -> None:
    boxes = torch.rand(50, 9, dtype=torch.float64) * 4 - 2
    boxes[:, 3:6] = boxes[:, 3:6].abs() + 0.1
    codes, cell, inside = encode_boxes(boxes, GRID)
    assert inside.all()
    torch.testing.assert_close(decode_boxes(codes, cell, GRID), boxes)


def test_no_boxes_give_empty_targets() -> None:
    made = targets(Boxes3D.pad([Boxes3D.empty(), Boxes3D.empty()]), GRID, CONFIG)
    assert made.heatmap.shape == (2, 10, *GRID.shape) and made.heatmap.sum() == 0 and made.mask.shape == (2, 0)
