"""Runs side by side as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlab.checkpoint import load_run_config
from kdlab.evaluate import TP_ERRORS, Metrics, load_metrics
from kdlab.sample import CLASSES

LOWER_IS_BETTER = frozenset(TP_ERRORS.values())
"""Rows of a comparison whose best value is the smallest."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        split: split that all metrics are of.
        names: one per run.
        runs: the folders.
        rows: name -> one value per run: mAP, NDS, five errors, AP by class; NaN where a run has none.
        metrics: of each run, by its name.
        absent: classes without ground truth on the split.
        notes: method and backbone of each run.
    """

    split: str
    names: tuple[str, ...]
    runs: tuple[Path, ...]
    rows: dict[str, tuple[float, ...]]
    metrics: dict[str, Metrics]
    absent: tuple[str, ...]
    notes: tuple[str, ...]

    def best(self, row: str) -> int | None:
        """Index of the best run in a row, None where no run has a number."""
        values = self.rows[row]
        known = [i for i, v in enumerate(values) if not math.isnan(v)]
        if not known:
            return None
        pick = min if row in LOWER_IS_BETTER else max
        return pick(known, key=lambda i: values[i])

    def markdown(self) -> str:
        """The table as Markdown, the best of each row in bold."""
        lines = [f"| {self.split} | " + " | ".join(self.names) + " |", "|---" * (len(self.names) + 1) + "|"]
        lines.append("| method | " + " | ".join(self.notes) + " |")
        for row, values in self.rows.items():
            best = self.best(row)
            cells = [f"**{_number(v)}**" if i == best and len(values) > 1 else _number(v) for i, v in enumerate(values)]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        return "\n".join([*lines, *self._footnotes()])

    def text(self) -> str:
        """The table as plain text, the best of each row starred."""
        first = max(len(r) for r in [*self.rows, self.split, "method"]) + 2
        widths = [max(len(n), len(note), 8) + 2 for n, note in zip(self.names, self.notes, strict=True)]
        lines = []
        for title, cells in ((self.split, self.names), ("method", self.notes)):
            lines.append(f"{title:{first}s}" + "".join(f"{c:>{w}s}" for c, w in zip(cells, widths, strict=True)))
        for row, values in self.rows.items():
            best = self.best(row)
            stars = ["*" if i == best and len(values) > 1 else "" for i in range(len(values))]
            cells = tuple(_number(v) + star for v, star in zip(values, stars, strict=True))
            lines.append(f"{row:{first}s}" + "".join(f"{c:>{w}s}" for c, w in zip(cells, widths, strict=True)))
        return "\n".join([*lines, *self._footnotes()])

    def _footnotes(self) -> list[str]:
        if not self.absent:
            return []
        return ["", f"No ground truth on {self.split} (counts as 0 in mAP, as in nuScenes): {', '.join(self.absent)}."]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def describe(run: Path | str) -> str:
    """One short line: the method that trained a run, or its sensors, and whether the backbone was pretrained.

    Terms of the method that were switched off are named, and options that it was built with.
    """
    config = load_run_config(run)
    name: str = config.detector.modality
    name += " with LiDAR depth" if config.detector.sensors != config.detector.modality else ""
    if config.distill is not None:
        name += f" + {config.distill.method}" + (" (released)" if config.distill.variant == "released" else "")
        off = [term for term, weight in config.distill.weights.items() if weight == 0]
        name += f" without {', '.join(off)}" if off else ""
        name += f", only {', '.join(config.distill.only)}" if config.distill.only else ""
        name += "".join(f", {option} {value}" for option, value in config.distill.options.items())
    return name + (", pretrained" if config.detector.modality != "lidar" and config.detector.camera.pretrained else "")


def _rows(metrics: Metrics) -> dict[str, float]:
    rows = {"mAP": metrics.mean_ap, "NDS": metrics.nd_score}
    if len(metrics.present) < len(CLASSES):
        rows["mAP of present"] = metrics.mean_ap_present
    rows |= {short: metrics.tp_errors[name] for name, short in TP_ERRORS.items()}
    return rows | {f"AP {name}": metrics.mean_dist_aps[name] for name in metrics.present}


def compare(runs: Sequence[Path | str], split: str | None = None) -> Comparison:
    """Metrics of runs side by side.

    Args:
        runs: run folders.
        split: which split's metrics; by default the one that all runs have, sim_test or val first.

    Raises:
        FileNotFoundError: no such run.
        ValueError: no runs, one has no metrics (the message names the command that makes them), or data sets differ.
    """
    if not runs:
        raise ValueError("compare: name at least one run folder")
    paths = tuple(Path(r) for r in runs)
    notes = tuple(describe(p) for p in paths)
    stored = [load_metrics(p) for p in paths]
    split = split or shared_split(stored)
    wanted = split or next((s for m in stored for s in m), None) or load_run_config(paths[0]).data.val
    for path, metrics in zip(paths, stored, strict=True):
        if wanted not in metrics:
            root = load_run_config(path).data.root
            raise ValueError(
                f"{path} has no metrics on {wanted}; make them: "
                f"kdlab evaluate --run {path} --data {root} --split {wanted}"
            )
    chosen = [m[wanted] for m in stored]
    if len({m.data for m in chosen if m.data is not None}) > 1:
        raise ValueError(f"compare: the runs were scored on different data sets that both call a split {wanted}")
    tables = [_rows(m) for m in chosen]
    names = [row for row in tables[0] if all(row in t for t in tables)]
    absent = tuple(c for c in CLASSES if c not in chosen[0].present)
    labels = _labels(paths)
    rows = {n: tuple(t[n] for t in tables) for n in names}
    return Comparison(wanted, labels, paths, rows, dict(zip(labels, chosen, strict=True)), absent, notes)


def shared_split(stored: Sequence[Mapping[str, Metrics]]) -> str | None:
    """The split that all runs were scored on, those for reported tables first; None where there is none."""
    shared = [s for s in stored[0] if all(s in m for m in stored)] if stored else []
    preferred = [s for s in ("sim_test", "val", "mini_val", "sim_val") if s in shared]
    return next(iter([*preferred, *shared]), None)


def _labels(paths: Sequence[Path]) -> tuple[str, ...]:
    """Change and seed of a study's runs; else folder names, with as many parents as it takes to tell them apart."""
    trials = [_trial(path) for path in paths]
    depth = 1
    labels = ["/".join(p.parts[-depth:]) for p in paths]
    while len(set(labels)) < len(set(paths)) and depth < max(len(p.parts) for p in paths):
        depth += 1
        labels = ["/".join(p.parts[-depth:]) for p in paths]
    mixed = tuple(trial or label for trial, label in zip(trials, labels, strict=True))
    return mixed if len(set(mixed)) == len(set(paths)) else tuple(labels)


def _trial(run: Path) -> str:
    """Change and seed of a study's run; empty for another run."""
    try:
        about = json.loads((run / "trial.json").read_text())
        return f"{about['change']} seed {about['seed']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
