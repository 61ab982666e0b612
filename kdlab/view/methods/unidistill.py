"""What UniDistill computes on its way, drawn: the nine points of each box and their relations.

The pictures call the functions of `kdlab.distill` that the losses call, on what one sample gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from kdlab.distill import unidistill
from kdlab.distill.places import Points
from kdlab.distill.terms import cosine_relation, read_points
from kdlab.sample import CLASSES
from kdlab.view.methods.regions import POINT, window_at_nearest
from kdlab.view.methods.shared import norm_map, on_map, terms_of
from kdlab.view.style import BELOW, TRUTH, array, bev_axes, bev_boxes_on, colour_bar, new_figure, points_on, robust_norm

if TYPE_CHECKING:
    from kdlab.view.sight import Observer, Sight

NINE = ("rear right", "rear left", "front left", "front right", "centre", "rear", "left", "front", "right")
"""UniDistill's nine points in their order."""


def crucial_points(sight: Sight, observer: Observer) -> Figure:
    """UniDistill's nine points of each box on the maps that the feature term reads, and each point's share of the loss.

    Where the quirk ``unidistill.transpose_points`` is on, the places that are read lie elsewhere than the points.

    Args:
        sight: what the observer saw.
        observer: with a method that has UniDistill's feature term.

    Raises:
        ValueError: it has none.
    """
    context, terms = terms_of(sight, observer, unidistill.feature, "crucial points")
    term, result = terms[0], sight.results[terms[0].name]
    student, teacher = context.pair(term)
    grid = context.grid_of(student)
    uv = unidistill.box_points(context, student)[0].flatten(0, 1)
    assert isinstance(result.places, Points)
    read, loss = (array(v) for v in (grid.to_metres(result.places.uv[0]), result.errors[0]))
    figure = new_figure(13.0, 5.4)
    axes = list(figure.subplots(1, 3))
    norm = robust_norm(norm_map(student), norm_map(teacher))
    for ax, maps, side in ((axes[0], teacher, "teacher"), (axes[1], student, "student")):
        path = term.teacher if side == "teacher" else term.student
        shown = on_map(ax, sight, norm_map(maps), grid, f"{path} and the points", norm=norm, cmap="viridis")
        _places(ax, array(grid.to_metres(uv)), read, unidistill.exchanged(context))
    colour_bar(axes[:2], shown, "norm over channels", **BELOW)
    axes[0].legend(loc="upper right", fontsize=8, framealpha=0.9, markerscale=4).set_zorder(8)
    _close_points(axes[2], sight, read, loss)
    return figure


def _places(ax: Axes, points: Any, read: Any, exchanged: bool) -> None:
    ax.scatter(points[:, 1], points[:, 0], s=4, color=POINT, linewidths=0, label="nine points of each box", zorder=6)
    if exchanged:
        ax.scatter(
            read[:, 1], read[:, 0], s=5, color="#E69F00", linewidths=0, label="where the maps are read", zorder=6
        )


def _close_points(ax: Axes, sight: Sight, read: Any, loss: Any) -> None:
    window = window_at_nearest(sight.sample.boxes, sight.grid)
    points_on(ax, sight.sample.points, window, size=3.0)
    bev_boxes_on(ax, sight.sample.boxes, TRUTH, linewidths=1.6)
    norm = robust_norm(loss[loss > 0], np.zeros(1), low=0)
    style: dict[str, Any] = {"cmap": "magma_r", "norm": norm, "edgecolors": "black", "linewidths": 0.5, "zorder": 6}
    dots = ax.scatter(read[:, 1], read[:, 0], s=70, c=loss, **style)
    bev_axes(ax, window, "loss of each point, close up")
    colour_bar(ax, dots, "loss that falls on the point", **{**BELOW, "extend": "max"})


def relation_matrices(sight: Sight, observer: Observer, boxes: Sequence[int] | None = None) -> Figure:
    """UniDistill's 9 x 9 cosine relations within boxes: the teacher's, the student's, and their difference.

    Args:
        sight: what the observer saw.
        observer: with a method that has UniDistill's relation term.
        boxes: rows of the sight's boxes in range; the three with the greatest loss where left out.

    Raises:
        ValueError: it has none, or there is no such box.
    """
    context, terms = terms_of(sight, observer, unidistill.relation, "relation matrices")
    term = terms[0]
    student, teacher = context.pair(term)
    uv, swap = unidistill.box_points(context, student), unidistill.exchanged(context)
    theirs, ours = (array(cosine_relation(read_points(maps, uv, swap))[0]) for maps in (teacher, student))
    loss = array(sight.results[term.name].errors[0]).reshape(-1, 81).sum(1)
    counted = int(context.boxes.valid[0].sum())
    chosen = list(np.argsort(-loss[:counted])[:3]) if boxes is None else list(boxes)
    if not chosen or not all(0 <= box < counted for box in chosen):
        raise ValueError(f"relation matrices: there are {counted} boxes in range, not {chosen or 'any'}")
    figure = new_figure(10.0, 2.9 * len(chosen) + 1.4)
    axes = figure.subplots(len(chosen), 3, squeeze=False)
    norm, apart = Normalize(float(min(theirs[chosen].min(), ours[chosen].min())), 1.0), np.abs(ours - theirs)
    far = Normalize(0.0, float(apart[chosen].max()) or 1.0)
    for row, box in zip(list(axes), chosen, strict=True):
        values = context.boxes.values[0, box]
        name = CLASSES[int(context.boxes.labels[0, box])].replace("_", " ")
        place = f"{name}, {float(values[:2].norm()):.0f} m away"
        panels = ((theirs, f"teacher: {place}"), (ours, "student"), (apart, f"|difference|, loss {loss[box]:.2g}"))
        for ax, (matrices, title) in zip(row, panels, strict=True):
            style = {"norm": far, "cmap": "magma"} if matrices is apart else {"norm": norm, "cmap": "viridis"}
            shown = ax.imshow(matrices[box], **style)
            _nine_ticks(ax, title, left=ax is row[0], below=box == chosen[-1])
    left = axes[0, 0].images[0]
    colour_bar(
        list(axes[:, :2].ravel()), left, f"cosine of two points' vectors in {term.student.split('.')[1]}", **BELOW
    )
    colour_bar(list(axes[:, 2]), shown, "|difference| of the cosines", **BELOW)
    return figure


def _nine_ticks(ax: Axes, title: str, left: bool, below: bool) -> None:
    """Names of the nine points beside the leftmost matrices and below the lowest."""
    ax.set_title(title, fontsize=10)
    ax.set_xticks(range(9), NINE if below else [""] * 9, fontsize=7, rotation=90)
    ax.set_yticks(range(9), NINE if left else [""] * 9, fontsize=7)
