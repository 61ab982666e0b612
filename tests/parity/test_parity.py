import platform
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdlab.parity import parity, render, run

GOLDEN = Path(__file__).parents[1] / "golden" / "unidistill"


def rewrite(source: Path, target: Path, change) -> None:
    with np.load(source) as stored:
        arrays = {k: stored[k] for k in stored.files}
    change(arrays)
    np.savez(target, **arrays)


INPUTS = {
    "gt_boxes",
    "gt_labels",
    "pc_range",
    "voxel_size",
    "out_size_factor",
    "seed",
    "det_loss",
    "marker_student_low",
}


def outputs_of(file: Path) -> set[str]:
    with np.load(file) as stored:
        outputs = {k for k in stored.files if k not in INPUTS and not k.startswith(("student_", "teacher_"))}
        return outputs | ({"student_hm_prob"} & set(stored.files))


def test_released_readings_are_reproduced_bit_for_bit(stored_rows):
    exact = ("grid", "gt_corners_bev", "sampled_", "gauss_mask")
    rows = [r for r in stored_rows("unidistill") if r.array.startswith(exact)]
    most = 0 if platform.machine() == "x86_64" else 1e-6  # a float32 sine may differ elsewhere
    assert len(rows) > 20 and all(r.error <= most for r in rows)


def only_outputs(rows):
    return {row.array: row for row in rows}


def test_every_stored_array_is_reproduced(stored_rows, capsys):
    rows = stored_rows("unidistill")
    assert [r for r in rows if not r.passed] == []
    assert {r.file for r in rows} == {p.name for p in GOLDEN.glob("*.npz")}
    assert {(r.file, r.array) for r in rows} == {(f.name, a) for f in GOLDEN.glob("*.npz") for a in outputs_of(f)}
    assert len(rows) > 100 and all(r.judged and r.error is not None for r in rows)
    assert run(GOLDEN) == 0
    out = capsys.readouterr().out
    assert "max relative error" in out and "typical.npz" in out and "none off" in out


def test_each_perturbed_output_is_found(tmp_path):
    def nudge(arrays):
        for name in arrays:
            if name.startswith(("loss_", "grad_", "gauss_", "sampled_", "relation_", "grid", "gt_corners")):
                flat = arrays[name].reshape(-1).copy()
                flat[-1] += 1e-3 * max(1, abs(float(flat[-1])))
                arrays[name] = flat.reshape(arrays[name].shape)

    rewrite(GOLDEN / "typical.npz", tmp_path / "renamed.npz", nudge)
    rows = parity(tmp_path)
    exact = {"gt_indices", "gt_boxes_labelled", "student_hm_prob"}
    assert {r.array for r in rows if r.passed} == exact
    assert run(tmp_path) == 1
    assert "OFF" in render(rows)


def test_perturbed_inputs_are_found(tmp_path):
    def move(arrays):
        arrays["gt_boxes"] = arrays["gt_boxes"] + np.float32(0.1)

    rewrite(GOLDEN / "one_box.npz", tmp_path / "a.npz", move)
    found = only_outputs(parity(tmp_path))
    assert not found["loss_feature"].passed and not found["gt_corners_bev"].passed


def test_nan_and_wrong_shapes_fail(tmp_path):
    def spoil(arrays):
        arrays["loss_feature"] = np.float32(np.nan)
        arrays["gauss_mask"] = arrays["gauss_mask"][:, :-1]

    rewrite(GOLDEN / "one_box.npz", tmp_path / "a.npz", spoil)
    found = only_outputs(parity(tmp_path))
    assert not found["loss_feature"].passed and found["loss_feature"].error == np.inf
    assert not found["gauss_mask"].passed and "in the file" in found["gauss_mask"].note


def test_what_nobody_computes_fails(tmp_path):
    rewrite(GOLDEN / "one_box.npz", tmp_path / "a.npz", lambda arrays: arrays.update(loss_new=np.zeros(())))
    found = only_outputs(parity(tmp_path))
    assert found["loss_new"].error is None and not found["loss_new"].passed
    np.savez(tmp_path / "b.npz", something=np.zeros(3))
    (tmp_path / "c.npz").write_bytes(b"not a zip")
    rows = {r.file: r for r in parity(tmp_path) if r.array == "-"}
    assert "no known family" in rows["b.npz"].note and "cannot be read" in rows["c.npz"].note
    assert run(tmp_path) == 1


def test_missing_input_is_told(tmp_path):
    rewrite(GOLDEN / "one_box.npz", tmp_path / "a.npz", lambda arrays: arrays.pop("teacher_low"))
    found = only_outputs(parity(tmp_path))
    assert found["loss_feature"].note == "needs the input teacher_low" and found["loss_relation"].passed
    assert not found["loss_total_L2C"].passed


RESPONSE_INPUTS = ("student_hm_logits", "teacher_hm_logits", "student_reg", "teacher_reg")


@pytest.mark.parametrize("spoil", ["", "loss_resp_cls", "loss_resp_reg", "loss_total_F2C", "loss_relation"])
def test_totals_without_response_inputs_take_stored_parts(tmp_path, spoil):
    def strip(arrays):
        for name in [*RESPONSE_INPUTS, *(n for n in arrays if n.startswith(("grad_resp", "student_hm_prob")))]:
            del arrays[name]
        if spoil:
            arrays[spoil] = arrays[spoil] * np.float32(1.01)

    rewrite(GOLDEN / "typical.npz", tmp_path / "a.npz", strip)
    found = only_outputs(parity(tmp_path))
    assert not found["loss_resp_cls_F2C"].judged and "as stored" in found["loss_resp_cls_F2C"].note
    assert "response_class, response_regression as stored" in found["loss_total_L2C"].note
    off = {
        "": set(),
        "loss_resp_cls": {"loss_total_L2C", "loss_total_C2L", "loss_total_F2L"},
        "loss_resp_reg": {"loss_total_L2C", "loss_total_C2L", "loss_total_F2L", "loss_total_F2C"},
    }.get(spoil, {spoil})
    assert {name for name, row in found.items() if not row.passed} == off


def test_totals_of_the_parts_there_are(tmp_path):
    def strip(arrays):
        for name in [*RESPONSE_INPUTS, *(n for n in arrays if "resp" in n or n == "student_hm_prob")]:
            del arrays[name]
        arrays["loss_total_L2C"] = arrays["det_loss"] + 100 * arrays["loss_feature"] + 40 * arrays["loss_relation"]

    rewrite(GOLDEN / "one_box.npz", tmp_path / "a.npz", strip)
    found = only_outputs(parity(tmp_path))
    assert found["loss_total_L2C"].passed and found["loss_total_L2C"].error < 1e-5
    assert found["loss_total_L2C"].note == "without response_class, response_regression"
    assert not found["loss_total_C2L"].passed and found["loss_total_C2L"].error > 0  # stored with the response


def test_stored_parts_without_totals_are_not_believed(tmp_path):
    def strip(arrays):
        for name in [*RESPONSE_INPUTS, *(n for n in arrays if n.startswith("loss_total"))]:
            del arrays[name]

    rewrite(GOLDEN / "one_box.npz", tmp_path / "a.npz", strip)
    row = only_outputs(parity(tmp_path))["loss_resp_cls"]
    assert not row.passed and row.note == "needs the input student_hm_logits"


def test_inputs_alone_are_no_comparison(tmp_path):
    def strip(arrays):
        for name in list(arrays):
            if name.startswith(("loss_", "grad_", "g", "sampled_", "relation_")) and name not in (
                "gt_boxes",
                "gt_labels",
            ):
                del arrays[name]
        del arrays["student_hm_prob"]

    rewrite(GOLDEN / "one_box.npz", tmp_path / "a.npz", strip)
    (row,) = parity(tmp_path)
    assert not row.passed and "no outputs" in row.note


@pytest.mark.parametrize("keep", [("loss_relation",), ("gauss_mask", "gt_indices"), ("grad_resp_reg_student_reg",)])
def test_any_subset_of_outputs(tmp_path, keep):
    with np.load(GOLDEN / "typical.npz") as stored:
        inputs = {k: stored[k] for k in stored.files if k in INPUTS or k.startswith(("student_", "teacher_"))}
        inputs.pop("student_hm_prob")
        np.savez(tmp_path / "a.npz", **inputs, **{k: stored[k] for k in keep})
    rows = parity(tmp_path)
    assert sorted(r.array for r in rows) == sorted(keep) and all(r.passed for r in rows)


def test_folders_without_files(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError):
            parity(folder)
        assert run(folder) == 2
    assert "npz" in capsys.readouterr().err


def test_folders_below_are_looked_into(tmp_path):
    (tmp_path / "deep").mkdir()
    shutil.copy(GOLDEN / "no_gt.npz", tmp_path / "deep" / "x.npz")
    assert {r.file for r in parity(tmp_path)} == {str(Path("deep") / "x.npz")}


def rectangular(rows: int, columns: int, swap: bool) -> dict[str, np.ndarray]:
    """A file as the released code would write it for H != W: its statements one by one, in numpy."""
    rng = np.random.default_rng(rows)
    voxel, factor, batch, channels = 0.1, 4, 2, 3
    cell = voxel * factor
    low = np.array([-columns * cell / 2, -rows * cell / 2])
    boxes = np.zeros((batch, 3, 9), np.float32)
    boxes[0, :3, :7] = rng.uniform(-1, 1, (3, 7)) * [columns * cell / 2, rows * cell / 2, 1, 1, 1, 1, 3] + [
        0,
        0,
        0,
        3,
        2,
        2,
        0,
    ]
    boxes[1, :1, :7] = [0.31, -0.57, 0, 4.1, 1.9, 1.5, 0.7]
    out = {
        "gt_boxes": boxes,
        "gt_labels": np.zeros((batch, 3), np.float32),
        "pc_range": np.array([low[0], low[1], -5, -low[0], -low[1], 3]),
        "voxel_size": np.array([voxel, voxel, 0.2]),
        "out_size_factor": np.array(factor),
        "student_low": rng.integers(-8, 8, (batch, channels, rows, columns)).astype(np.float32) / 4,
        "teacher_low": rng.integers(-8, 8, (batch, channels, rows, columns)).astype(np.float32) / 4,
    }
    signs = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]]) / 2
    corners = np.zeros((batch, 3, 4, 2))
    sampled = np.zeros((2, batch, channels, 3, 9))
    grid = np.zeros((batch, 3, 9, 2))
    for b in range(batch):
        for m in range(3):
            x, y, _, length, width, _, yaw = boxes[b, m, :7].astype(float)
            turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
            corners[b, m] = ((signs * [length, width]) @ turn.T + [x, y] - low) / cell
            c = corners[b, m]
            given = c if swap else c[:, ::-1]  # `*_unswapped`: exchanged beforehand
            mids = [given.mean(0), *((given[i] + given[j]) / 2 for i, j in ((0, 1), (1, 2), (2, 3), (0, 3)))]
            for k, (u, v) in enumerate([*given, *mids]):
                g = (v / (rows / 2) - 1, u / (columns / 2) - 1)  # normalised, then exchanged
                grid[b, m, k] = g
                px, py = ((g[0] + 1) * columns - 1) / 2, ((g[1] + 1) * rows - 1) / 2
                for i in (int(np.floor(py)), int(np.floor(py)) + 1):
                    for j in (int(np.floor(px)), int(np.floor(px)) + 1):
                        if 0 <= i < rows and 0 <= j < columns:
                            share = (1 - abs(px - j)) * (1 - abs(py - i))
                            for s, side in enumerate(("student_low", "teacher_low")):
                                sampled[s, b, :, m, k] += out[side][b, :, i, j] * share
    counted = np.array([[True] * 3, [True, False, False]])
    error = np.abs(sampled[0] - sampled[1]).sum((1, 3)) / (9 * channels)
    loss = (error * counted).sum() / (counted.sum() + 1e-4)
    suffix = "" if swap else "_unswapped"
    found = {"loss_feature": np.array(loss), "grid": grid, "sampled_student_low": sampled[0]}
    out |= {name + suffix: value for name, value in found.items()}
    return out | {"gt_corners_bev": corners, "gt_indices": counted}


@pytest.mark.parametrize(("rows", "columns"), [(30, 40), (44, 20), (24, 24)])
@pytest.mark.parametrize("swap", [True, False])
def test_other_sizes_ranges_and_voxels(tmp_path, rows, columns, swap):
    np.savez(tmp_path / "case.npz", **rectangular(rows, columns, swap))
    rows_found = parity(tmp_path)
    assert len(rows_found) == 5 and [r for r in rows_found if not r.passed] == []


def released_corners(boxes: np.ndarray, low: np.ndarray, voxel: float, factor: int) -> torch.Tensor:
    """Corners in cells as released: sine and cosine in float32, corners in float64, cells in float32."""
    corners = np.zeros((*boxes.shape[:2], 4, 2))
    sines, cosines = np.sin(boxes[..., 6]), np.cos(boxes[..., 6])
    for b, m in np.ndindex(*boxes.shape[:2]):
        x, y, _, length, width = boxes[b, m, :5]
        sin, cos = sines[b, m], cosines[b, m]
        for k, (p, q) in enumerate(((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5))):
            along, across = p * np.float64(length), q * np.float64(width)
            corners[b, m, k] = along * cos - across * sin + x, along * sin + across * cos + y
    scale = torch.tensor([voxel, voxel], dtype=torch.float32)
    return (torch.from_numpy(corners).float() - torch.tensor(low).float()) / scale / factor


def released_losses(corners: torch.Tensor, counted: torch.Tensor, maps: dict[str, torch.Tensor]) -> dict:
    """Feature and relation losses and what they pass by, one statement of the specification after another."""
    height, width = maps["student_low"].shape[-2:]
    points = [corners[:, :, i] for i in range(4)]
    points.append(torch.mean(corners, 2))
    points += [(corners[:, :, i] + corners[:, :, j]) / 2 for i, j in ((0, 1), (1, 2), (2, 3), (0, 3))]
    grid = torch.stack(points, 2)
    grid[..., 0] = (grid[..., 0] - width / 2) / (width / 2)
    grid[..., 1] = (grid[..., 1] - height / 2) / (height / 2)
    grid[..., [0, 1]] = grid[..., [1, 0]]
    out = {"grid": grid}
    relations, k = {}, counted.float()
    for name, tensor in maps.items():
        out[f"sampled_{name}"] = F.grid_sample(tensor, grid, align_corners=False)
        if name.endswith("high"):
            q = out[f"sampled_{name}"].permute(0, 2, 3, 1).flatten(0, 1)
            r = q / (torch.norm(q, dim=-1, keepdim=True) + 1e-4)
            relations[name[:7]] = torch.bmm(r, r.transpose(1, 2))
            out[f"relation_{name[:7]}"] = relations[name[:7]].unflatten(0, counted.shape)
    error = (out["sampled_student_low"] - out["sampled_teacher_low"]).abs().mean(1).mean(-1)
    out["loss_feature"] = (error * k).sum() / (k.sum() + 1e-4)
    error = (relations["student"] - relations["teacher"]).abs().mean((1, 2)).unflatten(0, counted.shape)
    out["loss_relation"] = (error * k).sum() / (k.sum() + 1e-4)
    out["grad_feature_student_low"] = torch.autograd.grad(out["loss_feature"], maps["student_low"], retain_graph=True)[
        0
    ]
    out["grad_relation_student_high"] = torch.autograd.grad(out["loss_relation"], maps["student_high"])[0]
    return out


def released_file(seed: int, size: tuple[int, int], counts: tuple[int, ...], channels: tuple[int, int]) -> dict:
    """A golden file of our own: multiples of 1/4 as features, boxes over the border."""
    rng = np.random.default_rng(seed)
    height, width = size
    voxel, factor = 0.075, 8
    reach = np.array([width, height]) * voxel * factor / 2
    boxes = np.zeros((len(counts), max(counts), 9), np.float32)
    for b, count in enumerate(counts):
        boxes[b, :count, :2] = rng.uniform(-1.02, 1.02, (count, 2)) * reach
        boxes[b, :count, 3:6] = rng.uniform(0.4, 1, (count, 3)) * rng.choice([2, 5, 12], (count, 1))
        boxes[b, :count, 6] = rng.uniform(-np.pi, np.pi, count)
    counted = torch.tensor([[m < max(count, 1) for m in range(max(counts))] for count in counts])
    maps = {}
    for side, level in ((s, i) for s in ("student", "teacher") for i in (0, 1)):
        values = rng.integers(-8, 9, (len(counts), channels[level], height, width)).astype(np.float32) / 4
        maps[f"{side}_{('low', 'high')[level]}"] = torch.from_numpy(values).requires_grad_(side == "student")
    corners = released_corners(boxes, -reach, voxel, factor)
    out = released_losses(corners.clone(), counted, maps) | {"gt_indices": counted, "gt_corners_bev": corners}
    plain = released_losses(corners.flip(-1), counted, maps)
    out |= {f"{n}_unswapped": v for n, v in plain.items() if n.startswith(("loss_", "grad_"))}
    arrays = {name: value.detach().numpy() for name, value in (out | maps).items()}
    return arrays | {
        "gt_boxes": boxes,
        "gt_labels": np.zeros(boxes.shape[:2], np.float32),
        "pc_range": np.array([*-reach, -5, *reach, 3]),
        "voxel_size": np.array([voxel, voxel, 0.2]),
        "out_size_factor": np.array(factor),
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("size", "counts", "channels"),
    [
        ((30, 40), (4, 3), (4, 6)),
        ((180, 180), (8,), (2, 2)),
        ((40, 40), (0, 3), (4, 6)),
        ((40, 40), (5, 0, 2), (4, 6)),
        ((44, 20), (3, 1, 4), (3, 2)),
    ],
    ids=["rect", "grid180", "empty sample", "batch 3", "batch 3, rect"],
)
def test_relations_and_gradients_match_the_statements(tmp_path, seed, size, counts, channels):
    np.savez(tmp_path / "case.npz", **released_file(seed, size, counts, channels))
    found = parity(tmp_path)
    assert len(found) == 17 and [r for r in found if not r.passed] == []
    assert all(r.error == 0 for r in found if r.array.startswith(("grid", "gt_corners", "sampled_")))
