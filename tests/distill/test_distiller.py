from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from distill_fakes import GRID, FakeChannels, FakeDetector, batch_of, boxes, features
from torch import Tensor, nn

from kdlab.distill import (
    Adapter,
    Cells,
    Context,
    Distiller,
    Method,
    Nowhere,
    Part,
    Quirk,
    Slots,
    Start,
    TeacherMode,
    Term,
    TermResult,
    copy_start,
    total,
)
from kdlab.distill.method import ALL
from kdlab.distill.unidistill import unidistill
from kdlab.geometry import BEVGrid
from kdlab.sample import Boxes3D


def distiller(method=None, teacher=None, student=None, labels=None):
    method = unidistill() if method is None else method
    return Distiller(method, student or FakeDetector(1), teacher or FakeDetector(2), labels, grid=GRID)


def squared(context: Context, term: Term) -> TermResult:
    student, teacher = context.pair(term)
    return TermResult.of((student - teacher).square().mean(1), Cells(), context.grid_of(student))


def method_of(*terms: Term, **more) -> Method:
    return Method("test", ALL, ALL, terms, **more)


def test_results_are_weighted_and_add_up():
    batch, student = batch_of(boxes(0)), features(5)
    one, half = distiller()(student, batch), distiller(unidistill().scaled(0.5))(student, batch)
    assert list(one) == ["feature", "relation", "response_class", "response_regression"]
    for name in one:
        torch.testing.assert_close(one[name].value, half[name].value * 2)
        assert not one[name].errors.requires_grad
    torch.testing.assert_close(total(one), sum(r.value for r in one.values()))
    total(one).backward()
    assert student.bev.grad.abs().sum() > 0 and total({}) == 0.0


def test_kept_boxes_move_to_the_front():
    found = boxes(3, (4, 2, 0))
    found.points, found.attributes = found.labels + 1, found.labels + 0
    found.points[~found.valid], found.attributes[~found.valid] = 0, -1
    kept = found.keep(torch.tensor([[False, True, False, True], [True, False, True, True], [True] * 4]))
    assert kept.valid.tolist() == [[True, True], [True, False], [False, False]]
    expected = Boxes3D.pad([found[0][torch.tensor([1, 3])], found[1][:1], Boxes3D.empty()])
    for name in ("values", "labels", "valid", "points", "visibility", "attributes"):
        ours, theirs = getattr(kept, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    one = found[0].keep(torch.tensor([False, False, True, False]))  # boxes of one sample
    torch.testing.assert_close(one.values, found[0].values[2:3], equal_nan=True)
    assert found.keep(torch.zeros(3, 4, dtype=torch.bool)).values.shape == (3, 0, 9)
    assert Boxes3D.empty().keep(torch.zeros(0, dtype=torch.bool)).values.shape == (0, 9)


def test_boxes_outside_the_grid_count_for_nothing():
    inside = boxes(0, (3, 2), reach=8.0)
    more = boxes(9, (2, 3))
    more.values[..., 0] = 40.0
    more.values[0, 0, :7] = torch.tensor([12.5, 0.0, 0.0, 4.0, 2.0, 1.0, 0.0])  # its centre is outside, a corner inside
    reaching = more.values[0, :1].clone()
    mixed = Boxes3D.pad(
        [
            Boxes3D.make(torch.cat(p), torch.zeros(len(torch.cat(p)), dtype=torch.long))
            for p in (
                (more.values[0, 1:2], inside.values[0, :3], reaching),
                (inside.values[1, :1], more.values[1], inside.values[1, 1:2]),
            )
        ]
    )
    clean = Boxes3D.pad(
        [
            Boxes3D.make(torch.cat(p), torch.zeros(len(torch.cat(p)), dtype=torch.long))
            for p in (
                (inside.values[0, :3], reaching),
                (inside.values[1, :2],),
            )
        ]
    )
    for variant in ("intended", "released"):
        d, student = distiller(unidistill("F2C", variant)), features(5)
        batch = batch_of(mixed)
        context = d.context(student, batch)
        assert context.boxes.valid.sum(1).tolist() == [4, 2] and batch.boxes is mixed
        torch.testing.assert_close(context.boxes.values, clean.values, equal_nan=True)
        ours, theirs = d(student, batch), d(student, batch_of(clean))
        for name in ours:
            torch.testing.assert_close(ours[name].value, theirs[name].value)


def test_nothing_reaches_the_teacher():
    teacher = FakeDetector(2)
    d = distiller(teacher=teacher)
    d.train()
    assert not teacher.training and not list(d.parameters()) and not d.state_dict()
    stored = features(7)
    for given in (None, stored):
        total(d(features(5), batch_of(boxes(0)), given)).backward()
    assert stored.bev.grad is None and stored.neck.grad is None
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_stored_features_stand_for_the_teacher():
    teacher = FakeDetector(2)
    d, batch, student = distiller(teacher=teacher), batch_of(boxes(0)), features(5)
    fresh = total(d(student, batch))
    stored = teacher(batch)
    teacher.forward = None  # not called again
    torch.testing.assert_close(total(d(student, batch, stored)), fresh)


def test_teacher_in_training_mode():
    teacher = FakeDetector(2)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    d = distiller(unidistill().flip(["unidistill.teacher_train_mode"]), teacher)
    batch, student = batch_of(boxes(0)), features(5)
    value = d(student, batch)["feature"].value
    assert value != distiller(teacher=FakeDetector(2))(student, batch)["feature"].value
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not d.cacheable and distiller().cacheable
    with pytest.raises(ValueError, match=r"stored features cannot be used.*teacher_train_mode"):
        d(student, batch, features(7))
    drifts = distiller(unidistill("F2C").flip(["unidistill.teacher_train_mode"]), teacher)
    drifts(student, batch)
    assert not torch.equal(teacher.norm.running_mean, before["norm.running_mean"])


def test_part_of_the_teacher_may_learn():
    quirk = Quirk("test.fuser", "", "", "teacher", TeacherMode(trainable=("encoder",)))
    teacher = FakeDetector(2)
    term = Term(name="x", function=squared, weight=1.0, source="")
    d = distiller(method_of(term, quirks=(quirk,), on=frozenset(["test.fuser"])), teacher)
    assert {id(p) for p in d.parameters()} == {id(p) for p in teacher.encoder.parameters()}
    total(d(features(5), batch_of(boxes(0)))).backward()
    assert teacher.encoder.weight.grad is not None and teacher.norm.weight.grad is None
    assert not d.cacheable


def test_adapters_learn_and_are_stored():
    d = distiller(unidistill("C2L"))
    assert set(d.state_dict()) == {f"adapters.unidistill/{n}.{w}" for n in ("low", "high") for w in ("weight", "bias")}
    total(d(features(5), batch_of(boxes(0)))).backward()
    assert all(p.grad is not None for p in d.parameters())
    assert not list(distiller(unidistill("C2L", "released")).parameters())
    assert len(list(distiller(unidistill("C2L").reweight({"relation": 0.0})).parameters())) == 2


def test_adapter_is_shared_and_runs_once_a_step():
    calls = []

    class Counting(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(tuple(x.shape))
            return super().forward(x)

    adapter = Adapter("a", lambda s, t: Counting(s, t, 1), "", "", resize="corners")
    base = Term(
        name="x",
        function=squared,
        weight=1.0,
        source="",
        student="student.stages[1]",
        teacher="teacher.bev",
        adapter="a",
    )
    method = method_of(base, replace(base, name="y"), adapters=(adapter,))
    d = distiller(method)
    d(features(5), batch_of(boxes(0)))
    assert calls == [(2, 6, *GRID.shape)]
    clash = replace(base, name="y", student="student.stages[0]")
    with pytest.raises(ValueError, match="adapter a is shared"):
        distiller(method_of(base, clash, adapters=(adapter,)))


def test_missing_tensors_and_widths_are_told_before_training():
    with pytest.raises(
        ValueError, match=r"term feature: teacher\.bev is missing, the teacher has lidar_bev, neck, stages"
    ):
        distiller(teacher=FakeDetector(2, FakeChannels(bev=None)))
    with pytest.raises(ValueError, match=r"student\.neck is missing"):
        distiller(student=FakeDetector(2, FakeChannels(neck=0)))
    with pytest.raises(
        ValueError, match=r"student\.bev has 4 channels and teacher\.bev has 5; the term needs an adapter"
    ):
        distiller(teacher=FakeDetector(2, FakeChannels(bev=5)))
    Distiller(unidistill(adapt=True), FakeDetector(1), FakeDetector(2, FakeChannels(bev=5)), grid=GRID)
    term = Term(
        name="x", function=squared, weight=1.0, source="", teacher="labels.stages[0]", student="student.stages[0]"
    )
    with pytest.raises(ValueError, match=r"labels\.stages\[0\] is missing, there is no label encoder"):
        distiller(method_of(term))
    with pytest.raises(ValueError, match=r"teacher\.depth is missing"):
        distiller(method_of(replace(term, teacher="teacher.bev", student="student.bev", reads=("teacher.depth",))))
    distiller(method_of(replace(term, weight=0.0)))  # switched off: nothing to check


def test_labels_thirds_slots_and_student_only_terms():
    """The shapes that other papers need: see the three terms."""
    third = Adapter("third", lambda s, t: nn.Conv2d(s, t, 3, padding=1), "", "")
    psi = Adapter("psi", lambda s, t: nn.Conv2d(1, 1, 3, padding=1), "", "")
    channels = FakeChannels(stages=(9, 6), camera_bev=8)

    def spatial(context: Context, term: Term) -> TermResult:
        student, teacher = context.pair(term)
        moved = context.module("psi")(student.mean(1, keepdim=True))
        return TermResult.of((teacher.mean(1) - moved[:, 0]).abs(), Cells(), context.grid_of(student))

    def slots(context: Context, term: Term) -> TermResult:
        ours, theirs = context.pair(term)
        column, row, inside = context.grid.locate(context.boxes.values[..., :2])
        index = torch.where(inside & context.boxes.valid, row * context.grid.width + column, 0)
        gathered = (ours - theirs).abs().sum(1).flatten(1).gather(1, index)
        return TermResult.of(gathered * (inside & context.boxes.valid), Slots(index), context.grid)

    def alone(context: Context, term: Term) -> TermResult:
        return TermResult.of(F.relu(context.student_tensor(term)), Nowhere(2), context.grid)

    terms = (
        Term(
            name="label",
            function=spatial,
            weight=0.3,
            source="",
            teacher="labels.stages[0]",
            student="student.stages[0]",
            adapter="third",
            channels=Part(0, 3),
            modules=("psi",),
        ),
        Term(
            name="boxes",
            function=slots,
            weight=1.0,
            source="",
            teacher="teacher.predictions.regression",
            student="student.predictions.regression",
        ),
        Term(name="alone", function=alone, weight=1.0, source="", teacher=None, student="student.stages[1]"),
    )
    method = method_of(*terms, adapters=(third, psi))
    assert method.needs_labels
    student, teacher = FakeDetector(1, channels), FakeDetector(2)
    d = distiller(method, teacher, student, labels=FakeDetector(3))
    assert d.adapters["third"].weight.shape == (4, 3, 3, 3)
    results = d(features(5, channels=channels), batch_of(boxes(0)))
    for result in results.values():
        torch.testing.assert_close(result.map().sum() + result.off_map, result.value, rtol=1e-4, atol=1e-4)
    total(results).backward()
    assert all(p.grad is not None for p in d.parameters())


def test_teacher_runs_only_where_a_term_needs_it():
    term = Term(name="x", function=squared, weight=1.0, source="", teacher="labels.bev", student="student.bev")
    teacher = FakeDetector(2)
    teacher.forward = None
    d = distiller(method_of(term), teacher, labels=FakeDetector(3))
    assert d(features(5), batch_of(boxes(0)))["x"].value > 0


def test_maps_of_different_sizes_are_told():
    term = Term(name="x", function=squared, weight=1.0, source="", teacher="teacher.neck", student="student.stages[1]")
    with pytest.raises(ValueError, match="an adapter"):
        distiller(method_of(term))(features(5), batch_of(boxes(0)))


def test_terms_run_in_float32_under_autocast():
    d, batch = distiller(unidistill("C2L")), batch_of(boxes(0))
    student = features(5)
    half = replace(student, bev=student.bev.bfloat16(), neck=student.neck.bfloat16())
    seen = []
    stored = FakeDetector(2).eval()(batch)
    d.adapters["unidistill/low"].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        results = d(half, batch, stored)
    assert seen == [torch.bfloat16] and {r.value.dtype for r in results.values()} == {torch.float32}
    rounded = replace(student, bev=half.bev.float(), neck=half.neck.float())
    torch.testing.assert_close(total(results), total(d(rounded, batch, stored)), rtol=1e-2, atol=1e-3)


def test_grid_of_a_map():
    context = Context(features(0), None, boxes(0), GRID)
    assert context.grid_of(torch.zeros(2, 1, *GRID.shape)) is GRID
    assert context.grid_of(torch.zeros(2, 1, 12, 16)) == GRID.strided(2)
    assert context.grid_of(torch.zeros(2, 1, 48, 64)) == BEVGrid(GRID.x, GRID.y, GRID.cell / 2)
    with pytest.raises(ValueError, match="does not lie on the grid"):
        context.grid_of(torch.zeros(2, 1, 12, 12))


def test_released_method_trains():
    d = distiller(unidistill("L2C", "released"))
    student = features(5)
    total(d(student, batch_of(boxes(0, (3, 0))))).backward()
    assert student.bev.grad.isfinite().all()


def test_distiller_moves_its_teacher():
    d = distiller()
    d.to(torch.float64)
    assert d.teacher.encoder.weight.dtype == torch.float64


def test_start_copies_weights():
    student, teacher = FakeDetector(1), FakeDetector(2)
    method = replace(unidistill(), start=(Start("norm", ""), Start("encoder", "")))
    assert copy_start(method, student, teacher) == ["norm", "encoder"]
    assert torch.equal(student.encoder.weight, teacher.encoder.weight)
    with pytest.raises(ValueError, match="nope cannot be copied"):
        copy_start(replace(method, start=(Start("nope", ""),)), student, teacher)
