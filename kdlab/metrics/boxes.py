"""Boxes as numpy columns: what the evaluation works on, from tensors here, from a file in `kdlab.metrics.results`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdlab.geometry import transform
from kdlab.sample import ATTRIBUTES, CLASSES, Detections

if TYPE_CHECKING:
    from kdlab.metrics.truth import Truth

Array: TypeAlias = NDArray[Any]

MAX_BOXES = 500
"""Boxes per sample that nuScenes allows."""

MOVING = 0.2
"""Speed above which a box counts as moving, m/s."""

_USUAL_ATTRIBUTES = {  # class -> attribute when moving, when not; the defaults that nuScenes detectors commonly use
    "car": ("vehicle.moving", "vehicle.parked"),
    "truck": ("vehicle.moving", "vehicle.parked"),
    "construction_vehicle": ("vehicle.moving", "vehicle.parked"),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    "trailer": ("vehicle.moving", "vehicle.parked"),
    "barrier": ("", ""),
    "motorcycle": ("cycle.with_rider", "cycle.without_rider"),
    "bicycle": ("cycle.with_rider", "cycle.without_rider"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    "traffic_cone": ("", ""),
}
ATTRIBUTE_INDEX = {"": -1, **{name: i for i, name in enumerate(ATTRIBUTES)}}
"""Attribute name -> index into ATTRIBUTES; the empty name -> -1."""

_USUAL = np.array([[ATTRIBUTE_INDEX[a] for a in _USUAL_ATTRIBUTES[name]] for name in CLASSES])


@dataclass(frozen=True)
class EvalBoxes:
    """N boxes in the global frame, in the order in which the devkit holds them; ties of scores are decided by it.

    Attributes:
        sample: int64 [N]: index into `Truth.tokens` of the list that holds the box; decides which boxes are filtered.
        owner: int64 [N]: index of the sample that the box itself names, -1 for another one; decides what it may match.
        translation: float64 [N, 3]: centre, metres.
        size: float64 [N, 3]: width, length, height, metres.
        rotation: float64 [N, 4]: quaternion w, x, y, z.
        velocity: float64 [N, 2]: m/s, NaN where unknown.
        label: int64 [N]: index into CLASSES.
        score: float64 [N].
        attribute: int64 [N]: index into ATTRIBUTES, -1 for none.
        points: int64 [N]: LiDAR and radar points inside, -1 where unknown; a box with 0 is left out.
        visibility: int64 [N]: nuScenes visibility level 1..4, 0 where unknown.
        meta: what a result file says of itself; empty where the boxes are from elsewhere.
        of: the samples that ``sample`` and ``owner`` point into (`Truth.name`); empty where nobody said so.
    """

    sample: Array
    owner: Array
    translation: Array
    size: Array
    rotation: Array
    velocity: Array
    label: Array
    score: Array
    attribute: Array
    points: Array
    visibility: Array
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    of: str = ""

    def __len__(self) -> int:
        return len(self.sample)

    def take(self, rows: Array) -> EvalBoxes:
        """The boxes of the rows (int64 [n], or bool [N]), in their order."""
        return replace(self, **{name: getattr(self, name)[rows] for name in COLUMNS})

    @classmethod
    def join(cls, parts: Sequence[EvalBoxes]) -> EvalBoxes:
        """All boxes of the parts, one part after the other."""
        parts = [cls.empty(), *parts]
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in COLUMNS})

    @classmethod
    def empty(cls) -> EvalBoxes:
        """No boxes."""
        none, number = np.zeros(0, np.int64), np.zeros((0, 4))
        three, two, score = number[:, :3], number[:, :2], number[:, 0]
        return cls(none, none, three, three, number, two, none, score, none, none, none)


COLUMNS = tuple(f.name for f in fields(EvalBoxes) if f.name not in ("meta", "of"))
"""Names of the columns of `EvalBoxes`."""


def to_global(
    detections: Detections, global_from_key: Tensor, sample: int = 0, max_boxes: int = MAX_BOXES
) -> EvalBoxes:
    """A sample's detections in the global frame, best first.

    Args:
        detections: boxes [M, 9] in the key ego frame; an unknown (NaN) velocity becomes 0.
        global_from_key: float64 [4, 4].
        sample: what `EvalBoxes.sample` and ``owner`` say.
        max_boxes: as many of the best are kept.
    """
    order = detections.scores.argsort(descending=True, stable=True)[:max_boxes]
    values = detections.values[order].double().cpu()
    pose = global_from_key.double().cpu()
    # nuScenes boxes stand upright in the global frame: only the heading is turned.
    heading = torch.stack((values[:, 6].cos(), values[:, 6].sin()), -1) @ pose[:2, :2].mT
    yaw = torch.atan2(heading[:, 1], heading[:, 0]).tolist()
    velocity = (values[:, 7:9].nan_to_num(0.0) @ pose[:2, :2].mT).numpy()
    label = detections.labels[order].cpu().numpy().astype(np.int64)
    rotation = np.zeros((len(order), 4))
    rotation[:, 0], rotation[:, 3] = [math.cos(y / 2) for y in yaw], [math.sin(y / 2) for y in yaw]
    still = ~(np.hypot(velocity[:, 0], velocity[:, 1]) > MOVING)
    here, unknown = np.full(len(order), sample), np.full(len(order), -1)
    return EvalBoxes(
        sample=here,
        owner=here,
        translation=transform(pose, values[:, :3]).numpy(),
        size=values[:, [4, 3, 5]].numpy(),
        rotation=rotation,
        velocity=velocity,
        label=label,
        score=detections.scores[order].double().cpu().numpy(),
        attribute=_USUAL[label, still.astype(int)],
        points=unknown,
        visibility=np.zeros(len(order), np.int64),
    )


def from_detections(
    tokens: Sequence[str],
    detections: Sequence[Detections],
    global_from_key: Sequence[Tensor],
    truth: Truth,
    max_boxes: int = MAX_BOXES,
) -> EvalBoxes:
    """A detector's boxes for the evaluation, without a file in between.

    Args:
        tokens: sample tokens, each once.
        detections: of each token, in the key ego frame.
        global_from_key: float64 [4, 4] of each token.
        truth: what they will be compared with.
        max_boxes: the best so many of each sample are kept (`EvaluationConfig.max_boxes_per_sample`); a file with more
            is refused, but a detector that finds more is not at fault.

    Raises:
        ValueError: a sample of the truth is missing, a token is not of it or given twice, a number is not finite.
    """
    if not len(tokens) == len(detections) == len(global_from_key) == len(set(tokens)):
        given = f"{len(tokens)} tokens ({len(set(tokens))} different)"
        raise ValueError(
            f"from_detections: {given}, {len(detections)} detections, {len(global_from_key)} poses; one of each needed"
        )
    place = {token: i for i, token in enumerate(tokens)}
    parts = []
    for token in truth.arrange(tokens, "the detections"):
        i = place[token]
        part = to_global(detections[i], global_from_key[i], truth.index[token], max_boxes)
        numbers = (part.translation, part.size, part.rotation, part.velocity, part.score[:, None])
        if not np.isfinite(np.concatenate(numbers, 1)).all():
            raise ValueError(f"from_detections: a box of sample {token!r} has a number that is not finite")
        parts.append(part)
    return replace(EvalBoxes.join(parts), of=truth.name)
