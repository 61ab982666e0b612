"""Every intended term by loops in float64, from the specifications: values, and gradients at the student's maps.

Student's stages have fewer or more cells than the teacher's, adapters have random weights, boxes lie over the border.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from all_methods import NAMES, changed, leaves, maps, method_of, some_boxes, unit
from torch import Tensor

from kdlab.distill import Context, run_terms, total
from kdlab.distill.terms import read_points
from kdlab.geometry import BEVGrid
from kdlab.sample import TASKS, Predictions

GRIDS = (BEVGrid((-6.0, 6.0), (-4.5, 4.5), 1.5), BEVGrid((-2.0, 7.6), (-9.0, 3.0), 1.2))
TASK_OF = {c: t for t, classes in enumerate(TASKS) for c in classes}


def read(image: Tensor, u: float, v: float) -> Tensor:
    """A map [C, H, W] at column u and row v, cell i's centre at i + 1/2, zeros outside."""
    out = torch.zeros(len(image), dtype=torch.float64)
    for i in (math.floor(v - 0.5), math.floor(v - 0.5) + 1):
        for j in (math.floor(u - 0.5), math.floor(u - 0.5) + 1):
            if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
                out = out + image[:, i, j] * (1 - abs(u - 0.5 - j)) * (1 - abs(v - 0.5 - i))
    return out


def resized(image: Tensor, size: tuple[int, int], corners: bool) -> Tensor:
    """Bilinear: corners on corners, or areas on areas with the border's cells repeated."""
    height, width = image.shape[-2:]
    rows = []
    for i in range(size[0]):
        for j in range(size[1]):
            if corners:
                y, x = i * (height - 1) / (size[0] - 1), j * (width - 1) / (size[1] - 1)
            else:
                y, x = (i + 0.5) * height / size[0] - 0.5, (j + 0.5) * width / size[1] - 0.5
                y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            r, c = min(int(y), height - 2), min(int(x), width - 2)
            p, q = y - r, x - c
            upper = (1 - q) * image[..., r, c] + q * image[..., r, c + 1]
            rows.append((1 - p) * upper + p * ((1 - q) * image[..., r + 1, c] + q * image[..., r + 1, c + 1]))
    return torch.stack(rows, -1).unflatten(-1, size)


def gauss(shape: tuple[int, int], box: list[float], grid: BEVGrid, o: float, least: int) -> Tensor:
    """One box's Gaussian on a grid; zeros where its centre is outside, but UniDistill's (least 0) reaches in."""
    out, a, b = torch.zeros(shape, dtype=torch.float64), box[3] / grid.cell, box[4] / grid.cell
    t, p = a + b, a * b
    radii = (
        (t + math.sqrt(t * t - 4 * p * (1 - o) / (1 + o))) / 2,
        (2 * t + math.sqrt(4 * t * t - 16 * (1 - o) * p)) / 2,
        (-2 * o * t + math.sqrt(4 * o * o * t * t + 16 * o * (1 - o) * p)) / 2,
    )
    r = max(least, int(min(radii)))
    u, v = (math.floor((box[k] - low) / grid.cell) for k, low in ((0, grid.x[0]), (1, grid.y[0])))
    if least and not (0 <= u < shape[1] and 0 <= v < shape[0]):
        return out
    for i in range(max(0, v - r), min(shape[0], v + r + 1)):
        for j in range(max(0, u - r), min(shape[1], u + r + 1)):
            out[i, j] = math.exp(-((i - v) ** 2 + (j - u) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
    return out


def samples(ctx: Context) -> list[list[tuple[int, list[float]]]]:
    """(class, box) of the valid boxes of each sample."""
    values, labels = ctx.boxes.values.double().tolist(), ctx.boxes.labels.tolist()
    return [
        [(labels[b][m], values[b][m]) for m in range(len(values[b])) if ctx.boxes.valid[b, m]]
        for b in range(len(values))
    ]


def class_masks(ctx: Context) -> Tensor:
    """CenterPoint's heat maps [B, 10, H, W]."""
    found = torch.zeros(len(ctx.boxes.values), 10, *ctx.grid.shape, dtype=torch.float64)
    for b, rows in enumerate(samples(ctx)):
        for label, box in rows:
            found[b, label] = torch.maximum(found[b, label], gauss(ctx.grid.shape, box, ctx.grid, 0.1, 2))
    return found


def centre(box: list[float], grid: BEVGrid) -> tuple[int, int] | None:
    u, v = math.floor((box[0] - grid.x[0]) / grid.cell), math.floor((box[1] - grid.y[0]) / grid.cell)
    return (v, u) if 0 <= u < grid.width and 0 <= v < grid.height else None


def probability(logits: Tensor) -> Tensor:
    return logits.sigmoid().clamp(1e-4, 1 - 1e-4)


def adapted(ctx: Context, term, maps_: Tensor, size: tuple[int, int]) -> Tensor:
    """Resized by loops, then the adapter in float64."""
    adapter = ctx.adapters[term.adapter]
    if adapter.resize != "no" and tuple(maps_.shape[-2:]) != size:
        maps_ = resized(maps_, size, adapter.resize == "corners")
    return copy.deepcopy(ctx.modules[term.adapter]).double()(maps_)


def unidistill_loops(ctx: Context, s, t, method) -> dict[str, Tensor]:
    (height, width), low, cell = ctx.grid.shape, (ctx.grid.x[0], ctx.grid.y[0]), ctx.grid.cell
    ours, theirs = (s.bev, s.neck), (t.bev, t.neck)
    if method.terms[0].adapter:
        pairs = zip(method.terms[:2], ours, strict=True)
        ours = tuple(adapted(ctx, term, m, (height, width)) for term, m in pairs)
    feature = relation = torch.zeros((), dtype=torch.float64)
    mask, count = torch.zeros(len(s.bev), height, width, dtype=torch.float64), 0
    for b, rows in enumerate(samples(ctx)):
        for _, box in rows:
            count += 1
            mask[b] = torch.maximum(mask[b], gauss((height, width), box, ctx.grid, 0.7, 0))
            places = []
            for p, q in ((-1, -1), (-1, 1), (1, 1), (1, -1), (0, 0), (-1, 0), (0, 1), (1, 0), (0, -1)):
                dx, dy = p * box[3] / 2, q * box[4] / 2
                x = box[0] + dx * math.cos(box[6]) - dy * math.sin(box[6])
                y = box[1] + dx * math.sin(box[6]) + dy * math.cos(box[6])
                places.append(((x - low[0]) / cell, (y - low[1]) / cell))
            vectors = [[torch.stack([read(m[b], u, v) for u, v in places]) for m in side] for side in (ours, theirs)]
            feature = feature + (vectors[0][0] - vectors[1][0]).abs().mean()
            units = [v[1] / (v[1].square().sum(1, keepdim=True).sqrt() + 1e-4) for v in vectors]
            apart = [(units[0][i] @ units[0][j] - units[1][i] @ units[1][j]).abs() for i in range(9) for j in range(9)]
            relation = relation + torch.stack(apart).mean()
    most = [probability(f.predictions.heatmap).amax(1) for f in (s, t)]
    area = mask.sum() + 1e-4
    return {
        "feature": feature / (count + 1e-4),
        "relation": relation / (count + 1e-4),
        "response_class": (mask * (most[0] - most[1]).abs()).sum() / area,
        "response_regression": (
            mask * (s.predictions.regression - t.predictions.regression).abs().mean(1)
        ).sum() / area,
    }  # fmt: skip


def distillbev_loops(ctx: Context, s, t, method) -> dict[str, Tensor]:
    out = {t.name: torch.zeros((), dtype=torch.float64) for t in method.terms}
    sides = {"B1": (s.stages[0], t.stages[0]), "B2": (s.stages[1], t.stages[1]), "H": (s.neck, t.neck)}
    heads, truth = ctx.grid.shape, class_masks(ctx).amax(1)
    fires = (probability(t.predictions.heatmap).amax(1) > 0.1) & (truth < 0.1)
    for name, (ours, theirs) in sides.items():
        size = tuple(theirs.shape[-2:])
        term = next(x for x in method.terms if x.name == f"spatial_{name}")
        ours, batch = adapted(ctx, term, ours, size), len(theirs)
        cell = (ctx.grid.x[1] - ctx.grid.x[0]) / size[1]
        for b, rows in enumerate(samples(ctx)):
            weights = [(m[b].abs().mean(0) / 0.5).flatten().softmax(0).view(size) * size[0] * size[1]
                       for m in (ours.detach(), theirs)]  # fmt: skip
            cells: dict[str, list] = {"foreground": [], "false_positive": [], "background": []}
            for i in range(size[0]):
                for j in range(size[1]):
                    x, y = ctx.grid.x[0] + (j + 0.5) * cell, ctx.grid.y[0] + (i + 0.5) * cell
                    scale = None
                    for _, box in rows[::-1]:
                        dx, dy, cos, sin = x - box[0], y - box[1], math.cos(box[6]), math.sin(box[6])
                        if abs(dx * cos + dy * sin) < box[3] / 2 and abs(dy * cos - dx * sin) < box[4] / 2:
                            scale = cell / math.sqrt(box[3] * box[4])
                    ratio = max(1, heads[0] // size[0])
                    block = fires[b, i * ratio : (i + 1) * ratio, j * ratio : (j + 1) * ratio]
                    kind = "foreground" if scale else "false_positive" if block.any() else "background"
                    error = ((ours[b, :, i, j] - theirs[b, :, i, j]) ** 2).sum()
                    cells[kind].append(error * (weights[0][i, j] + weights[1][i, j]) / 2 * (scale or 1) / batch)
            for kind, errors in cells.items():
                if errors:
                    value = torch.stack(errors).sum() / (1 if kind == "foreground" else len(errors))
                    out[f"{kind}_{name}"] = out[f"{kind}_{name}"] + value
            apart = (ours[b].abs().mean(0) - theirs[b].abs().mean(0)).abs().sum()
            out[f"spatial_{name}"] = out[f"spatial_{name}"] + apart / batch
    return out


def simdistill_loops(ctx: Context, s, t, method) -> dict[str, Tensor]:
    size, mask = len(s.bev), class_masks(ctx).sum(1, keepdim=True)
    lidar = adapted(ctx, method.terms[1], s.lidar_bev, ctx.grid.shape)
    out = {
        "intra_modal": ((s.camera_bev[:, 0] - t.camera_bev[:, 0]) ** 2).mean(),
        "fusion": ((s.bev - t.bev) ** 2).mean(),
        "cross_modal": ((mask * lidar - mask * t.lidar_bev) ** 2).mean(),
    }
    scores = boxes = torch.zeros((), dtype=torch.float64)
    for b, rows in enumerate(samples(ctx)):
        for k in range(10):
            p, q = (f.predictions.heatmap[b, k].sigmoid() for f in (s, t))
            loss = -(q * p.log() + (1 - q) * (1 - p).log()) * (p - q) ** 2
            scores = scores + loss.sum() / max(1, int((q > 0.1).sum())) / size
        for task in range(6):
            mine = [c for label, box in rows if TASK_OF[label] == task and (c := centre(box, ctx.grid))]
            for i, j in mine:
                for k in range(10):
                    ours, theirs = (f.predictions.regression[b, 10 * task + k, i, j] for f in (s, t))
                    d = (ours - theirs).abs() * (0.2 if k > 7 else 1.0)
                    boxes = boxes + (d * d * 4.5 if d < 1 / 9 else d - 1 / 18) / len(mine) / size
    return out | {"prediction_class": scores, "prediction_box": boxes}


def labeldistill_loops(ctx: Context, s, t, method) -> dict[str, Tensor]:
    truth, out, labels = class_masks(ctx), {}, changed(ctx.labels, Tensor.double)
    for term in method.terms[:4]:
        level, third = int(term.name[-1]), term.channels.index
        source = (labels if term.name.startswith("label") else t).stages[level]
        if level:
            width = s.stages[1].shape[1] // 3
            part = s.stages[1][:, third * width : (third + 1) * width]
        else:
            width = s.camera_bev_aligned.shape[2] // 3
            part = torch.cat([f[:, third * width : (third + 1) * width] for f in s.camera_bev_aligned.unbind(1)], 1)
        size = tuple(source.shape[-2:])
        ours, mask = adapted(ctx, term, part, size), truth.sum(1)
        mask = mask if tuple(mask.shape[1:]) == size else resized(mask, size, True)
        mask = (mask > 0).double() if term.name.startswith("label") else mask
        out[term.name] = (mask * ((ours - source) ** 2).sum(1)).sum() / max(1.0, float(mask.sum()))
    p, q = (probability(f.predictions.heatmap) for f in (s, t))
    scores = boxes = torch.zeros((), dtype=torch.float64)
    for task, classes in enumerate(TASKS):
        k = list(classes)
        target = q[:, k] * truth[:, k]
        ones = truth[:, k] == 1
        pulls = ones * target * (1 - p[:, k]) ** 2 * -p[:, k].log()
        loss = pulls + (1 - target) ** 4 * p[:, k] ** 2 * -(1 - p[:, k]).log()
        scores = scores + loss.sum() / max(1, int(ones.sum()))
        places = [(b, *c) for b, rows in enumerate(samples(ctx)) for label, box in rows
                  if label in classes and (c := centre(box, ctx.grid))]  # fmt: skip
        for b, i, j in places:
            ours, theirs = (f.predictions.regression[b, 10 * task : 10 * task + 10, i, j] for f in (s, t))
            boxes = boxes + 0.25 * (ours - theirs).abs().sum() / len(places)
    return out | {"response_heatmap": scores, "response_box": boxes}


LOOPS = {
    "unidistill": unidistill_loops,
    "distillbev": distillbev_loops,
    "simdistill": simdistill_loops,
    "labeldistill": labeldistill_loops,
}


def of_any_size(name: str, seed: int, batch: int, grid: BEVGrid, coarse: bool = False):
    """Features of both sides and of a label encoder; DistillBEV's and LabelDistill's student has coarser maps.

    Args:
        name: of the method.
        seed: of everything.
        batch: number of samples.
        grid: of the maps.
        coarse: the teacher's second stage is as coarse as the student's.
    """
    student, teacher, labels = (maps(seed + i, batch, grid, fires=-3.5) for i in range(3))
    if name in ("distillbev", "labeldistill") and not coarse:
        fine = BEVGrid(grid.x, grid.y, grid.cell / 2)
        second = [maps(seed + 9 + i, batch, fine).stages[1] for i in range(2)]  # as many cells as the grid
        teacher, labels = (replace(f, stages=(f.stages[0], m)) for f, m in zip((teacher, labels), second, strict=True))
    if name == "distillbev":
        student = replace(student, neck=maps(seed + 20, batch, grid.strided(2)).neck)
    return student, *(changed(f, Tensor.detach) for f in (teacher, labels))


@pytest.mark.parametrize("grid", GRIDS, ids=("6x8", "10x8"))
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NAMES)
def test_terms_and_gradients_match_loops_in_double(name, seed, grid):
    method, boxes = unit(method_of(name)), some_boxes(seed + 50, (4, 0, 2), grid)
    if name == "distillbev":
        method = unit(_every_position())
    student, teacher, labels = of_any_size(name, 100 * seed, 3, grid, coarse=seed == 1)
    adapters = {a.name: a for a in method.adapters}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = _modules(method, student, teacher, labels)
    ctx = Context(student, teacher, boxes, grid, labels, adapters=adapters, modules=modules)
    results = run_terms(method, ctx)
    ours, theirs = (changed(f, lambda t: t.detach().double()) for f in (student, teacher))
    ours = changed(ours, lambda t: t.requires_grad_())
    expected = LOOPS[name.split()[0]](ctx, ours, theirs, method)
    assert set(results) == set(expected)
    for term, value in expected.items():
        torch.testing.assert_close(results[term].value.double(), value, rtol=2e-5, atol=1e-6, msg=term)
        assert value > 0, term
    found = torch.autograd.grad(total(results), leaves(student), materialize_grads=True)
    wanted = torch.autograd.grad(sum(expected.values()), leaves(ours), materialize_grads=True)
    for mine, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=1e-3, atol=1e-5 * max(1.0, float(want.abs().max())))


def _every_position():
    from kdlab.distill.distillbev import distillbev

    return distillbev(false_positives=("B1", "B2", "H"))


def _modules(method, student, teacher, labels) -> dict:
    """Adapters of the widths that their terms meet, in eval mode."""
    found = {}
    for term in method.active:
        if term.adapter and term.adapter not in found:
            probe = Context(student, teacher, some_boxes(0, (0,)), GRIDS[0], labels)
            width = probe.student_tensor(replace(term, adapter=None)).shape[1]
            adapter = next(a for a in method.adapters if a.name == term.adapter)
            found[term.adapter] = adapter.build(width, probe.teacher_tensor(term).shape[1]).eval()
    return found


@pytest.mark.parametrize("exchange", [False, True])
@pytest.mark.parametrize("size", [(3, 5), (4, 1), (6, 6)])
def test_readings_have_the_gradient_of_their_loops(size, exchange):
    g = torch.Generator().manual_seed(size[0])
    image = torch.randn(2, 3, *size, generator=g, dtype=torch.float64, requires_grad=True)
    uv = torch.rand(2, 4, 6, 2, generator=g, dtype=torch.float64) * 9 - 2
    uv[0, 0] = torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.0, 1.5], [size[1] - 0.5, size[0] - 0.5], [-0.5, 1], [99, 2]])
    found = read_points(image, uv, exchange)
    rows = []
    for b, m, k in ((b, m, k) for b in range(2) for m in range(4) for k in range(6)):
        u, v = uv[b, m, k].tolist()
        at = (v * size[1] / size[0], u * size[0] / size[1]) if exchange else (u, v)
        rows.append(read(image[b], *at))
    wanted = torch.stack(rows).view(2, 4, 6, 3)
    torch.testing.assert_close(found, wanted)
    pull = torch.randn(found.shape, generator=g, dtype=torch.float64)
    (mine,), (want,) = (torch.autograd.grad((x * pull).sum(), image) for x in (found, wanted))
    torch.testing.assert_close(mine, want)


def test_heat_maps_that_are_coarser_than_a_position():
    """The teacher's heat map has half the cells: false positives are repeated, or the greatest is taken."""
    grid = GRIDS[0]
    method = unit(_every_position()).only(["false_positive_H"])
    student, teacher, labels = of_any_size("labeldistill", 7, 2, grid)
    task = maps(3, 2, grid.strided(2), fires=-3.5).predictions.tasks[0]
    teacher = replace(teacher, predictions=Predictions((changed(task, Tensor.detach),)))
    boxes = some_boxes(0, (0, 0), grid)
    modules = _modules(method, student, teacher, labels)
    ctx = Context(student, teacher, boxes, grid, adapters={a.name: a for a in method.adapters}, modules=modules)
    found = run_terms(method, ctx)["false_positive_H"].map() > 0
    fires = probability(task.heatmap).amax(1) > 0.1
    assert fires.any() and not fires.all()
    for b, i, j in ((b, i, j) for b in range(2) for i in range(6) for j in range(8)):
        assert found[b, i, j] == fires[b, i // 2, j // 2]
