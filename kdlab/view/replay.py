"""One HTML file that shows frames as the explorer does: no kernel, no network, it opens from a disk or a mail.

The page holds the widget's own JavaScript, `static/replay.js` with small controls, and the frames: maps in 255 steps
of their colour scale, JPEG images, boxes, points. A frame is one chunk (JSON and the bytes that it names, compressed);
what frames share, such as the images of a training that watches one scene, is stored once.
"""

from __future__ import annotations

import base64
import html
import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kdlab.checkpoint import replacing
from kdlab.geometry import BEVGrid
from kdlab.sample import CLASSES
from kdlab.view.sight.data import ALL, Sight
from kdlab.view.sight.layers import Layer, View, feature_layers, mask_layers, term_layer
from kdlab.view.style import Array
from kdlab.view.widgets.canvas import STATIC, boxes_of, mask_bytes, palettes, panel_of, pictures_of, points_of

LIMIT = 10_000_000
"""Bytes that a replay may have: what mail programs and course pages still take."""

Layers = dict[str, dict[str, Layer]]  # of one frame: by "stage|view" and side, and "terms" by term


def write_replay(
    path: Path | str,
    sights: Sequence[Sight],
    stages: Sequence[str] = ("bev",),
    views: Sequence[View] = ("norm", "pca"),
    terms: Sequence[str] | None = None,
    title: str = "kdlab replay",
    labels: Sequence[str] | None = None,
    *,
    masks: bool = True,
    pictures: int = 150,
    points: int = 8000,
) -> Path:
    """Write frames, or steps of a training, as one self-contained page.

    Each map has one colour scale over all frames, so that frames can be compared.

    Args:
        path: of the HTML file; it is written whole or not at all.
        sights: the frames.
        stages: maps to choose from, see `kdlab.view.sight.maps.stage_map`.
        views: how channels become a picture, to choose from.
        terms: of the method, to choose from; None for all, and their sum.
        title: heading of the page.
        labels: a name for each frame, such as "step 20"; default: scene and number.
        masks: also the masks of method and boxes.
        pictures: height of the six images in pixels; 0 leaves them out.
        points: at most so many LiDAR points of a frame; 0 leaves them out.

    Returns:
        the path.

    Raises:
        ValueError: no frames, another number of labels, a stage or term that is not there, or more than 10 MB.
    """
    path = Path(path)
    if not sights:
        raise ValueError("write_replay: no frames; give at least one sight")
    if labels is not None and len(labels) != len(sights):
        raise ValueError(f"write_replay: {len(labels)} labels for {len(sights)} frames; give one each")
    names = list(labels) if labels is not None else [f"{s.sample.scene}, frame {i}" for i, s in enumerate(sights)]
    terms = _terms(sights, terms)
    layers = _one_scale([_layers(sight, stages, views, terms) for sight in sights])
    frames = [_frame(s, maps, masks, pictures, points) for s, maps in zip(sights, layers, strict=True)]
    page = {"title": title, "labels": names, "stages": list(stages), "views": [_word(v) for v in views], "terms": terms}
    text = _html(page | _state(sights[0].grid, frames), frames)
    if len(text) > LIMIT:
        raise ValueError(_too_large(len(text), frames))
    with replacing(path) as part:
        part.write_bytes(text)
    return path


def _terms(sights: Sequence[Sight], wanted: Sequence[str] | None) -> list[str]:
    """The terms to choose from; by default all that any frame has, and their sum."""
    found = list(dict.fromkeys(name for sight in sights for name in sight.results))
    have = [ALL, *found] if found else []
    for name in wanted or ():
        if name not in have:
            raise ValueError(f"write_replay: no term {name!r} in any frame, only {', '.join(found) or 'none'}")
    return have if wanted is None else list(wanted)


def _word(view: View) -> str:
    return f"channel {view}" if isinstance(view, int) else view


def _state(grid: BEVGrid, frames: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What holds for all frames: masks to choose from, the canvas's traits, colour maps."""
    return {
        "masks": list(dict.fromkeys(name for frame in frames for name in frame["masks"])),
        "state": {"extent": [*grid.x, *grid.y], "cells": list(grid.shape), "names": list(CLASSES)},
        "palettes": {name: base64.b64encode(table).decode() for name, table in palettes().items()},
    }


def _layers(sight: Sight, stages: Sequence[str], views: Sequence[View], terms: Sequence[str]) -> Layers:
    """All maps of a frame; a term that this frame does not have is left out."""
    found: Layers = {}
    for stage in stages:
        for view in views:
            found[f"{stage}|{_word(view)}"] = feature_layers(sight, stage, view)
    found["terms"] = {t: term_layer(sight, t) for t in terms if t in sight.results or (t == ALL and sight.results)}
    return found


def _one_scale(frames: list[Layers]) -> list[Layers]:
    """The same map of every frame on one colour scale, and colours of main directions that do not flip."""
    for group in frames[0]:
        for name in {name for frame in frames for name in frame.get(group, {})}:
            row = [frame[group][name] for frame in frames if name in frame[group]]
            low, high = min(layer.low for layer in row), max(layer.high for layer in row)
            for frame in frames:
                if name in frame[group]:
                    frame[group][name] = replace(frame[group][name], low=low, high=high)
    _steady([frame[group] for frame in frames for group in frame if group.endswith("|pca")])
    return frames


def _steady(frames: Iterable[dict[str, Layer]]) -> None:
    """Main directions have no sign of their own: turn each frame's to that of the frame before."""
    previous: Array | None = None
    for layers in frames:
        colours = [name for name, layer in layers.items() if layer.values.ndim == 3]
        if not colours:
            continue
        seen = np.concatenate([layers[name].values.reshape(-1, 3).astype(np.float32) for name in colours])
        seen = seen - seen.mean(0)
        if previous is not None and previous.shape == seen.shape:
            flip = (previous * seen).sum(0) < 0
            for name in colours:
                values = layers[name].values
                layers[name] = replace(layers[name], values=np.where(flip, 255 - values, values).astype(np.uint8))
            seen = np.where(flip, -seen, seen)
        previous = seen


def _frame(sight: Sight, layers: Layers, masks: bool, pictures: int, points: int) -> dict[str, Any]:
    """What the page holds of one frame."""
    maps = {group: [panel_of(one, 8) for one in of.values()] for group, of in layers.items() if group != "terms"}
    return {
        "maps": maps,
        "terms": {name: panel_of(layer, 8) for name, layer in layers["terms"].items()},
        "masks": {name: mask_bytes(layer.values) for name, layer in mask_layers(sight).items()} if masks else {},
        "pictures": pictures_of(sight.sample, pictures) if pictures else [],
        "boxes": boxes_of(sight),
        "points": points_of(sight.sample.points, points) if points else b"",
    }


def _bytes_in(value: Any) -> Iterator[bytes]:
    """Every bytes object in nested lists and dictionaries."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _bytes_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from _bytes_in(one)


def _named(value: Any, places: Mapping[bytes, Any]) -> Any:
    """Nested lists and dictionaries with every bytes object replaced by where it lies."""
    if isinstance(value, bytes):
        return {"$": places[value]}
    if isinstance(value, Mapping):
        return {key: _named(one, places) for key, one in value.items()}
    return [_named(one, places) for one in value] if isinstance(value, list) else value


def _chunk(content: Any, blobs: Sequence[bytes]) -> str:
    """Length of the JSON, JSON, bytes; compressed, in letters."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    return base64.b64encode(zlib.compress(struct.pack("<I", len(text)) + text + b"".join(blobs), 9)).decode()


def _places(blobs: Iterable[bytes], where: str) -> dict[bytes, list[Any]]:
    """Chunk, offset and length of blobs that lie one after another."""
    places, offset = {}, 0
    for blob in blobs:
        places[blob] = [where, offset, len(blob)]
        offset += len(blob)
    return places


def _chunks(frames: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A chunk for each frame by its number, and "shared" for the bytes that several frames name."""
    used = Counter(blob for frame in frames for blob in set(_bytes_in(frame)))
    shared = [blob for blob, count in used.items() if count > 1]
    common = _places(shared, "shared")
    chunks = {"shared": _chunk({}, shared)}
    for index, frame in enumerate(frames):
        own = [blob for blob in dict.fromkeys(_bytes_in(frame)) if blob not in common]
        chunks[str(index)] = _chunk(_named(frame, {**common, **_places(own, str(index))}), own)
    return chunks


def _html(page: Mapping[str, Any], frames: Sequence[dict[str, Any]]) -> bytes:
    """The page's text."""
    scripts = [
        f'<script type="application/base64" id="chunk-{name}">{chunk}</script>'
        for name, chunk in _chunks(frames).items()
    ]
    # The page has no second file to import from, so the two modules become one.
    module = re.sub(r"^import .*?;\n", "", (STATIC / "replay.js").read_text(), flags=re.M)
    parts = {
        "title": html.escape(str(page["title"])),
        "style": (STATIC / "canvas.css").read_text() + (STATIC / "replay.css").read_text(),
        "page": json.dumps(page, allow_nan=False).replace("<", "\\u003c"),
        "chunks": "\n".join(scripts),
        "script": (STATIC / "canvas.js").read_text() + module,
    }
    template = (STATIC / "replay.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template).encode()


def _too_large(size: int, frames: Sequence[dict[str, Any]]) -> str:
    """What to leave out, the largest first."""
    sizes: Counter[str] = Counter()
    known: set[bytes] = set()
    for frame in frames:
        for part, value in frame.items():
            groups = value.items() if part in ("maps", "terms") else [(part, value)]
            for name, content in groups:
                key = {"maps": "stage and view {}", "terms": "term {}"}.get(part, "{}").format(name.replace("|", ", "))
                blobs = set(_bytes_in(content)) - known
                known |= blobs
                sizes[key] += sum(len(zlib.compress(blob, 1)) for blob in blobs) * 4 // 3
    largest = ", ".join(f"{name} ({count / 1e6:.1f} MB)" for name, count in sizes.most_common(5))
    return (
        f"write_replay: {size / 1e6:.1f} MB with {len(frames)} frames, the limit is {LIMIT / 1e6:g} MB; "
        f"give fewer frames (every second one halves it) or leave out: {largest}"
    )
