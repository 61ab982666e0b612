"""The figure of a method, drawn from what one sample gives: both networks' maps in order, an arrow for each term.

Nothing here knows a paper: rows and columns come from the tensors that the method's terms name.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from kdlab.distill import Method, Part, TensorPath, Term
from kdlab.geometry import BEVGrid
from kdlab.sample import CAMERAS, Features
from kdlab.view.sensors.cameras import LAYOUT
from kdlab.view.sight.data import ALL, Sight
from kdlab.view.style import (
    GREY,
    OTHERS,
    STUDENT,
    TEACHER,
    TRUTH,
    Array,
    array,
    bev_boxes_on,
    bev_image,
    draw_ego,
    points_on,
    robust_norm,
)

if TYPE_CHECKING:
    from kdlab.view.sight import Observer

WIDTH, THUMB, LINE = 12.0, 1.22, 0.135
"""Inches: the figure's width, the side of a map, the height of a line of small text."""

ROWS = {"teacher": TEACHER, "student": STUDENT, "labels": TRUTH}
"""Rows from top to bottom and their colours."""

COLOURS = (*OTHERS[:4], "#882255", "#44AA99", "#999933")
"""Of terms."""

ORDER = ("input", "camera_bev", "lidar_bev", "bev", "stages", "neck", "heatmap", "regression")
"""Columns from left to right."""


def method_diagram(sight: Sight, observer: Observer) -> Figure:
    """A method as a figure: the teacher's maps, the student's, those of a label encoder; an arrow per term.

    Beside an arrow stand the term's name, its weight (the paper's times the preset's scale) and its loss in this
    sample. Maps that no term names are left out between the sensors and the predictions. Maps of one column share one
    colour scale, whose ends stand below it.

    Args:
        sight: what the observer saw.
        observer: with teacher, student and method.

    Raises:
        ValueError: the observer has no method, or the sight no terms.
    """
    method = observer.method
    if method is None or not sight.results:
        raise ValueError(
            "method_diagram needs a method between two networks: give the Observer teacher, student, method"
        )
    plan = _Plan.of(sight, method)
    figure = Figure(figsize=(WIDTH, plan.height), dpi=100)
    board = figure.add_axes((0, 0, 1, 1))
    board.set(xlim=(0, WIDTH), ylim=(0, plan.height))
    board.set_axis_off()
    _draw_maps(figure, board, sight, plan)
    for group in plan.groups:
        _draw_group(board, sight, plan, group)
    _draw_words(board, sight, method, plan)
    return figure


@dataclass
class _Group:
    """Terms that compare the same two tensors.

    Attributes:
        source: row and column of the source's map.
        target: row and column of the student's map.
        terms: the terms.
        lines: what stands on the arrows.
    """

    source: tuple[str, str]
    target: tuple[str, str]
    terms: list[Term] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass
class _Plan:
    """Where everything goes, in inches from the lower left corner.

    Attributes:
        columns: centres of the columns, left to right.
        rows: centres of the rows.
        maps: picture [h, w] of each row and column that has one; none for the inputs.
        titles: name and width of each map.
        groups: of terms.
        colours: of the terms, by name.
        height: of the figure.
    """

    columns: dict[str, float]
    rows: dict[str, float]
    maps: dict[tuple[str, str], Array]
    titles: dict[tuple[str, str], str]
    groups: list[_Group]
    colours: dict[str, str]
    height: float

    @classmethod
    def of(cls, sight: Sight, method: Method) -> _Plan:
        terms = [term for term in method.active if term.name in sight.results]
        stems = list(dict.fromkeys(_stem(term.name) for term in terms))
        colours = {term.name: COLOURS[stems.index(_stem(term.name)) % len(COLOURS)] for term in terms}
        groups = _groups(sight, method, terms)
        named = {place for group in groups for place in (group.source, group.target)}
        wanted = {"input", "bev", "heatmap"} | {column for _, column in named}
        maps, titles = {}, {}
        for row, features in sight.features.items():
            for column in wanted - {"input"}:
                found = _picture(features, column)
                if found is not None and (row != "labels" or (row, column) in named):
                    maps[row, column], titles[row, column] = found
        used = {column for _, column in maps} | {"input"}
        ordered = sorted(used, key=_order)
        pitch = WIDTH / len(ordered)
        columns = {column: (index + 0.5) * pitch for index, column in enumerate(ordered)}
        tall = {row: max([1.0, *(_height(g) for g in groups if g.source[0] == row)]) for row in ("teacher", "labels")}
        rows, y = {}, 0.75
        if sight.labels is not None:
            rows["labels"] = y + THUMB / 2
            y += THUMB + tall["labels"] + 0.85
        rows["student"] = y + THUMB / 2
        y += THUMB + tall["teacher"] + 0.85
        rows["teacher"] = y + THUMB / 2
        return cls(columns, rows, maps, titles, groups, colours, y + THUMB + 0.35)

    def place(self, at: tuple[str, str]) -> tuple[float, float]:
        """Centre of a row and column's map."""
        return self.columns[at[1]], self.rows[at[0]]


def _order(column: str) -> tuple[int, int]:
    name, _, index = column.partition("[")
    return ORDER.index(name), int(index[:-1]) if index else 0


def _stem(name: str) -> str:
    """A term's name without its position: ``foreground_H`` and ``foreground_B1`` share a colour."""
    return re.sub(r"_[A-Z]?\d*$", "", name)


def _column(text: str, features: Features) -> tuple[str, str]:
    """Row and column of a tensor path."""
    path = TensorPath.parse(text)
    if path.name == "stages" and path.index is not None:
        return path.side, f"stages[{path.index if path.index < 0 else path.index - len(features.stages)}]"
    names = {
        "camera_bev_aligned": "camera_bev",
        "predictions": path.part or "heatmap",
        "image": "input",
        "depth": "input",
    }
    return path.side, names.get(path.name, path.name)


def _groups(sight: Sight, method: Method, terms: list[Term]) -> list[_Group]:
    found: dict[Any, _Group] = {}
    for term in terms:
        student = sight.features["student"]
        target = _column(term.student, student)
        side = TensorPath.parse(term.teacher).side if term.teacher else "student"
        source = _column(term.teacher, sight.features[side]) if term.teacher else target
        key = (source, target, repr(term.channels), term.adapter)
        group = found.setdefault(key, _Group(source, target))
        group.terms.append(term)
    adapters = {adapter.name: adapter for adapter in method.adapters}
    for group in found.values():
        for term in group.terms:
            weight = f"{term.weight:.3g}" + (f" × {term.scale:.3g}" if term.scale != 1 else "")
            group.lines += [term.name, f"weight {weight}", f"loss {sight.value(term.name):.3g}"]
        first = group.terms[0]
        if isinstance(first.channels, Part):
            group.lines.append(f"channels: part {first.channels.index + 1} of {first.channels.of}")
        if first.adapter:
            group.lines += textwrap.wrap(f"student adapted: {adapters[first.adapter].what}", 27)
    return list(found.values())


def _height(group: _Group) -> float:
    return len(group.lines) * LINE + 0.45


def _picture(features: Features, column: str) -> tuple[Array, str] | None:
    """A column's map as a picture, and its title; None where the features have none."""
    name, _, index = column.partition("[")
    if name in ("heatmap", "regression"):
        if features.predictions is None:
            return None
        maps = features.predictions.heatmap.sigmoid() if name == "heatmap" else features.predictions.regression
        picture = maps[0].amax(0) if name == "heatmap" else maps[0].norm(dim=0)
        return array(picture), "heat map" if name == "heatmap" else "box maps"
    value: Any = getattr(features, name)
    if name == "stages":
        place = int(index[:-1])
        value = value[place] if len(value) >= -place else None
        name = f"stages[{len(features.stages) + place}]"
    if value is None:
        return None
    maps = value[0, 0] if value.ndim == 5 else value[0]
    return array(maps.norm(dim=0)), f"{name}, {maps.shape[0]} channels"


def _draw_maps(figure: Figure, board: Axes, sight: Sight, plan: _Plan) -> None:
    scales = {}
    for column in plan.columns:
        pictures = [picture for (_, other), picture in plan.maps.items() if other == column]
        if pictures:
            scales[column] = Normalize(0, 1) if column == "heatmap" else robust_norm(*pictures)
    for row, y in plan.rows.items():
        ends = [plan.columns[c] for c in plan.columns if c == "input" or (row, c) in plan.maps]
        for left, right in pairwise(ends):
            _arrow(board, (left + THUMB / 2 + 0.04, y), (right - THUMB / 2 - 0.04, y), "#777777")
        for column, x in plan.columns.items():
            if column != "input" and (row, column) not in plan.maps:
                continue
            ax = figure.add_axes(
                (((x - THUMB / 2) / WIDTH), (y - THUMB / 2) / plan.height, THUMB / WIDTH, THUMB / plan.height), zorder=2
            )
            if column == "input":
                title = _draw_input(figure, ax, sight, row)
            else:
                picture, title = plan.maps[row, column], plan.titles[row, column]
                grid = BEVGrid(sight.grid.x, sight.grid.y, (sight.grid.x[1] - sight.grid.x[0]) / picture.shape[1])
                bev_image(ax, picture, grid, norm=scales[column], cmap="inferno" if column == "heatmap" else "viridis")
                _bare(ax, sight.grid)
            board.text(x, y - THUMB / 2 - 0.13, title, ha="center", va="center", fontsize=8)
            for spine in ax.spines.values():
                spine.set(edgecolor=ROWS[row], linewidth=2.0, visible=True)
    lowest = {column: min(plan.rows[r] for r, c in plan.maps if c == column) for column in scales}
    for column, norm in scales.items():
        text = f"{'score' if column == 'heatmap' else 'norm'} {norm.vmin:.3g} (dark) to {norm.vmax:.3g}"
        y = lowest[column] - THUMB / 2 - 0.29
        board.text(plan.columns[column], y, text, ha="center", va="center", fontsize=7, color="#555555")


def _bare(ax: Axes, grid: BEVGrid) -> None:
    ax.set(xlim=(grid.y[1], grid.y[0]), ylim=(grid.x[0], grid.x[1]), xticks=[], yticks=[])
    draw_ego(ax, grid)


def _draw_input(figure: Figure, ax: Axes, sight: Sight, row: str) -> str:
    """What a row's network is given: its points, six images, or annotations; returns its title."""
    features = sight.features[row]
    if row == "labels":
        bev_boxes_on(ax, sight.sample.boxes, TRUTH, linewidths=1.0)
        _bare(ax, sight.grid)
        return "annotations"
    has_images = features.image is not None
    has_points = features.lidar_bev is not None and (row == "teacher" or not has_images)
    if has_points:
        points_on(ax, sight.sample.points, sight.grid, size=0.25)
    _bare(ax, sight.grid)
    if not has_images:
        return "LiDAR points"
    images = [sight.sample.images[0, CAMERAS.index(name)].permute(1, 2, 0).cpu().numpy() for name in LAYOUT]
    rows = 3 if not has_points else 2  # nearly square alone, flat below the points
    mosaic = np.concatenate([np.concatenate(images[i :: 6 // rows], 0) for i in range(6 // rows)], 1)
    if not has_points:
        for patch in list(ax.patches):
            patch.remove()
        ax.imshow(mosaic, aspect="auto", interpolation="bilinear")
        ax.set(xlim=(0, mosaic.shape[1]), ylim=(mosaic.shape[0], 0))
        return "six images"
    inset = ax.inset_axes((0.0, 0.0, 1.0, 0.42))
    inset.imshow(mosaic, aspect="auto", interpolation="bilinear")
    inset.set(xticks=[], yticks=[])
    return "LiDAR points, six images"


def _arrow(board: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, **style: Any) -> None:
    how = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0, **style}
    board.add_patch(FancyArrowPatch(start, end, color=colour, zorder=1, **how))


def _draw_group(board: Axes, sight: Sight, plan: _Plan, group: _Group) -> None:
    """Arrows of some terms from source to student, and their words on them."""
    (x0, y0), (x1, y1) = plan.place(group.source), plan.place(group.target)
    side = 1 if y0 > y1 else -1
    start = y0 - side * (THUMB / 2 + (0.25 if side > 0 else 0.06))  # titles stand below a map
    end = y1 + side * (THUMB / 2 + (0.06 if side > 0 else 0.42))
    for index, term in enumerate(group.terms):
        shift = (index - (len(group.terms) - 1) / 2) * 0.11
        ends = (x0 + shift, start), (x1 + shift, end)
        _arrow(board, *ends, plan.colours[term.name], linewidth=2.0, mutation_scale=12)
    high, width = len(group.lines) * LINE, min(WIDTH / len(plan.columns) - 0.08, 1.68)
    middle = (start + end) / 2 if x0 == x1 else end + side * (high / 2 + 0.2)
    corner = (x1 - width / 2, middle - high / 2 - 0.03)
    style: dict[str, Any] = {"boxstyle": "round,pad=0.0,rounding_size=0.06", "facecolor": "white", "edgecolor": GREY}
    board.add_patch(FancyBboxPatch(corner, width, high + 0.06, zorder=3, **style))
    for index, text in enumerate(group.lines):
        y = middle + high / 2 - (index + 0.5) * LINE
        head = text in plan.colours
        board.text(x1, y, text, ha="center", va="center", fontsize=7.5, zorder=4, weight="bold" if head else "normal")
        if head:
            board.plot([corner[0] + 0.09], [y], "s", color=plan.colours[text], markersize=6, zorder=4)
    for path in dict.fromkeys(path for term in group.terms for path in term.reads):
        x, y = plan.place(_column(path, sight.features[TensorPath.parse(path).side]))
        ends = (x, y - THUMB / 2 - 0.25), (corner[0] + width, middle)
        _arrow(board, *ends, "#777777", linestyle=":", connectionstyle="angle,angleA=90,angleB=0")


def _draw_words(board: Axes, sight: Sight, method: Method, plan: _Plan) -> None:
    left = min(plan.columns.values()) - THUMB / 2
    for row, y in plan.rows.items():
        name = {"teacher": "TEACHER, frozen", "student": "STUDENT, trained", "labels": "LABEL ENCODER, frozen"}[row]
        board.text(left, y + THUMB / 2 + 0.1, name, fontsize=9, weight="bold", color=ROWS[row], va="center")
    x, reads = sight.grid.x, any(term.reads for group in plan.groups for term in group.terms)
    first = (
        f"{method.name}: loss of all terms in this sample {sight.value(ALL):.3g}.",
        f"Maps seen from above, x (forward) up from {x[0]:g} to {x[1]:g} m, y to the left; the arrow: ego vehicle.",
    )
    second = (
        "Weight: the paper's × this preset's scale.",
        *(["Dotted: a map that terms read besides."] if reads else []),
        *(f"Before training the student's {s.module} is copied from the teacher." for s in method.start),
        *(f"Trained first: {s.name.replace('_', ' ')}." for s in method.stages),
    )
    text = f"{' '.join(first)}\n{' '.join(second)}"
    board.text(left, 0.2, text, fontsize=8, va="center", linespacing=1.3)
