import math
from pathlib import Path

import numpy as np
import pytest
import torch
from labeldistill_twin import adaptor_file, boxes_file, encoder_file, feature_file, head_file, polygon

from kdlab.parity import parity

GOLDEN = Path(__file__).parents[1] / "golden" / "labeldistill"
FILES = sorted(GOLDEN.glob("*.npz"))
INPUTS = ("gt_", "n_samples", "student_", "teacher_", "dbound", "d_bound", "edge_values", "depth", "logits", "in_")
INPUTS += ("param", "boxes_in", "points_uvd", "sensor2ego", "intrin", "ida", "bda", "voxel_size", "voxel_coord")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as stored:
        return {k: stored[k] for k in stored.files}


def outputs_of(arrays) -> set[str]:
    found = set()
    for name in arrays:
        prefix, _, base = name.rpartition("/")
        if prefix.startswith(("w", "neck", "head", "label", "lidar")) or (
            base.startswith(INPUTS) and base != "ida_mat"
        ):
            continue
        if base != "heatmap" or f"{prefix}/n_samples" in arrays:
            found.add(name)
    return found


def failed(rows) -> list:
    return [(r.file, r.array, r.error, r.note) for r in rows if not r.passed]


@pytest.fixture(scope="module")
def golden(stored_rows):
    return stored_rows("labeldistill")


def test_every_stored_array_is_reproduced(golden):
    assert failed(golden) == []
    assert {(r.file, r.array) for r in golden} == {(f.name, a) for f in FILES for a in outputs_of(load(f))}
    assert len(golden) == 169 and all(r.error is not None and r.judged for r in golden)


def test_maps_are_exact_and_numbers_close(golden):
    exact = ("bev_", "ind", "mask", "bin", "voxel_idx", "nz_yx")
    maps = [r for r in golden if r.array.rpartition("/")[2].startswith(exact)]
    assert len(maps) > 30 and all(r.error == 0 for r in maps)
    assert max(r.error for r in golden) < 2e-6


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_each_perturbed_output_is_found(tmp_path, file):
    arrays = load(file)
    outputs = outputs_of(arrays)
    for name in outputs:
        if arrays[name].size:
            changed = arrays[name].astype(np.float64).reshape(-1)
            changed[-1] += max(1e-3, 1e-3 * float(np.abs(changed).max()))
            arrays[name] = changed.reshape(arrays[name].shape)
    np.savez(tmp_path / "renamed.npz", **arrays)
    assert [r.array for r in parity(tmp_path) if r.passed] == []


@pytest.mark.parametrize(
    ("file", "array", "found"),
    [
        ("label_input_128", "typical/gt_boxes_1", "typical/bev_box"),
        ("head_kd", "typical/student_box", "typical/resp_box_per_task"),
        ("label_encoder", "w/mlp2.fc1.bias", "nogt/eval_out_1"),
        ("feature_distill", "typical/teacher_1", "typical/label_grad_1"),
        ("partition_adaptor", "in_0", "eval_label_0"),
    ],
)
def test_perturbed_inputs_are_found(tmp_path, file, array, found):
    arrays = load(GOLDEN / f"{file}.npz")
    arrays[array] = arrays[array] + np.float32(0.5)
    np.savez(tmp_path / "a.npz", **arrays)
    assert found in {r.array for r in parity(tmp_path) if not r.passed}


def test_what_cannot_be_read_fails(tmp_path):
    arrays = load(GOLDEN / "feature_distill.npz")
    np.savez(tmp_path / "new.npz", **arrays, **{"typical/new_loss": np.zeros(()), "else": np.zeros(3)})
    np.savez(tmp_path / "less.npz", **{k: v for k, v in arrays.items() if k != "typical/student_1"})
    arrays["nogt/lidar_grad_0"] = np.full_like(arrays["nogt/lidar_grad_0"], np.nan)
    arrays["nogt/label_loss"] = np.zeros(2)
    np.savez(tmp_path / "nan.npz", **arrays)
    off = {(r.file, r.array): r.note for r in parity(tmp_path) if not r.passed}
    assert "nothing computes" in off["new.npz", "typical/new_loss"] and ("new.npz", "else") in off
    assert "typical/student_1" in off["less.npz", "typical/label_loss"] and ("less.npz", "nogt/label_loss") not in off
    assert ("nan.npz", "nogt/lidar_grad_0") in off and "in the file" in off["nan.npz", "nogt/label_loss"]


AREAS = {
    "square": ((32, 32), (-12.8, -12.8), 0.8),
    "rect": ((20, 44), (-17.6, -8.0), 0.8),
    "elsewhere": ((28, 20), (-3.2, -14.4), 0.8),
    "fine": ((40, 24), (-4.8, -8.0), 0.4),
}


@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("counts", [(6, 4), (0, 9, 3), (12,)], ids=str)
def test_label_maps_match_the_statements(tmp_path, area, counts):
    size, low, cell = AREAS[area]
    rng = np.random.default_rng(len(counts) + size[0])
    np.savez(
        tmp_path / "case.npz", **{f"x/{n}": v for n, v in boxes_file(rng, counts, size, np.array(low), cell).items()}
    )
    rows = parity(tmp_path)
    assert failed(rows) == [] and len(rows) == 7


@pytest.mark.parametrize(("area", "counts"), [("rect", (7, 5)), ("elsewhere", (0, 6, 4)), ("square", (0,))])
def test_the_heads_losses_match_the_statements(tmp_path, area, counts):
    size, low, cell = AREAS[area]
    arrays = head_file(np.random.default_rng(3), counts, size, np.array(low), cell)
    np.savez(tmp_path / "case.npz", **{f"a/{n}": v for n, v in arrays.items()})
    rows = parity(tmp_path)
    assert failed(rows) == [] and len(rows) == 22


@pytest.mark.parametrize(("area", "counts"), [("rect", (7, 0)), ("square", (3, 4, 2))])
def test_encoders_match_the_statements(tmp_path, area, counts):
    size, low, cell = AREAS[area]
    arrays, weights = encoder_file(np.random.default_rng(4), counts, size, np.array(low), cell)
    np.savez(tmp_path / "case.npz", **weights, **{f"b/{n}": v for n, v in arrays.items()})
    rows = parity(tmp_path)
    assert failed(rows) == [] and len(rows) == 11


@pytest.mark.parametrize(
    ("batch", "maps", "out"), [(1, ((13, 10, 6), (8, 5, 3)), (4, 9)), (3, ((6, 4, 9), (21, 8, 8)), (2, 3))]
)
def test_adaptors_match_the_statements(tmp_path, batch, maps, out):
    np.savez(tmp_path / "case.npz", **adaptor_file(np.random.default_rng(5), batch, maps, out))
    rows = parity(tmp_path)
    assert failed(rows) == [] and len(rows) == 12


@pytest.mark.parametrize(("batch", "size", "empty"), [(1, (24, 16), False), (3, (10, 30), False), (2, (8, 8), True)])
def test_feature_losses_match_the_statements(tmp_path, batch, size, empty):
    np.savez(tmp_path / "case.npz", **feature_file(np.random.default_rng(6), batch, size, (3, 4), empty))
    rows = parity(tmp_path)
    assert failed(rows) == [] and len(rows) == 13


def test_polygons_match_the_statements(tmp_path):
    rng, count, size = np.random.default_rng(7), 200, (24, 40)
    out = {
        "center": (rng.random((count, 2)) * 50 - 5).astype(np.float32),
        "size": (rng.random((count, 2)) * (14, 5)).astype(np.float32),
        "box": rng.normal(0, 3, (count, 9)).astype(np.float32),
        "cls": rng.integers(0, 10, count),
        "mask": np.zeros((count, *size), np.uint8),
    }
    for k in range(count):
        for i, j in polygon(*out["center"][k].tolist(), *out["size"][k].tolist(), float(out["box"][k, 6]), size):
            out["mask"][k, i, j] = 1
    np.savez(tmp_path / "polygon_x.npz", **out)
    rows = parity(tmp_path)
    assert failed(rows) == [] and [r.array for r in rows] == ["mask"] and out["mask"].sum() > 500


def test_the_input_pipeline_matches_the_statements(tmp_path):
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(3, 20, 2, 5)).astype(np.float32)
    depth = np.where(rng.random((1, 3, 16, 40)) < 0.05, rng.random((1, 3, 16, 40)) * 14, 0).astype(np.float32)
    low, width = 1.0, 0.5
    bins = np.full((3, 2, 5), -1, np.int64)
    for n in range(3):
        for i in range(2):
            for j in range(5):
                block = depth[0, n, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
                if (block > 0).any():
                    k = math.floor((block[block > 0].min() - (low - width)) / width) - 1
                    bins[n, i, j] = k if 0 <= k < 20 else -1
    leaf = torch.from_numpy(logits).requires_grad_()
    p = leaf.softmax(1)
    hit = torch.nn.functional.one_hot(torch.from_numpy(bins).clamp(min=0), 20).permute(0, 3, 1, 2).float()
    error = -(hit * p.log() + (1 - hit) * (1 - p).log()) * torch.from_numpy(bins >= 0)[:, None]
    loss = 3 * error.sum() / max(1, int((bins >= 0).sum()))
    grads = torch.autograd.grad(loss, (leaf, p))
    out = {"dbound": np.array([1.0, 11.0, 0.5]), "c/depth": depth, "c/bin": bins, "c/logits": logits}
    out |= {"c/loss": loss.detach().numpy(), "c/grad_logits": grads[0].numpy(), "c/grad_prob": grads[1].numpy()}
    np.savez(tmp_path / "d.npz", **out)
    box = rng.normal(0, 9, (4, 9))
    theta, scale = math.radians(-13.0), 1.04
    turn = np.array([[math.cos(theta), -math.sin(theta), 0], [math.sin(theta), math.cos(theta), 0], [0, 0, 1]])
    matrix = np.diag([-1.0, 1, 1]) @ (scale * turn)
    moved = np.c_[
        box[:, :3] @ matrix.T, box[:, 3:6] * scale, math.pi - (box[:, 6] + theta), box[:, 7:] @ matrix[:2, :2].T
    ]
    bda = {"param": np.array([-13.0, 1.04, 1, 0]), "boxes_in": box, "boxes_out": moved, "rot_mat": matrix}
    np.savez(tmp_path / "e.npz", **{f"bda7/{n}": v for n, v in bda.items()})
    rows = parity(tmp_path)
    assert failed(rows) == [] and len(rows) == 6
