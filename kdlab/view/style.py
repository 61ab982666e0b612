"""What every picture shares: colours, axes in metres, the ego vehicle, one colour scale for what is compared.

Figures are plain `matplotlib.figure.Figure` objects: pyplot keeps no reference to them, so none has to be closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from numpy.typing import NDArray
from torch import Tensor

from kdlab.geometry import BEVGrid, footprint
from kdlab.sample import Boxes3D, Detections

Boxes: TypeAlias = Boxes3D | Detections
Array: TypeAlias = NDArray[Any]

TRUTH, TEACHER, STUDENT = "#009E73", "#0072B2", "#D55E00"
"""Green, blue and vermilion of the Okabe-Ito palette, which colour-blind readers can tell apart."""

OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""The rest of the palette, for what is none of the three."""

GREY = "#B8B8B8"
HEIGHTS: Colormap = LinearSegmentedColormap.from_list("heights", ["#D9D9D9", "#8C8C8C", "#1A1A1A"])
"""Light for low, dark for high points, so that coloured boxes stand out."""

EGO_LENGTH, EGO_WIDTH, EGO_REAR = 4.08, 1.73, 1.0
"""Size of the nuScenes vehicle and how far it reaches behind the ego origin (the rear axle), metres."""

CLASS_COLOURS = (
    "#CC6677", "#882255", "#AA4499", "#332288", "#88CCEE",
    "#DDCC77", "#999933", "#44AA99", "#117733", "#E69F00",
)  # fmt: skip
"""One colour for each class: Tol's muted palette, and Okabe and Ito's orange for the tenth."""

BELOW: dict[str, Any] = {"orientation": "horizontal", "fraction": 0.06}
"""A colour bar below its axes."""


def colour_of(name: str, index: int = 0) -> str:
    """The colour of a set of boxes or a run: fixed for truth, teacher and student, else by its place in the palette."""
    fixed = {"truth": TRUTH, "teacher": TEACHER, "student": STUDENT, "detector": STUDENT}
    return fixed.get(name, OTHERS[index % len(OTHERS)])


def run_colours(names: Iterable[str]) -> list[str]:
    """Colours of runs: names that begin with "teacher" share the teacher's, the others begin with the student's."""
    rest = iter(cycle((STUDENT, *OTHERS)))
    return [TEACHER if name.startswith("teacher") else next(rest) for name in names]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches whose labels are kept apart by constrained layout."""
    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def owner(ax: Axes) -> Figure:
    """The figure that holds an axes, also where subfigures lie between."""
    figure: Figure | SubFigure = ax.figure
    while isinstance(figure, SubFigure):
        figure = figure.figure
    return figure


def array(values: Tensor | Array) -> Array:
    """A tensor of any device and type, or an array, as a numpy array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray(values.float().numpy() if values.is_floating_point() else values.numpy())
    return np.asarray(values)


def kept(boxes: Boxes, min_score: float) -> tuple[Tensor, Tensor]:
    """Values [M, 9] and labels [M] of the boxes worth drawing: valid ones, or detections of at least ``min_score``."""
    keep = boxes.valid if isinstance(boxes, Boxes3D) else boxes.scores >= min_score
    keep = keep & boxes.values[:, :7].isfinite().all(-1)
    return boxes.values[keep].detach().float().cpu(), boxes.labels[keep].detach().cpu()


def box_legend(sets: Mapping[str, Boxes], min_score: float) -> list[Line2D]:
    """One legend entry for each set of boxes: its name, how many are drawn, and the score they had to reach."""
    handles = []
    for index, (name, boxes) in enumerate(sets.items()):
        limit = f", score ≥ {min_score:g}" if isinstance(boxes, Detections) and min_score > 0 else ""
        label = f"{name} ({len(kept(boxes, min_score)[0])}{limit})"
        handles.append(Line2D([], [], color=colour_of(name, index), linewidth=2.5, label=label))
    return handles


def robust_norm(*maps: Array, low: float = 1.0, high: float = 99.0) -> Normalize:
    """One colour scale for several maps: from the ``low`` to the ``high`` percentile of all finite values together."""
    values = np.concatenate([m[np.isfinite(m)].ravel() for m in maps])
    if not values.size:
        return Normalize(0.0, 1.0)
    bottom, top = (float(v) for v in np.percentile(values, (low, high)))
    return Normalize(bottom, top if top > bottom else bottom + 1.0)


def symmetric_norm(values: Array, high: float = 99.0) -> Normalize:
    """A colour scale centred on zero that reaches the ``high`` percentile of the finite magnitudes."""
    finite = np.abs(values[np.isfinite(values)])
    reach = float(np.percentile(finite, high)) if finite.size else 0.0
    return Normalize(-reach or -1.0, reach or 1.0)


def bev_axes(ax: Axes, grid: BEVGrid, title: str = "", ego: bool = True) -> Axes:
    """Turn an axes into a map of the ground seen from above: x (forward) up, y (left) to the left, both in metres."""
    ax.set_aspect("equal")
    ax.set_xlim(grid.y[1], grid.y[0])
    ax.set_ylim(grid.x[0], grid.x[1])
    ax.set_xlabel("y, to the left (m)")
    ax.set_ylabel("x, forward (m)")
    ax.set_title(title, fontsize=11)
    if ego:
        draw_ego(ax, grid)
    return ax


def draw_ego(ax: Axes, grid: BEVGrid) -> None:
    """The ego vehicle's outline to scale and an arrow along its heading."""
    reach = min(grid.x[1] - grid.x[0], grid.y[1] - grid.y[0])
    front, half = EGO_LENGTH - EGO_REAR, EGO_WIDTH / 2
    outline = [(half, -EGO_REAR), (-half, -EGO_REAR), (-half, front), (half, front)]
    ax.add_patch(Polygon(outline, closed=True, facecolor="white", edgecolor="black", linewidth=1.2, zorder=6))
    head, tip = 0.013 * reach, front + 0.055 * reach
    shaft = tip - 2.2 * head
    arrow = [
        (-head / 4, 0),
        (-head / 4, shaft),
        (-head, shaft),
        (0, tip),
        (head, shaft),
        (head / 4, shaft),
        (head / 4, 0),
    ]
    ax.add_patch(Polygon(arrow, closed=True, facecolor="black", edgecolor="white", linewidth=0.8, zorder=7))


def bev_image(ax: Axes, values: Array, grid: BEVGrid, **style: Any) -> AxesImage:
    """Draw a map [H, W] or [H, W, 3] (row = y, column = x) on BEV axes; cells that are not numbers are grey.

    Raises:
        ValueError: the map has not the shape of rows and columns.
    """
    if values.ndim not in (2, 3):
        raise ValueError(f"bev_image: a map must be [H, W] or [H, W, 3], got {values.shape}")
    turned = np.swapaxes(values, 0, 1)  # rows = x, so that forward is up
    if turned.ndim == 2:
        turned = np.ma.MaskedArray(turned, ~np.isfinite(turned))
    ax.set_facecolor(GREY)
    extent = (grid.y[0], grid.y[1], grid.x[0], grid.x[1])
    return ax.imshow(turned, origin="lower", extent=extent, interpolation="nearest", **style)


def bev_boxes_on(ax: Axes, boxes: Boxes, colour: str, min_score: float = 0.0, **style: Any) -> None:
    """Draw footprints with a tick from the centre through the front, which shows the heading."""
    values, _ = kept(boxes, min_score)
    if not len(values):
        return
    outline = footprint(values, ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5), (-0.5, -0.5)))
    front = footprint(values, ((0.0, 0.0), (0.5, 0.0)))
    beyond = torch.stack((values[:, 6].cos(), values[:, 6].sin()), -1) * (values[:, 3:4] / 2).clamp(max=0.8)
    front[:, 1] += beyond  # metres beyond the front face
    lines = [*array(outline.flip(-1)), *array(front.flip(-1))]
    options = {"linewidths": 1.2, "zorder": 5, **style}
    ax.add_collection(LineCollection(lines, colors=colour, **options), autolim=False)


def colour_bar(ax: Axes | list[Axes], image: ScalarMappable, label: str, **style: Any) -> None:
    """A colour bar beside one axes or a row of them, with arrows where values lie beyond its ends."""
    first = ax[0] if isinstance(ax, list) else ax
    options = {"extend": "both", "fraction": 0.05, "pad": 0.02, **style}
    bar = owner(first).colorbar(image, ax=ax, label=label, **options)
    bar.ax.tick_params(labelsize=8)


def points_on(ax: Axes, points: Tensor, grid: BEVGrid, size: float | None = None) -> ScalarMappable:
    """Scatter the points [P, 3+] on the grid, coloured by height above the ground; returns what a colour bar needs."""
    cloud = points[:, :3].detach().float().cpu()
    cloud = cloud[grid.locate(cloud[:, :2])[2] & cloud.isfinite().all(-1)] if len(cloud) else cloud
    norm = Normalize(-1.0, 4.0)
    order = cloud[:, 2].argsort()  # the highest point of a column on top
    x, y, z = array(cloud[order]).T if len(cloud) else (np.zeros(0),) * 3
    size = size if size is not None else float(np.clip(6e4 / max(len(cloud), 1), 0.3, 3.0))
    return ax.scatter(y, x, c=z, s=size, norm=norm, cmap=HEIGHTS, linewidths=0, rasterized=True)
