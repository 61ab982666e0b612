"""Settings of the simulated world, its seeded randomness and its sensor rig."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

VERSION = "v1.0-sim"
GENERATOR = 1  # Raise when the same settings start to give other bytes: an old folder is then not continued.

CAMERAS: tuple[str, ...] = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_RIGHT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_FRONT_LEFT",
)
LIDAR = "LIDAR_TOP"

Array: TypeAlias = NDArray[np.float64]
Array32: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True)
class SimulationConfig:
    """Everything that decides the bytes of a simulated data set."""

    scenes: int = 12
    """Number of scenes; at least 3, so that sim_train, sim_val and sim_test each have one."""
    keyframes: int = 20
    """Annotated keyframes per scene, at 2 Hz."""
    seed: int = 7
    """Seed of everything: layouts, traffic, colours, noise."""
    image_width: int = 704
    """Width of the camera images in pixels; the intrinsics of the 1600x900 originals are scaled."""
    image_height: int = 396
    """Height of the camera images in pixels."""
    sweeps_per_keyframe: int = 4
    """LiDAR sweeps from one keyframe to the next, the keyframe's own included (real nuScenes has 10)."""
    traffic: float = 1.0
    """Density of moving traffic and pedestrians; more traffic also means more occlusion."""
    occlusion: float = 1.0
    """Density of parked vehicles and street furniture, which hide what is behind them."""
    distance: float = 1.0
    """Stretches lanes, gaps and kerb distances, so that objects stand farther away."""
    speed: float = 1.0
    """Scales the speeds of all traffic and of the ego vehicle."""
    night: float = 0.0
    """0 is daylight, 1 is night with street lamps and headlights. Images only; a LiDAR brings its own light."""
    fog: float = 0.0
    """Fog density, 0 (clear) to 1 (about 40 m of sight). Fades images; weakens and drops LiDAR returns."""
    image_noise: float = 1.0
    """Camera noise, as a multiple of a modest sensor noise; grows by itself at night."""
    antialias: bool = True
    """Cast three more rays for every pixel on an edge."""
    lidar_beams: int = 32
    """LiDAR beams, spread over -30.67 to 10.67 degrees."""
    lidar_azimuth_steps: int = 1080
    """Firings of each beam per revolution."""
    lidar_range: float = 90.0
    """Farthest LiDAR return in metres."""
    lidar_range_noise: float = 0.02
    """Standard deviation of the measured range in metres."""
    lidar_dropout: float = 0.05
    """Share of returns lost at random, on top of those lost to weak reflection."""
    lidar_rolling: bool = False
    """Fire the sweep over 50 ms that end at its timestamp, unrectified, instead of all at once."""
    camera_time_offset: float = 0.0
    """Largest time offset of a camera from the keyframe in seconds; each camera gets its own, fixed per scene."""
    lidar_time_offset: float = 0.0
    """Time offset of the LiDAR from the keyframe in seconds. Boxes stay at the keyframe's time."""
    calibration_rotation: float = 0.0
    """Error of the written camera rotations, standard deviation per axis in degrees."""
    calibration_translation: float = 0.0
    """Error of the written camera positions, standard deviation per axis in metres."""
    annotation_range: float = 75.0
    """Objects within this distance of the ego vehicle are annotated, in metres."""

    def check(self) -> None:
        """Raise ValueError, with the field's name, for settings that cannot work."""
        if self.scenes < 3:
            raise ValueError(f"scenes must be at least 3 (train, val and test need one each), got {self.scenes}")
        least: dict[str, float] = {
            "keyframes": 1,
            "image_width": 32,
            "image_height": 18,
            "sweeps_per_keyframe": 1,
            "lidar_beams": 2,
            "lidar_azimuth_steps": 16,
            "lidar_range": 5,
            "annotation_range": 30,
            "distance": 0.8,
            "seed": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        most = {"night": 1.0, "fog": 1.0, "lidar_dropout": 0.95, "traffic": 3.0, "occlusion": 2.0, "distance": 2.0}
        for name in (
            "night",
            "fog",
            "traffic",
            "occlusion",
            "speed",
            "image_noise",
            "lidar_range_noise",
            "lidar_dropout",
            "camera_time_offset",
            "calibration_rotation",
            "calibration_translation",
        ):
            value = getattr(self, name)
            if not 0 <= value <= most.get(name, float("inf")):
                raise ValueError(f"{name} must be between 0 and {most.get(name, 'infinity')}, got {value}")
        if self.speed > 2 or max(abs(self.lidar_time_offset), self.camera_time_offset) > 0.25:
            raise ValueError("speed must be at most 2, and time offsets at most 0.25 s")

    def digest(self) -> str:
        """Hash of all settings and of the generator's version."""
        text = json.dumps([GENERATOR, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def rng_of(seed: int, *names: str | int) -> np.random.Generator:
    """A generator that depends only on the seed and the names, never on the order of calls."""
    keys = [zlib.crc32(n.encode()) if isinstance(n, str) else int(n) + 1_000_003 for n in names]
    return np.random.default_rng(np.random.SeedSequence([seed, *keys]))


def token_of(seed: int, *names: str | int) -> str:
    """A nuScenes token: 32 hexadecimal digits from the seed and the names."""
    return hashlib.md5("/".join(map(str, (seed, *names))).encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Sensor:
    """One sensor's calibration.

    Attributes:
        channel: nuScenes channel name.
        ego_from_sensor: Pose [4, 4] of the sensor in the ego frame.
        intrinsic: Camera matrix [3, 3] in pixels; None for the LiDAR.
    """

    channel: str
    ego_from_sensor: Array
    intrinsic: Array | None


Rig: TypeAlias = dict[str, Sensor]

# Rounded calibrations of one real nuScenes vehicle: focal length, principal point (1600x900), translation, w x y z.
_CAMERA_NUMBERS: dict[str, tuple[float, float, float, tuple[float, ...], tuple[float, ...]]] = {
    "CAM_FRONT": (1266.4, 816.3, 491.5, (1.701, 0.016, 1.511), (0.4998, -0.5030, 0.4998, -0.4974)),
    "CAM_FRONT_RIGHT": (1260.8, 808.0, 495.3, (1.551, -0.493, 1.496), (0.2060, -0.2027, 0.6825, -0.6714)),
    "CAM_FRONT_LEFT": (1272.6, 826.6, 479.8, (1.524, 0.495, 1.509), (0.6757, -0.6736, 0.2121, -0.2112)),
    "CAM_BACK": (809.2, 829.2, 481.8, (0.028, 0.003, 1.579), (0.5038, -0.4974, -0.4942, 0.5045)),
    "CAM_BACK_LEFT": (1256.7, 792.1, 492.8, (1.036, 0.485, 1.591), (0.6924, -0.7032, -0.1165, 0.1120)),
    "CAM_BACK_RIGHT": (1259.5, 807.3, 501.2, (1.015, -0.481, 1.562), (0.1228, -0.1324, -0.7004, 0.6905)),
}
_LIDAR_NUMBERS = ((0.944, 0.0, 1.840), (0.7078, -0.0065, 0.0106, -0.7063))


def quaternion_matrix(q: tuple[float, ...] | Array) -> Array:
    """Rotation matrix [3, 3] of a quaternion (w, x, y, z), normalised first."""
    w, x, y, z = np.asarray(q, dtype=np.float64) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def pose_matrix(translation: tuple[float, ...] | Array, rotation: Array) -> Array:
    """Pose [4, 4] from a translation [3] and a rotation matrix [3, 3]."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, translation
    return pose


def yaw_pose(x: float, y: float, z: float, yaw: float) -> Array:
    """Pose [4, 4] of an upright body at x, y, z (metres) turned by yaw (radians) about z."""
    c, s = np.cos(yaw), np.sin(yaw)
    return pose_matrix((x, y, z), np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]))


def real_rig(config: SimulationConfig) -> Rig:
    """The sensors where they really are: a real vehicle's geometry, intrinsics scaled to the image size."""
    sx, sy = config.image_width / 1600.0, config.image_height / 900.0
    rig: Rig = {LIDAR: Sensor(LIDAR, pose_matrix(_LIDAR_NUMBERS[0], quaternion_matrix(_LIDAR_NUMBERS[1])), None)}
    for name, (f, cx, cy, t, q) in _CAMERA_NUMBERS.items():
        # A pixel's centre is at its index + 0.5 before and after scaling, as everywhere in an image resize.
        intrinsic = np.array(
            [[f * sx, 0, (cx + 0.5) * sx - 0.5], [0, f * sy, (cy + 0.5) * sy - 0.5], [0, 0, 1]], dtype=np.float64
        )
        rig[name] = Sensor(name, pose_matrix(t, quaternion_matrix(q)), intrinsic)
    return rig


def written_rig(config: SimulationConfig, scene_index: int) -> Rig:
    """The calibration that the tables state: the real one, off by the seeded calibration error (cameras only)."""
    rig = real_rig(config)
    if config.calibration_rotation == 0 and config.calibration_translation == 0:
        return rig
    for name in CAMERAS:
        rng = rng_of(config.seed, scene_index, "calibration", name)
        half = np.radians(rng.normal(0, 1, 3) * config.calibration_rotation) / 2
        error = pose_matrix(
            rng.normal(0, 1, 3) * config.calibration_translation, quaternion_matrix(np.array([1.0, *half]))
        )
        sensor = rig[name]
        pose = sensor.ego_from_sensor.copy()
        pose[:3, :3] = pose[:3, :3] @ error[:3, :3]
        pose[:3, 3] += error[:3, 3]
        rig[name] = Sensor(name, pose, sensor.intrinsic)
    return rig


def camera_offsets(config: SimulationConfig, scene_index: int) -> dict[str, float]:
    """Time offset of each camera from the keyframe in seconds."""
    rng = rng_of(config.seed, scene_index, "camera offsets")
    return {name: float(rng.uniform(-1, 1)) * config.camera_time_offset for name in CAMERAS}
