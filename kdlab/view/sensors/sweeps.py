"""Pictures of what happens around one instant: sweeps and ego motion, density over distance, the world's knobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kdlab.data.nuscenes import NuScenesDataset, pose_matrices
from kdlab.data.tables_json import Array
from kdlab.geometry import BEVGrid, transform
from kdlab.sample import CLASSES, Sample
from kdlab.view.sensors.cameras import camera as camera_on
from kdlab.view.sensors.sensing import title_of, window
from kdlab.view.style import (
    GREY,
    OTHERS,
    STUDENT,
    TEACHER,
    TRUTH,
    array,
    bev_axes,
    bev_boxes_on,
    colour_bar,
    new_figure,
    points_on,
)

LAGS = "cividis_r"
"""Colours of a point's age."""


@dataclass(frozen=True)
class EgoMotion:
    """Where the vehicle was at a keyframe's sweep and at those before it.

    Attributes:
        lags: float64 [S], seconds before the key sweep, 0 first.
        key_from_ego: float64 [S, 4, 4], ego frame at each sweep to the key ego frame.
    """

    lags: Array
    key_from_ego: Array


def ego_motion(dataset: NuScenesDataset, index: int, sweeps: int) -> EgoMotion:
    """The poses with which a sample's sweeps were brought to the key frame.

    Args:
        dataset: holds the tables.
        index: place of the sample in the data set.
        sweeps: how many, fewer at the start of a scene.

    Raises:
        IndexError: no such sample.
    """
    tables = dataset.tables
    key = int(np.flatnonzero(tables.sample_token == dataset.tokens[index].encode())[0])
    rows = [int(tables.sample_data[key, 0])]
    while len(rows) < sweeps and int(tables.data_previous[rows[-1]]) >= 0:
        rows.append(int(tables.data_previous[rows[-1]]))
    global_from_ego = pose_matrices(tables.pose[tables.data_pose[rows]])
    lags = (tables.data_time[rows[0]] - tables.data_time[rows]) * 1e-6
    return EgoMotion(lags, np.linalg.inv(global_from_ego[0]) @ global_from_ego)


def without_motion(points: Tensor, motion: EgoMotion) -> Tensor:
    """Points [P, 5] as they would lie if the vehicle's motion between sweeps were ignored.

    Args:
        points: of the key ego frame, all sweeps together.
        motion: of these sweeps.
    """
    stale = points.clone()
    nearest = np.abs(array(points[:, 4])[:, None] - motion.lags).argmin(1)
    for sweep, key_from_ego in enumerate(motion.key_from_ego):
        mine = torch.from_numpy(nearest == sweep)
        ego_from_key = torch.from_numpy(np.linalg.inv(key_from_ego)).to(points.dtype)
        stale[mine, :3] = transform(ego_from_key, points[mine, :3])
    return stale


def sweeps(sample: Sample, motion: EgoMotion, places: Mapping[str, tuple[Tensor, float]]) -> Figure:
    """One sweep, several with the vehicle's own motion ignored, and several with it taken out: a row for each place.

    Args:
        sample: holds the points of the sweeps.
        motion: of these sweeps.
        places: by name the centre (x, y) and the reach of a close-up, metres.
    """
    points = sample.points.cpu()
    stale = without_motion(points, motion)
    panels = {
        "one sweep": points[points[:, 4] == 0],
        f"{len(motion.lags)} sweeps, own motion ignored": stale,
        f"{len(motion.lags)} sweeps, own motion taken out": points,
    }
    figure = new_figure(12.0, 4.1 * len(places) + 0.2)
    axes = figure.subplots(len(places), 3, squeeze=False)
    for row, (name, (centre, reach)) in zip(axes, places.items(), strict=True):
        grid = window(centre, reach)
        for ax, (title, cloud) in zip(row, panels.items(), strict=True):
            cloud = cloud[grid.locate(cloud[:, :2])[2] & (cloud[:, 2] > 0.25)]  # the ground would hide the rest
            cloud = cloud[cloud[:, 4].argsort(descending=True)]  # the newest on top
            look = ax.scatter(cloud[:, 1], cloud[:, 0], c=cloud[:, 4], s=7, cmap=LAGS, linewidths=0)
            look.set_clim(0, max(float(motion.lags.max()), 0.1))
            bev_boxes_on(ax, sample.boxes, TRUTH, linewidths=1.5)
            bev_axes(ax, grid, title, ego=reach > 15)
        row[0].set_ylabel(f"{name}\nx, forward (m)")
    colour_bar(list(axes.ravel()), look, "age of a point (s)", extend="neither")
    return figure


def density(samples: Sequence[Sample], edges: Sequence[float] = (0, 10, 20, 30, 40, 50)) -> Figure:
    """How the LiDAR thins out: points in annotated boxes over distance, and how many boxes have next to none.

    Args:
        samples: whose annotations count.
        edges: of the rings, metres.
    """
    values = torch.cat([s.boxes.values[s.boxes.valid] for s in samples])
    labels = array(torch.cat([s.boxes.labels[s.boxes.valid] for s in samples]))
    inside = array(torch.cat([s.boxes.points[s.boxes.valid] for s in samples]))
    distance = array(values[:, :2].norm(dim=-1))
    figure = new_figure(12.0, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    groups = {
        "cars": [0], "large vehicles": [1, 2, 3, 4], "people and two-wheelers": [6, 7, 8], "barriers and cones": [5, 9],
    }  # fmt: skip
    for (name, kinds), colour in zip(groups.items(), (TEACHER, TRUTH, STUDENT, OTHERS[4]), strict=True):
        mine = np.isin(labels, kinds)
        left.scatter(
            distance[mine], np.maximum(inside[mine], 1), s=9, alpha=0.55, color=colour, label=name, linewidths=0
        )
    reach = np.linspace(5, max(edges), 50)
    cars = (labels == CLASSES.index("car")) & (inside > 0)
    if cars.any():
        scale = float(np.median(inside[cars] * distance[cars] ** 2))
        left.plot(reach, scale / reach**2, "k--", linewidth=1, label="1 / distance²")
    left.set(yscale="log", xlim=(0, max(edges)), xlabel="distance (m)", ylabel="LiDAR points in the box")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    _rings_on(right, distance, inside, edges)
    return figure


def _rings_on(ax: Axes, distance: Array, inside: Array, edges: Sequence[float]) -> None:
    """Boxes per ring, and those of them with few points."""
    names = [f"{lo:g}–{hi:g}" for lo, hi in pairwise(edges)]
    total = np.histogram(distance, edges)[0]
    few = np.histogram(distance[inside < 5], edges)[0]
    ax.bar(names, total, color=GREY, label="all boxes")
    bars = ax.bar(names, few, color=STUDENT, label="fewer than 5 points")
    shares = [f"{100 * f / t:.0f} %" if t else "" for f, t in zip(few, total, strict=True)]
    ax.bar_label(bars, shares, fontsize=8, padding=2)
    ax.set(xlabel="distance (m)", ylabel="annotated boxes")
    ax.legend(fontsize=8)


def knobs(samples: Mapping[str, Sample], camera: int = 0, reach: float = 40.0) -> Figure:
    """One moment under different settings of the world: an image with the true boxes, and the cloud from above.

    Args:
        samples: by the name of the setting; of one moment, so that they can be compared.
        camera: place in CAMERAS.
        reach: metres shown around the vehicle.
    """
    across = min(3, len(samples))
    down = -(-len(samples) // across)
    first = next(iter(samples.values()))
    ratio = first.images.shape[-2] / first.images.shape[-1]
    heights = (4.0 * ratio, 3.6)
    figure = new_figure(4.0 * across, (sum(heights) + 0.5) * down)
    axes = figure.subplots(2 * down, across, squeeze=False, height_ratios=heights * down)
    for ax in axes.ravel():
        ax.set_axis_off()
    grid = BEVGrid.square(reach, reach)
    for place, (name, sample) in enumerate(samples.items()):
        row, column = divmod(place, across)
        image, above = axes[2 * row, column], axes[2 * row + 1, column]
        image.set_axis_on()
        above.set_axis_on()
        camera_on(image, sample, camera, {"truth": sample.boxes}, 0.0, False)
        image.set_title(f"{name} ({title_of(camera)})", fontsize=10)
        points_on(above, sample.points, grid, size=0.7)
        bev_boxes_on(above, sample.boxes, TRUTH, linewidths=0.8)
        bev_axes(above, grid, f"{len(sample.points):,} points")
        above.set(xlabel="", ylabel="")
    return figure
