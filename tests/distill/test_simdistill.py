import math
from dataclasses import replace

import pytest
import torch
from distill_fakes import GRID, SQUARE, FakeChannels, FakeDetector, batch_of, boxes, features
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture
from test_regions import naive_mask
from torch import nn

from kdlab.checkpoint import load_detector
from kdlab.config import DetectorConfig, DistillConfig
from kdlab.distill import Context, Distiller, build_method, run_terms, total
from kdlab.distill.distiller import agree
from kdlab.distill.simdistill import QUIRKS, TERMS, object_mask, simdistill
from kdlab.geometry import BEVGrid, transform_boxes, yaw_pose
from kdlab.models.detector import Detector
from kdlab.sample import TASKS, Boxes3D, Features, Predictions, TaskPrediction
from kdlab.train import train

GRIDS = (GRID, SQUARE, BEVGrid((-6.0, 12.0), (-9.0, 9.0), 0.9), BEVGrid((-6.0, 3.0), (-9.0, 9.0), 0.75))
WIDTHS = FakeChannels(camera_bev=3, regression=60)
NAMES = tuple(t.name for t in TERMS)
MASKED = {"cross_modal", "prediction_box"}


def maps(seed, size, grid, widths=WIDTHS):
    """Features with a camera BEV map and a heat map that fires in a fifth of the cells."""
    found = features(seed, size, grid, widths)
    g = torch.Generator().manual_seed(seed + 1000)
    found.camera_bev = torch.randn(size, 1, widths.camera_bev, *grid.shape, generator=g).requires_grad_()
    heat = (found.predictions.heatmap.detach() - 3).requires_grad_()
    reg = found.predictions.regression
    task = TaskPrediction(heat, reg, *(reg[:, :0],) * 4)
    return replace(found, predictions=Predictions((task,)))


def setting(seed, counts=(4, 2), grid=GRID, method=None, found=None):
    """A context and its method; the adapter has random weights."""
    method = method or simdistill()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sides = FakeDetector(0, WIDTHS), FakeDetector(1, WIDTHS)
        distiller = Distiller(method.flip(method.on & {"simdistill.trained_fuser"}), *sides, grid=grid)
    batch = batch_of(boxes(seed, counts) if found is None else found)
    student, teacher = (maps(seed + i, len(counts), grid) for i in (1, 2))
    return distiller.context(student, batch, teacher), method


def plain(method):
    """The method with weights 1 and an adapter that changes nothing."""
    adapters = tuple(replace(a, build=lambda s, t: nn.Identity()) for a in method.adapters)
    return replace(method.reweight(dict.fromkeys(NAMES, 1.0)), adapters=adapters)


def leaves(found):
    task = found.predictions.tasks[0]
    return [found.bev, found.camera_bev, found.lidar_bev, task.heatmap, task.reg]


def naive(ctx, released):
    """The five losses of weight 1, by loops over samples, boxes, tasks and cells."""
    student, teacher, grid, size = ctx.student, ctx.teacher, ctx.grid, len(ctx.boxes.values)
    cells = grid.height * grid.width
    out = {"intra_modal": (student.camera_bev - teacher.camera_bev).pow(2).mean()}
    out["fusion"] = (student.bev - teacher.bev).pow(2).mean()
    adapted, lidar = ctx.pair(next(t for t in TERMS if t.name == "cross_modal"))
    out |= dict.fromkeys(("cross_modal", "prediction_class", "prediction_box"), torch.zeros(()))
    for b in range(size):
        rows = [m for m in range(len(ctx.boxes)) if ctx.boxes.valid[b, m] and inside(ctx, b, m, released)]
        mask = torch.zeros(grid.shape)
        for k in range(10):
            drawn = torch.tensor([[m in rows and int(ctx.boxes.labels[b, m]) == k for m in range(len(ctx.boxes))]])
            mask += naive_mask(ctx.boxes.values[b : b + 1], drawn, grid, 0.1, 2, truncate=released)[0]
        error = (mask**2 * (adapted[b] - lidar[b]) ** 2).sum()
        out["cross_modal"] = out["cross_modal"] + error / (size * len(lidar[b]) * cells)
        for t, members in enumerate(TASKS):
            scale = 1 if released else 1 / size
            out["prediction_class"] = out["prediction_class"] + scale * sum(
                naive_scores(student, teacher, b, k, released) * (len(members) if released else 1) for k in members
            )
            mine = [m for m in rows if int(ctx.boxes.labels[b, m]) in members]
            error = sum((naive_codes(ctx, b, t, cell(ctx, b, m, released), released) for m in mine), torch.zeros(()))
            if released:
                error = error + (500 - len(mine)) * naive_codes(ctx, b, t, (0, 0), released)
            out["prediction_box"] = out["prediction_box"] + scale * error / (500 if released else max(len(mine), 1))
    return out


def cell(ctx, b, m, truncate):
    u, v = ctx.grid.to_cells(ctx.boxes.values[b, m, :2]).tolist()
    return (int(u), int(v)) if truncate else (math.floor(u), math.floor(v))


def inside(ctx, b, m, truncate):
    u, v = cell(ctx, b, m, truncate)
    return 0 <= u < ctx.grid.width and 0 <= v < ctx.grid.height


def naive_scores(student, teacher, b, k, released):
    s, t = (f.predictions.heatmap[b, k].sigmoid() for f in (student, teacher))
    if released:
        s, t = (p.clamp(1e-4, 1 - 1e-4).sigmoid() for p in (s, t))
    count = s.numel() if released else max(int((t > 0.1).sum()), 1)
    return (-(t * s.log() + (1 - t) * (1 - s).log()) * (s - t) ** 2).sum() / count


def naive_codes(ctx, b, task, at, released):
    s, t = (f.predictions.regression[b, 10 * task : 10 * task + 10, at[1], at[0]] for f in (ctx.student, ctx.teacher))
    error = torch.zeros(())
    for k in range(10):
        d = (torch.sin(s[k] - t[k]) if released and k == 6 else s[k] - t[k]) * (0.2 if k > 7 else 1)
        error = error + (d * d * 4.5 if abs(d) < 1 / 9 else abs(d) - 1 / 18)
    return error


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(0, 4), st.integers(0, 3)), st.sampled_from(GRIDS), st.booleans())
def test_terms_match_loops(seed, counts, grid, released):
    ctx, method = setting(seed, counts, grid, simdistill("released" if released else "intended"))
    results = run_terms(method.reweight(dict.fromkeys(NAMES, 1.0)), ctx)
    with torch.no_grad():
        for name, value in naive(ctx, released).items():
            torch.testing.assert_close(results[name].value.detach(), value, rtol=2e-5, atol=2e-5)


def test_weights_and_sources():
    method = simdistill("released")
    weights = {"intra_modal": 1, "cross_modal": 100, "fusion": 1, "prediction_class": 0.25, "prediction_box": 0.25}
    assert {t.name: t.weight for t in method.terms} == weights
    assert all("SimDistill (AAAI 2024)" in t.source for t in method.terms) and all(q.evidence for q in method.quirks)
    assert "3x3 convolution, norm, ReLU" in method.describe() and "simdistill.shared_lift" in method.describe()
    with pytest.raises(ValueError, match="unknown variant"):
        simdistill("other")


def test_zero_where_student_is_teacher():
    for method in (simdistill(), simdistill("released")):
        ctx, method = setting(1, method=plain(method))
        ctx.teacher = ctx.student
        results = run_terms(method, ctx)
        assert all(r.value == 0 for r in results.values())
        found = torch.autograd.grad(total(results), leaves(ctx.student), materialize_grads=True)
        assert all(not g.any() for g in found)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("variant", ["intended", "released"])
def test_samples_without_ground_truth(variant, counts):
    ctx, method = setting(3, counts, method=simdistill(variant))
    results = run_terms(method, ctx)
    assert all(r.value.isfinite() for r in results.values())
    masked = MASKED - ({"prediction_box"} if variant == "released" else set())
    for b, count in enumerate(counts):
        for name, result in results.items():
            assert bool(result.map()[b].any()) == (name not in masked or count > 0), name
    assert all(g.isfinite().all() for g in torch.autograd.grad(total(results), leaves(ctx.student)))


def test_padding_changes_nothing():
    ctx, method = setting(2, (3, 3))
    more = Boxes3D.pad([ctx.boxes[0], ctx.boxes[1], boxes(9, (6,))[0]])[:2]
    other = replace(ctx, boxes=more, _made={})
    assert len(more) > len(ctx.boxes)
    for a, b in zip(run_terms(method, ctx).values(), run_terms(method, other).values(), strict=True):
        torch.testing.assert_close(a.value, b.value)


@pytest.mark.parametrize("variant", ["intended", "released"])
def test_value_is_map_and_what_is_off_it(variant):
    ctx, method = setting(5, (4, 0), method=simdistill(variant))
    for result in run_terms(method, ctx).values():
        torch.testing.assert_close(result.map().sum() + result.off_map, result.value, rtol=1e-4, atol=1e-5)


def test_released_boxes_fall_on_the_first_cell():
    ctx, method = setting(5, (3, 1), method=simdistill("released"))
    found = run_terms(method.only(["prediction_box"]), ctx)["prediction_box"]
    assert found.map()[:, 0, 0].sum() > 0.95 * found.value
    ctx, method = setting(5, (3, 1))
    assert run_terms(method.only(["prediction_box"]), ctx)["prediction_box"].map()[:, 0, 0].sum() == 0


CHANGES = {
    "simdistill.double_sigmoid": {"prediction_class"},
    "simdistill.unmasked_boxes": {"prediction_box"},
    "simdistill.sine_of_sine": {"prediction_box"},
    "simdistill.sum_over_batch": {"prediction_class", "prediction_box"},
    "simdistill.truncate_centre": {"cross_modal", "prediction_box"},
    "simdistill.trained_fuser": set(),
    "simdistill.shared_lift": set(),
    "simdistill.corner_reference": set(),
    "simdistill.lidar_depth": set(),
}


@pytest.mark.parametrize("quirk", CHANGES)
def test_a_quirk_changes_what_it_should(quirk):
    found = boxes(6, (3, 1))
    found.values[0, 0, :7] = torch.tensor([-12.4, 3.1, 0, 5, 3, 1, 0.3])  # centre just outside
    made, _ = setting(6, (3, 1), found=found)
    runs = []
    for method in (simdistill(), simdistill().flip([quirk])):
        ctx = replace(made, on=method.on, _made={})
        runs.append({n: r.value.item() for n, r in run_terms(method, ctx).items()})
    assert {n for n in NAMES if runs[0][n] != runs[1][n]} == CHANGES[quirk]
    assert {q.name for q in QUIRKS} == set(CHANGES)


def test_quirks_of_the_student_are_fields_of_its_config():
    fields = {q.name: q.student for q in QUIRKS if q.where == "student"}
    assert set(fields.values()) == {"camera.shared_lift", "camera.corner_reference", "camera.lidar_depth"}
    for path in fields.values():
        part, name = path.split(".")
        assert getattr(getattr(DetectorConfig(), part), name) is False


def test_mask_turns_with_the_boxes():
    found = boxes(7, (6, 3))
    masks = [
        object_mask(Context(maps(0, 2, SQUARE), None, Boxes3D.make(v, found.labels, found.valid), SQUARE), SQUARE)
        for v in (found.values.double(), transform_boxes(yaw_pose(math.pi / 2), found.values.double()))
    ]
    assert masks[0].max() >= 1
    torch.testing.assert_close(masks[1], masks[0].rot90(1, (3, 2)))


def test_mask_adds_classes_and_merges_within_one():
    values = torch.tensor([[[0.3, 0.3, 0, 4, 2, 1, 0, 0, 0], [1.0, 0.3, 0, 4, 2, 1, 0, 0, 0]]])
    ones = torch.ones(1, 2, dtype=torch.bool)
    peaks = []
    for labels in ([0, 0], [0, 3]):
        made = Context(maps(0, 1, SQUARE), None, Boxes3D.make(values, torch.tensor([labels]), ones), SQUARE)
        peaks.append(float(object_mask(made, SQUARE).max()))
    assert peaks[0] == 1 and peaks[1] > 1.3


def test_a_batch_is_the_mean_of_its_samples():
    """So losses averaged over processes are those of one process; as released, predictions add up instead."""
    for variant, factor in (("intended", 0.5), ("released", 1.0)):
        ctx, method = setting(8, (4, 2), method=plain(simdistill(variant)))
        parts = []
        for b in (slice(0, 1), slice(1, 2)):
            one = [sliced(f, b) for f in (ctx.student, ctx.teacher)]
            parts.append(run_terms(method, Context(*one, ctx.boxes[b], GRID, on=ctx.on, adapters=ctx.adapters,
                                                   modules=ctx.modules)))  # fmt: skip
        for name, result in run_terms(method, ctx).items():
            share = factor if name.startswith("prediction") else 0.5
            torch.testing.assert_close((parts[0][name].value + parts[1][name].value) * share, result.value)


def sliced(found, b):
    task = found.predictions.tasks[0]
    tasks = (TaskPrediction(task.heatmap[b], task.reg[b], *(task.vel[b],) * 4),)
    return Features(
        found.bev[b],
        camera_bev=found.camera_bev[b],
        lidar_bev=found.lidar_bev[b],
        neck=found.neck[b],
        predictions=Predictions(tasks),
    )


def test_what_the_teacher_does_not_know_is_left_out():
    ctx, method = setting(9, (3, 2))
    whole = run_terms(method, ctx)["prediction_box"].value
    with torch.no_grad():
        ctx.teacher.predictions.tasks[0].reg[:, 3::10] = math.nan
    ctx.teacher.predictions = Predictions(ctx.teacher.predictions.tasks)  # its maps are made once
    part = run_terms(method, replace(ctx, _made={}))["prediction_box"].value
    assert part.isfinite() and 0 < part < whole


def test_float32_under_autocast():
    distiller = Distiller(simdistill(), FakeDetector(0, WIDTHS), FakeDetector(1, WIDTHS), grid=GRID).eval()
    found = maps(0, 2, GRID), batch_of(boxes(0)), maps(1, 2, GRID)
    plainly = distiller(*found)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = distiller(*found)
    for name, result in plainly.items():
        assert mixed[name].value.dtype == torch.float32
        torch.testing.assert_close(mixed[name].value, result.value, rtol=2e-2, atol=1e-4)  # adapters run in bfloat16


def detectors(tmp_path, **camera):
    """A student with simulated LiDAR, a fusion teacher, and a batch for both."""
    config = mini_config(tmp_path, "camera").detector
    wider = replace(config.camera, **{"simulated_lidar": True, **camera})
    torch.manual_seed(0)
    student = Detector(replace(config, camera=wider), load_pretrained=False)
    teacher = Detector(replace(config, modality="fusion"), load_pretrained=False)
    return student, teacher


def sensors(config, size=2):
    """Random images and points for detectors of this config."""
    made, g = batch_of(boxes(0, (3, 2))), torch.Generator().manual_seed(0)
    height, width = config.camera.image_size
    axes = torch.tensor([[0.0, 0, 1, 1], [-1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]])
    focal = torch.tensor([[0.8 * width, 0, width / 2], [0, 0.8 * width, height / 2], [0, 0, 1]])
    points = (torch.rand(size * 50, 5, generator=g) - 0.5) * torch.tensor([60, 60, 4, 1, 0])
    images = torch.randint(0, 256, (size, 1, 1, 3, height, width), dtype=torch.uint8, generator=g)
    return replace(made, images=images, image_from_camera=focal.expand(size, 1, 1, 3, 3),
                   frame_from_camera=axes.expand(size, 1, 1, 4, 4), points=points,
                   point_batch=torch.arange(size).repeat_interleave(50))  # fmt: skip


def test_gradients_reach_the_student_alone(tmp_path):
    student, teacher = detectors(tmp_path)
    distiller = Distiller(simdistill(), student, teacher, grid=student.grid)
    batch = sensors(student.config)
    results = distiller(student(batch), batch)
    total(results).backward()
    assert all(r.value.isfinite() and r.value > 0 for r in results.values())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert all(p.grad is not None for p in distiller.parameters()) and not distiller.teacher_parts
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.camera.simulated.parameters())
    assert list(distiller.adapters) == ["simdistill/lidar"]


def test_released_trains_the_teachers_fuser(tmp_path):
    student, teacher = detectors(tmp_path, shared_lift=True, corner_reference=True, lidar_depth=True)
    distiller = Distiller(simdistill("released"), student, teacher, grid=student.grid)
    batch = sensors(student.config)
    total(distiller(student(batch), batch)).backward()
    learns = {n.split(".")[0] for n, p in teacher.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {"fuser"} and not distiller.cacheable
    assert teacher.fuser.training and not teacher.neck.training


def test_impossible_pairs_are_told_before_training(tmp_path):
    student, teacher = detectors(tmp_path)
    config = mini_config(tmp_path, "camera").detector
    bare = Detector(config, load_pretrained=False)
    with pytest.raises(
        ValueError, match=r"cross_modal: student\.lidar_bev is missing, the student has image, depth, ca"
    ):
        Distiller(simdistill(), bare, teacher, grid=bare.grid)
    Distiller(simdistill().reweight({"cross_modal": 0}), bare, teacher, grid=bare.grid)
    lidar = Detector(replace(config, modality="lidar"), load_pretrained=False)
    with pytest.raises(
        ValueError, match=r"intra_modal: teacher\.camera_bev\[0\] is missing, the teacher has lidar_bev"
    ):
        Distiller(simdistill(), student, lidar, grid=student.grid)
    Distiller(simdistill().reweight({"intra_modal": 0}), student, lidar, grid=student.grid)
    wide = Detector(
        replace(config, modality="fusion", camera=replace(config.camera, context=16)), load_pretrained=False
    )
    with pytest.raises(
        ValueError, match=r"student\.camera_bev\[0\] has 8 channels and teacher\.camera_bev\[0\] has 16"
    ):
        Distiller(simdistill(), student, wide, grid=student.grid)


def test_weights_of_other_pairs_say_so():
    assert build_method(DistillConfig(method="simdistill"), "camera", "fusion") == simdistill()
    for student, teacher in (("lidar", "fusion"), ("camera", "lidar"), ("fusion", "fusion"), ("camera", "camera")):
        method = build_method(DistillConfig(method="simdistill"), student, teacher)
        said = f"; a weight for fusion to camera, not for {teacher} to {student}"
        assert all(said in term.source for term in method.terms)


def test_adds_up_with_other_methods():
    from kdlab.distill.distillbev import distillbev
    from kdlab.distill.unidistill import unidistill

    both = simdistill() + unidistill("F2C") + distillbev()
    assert both.teacher == {"fusion"} and len(both.terms) == 5 + 4 + 10
    assert both.on == frozenset() and "simdistill.lidar" in {a.name for a in both.adapters}


def test_trains_and_runs_without_its_teacher(tmp_path):
    root = write_set(tmp_path / "set")
    base = mini_config(root, "fusion", epochs=1)
    teacher = train(base, tmp_path / "teacher", progress=False, cpu=True)
    camera = replace(base.detector, modality="camera", camera=replace(base.detector.camera, simulated_lidar=True))
    distill = DistillConfig("simdistill", str(teacher))
    config = replace(base, detector=camera, distill=distill, train=replace(base.train, gradients_every=1))
    run = train(config, tmp_path / "student", progress=False, cpu=True)
    header = (run / "losses.csv").read_text().splitlines()[0]
    assert all(f"kd/{name}" in header for name in NAMES)
    student = load_detector(run)
    assert not any("simdistill" in name or "adapter" in name for name in student.state_dict())
    batch = sensors(camera)
    with torch.no_grad():
        assert torch.equal(student(batch).neck, student(batch.images_only()).neck)


def test_a_student_agrees_with_the_quirks_about_it(tmp_path):
    student, teacher = detectors(tmp_path)
    said = r"shared_lift is on, but the student's detector\.camera\.shared_lift is False"
    with pytest.raises(ValueError, match=said):
        Distiller(simdistill("released"), student, teacher, grid=student.grid)
    student, teacher = detectors(tmp_path, corner_reference=True)
    with pytest.raises(ValueError, match=r"corner_reference is off, .* is True; make it False, or flip the quirk: --q"):
        Distiller(simdistill(), student, teacher, grid=student.grid)


def test_quirks_about_students_that_have_no_such_part_ask_for_nothing(tmp_path):
    released, camera = simdistill("released"), mini_config(tmp_path, "camera").detector
    for modality in ("lidar", "fusion"):
        agree(released, replace(camera, modality=modality))
    plain = replace(camera, camera=replace(camera.camera, lidar_depth=True))
    agree(released, plain)  # no simulated LiDAR, whose lift could be shared
    with pytest.raises(
        ValueError, match=r"lidar_depth is on, .* is False; make it True, .*: --quirks simdistill.lidar_d"
    ):
        agree(released, camera)
