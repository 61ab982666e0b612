"""The scene in three dimensions: points, boxes and cameras, drawn in a notebook's cell, as a picture or in a window.

`geometry` makes everything once as Open3D geometry. `scene` draws it with Plotly; `scene_png` and `show_window` let
Open3D draw it, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import open3d as o3d
import plotly.graph_objects as go
import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, to_hex, to_rgb
from torch import Tensor

from kdlab.geometry import points_in_boxes, transform, unproject
from kdlab.sample import CAMERAS, CLASSES, Detections, Sample
from kdlab.view.scene3d_draw import Look, draw
from kdlab.view.sensors.cameras import box_segments
from kdlab.view.style import (
    CLASS_COLOURS,
    EGO_LENGTH,
    EGO_REAR,
    EGO_WIDTH,
    GREY,
    Array,
    Boxes,
    array,
    box_legend,
    colour_of,
    kept,
)

ColourBy = Literal["height", "intensity", "class"]

PALETTES = {"height": "cividis", "intensity": "magma"}
UNITS = {"height": "height (m)", "intensity": "intensity"}
FRUSTUM = 2.0  # metres along the optical axis to which a camera's pyramid reaches
EGO_HEIGHT = 1.56  # metres
EYE, TARGET = (-26.0, 0.0, 21.0), (9.0, 0.0, 0.0)  # of the first look: from behind and above, forward
BESIDE = 5_000  # points [BESIDE, M] are compared with boxes at once


@dataclass(frozen=True)
class Geometry:
    """A scene as Open3D geometry, in the key ego frame, metres.

    Attributes:
        cloud: the points with their colours.
        colour_by: what the colours mean.
        values: float32 [P], the height (m) or intensity that is coloured; the class where there is one, else -1.
        limits: values of the first and the last colour.
        kinds: int64 [P], index into CLASSES of the box that holds the point, -1 for none.
        intensity: float32 [P], 0..1.
        lines: outlines by name: sets of boxes, "cameras" and "ego".
        titles: what a legend says of each of them.
        marks: hover places [M, 3] and their words, by the same names.
    """

    cloud: Any
    colour_by: ColourBy
    values: Array
    limits: tuple[float, float]
    kinds: Array
    intensity: Array
    lines: dict[str, Any] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    marks: dict[str, tuple[Array, list[str]]] = field(default_factory=dict)


def geometry(
    points: Sample | Tensor,
    boxes: Mapping[str, Boxes] | None = None,
    sample: Sample | None = None,
    colour_by: ColourBy = "height",
    min_score: float = 0.2,
) -> Geometry:
    """Points, boxes and cameras as Open3D geometry.

    Args:
        points: a sample, or points [P, 3+] (x, y, z, intensity, ...) in the key ego frame.
        boxes: sets of boxes by name ("truth", "teacher" and "student" have their own colours); default: the sample's.
        sample: whose cameras are drawn; default: `points` where that is a sample.
        colour_by: "height", "intensity" or "class": the class of the box that holds the point, in the set "truth", or
            the first set where that is missing.
        min_score: detections below are left out.

    Raises:
        ValueError: points of another shape, or no such `colour_by`.
    """
    if isinstance(points, Sample):
        sample = points if sample is None else sample
        boxes = {"truth": points.boxes} if boxes is None else boxes
        points = points.points
    if points.dim() != 2 or points.shape[1] < 3:
        raise ValueError(f"3D scene: points must be [P, 3 or more], got {tuple(points.shape)}")
    if colour_by not in ("height", "intensity", "class"):
        raise ValueError(f"3D scene: colour_by={colour_by!r}; give 'height', 'intensity' or 'class'")
    boxes = boxes or {}
    points = points.detach().float().cpu()
    points = points[points[:, :3].isfinite().all(1)]
    kinds = _kinds(points, boxes, min_score)
    intensity = array(points[:, 3] if points.shape[1] > 3 else torch.zeros(len(points)))
    values = {"height": array(points[:, 2]), "intensity": intensity, "class": kinds.astype(np.float32)}[colour_by]
    limits = (-1.0, float(len(CLASSES) - 1)) if colour_by == "class" else _limits(values)
    made = Geometry(o3d.geometry.PointCloud(), colour_by, values, limits, kinds, intensity)
    made.cloud.points = o3d.utility.Vector3dVector(array(points[:, :3]).astype(np.float64))
    shares = (values - limits[0]) / (limits[1] - limits[0])
    colours = _palette(colour_by)(np.clip(shares, 0, 1))[:, :3].reshape(-1, 3)
    made.cloud.colors = o3d.utility.Vector3dVector(colours)
    for (name, items), handle in zip(boxes.items(), box_legend(boxes, min_score), strict=True):
        _add_boxes(made, name, items, str(handle.get_label()), str(handle.get_color()), min_score)
    if sample is not None and sample.images.shape[1] == len(CAMERAS):
        _add_cameras(made, sample)
    _add_ego(made)
    return made


def scene(
    points: Sample | Tensor,
    boxes: Mapping[str, Boxes] | None = None,
    sample: Sample | None = None,
    colour_by: ColourBy = "height",
    min_score: float = 0.2,
    size: tuple[int, int] = (1060, 620),
) -> go.FigureWidget:
    """The scene in the cell: turn it with the mouse, read points and boxes, switch parts off in the legend.

    Args:
        points: see `geometry`, as are the next four.
        boxes: sets of boxes by name.
        sample: whose cameras are drawn.
        colour_by: "height", "intensity" or "class".
        min_score: detections below are left out.
        size: width and height, pixels.

    Raises:
        ValueError: see `geometry`.
    """
    made = geometry(points, boxes, sample, colour_by, min_score)
    traces = _point_traces(made)
    for name, lines in made.lines.items():
        traces += _line_traces(made, name, lines)
    figure = go.FigureWidget(traces)
    figure.update_layout(
        width=size[0],
        height=size[1],
        margin={"l": 0, "r": 190, "t": 0, "b": 0},
        paper_bgcolor="white",
        template="plotly_white",
        legend={"x": 1.01, "y": 0.94, "itemsizing": "constant"},
        scene=_axes(made),
        uirevision="kept",  # a later change of data leaves the camera where the reader put it
    )
    return figure


def scene_png(
    points: Sample | Tensor,
    boxes: Mapping[str, Boxes] | None = None,
    sample: Sample | None = None,
    colour_by: ColourBy = "height",
    min_score: float = 0.2,
    size: tuple[int, int] = (1200, 720),
    eye: tuple[float, float, float] = EYE,
    target: tuple[float, float, float] = TARGET,
) -> bytes:
    """The scene as a PNG, drawn by Open3D without a window.

    Args:
        points: see `geometry`, as are the next four.
        boxes: sets of boxes by name.
        sample: whose cameras are drawn.
        colour_by: "height", "intensity" or "class".
        min_score: detections below are left out.
        size: width and height, pixels.
        eye: where the picture is taken from, metres in the key ego frame.
        target: the point in its middle.

    Raises:
        ValueError: see `geometry`.
        RuntimeError: this machine lacks the graphics libraries; the message names them.
    """
    made = geometry(points, boxes, sample, colour_by, min_score)
    return draw(made.cloud, made.lines, Look(eye, target, size))


def show_window(
    points: Sample | Tensor,
    boxes: Mapping[str, Boxes] | None = None,
    sample: Sample | None = None,
    colour_by: ColourBy = "height",
    min_score: float = 0.2,
) -> None:
    """Open3D's window on the scene; returns when it is closed.

    Args:
        points: see `geometry`, as are the others.
        boxes: sets of boxes by name.
        sample: whose cameras are drawn.
        colour_by: "height", "intensity" or "class".
        min_score: detections below are left out.

    Raises:
        ValueError: see `geometry`.
        RuntimeError: no screen, or no graphics libraries.
    """
    made = geometry(points, boxes, sample, colour_by, min_score)
    draw(made.cloud, made.lines, Look(EYE, TARGET, (1280, 800)), window=True)


def _palette(colour_by: ColourBy) -> Any:
    return ListedColormap([GREY, *CLASS_COLOURS]) if colour_by == "class" else colormaps[PALETTES[colour_by]]


def _limits(values: Array) -> tuple[float, float]:
    """From the 1st to the 97th percentile: a few tree tops must not use up the colours."""
    if not len(values):
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, (1, 97)))
    return low, high if high > low else low + 1.0


def _kinds(points: Tensor, boxes: Mapping[str, Boxes], min_score: float) -> Array:
    """Class [P] of the box that holds each point, -1 for none; where boxes overlap, the smallest one's."""
    if not boxes or not len(points):
        return np.full(len(points), -1)
    values, labels = kept(boxes["truth"] if "truth" in boxes else next(iter(boxes.values())), min_score)
    order = values[:, 3:6].prod(1).argsort()
    values, labels = values[order], torch.cat((labels[order], labels.new_tensor([-1])))
    found = []
    for part in points.split(BESIDE):
        within = torch.cat((points_in_boxes(part, values), torch.ones(len(part), 1, dtype=torch.bool)), 1)
        found.append(labels[within.byte().argmax(1)])
    return array(torch.cat(found))


def _line_set(segments: Array, colour: str) -> Any:
    """Separate lines [S, 2, 3] of one colour."""
    made = o3d.geometry.LineSet()
    made.points = o3d.utility.Vector3dVector(segments.reshape(-1, 3).astype(np.float64))
    made.lines = o3d.utility.Vector2iVector(np.arange(2 * len(segments), dtype=np.int32).reshape(-1, 2))
    made.paint_uniform_color(to_rgb(colour))
    return made


def _heading(values: Tensor) -> Tensor:
    """A line [M, 1, 2, 3] on the roof of each box from its centre to as much as 0.8 m before its front."""
    along = torch.stack((values[:, 6].cos(), values[:, 6].sin(), torch.zeros(len(values))), -1)
    top = values[:, :3].clone()
    top[:, 2] += values[:, 5] / 2
    reach = values[:, 3:4] / 2
    return torch.stack((top, top + along * (reach + reach.clamp(max=0.8))), 1)[:, None]


def _add_boxes(made: Geometry, name: str, items: Boxes, title: str, colour: str, min_score: float) -> None:
    values, labels = kept(items, min_score)
    segments = torch.cat((box_segments(values)[:, :12], _heading(values)), 1)
    made.lines[name] = _line_set(array(segments.flatten(0, 1)), colour)
    made.titles[name] = title
    finite = items.values[:, :7].isfinite().all(-1)  # as `kept` leaves the others out
    scores: list[Any] = [None] * len(values)
    points: list[Any] = [None] * len(values)
    if isinstance(items, Detections):
        scores = items.scores[finite & (items.scores >= min_score)].tolist()
    else:
        points = items.points[finite & items.valid].tolist()
    words = []
    for row, label, score, count in zip(values.tolist(), labels.tolist(), scores, points, strict=True):
        said = f"<b>{CLASSES[label].replace('_', ' ')}</b> ({name})<br>{np.hypot(row[0], row[1]):.1f} m away"
        said += f"<br>{row[3]:.1f} × {row[4]:.1f} × {row[5]:.1f} m"
        said += "" if score is None else f"<br>score {score:.2f}"
        words.append(said + (f"<br>{count} points" if count else ""))
    tops = values[:, :3].clone()
    tops[:, 2] += values[:, 5] / 2
    made.marks[name] = (array(tops), words)


def _add_cameras(made: Geometry, sample: Sample) -> None:
    """A pyramid for each camera of the key frame, from its centre to the image's corners."""
    height, width = sample.images.shape[-2:]
    pixels = torch.tensor([[0.0, 0], [width, 0], [width, height], [0, height]])
    segments, tips = [], []
    for matrix, pose in zip(sample.image_from_camera[0].cpu(), sample.frame_from_camera[0].cpu(), strict=True):
        corners = transform(pose, unproject(matrix, pixels, torch.full((4,), FRUSTUM)))
        centre = pose[:3, 3].expand(4, 3)
        segments += [torch.stack((centre, corners), 1), torch.stack((corners, corners.roll(-1, 0)), 1)]
        tips.append(corners.mean(0))
    made.lines["cameras"] = _line_set(array(torch.cat(segments)), "#555555")
    made.titles["cameras"] = "cameras"
    names = [name.removeprefix("CAM_").replace("_", " ").lower() for name in CAMERAS]
    made.marks["cameras"] = (array(torch.stack(tips)), [f"camera {name}" for name in names])


def _add_ego(made: Geometry) -> None:
    """The ego vehicle, and an arrow on the ground along its heading."""
    middle = EGO_LENGTH / 2 - EGO_REAR
    body = torch.tensor([[middle, 0, EGO_HEIGHT / 2, EGO_LENGTH, EGO_WIDTH, EGO_HEIGHT, 0, 0, 0]])
    tip = [EGO_LENGTH - EGO_REAR + 4.0, 0.0, 0.1]
    arrow = [[[0.0, 0.0, 0.1], tip], [tip, [tip[0] - 1.2, 0.8, 0.1]], [tip, [tip[0] - 1.2, -0.8, 0.1]]]
    lines = torch.cat((box_segments(body)[0, :12], torch.tensor(arrow)))
    made.lines["ego"] = _line_set(array(lines), "#000000")
    made.titles["ego"] = "ego vehicle"
    made.marks["ego"] = (array(body[:, :3]), ["ego vehicle, heading along the arrow"])


def _point_traces(made: Geometry) -> list[Any]:
    """The cloud; one trace for each class where it is coloured by class, so that the legend switches each."""
    xyz = np.asarray(made.cloud.points).astype(np.float32)
    if made.colour_by != "class":
        palette = _palette(made.colour_by)
        scale = [[share, to_hex(palette(share))] for share in np.linspace(0, 1, 17).tolist()]
        bar = {"title": {"text": UNITS[made.colour_by]}, "len": 0.5, "thickness": 14, "x": 1.02, "y": 0.3}
        low, high = made.limits
        marker = {"size": 1.6, "color": made.values, "colorscale": scale, "cmin": low, "cmax": high, "colorbar": bar}
        return [_points(f"points ({len(xyz)})", xyz, made.intensity, marker)]
    traces = []
    for kind in sorted(set(made.kinds.tolist())):
        chosen = made.kinds == kind
        name = "no box" if kind < 0 else CLASSES[kind].replace("_", " ")
        marker = {"size": 1.4 if kind < 0 else 2.4, "color": GREY if kind < 0 else CLASS_COLOURS[kind]}
        traces.append(_points(f"{name} ({int(chosen.sum())})", xyz[chosen], made.intensity[chosen], marker))
    return traces


def _points(name: str, xyz: Array, intensity: Array, marker: dict[str, Any]) -> Any:
    x, y, z = xyz.T.copy()
    said = "x %{x:.1f}, y %{y:.1f}, z %{z:.1f} m<br>%{customdata[0]:.1f} m away<br>intensity %{customdata[1]:.2f}"
    beside = np.stack((np.hypot(x, y), intensity), -1).astype(np.float32)
    return go.Scatter3d(x=x, y=y, z=z, name=name, mode="markers", marker=marker, customdata=beside, hovertemplate=said)


def _line_traces(made: Geometry, name: str, lines: Any) -> list[Any]:
    """A set's outlines, and points to hover over; both obey one entry of the legend."""
    ends = np.asarray(lines.points).astype(np.float32).reshape(-1, 2, 3)
    apart = np.full((len(ends), 1, 3), np.nan, np.float32)  # lifts the pen between two lines
    x, y, z = np.concatenate((ends, apart), 1).reshape(-1, 3).T.copy()
    colour = to_hex(np.asarray(lines.colors)[0]) if len(ends) else colour_of(name)
    both = {"legendgroup": name, "name": made.titles[name]}
    outline = go.Scatter3d(x=x, y=y, z=z, mode="lines", line={"color": colour, "width": 4}, hoverinfo="skip", **both)
    places, words = made.marks[name]
    x, y, z = places.astype(np.float32).reshape(-1, 3).T.copy()
    marker = {"size": 3, "color": colour}
    options = {"hovertext": words, "hoverinfo": "text", "showlegend": False}
    return [outline, go.Scatter3d(x=x, y=y, z=z, mode="markers", marker=marker, **options, **both)]


def _axes(made: Geometry) -> dict[str, Any]:
    """Axes in metres of one scale, and the first look at them."""
    xyz = np.asarray(made.cloud.points)
    reach = float(np.clip(np.abs(xyz[:, :2]).max(initial=20.0), 20, 80))
    low = float(np.clip(xyz[:, 2].min(initial=-1.0), -4, -1))
    high = float(np.clip(xyz[:, 2].max(initial=4.0), 4, 25))
    ranges = {"x": (-reach, reach), "y": (-reach, reach), "z": (low, high)}
    unit = 1 / reach  # of Plotly's scene, for a metre
    middle = np.array([0.0, 0.0, (low + high) / 2])
    place = {k: dict(zip("xyz", ((np.array(p) - middle) * unit).tolist(), strict=True)) for k, p in _LOOK.items()}
    names = {"x": "x, forward (m)", "y": "y, to the left (m)", "z": "z (m)"}
    axis = {"showbackground": False, "gridcolor": "#E5E5E5", "zeroline": False, "showspikes": False}
    return {
        **{f"{k}axis": {**axis, "range": list(ranges[k]), "title": {"text": names[k]}} for k in "xyz"},
        "aspectmode": "manual",
        "aspectratio": {k: (b - a) * unit for k, (a, b) in ranges.items()},
        "camera": {**place, "up": {"x": 0, "y": 0, "z": 1}},
    }


_LOOK = {"eye": EYE, "center": TARGET}
