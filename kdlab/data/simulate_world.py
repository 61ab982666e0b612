"""The simulated world at any moment: plan a scene once, then ask for its state."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from kdlab.data.simulate_config import Array, SimulationConfig, rng_of, yaw_pose
from kdlab.data.simulate_layout import Layout, make_layout
from kdlab.data.simulate_shapes import CATEGORIES, GAIT_STEPS, Size
from kdlab.data.simulate_traffic import MARGIN, STEP, Planner, Track

KEYFRAME_STEP = 0.5
"""Seconds from keyframe to keyframe."""


@dataclass(frozen=True)
class Agent:
    """One annotated object at one moment, in the scene's world frame.

    Attributes:
        index: Its number in the scene; constant over time, and the value in instance maps.
        name: nuScenes detection class. category: nuScenes category.
        style: Variant of its shape. size: length, width, height in metres.
        x, y, z: Box centre in metres. yaw: heading in radians.
        vx, vy: Velocity in m/s.
        attribute: nuScenes attribute, "" for none.
        seed: Seed of its looks. gait: pose of a walker's stride.
    """

    index: int
    name: str
    category: str
    style: str
    size: Size
    x: float
    y: float
    z: float
    yaw: float
    vx: float
    vy: float
    attribute: str
    seed: int
    gait: int = 0

    @property
    def pose(self) -> Array:
        """Pose [4, 4] of the box in the world."""
        return yaw_pose(self.x, self.y, self.z, self.yaw)


@dataclass(frozen=True)
class SceneState:
    """A scene at one moment; replace fields to change it, then render again.

    Attributes:
        layout: What never moves.
        time: Seconds since the scene's first keyframe.
        ego_pose: Pose [4, 4] of the ego frame in the world. ego_velocity: x, y in m/s, world frame.
        agents: Everyone present.
        red: For each junction of the layout, whether the road has a red light.
        night, fog: As in SimulationConfig.
    """

    layout: Layout = field(repr=False)
    time: float
    ego_pose: Array
    ego_velocity: tuple[float, float]
    agents: tuple[Agent, ...]
    red: tuple[bool, ...]
    night: float
    fog: float


@dataclass(frozen=True)
class ScenePlan:
    """A scene's layout and everyone's motion; ego [T, 3] is x, y, yaw every STEP seconds from -MARGIN on."""

    layout: Layout = field(repr=False)
    tracks: tuple[Track, ...] = field(repr=False)
    ego: Array = field(repr=False)


def plan_scene(config: SimulationConfig, scene_index: int, attempt: int) -> ScenePlan:
    """Plan one scene; the attempt number gives another scene of the same index."""
    duration = (config.keyframes - 1) * KEYFRAME_STEP
    layout = make_layout(config, scene_index, attempt, travel=9.0 * config.speed * duration + 10)
    planner = Planner(layout, config, duration, rng_of(config.seed, scene_index, "traffic", attempt))
    planner.plan()
    return ScenePlan(layout, tuple(planner.tracks), planner.ego)


def _between(values: Array, time: float) -> tuple[Array, Array]:
    """Value and rate of change of samples [T, ...] at a time."""
    place = float(np.clip((time + MARGIN) / STEP, 0, len(values) - 1.001))
    i = int(place)
    rate = (values[i + 1] - values[i]) / STEP
    return values[i] + rate * (place - i) * STEP, rate


def _attribute(track: Track, speed: float) -> str:
    if track.name in ("barrier", "traffic_cone"):
        return ""
    if track.name in ("bicycle", "motorcycle"):
        return "cycle.with_rider" if track.style == "rider" else "cycle.without_rider"
    if track.name == "pedestrian":
        return "pedestrian.moving" if speed > 0.2 else "pedestrian.standing"
    return "vehicle.parked" if track.parked else ("vehicle.moving" if speed > 0.4 else "vehicle.stopped")


def state_of(plan: ScenePlan, config: SimulationConfig, time: float) -> SceneState:
    """A plan's state at a time in seconds."""
    agents: list[Agent] = []
    for index, track in enumerate(plan.tracks):
        xyz, rate = _between(track.xyz, time)
        if np.isnan(xyz).any():
            continue
        yaw, _ = _between(track.yaw, time)
        speed = float(np.hypot(rate[0], rate[1]))
        if track.parked:
            rate, speed = np.zeros(3), 0.0
        stride = int(time * 1.9 * GAIT_STEPS / 2 + track.seed) % GAIT_STEPS if speed > 0.2 else 0
        agents.append(
            Agent(
                index,
                track.name,
                CATEGORIES[track.name],
                track.style,
                track.size,
                float(xyz[0]),
                float(xyz[1]),
                float(xyz[2]),
                float(yaw),
                float(rate[0]),
                float(rate[1]),
                _attribute(track, speed),
                track.seed,
                stride,
            )
        )
    ego, velocity = _between(plan.ego, time)
    red = tuple(c.red[0] <= time < c.red[1] for c in plan.layout.crosses)
    pose = yaw_pose(float(ego[0]), float(ego[1]), 0.0, float(ego[2]))
    return SceneState(
        plan.layout, time, pose, (float(velocity[0]), float(velocity[1])), tuple(agents), red, config.night, config.fog
    )


def _near(state: SceneState, name: str, within: float = 28.0) -> bool:
    ego = state.ego_pose[:2, 3]
    return any(a.name == name and np.hypot(a.x - ego[0], a.y - ego[1]) < within for a in state.agents)


@lru_cache(maxsize=2)
def accepted_plan(config: SimulationConfig, scene_index: int) -> ScenePlan:
    """The first plan in which every class can be seen near the ego vehicle by a plain 32-beam LiDAR."""
    from kdlab.data.simulate_sensors import seen_classes

    best: tuple[int, ScenePlan] | None = None
    times = np.linspace(0, (config.keyframes - 1) * KEYFRAME_STEP, min(config.keyframes, 5))
    enough = min(2, len(times))
    for attempt in range(60):
        plan = plan_scene(config, scene_index, attempt)
        states = [state_of(plan, config, float(time)) for time in times]
        counts = dict.fromkeys(CATEGORIES, 0)
        if all(sum(_near(state, name) for state in states) >= enough for name in CATEGORIES):  # Else spare the rays.
            for state in states:
                for name in seen_classes(state):
                    counts[name] += 1
        worst = min(counts.values())
        if worst >= enough:
            return plan
        if best is None or worst > best[0]:
            best = (worst, plan)
    if best is None or best[0] < 1:
        raise ValueError(
            f"no scene with all ten classes in sight came out for scene {scene_index}: "
            "raise traffic or occlusion, lower distance or speed, or change the seed"
        )
    return best[1]


def scene_at(config: SimulationConfig, scene_index: int, time: float) -> SceneState:
    """The state of a scene at a time.

    Args:
        config: The simulation's settings.
        scene_index: 0 to config.scenes - 1.
        time: Seconds since the first keyframe; keyframe k is at k * 0.5.
    """
    return state_of(accepted_plan(config, scene_index), config, time)
