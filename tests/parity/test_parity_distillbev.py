import math
from pathlib import Path

import numpy as np
import pytest
import torch
from distillbev_twin import (
    CELL,
    average_scale,
    foreground,
    heatmap,
    loss_file,
    queue_scale,
    random_boxes,
    scores,
    spread,
)

from kdlab.parity import parity, run

GOLDEN = Path(__file__).parents[1] / "golden" / "distillbev"
FILES = sorted(GOLDEN.glob("*.npz"))
INPUTS = ("gt_boxes", "gt_labels", "gt_offsets", "geom_", "teacher_", "student_", "param__", "config_", "context_")


def load(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as stored:
        return {k: stored[k] for k in stored.files}


def outputs_of(file: Path) -> set[str]:
    with np.load(file) as stored:
        names = {n for n in stored.files if n == "gt_boxes_modern" or not n.startswith(INPUTS)} - {"output_threshold"}
        return names if "gt_boxes" in stored.files else names - {"gt_heatmap", "fg_mask"}


def failed(rows) -> list:
    return [(r.array, r.error, r.note) for r in rows if not r.passed]


@pytest.fixture(scope="module")
def golden(stored_rows):
    return stored_rows("distillbev")


def test_every_stored_array_is_reproduced(golden):
    assert failed(golden) == []
    assert {(r.file, r.array) for r in golden} == {(f.name, a) for f in FILES for a in outputs_of(f)}
    assert len(golden) > 700 and all(r.error is not None for r in golden)
    assert {r.file for r in golden if not r.judged} == {"masks_bevdet_knifeedge_informative.npz"}


def test_masks_are_exact_and_numbers_close(golden):
    judged = [r for r in golden if r.judged]
    masks = [r for r in judged if r.array.startswith(("fg_mask", "fp_mask", "fp_count"))]
    assert len(masks) > 90 and all(r.error == 0 for r in masks)
    values = [r.error for r in judged if r.array.startswith(("loss", "grad__", "mid__"))]
    assert len(values) > 300 and max(values) < 2e-6


@pytest.mark.parametrize(
    "name",
    [
        "loss_head_script_typical",
        "loss_head_base_single",
        "loss_multiscale_script_single",
        "loss_bevformer_fp_single",
        "loss_head_fp_dfs_single",
        "loss_optional_affinity_typical",
        "masks_bevdet_typical",
        "masks_bevdet_context_typical",
        "region_bevformer_single",
        "attention_single",
        "quirk_inplace_sigmoid",
    ],
)
def test_each_perturbed_output_is_found(tmp_path, name):
    arrays = load(GOLDEN / f"{name}.npz")
    outputs = outputs_of(GOLDEN / f"{name}.npz")
    for output in outputs - {"gt_boxes_modern"}:
        changed = arrays[output].astype(np.float64).reshape(-1)
        changed[-1] += 1e-3 * max(1e-3, float(np.abs(changed).max()))
        arrays[output] = changed.reshape(arrays[output].shape)
    np.savez(tmp_path / "renamed.npz", **arrays)
    passed = {r.array for r in parity(tmp_path) if r.passed}
    assert {p for p in passed if not p.endswith("bias")} <= {"gt_boxes_modern", "gt_heatmap", "fg_mask_200"}


@pytest.mark.parametrize("array", ["gt_boxes", "teacher_feat", "student_feat", "teacher_logits"])
def test_perturbed_inputs_are_found(tmp_path, array):
    arrays = load(GOLDEN / "loss_head_script_typical.npz")
    arrays[array] = arrays[array] + np.float32(0.5)
    np.savez(tmp_path / "a.npz", **arrays)
    assert {"loss_total", "grad__student_feat"} <= {r.array for r in parity(tmp_path) if not r.passed}


def test_what_cannot_be_read_fails(tmp_path):
    arrays = load(GOLDEN / "loss_head_script_single.npz")
    changes = {
        "new": {"loss__kd_new_loss": np.zeros(()), "mid__new": np.zeros(3)},
        "kind": {"config_json": np.array(str(arrays["config_json"]).replace("1x1conv", "mlp"))},
        "option": {"config_json": np.array(str(arrays["config_json"]).replace('"gt"', '"gauss"'))},
        "shape": {"loss_total": np.zeros(2), "grad__student_feat": np.full((1, 6, 32, 32), np.nan)},
        "area": {"geom_point_cloud_range": np.array([-10, -12.8, -5, 12.8, 12.8, 3], np.float32)},
    }
    for name, change in changes.items():
        np.savez(tmp_path / f"{name}.npz", **(arrays | change))
    np.savez(tmp_path / "less.npz", **{k: v for k, v in arrays.items() if k != "teacher_feat"})
    off = {(r.file, r.array): r.note for r in parity(tmp_path) if not r.passed}
    assert "nothing computes" in off["new.npz", "loss__kd_new_loss"] and ("new.npz", "mid__new") in off
    assert (
        "'mlp' is not known" in off["kind.npz", "loss_total"] and "foreground_mask" in off["option.npz", "loss_total"]
    )
    assert "in the file" in off["shape.npz", "loss_total"] and ("shape.npz", "grad__student_feat") in off
    assert "not square" in off["area.npz", "loss_total"]
    assert ("less.npz", "loss_total") in off and ("less.npz", "gt_heatmap") not in off
    assert run(tmp_path) == 1


def test_knife_edges_are_shown_by_their_name_alone(tmp_path):
    arrays = load(GOLDEN / "masks_bevdet_knifeedge_informative.npz")
    np.savez(tmp_path / "masks_knifeedge_x.npz", **arrays)
    assert run(tmp_path) == 0
    np.savez(tmp_path / "masks_x.npz", **arrays)
    assert run(tmp_path) == 1


SCRIPT = {"fp_as_foreground": ["teacher"]}
BASE = {"channel_mask": True, "spatial_attentions": ["teacher"], "fg_feat_loss_weights": [0.0015]}
THREE = (("backbone1", 1, 4), ("backbone2", 2, 2), ("head", 1, 1))
KINDS = ["upsample_3layer", "upsample_3layer", "1x1conv"]


@pytest.mark.parametrize(
    ("size", "counts", "positions", "config"),
    [
        ((20, 28), (4, 3), (("head", 1, 1),), SCRIPT),
        ((20, 20), (0, 3, 5), (("head", 1, 1),), SCRIPT | {"scale_mask": "separate_gt"}),
        ((24, 12), (5,), (("head", 1, 1),), BASE),
        ((12, 24), (3, 0), (("head", 1, 1),), SCRIPT | {"fp_scale_mode": "dfs", "fp_weight": 0.1}),
        ((16, 8), (0, 0), (("head", 1, 1),), SCRIPT | {"adaptation_type": "identity"}),
        ((8, 16), (3, 2, 4), THREE, {"adaptation_type": KINDS, "fp_as_foreground": ["none", "none", "teacher"]}),
        ((8, 8), (4,), (("head", 2, 1),), SCRIPT),
        ((4, 4), (6, 2), (("head", 1, 1),), SCRIPT),  # less background than an object's root: scales meet
    ],
    ids=["rect", "batch 3, separate", "base", "components", "identity, empty", "three", "pooled", "crowded"],
)
def test_losses_match_the_statements(tmp_path, size, counts, positions, config):
    np.savez(tmp_path / "case.npz", **loss_file(sum(size), size, counts, positions, **config))
    rows = parity(tmp_path)
    assert failed(rows) == [] and len(rows) > 8


@pytest.mark.parametrize(
    ("size", "counts", "at", "maps"),
    [
        ((24, 36), (9, 4), 0.0, ((24, 36), (12, 18), (48, 72))),
        ((40, 40), (12, 0, 7), 0.0, ((40, 40), (20, 20), (10, 10))),
        ((30, 18), (6,), 0.5, ((30, 18), (25, 15))),
    ],
)
def test_masks_match_the_statements(tmp_path, size, counts, at, maps):
    rng = np.random.default_rng(size[0])
    low = np.array([-3.2, -20.4])
    area = (*low, -5.0, *(low + np.array([size[1], size[0]]) * CELL), 3.0)
    boxes = random_boxes(rng, counts, size, low)
    out = {
        "gt_boxes": np.concatenate(boxes),
        "gt_offsets": np.cumsum([0, *counts]),
        "geom_point_cloud_range": np.array(area),
    }
    for rows, columns in maps:
        mask, scale = foreground(boxes, (rows, columns), area, at)
        background = 1 / (rows * columns - mask.sum((1, 2)))
        out |= {f"fg_mask_{columns}": mask[:, None], f"fg_scale_{columns}": scale[:, None]}
        out[f"bg_scale_{columns}"] = np.broadcast_to(background[:, None, None, None], mask[:, None].shape)
    np.savez(tmp_path / "case.npz", **out)
    found = parity(tmp_path)
    assert failed(found) == [] and len(found) == 3 * len(maps)


def test_regions_match_the_statements(tmp_path):
    rng, size, counts = np.random.default_rng(5), (16, 24), (5, 0, 3)
    low = np.array([-9.6, -6.4])
    area = (*low, -5.0, *(low + np.array([size[1], size[0]]) * CELL), 3.0)
    boxes = random_boxes(rng, counts, size, low)
    labels = [rng.integers(0, 10, len(rows)) for rows in boxes]
    logits = {s: rng.normal(-6, 2, (3, 10, *size)).astype(np.float32) for s in ("teacher", "student")}
    truth = heatmap(boxes, labels, size, area).max(1)
    t, s = (scores(torch.from_numpy(logits[k])) > 0.1 for k in ("teacher", "student"))
    modes = {"teacher": t, "student": s, "teacher_selected_student": s & ~t}
    modes["teacher_plus_teacher_selected_student"] = s | t
    out = {
        "gt_boxes": np.concatenate(boxes),
        "gt_labels": np.concatenate(labels),
        "gt_offsets": np.cumsum([0, *counts]),
        "geom_point_cloud_range": np.array(area),
        "output_threshold": np.float32(0.1),
        "gt_heatmap": heatmap(boxes, labels, size, area),
        **{f"{k}_logits": v for k, v in logits.items()},
    }
    for rows, columns in (size, (8, 12), (32, 48)):
        fg, _ = foreground(boxes, (rows, columns), area, 0.0)
        out[f"fg_mask_{rows}"] = fg[:, None]
        for mode, fires in modes.items():
            cells = fires & (truth < 0.1)
            if rows < size[0]:
                cells = cells.reshape(3, 8, 2, 12, 2).max((2, 4))
            elif rows > size[0]:
                cells = cells.repeat(2, 1).repeat(2, 2)
            cells = (cells & (fg == 0)).astype(float)
            name = f"{mode}_average_{rows}"
            out |= {f"fp_mask__{name}": cells[:, None], f"fp_count__{name}": cells.sum((1, 2))}
            out[f"fp_scale__{name}"] = average_scale(cells)[:, None]
    cells = (t & (truth < 0.1) & (out["fg_mask_16"][:, 0] == 0)).astype(float)
    out |= {"fp_mask__teacher_dfs_16": cells[:, None], "fp_scale__teacher_dfs_16": queue_scale(cells)[:, None]}
    out["fp_mask__gtthr05"] = (t & (truth < 0.5) & (out["fg_mask_16"][:, 0] == 0)).astype(float)[:, None]
    np.savez(tmp_path / "case.npz", **out)
    found = parity(tmp_path)
    assert failed(found) == [] and len(found) == 1 + 3 + 36 + 3


@pytest.mark.parametrize("shape", [(3, 5, 6, 9), (1, 2, 12, 4)])
def test_attention_matches_the_statements(tmp_path, shape):
    rng = np.random.default_rng(1)
    maps = {n: rng.normal(0, 2, shape) for n in ("teacher_feat", "student_feat_adapted")}
    maps["teacher_feat"][0] = 0  # an empty map: 1 everywhere
    t, s = (torch.from_numpy(v) for v in maps.values())
    out = {**maps, "geom_point_cloud_range": np.array([-1, -1, -1, 1, 1, 1.0])}
    for heat in (0.5, 0.2):
        a, b = (spread(x.abs().mean(1, keepdim=True) / heat).numpy() for x in (t, s))
        out |= {f"t_attention_T{heat}": a, f"s_attention_T{heat}": b}
        out |= {f"sum_attention__teacher_T{heat}": a, f"sum_attention__teacher_student_T{heat}": (a + b) / 2}
        out[f"channel_attention_T{heat}"] = spread(t.abs().mean((2, 3), keepdim=True) / heat).numpy()
    assert (out["t_attention_T0.5"][0] == 1).all()
    np.savez(tmp_path / "case.npz", **{k: v.astype(np.float32) for k, v in out.items()})
    found = parity(tmp_path)
    assert failed(found) == [] and len(found) == 10


def test_a_heading_of_half_a_turn_is_one_direction(tmp_path):
    box = np.array([[1, 2, 0, 2, 4, 1, math.pi / 2, 0, 0]], np.float32)
    out = {"gt_boxes": box, "gt_offsets": np.array([0, 1]), "geom_point_cloud_range": np.array([-8, -8, -5, 8, 8, 3.0])}
    for yaw in (math.pi, -math.pi):
        out["gt_boxes_modern"] = np.array([[1, 2, 0.5, 4, 2, 1, yaw, 0, 0]])
        np.savez(tmp_path / "case.npz", **out)
        assert failed(parity(tmp_path)) == []
