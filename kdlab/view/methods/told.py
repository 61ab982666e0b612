"""What LabelDistill's labels tell: how they are painted, what a head finds in them, what LiDAR misses, what is learned.

The functions look through an Observer whose method has a label encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kdlab.distill import Context, TermResult, labeldistill, run_terms
from kdlab.geometry import BEVGrid
from kdlab.models.labels import LabelDetector
from kdlab.models.labels import label_maps as maps_of_labels
from kdlab.sample import Boxes3D, Detections, to_device
from kdlab.view.sight.before_after import found_score
from kdlab.view.style import (
    OTHERS,
    STUDENT,
    TEACHER,
    TRUTH,
    array,
    bev_axes,
    bev_boxes_on,
    bev_image,
    box_legend,
    new_figure,
    points_on,
)

if TYPE_CHECKING:
    from kdlab.view.sight import Observer, Sight

EDGES = (1, 2, 4, 8, 16, 64)
"""Where a group of objects begins, in LiDAR points; the last one is open."""


def fit_adapters(
    observer: Observer, sights: Sequence[Sight], steps: int, lr: float = 3e-3, seed: int = 0
) -> dict[str, list[float]]:
    """Train the observer's adapters on LabelDistill's feature terms; the student and all else stay as they are.

    So it tells how much of a source's features can be read off the student's part of the channels. Sights that the
    observer made before know nothing of it: look again afterwards.

    Args:
        observer: with LabelDistill's feature terms; its adapters change.
        sights: what it saw of some training samples.
        steps: optimiser steps, one sight each.
        lr: of AdamW.
        seed: of the sights' order.

    Returns:
        Weighted loss of each feature term, by name, at each step.

    Raises:
        ValueError: it has no such term, or there is nothing to learn from.
    """
    distiller, names = observer.distiller, _feature_terms(observer)
    if distiller is None or not names or not sights:
        raise ValueError("fit_adapters: needs sights, and an Observer whose method has LabelDistill's feature terms")
    method, contexts = distiller.method.only(names), [_still(sight) for sight in sights]
    optimizer = torch.optim.AdamW(distiller.adapters.parameters(), lr)
    random = np.random.default_rng(seed)
    order: list[int] = []
    losses: dict[str, list[float]] = {name: [] for name in names}
    distiller.train()
    try:
        for _ in range(steps):
            order = order or random.permutation(len(contexts)).tolist()
            results = run_terms(method, replace(contexts[order.pop()], _made={}))
            optimizer.zero_grad(set_to_none=True)
            torch.stack([result.value for result in results.values()]).sum().backward()
            optimizer.step()
            for name, result in results.items():
                losses[name].append(float(result.value.detach()))
    finally:
        distiller.eval()
        distiller.zero_grad(set_to_none=True)
    return losses


def feature_losses(observer: Observer, sights: Sequence[Sight]) -> dict[str, float]:
    """Mean weighted loss of each of LabelDistill's feature terms over some samples, with the adapters of now.

    Args:
        observer: with these terms.
        sights: what it saw, at any time.

    Raises:
        ValueError: it has no such term, or there are no sights.
    """
    distiller, names = observer.distiller, _feature_terms(observer)
    if distiller is None or not names or not sights:
        raise ValueError("feature_losses: needs sights, and an Observer whose method has LabelDistill's feature terms")
    found: list[dict[str, TermResult]] = []
    with torch.no_grad():
        found = [run_terms(distiller.method.only(names), _still(sight)) for sight in sights]
    return {name: float(np.mean([float(results[name].value) for results in found])) for name in names}


def _feature_terms(observer: Observer) -> list[str]:
    method = observer.method
    return [t.name for t in method.active if t.function is labeldistill.feature] if method is not None else []


def _still(sight: Sight) -> Context:
    """What the terms of a sight look at, cut off from the student's graph; nothing made from it is kept."""
    context = sight.graph().context
    assert sight.student is not None
    student = to_device(replace(sight.student, lift=None), context.boxes.values.device, False)
    return replace(context, student=student, _made={})


@torch.no_grad()
def find_labels(sight: Sight, observer: Observer) -> Detections:
    """The boxes that the teacher's neck and head find in the encoded annotations of a sample: the encoder's gate.

    Raises:
        ValueError: the observer has no label encoder.
    """
    if observer.labels is None or observer.teacher is None:
        raise ValueError("no label encoder here: look with an Observer of a student that LabelDistill trained")
    detector = LabelDetector(observer.labels, observer.teacher).eval()
    found = detector.predict(detector(sight.batch.to(observer.device)))[0]
    return Detections(found.values.cpu(), found.labels.cpu(), found.scores.cpu())


def gate(sight: Sight, observer: Observer, min_score: float = 0.3) -> Figure:
    """The same neck and head given LiDAR, and given encoded annotations: what they find, beside the truth.

    Args:
        sight: what the observer saw.
        observer: with a label encoder.
        min_score: of the boxes drawn.

    Raises:
        ValueError: it has none.
    """
    told = find_labels(sight, observer)
    figure = new_figure(12.5, 6.6)
    for ax, found, title in zip(
        figure.subplots(1, 2),
        (sight.detections["teacher"], told),
        ("neck and head on the LiDAR's features", "the same neck and head on encoded annotations"),
        strict=True,
    ):
        points_on(ax, sight.sample.points, sight.grid)
        sets: dict[str, Boxes3D | Detections] = {"truth": sight.sample.boxes, "teacher": found}
        bev_boxes_on(ax, sight.sample.boxes, TRUTH, linewidths=2.2)
        bev_boxes_on(ax, found, TEACHER, min_score)
        bev_axes(ax, sight.grid, title)
        handles = box_legend(sets, min_score)
        handles[1].set_label(str(handles[1].get_label()).replace("teacher", "found"))
        ax.legend(handles=handles, loc="upper right", fontsize=8, framealpha=0.9).set_zorder(8)
    return figure


def by_points(sights: Sequence[Sight], observer: Observer) -> Figure:
    """What LiDAR points in an object do to its score and to the features at its centre, of LiDAR and of labels.

    Objects are grouped by the points that the annotations count. A score is the best one of a found box of the
    object's class within two metres, 0 where there is none.

    Args:
        sights: what the observer saw.
        observer: with a label encoder.

    Raises:
        ValueError: it has none, or no object lies on the grid.
    """
    rows = np.concatenate([_objects(sight, observer) for sight in sights])
    if not len(rows):
        raise ValueError("by_points: no annotated object lies on the grid")
    group = np.searchsorted(np.array(EDGES), rows[:, 0], side="right") - 1
    names = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in pairwise(EDGES)]
    names.append(f"{EDGES[-1]}+")
    there = [i for i in range(len(EDGES)) if (group == i).any()]
    figure = new_figure(12.5, 4.4)
    axes = figure.subplots(1, 2)
    lines = (("told the annotations", 1, OTHERS[0], "s"), ("LiDAR teacher", 2, TEACHER, "o"))
    for label, column, colour, marker in (*lines, ("camera student", 3, STUDENT, "^")):
        _means(axes[0], rows[:, column], group, there, label, colour, marker)
    for (_, column, colour, marker), label in zip(lines, ("labels.stages[0]", "teacher.stages[0]"), strict=True):
        _means(axes[1], rows[:, column + 3], group, there, label, colour, marker)
    counts = [f"{names[i]}\n({int((group == i).sum())})" for i in there]
    for ax, title in zip(axes, ("score of the object", "feature's norm at the object's centre"), strict=True):
        ax.set_xticks(range(len(there)), counts)
        ax.set(xlabel="LiDAR points in the object (number of objects)", title=title)
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=8, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _means(ax: Axes, values: Any, group: Any, there: list[int], label: str, colour: str, marker: str) -> None:
    """Mean of each group with its standard error; a group of one has none."""
    parts = [values[group == i] for i in there]
    error = [p.std(ddof=1) / np.sqrt(len(p)) if len(p) > 1 else np.nan for p in parts]
    style: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 3, "label": label}
    ax.errorbar(range(len(there)), [p.mean() for p in parts], error, **style)


def _objects(sight: Sight, observer: Observer) -> Any:
    """Rows: points; scores told, of teacher, of student; norms of labels' and teacher's first stage. [M, 6]."""
    told, boxes = find_labels(sight, observer), sight.sample.boxes
    columns, lines, inside = sight.grid.locate(boxes.values[:, :2])
    assert sight.labels is not None and sight.teacher is not None
    stages = [features.stages[0][0] for features in (sight.labels, sight.teacher)]
    found = (told, sight.detections["teacher"], sight.detections["student"])
    rows = []
    for i in torch.nonzero(inside & boxes.valid & (boxes.points >= EDGES[0])).flatten().tolist():
        scores = [np.nan_to_num(found_score(f, boxes[i : i + 1])) for f in found]
        norms = [_at(stage, sight.grid, int(columns[i]), int(lines[i])) for stage in stages]
        rows.append([float(boxes.points[i]), *scores, *norms])
    return np.array(rows).reshape(-1, 6)


def _at(stage: Tensor, grid: BEVGrid, column: int, row: int) -> float:
    """Norm over channels of a stage [C, h, w], of any stride, where a cell lies."""
    height, width = stage.shape[-2:]
    return float(stage[:, row * height // grid.height, column * width // grid.width].norm())


def footprints(sight: Sight, cell: float = 0.8, reach: float = 12.0) -> Figure:
    """Which cells have a label near the vehicle, as intended and as the released code paints, and which centres do.

    Args:
        sight: its boxes are drawn; no network is needed.
        cell: side of the cells, metres; the paper's by default.
        reach: half side of the window, metres; the counts are of the whole grid.
    """
    whole, boxes = BEVGrid(sight.grid.x, sight.grid.y, cell), sight.batch.boxes
    shown = boxes.values[0][boxes.valid[0]]
    columns, rows, inside = whole.locate(shown[:, :2])
    centre = _crowded(shown[inside, :2], reach)
    figure = new_figure(12.5, 6.6)
    for ax, released in zip(figure.subplots(1, 2), (False, True), strict=True):
        mask = array(maps_of_labels(boxes, whole, released=released).mask[0])
        filled = mask[array(rows[inside]), array(columns[inside])]
        bev_image(ax, mask.astype(float), whole, cmap="Greys", vmin=0, vmax=2.2)
        bev_boxes_on(ax, sight.sample.boxes, TRUTH, linewidths=1.8)
        for kind, colour, marker in ((filled, "black", "o"), (~filled, "#D55E00", "X")):
            xy = array(shown[inside, :2])[kind]
            name = "centres with a label" if kind is filled else "centres left empty"
            label = f"{name}: {int(kind.sum())}"
            ax.scatter(xy[:, 1], xy[:, 0], s=46, color=colour, marker=marker, edgecolors="white", zorder=6, label=label)
        name = "released: half the length and width" if released else "intended: the footprint, its centre at least"
        bev_axes(ax, whole, f"{name}, {int(mask.sum())} cells", ego=False)
        ax.set_xticks(np.arange(whole.height + 1) * cell + whole.y[0], minor=True)
        ax.set_yticks(np.arange(whole.width + 1) * cell + whole.x[0], minor=True)
        ax.grid(which="minor", color="#CCCCCC", linewidth=0.5)
        ax.tick_params(which="minor", length=0)
        ax.set(xlim=(centre[1] + reach, centre[1] - reach), ylim=(centre[0] - reach, centre[0] + reach))
        ax.legend(loc="upper right", fontsize=8, framealpha=0.9).set_zorder(8)
    return figure


def _crowded(xy: Tensor, reach: float) -> tuple[float, float]:
    """The middle of those objects [M, 2] that one has within reach, of the one with most; the vehicle without any."""
    if not len(xy):
        return 0.0, 0.0
    near = (xy[:, None] - xy[None]).abs().amax(-1) < reach
    x, y = xy[near[near.sum(1).argmax()]].mean(0).tolist()
    return x, y
