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
from kdlab.distill.options import Option, PaperMethod, together
from kdlab.distill.paths import Channels, HasChannels, Part, TensorPath
from kdlab.distill.places import Boxes, Cells, Nowhere, Pairs, Points, Slots, TermResult, gradient_map

METHODS: dict[str, PaperMethod] = {
    "unidistill": _unidistill.PAPER,
    "distillbev": _distillbev.PAPER,
    "simdistill": _simdistill.PAPER,
    "labeldistill": _labeldistill.PAPER,
}
"""One row per paper."""


def papers(names: str) -> list[PaperMethod]:
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


def usual_pair(
    names: str, student: Modality | None = None, teacher: Modality | None = None
) -> tuple[Modality, Modality]:
    """Student and teacher that the papers of a name have first, with the sides that are given, where a paper has such.

    Raises:
        ValueError: as `papers`.
    """
    chosen = papers(names)
    pairs = [pair for paper in chosen for pair in paper.pairs]
    fit = [(s, t) for s, t in pairs if student in (None, s) and teacher in (None, t)]
    shared = [pair for pair in fit if all(pair in paper.pairs for paper in chosen)]
    first = [*shared, *fit, *pairs][0]
    return student or first[0], teacher or first[1]


def usual_teacher(names: str, student: Modality) -> Modality:
    """The teacher's modality that the papers of a name give a student first, see `usual_pair`."""
    return usual_pair(names, student)[1]


def build_method(config: DistillConfig, student: Modality, teacher: Modality) -> Method:
    """The method that a config describes: path by modality and options, variant, flipped quirks, weights, scales.

    Any pair of modalities goes; whether both sides have the tensors is seen later, see `kdlab.pairing`.

    Raises:
        ValueError: an unknown method, option, quirk or term; the message lists the known ones. Or options add a term
            that has no scale beside others that have one.
    """
    chosen = papers(config.method)
    method = together(chosen, student, teacher, config.options).variant(config.variant).flip(config.quirks)
    _all_scaled(config, chosen, student, teacher)
    there = {term.name for term in method.terms}
    left_out = {term.name for term in together(chosen, student, teacher).terms} - there if config.options else set()
    scales = {n: factor for n, factor in config.scales.items() if n not in config.weights and n not in left_out}
    method = method.reweight(config.weights).scaled(scales).scaled(config.scale)
    return method.only(config.only) if config.only else method


def _all_scaled(config: DistillConfig, chosen: list[PaperMethod], student: Modality, teacher: Modality) -> None:
    """Refuse terms that options add at the paper's weight beside scaled ones of the same paper."""
    for paper in chosen:
        usual, built = (paper(student, teacher, given) for given in ({}, paper.own(config.options)))
        known = {term.name for term in usual.terms}
        new = [term.name for term in built.terms if term.name not in {*known, *config.scales, *config.weights}]
        new = [name for name in new if not config.only or name in config.only]
        if new and known & config.scales.keys():
            raise ValueError(
                f"{built.name}: no preset scale for {', '.join(new)}, which the options add; give a weight to each: "
                f"--weights {new[0]} X"
            )


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
    "PaperMethod",
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
    "usual_pair",
    "usual_teacher",
]
