"""UniDistill's files: boxes and maps come as they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kdlab.distill import Context, Method, TermResult, run_terms
from kdlab.distill.terms import class_probability, cosine_relation, normalised, read_points
from kdlab.distill.unidistill import PATHS, box_points, counted_rows, exchanged, response_mask, unidistill
from kdlab.geometry import footprint
from kdlab.parity.compare import Arrays, Family, Inputs, Row, compare
from kdlab.parity.oracles import Assignment, ForeignGrid, nearest_cells
from kdlab.sample import Boxes3D, Features, Predictions, TaskPrediction

_INPUTS = frozenset(("gt_boxes", "gt_labels", "pc_range", "voxel_size", "out_size_factor", "seed", "det_loss")) | {
    f"{side}_{name}" for side in ("student", "teacher") for name in ("low", "high", "hm_logits", "reg")
}
_MARKS = frozenset(("gt_boxes", "pc_range", "voxel_size", "out_size_factor"))
_MARKER = "marker_student_low"
_RESPONSES = {"response_class": ("hm_logits", "loss_resp_cls"), "response_regression": ("reg", "loss_resp_reg")}
"""Terms whose inputs are large and may be missing: the inputs, and the stored value."""


class _UniDistill(Inputs):
    """One file of UniDistill's arrays, along one path, with the exchange cancelled or not."""

    def __init__(self, arrays: Arrays, path: str = "L2C", unswapped: bool = False) -> None:
        super().__init__(arrays)
        self.path = path
        self.unswapped = unswapped

    @cached_property
    def boxes(self) -> Boxes3D:
        """Rows in float64, in which the released code computes corners, but from a sine and a cosine in float32.

        Their angle stands for the yaw and their length (1 +- 1e-7) multiplies l and w: corners come out bit for bit.
        """
        values = self.given("gt_boxes").double()
        yaw = self.arrays["gt_boxes"][..., 6]
        turn = torch.from_numpy(np.stack((np.cos(yaw), np.sin(yaw)), -1)).double()
        values[..., 3:5] *= turn.norm(dim=-1, keepdim=True)
        values[..., 6] = torch.atan2(turn[..., 1], turn[..., 0])
        labels = torch.zeros(values.shape[:2])
        if "gt_labels" in self.arrays:
            labels = self.given("gt_labels")
        elif "gt_boxes_labelled" in self.arrays:
            labels = self.given("gt_boxes_labelled")[..., 9] - 1
        return Boxes3D.make(values, labels.long(), values.abs().sum(-1) > 0)

    @cached_property
    def grid(self) -> ForeignGrid:
        """Cells of the maps.

        Raises:
            ValueError: the cells are not square.
        """
        low_x, low_y, _, high_x, high_y, _ = (float(v) for v in self.given("pc_range"))
        factor = float(self.given("out_size_factor"))
        sides = self.given("voxel_size")[:2].double() * factor
        if abs(float(sides[0] - sides[1])) > 1e-9:
            raise ValueError(f"cells of {sides.tolist()} m are not square")
        cell = float(sides[0])
        maps = [n for n in (*sorted(_INPUTS), _MARKER, "gauss_mask", "student_hm_prob") if n in self.arrays]
        maps = [n for n in maps if self.arrays[n].ndim >= 3 and not n.startswith("gt_")]
        size = (round((high_y - low_y) / cell), round((high_x - low_x) / cell))
        if maps:
            height, width = self.arrays[maps[0]].shape[-2:]
            size = (height, width)
        exchanged = self.unswapped and size[0] != size[1]
        return ForeignGrid((low_x, high_x), (low_y, high_y), cell, size, factor, exchanged)

    @cached_property
    def method(self) -> Method:
        """Everything as released; without the exchange where it cancels, which on a square map means off."""
        method = unidistill(self.path, "released")  # type: ignore[arg-type]
        square = self.grid.height == self.grid.width
        return method.flip(["unidistill.transpose_points"]) if self.unswapped and square else method

    def features(self, side: str) -> Features:
        """The stored tensors under kdlab's names; a tensor that is not in the file has no channels."""

        def read(name: str) -> Tensor:
            stored = f"{side}_{name}"
            if stored not in self.arrays:
                return torch.zeros(len(self.boxes.values), 0, *self.grid.size)
            return self.given(stored).float().requires_grad_(side == "student")

        low, logits, reg = read("low"), read("hm_logits"), read("reg")
        none = torch.zeros(len(reg), 0, *reg.shape[-2:])
        task = TaskPrediction(logits, reg, none, none, none, none)
        return Features(low, neck=read("high"), predictions=Predictions((task,)))

    @cached_property
    def context(self) -> Context:
        """What the terms see."""
        return Context(self.features("student"), self.features("teacher"), self.boxes, self.grid, on=self.method.on)

    def result(self, term: str, *inputs: str) -> TermResult:
        """A term's result with weight 1; ``inputs`` must be in the file."""
        for name in inputs:
            self.given(f"student_{name}"), self.given(f"teacher_{name}")
        return run_terms(self.method.only([term]).reweight({term: 1.0}), self.context)[term]

    def gradient(self, term: str, tensor: str) -> Tensor:
        """Gradient of a term, weight 1, with respect to a student's input."""
        predictions = self.context.student.predictions
        assert predictions is not None
        found = {
            "low": self.context.student.bev,
            "high": self.context.student.neck,
            "hm_logits": predictions.tasks[0].heatmap,
            "reg": predictions.tasks[0].reg,
        }[tensor]
        assert found is not None
        return torch.autograd.grad(self.result(term, tensor).value, found, materialize_grads=True)[0]

    def total(self) -> Tensor:
        """Detection loss and weighted terms; a response term without inputs is taken as stored, or left out."""
        for name in ("student_low", "teacher_low", "student_high", "teacher_high"):
            self.given(name)
        terms = [t.name for t in self.method.terms if t.name not in _RESPONSES or self.holds(_RESPONSES[t.name][0])]
        results = run_terms(self.method.only(terms), self.context)
        stored = (self.stored(t.name) * t.weight for t in self.method.terms if t.name not in terms)
        return self.given("det_loss").float() + sum(r.value for r in results.values()) + sum(stored)

    def holds(self, tensor: str) -> bool:
        """Both sides of an input are in the file."""
        return f"student_{tensor}" in self.arrays and f"teacher_{tensor}" in self.arrays

    def stored(self, term: str) -> Tensor | float:
        """A response term's stored value along this path, 0 where there is none."""
        name = _RESPONSES[term][1]
        alike = (f"{name}_{self.path}", name) if self.path != "F2C" or term != "response_class" else (f"{name}_F2C",)
        return next((self.given(n).float() for n in alike if n in self.arrays), 0.0)

    def note(self, output: str) -> str:
        """What is special about an output: terms that enter a total as stored, or not at all."""
        lacking = [t for t in _RESPONSES if output == "loss_total" and not self.holds(_RESPONSES[t][0])]
        taken = [t for t in lacking if isinstance(self.stored(t), Tensor)]
        left = [t for t in lacking if t not in taken]
        parts = [f"{', '.join(taken)} as stored" if taken else "", f"without {', '.join(left)}" if left else ""]
        return "; ".join(p for p in parts if p)

    def points(self) -> Tensor:
        """Nine points of each box [B, M, 9, 2], cells."""
        return box_points(self.context, torch.zeros(1, 1, *self.grid.size))

    def read_at(self) -> Tensor:
        """What grid_sample is given [B, M, 9, 2]."""
        return normalised(self.points(), *self.grid.size, exchanged(self.context))

    def corners(self) -> Tensor:
        """Corners in cells [B, M, 4, 2]."""
        return self.grid.to_cells(footprint(self.boxes.values))

    def read(self, name: str) -> Tensor:
        """Maps at the points [B, C, M, 9]."""
        return read_points(self.given(name).float(), self.points(), exchanged(self.context)).permute(0, 3, 1, 2)

    def relation(self, side: str) -> Tensor:
        """Relations within boxes [B, M, 9, 9]."""
        maps = self.given(f"{side}_high").float()
        return cosine_relation(read_points(maps, self.points(), exchanged(self.context)))

    def mask(self) -> Tensor:
        """Mask of the response terms [B, H, W]."""
        term = next(t for t in self.method.terms if t.name == "response_class")
        return response_mask(self.context, term, torch.zeros(1, 1, *self.grid.size))

    def labelled(self) -> Tensor:
        """Boxes with label + 1 behind them [B, M, 10]."""
        return torch.cat((self.given("gt_boxes").double(), self.boxes.labels[..., None] + 1), -1)

    @cached_property
    def assigned(self) -> Assignment:
        """The released assigner's cells for the cars of the first sample."""
        filled = (self.boxes.values[0].abs().sum(-1) > 0) & (self.boxes.labels[0] == 0)
        grid = self.grid
        return nearest_cells(self.boxes.values[0][filled], (grid.x[0], grid.y[0]), grid.cell, grid.size)


_OUTPUTS: dict[str, Callable[[_UniDistill], Tensor]] = {
    "gt_boxes_labelled": _UniDistill.labelled,
    "gt_indices": lambda c: counted_rows(c.context),
    "gt_corners_bev": _UniDistill.corners,
    "grid": _UniDistill.read_at,
    "sampled_student_low": lambda c: c.read("student_low"),
    "sampled_teacher_low": lambda c: c.read("teacher_low"),
    "sampled_student_high": lambda c: c.read("student_high"),
    "sampled_teacher_high": lambda c: c.read("teacher_high"),
    "sampled_column": lambda c: c.read(_MARKER)[0, 0, 0],
    "sampled_row": lambda c: c.read(_MARKER)[0, 1, 0],
    "relation_student": lambda c: c.relation("student"),
    "relation_teacher": lambda c: c.relation("teacher"),
    "gauss_mask": _UniDistill.mask,
    "student_hm_prob": lambda c: class_probability(c.given("student_hm_logits").float(), 1e-4),
    "loss_feature": lambda c: c.result("feature", "low").value,
    "loss_relation": lambda c: c.result("relation", "high").value,
    "loss_resp_cls": lambda c: c.result("response_class", "hm_logits").value,
    "loss_resp_reg": lambda c: c.result("response_regression", "reg").value,
    "loss_total": _UniDistill.total,
    "grad_feature_student_low": lambda c: c.gradient("feature", "low"),
    "grad_relation_student_high": lambda c: c.gradient("relation", "high"),
    "grad_resp_cls_student_hm_logits": lambda c: c.gradient("response_class", "hm_logits"),
    "grad_resp_reg_student_reg": lambda c: c.gradient("response_regression", "reg"),
    "assigner_heatmap_car": lambda c: c.assigned.heatmap,
    "assigner_ind": lambda c: c.assigned.index,
    "assigner_positive_rows": lambda c: c.assigned.index // c.grid.width,
    "assigner_positive_cols": lambda c: c.assigned.index % c.grid.width,
    "assigner_box_encoding": lambda c: c.assigned.encoding,
}
_TOLERANCES = {"relation_": 2e-4, "loss_total": 1e-4, "sampled_": 1e-4}
"""By prefix, 1e-5 elsewhere. Readings move with their place, which float32 rounds to 1e-5 cells on large maps."""
_SUFFIXES = re.compile(rf"(?P<base>.+?)(?:_(?P<path>{'|'.join(PATHS)}))?(?P<unswapped>_unswapped)?")


def _unidistill_owns(names: frozenset[str]) -> bool:
    return names >= _MARKS


def _unidistill_rows(file: str, arrays: Arrays) -> list[Row]:
    rows = []
    cases: dict[tuple[str, bool], _UniDistill] = {}
    totals = sorted(name for name in arrays if name.startswith("loss_total"))
    for name in sorted(set(arrays) - _INPUTS - {_MARKER}):
        match = _SUFFIXES.fullmatch(name)
        base, path, unswapped = (
            (match["base"], match["path"] or "L2C", bool(match["unswapped"])) if match else ("", "", False)
        )
        tolerance = next((t for prefix, t in _TOLERANCES.items() if base.startswith(prefix)), 1e-5)
        if base not in _OUTPUTS:
            rows.append(Row(file, name, None, tolerance, note="nothing computes this array"))
            continue
        case = cases.setdefault((path, unswapped), _UniDistill(arrays, path, unswapped))
        if any(base == loss and not case.holds(tensor) for tensor, loss in _RESPONSES.values()) and totals:
            rows.append(Row(file, name, None, tolerance, False, f"no inputs; enters {', '.join(totals)} as stored"))
            continue
        try:
            row = compare(file, name, _OUTPUTS[base](case), arrays[name], tolerance)
            rows.append(replace(row, note=row.note or case.note(base)))
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            rows.append(Row(file, name, None, tolerance, note=str(error.args[0] if error.args else error)))
    return rows


FAMILY = Family("unidistill", _unidistill_owns, _unidistill_rows, _MARKS)
"""How to tell and compare such files."""
