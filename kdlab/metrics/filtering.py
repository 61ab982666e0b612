"""Which boxes count: in the range of their class, not empty, not in a bicycle rack."""

from __future__ import annotations

import numpy as np

from kdlab.metrics.boxes import Array, EvalBoxes
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.errors import dots, rotation_matrices
from kdlab.metrics.truth import Racks, Truth
from kdlab.sample import CLASSES

_CYCLES = [CLASSES.index(name) for name in ("bicycle", "motorcycle")]
# Signs of a box's eight corners along length, width and height.
_FRONT, _SIDE, _UP = np.array(
    ((1, 1, 1, 1, -1, -1, -1, -1), (1, -1, -1, 1, 1, -1, -1, 1), (1, 1, -1, -1, 1, 1, -1, -1))
)


def ego_distances(truth: Truth, boxes: EvalBoxes) -> Array:
    """Distance of each box to the ego vehicle of the sample that holds it, in the ground plane, metres, float64 [N]."""
    offset = boxes.translation[:, :2] - truth.ego[boxes.sample, :2]
    distance: Array = np.sqrt(offset[:, 0] ** 2 + offset[:, 1] ** 2)
    return distance


def counted(truth: Truth, boxes: EvalBoxes, config: EvaluationConfig) -> Array:
    """Which boxes the evaluation counts, bool [N]; the same rule for annotations and predictions."""
    reach = np.array([config.class_range[name] for name in CLASSES])
    keep: Array = (ego_distances(truth, boxes) < reach[boxes.label]) & (boxes.points != 0)
    cycles = np.flatnonzero(keep & np.isin(boxes.label, _CYCLES))
    keep[cycles[_in_rack(boxes.translation[cycles], boxes.sample[cycles], truth.racks)]] = False
    return keep


def _in_rack(centre: Array, sample: Array, racks: Racks) -> Array:
    """Which centres [n, 3] lie in a rack of their sample, borders included, bool [n]."""
    inside = np.zeros(len(centre), bool)
    count = np.diff(racks.start)[sample]
    corner, edges = _edges(racks)
    for k in range(int(count.max(initial=0))):  # The k-th rack of every sample that has as many.
        rows = np.flatnonzero(count > k)
        rack = racks.start[sample[rows]] + k
        offset, within = centre[rows] - corner[rack], np.ones(len(rows), bool)
        for edge in edges:
            along, full = dots(edge[rack], offset), dots(edge[rack], edge[rack])
            within &= (along >= 0) & (along <= full)
        inside[rows[within]] = True
    return inside


def _edges(racks: Racks) -> tuple[Array, tuple[Array, Array, Array]]:
    """One corner [R, 3] of each rack and the edges [R, 3] from it along length, width and height."""
    width, length, height = (racks.size[:, i, None] for i in range(3))
    local = np.stack((length / 2 * _FRONT, width / 2 * _SIDE, height / 2 * _UP), 1)  # [R, 3, 8]
    corners = np.matmul(rotation_matrices(racks.rotation), local) + racks.translation[:, :, None]
    first = np.ascontiguousarray(corners[:, :, 0])
    return first, (corners[:, :, 4] - first, corners[:, :, 1] - first, corners[:, :, 3] - first)
