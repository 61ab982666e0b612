"""Depth as the camera sees it: the distribution of one pixel, and expected depths beside what the LiDAR measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from kdlab.data.depth import depth_targets
from kdlab.sample import CAMERAS
from kdlab.view.sensors.cameras import LAYOUT
from kdlab.view.sensors.sensing import seen_extent, title_of
from kdlab.view.style import STUDENT, TRUTH, Array, array, colour_of, new_figure

if TYPE_CHECKING:
    from kdlab.view.sight import Sight

Bins = tuple[float, float, float]
"""Lower bound, upper bound and width of depth bins, metres (`CameraConfig.depth`)."""


def bin_centres(bins: Bins) -> Array:
    """Middles of the depth bins, metres."""
    low, high, step = bins
    return low + step * (np.arange(round((high - low) / step)) + 0.5)


def bins_of(sight: Sight) -> Bins:
    """The depth bins of the sight's lift.

    Raises:
        ValueError: neither side has a lift.
    """
    if sight.depth_bins is None:
        raise ValueError("no depths: neither student nor teacher has cameras here")
    return sight.depth_bins


def depth_of(sight: Sight, bins: Bins, side: str = "student") -> Tensor:
    """Depth probabilities of the key frame's cameras [N, D, h, w].

    Raises:
        ValueError: this side has no depth net, or another number of bins.
    """
    features = getattr(sight, side)
    if features is None or features.depth is None:
        raise ValueError(f"no depths: there is no {side} with a depth net here (a LiDAR detector has none)")
    found: Tensor = features.depth[0, 0].detach().float().cpu()
    if found.shape[1] != len(bin_centres(bins)):
        raise ValueError(f"bins {bins} are {len(bin_centres(bins))}, but the depth net has {found.shape[1]}")
    return found


def lidar_depth(sight: Sight, cells: tuple[int, int]) -> Tensor:
    """Nearest depth of the key sweep's points in each of h x w feature cells of the key images [N, h, w]; 0: none."""
    batch, size = sight.batch, (int(sight.batch.images.shape[-2]), int(sight.batch.images.shape[-1]))
    seen = batch.image_from_camera[0, 0], batch.frame_from_camera[0, 0]
    return depth_targets(sight.sample.points, *seen, size, size[0] // cells[0])


def extent_of(sight: Sight, camera: int) -> tuple[float, float, float, float]:
    """Where the network's image, often a crop, lies in the stored one: left, right, bottom, top in its pixels."""
    stored_from_seen = sight.sample.image_from_camera[0, camera] @ torch.linalg.inv(
        sight.batch.image_from_camera[0, 0, camera]
    )
    height, width = sight.batch.images.shape[-2:]
    return seen_extent(stored_from_seen, height, width)


def cell_at(sight: Sight, camera: int, u: float, v: float, cells: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the feature cell that holds a pixel of the stored image.

    Raises:
        ValueError: the pixel lies outside what the network sees of the image.
    """
    left, right, bottom, top = extent_of(sight, camera)
    row, column = (v - top) / (bottom - top) * cells[0], (u - left) / (right - left) * cells[1]
    if not (0 <= row < cells[0] and 0 <= column < cells[1]):
        seen = f"u in [{left:.0f}, {right:.0f}) and v in [{top:.0f}, {bottom:.0f})"
        raise ValueError(f"pixel ({u:g}, {v:g}) is not in what the network sees of {CAMERAS[camera]}: {seen}")
    return int(row), int(column)


def _image_on(ax: Axes, sight: Sight, camera: int) -> None:
    image = sight.sample.images[0, camera].permute(1, 2, 0).cpu().numpy()
    ax.imshow(image, extent=(0, image.shape[1], image.shape[0], 0), interpolation="bilinear")
    ax.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0), xticks=[], yticks=[])
    ax.set_title(title_of(camera), fontsize=10)


def pixel_depth(
    sight: Sight, camera: int | str, u: float, v: float, bins: Bins | None = None, side: str = "student"
) -> Figure:
    """One pixel and how far away the depth net believes it to be, beside the LiDAR's depth where a point fell.

    Args:
        sight: of a side with cameras.
        camera: its place in CAMERAS, or its name there.
        u: column of the stored image, pixels.
        v: row.
        bins: of the depth net; those of the sight's config where left out.
        side: "student" or "teacher".

    Raises:
        ValueError: no such camera, a pixel that the network does not see, or see `depth_of`.
    """
    index = CAMERAS.index(camera) if isinstance(camera, str) else camera
    bins = bins or bins_of(sight)
    chances = depth_of(sight, bins, side)
    height, width = chances.shape[-2:]
    row, column = cell_at(sight, index, u, v, (height, width))
    measured = float(lidar_depth(sight, (height, width))[index, row, column])
    figure = new_figure(12.0, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1.0])
    _image_on(left, sight, index)
    x0, x1, y1, y0 = extent_of(sight, index)
    wide, high = (x1 - x0) / width, (y1 - y0) / height
    for colour, line in (("white", 3.5), (STUDENT, 1.8)):
        box = Rectangle((x0 + column * wide, y0 + row * high), wide, high, fill=False, edgecolor=colour, linewidth=line)
        left.add_patch(box)
    _bars(right, array(chances[index, :, row, column]), bins, measured, colour_of(side))
    right.set_title(f"depth of the feature cell with pixel ({u:.0f}, {v:.0f})", fontsize=10)
    return figure


def _bars(ax: Axes, chances: Array, bins: Bins, measured: float, colour: str) -> None:
    centres = bin_centres(bins)
    ax.bar(centres, chances, width=bins[2], color=colour, label="probability of each bin")
    mean = float((centres * chances).sum())
    ax.axvline(mean, color="black", linestyle="--", label=f"expected depth, {mean:.1f} m")
    if measured:
        ax.axvline(measured, color=TRUTH, linewidth=2.5, label=f"LiDAR, {measured:.1f} m")
    else:
        ax.plot([], [], " ", label="no LiDAR point fell into this cell")
    ax.set(xlabel="depth along the camera's axis (m)", ylabel="probability", xlim=bins[:2])
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)


def expected_depth(sight: Sight, bins: Bins | None = None, side: str = "student") -> Figure:
    """Expected depth in the six cameras above what the LiDAR measured there, all on one scale of metres.

    Args:
        sight: of a side with cameras.
        bins: of the depth net; those of the sight's config where left out.
        side: "student" or "teacher".

    Raises:
        ValueError: see `depth_of`.
    """
    bins = bins or bins_of(sight)
    chances = depth_of(sight, bins, side)
    expected = array(torch.einsum("d,ndhw->nhw", torch.from_numpy(bin_centres(bins)).float(), chances))
    measured = array(lidar_depth(sight, (chances.shape[-2], chances.shape[-1])))
    measured = np.where(measured > 0, measured, np.nan)
    norm = LogNorm(bins[0], bins[1])
    left, right, bottom, top = extent_of(sight, 0)
    figure = new_figure(12.0, 6 * (3.6 * (bottom - top) / (right - left) + 0.32) + 0.5)
    axes = figure.subplots(6, 3)
    for place, name in enumerate(LAYOUT):
        camera, (block, column) = CAMERAS.index(name), divmod(place, 3)
        rows = axes[3 * block : 3 * block + 3, column]
        _image_on(rows[0], sight, camera)
        for ax, values, what in ((rows[1], expected, "expected depth"), (rows[2], measured, "LiDAR")):
            _image_on(ax, sight, camera)
            ax.images[0].set_alpha(0.25)
            shown = ax.imshow(values[camera], extent=extent_of(sight, camera), norm=norm, cmap="viridis_r")
            ax.set_title(f"{title_of(camera)}: {what}", fontsize=9)
        left, right, bottom, top = extent_of(sight, camera)
        for ax in rows:
            ax.set(xlim=(left, right), ylim=(bottom, top))
    label = "depth along the camera's axis (m)"
    metre_ticks(figure.colorbar(shown, ax=axes, label=label, fraction=0.025, extend="both"), bins)
    return figure


def metre_ticks(bar: Colorbar, bins: Bins) -> None:
    """Round metres on a logarithmic colour bar of depths."""
    ticks = [t for t in (1, 2, 5, 10, 20, 40, 60, 100) if bins[0] <= t <= bins[1]]
    bar.set_ticks(ticks, labels=[str(t) for t in ticks])
    bar.minorticks_off()
