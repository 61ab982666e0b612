"""Likely causes of odd metrics: bugs of size, heading, place and speed leave marks in the official numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from kdlab.metrics.metrics import TP_ERRORS, Metrics

Sure = Literal["almost certain", "likely", "possible"]

ASPECT = {
    "car": 2.4,
    "truck": 2.8,
    "bus": 3.8,
    "trailer": 4.2,
    "construction_vehicle": 2.2,
    "motorcycle": 2.7,
    "bicycle": 2.8,
    "barrier": 5.0,
    "pedestrian": 1.1,
    "traffic_cone": 1.0,
}
"""Longer over shorter side of a usual object, as in nuScenes."""

DIRECTED = ("car", "truck", "bus", "trailer", "construction_vehicle", "motorcycle", "bicycle", "pedestrian")
"""Classes with a front; a barrier is the same after half a turn, a cone has no heading."""

FEW = 10
"""Annotations below which a class's errors say nothing."""


@dataclass(frozen=True)
class Finding:
    """Something odd in metrics and what may be behind it.

    Attributes:
        cause: the likely cause.
        evidence: the numbers that speak for it.
        check: what to look at to be certain.
        sure: how certain the numbers alone make it.
    """

    cause: str
    evidence: str
    check: str
    sure: Sure

    def __str__(self) -> str:
        check = self.check if self.check.endswith("?") else f"{self.check}."
        return f"{self.sure.capitalize()}: {self.cause}.\n  Why: {self.evidence}.\n  Check: {check}"


def diagnose(metrics: Metrics, reference: Metrics | None = None) -> list[Finding]:
    """Name likely causes of odd numbers; an empty list where nothing is odd.

    The rules read the official metrics alone, so they can point to a cause but never prove one: `Finding.check` says
    how to. They know bugs, and limits of a detector that look like bugs, such as headings that were never learned.

    Args:
        metrics: of one run on one split.
        reference: of a run that is known to be sound, on the same split; shows losses that look healthy by themselves.

    Raises:
        ValueError: the reference is of another split.
    """
    if reference is not None and metrics.split != reference.split:
        raise ValueError(f"diagnose: the reference is of split {reference.split}, the metrics are of {metrics.split}")
    rules: tuple[Callable[[Metrics], Finding | None], ...] = (
        _nothing_found,
        _classes_missing,
        _headings,
        _sizes,
        _shifted,
        _not_located,
        _attributes,
        _speeds,
    )
    found = [finding for rule in rules if (finding := rule(metrics)) is not None]
    if reference is not None and (worse := _worse(metrics, reference)) is not None:
        found.append(worse)
    return found


# What the numbers say -------------------------------------------------------------------------------------------------


def _errors(metrics: Metrics, key: str, names: Collection[str] = tuple(ASPECT)) -> dict[str, float]:
    """A true-positive error by class, of the classes whose number means something.

    nuScenes writes 1 for a class of which too little was found to measure an error.
    """
    aps = metrics.mean_dist_aps
    known = {name: metrics.label_tp_errors.get(name, {}).get(key, math.nan) for name in names}
    return {
        name: error
        for name, error in known.items()
        if metrics.counts[name] >= FEW and aps[name] > 0.02 and not math.isnan(error)
    }


def _mean(errors: dict[str, float], metrics: Metrics) -> float:
    """Mean over classes, weighted by their annotations; NaN of none."""
    if not errors:
        return math.nan
    return float(np.average(list(errors.values()), weights=[metrics.counts[name] for name in errors]))


def _spread(errors: dict[str, float]) -> str:
    low, high = min(errors, key=lambda n: errors[n]), max(errors, key=lambda n: errors[n])
    return f"from {errors[low]:.2f} ({low}) to {errors[high]:.2f} ({high})"


def _by_distance(metrics: Metrics) -> dict[float, float]:
    """AP by matching distance, mean over the classes with ground truth."""
    distances = sorted({float(d) for aps in metrics.label_aps.values() for d in aps})
    rows = [{float(d): ap for d, ap in metrics.label_aps[name].items()} for name in metrics.present]
    return {d: float(np.mean([row[d] for row in rows])) for d in distances} if rows else {}


# Rules ----------------------------------------------------------------------------------------------------------------
# Limits lie well beyond what sound detectors of the nuScenes benchmark show (scale errors of 0.25 to 0.3, orientation
# errors of 0.3 to 0.6 rad, attribute errors of 0.1 to 0.4) and before what the bug would give (a car with its sides
# exchanged 0.74, headings by chance 1.57 rad, attributes that are missing 1).


def _nothing_found(metrics: Metrics) -> Finding | None:
    best = max(_by_distance(metrics).values(), default=1.0)
    if best > 0.01:
        return None
    return Finding(
        "nothing is found: boxes in another frame (sensor, ego, global), x and y exchanged or one mirrored, class "
        "numbers in another order, weights that were not loaded, or a training that has hardly begun",
        f"mAP is {best:.3f} at the most generous matching distance",
        "draw predictions and truth from above (kdlab.view.networks.bev.bev_boxes): a turn, a mirror or a shift shows "
        "at once; if boxes lie well, compare their classes",
        "almost certain",
    )


def _classes_missing(metrics: Metrics) -> Finding | None:
    aps = {name: ap for name, ap in metrics.mean_dist_aps.items() if metrics.counts[name] >= FEW}
    lost = [name for name, ap in aps.items() if ap < 0.005]
    rest = [ap for name, ap in aps.items() if name not in lost]
    if not lost or not rest or float(np.mean(rest)) < 0.1:
        return None
    several = len(lost) > 1
    return Finding(
        f"{', '.join(lost)} {'are' if several else 'is'} never found: "
        + ("class numbers are exchanged, or these classes are" if several else "the class is")
        + " left out of the training or of the head, or too rare in the training",
        f"AP 0.00 with {', '.join(str(metrics.counts[n]) for n in lost)} annotations; "
        f"the other classes have {np.mean(rest):.2f}",
        "draw their true boxes beside all predictions, whatever their class; compare the order of classes with "
        "kdlab.sample.CLASSES",
        "likely" if several else "possible",
    )


def _headings(metrics: Metrics) -> Finding | None:
    errors = _errors(metrics, "orient_err", DIRECTED)
    barrier = _errors(metrics, "orient_err", ("barrier",)).get("barrier", math.nan)
    mean = _mean(errors, metrics)
    if not mean > 0.75:
        return None
    numbers = f"mean orientation error {mean:.2f} rad over classes with a front, {_spread(errors)}"
    beside = f"{numbers}; barriers {barrier:.2f}" if barrier == barrier else f"{numbers}; no barriers to compare with"
    if mean > 2.4:
        return Finding(
            "boxes point backwards: headings are off by half a turn",
            f"{beside}; π is {math.pi:.2f}",
            "draw boxes with their heading (the tick leads out of the front) over the truth; look for a sign, or for "
            "sine and cosine that are both negated",
            "almost certain",
        )
    if max(abs(e - math.pi / 2) for e in errors.values()) < 0.3 and not barrier < 1.2:
        return Finding(
            "headings are off by a quarter turn: an angle from another axis, or sine and cosine exchanged",
            f"{beside}; every class is near π/2 = {math.pi / 2:.2f}, which chance would give to classes with a front "
            "but not to barriers (theirs would be 0.79)",
            "subtract the true from the predicted heading of some matched boxes: is it always the same angle?",
            "almost certain" if barrier == barrier else "possible",
        )
    if barrier < 0.35:
        return Finding(
            "front and back are confused: the axis of a box is known, its direction is often a guess",
            f"{beside}, whose heading counts up to half a turn; as if {100 * mean / math.pi:.0f} % of the boxes "
            "pointed backwards",
            "a limit of coarse cells and small networks rather than a bug: the same numbers from the teacher confirm "
            "it. A bug may be that half of the training data is flipped without its headings",
            "likely",
        )
    return Finding(
        "headings say nothing: never learned, of the wrong sign (clockwise for counter-clockwise), or mirrored with "
        "the map but not with the box",
        f"{beside}; chance gives 1.57 to classes with a front and 0.79 to barriers",
        "plot predicted over true heading of matched boxes: a falling line is a wrong sign, a cloud is nothing learned",
        "likely" if mean > 1.2 else "possible",
    )


def swapped_scale_error(aspect: float) -> float:
    """The scale error 1 - IoU of a box whose length and width are exchanged, by its longer over its shorter side."""
    return 1 - 1 / (2 * aspect - 1)


def _sizes(metrics: Metrics) -> Finding | None:
    errors = _errors(metrics, "scale_err")
    long = {name: error for name, error in errors.items() if ASPECT[name] > 2}
    square = {name: error for name, error in errors.items() if ASPECT[name] < 1.3}
    if not long or not _mean(long, metrics) > 0.45:
        return None
    off = float(np.mean([abs(error - swapped_scale_error(ASPECT[name])) for name, error in long.items()]))
    numbers = f"scale error {_mean(long, metrics):.2f} for long objects, {_spread(long)}"
    beside = f"{numbers}; {_mean(square, metrics):.2f} for square ones" if square else numbers
    if off < 0.15 and not (square and _mean(square, metrics) > 0.4):
        return Finding(
            "length and width are exchanged",
            f"{beside}; an exchange gives about {np.mean([swapped_scale_error(ASPECT[n]) for n in long]):.2f} and "
            "leaves what is square nearly as it is",
            "print size and heading of one predicted car: nuScenes files hold (width, length, height), kdlab's boxes "
            "(length, width, height)",
            "almost certain" if square else "likely",
        )
    factor = (1 - _mean(errors, metrics)) ** (1 / 3)
    return Finding(
        "sizes are wrong by a factor: a unit, a logarithm that is missing or taken twice, or a scale of the "
        "augmentation that does not reach the boxes",
        f"{beside}; all sides {factor:.2f} or {1 / factor:.2f} times the true ones would give that",
        "divide predicted by true sizes of matched boxes, side by side: one factor, or one per side?",
        "likely",
    )


def _shifted(metrics: Metrics) -> Finding | None:
    aps = _by_distance(metrics)
    top = max(aps.values(), default=0.0)
    errors = _errors(metrics, "trans_err")
    if top < 0.1 or not errors:
        return None
    # One or two classes are alike by chance, and the poor depth of a camera detector would look like a shift.
    alike = len(errors) > 2 and float(np.std(list(errors.values())) / np.mean(list(errors.values()))) < 0.1
    steps = list(aps)
    pairs = list(pairwise(steps)) + (list(zip(steps, steps[2:], strict=False)) if alike else [])
    jump = next(((near, far) for near, far in pairs if aps[near] < 0.12 * top and aps[far] > 0.75 * top), None)
    if jump is None:
        return None
    near, far = jump
    return Finding(
        f"all boxes are shifted by about the same distance, between {near:g} and {far:g} m: a frame (the LiDAR stands "
        "0.94 m before the ego origin), cells counted from their corner instead of their centre, a wrong grid, or "
        "boxes of another moment",
        f"AP jumps from {aps[near]:.2f} at {near:g} m to {aps[far]:.2f} at {far:g} m"
        + (f"; matched boxes are {_mean(errors, metrics):.2f} m off" if far <= 2 else ""),
        "draw the vectors from true to predicted centres: do all point one way, in the ego frame or in the map?",
        "likely",
    )


def _not_located(metrics: Metrics) -> Finding | None:
    aps = _by_distance(metrics)
    if not {1.0, 4.0} <= set(aps) or _shifted(metrics) is not None or aps[4.0] < 0.1 or aps[1.0] > 0.35 * aps[4.0]:
        return None
    return Finding(
        "objects are found but not located: depth that is guessed, a calibration that is off, or sensors of different "
        "moments",
        f"AP {aps[4.0]:.2f} within 4 m, but {aps[1.0]:.2f} within 1 m; mATE {metrics.tp_errors['trans_err']:.2f} m",
        "usual for a small camera detector, whose errors lie along the line of sight; for a LiDAR detector a bug. "
        "Draw the errors as vectors and look at their direction",
        "possible",
    )


def _attributes(metrics: Metrics) -> Finding | None:
    errors = _errors(metrics, "attr_err", DIRECTED)
    if not errors or not _mean(errors, metrics) > 0.75:
        return None
    return Finding(
        "attributes are not written, or always of the wrong name",
        f"attribute error {_mean(errors, metrics):.2f}, {_spread(errors)}",
        "look at attribute_name in the result file; it follows from class and speed, so wrong speeds spoil it too",
        "likely" if _mean(errors, metrics) > 0.95 else "possible",
    )


def _speeds(metrics: Metrics) -> Finding | None:
    errors = _errors(metrics, "vel_err", DIRECTED)
    mean = _mean(errors, metrics)
    if not mean > 1.2:
        return None
    return Finding(
        "speeds are not known, or in another frame (ego for global axes, relative to the moving ego, per frame for per "
        "second)",
        f"mean velocity error {mean:.1f} m/s, {_spread(errors)}; NDS gives nothing for more than 1 m/s",
        "a detector that sees a single moment cannot know speeds: then it is a limit, not a bug. With past frames or "
        "sweeps, plot predicted over true velocity: all zero, turned, or off by the ego's own speed?",
        "possible",
    )


def _worse(metrics: Metrics, reference: Metrics) -> Finding | None:
    """AP is lost although the boxes that are found are as good as the reference's."""
    now = _by_distance(metrics)
    lost = {d: ap - now.get(d, 0.0) for d, ap in _by_distance(reference).items()}
    ratio = metrics.mean_ap_present / max(reference.mean_ap_present, 1e-9)
    if ratio > 0.8:
        return None
    geometry = ("trans_err", "scale_err", "orient_err")
    grown = [TP_ERRORS[k] for k in geometry if metrics.tp_errors[k] > 1.3 * reference.tp_errors[k] + 0.05]
    numbers = f"mAP {metrics.mean_ap_present:.3f} against {reference.mean_ap_present:.3f}"
    if grown:
        words = ", ".join(grown)
        return Finding(
            f"worse than the reference, and its boxes are worse too ({words})",
            f"{numbers}; AP lost by matching distance: " + ", ".join(f"{v:.2f} at {d:g} m" for d, v in lost.items()),
            "begin with the error that grew most, it names the part of a box that is wrong",
            "likely",
        )
    return Finding(
        "worse than the reference although the boxes that are found are as good: features or scores are off, not "
        "geometry, such as normalisation layers in train mode, images normalised in another way, or weights of another "
        "step",
        f"{numbers}; no error of place, size or heading grew by more than a third",
        "is every network in eval mode where it should be? Does the same sample give the same output twice, and in a "
        "batch of another size?",
        "possible",
    )
