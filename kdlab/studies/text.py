"""Tables and verdicts as words: Markdown, LaTeX, sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from kdlab.studies.plan import BASE
from kdlab.studies.verdict import BEATS, COSTS, DOES_NOT_BEAT, INCONCLUSIVE, MANY_SEEDS, NOT_COMPARABLE, higher

MINUS = "−"

_LATEX = {
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    MINUS: "$-$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def number(value: float, digits: int = 3) -> str:
    """A number with so many decimals; large ones with three significant digits, a dash for what is none."""
    if math.isnan(value):
        return "-"
    text = f"{value:.{digits}f}" if abs(value) < 100 else f"{float(f'{value:.3g}'):,.0f}"
    return _minus(text)


def significant(value: float) -> str:
    """A number with three significant digits."""
    return number(value) if math.isnan(value) or abs(value) >= 100 else _minus(f"{value:.3g}")


def signed(text: str) -> str:
    """A number's text with a plus in front where it is above 0."""
    return text if text[:1] in (MINUS, "-", "") or not text.strip("0.") else f"+{text}"


def _minus(text: str) -> str:
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("-")


def with_interval(row: Mapping[str, Any]) -> str:
    """The difference of a row of `kdlab.studies.verdict.verdicts`, with its interval where there is one."""
    write = significant if row["metric"] in COSTS else number
    ends = "" if math.isnan(row["low"]) else f" [{signed(write(row['low']))}, {signed(write(row['high']))}]"
    return signed(write(row["difference"])) + ends


def sentence(row: Mapping[str, Any]) -> str:
    """One row of `kdlab.studies.verdict.verdicts` as a sentence."""
    change, metric, word = row["change"], row["metric"], row["verdict"]
    rival = reference(row)
    if word == NOT_COMPARABLE:
        return f"{change} is NOT COMPARABLE with {rival} on {metric}: {row['note']}."
    note = f"; {row['note']}" if row["note"] else ""
    seeds = f"{row['seeds']} seed{'' if row['seeds'] == 1 else 's'}"
    if row["seeds"] == 0:
        return f"{change} is INCONCLUSIVE against {rival} on {metric}: no seed with a number of both{note}."
    if row["seeds"] == 1:
        return (
            f"{change} is INCONCLUSIVE against {rival} on {metric}: difference {signed(number(row['difference']))} "
            f"(1 seed has no interval; run at least two){note}."
        )
    level = f"{100 * row['level']:g} %"
    if word == BEATS:
        low, high = sorted((abs(row["low"]), abs(row["high"])))
        side = "" if higher(metric) else " less"
        size, span = number(abs(row["difference"])), f"{level} {number(low)}..{number(high)}, {seeds}"
        return f"{change} BEATS {rival} on {metric} by {size}{side} ({span}){note}."
    ends = f"{signed(number(row['low']))}..{signed(number(row['high']))}"
    span = f"difference {signed(number(row['difference']))} ({level} {ends}, {seeds})"
    if word == DOES_NOT_BEAT:
        return f"{change} DOES NOT BEAT {rival} on {metric}: {span}{note}."
    assert word == INCONCLUSIVE
    return f"{change} is INCONCLUSIVE against {rival} on {metric}: {span}; {_settled(row['seeds_needed'])}{note}."


def reference(row: Mapping[str, Any]) -> str:
    """What a change is judged against, in words."""
    name = row.get("reference", BASE)
    return "the base" if name == BASE else str(name)


def _settled(seeds: float) -> str:
    if math.isnan(seeds):
        return "nobody can say how many seeds would settle it"
    many = f"more than {MANY_SEEDS}" if math.isinf(seeds) else f"about {seeds:.0f}"
    return f"{many} seeds would settle it if mean and spread stay"


def bold_beats(table: pd.DataFrame) -> pd.DataFrame:
    """A table of words with every BEATS in Markdown's bold."""
    return table.map(lambda cell: f"**{cell}**" if cell == BEATS else cell)


def markdown(table: pd.DataFrame) -> str:
    """A table of words as Markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.values.tolist()]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def latex(table: pd.DataFrame, caption: str = "") -> str:
    r"""A table of words as LaTeX, in the style of the package booktabs, which the document has to load."""
    lines = [r"\begin{table}", r"  \centering\footnotesize", r"  \caption{" + escape(caption) + "}"]
    lines += [r"  \begin{tabular}{" + "l" * len(table.columns) + "}", r"    \toprule"]
    rows = [list(table.columns), *table.values.tolist()]
    for index, row in enumerate(rows):
        lines.append("    " + " & ".join(escape(str(cell)) for cell in row) + r" \\")
        lines += [r"    \midrule"] if index == 0 else []
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}"])


def escape(text: str) -> str:
    """Text for LaTeX: its special characters as commands."""
    return "".join(_LATEX.get(c, c) for c in text)
