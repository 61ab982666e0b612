"""Non-maximum suppression in the ground plane: by distance of centres, or by overlap of rotated boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlab.geometry import footprint

_EPSILON = 1e-9  # metres


def intersection(first: Tensor, second: Tensor) -> Tensor:
    """Area in m^2 of the intersection of the footprints of K pairs of boxes [K, 9], float64 [K].

    Green's theorem: the area is half the sum of cross products along the intersection's border, which is made of the
    parts of each rectangle's edges that lie in the other one. A border shared by both counts for the first only,
    and not at all where the two touch from outside.
    """
    origin = first[:, :2].double()  # far from 0 the cross products would cancel
    corners = []
    for boxes in (first, second):
        local = boxes.double().clone()
        local[:, :2] -= origin
        corners.append(footprint(local).flip(1))  # counter-clockwise
    a, b = corners
    area: Tensor = (_border(a, b, shared=True) + _border(b, a, shared=False)) / 2
    return area.clamp(min=0)


def _border(inner: Tensor, outer: Tensor, shared: bool) -> Tensor:
    """Sum of cross products along the parts of the edges of ``inner`` that lie in ``outer``, both [K, 4, 2]."""
    start, edge = inner, inner.roll(-1, 1) - inner
    side = outer.roll(-1, 1) - outer
    side = side / side.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    along = (edge[:, :, None] * side[:, None]).sum(-1) > 0
    slack = torch.where(along & shared, _EPSILON, -_EPSILON)
    # Signed distance to side s of a point start + t edge, plus slack, is high + t slope; inside it is positive.
    high = _cross(side[:, None], start[:, :, None] - outer[:, None]) + slack  # [K, edge, side]
    slope = _cross(side[:, None], edge[:, :, None])
    level = slope.abs() < 1e-12
    crossing = -high / torch.where(level, 1.0, slope)
    low = torch.where(level, torch.where(high > 0, 0.0, 2.0), torch.where(slope > 0, crossing, 0.0)).amax(-1)
    up = torch.where(level | (slope > 0), 1.0, crossing).amin(-1)
    low, up = low.clamp(min=0), up.clamp(max=1)
    first, last = start + low[..., None] * edge, start + up[..., None] * edge
    return torch.where(up > low, _cross(first, last), 0.0).sum(1)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def iou_of_pairs(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union in the ground plane of K pairs of boxes [K, 9], float64 [K]."""
    shared = intersection(first, second)
    union = first[:, 3:5].double().prod(-1) + second[:, 3:5].double().prod(-1) - shared
    return shared / union.clamp(min=1e-12)


def rotated_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union in the ground plane of boxes [M, 9] with boxes [K, 9], float64 [M, K]."""
    result = first.new_zeros(len(first), len(second), dtype=torch.float64)
    i, j = _near(first, second).nonzero(as_tuple=True)
    result[i, j] = iou_of_pairs(first[i], second[j])
    return result


def _near(first: Tensor, second: Tensor) -> Tensor:
    """Pairs whose circumscribed circles meet, bool [M, K]: no other pair can overlap."""
    reach = torch.linalg.vector_norm(first[:, None, 3:5], dim=-1) + torch.linalg.vector_norm(second[:, 3:5], dim=-1)
    near: Tensor = _distance(first, second) <= reach / 2
    return near


def _distance(first: Tensor, second: Tensor) -> Tensor:
    distance: Tensor = torch.linalg.vector_norm(first[:, None, :2] - second[None, :, :2], dim=-1)
    return distance


def greedy(higher: Tensor, lower: Tensor, count: int) -> Tensor:
    """Greedy suppression from a list of conflicts: an item goes if a kept item of higher rank is in conflict with it.

    Args:
        higher: int64 [K], the conflict's item of higher rank (the smaller number).
        lower: int64 [K], its item of lower rank.
        count: number of items; rank falls with the number.

    Returns:
        Bool [count]: what is kept.
    """
    keep = torch.ones(count, dtype=torch.bool, device=higher.device)
    while True:  # the greedy answer is the only fixed point, and each round settles at least one more rank
        beaten = torch.zeros_like(keep).index_fill_(0, lower[keep[higher]], True)
        if torch.equal(~beaten, keep):
            return keep
        keep = ~beaten


def circle_nms(boxes: Tensor, groups: Tensor, radius: Tensor) -> Tensor:
    """Keep the best of boxes whose centres are near ("CenterPoint", CVPR 2021).

    Args:
        boxes: [M, 9], best first.
        groups: int64 [M]; boxes of different groups do not meet.
        radius: [M], metres: how far each box suppresses.

    Returns:
        Bool [M]: which to keep.
    """
    conflict = (_distance(boxes, boxes) <= radius[:, None]) & (groups[:, None] == groups)
    higher, lower = conflict.triu(1).nonzero(as_tuple=True)
    return greedy(higher, lower, len(boxes))


def rotated_nms(boxes: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Keep the best of boxes that overlap by more than ``threshold`` IoU in the ground plane.

    Args:
        boxes: [M, 9], best first.
        groups: int64 [M]; boxes of different groups do not meet.
        threshold: IoU.

    Returns:
        Bool [M]: which to keep.
    """
    i, j = (_near(boxes, boxes) & (groups[:, None] == groups)).triu(1).nonzero(as_tuple=True)
    over = iou_of_pairs(boxes[i], boxes[j]) > threshold
    return greedy(i[over], j[over], len(boxes))
