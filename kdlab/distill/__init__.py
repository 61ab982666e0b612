"""Distillation: methods as data, their terms, and the Distiller that runs them."""

from __future__ import annotations

from kdlab.config import DistillConfig, Modality
from kdlab.distill import distillbev as _distillbev
from kdlab.distill import labeldistill as _labeldistill
from kdlab.distill import simdistill as _simdistill
from kdlab.distill import unidistill as _unidistill
from kdlab.distill.context import Context
from kdlab.distill.distiller import Distiller, copy_start, run_terms, total
from kdlab.distill.method import Adapter, Method, Quirk, Stage, Start, TeacherMode, Term
from kdlab.distill.options import Option, Paper, together
from kdlab.distill.paths import Channels, HasChannels, Part, TensorPath
from kdlab.distill.places import Boxes, Cells, Nowhere, Pairs, Points, Slots, TermResult, gradient_map

METHODS: dict[str, Paper] = {
    "unidistill": _unidistill.PAPER,
    "distillbev": _distillbev.PAPER,
    "simdistill": _simdistill.PAPER,
    "labeldistill": _labeldistill.PAPER,
}
"""One row per paper."""


def papers(names: str) -> list[Paper]:
    """The papers of a name in METHODS, or of several with + between them.

    Raises:
        ValueError: an unknown name, or one that stands twice.
    """
    words = [name.strip() for name in names.split("+")]
    for name in words:
        if name not in METHODS:
            raise ValueError(
                f"unknown method {name!r}; known: {', '.join(METHODS)}; several go together with + between"
            )
        if words.count(name) > 1:
            raise ValueError(f"method {names!r}: {name} stands there twice")
    return [METHODS[name] for name in words]


def usual_teacher(names: str, student: Modality) -> Modality:
    """The teacher's modality that the papers of a name give a student first; one that another student has otherwise.

    Raises:
        ValueError: as `papers`.
    """
    pairs = [pair for paper in papers(names) for pair in paper.pairs]
    shared = [t for s, t in pairs if s == student and all((s, t) in paper.pairs for paper in papers(names))]
    return [*shared, *(t for s, t in pairs if s == student), *(t for _, t in pairs)][0]


def build_method(config: DistillConfig, student: Modality, teacher: Modality) -> Method:
    """The method that a config describes: path by modality and options, variant, flipped quirks, weights, scales.

    Any pair of modalities goes; whether both sides have the tensors is seen later, see `kdlab.pairing`.

    Raises:
        ValueError: an unknown method, option, quirk or term; the message lists the known ones.
    """
    chosen = papers(config.method)
    method = together(chosen, student, teacher, config.options).variant(config.variant).flip(config.quirks)
    there = {term.name for term in method.terms}
    left_out = {term.name for term in together(chosen, student, teacher).terms} - there if config.options else set()
    scales = {n: factor for n, factor in config.scales.items() if n not in config.weights and n not in left_out}
    method = method.reweight(config.weights).scaled(scales).scaled(config.scale)
    return method.only(config.only) if config.only else method


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
    "Option",
    "Pairs",
    "Paper",
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
    "papers",
    "run_terms",
    "total",
    "usual_teacher",
]
