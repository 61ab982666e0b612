"""What a change of the world does to teacher and student: maps, and the score of one object, before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kdlab.sample import Boxes3D, Detections
from kdlab.view.sight.cell import inspect
from kdlab.view.sight.data import Sight
from kdlab.view.sight.layers import Layer, View, feature_layers
from kdlab.view.sight.maps import stage_map
from kdlab.view.style import array, robust_norm

WITHIN = 2.0
"""A detection of the same class this near to an object's centre, in metres, counts as finding it."""


def pinned_layers(before: Sight, now: Sight, stage: str, view: View) -> dict[str, Layer]:
    """`feature_layers` of now on the colour scales of before, so that equal colours stay equal numbers.

    Raises:
        ValueError: no side has such a stage or channel.
    """
    first = feature_layers(before, stage, view)
    layers = feature_layers(now, stage, view)
    return {k: replace(v, low=first[k].low, high=first[k].high) if k in first else v for k, v in layers.items()}


def change_layers(before: Sight, now: Sight, stage: str) -> dict[str, Layer]:
    """How far each side's vectors at a stage moved, by side, on one colour scale.

    Raises:
        ValueError: no side has such a stage.
    """
    sides = [side for side in ("teacher", "student") if stage in now.stages().get(side, ())]
    if not sides:
        raise ValueError(f"neither teacher nor student has a stage {stage}")
    moved = {
        side: array((stage_map(now.features[side], stage) - stage_map(before.features[side], stage)).norm(dim=0))
        for side in sides
    }
    top = float(robust_norm(*moved.values(), low=0, high=99.5).vmax or 1.0)
    return {side: Layer(f"{side}: change of {stage}", values, 0.0, top, "magma") for side, values in moved.items()}


def label_layers(before: Sight, now: Sight, stage: str, view: View) -> dict[str, Layer]:
    """The label encoder's features at the stage, or at its first where it has none such; {} without label encoder."""
    stages = now.stages().get("labels", ())
    if not stages:
        return {}
    stage = stage if stage in stages else stages[0]
    try:
        first = feature_layers(before, stage, view, ("labels",))["labels"]
        layer = feature_layers(now, stage, view, ("labels",))["labels"]
    except ValueError:  # it has not so many channels
        return {}
    return {"labels": replace(layer, low=first.low, high=first.high)}


def maps_of(before: Sight, now: Sight, stage: str, view: View, beside: str) -> tuple[list[Layer], list[str]]:
    """Maps of teacher, student and label encoder, further ones beside them, and what could not be drawn, in words.

    Args:
        before: of the unchanged world.
        now: of the changed one.
        stage: see `kdlab.view.sight.maps.stage_map`.
        view: how channels become a picture.
        beside: "change" since before, "difference" of student and teacher, or "none".

    Raises:
        ValueError: no side has such a stage or channel.
    """
    pinned = pinned_layers(before, now, stage, view)
    layers = [pinned[side] for side in ("teacher", "student") if side in pinned]
    layers += label_layers(before, now, stage, view).values()
    if beside == "change":
        layers += change_layers(before, now, stage).values()
    elif beside == "difference" and "difference" in pinned:
        layers.append(pinned["difference"])
    notes = [now.errors[side] for side in ("teacher", "student") if side in now.errors]
    if beside == "difference" and "difference" not in pinned:
        notes.append(f"no difference to draw: teacher and student do not both have a {stage} of one size")
    return layers, notes


def found_score(detections: Detections, box: Boxes3D) -> float:
    """The best score among detections of a box's class near its centre; NaN where there is none.

    Args:
        detections: of one sample.
        box: one row.
    """
    near = (detections.values[:, :2] - box.values[0, :2]).norm(dim=-1) < WITHIN
    scores = detections.scores[near & (detections.labels == box.labels[0])]
    return float(scores.max()) if len(scores) else math.nan


@dataclass(frozen=True)
class Finding:
    """What is known of one object at one time.

    Attributes:
        scores: of each side's detection of it; NaN where it found none.
        points: LiDAR points of the key sweep in its box.
        cosine: of teacher's and student's vectors at its centre; NaN where they cannot be compared.
    """

    scores: dict[str, float]
    points: int
    cosine: float


def find(sight: Sight, box: Boxes3D, stage: str) -> Finding:
    """What the networks make of an object.

    Args:
        sight: of the sample that may hold it.
        box: of the object, one row.
        stage: whose vectors are compared.
    """
    scores = {side: found_score(found, box) for side, found in sight.detections.items()}
    boxes = sight.sample.boxes
    same = ((boxes.values[:, :7] - box.values[0, :7]).abs() < 1e-3).all(-1) & (boxes.labels == box.labels[0])
    points = int(boxes.points[same][0]) if bool(same.any()) else 0  # without points there is no annotation
    column, row, inside = sight.grid.locate(box.values[:, :2])
    cosine = inspect(sight, int(row), int(column), stage).cosine if bool(inside) else math.nan
    return Finding(scores, points, cosine)


def nearest(boxes: Boxes3D, x: float, y: float, reach: float) -> int | None:
    """Row of the box whose footprint, or whose centre's surroundings, hold a place; None for none.

    Args:
        boxes: in the key ego frame.
        x: metres ahead.
        y: metres to the left.
        reach: how far from the centre is near enough, in metres.
    """
    best, least = None, math.inf
    for index, (cx, cy, _, length, width, _, yaw) in enumerate(boxes.values[:, :7].tolist()):
        c, s = math.cos(yaw), math.sin(yaw)
        along, across = c * (x - cx) + s * (y - cy), c * (y - cy) - s * (x - cx)
        away = math.hypot(along, across)
        inside = abs(along) <= length / 2 and abs(across) <= width / 2
        if (inside or away <= reach) and away < least:
            best, least = index, away
    return best
