"""Parity on cases that are not stored: made from stored ones, and by loops; and what it says of broken files."""

import shutil
from pathlib import Path

import golden_changes as change
import numpy as np
import pytest
import torch
from golden_changes import load

from kdlab.parity import parity, run

GOLDEN = Path(__file__).parents[1] / "golden"
SIM = ("cmd_*", "imd_*", "mmdf_*", "mmdp_*", "targets_*", "fn_cls_*", "fn_box_b2*", "depth_*", "unused_*")
ORDERED = {
    "unidistill": (change.uni_ordered, ("typical", "one_box", "all_pad", "no_gt")),
    "distillbev": (change.bev_ordered, ("loss_[bhm]*", "masks_bev*_typical", "region_*", "attention_*")),
    "simdistill": (change.sim_ordered, SIM),
}
MIRRORED = {
    "unidistill": (change.uni_mirrored, ("typical", "one_box", "orientation", "all_pad")),
    "distillbev": (change.bev_mirrored, ("loss_*", "masks_*", "region_*", "attention_*", "quirk_*")),
    "simdistill": (change.sim_mirrored, ("cmd_*", "mmdp_*", "targets_*")),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def off(rows) -> list:
    return [(r.file, r.array, r.error, r.note) for r in rows if not r.passed]


def files(family: str, patterns) -> list[Path]:
    return sorted({f for p in patterns for f in (GOLDEN / family).glob(f"{p}.npz")})


def samples_of(arrays) -> int:
    for name, count in (("gt_offsets", -1), ("gt_boxes", 0), ("depth_gt", 0)):
        if name in arrays:
            return len(arrays[name]) + count
    return len(next(v for n, v in arrays.items() if n.startswith(("teacher", "student"))))


@pytest.mark.parametrize("family", ORDERED)
def test_samples_in_another_order_and_twice(tmp_path, family):
    make, patterns = ORDERED[family]
    for k, file in enumerate(files(family, patterns)):
        arrays = load(file)
        count = samples_of(arrays)
        rows = list(range(count))[::-1] if k % 2 and count > 1 else [*range(count), *range(count)][::-1]
        folder = tmp_path / f"{len(rows)} samples"
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"case {k}.npz", **make(arrays, rows))
    found = parity(tmp_path)
    assert off(found) == [] and len(found) >= {"unidistill": 110, "distillbev": 300, "simdistill": 100}[family]


@pytest.mark.parametrize("family", MIRRORED)
def test_mirrored_scenes(tmp_path, family):
    make, patterns = MIRRORED[family]
    for k, file in enumerate(files(family, patterns)):
        if "dfs" not in file.name and "knifeedge" not in file.name:
            np.savez(tmp_path / f"{k}.npz", **make(load(file)))
    found = parity(tmp_path)
    assert off(found) == [] and len(found) >= {"unidistill": 90, "distillbev": 300, "simdistill": 50}[family]


@pytest.mark.parametrize("name", ["feature_distill", "head_kd", "label_input_128"])
def test_groups_of_other_names_orders_and_mirrored(tmp_path, name):
    arrays, out = load(GOLDEN / "labeldistill" / f"{name}.npz"), {}
    for prefix in sorted({n.split("/")[0] for n in arrays}):
        group = {n.removeprefix(f"{prefix}/"): v for n, v in arrays.items() if n.startswith(f"{prefix}/")}
        out |= {f"{prefix} 2/turned/{n}": v for n, v in change.label_ordered(group, [1, 0]).items()}
        if prefix != "nogt":  # 1 is the least count there
            out |= {f"twice_{prefix}/{n}": v for n, v in change.label_ordered(group, [0, 1, 1, 0]).items()}
        out |= {f"{prefix}-mirrored/{n}": v for n, v in change.label_mirrored(group).items()}
    np.savez(tmp_path / "any name.npz", **out)
    found = parity(tmp_path)
    assert off(found) == [] and len(found) >= 40


NEEDED = {
    "unidistill/typical": {
        "gt_boxes", "pc_range", "voxel_size", "out_size_factor", "det_loss", "student_low", "teacher_low",
        "student_high", "teacher_high", "student_reg", "teacher_hm_logits",
    },
    "distillbev/loss_multiscale_script_single": {
        "gt_offsets", "teacher_logits", "student_backbone2", "config_json",
        "param__channel_wise_adaptations.0.1.conv2.weight", "param__channel_wise_adaptations.1.1.norm3.bias",
    },
    "distillbev/loss_head_script_typical": {
        "gt_boxes", "geom_point_cloud_range", "teacher_feat", "student_feat", "param__channel_wise_adaptations.0.bias",
        "param__spatial_wise_adaptations.0.weight",
    },
    "distillbev/loss_bevformer_fp_typical": {"teacher_boxes", "teacher_offsets", "teacher_scores", "gt_boxes"},
    "distillbev/region_bevdet_small_typical": {
        "gt_boxes", "gt_offsets", "gt_labels", "student_logits", "teacher_logits", "gt_heatmap",
    },
    "distillbev/masks_bevdet_context_typical": {"gt_boxes", "gt_offsets", "context_length", "context_weight"},
    "distillbev/attention_typical": {"teacher_feat", "student_feat_adapted", "geom_point_cloud_range"},
    "simdistill/cmd_typical": {"student", "teacher", "gt_boxes", "gt_labels", "point_cloud_range", "voxel_size"},
    "simdistill/mmdp_typical": {
        "student_heatmap_logits", "teacher_heatmap_logits", "student_box", "teacher_box", "gt_boxes", "out_stride",
    },
    "simdistill/depth_typical": {"depth_gt", "logits", "dbound"},
    "simdistill/fn_box_b2k12": {"student", "teacher", "code_weights"},
    "simdistill/fn_cls_c2": {"student_prob", "teacher_prob", "num_class"},
    "simdistill/gaussian_radius": {"cells", "min_overlap"},
    "simdistill/gcm_square": {"heads", "w.pe.0.row_embed.weight"},
    "simdistill/targets_typical": {"gt_boxes", "gt_labels", "point_cloud_range", "voxel_size", "out_stride"},
    "simdistill/total_typical": {"keys", "values"},
    "simdistill/unused_tf_typical": {"student_logits", "teacher_logits", "student_box", "teacher_box"},
    "labeldistill/augment": {"bda1/param", "bda1/boxes_in", "ida0/param", "ida2/points_uvd"},
    "labeldistill/depth": {"dbound", "typical/depth", "typical/logits"},
    "labeldistill/feature_distill": {"typical/heatmap", "typical/teacher_1", "nogt/student_0"},
    "labeldistill/geometry": {"d_bound", "sensor2ego", "intrin", "ida", "bda", "voxel_size", "voxel_coord"},
    "labeldistill/head_kd": {
        "typical/n_samples", "typical/gt_boxes_1", "typical/gt_labels_0", "typical/student_box",
        "typical/student_heatmap_logit", "typical/teacher_box_at_ind", "typical/teacher_heatmap_logit",
    },
    "labeldistill/label_input_128": {"typical/n_samples", "mixed_empty/gt_boxes_1"},
    "labeldistill/partition_adaptor": {"in_0", "in_1", "lidar/blocks.1.0.bias"},
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_array_is_named(tmp_path, name):
    """By at least one row; and no output is let through because of it."""
    arrays = load(GOLDEN / f"{name}.npz")
    for k, lost in enumerate(sorted(NEEDED[name])):
        np.savez(tmp_path / f"{k}.npz", **{n: v for n, v in arrays.items() if n != lost})
    found = parity(tmp_path)
    for k, lost in enumerate(sorted(NEEDED[name])):
        bad = [r for r in found if r.file == f"{k}.npz" and not r.passed]
        assert any(lost.rpartition("/")[2] in r.note for r in bad), (lost, off(bad))


@pytest.mark.parametrize("family", ["unidistill", "distillbev", "simdistill", "labeldistill"])
def test_broken_files_are_rows_of_their_own(tmp_path, family):
    file = min((GOLDEN / family).glob("*.npz"), key=lambda f: f.stat().st_size)
    whole = file.read_bytes()
    for k, size in enumerate((0, 3, len(whole) // 4, len(whole) // 2, len(whole) - 30)):
        (tmp_path / f"cut{k}.npz").write_bytes(whole[:size])
    spoilt = bytearray(whole)
    middle = len(whole) // 2
    spoilt[middle : middle + 64] = bytes(b ^ 0x5A for b in spoilt[middle : middle + 64])
    (tmp_path / "spoilt.npz").write_bytes(bytes(spoilt))
    (tmp_path / "good.npz").write_bytes(whole)
    arrays = load(file)
    name = next(iter(arrays))
    np.savez(tmp_path / "object.npz", **(arrays | {name: np.array([{"a": 1}], dtype=object)}))
    np.savez(tmp_path / "alien.npz", **{f"{n}_x": v for n, v in arrays.items()})
    np.savez(tmp_path / "empty.npz")
    found = parity(tmp_path)
    for file in tmp_path.glob("*.npz"):
        rows = [r for r in found if r.file == file.name]
        if file.name == "good.npz":
            assert len(rows) > 0 and off(rows) == []
            continue
        assert off(rows), file.name
        if file.stem not in ("alien", "empty"):
            assert len(rows) == 1 and rows[0].note.startswith("cannot be read: "), rows
    assert any("no known family" in r.note for r in found if r.file == "empty.npz")


def test_one_wrong_number_is_found_wherever_it_is(tmp_path, stored_rows):
    """In every output of every other stored file."""
    rng, wrong = np.random.default_rng(0), set()
    for k, file in enumerate(sorted(GOLDEN.rglob("*.npz"))[::2]):
        arrays, name = load(file), f"{k}.npz"
        inputs = {"gt_heatmap", "heatmap", "fg_mask", "mask", "ind", "anno_box", "bev_box", "bev_label", "gt_indices"}
        if "knifeedge" in file.name:
            continue
        for row in (r for r in stored_rows(file.parent.name) if r.file == file.name):
            base = row.array.rpartition("/")[2]
            if base in inputs or base.startswith("fg_mask") or arrays[row.array].size == 0:
                continue  # also inputs of others, which are then off too
            flat = arrays[row.array].reshape(-1).copy()
            at = rng.integers(len(flat))
            step = 0.02 * max(float(np.abs(flat.astype(float)).max()), 0.05)
            flat[at] = 1 - flat[at] if flat.dtype.kind in "bui" else flat[at] + step
            arrays[row.array] = flat.reshape(arrays[row.array].shape)
            wrong.add((name, row.array))
        np.savez(tmp_path / name, **arrays)
        passed = {r.array for r in parity(tmp_path) if r.passed}
        assert not {(name, p) for p in passed} & wrong, (file.name, passed)
        (tmp_path / name).unlink()
    assert len(wrong) > 400


def test_other_types_and_layouts_of_arrays(tmp_path):
    """Numbers in double precision, whole numbers and masks in other types, columns before rows in memory."""
    types = {"f": np.float64, "i": np.int32, "u": np.int16, "b": np.uint8}
    for k, file in enumerate(sorted(GOLDEN.rglob("*.npz"))[1::4]):
        if "knifeedge" not in file.name:
            arrays = {n: v.astype(types[v.dtype.kind]) if v.dtype.kind in types else v for n, v in load(file).items()}
            np.savez(tmp_path / f"{k}.npz", **{n: np.asfortranarray(v) if v.ndim else v for n, v in arrays.items()})
    found = parity(tmp_path)
    assert off(found) == [] and len(found) > 100


def test_families_in_another_form_are_no_skip(tmp_path):
    shutil.copy(GOLDEN / "unidistill" / "no_gt.npz", tmp_path / "a.npz")
    (tmp_path / "README.md").write_text("about")
    assert run(tmp_path) == 0
    for folder in ("fifth", ".hidden", "sixth/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "fifth" / "cases.json").write_text("{}")
    for hidden in (Path(".hidden", "objects"), Path("__pycache__", "deep")):
        (tmp_path / hidden).mkdir(parents=True)
        np.save(tmp_path / hidden / "c.npy", np.zeros(3))
    np.save(tmp_path / "b.npy", np.zeros(3))
    np.savez(tmp_path / "sixth" / "deep" / "x.npz", boxes=np.zeros(3), gt_boxes=np.zeros((0, 9)))
    notes = {r.file: r.note for r in parity(tmp_path) if not r.passed}
    assert set(notes) == {"fifth", "b.npy", str(Path("sixth") / "deep" / "x.npz")} and run(tmp_path) == 1
    assert notes["fifth"] == notes["b.npy"] == "only .npz files can be read"
    assert "no known family holds these arrays: boxes, gt_boxes" in notes[str(Path("sixth") / "deep" / "x.npz")]
