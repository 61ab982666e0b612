"""Pictures of where methods distil: Gaussian masks and the nine points of each box."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from kdlab.config import HeadConfig
from kdlab.distill.places import TermResult
from kdlab.distill.regions import nine_points
from kdlab.geometry import BEVGrid
from kdlab.models.targets import targets
from kdlab.sample import CLASSES, Boxes3D
from kdlab.view.sight.masks import mask_of
from kdlab.view.style import (
    BELOW,
    TRUTH,
    array,
    bev_axes,
    bev_boxes_on,
    bev_image,
    colour_bar,
    kept,
    new_figure,
    owner,
    points_on,
    robust_norm,
    symmetric_norm,
)

POINT = "#CC79A7"
"""Colour of the nine points."""


def nine_points_on(ax: Axes, boxes: Boxes3D, size: float = 10.0) -> None:
    """Draw UniDistill's nine points of each box: corners, centre and the middles of the sides."""
    values, _ = kept(boxes, 0.0)
    if len(values):
        x, y = array(nine_points(values).flatten(0, 1)).T
        ax.scatter(y, x, s=size, color=POINT, edgecolors="black", linewidths=0.4, zorder=6, label="nine points")


def window_at_nearest(boxes: Boxes3D, grid: BEVGrid, reach: float = 8.0) -> BEVGrid:
    """A window of about 2 x ``reach`` metres around the vehicle nearest to the ego, or any box where there is none."""
    values, labels = kept(boxes, 0.0)
    cells = max(2, round(reach / grid.cell))
    if len(values):
        distance = values[:, :2].norm(dim=-1) + 1e3 * (labels > CLASSES.index("trailer"))
        centre = values[distance.argmin(), :2]
    else:
        centre = torch.zeros(2)
    column, row, _ = (int(v) for v in grid.locate(centre))
    x, y = grid.x[0] + column * grid.cell, grid.y[0] + row * grid.cell
    span = cells * grid.cell
    return BEVGrid((x - span, x + span), (y - span, y + span), grid.cell)


def masks(
    points: Tensor,
    boxes: Boxes3D,
    grid: BEVGrid,
    overlap: float = 0.7,
    min_radius: int = 0,
    head: HeadConfig | None = None,
) -> Figure:
    """Where UniDistill compares teacher and student: the targets' Gaussians, its narrow mask, the nine points close up.

    Args:
        points: LiDAR points [P, 3+] in the key ego frame.
        boxes: annotations of the sample.
        grid: of the masks.
        overlap: IoU that sizes UniDistill's mask.
        min_radius: least radius of it, cells.
        head: of the detector whose targets are shown beside it; the default one where left out.
    """
    figure = new_figure(12.4, 5.4)
    axes = figure.subplots(1, 3)
    narrow = mask_of(boxes, grid, overlap, min_radius)
    panels = (
        (
            targets(Boxes3D.pad([boxes]), grid, head or HeadConfig()).heatmap[0].amax(0),
            "foreground of the detection targets",
        ),
        (narrow, "UniDistill's response mask"),
    )
    norm = Normalize(0.0, 1.0)
    for ax, (mask, title) in zip(axes[:2], panels, strict=True):
        shown = bev_image(ax, array(mask), grid, norm=norm, cmap="cividis")
        bev_axes(ax, grid, title)
        bev_boxes_on(ax, boxes, "white", linewidths=0.6)
    window = window_at_nearest(boxes, grid)
    bev_image(axes[2], array(narrow), grid, norm=norm, cmap="Blues", alpha=0.5)
    points_on(axes[2], points, window, size=4.0)
    bev_boxes_on(axes[2], boxes, TRUTH, linewidths=1.6)
    nine_points_on(axes[2], boxes, size=22)
    bev_axes(axes[2], window, "nine points of a box, close up")
    axes[2].set_facecolor("white")
    if axes[2].get_legend_handles_labels()[0]:
        axes[2].legend(loc="upper right", fontsize=8)
    colour_bar(list(axes[:2]), shown, "weight of a cell", extend="neither", **BELOW)
    return figure


def term_map(
    values: Tensor,
    grid: BEVGrid,
    name: str = "",
    boxes: Boxes3D | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Where a distillation term's loss comes from: its map over the ground, which sums to the term's value.

    Args:
        values: [H, W], the loss that falls on each cell (`result.map()` of one sample).
        grid: the map's grid.
        name: of the term.
        boxes: outlines to draw on top.
        ax: where to draw; default: a new figure.

    Raises:
        ValueError: the map has not two dimensions.
    """
    loss = array(values)
    if loss.ndim != 2:
        raise ValueError(f"term_map: needs [H, W], got {loss.shape}; take one sample's map")
    below = {} if ax is None else BELOW
    ax = new_figure(7.6, 6.3).subplots() if ax is None else ax
    signed = bool((loss[np.isfinite(loss)] < 0).any())  # a gradient map
    norm = symmetric_norm(loss, 99.5) if signed else robust_norm(loss[loss > 0], np.zeros(1), low=0, high=99.5)
    shown = bev_image(ax, loss, grid, norm=norm, cmap="RdBu_r" if signed else "inferno")
    bev_axes(ax, grid, f"{name}: sum {np.nansum(loss):.4g}".removeprefix(": "))
    colour_bar(ax, shown, "loss per cell", **below)
    if boxes is not None:
        bev_boxes_on(ax, boxes, "white", linewidths=0.6)
    return owner(ax)


def term_maps(results: Mapping[str, TermResult], boxes: Boxes3D | None = None, item: int = 0) -> Figure:
    """Where the loss of each term of a method comes from, one map per term, each with its own scale.

    Args:
        results: of one step, by term name (what a `Distiller` returns).
        boxes: outlines to draw on top.
        item: place of the sample in the batch.
    """
    across = min(2, max(1, len(results)))
    down = max(1, -(-len(results) // across))
    figure = new_figure(5.0 * across, 5.2 * down)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax in axes[len(results) :]:
        ax.set_axis_off()
    for ax, (name, result) in zip(axes, results.items(), strict=False):
        term_map(result.map()[item], result.grid, name, boxes, ax)
    return figure
