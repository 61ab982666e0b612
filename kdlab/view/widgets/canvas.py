"""The one widget that kdlab brings its own JavaScript for: linked BEV maps on one metre grid, and the six cameras.

Python sends numbers (`panel_of`, `boxes_of`, `pictures_of`, `points_of`, `mask_bytes`); the page colours, draws and
reads them, so that hovering, thresholds and toggles need no kernel. `static/canvas.js` says what the page does.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import matplotlib
import numpy as np
import torch
import traitlets
from torch import Tensor

from kdlab.geometry import BEVGrid, transform
from kdlab.sample import CAMERAS, CLASSES, Detections, Sample
from kdlab.view.sensors.cameras import LAYOUT, NEAR, box_segments
from kdlab.view.style import Array, Boxes, array, colour_of

if TYPE_CHECKING:
    from kdlab.view.sight.data import Sight
    from kdlab.view.sight.layers import Layer

STATIC = Path(__file__).parent / "static"
"""The widget's JavaScript and style sheet."""

PALETTES = {name: name for name in ("viridis", "magma", "inferno", "cividis", "RdBu_r", "PuOr")} | {"greys": "Greys"}
"""What layers call a colour map, and matplotlib."""

DASHES = {"truth": [], "teacher": [7, 4], "student": [2, 2.5]}
"""Line styles of sets of boxes (on, off, in screen pixels), for readers who do not see their colours."""

LOWEST = 0.05
"""Detections below this score are not sent."""


@lru_cache(maxsize=1)
def palettes() -> dict[str, bytes]:
    """Colour maps by the names that layers use, each 256 colours of 3 bytes."""
    ramp = np.linspace(0, 1, 256)
    colours = {name: matplotlib.colormaps[source](ramp)[:, :3] for name, source in PALETTES.items()}
    return {name: (255 * values).round().astype(np.uint8).tobytes() for name, values in colours.items()}


class Canvas(anywidget.AnyWidget):
    """Linked maps of the ground and six cameras. Set several traits at once with `draw`.

    Everything sent here is drawn as it arrives, the newest only; what the page sends back are ``cell``, ``dragged``,
    ``key`` and ``shown``.

    Attributes:
        panels: maps side by side, see `panel_of`.
        extent: x0, x1, y0, y1 that every map covers, metres.
        cells: rows and columns of the grid that ``cell`` counts on; empty: those of the first map.
        pictures: the six cameras, see `pictures_of`.
        boxes: sets of boxes, see `boxes_of`.
        points: see `points_of`.
        mask: uint8 [H, W] over the extent, see `mask_bytes`.
        pixels: camera, u, v, weight of pixels to mark on the pictures; the weight is the area of the dot.
        min_score: detections below are not drawn.
        mask_threshold: cells of the mask from here on (0..1) are drawn.
        show: what is drawn: "boxes", "points", "mask", "cameras"; the name of a set of boxes hides it if False.
        status: progress (ends in "…") or what went wrong, in words.
        serial: counts updates.
        editable: whether dragging is reported.
        names: of the classes that boxes are labelled with.
        palettes: see `palettes`.
        label: what a screen reader calls the maps.
        cell: row and column that was picked with the mouse or the arrow keys; empty for none.
        dragged: x0, y0, x1, y1 of the last drag, metres.
        key: the last key pressed on the maps that means nothing to them, and how many there were: "space:3".
        shown: serial of the last update that is on the screen.
    """

    _esm = STATIC / "canvas.js"
    _css = STATIC / "canvas.css"

    panels: traitlets.List[Any] = traitlets.List().tag(sync=True)
    extent = traitlets.List([-51.2, 51.2, -51.2, 51.2]).tag(sync=True)
    cells: traitlets.List[Any] = traitlets.List().tag(sync=True)
    pictures: traitlets.List[Any] = traitlets.List().tag(sync=True)
    boxes = traitlets.Dict().tag(sync=True)
    points = traitlets.Bytes(b"").tag(sync=True)
    mask = traitlets.Bytes(b"").tag(sync=True)
    pixels: traitlets.List[Any] = traitlets.List().tag(sync=True)
    min_score = traitlets.Float(0.3).tag(sync=True)
    mask_threshold = traitlets.Float(0.5).tag(sync=True)
    show = traitlets.Dict({"boxes": True, "points": False, "mask": False, "cameras": True}).tag(sync=True)
    status = traitlets.Unicode("").tag(sync=True)
    serial = traitlets.Int(0).tag(sync=True)
    editable = traitlets.Bool(False).tag(sync=True)
    names = traitlets.List(list(CLASSES)).tag(sync=True)
    palettes = traitlets.Dict(default_value=palettes()).tag(sync=True)
    label = traitlets.Unicode("Bird's-eye-view maps").tag(sync=True)

    cell: traitlets.List[Any] = traitlets.List().tag(sync=True)
    dragged: traitlets.List[Any] = traitlets.List().tag(sync=True)
    key = traitlets.Unicode("").tag(sync=True)
    shown = traitlets.Int(0).tag(sync=True)

    @classmethod
    def over(cls, grid: BEVGrid, **traits: Any) -> Canvas:
        """A canvas whose maps cover a grid and whose ``cell`` counts its cells."""
        return cls(**{"extent": [*grid.x, *grid.y], "cells": list(grid.shape), **traits})

    def draw(self, **traits: Any) -> int:
        """Send several traits in one message, so that the page draws once.

        Returns:
            the update's serial, which comes back as ``shown`` once it is on the screen.
        """
        with self.hold_sync():
            for name, value in traits.items():
                setattr(self, name, value)
            self.serial += 1
        return int(self.serial)


def panel_of(layer: Layer, bits: int = 16) -> dict[str, Any]:
    """What the page needs of a layer: numbers and how to colour them.

    Args:
        layer: what to show.
        bits: 16 sends half precision, 8 one of 255 steps between the ends of the colour scale (smaller, for files).

    Raises:
        ValueError: a layer of another shape than [H, W] or [H, W, 3].
    """
    values = np.asarray(layer.values)
    if values.ndim not in (2, 3) or values.shape[2:] not in ((), (3,)):
        raise ValueError(f"panel_of: layer {layer.title!r} must be [H, W] or [H, W, 3], got {values.shape}")
    panel = {"title": layer.title, "shape": list(values.shape[:2]), "low": float(layer.low), "high": float(layer.high)}
    panel |= {"palette": layer.palette, "unit": layer.unit}
    if values.ndim == 3:
        return panel | {"kind": "rgb", "scale": 1.0, "values": values.astype(np.uint8).tobytes()}
    if bits == 8:
        steps = 1 + np.clip((values - layer.low) / ((layer.high - layer.low) or 1.0), 0, 1) * 254
        steps = np.where(np.isfinite(values), steps.round(), 0)  # 0: no number
        return panel | {"kind": "uint8", "scale": 1.0, "values": steps.astype(np.uint8).tobytes()}
    # Gradients can be smaller than a half can hold, so the values travel in units of the colour scale.
    scale = max(abs(layer.low), abs(layer.high)) or 1.0
    halves = np.clip(values / scale, -6e4, 6e4).astype("<f2")
    return panel | {"kind": "float16", "scale": float(scale), "values": halves.tobytes()}


def mask_bytes(values: Tensor | Array) -> bytes:
    """A mask [H, W] of 0..1 as the canvas takes it; what is no number counts as 0."""
    return bytes((255 * np.clip(np.nan_to_num(array(values)), 0, 1)).round().astype(np.uint8).tobytes())


def points_of(points: Tensor, limit: int = 20000) -> bytes:
    """Places of LiDAR points [P, 3+] as half precision, low ones first; of more than ``limit`` every so many-th."""
    cloud = array(points)[:, :3]
    cloud = cloud[np.isfinite(cloud).all(1)]
    cloud = cloud[:: max(1, -(-len(cloud) // limit))]
    return bytes(cloud[np.argsort(cloud[:, 2], kind="stable")].astype("<f2").tobytes())


def pictures_of(sample: Sample, height: int = 150) -> list[dict[str, Any]]:
    """The six key images as JPEG in the order of `LAYOUT`, at most ``height`` pixels high; [] without images.

    ``width`` and ``height`` of a picture are the stored image's, which pixels and box lines count on.
    """
    import cv2

    if sample.images.shape[1] != len(CAMERAS):
        return []
    images = sample.images[0].permute(0, 2, 3, 1).cpu().numpy()
    full = images.shape[1:3]
    ratio = min(1.0, height / full[0])
    pictures = []
    for name in LAYOUT:
        index = CAMERAS.index(name)
        image = cv2.cvtColor(images[index], cv2.COLOR_RGB2BGR)
        if ratio < 1:
            image = cv2.resize(image, None, fx=ratio, fy=ratio, interpolation=cv2.INTER_AREA)
        jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
        title = name.removeprefix("CAM_").replace("_", " ").lower()
        pictures.append({"name": title, "camera": index, "width": full[1], "height": full[0], "jpeg": jpeg})
    return pictures


def boxes_of(sight: Sight, sets: Collection[str] = ("truth", "teacher", "student")) -> dict[str, dict[str, Any]]:
    """The sets of boxes of a sight that there are, as the canvas takes them, see `box_set`."""
    have: dict[str, Boxes] = {"truth": sight.sample.boxes, **sight.detections}
    return {name: box_set(name, have[name], sight.sample) for name in sets if name in have}


def box_set(name: str, boxes: Boxes, sample: Sample | None = None, index: int = 0) -> dict[str, Any]:
    """One set of boxes for the canvas: colour, line style, footprints, and lines in the six cameras.

    Args:
        name: of the set; "truth", "teacher" and "student" have their own colours and line styles.
        boxes: of the set.
        sample: whose cameras to project into; none leaves the lines out.
        index: place of the set, which gives other names their colour.

    Returns:
        ``rows`` of x, y, l, w, yaw, score, label, and ``lines``: for each of CAMERAS float32 [S, 5] of score, u0, v0,
        u1, v1, segments in pixels of the stored image.
    """
    scored = isinstance(boxes, Detections)
    scores = boxes.scores if isinstance(boxes, Detections) else torch.ones(len(boxes))
    keep = scores >= LOWEST if isinstance(boxes, Detections) else boxes.valid
    keep = (keep & boxes.values[:, :7].isfinite().all(-1)).cpu()
    values, scores = boxes.values.detach().float().cpu()[keep], scores.detach().float().cpu()[keep]
    columns = (values[:, [0, 1, 3, 4, 6]].double(), scores[:, None].double(), boxes.labels.cpu()[keep][:, None])
    rows = [[round(v, 3) for v in row] for row in torch.cat(columns, -1).tolist()]
    lines = [] if sample is None else camera_lines(sample, values, scores)
    dash = DASHES.get(name, [8, 3, 2, 3])
    return {"colour": colour_of(name, index), "dash": dash, "scored": scored, "rows": rows, "lines": lines}


def camera_lines(sample: Sample, values: Tensor, scores: Tensor) -> list[bytes]:
    """Edges of boxes [M, 9] in each of the key frame's cameras, see `box_set`; a box out of sight has none there."""
    cameras = sample.images.shape[1]
    if not len(values) or not cameras:
        return [b""] * cameras
    height, width = sample.images.shape[-2:]
    camera_from_key = torch.linalg.inv(sample.frame_from_camera[0].cpu())
    ends = box_segments(values)  # [M, 13, 2, 3]
    places = transform(camera_from_key, ends.reshape(1, -1, 3)).view(cameras, *ends.shape)
    pixels, seen = _project_segments(array(places), array(sample.image_from_camera[0]))
    low, high = pixels.min(3), pixels.max(3)  # [N, M, 13, 2]
    seen &= ((high >= 0) & (low <= np.array([width, height]))).all(-1)
    scored = np.broadcast_to(array(scores)[None, :, None, None], (*seen.shape, 1))
    lines = np.concatenate((scored, pixels.reshape(*seen.shape, 4).round(1)), -1).astype("<f4")
    return [camera[some].tobytes() for camera, some in zip(lines, seen, strict=True)]


def _project_segments(places: Array, matrices: Array) -> tuple[Array, Array]:
    """Pixels [N, M, S, 2, 2] of segments [N, M, S, 2, 3] of N cameras, cut off `NEAR`, and which are in front."""
    depth = places[..., 2]
    seen = (depth > NEAR).any(-1)
    start, end = places[..., 0, :], places[..., 1, :]
    step = depth[..., 1] - depth[..., 0]
    along = ((NEAR - depth[..., 0]) / np.where(step == 0, 1.0, step))[..., None]
    cut = start + along * (end - start)
    near = (depth <= NEAR)[..., None]
    clipped = np.stack((np.where(near[..., 0, :], cut, start), np.where(near[..., 1, :], cut, end)), -2)
    image = np.einsum("nij,nmskj->nmski", matrices, clipped)
    return image[..., :2] / np.maximum(image[..., 2:], 1e-5), seen
