import math

import pytest
import torch
from distill_fakes import GRID, SQUARE, boxes, features
from hypothesis import given, settings
from hypothesis import strategies as st
from test_regions import naive_mask

from kdlab.distill import Context, run_terms
from kdlab.distill.unidistill import PATHS, by_modality, unidistill
from kdlab.geometry import BEVGrid
from kdlab.sample import Boxes3D

TERMS = ("feature", "relation", "response_class", "response_regression")
GRIDS = (GRID, SQUARE, BEVGrid((-6.0, 12.0), (-9.0, 9.0), 0.9), BEVGrid((-6.0, 3.0), (-9.0, 9.0), 0.75))


def context(seed, counts=(4, 2), grid=GRID, on=frozenset()):
    return Context(
        features(seed, len(counts), grid), features(seed + 1, len(counts), grid), boxes(seed, counts), grid, on=on
    )


def values(method, ctx):
    results = run_terms(method.reweight(dict.fromkeys(TERMS, 1.0)), ctx)
    return {name: r.value for name, r in results.items()}


def nine(box, grid):
    """The nine points in cells (u, v), by hand."""
    x, y, _, length, width, _, yaw = box[:7]
    corners = []
    for a, b in ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5)):
        px, py = a * length, b * width
        qx = px * math.cos(yaw) - py * math.sin(yaw) + x
        qy = px * math.sin(yaw) + py * math.cos(yaw) + y
        corners.append(((qx - grid.x[0]) / grid.cell, (qy - grid.y[0]) / grid.cell))
    mid = [
        tuple((p + q) / 2 for p, q in zip(corners[i], corners[j], strict=True))
        for i, j in ((0, 1), (1, 2), (2, 3), (0, 3))
    ]
    centre = tuple(sum(c) / 4 for c in zip(*corners, strict=True))
    return [*corners, centre, *mid]


def bilinear(image, gx, gy):
    """grid_sample's rule for one point of [C, H, W]: g = -1 and 1 are the outer edges, zeros outside."""
    _, height, width = image.shape
    px, py = ((gx + 1) * width - 1) / 2, ((gy + 1) * height - 1) / 2
    out = torch.zeros(image.shape[0])
    for i in (math.floor(py), math.floor(py) + 1):
        for j in (math.floor(px), math.floor(px) + 1):
            if 0 <= i < height and 0 <= j < width:
                out = out + image[:, i, j] * (1 - abs(px - j)) * (1 - abs(py - i))
    return out


def naive(ctx, released):
    """The four losses by loops over samples, boxes, points; clamp and temperature as in L2C."""
    student, teacher, grid = ctx.student, ctx.teacher, ctx.grid
    height, width = grid.shape
    rows = ctx.boxes.values.nan_to_num()
    fea = rel = torch.zeros(())
    n = 0
    for b in range(len(rows)):
        last = max((m for m in range(rows.shape[1]) if float(rows[b, m].sum()) != 0), default=0)
        for m in range(rows.shape[1]):
            counts = m <= last if released else bool(ctx.boxes.valid[b, m])
            if not counts:
                continue
            n += 1
            read = {}
            for key, image in (("sl", student.bev), ("tl", teacher.bev), ("sh", student.neck), ("th", teacher.neck)):
                vectors = []
                for u, v in nine(rows[b, m].tolist(), grid):
                    g = (u / (width / 2) - 1, v / (height / 2) - 1)
                    g = (g[1], g[0]) if released else g
                    vectors.append(bilinear(image[b].detach(), *g))
                read[key] = torch.stack(vectors)
            fea = fea + (read["sl"] - read["tl"]).abs().sum() / (9 * read["sl"].shape[1])
            unit = {k: q / (q.norm(dim=1, keepdim=True) + 1e-4) for k, q in read.items()}
            rel = rel + (unit["sh"] @ unit["sh"].T - unit["th"] @ unit["th"].T).abs().sum() / 81
    drawn = torch.ones_like(ctx.boxes.valid) if released else ctx.boxes.valid
    mask = naive_mask(rows, drawn, grid, 0.7, 0, truncate=released)
    ps = student.predictions.heatmap.sigmoid().clamp(1e-4, 1 - 1e-4)
    pt = (teacher.predictions.heatmap / (2 if released else 1)).sigmoid().clamp(1e-4, 1 - 1e-4)
    cls = (mask * (ps.amax(1) - pt.amax(1)).abs()).sum() / (mask.sum() + 1e-4)
    difference = (student.predictions.regression - teacher.predictions.regression).abs().mean(1)
    reg = (mask * difference).sum() / (mask.sum() + 1e-4)
    return dict(zip(TERMS, (fea / (n + 1e-4), rel / (n + 1e-4), cls, reg), strict=True))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(GRIDS), st.booleans())
def test_terms_match_loops(seed, counts, grid, released):
    ctx = context(seed, counts, grid)
    method = unidistill("L2C", "released" if released else "intended")
    ctx.on = method.on
    ours, theirs = values(method, ctx), naive(ctx, released)
    for name in TERMS:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("path", PATHS)
def test_weights_and_modalities_of_paths(path):
    method = unidistill(path)
    expected = {"L2C": (100, 40, 10, 10), "C2L": (10, 5, 1, 1), "F2C": (10, 5, 10, 10), "F2L": (10, 1, 10, 10)}[path]
    assert tuple(t.weight for t in method.terms) == expected
    letters = {"L": "lidar", "C": "camera", "F": "fusion"}
    assert (method.teacher, method.student) == ({letters[path[0]]}, {letters[path[2]]})
    assert bool(method.adapters) == (path == "C2L")
    assert all(t.source for t in method.terms) and all(q.evidence for q in method.quirks)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(GRIDS))
def test_zero_where_student_is_teacher(seed, grid):
    ctx = context(seed, (3, 2), grid)
    ctx.teacher = ctx.student
    for value in values(unidistill("L2C"), ctx).values():
        assert value == 0


def test_released_is_not_zero_where_student_is_teacher():
    method = unidistill("L2C", "released")
    ctx = context(0, on=method.on)
    ctx.teacher = ctx.student
    assert values(method, ctx)["response_class"] > 0


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0)])
def test_samples_without_ground_truth(counts):
    ctx = context(1, counts)
    results = run_terms(unidistill("L2C"), ctx)
    total = sum(r.value for r in results.values())
    assert total.isfinite()
    gradients = torch.autograd.grad(total, [ctx.student.bev, ctx.student.neck], materialize_grads=True)
    for b, count in enumerate(counts):
        for gradient in gradients:
            assert gradient.isfinite().all() and bool((gradient[b] != 0).any()) == (count > 0)
        for result in results.values():
            assert bool((result.map()[b] != 0).any()) == (count > 0)


def test_padding_changes_nothing_as_intended():
    ctx = context(2, (3, 3))
    padded = boxes(2, (3, 3))
    more = Boxes3D.pad([padded[0], padded[1], boxes(9, (6,))[0]])[:2]
    other = Context(ctx.student, ctx.teacher, more, GRID)
    assert more.values.shape[1] == 6
    for a, b in zip(values(unidistill(), ctx).values(), values(unidistill(), other).values(), strict=True):
        torch.testing.assert_close(a, b)


CHANGES = {
    "unidistill.transpose_points": {"feature", "relation"},
    "unidistill.teacher_temperature": {"response_class"},
    "unidistill.count_first_row": {"feature", "relation"},
    "unidistill.pad_lights_ego": {"response_class", "response_regression"},
    "unidistill.truncate_centre": {"response_class", "response_regression"},
    "unidistill.teacher_train_mode": set(),
    "unidistill.wide_teacher_clamp": {"response_class"},
}


@pytest.mark.parametrize("quirk", CHANGES)
def test_a_quirk_changes_what_it_should(quirk):
    ctx = context(3, (3, 0), SQUARE)
    ctx.boxes.values[0, 0, :2] = torch.tensor([-12.2, 3.1])  # just outside
    with torch.no_grad():
        ctx.teacher.predictions.tasks[0].heatmap.mul_(20)  # reach the clamps
    before = values(unidistill("F2C"), ctx)
    method = unidistill("F2C").flip([quirk])
    after = values(method, Context(ctx.student, ctx.teacher, ctx.boxes, SQUARE, on=method.on))
    assert {name for name in TERMS if before[name] != after[name]} == CHANGES[quirk]


def test_released_reads_the_mirror_image():
    maps = torch.zeros(1, 4, 40, 40)
    maps[0, :, 31, 12] = 1  # row, column
    ctx = Context(features(0, 1, SQUARE), features(1, 1, SQUARE), boxes(0, (1,)), SQUARE)
    ctx.boxes.values[0, 0, :7] = torch.tensor([6.9, -4.5, 0, 0.01, 0.01, 1, 0])  # column 31.5, row 12.5
    ctx.student.bev, ctx.teacher.bev = maps, torch.zeros_like(maps)
    assert values(unidistill(), ctx)["feature"] == 0
    ctx = Context(ctx.student, ctx.teacher, ctx.boxes, SQUARE, on=unidistill("L2C", "released").on)
    found = run_terms(unidistill("L2C", "released").only(["feature"]), ctx)["feature"]
    assert found.value > 90
    assert found.map()[0].argmax() == 31 * 40 + 12


@pytest.mark.parametrize("variant", ["intended", "released"])
def test_value_is_map_and_what_is_off_it(variant):
    method = unidistill("L2C", variant)
    for result in run_terms(method, context(4, (4, 0), on=method.on)).values():
        torch.testing.assert_close(result.map().sum() + result.off_map, result.value, rtol=1e-4, atol=1e-4)


def test_pairs_beside_the_papers_paths_take_the_nearest_ones_weights():
    for student, teacher, path in (
        ("camera", "camera", "F2C"),
        ("fusion", "camera", "C2L"),
        ("lidar", "lidar", "F2L"),
        ("fusion", "lidar", "F2L"),
        ("fusion", "fusion", "F2L"),
    ):
        method = by_modality(student, teacher)
        assert [t.weight for t in method.terms] == [t.weight for t in unidistill(path).terms]
        assert bool(method.adapters) == (path == "C2L") and (method.student, method.teacher) == ({student}, {teacher})
        said = f"; a weight for {PATHS[path].teacher} to {PATHS[path].student}, not for {teacher} to {student}"
        assert all(f"weight {path}:" in t.source and t.source.endswith(said) for t in method.terms)
    method = by_modality("camera", "camera", path="L2C", adapt="on")
    assert method.terms[0].weight == 100 and method.terms[0].adapter == "unidistill.low"
    assert by_modality("camera", "lidar") == unidistill("L2C")


def test_unknown_path():
    with pytest.raises(ValueError, match="known: L2C, C2L, F2C, F2L"):
        unidistill("L2F")
