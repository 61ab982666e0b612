"""Pictures in the camera plane: six images with projected boxes, and depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from kdlab.geometry import box_corners, footprint, project, transform
from kdlab.sample import CAMERAS, CLASSES, Features, Sample
from kdlab.view.style import Array, Boxes, array, box_legend, colour_bar, colour_of, kept, new_figure, robust_norm

LAYOUT = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
"""Where each camera stands in the picture, row by row."""

NEAR = 0.1  # metres before the camera at which lines are cut off
_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))


def clip_near(segments: Tensor, near: float = NEAR) -> Tensor:
    """Cut segments [S, 2, 3] of a camera frame at depth ``near`` metres; those wholly nearer are left out."""
    depth = segments[..., 2]
    segments, depth = segments[(depth > near).any(-1)], depth[(depth > near).any(-1)]
    start, end = segments[:, 0], segments[:, 1]
    step = depth[:, 1] - depth[:, 0]
    along = ((near - depth[:, 0]) / torch.where(step == 0, 1.0, step))[:, None]
    cut = start + along * (end - start)
    start = torch.where((depth[:, 0] < near)[:, None], cut, start)
    end = torch.where((depth[:, 1] < near)[:, None], cut, end)
    return torch.stack((start, end), 1)


def box_segments(values: Tensor) -> Tensor:
    """Twelve edges of boxes [M, 9] and a line from the bottom's centre to its front edge, [M, 13, 2, 3] metres."""
    corners = box_corners(values)
    edges = torch.stack([corners[:, list(edge)] for edge in _EDGES], 1)
    flat = footprint(values, ((0.0, 0.0), (0.5, 0.0)))
    low = (values[:, 2] - values[:, 5] / 2)[:, None, None].expand(-1, 2, 1)
    return torch.cat((edges, torch.cat((flat, low), -1)[:, None]), 1)


def project_boxes(sample: Sample, camera: int, values: Tensor) -> tuple[list[Tensor], Tensor]:
    """Lines and label places of boxes [M, 9] in one camera of the key frame.

    Returns:
        for each box the pixels [S, 2, 2] of its visible lines (S = 0 for a box behind the camera), and the pixel [M, 2]
        of its highest point (NaN for a box that reaches behind the camera).
    """
    camera_from_key = torch.linalg.inv(sample.frame_from_camera[0, camera].cpu())
    matrix = sample.image_from_camera[0, camera].cpu()
    ends = box_segments(values)
    segments = transform(camera_from_key, ends.flatten(1, 2)).view(ends.shape)
    lines = [project(matrix, clip_near(s))[0] for s in segments]
    tops, depth = project(matrix, transform(camera_from_key, box_corners(values)))
    highest = tops[..., 1].argmin(-1)
    places = tops.gather(1, highest[:, None, None].expand(-1, 1, 2))[:, 0]
    return lines, torch.where((depth > NEAR).all(-1)[:, None], places, torch.nan)


def camera(ax: Axes, sample: Sample, index: int, boxes: Mapping[str, Boxes], min_score: float, labels: bool) -> None:
    """Draw one camera's key image with projected boxes on an axes.

    Args:
        ax: where to draw.
        sample: holds images and calibrations.
        index: place of the camera in CAMERAS.
        boxes: sets of boxes by name.
        min_score: detections below are left out.
        labels: write each box's class above it.
    """
    image = sample.images[0, index].permute(1, 2, 0).cpu().numpy()
    height, width = image.shape[:2]
    ax.imshow(image, extent=(0, width, height, 0), interpolation="bilinear")
    for place, (name, items) in enumerate(boxes.items()):
        values, kinds = kept(items, min_score)
        if not len(values):
            continue
        lines, tops = project_boxes(sample, index, values)
        colour = colour_of(name, place)
        halo: list[Any] = [withStroke(linewidth=2.4, foreground="white", alpha=0.55)]
        segments = [array(line) for box in lines for line in box]
        lines_drawn = LineCollection(segments, colors=colour, linewidths=1.2, path_effects=halo)
        ax.add_collection(lines_drawn, autolim=False)
        if labels:
            _label(
                ax, array(tops), kinds.tolist(), values[:, :2].norm(dim=-1).argsort().tolist(), (height, width), colour
            )
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.set_title(CAMERAS[index].removeprefix("CAM_").replace("_", " ").lower(), fontsize=10)


def _label(ax: Axes, tops: Array, kinds: list[int], order: list[int], size: tuple[int, int], colour: str) -> None:
    """Write class names above boxes, the nearest first; one that would cover another is left out."""
    height, width = size
    line, letter = width / 36, width / 85  # a text's height and a letter's width, in pixels of the image
    taken: list[tuple[float, float, float]] = []
    options: dict[str, Any] = {"ha": "center", "va": "bottom", "clip_on": True, "fontsize": 7}
    for index in order:
        text = CLASSES[kinds[index]].replace("_", " ")
        u, v = float(tops[index, 0]), float(tops[index, 1])
        half = letter * (len(text) + 1) / 2
        free = all(abs(v - q) > line or abs(u - p) > half + other for p, q, other in taken)
        if free and half <= u < width - half and line <= v < height:
            taken.append((u, v, half))
            halo: list[Any] = [withStroke(linewidth=2.0, foreground="white", alpha=0.8)]
            ax.text(u, v - 2, text, color=colour, path_effects=halo, **options)


def cameras(
    sample: Sample,
    boxes: Mapping[str, Boxes] | None = None,
    min_score: float = 0.2,
    labels: bool = False,
    title: str = "",
) -> Figure:
    """The six cameras as they sit around the vehicle, with 3D boxes projected into them.

    The line on a box's floor runs from its centre to its front. The rear cameras look backwards: what is to the left in
    their images is on the vehicle's right.

    Args:
        sample: holds the images [T, N, 3, H, W] and calibrations.
        boxes: sets of boxes by name ("truth", "teacher" and "student" have their own colours); default: the sample's.
        min_score: detections below are left out.
        labels: write the class above each box that has room for it.
        title: heading of the figure.

    Raises:
        ValueError: the sample holds no images.
    """
    if sample.images.shape[1] != len(CAMERAS):
        raise ValueError(f"cameras: sample {sample.token} holds {sample.images.shape[1]} images, needs {len(CAMERAS)}")
    sets = {"truth": sample.boxes} if boxes is None else boxes
    ratio = sample.images.shape[-2] / sample.images.shape[-1]
    figure = new_figure(12.0, 2 * (12.0 / 3 * ratio + 0.3) + 0.5 + 0.3 * bool(title))
    axes = figure.subplots(2, 3)
    for ax, name in zip(axes.ravel(), LAYOUT, strict=True):
        camera(ax, sample, CAMERAS.index(name), sets, min_score, labels)
    if title:
        figure.suptitle(title, fontsize=12)
    if sets:
        figure.legend(handles=box_legend(sets, min_score), loc="outside lower center", ncols=len(sets), frameon=False)
    return figure


def depth(
    sample: Sample, features: Features, bins: tuple[float, float, float], index: int = 0, item: int = 0
) -> Figure:
    """What the depth net believes of one camera: image, expected depth, how sure it is, and the mean over all pixels.

    Args:
        sample: the sample that the features were computed from.
        features: holds depth [B, T, N, D, h, w], probabilities over the bins.
        bins: lower bound, upper bound and width of the depth bins, metres (`CameraConfig.depth`).
        index: place of the camera in CAMERAS.
        item: place of the sample in the batch.

    Raises:
        ValueError: the features hold no depth.
    """
    if features.depth is None:
        raise ValueError("depth: this detector has no depth net (a LiDAR detector?)")
    chances = array(features.depth[item, 0, index])  # [D, h, w]
    low, _, step = bins
    centres = low + step * (np.arange(len(chances)) + 0.5)
    expected = np.tensordot(centres, chances, 1)
    image = sample.images[0, index].permute(1, 2, 0).cpu().numpy()
    figure = new_figure(12.0, 2.0 + 12.0 / 4 * image.shape[0] / image.shape[1])
    axes = figure.subplots(1, 4)
    whole = (0, image.shape[1], image.shape[0], 0)
    axes[0].imshow(image, extent=whole)
    axes[0].set_title(CAMERAS[index].removeprefix("CAM_").replace("_", " ").lower(), fontsize=10)
    norm = robust_norm(expected)
    metres = axes[1].imshow(expected, norm=norm, cmap="viridis", extent=whole)
    colour_bar(axes[1], metres, "metres", orientation="horizontal")
    axes[1].set_title("expected depth", fontsize=10)
    sure = axes[2].imshow(chances.max(0), vmin=0, vmax=1, cmap="cividis", extent=whole)
    colour_bar(axes[2], sure, "probability", orientation="horizontal", extend="neither")
    axes[2].set_title("probability of the likeliest bin", fontsize=10)
    for ax in axes[:3]:
        ax.set(xticks=[], yticks=[], anchor="N")
    axes[3].bar(centres, chances.mean((1, 2)), width=step, color=colour_of("student"))
    axes[3].set(xlabel="depth (m)", ylabel="mean probability", title="all pixels")
    return figure
