"""nuScenes tables as numpy columns: read once from JSON, kept in a versioned .npz beside them.

`nuscenes.NuScenes` turns every record into a Python dictionary, which takes a minute and gigabytes on v1.0-trainval.
The columns that kdlab needs are a small part of that; they are read once and stored for the next start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from kdlab.data.tables_json import TABLES, Array, read_columns

SCHEMA = 2
"""Raised whenever the columns or their meaning change: older cache files are then rebuilt."""

CACHE_NAME = ".kdlab-tables.npz"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tables:
    """The columns of one version folder.

    Letters: S scenes, K keyframes, D sensor files, E poses, Q calibrations, A boxes, R bicycle racks. Keyframes are
    sorted by scene (in the order of scene.json) and time, a keyframe's boxes as in sample_annotation.json. Strings are
    UTF-8 bytes; -1 stands for "none".

    Attributes:
        splits: JSON object, split name -> scene names, bytes [].
        official: JSON object, likewise: those of nuScenes' own splits that fit the version's name, the scenes that are
            here, bytes [].
        digest: SHA-256 of the columns (those of `kdlab.data.tables_json.UNSIGNED` left out) and of further JSON files
            in the folder; identifies the data, bytes [].
        scene_name: bytes [S].
        scene_description: bytes [S].
        sample_token: bytes [K].
        sample_scene: int32 [K], rising.
        sample_rank: int32 [K]: place in sample.json.
        sample_data: int32 [K, 7]: row of each sensor's keyframe file in the order of `CHANNELS`.
        data_file: bytes [D]: path below the root. LiDAR keyframes and sweeps, camera keyframes.
        data_time: int64 [D], microseconds.
        data_previous: int32 [D]: the sweep before.
        data_pose: int32 [D]: row of `pose`.
        data_calibration: int32 [D]: row of `calibration`.
        data_size: int32 [D, 2]: image height and width, pixels.
        pose: float64 [E, 7]: global from ego; quaternion w, x, y, z and translation, metres.
        calibration: float64 [Q, 7]: ego from sensor, likewise.
        intrinsic: float64 [Q, 9]: camera matrix row by row, NaN where it is no camera.
        box_start: int64 [K + 1]: boxes of keyframe k are rows box_start[k]:box_start[k + 1].
        box_geometry: float64 [A, 13] in the global frame: centre (3), size l, w, h (3), quaternion (4), velocity (3,
            NaN where unknown); metres, m/s.
        box_label: int64 [A]: index into CLASSES; other categories are left out.
        box_points: int64 [A, 2]: LiDAR and radar points inside.
        box_visibility: int64 [A]: 1..4, 0 where not given.
        box_attribute: int64 [A]: index into ATTRIBUTES.
        box_attribute_count: int64 [A]: how many attributes the annotation has.
        rack_start: int64 [K + 1]: bicycle racks of keyframe k are rows rack_start[k]:rack_start[k + 1].
        rack_geometry: float64 [R, 10] in the global frame: centre, size l, w, h, quaternion, as of a box.
    """

    splits: Array
    official: Array
    digest: Array
    scene_name: Array
    scene_description: Array
    sample_token: Array
    sample_scene: Array
    sample_rank: Array
    sample_data: Array
    data_file: Array
    data_time: Array
    data_previous: Array
    data_pose: Array
    data_calibration: Array
    data_size: Array
    pose: Array
    calibration: Array
    intrinsic: Array
    box_start: Array
    box_geometry: Array
    box_label: Array
    box_points: Array
    box_visibility: Array
    box_attribute: Array
    box_attribute_count: Array
    rack_start: Array
    rack_geometry: Array

    @property
    def split_scenes(self) -> dict[str, list[str]]:
        """Scene names of every known split."""
        splits: dict[str, list[str]] = json.loads(self.splits.item())
        return splits

    @property
    def official_splits(self) -> dict[str, list[str]]:
        """Scene names of nuScenes' own splits that the devkit evaluates on this version."""
        splits: dict[str, list[str]] = json.loads(self.official.item())
        return splits


def load_tables(folder: Path) -> Tables:
    """The columns of a version folder: from the cache where it is fresh, otherwise read from the JSON files and cached.

    Raises:
        FileNotFoundError: a table is missing.
        ValueError: a table is not JSON, or records refer to others that do not exist.
    """
    stamp = _stamp(folder)
    places = _cache_places(folder)
    for place in places:
        columns = _read_cache(place, stamp)
        if columns is not None:
            return Tables(**columns)
    _log.info("indexing the tables in %s (once)", folder)
    tables = Tables(**read_columns(folder))
    if not any(_write_cache(place, stamp, tables) for place in places):
        where = " or ".join(map(str, places))
        _log.warning("no table cache could be written at %s: the tables will be read again at every start", where)
    return tables


def _cache_places(folder: Path) -> list[Path]:
    """Beside the tables, else in the user's cache folder under a name made from the tables' path."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return [folder / CACHE_NAME, base / "kdlab" / f"tables-{name}.npz"]


def _stamp(folder: Path) -> str:
    """What a cache was made from: the version, names, sizes and times of the JSON files, and the schema."""
    for name in TABLES:
        if not (folder / f"{name}.json").is_file():
            raise FileNotFoundError(
                f"{folder / name}.json is missing: {folder} is not a complete set of nuScenes tables. "
                "Unpack the metadata archive again, or write a simulated set with `kdlab simulate`."
            )
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.glob("*.json"))]
    return json.dumps([SCHEMA, folder.name, files])


def _read_cache(place: Path, stamp: str) -> dict[str, Array] | None:
    try:
        with np.load(place, allow_pickle=False) as file:
            if str(file["stamp"]) != stamp:
                return None
            return {f.name: file[f.name] for f in fields(Tables)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # Missing, unreadable or damaged: rebuilt.


def _write_cache(place: Path, stamp: str, tables: Tables) -> bool:
    """Write through a temporary file, so that another process sees a whole cache or none."""
    temporary: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.parent.stat().st_mode & 0o222:
            return False  # Marked read-only: left alone even by root.
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=place.name, suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            np.savez(file, stamp=np.array(stamp), **{f.name: getattr(tables, f.name) for f in fields(Tables)})
        os.chmod(temporary, 0o644)  # mkstemp makes private files; a data set is often shared.
        os.replace(temporary, place)
        return True
    except OSError:
        return False
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)  # There where the writing failed, or was interrupted.
