"""Scores of single samples: where a detector fails, and where two of them differ most."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kdlab.metrics.boxes import Array, EvalBoxes
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.curves import average_precision, precision_at_recalls
from kdlab.metrics.evaluation import matches_by_class
from kdlab.metrics.matching import Matches
from kdlab.metrics.truth import Truth


@dataclass(frozen=True)
class SampleScores:
    """Scores of S samples.

    Attributes:
        tokens: sample tokens, in the order of `Truth.tokens`.
        ap: float64 [S]: AP of the sample alone, mean over the classes that have annotations in it and the distance
            thresholds; NaN where it has no annotation.
        true_positives: int64 [S]: matched predictions at `EvaluationConfig.dist_th_tp`, all classes together.
        false_positives: int64 [S]: predictions without a match there, of any score.
        misses: int64 [S]: annotations without a match there.
    """

    tokens: list[str]
    ap: Array
    true_positives: Array
    false_positives: Array
    misses: Array

    def difference(self, other: SampleScores) -> list[tuple[str, float]]:
        """Token and AP here minus AP there of each sample that has annotations, those that differ most first.

        Raises:
            ValueError: the scores are of other samples.
        """
        if self.tokens != other.tokens:
            raise ValueError("difference: the scores are of different samples; score both on the same split")
        difference = self.ap - other.ap
        known = np.flatnonzero(~np.isnan(difference))
        order = known[np.argsort(-np.abs(difference[known]), kind="stable")]
        return [(self.tokens[i], float(difference[i])) for i in order]


def sample_scores(truth: Truth, predictions: EvalBoxes, config: EvaluationConfig | None = None) -> SampleScores:
    """Score every sample by itself, as if it were the whole split.

    Args:
        truth: annotations.
        predictions: predictions.
        config: nuScenes' own settings where left out.

    Raises:
        ValueError: the predictions were read for other samples.
    """
    config = config or EvaluationConfig()
    truth.check(predictions)
    samples = len(truth.tokens)
    total, terms = np.zeros(samples), np.zeros(samples, np.int64)
    true, false, missed = (np.zeros(samples, np.int64) for _ in range(3))
    # A box that names another sample than the one that holds it matches nothing there.
    own = replace(predictions, owner=np.where(predictions.owner == predictions.sample, predictions.owner, -1))
    with np.errstate(invalid="ignore", over="ignore"):
        for _, matches in matches_by_class(truth, own, config, np.ones(samples, bool)):
            held = np.bincount(truth.boxes.sample[matches.truths], minlength=samples)
            where = own.sample[matches.predictions]
            found = np.bincount(where[matches.partner(config.dist_th_tp) >= 0], minlength=samples)
            true += found
            false += np.bincount(where, minlength=samples) - found
            missed += held - found
            total += _average_precisions(matches, where, held, config)
            terms += (held > 0) * len(config.dist_ths)
    ap = np.divide(total, terms, out=np.full(samples, np.nan), where=terms > 0)
    return SampleScores(truth.tokens, ap, true, false, missed)


def _average_precisions(matches: Matches, where: Array, held: Array, config: EvaluationConfig) -> Array:
    """AP of one class in every sample, added up over the thresholds, float64 [S].

    Args:
        matches: of the class.
        where: int64 [P]: sample of each prediction, best score first.
        held: int64 [S]: annotations of each sample.
        config: settings.
    """
    total = np.zeros(len(held))
    order = np.argsort(where, kind="stable")
    start = np.searchsorted(where[order], np.arange(len(held) + 1))
    for threshold in config.dist_ths:
        hit = (matches.partner(threshold) >= 0)[order]
        for sample in np.unique(where[order][hit]):
            precision, _ = precision_at_recalls(hit[start[sample] : start[sample + 1]], int(held[sample]))
            total[sample] += average_precision(precision, config)
    return total
