"""Heat maps and box codes for the centre head, against mmdet3d's CenterHead.get_targets."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import timing
import torch
from model_fakes import random_boxes
from timing import Row, interleaved, row
from torch import Tensor

import kdlab.models.targets
from kdlab.config import HeadConfig
from kdlab.geometry import BEVGrid
from kdlab.models.targets import CenterTargets, gaussian_radius, targets
from kdlab.sample import CLASSES, TASKS, Boxes3D

GRIDS = (BEVGrid.square(51.2, 0.8), BEVGrid.square(54.0, 0.6))
SHAPES = ((4, 35), (8, 35), (8, 100))
Targets = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def peers_way(boxes: Boxes3D, grid: BEVGrid) -> Callable[[], Targets] | None:
    """mmdet3d's targets of the same boxes; None where it is not installed."""
    if timing.peer("mmdet3d") is None or timing.peer("mmcv.ops") is None:
        return None
    from mmdet3d.models.dense_heads import CenterHead
    from mmdet3d.structures import LiDARInstance3DBoxes
    from mmengine.structures import InstanceData

    cell = [grid.cell / 4, grid.cell / 4, 8]
    head = CenterHead(
        in_channels=8,
        share_conv_channel=8,
        tasks=[{"num_class": len(task), "class_names": [CLASSES[c] for c in task]} for task in TASKS],
        common_heads={"reg": (2, 2), "height": (1, 2), "dim": (3, 2), "rot": (2, 2), "vel": (2, 2)},
        bbox_coder={"type": "CenterPointBBoxCoder", "pc_range": [grid.x[0], grid.y[0]], "out_size_factor": 4,
                    "voxel_size": cell[:2], "code_size": 9},
        separate_head={"type": "SeparateHead", "init_bias": -2.19, "final_kernel": 3},
        loss_cls={"type": "mmdet.GaussianFocalLoss"},
        loss_bbox={"type": "mmdet.L1Loss"},
        norm_bbox=True,
        train_cfg={"grid_size": [grid.width * 4, grid.height * 4, 1], "voxel_size": cell, "out_size_factor": 4,
                   "point_cloud_range": [grid.x[0], grid.y[0], -5, grid.x[1], grid.y[1], 3], "dense_reg": 1,
                   "gaussian_overlap": 0.1, "max_objs": 500, "min_radius": 2},
    )  # fmt: skip
    samples = []
    for values, labels in zip(boxes.values, boxes.labels, strict=True):
        bottom = values.clone()
        bottom[:, 2] -= values[:, 5] / 2
        samples.append(InstanceData(bboxes_3d=LiDARInstance3DBoxes(bottom, 9), labels_3d=labels))
    get: Callable[[list[InstanceData]], Targets] = head.get_targets
    return lambda: get(samples)


def check(ours: CenterTargets, theirs: Targets) -> None:
    """The heat maps bit for bit; of each task the same cells with the same codes (up to the rounding of a cell)."""
    heatmaps, codes, cells, masks = theirs
    assert torch.equal(ours.heatmap, torch.cat(heatmaps, 1)), "other heat maps"
    for task, (code, cell, mask) in enumerate(zip(codes, cells, masks, strict=True)):
        for b in range(len(mask)):
            mine = ours.mask[b] & (ours.task[b] == task)
            first, second = ours.cell[b, mine].sort(stable=True), cell[b, mask[b].bool()].sort(stable=True)
            assert torch.equal(first.values, second.values), "other cells"
            pair = ours.codes[b, mine][first.indices], code[b, mask[b].bool()][second.indices]
            pair = tuple(c[c.sum(1).argsort()] for c in pair)
            torch.testing.assert_close(*pair, atol=2e-5, rtol=1e-5)


def measure_all() -> list[Row]:
    """kdlab sizes its Gaussians by the least positive root; here both take CenterPoint's released, larger radii."""
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kdlab.models.targets, "gaussian_radius", functools.partial(gaussian_radius, released=True))
        for grid in GRIDS:
            for size, count in SHAPES:
                boxes = random_boxes(size, count, grid.x[1], torch.Generator().manual_seed(0))
                ours = functools.partial(targets, boxes, grid, HeadConfig())
                peer = peers_way(boxes, grid)
                if peer is not None:
                    check(ours(), peer())
                mine, *theirs = interleaved(*((ours,) if peer is None else (ours, peer)), rounds=20)
                shape = f"{size} x {count} boxes, {grid.height}x{grid.width}"
                name = "mmdet3d CenterHead.get_targets"
                moved = 4 * size * 10 * grid.height * grid.width
                rows.append(row("centre targets", shape, mine, name, theirs[0] if theirs else None, 25.0, bytes=moved))
    return rows


def test_targets() -> None:
    for measured in measure_all():
        assert measured["ours_ms"] < 50 and (measured["ratio"] is None or measured["ratio"] > 10)
