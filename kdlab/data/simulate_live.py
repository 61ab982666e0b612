"""The simulated world in memory: one keyframe as a `Sample`, changed at will, without files.

Without changes the sample is the one that `NuScenesDataset` reads from the simulated data set. What a change does not
touch stays as it was: the noise of a pixel and of a LiDAR beam does not depend on what they see.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdlab.data.nuscenes import find_version, pose_matrices
from kdlab.data.simulate import images_at, jpeg
from kdlab.data.simulate_changes import Changes
from kdlab.data.simulate_config import (
    LIDAR,
    Array,
    Array32,
    SimulationConfig,
    camera_offsets,
    real_rig,
    rng_of,
    written_rig,
)
from kdlab.data.simulate_record import read_record
from kdlab.data.simulate_sensors import (
    BeamNoise,
    Caster,
    DrawnNoise,
    lidar_echoes,
    measured,
    points_in_boxes,
    rolling_sweep,
    visible_shares,
)
from kdlab.data.simulate_tables import SceneTables, microseconds, quaternion_of, scene_name
from kdlab.data.simulate_world import KEYFRAME_STEP, Agent, SceneState, accepted_plan, state_of
from kdlab.sample import ATTRIBUTES, CAMERAS, CLASSES, Boxes3D, Sample

T = TypeVar("T")

_NEAR = 1.0  # As `read_points` drops returns from the ego vehicle.
_KEPT = 4  # Clouds and sets of images that are kept for coming back to them.


class LiveWorld:
    """One keyframe of a simulated world; threads may share it.

    Args:
        config: the world's settings.
        scene: index of the scene, from 0.
        keyframe: index of the keyframe in the scene, from 0.
        sweeps: LiDAR sweeps in the cloud, as of `NuScenesDataset`.
        frames: key frame and frames - 1 past ones, likewise.
        threads: for ray casting and rendering.

    Attributes:
        agents: what may be changed: (agent, class, box as one row of `Boxes3D` in the key ego frame), in the order of
            agents.

    Raises:
        ValueError: settings that cannot work, no such scene or keyframe, sweeps or frames below 1.
    """

    def __init__(
        self, config: SimulationConfig, scene: int, keyframe: int, *, sweeps: int, frames: int = 1, threads: int = 2
    ) -> None:
        config.check()
        for name, value, count in (("scene", scene, config.scenes), ("keyframe", keyframe, config.keyframes)):
            if not 0 <= value < count:
                raise ValueError(f"LiveWorld: {name} {value} is not there; this world has {name}s 0 to {count - 1}")
        if sweeps < 1 or frames < 1:
            raise ValueError(f"LiveWorld: sweeps and frames must be at least 1, got {sweeps} and {frames}")
        self.config, self.scene, self.keyframe = config, scene, keyframe
        self.sweeps, self.frames, self.threads = sweeps, frames, threads
        self._plan = accepted_plan(config, scene)
        self._rig, self._written = real_rig(config), written_rig(config, scene)
        self._states: dict[float, SceneState] = {}
        self._noise: dict[Hashable, BeamNoise] = {}
        self._casters: dict[float, Caster] = {}
        self._arranged: Hashable = None
        self._kept: dict[str, OrderedDict[Hashable, object]] = {}
        self._lock = threading.Lock()  # what is kept belongs to one arrangement at a time
        self._there: dict[int, Agent] = {}
        self._there = {a.index: a for a in self._annotated(keyframe, Changes())}
        rows = self.boxes()
        self.agents = [(index, a.name, rows[i : i + 1]) for i, (index, a) in enumerate(self._there.items())]

    @classmethod
    def of_data(cls, root: Path | str, token: str, *, sweeps: int, frames: int = 1, threads: int = 2) -> LiveWorld:
        """The world of a simulated data set.

        Args:
            root: folder of the data set.
            token: of the sample.
            sweeps: as of `LiveWorld`.
            frames: as of `LiveWorld`.
            threads: as of `LiveWorld`.

        Raises:
            FileNotFoundError: no data set at the root.
            ValueError: it is not a simulated one, of another version of the simulator, or holds no such sample.
        """
        record = read_record(Path(root) / find_version(Path(root), None))
        if record is None:
            raise ValueError(f"{root} is no simulated data set: only a simulated world can be changed")
        names = {f.name for f in fields(SimulationConfig)}
        config = SimulationConfig(**{name: value for name, value in record.config.items() if name in names})
        if record.digest != config.digest():
            raise ValueError(f"{root} is of another version of the simulator; simulate it anew to change its world")
        for scene in range(config.scenes):
            tables = SceneTables(config, scene)
            for keyframe in range(config.keyframes):
                if tables.sample_token(keyframe) == token:
                    return cls(config, scene, keyframe, sweeps=sweeps, frames=frames, threads=threads)
        raise ValueError(f"the world of {root} has no sample {token!r}")

    def sample(self, changes: Changes | None = None) -> Sample:
        """The keyframe with the changes; what they do not touch is not made again.

        Raises:
            ValueError: an agent or a camera that is not there, or a value out of range.
        """
        changes = changes or Changes()
        changes.check(self._there)
        with self._lock:
            return self._sample(changes)

    def _sample(self, changes: Changes) -> Sample:
        if changes.arrangement != self._arranged:
            self._casters, self._arranged = {}, changes.arrangement
        keyframes = [max(self.keyframe - t, 0) for t in range(self.frames)]
        times = [self._lidar_time(k) for k in keyframes]
        stamps = np.array([microseconds(self.scene, time) for time in times])
        global_from_frame = np.stack([_as_written(self._base(time).ego_pose) for time in times])
        frame_from_global = np.linalg.inv(global_from_frame)
        key_from_frame = frame_from_global[0] @ global_from_frame
        key_from_frame[0] = np.eye(4)
        images = self._once("images", changes.light, lambda: self._images(keyframes, changes))
        points, boxes = self._once("points", changes.cloud, lambda: self._points_and_boxes(changes))
        rig = changes.written(self._written)
        cameras = np.stack([_as_written(rig[c].ego_from_sensor) for c in CAMERAS])
        matrices = np.stack([np.round(cast(Array, rig[c].intrinsic), 9) for c in CAMERAS])
        global_from_ego = np.stack(
            [[_as_written(self._base(t).ego_pose) for t in self._camera_times(k)] for k in keyframes]
        )
        return Sample(
            token=SceneTables(self.config, self.scene).sample_token(self.keyframe),
            scene=scene_name(self.scene),
            timestamp=float(stamps[0]) * 1e-6,
            images=images.clone(),
            image_from_camera=_float32(np.broadcast_to(matrices, (self.frames, *matrices.shape))),
            frame_from_camera=_float32(frame_from_global[:, None] @ global_from_ego @ cameras),
            key_from_frame=_float32(key_from_frame),
            frame_times=_float32((stamps[0] - stamps) * 1e-6),
            points=points.clone(),
            boxes=boxes[:],
            global_from_key=torch.from_numpy(global_from_frame[0].copy()),
            bev_augmentation=torch.eye(4),
            lidar_origin=_float32(_as_written(rig[LIDAR].ego_from_sensor)[:3, 3]),
        )

    def boxes(self, changes: Changes | None = None) -> Boxes3D:
        """Boxes of all agents, in the order of ``agents``, where the changes put them, removed ones too.

        Raises:
            ValueError: as of `sample`.
        """
        changes = changes or Changes()
        changes.check(self._there)
        changes = replace(changes, removed=frozenset())
        key = self._base(self._lidar_time(self.keyframe))
        placed = [changes.placed(agent, self._there, key) for agent in self._there.values()]
        return self._boxes(placed, np.ones(len(placed), np.int64), {}, changes)

    def box_of(self, agent: int, changes: Changes | None = None) -> Boxes3D:
        """The box of one agent, one row of `boxes`.

        Raises:
            ValueError: as of `sample`, or no such agent.
        """
        Changes(removed=frozenset({agent})).check(self._there)
        row = list(self._there).index(agent)
        return self.boxes(changes)[row : row + 1]

    def _once(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """What was made for the key, or is made now."""
        kept = self._kept.setdefault(kind, OrderedDict())
        if key not in kept:
            kept[key] = make()
            while len(kept) > _KEPT:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return cast(T, kept[key])

    # States ---------------------------------------------------------------------------------------------------------

    def _base(self, time: float) -> SceneState:
        """The unchanged scene at a time."""
        if time not in self._states:
            self._states[time] = state_of(self._plan, self.config, time)
        return self._states[time]

    def _state(self, time: float, changes: Changes) -> SceneState:
        """The changed scene at a time."""
        state = self._base(time)
        key = self._base(self._lidar_time(self.keyframe))
        agents = tuple(changes.placed(a, self._there, key) for a in state.agents if a.index not in changes.removed)
        fog = state.fog if changes.fog is None else changes.fog
        night = state.night if changes.night is None else changes.night
        return replace(state, agents=agents, fog=fog, night=night)

    def _annotated(self, keyframe: int, changes: Changes) -> list[Agent]:
        """Agents that a keyframe's tables list."""
        state = self._state(keyframe * KEYFRAME_STEP, changes)
        x, y = state.ego_pose[:2, 3]
        return [a for a in state.agents if np.hypot(a.x - x, a.y - y) < self.config.annotation_range]

    def _lidar_time(self, keyframe: int) -> float:
        return keyframe * KEYFRAME_STEP + self.config.lidar_time_offset

    def _camera_times(self, keyframe: int) -> list[float]:
        offsets = camera_offsets(self.config, self.scene)
        return [keyframe * KEYFRAME_STEP + offsets[c] for c in CAMERAS]

    # Sensors --------------------------------------------------------------------------------------------------------

    def _caster(self, time: float, changes: Changes) -> Caster:
        """The triangles at a time, kept while all objects stay where they are."""
        if time not in self._casters:
            self._casters[time] = Caster(self._state(time, changes), self.threads)
        return self._casters[time]

    def _images(self, keyframes: list[int], changes: Changes) -> Tensor:
        """Images [T, N, 3, H, W] as they are read from the files of the data set."""
        import cv2

        made: dict[int, list[NDArray[np.uint8]]] = {}
        for k in dict.fromkeys(keyframes):
            caster = self._caster(k * KEYFRAME_STEP, changes)
            shots = images_at(partial(self._state, changes=changes), self.config, self.scene, k, caster, self.threads)
            files = [np.frombuffer(jpeg(shot), np.uint8) for _, _, _, shot in shots]
            made[k] = [np.asarray(cv2.imdecode(f, cv2.IMREAD_COLOR), np.uint8)[..., ::-1] for f in files]
        return torch.from_numpy(np.stack([np.stack(made[k]) for k in keyframes])).permute(0, 1, 4, 2, 3)

    def _points_and_boxes(self, changes: Changes) -> tuple[Tensor, Boxes3D]:
        """The cloud [P, 5] of all sweeps, and the boxes that hold a point of the key sweep."""
        time, per = self._lidar_time(self.keyframe), self.config.sweeps_per_keyframe
        key_from_global = np.linalg.inv(_as_written(self._base(time).ego_pose))
        ego_from_sensor = _as_written(self._written[LIDAR].ego_from_sensor)
        last = self.keyframe * per
        clouds = []
        for n in range(last, max(last - self.sweeps, -1), -1):
            moment = n // per * KEYFRAME_STEP + n % per * KEYFRAME_STEP / per + self.config.lidar_time_offset
            points = self._sweep(moment, changes)
            if n == last:
                counts = self._counts(points, self._base(moment).ego_pose, changes)
            points = points[(np.abs(points[:, :2]) >= _NEAR).any(1)]
            moved = (key_from_global @ _as_written(self._base(moment).ego_pose) @ ego_from_sensor).astype(np.float32)
            points[:, :3] = (moved[:3, :3] @ points[:, :3].T + moved[:3, 3:]).T
            points[:, 3] /= 255
            points[:, 4] = (microseconds(self.scene, time) - microseconds(self.scene, moment)) * 1e-6
            clouds.append(points)
        agents = self._annotated(self.keyframe, changes)
        shares = self._once("shares", changes.arrangement, lambda: self._shares(changes))
        boxes = self._boxes(agents, counts, shares, changes)
        return torch.from_numpy(np.concatenate(clouds)), boxes[boxes.points > 0]

    def _sweep(self, time: float, changes: Changes) -> Array32:
        """One sweep [P, 5] as the data set holds it."""
        dropout = self.config.lidar_dropout if changes.dropout is None else changes.dropout
        plain = replace(self.config, lidar_beams=changes.beams or self.config.lidar_beams)
        config = replace(plain, lidar_dropout=dropout)
        if config.lidar_rolling:
            rng = rng_of(config.seed, self.scene, LIDAR, round(time * 1e6))
            return rolling_sweep(partial(self._state, changes=changes), time, self._rig, config, rng)[0]
        echoes = lidar_echoes(self._state(time, changes), self._rig, config, self._caster(time, changes))
        return measured(echoes, config, self._noise_of(time, plain, changes))[0]

    def _noise_of(self, time: float, config: SimulationConfig, changes: Changes) -> BeamNoise:
        """The noise of a sweep's beams: what the unchanged world's sweep drew, drawn once."""
        key = time, config.lidar_beams
        if key not in self._noise:
            base, unmoved = self._base(time), changes.arrangement == Changes().arrangement
            caster = self._caster(time, changes) if unmoved else Caster(base, self.threads)
            echoes = lidar_echoes(base, self._rig, config, caster)
            count = config.lidar_beams * config.lidar_azimuth_steps
            names = config.seed, self.scene, LIDAR, round(time * 1e6)
            self._noise[key] = noise = BeamNoise(DrawnNoise(rng_of(*names)), rng_of(*names, "spare"), count)
            measured(echoes, config, noise)
        return self._noise[key]

    def _counts(self, points: Array32, ego_pose: Array, changes: Changes) -> NDArray[np.int64]:
        """How many points of a sweep lie in each annotated box."""
        pose = ego_pose @ self._rig[LIDAR].ego_from_sensor
        world = points[:, :3].astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]
        return points_in_boxes(world, self._annotated(self.keyframe, changes)).astype(np.int64)

    def _shares(self, changes: Changes) -> dict[int, float]:
        time = self.keyframe * KEYFRAME_STEP
        return visible_shares(self._state(time, changes), self._rig, self.config, self._caster(time, changes))

    # Boxes ----------------------------------------------------------------------------------------------------------

    def _boxes(
        self, agents: list[Agent], counts: NDArray[np.int64], shares: dict[int, float], changes: Changes
    ) -> Boxes3D:
        """Boxes in the key ego frame as they are read from the tables."""
        key_from_global = np.linalg.inv(_as_written(self._base(self._lidar_time(self.keyframe)).ego_pose))
        half = np.array([a.yaw for a in agents]) / 2
        centre = np.array([(a.x, a.y, a.z) for a in agents]).reshape(-1, 3)
        zero = np.zeros_like(half)
        poses = pose_matrices(np.round(np.column_stack((np.cos(half), zero, zero, np.sin(half), centre)), 9))
        key_from_box = key_from_global @ poses
        yaw = np.arctan2(key_from_box[:, 1, 0], key_from_box[:, 0, 0])
        size = np.round(np.array([a.size for a in agents]).reshape(-1, 3), 9)
        velocity = self._velocities(agents, changes) @ key_from_global[:3, :3].T
        share = np.array([shares.get(a.index, 0.0) for a in agents])
        return Boxes3D(
            values=_float32(np.column_stack((key_from_box[:, :3, 3], size, yaw, velocity[:, :2]))),
            labels=torch.tensor([CLASSES.index(a.name) for a in agents], dtype=torch.long),
            valid=torch.ones(len(agents), dtype=torch.bool),
            points=torch.from_numpy(counts),
            visibility=torch.from_numpy(1 + np.digitize(share, (0.4, 0.6, 0.8))),
            attributes=torch.tensor(
                [ATTRIBUTES.index(a.attribute) if a.attribute else -1 for a in agents], dtype=torch.long
            ),
        )

    def _velocities(self, agents: list[Agent], changes: Changes) -> Array:
        """Velocities [M, 3] in the world by nuScenes' rule: from the annotations before and after."""
        listed = [{a.index: (a.x, a.y, a.z) for a in self._annotated(k, changes)} for k in range(self.config.keyframes)]
        velocities = np.full((len(agents), 3), np.nan)
        for row, agent in enumerate(agents):
            frames = [k for k, places in enumerate(listed) if agent.index in places]
            before = max((k for k in frames if k < self.keyframe), default=self.keyframe)
            after = min((k for k in frames if k > self.keyframe), default=self.keyframe)
            elapsed = (after - before) * KEYFRAME_STEP
            if 0 < elapsed <= (3.0 if before < self.keyframe < after else 1.5):
                places = [np.round(listed[k].get(agent.index, (agent.x, agent.y, agent.z)), 9) for k in (before, after)]
                velocities[row] = (places[1] - places[0]) / elapsed
        return velocities


def _as_written(pose: Array) -> Array:
    """A pose [4, 4] after it was written to a table and read back."""
    return pose_matrices(np.array(quaternion_of(pose[:3, :3]) + [round(float(v), 9) for v in pose[:3, 3]]))


def _float32(values: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
