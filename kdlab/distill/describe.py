"""Methods as text: what a method consists of, and how papers and released code differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kdlab.distill.method import Method, Quirk, Term
from kdlab.distill.options import Option, PaperMethod
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
    teacher, student = ("/".join(sorted(side)) or "any" for side in (method.teacher, method.student))
    head = f"{method.name}: {teacher} teacher -> {student} student"
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
        quirks = [
            (q.name, "on" if q.name in method.on else "off", q.where, q.means or "-", q.what, q.evidence)
            for q in method.quirks
        ]
        heads = ("quirk", "now", "where", "what the paper means", "what the released code does", "evidence")
        lines += ["", *_table([heads, *quirks])]
    return "\n".join(lines)


def describe_options(options: Sequence[Option]) -> str:
    """Printable table of options, after an empty line; empty where there are none."""
    if not options:
        return ""
    rows = [(o.name, o.default, ", ".join(o.values) + (" (several)" if o.several else ""), o.what) for o in options]
    return "\n".join(["", *_table([("option", "default", "values", "what"), *rows])])


_HEAD = """# Errata: what the papers mean and what their released code computes

Made by `kdlab methods --errata`; do not edit. The papers' bodies were not at hand: what they mean is reconstructed from
abstracts, figures, reviews and code, see the text at the head of each method's module in `kdlab/distill/`. Evidence is
file:line of the released code, with the short names that are told there.

Every quirk has a switch of its own. All are off by default (`--variant intended`) and on with `--variant released`;
`--quirks NAME` flips single ones from there. A quirk that acts on the student is a field of its config, which `kdlab
train` sets as the method's quirks say."""


def errata(papers: Mapping[str, PaperMethod]) -> str:
    """All quirks and other differences of some papers' methods, as Markdown."""
    lines = [_HEAD]
    for name, paper in papers.items():
        lines += ["", f"## {name}", "", "| quirk | the paper means | the released code | evidence | acts on | switch |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_row(quirks) for quirks in _quirks(paper)]
        lines += ["", "Differences that are no quirks, and why:", ""]
        lines += [f"* {difference}" for difference in paper.differences]
    return "\n".join(lines)


def _quirks(paper: PaperMethod) -> Iterable[list[Quirk]]:
    """The quirks of all the paper's pairs, those of one name together."""
    found: dict[str, list[Quirk]] = {}
    for student, teacher in paper.pairs:
        for quirk in paper(student, teacher).quirks:
            found.setdefault(quirk.name, []).append(quirk)
    return found.values()


def _row(quirks: Sequence[Quirk]) -> str:
    quirk = quirks[0]
    evidence = "; ".join(dict.fromkeys(part for q in quirks for part in q.evidence.split("; ")))
    switch = f"`--quirks {quirk.name}`" + (f", `detector.{quirk.student}`" if quirk.student else "")
    cells = (quirk.name.partition(".")[2], quirk.means, quirk.what, evidence, quirk.where, switch)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
