"""Suppression of duplicates: mmcv's rotated NMS and mmdet3d's circle NMS (numba, already compiled), one class."""

from __future__ import annotations

import numpy as np
import pytest
import timing
import torch
from model_fakes import random_boxes
from timing import Row, interleaved, row

from kdlab.models.nms import circle_nms, rotated_nms

IOU, RADIUS = 0.2, 2.0
CIRCLE_MS = 1.0
"""Most that circle NMS of 1,000 boxes may take; numba, once it has spent seconds compiling, is out of reach."""


def measure_rotated(count: int) -> Row:
    boxes = random_boxes(1, count, 50.0, torch.Generator().manual_seed(0)).values[0]
    groups = torch.zeros(count, dtype=torch.long)
    ways = [lambda: rotated_nms(boxes, groups, IOU)]
    ops = timing.peer("mmcv.ops")
    if ops is not None:
        rectangles, scores = boxes[:, [0, 1, 3, 4, 6]].contiguous(), torch.linspace(1, 0.1, count)
        ways.append(lambda: ops.nms_rotated(rectangles, scores, IOU)[1])
        assert torch.equal(ways[1]().sort().values, ways[0]().nonzero()[:, 0]), "other boxes are kept"
    ours, *theirs = interleaved(*ways, rounds=30)
    target = 4.0 if count >= 500 else 0.5
    return row("rotated NMS", f"N={count}", ours, "mmcv nms_rotated", theirs[0] if theirs else None, target)


def measure_circle(count: int) -> Row:
    boxes = random_boxes(1, count, 50.0, torch.Generator().manual_seed(0)).values[0]
    groups, radius = torch.zeros(count, dtype=torch.long), torch.full((count,), RADIUS)
    ways = [lambda: circle_nms(boxes, groups, radius)]
    layers = timing.peer("mmdet3d.models.layers.box3d_nms")
    if layers is not None:
        scored = torch.cat((boxes[:, :2], torch.linspace(1, 0.1, count)[:, None]), 1).numpy()
        ways.append(lambda: layers.circle_nms(scored, RADIUS**2, count))
        assert np.array_equal(np.sort(ways[1]()), ways[0]().nonzero()[:, 0].numpy()), "other boxes are kept"
    ours, *theirs = interleaved(*ways, rounds=30)
    measured = row("circle NMS", f"N={count}", ours, "mmdet3d circle_nms", theirs[0] if theirs else None, 0.0)
    return {**measured, "target": f"{CIRCLE_MS:g} ms"}


def measure_all() -> list[Row]:
    return [*(measure_rotated(count) for count in (83, 500, 1000)), *(measure_circle(count) for count in (500, 1000))]


@pytest.mark.parametrize("count", [500, 1000])
def test_nms(count: int) -> None:
    rotated, circle = measure_rotated(count), measure_circle(count)
    assert rotated["ratio"] is None or rotated["ratio"] > 2
    assert circle["ours_ms"] < 5 * CIRCLE_MS
