"""DistillBEV's released computations statement by statement: loops over samples, boxes and cells, in float64.

Boxes are rows (x, y, bottom, w, l, h, clockwise yaw): a local (a, b), a along w, lies at
(a cos + b sin, b cos - a sin).
"""

from __future__ import annotations

import json
import math

import numpy as np
import torch
import torch.nn.functional as F

VOXEL, FACTOR = 0.1, 8
CELL = VOXEL * FACTOR
CONFIG = {
    "adaptation_type": "1x1conv",
    "affinity_mode": "none",
    "bg_feat_loss_weights": [0.04],
    "channel_loss_weights": [0.25],
    "channel_mask": False,
    "channel_t": 0.5,
    "fg_feat_loss_weights": [0.006],
    "fp_as_foreground": "none",
    "fp_scale_mode": "average",
    "fp_weight": 0.06,
    "groundtruth_threshold": None,
    "output_threshold": 0.1,
    "scale_mask": "combine_gt",
    "spatial_attentions": ["teacher_student"],
    "spatial_loss_weights": [0.0025],
    "spatial_t": 0.5,
    "student_feat_pos": ["head"],
    "teacher_feat_pos": ["head"],
}
TURNS = (0.0, math.pi / 4, math.pi / 2, -1.2, 2.9)


def inside(x: float, y: float, box: np.ndarray) -> bool:
    cos, sin = math.cos(box[6]), math.sin(box[6])
    dx, dy = x - box[0], y - box[1]
    return abs(dx * cos - dy * sin) < box[3] / 2 and abs(dx * sin + dy * cos) < box[4] / 2


def foreground(boxes: list[np.ndarray], size: tuple[int, int], area: tuple[float, ...], at: float):
    """Mask and scale of each sample; the lowest box owns a cell."""
    cell = (area[3] - area[0]) / size[1]
    mask, scale = np.zeros((2, len(boxes), *size))
    for b, rows in enumerate(boxes):
        for i in range(size[0]):
            for j in range(size[1]):
                for row in rows[::-1]:
                    if inside(area[0] + (j + at) * cell, area[1] + (i + at) * cell, row):
                        mask[b, i, j], scale[b, i, j] = 1, math.sqrt(cell * cell / (row[3] * row[4]))
    return mask, scale


def heatmap(boxes: list[np.ndarray], labels: list[np.ndarray], size: tuple[int, int], area: tuple[float, ...]):
    out = np.zeros((len(boxes), 10, *size))
    for s, (rows, classes) in enumerate(zip(boxes, labels, strict=True)):
        for row, label in zip(rows, classes, strict=True):
            a, b, o = row[4] / CELL, row[3] / CELL, 0.1
            p, q = a + b, a * b
            r1 = (p + math.sqrt(p * p - 4 * q * (1 - o) / (1 + o))) / 2
            r2 = (2 * p + math.sqrt(4 * p * p - 16 * q * (1 - o))) / 2
            r3 = (-2 * o * p + math.sqrt(4 * o * o * p * p + 16 * o * (1 - o) * q)) / 2
            r = max(2, int(min(r1, r2, r3)))
            v, u = math.floor((row[1] - area[1]) / CELL), math.floor((row[0] - area[0]) / CELL)
            if not (0 <= u < size[1] and 0 <= v < size[0]):
                continue
            for i in range(max(0, v - r), min(size[0], v + r + 1)):
                for j in range(max(0, u - r), min(size[1], u + r + 1)):
                    g = math.exp(-((i - v) ** 2 + (j - u) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
                    out[s, label, i, j] = max(out[s, label, i, j], g)
    return out


def queue_scale(cells: np.ndarray) -> np.ndarray:
    """The released search: a cell is marked when it leaves the queue."""
    out = np.zeros(cells.shape)
    for sample, scale in zip(cells, out, strict=True):
        marked = np.zeros(sample.shape, bool)
        for start in zip(*np.nonzero(sample), strict=True):
            if marked[start]:
                continue
            queue, seen = [start], []
            while queue:
                i, j = queue.pop(0)
                marked[i, j] = True
                seen.append((i, j))
                for a, b in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                    inside_map = 0 <= a < sample.shape[0] and 0 <= b < sample.shape[1]
                    if inside_map and sample[a, b] and not marked[a, b]:
                        queue.append((a, b))
            for cell in seen:
                scale[cell] = 1 / len(seen)
    return out


def average_scale(cells: np.ndarray) -> np.ndarray:
    out = np.zeros(cells.shape)
    for sample, scale in zip(cells, out, strict=True):
        if sample.sum():
            scale[sample > 0] = 1 / sample.sum()
    return out


def scores(logits: torch.Tensor) -> np.ndarray:
    return (1 / (1 + np.exp(-logits.numpy()))).clip(1e-4, 1 - 1e-4).max(1)


def adapt(kind: str, x: torch.Tensor, size: tuple[int, int], p: list[torch.Tensor]) -> torch.Tensor:
    if kind == "identity":
        return x
    if kind == "1x1conv":
        return torch.einsum("oi,bihw->bohw", p[0][..., 0, 0], x) + p[1][:, None, None]
    x = F.interpolate(x, size, mode="bilinear", align_corners=True)
    for k in range(3):
        weight, bias, gain, shift = p[4 * k : 4 * k + 4]
        x = torch.einsum("oi,bihw->bohw", weight[..., 0, 0], x) + bias[:, None, None]
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        x = ((x - mean) / (var + 1e-5).sqrt() * gain[:, None, None] + shift[:, None, None]).clamp(min=0)
    return x


def spread(strength: torch.Tensor) -> torch.Tensor:
    """Number of entries times softmax over them, for each sample."""
    powers = torch.exp(strength.flatten(1) - strength.flatten(1).max(1, keepdim=True).values)
    return (powers / powers.sum(1, keepdim=True) * powers.shape[1]).reshape(strength.shape)


def losses(c: dict, t, s, psi, fg, size_scale, fp, fp_scale) -> dict[str, torch.Tensor]:
    """The losses of one position, from the adapted student and numpy regions."""
    batch, _, height, width = t.shape
    attention = spread(t.abs().mean(1) / c["spatial_t"])
    if c["spatial_attentions"] == "teacher_student":
        attention = (attention + spread(s.detach().abs().mean(1) / c["spatial_t"])) / 2
    channels = spread(t.abs().mean((2, 3)) / c["channel_t"])[..., None, None]
    parts = {k: torch.zeros((), dtype=torch.float64) for k in ("fg", "bg", "fp")}
    for b in range(batch):
        n_bg = height * width - fg[b].sum() - fp[b].sum()
        s_bg = 1 / n_bg if n_bg > 0 else 0.0
        for i in range(height):
            for j in range(width):
                d = (t[b, :, i, j] - s[b, :, i, j]) ** 2
                ca = channels[b, :, 0, 0]
                plain = ((d * ca) if c["channel_mask"] else d).sum() * attention[b, i, j] / batch
                if fg[b, i, j]:
                    scale = size_scale[b, i, j]
                    scale = max(scale, s_bg) if c["scale_mask"] == "combine_gt" else scale
                    parts["fg"] = parts["fg"] + plain * scale * c["fg_feat_loss_weights"]
                if fp[b, i, j]:
                    wrong = (d * ca).sum() * attention[b, i, j] / batch
                    parts["fp"] = parts["fp"] + wrong * fp_scale[b, i, j] * c["fp_weight"]
                if not fg[b, i, j] and not fp[b, i, j]:
                    parts["bg"] = parts["bg"] + plain * s_bg * c["bg_feat_loss_weights"]
    means = F.pad(s.mean(1), (1, 1, 1, 1))
    mapped = torch.zeros(batch, height, width, dtype=torch.float64) + psi[1]
    for a in range(3):
        for b in range(3):
            mapped = mapped + psi[0][0, 0, a, b] * means[:, a : a + height, b : b + width]
    out = {"kd_fg_feat_loss": parts["fg"], "kd_bg_feat_loss": parts["bg"]}
    if c["fp_as_foreground"] != "none":
        out["kd_fp_bg_feat_loss"] = parts["fp"]
    if c["channel_mask"]:
        means_off = (t.mean((2, 3)) - s.mean((2, 3))).abs().sum() / batch
        out["kd_channel_loss"] = c["channel_loss_weights"] * means_off
    return out | {"kd_spatial_loss": c["spatial_loss_weights"] * (t.mean(1) - mapped).abs().sum() / batch}


def random_boxes(rng: np.random.Generator, counts, size, low) -> list[np.ndarray]:
    """Right angles and others, overlaps, boxes less than a cell, centres anywhere and a little outside."""
    reach = np.array([size[1], size[0]]) * CELL
    out = []
    for count in counts:
        rows = np.zeros((count, 9), np.float32)
        rows[:, :2] = low + rng.uniform(-0.03, 1.03, (count, 2)) * reach
        rows[:, 2] = -1.7
        rows[:, 3:5] = (
            rng.uniform(0.8, 1.2, (count, 2)) * np.array([[1.9, 4.5], [2.9, 9.0], [0.5, 0.6]])[np.arange(count) % 3]
        )
        rows[:, 5] = 1.5
        rows[:, 6] = rng.choice(TURNS, count)
        if count > 2:
            rows[2, :2] = rows[0, :2] + np.float32(0.37)
            rows[2, 3:5] = (2.1, 4.0)
        out.append(rows)
    return out


def parameters(rng, kind: str, student: int, teacher: int, index: int) -> dict[str, np.ndarray]:
    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.5, shape).astype(np.float32)

    names = {}
    prefix = f"param__channel_wise_adaptations.{index}."
    if kind == "1x1conv":
        names = {"weight": draw(teacher, student, 1, 1), "bias": draw(teacher)}
    elif kind == "upsample_3layer":
        for k, width in enumerate((student, student, teacher), 1):
            names |= {f"1.conv{k}.weight": draw(width, student, 1, 1), f"1.conv{k}.bias": draw(width)}
            names |= {f"1.norm{k}.weight": 1 + draw(width) / 4, f"1.norm{k}.bias": draw(width)}
    psi = f"param__spatial_wise_adaptations.{index}."
    return {prefix + n: v for n, v in names.items()} | {psi + "weight": draw(1, 1, 3, 3), psi + "bias": draw(1)}


def loss_file(seed: int, size, counts, positions=(("head", 1, 1),), **config) -> dict[str, np.ndarray]:
    """A golden file of our own.

    Args:
        seed: of everything.
        size: rows and columns of the heat maps.
        counts: boxes of each sample.
        positions: name, rows of the heat map per row of the teacher's map, rows of that per row of the student's.
        config: what differs from `CONFIG`.
    """
    rng = np.random.default_rng(seed)
    names = [p[0] for p in positions]
    config = CONFIG | {"student_feat_pos": names, "teacher_feat_pos": names} | config
    low = np.array([-5.6, -9.2])
    high = low + np.array([size[1], size[0]]) * CELL
    area = (*low, -5.0, *high, 3.0)
    boxes = random_boxes(rng, counts, size, low)
    labels = [rng.integers(0, 10, len(rows)) for rows in boxes]
    logits = torch.from_numpy(rng.normal(-4.5, 2, (len(counts), 10, *size)).astype(np.float32))
    out = {
        "gt_boxes": np.concatenate(boxes),
        "gt_labels": np.concatenate(labels),
        "gt_offsets": np.cumsum([0, *counts]),
        "gt_heatmap": heatmap(boxes, labels, size, area),
        "teacher_logits": logits.numpy(),
        "geom_point_cloud_range": np.array(area, np.float32),
        "config_json": np.array(json.dumps(config)),
    }
    leaves, values, single = {}, {}, len(positions) == 1
    for k, (name, coarse, up) in enumerate(positions):
        c = {n: (v[k % len(v)] if isinstance(v, list) else v) for n, v in config.items()}
        kind, widths = c["adaptation_type"], (4, 4) if c["adaptation_type"] == "identity" else (3, 4)
        rows, columns = size[0] // coarse, size[1] // coarse
        maps = {"student": (widths[0], rows // up, columns // up), "teacher": (widths[1], rows, columns)}
        for side, shape in maps.items():
            array = rng.normal(0, 1, (len(counts), *shape)).astype(np.float32)
            out[f"{side}_feat" if single else f"{side}_{name}"] = array
        student, teacher = (f"{side}_feat" if single else f"{side}_{name}" for side in maps)
        drawn = parameters(rng, kind, *widths, k)
        leaves |= {n: torch.from_numpy(v).double().requires_grad_() for n, v in drawn.items()}
        leaves[student] = torch.from_numpy(out[student]).double().requires_grad_()
        out |= drawn
        fg, scale = foreground(boxes, (rows, columns), area, 0.0)
        fp = np.zeros(fg.shape)
        if c["fp_as_foreground"] != "none":
            fires = (out["gt_heatmap"].max(1) < 0.1) & (scores(logits) > 0.1)
            fires = fires.reshape(len(counts), rows, coarse, columns, coarse).max((2, 4))
            fp = (fires & (fg == 0)).astype(float)
        phi = [leaves[n] for n in drawn if "channel_wise" in n]
        psi = [leaves[n] for n in drawn if "spatial_wise" in n]
        adapted = adapt(kind, leaves[student], (rows, columns), phi)
        fp_scale = queue_scale(fp) if c["fp_scale_mode"] == "dfs" else average_scale(fp)
        found = losses(c, torch.from_numpy(out[teacher]).double(), adapted, psi, fg, scale, fp, fp_scale)
        values |= {f"loss__{n}" + ("" if single else f"_{name}_{name}"): v for n, v in found.items()}
        if k == 0:
            out |= {"mid__foreground_mask": fg[:, None], "mid__fg_scale_mask": scale[:, None]}
            if c["fp_as_foreground"] != "none":
                out |= {"mid__fp_region": fp[:, None], "mid__fp_scale_mask": fp_scale[:, None]}
    total = sum(values.values())
    gradients = torch.autograd.grad(total, list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        out[f"gradparam__{name[7:]}" if name.startswith("param__") else f"grad__{name}"] = gradient.numpy()
    return out | {n: v.detach().numpy() for n, v in values.items()} | {"loss_total": total.detach().numpy()}
