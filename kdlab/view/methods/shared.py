"""What the pictures of the four methods share: the terms of a sight, maps drawn on the ground, kinds of cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from torch import Tensor

from kdlab.distill import Context, Term
from kdlab.geometry import BEVGrid
from kdlab.view.style import BELOW, array, bev_axes, bev_boxes_on, bev_image, owner

if TYPE_CHECKING:
    from kdlab.view.sight import Observer, Sight


def terms_of(sight: Sight, observer: Observer, function: Callable[..., Any], what: str) -> tuple[Context, list[Term]]:
    """What the terms of a sight look at, and those of the observer's method that a function computes.

    Raises:
        ValueError: the observer has no method, or one without such a term; the sight was read from a file.
    """
    if observer.method is None:
        raise ValueError(f"{what} belong to a method: look with an Observer that has teacher, student and method")
    found = [term for term in observer.method.active if term.function is function and term.name in sight.results]
    if not found:
        raise ValueError(f"{what}: the method {observer.method.name} has no such term here")
    return sight.graph().context, found


def norm_map(maps: Tensor) -> Any:
    """Norm over channels [H, W] of the first sample of maps [B, C, H, W]."""
    return array(maps[0].norm(dim=0))


def on_map(ax: Axes, sight: Sight, values: Any, grid: BEVGrid, title: str, **style: Any) -> Any:
    """Draw a map in metres with the annotated boxes in white; returns the image, for a colour bar."""
    shown = bev_image(ax, values, grid, **style)
    bev_axes(ax, grid, title)
    bev_boxes_on(ax, sight.sample.boxes, "white", linewidths=0.5)
    return shown


def kinds_on(ax: Axes, kinds: Any, grid: BEVGrid, title: str, names: Mapping[str, str]) -> None:
    """Draw a map of whole numbers [H, W], each a kind with a name and a colour, and how many cells are of each."""
    shown = bev_image(
        ax, kinds, grid, cmap=ListedColormap(list(names.values())), norm=Normalize(-0.5, len(names) - 0.5)
    )
    bev_axes(ax, grid, title)
    texts = [f"{name}\n{int((kinds == i).sum())} cells" for i, name in enumerate(names)]
    bar = owner(ax).colorbar(shown, ax=ax, pad=0.02, **BELOW)
    bar.set_ticks(range(len(names)), labels=texts, fontsize=7)
    bar.ax.tick_params(length=0)
