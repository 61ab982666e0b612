"""nuScenes tables of the simulated world: rows of one scene while it is rendered, all tables at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from kdlab.data.simulate_config import (
    CAMERAS,
    LIDAR,
    VERSION,
    Array,
    SimulationConfig,
    camera_offsets,
    token_of,
    written_rig,
)
from kdlab.data.simulate_shapes import CATEGORIES
from kdlab.data.simulate_world import KEYFRAME_STEP, Agent, SceneState

Row: TypeAlias = dict[str, Any]
Tables: TypeAlias = dict[str, list[Row]]

TABLES = (
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
)
ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)
_LEVELS = (("1", "v0-40", 0.4), ("2", "v40-60", 0.6), ("3", "v60-80", 0.8), ("4", "v80-100", 2.0))
_EPOCH = 1_600_000_000_000_000  # Timestamps are in microseconds and start here, one scene every 1000 s.


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write JSON atomically."""
    write_atomic(path, json.dumps(value, indent=indent).encode())


def scene_name(scene_index: int) -> str:
    """Name of a scene: scene-0001 for index 0."""
    return f"scene-{scene_index + 1:04d}"


def splits_of(scenes: int) -> dict[str, list[str]]:
    """Scene names by split: about 15 % each for validation and test, at least one."""
    part = max(1, round(scenes * 0.15))
    names = [scene_name(i) for i in range(scenes)]
    return {
        "sim_train": names[: scenes - 2 * part],
        "sim_val": names[scenes - 2 * part : scenes - part],
        "sim_test": names[scenes - part :],
    }


def microseconds(scene_index: int, time: float) -> int:
    """Timestamp of a scene's moment."""
    return _EPOCH + scene_index * 1_000_000_000 + round(time * 1e6)


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(v), 9) for v in values]


def quaternion_of(rotation: Array) -> list[float]:
    """Quaternion w, x, y, z of a rotation matrix [3, 3]."""
    from pyquaternion import Quaternion

    return _rounded(Quaternion(matrix=rotation, atol=1e-6, rtol=1e-6).elements)


class SceneTables:
    """Collects one scene's rows. Tokens are hashes of the seed and names, so that they never depend on order."""

    def __init__(self, config: SimulationConfig, scene_index: int) -> None:
        self.config, self.index = config, scene_index
        self.tables: Tables = {name: [] for name in TABLES}
        self._data: dict[str, list[Row]] = {}
        self._annotations: dict[int, list[Row]] = {}
        self._agents: dict[int, Agent] = {}

    def token(self, *names: str | int) -> str:
        """A token of this scene."""
        return token_of(self.config.seed, self.index, *names)

    def sample_token(self, keyframe: int) -> str:
        """Token of a keyframe."""
        return self.token("sample", keyframe)

    def add_data(self, channel: str, keyframe: int, time: float, filename: str, state: SceneState, key: bool) -> None:
        """Add one sensor reading with the ego pose of its own moment."""
        stamp = microseconds(self.index, time)
        token = self.token("data", channel, stamp)
        camera = channel != LIDAR
        pose = state.ego_pose
        self.tables["ego_pose"].append(
            {
                "token": token,
                "timestamp": stamp,
                "rotation": quaternion_of(pose[:3, :3]),
                "translation": _rounded(pose[:3, 3]),
            }
        )
        row: Row = {
            "token": token,
            "sample_token": self.sample_token(keyframe),
            "ego_pose_token": token,
            "calibrated_sensor_token": self.token("calibration", channel),
            "timestamp": stamp,
            "fileformat": "jpg" if camera else "pcd",
            "is_key_frame": key,
            "height": self.config.image_height if camera else 0,
            "width": self.config.image_width if camera else 0,
            "filename": filename,
            "prev": "",
            "next": "",
        }
        self._data.setdefault(channel, []).append(row)

    def add_annotations(self, keyframe: int, agents: list[Agent], points: list[int], shares: dict[int, float]) -> None:
        """Add the boxes of a keyframe, each with its LiDAR points and the share of it that the cameras see."""
        for agent, count in zip(agents, points, strict=True):
            self._agents.setdefault(agent.index, agent)
            share = shares.get(agent.index, 0.0)
            level = next(token for token, _, high in _LEVELS if share < high)
            length, width, height = agent.size
            row: Row = {
                "token": self.token("annotation", agent.index, keyframe),
                "sample_token": self.sample_token(keyframe),
                "instance_token": self.token("instance", agent.index),
                "visibility_token": level,
                "attribute_tokens": [token_of(0, "attribute", agent.attribute)] if agent.attribute else [],
                "translation": _rounded((agent.x, agent.y, agent.z)),
                "size": _rounded((width, length, height)),
                "rotation": _rounded((np.cos(agent.yaw / 2), 0, 0, np.sin(agent.yaw / 2))),
                "prev": "",
                "next": "",
                "num_lidar_pts": count,
                "num_radar_pts": 0,
            }
            self._annotations.setdefault(agent.index, []).append(row)

    def finish(self, description: str) -> Tables:
        """All rows of the scene, chains linked. Objects that no keyframe's LiDAR ever hit are left out."""
        for rows in self._data.values():
            rows.sort(key=lambda row: int(row["timestamp"]))
            self.tables["sample_data"] += _linked(rows)
        for index, rows in sorted(self._annotations.items()):
            if not any(row["num_lidar_pts"] for row in rows):
                continue
            self.tables["sample_annotation"] += _linked(rows)
            self.tables["instance"].append(
                {
                    "token": self.token("instance", index),
                    "category_token": token_of(0, "category", self._agents[index].category),
                    "nbr_annotations": len(rows),
                    "first_annotation_token": rows[0]["token"],
                    "last_annotation_token": rows[-1]["token"],
                }
            )
        count = self.config.keyframes
        self.tables["sample"] = _linked(
            [
                {
                    "token": self.sample_token(k),
                    "timestamp": microseconds(self.index, k * KEYFRAME_STEP),
                    "prev": "",
                    "next": "",
                    "scene_token": self.token("scene"),
                }
                for k in range(count)
            ]
        )
        self.tables["scene"] = [
            {
                "token": self.token("scene"),
                "log_token": self.token("log"),
                "nbr_samples": count,
                "first_sample_token": self.sample_token(0),
                "last_sample_token": self.sample_token(count - 1),
                "name": scene_name(self.index),
                "description": description,
            }
        ]
        self._log()
        self._calibrations()
        return self.tables

    def _log(self) -> None:
        self.tables["log"] = [
            {
                "token": self.token("log"),
                "logfile": f"sim-{self.config.seed}-{scene_name(self.index)}",
                "vehicle": "sim",
                "date_captured": "2020-09-13",
                "location": "simulated",
            }
        ]
        self.tables["map"] = [
            {
                "token": self.token("map"),
                "log_tokens": [self.token("log")],
                "category": "semantic_prior",
                "filename": self.map_file,
            }
        ]

    @property
    def map_file(self) -> str:
        """Path of the scene's map mask in the data set."""
        return f"maps/{self.token('map')}.png"

    def _calibrations(self) -> None:
        for channel, sensor in written_rig(self.config, self.index).items():
            intrinsic = [] if sensor.intrinsic is None else [_rounded(row) for row in sensor.intrinsic]
            pose = sensor.ego_from_sensor
            self.tables["calibrated_sensor"].append(
                {
                    "token": self.token("calibration", channel),
                    "sensor_token": token_of(0, "sensor", channel),
                    "translation": _rounded(pose[:3, 3]),
                    "rotation": quaternion_of(pose[:3, :3]),
                    "camera_intrinsic": intrinsic,
                }
            )


def _linked(rows: list[Row]) -> list[Row]:
    """Rows in order, their prev and next set."""
    for before, after in pairwise(rows):
        before["next"], after["prev"] = after["token"], before["token"]
    return rows


def fixed_tables() -> Tables:
    """The tables that are the same in every data set."""
    return {
        "attribute": [
            {"token": token_of(0, "attribute", name), "name": name, "description": ""} for name in ATTRIBUTES
        ],
        "category": [
            {"token": token_of(0, "category", name), "name": name, "description": "", "index": i + 1}
            for i, name in enumerate(sorted(CATEGORIES.values()))
        ],
        "visibility": [{"token": token, "level": level, "description": ""} for token, level, _ in _LEVELS],
        "sensor": [
            {"token": token_of(0, "sensor", name), "channel": name, "modality": "lidar" if name == LIDAR else "camera"}
            for name in (*CAMERAS, LIDAR)
        ],
    }


def write_tables(out: Path, parts: list[Tables], scenes: int) -> None:
    """Assemble the scenes' parts into the thirteen tables and the splits of a world of so many scenes."""
    folder = out / VERSION
    written = {row["name"] for part in parts for row in part["scene"]}
    splits = {split: [name for name in names if name in written] for split, names in splits_of(scenes).items()}
    fixed = fixed_tables()
    for name in TABLES:
        rows = fixed[name] if name in fixed else [row for part in parts for row in part[name]]
        write_json(folder / f"{name}.json", rows, indent=0)
    write_json(folder / "splits.json", splits, indent=1)


def describe(config: SimulationConfig, scene_index: int, agents: Iterable[Agent]) -> str:
    """A scene's description, in the manner of nuScenes."""
    names = [a.name.replace("_", " ") for a in agents]
    counts = ", ".join(f"{names.count(n)} {n}" for n in sorted(set(names), key=lambda n: (-names.count(n), n)))
    late = max((abs(v) for v in camera_offsets(config, scene_index).values()), default=0.0)
    mood = [
        word
        for word, on in (("night", config.night > 0.5), ("fog", config.fog > 0.2), ("unsynchronised", late > 0))
        if on
    ]
    return "Simulated street" + (f" ({', '.join(mood)})" if mood else "") + f": {counts}"
