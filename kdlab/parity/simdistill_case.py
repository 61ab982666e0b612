"""What a file of SimDistill's arrays says: boxes, grid, targets, predictions, losses.

Boxes come as (x, y, bottom z, w, l, h, clockwise yaw from +y); maps, flat cells and gradients with x before y. Codes in
box maps stay as they are: no term tells them apart but by their place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kdlab.distill import Context, Method, TermResult, run_terms
from kdlab.distill.simdistill import CODE_WEIGHTS, centre_cells, class_gaussians, object_mask, simdistill, slots
from kdlab.geometry import BEVGrid
from kdlab.models.head import focal_sums, gather_codes
from kdlab.models.targets import TASK_OF_CLASS, encode_boxes
from kdlab.parity.compare import Inputs
from kdlab.parity.distillbev_case import modern
from kdlab.parity.oracles import ForeignGrid
from kdlab.sample import TASKS, Boxes3D, Features, Predictions, TaskPrediction

FOREIGN_CODES = (0, 1, 2, 4, 3, 5, 7, 6, 8, 9)
"""Where the codes of kdlab stand in a released row: w and l exchanged, sine and cosine too (both negated)."""


def turned(maps: Tensor) -> Tensor:
    """[..., X, Y] to [..., H, W] and back."""
    return maps.mT


def _adapted(method: Method) -> Method:
    """The method for student's maps that have passed the adapters."""
    return replace(method, terms=tuple(replace(t, adapter=None) for t in method.terms))


def difference(student: Tensor, teacher: Tensor) -> Tensor:
    """The plain difference of maps [..., C, X, Y], which knows of no boxes."""
    ours, theirs = (turned(maps).flatten(0, -4) for maps in (student, teacher))
    grid = BEVGrid((0.0, float(ours.shape[-1])), (0.0, float(ours.shape[-2])), 1.0)
    boxes = Boxes3D.pad([Boxes3D.empty()] * len(ours))
    context = Context(Features(ours), Features(theirs), boxes, grid)
    return run_terms(simdistill("released").only(["fusion"]), context)["fusion"].value


@dataclass(frozen=True)
class Slotted:
    """Targets by slot.

    Attributes:
        cell: int64 [B, 6, K], flat with x before y; 0 in empty slots.
        filled: bool [B, 6, K].
        codes: float32 [B, 6, K, 10], released; 0 in empty slots.
    """

    cell: Tensor
    filled: Tensor
    codes: Tensor


class Case(Inputs):
    """One file."""

    def number(self, name: str) -> float:
        """An input of one number."""
        return float(self.given(name))

    def leaf(self, name: str) -> Tensor:
        """An input that gradients are taken by, float32; the same tensor at every call."""
        if name not in self._leaves:
            self._leaves[name] = self.given(name).float().requires_grad_()
        return self._leaves[name]

    @cached_property
    def _leaves(self) -> dict[str, Tensor]:
        return {}

    def gradient(self, value: Tensor, name: str) -> Tensor:
        """Gradient of a value by an input."""
        return torch.autograd.grad(value, self.leaf(name), retain_graph=True, materialize_grads=True)[0]

    @cached_property
    def boxes(self) -> Boxes3D:
        """Ground truth; a label below 0 marks padding."""
        labels = self.given("gt_labels").long()
        return Boxes3D.make(modern(self.given("gt_boxes").float()), labels.clamp(min=0), labels >= 0)

    @cached_property
    def grid(self) -> ForeignGrid:
        """Cells of the maps.

        Raises:
            ValueError: the cells are not square.
        """
        low_x, low_y, _, high_x, high_y, _ = (float(v) for v in self.given("point_cloud_range"))
        factor = self.number("out_stride")
        sides = self.given("voxel_size")[:2].double() * factor
        if abs(float(sides[0] - sides[1])) > 1e-6:
            raise ValueError(f"cells of {sides.tolist()} m are not square")
        cell = float(sides[0])
        size = (round((high_y - low_y) / cell), round((high_x - low_x) / cell))
        return ForeignGrid((low_x, high_x), (low_y, high_y), cell, size, factor)

    @cached_property
    def method(self) -> Method:
        """Everything as released."""
        return simdistill("released")

    @cached_property
    def context(self) -> Context:
        """What the terms see; maps that the file lacks have no channels."""
        student, teacher = (self._features(side) for side in ("student", "teacher"))
        return Context(student, teacher, self.boxes, self.grid, on=self.method.on)

    def _features(self, side: str) -> Features:
        none = torch.zeros(len(self.boxes.values), 0, *self.grid.size)
        bev = turned(self.leaf(side)) if side in self.arrays else none
        predictions = None
        if {f"{side}_heatmap_logits", f"{side}_box"} & set(self.arrays):
            predictions = self._predictions(side)
        return Features(bev, lidar_bev=bev, predictions=predictions)

    def _predictions(self, side: str) -> Predictions:
        logits, box = turned(self.leaf(f"{side}_heatmap_logits")), turned(self.leaf(f"{side}_box"))
        tasks = zip(logits.split([len(t) for t in TASKS], 1), box.unbind(1), strict=True)
        return Predictions(tuple(TaskPrediction(heat, *codes.split((2, 1, 3, 2, 2), 1)) for heat, codes in tasks))

    def result(self, name: str) -> TermResult:
        """A term's weighted result."""
        return run_terms(_adapted(self.method.only([name])), self.context)[name]

    def by_task(self, name: str) -> Tensor:
        """A prediction term by task [6]."""
        result, tasks = self.result(name), torch.tensor(TASK_OF_CLASS)
        if name == "prediction_box":
            tasks = slots(self.context, self.method.only([name]).terms[0]).task.flatten()
        errors = result.errors.flatten() if name == "prediction_box" else result.errors.sum((0, 2, 3))
        return errors.new_zeros(len(TASKS)).index_add(0, tasks, errors)

    def mask(self) -> Tensor:
        """The mask of objects [B, 1, X, Y]."""
        return turned(object_mask(self.context, self.grid))

    def heatmaps(self) -> Tensor:
        """Targets [B, 10, X, Y]."""
        return turned(class_gaussians(self.context, self.grid))

    def slotted(self, count: int) -> Slotted:
        """Targets in ``count`` slots per task: by class, then by row."""
        boxes, task = self.boxes, torch.tensor(TASK_OF_CLASS)[self.boxes.labels]
        order = boxes.labels * boxes.labels.shape[1] + torch.arange(boxes.labels.shape[1])
        before = (task[:, None] == task[:, :, None]) & (order[:, None] < order[:, :, None]) & boxes.valid[:, None]
        slot = before.sum(2)
        cell, counted = centre_cells(self.context, self.grid)
        batch, row = (counted & (slot < count)).nonzero(as_tuple=True)
        column, line = cell % self.grid.width, cell // self.grid.width
        codes, _, _ = encode_boxes(boxes.values, self.grid)
        offset = self.grid.to_cells(boxes.values[..., :2]) - torch.stack((column, line), -1)
        codes = torch.cat((offset, codes[..., 2:6], -codes[..., 6:8], codes[..., 8:]), -1)[..., FOREIGN_CODES]
        place = (batch, task[batch, row], slot[batch, row])
        shape = (len(cell), len(TASKS), count)
        filled = torch.zeros(shape, dtype=torch.bool).index_put(place, torch.tensor(True))
        flat = (column * self.grid.height + line)[batch, row]
        cells = torch.zeros(shape, dtype=torch.long).index_put(place, flat)
        return Slotted(cells, filled, torch.zeros(*shape, codes.shape[-1]).index_put(place, codes[batch, row].float()))

    def detection(self, which: str) -> Tensor:
        """The student's detection loss by task [6]: ``heatmap`` or ``bbox``."""
        predictions, heat = self.context.predictions("student"), class_gaussians(self.context, self.grid)
        if which == "heatmap":
            score = predictions.heatmap.sigmoid().clamp(1e-4, 1 - 1e-4)
            ones = (heat == 1).sum((0, 2, 3))
            positives = torch.zeros(len(TASKS)).index_add(0, torch.tensor(TASK_OF_CLASS), ones.float())
            return focal_sums(score.double().logit(), heat) / positives.clamp(min=1)
        found = self.slotted(max(1, len(self.boxes)))
        cell = found.cell % self.grid.height * self.grid.width + found.cell // self.grid.height
        task = torch.arange(len(TASKS))[:, None].expand(cell.shape)
        read = gather_codes(predictions, task.flatten(1), cell.flatten(1)).view(found.codes.shape)
        error = (read - found.codes).abs() @ torch.tensor(CODE_WEIGHTS)
        return 0.25 * (error * found.filled).sum((0, 2)) / (found.filled.sum((0, 2)) + 1e-4)
