"""Who matches whom: predictions in the order of their scores each take the nearest annotation that is left."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kdlab.metrics.boxes import Array, EvalBoxes
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.errors import lengths

_CHUNK = 1 << 16  # Pairs whose distance is taken at a time: their arrays stay in the cache.


@dataclass(frozen=True)
class Matches:
    """One class at all distance thresholds; P predictions, G annotations, C pairs that are near enough to match.

    Attributes:
        predictions: int64 [P]: rows of the predictions, best score first, of equal ones the last first.
        truths: int64 [G]: rows of the annotations.
        prediction: int64 [C], rising: index into ``predictions``; an annotation may be in several pairs.
        truth: int64 [C]: index into ``truths``.
        matched: by threshold, int64 [n]: those of the C pairs that are matches, best score first.
    """

    predictions: Array
    truths: Array
    prediction: Array
    truth: Array
    matched: dict[float, Array]

    def partner(self, threshold: float) -> Array:
        """Index into ``truths`` of each prediction's match, -1 for none, int64 [P]."""
        partner = np.full(len(self.predictions), -1)
        pairs = self.matched[threshold]
        partner[self.prediction[pairs]] = self.truth[pairs]
        return partner


def match(
    truths: EvalBoxes, truth_rows: Array, predictions: EvalBoxes, rows: Array, config: EvaluationConfig
) -> Matches:
    """Match the predictions of one class with its annotations in the samples that the predictions name.

    Each prediction takes the nearest annotation that no better one has taken, and is a match where that is nearer than
    the threshold. Only pairs below the largest threshold matter for that.

    Args:
        truths: annotations, sample after sample.
        truth_rows: int64 [G], rising: rows of the class.
        predictions: predictions.
        rows: int64 [P], rising: rows of the class.
        config: has the thresholds.
    """
    rows = rows[np.argsort(predictions.score[rows], kind="stable")[::-1]]
    prediction, truth, distance = _near(truths, truth_rows, predictions, rows, max(config.dist_ths))
    matched = {}
    for threshold in config.dist_ths:
        near = np.flatnonzero(distance < threshold)
        matched[threshold] = near[_greedy(prediction[near], truth[near], len(truth_rows))]
    return Matches(rows, truth_rows, prediction, truth, matched)


def _near(
    truths: EvalBoxes, truth_rows: Array, predictions: EvalBoxes, rows: Array, limit: float
) -> tuple[Array, Array, Array]:
    """All pairs nearer than the limit, by prediction, then distance, then annotation: two indices and the distance."""
    owner, held = predictions.owner[rows], truths.sample[truth_rows]
    first = np.searchsorted(held, owner)
    count = np.searchsorted(held, owner, side="right") - first
    total = np.concatenate(([0], count.cumsum()))
    where, goal = predictions.translation[rows, :2], truths.translation[truth_rows, :2]
    found = []
    for low, high in _chunks(total):
        number = count[low:high]
        prediction = np.repeat(np.arange(low, high), number)
        truth = np.arange(total[low], total[high]) + np.repeat(first[low:high] - total[low:high], number)
        offset = where[prediction] - goal[truth]
        distance = lengths(offset)
        near = np.flatnonzero(distance < limit)
        found.append((prediction[near], truth[near], distance[near]))
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    prediction, truth, distance = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((distance, prediction))  # Stable: of equal distances the first annotation stays first.
    return prediction[order], truth[order], distance[order]


def _chunks(total: Array) -> list[tuple[int, int]]:
    """Cut predictions into runs [low, high) of about _CHUNK pairs; total: int64 [P + 1], pairs before each."""
    cuts = np.searchsorted(total, np.arange(0, total[-1] + _CHUNK, _CHUNK))
    cuts = np.unique(np.append(np.minimum(cuts, len(total) - 1), len(total) - 1))
    return [(int(low), int(high)) for low, high in pairwise(cuts)]


def _greedy(prediction: Array, truth: Array, truths: int) -> Array:
    """Go through the pairs and keep those of which neither side is taken, int64 [n].

    A plain loop: which pairs remain depends on all pairs before.
    """
    taken, last, kept = bytearray(truths), -1, []
    for i, (p, t) in enumerate(zip(prediction.tolist(), truth.tolist(), strict=True)):
        if p != last and not taken[t]:
            taken[t] = 1
            last = p
            kept.append(i)
    return np.array(kept, np.int64)
