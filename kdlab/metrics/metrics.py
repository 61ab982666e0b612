"""The numbers of an evaluation: mAP, NDS, true-positive errors, by class and distance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdlab.metrics.config import EvaluationConfig
from kdlab.sample import CLASSES

TP_ERRORS = {"trans_err": "mATE", "scale_err": "mASE", "orient_err": "mAOE", "vel_err": "mAVE", "attr_err": "mAAE"}
"""The devkit's true-positive errors and their usual names: metres, 1 - IoU, radians, m/s, 1 - accuracy."""


@dataclass(frozen=True)
class Metrics:
    """nuScenes detection metrics of one split.

    Attributes:
        split: name of the split.
        samples: its number of samples.
        mean_ap: over the ten classes and all distances; a class without ground truth counts as 0, as in nuScenes.
        nd_score: NDS.
        tp_errors: mean true-positive error by name (keys of TP_ERRORS).
        label_aps: AP by class and distance in metres ("0.5").
        label_tp_errors: true-positive errors by class and name; NaN where nuScenes defines none.
        counts: ground-truth boxes by class that the evaluation counts; 0: the class's numbers mean nothing.
        pretrained: whether the detector's backbone started from pretrained weights; None where that is unknown.
        data: digest of the data set (`Truth.digest`); None where that is unknown.
    """

    split: str
    samples: int
    mean_ap: float
    nd_score: float
    tp_errors: dict[str, float]
    label_aps: dict[str, dict[str, float]]
    label_tp_errors: dict[str, dict[str, float]]
    counts: dict[str, int]
    pretrained: bool | None = None
    data: str | None = None

    @property
    def mean_dist_aps(self) -> dict[str, float]:
        """AP by class, mean over the distances."""
        return {name: float(np.mean(list(aps.values()))) for name, aps in self.label_aps.items()}

    @property
    def tp_scores(self) -> dict[str, float]:
        """1 - error, at least 0, by name of the error: what NDS takes the mean of."""
        return {name: max(0.0, 1.0 - self.tp_errors[name]) for name in TP_ERRORS}

    @property
    def present(self) -> list[str]:
        """Classes with ground truth, in the order of CLASSES."""
        return [name for name in CLASSES if self.counts[name] > 0]

    @property
    def mean_ap_present(self) -> float:
        """MAP over the classes with ground truth alone."""
        aps = self.mean_dist_aps
        return sum(aps[name] for name in self.present) / max(len(self.present), 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; NaN becomes None."""
        plain: dict[str, Any] = _map_leaves(self.__dict__, lambda v: None if v != v else v)
        return {**plain, "mean_ap_present": self.mean_ap_present}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Metrics:
        """The inverse of `to_dict`."""
        values = {k: v for k, v in plain.items() if k != "mean_ap_present"}
        for key in ("tp_errors", "label_aps", "label_tp_errors"):
            values[key] = _map_leaves(values[key], lambda v: math.nan if v is None else v)
        return cls(**values)

    def summary(self, config: EvaluationConfig, eval_time: float, meta: Mapping[str, Any]) -> dict[str, Any]:
        """The devkit's ``metrics_summary.json``, with its field names; NaN stays NaN, as the devkit writes it.

        Args:
            config: the settings of the evaluation.
            eval_time: seconds that it took.
            meta: what the result file says of itself (`EvalBoxes.meta`).
        """
        return {
            "label_aps": self.label_aps,
            "mean_dist_aps": self.mean_dist_aps,
            "mean_ap": self.mean_ap,
            "label_tp_errors": self.label_tp_errors,
            "tp_errors": self.tp_errors,
            "tp_scores": self.tp_scores,
            "nd_score": self.nd_score,
            "eval_time": eval_time,
            "cfg": config.to_dict(),
            "meta": dict(meta),
        }

    def __str__(self) -> str:
        errors = "  ".join(f"{short} {self.tp_errors[name]:.3f}" for name, short in TP_ERRORS.items())
        lines = [f"{self.split}: {self.samples} samples", f"mAP {self.mean_ap:.4f}  NDS {self.nd_score:.4f}  {errors}"]
        if len(self.present) < len(CLASSES):
            absent = ", ".join(name for name in CLASSES if name not in self.present)
            lines.append(
                f"mAP of the {len(self.present)} classes that are there: {self.mean_ap_present:.4f} (none of: {absent})"
            )
        if self.present:
            lines.append(f"  {'':21s} {'AP':>6s}" + "".join(f" {short[1:]:>6s}" for short in TP_ERRORS.values()))
        lines += [self._row(name, ap) for name, ap in self.mean_dist_aps.items() if name in self.present]
        return "\n".join(lines)

    def _row(self, name: str, ap: float) -> str:
        """A class's line of the table; a dash where nuScenes defines no such error."""
        errors = (self.label_tp_errors[name][key] for key in TP_ERRORS)
        cells = "".join(f" {'-':>6s}" if math.isnan(e) else f" {e:6.3f}" for e in errors)
        return f"  {name:21s} {ap:6.4f}{cells}  ({self.counts[name]} boxes)"


def read_stored(path: Path) -> dict[str, dict[str, Any]]:
    """What a file such as metrics.json holds by key (a split or an epoch), not yet looked at; empty without a file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); remove it and evaluate again: {_command(path)}") from error
    if not isinstance(stored, dict) or not all(isinstance(plain, dict) for plain in stored.values()):
        raise ValueError(f"{path}: holds no metrics of kdlab; remove it and evaluate again: {_command(path)}")
    return stored


def read_metrics(path: Path) -> dict[str, Metrics]:
    """Metrics by key (a split or an epoch) from a file such as metrics.json; empty without a file.

    Raises:
        ValueError: the file is damaged, or another version of kdlab wrote it; the message says how to make it again.
    """
    found = {}
    for key, plain in read_stored(path).items():
        try:
            if not all(isinstance(aps, dict) for aps in plain["label_aps"].values()):
                raise ValueError("an earlier version of kdlab wrote them, without AP by distance")
            found[key] = Metrics.from_dict(plain)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path}: the metrics on {key} cannot be read ({what}); make them again: {_command(path)} --split {key}"
            ) from error
    return found


def _command(path: Path) -> str:
    return f"kdlab evaluate --run {path.parent}"


def _map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    return {k: _map_leaves(v, change) for k, v in value.items()} if isinstance(value, dict) else change(value)
