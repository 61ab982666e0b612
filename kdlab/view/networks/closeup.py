"""A small part of the ground, large: what one cell of the explorer shows, as a figure."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from kdlab.geometry import BEVGrid
from kdlab.view.sight.data import Sight
from kdlab.view.sight.layers import Layer
from kdlab.view.style import (
    Boxes,
    bev_axes,
    bev_boxes_on,
    bev_image,
    box_legend,
    colour_bar,
    colour_of,
    new_figure,
    points_on,
)

DASHES = {"teacher": "dashed", "student": "dotted"}


def close_up(
    sight: Sight, place: tuple[float, float], layers: Sequence[Layer], reach: float = 12.0, min_score: float = 0.3
) -> Figure:
    """LiDAR points and layers around a place, with the boxes of truth, teacher and student.

    Args:
        sight: whose points and boxes are drawn.
        place: x and y in the key ego frame, metres; a cross marks it.
        layers: maps over the sight's ground, see `kdlab.view.sight.layers`.
        reach: how far to look to each side, metres.
        min_score: detections below are left out.
    """
    boxes: dict[str, Boxes] = {"truth": sight.sample.boxes, **sight.detections}
    figure = new_figure(3.5 * (len(layers) + 1), 4.9)
    axes = list(figure.subplots(1, len(layers) + 1, squeeze=False)[0])
    points_on(axes[0], sight.sample.points, sight.grid)
    axes[0].set_title(f"{len(sight.sample.points)} LiDAR points", fontsize=10)
    for ax, layer in zip(axes[1:], layers, strict=True):
        _layer_on(ax, layer, sight.grid)
    for ax in axes:
        title = ax.get_title()
        bev_axes(ax, sight.grid, ego=abs(place[0]) < reach and abs(place[1]) < reach)
        ax.set_title(title, fontsize=10)
        ax.set(xlim=(place[1] + reach, place[1] - reach), ylim=(place[0] - reach, place[0] + reach))
        for index, (name, items) in enumerate(boxes.items()):
            halo = [withStroke(linewidth=3.0, foreground="white", alpha=0.8)]
            style = {"linewidths": 1.6, "linestyles": DASHES.get(name, "solid"), "path_effects": halo, "zorder": 5}
            bev_boxes_on(ax, items, colour_of(name, index), min_score, **style)
        ax.plot(place[1], place[0], "+", color="black", markersize=11, markeredgewidth=2.6, zorder=8)
        ax.plot(place[1], place[0], "+", color="white", markersize=10, markeredgewidth=1.2, zorder=9)
    for ax in axes[1:]:
        ax.set_ylabel("")
    figure.suptitle(f"{sight.sample.scene}, around x {place[0]:+.1f} m, y {place[1]:+.1f} m", fontsize=11)
    handles = box_legend(boxes, min_score)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _layer_on(ax: Axes, layer: Layer, grid: BEVGrid) -> None:
    """A layer with its colour bar."""
    ax.set_title(layer.title, fontsize=10)
    if layer.values.ndim == 3:
        bev_image(ax, layer.values, grid)
        return
    palette = {"greys": "Greys"}.get(layer.palette, layer.palette)
    shown = bev_image(ax, layer.values, grid, norm=Normalize(layer.low, layer.high), cmap=palette)
    colour_bar(ax, shown, layer.unit, orientation="horizontal", extend="neither")
