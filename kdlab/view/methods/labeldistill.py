"""What LabelDistill computes on its way, drawn: label maps, label-embedded features, the parts of the channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from kdlab.distill import Part, TensorPath, Term, labeldistill
from kdlab.models.labels import label_maps as maps_of_labels
from kdlab.sample import CLASSES
from kdlab.view.methods.shared import kinds_on, norm_map, on_map, terms_of
from kdlab.view.style import (
    BELOW,
    CLASS_COLOURS,
    OTHERS,
    STUDENT,
    TEACHER,
    array,
    colour_bar,
    new_figure,
    robust_norm,
)

if TYPE_CHECKING:
    from kdlab.view.sight import Observer, Sight

PARTS = (OTHERS[0], TEACHER, STUDENT)
"""Colours of the parts that imitate labels and LiDAR, and of what is left to the image."""


PAINTED = {"no label": "#F2F2F2", "intended\nalone": "#56B4E9", "released\nalone": "#D55E00", "both": "#000000"}
"""Cells that have a label as intended, or as the released code paints."""


def label_maps(sight: Sight) -> Figure:
    """Annotations written into cells: class, length and heading, and what the released code would paint.

    Args:
        sight: its boxes are drawn, on its grid; no network is needed.
    """
    boxes, grid = sight.batch.boxes, sight.grid
    meant, released = (maps_of_labels(boxes, grid, released=r) for r in (False, True))
    mask = array(meant.mask[0])
    figure = new_figure(14.0, 5.2)
    axes = list(figure.subplots(1, 4))
    for ax in axes:
        ax.set_anchor("N")
    kinds = np.where(mask, array(meant.label[0].argmax(-1)), np.nan)
    style: dict[str, Any] = {"cmap": ListedColormap(CLASS_COLOURS), "norm": Normalize(-0.5, 9.5)}
    shown = on_map(axes[0], sight, kinds, grid, "class of each cell", **style)
    bar = figure.colorbar(shown, ax=axes[0], pad=0.02, **BELOW)
    bar.set_ticks(range(len(CLASSES)), labels=[name.replace("_", " ") for name in CLASSES], fontsize=7, rotation=90)
    box = array(meant.box[0])
    length, yaw = np.where(mask, box[..., 3], np.nan), np.where(mask, box[..., 6], np.nan)
    shown = on_map(axes[1], sight, length, grid, "length of the cell's box", cmap="viridis", norm=robust_norm(length))
    colour_bar(axes[1], shown, "metres", **BELOW)
    shown = on_map(axes[2], sight, yaw, grid, "heading", cmap="twilight", norm=Normalize(-np.pi, np.pi))
    colour_bar(axes[2], shown, "radians, counter-clockwise from forward", **{**BELOW, "extend": "neither"})
    both = array(meant.mask[0].int() + 2 * released.mask[0].int())
    kinds_on(axes[3], both, grid, "cells painted, intended and released", PAINTED)
    return figure


def label_features(sight: Sight, observer: Observer) -> Figure:
    """Label-embedded features beside the teacher's, and the student's parts that are to become like them.

    A row per level; one scale in each row. The student's parts are shown behind their adapters, as the terms see them.

    Args:
        sight: what the observer saw.
        observer: with LabelDistill's feature terms.

    Raises:
        ValueError: it has none.
    """
    context, terms = terms_of(sight, observer, labeldistill.feature, "label-embedded features")
    levels: dict[str, list[Term]] = {}
    for term in terms:
        levels.setdefault(term.name.rpartition("_")[2], []).append(term)
    figure = new_figure(13.5, 4.6 * len(levels))
    for part, group in zip(figure.subfigures(len(levels), 1, squeeze=False)[:, 0], levels.values(), strict=True):
        axes = list(part.subplots(1, 2 * len(group), squeeze=False)[0])
        panels = []
        for term in group:
            student, source = context.pair(term)
            how = ", adapted" if term.adapter else ""
            panels += [(term.teacher or "", source), (f"student's part for {term.name}{how}", student)]
        norm = robust_norm(*(norm_map(maps) for _, maps in panels))
        for ax, (title, maps) in zip(axes, panels, strict=True):
            shown = on_map(ax, sight, norm_map(maps), context.grid_of(maps), title, norm=norm, cmap="viridis")
        colour_bar(axes, shown, "norm over channels", **BELOW)
    return figure


def partition(sight: Sight, observer: Observer) -> Figure:
    """How LabelDistill shares out the student's channels: the map of each part, and each term's pull on each channel.

    Args:
        sight: what the observer saw.
        observer: with LabelDistill's feature terms.

    Raises:
        ValueError: it has none, or its terms take all channels.
    """
    context, terms = terms_of(sight, observer, labeldistill.feature, "the partition")
    first = terms[0]
    if not isinstance(first.channels, Part):
        raise ValueError("the partition: these terms take all channels (option partition off)")
    same = [term for term in terms if term.student == first.student]
    whole = context.tensor(first.student)
    frames = TensorPath.parse(first.student).frames_in(context.student)
    parts = {
        f"for {name}": Part(i, first.channels.of, first.channels.across).take(whole, frames)
        for i, name in enumerate(("labels", "LiDAR", "images alone"))
    }
    figure = new_figure(13.5, 4.5)
    axes = list(figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.25]))
    for ax in axes:
        ax.set_anchor("N")
    norm = robust_norm(*(norm_map(maps) for maps in parts.values()))
    for ax, (title, maps) in zip(axes, parts.items(), strict=False):
        shown = on_map(
            ax, sight, norm_map(maps), sight.grid, f"{maps.shape[1]} channels {title}", norm=norm, cmap="viridis"
        )
    colour_bar(axes[:3], shown, f"{first.student}, norm over channels", **BELOW)
    for term, colour in zip(same, PARTS, strict=False):
        pull = array(sight.gradient(term.name, sight.pulls[term.name]).abs().mean((1, 2)))
        axes[3].bar(np.arange(len(pull)), pull, width=1.0, color=colour, label=term.name, alpha=0.8)
    axes[3].set(xlabel=f"channel of {first.student}", ylabel="|gradient|, mean over cells", title="pull of each term")
    axes[3].legend(fontsize=8, frameon=False)
    axes[3].set_box_aspect(1)
    axes[3].spines[["top", "right"]].set_visible(False)
    return figure
