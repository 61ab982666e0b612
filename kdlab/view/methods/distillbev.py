"""What DistillBEV computes on its way, drawn: regions, scales and attention.

The pictures call the functions of `kdlab.distill` that the losses call, on what one sample gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from kdlab.distill import Context, Term, distillbev
from kdlab.distill.terms import cell_attention
from kdlab.view.methods.shared import kinds_on, on_map, terms_of
from kdlab.view.style import BELOW, array, colour_bar, new_figure, robust_norm

if TYPE_CHECKING:
    from kdlab.view.sight import Observer, Sight


def regions(sight: Sight, observer: Observer, positions: Sequence[str] | None = None) -> Figure:
    """DistillBEV's regions, the scale of their cells, and the attention of teacher and adapted student.

    Args:
        sight: what the observer saw.
        observer: with DistillBEV's terms.
        positions: which of `kdlab.distill.distillbev.POSITIONS`, such as ("H",); all that the method compares by
            default.

    Raises:
        ValueError: the method does not compare there.
    """
    context, terms = terms_of(sight, observer, distillbev.regional, "regions")
    first: dict[str, Term] = {}
    for term in terms:
        first.setdefault(term.name.rpartition("_")[2], term)
    chosen = list(first) if positions is None else list(positions)
    if not chosen or not {*chosen} <= {*first}:
        raise ValueError(f"regions: positions {chosen} are not all among those of the method, {list(first)}")
    figure = new_figure(14.0, 4.5 * len(chosen))
    for part, position in zip(figure.subfigures(len(chosen), 1, squeeze=False)[:, 0], chosen, strict=True):
        _region_row(list(part.subplots(1, 4)), sight, context, first[position], position)
    return figure


REGIONS = {"background": "#56B4E9", "foreground": "#E69F00", "false positive": "#000000"}
"""DistillBEV's regions and their colours."""


def _region_row(axes: list[Axes], sight: Sight, context: Context, term: Term, position: str) -> None:
    found = distillbev.regions(context, term)
    student, teacher = distillbev.strengths(context, term)
    grid = context.grid_of(student)
    kinds = array(found.foreground[0].int() + 2 * found.false_positive[0].int())
    kinds_on(axes[0], kinds, grid, f"{position}: regions", REGIONS)
    combined = "distillbev.combined_scale" in context.on
    adaptive = term.options.get("scaling", True)
    kind: tuple[distillbev.Region, ...] = ("foreground", "background", "false_positive")
    scale = array(torch.stack([found.weight(region, combined, adaptive)[0] for region in kind]).sum(0))
    low = float(scale[scale > 0].min()) if (scale > 0).any() else 0.1
    norm: Normalize = LogNorm(low, max(float(scale.max()), 10 * low))
    shown = on_map(
        axes[1], sight, np.where(scale > 0, scale, np.nan), grid, "scale of each cell", norm=norm, cmap="cividis"
    )
    colour_bar(axes[1], shown, "scale (logarithmic)", **{**BELOW, "extend": "neither"})
    temperature = term.options["temperature"]
    both = [array(cell_attention(s.detach(), temperature)[0]) for s in (teacher, student)]
    together = robust_norm(*both, low=0, high=99.5)
    for ax, values, side in zip(axes[2:], both, ("teacher", "adapted student"), strict=True):
        shown = on_map(ax, sight, values, grid, f"attention: {side}", norm=together, cmap="inferno")
    colour_bar(axes[2:], shown, "attention (its mean over cells is 1)", **{**BELOW, "extend": "max"})
