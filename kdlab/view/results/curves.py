"""Pictures of training and of results: loss curves, and the official metrics of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlab.evaluate import TP_ERRORS, Metrics
from kdlab.losslog import read_losses
from kdlab.sample import CLASSES
from kdlab.view.style import Array, new_figure, run_colours

Rows: TypeAlias = Sequence[Mapping[str, Any]]

UNITS = {"mATE": "m", "mASE": "1 − IoU", "mAOE": "rad", "mAVE": "m/s", "mAAE": "1 − acc."}
"""Units of the five true-positive errors."""


def smoothed(values: Array, window: int) -> Array:
    """Running mean over up to ``window`` past values; what is no number is left out of it."""
    known = np.isfinite(values)
    total = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    count = np.concatenate(([0], np.cumsum(known)))
    start = np.maximum(np.arange(len(values)) + 1 - window, 0)
    seen = count[1:] - count[start]
    return np.where(seen > 0, (total[1:] - total[start]) / np.maximum(seen, 1), np.nan)


def loss_curves(
    runs: Mapping[str, Rows | Path],
    columns: Sequence[str] | None = None,
    x: str = "step",
    window: int | None = None,
) -> Figure:
    """How the losses of several runs fell: one panel per column, thin the values, thick their running mean.

    Args:
        runs: rows of a training log by run name, or the CSV file that holds them.
        columns: which to draw; default: every column of numbers that is not a counter, a rate or a time.
        x: column of the horizontal axis.
        window: values in the running mean; default: a twentieth of the longest run.
    """
    logs = {name: read_losses(rows) if isinstance(rows, Path) else list(rows) for name, rows in runs.items()}
    columns = loss_columns(logs, x) if columns is None else list(columns)
    longest = max((len(rows) for rows in logs.values()), default=0)
    window = window or max(1, longest // 20)
    across = min(3, max(1, len(columns)))
    down = -(-max(1, len(columns)) // across)
    figure = new_figure(3.7 * across, 2.7 * down + 0.5)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax in axes[max(1, len(columns)) :]:
        ax.set_axis_off()
    for ax, column in zip(axes, columns, strict=False):
        for (name, rows), colour in zip(logs.items(), run_colours(logs), strict=True):
            _curve(ax, rows, x, column, name, colour, window)
        ax.set(title=column, xlabel=x, ylabel="loss")
        ax.grid(alpha=0.3)
        values = np.array([row.get(column, np.nan) for rows in logs.values() for row in rows], dtype=float)
        finite = values[np.isfinite(values)]
        if finite.size and finite.min() > 0 and finite.max() > 20 * finite.min():
            ax.set_yscale("log")
    handles = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
    if handles:
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def loss_columns(logs: Mapping[str, Rows], x: str = "step") -> list[str]:
    """Columns of numbers in training logs that are losses, in the order in which they first appear."""
    aside = {x, "step", "epoch", "lr", "seconds", "time", "grad_norm", "samples", "samples_per_second", "draw"}
    names = [k for rows in logs.values() for row in rows[:1] for k in row]
    return [k for k in dict.fromkeys(names) if k not in aside and _holds_numbers(logs, k)]


def _holds_numbers(logs: Mapping[str, Rows], column: str) -> bool:
    values = [row.get(column) for rows in logs.values() for row in rows]
    return any(isinstance(v, int | float) and np.isfinite(v) for v in values)


def _curve(ax: Axes, rows: Rows, x: str, column: str, name: str, colour: str, window: int) -> None:
    places = np.array([row.get(x, i) for i, row in enumerate(rows)], dtype=float)
    values = np.array([row.get(column, np.nan) for row in rows], dtype=float)
    if not np.isfinite(values).any():
        return
    known = np.isfinite(values)
    ax.plot(places[known], values[known], color=colour, alpha=0.25, linewidth=0.8)
    ax.plot(places[known], smoothed(values[known], window), color=colour, linewidth=1.8, label=name)


def metric_comparison(runs: Mapping[str, Metrics], title: str = "") -> Figure:
    """The official metrics of several runs side by side: mAP and NDS, the five errors, AP by class.

    A class without ground truth has no number: it is greyed and hatched, not drawn as zero.

    Args:
        runs: metrics by run name; the first usually is the teacher's.
        title: heading.

    Raises:
        ValueError: no runs, or runs of different splits, which cannot be compared.
    """
    splits = sorted({m.split for m in runs.values()})
    if len(splits) != 1:
        raise ValueError(f"metric_comparison: needs runs of one split, got {', '.join(splits) or 'none'}")
    found = list(runs.values())
    figure = new_figure(11.4, 7.4)
    axes = figure.subplot_mosaic([["scores", "errors", "errors"], ["classes"] * 3], height_ratios=(1, 1.15))
    scores = np.array([[m.mean_ap, m.nd_score] for m in found])
    errors = np.array([[m.tp_errors[k] for k in TP_ERRORS] for m in found])
    classes = np.array([[m.mean_dist_aps[k] for k in CLASSES] for m in found])
    _bars(axes["scores"], ["mAP", "NDS"], scores, runs)
    axes["scores"].set(title="higher is better", ylabel="score (0 to 1)")
    _bars(axes["errors"], [f"{name}\n({UNITS[name]})" for name in TP_ERRORS.values()], errors, runs, digits=2)
    axes["errors"].set(title="lower is better", ylabel="error of true positives")
    absent = [all(m.counts[k] == 0 for m in found) for k in CLASSES]
    counts = [max(m.counts[k] for m in found) for k in CLASSES]
    names = [f"{k.replace('_', chr(10))}\n{n} boxes" for k, n in zip(CLASSES, counts, strict=True)]
    _bars(axes["classes"], names, classes, runs, absent, digits=2)
    axes["classes"].set(title="average precision by class, higher is better", ylabel="AP (0 to 1)")
    handles, _ = axes["scores"].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=len(runs), frameon=False)
    figure.suptitle(title or f"{splits[0]}: {found[0].samples} samples", fontsize=12)
    return figure


def _bars(
    ax: Axes,
    names: Sequence[str],
    values: Array,
    runs: Mapping[str, Metrics],
    absent: Sequence[bool] = (),
    digits: int = 3,
) -> None:
    """Groups of bars, values [runs, names], each with its number above."""
    width = 0.8 / len(values)
    top = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    small = 7 if len(names) * len(values) > 12 else 9
    for index, (run, row, colour) in enumerate(zip(runs, values, run_colours(runs), strict=True)):
        places = np.arange(len(names)) + (index - (len(values) - 1) / 2) * width
        drawn = ax.bar(places, np.nan_to_num(row), width * 0.92, label=run, color=colour)
        gone = absent or [False] * len(row)
        labels = ["" if g else f"{v:.{digits}f}" if np.isfinite(v) else "none" for v, g in zip(row, gone, strict=True)]
        ax.bar_label(drawn, labels, fontsize=small, padding=1, rotation=90 if width < 0.14 else 0)
    for place in np.flatnonzero(absent):
        ax.axvspan(place - 0.45, place + 0.45, facecolor="#E8E8E8", edgecolor="#C8C8C8", hatch="///", linewidth=0)
        middle: dict[str, Any] = {"ha": "center", "va": "center", "transform": ax.get_xaxis_transform()}
        ax.text(place, 0.5, "no ground\ntruth", fontsize=8, color="#666666", **middle)
    ax.set_xticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(0, max(top, 0.05) * 1.15)  # hundredths are not to look like a triumph
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
