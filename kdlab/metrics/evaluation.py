"""mAP, NDS and true-positive errors of predictions: the numbers of nuscenes-devkit's `DetectionEval`, vectorised."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kdlab.metrics.boxes import Array, EvalBoxes
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.curves import Curve, average_precision, curve, mean_error
from kdlab.metrics.errors import pair_errors
from kdlab.metrics.filtering import counted
from kdlab.metrics.matching import Matches, match
from kdlab.metrics.metrics import TP_ERRORS, Metrics
from kdlab.metrics.subset import Subset
from kdlab.metrics.truth import Truth
from kdlab.sample import CLASSES

_UNDEFINED = {"traffic_cone": ("attr_err", "vel_err", "orient_err"), "barrier": ("attr_err", "vel_err")}


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        metrics: the numbers.
        curves: by class and distance threshold in metres.
    """

    metrics: Metrics
    curves: dict[tuple[str, float], Curve]


def evaluate(
    truth: Truth,
    predictions: EvalBoxes,
    config: EvaluationConfig | None = None,
    subset: Subset | None = None,
    *,
    allow_empty: bool = False,
) -> Evaluation:
    """Evaluate predictions as nuScenes does.

    Args:
        truth: annotations (`kdlab.metrics.truth.load_truth`).
        predictions: from `kdlab.metrics.results.read_results` or `kdlab.metrics.boxes.from_detections`.
        config: nuScenes' own settings where left out.
        subset: a part of the split; all of it where left out.
        allow_empty: take a subset without any annotation too; all its classes are absent, its numbers mean nothing.

    Raises:
        ValueError: the predictions were read for other samples, a matched box has a size that is not positive, negative
            scores give no falling curve, or the subset has no sample or no annotation.
    """
    config = config or EvaluationConfig()
    truth.check(predictions)
    samples = np.ones(len(truth.tokens), bool) if subset is None else subset.samples(truth)
    counts, curves = {}, {}
    with np.errstate(all="ignore"):  # Infinite coordinates, NaN velocities.
        for name, matches in matches_by_class(truth, predictions, config, samples):
            truths = truth.boxes.take(matches.truths)
            counts[name], scored = _score_class(truth, truths, predictions, matches, name, config, subset)
            curves.update(scored)
        if subset not in (None, Subset()) and not allow_empty and not any(counts.values()):
            raise ValueError(f"subset: split {truth.split!r} has no annotation that counts within {subset}")
        metrics = _summarise(truth, int(samples.sum()), curves, counts, config)
    return Evaluation(metrics, curves)


def matches_by_class(
    truth: Truth, predictions: EvalBoxes, config: EvaluationConfig, samples: Array
) -> Iterator[tuple[str, Matches]]:
    """Name and matches of every class, in the order of `EvaluationConfig.class_range`.

    Args:
        truth: annotations.
        predictions: predictions.
        config: settings.
        samples: bool [S]: the samples that take part.
    """
    truth_rows = np.flatnonzero(counted(truth, truth.boxes, config) & samples[truth.boxes.sample])
    rows = np.flatnonzero(counted(truth, predictions, config) & samples[predictions.sample])
    labels, truth_labels = predictions.label[rows], truth.boxes.label[truth_rows]
    for name in config.class_range:
        label = CLASSES.index(name)
        yield name, match(truth.boxes, truth_rows[truth_labels == label], predictions, rows[labels == label], config)


def _score_class(
    truth: Truth,
    truths: EvalBoxes,
    predictions: EvalBoxes,
    matches: Matches,
    name: str,
    config: EvaluationConfig,
    subset: Subset | None,
) -> tuple[int, dict[tuple[str, float], Curve]]:
    """Number of annotations that count, and the curves of one class."""
    inside = np.ones(len(truths), bool) if subset is None else subset.truths(truth, truths)
    alone = np.ones(len(matches.predictions), bool)
    if subset is not None and subset.distance is not None:
        alone = subset.predictions(truth, predictions.take(matches.predictions))
    total, score = int(inside.sum()), predictions.score[matches.predictions]
    errors, curves = _errors(truth, predictions, matches, name), {}
    for threshold, pairs in matches.matched.items():
        partner = matches.partner(threshold)
        hit = partner >= 0
        counts = np.where(hit, inside[partner] if len(inside) else False, alone)
        of_pairs = pairs[inside[matches.truth[pairs]]]
        try:
            curves[name, threshold] = curve(
                hit[counts], score[counts], total, {key: values[of_pairs] for key, values in errors.items()}
            )
        except ValueError as error:
            raise ValueError(f"{name} at {threshold:g} m: {error}") from error
    return total, curves


def _errors(truth: Truth, predictions: EvalBoxes, matches: Matches, name: str) -> dict[str, Array]:
    """True-positive errors of a class's pairs [C], NaN where a pair is a match at no threshold."""
    used = np.unique(np.concatenate(list(matches.matched.values())))
    truths = truth.boxes.take(matches.truths[matches.truth[used]])
    predicted = predictions.take(matches.predictions[matches.prediction[used]])
    for what, boxes in (("annotation", truths), ("prediction", predicted)):
        flat = ~(boxes.size > 0).all(1)
        if flat.any():
            i = int(np.argmax(flat))
            place = ", ".join(f"{v:g}" for v in boxes.translation[i])
            raise ValueError(
                f"sample {truth.tokens[boxes.owner[i]]!r}: the {what} {name} at ({place}) is matched and has size "
                f"{boxes.size[i].tolist()}; width, length and height must be positive"
            )
    errors = {}
    for key, values in pair_errors(truths, predicted, math.pi if name == "barrier" else 2 * math.pi).items():
        errors[key] = np.full(len(matches.prediction), math.nan)
        errors[key][used] = values
    return errors


def _summarise(
    truth: Truth,
    samples: int,
    curves: dict[tuple[str, float], Curve],
    counts: dict[str, int],
    config: EvaluationConfig,
) -> Metrics:
    aps = {
        name: {str(float(d)): average_precision(curves[name, d].precision, config) for d in config.dist_ths}
        for name in config.class_range
    }
    label_errors = {
        name: {
            key: math.nan
            if key in _UNDEFINED.get(name, ())
            else mean_error(curves[name, config.dist_th_tp], key, config)
            for key in TP_ERRORS
        }
        for name in config.class_range
    }
    mean_ap = float(np.mean([np.mean(list(by.values())) for by in aps.values()]))
    tp_errors = {key: float(np.nanmean([by[key] for by in label_errors.values()])) for key in TP_ERRORS}
    scores = [max(0.0, 1.0 - error) for error in tp_errors.values()]
    weight = config.mean_ap_weight
    nd_score = float(weight * mean_ap + np.sum(scores)) / float(weight + len(scores))
    return Metrics(truth.split, samples, mean_ap, nd_score, tp_errors, aps, label_errors, counts, data=truth.digest)
