"""SimDistill's files: losses and their gradients, masks, targets, geometry compensation.

What no release uses is computed by `kdlab.parity.oracles` or here, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlab.config import CameraConfig
from kdlab.distill.regions import gaussian_mask
from kdlab.distill.simdistill import BETA, CODE_WEIGHTS, box_error, score_error
from kdlab.geometry import BEVGrid
from kdlab.models.camera import depth_loss
from kdlab.models.deformable import GeometryCompensation
from kdlab.models.targets import gaussian_radius
from kdlab.parity.compare import Arrays, Family, Row, compare, not_computed
from kdlab.parity.oracles import view_counts, view_weights
from kdlab.parity.simdistill_case import Case, difference

Compute = Callable[[Case, "re.Match[str]"], Tensor]
_NO_DEPTH = 1e5  # metres, of a patch without a point


@dataclass(frozen=True)
class _Kind:
    """Files about one thing.

    Attributes:
        marks: arrays that only such files have all of.
        inputs: pattern of further arrays that are not judged.
        outputs: patterns of arrays, what computes them, and the tolerance.
    """

    marks: frozenset[str]
    inputs: str
    outputs: Mapping[str, tuple[Compute, float]]


def _released_weights(case: Case) -> None:
    """Refuse weights other than the released ones.

    Raises:
        ValueError: the file has others.
    """
    if "code_weights" in case.arrays and not np.allclose(case.arrays["code_weights"], CODE_WEIGHTS):
        raise ValueError(f"code_weights are not known, only {CODE_WEIGHTS}")
    if "beta" in case.arrays and abs(case.number("beta") - BETA) > 1e-9:
        raise ValueError(f"beta = {case.number('beta')} is not known, only {BETA:.6f}")


def _loss_or_gradient(case: Case, match: re.Match[str], loss: Tensor, array: str = "{side}") -> Tensor:
    """The loss, or where the output's name says a side, its gradient by the side's array."""
    side = match.groupdict().get("side")
    return loss if side is None else case.gradient(loss, array.format(side=side))


def _of_features(case: Case, match: re.Match[str]) -> Tensor:
    prefix = match["prefix"] or ""
    if case.leaf(f"{prefix}student").ndim < 4:
        raise KeyError("needs the input code_weights, or maps [B, C, X, Y]")
    loss = difference(case.leaf(f"{prefix}student"), case.leaf(f"{prefix}teacher"))
    return _loss_or_gradient(case, match, loss, prefix + "{side}")


def _of_cross_modal(case: Case, match: re.Match[str]) -> Tensor:
    if match["plain"]:
        return difference(case.leaf("student"), case.leaf("teacher"))
    return _loss_or_gradient(case, match, case.result("cross_modal").value)


def _of_heads(case: Case, match: re.Match[str]) -> Tensor:
    _released_weights(case)
    scores = match["part"] in ("cls", "heatmap")
    term, array = ("prediction_class", "heatmap_logits") if scores else ("prediction_box", "box")
    if "side" not in match.groupdict():
        return case.by_task(term)
    return _loss_or_gradient(case, match, case.result(term).value, f"{{side}}_{array}")


def _slots(case: Case, match: re.Match[str]) -> Tensor:
    found = case.slotted(case.arrays[match.string].shape[2])
    return {"ind": found.cell, "anno_box": found.codes}.get(match.string, found.filled)


def _radius(case: Case, match: re.Match[str]) -> Tensor:
    cells = case.given("cells").float()
    found = gaussian_radius(cells[:, None], cells, case.number("min_overlap"), released=True)
    return found if match.string == "radius" else found.floor().clamp(min=2)


def _patch(case: Case, match: re.Match[str]) -> Tensor:
    radius = int(match["radius"])
    side = 2.0 * radius + 1
    box = torch.tensor([side / 2, side / 2, 0, 1, 1, 1, 0, 0, 0], dtype=torch.float64)[None, None]
    drawn = torch.ones(1, 1, dtype=torch.bool)
    grid = BEVGrid((0.0, side), (0.0, side), 1.0)
    return gaussian_mask(box, drawn, grid, overlap=0.99, min_radius=radius)[0, 0]


def _scores(case: Case, match: re.Match[str]) -> Tensor:
    student, teacher = case.leaf("student_prob"), case.leaf("teacher_prob")
    loss = 0.25 * score_error(student, teacher).sum() * case.number("num_class") / student[0, 0].numel()
    return _loss_or_gradient(case, match, loss, "{side}_prob")


def _rows(case: Case, match: re.Match[str]) -> Tensor:
    _released_weights(case)
    student, teacher = case.leaf("student"), case.leaf("teacher")
    loss = 0.25 * box_error(student, teacher, sine=True).sum() / student.shape[1]
    return _loss_or_gradient(case, match, loss)


def _transfusion(case: Case, match: re.Match[str]) -> Tensor:
    _released_weights(case)
    logits = case.given("teacher_logits").float()
    if match["part"] == "box":
        error = box_error(case.leaf("student_box"), case.given("teacher_box").float(), sine=True)
        loss = 0.25 * (error * view_weights(logits.sigmoid())).sum() / error.shape[1]
        return _loss_or_gradient(case, match, loss, "{side}_box")
    loss = 0.25 * (score_error(case.leaf("student_logits"), logits) / view_counts(logits.sigmoid())).sum()
    return _loss_or_gradient(case, match, loss, "{side}_logits")


def _depths(case: Case) -> tuple[Tensor, Tensor]:
    """Depth probabilities [B, N, D, h, w] and the least depth of each patch [B, N, h, w], 0 where there is none."""
    truth = case.given("depth_gt").float()
    depth = case.leaf("logits").softmax(1).unflatten(0, truth.shape[:2])
    patch = (truth.shape[2] // depth.shape[3], truth.shape[3] // depth.shape[4])
    known = torch.where(truth > 0, truth, torch.inf)
    least = -torch.nn.functional.max_pool2d(-known, patch)
    return depth, torch.where(least.isinf(), 0, least)


def _depth(case: Case, match: re.Match[str]) -> Tensor:
    depth, least = _depths(case)
    bins = tuple(float(v) for v in case.given("dbound"))
    if match.string == "pred":
        return depth.flatten(0, 1)
    if match.string == "mindepth":
        return torch.where(least == 0, _NO_DEPTH, least).flatten(0, 1)
    if match.string == "onehot":
        index = ((least.flatten() - bins[0]) / bins[2]).floor()
        known = (least.flatten() >= bins[0]) & (least.flatten() < bins[1])
        return (index[:, None] == torch.arange(depth.shape[2])) & known[:, None]
    loss = CameraConfig().depth_weight * depth_loss(depth, least, bins)  # type: ignore[arg-type]
    return loss if match.string == "loss" else case.gradient(loss, "logits")


def _compensation(case: Case, match: re.Match[str]) -> Tensor:
    x = case.leaf("x")
    module = GeometryCompensation(
        x.shape[1], (x.shape[2], x.shape[3]), int(case.number("points")), int(case.number("heads")), True
    )
    if match.string == "ref_points":
        return (module.cells() / torch.tensor([x.shape[3], x.shape[2]]))[None, :, None]
    names = {"sampling_offsets": "offsets", "attention_weights": "weights", "value_proj": "value"}
    names |= {"output_proj": "output"}
    found = {"columns": case.given("w.pe.0.row_embed.weight"), "rows": case.given("w.pe.0.col_embed.weight")}
    for theirs, ours in names.items():
        for part in ("weight", "bias"):
            found[f"{ours}.{part}"] = case.given(f"w.el.0.self_attn.{theirs}.{part}")
    module.load_state_dict(found)
    if match.string == "grad_x":
        return case.gradient((module(x) * case.given("cotangent")).sum(), "x")
    return module.attend(x) if match.string == "dfa" else module(x)


def _total(case: Case, match: re.Match[str]) -> Tensor:
    losses = np.array(["loss" in str(key) for key in case.arrays["keys"]], dtype=bool)
    return torch.from_numpy(np.asarray(case.arrays["values"], dtype=np.float64)[losses]).sum()


def _kind(marks: str, inputs: str, outputs: Mapping[str, tuple[Compute, float]]) -> _Kind:
    return _Kind(frozenset(marks.split()), inputs, outputs)


_GEOMETRY = "gt_boxes|gt_labels|point_cloud_range|voxel_size|out_stride"
_SIDE = "(?P<side>student|teacher)"
KINDS = (
    _kind("x heads points", r"cotangent|w\..+", {"dfa|out|grad_x|ref_points": (_compensation, 1e-5)}),
    _kind("depth_gt logits dbound", "", {"pred|loss|grad_logits": (_depth, 1e-5), "mindepth|onehot": (_depth, 0.0)}),
    _kind("teacher_prob student_prob num_class", "", {f"loss|grad_{_SIDE}": (_scores, 1e-5)}),
    _kind(
        "cells min_overlap",
        "",
        {"radius": (_radius, 1e-5), "radius_used": (_radius, 0.0), r"patch_r(?P<radius>\d+)": (_patch, 1e-6)},
    ),
    _kind("keys values", "", {"total": (_total, 1e-6)}),
    _kind(
        "student_heatmap_logits teacher_heatmap_logits",
        rf"{_GEOMETRY}|(student|teacher)_box|code_weights",
        {
            "ind|mask": (_slots, 0.0),
            "kd_(?P<part>cls|bbox)": (_of_heads, 2e-5),
            f"grad_{_SIDE}_(?P<part>heatmap|box)": (_of_heads, 5e-5),
            "det_(?P<part>heatmap|bbox)": (lambda case, match: case.detection(match["part"]), 1e-5),
        },
    ),
    _kind(
        "student_logits teacher_logits student_box teacher_box",
        "code_weights",
        {
            "loss_(?P<part>cls|box)": (_transfusion, 1e-5),
            "grad_(?P<side>student)_(?P<part>logits|box)": (_transfusion, 1e-5),
        },
    ),
    _kind(
        "student teacher point_cloud_range",
        _GEOMETRY,
        {
            "mask": (lambda case, match: case.mask(), 1e-6),
            f"loss|grad_{_SIDE}|loss_(?P<plain>unmasked)": (_of_cross_modal, 1e-5),
        },
    ),
    _kind("student teacher code_weights", "beta", {f"loss|grad_{_SIDE}": (_rows, 1e-5)}),
    _kind(
        "student teacher",
        "gt_boxes|gt_labels|sem_(student|teacher)",
        {f"(?P<prefix>sem_)?(loss|grad_{_SIDE})": (_of_features, 1e-5)},
    ),
    _kind(
        "gt_boxes gt_labels point_cloud_range voxel_size out_stride",
        "",
        {
            "heatmaps": (lambda case, match: case.heatmaps(), 1e-6),
            "object_mask": (lambda case, match: case.mask(), 1e-6),
            "ind|valid": (_slots, 0.0),
            "anno_box": (_slots, 1e-5),
        },
    ),
)
"""What files are about; the first kind counts whose marks a file has."""


def _kind_of(names: frozenset[str]) -> _Kind | None:
    if "geom_point_cloud_range" in names:  # DistillBEV's
        return None
    return next((kind for kind in KINDS if kind.marks <= names), None)


def _scale(name: str, stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The greatest stored value; the first cell of a box map is measured alone, since all empty slots fall there."""
    size = np.abs(np.asarray(stored, dtype=np.float64))
    scale = np.full(size.shape, size.max(initial=0.0))
    if re.fullmatch("grad_(student|teacher)_box", name) and size.ndim == 5:
        size[..., 0, 0] = 0
        first = scale[..., 0, 0].copy()
        scale = np.full(size.shape, size.max(initial=0.0))
        scale[..., 0, 0] = first
    return scale


def _row(file: str, name: str, case: Case, kind: _Kind) -> Row:
    for pattern, (compute, tolerance) in kind.outputs.items():
        match = re.fullmatch(pattern, name)
        if match:
            stored = case.arrays[name]
            try:
                return compare(file, name, compute(case, match), stored, tolerance, _scale(name, stored))
            except Exception as error:  # whatever is wrong with one array, the others are still judged
                return Row(file, name, None, tolerance, note=str(error.args[0] if error.args else error))
    return Row(
        file, name, None, 0.0, note=not_computed(name, frozenset(case.arrays), ((k.marks, k.outputs) for k in KINDS))
    )


def _rows_of(file: str, arrays: Arrays) -> list[Row]:
    kind, case = _kind_of(frozenset(arrays)), Case(arrays)
    assert kind is not None
    judged = (name for name in sorted(arrays) if name not in kind.marks and not re.fullmatch(kind.inputs, name))
    return [_row(file, name, case, kind) for name in judged]


_MARKS = frozenset(mark for kind in KINDS for mark in kind.marks)
FAMILY = Family("simdistill", lambda names: _kind_of(names) is not None, _rows_of, _MARKS)
"""How to tell and compare such files."""
