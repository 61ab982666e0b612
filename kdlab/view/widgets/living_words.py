"""What the living scene says in words: its objects, its networks, what was changed, what became of an object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from kdlab.data.simulate_changes import Changes
from kdlab.data.simulate_live import LiveWorld
from kdlab.data.simulate_tables import scene_name
from kdlab.geometry import BEVGrid
from kdlab.sample import Boxes3D
from kdlab.view.sight import Observer
from kdlab.view.sight.before_after import Finding
from kdlab.view.widgets.readout import number, table


def where(box: Boxes3D) -> str:
    """A box's place as seen from the ego vehicle."""
    x, y = box.values[0, :2].tolist()
    return f"{abs(x):.0f} m {'ahead' if x >= 0 else 'behind'}, {abs(y):.0f} m {'left' if y >= 0 else 'right'}"


def objects_of(world: LiveWorld, grid: BEVGrid) -> list[tuple[str, int]]:
    """The objects on a grid in words, and their agents, the nearest first."""
    found = []
    for agent, name, box in world.agents:
        if bool(grid.locate(box.values[:, :2])[2]):
            words = f"{name.replace('_', ' ')} #{agent}: {where(box)}"
            found.append((float(box.values[0, :2].norm()), words, agent))
    return [(words, agent) for _, words, agent in sorted(found)]


def heading_of(world: LiveWorld, observer: Observer) -> str:
    """Names keyframe, teacher, student and method, and what a viewer should know, as HTML."""
    parts = [("world", f"{scene_name(world.scene)}, keyframe {world.keyframe}")]
    for side in ("teacher", "student"):
        network = getattr(observer, side)
        parts.append((side, "none" if network is None else network.config.modality))
    parts.append(("method", "none" if observer.method is None else observer.method.name))
    style = "margin-right: 22px; white-space: nowrap"
    words = " ".join(f'<span style="{style}">{name} <b>{escape(text)}</b></span>' for name, text in parts)
    notes = "".join(f"<div>{escape(note)}</div>" for note in (*observer.notes, *observer.errors.values()))
    return f'<div style="font-size: 14px; line-height: 1.5">{words}</div>{notes}'


def changes_in_words(changes: Changes, names: Mapping[int, str]) -> str:
    """What is other than in the data set.

    Args:
        changes: of the world.
        names: class of each agent.
    """
    words = []
    for agent, (ahead, left, turn) in changes.moved.items():
        if agent not in changes.removed:
            turned = f", turned {math.degrees(turn):+.0f}°" if turn else ""
            words.append(f"{names[agent]} #{agent} moved {ahead:+.1f} m ahead, {left:+.1f} m left{turned}")
    words += [f"{names[agent]} #{agent} removed" for agent in sorted(changes.removed)]
    settings = {"beams": "LiDAR beams", "dropout": "drop-out", "fog": "fog", "night": "night"}
    values = ((words, getattr(changes, name)) for name, words in settings.items())
    words += [f"{name} {value:g}" for name, value in values if value is not None]
    for camera, (yaw, pitch, roll) in changes.calibration.items():
        angles = ", ".join(f"{n} {a:+.1f}°" for n, a in (("yaw", yaw), ("pitch", pitch), ("roll", roll)) if a)
        words.append(f"calibration of {camera.removeprefix('CAM_').replace('_', ' ').lower()} off by {angles}")
    return "; ".join(words) or "the world as it is in the data set"


def place_html(changes: Changes, names: Mapping[int, str], seconds: Mapping[str, float]) -> str:
    """What was changed and how long it took."""
    parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    return f"{escape(changes_in_words(changes, names))} · {sum(seconds.values()):.2f} s ({parts})"


def report_html(name: str, box: Boxes3D, removed: bool, before: Finding, now: Finding) -> str:
    """What teacher and student make of an object, before and now.

    Args:
        name: of the object.
        box: where it is now, one row.
        removed: it is not there any more.
        before: of the unchanged world.
        now: of the changed one, at the object's new place.
    """
    state = "removed; below, what is still found at its place" if removed else where(box)
    head = ["", *(f"score of the {side}" for side in now.scores), "LiDAR points on it"]
    known = not (math.isnan(before.cosine) and math.isnan(now.cosine))
    rows = [
        [time, *map(_score, found.scores.values()), str(found.points), *([number(found.cosine)] if known else [])]
        for time, found in (("before", before), ("now", now))
    ]
    head += ["cosine of teacher and student there"] if known else []
    style = "<style>.kdlab-object td, .kdlab-object th { padding: 0 22px 0 0; text-align: left; }</style>"
    title = f"<b>{escape(name)}</b> now: {state}"
    return f'{style}<div class="kdlab-object" style="line-height: 1.45">{title}{table(head, rows)}</div>'


def _score(score: float) -> str:
    return "not found" if math.isnan(score) else f"{score:.2f}"
