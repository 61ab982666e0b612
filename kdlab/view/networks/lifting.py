"""Lift-splat taken apart: rays, one camera's map, six cameras' sum, the pixels of a cell, and what wrong depth does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from kdlab.geometry import BEVGrid, box_corners, footprint, points_in_boxes, project, transform, unproject
from kdlab.models import Detector
from kdlab.models.camera import camera_entries
from kdlab.models.lift import Frustum, LiftIndex, lift_index, splat
from kdlab.sample import Batch, Boxes3D, Sample
from kdlab.view.sensors.cameras import camera as camera_on
from kdlab.view.sensors.sensing import seen_extent, title_of, window
from kdlab.view.style import (
    BELOW,
    STUDENT,
    TRUTH,
    Array,
    array,
    bev_axes,
    bev_boxes_on,
    bev_image,
    colour_bar,
    new_figure,
    owner,
    points_on,
)

NEAR_FAR = LogNorm(2.0, 60.0)
"""Colour scale of depths, metres."""

_HALO: list[Any] = [withStroke(linewidth=2.5, foreground="white")]


@dataclass(frozen=True)
class LiftSteps:
    """All that the lift of one sample's key frame is made of; N cameras, features of h x w cells, D depth bins.

    Attributes:
        depth: probabilities [N, D, h, w].
        context: features [N, C, h, w].
        points: where each pixel would lie at each depth, key ego frame [N, h * w, D, 3], metres.
        frustum: the sizes.
        grid: of the BEV map.
        z: lowest and highest z that count, metres.
        stored_from_seen: [N, 3, 3], pixels of the network's images to those of the stored ones.
    """

    depth: Tensor
    context: Tensor
    points: Tensor
    frustum: Frustum
    grid: BEVGrid
    z: tuple[float, float]
    stored_from_seen: Tensor

    @property
    def index(self) -> LiftIndex:
        """Which point falls into which cell."""
        return lift_index(self.points[None], self.grid, self.z)

    @property
    def middles(self) -> Tensor:
        """Middles of the depth bins [D], metres."""
        low, _, width = self.frustum.depth
        return low + width * (torch.arange(self.frustum.bins) + 0.5)

    def expected(self) -> Tensor:
        """Mean of each pixel's depth distribution [N, h, w], metres."""
        return torch.einsum("d,ndhw->nhw", self.middles, self.depth)

    def bev(self, cameras: Collection[int] | None = None) -> Tensor:
        """BEV map [C, H, W] of some cameras; of all where left out."""
        context = self.context
        if cameras is not None:
            on = torch.zeros(len(context), 1, 1, 1)
            on[list(cameras)] = 1.0
            context = context * on
        return splat(context, self.depth, self.index, 1, self.grid)[0]

    def mass(self, pixels: Tensor | None = None, depth: Tensor | None = None) -> Tensor:
        """How much probability lands in each cell [H, W].

        Args:
            pixels: bool [N, h, w], which count; all where left out.
            depth: other probabilities [N, D, h, w]; the network's where left out.
        """
        ones = torch.ones(len(self.depth), 1, *self.frustum.size) if pixels is None else pixels[:, None].float()
        return splat(ones, self.depth if depth is None else depth, self.index, 1, self.grid)[0, 0]


@torch.no_grad()
def lift_steps(detector: Detector, batch: Batch, sample: Sample) -> LiftSteps:
    """Run the camera branch on one sample's key frame and keep every part, in full precision.

    Args:
        detector: in eval mode, on the CPU.
        batch: of the one sample.
        sample: the same, with images as they are stored.

    Raises:
        ValueError: the detector has no cameras, or its lift reads LiDAR depths.
    """
    camera = detector.camera
    if camera is None or camera.lidar_depth is not None:
        raise ValueError("lift_steps: needs a detector with cameras whose lift reads images alone")
    images, intrinsic, extrinsic = batch.images[0, 0], batch.image_from_camera[0, 0], batch.frame_from_camera[0, 0]
    image = camera.neck(camera.backbone(camera.normalise(images)))
    depth, context = camera.depth_net(image, camera_entries(intrinsic, extrinsic, camera.config.image_size))
    frustum = Frustum((int(image.shape[-2]), int(image.shape[-1])), camera.config.stride, camera.config.depth)
    stored = sample.image_from_camera[0] @ torch.linalg.inv(intrinsic)
    points = frustum.points(intrinsic, extrinsic)
    return LiftSteps(depth, context, points, frustum, detector.grid, detector.config.z, stored)


def over_image(ax: Axes, sample: Sample, steps: LiftSteps, camera: int, values: Any = None, **style: Any) -> Any:
    """Draw the part of a stored image that the network sees, and a map [h, w] over it.

    Args:
        ax: where to draw.
        sample: with images as they are stored.
        steps: of the sample.
        camera: place in CAMERAS.
        values: the map, or none.
        style: of the map, as `imshow` takes it.

    Returns:
        The drawn map, None without one.
    """
    camera_on(ax, sample, camera, {}, 0.0, False)
    (rows, columns), stride = steps.frustum.size, steps.frustum.stride
    left, right, bottom, top = seen_extent(steps.stored_from_seen[camera], rows * stride, columns * stride)
    shown = None
    if values is not None:
        ax.images[0].set_alpha(0.2)
        shown = ax.imshow(values, extent=(left, right, bottom, top), **style)
    ax.set(xlim=(left, right), ylim=(bottom, top), anchor="S")
    return shown


def depth_bar(axes: Axes | list[Axes], shown: Any) -> None:
    """A colour bar of metres, below one axes or beside several, on the scale `NEAR_FAR`."""
    place = "vertical" if isinstance(axes, list) else "horizontal"
    first = axes[0] if isinstance(axes, list) else axes
    bar = owner(first).colorbar(shown, ax=axes, label="metres", orientation=place, fraction=0.05, pad=0.02)
    bar.set_ticks([2, 5, 10, 20, 40, 60], labels=["2", "5", "10", "20", "40", "60"])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)


def strengths(norms: Array) -> PowerNorm:
    """A colour scale from 0 on for the norms of maps, by square roots: near cells hold many times what far ones do."""
    return PowerNorm(0.5, 0.0, max(float(np.percentile(norms, 99.5)), 1e-6))


def pixel_ray(sample: Sample, camera: int, u: float, v: float, depths: Sequence[float] = (5, 10, 20, 30, 40)) -> Figure:
    """One pixel, and all the places on the ground that it may show: the line of sight from above.

    Args:
        sample: holds images and points.
        camera: place in CAMERAS.
        u: column of the stored image, pixels.
        v: row.
        depths: marked along the ray, metres.
    """
    matrix, pose = sample.image_from_camera[0, camera], sample.frame_from_camera[0, camera]
    far = torch.tensor([0.1, *depths])
    ray = transform(pose, unproject(matrix, torch.tensor([[u, v]]).expand(len(far), 2), far))
    figure = new_figure(12.0, 5.2)
    image, above = figure.subplots(1, 2, width_ratios=(1.3, 1))
    camera_on(image, sample, camera, {}, 0.0, False)
    image.plot(u, v, "+", color="white", markersize=20, markeredgewidth=5)
    image.plot(u, v, "+", color=STUDENT, markersize=18, markeredgewidth=2.5)
    grid = BEVGrid.square(max(depths) + 4.0, max(depths) + 4.0)
    points_on(above, sample.points, grid, size=0.8)
    above.plot(ray[:, 1], ray[:, 0], color=STUDENT, linewidth=1.5, zorder=6)
    above.plot(ray[1:, 1], ray[1:, 0], "o", color=STUDENT, markeredgecolor="white", zorder=7)
    for depth, place in zip(depths, ray[1:], strict=True):
        note = f"{depth:g} m, height {float(place[2]):.1f} m"
        at = float(place[1]), float(place[0])
        above.annotate(note, at, (9, -3), textcoords="offset points", fontsize=8, path_effects=_HALO, zorder=9)
    bev_axes(above, grid, "the same pixel, at five depths")
    return figure


def one_camera(steps: LiftSteps, sample: Sample, camera: int = 0, boxes: Boxes3D | None = None) -> Figure:
    """Lift-splat of one camera: image, features and depth; lifted points; what lands where; the BEV map.

    Args:
        steps: of the sample.
        sample: with images as they are stored.
        camera: place in CAMERAS.
        boxes: outlines to draw on the maps.
    """
    pixels = torch.zeros(len(steps.depth), *steps.frustum.size, dtype=torch.bool)
    pixels[camera] = True
    figure = new_figure(13.0, 7.8)
    axes = figure.subplots(2, 3, height_ratios=(0.5, 1))
    below: dict[str, Any] = {"orientation": "horizontal"}
    over_image(axes[0, 0], sample, steps, camera)
    axes[0, 0].set_title(f"1  image ({title_of(camera)})", fontsize=10)
    norms = array(steps.context[camera].norm(dim=0))
    shown = over_image(axes[0, 1], sample, steps, camera, norms, cmap="viridis")
    colour_bar(axes[0, 1], shown, "norm over channels", extend="neither", **below)
    axes[0, 1].set_title(f"2  features: {len(steps.context[camera])} channels", fontsize=10)
    far = array(steps.expected()[camera])
    shown = over_image(axes[0, 2], sample, steps, camera, far, norm=NEAR_FAR, cmap="viridis_r")
    depth_bar(axes[0, 2], shown)
    axes[0, 2].set_title(f"3  depth: {steps.frustum.bins} bins, here the mean", fontsize=10)
    ax = axes[1, 0]
    cloud, weight = steps.points[camera].flatten(0, 1), steps.depth[camera].flatten(1).T.flatten()
    order = weight.argsort()
    cloud, chance = cloud[order], array(weight[order])
    shown = ax.scatter(cloud[:, 1], cloud[:, 0], c=chance, s=1 + 12 * chance, cmap="magma_r", vmin=0, vmax=0.5)
    bev_axes(ax, steps.grid, "4  lift: every pixel at every depth")
    colour_bar(ax, shown, "probability", extend="max", **below)
    mass = array(steps.mass(pixels))
    shown = bev_image(axes[1, 1], np.where(mass > 0, mass, np.nan), steps.grid, cmap="magma_r", norm=LogNorm(1e-3, 10))
    axes[1, 1].set_facecolor("white")
    bev_axes(axes[1, 1], steps.grid, "5  splat: probability that lands in a cell")
    colour_bar(axes[1, 1], shown, "pixels' worth", **below)
    norms = array(steps.bev([camera]).norm(dim=0))
    shown = bev_image(axes[1, 2], norms, steps.grid, norm=strengths(norms), cmap="viridis")
    bev_axes(axes[1, 2], steps.grid, "6  the sum of features × probability")
    colour_bar(axes[1, 2], shown, "norm over channels", **below)
    if boxes is not None:
        for ax in axes[1]:
            bev_boxes_on(ax, boxes, TRUTH, linewidths=0.8)
    return figure


def six_cameras(steps: LiftSteps, boxes: Boxes3D | None = None) -> Figure:
    """The BEV map as camera after camera is added, on one colour scale.

    Args:
        steps: of the sample.
        boxes: outlines to draw on the last map.
    """
    maps = [array(steps.bev(range(count + 1)).norm(dim=0)) for count in range(len(steps.depth))]
    norm, across = strengths(maps[-1]), 3
    figure = new_figure(12.0, 4.2 * -(-len(maps) // across))
    axes = list(figure.subplots(-(-len(maps) // across), across, squeeze=False).ravel())
    for place, (ax, values) in enumerate(zip(axes, maps, strict=False)):
        shown = bev_image(ax, values, steps.grid, norm=norm, cmap="viridis")
        bev_axes(ax, steps.grid, ("+ " if place else "") + title_of(place))
    if boxes is not None:
        bev_boxes_on(axes[len(maps) - 1], boxes, "white", linewidths=0.7)
    colour_bar(axes, shown, "norm over channels")
    return figure


def feeding(steps: LiftSteps, row: int, column: int) -> tuple[Tensor, Tensor]:
    """Which pixels feed a BEV cell, and with how much probability.

    Returns:
        weight [N, h, w], the probability that each pixel sends to the cell, and depth [N, h, w], at which metres (the
        mean of the bins that land there; NaN where none does).
    """
    index, shape = steps.index, (len(steps.depth), *steps.frustum.size)
    mine = index.cell == row * steps.grid.width + column
    pixel, source = index.pixel[mine], index.source[mine]
    chance = steps.depth.permute(0, 2, 3, 1).flatten()[source]
    bins = torch.zeros(len(steps.depth) * shape[1] * shape[2]).index_add_(0, pixel, torch.ones_like(chance))
    sums = torch.zeros_like(bins).index_add_(0, pixel, steps.middles[source % steps.frustum.bins])
    weight = torch.zeros_like(bins).index_add_(0, pixel, chance)
    return weight.view(shape), torch.where(bins > 0, sums / bins.clamp(min=1), torch.nan).view(shape)


def cell_pixels(steps: LiftSteps, sample: Sample, row: int, column: int, boxes: Boxes3D | None = None) -> Figure:
    """The pixels that feed one BEV cell, in the two cameras that give most, and where the cell lies.

    Args:
        steps: of the sample.
        sample: with images as they are stored.
        row: of the cell.
        column: of the cell.
        boxes: outlines to draw on the map.
    """
    weight, _ = feeding(steps, row, column)
    best = weight.flatten(1).sum(1).argsort(descending=True)[:2].tolist()
    figure = new_figure(12.0, 5.6)
    places = figure.subplot_mosaic([["first", "above"], ["second", "above"]], width_ratios=(1.25, 1))
    first, second, above = places["first"], places["second"], places["above"]
    limit = max(float(weight.max()), 1e-3)
    for ax, camera in zip((first, second), best, strict=True):
        values = array(weight[camera])
        look = {"cmap": "magma_r", "vmin": 0, "vmax": limit, "alpha": 0.85}
        shown = over_image(ax, sample, steps, camera, np.where(values > 0.02 * limit, values, np.nan), **look)
        ax.images[0].set_alpha(0.75)
        total, count = float(weight[camera].sum()), int((weight[camera] > 0).sum())
        share = f"{count} pixels, together {total:.2f}" if count else "no pixel"
        ax.set_title(f"{title_of(camera)}: {share}", fontsize=10)
    colour_bar([first, second], shown, "probability sent to the cell", extend="neither", orientation="horizontal")
    mass = array(steps.mass())
    bev_image(above, np.where(mass > 0, mass, np.nan), steps.grid, cmap="magma_r", norm=LogNorm(1e-2, 10))
    above.set_facecolor("white")
    corner = steps.grid.y[0] + row * steps.grid.cell, steps.grid.x[0] + column * steps.grid.cell
    above.add_patch(Rectangle(corner, steps.grid.cell, steps.grid.cell, fill=False, color=STUDENT, lw=2.5, zorder=8))
    centre = [c + steps.grid.cell / 2 for c in corner]
    above.plot(
        *centre, "o", markersize=20, markerfacecolor="none", markeredgecolor=STUDENT, markeredgewidth=2, zorder=8
    )
    bev_axes(above, steps.grid, f"the cell: x = {centre[1]:.1f} m, y = {centre[0]:.1f} m")
    if boxes is not None:
        bev_boxes_on(above, boxes, TRUTH, linewidths=0.8)
    return figure


def pixels_of_box(steps: LiftSteps, sample: Sample, box: Tensor) -> Tensor:
    """Feature cells whose middle lies in the frame around a box [9] as the cameras see it, bool [N, h, w]."""
    corners = box_corners(box[None].float())[0]
    (height, width), stride = steps.frustum.size, steps.frustum.stride
    rows, columns = ((torch.arange(n) + 0.5) * stride for n in (height, width))
    found = torch.zeros(len(steps.depth), height, width, dtype=torch.bool)
    for camera in range(len(found)):
        seen_from_camera = torch.linalg.inv(steps.stored_from_seen[camera]) @ sample.image_from_camera[0, camera]
        local = transform(torch.linalg.inv(sample.frame_from_camera[0, camera]), corners)
        pixels, depth = project(seen_from_camera, local)
        if (depth > 0.5).all():
            (left, top), (right, bottom) = pixels.amin(0), pixels.amax(0)
            inside = (rows >= top) & (rows <= bottom)
            found[camera] = inside[:, None] & (columns >= left) & (columns <= right)
    return found


def measured_depth(target: Tensor, bins: tuple[float, float, float]) -> Tensor:
    """Depth distributions [N, D, h, w] that put all on what the LiDAR measured, [N, h, w]; zero where it is 0."""
    low, high, width = bins
    count = round((high - low) / width)
    place = ((target - low) / width).floor().long()
    hit = torch.nn.functional.one_hot(place.clamp(0, count - 1), count).float()
    return (hit * ((target >= low) & (target < high)).unsqueeze(-1)).movedim(-1, 1)


def shifted_depth(depth: Tensor, bins: int) -> Tensor:
    """Distributions [N, D, h, w] moved away by a number of bins; what leaves the range is lost."""
    return torch.nn.functional.pad(depth, (0, 0, 0, 0, bins, -bins))


def smear(steps: LiftSteps, sample: Sample, box: Tensor, depths: Mapping[str, Tensor]) -> Figure:
    """Where the pixels of one object land, for several depth distributions: right depth a spot, none at all a smear.

    Args:
        steps: of the sample.
        sample: holds points and calibration.
        box: [9], the object.
        depths: probabilities [N, D, h, w] by name.
    """
    pixels = pixels_of_box(steps, sample, box)
    centre = box[:2] * (0.5 + 6.0 / max(float(box[:2].norm()), 12.0))
    area = window(centre, max(14.0, float(box[:2].norm()) * 0.75))
    figure = new_figure(3.5 * len(depths), 4.7)
    axes = list(figure.subplots(1, len(depths), squeeze=False)[0])
    truth = Boxes3D.make(box[None], torch.zeros(1, dtype=torch.long))
    wide = box.clone()
    wide[3:5] += steps.grid.cell
    near = torch.cat((steps.grid.centres().flatten(0, 1), box[2].expand(steps.grid.height * steps.grid.width, 1)), 1)
    inside = points_in_boxes(near, wide[None])[:, 0].view(steps.grid.shape)
    for ax, (name, depth) in zip(axes, depths.items(), strict=True):
        mass = steps.mass(pixels, depth)
        share = float(mass[inside].sum() / mass.sum().clamp(min=1e-9))
        values = array(mass / mass.sum().clamp(min=1e-9))
        shown = bev_image(ax, np.where(values > 0, values, np.nan), steps.grid, norm=LogNorm(1e-3, 0.5), cmap="magma_r")
        ax.set_facecolor("white")
        bev_boxes_on(ax, truth, TRUTH, linewidths=2)
        corners = array(footprint(box[None].float()))[0]
        angles = np.arctan2(corners[:, 1], corners[:, 0])
        for angle in (angles.min(), angles.max()) if np.ptp(angles) < np.pi else ():
            ax.plot([0, 80 * np.sin(angle)], [0, 80 * np.cos(angle)], ":", color="black", linewidth=0.8)
        bev_axes(ax, area, f"{name}\n{100 * share:.0f} % at the object")
    colour_bar(axes, shown, "share of the object's pixels", **BELOW)
    return figure
