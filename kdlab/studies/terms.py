"""Changes over the terms of a method: each switched off, each alone, or every subset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, get_args

from kdlab.config import RunConfig
from kdlab.pairing import method_of
from kdlab.studies.plan import BASE, NO_METHOD, Change, Mode, apply, differing

MAX_TERMS = 4
"""Of subsets: more would be more than 16 runs a seed."""


def term_changes(
    base: RunConfig, mode: Mode, method: str = "", teacher: str = "", terms: Sequence[str] = ()
) -> tuple[Change, ...]:
    """Changes over the terms of a method.

    ``each-off``: the whole method, and without each term, judged against the whole method. ``each-alone``: the whole
    method, and each term with all others off. ``subsets``: every subset of the terms with all others off, for Shapley
    shares; the empty one is the run without distillation. Where the method wants another student than the base's, its
    undistilled run is a change too, "no-terms", and what the others are judged against.

    Args:
        base: what is changed.
        mode: which changes.
        method: name of the method; the base's where left out.
        teacher: run folder of the teacher; the base's where left out.
        terms: names; all terms of the method where left out.

    Raises:
        ValueError: no method, an unknown one, an unknown term, one named twice, or too many for subsets.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode: {mode!r} is not one of {', '.join(get_args(Mode))}")
    start: dict[str, Any] = {"distill.method": method or (base.distill.method if base.distill else "")}
    if not start["distill.method"]:
        raise ValueError("method: the base has no distillation; name a method (see `kdlab methods`)")
    start |= {"distill.teacher": teacher} if teacher else {}
    distilled = apply(start, base)[0]
    built, student = method_of(distilled), differing(distilled.detector, base.detector)
    assert built is not None
    known = tuple(t.name for t in built.active)
    unknown = [name for name in terms if name not in known]
    if unknown:
        raise ValueError(f"terms: unknown term {unknown[0]!r}; known: {', '.join(known)}")
    players = tuple(name for name in known if name in terms) if terms else known
    if len(players) < len(terms):
        raise ValueError(f"terms: one of {', '.join(terms)} is there twice")

    none = Change("no-terms", student | ({} if base.distill is None else {"distill.method": NO_METHOD}))
    bare = (none,) if student or (mode == "subsets" and base.distill is not None) else ()

    def change(name: str, off: Iterable[str], reference: str = none.name if student else BASE) -> Change:
        return Change(name, {**start, **{f"distill.weights.{term}": 0.0 for term in off}}, reference)

    whole = change(built.name, ())
    if mode == "each-off":
        return (*bare, whole, *(change(f"without-{term}", [term], built.name) for term in players))
    if mode == "each-alone":
        return (*bare, whole, *(change(f"only-{term}", [t for t in known if t != term]) for term in players))
    if len(players) > MAX_TERMS:
        raise ValueError(f"terms: subsets want at most {MAX_TERMS}, {built.name} has {len(players)}; name some")
    subsets = [s for size in range(1, len(players) + 1) for s in combinations(players, size)]
    return (*bare, *(change("+".join(s), [t for t in known if t not in s]) for s in subsets))
