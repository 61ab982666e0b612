"""A method's terms in a short training: what each of them is on the watched sample, and where one of them falls."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from kdlab.view.style import (
    GREY,
    OTHERS,
    STUDENT,
    TEACHER,
    TRUTH,
    array,
    bev_axes,
    bev_boxes_on,
    bev_image,
    colour_bar,
    new_figure,
    robust_norm,
)

if TYPE_CHECKING:
    from kdlab.view.results.timelapse import Timelapse

COLOURS = (OTHERS[0], TEACHER, STUDENT, TRUTH, OTHERS[1], OTHERS[2], "black", GREY)
"""Of the curves."""


def term_losses(lapse: Timelapse, term: str) -> Figure:
    """Each term's loss on the watched sample as a share of what it was, and one term's loss per cell before and after.

    Args:
        lapse: of a training with a method.
        term: whose loss is drawn on the ground, both times on one scale.

    Raises:
        ValueError: no such term.
    """
    first, last = lapse.sights[0], lapse.sights[-1]
    maps = [array(sight.loss_map(term)) for sight in (first, last)]
    figure = new_figure(13.0, 4.8)
    axes = list(figure.subplots(1, 3))
    for name, colour in zip(first.results, cycle(COLOURS), strict=False):
        start = first.value(name) or 1.0
        share = [sight.value(name) / start for sight in lapse.sights]
        axes[0].plot(lapse.steps, share, color=colour, marker="o", markersize=4, label=name)
    axes[0].axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes[0].set(title="loss on the watched sample", xlabel="steps", ylabel="share of the loss before the training")
    axes[0].set_ylim(bottom=0)
    axes[0].set_box_aspect(1)
    axes[0].spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    norm = robust_norm(*(m[m > 0] for m in maps), np.zeros(1), low=0, high=98)
    for ax, values, name in zip(axes[1:], maps, ("before", f"after {lapse.steps[-1]} steps"), strict=True):
        shown = bev_image(ax, values, last.grid, norm=norm, cmap="inferno")
        bev_axes(ax, last.grid, f"{term} {name}: {values.sum():.3g}")
        bev_boxes_on(ax, last.sample.boxes, "white", linewidths=0.6)
    colour_bar(axes[1:], shown, "loss per cell", extend="max")
    return figure
