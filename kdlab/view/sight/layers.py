"""What a panel shows, as numbers on the ground with a scale and a palette, whoever draws it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdlab.distill.regions import footprint_owner
from kdlab.models.labels import label_maps
from kdlab.sample import Boxes3D
from kdlab.view.sight.data import ALL, Sight
from kdlab.view.sight.maps import cosine_map, principal, reduce_channels, stage_map
from kdlab.view.sight.masks import mask_of
from kdlab.view.style import array, robust_norm, symmetric_norm

Palette = Literal["viridis", "magma", "inferno", "cividis", "RdBu_r", "PuOr", "greys"]
View = Literal["norm", "mean", "pca"] | int
"""How channels become a picture: norm or mean over them, three main directions as colours, or a channel's index."""


@dataclass(frozen=True)
class Layer:
    """One map over the ground; row = y, column = x.

    Attributes:
        title: heading.
        values: float32 [H, W], NaN where unknown, or uint8 [H, W, 3] RGB.
        low: where the palette begins.
        high: where it ends.
        palette: colours; no meaning for RGB.
        unit: of the values.
    """

    title: str
    values: NDArray[Any]
    low: float = 0.0
    high: float = 1.0
    palette: Palette = "viridis"
    unit: str = ""


def feature_layers(
    sight: Sight, stage: str, view: View, sides: tuple[str, ...] = ("teacher", "student")
) -> dict[str, Layer]:
    """The sides' maps of a stage on one scale or one basis, and the difference of student and teacher.

    Where widths or cells differ and the method adapts this stage, what the adapter makes stands for the student; the
    title says so. There is no difference where the two still do not fit.

    Args:
        sight: of one sample.
        stage: see `kdlab.view.sight.maps.stage_map`.
        view: see `View`.
        sides: "teacher", "student", and "labels" for the label encoder.

    Returns:
        By side, and "difference"; those that exist.

    Raises:
        ValueError: no side has such a stage or channel, or an unknown view.
    """
    maps, names = side_maps(sight, stage, sides)
    if isinstance(view, int):
        kept = {side: m for side, m in maps.items() if 0 <= view < len(m)}
        if not kept:
            raise ValueError(f"{stage} has no channel {view}; its channels go to {max(map(len, maps.values())) - 1}")
        maps = kept
    titles = {side: f"{names[side]}: {stage}" for side in maps}
    layers = _colours(maps, titles) if view == "pca" else _reduced(maps, titles, view)
    both = [maps[side] for side in ("teacher", "student") if side in maps]
    if len(both) == 2 and both[0].shape[1:] == both[1].shape[1:]:
        difference = _difference(both[0], both[1], view, names["student"])
        if difference is not None:
            layers["difference"] = difference
    return layers


def side_maps(
    sight: Sight, stage: str, sides: tuple[str, ...] = ("teacher", "student")
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Maps [C, H, W] of a stage by side, the adapted student's where there is one, and what each side is called.

    Raises:
        ValueError: no side has such a stage.
    """
    maps: dict[str, Tensor] = {}
    problems = []
    for side in sides:
        try:
            if side == "student" and stage in sight.adapted:
                maps[side] = sight.adapted[stage]
            elif side in sight.features:
                maps[side] = stage_map(sight.features[side], stage)
        except ValueError as error:
            problems.append(f"{side}: {error}")
    if not maps:
        raise ValueError("; ".join(problems) or f"none of {', '.join(sides)} is here")
    names = {side: "label encoder" if side == "labels" else side for side in maps}
    if "student" in maps and stage in sight.adapted:
        names["student"] = "adapted student"
    return maps, names


def _colours(maps: dict[str, Tensor], titles: dict[str, str]) -> dict[str, Layer]:
    one = len({len(m) for m in maps.values()}) == 1
    seen = principal(*maps.values()) if one else [principal(m)[0] for m in maps.values()]
    note = ", PCA" if one else ", PCA of its own"
    rgb = [(array(colours.nan_to_num(0.7)) * 255).round().astype(np.uint8) for colours in seen]
    return {side: Layer(titles[side] + note, values) for side, values in zip(maps, rgb, strict=True)}


def _reduced(maps: dict[str, Tensor], titles: dict[str, str], view: View) -> dict[str, Layer]:
    reduced = {side: reduce_channels(m, view) for side, m in maps.items()}
    norm = robust_norm(*reduced.values())
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 0.0)
    what = f", channel {view}" if isinstance(view, int) else f", {view}"
    return {side: Layer(titles[side] + what, values, low, high) for side, values in reduced.items()}


def _difference(teacher: Tensor, student: Tensor, view: View, name: str) -> Layer | None:
    same = len(teacher) == len(student)
    if view == "pca":
        if not same:
            return None
        values = array((student - teacher).norm(dim=0))
        norm = robust_norm(values)
        return Layer(f"distance of {name} from teacher", values, float(norm.vmin or 0), float(norm.vmax or 0), "magma")
    if isinstance(view, int) and not same:
        return None
    values = reduce_channels(student, view) - reduce_channels(teacher, view)
    return Layer(f"{name} − teacher", values, *_ends(symmetric_norm(values)), "RdBu_r")


def _ends(norm: Any) -> tuple[float, float]:
    return float(norm.vmin), float(norm.vmax)


def term_layer(sight: Sight, term: str, what: Literal["loss", "gradient"] = "loss") -> Layer:
    """A term's loss per cell, or how strongly it pulls on the student there; "all" for the whole method.

    Raises:
        ValueError: no such term, or a gradient that cannot be made.
    """
    name = "all terms" if term == ALL else term
    if what == "loss":
        values, title, palette = sight.loss_map(term), f"{name}: {sight.value(term):.4g}", "inferno"
    else:
        at = sight.pulls.get(term, "student.bev")
        values, title, palette = sight.gradient_map(term), f"{name}: gradient at {at}", "magma"
    shown = array(values)
    norm = robust_norm(shown[shown > 0], np.zeros(1), low=0, high=98)
    unit = "loss per cell" if what == "loss" else "|gradient|"
    return Layer(title, shown, *_ends(norm), palette, unit)  # type: ignore[arg-type]


def mask_layers(sight: Sight) -> dict[str, Layer]:
    """Where boxes and method say that it matters, 0 to 1: footprints, Gaussians, cells of labels, the method's masks.

    What a method weighs by more than 1, such as attention, is shown as a share of its maximum.
    """
    boxes, grid = Boxes3D.pad([sight.sample.boxes]), sight.grid
    values = boxes.values.nan_to_num()
    owner = footprint_owner(values, boxes.valid, grid)[0]
    found = {
        "foreground": (owner < values.shape[1]).float(),
        "Gaussians": mask_of(sight.sample.boxes, grid, 0.1, 2),
        "label maps": label_maps(boxes, grid).mask[0].float(),
    }
    layers = {name: Layer(name, array(mask), palette="cividis") for name, mask in found.items()}
    for name, mask in sight.masks.items():
        top = float(mask.max())
        share = "" if top <= 1 and not name.startswith("scale") else f", share of its maximum {top:.3g}"
        layers[name] = Layer(name + share, array(mask / top if share and top > 0 else mask), palette="cividis")
    return layers


def similarity_layers(sight: Sight, stage: str, row: int, col: int) -> dict[str, Layer]:
    """Cosine similarity of one cell's vector to every other cell's, for each side; NaN where a vector is all zero.

    Args:
        sight: of one sample.
        stage: see `kdlab.view.sight.maps.stage_map`.
        row: of the cell on ``sight.grid``; on a coarser map, the cell that holds it.
        col: likewise.

    Raises:
        ValueError: no such stage, or no such cell.
    """
    maps, names = side_maps(sight, stage)
    layers = {}
    for side, m in maps.items():
        r, c = cell_of(sight, m.shape[-2:], row, col)
        cosine = cosine_map(m, m[:, r, c, None, None].expand_as(m))
        layers[side] = Layer(f"{names[side]}: cosine to the cell", array(cosine), -1.0, 1.0, "PuOr")
    return layers


def cell_of(sight: Sight, size: torch.Size | tuple[int, ...], row: int, col: int) -> tuple[int, int]:
    """Row and column of a cell of ``sight.grid`` on a map of another size that covers the same ground.

    Raises:
        ValueError: no such cell.
    """
    height, width = sight.grid.shape
    if not (0 <= row < height and 0 <= col < width):
        raise ValueError(f"no cell ({row}, {col}) on a grid of {height} x {width} cells")
    return row * size[0] // height, col * size[1] // width
