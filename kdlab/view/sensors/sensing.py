"""Pictures of what sensors measure: where they sit, how a point becomes a pixel, what a box means, cells and metres."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Arc, Polygon
from matplotlib.patheffects import withStroke
from torch import Tensor

from kdlab.geometry import BEVGrid, footprint, points_in_boxes, project, transform, unproject
from kdlab.sample import CAMERAS, CLASSES, Boxes3D, Sample
from kdlab.view.sensors.cameras import camera as camera_on
from kdlab.view.style import (
    EGO_LENGTH,
    EGO_REAR,
    GREY,
    OTHERS,
    TEACHER,
    TRUTH,
    array,
    bev_axes,
    bev_boxes_on,
    bev_image,
    colour_bar,
    new_figure,
)

LONGITUDINAL, LATERAL = "#D55E00", "#0072B2"
"""Colours of x and y axes."""

DEPTHS = Normalize(0.0, 50.0)
"""Colour scale of depth along a camera's axis, metres."""

_HALO: list[Any] = [withStroke(linewidth=2.5, foreground="white")]


def window(centre: Tensor | Sequence[float], reach: float) -> BEVGrid:
    """A square of 2 x ``reach`` metres around a place (x, y), as a grid to draw on."""
    x, y = float(centre[0]), float(centre[1])
    return BEVGrid((x - reach, x + reach), (y - reach, y + reach), reach)


def seen_extent(stored_from_seen: Tensor, height: int, width: int) -> tuple[float, float, float, float]:
    """Where the network's image, often a crop, lies in the stored one: left, right, bottom, top in its pixels.

    Args:
        stored_from_seen: [3, 3], pixels of the network's image to those of the stored one.
        height: of the network's image, as ``width``, in its pixels.
        width: see ``height``.
    """
    corners = stored_from_seen @ torch.tensor([[0.0, width], [0.0, height], [1.0, 1.0]])
    (left, right), (top, bottom) = corners[0].tolist(), corners[1].tolist()
    return left, right, bottom, top


def title_of(camera: int) -> str:
    """A camera's name in words."""
    return CAMERAS[camera].removeprefix("CAM_").replace("_", " ").lower()


def clearest(boxes: Boxes3D, among: Tensor, near: float = 8.0, far: float = 35.0) -> int:
    """The vehicle with most LiDAR points among some boxes, neither beside the ego nor far away: one to look at.

    Args:
        boxes: annotations of a sample.
        among: bool [M].
        near: least distance, metres.
        far: greatest distance.

    Raises:
        ValueError: there is none.
    """
    distance = boxes.values[:, :2].norm(dim=-1)
    vehicle = boxes.labels <= CLASSES.index("trailer")
    chosen = among & boxes.valid & vehicle & (distance > near) & (distance < far)
    if not chosen.any():
        raise ValueError(f"clearest: no such vehicle between {near:g} and {far:g} m; try another sample")
    return int((boxes.points * chosen - (~chosen).long()).argmax())


def view_wedge(sample: Sample, camera: int, reach: float) -> Tensor:
    """What a camera sees of the ground plane, up to a depth: its place and two corners in the ego frame, [3, 2] metres.

    Raises:
        ValueError: the sample holds no images.
    """
    if sample.images.shape[1] == 0:
        raise ValueError(f"sample {sample.token} holds no images; open the data set with images=True")
    height, width = sample.images.shape[-2:]
    pixels = torch.tensor([[0.0, height / 2], [float(width), height / 2]])
    rays = unproject(sample.image_from_camera[0, camera].cpu(), pixels, torch.full((2,), reach))
    pose = sample.frame_from_camera[0, camera].cpu()
    return torch.cat((pose[:2, 3][None], transform(pose, rays)[:, :2]))


def rig(sample: Sample, reach: float = 9.0) -> Figure:
    """Where the sensors sit: from above with what each camera sees, and from the side with a slice of the cloud.

    Args:
        sample: holds images, calibrations and points.
        reach: metres that are shown around the vehicle.

    Raises:
        ValueError: the sample holds no images.
    """
    figure = new_figure(12.0, 5.8)
    above, side = figure.subplots(1, 2, width_ratios=(1, 1.15))
    colours = (*OTHERS[:3], TRUTH, LONGITUDINAL, LATERAL)
    for index, colour in enumerate(colours):
        corners = array(view_wedge(sample, index, reach * 0.62))[:, ::-1]
        above.add_patch(Polygon(corners, facecolor=colour, alpha=0.28, edgecolor=colour, linewidth=1.2))
        middle = 0.72 * corners[1:].mean(0) + 0.28 * corners[0]
        above.text(*middle, title_of(index), ha="center", va="center", fontsize=8, path_effects=_HALO, zorder=9)
        above.plot(*corners[0], "o", color=colour, markersize=5, markeredgecolor="black", zorder=8)
        place = array(sample.frame_from_camera[0, index, :3, 3])
        side.plot(place[0], place[2], "o", color=colour, markersize=6, markeredgecolor="black", zorder=8)
    bev_axes(above, window((0.0, 0.0), reach), "from above: the six cameras overlap a little")
    origin = array(sample.lidar_origin)
    above.plot(
        origin[1], origin[0], "*", color="black", markersize=13, markeredgecolor="white", zorder=9, label="LiDAR"
    )
    above.legend(loc="upper right", fontsize=8)
    _side_slice(side, sample)
    side.plot(origin[0], origin[2], "*", color="black", markersize=13, markeredgecolor="white", zorder=9)
    side.annotate(f"LiDAR, {origin[2]:.2f} m", (origin[0], origin[2]), (6, 8), textcoords="offset points", fontsize=8)
    return figure


def _side_slice(ax: Axes, sample: Sample, half: float = 1.5, reach: float = 20.0) -> None:
    """Points of the key sweep within ``half`` metres of the vehicle's middle plane, seen from the right."""
    near = (sample.points[:, 4] == 0) & (sample.points[:, 1].abs() < half)
    cloud = array(sample.points[near])
    origin = array(sample.lidar_origin)[[0, 2]]
    rays = np.stack((np.broadcast_to(origin, (len(cloud), 2)), cloud[:, [0, 2]]), 1)
    ax.add_collection(LineCollection(list(rays), colors=TEACHER, linewidths=0.4, alpha=0.06, rasterized=True))
    ax.scatter(cloud[:, 0], cloud[:, 2], s=2.5, color="#555555", linewidths=0, rasterized=True)
    body = [(-EGO_REAR, 0.2), (EGO_LENGTH - EGO_REAR, 0.2), (EGO_LENGTH - EGO_REAR, 0.9), (2.2, 1.0), (1.5, 1.5)]
    ax.add_patch(Polygon([*body, (-EGO_REAR, 1.5)], facecolor="white", edgecolor="black", zorder=5))
    ax.set(xlim=(-reach, reach), ylim=(-2.0, 6.0), xlabel="x, forward (m)", ylabel="z, up (m)")
    ax.set_title(f"from the side: points with |y| < {half:g} m (heights stretched)", fontsize=11)
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=0)


def projection_steps(sample: Sample, camera: int = 0) -> Figure:
    """How LiDAR points of the key sweep become pixels: ego frame, camera frame, plane at depth 1, image.

    Points that land in the image keep one colour, their depth, through all four panels.

    Args:
        sample: holds images and points.
        camera: place in CAMERAS.

    Raises:
        ValueError: the sample holds no images.
    """
    wedge = view_wedge(sample, camera, 50.0)
    height, width = sample.images.shape[-2:]
    matrix, points = sample.image_from_camera[0, camera].cpu(), sample.points[sample.points[:, 4] == 0, :3].cpu()
    seen = transform(torch.linalg.inv(sample.frame_from_camera[0, camera].cpu()), points)
    pixels, depth = project(matrix, seen)
    inside = (depth > 0.5) & (pixels >= 0).all(-1) & (pixels[:, 0] < width) & (pixels[:, 1] < height)
    look: dict[str, Any] = {"c": array(depth[inside]), "norm": DEPTHS, "cmap": "viridis", "linewidths": 0}
    figure = new_figure(12.0, 9.0)
    axes = figure.subplots(2, 2, height_ratios=(1.25, 1))
    ego, own = axes[0]
    x, y, _ = array(points).T
    ego.scatter(y, x, s=0.6, color="#BBBBBB", linewidths=0, rasterized=True)
    ego.add_patch(Polygon(array(wedge)[:, ::-1], fill=False, edgecolor="black", linewidth=1))
    ego.scatter(y[inside], x[inside], s=3, **look)
    bev_axes(ego, window((0.0, 0.0), 50.0), "1  ego frame: (x, y, z)")
    camera_x, camera_y, camera_z = array(seen[inside]).T
    drawn = own.scatter(camera_x, camera_z, s=3, **look)
    own.set(xlim=(-40, 40), ylim=(-2, 55), xlabel="X, to the right (m)", ylabel="Z, depth (m)", aspect="equal")
    own.plot(0, 0, "k^", markersize=8)
    own.set_title("2  camera frame: (X, Y, Z) = camera_from_key · p", fontsize=11)
    plane, image = axes[1]
    plane.scatter(camera_x / camera_z, camera_y / camera_z, s=3, **look)
    corners = torch.tensor([[0.0, 0], [width, 0], [width, height], [0, height]])
    border = array(unproject(matrix, corners, torch.ones(4)))[:, :2]
    plane.add_patch(Polygon(border, fill=False, edgecolor="black", linewidth=1))
    plane.set(xlabel="X / Z", ylabel="Y / Z", aspect="equal", title="")
    plane.set(xlim=(border[0, 0] - 0.05, border[1, 0] + 0.05), ylim=(border[2, 1] + 0.05, border[0, 1] - 0.05))
    plane.set_title("3  the plane at depth 1, and the image's border in it", fontsize=11)
    camera_on(image, sample, camera, {}, 0.0, False)
    image.scatter(*array(pixels[inside]).T, s=3, **look)
    image.set_title(f"4  image: u = f X / Z + c   ({title_of(camera)})", fontsize=11)
    colour_bar([own, image], drawn, "depth Z (m)")
    return figure


def box_anatomy(box: Tensor, points: Tensor, label: int) -> Figure:
    """What the nine numbers of a box mean: from above in the ego's axes, and from its own right side.

    Args:
        box: [9], x, y, z, l, w, h, yaw, vx, vy.
        points: [P, 3+] in the box's frame of reference, the key ego frame.
        label: index into CLASSES.
    """
    box = box.detach().float().cpu()
    x, y, z, length, width, high, yaw = (float(v) for v in box[:7])
    reach = max(length, width) * 0.5 + 3.0
    cloud = points[window((x, y), reach).locate(points[:, :2].cpu())[2], :3].cpu()
    inside = array(points_in_boxes(cloud, box[None])[:, 0])
    figure = new_figure(12.0, 5.6)
    above, side = figure.subplots(1, 2)
    near = array(cloud)
    above.scatter(near[~inside, 1], near[~inside, 0], s=5, color="#AAAAAA", linewidths=0)
    above.scatter(near[inside, 1], near[inside, 0], s=9, color=TRUTH, linewidths=0)
    bev_boxes_on(above, Boxes3D.make(box[None], torch.tensor([label])), "black", linewidths=1.8)
    bev_axes(above, window((x, y), reach), f"{CLASSES[label].replace('_', ' ')} from above", ego=False)
    ends = array(footprint(box[None], ((-0.5, -0.62), (0.5, -0.62), (0.62, -0.5), (0.62, 0.5))))[0][:, ::-1]
    _measure(above, ends[0], ends[1], f"l = {length:.2f}")
    _measure(above, ends[2], ends[3], f"w = {width:.2f}")
    above.plot(y, x, "k+", markersize=11, markeredgewidth=2)
    _draw_yaw(above, (x, y), yaw, 0.6 * width)
    velocity = array(box[7:9])
    if np.isfinite(velocity).all() and np.hypot(*velocity) > 0.3:
        tip = (y + 0.5 * velocity[1], x + 0.5 * velocity[0])
        above.annotate("", tip, (y, x), arrowprops={"arrowstyle": "-|>", "color": LONGITUDINAL, "lw": 2})
        speed = f"v = {np.hypot(*velocity):.1f} m/s (arrow: half a second)"
        above.text(0.02, 0.02, speed, transform=above.transAxes, color=LONGITUDINAL, fontsize=9, path_effects=_HALO)
    turned = array(_in_box_frame(cloud, box))
    side.scatter(turned[~inside, 0], near[~inside, 2], s=5, color="#AAAAAA", linewidths=0)
    side.scatter(
        turned[inside, 0], near[inside, 2], s=9, color=TRUTH, linewidths=0, label=f"{inside.sum()} points inside"
    )
    outline = [
        (-length / 2, z - high / 2),
        (length / 2, z - high / 2),
        (length / 2, z + high / 2),
        (-length / 2, z + high / 2),
    ]
    side.add_patch(Polygon(outline, fill=False, linewidth=1.8))
    side.plot(0, z, "k+", markersize=11, markeredgewidth=2)
    _measure(side, (length / 2 + 0.4, z - high / 2), (length / 2 + 0.4, z + high / 2), f"h = {high:.2f}")
    note = f"z = {z:.2f}: the middle, not the floor"
    side.annotate(note, (0, z), (0, z + high / 2 + 0.35), ha="center", fontsize=9, arrowprops={"arrowstyle": "-"})
    side.set(xlim=(-reach, reach), ylim=(-1, max(4.0, z + high / 2 + 0.6)), aspect="equal")
    side.set(xlabel="along the heading, front to the right (m)", ylabel="z, up (m)")
    side.set_title("from its right side", fontsize=11)
    side.legend(loc="upper left", fontsize=8)
    return figure


def _in_box_frame(points: Tensor, box: Tensor) -> Tensor:
    """Points along and across a box's heading [P, 2]; NaN farther beside it than a metre."""
    offset = points[:, :2] - box[:2]
    cos, sin = box[6].cos(), box[6].sin()
    along, across = offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin
    return torch.stack((along.masked_fill(across.abs() > box[4] / 2 + 1, torch.nan), across), -1)


def _measure(ax: Axes, start: Any, end: Any, text: str) -> None:
    """A dimension line with its length."""
    ax.annotate(
        "", end, start, arrowprops={"arrowstyle": "<|-|>", "color": LATERAL, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    )
    middle = (np.asarray(start) + np.asarray(end)) / 2
    plate = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    ax.text(
        float(middle[0]),
        float(middle[1]),
        text,
        color=LATERAL,
        ha="center",
        va="center",
        fontsize=9,
        bbox=plate,
        zorder=9,
    )


def _draw_yaw(ax: Axes, centre: tuple[float, float], yaw: float, radius: float) -> None:
    """The angle from the ego's x axis (up) counter-clockwise to the heading."""
    x, y = centre
    ax.plot([y, y], [x, x + 1.5 * radius], "--", color=LONGITUDINAL, linewidth=1)
    # The y axis points left, so matplotlib's angles run the other way: 90 degrees is the ego's x axis.
    start, end = sorted((90.0, 90.0 - np.degrees(yaw)))
    ax.add_patch(Arc((y, x), 2 * radius, 2 * radius, theta1=start, theta2=end, color=LONGITUDINAL, linewidth=1.6))
    text = f"yaw = {np.degrees(yaw):.0f}°"
    ax.text(y, x + 1.6 * radius, text, color=LONGITUDINAL, ha="center", fontsize=9, path_effects=_HALO)


def array_and_metres(points: Tensor, grid: BEVGrid, boxes: Boxes3D | None = None) -> Figure:
    """Points per cell twice: as the array lies in memory, row = y and column = x, and as every picture shows it.

    Args:
        points: [P, 3+] in the key ego frame.
        grid: of the cells.
        boxes: outlines for both.
    """
    column, row, inside = grid.locate(points[:, :2].cpu())
    counts = torch.zeros(grid.shape).index_put_((row[inside], column[inside]), torch.ones(()), accumulate=True)
    shown = np.where(array(counts) > 0, array(counts), np.nan)
    norm = LogNorm(1, max(2.0, float(counts.max())))
    figure = new_figure(12.0, 5.6)
    raw, map_ = figure.subplots(1, 2)
    raw.set_facecolor("white")
    raw.imshow(shown, norm=norm, cmap="viridis")
    raw.set(xlabel="column (x)", ylabel="row (y)")
    raw.set_title(f"the array [{grid.height}, {grid.width}]: rows run down", fontsize=11)
    image = bev_image(map_, shown, grid, norm=norm, cmap="viridis")
    map_.set_facecolor("white")
    bev_axes(map_, grid, "the same on the ground: x up, y to the left")
    if boxes is not None and len(boxes):
        outline = footprint(
            boxes.values[boxes.valid].cpu(), ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5), (-0.5, -0.5))
        )
        for cells in array(grid.to_cells(outline)) - 0.5:  # imshow puts the middle of the first cell at 0
            raw.plot(*cells.T, color=LONGITUDINAL, linewidth=0.9)
        raw.set(xlim=(-0.5, grid.width - 0.5), ylim=(grid.height - 0.5, -0.5))
        bev_boxes_on(map_, boxes, LONGITUDINAL, linewidths=0.9)
    colour_bar(map_, image, "points per cell", extend="neither")
    return figure
