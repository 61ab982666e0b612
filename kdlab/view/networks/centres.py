"""Pictures of the centre head: Gaussian radii, targets, from heat map to boxes, and what a score is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle

from kdlab.config import HeadConfig
from kdlab.data.tables_json import Array
from kdlab.geometry import BEVGrid
from kdlab.metrics.boxes import EvalBoxes
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.evaluation import matches_by_class
from kdlab.metrics.truth import Truth
from kdlab.models.head import CIRCLE_RADIUS, gather_codes
from kdlab.models.nms import circle_nms
from kdlab.models.targets import TASK_OF_CLASS, decode_boxes, gaussian_radius, targets
from kdlab.sample import CLASSES, Boxes3D, Detections, Predictions
from kdlab.view.sensors.sensing import window
from kdlab.view.style import (
    GREY,
    STUDENT,
    TEACHER,
    TRUTH,
    array,
    bev_axes,
    bev_boxes_on,
    bev_image,
    colour_bar,
    new_figure,
)

_SETS = {TRUTH: "truth", TEACHER: "score ≥ 0.2", GREY: "below"}


def gaussian_cases(length: float, width: float, overlap: float) -> Figure:
    """How far a box's two corners may be off while the box still overlaps the true one: CornerNet's three cases.

    Args:
        length: of the box, in cells or metres.
        width: likewise.
        overlap: IoU that must remain.
    """
    radii = [_radius_of_case(length, width, overlap, case) for case in range(3)]
    least = float(gaussian_radius(torch.tensor(length), torch.tensor(width), overlap))
    shifts = ((1, 1), (1, -1), (-1, 1))
    names = ("both corners move the same way", "both move inwards", "both move outwards")
    figure = new_figure(12.0, 4.6)
    reach = max(length, width) / 2 + max(radii) + 0.6
    for ax, radius, (low, high), name in zip(figure.subplots(1, 3), radii, shifts, names, strict=True):
        corners = np.array([[-length / 2, -width / 2], [length / 2, width / 2]])
        moved = corners + radius * np.array([[low], [high]])
        for (start, end), colour, label in ((corners, TRUTH, "true box"), (moved, STUDENT, "box that is off")):
            ax.add_patch(Rectangle(start, *(end - start), fill=True, facecolor=colour, alpha=0.18))
            ax.add_patch(Rectangle(start, *(end - start), fill=False, edgecolor=colour, linewidth=2, label=label))
        for corner in corners:
            ax.add_patch(Circle(corner, radius, fill=False, linestyle=":", color="black"))
        chosen = "  (the least: taken)" if abs(radius - least) < 1e-4 else ""
        ax.set_title(f"{name}\nr = {radius:.2f}{chosen}, IoU {_iou(corners, moved):.2f}", fontsize=10)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="cells")
    ax.legend(fontsize=8, loc="lower right")
    return figure


def _radius_of_case(length: float, width: float, overlap: float, case: int) -> float:
    """The shift at which one case reaches the overlap, by bisection: a check on the formula, not a copy of it."""
    signs = ((1, 1), (1, -1), (-1, 1))[case]
    corners = np.array([[-length / 2, -width / 2], [length / 2, width / 2]])
    low, high = 0.0, float(min(length, width) / (2 if case == 1 else 0.1))
    for _ in range(60):
        middle = (low + high) / 2
        moved = corners + middle * np.array(signs)[:, None]
        low, high = (middle, high) if _iou(corners, moved) > overlap else (low, middle)
    return low


def _iou(a: Array, b: Array) -> float:
    """Of two upright rectangles given by their lower and upper corners."""
    shared = np.clip(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0, None).prod()
    return float(shared / ((a[1] - a[0]).prod() + (b[1] - b[0]).prod() - shared))


def target_maps(boxes: Boxes3D, grid: BEVGrid, head: HeadConfig, focus: int) -> Figure:
    """What the head is to say of a sample: all heat maps at once, and one box close up with what its centre cell holds.

    Args:
        boxes: annotations of the sample.
        grid: of the maps.
        head: has the radius's overlap and least value.
        focus: which box is shown close up.
    """
    found = targets(Boxes3D.pad([boxes]), grid, head)
    label, box = int(boxes.labels[focus]), boxes.values[focus]
    figure = new_figure(12.0, 5.4)
    whole, close = figure.subplots(1, 2)
    norm = Normalize(0, 1)
    image = bev_image(whole, array(found.heatmap[0].amax(0)), grid, norm=norm, cmap="inferno")
    bev_axes(whole, grid, "heat map targets, the highest of ten classes")
    bev_boxes_on(whole, boxes, "white", linewidths=0.6)
    area = window(box[:2], max(6 * grid.cell, float(box[3])))
    bev_image(close, array(found.heatmap[0, label]), grid, norm=norm, cmap="inferno")
    same = boxes[boxes.labels == label]
    bev_boxes_on(close, same, "white", linewidths=1.6)
    row, column = divmod(int(found.cell[0, focus]), grid.width)
    corner = grid.x[0] + column * grid.cell, grid.y[0] + row * grid.cell
    close.add_patch(Rectangle(corner[::-1], grid.cell, grid.cell, fill=False, edgecolor=TEACHER, linewidth=2, zorder=6))
    close.plot(float(box[1]), float(box[0]), "o", color=TRUTH, markeredgecolor="white", zorder=7)
    u, v = (float(value) for value in found.codes[0, focus, :2])
    bev_axes(close, area, f"{CLASSES[label].replace('_', ' ')}: its cell, offset ({u:.2f}, {v:.2f}) cells", ego=False)
    colour_bar([whole, close], image, "target", extend="neither")
    return figure


def decoding(predictions: Predictions, grid: BEVGrid, head: HeadConfig, boxes: Boxes3D, label: int) -> Figure:
    """From a class's heat map to boxes: probabilities, a box of every cell, those of local maxima, those left by NMS.

    Args:
        predictions: of one sample, first of the batch.
        grid: of the maps.
        head: its window and least score; NMS is shown by circles.
        boxes: annotations, for comparison.
        label: index into CLASSES.
    """
    heat = predictions.heatmap[:1].detach().float().sigmoid()
    side = head.local_max
    highest = (F.max_pool2d(heat, side, 1, side // 2) == heat)[0, label].flatten()
    scores, cell = heat[0, label].flatten().sort(descending=True)
    cell, scores = cell[scores >= head.score_threshold], scores[scores >= head.score_threshold]
    task = TASK_OF_CLASS[label]
    values = decode_boxes(gather_codes(predictions, torch.full_like(cell, task)[None], cell[None])[0], cell, grid)
    radius = values.new_full((len(values),), CIRCLE_RADIUS[task])
    peak = highest[cell]
    kept = peak.clone()
    kept[peak] = circle_nms(values[peak], torch.zeros_like(cell[peak]), radius[peak])
    name, least = CLASSES[label].replace("_", " "), head.score_threshold
    panels = {
        f"2  a box of every cell of at least {least:g}: {len(cell)}": torch.ones_like(peak),
        f"3  of cells that are highest of {side} × {side}: {int(peak.sum())}": peak,
        f"4  after NMS within {float(CIRCLE_RADIUS[task]):g} m: {int(kept.sum())}": kept,
    }
    figure = new_figure(12.0, 11.6)
    axes = list(figure.subplots(2, 2).ravel())
    truth = boxes[boxes.labels == label]
    image = bev_image(axes[0], array(heat[0, label]), grid, vmin=0, vmax=1, cmap="inferno")
    bev_boxes_on(axes[0], truth, "white", linewidths=1.0)
    bev_axes(axes[0], grid, f"1  heat map of {name}")
    colour_bar(axes[0], image, "probability", extend="neither")
    labels = torch.full_like(cell, label)
    for ax, (title, chosen) in zip(axes[1:], panels.items(), strict=True):
        bev_axes(ax, grid, title)
        found = Detections(values[chosen], labels[chosen], scores[chosen])
        bev_boxes_on(ax, found, GREY, linewidths=0.9)
        bev_boxes_on(ax, truth, TRUTH, linewidths=2.0)
        bev_boxes_on(ax, found, TEACHER, 0.2, linewidths=1.4)
    handles = [Line2D([], [], color=c, label=t) for c, t in _SETS.items()]
    axes[1].legend(handles=handles, fontsize=8, loc="upper left")
    return figure


def scored_matches(
    truth: Truth, found: EvalBoxes, within: float = 2.0, config: EvaluationConfig | None = None
) -> tuple[Array, Array]:
    """Score of each detection and whether it is a match, float64 and bool [n], of all classes together.

    Args:
        truth: annotations.
        found: detections.
        within: metres between centres for a match; one of the config's.
        config: those of the nuScenes detection challenge where left out.

    Raises:
        KeyError: no such distance.
    """
    config = config or EvaluationConfig()
    scores, hits = [np.zeros(0)], [np.zeros(0, bool)]
    for _, matches in matches_by_class(truth, found, config, np.ones(len(truth.tokens), bool)):
        scores.append(found.score[matches.predictions])
        hits.append(matches.partner(within) >= 0)
    return np.concatenate(scores), np.concatenate(hits)


def calibration(scores: Array, hits: Array, bins: int = 10, title: str = "") -> Figure:
    """What a score is worth: the share of matches among detections of about one score, and how many there are.

    Args:
        scores: [n], 0..1.
        hits: bool [n].
        bins: of the score, equally wide.
        title: heading.
    """
    place = np.clip((np.asarray(scores) * bins).astype(int), 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    mean = np.bincount(place, weights=scores, minlength=bins) / np.maximum(count, 1)
    share = np.bincount(place, weights=np.asarray(hits, float), minlength=bins) / np.maximum(count, 1)
    gap = float((count * np.abs(mean - share)).sum() / max(count.sum(), 1))
    known = count > 0
    error = np.abs(_interval(share[known], count[known]) - share[known])
    figure = new_figure(11.0, 4.4)
    curve, bars = figure.subplots(1, 2)
    curve.plot([0, 1], [0, 1], "--", color=GREY, label="score = share of matches")
    style: dict[str, Any] = {"fmt": "o-", "color": TEACHER, "capsize": 3}
    curve.errorbar(mean[known], share[known], error, **style, label="detections, with 95 % intervals")
    curve.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="mean score", ylabel="share of matches", aspect="equal")
    curve.set_title(f"mean gap between score and share: {gap:.3f}", fontsize=11)
    curve.legend(fontsize=8, loc="upper left")
    _counts(bars, count)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def _interval(share: Array, count: Array, z: float = 1.96) -> Array:
    """Wilson's interval of shares of counts, low and high [2, n]; unlike the normal one it is never of no width."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return np.stack((middle - half, middle + half))


def _counts(ax: Axes, count: Array) -> None:
    middles = (np.arange(len(count)) + 0.5) / len(count)
    drawn = ax.bar(middles, count, width=0.9 / len(count), color=GREY)
    ax.bar_label(drawn, fontsize=8)
    ax.set(yscale="symlog", xlabel="score", ylabel="detections", ylim=(0, max(2, count.max()) * 3))
    ax.set_title("how many there are", fontsize=11)
