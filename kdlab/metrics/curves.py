"""Precision and errors over recall, and the numbers taken from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kdlab.metrics.boxes import Array
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.metrics import TP_ERRORS

RECALLS = np.linspace(0, 1, 101)
"""Recalls at which curves are sampled."""


@dataclass(frozen=True)
class Curve:
    """One class at one distance threshold, sampled at `RECALLS`; float64 [101] each.

    Attributes:
        recall: 0 to 1.
        precision: 0 beyond the highest recall that is reached.
        confidence: score from which on that recall is reached; likewise.
        trans_err: mean error of the matches with at least that score, as are the following; metres.
        vel_err: m/s.
        scale_err: 1 - IoU of boxes laid upon each other.
        orient_err: radians.
        attr_err: 1 - accuracy.
    """

    recall: Array
    precision: Array
    confidence: Array
    trans_err: Array
    vel_err: Array
    scale_err: Array
    orient_err: Array
    attr_err: Array


def no_curve() -> Curve:
    """Of a class without annotations or without a match: precision 0 and errors 1."""
    zeros, ones = np.zeros(101), np.ones(101)
    return Curve(RECALLS, zeros, zeros, **dict.fromkeys(TP_ERRORS, ones))


def precision_at_recalls(hit: Array, truths: int) -> tuple[Array, Array]:
    """Precision at `RECALLS`, and the recall that each prediction reaches.

    Args:
        hit: bool [n]: whether each prediction is a match, best score first; n > 0.
        truths: how many annotations there are, > 0.
    """
    true = np.cumsum(hit).astype(float)
    false = np.cumsum(~hit).astype(float)
    recall = true / float(truths)
    return np.interp(RECALLS, recall, true / (false + true), right=0), recall


def curve(hit: Array, score: Array, truths: int, errors: Mapping[str, Array]) -> Curve:
    """Sample a class at one threshold.

    Args:
        hit: bool [n]: whether each prediction is a match, best score first.
        score: float64 [n].
        truths: how many annotations there are.
        errors: true-positive errors of the matches in their order (`kdlab.metrics.errors.pair_errors`).

    Raises:
        ValueError: the confidence does not fall over recall, as for negative scores.
    """
    if not truths or not hit.any():
        return no_curve()
    precision, recall = precision_at_recalls(hit, truths)
    confidence = np.interp(RECALLS, recall, score, right=0)
    if not (confidence[1:] <= confidence[:-1]).all():
        raise ValueError(
            "its scores give no falling curve of confidence over recall, as nuScenes needs it; they lie between "
            f"{score.min()} and {score.max()} and must not be negative"
        )
    of_matches = score[hit]
    sampled = {
        name: np.interp(confidence[::-1], of_matches[::-1], running_mean(values)[::-1])[::-1]
        for name, values in errors.items()
    }
    return Curve(RECALLS, precision, confidence, **sampled)


def running_mean(values: Array) -> Array:
    """Mean of all values up to each one, NaN left out: 0 before the first number, 1 throughout where there is none."""
    number = ~np.isnan(values)
    if not number.any():
        return np.ones(len(values))
    count = np.cumsum(number)
    total = np.nancumsum(values)
    return np.divide(total, count, out=np.zeros_like(total), where=count != 0)


def average_precision(precision: Array, config: EvaluationConfig) -> float:
    """Mean of a precision curve above the lowest recall and the lowest precision that count, 0..1."""
    counts = np.maximum(precision[_first(config) :] - config.min_precision, 0)
    return float(np.mean(counts)) / (1.0 - config.min_precision)


def mean_error(curve: Curve, name: str, config: EvaluationConfig) -> float:
    """Mean of an error's curve from the lowest recall that counts to the highest that is reached; 1 where none is."""
    reached = np.flatnonzero(curve.confidence)
    last = int(reached[-1]) if len(reached) else 0
    if last < _first(config):
        return 1.0
    return float(np.mean(getattr(curve, name)[_first(config) : last + 1]))


def _first(config: EvaluationConfig) -> int:
    """Index of the first recall that counts."""
    return round(100 * config.min_recall) + 1
