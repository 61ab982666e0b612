"""What methods compute on their way, drawn: UniDistill's points and relations, DistillBEV's regions and attention.

Each picture calls the functions of `kdlab.distill` that the losses call, on what one sample gives. For SimDistill and
LabelDistill see `kdlab.view.geometry_compensation` and `kdlab.view.labels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from kdlab.distill import Context, Term, distillbev, unidistill
from kdlab.distill.places import Points
from kdlab.distill.terms import cell_attention, cosine_relation, read_points
from kdlab.geometry import BEVGrid
from kdlab.models.deformable import GeometryCompensation
from kdlab.sample import CLASSES
from kdlab.view.bev import points_on
from kdlab.view.regions import POINT, close_up
from kdlab.view.style import TRUTH, array, bev_axes, bev_boxes_on, bev_image, colour_bar, new_figure, owner, robust_norm

if TYPE_CHECKING:
    from kdlab.view.sight import Observer, Sight

NINE = ("rear right", "rear left", "front left", "front right", "centre", "rear", "left", "front", "right")
"""UniDistill's nine points in their order."""

BELOW: dict[str, Any] = {"orientation": "horizontal", "fraction": 0.06}
"""A colour bar below its axes."""


def terms_of(sight: Sight, observer: Observer, function: Callable[..., Any], what: str) -> tuple[Context, list[Term]]:
    """What the terms of a sight look at, and those of the observer's method that a function computes.

    Raises:
        ValueError: the observer has no method, or one without such a term; the sight was read from a file.
    """
    if observer.method is None:
        raise ValueError(f"{what} belong to a method: look with an Observer that has teacher, student and method")
    found = [term for term in observer.method.active if term.function is function and term.name in sight.results]
    if not found:
        raise ValueError(f"{what}: the method {observer.method.name} has no such term here")
    return sight.graph().context, found


def norm_map(maps: Tensor) -> Any:
    """Norm over channels [H, W] of the first sample of maps [B, C, H, W]."""
    return array(maps[0].norm(dim=0))


def on_map(ax: Axes, sight: Sight, values: Any, grid: BEVGrid, title: str, **style: Any) -> Any:
    """Draw a map in metres with the annotated boxes in white; returns the image, for a colour bar."""
    shown = bev_image(ax, values, grid, **style)
    bev_axes(ax, grid, title)
    bev_boxes_on(ax, sight.sample.boxes, "white", linewidths=0.5)
    return shown


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
    window = close_up(sight.sample.boxes, sight.grid)
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


def regions(sight: Sight, observer: Observer, positions: Sequence[str] | None = None) -> Figure:
    """DistillBEV's regions, the scale of their cells, and the attention of teacher and adapted student.

    Args:
        sight: what the observer saw.
        observer: with DistillBEV's terms.
        positions: which of `kdlab.distill.distillbev.POSITIONS`, such as ("H",); all that the method compares by
            default.

    Raises:
        ValueError: the method does not compare there.
    """
    context, terms = terms_of(sight, observer, distillbev.regional, "regions")
    first: dict[str, Term] = {}
    for term in terms:
        first.setdefault(term.name.rpartition("_")[2], term)
    chosen = list(first) if positions is None else list(positions)
    if not chosen or not {*chosen} <= {*first}:
        raise ValueError(f"regions: positions {chosen} are not all among those of the method, {list(first)}")
    figure = new_figure(14.0, 4.5 * len(chosen))
    for part, position in zip(figure.subfigures(len(chosen), 1, squeeze=False)[:, 0], chosen, strict=True):
        _region_row(list(part.subplots(1, 4)), sight, context, first[position], position)
    return figure


def kinds_on(ax: Axes, kinds: Any, grid: BEVGrid, title: str, names: Mapping[str, str]) -> None:
    """Draw a map of whole numbers [H, W], each a kind with a name and a colour, and how many cells are of each."""
    shown = bev_image(
        ax, kinds, grid, cmap=ListedColormap(list(names.values())), norm=Normalize(-0.5, len(names) - 0.5)
    )
    bev_axes(ax, grid, title)
    texts = [f"{name}\n{int((kinds == i).sum())} cells" for i, name in enumerate(names)]
    bar = owner(ax).colorbar(shown, ax=ax, pad=0.02, **BELOW)
    bar.set_ticks(range(len(names)), labels=texts, fontsize=7)
    bar.ax.tick_params(length=0)


REGIONS = {"background": "#56B4E9", "foreground": "#E69F00", "false positive": "#000000"}
"""DistillBEV's regions and their colours."""


def _region_row(axes: list[Axes], sight: Sight, context: Context, term: Term, position: str) -> None:
    found = distillbev.regions(context, term)
    student, teacher = distillbev.strengths(context, term)
    grid = context.grid_of(student)
    kinds = array(found.foreground[0].int() + 2 * found.false_positive[0].int())
    kinds_on(axes[0], kinds, grid, f"{position}: regions", REGIONS)
    combined = "distillbev.combined_scale" in context.on
    adaptive = term.options.get("scaling", True)
    kind: tuple[distillbev.Region, ...] = ("foreground", "background", "false_positive")
    scale = array(torch.stack([found.weight(region, combined, adaptive)[0] for region in kind]).sum(0))
    low = float(scale[scale > 0].min()) if (scale > 0).any() else 0.1
    norm: Normalize = LogNorm(low, max(float(scale.max()), 10 * low))
    shown = on_map(
        axes[1], sight, np.where(scale > 0, scale, np.nan), grid, "scale of each cell", norm=norm, cmap="cividis"
    )
    colour_bar(axes[1], shown, "scale (logarithmic)", **{**BELOW, "extend": "neither"})
    temperature = term.options["temperature"]
    both = [array(cell_attention(s.detach(), temperature)[0]) for s in (teacher, student)]
    together = robust_norm(*both, low=0, high=99.5)
    for ax, values, side in zip(axes[2:], both, ("teacher", "adapted student"), strict=True):
        shown = on_map(ax, sight, values, grid, f"attention: {side}", norm=together, cmap="inferno")
    colour_bar(axes[2:], shown, "attention (its mean over cells is 1)", **{**BELOW, "extend": "max"})


def sampling_offsets(sight: Sight, observer: Observer, at: Sequence[tuple[float, float]] | None = None) -> Figure:
    """Where cells of SimDistill's simulated LiDAR map read it: the learned places of the geometry compensation.

    The student runs again on the sight's batch, and what its compensation computes on the way is taken from it.

    Args:
        sight: of a student with simulated LiDAR.
        observer: that made the sight; holds the student.
        at: places (x, y) in metres whose cells are shown; the centre of the nearest box by default, ten metres ahead
            where there is none.

    Raises:
        ValueError: the student has no geometry compensation in its BEV.
    """
    places, weights = compensation(sight, observer)
    grid = sight.grid
    if at is None:
        centres = sight.sample.boxes.values[:, :2]
        at = [(float(x), float(y)) for x, y in centres[centres.norm(dim=-1).argsort()[:1]]] or [(10.0, 0.0)]
    assert sight.student is not None and sight.student.lidar_bev is not None
    backdrop = norm_map(sight.student.lidar_bev)
    figure = new_figure(13.0, 5.6)
    left, right = figure.subplots(1, 2)
    shown = bev_image(left, backdrop, grid, norm=robust_norm(backdrop), cmap="Greys")
    bev_axes(left, grid, "places that a cell reads; size: weight")
    bev_boxes_on(left, sight.sample.boxes, TRUTH, linewidths=0.8)
    colour_bar(left, shown, "student.lidar_bev, norm over channels", **BELOW)
    columns, rows, inside = grid.locate(torch.tensor(list(at), dtype=torch.float32).reshape(-1, 2))
    for index, (column, row) in enumerate(zip(columns[inside].tolist(), rows[inside].tolist(), strict=True)):
        xy, share = (array(v[row, column].flatten(0, 1)) for v in (grid.to_metres(places), weights))
        colour = ("#D55E00", "#0072B2", "#CC79A7")[index % 3]
        x, y = grid.to_metres(torch.tensor((column + 0.5, row + 0.5))).tolist()
        left.scatter(xy[:, 1], xy[:, 0], s=1000 * share, color=colour, alpha=0.7, linewidths=0, zorder=6)
        text = f"cell at ({x:.0f}, {y:.0f}) m"
        left.scatter([y], [x], marker="s", s=40, color=colour, edgecolors="white", zorder=7, label=text)
    if inside.any():
        left.legend(loc="upper right", fontsize=8, framealpha=0.9).set_zorder(8)
    cells = grid.to_cells(grid.centres())[:, :, None, None]
    reach = ((places - cells).norm(dim=-1) * weights).sum(-1).mean(-1) * grid.cell
    shown = on_map(
        right, sight, array(reach), grid, "how far away a cell reads", norm=robust_norm(array(reach)), cmap="viridis"
    )
    colour_bar(right, shown, "weighted mean distance of the places (m)", **BELOW)
    return figure


def compensation(sight: Sight, observer: Observer) -> tuple[Tensor, Tensor]:
    """What the student's BEV compensation reads: places (column, row) [H, W, heads, points, 2], weights [..., points].

    Raises:
        ValueError: the student has none.
    """
    camera = observer.student.camera if observer.student is not None else None
    module = camera.simulated.in_bev if camera is not None and camera.simulated is not None else None
    if not isinstance(module, GeometryCompensation):
        raise ValueError("sampling offsets: this student has no geometry compensation (camera.simulated_lidar)")
    kept: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: kept.__setitem__(name, out))
        for name, layer in (("offsets", module.offsets), ("weights", module.weights))
    ]
    try:
        device = next(module.parameters()).device
        with torch.no_grad():
            observer.student.encode(observer.student.seen(sight.batch).to(device))  # type: ignore[union-attr]
    finally:
        for hook in hooks:
            hook.remove()
    shape = (*module.size, module.heads, module.points)
    cells = module.cells().view(*module.size, 1, 1, 2)
    weights = kept["weights"][0].float().cpu().view(shape).softmax(-1)
    return cells + kept["offsets"][0].float().cpu().view(*shape, 2), weights
