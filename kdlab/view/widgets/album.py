"""What the explorer shows of each frame, made once and kept: panels, scenes, masks, terms under other quirks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, TypeVar

from kdlab.view.sight import ALL, Frames, Observer, Sight
from kdlab.view.sight.cell import CellReport, inspect
from kdlab.view.sight.layers import Layer, View, feature_layers, mask_layers, similarity_layers, term_layer
from kdlab.view.sight.maps import stage_map
from kdlab.view.widgets.canvas import boxes_of, mask_bytes, panel_of, pictures_of, points_of

T_ = TypeVar("T_")


@dataclass(frozen=True)
class Wanted:
    """Everything that decides what the explorer shows.

    Attributes:
        index: frame.
        quirks: that are on; None for the method as it was given.
        stage: of the detectors' maps.
        view: how channels become a picture.
        term: "all" or a term's name; "" for none.
        what: the term's loss or gradient.
        mask: name of a mask; "" for none.
        cell: row and column of the cell that was picked.
        similar: show how similar every other cell is to it.
    """

    index: int
    quirks: frozenset[str] | None = None
    stage: str = "bev"
    view: View = "norm"
    term: str = "all"
    what: Literal["loss", "gradient"] = "loss"
    mask: str = ""
    cell: tuple[int, int] | None = None
    similar: bool = True


class Kept:
    """The last results by key, for several threads.

    Args:
        limit: so many are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, Lock()
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, make: Callable[[], T_]) -> T_:
        """What is kept under a key, or what ``make`` gives."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                found: T_ = self._values[key]
                return found
        made = make()
        with self._lock:
            self._values[key] = made
            while len(self._values) > self._limit:
                self._values.popitem(last=False)
        return made


class Album:
    """Frames, and what is drawn of them.

    Args:
        sights: `Frames`, or sights that are there already.
    """

    def __init__(self, sights: Sequence[Sight]) -> None:
        self.sights = sights
        looks = sights.observer if isinstance(sights, Frames) else None
        self.observer = looks if isinstance(looks, Observer) else None
        self._observers, self._other = Kept(8), Kept(6)  # the latter hold graphs
        self._scenes, self._panels = Kept(128), Kept(512)

    def __len__(self) -> int:
        return len(self.sights)

    def missing(self, wanted: Wanted) -> str:
        """What has to be made first and takes long, in words; "" where nothing has."""
        return next(self.prepare(wanted), "")

    def prepare(self, wanted: Wanted) -> Iterator[str]:
        """Make what takes long, piece by piece; yields what comes next, in words, before each piece."""
        frame = f"frame {wanted.index}: "
        if isinstance(self.sights, Frames) and not self.sights.ready(wanted.index):
            yield f"{frame}running the networks …"
            self.sights[wanted.index]
        if wanted.quirks is not None and (wanted.index, wanted.quirks) not in self._other:
            yield f"{frame}computing the terms with these quirks …"
            self.sight(wanted)
        if wanted.index not in self._scenes:
            yield f"{frame}preparing images and boxes …"
            self.scene(wanted.index)
        if wanted.what == "gradient":
            for message in self.gradients(wanted, [wanted.term]):
                yield frame + message

    def gradients(self, wanted: Wanted, terms: Iterable[str] | None = None) -> Iterator[str]:
        """Make gradient maps, piece by piece; yields what comes next, in words.

        Args:
            wanted: whose frame and quirks.
            terms: of which; every single one where left out.
        """
        sight = self.sight(wanted)
        can = sight.live is not None or sight.again is not None
        for term in sight.results if terms is None else terms:
            there = bool(sight.results) if term == ALL else term in sight.results
            if can and there and term not in sight.gradients:
                yield f"computing the gradient of {'all terms' if term == ALL else term} …"
                sight.gradient_map(term)

    def sight(self, wanted: Wanted) -> Sight:
        """The frame as networks and method see it."""
        if wanted.quirks is None or self.observer is None:
            return self.sights[wanted.index]
        quirks, observer = wanted.quirks, self.observer
        other = self._observers.get(quirks, lambda: observer.with_quirks(quirks))
        return self._other.get((wanted.index, quirks), lambda: other.compare(self.sights[wanted.index]))

    def scene(self, index: int) -> dict[str, Any]:
        """What the canvas draws of a frame whatever is picked: pictures, boxes, points."""
        sight = self.sights[index]

        def make() -> dict[str, Any]:
            sample = sight.sample
            return {
                "pictures": pictures_of(sample),
                "boxes": boxes_of(sight),
                "points": points_of(sample.points),
                "extent": [*sight.grid.x, *sight.grid.y],
                "cells": list(sight.grid.shape),
            }

        return self._scenes.get(index, make)

    def masks(self, wanted: Wanted) -> dict[str, Layer]:
        """Masks by name."""
        key = ("masks", wanted.index, wanted.quirks)
        return self._panels.get(key, lambda: mask_layers(self.sight(wanted)))

    def mask(self, wanted: Wanted) -> bytes:
        """The mask that is wanted, b"" where there is none."""
        layer = self.masks(wanted).get(wanted.mask) if wanted.mask else None
        return b"" if layer is None else mask_bytes(layer.values)

    def panels(self, wanted: Wanted) -> tuple[list[dict[str, Any]], list[str]]:
        """Maps side by side, and what could not be drawn, in words."""
        sight, place = self.sight(wanted), (wanted.index, wanted.quirks)
        pieces: list[tuple[Hashable, Callable[[], dict[str, Layer]]]] = [
            ((*place, wanted.stage, wanted.view), lambda: feature_layers(sight, wanted.stage, wanted.view))
        ]
        if wanted.term and sight.results:
            key = (*place, "term", wanted.term, wanted.what)
            pieces.append((key, lambda: {wanted.term: term_layer(sight, wanted.term, wanted.what)}))
        if wanted.cell is not None and wanted.similar:
            row, column = wanted.cell
            like = (*place, "similar", wanted.stage, row, column)
            pieces.append((like, lambda: similarity_layers(sight, wanted.stage, row, column)))
        made = [self._panels.get(key, lambda make=make: _tried(make)) for key, make in pieces]  # type: ignore[misc]
        notes = _lacking(sight, wanted) + [note for _, problems in made for note in problems]
        return [panel for panels, _ in made for panel in panels], list(dict.fromkeys(notes))

    def report(self, wanted: Wanted) -> CellReport | None:
        """What is known of the cell that is wanted, with the gradients that are made; None without a cell."""
        if wanted.cell is None:
            return None
        sight, (row, column) = self.sight(wanted), wanted.cell
        key = ("report", wanted.index, wanted.quirks, wanted.stage, row, column, frozenset(sight.gradients))
        return self._panels.get(key, lambda: inspect(sight, row, column, wanted.stage))

    def warm(self, wanted: Wanted) -> None:
        """Make what the others here give, so that drawing it is only sending it."""
        self.panels(wanted)
        self.masks(wanted)
        self.report(wanted)


def sizes(sight: Sight, stage: str) -> dict[str, tuple[int, ...]]:
    """Channels, rows and columns of a stage's map as it is shown, of teacher and student, where they have it."""
    stages, features = sight.stages(), sight.features
    have = [side for side in ("teacher", "student") if stage in stages.get(side, ())]
    maps = {side: stage_map(features[side], stage) for side in have}
    if "student" in maps and stage in sight.adapted:
        maps["student"] = sight.adapted[stage]
    return {side: tuple(found.shape) for side, found in maps.items()}


def _lacking(sight: Sight, wanted: Wanted) -> list[str]:
    """What a side or the method does not have of what is wanted, in words."""
    have = sizes(sight, wanted.stage)
    sides = {side: stages for side, stages in sight.stages().items() if side != "labels"}
    notes = [
        f"the {side} has no {wanted.stage}, only {', '.join(stages)}"
        for side, stages in sides.items()
        if side not in have and have
    ]
    if isinstance(wanted.view, int):
        few = (f"the {side}'s {wanted.stage} has {size[0]} channels only" for side, size in have.items())
        notes += [note for note, size in zip(few, have.values(), strict=True) if wanted.view >= size[0]]
    elif len(have) == 2 and _differ(have, wanted.view):
        each = " against ".join(" x ".join(str(n) for n in size) for size in have.values())
        notes.append(f"no difference to draw: maps of {each} (channels x rows x columns)")
    notes += [sight.errors[side] for side in ("teacher", "student") if side in sight.errors]
    notes += [sight.errors[quirk] for quirk in sorted(wanted.quirks or ()) if quirk in sight.errors]
    if wanted.term in sight.errors:
        notes.append(f"{wanted.term}: {sight.errors[wanted.term]}")
    return notes


def _differ(have: dict[str, tuple[int, ...]], view: View) -> bool:
    """Whether teacher and student cannot be subtracted."""
    teacher, student = have["teacher"], have["student"]
    return teacher[1:] != student[1:] or (view == "pca" and teacher != student)


def _tried(make: Callable[[], dict[str, Layer]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Panels of layers, or the reason why there are none."""
    try:
        return [panel_of(layer) for layer in make().values()], []
    except ValueError as error:
        return [], [str(error)]
