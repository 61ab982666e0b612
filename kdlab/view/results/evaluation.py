"""Pictures of an evaluation: precision over recall, errors over recall, scores over distance, frames that differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlab.evaluate import TP_ERRORS, Metrics
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.evaluation import Evaluation
from kdlab.sample import CLASSES
from kdlab.view.results.curves import UNITS
from kdlab.view.style import GREY, Array, new_figure, run_colours

Rings: TypeAlias = Mapping[tuple[float, float], Metrics]
"""Metrics by ring around the ego vehicle: nearest and farthest distance, metres."""

_LINES = ("-", "--", ":", "-.")  # ten classes share five colours: the line tells the halves apart


def precision_recall(evaluation: Evaluation, config: EvaluationConfig | None = None, title: str = "") -> Figure:
    """Precision over recall, a panel for each class, a line for each distance within which a match counts.

    What lies below the least recall or precision that AP counts is greyed; a class without ground truth is left empty.

    Args:
        evaluation: curves and metrics.
        config: settings that it was made with; those of the nuScenes detection challenge where left out.
        title: heading; the split where left out.
    """
    metrics, config = evaluation.metrics, config or EvaluationConfig()
    distances = sorted({distance for _, distance in evaluation.curves})
    shades = colormaps["Blues"](np.linspace(0.4, 1.0, len(distances)))  # the farther a match may be, the darker
    figure = new_figure(13.0, 5.8)
    axes = figure.subplots(2, 5, sharex=True, sharey=True)
    for ax, name in zip(axes.ravel(), CLASSES, strict=True):
        ax.set(xlim=(0, 1), ylim=(0, 1.02))
        ax.grid(alpha=0.3)
        if not metrics.counts[name]:
            _no_truth(ax, name)
            continue
        ax.axvspan(0, config.min_recall, color=GREY, alpha=0.25, linewidth=0)
        ax.axhspan(0, config.min_precision, color=GREY, alpha=0.25, linewidth=0)
        for distance, shade in zip(distances, shades, strict=True):
            curve = evaluation.curves[name, distance]
            ax.plot(curve.recall, curve.precision, color=shade, linewidth=1.6, label=f"within {distance:g} m")
        ax.set_title(f"{_words(name)}: AP {metrics.mean_dist_aps[name]:.3f}", fontsize=10)
    _outer_labels(axes, "recall", "precision")
    handles = {h.get_label(): h for ax in axes.ravel() for h in ax.get_legend_handles_labels()[0]}
    if handles:
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title or f"{_heading(metrics)}, mAP {metrics.mean_ap:.3f}", fontsize=12)
    return figure


def error_curves(evaluation: Evaluation, config: EvaluationConfig | None = None, title: str = "") -> Figure:
    """True-positive errors over recall, a panel for each of the five, a line for each class with ground truth.

    A line begins at the least recall that counts and ends at the highest that the detector reaches; a class that
    reaches less has none, and its error counts as 1.

    Args:
        evaluation: curves and metrics.
        config: settings that it was made with; those of the nuScenes detection challenge where left out.
        title: heading; the split where left out.

    Raises:
        ValueError: the evaluation was not made with the config's ``dist_th_tp``.
    """
    metrics, config = evaluation.metrics, config or EvaluationConfig()
    distances = sorted({distance for _, distance in evaluation.curves})
    if config.dist_th_tp not in distances:
        raise ValueError(
            f"error_curves: no curves at {config.dist_th_tp:g} m, where errors are taken, but at {distances}; give the "
            "config that the evaluation was made with"
        )
    figure = new_figure(13.0, 6.6)
    axes = figure.subplots(2, 3, sharex=True).ravel()
    handles = {}
    for ax, (key, short) in zip(axes, TP_ERRORS.items(), strict=False):
        for name in metrics.present:
            curve = evaluation.curves[name, config.dist_th_tp]
            reached = np.flatnonzero(curve.confidence)
            last = int(reached[-1]) if reached.size else 0
            shown = slice(round(100 * config.min_recall) + 1, last + 1)
            if np.isnan(metrics.label_tp_errors[name][key]) or shown.start >= shown.stop:
                continue
            place = CLASSES.index(name)
            (line,) = ax.plot(
                curve.recall[shown],
                getattr(curve, key)[shown],
                color=f"C{place % 5}",
                linestyle=_LINES[place // 5],
                linewidth=1.6,
                label=_words(name),
                clip_on=False,  # an error of 0 lies on the axis
            )
            handles[name] = line
        ax.set(title=f"{short} {_number(metrics.tp_errors[key])}", ylabel=f"error ({UNITS[short]})", xlim=(0, 1))
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    for ax in axes[2:5]:
        ax.set_xlabel("recall")
        ax.tick_params(labelbottom=True)
    axes[5].set_axis_off()
    ordered = [handles[name] for name in CLASSES if name in handles]
    if ordered:
        axes[5].legend(handles=ordered, loc="center", frameon=False, handlelength=3, title="class")
    reach = f"matches within {config.dist_th_tp:g} m"
    figure.suptitle(title or f"{_heading(metrics)}, errors of true positives, {reach}", fontsize=12)
    return figure


def ring_scores(runs: Mapping[str, Rings], title: str = "") -> Figure:
    """Scores and errors over the distance from the ego vehicle, one line for each result, and how many boxes there are.

    Numbers are means over the classes with ground truth in a ring: no nuScenes class but the vehicles is evaluated
    beyond 40 m, and a class that cannot be there is not to count as missed.

    Args:
        runs: metrics by ring by the result's name; see `kdlab.evaluate.of_present`.
        title: heading.

    Raises:
        ValueError: no results, or results of different rings.
    """
    found = [list(rings) for rings in runs.values()]
    if not found or any(rings != found[0] for rings in found):
        raise ValueError("ring_scores: needs results of the same rings")
    rings = found[0]
    figure = new_figure(13.0, 5.8)
    axes = figure.subplots(2, 4, sharex=True)
    rows = ["mAP", "NDS", *TP_ERRORS.values()]
    for ax, row in zip(axes.ravel(), rows, strict=False):
        for (name, by_ring), colour in zip(runs.items(), run_colours(runs), strict=True):
            values = [_row(metrics, row) for metrics in by_ring.values()]
            ax.plot(range(len(rings)), values, color=colour, marker="o", markersize=4, linewidth=1.6, label=name)
        better = "higher" if row in ("mAP", "NDS") else "lower"
        unit = f" ({UNITS[row]})" if row in UNITS else ""
        ax.set_title(f"{row}{unit}: {better} is better", fontsize=10)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    counts = [max(sum(by_ring[ring].counts.values()) for by_ring in runs.values()) for ring in rings]
    axes[1, 3].bar_label(axes[1, 3].bar(range(len(rings)), counts, color=GREY), fontsize=8)
    axes[1, 3].set_title("annotated boxes that count", fontsize=10)
    axes[1, 3].margins(y=0.12)
    for ax in axes[1]:
        ax.set_xticks(range(len(rings)), [f"{lo:g}–{hi:g}" for lo, hi in rings], fontsize=8)
        ax.set_xlabel("distance from the ego vehicle (m)", fontsize=9)
    handles, _ = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=len(runs), frameon=False)
    first = next(iter(runs.values()))[rings[0]]
    figure.suptitle(title or f"{_heading(first)}, means over the classes that are there", fontsize=12)
    return figure


def frame_differences(frames: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """The frames where two results differ most, each with a bar for either one's AP.

    Args:
        frames: AP by the result's name, of each frame by its name, the one that differs most first.
        title: heading.

    Raises:
        ValueError: no frames.
    """
    if not frames:
        raise ValueError("frame_differences: needs at least one frame")
    names = list(next(iter(frames.values())))
    figure = new_figure(9.5, 1.6 + 0.42 * max(len(frames), 2))
    ax = figure.subplots()
    places, height = np.arange(len(frames)), 0.76 / len(names)
    for index, (name, colour) in enumerate(zip(names, run_colours(names), strict=True)):
        values = np.array([by[name] for by in frames.values()])
        offset = (index - (len(names) - 1) / 2) * height
        bars = ax.barh(places + offset, values, height * 0.95, color=colour, label=name)
        ax.bar_label(bars, [_number(v, 2) for v in values], fontsize=8, padding=2)
    ax.set_yticks(places, list(frames), fontsize=8)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.08), xlabel="AP of the frame: mean over its classes and the four distances")
    ax.set_xticks(np.arange(0, 1.01, 0.2))
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    ax.set_title(title or "the frames that differ most", fontsize=12)
    return figure


def _row(metrics: Metrics, row: str) -> float:
    errors = {short: metrics.tp_errors[name] for name, short in TP_ERRORS.items()}
    return {"mAP": metrics.mean_ap, "NDS": metrics.nd_score, **errors}[row]


def _no_truth(ax: Axes, name: str) -> None:
    ax.set_title(_words(name), fontsize=10)
    ax.set_facecolor("#EFEFEF")
    ax.text(0.5, 0.5, "no ground\ntruth", ha="center", va="center", fontsize=9, color="#666666")


def _outer_labels(axes: Array, x: str, y: str) -> None:
    for ax in axes[-1]:
        ax.set_xlabel(x)
    for ax in axes[:, 0]:
        ax.set_ylabel(y)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _heading(metrics: Metrics) -> str:
    return f"{metrics.split}: {metrics.samples} samples"


def _number(value: float, digits: int = 3) -> str:
    return "none" if np.isnan(value) else f"{value:.{digits}f}"
