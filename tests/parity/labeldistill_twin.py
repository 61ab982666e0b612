"""LabelDistill's released outputs as the specification states them, in loops, for cases of any size."""

import math

import numpy as np
import torch
import torch.nn.functional as F

TASKS = ((0,), (1, 2), (3, 4), (5,), (6, 7), (8, 9))


def random_boxes(rng, count, size, low, cell):
    """Boxes in and around the area, one without length."""
    span = np.array([size[1], size[0]]) * cell
    boxes = np.empty((count, 9))
    boxes[:, :2] = low + (rng.random((count, 2)) * 1.2 - 0.1) * span
    boxes[:, 2] = rng.normal(size=count)
    boxes[:, 3:6] = rng.random((count, 3)) * (9, 3, 2) + 0.3
    boxes[:, 6] = rng.random(count) * 12 - 6
    boxes[:, 7:] = rng.normal(size=(count, 2))
    if count > 3:
        boxes[3, 3] = 0
    return boxes.astype(np.float32), rng.integers(0, 10, count)


def filled(x, y, corners):
    right = left = 0
    for (x0, y0), (x1, y1) in zip(corners, corners[-1:] + corners[:-1], strict=True):
        a, b, c, d = x0 - x, y0 - y, x1 - x, y1 - y
        if a == 0 and b == 0:
            return True
        right += (b > 0) != (d > 0) and (a * d - c * b) / (d - b) > 0
        left += (b < 0) != (d < 0) and (a * d - c * b) / (d - b) < 0
    return right % 2 == 1 or left % 2 == 1


def polygon(u, v, long, across, yaw, size):
    """Cells (row, column) that a footprint of these sides, in cells, paints."""
    corners = []
    for s, t in ((-1, -1), (-1, 1), (1, 1), (1, -1)):
        p, q = s * long / 4, t * across / 4
        corners.append((int(u + p * math.cos(yaw) - q * math.sin(yaw)), int(v + p * math.sin(yaw) + q * math.cos(yaw))))
    us, vs = zip(*corners, strict=True)
    cells = ((i, j) for i in range(max(0, min(vs)), max(vs) + 1) for j in range(max(0, min(us)), max(us) + 1))
    return [(min(i, size[0] - 1), min(j, size[1] - 1)) for i, j in cells if filled(j, i, corners)]


def radius(h, w, o=0.1):
    s, p = h + w, h * w
    r1 = (s + math.sqrt(s * s - 4 * p * (1 - o) / (1 + o))) / 2
    r2 = (2 * s + math.sqrt(4 * s * s - 16 * (1 - o) * p)) / 2
    r3 = (-2 * o * s + math.sqrt(4 * o * o * s * s + 16 * o * (1 - o) * p)) / 2
    return max(2, int(min(r1, r2, r3)))


def targets(samples, size, low, cell, slots):
    """Label maps, heat maps, codes, cells and mask."""
    count, (height, width) = len(samples), size
    out = {
        "bev_mask": np.zeros((count, *size), np.uint8),
        "bev_box": np.zeros((count, *size, 9), np.float32),
        "bev_label": np.zeros((count, *size, 10), np.float32),
        "heatmap": np.zeros((count, 10, *size), np.float32),
        "anno_box": np.zeros((count, 6, slots, 10), np.float32),
        "ind": np.zeros((count, 6, slots), np.int64),
        "mask": np.zeros((count, 6, slots), np.uint8),
    }
    for b, (boxes, labels) in enumerate(samples):
        for t, classes in enumerate(TASKS):
            rows = [m for c in classes for m in np.flatnonzero(labels == c)]
            for k, m in enumerate(rows):
                x, y, z, dx, dy, dz, yaw, vx, vy = (float(a) for a in boxes[m])
                if dx <= 0 or dy <= 0:
                    continue
                u, v = (x - low[0]) / cell, (y - low[1]) / cell
                for i, j in polygon(u, v, dx / cell, dy / cell, yaw, size):
                    out["bev_mask"][b, i, j], out["bev_box"][b, i, j] = 1, boxes[m]
                    out["bev_label"][b, i, j] = np.eye(10)[labels[m]]
                column, row = int(u), int(v)
                if not (0 <= column < width and 0 <= row < height):
                    continue
                r = radius(dy / cell, dx / cell)
                for i in range(max(0, row - r), min(height, row + r + 1)):
                    for j in range(max(0, column - r), min(width, column + r + 1)):
                        g = math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
                        out["heatmap"][b, labels[m], i, j] = max(out["heatmap"][b, labels[m], i, j], g)
                out["ind"][b, t, k], out["mask"][b, t, k] = row * width + column, 1
                code = (u - column, v - row, z, math.log(dx), math.log(dy), math.log(dz))
                out["anno_box"][b, t, k] = (*code, math.sin(yaw), math.cos(yaw), vx, vy)
    return out


def boxes_file(rng, counts, size, low, cell, slots=16):
    samples = [random_boxes(rng, n, size, low, cell) for n in counts]
    out = {"n_samples": np.array(len(counts)), **targets(samples, size, low, cell, slots)}
    for b, (boxes, labels) in enumerate(samples):
        out |= {f"gt_boxes_{b}": boxes, f"gt_labels_{b}": labels}
    return out


def focal(p, t, d):
    error = torch.where(t == 1, (1 - p) ** 2 * -p.log(), (1 - t) ** 4 * p**2 * -(1 - p).log())
    return torch.stack([error[:, list(c)].sum() / max(1, int((d[:, list(c)] == 1).sum())) for c in TASKS])


def head_file(rng, counts, size, low, cell, slots=16):
    """Targets and the head's losses with their gradients."""
    out = boxes_file(rng, counts, size, low, cell, slots)
    count = len(counts)
    logits = {s: rng.normal(-1, 3, (count, 10, *size)).astype(np.float32) for s in ("student", "teacher")}
    box = {s: rng.normal(0, 1, (count, 6, 10, *size)).astype(np.float32) for s in ("student", "teacher")}
    leaf = [torch.from_numpy(v).double().requires_grad_() for v in (logits["student"], box["student"])]
    heat, ind = (torch.from_numpy(out[n]) for n in ("heatmap", "ind"))
    mask, codes = torch.from_numpy(out["mask"]).double(), torch.from_numpy(out["anno_box"]).double()
    p, q = (x.sigmoid().clamp(1e-4, 1 - 1e-4) for x in (leaf[0], torch.from_numpy(logits["teacher"]).double()))
    target = q * heat.double()

    def gathered(maps):
        return maps.flatten(3).gather(3, ind[:, :, None].expand(-1, -1, 10, -1)).movedim(2, 3)

    theirs = gathered(torch.from_numpy(box["teacher"]).double())

    def boxes(want, velocity=1.0):
        weight = torch.tensor([1.0] * 8 + [velocity] * 2).double()
        error = ((gathered(leaf[1]) - want).abs() * weight).sum(-1) * mask
        return 0.25 * error.sum((0, 2)) / mask.sum((0, 2)).clamp(min=1e-4)

    found = {
        "det": (focal(p, heat.double(), heat), boxes(codes)),
        "resp": (focal(p, target, heat), boxes(theirs)),
        "step1": (focal(p, heat.double(), heat), boxes(codes, 0.5)),
    }
    for name, (h, b) in found.items():
        total = (h + b).sum()
        gradients = torch.autograd.grad(total, leaf, retain_graph=True)
        out |= {f"{name}_loss": total, f"{name}_grad_heatmap": gradients[0]}
        if name != "step1":
            out |= {f"{name}_heatmap_per_task": h, f"{name}_box_per_task": b}
            out |= {
                f"{name}_grad_box_at_ind": gathered(gradients[1]),
                f"{name}_grad_box_abs_sum": gradients[1].abs().sum(),
            }
    out["resp_heatmap_target_max"] = torch.stack([target[:, list(c)].max() for c in TASKS])
    out |= {"student_heatmap_logit": logits["student"], "student_box": box["student"]}
    out |= {"teacher_heatmap_logit": logits["teacher"], "teacher_box_at_ind": theirs}
    return {n: single(v) for n, v in out.items()}


def single(value):
    value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    return value.astype(np.float32) if value.dtype == np.float64 else value


def block(w, x, train):
    def norm(x, n):
        mean, var = (None, None) if train else (w[f"{n}.running_mean"], w[f"{n}.running_var"])
        return F.batch_norm(x, mean, var, w[f"{n}.weight"], w[f"{n}.bias"], train)

    y = norm(F.conv2d(x, w["conv1.weight"], padding=1), "bn1").relu()
    return (norm(F.conv2d(y, w["conv2.weight"], padding=1), "bn2") + x).relu()


def block_weights(rng, width):
    def rand(*shape):
        return torch.from_numpy(rng.normal(0, 0.3, shape).astype(np.float32))

    out = {f"conv{i}.weight": rand(width, width, 3, 3) for i in (1, 2)}
    for n in ("bn1", "bn2"):
        out |= norm_weights(rng, n, width)
    return out


def norm_weights(rng, name, width):
    def rand(*shape):
        return torch.from_numpy(rng.normal(0, 0.3, shape).astype(np.float32))

    out = {f"{name}.weight": rand(width) + 1, f"{name}.bias": rand(width), f"{name}.running_mean": rand(width)}
    return out | {f"{name}.running_var": rand(width) ** 2 + 0.5, f"{name}.num_batches_tracked": torch.tensor(0)}


def wide(w, x, name, stride=1):
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), w[f"{name}.weight"], w[f"{name}.bias"], stride)


def encoder_file(rng, counts, size, low, cell, hidden=6, out=(4, 5)):
    """Encoder outputs in both modes."""
    found = boxes_file(rng, counts, size, low, cell)

    def rand(*shape):
        return torch.from_numpy(rng.normal(0, 0.3, shape).astype(np.float32))

    w = {}
    for name, width in (("mlp_box", 9), ("mlp_label", 10), ("mlp2", hidden)):
        w |= {f"{name}.fc1.weight": rand(hidden, width), f"{name}.fc1.bias": rand(hidden)}
        w |= {f"{name}.fc2.weight": rand(hidden, hidden), f"{name}.fc2.bias": rand(hidden)}
    w |= {"ln2.weight": rand(hidden) + 1, "ln2.bias": rand(hidden)}
    w |= {f"conv1.{n}": v for n, v in block_weights(rng, hidden).items()}
    for i, width in enumerate(out):
        shape = (width, size[0] // 2**i, size[1] // 2**i)
        w |= {f"conv_blocks.{i}.0.weight": rand(width, hidden, 3, 3), f"conv_blocks.{i}.0.bias": rand(width)}
        w |= {f"conv_blocks.{i}.1.weight": rand(*shape) + 1, f"conv_blocks.{i}.1.bias": rand(*shape)}

    def mlp(name, x):
        x = F.linear(x, w[f"{name}.fc1.weight"], w[f"{name}.fc1.bias"]).relu()
        return F.linear(x, w[f"{name}.fc2.weight"], w[f"{name}.fc2.bias"])

    both = mlp("mlp_box", torch.from_numpy(found["bev_box"])) + mlp("mlp_label", torch.from_numpy(found["bev_label"]))
    cells = F.layer_norm(mlp("mlp2", both), (hidden,), w["ln2.weight"], w["ln2.bias"]).permute(0, 3, 1, 2).contiguous()
    for mode in ("eval", "train"):
        bev = block({n.removeprefix("conv1."): v for n, v in w.items()}, cells, mode == "train")
        for i in range(len(out)):
            level, gain, shift = (
                wide(w, bev, f"conv_blocks.{i}.0", 2**i),
                *(w[f"conv_blocks.{i}.1.{n}"] for n in ("weight", "bias")),
            )
            found[f"{mode}_out_{i}"] = F.layer_norm(level, gain.shape, gain, shift).relu()
    return {n: single(v) for n, v in found.items()}, {f"w/{n}": v.numpy() for n, v in w.items()}


def adaptor_file(rng, batch, maps, out):
    """The channels' thirds and two adaptors; ``maps`` are (channels, rows, columns) by level."""
    found = {}
    inputs = [torch.from_numpy(rng.normal(size=(batch, *m)).astype(np.float32)) for m in maps]
    found |= {f"in_{i}": x for i, x in enumerate(inputs)}
    used = [np.zeros(m[0], bool) for m in maps]
    for g, group in enumerate(("label", "lidar")):
        for i, x in enumerate(inputs):
            third = x.shape[1] // 3
            used[i][g * third : (g + 1) * third] = True
            w = {"0.weight": torch.from_numpy(rng.normal(0, 0.3, (out[i], third, 3, 3)).astype(np.float32))}
            w |= {"0.bias": torch.zeros(out[i]) + 0.1, **norm_weights(rng, "1", out[i])}
            w |= {f"3.{n}": v for n, v in block_weights(rng, out[i]).items()}
            found |= {f"{group}/blocks.{i}.{n}": v for n, v in w.items()}
            for mode in ("eval", "train"):
                y, train = wide(w, x[:, g * third : (g + 1) * third], "0"), mode == "train"
                mean, var = (None, None) if train else (w["1.running_mean"], w["1.running_var"])
                y = F.batch_norm(y, mean, var, w["1.weight"], w["1.bias"], train).relu()
                found[f"{mode}_{group}_{i}"] = block({n[2:]: v for n, v in w.items() if n[0] == "3"}, y, train)
                found[f"{mode}_used_channels_{i}"] = used[i]
    return {n: single(v) for n, v in found.items()}


def feature_file(rng, batch, size, channels, empty=False):
    """The feature losses; the second level has half as many rows and columns."""
    heat = (rng.random((batch, 10, *size)) ** 40).astype(np.float32) * (not empty)
    heat[heat < 0.2] = 0
    out = {"heatmap": heat}
    sizes = [size, (size[0] // 2, size[1] // 2)]
    soft = [torch.from_numpy(heat).sum(1, keepdim=True)]
    soft.append(F.interpolate(soft[0], sizes[1], mode="bilinear", align_corners=True))
    students = []
    for i in range(2):
        for side in ("teacher", "student"):
            out[f"{side}_{i}"] = rng.normal(size=(batch, channels[i], *sizes[i])).astype(np.float32)
        students.append(torch.from_numpy(out[f"student_{i}"]).requires_grad_())
    for kind in ("lidar", "label", "nomask"):
        total = torch.zeros(())
        for i in range(2):
            mask = (
                soft[i] if kind == "lidar" else (soft[i] > 0).float() if kind == "label" else torch.ones_like(soft[i])
            )
            error = (torch.from_numpy(out[f"teacher_{i}"]) - students[i]) ** 2
            total = total + (mask * error).sum() / mask.sum().clamp(min=1)
            if kind != "nomask":
                out[f"{kind}_mask_{i}"] = mask
        out[f"{kind}_loss"] = total
        if kind != "nomask":
            out[f"{kind}_loss_x0.3"] = total * 0.3
            grads = torch.autograd.grad(total, students)
            out |= {f"{kind}_grad_{i}": g for i, g in enumerate(grads)}
    return {n: single(v) for n, v in out.items()}
