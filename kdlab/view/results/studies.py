"""Pictures of a study: differences to the base, conflicts of gradients, Shapley shares, cost against quality."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from kdlab.checkpoint import replacing
from kdlab.studies.conflict import PARTS, matrix
from kdlab.studies.plan import BASE
from kdlab.studies.report import Report
from kdlab.studies.text import number, signed
from kdlab.studies.verdict import BEATS, DOES_NOT_BEAT, INCONCLUSIVE, NOT_COMPARABLE, SCORES, differences, higher
from kdlab.view.style import GREY, OTHERS, STUDENT, TEACHER, TRUTH, new_figure

COLOURS = {BEATS: TRUTH, DOES_NOT_BEAT: STUDENT, INCONCLUSIVE: "#666666", NOT_COMPARABLE: GREY}
"""Colour of a verdict."""

COST_NAMES = {
    "train_seconds": "training time (s)",
    "train_memory_mb": "training memory (MB)",
    "test_seconds": "time at test (s per sample)",
    "test_memory_mb": "memory at test (MB)",
    "test_parameters": "parameters at test",
    "train_gflop": "operations of a training step (GFLOP per sample)",
    "test_gflop": "operations at test (GFLOP per sample)",
}
"""Costs that are drawn against quality."""

FORMATS = (".png", ".svg", ".pdf")
MARKERS = "osD^vP*X"
NAME_WIDTH = 26
"""Letters of a change's name in a line."""


def draw_report(report: Report, folder: Path) -> list[Path]:
    """Draw what a study has: differences, conflicts by change, Shapley shares, cost against quality.

    Args:
        report: its tables (`kdlab.studies.report`).
        folder: for the files, each as PNG, SVG and PDF; made where it is missing.

    Returns:
        The files.
    """
    figures: dict[str, Figure] = {}
    if len(report.verdicts):
        figures["differences"] = difference_plot(report.rows, report.verdicts)
    for change in report.conflict["change"].unique():
        figures[f"conflict-{re.sub(r'[^A-Za-z0-9.+-]+', '_', change)}"] = conflict_maps(report.conflict, change)
    methods = list(report.shapley["of"].unique()) if len(report.shapley) else []
    for of in methods:
        shares = report.shapley[report.shapley["of"] == of]
        figures["shapley" if len(methods) == 1 else f"shapley-{of}"] = shapley_bars(shares)
    if any(_differs(report.rows, cost) for cost in COST_NAMES):
        figures["cost"] = cost_plot(report.rows)
    return [path for name, figure in figures.items() for path in save(figure, folder / name)]


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG, SVG and PDF, each whole or not at all; returns the files."""
    files = [stem.with_name(stem.name + suffix) for suffix in FORMATS]
    for file in files:
        with replacing(file) as part:
            figure.savefig(part, format=file.suffix[1:], dpi=150, bbox_inches="tight")
    return files


def difference_plot(rows: pd.DataFrame, verdicts: pd.DataFrame, metrics: Sequence[str] = SCORES) -> Figure:
    """Differences to the base: a row per change with its seeds as dots, the mean, the interval and the verdict.

    The band reaches from 0 to the smallest difference worth having.

    Args:
        rows: finished trials (`kdlab.studies.results.collect`).
        verdicts: of them (`kdlab.studies.verdict.verdicts`).
        metrics: a panel for each.
    """
    metrics = [metric for metric in metrics if (verdicts["metric"] == metric).any()]
    changes = list(verdicts["change"].unique())
    figure = new_figure(2.4 + 4.8 * max(len(metrics), 1), 1.6 + 0.5 * len(changes))
    panels = figure.subplots(1, max(len(metrics), 1), sharey=True, squeeze=False)[0]
    for ax, metric in zip(panels, metrics, strict=False):
        judged = verdicts[verdicts["metric"] == metric].set_index("change")
        seeds = differences(rows, metric)
        for place, change in enumerate(changes):
            shown = judged.loc[change, "verdict"] != NOT_COMPARABLE
            values = seeds[seeds["change"] == change]["difference"].to_numpy(float) if shown else np.empty(0)
            _difference_row(ax, place, judged.loc[change], values)
        _difference_axes(ax, metric, judged)
    references = verdicts.drop_duplicates("change").set_index("change")["reference"]
    names = [_against(change, references[change]) for change in changes]
    panels[0].set_yticks(range(len(changes)), names)
    panels[0].set_ylim(len(changes) - 0.4, -0.6)
    return figure


def _against(change: str, reference: str) -> str:
    """A change in lines, with what it is judged against where that is not the base."""
    return _wrapped(change) + ("" if reference == BASE else f"\n(against {_wrapped(reference)})")


def _difference_row(ax: Axes, place: int, row: Mapping[str, Any], values: np.ndarray[Any, Any]) -> None:
    colour = COLOURS[row["verdict"]]
    ax.plot(values, np.full(len(values), place + 0.16), "o", color=colour, markersize=4, alpha=0.45, linewidth=0)
    if np.isfinite(row["low"]):
        ax.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
    if np.isfinite(row["difference"]):
        ax.plot(row["difference"], place, "D", color=colour, markersize=6.5)
    seeds = f"{row['seeds']} seed{'' if row['seeds'] == 1 else 's'}"
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    ax.annotate(f"{row['verdict']}\n{seeds}", (1, place), (5, 0), color=colour, fontsize=8, **where)


def _difference_axes(ax: Axes, metric: str, judged: pd.DataFrame) -> None:
    worth = float(judged["worth"].median())
    if math.isfinite(worth):
        ax.axvspan(0, worth if higher(metric) else -worth, color="#EFE9D5", linewidth=0, zorder=0)
    ax.axvline(0, color="black", linewidth=1)
    ax.grid(axis="x", alpha=0.3)
    ax.locator_params(axis="x", nbins=6)
    side = "right" if higher(metric) else "left"
    ax.set_title(metric, fontsize=11)
    ax.set_xlabel(f"difference ({side} is better)\nband: less than is worth having", fontsize=9)


def conflict_maps(table: pd.DataFrame, change: str, parts: Sequence[str] = PARTS) -> Figure:
    """Mean cosine of every two losses' gradients at the map that they share: a panel per part of the training.

    Blue pulls the same way, red is in conflict; the small number is the share of steps in conflict.

    Args:
        table: what `kdlab.studies.conflict.conflict` returned.
        change: which.
        parts: of the training.
    """
    first = matrix(table, change, parts[0])
    side = max(2.4, 0.56 * len(first) + 0.4)
    figure = new_figure(2 * side + 2.8, side * math.ceil(len(parts) / 2) + 2.0)
    panels = figure.subplots(math.ceil(len(parts) / 2), 2, sharex=True, sharey=True, squeeze=False).ravel()
    for ax in panels[len(parts) :]:
        ax.set_axis_off()
    for ax, part in zip(panels, parts, strict=False):
        cosine = matrix(table, change, part).reindex(index=first.index, columns=first.columns)
        share = matrix(table, change, part, "conflict").reindex(index=first.index, columns=first.columns)
        image = _heat_map(ax, cosine, share)
        ax.set_title(part, fontsize=10)
    seeds = int(table[table["change"] == change]["seeds"].max())
    figure.colorbar(image, ax=list(panels), label="mean cosine (red: conflict)", fraction=0.04, pad=0.02)
    title = f"{_wrapped(change, 60)}: gradients at the shared map, {seeds} seed{'' if seeds == 1 else 's'}"
    figure.suptitle(f"{title}\nlarge: mean cosine; small: steps in conflict", fontsize=11)
    return figure


def _heat_map(ax: Axes, cosine: pd.DataFrame, share: pd.DataFrame) -> AxesImage:
    ax.set_facecolor("#E8E8E8")
    values = np.ma.masked_invalid(cosine.to_numpy(float))
    image = ax.imshow(values, cmap="RdBu", norm=Normalize(-1, 1))
    for (row, column), value in np.ndenumerate(cosine.to_numpy(float)):
        if np.isfinite(value):
            style: dict[str, Any] = {"ha": "center", "color": "white" if abs(value) > 0.6 else "black"}
            ax.text(column, row - 0.08, signed(number(value, 2)), fontsize=8, va="center", **style)
            ax.text(column, row + 0.3, f"{100 * share.iloc[row, column]:.0f} %", fontsize=6, va="center", **style)
    ax.set_xticks(range(len(cosine)), cosine.columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(range(len(cosine)), cosine.index, fontsize=8)
    ax.tick_params(length=0)
    return image


def shapley_bars(shares: pd.DataFrame) -> Figure:
    """Shapley shares of the terms and their sum, with intervals: a panel per metric.

    Args:
        shares: what `kdlab.studies.shapley.shapley` returned, of one metric or several.
    """
    metrics = list(shares["metric"].unique())
    terms = list(shares["term"].unique())
    figure = new_figure(2.2 + 4.2 * len(metrics), 1.3 + 0.5 * len(terms))
    for ax, metric in zip(figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics, strict=True):
        found = shares[shares["metric"] == metric].set_index("term").reindex(terms)
        colours = ["#777777" if term == terms[-1] else TEACHER for term in terms]
        ax.barh(range(len(terms)), found["share"], color=colours, height=0.62)
        for place, row in enumerate(found.to_dict("records")):
            ends = [v for v in (row["low"], row["high"]) if math.isfinite(v)]
            ax.plot(ends, [place] * len(ends), color="black", linewidth=1.4, marker="|", markersize=7)
            reach = max([row["share"], 0.0, *ends])
            ax.annotate(
                signed(number(row["share"])),
                (reach, place),
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        ax.axvline(0, color="black", linewidth=1)
        ax.margins(x=0.22)
        ax.locator_params(axis="x", nbins=6)
        ax.set_yticks(range(len(terms)), [_wrapped(term) for term in terms])
        ax.set_ylim(len(terms) - 0.5, -0.5)
        seeds = int(found["seeds"].min())
        ax.set_title(f"{metric}, {seeds} seed{'' if seeds == 1 else 's'}", fontsize=11)
        ax.set_xlabel(f"share of the gain in {metric}")
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
    return figure


def cost_plot(rows: pd.DataFrame, metric: str = "mAP", costs: Iterable[str] = COST_NAMES) -> Figure:
    """Quality against cost: a panel per cost in which the runs differ, small the seeds, large their mean.

    Args:
        rows: finished trials (`kdlab.studies.results.collect`).
        metric: of the vertical axis.
        costs: columns of ``rows``.
    """
    drawn = [cost for cost in costs if _differs(rows, cost)]
    changes = list(rows["change"].unique())
    across = min(3, max(1, len(drawn)))
    down = math.ceil(max(1, len(drawn)) / across)
    legend = sum(0.12 + 0.14 * (1 + _wrapped(change).count("\n")) for change in changes)
    figure = new_figure(3.6 * across + 2.6, max(3.1 * down + 0.3, 0.4 + legend))
    panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    for ax in panels[len(drawn) :]:
        ax.set_axis_off()
    for ax, cost in zip(panels, drawn, strict=False):
        for index, (_, group) in enumerate(rows.groupby("change", sort=False)):
            colour, marker = _look(index)
            ax.plot(group[cost], group[metric], marker, color=colour, markersize=4, alpha=0.4)
            ax.plot(
                group[cost].mean(), group[metric].mean(), marker, color=colour, markersize=9, markeredgecolor="white"
            )
        ax.set_xlabel(COST_NAMES.get(cost, cost))
        ax.locator_params(axis="x", nbins=5)
        ax.grid(alpha=0.3)
        ax.margins(0.12)
    for ax in panels[::across]:
        ax.set_ylabel(metric)
    _change_legend(figure, changes)
    return figure


def _differs(rows: pd.DataFrame, cost: str) -> bool:
    return cost in rows and rows[cost].nunique() > 1


def _look(index: int) -> tuple[str, str]:
    """Colour and marker of a change by its place; no two of the first 48 are alike."""
    palette = ("#000000", STUDENT, TEACHER, TRUTH, *OTHERS[:2])
    return palette[index % len(palette)], MARKERS[(index // len(palette) + index) % len(MARKERS)]


def _change_legend(figure: Figure, changes: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for index, change in enumerate(changes):
        colour, marker = _look(index)
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=0, label=_wrapped(change)))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)


def _wrapped(name: str, width: int = NAME_WIDTH) -> str:
    """A name in lines of about so many letters, broken after signs and spaces; of more than three, the ends."""
    lines = [""]
    for word in re.findall(r"[^\s_+-]*[\s_+-]?", name):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines if len(lines) < 4 else [lines[0], f"{lines[1]} …", lines[-1]]).rstrip()
