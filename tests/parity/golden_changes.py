"""Other cases made from stored ones: their samples in another order or twice, and the mirror image of their scenes.

What the outputs then are follows from the specifications alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
EPS = 1e-4
TOTALS = {"L2C": (100, 40, 10), "C2L": (10, 5, 1), "F2C": (10, 5, 10), "F2L": (10, 1, 10)}


def load(file: Path) -> Arrays:
    """All arrays of a file."""
    with np.load(file) as stored:
        return {k: stored[k] for k in stored.files}


# UniDistill


def _uni_by_sample(name: str) -> bool:
    return not name.startswith(("loss_", "pc_", "voxel", "out_size", "seed", "det_", "assigner", "marker", "sampled_c"))


def uni_ordered(a: Arrays, rows: list[int]) -> Arrays:
    """These samples, in this order; two for one has sums twice as great over normalisers twice as great."""
    times = len(rows) / len(a["gt_boxes"])
    found = {n: v[rows] if _uni_by_sample(n) and v.ndim else v for n, v in a.items()}
    counts = {"feature": a["gt_indices"].sum(), "relation": a["gt_indices"].sum()} | {
        n: a["gauss_mask"].sum() for n in ("resp_cls", "resp_reg")
    }
    for part, count in counts.items():
        share = (float(count) + EPS) / (times * float(count) + EPS)
        found |= {n: v * share * times for n, v in a.items() if n.startswith(f"loss_{part}")}
        found |= {n: v[rows] * share for n, v in a.items() if n.startswith(f"grad_{part}")}
    for path, (low, high, response) in TOTALS.items():
        scores = found["loss_resp_cls_F2C" if path == "F2C" else "loss_resp_cls"]
        value = low * found["loss_feature"] + high * found["loss_relation"]
        found[f"loss_total_{path}"] = a["det_loss"] + value + response * (scores + found["loss_resp_reg"])
    return found


_MIRRORED_POINTS = [1, 0, 3, 2, 4, 5, 8, 7, 6]
"""The first and second side of a box keep their corners' order, left and right change places."""


def uni_mirrored(a: Arrays) -> Arrays:
    """x and y exchanged; the assigner, which breaks ties by the order of cells, is left out."""
    found = {n: v for n, v in a.items() if not n.startswith("assigner")}
    for name, v in found.items():
        base = re.sub("_(unswapped|F2C)$", "", name)
        if base in ("gt_boxes", "gt_boxes_labelled"):
            found[name] = _exchanged(v, 1)
        elif base == "pc_range":
            found[name] = v[[1, 0, 2, 4, 3, 5]]
        elif base == "gt_corners_bev":
            found[name] = v[..., _MIRRORED_POINTS[:4], ::-1]
        elif base == "grid":
            found[name] = v[..., _MIRRORED_POINTS, ::-1]
        elif base.startswith("sampled_"):
            found[name] = v[..., _MIRRORED_POINTS]
        elif base in ("relation_student", "relation_teacher"):
            found[name] = v[..., _MIRRORED_POINTS, :][..., _MIRRORED_POINTS]
        elif v.ndim > 2 or base == "gauss_mask":
            found[name] = v.swapaxes(-1, -2)
    return found


def _exchanged(boxes: np.ndarray, sign: int) -> np.ndarray:
    """Boxes with x and y exchanged; an angle that grows from +x to +y, or from +x to -y and a quarter off."""
    out = boxes.copy()
    out[..., [0, 1, 7, 8]] = boxes[..., [1, 0, 8, 7]]
    filled = np.abs(boxes[..., :9]).sum(-1) > 0
    out[..., 6] = np.where(filled, np.pi / 2 - boxes[..., 6], 0) * sign
    return out


# DistillBEV


def _rows_of(offsets: np.ndarray, samples: list[int]) -> tuple[np.ndarray, np.ndarray]:
    parts = [np.arange(offsets[s], offsets[s + 1]) for s in samples]
    counts = [len(p) for p in parts]
    return np.concatenate(parts).astype(int), np.cumsum([0, *counts]).astype(offsets.dtype)


def bev_ordered(a: Arrays, rows: list[int]) -> Arrays:
    """These samples, in this order; losses are means over them."""
    found = dict(a)
    for side in ("gt", "teacher"):
        if f"{side}_offsets" in a:
            index, found[f"{side}_offsets"] = _rows_of(a[f"{side}_offsets"], rows)
            for name in ("boxes", "labels", "scores", "boxes_modern"):
                if f"{side}_{name}" in a:
                    found[f"{side}_{name}"] = a[f"{side}_{name}"][index]
    batch = len(a["gt_offsets"]) - 1 if "gt_offsets" in a else len(next(v for v in a.values() if v.ndim == 4))
    boxes = ("gt_boxes", "gt_labels", "gt_offsets", "teacher_boxes", "teacher_offsets", "teacher_scores")
    for name, v in a.items():
        if not name.startswith((*boxes, "geom", "config", "param", "gradparam", "loss", "output", "context")):
            found[name] = v[rows] * (batch / len(rows) if name.startswith("grad") else 1)
    return found


def bev_mirrored(a: Arrays) -> Arrays:
    """x and y exchanged; sizes of components depend on where a search begins and are left out."""
    found = {n: v.swapaxes(-1, -2) if v.ndim == 4 else v for n, v in a.items() if "_dfs_" not in n}
    for name in ("gt_boxes", "teacher_boxes", "gt_boxes_modern"):
        if name in a:
            found[name] = _exchanged(a[name], 1)
    found["geom_point_cloud_range"] = a["geom_point_cloud_range"][[1, 0, 2, 4, 3, 5]]
    return found


# SimDistill

_SIM_ONE = ("code_weights", "beta", "point_cloud", "voxel", "out_stride", "dbound", "num_class", "kd_", "det_", "loss")
_SIM_ONE += ("sem_loss", "heads", "points", "w.", "cells", "radius", "min_overlap", "patch", "keys", "values", "total")


def sim_ordered(a: Arrays, rows: list[int]) -> Arrays:
    """These samples, in this order: differences are means over them, the heads' terms add up."""
    found = dict(a)
    batch = len(next(a[n] for n in ("gt_boxes", "depth_gt", "teacher_prob", "teacher", "teacher_box", "x") if n in a))
    times = len(rows) / batch
    for name, v in a.items():
        if not name.startswith(_SIM_ONE) and name != "ref_points":
            found[name] = v.reshape(batch, -1, *v.shape[1:])[rows].reshape(-1, *v.shape[1:])
    mean = not any(n in a for n in ("kd_cls", "teacher_prob", "teacher_logits", "beta", "x"))
    for name in a:
        if mean and name.startswith(("grad", "sem_grad")):
            found[name] = found[name] / times
        elif not mean and name.startswith(("loss", "kd_")):
            found[name] = found[name] * times
    if "det_bbox" in a:  # over the boxes of a task, or the cells with one
        count = a["mask"].sum((0, 2)).astype(float)
        found["det_bbox"] = a["det_bbox"] * times * (count + EPS) / (times * count + EPS)
        alone = np.array([len(set(a["ind"][:, t][a["mask"][:, t] > 0])) == 0 for t in range(6)])
        found["det_heatmap"] = a["det_heatmap"] * np.where(alone, times, 1)
    return found


def sim_mirrored(a: Arrays) -> Arrays:
    """x and y exchanged, codes in box maps left where they are; so the detection's box loss is left out."""
    found = {n: v for n, v in a.items() if n != "det_bbox"}
    size = round(float(a["point_cloud_range"][3] - a["point_cloud_range"][0]) / float(a["voxel_size"][0]) / 8)
    for name, v in found.items():
        if name == "gt_boxes":
            found[name] = _exchanged(v, 1)
        elif name == "anno_box":
            found[name] = v[..., [1, 0, 2, 3, 4, 5, 7, 6, 9, 8]]
        elif name == "ind":
            found[name] = v % size * size + v // size
        elif v.ndim > 3:
            found[name] = v.swapaxes(-1, -2)
    return found


# LabelDistill: one group, without its prefix

_LABEL_ONE = ("n_samples", "det_loss", "resp_loss", "step1_loss", "lidar_loss", "label_loss", "nomask", "gt_")


def label_ordered(a: Arrays, rows: list[int]) -> Arrays:
    """These samples, in this order; all normalisers are sums, so twice the samples change nothing but gradients."""
    found = {n: v for n, v in a.items() if not n.startswith("gt_")} | {"n_samples": np.array(len(rows))}
    batch = next(len(a[n]) for n in ("heatmap", "student_0") if n in a)
    for name in ("boxes", "labels"):
        if f"gt_{name}_0" in a:
            found |= {f"gt_{name}_{k}": a[f"gt_{name}_{row}"] for k, row in enumerate(rows)}
    if "n_samples" not in a:
        del found["n_samples"]
    for name, v in a.items():
        if not name.startswith(_LABEL_ONE) and "per_task" not in name and not name.endswith(("_max", "_sum")):
            found[name] = v[rows] * (batch / len(rows) if "_grad_" in name else 1)
    return found


def label_mirrored(a: Arrays) -> Arrays:
    """x and y exchanged; the polygon rule goes by rows, so label maps are left out."""
    codes, found = [1, 0, 2, 3, 4, 5, 7, 6, 9, 8], {n: v for n, v in a.items() if not n.startswith("bev_")}
    side = next(v for n, v in a.items() if n.startswith("heatmap")).shape[-1]
    for name, v in found.items():
        if name.startswith("gt_boxes"):
            found[name] = _exchanged(v, 1)
        elif name == "anno_box" or name.endswith("at_ind"):
            found[name] = v[..., codes]
        elif name == "student_box":
            found[name] = v[:, :, codes].swapaxes(-1, -2)
        elif name == "ind":
            found[name] = v % side * side + v // side
        elif v.ndim == 4:
            found[name] = v.swapaxes(-1, -2)
    return found
