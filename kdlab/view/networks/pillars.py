"""Pictures of the LiDAR branch: points in pillars, what is known of each point, and the map of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from kdlab.geometry import BEVGrid
from kdlab.models.lidar import group_points
from kdlab.sample import Boxes3D, Features
from kdlab.view.sensors.sensing import window
from kdlab.view.sight.maps import Reduction, principal, reduce_channels, stage_map
from kdlab.view.style import (
    STUDENT,
    TEACHER,
    TRUTH,
    array,
    bev_axes,
    bev_boxes_on,
    bev_image,
    colour_bar,
    new_figure,
    points_on,
    robust_norm,
)


def points_per_cell(points: Tensor, grid: BEVGrid, z: tuple[float, float]) -> Tensor:
    """How many points [P, 3+] each pillar holds, int64 [H, W]; those outside the grid or the z range do not count."""
    groups = group_points(points, torch.zeros(len(points), dtype=torch.long), grid, z)
    counts = groups.counts.new_zeros(grid.height * grid.width)
    return counts.index_copy_(0, groups.cell, groups.counts).view(grid.shape)


def pillars(points: Tensor, grid: BEVGrid, z: tuple[float, float], boxes: Boxes3D, centre: Tensor) -> Figure:
    """Points per pillar, a close-up with the pillars' borders, and one pillar from the side with what the net is told.

    The last panel shows the fullest pillar of those that hold points more than half a metre above the ground.

    Args:
        points: [P, 5] in the key ego frame.
        grid: of the pillars.
        z: lowest and highest z that count, metres.
        boxes: annotations.
        centre: of the close-up (x, y), metres.
    """
    counts = points_per_cell(points, grid, z)
    figure = new_figure(13.0, 4.8)
    whole, close, one = figure.subplots(1, 3, width_ratios=(1.15, 1, 0.9))
    shown = np.where(array(counts) > 0, array(counts), np.nan)
    image = bev_image(whole, shown, grid, norm=LogNorm(1, max(2.0, float(counts.max()))), cmap="viridis")
    whole.set_facecolor("white")
    filled = float((counts > 0).float().mean())
    bev_axes(whole, grid, f"points per pillar: {100 * filled:.0f} % hold any")
    colour_bar(whole, image, "points", extend="neither")
    area = window(centre, 6.0)
    points_on(close, points, area, size=6)
    for (low, high), lines in ((grid.x, close.axhline), (grid.y, close.axvline)):
        for place in np.arange(low, high + grid.cell / 2, grid.cell):
            lines(place, color="#BBBBBB", linewidth=0.6, zorder=0)
    bev_boxes_on(close, boxes, TRUTH, linewidths=1.6)
    bev_axes(close, area, f"close-up: pillars of {grid.cell:g} m", ego=False)
    corner = _fullest(points, grid, z, area)
    close.add_patch(
        Rectangle((corner[1], corner[0]), grid.cell, grid.cell, fill=False, color=STUDENT, lw=2.2, zorder=7)
    )
    _one_pillar(one, points, grid, corner, z)
    return figure


def _fullest(points: Tensor, grid: BEVGrid, z: tuple[float, float], area: BEVGrid) -> tuple[float, float]:
    """Lower corner (x, y) of the fullest pillar within an area, points near the ground left out."""
    high = points[(points[:, 2] > 0.5) & area.locate(points[:, :2])[2]]
    counts = points_per_cell(high, grid, z)
    row, column = divmod(int(counts.argmax()), grid.width)
    return grid.x[0] + column * grid.cell, grid.y[0] + row * grid.cell


def _one_pillar(ax: Axes, points: Tensor, grid: BEVGrid, corner: tuple[float, float], z: tuple[float, float]) -> None:
    """One pillar's points from the side, their mean, and offsets of one of them."""
    x, y = corner
    inside = (points[:, 0] >= x) & (points[:, 0] < x + grid.cell) & (points[:, 1] >= y) & (points[:, 1] < y + grid.cell)
    cloud = array(points[inside & (points[:, 2] >= z[0]) & (points[:, 2] < z[1])])
    ax.set(xlabel="x, forward (m)", ylabel="z, up (m)", xlim=(x - 0.5, x + grid.cell + 0.5))
    ax.axvspan(x, x + grid.cell, color=STUDENT, alpha=0.08)
    ax.axvline(x + grid.cell / 2, color=STUDENT, linestyle="--", linewidth=1.2, label="the pillar's middle")
    ax.set_title(f"one pillar from the side: {len(cloud)} points", fontsize=11)
    if not len(cloud):
        return
    old = cloud[:, 4] > 0
    ax.scatter(cloud[old, 0], cloud[old, 2], s=14, facecolors="none", edgecolors="#777777", label="older sweep")
    ax.scatter(cloud[~old, 0], cloud[~old, 2], s=14, color="black", linewidths=0, label="key sweep")
    mean = cloud[:, :3].mean(0)
    ax.plot(mean[0], mean[2], "X", color=TEACHER, markersize=11, markeredgecolor="white", label="mean of its points")
    far = cloud[np.abs(cloud[:, 0] - mean[0]).argmax()]
    arrow: dict[str, Any] = {"arrowstyle": "-|>", "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (far[0], far[2]), (mean[0], mean[2]), arrowprops={**arrow, "color": TEACHER})
    ax.annotate("", (far[0], far[2]), (x + grid.cell / 2, far[2]), arrowprops={**arrow, "color": STUDENT})
    ax.legend(fontsize=7, loc="upper left")
    ax.set_ylim(min(-0.3, cloud[:, 2].min() - 0.2), max(cloud[:, 2].max() * 1.45, 1.5))


def stage_maps(
    features: Features,
    grid: BEVGrid,
    stages: Sequence[str],
    how: Reduction | int = "norm",
    boxes: Boxes3D | None = None,
    item: int = 0,
) -> Figure:
    """The map of several stages of one detector side by side, each on its own colour scale.

    Args:
        features: of one forward pass.
        grid: the area of the maps (a stage of any stride covers it).
        stages: see `kdlab.view.sight.maps.stage_map`; of "heatmap" the likeliest class of each cell is shown.
        how: "norm" or "mean" over channels, "pca" (three main directions as RGB), or a channel's index.
        boxes: outlines to draw on top.
        item: place of the sample in the batch.

    Raises:
        ValueError: no such stage or channel.
    """
    across = min(3, len(stages))
    down = -(-len(stages) // across)
    figure = new_figure(4.3 * across, 4.5 * down)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax in axes[len(stages) :]:
        ax.set_axis_off()
    for ax, stage in zip(axes, stages, strict=False):
        maps = stage_map(features, stage, item)
        title = f"{stage}: {len(maps)} channels, {maps.shape[1]} × {maps.shape[2]} cells"
        if stage == "heatmap":
            image = bev_image(ax, array(maps.amax(0)), grid, vmin=0, vmax=1, cmap="inferno")
            colour_bar(ax, image, "probability", extend="neither", orientation="horizontal")
        elif how == "pca":
            bev_image(ax, array(principal(maps)[0]), grid)
        else:
            values = reduce_channels(maps, how)
            image = bev_image(ax, values, grid, norm=robust_norm(values), cmap="viridis")
            what = f"channel {how}" if isinstance(how, int) else f"{how} over channels"
            colour_bar(ax, image, what, orientation="horizontal")
        bev_axes(ax, grid, title)
        ax.title.set_fontsize(10)
        if boxes is not None:
            bev_boxes_on(ax, boxes, "white", linewidths=0.7)
    return figure
