"""All that is known about one cell: its vectors, the pixels that feed it, its points, its losses, its boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdlab.geometry import footprint
from kdlab.sample import CAMERAS, CLASSES, Features
from kdlab.view.sight.data import Sight
from kdlab.view.sight.layers import cell_of, side_maps
from kdlab.view.style import Boxes, kept

MIN_SCORE = 0.2
"""Detections below are not named."""


@dataclass(frozen=True)
class Pixel:
    """A pixel whose features are splatted into a cell.

    Attributes:
        camera: place in CAMERAS.
        u: to the right, pixels of the stored image; the middle of the feature map's cell.
        v: down, likewise.
        depth: metres along the optical axis; mean of the depth bins that reach the cell, by weight.
        weight: probability of those bins.
    """

    camera: int
    u: float
    v: float
    depth: float
    weight: float


@dataclass
class CellReport:
    """What is known about a cell.

    Attributes:
        row: on ``Sight.grid``.
        col: likewise.
        x: of its centre, metres forward.
        y: metres to the left.
        cosine: similarity of teacher's and student's vectors at the stage; NaN where there are no two to compare.
        norms: length of each side's vector.
        pixels: that feed it, the greatest weight first.
        points: LiDAR points in it, [K, 5].
        losses: of each term, on the term's own cell there.
        gradients: likewise; those that were made.
        boxes: names of the boxes over it.
    """

    row: int
    col: int
    x: float
    y: float
    cosine: float = math.nan
    norms: dict[str, float] = field(default_factory=dict)
    pixels: list[Pixel] = field(default_factory=list)
    points: Tensor = field(default_factory=lambda: torch.zeros(0, 5))
    losses: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    boxes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The report as a few lines and a table of the terms."""
        lines = [f"**x {self.x:+.1f} m, y {self.y:+.1f} m** (row {self.row}, column {self.col})", ""]
        if self.boxes:
            lines.append(f"- boxes: {', '.join(self.boxes)}")
        if self.norms:
            norms = ", ".join(f"{side} {value:.3g}" for side, value in self.norms.items())
            cosine = "" if math.isnan(self.cosine) else f"; cosine {self.cosine:+.2f}"
            lines.append(f"- vectors: {norms}{cosine}")
        lines.append(f"- LiDAR points: {len(self.points)}{_heights(self.points)}")
        for pixel in self.pixels[:3]:
            name = CAMERAS[pixel.camera].removeprefix("CAM_").replace("_", " ").lower()
            place = f"({pixel.u:.0f}, {pixel.v:.0f}), {pixel.depth:.1f} m"
            lines.append(f"- pixel: {name} {place}, weight {pixel.weight:.3f}")
        if len(self.pixels) > 3:
            lines.append(f"- and {len(self.pixels) - 3} more pixels")
        if self.losses:
            lines += ["", "| term | loss | gradient |", "|---|---:|---:|"]
            for term, loss in self.losses.items():
                pull = f"{self.gradients[term]:.3g}" if term in self.gradients else ""
                lines.append(f"| {term} | {loss:.3g} | {pull} |")
        return "\n".join(lines)


def inspect(sight: Sight, row: int, col: int, stage: str = "bev", gradients: bool = False) -> CellReport:
    """Report on a cell.

    Args:
        sight: of one sample.
        row: on ``sight.grid``, at stride 1; coarser maps are read at the cell that holds it.
        col: likewise.
        stage: whose vectors are compared, see `kdlab.view.sight.maps.stage_map`; a side without it is left out.
        gradients: make the terms' gradient maps that were not asked for before.

    Raises:
        ValueError: no such cell.
    """
    cell_of(sight, sight.grid.shape, row, col)
    x, y = sight.grid.to_metres(torch.tensor((col + 0.5, row + 0.5))).tolist()
    report = CellReport(row, col, x, y)
    _compare(report, sight, stage)
    report.pixels = pixels_of(sight, row, col)
    column, line, inside = sight.grid.locate(sight.sample.points[:, :2])
    report.points = sight.sample.points[inside & (column == col) & (line == row)]
    for term in sight.results:
        found = sight.loss_map(term)
        report.losses[term] = float(found[cell_of(sight, found.shape, row, col)])
        if term in sight.gradients or (gradients and (sight.live is not None or sight.again is not None)):
            pull = sight.gradient_map(term)
            report.gradients[term] = float(pull[cell_of(sight, pull.shape, row, col)])
    report.boxes = _names(sight, row, col)
    return report


def _compare(report: CellReport, sight: Sight, stage: str) -> None:
    try:
        maps, _ = side_maps(sight, stage)
    except ValueError:
        return
    vectors = {}
    for side, found in maps.items():
        r, c = cell_of(sight, found.shape[-2:], report.row, report.col)
        vectors[side] = found[:, r, c]
    report.norms = {side: float(vector.norm()) for side, vector in vectors.items()}
    if len(vectors) == 2 and len(vectors["teacher"]) == len(vectors["student"]) and all(report.norms.values()):
        report.cosine = float(torch.cosine_similarity(vectors["teacher"], vectors["student"], dim=0))


def _lifted(sight: Sight) -> Features | None:
    """The features of the side whose lift is at hand."""
    return next((f for f in (sight.student, sight.teacher) if f is not None and f.lift is not None), None)


def pixels_of(sight: Sight, row: int, col: int) -> list[Pixel]:
    """The pixels of the key frame that feed a cell, the greatest weight first; several depth bins of one are merged."""
    features = _lifted(sight)
    if features is None or features.lift is None or features.image is None or sight.depth_bins is None:
        return []
    lift, (height, width) = features.lift, features.image.shape[-2:]
    here = lift.cell == row * sight.grid.width + col
    if not bool(here.any()):
        return []
    low, _, step = sight.depth_bins
    weight, middle = lift.weight[here], low + (lift.bin[here] + 0.5) * step
    pixel, which = lift.pixel[here].unique(return_inverse=True)
    total = torch.zeros(len(pixel)).index_add_(0, which, weight)
    depth = torch.zeros(len(pixel)).index_add_(0, which, weight * middle) / total.clamp(min=1e-12)
    camera = pixel // (height * width)
    v, u = (pixel % (height * width)) // width, pixel % width
    stride = sight.batch.images.shape[-1] / width
    at = torch.stack(((u + 0.5) * stride, (v + 0.5) * stride, torch.ones(len(u))), -1).double()
    places = torch.stack([stored_from_batch(sight, int(n)) @ p for n, p in zip(camera, at, strict=True)])
    found = zip(camera.tolist(), *places.T[:2].tolist(), depth.tolist(), total.tolist(), strict=True)
    return sorted((Pixel(*values) for values in found), key=lambda pixel: -pixel.weight)


def stored_from_batch(sight: Sight, camera: int) -> Tensor:
    """The pixel transform, float64 [3, 3], from the network's image of a camera to the stored one."""
    ours, theirs = sight.sample.image_from_camera[0, camera], sight.batch.image_from_camera[0, 0, camera]
    change: Tensor = ours.double() @ torch.linalg.inv(theirs.double())
    return change


def _names(sight: Sight, row: int, col: int) -> list[str]:
    """Boxes whose footprint holds the cell's centre, or whose centre lies in the cell."""
    centre = sight.grid.to_metres(torch.tensor((col + 0.5, row + 0.5)))
    sets: dict[str, Boxes] = {"truth": sight.sample.boxes, **sight.detections}
    named = []
    for name, boxes in sets.items():
        values, labels = kept(boxes, MIN_SCORE)
        if not len(values):
            continue
        scores = boxes.scores[boxes.scores >= MIN_SCORE] if name != "truth" else None  # type: ignore[union-attr]
        axes = footprint(values, ((0.5, 0.0), (0.0, 0.5))) - values[:, None, :2]  # half length and half width
        along = ((centre - values[:, None, :2]) * axes).sum(-1).abs() <= axes.square().sum(-1)
        column, line, _ = sight.grid.locate(values[:, :2])
        over = along.all(-1) | ((column == col) & (line == row))
        for i in over.nonzero().flatten().tolist():
            score = "" if scores is None else f" {float(scores[i]):.2f}"
            named.append(f"{CLASSES[int(labels[i])].replace('_', ' ')}{score} ({name})")
    return named


def _heights(points: Tensor) -> str:
    if not len(points):
        return ""
    return f", heights {float(points[:, 2].min()):.1f} to {float(points[:, 2].max()):.1f} m"
