import math
from dataclasses import replace

import pytest
import torch
from distill_fakes import GRID, SQUARE, FakeChannels, FakeDetector, batch_of, boxes, features
from hypothesis import given, settings
from hypothesis import strategies as st
from test_regions import naive_mask
from torch import nn

from kdlab.config import BEVConfig, DetectorConfig, DistillConfig, HeadConfig, LidarConfig
from kdlab.distill import Context, Distiller, Part, TensorPath, build_method, run_terms, total
from kdlab.distill.labeldistill import QUIRKS, build_encoder, encoder_loss, foreground, labeldistill, truth
from kdlab.geometry import BEVGrid, transform_boxes, yaw_pose
from kdlab.models.detector import Detector
from kdlab.models.labels import LabelDetector, LabelEncoder
from kdlab.models.targets import TASK_OF_CLASS
from kdlab.sample import Boxes3D, Features

GRIDS = (GRID, SQUARE, BEVGrid((-6.0, 12.0), (-9.0, 9.0), 0.9), BEVGrid((-6.0, 3.0), (-9.0, 9.0), 0.75))
FRAMES = 2
STUDENT = FakeChannels(camera_bev=7, frames=FRAMES, regression=60, stages=(4, 9))
TEACHER = FakeChannels(regression=60)
TERMS = [t.name for t in labeldistill().terms]
DIFFERENCES = [n for n in TERMS if n != "response_heatmap"]
MASKED = DIFFERENCES


def seen(seed, size, grid, channels=STUDENT):
    """Features with the camera BEV maps of some frames."""
    found = features(seed, size, grid, channels)
    if channels.camera_bev:
        g = torch.Generator().manual_seed(seed + 99)
        shape = (size, channels.frames, channels.camera_bev, *grid.shape)
        found.camera_bev_aligned = torch.randn(shape, generator=g).requires_grad_()
    return found


class Labels(nn.Module):
    """A label encoder with one weight."""

    def __init__(self, grid=GRID, channels=TEACHER) -> None:
        super().__init__()
        self.grid, self.channels, self.scale = grid, channels, nn.Parameter(torch.ones(()))

    def forward(self, batch):
        found = features(77, batch.size, self.grid, self.channels)
        return replace(found, stages=tuple(s.detach() * self.scale for s in found.stages))


def distiller_of(method, grid=GRID):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sides = FakeDetector(0, STUDENT, grid), FakeDetector(1, TEACHER, grid)
        return Distiller(method, *sides, Labels(grid), grid=grid).eval()


def setting(seed, counts=(4, 2), grid=GRID, method=None, found=None):
    """A context and its method; adapters with random weights."""
    distiller = distiller_of(method or labeldistill(), grid)
    batch = batch_of(boxes(seed, counts) if found is None else found)
    teacher = features(seed + 2, len(counts), grid, TEACHER) if distiller.cacheable else None
    return distiller.context(seen(seed + 1, len(counts), grid), batch, teacher), distiller.method


def naive_truth(ctx, released):
    return torch.stack(
        [
            naive_mask(
                ctx.boxes.values,
                ctx.boxes.valid & inside(ctx, released) & (ctx.boxes.labels == c),
                ctx.grid,
                0.1,
                2,
                released,
            )
            for c in range(10)
        ],
        1,
    )


def cell_of(ctx, b, m, released):
    u, v = ((ctx.boxes.values[b, m, :2] - torch.tensor([ctx.grid.x[0], ctx.grid.y[0]])) / ctx.grid.cell).tolist()
    return (int(u), int(v)) if released else (math.floor(u), math.floor(v))


def inside(ctx, released):
    out = torch.zeros_like(ctx.boxes.valid)
    for b in range(out.shape[0]):
        for m in range(out.shape[1]):
            u, v = cell_of(ctx, b, m, released)
            out[b, m] = 0 <= u < ctx.grid.width and 0 <= v < ctx.grid.height
    return out


def naive(ctx, method, released):
    """The six losses with weight 1, cell by cell."""
    truth, out = naive_truth(ctx, released), {}
    soft = truth.sum(1)
    for term in method.active[:4]:
        student, source = (x.detach() for x in ctx.pair(term))
        mask = soft
        if student.shape[-2:] != soft.shape[-2:]:
            mask = resized(soft, student.shape[-2:])
        if term.name.startswith("label"):
            mask = (mask > 0).float()
        value = torch.zeros(())
        for b, i, j in (mask > 0).nonzero().tolist():
            value += mask[b, i, j] * ((student[b, :, i, j] - source[b, :, i, j]) ** 2).sum()
        out[term.name] = value / max(1.0, float(mask.sum()))
    ps, pt = (x.predictions.heatmap.detach().sigmoid().clamp(1e-4, 1 - 1e-4) for x in (ctx.student, ctx.teacher))
    heat, count = torch.zeros(6), torch.zeros(6)
    for c in range(10):
        target, centre = pt[:, c] * truth[:, c], truth[:, c] == 1
        error = (1 - target) ** 4 * ps[:, c] ** 2 * -(1 - ps[:, c]).log()
        if not released:
            error = error + centre * target * (1 - ps[:, c]) ** 2 * -ps[:, c].log()
        heat[TASK_OF_CLASS[c]] += error.sum()
        count[TASK_OF_CLASS[c]] += centre.sum()
    out["response_heatmap"] = (heat / count.clamp(min=1)).sum()
    box, count = torch.zeros(6), torch.zeros(6)
    for b, m in (ctx.boxes.valid & inside(ctx, released)).nonzero().tolist():
        u, v = cell_of(ctx, b, m, released)
        task = TASK_OF_CLASS[int(ctx.boxes.labels[b, m])]
        ours, theirs = (
            x.predictions.regression[b, task * 10 : task * 10 + 10, v, u].detach() for x in (ctx.student, ctx.teacher)
        )
        box[task] += 0.25 * (ours - theirs).abs().sum()
        count[task] += 1
    out["response_box"] = (box / count.clamp(min=1)).sum()
    return out


def resized(mask, size):
    """Bilinear with aligned corners, by hand."""
    out = torch.zeros(len(mask), *size)
    rows, columns = mask.shape[-2:]
    for i in range(size[0]):
        for j in range(size[1]):
            y, x = i * (rows - 1) / (size[0] - 1), j * (columns - 1) / (size[1] - 1)
            r, c = min(int(y), rows - 2), min(int(x), columns - 2)
            p, q = y - r, x - c
            out[:, i, j] = (1 - p) * ((1 - q) * mask[:, r, c] + q * mask[:, r, c + 1]) + p * (
                (1 - q) * mask[:, r + 1, c] + q * mask[:, r + 1, c + 1]
            )
    return out


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(0, 4), st.integers(0, 3)), st.sampled_from(GRIDS), st.booleans())
def test_terms_match_loops(seed, counts, grid, released):
    ctx, method = setting(seed, counts, grid, labeldistill("released" if released else "intended"))
    results = run_terms(method.reweight(dict.fromkeys(TERMS, 1.0)), ctx)
    torch.testing.assert_close(truth(ctx), naive_truth(ctx, released), rtol=1e-5, atol=1e-6)
    for name, value in naive(ctx, method, released).items():
        torch.testing.assert_close(results[name].value, value, rtol=1e-4, atol=1e-4)


def test_recipe():
    method = labeldistill("released")
    weights = {t.name: t.weight for t in method.terms}
    assert weights == dict.fromkeys(("label_0", "label_1", "lidar_0", "lidar_1"), 0.3) | {
        "response_heatmap": 1.0,
        "response_box": 1.0,
    }
    assert all(t.source for t in method.terms) and all(q.evidence for q in method.quirks)
    (stage,) = method.stages
    assert (stage.epochs, stage.lr, stage.weight_decay) == (12, 1e-3, 1e-7)
    assert method.needs_labels and not method.reweight({"label_0": 0, "label_1": 0}).needs_labels
    assert method.teacher_mode.batch_statistics and not labeldistill().teacher_mode.batch_statistics


def test_frames_are_parted_one_by_one_and_as_released_together():
    """Two frames of 7 channels: thirds of 2 each, together 4 of 14."""
    ctx, method = setting(0)
    found = ctx.student.camera_bev_aligned
    for index, group in enumerate(("label", "lidar")):
        term = next(t for t in method.active if t.name == f"{group}_0")
        part = slice(2 * index, 2 * index + 2)
        expected = torch.cat((found[:, 0, part], found[:, 1, part]), 1)
        assert torch.equal(term.channels.take(ctx.tensor(term.student), FRAMES), expected)
        assert ctx.modules[term.adapter][0].in_channels == 4
        term = next(t for t in labeldistill("released").active if t.name == f"{group}_0")
        taken = term.channels.take(ctx.tensor(term.student), FRAMES)
        assert torch.equal(taken, found.flatten(1, 2)[:, 4 * index : 4 * index + 4])
        assert term.channels.width(14, FRAMES) == 4
    released = distiller_of(labeldistill("released"))
    assert released.adapters["labeldistill/label_0"][0].in_channels == 4
    gradients = {}
    for name in ("label_0", "lidar_0", "label_1", "lidar_1"):
        value = run_terms(method.only([name]), ctx)[name].value
        leaves = (found, ctx.student.stages[1])
        gradients[name] = torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)
    used = {
        n: [(g.flatten(0, -4) if g.ndim > 4 else g).abs().sum((0, 2, 3)).ne(0).tolist() for g in gs]
        for n, gs in gradients.items()
    }
    assert used["label_0"] == [[True] * 2 + [False] * 5, [False] * 9]
    assert used["lidar_0"] == [[False] * 2 + [True] * 2 + [False] * 3, [False] * 9]
    assert (
        used["label_1"][1] == [True] * 3 + [False] * 6 and used["lidar_1"][1] == [False] * 3 + [True] * 3 + [False] * 3
    )


def test_frames_side_by_side():
    path = TensorPath.parse("student.camera_bev_aligned[:]")
    assert path.width(STUDENT) == 14 and path.frames(STUDENT) == FRAMES and path.width(TEACHER) is None
    with pytest.raises(ValueError, match=r"only camera_bev and camera_bev_aligned take \[:\]"):
        TensorPath.parse("student.stages[:]")
    assert Part(2, 3).width(14, 2) == 6 and Part(2, 3, across=True).width(14, 2) == 6
    assert "[part 1 of 3 of each frame]" in labeldistill().describe()
    assert "[part 1 of 3]" in labeldistill("released").describe().splitlines()[4]


def test_impossible_pairs_are_told_before_training():
    def told(student=STUDENT, teacher=TEACHER, labels=None):
        return Distiller(
            labeldistill(), FakeDetector(0, student), FakeDetector(1, teacher), labels or Labels(), grid=GRID
        )

    told()
    with pytest.raises(
        ValueError, match=r"term lidar_0: student.camera_bev_aligned\[:\] is missing, the student has lidar_bev, bev"
    ):
        told(replace(STUDENT, camera_bev=None))
    with pytest.raises(
        ValueError, match=r"term lidar_1: teacher.stages\[1\] is missing, the teacher has .*stages\[0\]"
    ):
        told(teacher=replace(TEACHER, stages=(4,)))
    with pytest.raises(ValueError, match=r"term label_0: labels.stages\[0\] is missing, there is no label encoder"):
        Distiller(labeldistill(), FakeDetector(0, STUDENT), FakeDetector(1, TEACHER), grid=GRID)
    alone = labeldistill().reweight({"label_0": 0, "label_1": 0})
    Distiller(alone, FakeDetector(0, STUDENT), FakeDetector(1, TEACHER), grid=GRID)


def test_other_depths_and_cells_meet():
    deep, fine = replace(TEACHER, stages=(5, 6, 8)), BEVGrid(GRID.x, GRID.y, GRID.cell / 2)
    method = labeldistill(levels=(0, 1)).only(["label_0", "label_1", "lidar_0", "lidar_1"])
    distiller = Distiller(method, FakeDetector(0, STUDENT), FakeDetector(1, deep), Labels(fine, deep), grid=GRID)
    results = distiller(seen(0, 2, GRID), batch_of(boxes(0)), features(1, 2, fine, deep))
    assert results["lidar_0"].grid.shape == fine.shape and results["lidar_1"].grid.shape == GRID.shape
    assert all(r.value.isfinite() and r.value > 0 for r in results.values())


def test_zero_where_student_is_teacher():
    method = labeldistill()
    same = replace(STUDENT, camera_bev=12, frames=1, stages=(4, 18))
    adapters = tuple(replace(a, build=lambda s, t: nn.Identity()) for a in method.adapters)
    method = replace(method, adapters=adapters)
    distiller = Distiller(method, FakeDetector(0, same), FakeDetector(1, TEACHER), Labels(), grid=GRID)
    student = seen(3, 2, GRID, same)
    parts = [
        tuple(Part(i, 3).take(m.detach()) for m in (student.camera_bev_aligned[:, 0], student.stages[1]))
        for i in (0, 1)
    ]
    labels = Features(student.bev, stages=parts[0])
    teacher = Features(student.bev, stages=parts[1], predictions=student.predictions)
    results = distiller(student, batch_of(boxes(0)), teacher, labels)
    assert all(results[name].value == 0 for name in DIFFERENCES) and results["response_heatmap"].value > 0


@pytest.mark.parametrize("variant", ["intended", "released"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0)])
def test_samples_without_ground_truth(variant, counts):
    found = boxes(3, counts, 8.0)
    ctx, method = setting(3, counts, method=labeldistill(variant), found=found)
    results = run_terms(method, ctx)
    assert all(r.value.isfinite() for r in results.values())
    for b, count in enumerate(counts):
        for name, result in results.items():
            assert bool(result.map()[b].any()) == (name not in MASKED or count > 0), name
    leaves = [ctx.student.camera_bev_aligned, ctx.student.stages[1], ctx.student.predictions.tasks[0].reg]
    gradients = torch.autograd.grad(total(results), leaves, materialize_grads=True)
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert [bool(g.any()) for g in gradient] == [count > 0 for count in counts]


@pytest.mark.parametrize("variant", ["intended", "released"])
def test_value_is_map_and_what_is_off_it(variant):
    ctx, method = setting(5, (4, 0), method=labeldistill(variant))
    for result in run_terms(method, ctx).values():
        torch.testing.assert_close(result.map().sum() + result.off_map, result.value, rtol=1e-4, atol=1e-5)


def test_released_scores_are_never_pulled_up():
    ctx, _ = setting(6)
    logits = ctx.student.predictions.tasks[0].heatmap
    signs = {}
    for variant in ("intended", "released"):
        method = labeldistill(variant).only(["response_heatmap"])
        fresh = replace(ctx, on=method.on, _made={})
        (gradient,) = torch.autograd.grad(run_terms(method, fresh)["response_heatmap"].value, logits)
        signs[variant] = bool((gradient < 0).any())
    assert signs == {"intended": True, "released": False}


CHANGES = {
    "labeldistill.half_footprint": set(),  # of the encoder's input
    "labeldistill.batch_statistics": set(),  # of how frozen networks run
    "labeldistill.global_thirds": {"label_0", "lidar_0"},
    "labeldistill.no_positives": {"response_heatmap"},
    "labeldistill.truncate_centre": set(TERMS),
    "labeldistill.local_normaliser": set(),  # one process
}


@pytest.mark.parametrize("quirk", CHANGES)
def test_a_quirk_changes_what_it_should(quirk):
    found = boxes(6, (3, 1))
    found.values[0, 0, :7] = torch.tensor([-12.4, 3.1, 0, 5, 3, 1, 0.3])  # centre just outside
    teacher, student = features(8, 2, GRID, TEACHER), seen(7, 2, GRID)
    runs = []
    for method in (labeldistill(), labeldistill().flip([quirk])):
        results = (
            distiller_of(method)(student, batch_of(found), teacher)
            if not method.teacher_mode.batch_statistics
            else None
        )
        runs.append(results)
    if runs[1] is None:
        return
    assert {n for n in TERMS if runs[0][n].value != runs[1][n].value} == CHANGES[quirk]
    assert {q.name for q in QUIRKS} == set(CHANGES)


def test_foreground_turns_with_the_boxes():
    """One sample in double: a centre on a cell's border would fall to either side."""
    found = boxes(7, (6, 3))
    values = found.values.double()
    turned = Boxes3D.make(transform_boxes(yaw_pose(math.pi / 2), values.nan_to_num()), found.labels, found.valid)
    masks = []
    for b in (Boxes3D.make(values, found.labels, found.valid), turned):
        ctx = Context(seen(0, 2, SQUARE), features(1, 2, SQUARE, TEACHER), b, SQUARE)
        masks.append(
            [foreground(truth(ctx), size, binary) for size in ((40, 40), (20, 20)) for binary in (False, True)]
        )
    for before, after in zip(*masks, strict=True):
        assert before.any()
        torch.testing.assert_close(after, before.rot90(1, (2, 1)), rtol=1e-5, atol=1e-6)


def test_teacher_and_labels_carry_no_gradient():
    distiller = distiller_of(labeldistill()).train()
    total(distiller(seen(0, 2, GRID), batch_of(boxes(0)))).backward()
    assert all(p.grad is None for p in (*distiller.teacher.parameters(), *distiller.labels.parameters()))
    assert all(p.grad is not None for p in distiller.parameters())
    assert not distiller.teacher.training and not distiller.labels.training
    released = distiller_of(labeldistill("released"))
    released(seen(0, 2, GRID), batch_of(boxes(0)))
    assert released.teacher.training and released.labels.training


def test_float32_under_autocast():
    distiller = distiller_of(labeldistill())
    student, batch = seen(0, 2, GRID), batch_of(boxes(0))
    plain = distiller(student, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = distiller(student, batch)
    for name, result in plain.items():
        assert mixed[name].value.dtype == torch.float32
        torch.testing.assert_close(mixed[name].value, result.value, rtol=2e-2, atol=1e-4)  # adapters run in bfloat16


def test_modalities():
    assert build_method(DistillConfig(method="labeldistill"), "camera", "lidar") == labeldistill()
    for student, teacher in (("lidar", "camera"), ("camera", "camera"), ("fusion", "lidar"), ("camera", "fusion")):
        method = build_method(DistillConfig(method="labeldistill"), student, teacher)
        said = f"; a weight for lidar to camera, not for {teacher} to {student}"
        assert all(term.source.endswith(said) for term in method.terms)


def test_options_are_arguments():
    def built(**options):
        return build_method(DistillConfig("labeldistill", options=options), "camera", "lidar")

    assert [t.name for t in built(levels="1").terms] == ["label_1", "lidar_1", "response_heatmap", "response_box"]
    assert all(t.channels is None for t in built(partition="off").terms)
    assert [t.name for t in built(partition="off").terms] == [t.name for t in built().terms]
    with pytest.raises(ValueError, match="option partition: 'no' is not one of on, off"):
        built(partition="no")


def test_an_encoder_learns_to_tell_the_head():
    torch.manual_seed(0)
    config = DetectorConfig(
        "lidar",
        BEVGrid.square(12.8, 1.6),
        lidar=LidarConfig(channels=8),
        bev=BEVConfig(8, (16, 16), (1, 1), 16),
        head=HeadConfig(channels=16),
    )
    detector = Detector(config).eval().requires_grad_(False)
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    encoder = build_encoder(detector, frozenset())
    assert isinstance(encoder, LabelEncoder) and not encoder.released and encoder.channels.stages == (16, 16)
    assert build_encoder(detector, labeldistill("released").on).released
    batch = batch_of(boxes(5, (3, 2)))
    optimiser = torch.optim.Adam(encoder.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = encoder_loss(encoder, detector, batch, frozenset())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert all(p.grad is None for p in detector.parameters()) and not detector.training
    assert all(torch.equal(v, state[n]) for n, v in detector.state_dict().items())
    told = LabelDetector(encoder.eval(), detector)
    assert len(told.predict(told(batch))) == 2
    encoder_loss(encoder, detector, batch, labeldistill("released").on)
    assert detector.training and not all(torch.equal(v, state[n]) for n, v in detector.state_dict().items())
