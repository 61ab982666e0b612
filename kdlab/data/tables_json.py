"""Reads the JSON tables of the nuScenes format into numpy columns, a record at a time."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray

from kdlab.sample import ATTRIBUTES, CAMERAS, CLASSES

LIDAR = "LIDAR_TOP"
CHANNELS = (LIDAR, *CAMERAS)
"""The order of the sensor axis of `Tables.sample_data`."""

TABLES = ("scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sensor", "sample_annotation", "instance",
          "category", "attribute", "visibility")  # fmt: skip
"""The tables that are read."""

UNSIGNED = ("official", "scene_description", "sample_rank", "box_attribute_count", "rack_start", "rack_geometry")
"""Columns that the digest leaves out: they came later, and stored weights name the data by its digest."""

Array: TypeAlias = NDArray[Any]
_LEVELS = {"v0-40": 1, "v40-60": 2, "v60-80": 3, "v80-100": 4}
_CURE = "unpack the metadata archive again, or write a simulated set anew with `kdlab simulate`"
_RACK = -2  # Label of a bicycle rack while boxes are read; -1 for other categories.
_CHUNK = 1 << 19  # Bytes of JSON that are held at a time.

CATEGORIES = {
    "movable_object.barrier": "barrier",
    "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.car": "car",
    "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
    "vehicle.trailer": "trailer",
    "vehicle.truck": "truck",
}
"""The detection class of each nuScenes category that has one; the devkit's own, whose import takes seconds."""


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSON file that holds a list of objects, without holding the file in memory.

    A piece of the file is decoded up to its last closing brace. Where that brace closes no record, as in nested objects
    or text, what is there is no valid JSON, and the piece is taken together with the next one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a JSON list of objects, or cut off.
    """
    with path.open("rb") as file:
        text = file.read(_CHUNK).lstrip()  # Its end may lie within a string, whose spaces count.
        if not text.startswith(b"["):
            raise ValueError(f"{path}: not a nuScenes table (a JSON list); {_CURE}")
        text, more, comma = text[1:], b"more", b""
        while more:
            more = file.read(max(_CHUNK, len(text)))
            text = (text + more).lstrip()
            end = text.rfind(b"}") + 1 if more else len(text.rstrip()) - 1
            part = text[:end].removeprefix(comma)
            held = _decoded(part) if more or text.rstrip().endswith(b"]") else None
            if held is None and not more:
                raise ValueError(f"{path}: cut off or not JSON after {text[:40]!r}; {_CURE}")
            for record in held or ():
                if not isinstance(record, dict):
                    raise ValueError(f"{path}: holds {record!r} where a record was expected; {_CURE}")
                yield record
            if held:
                text, comma = text[end:], b","


def _decoded(text: bytes) -> list[Any] | None:
    """The values of a part of a JSON list; None where the part is not valid by itself."""
    try:
        values: list[Any] = orjson.loads(b"[" + text + b"]")
    except orjson.JSONDecodeError:
        try:
            values = json.loads(b"[" + text + b"]")  # It takes NaN and huge integers too.
        except ValueError:
            return None
    return values


def read_columns(folder: Path) -> dict[str, Array]:
    """Read the JSON tables of a version folder into the columns that `kdlab.data.tables.Tables` describes.

    Raises:
        ValueError: a table is not JSON, lacks a field or refers to a record that does not exist.
    """
    columns: dict[str, Array] = {}
    try:
        keyframes = _read_keyframes(folder, columns)
        channels = _read_calibrations(folder, columns)
        _read_sensor_files(folder, columns, keyframes, channels)
        _read_boxes(folder, columns, keyframes)
    except KeyError as error:
        what = f"no field or record {error}, which another needs"
        raise ValueError(f"{folder}: {what}; these are not complete nuScenes v1.0 tables; {_CURE}") from error
    columns["digest"] = np.array(_digest(folder, columns).encode())
    scenes = [n.decode() for n in columns["scene_name"]]
    columns["splits"] = np.array(json.dumps(_splits(folder, scenes)).encode())
    columns["official"] = np.array(json.dumps(_official_splits(folder, scenes)).encode())
    return columns


@dataclass
class _Keyframes:
    token: Array  # bytes [K], in the order of the columns
    time: Array  # int64 [K], microseconds, of the sample record
    order: Array  # int64 [K]: argsort of token, so that tokens are looked up quickly


def _read_keyframes(folder: Path, columns: dict[str, Array]) -> _Keyframes:
    scenes = [(r["token"], r["name"], r.get("description") or "") for r in records(folder / "scene.json")]
    rows = [(r["token"], r["timestamp"], r["scene_token"]) for r in records(folder / "sample.json")]
    scene = _find(_strings(s[0] for s in scenes), _strings(r[2] for r in rows), folder / "sample.json", "scene")
    time = np.array([r[1] for r in rows], np.int64)
    order = np.lexsort((time, scene))
    columns["scene_name"], columns["scene_description"] = _strings(s[1] for s in scenes), _strings(s[2] for s in scenes)
    columns["sample_token"] = token = _strings(r[0] for r in rows)[order]
    columns["sample_scene"], columns["sample_rank"] = scene[order].astype(np.int32), order.astype(np.int32)
    return _Keyframes(token, time[order], np.argsort(token, kind="stable"))


def _read_calibrations(folder: Path, columns: dict[str, Array]) -> dict[str, tuple[int, int]]:
    """Fill in the calibrations; returns token -> (row, index into CHANNELS) of those that kdlab uses."""
    sensors = ((r["token"], r["channel"]) for r in records(folder / "sensor.json"))
    channel = {token: CHANNELS.index(name) for token, name in sensors if name in CHANNELS}
    rows: list[tuple[list[float], Array]] = []
    found = {}
    for r in records(folder / "calibrated_sensor.json"):
        if r["sensor_token"] in channel:
            found[r["token"]] = (len(rows), channel[r["sensor_token"]])
            intrinsic = np.array(r["camera_intrinsic"], np.float64).ravel()
            rows.append((r["rotation"] + r["translation"], intrinsic if intrinsic.size == 9 else np.full(9, np.nan)))
    columns["calibration"] = np.array([r[0] for r in rows], np.float64).reshape(-1, 7)
    columns["intrinsic"] = np.array([r[1] for r in rows], np.float64).reshape(-1, 9)
    return found


def _read_sensor_files(
    folder: Path, columns: dict[str, Array], keyframes: _Keyframes, channels: dict[str, tuple[int, int]]
) -> None:
    """LiDAR files and the keyframes' images, with the ego poses that they name."""
    path = folder / "sample_data.json"
    names: tuple[list[str], ...] = ([], [], [], [], [])  # token, prev, pose token, sample token, file
    numbers = array("q")  # time, height, width, calibration, channel, keyframe
    for r in records(path):
        calibration, channel = channels.get(r["calibrated_sensor_token"], (-1, -1))
        if channel == 0 or (channel > 0 and r["is_key_frame"]):
            keys = ("token", "prev", "ego_pose_token", "sample_token", "filename")
            for column, name in zip(names, keys, strict=True):
                column.append(r[name])
            size = (r.get("height") or 0, r.get("width") or 0)
            numbers.extend((r["timestamp"], *size, calibration, channel, bool(r["is_key_frame"])))
    token, previous, pose, sample, file = map(_strings, names)
    table = np.array(numbers, np.int64).reshape(-1, 6)
    columns["data_file"], columns["data_time"], columns["data_size"] = file, table[:, 0], table[:, 1:3].astype(np.int32)
    columns["data_calibration"] = table[:, 3].astype(np.int32)
    columns["data_previous"] = _lookup(token, previous).astype(np.int32)  # A chain that leaves the tables ends there.
    owner = _find(keyframes.token, sample, path, "sample", keyframes.order)
    by_sample = np.full((len(keyframes.token), len(CHANNELS)), -1, np.int32)
    rows = np.flatnonzero(table[:, 5])
    by_sample[owner[rows], table[rows, 4]] = rows
    columns["sample_data"] = by_sample
    columns["pose"], columns["data_pose"] = _read_poses(folder, pose)


def _read_poses(folder: Path, wanted: Array) -> tuple[Array, Array]:
    """Ego poses [E, 7] that are wanted, and the row of each wanted token."""
    unique, row = np.unique(wanted, return_inverse=True)
    place = {t.decode(): i for i, t in enumerate(unique)}
    poses = np.full((len(unique), 7), np.nan)
    for r in records(folder / "ego_pose.json"):
        i = place.get(r["token"])
        if i is not None:
            poses[i] = r["rotation"] + r["translation"]
    missing = np.flatnonzero(np.isnan(poses).any(1))
    if len(missing):
        token = unique[missing[0]].decode()
        raise ValueError(f"{folder / 'ego_pose.json'}: no pose {token!r}, which sample_data.json names; {_CURE}")
    return poses, row.astype(np.int32)


def _read_boxes(folder: Path, columns: dict[str, Array], keyframes: _Keyframes) -> None:
    path = folder / "sample_annotation.json"
    label_of, attribute_of, level_of = _box_names(folder)
    names: tuple[list[str], ...] = ([], [], [], [])  # token, prev, next, sample token
    geometry, numbers = array("d"), array("q")
    for r in records(path):
        for column, key in zip(names, ("token", "prev", "next", "sample_token"), strict=True):
            column.append(r[key])
        width, length, height = r["size"]
        geometry.extend((*r["translation"], length, width, height, *r["rotation"]))
        attribute = next((attribute_of[t] for t in r["attribute_tokens"] if t in attribute_of), -1)
        level = level_of.get(r.get("visibility_token") or "", 0)
        points = (r["num_lidar_pts"], r["num_radar_pts"])
        numbers.extend((label_of(r["instance_token"]), *points, level, attribute, len(r["attribute_tokens"])))
    token, previous, following, sample = map(_strings, names)
    values = np.array(geometry, np.float64).reshape(-1, 10)
    table = np.array(numbers, np.int64).reshape(-1, 6)
    owner = _find(keyframes.token, sample, path, "sample", keyframes.order)
    before, after = _lookup(token, previous), _lookup(token, following)
    velocity, undefined = _velocities(values[:, :3], keyframes.time[owner], before, after)
    if undefined.any():
        name = token[int(np.argmax(undefined))].decode()
        raise ValueError(
            f"{path}: {name!r} has no velocity: the annotations before and after it are of samples of one time; {_CURE}"
        )
    rows, columns["box_start"] = _by_keyframe(table[:, 0] >= 0, owner, len(keyframes.token))
    columns["box_geometry"] = np.concatenate((values, velocity), 1)[rows]
    columns["box_label"], columns["box_points"] = table[rows, 0], table[rows, 1:3]
    columns["box_visibility"], columns["box_attribute"] = table[rows, 3], table[rows, 4]
    columns["box_attribute_count"] = table[rows, 5]
    racks, columns["rack_start"] = _by_keyframe(table[:, 0] == _RACK, owner, len(keyframes.token))
    columns["rack_geometry"] = values[racks]


def _by_keyframe(wanted: Array, owner: Array, keyframes: int) -> tuple[Array, Array]:
    """Rows that are wanted (bool [A]), sorted by their keyframe, and where each keyframe's begin, int64 [K + 1]."""
    rows = np.flatnonzero(wanted)
    rows = rows[np.argsort(owner[rows], kind="stable")]
    return rows, np.searchsorted(owner[rows], np.arange(keyframes + 1)).astype(np.int64)


def _box_names(folder: Path) -> tuple[Callable[[str], int], dict[str, int], dict[str, int]]:
    """How an instance token gives a class index, an attribute token an attribute index, a visibility token a level."""
    category = {}
    for r in records(folder / "category.json"):
        other = _RACK if r["name"] == "static_object.bicycle_rack" else -1
        category[r["token"]] = CLASSES.index(CATEGORIES[r["name"]]) if r["name"] in CATEGORIES else other
    instance = {r["token"]: category[r["category_token"]] for r in records(folder / "instance.json")}
    attributes = ((r["token"], r["name"]) for r in records(folder / "attribute.json"))
    attribute = {token: ATTRIBUTES.index(name) for token, name in attributes if name in ATTRIBUTES}
    level = {r["token"]: _LEVELS.get(r["level"], 0) for r in records(folder / "visibility.json")}
    return instance.__getitem__, attribute, level


def _velocities(
    centre: Array, time: Array, previous: Array, following: Array, limit: float = 1.5
) -> tuple[Array, Array]:
    """Velocities [A, 3] in m/s by the rules of `NuScenes.box_velocity`: centred difference, NaN over long times.

    Also where its two annotations are of one time (bool [A]): the devkit divides by 0, which is no velocity.
    """
    here = np.arange(len(centre))
    first, last = np.where(previous >= 0, previous, here), np.where(following >= 0, following, here)
    elapsed = 1e-6 * time[last] - 1e-6 * time[first]
    both = (previous >= 0) & (following >= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        velocity: Array = (centre[last] - centre[first]) / elapsed[:, None]
    known = (first != last) & (elapsed <= np.where(both, 2 * limit, limit)) & np.isfinite(velocity).all(1)
    velocity[~known] = np.nan
    return velocity, (first != last) & (elapsed == 0)


def _splits(folder: Path, scenes: list[str]) -> dict[str, list[str]]:
    """Splits of splits.json and, for the official versions, those of the devkit whose scenes are all there."""
    splits: dict[str, list[str]] = {}
    if folder.name in ("v1.0-mini", "v1.0-trainval", "v1.0-test"):
        from nuscenes.utils.splits import create_splits_scenes

        splits = {name: held for name, held in create_splits_scenes().items() if set(held) <= set(scenes)}
    path = folder / "splits.json"
    if path.is_file():
        try:
            own = json.loads(path.read_text())
            splits |= {str(name): [str(s) for s in held] for name, held in own.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: must map split names to lists of scene names ({error})") from error
    for name, held in splits.items():
        unknown = sorted(set(held) - set(scenes))
        if unknown:
            raise ValueError(f"{path}: split {name!r} names scene {unknown[0]!r}, which scene.json does not hold")
    return splits


def _official_splits(folder: Path, scenes: list[str]) -> dict[str, list[str]]:
    """The devkit's own splits that it evaluates on a version of this name; of their scenes those that are here."""
    endings = {"trainval": ("train", "val", "train_detect", "train_track"), "mini": ("mini_train", "mini_val"),
               "test": ("test",)}  # fmt: skip
    names = next((names for ending, names in endings.items() if folder.name.endswith(ending)), ())
    if not names:
        return {}
    from nuscenes.utils.splits import create_splits_scenes

    everywhere, here = create_splits_scenes(), set(scenes)
    splits = {name: [s for s in everywhere[name] if s in here] for name in names}
    return {name: held for name, held in splits.items() if held}


def _digest(folder: Path, columns: dict[str, Array]) -> str:
    """Identity of the data. Further JSON files count, since a simulator's settings may change images but no table."""
    state = hashlib.sha256()
    for name, column in sorted((n, c) for n, c in columns.items() if n not in UNSIGNED):
        state.update(f"{name} {column.dtype.str} {column.shape} ".encode() + np.ascontiguousarray(column).tobytes())
    for path in sorted(folder.glob("*.json")):
        if path.stem not in (*TABLES, "splits"):
            state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()


def _strings(values: Iterable[str]) -> Array:
    """UTF-8 bytes [n]: a quarter of the memory of numpy's own strings."""
    encoded = [v.encode() for v in values]
    return np.array(encoded, "S") if encoded else np.zeros(0, "S1")


def _lookup(keys: Array, wanted: Array, order: Array | None = None) -> Array:
    """Row in keys of each wanted value, int64 [n]; -1 where there is none or the wanted value is empty."""
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(keys, kind="stable") if order is None else order
    place = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    return np.where((keys[place] == wanted) & (wanted != b""), place, -1)


def _find(keys: Array, wanted: Array, path: Path, what: str, order: Array | None = None) -> Array:
    """`_lookup` where every value must be found."""
    rows = _lookup(keys, wanted, order)
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        token = wanted[missing[0]].decode()
        raise ValueError(f"{path}: refers to {what} {token!r}, which {what}.json does not hold; {_CURE}")
    return rows
