import shutil
from pathlib import Path

import numpy as np
import pytest

from kdlab.parity import parity, render, run

GOLDEN = Path(__file__).parent / "golden" / "unidistill"


def rewrite(source: Path, target: Path, change) -> None:
    with np.load(source) as stored:
        arrays = {k: stored[k] for k in stored.files}
    change(arrays)
    np.savez(target, **arrays)


def only_outputs(rows):
    return {row.array: row for row in rows}


def test_every_stored_array_is_reproduced(capsys):
    rows = parity(GOLDEN)
    assert [r for r in rows if not r.passed] == []
    assert {r.file for r in rows} == {p.name for p in GOLDEN.glob("*.npz")}
    assert len(rows) == 126 and all(r.judged for r in rows)
    assert run(GOLDEN) == 0
    out = capsys.readouterr().out
    assert "max relative error" in out and "typical.npz" in out and "none off" in out


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


def test_every_array_is_judged():
    for file in GOLDEN.glob("*.npz"):
        with np.load(file) as stored:
            outputs = {k for k in stored.files if k not in INPUTS and not k.startswith(("student_", "teacher_"))}
            outputs |= {"student_hm_prob"} & set(stored.files)
        assert {r.array for r in parity(GOLDEN) if r.file == file.name} == outputs


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
