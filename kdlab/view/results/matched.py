"""Predicted beside true numbers of matched boxes: what a metric's one number is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from kdlab.evaluate import Found
from kdlab.sample import CLASSES, Sample
from kdlab.view.style import GREY, STUDENT, array, new_figure

SIDES = ("length", "width", "height")


def pairs(
    samples: Sequence[Sample], found: Sequence[Found], within: float = 2.0, min_score: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """Each true box with the nearest detection of its class, as far as there is one.

    Args:
        samples: with annotations.
        found: of the same samples.
        within: greatest distance of the centres, metres.
        min_score: detections below are left out.

    Returns:
        true values [K, 9], predicted values [K, 9] and labels [K].
    """
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for sample, one in zip(samples, found, strict=True):
        boxes, seen = sample.boxes, one.detections
        good = seen.scores >= min_score
        values, labels = seen.values[good], seen.labels[good]
        if not len(boxes) or not len(values):
            continue
        apart = torch.cdist(boxes.values[:, :2], values[:, :2])
        apart = torch.where(boxes.labels[:, None] == labels, apart, torch.inf)
        near, which = apart.min(1)
        hit = near < within
        rows.append((boxes.values[hit], values[which[hit]], boxes.labels[hit]))
    if not rows:
        return torch.zeros(0, 9), torch.zeros(0, 9), torch.zeros(0, dtype=torch.long)
    true, predicted, classes = (torch.cat(column) for column in zip(*rows, strict=True))
    return true, predicted, classes


def sizes(true: Tensor, predicted: Tensor) -> Figure:
    """Predicted over true length, width and height of matched boxes [K, 9], metres; right is the diagonal."""
    figure = new_figure(12.0, 4.3)
    axes = figure.subplots(1, 3)
    for ax, name, column in zip(axes, SIDES, (3, 4, 5), strict=True):
        x, y = array(true[:, column]), array(predicted[:, column])
        top = 1.08 * float(max(x.max(initial=1.0), y.max(initial=1.0)))
        ax.plot([0, top], [0, top], color=GREY, label="as it should be")
        ax.scatter(x, y, s=10, color=STUDENT, alpha=0.6, label=f"{len(x)} matched boxes")
        ax.set(xlim=(0, top), ylim=(0, top), aspect="equal", xlabel=f"true {name} (m)", ylabel=f"predicted {name} (m)")
        ax.set_title(name, fontsize=11)
    axes[0].legend(loc="upper right", fontsize=8)
    return figure


def turns(true: Tensor, predicted: Tensor, labels: Tensor, bins: int = 36) -> Figure:
    """How far predicted headings of matched boxes [K, 9] are turned from the true ones, for three kinds of classes."""
    walker, barrier, cone = (labels == CLASSES.index(name) for name in ("pedestrian", "barrier", "traffic_cone"))
    kinds = {"classes with a front": ~(walker | barrier | cone), "pedestrians": walker, "barriers": barrier}
    turn = (predicted[:, 6] - true[:, 6] + math.pi) % (2 * math.pi) - math.pi
    figure = new_figure(12.0, 3.6)
    axes = figure.subplots(1, 3)
    for ax, (name, mask) in zip(axes, kinds.items(), strict=True):
        ax.hist(array(turn[mask]), bins=bins, range=(-math.pi, math.pi), color=STUDENT)
        ax.set_xticks(np.arange(-2, 3) * math.pi / 2, ["−π", "−π/2", "0", "π/2", "π"])
        ax.set(xlabel="predicted − true heading (rad)", ylabel="boxes")
        off = turn[mask].abs()
        if name == "barriers":  # as nuScenes counts: half a turn leaves them as they are
            off, name = torch.minimum(off, math.pi - off), "barriers, up to half a turn"
        mean = float(off.mean()) if len(off) else math.nan
        ax.set_title(f"{name}: {len(off)}, mean {mean:.2f} rad off", fontsize=11)
    return figure
