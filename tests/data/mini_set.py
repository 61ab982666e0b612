"""Writes a tiny data set in the nuScenes format: 2 scenes of 3 keyframes, a moving and turning ego, a static wall."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pyquaternion import Quaternion

from kdlab.sample import CAMERAS

VERSION = "v1.0-tiny"
WIDTH, HEIGHT = 96, 56
SWEEPS = 3  # LiDAR sweeps from one keyframe to the next
CAMERA_DELAY = 20_000  # microseconds after the keyframe, so that every camera has an ego pose of its own
KEYFRAMES = {"tiny-0001": (0, 500_000, 1_000_000), "tiny-0002": (0, 2_000_000, 2_500_000)}  # the second has a long gap
START = 1_600_000_000_000_000
LIDAR_ORIGIN = (0.94, 0.0, 1.84)
EMPTY_TIME = START + 60_000_000 + 2_500_000  # the last keyframe of the second scene has no boxes

Record = dict[str, Any]


def ego_pose(scene: int, time: int) -> tuple[Quaternion, np.ndarray]:
    """Rotation and translation of the ego in the map, a curve driven at 6 m/s, slightly pitched."""
    seconds = (time - START - scene * 60_000_000) * 1e-6
    turn = Quaternion(axis=(0, 0, 1), angle=0.4 + scene + 0.15 * seconds) * Quaternion(axis=(0, 1, 0), angle=0.01)
    return turn, np.array((600 + 6 * seconds * np.cos(0.4 + scene), 1600 + 6 * seconds * np.sin(0.4 + scene), 0.3))


def wall(scene: int) -> np.ndarray:
    """Points of a wall in the map, [P, 3]: 20 m ahead of where the scene starts."""
    turn, place = ego_pose(scene, START + scene * 60_000_000)
    y, z = np.meshgrid(np.linspace(-8, 8, 33), np.linspace(0, 3, 7))
    local = np.stack((np.full(y.size, 20.0), y.ravel(), z.ravel()), 1)
    return local @ turn.rotation_matrix.T + place


@dataclass
class _Writer:
    root: Path
    tables: dict[str, list[Record]] = field(default_factory=dict)

    def add(self, table: str, token: str, **values: Any) -> str:
        self.tables.setdefault(table, []).append({"token": token, **values})
        return token

    def pose(self, scene: int, time: int) -> str:
        token = f"pose-{time}"
        if token not in [r["token"] for r in self.tables.get("ego_pose", [])]:
            turn, place = ego_pose(scene, time)
            self.add("ego_pose", token, timestamp=time, rotation=list(turn.elements), translation=list(place))
        return token

    def write(self) -> None:
        folder = self.root / VERSION
        folder.mkdir(parents=True)
        for name, rows in self.tables.items():
            (folder / f"{name}.json").write_text(json.dumps(rows, indent=0))
        splits = {"tiny_train": ["tiny-0001"], "tiny_val": ["tiny-0002"], "all": ["tiny-0001", "tiny-0002"]}
        (folder / "splits.json").write_text(json.dumps(splits))


def write_mini_set(root: Path) -> Path:
    """Write the set below root; returns root."""
    writer = _Writer(root)
    _names(writer)
    for scene, (name, times) in enumerate(KEYFRAMES.items()):
        _scene(writer, scene, name, [START + scene * 60_000_000 + t for t in times])
    writer.write()
    return root


def _names(writer: _Writer) -> None:
    for category in ("vehicle.car", "human.pedestrian.adult", "movable_object.barrier", "animal"):
        writer.add("category", f"category-{category}", name=category, description="")
        writer.add("instance", f"instance-{category}", category_token=f"category-{category}", nbr_annotations=3,
                   first_annotation_token="", last_annotation_token="")  # fmt: skip
    for name in ("vehicle.moving", "pedestrian.standing"):
        writer.add("attribute", f"attribute-{name}", name=name, description="")
    for token, level in (("1", "v0-40"), ("2", "v40-60"), ("3", "v60-80"), ("4", "v80-100")):
        writer.add("visibility", token, level=level, description="")
    writer.add("log", "log", logfile="", vehicle="", date_captured="2020-01-01", location="nowhere")
    writer.add("map", "map", category="semantic_prior", filename="", log_tokens=["log"])
    turn = Quaternion(axis=(0, 0, 1), angle=-np.pi / 2)
    writer.add("sensor", "sensor-LIDAR_TOP", channel="LIDAR_TOP", modality="lidar")
    writer.add("calibrated_sensor", "calibration-LIDAR_TOP", sensor_token="sensor-LIDAR_TOP", camera_intrinsic=[],
               translation=list(LIDAR_ORIGIN), rotation=list(turn.elements))  # fmt: skip
    optical = Quaternion(matrix=np.array(((0.0, 0, 1), (-1, 0, 0), (0, -1, 0))))
    for camera, angle in zip(CAMERAS, (0, -60, -120, 180, 120, 60), strict=True):
        turn = Quaternion(axis=(0, 0, 1), degrees=angle) * optical
        writer.add("sensor", f"sensor-{camera}", channel=camera, modality="camera")
        writer.add("calibrated_sensor", f"calibration-{camera}", sensor_token=f"sensor-{camera}",
                   camera_intrinsic=[[60.0, 0, WIDTH / 2], [0, 60.0, HEIGHT / 2], [0, 0, 1]],
                   translation=[1.0, 0.1, 1.5], rotation=list(turn.elements))  # fmt: skip


def _scene(writer: _Writer, scene: int, name: str, times: list[int]) -> None:
    tokens = [f"{name}-{i}" for i in range(len(times))]
    writer.add("scene", f"scene-{name}", name=name, log_token="log", nbr_samples=len(times), description="",
               first_sample_token=tokens[0], last_sample_token=tokens[-1])  # fmt: skip
    for i, time in enumerate(times):
        writer.add("sample", tokens[i], timestamp=time, scene_token=f"scene-{name}", prev=tokens[i - 1] if i else "",
                   next=tokens[i + 1] if i + 1 < len(times) else "")  # fmt: skip
        for n, camera in enumerate(CAMERAS):
            _image(writer, scene, tokens[i], camera, time + CAMERA_DELAY, 20 * n + 10 * i)
    sweeps = []
    for i, time in enumerate(times):
        before = [] if i == 0 else [time - 50_000 * (SWEEPS - k) for k in range(1, SWEEPS)]
        sweeps += [(t, tokens[i], False) for t in before] + [(time, tokens[i], True)]
    for k, (time, sample, key) in enumerate(sweeps):
        _sweep(writer, scene, name, sample, time, key, [f"lidar-{t}" for t, _, _ in sweeps], k)
    if EMPTY_TIME not in times:
        _annotations(writer, scene, name, tokens, times)
    else:
        _annotations(writer, scene, name, tokens[:-1], times[:-1])


def _image(writer: _Writer, scene: int, sample: str, camera: str, time: int, grey: int) -> None:
    file = f"samples/{camera}/{camera}-{time}.jpg"
    (writer.root / file).parent.mkdir(parents=True, exist_ok=True)
    picture = np.full((HEIGHT, WIDTH, 3), grey, np.uint8)
    picture[HEIGHT // 2 :] = 240 - grey
    cv2.imwrite(str(writer.root / file), picture)
    writer.add("sample_data", f"{camera}-{time}", sample_token=sample, ego_pose_token=writer.pose(scene, time),
               calibrated_sensor_token=f"calibration-{camera}", timestamp=time, fileformat="jpg", is_key_frame=True,
               height=HEIGHT, width=WIDTH, filename=file, prev="", next="")  # fmt: skip


def _sweep(writer: _Writer, scene: int, name: str, sample: str, time: int, key: bool, chain: list[str], k: int) -> None:
    file = f"{'samples' if key else 'sweeps'}/LIDAR_TOP/{name}-{time}.pcd.bin"
    (writer.root / file).parent.mkdir(parents=True, exist_ok=True)
    turn, place = ego_pose(scene, time)
    ego = (wall(scene) - place) @ turn.rotation_matrix
    sensor = (ego - LIDAR_ORIGIN) @ Quaternion(axis=(0, 0, 1), angle=-np.pi / 2).rotation_matrix
    points = np.zeros((len(sensor) + 2, 5), np.float32)
    points[:-2, :3], points[:, 3], points[:-2, 4] = sensor, 51.0, 3
    points[-2, :3] = 0.5, -0.5, -1.0  # a return from the ego vehicle
    points[-1, :3] = np.nan, 1, 1  # a broken return
    points.tofile(writer.root / file)
    writer.add("sample_data", chain[k], sample_token=sample, ego_pose_token=writer.pose(scene, time),
               calibrated_sensor_token="calibration-LIDAR_TOP", timestamp=time, fileformat="pcd", is_key_frame=key,
               height=0, width=0, filename=file, prev=chain[k - 1] if k else "",
               next=chain[k + 1] if k + 1 < len(chain) else "")  # fmt: skip


def _annotations(writer: _Writer, scene: int, name: str, samples: list[str], times: list[int]) -> None:
    _, start = ego_pose(scene, times[0])
    objects = (  # category, place at the start, velocity, size (w, l, h), LiDAR points, radar points, attribute
        ("vehicle.car", (10.0, 3, 0.9), (4.0, 1.5, 0.1), (1.9, 4.5, 1.6), 12, 1, "vehicle.moving"),
        ("human.pedestrian.adult", (5.0, -6, 0.8), (0.0, 0, 0), (0.6, 0.7, 1.8), 3, 0, "pedestrian.standing"),
        ("movable_object.barrier", (15.0, -2, 0.5), (0.0, 0, 0), (2.0, 0.5, 1.0), 0, 0, ""),
        ("animal", (8.0, 8, 0.3), (0.0, 0, 0), (0.3, 0.8, 0.5), 4, 0, ""),
    )
    for k, (category, place, velocity, size, lidar, radar, attribute) in enumerate(objects):
        for i, (sample, time) in enumerate(zip(samples, times, strict=True)):
            if category == "human.pedestrian.adult" and i > 0:
                continue  # Annotated once: its velocity is unknown.
            single = category == "human.pedestrian.adult"
            centre = start + place + np.array(velocity) * (time - times[0]) * 1e-6
            attributes = [f"attribute-{attribute}"] if attribute else []
            writer.add("sample_annotation", f"{name}-{k}-{i}", sample_token=sample, attribute_tokens=attributes,
                       instance_token=f"instance-{category}", visibility_token=str(1 + k), translation=list(centre),
                       size=list(size), rotation=list(Quaternion(axis=(0, 0, 1), angle=0.7 + k).elements),
                       num_lidar_pts=lidar, num_radar_pts=radar, prev=f"{name}-{k}-{i - 1}" if i else "",
                       next=f"{name}-{k}-{i + 1}" if i + 1 < len(samples) and not single else "")  # fmt: skip
