"""What each term of a method pulls at, and what each quirk of the released code changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from kdlab.distill.method import Quirk
from kdlab.sample import Sample
from kdlab.view.sight.data import Sight
from kdlab.view.style import (
    GREY,
    STUDENT,
    array,
    bev_axes,
    bev_boxes_on,
    bev_image,
    colour_bar,
    new_figure,
    robust_norm,
)

if TYPE_CHECKING:
    import pandas as pd

    from kdlab.view.sight import Observer

BEV = "student.bev"
"""Where all that comes after the lift, the detection losses too, pulls at the student."""


def terms_off(sight: Sight, at: str = BEV) -> Figure:
    """Gradient at the student's BEV map: of the whole method, then with each term switched off, on one scale.

    A map is |gradient| summed over channels; the bars say by how much the gradient changes without a term, as a share
    of the whole one. A term that acts before this map, or beside it, changes nothing here; its bar says so.

    Args:
        sight: with the method's results.
        at: one of the student's maps at which gradients end (`Live.leaves`), such as "student.lidar_bev".

    Raises:
        ValueError: the sight holds no terms, was read from a file, or has no such map.
    """
    leaves = sight.graph().leaves
    if at not in leaves:
        raise ValueError(f"terms_off: no map {at!r} here; known: {', '.join(leaves)}")
    gradients = {name: sight.gradient(name, at) for name in sight.results}
    whole = torch.stack(list(gradients.values())).sum(0)
    panels = {"all terms": whole} | {f"without {name}": whole - g for name, g in gradients.items() if g.any()}
    maps = {name: array(g.abs().sum(0)) for name, g in panels.items()}
    norm = robust_norm(*(m[m > 0] for m in maps.values()), np.zeros(1), low=0, high=99.5)
    across = len(maps) if len(maps) <= 5 else 4
    down, side = -(-len(maps) // across), 11.4 / across
    bars = 0.9 + 0.24 * len(gradients)
    figure = new_figure(12.4, side * down + bars + 1.0)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[side * down + 1.0, bars])[:, 0]
    axes = upper.subplots(down, across, squeeze=False).ravel()
    for ax in axes[len(maps) :]:
        ax.set_axis_off()
    for index, (ax, (name, values)) in enumerate(zip(axes, maps.items(), strict=False)):
        shown = bev_image(ax, values, sight.grid, norm=norm, cmap="inferno")
        _small(ax, sight, name, index, across, len(maps))
    colour_bar(list(axes), shown, f"|gradient| at {at}, sum over channels", fraction=0.03, extend="max")
    _share_bars(lower.subplots(), gradients, whole, at, sight)
    return figure


def _small(ax: Axes, sight: Sight, title: str, index: int, across: int, many: int) -> None:
    """A small map: labels of the axes at the left and below alone."""
    bev_axes(ax, sight.grid, title)
    ax.title.set_fontsize(9)
    ax.tick_params(labelsize=7)
    if index % across:
        ax.set_ylabel("")
    if index + across < many:
        ax.set_xlabel("")
    bev_boxes_on(ax, sight.sample.boxes, "white", linewidths=0.5)


def _share_bars(ax: Axes, gradients: Mapping[str, Tensor], whole: Tensor, at: str, sight: Sight) -> None:
    base = float(whole.norm()) or 1.0
    names = list(gradients)
    sizes = [float(g.norm()) / base for g in gradients.values()]
    ax.barh(names, sizes, color=[STUDENT if size else GREY for size in sizes])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15 * max([*sizes, 0.1]))
    for row, (name, size) in enumerate(zip(names, sizes, strict=True)):
        text = f" {size:.1%}" if size else f" not at this map: it acts on {sight.pulls[name]}"
        ax.text(size, row, text, va="center", fontsize=8)
    ax.set_xlabel("size of the term's gradient, share of the whole one (shares need not add up: terms may disagree)")
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


COLUMNS = ("quirk", "the released code", "changes", "loss", "|gradient|", "cosine", "cosine of changed terms", "note")
"""Of `quirk_costs`."""

NOISE = 1e-4
"""Relative changes of a gradient below this are those of a GPU's order of summation."""

SAME = "nothing to act on in this sample"
_PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


def quirk_costs(observer: Observer, sample: Sample) -> tuple[pd.DataFrame, Figure]:
    """Each quirk of the method switched on by itself: what it does to the loss and to the student's gradient.

    The networks stay as they are: this is what the quirk would ask of this student now, not what a training with it
    would end in. Gradients are those at the student's BEV maps; a cosine is between the gradient with the quirk and the
    intended one, of the whole method or of the terms that the quirk changes.

    Args:
        observer: with a method.
        sample: to look at.

    Returns:
        A row per quirk (`COLUMNS`; NaN where it cannot be switched on here, with the reason in words), and the figure.

    Raises:
        ValueError: the observer has no method, one without quirks, or one of which this pair can have no term.
    """
    import pandas as pd

    method = observer.method
    if method is None or not method.quirks:
        raise ValueError("quirk_costs needs an observer whose method has quirks; give it one, such as 'unidistill'")
    base = _pulls(observer.with_quirks(()), sample)
    if not base.losses:
        raise ValueError(f"quirk_costs: no term of {method.name} can be had from this pair; see Observer.errors")
    rows = [("none (intended)", "", "", base.loss, base.size, 1.0, float("nan"), "")]
    rows += [_row(observer, sample, quirk, base) for quirk in method.quirks]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table, _quirk_figure(table)


@dataclass
class _Pulls:
    """Loss of each term, and its gradient at all maps of the student where gradients end, in one row, float64."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]

    @property
    def loss(self) -> float:
        return sum(self.losses.values())

    @property
    def size(self) -> float:
        return float(self.of(self.losses).norm())

    def of(self, terms: Collection[str]) -> Tensor:
        """The gradient of some terms together."""
        return torch.stack([self.gradients[name] for name in terms]).sum(0)


def _pulls(observer: Observer, sample: Sample) -> _Pulls:
    sight = observer.see(sample)
    maps = sight.graph().leaves
    rows = {name: torch.cat([sight.gradient(name, at).flatten() for at in maps]).double() for name in sight.results}
    return _Pulls({name: sight.value(name) for name in rows}, rows)


def _row(observer: Observer, sample: Sample, quirk: Quirk, base: _Pulls) -> tuple[Any, ...]:
    name, unknown = quirk.name.partition(".")[2], (float("nan"),) * 4
    if quirk.student is not None:
        return name, quirk.what, "", *unknown, f"needs another student, trained with detector.{quirk.student}"
    other = observer.with_quirks((quirk.name,))
    if quirk.name in other.errors:
        return name, quirk.what, "", *unknown, other.errors[quirk.name]
    now = _pulls(other, sample)
    shared = [term for term in base.losses if term in now.losses]
    moved = {term: float((now.gradients[term] - base.gradients[term]).norm()) for term in shared}
    changed = [term for term in shared if moved[term] > NOISE * float(base.gradients[term].norm())]
    whole = float(F.cosine_similarity(now.of(shared), base.of(shared), dim=0))
    part = float(F.cosine_similarity(now.of(changed), base.of(changed), dim=0)) if changed else float("nan")
    return name, quirk.what, ", ".join(changed), now.loss, now.size, whole, part, _note(quirk, not changed)


def _note(quirk: Quirk, same: bool) -> str:
    mode = quirk.teacher_mode
    if mode is not None and mode.trainable:
        return f"the same loss, but it would train the teacher's {', '.join(mode.trainable)} along"
    if mode is not None and mode.batch_statistics:
        return "on the statistics of this one sample; those of a batch are milder"
    if same:
        return SAME
    if quirk.where == "adapter":
        return "adapters that it adds or changes are fresh: this student was trained without it"
    return "the networks were trained on data without it" if quirk.where == "data" else ""


def _quirk_figure(table: pd.DataFrame) -> Figure:
    figure = new_figure(12.0, 1.6 + 0.42 * len(table))
    axes = figure.subplots(1, 3, sharey=True)
    names = table["quirk"].tolist()
    panels = (
        ("loss", "the method's loss"),
        ("|gradient|", "size of its gradient"),
        ("cosine", "cosine to the intended one"),
    )
    same = [not changes for changes in table["changes"]]
    for ax, (column, title) in zip(axes, panels, strict=True):
        values = table[column].to_numpy(float)
        colours = [GREY if s else STUDENT for s in same]
        ax.barh(names, np.nan_to_num(values), color=colours)
        ax.set_title(title, fontsize=10)
        ax.axvline(values[0], color="black", linewidth=0.8, linestyle=":")
        reach = 1.0 if column == "cosine" else float(np.nanmax(values)) or 1.0
        ax.set_xlim(min(0.0, float(np.nanmin(values))) * 1.1, 1.3 * reach)
        for row, value in enumerate(values):
            text = "not with these networks" if np.isnan(value) else f"{value:.3g}"
            place = (0 if np.isnan(value) else max(value, 0), row)
            ax.annotate(text, place, (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=_PLAIN)
        ax.spines[["top", "right"]].set_visible(False)
    part = table["cosine of changed terms"].to_numpy(float)
    axes[2].plot(part, range(len(part)), "D", color="black", markersize=6, label="of the terms that it changes alone")
    axes[2].set_xlim(min(0.0, float(np.nanmin([*part, 0.0]))) * 1.1, 1.3)
    handles = [Patch(color=STUDENT, label="quirk switched on"), Patch(color=GREY, label="intended, or unchanged here")]
    figure.legend(handles=[*handles, *axes[2].lines[-1:]], loc="outside lower center", ncols=3, frameon=False)
    axes[0].invert_yaxis()
    return figure
