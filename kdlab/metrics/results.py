"""Reads a nuScenes detection result file into columns, a sample at a time, and refuses what the devkit refuses."""

from __future__ import annotations

import contextlib
import gc
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from kdlab.metrics.boxes import ATTRIBUTE_INDEX, COLUMNS, Array, EvalBoxes
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.stream import CHUNK, JsonStream
from kdlab.metrics.truth import Truth
from kdlab.sample import CLASSES

_LABELS = {name: i for i, name in enumerate(CLASSES)}
_LENGTHS = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2, "ego_translation": 3}
_NEEDED = ("sample_token", "translation", "size", "rotation", "velocity", "detection_name", "attribute_name")
_fields = itemgetter(*_NEEDED)
_EMPTY = EvalBoxes.empty()


def read_results(
    path: Path | str, truth: Truth, config: EvaluationConfig | None = None, *, chunk: int = CHUNK
) -> EvalBoxes:
    """Read a result file for the samples of a split.

    The file is never held as a whole. For nuScenes' own splits it must hold exactly the split's samples; otherwise
    further samples are left out unread.

    As the devkit has it, of a key that is given twice the last value counts, a velocity may hold NaN, and a score may
    be a number in quotes. Other than the devkit: a velocity of null is refused, on which the devkit fails only where
    the box is matched; an integer of more than 64 bits, on which it always fails, is read as a float.

    Args:
        path: nuScenes detection result file.
        truth: what it will be compared with.
        config: nuScenes' own settings where left out.
        chunk: bytes to read at a time.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what nuScenes would not take: no JSON, no ``results`` or ``meta``, a sample missing or unknown, too
            many boxes, a box that lacks a field or holds something impossible; the message says where.
    """
    path, config = Path(path), config or EvaluationConfig()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such result file")
    store: _Store | None = None
    meta: Any = None
    with path.open("rb") as file, _no_collection():
        stream, seen = JsonStream(file, path, chunk), set()
        for key in stream.members():
            seen.add(key)
            if key == "results":
                store = _read_samples(stream, path, truth, config.max_boxes_per_sample)
            else:
                value = stream.value()
                meta = value if key == "meta" else meta
        stream.finish()
    if store is None or "meta" not in seen:
        lacking = "results" if store is None else "meta"
        raise ValueError(f"{path}: no field {lacking!r}; a nuScenes result file is an object with 'meta' and 'results'")
    order = truth.arrange(list(store.spans), str(path))
    return replace(store.boxes(order), meta=meta if isinstance(meta, dict) else {}, of=truth.name)


class _Store:
    """Columns that grow in place, sample after sample: no second copy of all of them is ever held.

    Attributes:
        spans: by token the first row of its boxes and the row after the last; of a token that comes twice the last
            ones, in the place of the first, as Python's ``json`` has it.
    """

    def __init__(self) -> None:
        self.spans: dict[str, tuple[int, int]] = {}
        self._columns = {name: array(_typecode(name)) for name in COLUMNS}
        self._rows = 0

    def add(self, token: str, boxes: EvalBoxes) -> None:
        for name, column in self._columns.items():
            values, shape = getattr(boxes, name), (len(boxes), *getattr(_EMPTY, name).shape[1:])
            assert values.shape == shape, name  # Another one would shift all later rows.
            column.frombytes(values.tobytes())
        self.spans[token] = self._rows, self._rows + len(boxes)
        self._rows += len(boxes)

    def boxes(self, tokens: Sequence[str]) -> EvalBoxes:
        """The boxes of the tokens, one token after the other; empties the store."""
        spans = [np.arange(*self.spans[token]) for token in tokens]
        rows = np.concatenate(spans) if spans else np.zeros(0, np.int64)
        as_stored = np.array_equal(rows, np.arange(self._rows))
        done: dict[str, Any] = {}
        for name in COLUMNS:
            column = np.frombuffer(self._columns.pop(name), dtype=_typecode(name))
            column = column.reshape(-1, *getattr(_EMPTY, name).shape[1:])
            done[name] = column if as_stored else column[rows]
        return EvalBoxes(**done)


def _typecode(name: str) -> str:
    return "d" if getattr(_EMPTY, name).dtype.kind == "f" else "q"


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Hold back the garbage collector: it would look through a million lists that reference counts free anyway."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_samples(stream: JsonStream, path: Path, truth: Truth, limit: int) -> _Store:
    if stream.peek() != b"{":
        raise ValueError(f"{path}: 'results' is not an object of sample tokens and their boxes")
    store = _Store()
    for token in stream.members():
        content = stream.value()
        sample = truth.index.get(token)
        if sample is None:
            if truth.predefined:
                raise ValueError(f"{path}: sample {token!r} is not of split {truth.split!r} of {truth.version}")
            continue
        if content in ({}, ""):
            content = []  # The devkit takes anything that holds nothing.
        if not isinstance(content, list):
            raise ValueError(f"{path}: sample {token!r} holds {_short(content)} where a list of boxes was expected")
        if len(content) > limit:
            raise ValueError(f"{path}: sample {token!r} has {len(content)} boxes; nuScenes allows {limit}")
        try:
            store.add(token, _columns(content, token, sample, truth.index) if content else _EMPTY)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            for i, box in enumerate(content):
                complaint = _complaint(box)
                if complaint:
                    name = f" ({box['detection_name']})" if isinstance(box, dict) and "detection_name" in box else ""
                    raise ValueError(f"{path}: sample {token!r}, box {i}{name}: {complaint}") from None
            raise ValueError(f"{path}: sample {token!r}: {error}") from error
    return store


def _columns(boxes: list[dict[str, Any]], token: str, sample: int, index: dict[str, int]) -> EvalBoxes:
    """Columns of a sample's boxes, with few steps of Python per box.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: one of the boxes is not as it should be.
    """
    n = len(boxes)
    if set(map(type, boxes)) != {dict}:
        raise TypeError("a box is not an object")
    given = set().union(*boxes)
    tokens, translation, size, rotation, velocity, names, attributes = zip(*map(_fields, boxes), strict=True)
    score = np.array([float(b.get("detection_score", -1.0)) for b in boxes])
    here, unknown = np.full(n, sample), np.full(n, -1)
    if "ego_translation" in given:
        _numbers([b["ego_translation"] for b in boxes if "ego_translation" in b], 3)  # Checked, then not used.
    return EvalBoxes(
        sample=here,
        owner=here if tokens.count(token) == n else _owners(tokens, index),
        translation=_numbers(translation, 3),
        size=_numbers(size, 3),
        rotation=_numbers(rotation, 4),
        velocity=_numbers(velocity, 2, nan=True),
        label=np.array([_LABELS[name] for name in names]),
        score=_no_nan(score),
        attribute=np.array([ATTRIBUTE_INDEX[name] for name in attributes]),
        points=np.array([int(b.get("num_pts", -1)) for b in boxes], np.int64) if "num_pts" in given else unknown,
        visibility=np.zeros(n, np.int64),
    )


def _numbers(lists: Sequence[list[float]], length: int, nan: bool = False) -> Array:
    """Lists of numbers as rows, float64 [n, length]."""
    if set(map(len, lists)) != {length}:
        raise ValueError("a list has a wrong length")
    values = np.array(list(chain.from_iterable(lists)))
    if values.dtype.kind not in "fiub" or values.ndim != 1:  # A list of lists has more axes.
        raise TypeError("a list holds what is not a number")
    values = values.astype(np.float64, copy=False).reshape(-1, length)
    return values if nan else _no_nan(values)


def _no_nan(values: Array) -> Array:
    if np.isnan(values).any():
        raise ValueError("a number is NaN")
    return values


def _owners(tokens: Sequence[str], index: dict[str, int]) -> Array:
    if set(map(type, tokens)) != {str}:
        raise TypeError("a sample token is not a string")
    return np.array([index.get(token, -1) for token in tokens])


def _complaint(box: Any) -> str:
    """What is wrong with a box; empty where nothing is."""
    if not isinstance(box, dict):
        return f"is {_short(box)} where an object was expected"
    lacking = next((key for key in _NEEDED if key not in box), None)
    if lacking:
        return f"has no field {lacking!r}"
    if not isinstance(box["sample_token"], str):
        return f"sample_token is {_short(box['sample_token'])}, not a string"
    for key in _LENGTHS:
        if key in box:
            complaint = _vector_complaint(key, box[key])
            if complaint:
                return complaint
    if box["detection_name"] not in CLASSES:
        return f"detection_name {_short(box['detection_name'])} is none of the ten classes"
    if box["attribute_name"] not in [*ATTRIBUTE_INDEX]:
        return f'attribute_name {_short(box["attribute_name"])} is no nuScenes attribute; use "" for none'
    return _number_complaint(box)


def _vector_complaint(key: str, value: Any) -> str:
    length = _LENGTHS[key]
    if not isinstance(value, list):
        return f"{key} is {_short(value)}, not a list of {length} numbers"
    if len(value) != length:
        return f"{key} has {len(value)} numbers, needs {length}"
    for number in value:
        try:
            (converted,) = array("d", [number])
        except (TypeError, OverflowError):
            return f"{key} holds {_short(number)}, which is not a number"
        if converted != converted and key != "velocity":
            return f"{key} holds NaN"
    return ""


def _number_complaint(box: dict[str, Any]) -> str:
    for key, convert in (("detection_score", float), ("num_pts", int)):
        if key in box:
            try:
                (number,) = array("d" if convert is float else "q", [convert(box[key])])
            except (TypeError, ValueError, OverflowError):
                return f"{key} is {_short(box[key])}, which is not a number"
            if number != number:
                return f"{key} is NaN"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
