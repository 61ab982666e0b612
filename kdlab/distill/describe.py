"""A method as text."""

from __future__ import annotations

from collections.abc import Sequence

from kdlab.distill.method import Method, Term
from kdlab.distill.paths import Part


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _student(term: Term) -> str:
    part = ""
    if isinstance(term.channels, Part):
        each = " of each frame" if term.student.endswith("[:]") and not term.channels.across else ""
        part = f"[part {term.channels.index + 1} of {term.channels.of}{each}]"
    elif term.channels is not None:
        part = f"[channels {term.channels.start or 0}:{'' if term.channels.stop is None else term.channels.stop}]"
    text = term.student + part
    return f"{term.adapter}({text})" if term.adapter else text


def _number(value: float) -> str:
    return f"{value:g}"


def describe(method: Method) -> str:
    """Printable tables: terms, weights with their sources, adapters, starts, stages, quirks with their evidence."""
    head = f"{method.name}: {'/'.join(sorted(method.teacher))} teacher -> {'/'.join(sorted(method.student))} student"
    rows = [("term", "student", "source tensor", "paper weight", "x scale", "= weight", "source")]
    active = {t.name: t for t in method.active}
    for t in (active.get(t.name, t) for t in method.terms):
        numbers = (_number(t.weight), _number(t.scale), _number(t.weight * t.scale))
        rows.append((t.name, _student(t), t.teacher or "-", *numbers, t.source))
    lines = [head, "", *_table(rows)]
    if method.adapters:
        lines += ["", *_table([("adapter", "what", "source"), *((a.name, a.what, a.source) for a in method.adapters)])]
    if method.start:
        lines += ["", *_table([("copied from the teacher", "source"), *((s.module, s.source) for s in method.start)])]
    if method.stages:
        lines += [
            "",
            *_table([("trained first", "what", "source"), *((s.name, s.what, s.source) for s in method.stages)]),
        ]
    if method.quirks:
        quirks = [(q.name, "on" if q.name in method.on else "off", q.where, q.what, q.evidence) for q in method.quirks]
        lines += ["", *_table([("quirk", "now", "where", "the released code", "evidence"), *quirks])]
    return "\n".join(lines)
