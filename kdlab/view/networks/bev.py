"""Pictures seen from above: points and boxes, features of teacher and student.

In all of them x (forward) points up and y (left) points to the left, in metres.
"""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from torch import Tensor

from kdlab.geometry import BEVGrid
from kdlab.sample import Boxes3D, Features
from kdlab.view.sight.maps import Reduction, cosine_map, principal, reduce_channels, stage_map
from kdlab.view.style import (
    BELOW,
    Boxes,
    array,
    bev_axes,
    bev_boxes_on,
    bev_image,
    box_legend,
    colour_bar,
    colour_of,
    new_figure,
    owner,
    points_on,
    robust_norm,
    symmetric_norm,
)


def bev_boxes(
    points: Tensor,
    boxes: Mapping[str, Boxes],
    grid: BEVGrid,
    min_score: float = 0.2,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """LiDAR points and sets of boxes from above; the tick of a box leads out of its front.

    Args:
        points: [P, 3+] in the key ego frame; P = 0 draws none.
        boxes: sets of boxes by name ("truth", "teacher" and "student" have colours of their own).
        grid: the area to show.
        min_score: detections below are left out.
        title: heading.
        ax: where to draw; default: a new figure.
    """
    made = ax is None
    ax = new_figure(8.2, 7.9).subplots() if ax is None else ax
    bev_axes(ax, grid, title)
    shown = points_on(ax, points, grid)
    colour_bar(ax, shown, "height above the ground (m)")
    for index, (name, items) in enumerate(boxes.items()):
        style = {"linewidths": 2.0} if name == "truth" else {}
        bev_boxes_on(ax, items, colour_of(name, index), min_score, **style)
    handles = box_legend(boxes, min_score)
    if made and handles:
        owner(ax).legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    elif handles:
        ax.legend(handles=handles, loc="upper right", framealpha=0.9, fontsize=8).set_zorder(8)
    return owner(ax)


def feature_maps(
    teacher: Features,
    student: Features,
    grid: BEVGrid,
    stage: str = "bev",
    how: Reduction | int = "norm",
    boxes: Boxes3D | None = None,
    item: int = 0,
    names: tuple[str, str] = ("teacher", "student"),
) -> Figure:
    """Teacher, student and their difference at one stage, and where equal numbers of channels allow it their cosine.

    Teacher and student share one colour scale: from the 1st to the 99th percentile of both together.

    Args:
        teacher: features of the teacher.
        student: features of the student.
        grid: the area of the maps (a stage of any stride covers it).
        stage: see `stage_map`.
        how: "norm" or "mean" over channels, a channel's index, or "pca" (three main directions of both as RGB).
        boxes: outlines to draw on top.
        item: place of the sample in the batch.
        names: titles of the two.

    Raises:
        ValueError: no such stage or channel, maps of different sizes, or "pca" with different numbers of channels.
    """
    a, b = stage_map(teacher, stage, item), stage_map(student, stage, item)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"{stage}: {tuple(a.shape[1:])} cells against {tuple(b.shape[1:])}; compare maps of one size")
    same = a.shape[0] == b.shape[0]
    figure = new_figure(10.4, 10.8) if same else new_figure(13.0, 5.2)
    axes = list(figure.subplots(2, 2).ravel() if same else figure.subplots(1, 3))
    third, label, heading = _compare(axes, a, b, how, grid, names)
    colour_bar(axes[2], third, label, **BELOW)
    titles = [f"{n} ({len(m)} channels)" for n, m in zip(names, (a, b), strict=True)] + [heading, "cosine similarity"]
    if same:
        cosine = bev_image(axes[3], array(cosine_map(a, b)), grid, norm=Normalize(-1, 1), cmap="PuOr")
        colour_bar(axes[3], cosine, "cosine (grey: one map is all zero)", extend="neither", **BELOW)
    halo = [withStroke(linewidth=2.0, foreground="black")]
    for ax, title in zip(axes, titles, strict=False):
        bev_axes(ax, grid, title)
        if boxes is not None:
            bev_boxes_on(ax, boxes, "white", linewidths=0.8, path_effects=halo)
    figure.suptitle(f"{stage}, {a.shape[1]} × {a.shape[2]} cells", fontsize=11)
    return figure


def _compare(
    axes: list[Axes], a: Tensor, b: Tensor, how: Reduction | int, grid: BEVGrid, names: tuple[str, str]
) -> tuple[AxesImage, str, str]:
    """Draw two maps [C, H, W] and their difference; returns the latter, its colour bar's label and its title."""
    if how == "pca":
        for ax, colours in zip(axes, principal(a, b), strict=False):
            bev_image(ax, array(colours), grid)
        distance = array((b - a).norm(dim=0))
        image = bev_image(axes[2], distance, grid, norm=robust_norm(distance), cmap="magma")
        return image, "norm of the difference", f"distance of {names[1]} from {names[0]}"
    first, second = reduce_channels(a, how), reduce_channels(b, how)
    norm = robust_norm(first, second)
    left = bev_image(axes[0], first, grid, norm=norm, cmap="viridis")
    bev_image(axes[1], second, grid, norm=norm, cmap="viridis")
    what = f"channel {how}" if isinstance(how, int) else f"{how} over channels"
    colour_bar(axes[:2], left, what, **BELOW)
    image = bev_image(axes[2], second - first, grid, norm=symmetric_norm(second - first), cmap="RdBu_r")
    return image, f"difference of the {what}", f"{names[1]} − {names[0]}"
