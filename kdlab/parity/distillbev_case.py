"""What a file of DistillBEV's arrays says: boxes, grids, regions, attention.

Boxes come as (x, y, bottom z, w, l, h, clockwise yaw from +y), all samples in a row with offsets; maps as here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlab.distill.regions import fires_wrongly, footprint_owner, gaussian_mask, share, size_scale
from kdlab.distill.terms import class_probability
from kdlab.geometry import BEVGrid, wrap_angle
from kdlab.parity.compare import Inputs
from kdlab.parity.oracles import context_ring, queued_size_scale
from kdlab.sample import Boxes3D

Size = tuple[int, int]
CHANNELS = 10


def size_of(maps: Tensor | np.ndarray[Any, Any]) -> Size:
    """Rows and columns of maps [..., H, W]."""
    return maps.shape[-2], maps.shape[-1]


def modern(boxes: Tensor) -> Tensor:
    """Boxes [..., 9] of mmdet3d before 1.0 under kdlab's convention."""
    x, y, bottom, w, l, h, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack((x, y, bottom + h / 2, l, w, h, wrap_angle(-yaw - math.pi / 2), vx, vy), -1)


class Case(Inputs):
    """One file."""

    def grid(self, size: Size) -> BEVGrid:
        """The file's area in this many cells.

        Raises:
            ValueError: they are not square.
        """
        low_x, low_y, _, high_x, high_y, _ = (float(v) for v in self.given("geom_point_cloud_range"))
        cell = (high_x - low_x) / size[1]
        if abs((high_y - low_y) / size[0] - cell) > 1e-4 * cell:
            raise ValueError(f"{size[0]} x {size[1]} cells over the file's range are not square")
        return BEVGrid((low_x, high_x), (low_y, low_y + cell * size[0]), cell)

    def _padded(self, side: str) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [B, M, 9] in float64, row in the file and validity [B, M]."""
        rows, offsets = self.given(f"{side}_boxes").double().reshape(-1, 9), self.given(f"{side}_offsets")
        counts = offsets.diff()
        index = torch.arange(int(counts.max()) if len(counts) else 0)
        valid = index < counts[:, None]
        row = torch.where(valid, offsets[:-1, None] + index, len(rows))
        return torch.cat((modern(rows), rows.new_zeros(1, 9)))[row], row, valid

    @cached_property
    def boxes(self) -> Boxes3D:
        """Ground truth."""
        values, row, valid = self._padded("gt")
        labels = torch.zeros_like(row)
        if "gt_labels" in self.arrays:
            labels = torch.cat((self.given("gt_labels").long(), torch.zeros(1, dtype=torch.long)))[row]
        return Boxes3D.make(values, labels, valid)

    @cached_property
    def by_boxes(self) -> bool:
        """The file is BEVFormer's: the teacher's false positives come from its boxes."""
        return bool({"teacher_boxes", "teacher_offsets", "teacher_scores"} & set(self.arrays))

    @cached_property
    def at(self) -> float:
        """Test point in a cell: BEVFormer's code takes the centre, BEVDet's the lower corner.

        Masks alone do not say whose they are; then the point is taken that gives more of them.
        """
        if self.by_boxes or {"teacher_logits", "gt_heatmap", "context_length", "context_weight"} & set(self.arrays):
            return 0.5 if self.by_boxes else 0.0
        masks = [
            v for n, v in self.arrays.items() if n.startswith(("fg_mask_", "mid__foreground_mask")) and v.ndim == 4
        ]

        def off(at: float) -> int:
            return sum(int(np.sum(self.owned(size_of(m), at)[:, None].numpy() != (m > 0))) for m in masks)

        return 0.5 if off(0.5) < off(0.0) else 0.0

    def owner(self, size: Size, at: float | None = None) -> Tensor:
        """Box of each cell [B, H, W], see `footprint_owner`."""
        point = self.at if at is None else at
        return footprint_owner(self.boxes.values, self.boxes.valid, self.grid(size), point)

    def owned(self, size: Size, at: float | None = None) -> Tensor:
        """Foreground, bool [B, H, W]."""
        return self.owner(size, at) < len(self.boxes)

    def foreground(self, size: Size) -> tuple[Tensor, Tensor]:
        """Mask and scale, float32 [B, H, W]; with a ring where the file asks for one."""
        grid = self.grid(size)
        if {"context_length", "context_weight"} & set(self.arrays):
            ring = float(self.given("context_length")), float(self.given("context_weight"))
            return context_ring(self.boxes.values, self.boxes.valid, grid, *ring)
        return self.owned(size).float(), size_scale(self.boxes.values, self.owner(size), grid)

    def background_scale(self, size: Size) -> Tensor:
        """1 / cells outside the foreground, the same all over a sample, float32 [B, H, W]."""
        return share(self.foreground(size)[0] == 0).expand(-1, *size)

    def heatmap(self) -> Tensor:
        """Targets [B, 10, H, W] of the centre head."""
        self.given("gt_labels")
        boxes, grid = self.boxes, self.grid(size_of(self.given("gt_heatmap")))
        drawn = boxes.valid & grid.locate(boxes.values[..., :2])[2]
        how = {"overlap": 0.1, "min_radius": 2, "channel": boxes.labels, "channels": CHANNELS}
        return gaussian_mask(boxes.values, drawn, grid, **how)  # type: ignore[arg-type]

    def threshold(self) -> float:
        """Over which a detector fires."""
        return float(self.arrays["output_threshold"]) if "output_threshold" in self.arrays else 0.1

    def scores(self, side: str, sigmoids: int = 1) -> Tensor:
        """Greatest class score [B, H, W]; the in-place sigmoid of the released code may have run several times."""
        found = self.given(f"{side}_logits").float()
        for _ in range(sigmoids):
            found = class_probability(found, 1e-4)
        return found.amax(1)

    def false_positive(self, mode: str, foreground: Tensor, truth_below: float | None = None, calls: int = 1) -> Tensor:
        """Cells that fire without reason, bool [B, H, W] at the size of ``foreground``.

        Args:
            mode: who fires: ``teacher``, ``student``, ``teacher_selected_student`` (the student where the teacher does
                not) or ``teacher_plus_teacher_selected_student``.
            foreground: bool [B, H, W], cells that cannot be false.
            truth_below: targets under this are none; the same threshold as for the scores by default.
            calls: how often the released code has been called with the same teacher.
        """
        above = self.threshold()
        modes: dict[str, Callable[[], Tensor]] = {
            "teacher": lambda: self.scores("teacher", calls),
            "student": lambda: self.scores("student"),
            "teacher_selected_student": lambda: self._unseen(above),
            "teacher_plus_teacher_selected_student": lambda: self.scores("teacher").maximum(self._unseen(above)),
        }
        truth = self.given("gt_heatmap").float().amax(1)
        fires = fires_wrongly(truth, modes[mode](), truth_below or above, above, size_of(foreground))
        return fires & ~foreground

    def _unseen(self, above: float) -> Tensor:
        return self.scores("student").where(self.scores("teacher") <= above, 0)

    def false_boxes(self, size: Size) -> Tensor:
        """Cells in a box of the teacher and in none of the truth, bool; exchanged rows and columns, as released."""
        values, row, valid = self._padded("teacher")
        scores = torch.cat((self.given("teacher_scores").float(), torch.zeros(1)))[row]
        owner = footprint_owner(values, valid & (scores > self.threshold()), self.grid(size), 0.5)
        return ((owner < values.shape[1]) & ~self.owned(size)).mT


def false_scale(cells: Tensor, mode: str) -> Tensor:
    """Scale of false positives [B, H, W]: 1 / their number (``average``) or by component (``dfs``)."""
    return queued_size_scale(cells).float() if mode == "dfs" else cells * share(cells)
