"""Pictures of time: a past frame before and after its own motion is taken out; depth nets compared."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kdlab.geometry import BEVGrid, transform
from kdlab.models.lift import align
from kdlab.sample import Boxes3D, Sample
from kdlab.view.networks.lifting import NEAR_FAR, LiftSteps, depth_bar, over_image, strengths
from kdlab.view.sensors.sensing import title_of, window
from kdlab.view.sight.maps import cosine_map
from kdlab.view.style import (
    GREY,
    OTHERS,
    STUDENT,
    TRUTH,
    Array,
    array,
    bev_axes,
    bev_boxes_on,
    bev_image,
    colour_bar,
    new_figure,
)

PAST = OTHERS[1]
"""Colour of what was measured in the past frame."""


def aligned_points(
    key: Sample, past: Sample, key_from_past: Tensor, places: Mapping[str, tuple[Tensor, float]]
) -> Figure:
    """Points of two frames over each other, as they are and with the vehicle's own motion taken out, at some places.

    Args:
        key: the key frame's sample.
        past: the past frame's sample, in its own ego frame.
        key_from_past: [4, 4].
        places: by name the centre (x, y) and the reach of a close-up, metres.
    """
    now, then = (s.points[(s.points[:, 4] == 0) & (s.points[:, 2] > 0.25), :3] for s in (key, past))
    panels = {"as measured": then, "own motion taken out": transform(key_from_past, then)}
    figure = new_figure(4.6 * len(places) + 0.6, 8.8)
    axes = figure.subplots(2, len(places), squeeze=False)
    for row, (title, cloud) in zip(axes, panels.items(), strict=True):
        for ax, (name, (centre, reach)) in zip(row, places.items(), strict=True):
            area = window(centre, reach)
            for points, colour, label in ((cloud, PAST, "past frame"), (now, "black", "key frame")):
                near = points[area.locate(points[:, :2])[2]]
                ax.scatter(near[:, 1], near[:, 0], s=9, color=colour, linewidths=0, label=label)
            bev_boxes_on(ax, key.boxes, TRUTH, linewidths=1.5)
            bev_axes(ax, area, f"{name}: {title}", ego=False)
    axes[0, 0].legend(loc="upper left", fontsize=8)
    return figure


def aligned_maps(key: Tensor, past: Tensor, key_from_past: Tensor, grid: BEVGrid, boxes: Boxes3D) -> Figure:
    """BEV maps of two frames: key, past as it is, past aligned; below, how alike each is to the key's.

    Args:
        key: [C, H, W] of the key frame.
        past: [C, H, W] of the past frame, in its own ego frame.
        key_from_past: [4, 4].
        grid: of both.
        boxes: annotations of the key frame.
    """
    moved = align(past[None], key_from_past[None], grid)[0]
    maps = {"key frame": key, "past frame, as it is": past, "past frame, aligned": moved}
    norms = {name: array(values.norm(dim=0)) for name, values in maps.items()}
    norm = strengths(norms["key frame"])
    figure = new_figure(12.6, 8.6)
    axes = figure.subplots(2, 3)
    for ax, (name, values) in zip(axes[0], norms.items(), strict=True):
        shown = bev_image(ax, values, grid, norm=norm, cmap="viridis")
        bev_axes(ax, grid, name)
        bev_boxes_on(ax, boxes, "white", linewidths=0.7)
    colour_bar(list(axes[0]), shown, "norm over channels")
    for ax, name in zip(axes[1, 1:], list(maps)[1:], strict=True):
        likeness = bev_image(ax, array(cosine_map(key, maps[name])), grid, vmin=-1, vmax=1, cmap="PuOr")
        bev_axes(ax, grid, f"{name.removeprefix('past frame, ')}: cosine to the key map")
        bev_boxes_on(ax, boxes, "black", linewidths=0.7)
    colour_bar(list(axes[1, 1:]), likeness, "cosine (grey: one map is all zero)", extend="neither")
    _likeness(axes[1, 0], key, {"as it is": past, "aligned": moved}, grid, boxes)
    return figure


def likeness(key: Tensor, other: Tensor, grid: BEVGrid, boxes: Boxes3D, still: bool) -> float:
    """Mean cosine similarity of two maps [C, H, W] at the centres of boxes that stand still, or of those that move.

    A box moves from 0.5 m/s on. NaN where there is no such box on the grid.
    """
    speed = boxes.values[:, 7:9].norm(dim=-1)
    column, row, inside = grid.locate(boxes.values[:, :2])
    chosen = inside & boxes.valid & ((speed < 0.5) if still else (speed >= 0.5))
    found: Tensor = cosine_map(key, other)[row[chosen], column[chosen]]
    return float(found.nanmean()) if bool(found.isfinite().any()) else float("nan")


def _likeness(ax: Axes, key: Tensor, others: Mapping[str, Tensor], grid: BEVGrid, boxes: Boxes3D) -> None:
    kinds = {"standing": True, "moving": False}
    for place, (name, other) in enumerate(others.items()):
        values = [likeness(key, other, grid, boxes, still) for still in kinds.values()]
        bars = ax.bar(
            np.arange(2) + 0.4 * place - 0.2, np.nan_to_num(values), 0.38, color=(GREY, STUDENT)[place], label=name
        )
        ax.bar_label(bars, [f"{v:.2f}" if np.isfinite(v) else "none" for v in values], fontsize=9)
    ax.set_xticks(range(2), [f"{kind} objects" for kind in kinds])
    ax.set(ylabel="mean cosine at their centres", ylim=(min(0, ax.get_ylim()[0]), 1.15))
    ax.set_title("past map against key map", fontsize=11)
    ax.legend(fontsize=8, loc="upper center", ncols=2)


def depth_errors(expected: Tensor, measured: Tensor, within: float) -> tuple[Array, Array]:
    """Measured and expected depths of the pixels that the LiDAR knows up to ``within`` metres, float [n] each."""
    known = (measured > 0) & (measured < within)
    return array(measured[known]), array(expected[known])


def depth_nets(nets: Mapping[str, LiftSteps], sample: Sample, measured: Tensor, camera: int = 0) -> Figure:
    """Expected depth of several depth nets in one camera, and against the LiDAR's in all cameras.

    Args:
        nets: lift steps of the sample by the net's name; all of one size.
        sample: with images as they are stored.
        measured: LiDAR depths [N, h, w], 0 where there is none.
        camera: place in CAMERAS.
    """
    figure = new_figure(3.6 * (len(nets) + 1) + 0.6, 5.6)
    axes = figure.subplots(2, len(nets) + 1, height_ratios=(0.45, 1))
    first = next(iter(nets.values()))
    over_image(axes[0, 0], sample, first, camera)
    known, reach = array(measured[camera]), first.frustum.depth[1]
    depths = np.where(known > 0, known, np.nan)
    shown = over_image(axes[1, 0], sample, first, camera, depths, norm=NEAR_FAR, cmap="viridis_r")
    axes[1, 0].set_title(f"LiDAR ({title_of(camera)})", fontsize=10)
    for (image, scatter), (name, steps) in zip(axes[:, 1:].T, nets.items(), strict=True):
        over_image(image, sample, steps, camera, array(steps.expected()[camera]), norm=NEAR_FAR, cmap="viridis_r")
        image.set_title(f"{name}: expected depth", fontsize=10)
        true, seen = depth_errors(steps.expected(), measured, reach)
        scatter.plot([0, reach], [0, reach], "--", color="black", linewidth=1)
        scatter.scatter(true, seen, s=4, alpha=0.4, color=STUDENT, linewidths=0)
        error = float(np.abs(true - seen).mean()) if len(true) else float("nan")
        scatter.set(xlim=(0, reach), ylim=(0, reach), xlabel="LiDAR (m)", ylabel="expected (m)", aspect="equal")
        scatter.set_title(f"mean error {error:.1f} m", fontsize=10)
    axes[1, 0].set_anchor("N")
    depth_bar(list(axes[0]), shown)
    return figure
