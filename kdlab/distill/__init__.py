"""Distillation: methods as data, their terms, and the Distiller that runs them."""

from __future__ import annotations

from collections.abc import Callable

from kdlab.config import DistillConfig, Modality
from kdlab.distill import distillbev as _distillbev
from kdlab.distill import labeldistill as _labeldistill
from kdlab.distill import simdistill as _simdistill
from kdlab.distill import unidistill as _unidistill
from kdlab.distill.context import Context
from kdlab.distill.distiller import Distiller, copy_start, run_terms, total
from kdlab.distill.method import Adapter, Method, Quirk, Stage, Start, TeacherMode, Term
from kdlab.distill.paths import Channels, HasChannels, Part, TensorPath
from kdlab.distill.places import Boxes, Cells, Nowhere, Pairs, Points, Slots, TermResult, gradient_map

METHODS: dict[str, Callable[[Modality, Modality], Method]] = {
    "unidistill": _unidistill.by_modality,
    "distillbev": lambda student, teacher: _distillbev.distillbev().between(student, teacher),
    "simdistill": lambda student, teacher: _simdistill.simdistill().between(student, teacher),
    "labeldistill": lambda student, teacher: _labeldistill.labeldistill().between(student, teacher),
}
"""One row per paper: (student's modality, teacher's modality) -> the intended method."""


def build_method(config: DistillConfig, student: Modality, teacher: Modality) -> Method:
    """The method that a config describes: path by modality, then variant, flipped quirks, weights, scale.

    Raises:
        ValueError: an unknown method, quirk or term (the message lists the known ones), or modalities without a path.
    """
    if config.method not in METHODS:
        raise ValueError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}")
    method = METHODS[config.method](student, teacher).variant(config.variant).flip(config.quirks)
    scales = {name: factor for name, factor in config.scales.items() if name not in config.weights}
    return method.reweight(config.weights).scaled(scales).scaled(config.scale)


__all__ = [
    "METHODS",
    "Adapter",
    "Boxes",
    "Cells",
    "Channels",
    "Context",
    "Distiller",
    "HasChannels",
    "Method",
    "Nowhere",
    "Pairs",
    "Part",
    "Points",
    "Quirk",
    "Slots",
    "Stage",
    "Start",
    "TeacherMode",
    "TensorPath",
    "Term",
    "TermResult",
    "build_method",
    "copy_start",
    "gradient_map",
    "run_terms",
    "total",
]
