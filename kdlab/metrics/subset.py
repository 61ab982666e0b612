"""Parts of a split to evaluate on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np

from kdlab.metrics.boxes import Array, EvalBoxes
from kdlab.metrics.filtering import ego_distances
from kdlab.metrics.truth import Truth

Time = Literal["day", "night"]


@dataclass(frozen=True)
class Subset:
    """What counts; None means all. Conditions hold together.

    Samples (``scenes``, ``tokens``, ``time``): boxes of other samples are left out before anything is matched.

    Boxes (``distance``, ``visibility``, ``points``), like COCO's area ranges: everything is matched; an annotation
    outside the subset does not count, nor does a prediction matched to it; a prediction without a match counts where
    its distance lies in the subset (it has no visibility and no points). Unlike COCO's, matching does not prefer
    annotations inside: the nearest first, as in nuScenes.

    Attributes:
        scenes: names of scenes.
        tokens: sample tokens.
        distance: from the ego vehicle in the ground plane, metres, the first included, the second not.
        visibility: nuScenes visibility levels, 1 to 4; 0 for annotations without one.
        points: LiDAR and radar points inside, the first included, the second not.
        time: of day.

    Raises:
        ValueError: a range that is none or holds NaN, a level or a time that does not exist.
    """

    scenes: tuple[str, ...] | None = None
    tokens: tuple[str, ...] | None = None
    distance: tuple[float, float] | None = None
    visibility: tuple[int, ...] | None = None
    points: tuple[float, float] | None = None
    time: Time | None = None

    def __post_init__(self) -> None:
        for name in ("distance", "points"):
            given = getattr(self, name)
            if given is not None and (len(given) != 2 or any(map(math.isnan, given)) or not given[0] < given[1]):
                raise ValueError(f"subset: {name} must be two numbers, the first below the second, got {given}")
        if self.visibility is not None and not set(self.visibility) <= {0, 1, 2, 3, 4}:
            raise ValueError(f"subset: visibility must be levels of 0 to 4, got {self.visibility}")
        if self.time not in (None, *get_args(Time)):
            raise ValueError(f"subset: time must be 'day' or 'night', got {self.time!r}")

    def __str__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name} {value}" for name, value in given if value is not None) or "everything"

    def samples(self, truth: Truth) -> Array:
        """Which samples count, bool [S].

        Raises:
            ValueError: a scene or token that the split does not hold, or no sample at all.
        """
        for kind, wanted, held in (("scene", self.scenes, truth.scene), ("sample", self.tokens, truth.tokens)):
            unknown = sorted(set(wanted or ()) - set(held))
            if unknown:
                raise ValueError(f"subset: split {truth.split!r} has no {kind} {unknown[0]!r}")
        chosen = np.ones(len(truth.tokens), bool)
        if self.scenes is not None:
            chosen &= np.isin(truth.scene, self.scenes)
        if self.tokens is not None:
            chosen &= np.isin(truth.tokens, self.tokens)
        if self.time is not None:
            chosen &= truth.night == (self.time == "night")
        if not chosen.any():
            raise ValueError(f"subset: split {truth.split!r} has no sample that fits {self}")
        return chosen

    def truths(self, truth: Truth, boxes: EvalBoxes) -> Array:
        """Which annotations count, bool [N]."""
        chosen = self.predictions(truth, boxes)
        if self.visibility is not None:
            chosen &= np.isin(boxes.visibility, self.visibility)
        if self.points is not None:
            chosen &= (boxes.points >= self.points[0]) & (boxes.points < self.points[1])
        return chosen

    def predictions(self, truth: Truth, boxes: EvalBoxes) -> Array:
        """Which predictions count where they match nothing, bool [N]."""
        if self.distance is None:
            return np.ones(len(boxes), bool)
        distance = ego_distances(truth, boxes)
        chosen: Array = (distance >= self.distance[0]) & (distance < self.distance[1])
        return chosen
