import math
from dataclasses import replace

import pytest
import torch
from distill_fakes import GRID, SQUARE, FakeChannels, FakeDetector, batch_of, boxes, features
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_run import mini_config
from test_regions import naive_mask
from torch import nn

from kdlab.config import BEVConfig, DistillConfig, HeadConfig
from kdlab.distill import Context, Distiller, build_method, copy_start, run_terms, total
from kdlab.distill.distillbev import QUIRKS, attention, distillbev, regions
from kdlab.geometry import BEVGrid, transform_boxes, yaw_pose
from kdlab.models.detector import Detector
from kdlab.sample import Boxes3D, Features, Predictions, TaskPrediction

GRIDS = (GRID, SQUARE, BEVGrid((-6.0, 12.0), (-9.0, 9.0), 0.9), BEVGrid((-6.0, 3.0), (-9.0, 9.0), 0.75))
WIDTHS = FakeChannels()
MASKED = {"foreground_B1", "foreground_B2", "foreground_H"}
DIFFERENCES = [t.name for t in distillbev().terms]


def cooler(seed, size, grid, channels=WIDTHS):
    """Features whose heat map fires in a fifth of the cells."""
    found = features(seed, size, grid, channels)
    task = found.predictions.tasks[0]
    found.predictions = Predictions((TaskPrediction(task.heatmap - 4, task.reg, *(task.reg[:, :0],) * 4),))
    return found


def setting(seed, counts=(4, 2), grid=GRID, method=None, found=None):
    """A context and its method; adapters with random weights."""
    method = method or distillbev()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        distiller = Distiller(method, FakeDetector(0), FakeDetector(1), grid=grid)
    batch = batch_of(boxes(seed, counts) if found is None else found)
    student, teacher = (cooler(seed + i, len(counts), grid) for i in (1, 2))
    return distiller.context(student, batch, teacher), distiller.method


def identity(method):
    """The method with adapters that change nothing."""
    return replace(
        method, adapters=tuple(replace(a, build=lambda s, t: nn.Identity(), resize="no") for a in method.adapters)
    )


def sliced(found, samples):
    """The features of some samples."""
    tasks = tuple(replace(t, heatmap=t.heatmap[samples]) for t in found.predictions.tasks)
    stages = tuple(s[samples] for s in found.stages)
    return Features(found.bev[samples], stages=stages, neck=found.neck[samples], predictions=Predictions(tasks))


def inside(x, y, box):
    dx, dy, cos, sin = x - box[0], y - box[1], math.cos(box[6]), math.sin(box[6])
    return abs(dx * cos + dy * sin) < box[3] / 2 and abs(-dx * sin + dy * cos) < box[4] / 2


def naive_regions(ctx, b, grid, released, false_positives):
    """Kind of each cell and its size scale, cell by cell."""
    rows = [r for r, v in zip(ctx.boxes.values[b].tolist(), ctx.boxes.valid[b].tolist(), strict=True) if v]
    if released:
        rows = [r for r in rows if grid.x[0] <= r[0] < grid.x[1] and grid.y[0] <= r[1] < grid.y[1]]
    kind, size = [["background"] * grid.width for _ in range(grid.height)], torch.zeros(grid.shape)
    scores = ctx.teacher.predictions.heatmap[b].sigmoid().amax(0)
    values, within = ctx.boxes.values[b : b + 1], ctx.grid.locate(ctx.boxes.values[b : b + 1, :, :2])[2]
    truth = naive_mask(values, ctx.boxes.valid[b : b + 1] & within, ctx.grid, 0.1, 2)[0]
    for i in range(grid.height):
        for j in range(grid.width):
            half = 0 if released else 0.5
            x, y = grid.x[0] + (j + half) * grid.cell, grid.y[0] + (i + half) * grid.cell
            owner = next((r for r in rows if inside(x, y, r)), None)
            if owner:
                kind[i][j], size[i, j] = "foreground", grid.cell / math.sqrt(owner[3] * owner[4])
            elif false_positives and scores[i, j] > 0.1 and truth[i, j] < 0.1:
                kind[i][j] = "false_positive"
    return kind, size


def naive_position(ctx, name, student, teacher, released):
    """The four losses of a position, weight 1, sample by sample and cell by cell."""
    grid, out, count = ctx.grid_of(teacher), {}, len(teacher)
    for b in range(count):
        s, t = student[b].detach(), teacher[b].detach()
        maps = [
            (m.abs().mean(0) / 0.5).flatten().softmax(0).reshape(grid.shape) * grid.width * grid.height for m in (s, t)
        ]
        attention = (maps[0] + maps[1]) / 2
        channels = (t.abs().mean((1, 2)) / 0.5).softmax(0) * len(t)
        kind, size = naive_regions(ctx, b, grid, released, name == "H")
        number = {k: sum(row.count(k) for row in kind) for k in ("background", "false_positive")}
        for i in range(grid.height):
            for j in range(grid.width):
                k, d = kind[i][j], (s[:, i, j] - t[:, i, j]) ** 2
                scale = size[i, j]
                if k == "foreground" and released and number["background"]:
                    scale = max(scale, 1 / number["background"])
                if k != "foreground":
                    scale = 1 / number[k]
                if k == "false_positive" and released:
                    d = d * channels
                key = f"{k}_{name}"
                out[key] = out.get(key, 0) + d.sum() * scale * attention[i, j] / count
        means = [m.mean(0) if released else m.abs().mean(0) for m in (s, t)]
        if released:
            means[0] = ctx.modules[f"distillbev.spatial_{name}"](means[0][None, None])[0, 0].detach()
        out[f"spatial_{name}"] = out.get(f"spatial_{name}", 0) + (means[0] - means[1]).abs().sum() / count
    return out


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(0, 4), st.integers(0, 3)), st.sampled_from(GRIDS), st.booleans())
def test_terms_match_loops(seed, counts, grid, released):
    method = distillbev("released" if released else "intended")
    ctx, method = setting(seed, counts, grid, method)
    results = run_terms(method.reweight(dict.fromkeys(DIFFERENCES, 1.0)), ctx)
    for name in ("B1", "B2", "H"):
        student, teacher = ctx.pair(next(t for t in method.active if t.name == f"spatial_{name}"))
        for key, value in naive_position(ctx, name, student, teacher, released).items():
            torch.testing.assert_close(results[key].value, torch.as_tensor(value), rtol=1e-4, atol=1e-4)


def test_recipe():
    method = distillbev("released")
    weights = {t.name: t.weight for t in method.terms}
    assert weights == {
        **{f"foreground_{p}": 6e-3 for p in ("B1", "B2", "H")},
        **{f"background_{p}": 4e-2 for p in ("B1", "B2", "H")},
        **{f"spatial_{p}": 2.5e-3 for p in ("B1", "B2", "H")},
        "false_positive_H": 6e-2,
    }
    assert all(t.source for t in method.terms) and all(q.evidence for q in method.quirks)
    assert [s.module for s in method.start] == ["head.tasks"]
    with pytest.raises(ValueError, match="unknown position 'B4'; known: B0, B1, B2, H"):
        distillbev(positions=["B4"])


def test_adapters_are_shared_by_a_position():
    distiller = Distiller(distillbev("released"), FakeDetector(0), FakeDetector(1), grid=GRID)
    assert len(distiller.adapters) == 6
    assert not any(
        "spatial" in name for name in Distiller(distillbev(), FakeDetector(0), FakeDetector(1), grid=GRID).adapters
    )
    calls = []
    for name, module in distiller.adapters.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    distiller(features(0), batch_of(boxes(0)))
    assert sorted(calls) == sorted(distiller.adapters)


def test_any_depths_and_sizes_meet():
    deep = FakeChannels(stages=(4, 6, 8), neck=5, bev=4)
    grid = BEVGrid((-12.0, 12.0), (-12.0, 12.0), 0.75)  # 32 cells: three stages
    distiller = Distiller(distillbev(), FakeDetector(0), FakeDetector(1, deep), grid=grid)
    results = distiller(features(0, 2, grid), batch_of(boxes(0)), cooler(1, 2, grid, deep))
    assert results["foreground_B2"].grid.shape == (8, 8) and results["foreground_B1"].grid.shape == (16, 16)
    assert all(r.value.isfinite() for r in results.values())


def test_impossible_pairs_are_told_before_training():
    flat = FakeDetector(1, FakeChannels(stages=(4,)))
    with pytest.raises(
        ValueError, match=r"foreground_B1: teacher.stages\[-2\] is missing, the teacher has .*stages\[0\]"
    ):
        Distiller(distillbev(), FakeDetector(0), flat, grid=GRID)
    Distiller(distillbev(positions=["B2", "H"]), FakeDetector(0), flat, grid=GRID)
    with pytest.raises(ValueError, match=r"background_H: teacher\.predictions\.heatmap is missing"):
        Distiller(distillbev(), FakeDetector(0), FakeDetector(1, FakeChannels(heatmap=None)), grid=GRID)


def test_zero_where_student_is_teacher():
    ctx, method = setting(1, method=identity(distillbev()))
    ctx.teacher = replace(ctx.student, predictions=ctx.teacher.predictions)
    assert all(r.value == 0 for r in run_terms(method, ctx).values())
    ctx, method = setting(1, method=identity(distillbev().flip(["distillbev.spatial_conv"])))
    assert all(r.value > 0 for r in run_terms(method, ctx).values())


@pytest.mark.parametrize("variant", ["intended", "released"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0)])
def test_samples_without_ground_truth(variant, counts):
    ctx, method = setting(3, counts, method=distillbev(variant))
    results = run_terms(method, ctx)
    assert all(r.value.isfinite() for r in results.values())
    for b, count in enumerate(counts):
        for name, result in results.items():
            assert bool(result.map()[b].any()) == (name not in MASKED or count > 0)
    gradients = torch.autograd.grad(total(results), [ctx.student.neck, *ctx.student.stages])
    assert all(g.isfinite().all() for g in gradients)


def test_teachers_without_doubt_or_with_nothing_but():
    ctx, method = setting(4)
    for shift, share in ((-50, 0.0), (50, 1.0)):
        task = ctx.teacher.predictions.tasks[0]
        heat = replace(task, heatmap=task.heatmap.detach() * 0 + shift)
        teacher = replace(ctx.teacher, predictions=Predictions((heat,)))
        fresh = Context(ctx.student, teacher, ctx.boxes, GRID, adapters=ctx.adapters, modules=ctx.modules)
        results = run_terms(method, fresh)
        found = regions(fresh, next(t for t in method.terms if t.name == "false_positive_H"))
        assert bool(results["false_positive_H"].value > 0) == (share > 0)
        assert all(r.value.isfinite() for r in results.values())
        assert found.background.any() == (share == 0 or not found.false_positive.all())


@pytest.mark.parametrize("variant", ["intended", "released"])
def test_value_is_map_and_what_is_off_it(variant):
    ctx, method = setting(5, (4, 0), method=distillbev(variant))
    for result in run_terms(method, ctx).values():
        torch.testing.assert_close(result.map().sum() + result.off_map, result.value, rtol=1e-4, atol=1e-5)


CHANGES = {
    "distillbev.corner_points": {t for t in DIFFERENCES if not t.startswith("spatial")},
    "distillbev.channel_attention": {"false_positive_H"},
    "distillbev.signed_means": {"spatial_B1", "spatial_B2", "spatial_H"},
    "distillbev.spatial_conv": {"spatial_B1", "spatial_B2", "spatial_H"},
    "distillbev.combined_scale": {"foreground_H"},
    "distillbev.centre_in_range": {t for t in DIFFERENCES if not t.startswith("spatial")},
}


@pytest.mark.parametrize("quirk", CHANGES)
def test_a_quirk_changes_what_it_should(quirk):
    found = boxes(6, (3, 1))
    values = found.values
    values[0, 0, :7] = torch.tensor([-12.4, 3.1, 0, 5, 3, 1, 0.3])  # centre just outside
    values[1, 0, :7] = torch.tensor([4.0, 2.0, 0, 7, 5, 1, 0.3])
    made, _ = setting(6, (3, 1), method=distillbev("released"), found=found)
    if quirk == "distillbev.combined_scale":  # the teacher fires all over: no background but a ring at each centre
        with torch.no_grad():
            made.teacher.predictions.tasks[0].heatmap.add_(50)
    runs = []
    for method in (distillbev(), distillbev().flip([quirk])):
        ctx = replace(made, on=method.on, _made={})
        runs.append({n: r.value.item() for n, r in run_terms(method, ctx).items()})
    assert {n for n in DIFFERENCES if runs[0][n] != runs[1][n]} == CHANGES[quirk]
    assert {q.name for q in QUIRKS} == set(CHANGES)


def test_masks_turn_with_the_boxes():
    found = boxes(7, (6, 3))
    term = next(t for t in distillbev(false_positives=()).terms if t.name == "foreground_H")
    before, after = (
        regions(
            Context(features(0, 2, SQUARE), features(1, 2, SQUARE), Boxes3D.make(v, found.labels, found.valid), SQUARE),
            term,
        )
        for v in (found.values.double(), transform_boxes(yaw_pose(math.pi / 2), found.values.double()))
    )
    assert before.foreground.any()
    assert (after.foreground == before.foreground.rot90(1, (2, 1))).all()
    torch.testing.assert_close(after.size, before.size.rot90(1, (2, 1)))


def test_a_batch_is_the_mean_of_its_samples():
    """So losses averaged over processes are those of one process: nothing is normalised across samples."""
    method = identity(distillbev())
    ctx, method = setting(8, (4, 2), method=method)
    both = {n: r.value for n, r in run_terms(method, ctx).items()}
    alone = []
    for b in (slice(0, 1), slice(1, 2)):
        one = [sliced(f, b) for f in (ctx.student, ctx.teacher)]
        part = Context(*one, ctx.boxes[b], GRID, adapters=ctx.adapters, modules=ctx.modules)
        alone.append(run_terms(method, part))
    for name, value in both.items():
        torch.testing.assert_close((alone[0][name].value + alone[1][name].value) / 2, value)


def test_attention_and_teacher_carry_no_gradient():
    distiller = Distiller(distillbev("released"), FakeDetector(0), FakeDetector(1), grid=GRID)
    student, batch = features(0), batch_of(boxes(0))
    total(distiller(student, batch)).backward()
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert all(p.grad is not None for p in distiller.parameters())
    ctx = distiller.context(features(0), batch)
    assert not attention(ctx, distiller.method.terms[0]).requires_grad
    assert not any(v.requires_grad for v in (ctx.tensor("teacher.neck"), ctx.tensor("teacher.stages[-1]")))


def test_float32_under_autocast():
    distiller = Distiller(distillbev(), FakeDetector(0), FakeDetector(1), grid=GRID).eval()
    student, batch = features(0), batch_of(boxes(0))
    plain = distiller(student, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = distiller(student, batch)
    for name, result in plain.items():
        assert mixed[name].value.dtype == torch.float32
        torch.testing.assert_close(mixed[name].value, result.value, rtol=2e-2, atol=1e-4)  # adapters run in bfloat16


def test_modules_that_a_term_calls_stay_in_float32_under_autocast():
    method = distillbev().flip(["distillbev.spatial_conv"])
    distiller = Distiller(method, FakeDetector(0), FakeDetector(1), grid=GRID).eval()
    seen = {}
    for name in ("distillbev/H", "distillbev/spatial_H"):
        distiller.adapters[name].register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        distiller(features(0), batch_of(boxes(0)))
    assert seen == {"distillbev/H": torch.bfloat16, "distillbev/spatial_H": torch.float32}


def test_heads_start_from_the_teachers(tmp_path):
    configs = [mini_config(tmp_path, m).detector for m in ("camera", "lidar")]
    student, teacher = (Detector(c, load_pretrained=False) for c in configs)
    method = build_method(DistillConfig(method="distillbev"), "camera", "lidar")
    assert copy_start(method, student, teacher) == ["head.tasks"]
    for ours, theirs in zip(student.head.tasks.parameters(), teacher.head.tasks.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    wide = Detector(replace(configs[1], head=HeadConfig(channels=8, branch=32)), load_pretrained=False)
    with pytest.raises(ValueError, match=r"head.tasks cannot be copied from the teacher: 0.boxes.weight is \(10, 32"):
        copy_start(method, student, wide)
    assert copy_start(distillbev(inherit_head=False), student, wide) == []
    other = Detector(replace(configs[1], bev=BEVConfig(8, (8, 12, 16), (1, 1, 1), 24)), load_pretrained=False)
    Distiller(method, student, other, grid=student.grid)  # other widths and depths of the encoder are no matter


def test_modalities():
    for teacher in ("lidar", "fusion"):
        assert build_method(DistillConfig(method="distillbev"), "camera", teacher).name == "distillbev"
    for student, teacher in (("lidar", "camera"), ("camera", "camera"), ("fusion", "lidar")):
        method = build_method(DistillConfig(method="distillbev"), student, teacher)
        said = f"; a weight for fusion/lidar to camera, not for {teacher} to {student}"
        assert all(term.source.endswith(said) for term in method.terms)


def built(**options):
    return build_method(DistillConfig("distillbev", options=options), "camera", "lidar")


def test_options_are_arguments():
    assert built().terms == distillbev().terms
    given, same = built(positions="H", false_positives="none", inherit_head="off"), {"false_positives": ()}
    assert given.terms == distillbev(positions=("H",), **same).terms and given.start == ()
    with pytest.raises(ValueError, match="option attention: 'student' is not one of both, teacher, none"):
        built(attention="student")
    with pytest.raises(ValueError, match="option positions: 'B9' is not one of B0, B1, B2, H, several of them with co"):
        built(positions="B1,B9")
    with pytest.raises(ValueError, match="unknown option 'levels'; known: positions, false_positives"):
        built(levels="0")
    alone = {"foreground_B1", "background_B1", "spatial_B1"}
    assert {t.name for t in built(positions="B1").terms} == alone  # the default's H is not compared
    assert {t.name for t in built(positions="B1", false_positives="B1").terms} == alone | {"false_positive_B1"}
    for wrong in ("B2", "B1,H"):
        with pytest.raises(ValueError, match=f"false_positives {wrong} are not all among the positions that are compa"):
            built(positions="B1", false_positives=wrong)
    with pytest.raises(ValueError, match="regions whole tells no false positives apart"):
        built(regions="whole", false_positives="H")
    assert built(regions="whole", scaling="off", attention="none", false_positives="none").terms


def test_without_scaling_the_foreground_keeps_its_total_but_not_its_shares():
    (ctx, method), (_, flat) = setting(3, (4, 0)), setting(3, (4, 0), method=built(scaling="off"))
    term, other = (next(t for t in m.terms if t.name == "foreground_H") for m in (method, flat))
    found = regions(ctx, term)
    ours, theirs = found.weight("foreground"), found.weight("foreground", adaptive=False)
    torch.testing.assert_close(ours.sum((1, 2)), theirs.sum((1, 2)))
    assert len(theirs[0].unique()) == 2 and len(ours[0].unique()) > 2 and not theirs[1].any()
    assert other.options["scaling"] is False
    assert run_terms(flat, ctx)["foreground_H"].value != run_terms(method, ctx)["foreground_H"].value


def test_without_regions_all_cells_are_background_and_without_attention_alike():
    ctx, method = setting(4, method=built(regions="whole", attention="none", positions="H"))
    assert [t.name for t in method.terms] == ["background_H", "spatial_H"]
    result = run_terms(method, ctx)["background_H"]
    student, teacher = ctx.pair(method.active[0])
    mean = (student - teacher).square().sum(1).mean()  # over cells and samples
    torch.testing.assert_close(result.value, method.terms[0].weight * mean)


def test_adds_up_with_another_method():
    from kdlab.distill.unidistill import unidistill

    both = distillbev() + unidistill("L2C")
    assert both.teacher == {"lidar"} and len(both.terms) == 14
    assert both.start == distillbev().start
    changed = tuple(replace(a, what="other") for a in distillbev().adapters)
    with pytest.raises(ValueError, match="they differ"):
        distillbev() + replace(distillbev(), adapters=changed)
