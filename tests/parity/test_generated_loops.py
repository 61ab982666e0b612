"""Parity on cases written by loops, for kinds of files that exist in one size and range only."""

import json
import math

import numpy as np
import pytest
import torch
from distillbev_twin import CELL, CONFIG, average_scale, foreground, heatmap, loss_file, losses, random_boxes, scores
from test_parity import released_file

from kdlab.parity import parity


def off(rows) -> list:
    return [(r.file, r.array, r.error, r.note) for r in rows if not r.passed]


def uni_mask(boxes, low, cell, size):
    """Gaussians of all rows until the first that is all zeros with its label; padding (label 1) lights the ego's cell.

    The maps of these cases are odd, so that the ego stands on no border of a cell.
    """
    mask = np.zeros((len(boxes), *size))
    for b, m in np.ndindex(*boxes.shape[:2]):
        a, w = (float(v) / cell for v in boxes[b, m, 3:5])
        t, p, o = a + w, a * w, 0.7
        radii = (
            (t + math.sqrt(t * t - 4 * p * (1 - o) / (1 + o))) / 2,
            (2 * t + math.sqrt(4 * t * t - 16 * (1 - o) * p)) / 2,
            (-2 * o * t + math.sqrt(4 * o * o * t * t + 16 * o * (1 - o) * p)) / 2,
        )
        r = max(0, int(min(radii)))
        u, v = (int((float(boxes[b, m, k]) - low[k]) / cell) for k in (0, 1))
        for i in range(max(0, v - r), min(size[0], v + r + 1)):
            for j in range(max(0, u - r), min(size[1], u + r + 1)):
                g = math.exp(-((i - v) ** 2 + (j - u) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
                mask[b, i, j] = max(mask[b, i, j], g)
    return mask


def uni_responses(rng, mask, channels):
    """Response losses and gradients of both clamps, cell by cell."""
    (batch, height, width), total = mask.shape, mask.sum() + 1e-4
    out = {}
    for side in ("student", "teacher"):
        out[f"{side}_hm_logits"] = (rng.integers(-40, 20, (batch, 10, height, width)) / 4).astype(np.float32)
        out[f"{side}_reg"] = rng.normal(0, 1, (batch, channels, height, width)).astype(np.float32)
    logits = out["student_hm_logits"].astype(float)
    raw = 1 / (1 + np.exp(-logits))
    ours = raw.clip(1e-4, 1 - 1e-4)
    halved = 1 / (1 + np.exp(-out["teacher_hm_logits"].astype(float) / 2))
    out["student_hm_prob"] = ours
    for suffix, eps in (("", 1e-4), ("_F2C", 1e-3)):
        loss, gradient = 0.0, np.zeros(logits.shape)
        for b, i, j in np.ndindex(*mask.shape):
            k = int(ours[b, :, i, j].argmax())
            apart = ours[b, k, i, j] - halved[b, :, i, j].clip(eps, 1 - eps).max()
            loss += mask[b, i, j] * abs(apart) / total
            if 1e-4 <= raw[b, k, i, j] <= 1 - 1e-4:
                slope = raw[b, k, i, j] * (1 - raw[b, k, i, j])
                gradient[b, k, i, j] = np.sign(apart) * slope * mask[b, i, j] / total
        out |= {f"loss_resp_cls{suffix}": loss, f"grad_resp_cls_student_hm_logits{suffix}": gradient}
    apart = out["student_reg"].astype(float) - out["teacher_reg"]
    out["loss_resp_reg"] = (np.abs(apart).mean(1) * mask).sum() / total
    out["grad_resp_reg_student_reg"] = np.sign(apart) * mask[:, None] / total / channels
    return out


@pytest.mark.parametrize(("size", "counts"), [((15, 11), (4, 2)), ((9, 17), (3,)), ((13, 13), (5, 0, 1))])
def test_responses_and_totals_of_unidistill(tmp_path, size, counts):
    rng, arrays = np.random.default_rng(sum(size)), released_file(sum(size), size, counts, (3, 4))
    low, cell = arrays["pc_range"][:2], float(arrays["voxel_size"][0] * arrays["out_size_factor"])
    mask = uni_mask(arrays["gt_boxes"], low, cell, size)
    arrays |= uni_responses(rng, mask, 17) | {"gauss_mask": mask, "det_loss": np.array(2.75)}
    arrays["gt_labels"] = rng.integers(0, 10, arrays["gt_labels"].shape).astype(np.float32)
    for b, count in enumerate(counts):
        arrays["gt_labels"][b, count:] = 0
    arrays["gt_boxes_labelled"] = np.concatenate((arrays["gt_boxes"], arrays["gt_labels"][..., None] + 1), -1)
    for path, w in {"L2C": (100, 40, 10), "C2L": (10, 5, 1), "F2C": (10, 5, 10), "F2L": (10, 1, 10)}.items():
        response = arrays["loss_resp_cls_F2C" if path == "F2C" else "loss_resp_cls"] + arrays["loss_resp_reg"]
        value = w[0] * arrays["loss_feature"] + w[1] * arrays["loss_relation"] + w[2] * response
        arrays[f"loss_total_{path}"] = 2.75 + value
    np.savez(tmp_path / "x.npz", **arrays)
    rows = parity(tmp_path)
    assert off(rows) == [] and len(rows) >= 29 and all(r.judged for r in rows)


@pytest.mark.parametrize("size", [(11, 7), (6, 20)])
def test_the_assigner_of_unidistill(tmp_path, size):
    rng, cell, count = np.random.default_rng(size[0]), 0.8, 4
    boxes = np.zeros((1, count, 9), np.float32)
    boxes[0, :, :2] = rng.uniform(0.1, 0.9, (count, 2)) * (size[1] * cell, size[0] * cell) + (3, -7)
    boxes[0, :, 2:] = rng.uniform(0.5, 3, (count, 7))
    cars = [0, 2, 3]
    labels = np.array([[0, 4, 0, 0]], np.float32)
    centre = {
        m: [float(np.float32(boxes[0, m, k] - lo) / np.float32(cell)) for k, lo in ((0, 3), (1, -7))] for m in cars
    }
    apart = {
        m: {(i, j): (centre[m][0] - j) ** 2 + (centre[m][1] - i) ** 2 for i in range(size[0]) for j in range(size[1])}
        for m in cars
    }
    near = {cell for m in cars for cell in sorted(apart[m], key=apart[m].get)[:9]}
    heat, index, codes = np.zeros(size), [], []
    for i, j in sorted(near):
        heat[i, j] = 1
        m = min(cars, key=lambda m, at=(i, j): apart[m][at])
        _, _, z, l, w, h, yaw, vx, vy = (float(v) for v in boxes[0, m])
        index.append(i * size[1] + j)
        offset = (centre[m][0] - j, centre[m][1] - i)
        codes.append((*offset, z, math.log(l), math.log(w), math.log(h), math.sin(yaw), math.cos(yaw), vx, vy))
    arrays = {
        "gt_boxes": boxes,
        "gt_labels": labels,
        "pc_range": np.array([3, -7, -5, 3 + size[1] * cell, -7 + size[0] * cell, 3]),
        "voxel_size": np.array([0.2, 0.2, 0.2]),
        "out_size_factor": np.array(4),
        "assigner_heatmap_car": heat,
        "assigner_ind": np.array(index),
        "assigner_positive_rows": np.array(index) // size[1],
        "assigner_positive_cols": np.array(index) % size[1],
        "assigner_box_encoding": np.array(codes),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    rows = parity(tmp_path)
    assert off(rows) == [] and len(rows) == 5


def bevformer(seed: int, side: int, counts, low):
    """Boxes of both sides, regions with cell centres tested, and false positives with rows and columns exchanged."""
    rng, high = np.random.default_rng(seed), np.array(low) + side * CELL
    area = (*low, -5.0, *high, 3.0)
    truth = random_boxes(rng, counts, (side, side), np.array(low))
    found = random_boxes(rng, [c + 3 for c in counts], (side, side), np.array(low))
    certain = [rng.uniform(0, 0.4, len(rows)).astype(np.float32) for rows in found]
    fg, scale = foreground(truth, (side, side), area, 0.5)
    sure = [rows[p > 0.1] for rows, p in zip(found, certain, strict=True)]
    fp = ((foreground(sure, (side, side), area, 0.5)[0] > 0) & (fg == 0)).swapaxes(1, 2).astype(float)
    arrays = {"geom_point_cloud_range": np.array(area), "teacher_scores": np.concatenate(certain)}
    for name, rows in (("gt", truth), ("teacher", found)):
        arrays[f"{name}_boxes"] = np.concatenate(rows)
        arrays[f"{name}_offsets"] = np.cumsum([0, *(len(r) for r in rows)])
    return rng, arrays, fg, scale, fp


@pytest.mark.parametrize(("side", "counts"), [(18, (4, 0, 2)), (31, (5,))])
def test_bevformer_regions_and_losses(tmp_path, side, counts):
    rng, arrays, fg, scale, fp = bevformer(side, side, counts, (-3.0, 11.0))
    shown = {"fg_mask_x": fg, "fp_mask_x": fp, "fp_scale_x": average_scale(fp)}
    regions = {n: v[:, None] for n, v in shown.items()} | {
        "fp_count": fp.sum((1, 2)),
        "output_threshold": np.array(0.1),
    }
    np.savez(tmp_path / "regions.npz", **arrays, **regions)
    config = CONFIG | {"fp_as_foreground": "teacher", "adaptation_type": "identity", "spatial_attentions": ["teacher"]}
    t, s = (torch.from_numpy(rng.normal(0, 1, (len(counts), 3, side, side)).astype(np.float32)).double() for _ in "ts")
    psi = [torch.from_numpy(rng.normal(0, 0.5, shape).astype(np.float32)).double() for shape in ((1, 1, 3, 3), (1,))]
    for leaf in (s, *psi):
        leaf.requires_grad_()
    flat = {n: v[0] if isinstance(v, list) else v for n, v in config.items()}
    values = losses(flat, t, s, psi, fg, scale, fp, average_scale(fp))
    total = sum(values.values())
    gradients = torch.autograd.grad(total, (s, *psi))
    names = ("student_feat", "spatial_wise_adaptations.0.weight", "spatial_wise_adaptations.0.bias")
    out = {f"grad{'param' if k else ''}__{n}": g for k, (n, g) in enumerate(zip(names, gradients, strict=True))}
    out |= {f"loss__{n}": v for n, v in values.items()} | {"loss_total": total, "teacher_feat": t, "student_feat": s}
    out |= {f"param__{n}": p for n, p in zip(names[1:], psi, strict=True)}
    found = {n: v.detach().numpy() for n, v in out.items()} | {"config_json": np.array(json.dumps(config))}
    np.savez(tmp_path / "losses.npz", **arrays, **found)
    rows = parity(tmp_path)
    assert off(rows) == [] and len(rows) == 4 + 8


def test_ring_affinity_and_second_sigmoid(tmp_path):
    rng, size, counts, low = np.random.default_rng(3), (12, 20), (5, 3), (-8.0, 2.0)
    area = (*low, -5.0, low[0] + size[1] * CELL, low[1] + size[0] * CELL, 3.0)
    boxes = random_boxes(rng, counts, size, np.array(low))
    given = {"gt_boxes": np.concatenate(boxes), "gt_offsets": np.cumsum([0, *counts])}
    given["geom_point_cloud_range"] = np.array(area)
    grown = [rows + np.array([0, 0, 0, 3 * CELL, 3 * CELL, 0, 0, 0, 0]) for rows in boxes]
    inner, outer = (foreground(b, size, area, 0.0)[0] for b in (boxes, grown))
    mask = np.where(inner > 0, 1.0, np.where(outer > 0, 0.25, 0.0))
    scale = np.zeros(mask.shape)
    for b, rows in enumerate(grown):
        for m in range(len(rows))[::-1]:
            cells = foreground([rows[m : m + 1]], size, area, 0.0)[0][0] > 0
            scale[b][cells] = CELL**2 / (boxes[b][m, 3] * boxes[b][m, 4])
    background = np.broadcast_to(1 / (mask == 0).sum((1, 2))[:, None, None], mask.shape)
    maps = {"fg_mask_20": mask, "fg_scale_20": scale, "bg_scale_20": background}
    ring = {"context_length": np.array(3), "context_weight": np.array(0.25)}
    np.savez(tmp_path / "ring.npz", **given, **ring, **{n: v[:, None] for n, v in maps.items()})
    labels, logits = (
        [rng.integers(0, 10, c) for c in counts],
        torch.from_numpy(rng.normal(-6, 3, (2, 10, *size))).float(),
    )
    fg, truth = foreground(boxes, size, area, 0.0)[0], heatmap(boxes, labels, size, area)
    calls = {"teacher_logits": logits.numpy(), "gt_heatmap": truth, "fg_mask": fg[:, None]}
    for call, found in ((1, logits), (2, torch.from_numpy((1 / (1 + np.exp(-logits.numpy()))).clip(1e-4, 1 - 1e-4)))):
        fires = (scores(found) > 0.1) & (truth.max(1) < 0.1) & (fg == 0)
        calls |= {f"fp_mask_call{call}": fires[:, None], f"fp_scale_call{call}": average_scale(fires * 1.0)[:, None]}
    np.savez(tmp_path / "calls.npz", geom_point_cloud_range=np.array(area), **calls)
    arrays = loss_file(9, (8, 14), (3, 4), adaptation_type="identity", affinity_mode="foreground", affinity_weights=0.5)
    cells, total = arrays["mid__foreground_mask"][:, 0] > 0, 0.0
    for s, t, where in zip(arrays["student_feat"], arrays["teacher_feat"], cells, strict=True):
        a, b = (m[:, where].T.astype(float) for m in (s, t))
        d = np.abs(a @ a.T - b @ b.T)
        total += np.where(d < 1, d * d / 2, d - 0.5).mean()
    kept = {n: v for n, v in arrays.items() if n != "loss_total" and not n.startswith("grad")}
    np.savez(tmp_path / "affinity.npz", **kept, loss__kd_affinity_loss=np.array(0.5 * total))
    rows = parity(tmp_path)
    assert off(rows) == [] and len(rows) >= 3 + 4 + 5


def test_radii_of_other_overlaps_and_a_smaller_frustum(tmp_path):
    rng, overlap = np.random.default_rng(4), 0.35
    cells = np.array([0.4, 1.5, 3.0, 7.25, 20.0], np.float32)
    radius = np.zeros((5, 5))
    for (i, a), (j, b) in ((x, y) for x in enumerate(cells.tolist()) for y in enumerate(cells.tolist())):
        t, p, o = a + b, a * b, overlap
        radius[i, j] = min(
            (t + math.sqrt(t * t - 4 * p * (1 - o) / (1 + o))) / 2,
            (2 * t + math.sqrt(4 * t * t - 16 * (1 - o) * p)) / 2,
            (-2 * o * t + math.sqrt(4 * o * o * t * t + 16 * o * (1 - o) * p)) / 2,
        )
    out = {"cells": cells, "min_overlap": np.array(overlap), "radius": radius}
    out["radius_used"] = np.array([[max(2, int(r)) for r in row] for row in radius])
    for r in (1, 5):
        steps = range(-r, r + 1)
        patch = [[math.exp(-(i * i + j * j) / (2 * ((2 * r + 1) / 6) ** 2)) for j in steps] for i in steps]
        out[f"patch_r{r}"] = np.array(patch)
    np.savez(tmp_path / "radius.npz", **out)
    bound, (rows, columns), batch, cameras = (1.5, 9.5, 2.0), (3, 5), 2, 3
    depth = np.arange(*bound)
    frustum = np.ones((len(depth), rows, columns, 4))
    for d, i, j in np.ndindex(len(depth), rows, columns):
        frustum[d, i, j, :3] = j * (16 * columns - 1) / (columns - 1), i * (16 * rows - 1) / (rows - 1), depth[d]
    out, shape = {"d_bound": np.array(bound), "frustum": frustum}, (batch, cameras, 4, 4)
    out["intrin"] = np.broadcast_to(np.diag([60.0, 50, 1, 1]), shape) + np.eye(4, k=2) * [0, 0, 40, 0] * np.eye(4, k=2)
    out["ida"] = np.broadcast_to(np.diag([0.5, 0.5, 1, 1]), shape) + rng.normal(0, 0.02, shape) * _corner(2)
    out["ida"][..., :2, 3] = rng.normal(0, 9, (batch, cameras, 2))
    out["sensor2ego"] = np.broadcast_to(np.eye(4), shape) + rng.normal(0, 0.3, shape) * _corner(3)
    out["sensor2ego"][..., :3, 3] = rng.normal(0, 2, (batch, cameras, 3))
    out["bda"] = np.broadcast_to(np.eye(4), (batch, 4, 4)) + rng.normal(0, 0.2, (batch, 4, 4)) * _corner(3)
    xyz = np.zeros((batch, cameras, *frustum.shape[:3], 3))
    for b, n, d, i, j in np.ndindex(*xyz.shape[:-1]):
        u, v, z, _ = np.linalg.inv(out["ida"][b, n]) @ frustum[d, i, j]
        seen = np.linalg.inv(out["intrin"][b, n]) @ (u * z, v * z, z, 1)
        xyz[b, n, d, i, j] = (out["bda"][b] @ out["sensor2ego"][b, n] @ seen)[:3]
    out |= {"voxel_size": np.array([0.5, 0.5, 8]), "voxel_coord": np.array([-7.75, -3.75, -1.0])}
    xyz = xyz.astype(np.float32).astype(float)
    first = out["voxel_coord"] - out["voxel_size"] / 2
    out |= {"xyz": xyz, "voxel_idx": np.trunc((xyz - first) / out["voxel_size"]).astype(int)}
    np.savez(tmp_path / "frustum.npz", **out)
    found = parity(tmp_path)
    assert off(found) == [] and len(found) == 4 + 3


def _corner(side: int) -> np.ndarray:
    """1 in the first rows and columns."""
    return np.pad(np.ones((side, side)), (0, 4 - side))
