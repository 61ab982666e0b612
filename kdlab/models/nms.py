"""Non-maximum suppression in the ground plane: by distance of centres, or by overlap of rotated boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlab.geometry import footprint

_EPSILON = 1e-9  # metres
_SLACK = 1e-3  # metres (or IoU) by which a prefilter errs on the safe side


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
    distance = torch.linalg.vector_norm(first[:, None, :2] - second[:, :2], dim=-1)
    near = distance <= _reach(first)[:, None] + _reach(second) + _SLACK
    i, j = near.nonzero(as_tuple=True)
    result[i, j] = iou_of_pairs(first[i], second[j])
    return result


def _reach(boxes: Tensor) -> Tensor:
    """Radius of the circle around each footprint [M], metres."""
    reach: Tensor = torch.linalg.vector_norm(boxes[:, 3:5], dim=-1) / 2
    return reach


def pairs_within(boxes: Tensor, groups: Tensor, reach: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of one group's boxes whose centres differ by at most twice the largest reach along x.

    A sweep along x: the work grows with the pairs found, not with all there are.

    Args:
        boxes: [M, 9], finite.
        groups: int64 [M], not negative.
        reach: [M], metres.

    Returns:
        The smaller number and the larger number of each pair, int64 [K], and the distance of the centres [K].
    """
    x = boxes[:, 0].double()
    width = 2 * reach.double().amax() + _SLACK
    line, order = (x + groups * (x.amax() - x.amin() + 2 * width)).sort()  # the groups one after another
    numbers = torch.arange(len(line), device=line.device)
    counts = torch.searchsorted(line, line + width, right=True) - numbers - 1
    first = numbers.repeat_interleave(counts)
    step = torch.arange(len(first), device=line.device) - (counts.cumsum(0) - counts).index_select(0, first)
    one, other = order.index_select(0, first), order.index_select(0, first + 1 + step)
    offset = boxes[:, :2].index_select(0, one) - boxes[:, :2].index_select(0, other)
    return torch.minimum(one, other), torch.maximum(one, other), torch.linalg.vector_norm(offset, dim=-1)


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
    if len(boxes) < 2:
        return torch.ones_like(groups, dtype=torch.bool)
    higher, lower, distance = pairs_within(boxes, groups, radius / 2)
    near = (distance <= radius.index_select(0, higher)).nonzero().squeeze(1)
    return greedy(higher.index_select(0, near), lower.index_select(0, near), len(boxes))


def rotated_nms(boxes: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Keep the best of boxes that overlap by more than ``threshold`` IoU in the ground plane.

    Args:
        boxes: [M, 9], best first.
        groups: int64 [M]; boxes of different groups do not meet.
        threshold: IoU.

    Returns:
        Bool [M]: which to keep.
    """
    if len(boxes) < 2:
        return torch.ones_like(groups, dtype=torch.bool)
    reach, area = _reach(boxes), boxes[:, 3] * boxes[:, 4]
    higher, lower, distance = pairs_within(boxes, groups, reach)
    meet = distance <= reach.index_select(0, higher) + reach.index_select(0, lower) + _SLACK
    ratio = area.index_select(0, higher) / area.index_select(0, lower)
    meet &= torch.minimum(ratio, 1 / ratio) > threshold - _SLACK  # the IoU cannot be larger than that
    near = meet.nonzero().squeeze(1)
    higher, lower = higher.index_select(0, near), lower.index_select(0, near)
    over = iou_of_pairs(boxes.index_select(0, higher), boxes.index_select(0, lower)) > threshold
    return greedy(higher[over], lower[over], len(boxes))
