from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdlab.geometry import footprint
from kdlab.models.nms import circle_nms, greedy, intersection, rotated_iou, rotated_nms

shapely = pytest.importorskip("shapely")


def random_rectangles(count: int, seed: int, reach: float = 6.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 9, generator=generator, dtype=torch.float64)
    boxes[:, :2] = (boxes[:, :2] * 2 - 1) * reach + 40
    boxes[:, 3:5] = boxes[:, 3:5] * 5 + 0.3
    boxes[:, 6] = boxes[:, 6] * 8 - 4
    return boxes


def exact_iou(first: Tensor, second: Tensor) -> Tensor:
    polygons = [[shapely.Polygon(corners.tolist()) for corners in footprint(boxes)] for boxes in (first, second)]
    rows = [[a.intersection(b).area / a.union(b).area for b in polygons[1]] for a in polygons[0]]
    return torch.tensor(rows, dtype=torch.float64)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_iou_equals_shapely(seed: int) -> None:
    first, second = random_rectangles(12, seed), random_rectangles(9, seed + 1)
    torch.testing.assert_close(rotated_iou(first, second), exact_iou(first, second), atol=1e-8, rtol=0)


@pytest.mark.parametrize("yaw", [0.0, 0.3, math.pi / 2, -2.7])
def test_shared_borders_count_once(yaw: float) -> None:
    box = torch.tensor([[3.0, -2.0, 0.0, 4.0, 2.0, 1.0, yaw, 0.0, 0.0]], dtype=torch.float64)
    along = torch.tensor([math.cos(yaw), math.sin(yaw)], dtype=torch.float64)
    turned, touching, half, inside = box.clone(), box.clone(), box.clone(), box.clone()
    turned[:, 6] += math.pi
    touching[:, :2] += 4 * along
    half[:, :2] += 2 * along
    inside[:, 3] = 2.0
    assert float(rotated_iou(box, box)) == pytest.approx(1, abs=1e-7)
    assert float(rotated_iou(box, turned)) == pytest.approx(1, abs=1e-7)
    assert float(rotated_iou(box, touching)) == pytest.approx(0, abs=1e-7)
    assert float(rotated_iou(box, half)) == pytest.approx(1 / 3, abs=1e-7)
    assert float(rotated_iou(box, inside)) == pytest.approx(1 / 2, abs=1e-7)
    assert float(rotated_iou(inside, box)) == pytest.approx(1 / 2, abs=1e-7)


def test_intersection_is_symmetric_and_exact_far_from_the_origin() -> None:
    first, second = random_rectangles(200, 1, 2.0), random_rectangles(200, 2, 2.0)
    there = intersection(first, second)
    torch.testing.assert_close(there, intersection(second, first), atol=1e-7, rtol=0)
    first[:, :2] += 1e5
    second[:, :2] += 1e5
    torch.testing.assert_close(there, intersection(first, second), atol=1e-6, rtol=0)


def naive_nms(conflict: Tensor) -> Tensor:
    keep = torch.ones(len(conflict), dtype=torch.bool)
    for j in range(len(conflict)):
        keep[j] = not any(keep[i] and conflict[i, j] for i in range(j))
    return keep


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 40))
def test_greedy_equals_the_loop(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    conflict = (torch.rand(count, count, generator=generator) < 0.15).triu(1)
    higher, lower = conflict.nonzero(as_tuple=True)
    assert torch.equal(greedy(higher, lower, count), naive_nms(conflict))


@pytest.mark.parametrize("seed", range(4))
def test_rotated_and_circle_nms_equal_the_loop(seed: int) -> None:
    boxes = random_rectangles(60, seed)
    groups = torch.arange(60) % 3
    same = groups[:, None] == groups
    kept = rotated_nms(boxes, groups, 0.2)
    assert torch.equal(kept, naive_nms((exact_iou(boxes, boxes) > 0.2) & same))
    radius = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)[groups]
    near = torch.cdist(boxes[:, :2], boxes[:, :2]) <= radius[:, None]
    assert torch.equal(circle_nms(boxes, groups, radius), naive_nms(near & same))
    assert 0 < kept.sum() < 60


def test_no_boxes() -> None:
    none = torch.zeros(0, 9)
    groups = torch.zeros(0, dtype=torch.long)
    assert rotated_nms(none, groups, 0.2).shape == (0,) and circle_nms(none, groups, none[:, 0]).shape == (0,)
    assert rotated_iou(none, none).shape == (0, 0)
