import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdlab.parity import parity

GOLDEN = Path(__file__).parents[1] / "golden" / "simdistill"
FILES = sorted(GOLDEN.glob("*.npz"))
TASKS = ((0,), (1, 2), (3, 4), (5,), (6, 7), (8, 9))
CW = torch.tensor([1.0] * 8 + [0.2] * 2)
GIVEN = {
    "student", "teacher", "sem_student", "sem_teacher", "gt_boxes", "gt_labels", "point_cloud_range", "voxel_size",
    "out_stride", "depth_gt", "logits", "dbound", "code_weights", "beta", "teacher_prob", "student_prob", "num_class",
    "cells", "min_overlap", "x", "cotangent", "heads", "points", "keys", "values", "teacher_logits", "student_logits",
    "teacher_box", "student_box", "teacher_heatmap_logits", "student_heatmap_logits",
}  # fmt: skip


def load(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as stored:
        return {k: stored[k] for k in stored.files}


def outputs_of(file: Path) -> set[str]:
    return {n for n in load(file) if n not in GIVEN and not n.startswith("w.")}


def failed(rows) -> list:
    return [(r.file, r.array, r.error, r.note) for r in rows if not r.passed]


@pytest.fixture(scope="module")
def golden(stored_rows):
    return stored_rows("simdistill")


def test_every_stored_array_is_reproduced(golden):
    assert failed(golden) == []
    assert {(r.file, r.array) for r in golden} == {(f.name, a) for f in FILES for a in outputs_of(f)}
    assert len(golden) == 133 and all(r.error is not None and r.judged for r in golden)


def test_cells_are_exact_and_numbers_close(golden):
    exact = {"ind", "valid", "onehot", "mindepth", "radius_used"}
    assert all(r.error == 0 for r in golden if r.array in exact or (r.array == "mask" and r.file.startswith("mmdp")))
    rest = [r.error for r in golden if not r.array.endswith("_box")]
    assert max(rest) < 1e-6
    corner = [r.error for r in golden if r.array in ("grad_student_box", "grad_teacher_box")]
    assert max(corner) < 1e-5  # 500 slots fall on one cell


@pytest.mark.parametrize("name", [f.stem for f in FILES if not f.stem.endswith("nogt")])
def test_each_perturbed_output_is_found(tmp_path, name):
    arrays = load(GOLDEN / f"{name}.npz")
    for output in outputs_of(GOLDEN / f"{name}.npz"):
        changed = arrays[output].astype(np.float64).reshape(-1)
        changed[-1] += 1e-3 * max(1e-8, float(np.abs(changed).max()))
        arrays[output] = changed.reshape(arrays[output].shape)
    np.savez(tmp_path / "renamed.npz", **arrays)
    assert [r.array for r in parity(tmp_path) if r.passed] == []


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("cmd_typical", "gt_boxes"),
        ("cmd_typical", "teacher"),
        ("mmdp_single", "student_box"),
        ("mmdp_typical", "teacher_heatmap_logits"),
        ("imd_single", "sem_teacher"),
        ("gcm_square", "w.pe.0.row_embed.weight"),
        ("depth_single", "logits"),
        ("unused_tf_typical", "teacher_logits"),
    ],
)
def test_perturbed_inputs_are_found(tmp_path, name, array):
    arrays = load(GOLDEN / f"{name}.npz")
    arrays[array] = arrays[array] + np.random.default_rng(0).normal(0, 0.5, arrays[array].shape).astype(np.float32)
    np.savez(tmp_path / "a.npz", **arrays)
    assert failed(parity(tmp_path))


def test_what_cannot_be_read_fails(tmp_path):
    arrays = load(GOLDEN / "cmd_single.npz")
    np.savez(tmp_path / "new.npz", **arrays, loss_new=np.zeros(()))
    np.savez(tmp_path / "area.npz", **(arrays | {"voxel_size": np.array([0.075, 0.1, 0.2])}))
    np.savez(tmp_path / "shape.npz", **(arrays | {"mask": arrays["mask"][..., 1:], "loss": np.float32(np.nan)}))
    np.savez(tmp_path / "less.npz", **{k: v for k, v in arrays.items() if k != "gt_boxes"})
    box = load(GOLDEN / "fn_box_b1k1.npz")
    np.savez(tmp_path / "weights.npz", **(box | {"code_weights": np.ones(10)}))
    np.savez(tmp_path / "beta.npz", **(box | {"beta": np.array(0.5)}))
    off = {(r.file, r.array): r.note for r in parity(tmp_path) if not r.passed}
    assert "nothing computes" in off["new.npz", "loss_new"] and ("new.npz", "loss") not in off
    assert "not square" in off["area.npz", "loss"] and "in the file" in off["shape.npz", "mask"]
    assert ("shape.npz", "loss") in off and off["less.npz", "mask"] == "needs the input gt_boxes"
    assert "code_weights" in off["weights.npz", "loss"] and "beta" in off["beta.npz", "loss"]


def test_totals_add_what_is_called_a_loss(tmp_path):
    keys = np.array(["loss/a", "stats/iou", "loss/object/b_kd_loss"])
    np.savez(tmp_path / "t.npz", keys=keys, values=np.array([1.0, 7.0, 2.5]), total=np.array(3.5))
    (row,) = parity(tmp_path)
    assert row.array == "total" and row.passed and row.error == 0


# The released statements one by one, for shapes that the stored files do not have.


def truth(rng, size, counts, voxel=0.1, stride=4) -> dict[str, np.ndarray]:
    """Boxes in and around a map of ``size`` = (X, Y) cells; padding has label -1."""
    reach = np.array(size) * voxel * stride / 2
    boxes, labels = np.zeros((len(counts), max(*counts, 1), 9)), np.full((len(counts), max(*counts, 1)), -1)
    for b, count in enumerate(counts):
        boxes[b, :count, :2] = rng.uniform(-1.08, 1.08, (count, 2)) * reach
        boxes[b, :count, 2:9] = rng.uniform(0.3, 2.5, (count, 7)) * [1, 1, 3, 1, 1, 1, 1]
        labels[b, :count] = rng.integers(0, 10, count)
        boxes[b, : count // 5, 3] = 0  # no width
    boxes = np.round(boxes * 16) / 16
    if counts[0]:
        boxes[0, 0, :2] = [-reach[0] - 0.05, 0.1]  # a little outside: truncated into the first cell
        boxes[0, 0, 3:5] = [1.5, 3]
    return {
        "gt_boxes": boxes.astype(np.float32),
        "gt_labels": labels,
        "point_cloud_range": np.array([*-reach, -5, *reach, 3], np.float32),
        "voxel_size": np.array([voxel, voxel, 0.2], np.float32),
        "out_stride": np.array(stride),
    }


def radius_of(a, b, o=0.1):
    t, p = a + b, a * b
    thirds = (
        (t + math.sqrt(t * t - 4 * p * (1 - o) / (1 + o))) / 2,
        (2 * t + math.sqrt(4 * t * t - 16 * (1 - o) * p)) / 2,
        (-2 * o * t + math.sqrt(4 * o * o * t * t + 16 * o * (1 - o) * p)) / 2,
    )
    return max(2, int(min(thirds)))


def released_targets(given, size, slots) -> dict[str, np.ndarray]:
    batch, (nx, ny) = len(given["gt_boxes"]), size
    low, voxel, stride = given["point_cloud_range"], given["voxel_size"][0], int(given["out_stride"])
    heat = np.zeros((batch, 10, nx, ny))
    anno, ind, valid = (np.zeros((batch, 6, slots, *k)) for k in ((10,), (), ()))
    for b in range(batch):
        for t, classes in enumerate(TASKS):
            rows = [(c, m) for c in classes for m in np.flatnonzero(given["gt_labels"][b] == c)]
            for slot, (c, m) in enumerate(rows):
                x, y, z, w, l, h, yaw, vx, vy = given["gt_boxes"][b, m]
                cx, cy = ((v - o) / voxel / np.float32(stride) for v, o in ((x, low[0]), (y, low[1])))
                i, j = int(cx), int(cy)
                if w <= 0 or l <= 0 or not (0 <= i < nx and 0 <= j < ny):
                    continue
                r = radius_of(float(l) / (voxel * stride), float(w) / (voxel * stride))
                for p in range(max(i - r, 0), min(i + r + 1, nx)):
                    for q in range(max(j - r, 0), min(j + r + 1, ny)):
                        value = math.exp(-((p - i) ** 2 + (q - j) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
                        heat[b, c, p, q] = max(heat[b, c, p, q], value)
                if slot < slots:
                    code = [cx - i, cy - j, z + h / 2, *np.log([w, l, h]), np.sin(yaw), np.cos(yaw), vx, vy]
                    anno[b, t, slot], ind[b, t, slot], valid[b, t, slot] = code, i * ny + j, 1
    return {"heatmaps": heat, "object_mask": heat.sum(1, keepdims=True), "anno_box": anno, "ind": ind, "valid": valid}


SHAPES = [((12, 20), (4, 9)), ((20, 12), (7, 0, 5)), ((15, 16), (0, 0)), ((32, 32), (25,))]
IDS = ["rect", "batch 3, empty sample", "empty", "many"]


@pytest.mark.parametrize(("size", "counts"), SHAPES, ids=IDS)
def test_targets_and_masked_losses_match_the_statements(tmp_path, size, counts):
    rng = np.random.default_rng(size[0])
    given = truth(rng, size, counts)
    targets = released_targets(given, size, 3)
    np.savez(tmp_path / "targets.npz", **given, **targets)
    maps = [rng.integers(-16, 17, (len(counts), 5, *size)) / 8 for _ in range(2)]
    mask, d = targets["object_mask"], maps[0] - maps[1]
    out = {"mask": mask, "loss": 100 * (mask * d**2 * mask).mean(), "grad_student": 200 * mask**2 * d / d.size}
    out |= {"loss_unmasked": (d**2).mean()}
    np.savez(tmp_path / "masked.npz", **given, student=maps[0], teacher=maps[1], **out)
    sem = [rng.normal(0, 1, (2, 3, 4, *size)) for _ in range(2)]
    out = {"loss": (d**2).mean(), "grad_student": 2 * d / d.size, "grad_teacher": -2 * d / d.size}
    out |= {"sem_loss": ((sem[0] - sem[1]) ** 2).mean(), "sem_grad_student": 2 * (sem[0] - sem[1]) / sem[0].size}
    np.savez(tmp_path / "plain.npz", student=maps[0], teacher=maps[1], sem_student=sem[0], sem_teacher=sem[1], **out)
    rows = parity(tmp_path)
    assert failed(rows) == [] and len(rows) == 5 + 4 + 5


def smooth(student, teacher):
    d = student - torch.where(teacher.isnan(), student, teacher)
    d = torch.cat((d[..., :6], d[..., 6:7].sin(), d[..., 7:]), -1) * CW
    return torch.where(d.abs() < 1 / 9, d * d * 4.5, d.abs() - 1 / 18).sum()


def quality(student, teacher):
    s, t = student.sigmoid(), teacher.sigmoid()
    return -(t * s.log() + (1 - t) * (1 - s).log()) * (s - t) ** 2


@pytest.mark.parametrize(("size", "counts"), SHAPES, ids=IDS)
def test_prediction_losses_match_the_statements(tmp_path, size, counts):
    rng = np.random.default_rng(size[1])
    given, batch, slots = truth(rng, size, counts), len(counts), 500
    targets = released_targets(given, size, slots)
    heat = {s: torch.from_numpy(rng.normal(-2, 4, (batch, 10, *size))).float().double() for s in ("student", "teacher")}
    box = {s: torch.from_numpy(rng.normal(0, 1, (batch, 6, 10, *size))).float().double() for s in heat}
    for leaf in (*heat.values(), *box.values()):
        leaf.requires_grad_()
    index = torch.from_numpy(targets["ind"]).long()
    scores, codes, found, error = [], [], [], []
    for t, classes in enumerate(TASKS):
        s, h = ({k: v[:, classes] for k, v in heat.items()}, torch.from_numpy(targets["heatmaps"][:, classes]))
        p = {k: v.sigmoid().clamp(1e-4, 1 - 1e-4) for k, v in s.items()}
        scores.append(0.25 * len(classes) * quality(p["student"], p["teacher"]).sum() / math.prod(size))
        rows = {k: v[:, t].flatten(2).gather(2, index[:, t, None].expand(-1, 10, -1)).mT for k, v in box.items()}
        codes.append(0.25 * smooth(rows["student"], rows["teacher"]) / slots)
        focal = torch.where(
            h == 1,
            -((1 - p["student"]) ** 2) * p["student"].log(),
            -((1 - h) ** 4) * p["student"] ** 2 * (1 - p["student"]).log(),
        )
        found.append(focal.sum() / (h == 1).sum().clamp(min=1))
        valid = torch.from_numpy(targets["valid"][:, t])
        apart = (rows["student"] - torch.from_numpy(targets["anno_box"][:, t])).abs() @ CW.double()
        error.append(0.25 * (apart * valid).sum() / (valid.sum() + 1e-4))
    out = {"ind": index, "mask": targets["valid"], "kd_cls": torch.stack(scores), "kd_bbox": torch.stack(codes)}
    out |= {"det_heatmap": torch.stack(found), "det_bbox": torch.stack(error)}
    for side in heat:
        out[f"grad_{side}_heatmap"] = torch.autograd.grad(sum(scores), heat[side], retain_graph=True)[0]
        out[f"grad_{side}_box"] = torch.autograd.grad(sum(codes), box[side], retain_graph=True)[0]
    out |= {f"{s}_heatmap_logits": v for s, v in heat.items()} | {f"{s}_box": v for s, v in box.items()}
    plain = {k: v.detach().numpy() if isinstance(v, torch.Tensor) else v for k, v in out.items()}
    np.savez(tmp_path / "heads.npz", **given, **plain)
    rows = parity(tmp_path)
    assert failed(rows) == [] and len(rows) == 10


@pytest.mark.parametrize(("size", "heads", "points"), [((4, 7), 2, 3), ((6, 3), 8, 7), ((1, 5), 4, 1)])
def test_compensation_matches_the_statements(tmp_path, size, heads, points):
    torch.manual_seed(points)
    (h, w), c, batch = size, 8, 3
    x = torch.randn(batch, c, h, w, requires_grad=True)
    weights = {"w.pe.0.row_embed.weight": torch.rand(w, c // 2), "w.pe.0.col_embed.weight": torch.rand(h, c // 2)}
    for name, outputs in (("sampling_offsets", 2 * heads * points), ("attention_weights", heads * points),
                          ("value_proj", c), ("output_proj", c)):  # fmt: skip
        weights[f"w.el.0.self_attn.{name}.weight"] = torch.randn(outputs, c) * 0.4
        weights[f"w.el.0.self_attn.{name}.bias"] = torch.randn(outputs)

    def linear(name, tokens):
        return F.linear(tokens, *(weights[f"w.el.0.self_attn.{name}.{part}"] for part in ("weight", "bias")))

    tokens = x.flatten(2).mT
    code = torch.stack([torch.cat((weights["w.pe.0.row_embed.weight"][j], weights["w.pe.0.col_embed.weight"][i]))
                        for i in range(h) for j in range(w)])  # fmt: skip
    reference = torch.tensor([[j / w, i / h] for i in range(h) for j in range(w)])
    offsets = linear("sampling_offsets", tokens + code).view(batch, h * w, heads, points, 2)
    attention = linear("attention_weights", tokens + code).view(batch, h * w, heads, points).softmax(-1)
    place = reference[:, None, None] + offsets / torch.tensor([w, h])
    value = linear("value_proj", tokens).view(batch, h * w, heads, c // heads)
    read = []
    for m in range(heads):
        part = value[:, :, m].mT.reshape(batch, c // heads, h, w)
        sampled = F.grid_sample(part, 2 * place[:, :, m] - 1, align_corners=False)
        read.append((sampled * attention[:, None, :, m]).sum(-1))
    dfa = linear("output_proj", torch.cat(read, 1).mT).mT.reshape(x.shape)
    cotangent = torch.randn(x.shape)
    (gradient,) = torch.autograd.grad(((x + dfa) * cotangent).sum(), x)
    out = {"x": x, "dfa": dfa, "out": x + dfa, "cotangent": cotangent, "grad_x": gradient, **weights}
    out["ref_points"] = reference[None, :, None]
    numbers = {"heads": np.array(heads), "points": np.array(points)}
    np.savez(tmp_path / "gcm.npz", **{k: v.detach().numpy() for k, v in out.items()}, **numbers)
    rows = parity(tmp_path)
    assert failed(rows) == [] and len(rows) == 4


def test_helpers_match_the_statements(tmp_path):
    rng = np.random.default_rng(0)
    teacher, student = (torch.from_numpy(rng.normal(0, 0.4, (3, 5, 10))).requires_grad_() for _ in range(2))
    with torch.no_grad():
        teacher[1, 2] = math.nan
        teacher[2, 0, 3] = math.nan
    loss = 0.25 * smooth(student, teacher) / 5
    (gradient,) = torch.autograd.grad(loss, student)
    save(tmp_path / "box.npz", teacher=teacher, student=student, loss=loss, grad_student=gradient, code_weights=CW)
    for size, classes in (((6, 10), 1), ((7, 4), 2)):
        s, t = (torch.from_numpy(rng.uniform(1e-4, 0.99, (1, classes, *size))).requires_grad_() for _ in range(2))
        loss = 0.25 * classes * quality(s, t).sum() / math.prod(size)
        first, second = torch.autograd.grad(loss, (s, t))
        found = {"student_prob": s, "teacher_prob": t, "loss": loss, "grad_student": first, "grad_teacher": second}
        save(tmp_path / f"cls{classes}.npz", **found, num_class=torch.tensor(classes))
    rows = parity(tmp_path)
    assert failed(rows) == [] and len(rows) == 2 + 3 + 3


def save(file: Path, **arrays: torch.Tensor) -> None:
    np.savez(file, **{k: v.detach().numpy() for k, v in arrays.items()})


def test_depths_match_the_statements(tmp_path):
    rng = np.random.default_rng(1)
    depth = rng.uniform(0, 12, (3, 1, 12, 20)) * (rng.random((3, 1, 12, 20)) < 0.05)
    depth = (np.round(depth * 8) / 8).astype(np.float32)
    logits = torch.from_numpy(rng.normal(0, 1, (3, 16, 3, 5)).astype(np.float32)).requires_grad_()
    least, onehot = np.full((3, 3, 5), 1e5, np.float32), np.zeros((45, 16))
    for row, (b, i, j) in enumerate(np.ndindex(3, 3, 5)):
        patch = depth[b, 0, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        if (patch > 0).any():
            least[b, i, j] = patch[patch > 0].min()
        k = math.floor((least[b, i, j] - 1.5) / 0.5)  # bins from 2 m
        if 1 <= k <= 16:
            onehot[row, k - 1] = 1
    prob = logits.softmax(1)
    rows = prob.permute(0, 2, 3, 1).flatten(0, 2)
    known = torch.from_numpy(onehot.max(1) > 0)
    bce = F.binary_cross_entropy(rows[known], torch.from_numpy(onehot).float()[known], reduction="none").sum()
    loss = 3 * bce / known.sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    found = {"logits": logits, "pred": prob, "loss": loss, "grad_logits": gradient}
    save(
        tmp_path / "depth.npz",
        **found,
        depth_gt=torch.from_numpy(depth),
        mindepth=torch.from_numpy(least),
        onehot=torch.from_numpy(onehot),
        dbound=torch.tensor([2.0, 10.0, 0.5]),
    )
    found = parity(tmp_path)
    assert known.sum() > 10 and failed(found) == [] and len(found) == 5
