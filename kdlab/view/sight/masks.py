"""Where methods compare teacher and student, as maps that they make themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdlab.distill import Context, Method, Term, TermResult, distillbev, labeldistill, simdistill, unidistill
from kdlab.distill.regions import gaussian_mask
from kdlab.geometry import BEVGrid
from kdlab.sample import Boxes3D


@torch.no_grad()
def masks_of(method: Method, context: Context) -> dict[str, Tensor]:
    """Masks and weights of a method's terms in the first sample, [H, W] on their own grids, by name.

    DistillBEV: foreground, background, false positives, size scale and attention of each position ("foreground H");
    UniDistill: its response mask; SimDistill: its object mask; LabelDistill: the foreground of each feature term.
    """
    found: dict[str, Tensor] = {}
    for term in method.active:
        make = _MAKERS.get(term.function)
        if make is not None:
            found |= {name: mask[0].float().cpu() for name, mask in make(context, term).items() if name not in found}
    return found


def _distillbev(context: Context, term: Term) -> dict[str, Tensor]:
    position = term.name.rpartition("_")[2]
    regions = distillbev.regions(context, term)
    masks = {"foreground": regions.foreground, "background": regions.background}
    if term.options["false_positives"]:
        masks["false positives"] = regions.false_positive
    masks |= {"scale": regions.size, "attention": distillbev.attention(context, term)}
    return {f"{name} {position}": mask for name, mask in masks.items()}


def _unidistill(context: Context, term: Term) -> dict[str, Tensor]:
    return {"response mask": unidistill.response_mask(context, term, context.student_tensor(term))}


def _simdistill(context: Context, term: Term) -> dict[str, Tensor]:
    grid = context.grid_of(context.student_tensor(term))
    return {"object mask": simdistill.object_mask(context, grid)[:, 0]}


def _labeldistill(context: Context, term: Term) -> dict[str, Tensor]:
    height, width = context.teacher_tensor(term).shape[-2:]
    mask = labeldistill.foreground(labeldistill.truth(context), (height, width), term.options["binary"])
    return {f"foreground {term.name}": mask}


_MAKERS: dict[Callable[[Context, Term], TermResult], Callable[[Context, Term], dict[str, Tensor]]] = {
    distillbev.regional: _distillbev,
    unidistill.response_class: _unidistill,
    simdistill.masked_difference: _simdistill,
    labeldistill.feature: _labeldistill,
}
"""By the function of the terms that use them."""


def mask_of(boxes: Boxes3D, grid: BEVGrid, overlap: float, min_radius: int) -> Tensor:
    """Gaussians around the valid boxes of one sample, merged by maximum, [H, W] in 0..1."""
    values = boxes.values.nan_to_num()[None].float().cpu()
    drawn = boxes.valid[None].cpu()
    return gaussian_mask(values, drawn, grid, overlap=overlap, min_radius=min_radius)[0, 0]
