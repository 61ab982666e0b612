"""What holds for every term of every method, whatever the paper."""

import math
from dataclasses import replace

import pytest
import torch
from all_methods import (
    CASES,
    MASKED,
    NAMES,
    RECT,
    SQUARE,
    changed,
    distiller_of,
    found_by,
    identity,
    leaves,
    maps,
    method_of,
    some_boxes,
    unit,
)
from distill_fakes import batch_of

from kdlab.distill import TermResult, run_terms, total
from kdlab.distill.labeldistill import foreground, truth
from kdlab.distill.unidistill import response_mask
from kdlab.geometry import transform_boxes, yaw_pose
from kdlab.sample import Boxes3D

every = pytest.mark.parametrize(("name", "variant"), CASES, ids=lambda v: v.replace(" ", "-"))
intended = pytest.mark.parametrize("name", NAMES, ids=lambda v: v.replace(" ", "-"))


def gradients(result: TermResult, student) -> list[torch.Tensor]:
    return torch.autograd.grad(result.value, leaves(student), retain_graph=True, materialize_grads=True)


def test_every_method_is_covered():
    from kdlab.distill import METHODS

    assert {name.split()[0] for name in NAMES} == set(METHODS)
    for name, variant in CASES:
        assert MASKED[name, variant] <= {t.name for t in method_of(name).terms}


@every
@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (0, 2)], ids=str)
def test_samples_without_boxes_add_nothing_to_masked_terms(name, variant, counts):
    results, student = found_by(method_of(name, variant), some_boxes(1, counts))
    for term, result in results.items():
        found = gradients(result, student)
        assert result.value.isfinite() and result.errors.isfinite().all(), term
        assert all(g.isfinite().all() for g in found), term
        if term in MASKED[name, variant]:
            for b, count in enumerate(counts):
                assert count or not any(g[b].any() for g in found), term
                assert count or not result.map()[b].any(), term
            assert bool(result.value == 0) == (sum(counts) == 0), term
        elif sum(counts) or not name.startswith("unidistill"):  # without one padding row there is nothing to read
            assert all(result.map()[b].any() for b in range(2)) and result.value > 0, term


HARD = {
    "over a border": [(11.9, 0, 4, 2, 0.4), (-12.8, 3, 4, 2, 0), (0, 9.4, 1, 3, 0), (-12, -9, 6, 6, 0.7)],
    "on cells' borders": [(0, 0, 3, 3, 0), (-12, 0, 1.5, 1.5, 0), (12, 0, 3, 1.5, 0), (1.5, 3, 1.5, 3, math.pi / 2)],
    "smaller than a cell": [(0.4, 0.4, 0.01, 0.01, 0), (0.75, 0.75, 0.05, 2, 1), (-11.99, -8.99, 0.02, 0.02, 0)],
    "larger than the map": [(0.2, 0.1, 60, 50, 0.3), (-5, 2, 200, 1, 1.2)],
    "without a side": [(2, 2, 0, 2, 0.2), (-3, 1, 2, 0, 0), (4, -4, 0, 0, 0)],
    "one place": [(3.3, 2.1, 4, 2, 0.4)] * 3,
    "far away": [(40, 0, 4, 2, 0.1), (-500, 900, 4, 2, 0), (0, 0, 4, 2, 0)],
}


@every
@pytest.mark.parametrize("kind", HARD)
def test_hard_boxes_give_finite_terms(name, variant, kind):
    rows = [[x, y, 0.5, length, width, 1.6, yaw, math.nan, math.nan] for x, y, length, width, yaw in HARD[kind]]
    one = Boxes3D.make(torch.tensor(rows), torch.arange(len(rows)) % 10)
    results, student = found_by(method_of(name, variant), Boxes3D.pad([one, Boxes3D.empty(), one[:1]]))
    for term, result in results.items():
        assert result.value.isfinite() and result.map().isfinite().all() and result.value >= 0, term
        assert all(g.isfinite().all() for g in gradients(result, student)), term
        torch.testing.assert_close(result.map().sum() + result.off_map, result.value, rtol=1e-4, atol=1e-5)


NO_DIFFERENCE = {"response_heatmap"}
"""LabelDistill's: a focal loss towards scores."""
RELEASED_NOT_ZERO = {"response_class"}
"""UniDistill's temperature is the teacher's alone."""


@every
def test_zero_where_student_is_teacher(name, variant):
    method, student = unit(identity(method_of(name, variant))), maps(4, 2, RECT)
    copies = {side: changed(student, lambda t: t.detach().clone()) for side in ("teacher", "labels")}
    if name == "labeldistill":  # the student's maps are as wide as both sources' together
        for term in method.active[:4]:
            level, seen = int(term.name[-1]), (student.camera_bev_aligned.flatten(1, 2), student.stages[1])
            part = term.channels.take(seen[level], (2, 1)[level])
            side = term.teacher.split(".")[0]
            stages = list(copies[side].stages)
            stages[level] = part.detach()
            copies[side] = replace(copies[side], stages=tuple(stages))
    results = distiller_of(method, *copies.values(), RECT)(student, batch_of(some_boxes(5, (4, 2))))
    for term, result in results.items():
        if term in NO_DIFFERENCE | (RELEASED_NOT_ZERO if variant == "released" else set()):
            assert result.value > 0, term
        else:
            assert result.value == 0 and not result.map().any(), term
            assert not any(g.any() for g in gradients(result, student)), term


@every
def test_no_gradient_reaches_the_teacher(name, variant):
    method = method_of(name, variant)
    student, teacher, labels = (maps(i, 2, RECT) for i in range(3))
    distiller = distiller_of(method, teacher, labels, RECT)
    results = distiller(student, batch_of(some_boxes(6, (3, 2))))
    total(results).backward()
    learns = {n for n, p in distiller.teacher.named_parameters() if p.grad is not None}
    assert learns == ({"fuser.weight"} if (name, variant) == ("simdistill", "released") else set())
    assert all(p.grad is None for p in distiller.labels.parameters())
    assert all(p.grad is not None for p in distiller.parameters())
    assert any(leaf.grad is not None and leaf.grad.any() for leaf in leaves(student))
    held = {n for n, _ in distiller.named_parameters()} | set(distiller.state_dict())
    assert not any("scale" in n for n in held) and any("fuser" in n for n in held) == bool(learns)
    stored = distiller_of(method.variant("intended"), teacher, labels, RECT)
    given = [changed(side, lambda t: t.detach().requires_grad_()) for side in (teacher, labels)]
    total(stored(student, batch_of(some_boxes(6, (3, 2))), *given)).backward()  # not through stored features either
    assert all(leaf.grad is None for side in given for leaf in leaves(side))


def turned(features):
    """A quarter turn, counter-clockwise in the plane: rows grow with y."""
    return changed(features, lambda t: t.detach().rot90(1, (-1, -2)).requires_grad_() if t.ndim > 2 else t)


@intended
@pytest.mark.parametrize("seed", range(3))
def test_everything_turns_with_boxes_and_maps(name, seed):
    """Regions, masks and losses of a scene that is turned by a quarter, boxes and maps together."""
    method, found = unit(identity(method_of(name))), some_boxes(seed, (6, 3), SQUARE)
    if name == "labeldistill":  # equally wide without adapters
        method = replace(method, terms=tuple(replace(t, channels=None) for t in method.terms if t.name[-2:] != "_0"))
    sides = [maps(seed + i, 2, SQUARE) for i in range(3)]
    values = transform_boxes(yaw_pose(math.pi / 2), found.values.nan_to_num())
    runs = []
    for boxes, (student, teacher, labels) in (
        (Boxes3D.make(found.values.nan_to_num(), found.labels, found.valid), sides),
        (Boxes3D.make(values, found.labels, found.valid), [turned(s) for s in sides]),
    ):
        runs.append(distiller_of(method, teacher, labels, SQUARE)(student, batch_of(boxes)))
    for term, before in runs[0].items():
        after = runs[1][term]
        assert before.value > 0, term
        torch.testing.assert_close(after.value, before.value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after.map(), before.map().rot90(1, (2, 1)), rtol=1e-3, atol=1e-6)


@every
@pytest.mark.parametrize("seed", range(2))
def test_everything_mirrors_at_the_diagonal(name, variant, seed):
    """x and y exchanged, rows and columns too: corners, rounding and exchange of the released codes keep this."""
    method, found = unit(identity(method_of(name, variant))), some_boxes(seed + 20, (6, 3), SQUARE)
    if name == "labeldistill":
        method = replace(method, terms=tuple(replace(t, channels=None) for t in method.terms if t.name[-2:] != "_0"))
        method = replace(method, quirks=tuple(replace(q, change=None) for q in method.quirks))
    sides, runs = [maps(seed + i, 2, SQUARE) for i in range(3)], []
    values = found.values.nan_to_num()
    other = torch.cat((values[..., [1, 0, 2, 3, 4, 5]], math.pi / 2 - values[..., 6:7], values[..., [8, 7]]), -1)
    for boxes, change in ((values, lambda t: t), (torch.where(found.valid[..., None], other, 0), mirrored)):
        student, teacher, labels = (changed(s, change) for s in sides)
        batch = batch_of(Boxes3D.make(boxes, found.labels, found.valid))
        runs.append(distiller_of(method, teacher, labels, SQUARE)(student, batch))
    for term, before in runs[0].items():
        torch.testing.assert_close(runs[1][term].value, before.value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(runs[1][term].map(), before.map().mT, rtol=1e-3, atol=1e-6)


def mirrored(tensor):
    return tensor.detach().mT.contiguous().requires_grad_() if tensor.ndim > 2 else tensor


@every
def test_samples_of_a_batch_may_change_places(name, variant):
    boxes, order = some_boxes(12, (4, 0, 2)), torch.tensor([2, 0, 1])
    sides, runs = [maps(30 + i, 3, RECT) for i in range(3)], []
    method = unit(method_of(name, variant))
    for rows in (torch.arange(3), order):
        student, teacher, labels = (changed(s, lambda t, rows=rows: t[rows]) for s in sides)
        runs.append(distiller_of(method, teacher, labels, RECT)(student, batch_of(boxes[rows])))
    for term, before in runs[0].items():
        torch.testing.assert_close(runs[1][term].value, before.value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(runs[1][term].map(), before.map()[order], rtol=1e-4, atol=1e-6)


def parts_of(name, term, result, context):
    """Sums that a batch adds up, and what it divides them by, as the specification says."""
    value, cars = result.value, context.boxes.valid.sum()
    if name.startswith("unidistill"):
        mask = response_mask(context, method_of(name).terms[2], context.student.predictions.heatmap)
        count = mask.sum() if term.startswith("response") else cars
        return [(value * (count + 1e-4), count, 1e-4)]
    if term == "response_heatmap":  # tasks without a centre divide by 1
        first = result.errors[:, 0].sum()
        return [(first * cars.clamp(min=1), cars, 0), (value - first, torch.tensor(0), 1)]
    if name == "labeldistill":
        size = context.student.stages[int(term[-1])].shape[-2:] if term != "response_box" else None
        mask = foreground(truth(context), size, term.startswith("label")) if size else cars
        return [(value * mask.sum().clamp(min=1), mask.sum(), 0)]
    return [(value, torch.tensor(1), 0)]  # a mean over samples


@intended
def test_a_batch_adds_up_as_the_specification_says(name):
    """UniDistill over all boxes, or all of the mask; LabelDistill too; the others take the mean of their samples."""
    boxes = some_boxes(13, (4, 1), label=0, apart=True)
    sides, method = [maps(40 + i, 2, RECT) for i in range(3)], unit(method_of(name))
    sums: dict[str, list] = {}
    for rows in (torch.tensor([0]), torch.tensor([1])):
        student, teacher, labels = (changed(s, lambda t, rows=rows: t[rows]) for s in sides)
        distiller = distiller_of(method, teacher, labels, RECT).eval()
        context = distiller.context(student, batch_of(boxes[rows]))
        for term, result in run_terms(method, context).items():
            sums.setdefault(term, []).append(parts_of(name, term, result, context))
    results = distiller_of(method, *sides[1:], RECT).eval()(sides[0], batch_of(boxes))
    for term, (first, second) in sums.items():
        expected = sum(
            (a + b) / (m + n + eps if m + n + eps > 1 else 1)
            for (a, m, eps), (b, n, _) in zip(first, second, strict=True)
        )
        assert name in ("distillbev", "simdistill") or first[0][1] > second[0][1], term
        torch.testing.assert_close(results[term].value, expected.to(results[term].value), rtol=1e-4, atol=1e-6)


@every
def test_float32_under_autocast_whatever_the_features_type(name, variant):
    method, boxes = method_of(name, variant), some_boxes(7, (3, 1))
    boxes = Boxes3D.make(boxes.values.float(), boxes.labels, boxes.valid)
    student, teacher, labels = (changed(maps(i, 2, RECT), lambda t: t.detach().bfloat16()) for i in range(3))
    distiller = distiller_of(method, changed(teacher, torch.Tensor.float), changed(labels, torch.Tensor.float), RECT)
    distiller.eval()
    plain = distiller(changed(student, torch.Tensor.float), batch_of(boxes))
    distiller.teacher.found = teacher
    with torch.autocast("cpu", torch.bfloat16):
        mixed = distiller(student, batch_of(boxes))
    for term, result in plain.items():
        assert mixed[term].value.dtype == mixed[term].errors.dtype == mixed[term].map().dtype == torch.float32, term
        torch.testing.assert_close(mixed[term].value, result.value, rtol=1e-3, atol=1e-4)


@every
def test_weights_and_scales_multiply(name, variant):
    method, boxes = method_of(name, variant), some_boxes(8, (3, 1))
    student, teacher, labels = (maps(i, 2, RECT) for i in range(3))
    weights = {t.name: 0.3 * (k + 1) for k, t in enumerate(method.terms)}
    runs = []
    for found in (unit(method), method.reweight(weights).scaled(0.25)):
        distiller = distiller_of(found, teacher, labels, RECT).eval()
        runs.append(distiller(student, batch_of(boxes)))
    for term, one in runs[0].items():
        part, factor = runs[1][term], weights[term] * 0.25
        torch.testing.assert_close(part.value, one.value * factor)
        torch.testing.assert_close(part.map(), one.map() * factor)
        torch.testing.assert_close(part.off_map, one.off_map * factor)
        ours, theirs = gradients(part, student), gradients(one, student)
        assert all(torch.allclose(a, b * factor, rtol=1e-4, atol=1e-7) for a, b in zip(ours, theirs, strict=True))


@every
def test_the_order_of_boxes_does_not_matter(name, variant):
    """Only where two footprints overlap does DistillBEV say whose a cell is: the first one's."""
    boxes = some_boxes(9, (6, 5), apart=name == "distillbev")
    order = torch.tensor([[3, 0, 5, 1, 4, 2], [4, 2, 0, 3, 1, 5]])  # the last row of the second sample is padding
    other = Boxes3D.make(
        boxes.values.gather(1, order[..., None].expand_as(boxes.values)), boxes.labels.gather(1, order), boxes.valid
    )
    before, after = (found_by(method_of(name, variant), b)[0] for b in (boxes, other))
    for term, result in before.items():
        torch.testing.assert_close(after[term].value, result.value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after[term].map(), result.map(), rtol=1e-4, atol=1e-6)


def test_the_first_of_two_overlapping_boxes_owns_a_cell():
    large, small = [0.1, 0.1, 0, 9, 6, 2, 0.2, 0, 0], [0.4, 0.3, 0, 4, 3, 2, 0.9, 0, 0]
    first, second = (Boxes3D.pad([Boxes3D.make(torch.tensor(rows), torch.tensor([0, 0]))])
                     for rows in ([large, small], [small, large]))  # fmt: skip
    before, after = (found_by(method_of("distillbev"), b)[0] for b in (first, second))
    for term, result in before.items():
        assert (after[term].value > 1.01 * result.value) == term.startswith("foreground"), term
        if not term.startswith("foreground"):
            torch.testing.assert_close(after[term].value, result.value)


@intended
def test_padding_changes_nothing(name):
    boxes = some_boxes(10, (3, 2))
    more = Boxes3D.pad([boxes[0], boxes[1], some_boxes(11, (7,))[0]])[:2]
    assert more.values.shape[1] == 7
    before, after = (found_by(method_of(name), b)[0] for b in (boxes, more))
    for term, result in before.items():
        torch.testing.assert_close(after[term].value, result.value, msg=term)
