"""Ray casting: one triangle world for all sensors, the LiDAR, and what can be seen of each object."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdlab.data.quiet_open3d import open3d
from kdlab.data.simulate_config import LIDAR, Array, Array32, IntArray, Rig, SimulationConfig, real_rig
from kdlab.data.simulate_layout import WHITE, YELLOW
from kdlab.data.simulate_mesh import Material, Mesh, merged
from kdlab.data.simulate_shapes import agent_mesh
from kdlab.data.simulate_static import Static, signal_heads, static_of
from kdlab.data.simulate_world import Agent, SceneState

BEAM_LOW, BEAM_HIGH = -30.67, 10.67
_REACH = 110.0  # Agents farther from the ego vehicle than this are not built, in metres.
# Reflectivity per Material at the LiDAR's wavelength.
_REFLECTIVITY = np.array(
    [0.25, 0.45, 0.10, 0.05, 0.35, 0.9, 0.9, 0.28, 0.95, 0.14, 0.30, 0.35, 0.5, 0.18, 0.2, 0.2, 0.4], dtype=np.float32
)


@dataclass(frozen=True)
class Hits:
    """What rays met.

    Attributes:
        distance: Float [N], in lengths of the ray's direction; inf for nothing.
        face: Int [N], triangle; -1 for nothing.
    """

    distance: Array32
    face: IntArray


class Caster:
    """All triangles of a state, with what each belongs to.

    Attributes:
        mesh: Fixed world and agents in world coordinates.
        normal: Unit normals [F, 3]; their sign is arbitrary.
        agent: Index of the agent that a triangle belongs to, -1 for none.
        building: Index of its building, -1 for none.
    """

    def __init__(self, state: SceneState, threads: int = 1) -> None:
        o3d = open3d()
        self.state, self.threads = state, threads
        self.static: Static = static_of(state.layout)
        ego = state.ego_pose[:2, 3]
        near = [a for a in state.agents if np.hypot(a.x - ego[0], a.y - ego[1]) < _REACH]
        parts: list[tuple[Mesh, int]] = [(self.static.mesh, -1), *[(placed_mesh(a), a.index) for a in near]]
        heads = signal_heads(state.layout, state.red)
        if heads is not None:
            parts.append((heads, -1))
        self.mesh = merged([m for m, _ in parts])
        counts = [len(m.faces) for m, _ in parts]
        self.agent: IntArray = np.repeat(np.array([i for _, i in parts], dtype=np.int32), counts)
        self.building: IntArray = np.full(len(self.agent), -1, dtype=np.int32)
        self.building[: counts[0]] = self.static.building
        a, b, c = (self.mesh.vertices[self.mesh.faces[:, k]] for k in range(3))
        normal = np.cross(b - a, c - a)
        self.normal: Array32 = (normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)).astype(
            np.float32
        )
        self._tensor = o3d.core.Tensor
        self._scene: Any = o3d.t.geometry.RaycastingScene(nthreads=1)  # One thread builds the same tree every time.
        self._scene.add_triangles(self._tensor(self.mesh.vertices), self._tensor(self.mesh.faces.astype(np.uint32)))

    def cast(self, rays: Array32) -> Hits:
        """First hits of rays [N, 6] (origin, direction)."""
        result = self._scene.cast_rays(self._tensor(np.ascontiguousarray(rays)), nthreads=self.threads)
        distance = result["t_hit"].numpy()
        face = result["primitive_ids"].numpy().astype(np.int32)
        return Hits(distance, np.where(np.isfinite(distance), face, np.int32(-1)))

    def blocked(self, rays: Array32, far: float = np.inf) -> NDArray[np.bool_]:
        """Whether rays [N, 6] meet anything before `far` (in lengths of the direction)."""
        result = self._scene.test_occlusions(
            self._tensor(np.ascontiguousarray(rays)), tnear=0.0, tfar=float(far), nthreads=self.threads
        )
        return np.asarray(result.numpy(), dtype=np.bool_)


def placed_mesh(agent: Agent) -> Mesh:
    """An agent's mesh in the world."""
    return agent_mesh(agent.name, agent.style, agent.size, agent.seed, agent.gait).placed(agent.pose)


def lidar_directions(beams: int, steps: int) -> tuple[Array32, NDArray[np.int32]]:
    """Unit directions [steps * beams, 3] in the sensor frame, in firing order, and the ring of each (0 lowest)."""
    elevation = np.radians(np.linspace(BEAM_LOW, BEAM_HIGH, beams))
    # The sensor's y axis points ahead; the sweep turns clockwise and starts behind.
    azimuth = -np.pi / 2 - np.arange(steps) * 2 * np.pi / steps
    az, el = np.meshgrid(azimuth, elevation, indexing="ij")
    directions = np.stack([np.cos(el) * np.cos(az), np.cos(el) * np.sin(az), np.sin(el)], -1).reshape(-1, 3)
    return directions.astype(np.float32), np.tile(np.arange(beams, dtype=np.int32), steps)


@dataclass(frozen=True)
class Echoes:
    """What the beams of a sweep meet, before chance and noise; E beams of those fired.

    Attributes:
        beam: Int [E]: number of the beam in the firing order.
        direction: Float [E, 3]: unit direction in the sensor frame. ring: Int [E], 0 lowest.
        distance: Float [E] in metres. strength: Float [E]: share of the beam that comes back.
        agent: Int [E]: agent that was hit, -1 for none.
    """

    beam: NDArray[np.int64]
    direction: Array32
    ring: IntArray
    distance: Array32
    strength: Array32
    agent: IntArray

    def __getitem__(self, mask: NDArray[np.bool_]) -> Echoes:
        """The echoes that a mask [E] picks."""
        return Echoes(*(getattr(self, f.name)[mask] for f in fields(self)))


class Noise(Protocol):
    """Chance in a sweep, for beams by their numbers [E]: losses are asked for first, then errors of those kept."""

    def losses(self, beam: NDArray[np.int64]) -> Array:
        """Uniform numbers [E] in 0..1: an echo is lost where its number is small."""
        ...

    def errors(self, beam: NDArray[np.int64]) -> tuple[Array, Array]:
        """Normal numbers [E] of deviation 1 for the range and of 1.5 for the intensity."""
        ...


@dataclass(frozen=True)
class DrawnNoise:
    """Noise drawn echo by echo; the same generator state gives the same sweep."""

    rng: np.random.Generator

    def losses(self, beam: NDArray[np.int64]) -> Array:
        """See `Noise`."""
        return self.rng.random(len(beam))

    def errors(self, beam: NDArray[np.int64]) -> tuple[Array, Array]:
        """See `Noise`."""
        return self.rng.normal(0, 1, len(beam)), self.rng.normal(0, 1.5, len(beam))


class BeamNoise:
    """Noise that stays with each beam of a sweep, whatever the beam meets.

    Args:
        first: noise of the unchanged sweep, asked once; beams that brought no echo then have spare noise.
        spare: for them.
        count: number of beams.
    """

    def __init__(self, first: DrawnNoise, spare: np.random.Generator, count: int) -> None:
        self._first: DrawnNoise | None = first
        self._loss, self._range = spare.random(count), spare.normal(0, 1, count)
        self._intensity = spare.normal(0, 1.5, count)

    def losses(self, beam: NDArray[np.int64]) -> Array:
        """See `Noise`."""
        if self._first is not None:
            self._loss[beam] = self._first.losses(beam)
        return self._loss[beam]

    def errors(self, beam: NDArray[np.int64]) -> tuple[Array, Array]:
        """See `Noise`."""
        if self._first is not None:
            self._range[beam], self._intensity[beam] = self._first.errors(beam)
            self._first = None
        return self._range[beam], self._intensity[beam]


def render_lidar(
    state: SceneState,
    rig: Rig,
    config: SimulationConfig,
    rng: np.random.Generator,
    caster: Caster | None = None,
    part: slice | None = None,
) -> tuple[Array32, IntArray]:
    """One sweep of a state.

    Args:
        state: The world at the sweep's time.
        rig: True calibrations; only the LiDAR's is used.
        config: Beams, range, noise and drop-out.
        rng: Noise; the same generator state gives the same sweep.
        caster: The state's triangles, if the caller has them already.
        part: Firings of the revolution to cast, all by default.

    Returns:
        Points [P, 5] in the sensor frame (x, y, z in metres, intensity 0-255, ring), and the agent that each hit
        [P], -1 for none.
    """
    return measured(lidar_echoes(state, rig, config, caster or Caster(state), part), config, DrawnNoise(rng))


def lidar_echoes(
    state: SceneState, rig: Rig, config: SimulationConfig, caster: Caster, part: slice | None = None
) -> Echoes:
    """What the beams of one sweep meet within the LiDAR's range; arguments as in `render_lidar`."""
    direction, ring = lidar_directions(config.lidar_beams, config.lidar_azimuth_steps)
    beam = np.arange(len(direction))
    if part is not None:
        beam = beam.reshape(config.lidar_azimuth_steps, config.lidar_beams)[part].ravel()
        direction, ring = direction[beam], ring[beam]
    pose = (state.ego_pose @ rig[LIDAR].ego_from_sensor).astype(np.float32)
    rays = np.empty((len(direction), 6), dtype=np.float32)
    rays[:, :3], rays[:, 3:] = pose[:3, 3], direction @ pose[:3, :3].T
    hits = caster.cast(rays)
    found = np.flatnonzero((hits.face >= 0) & (hits.distance < config.lidar_range))
    face, distance = hits.face[found], hits.distance[found]
    strength = _strength(caster, rays[found], face, distance, state.fog)
    return Echoes(beam[found], direction[found], ring[found], distance, strength, caster.agent[face])


def measured(echoes: Echoes, config: SimulationConfig, noise: Noise) -> tuple[Array32, IntArray]:
    """The points that a sweep's echoes become; returns them as `render_lidar` does."""
    # A weak echo is lost more often; fog weakens by its two-way extinction.
    lost = config.lidar_dropout + (1 - config.lidar_dropout) * np.exp(-echoes.strength * 90)
    kept = echoes[(noise.losses(echoes.beam) > lost) & (echoes.strength > 0)]
    range_error, intensity_error = noise.errors(kept.beam)
    distance = kept.distance + range_error.astype(np.float32) * np.float32(config.lidar_range_noise)
    intensity = np.clip(np.sqrt(kept.strength) * 160 + intensity_error, 0, 255).astype(np.float32)
    points = np.column_stack([kept.direction * distance[:, None], np.round(intensity), kept.ring])
    return points.astype(np.float32), kept.agent


def _strength(caster: Caster, rays: Array32, face: IntArray, distance: Array32, fog: float) -> Array32:
    """Share of the beam that comes back, by material, angle of incidence, fog and distance."""
    material = caster.mesh.material[face]
    cosine = np.abs((rays[:, 3:] * caster.normal[face]).sum(1))
    base = _REFLECTIVITY[material] * (0.55 + 0.45 * caster.mesh.color[face].mean(1).clip(0, 0.9))
    ground = material == Material.GROUND
    point = rays[ground, :3] + rays[ground, 3:] * distance[ground, None]
    label = caster.state.layout.label(point[:, 0], point[:, 1])
    base[ground] = np.where((label == WHITE) | (label == YELLOW), 0.5, 0.12)
    retro = (material == Material.RETRO) | (material == Material.TAILLIGHT)
    shape = np.where(retro, 1.0, 0.15 + 0.85 * cosine)
    fade = np.exp(-2 * fog * 0.035 * distance) / (1 + (distance / 90) ** 2)
    return np.asarray(base * shape * fade, dtype=np.float32)


def rolling_sweep(
    state_at: Any, time: float, rig: Rig, config: SimulationConfig, rng: np.random.Generator, parts: int = 8
) -> tuple[Array32, IntArray]:
    """A sweep fired over the 50 ms before `time`, each part from the world and the pose of its own moment.

    Args:
        state_at: Function from a time to a SceneState.
        time: When the sweep ends, in seconds.
        rig: True calibrations.
        config: Beams, range, noise and drop-out.
        rng: Noise.
        parts: How many moments the sweep is cast at.
    """
    edges = np.linspace(0, config.lidar_azimuth_steps, parts + 1).astype(int)
    points, owners = [], []
    for k in range(parts):
        moment = time - 0.05 * (1 - (k + 1) / parts)
        p, o = render_lidar(state_at(moment), rig, config, rng, part=slice(edges[k], edges[k + 1]))
        points.append(p)
        owners.append(o)
    return np.concatenate(points), np.concatenate(owners)


def points_in_boxes(points: Array, agents: list[Agent] | tuple[Agent, ...]) -> IntArray:
    """How many world points [P, 3] lie in each agent's box, [N]."""
    counts = np.zeros(len(agents), dtype=np.int32)
    x, y = np.ascontiguousarray(points[:, 0]), np.ascontiguousarray(points[:, 1])
    for i, agent in enumerate(agents):
        reach = max(agent.size)
        index = np.flatnonzero(np.abs(x - agent.x) < reach)
        index = index[np.abs(y[index] - agent.y) < reach]
        near = points[index] - (agent.x, agent.y, agent.z)
        c, s = np.cos(agent.yaw), np.sin(agent.yaw)
        local = np.stack([near[:, 0] * c + near[:, 1] * s, near[:, 1] * c - near[:, 0] * s, near[:, 2]], -1)
        counts[i] = (np.abs(local) <= np.array(agent.size) / 2).all(1).sum()
    return counts


def seen_classes(state: SceneState, within: float = 28.0, least: int = 8) -> set[str]:
    """Classes with an agent near the ego vehicle that a plain 32-beam LiDAR hits at least `least` times."""
    plain = SimulationConfig(lidar_dropout=0.0)
    _, owners = render_lidar(state, real_rig(plain), plain, np.random.default_rng(0))
    number, count = np.unique(owners, return_counts=True)
    hits = dict(zip(number.tolist(), count.tolist(), strict=True))
    ego = state.ego_pose[:2, 3]
    return {
        a.name for a in state.agents if np.hypot(a.x - ego[0], a.y - ego[1]) < within and hits.get(a.index, 0) >= least
    }


def visible_shares(state: SceneState, rig: Rig, config: SimulationConfig, caster: Caster) -> dict[int, float]:
    """Share of each agent that the cameras see, by agent index.

    An approximation of visible pixels over the pixels it would cover alone: points on its surface that face a camera
    and project into its image, weighted by the image area they stand for, are tested for something in between.
    """
    total: dict[int, float] = {}
    seen: dict[int, float] = {}
    ego = state.ego_pose[:2, 3]
    agents = [a for a in state.agents if np.hypot(a.x - ego[0], a.y - ego[1]) < config.annotation_range]
    if not agents:
        return {}
    samples = [_surface_points(a) for a in agents]
    point, normal = np.concatenate([s[0] for s in samples]), np.concatenate([s[1] for s in samples])
    owner = np.repeat([a.index for a in agents], [len(s[0]) for s in samples])
    for sensor in rig.values():
        if sensor.intrinsic is None:
            continue
        pose = state.ego_pose @ sensor.ego_from_sensor
        local = (point - pose[:3, 3]) @ pose[:3, :3]
        pixel = local @ sensor.intrinsic.T
        depth = np.maximum(pixel[:, 2], 1e-6)
        inside = (local[:, 2] > 0.3) & (pixel[:, 0] > -0.5 * depth) & (pixel[:, 0] < (config.image_width - 0.5) * depth)
        inside &= (pixel[:, 1] > -0.5 * depth) & (pixel[:, 1] < (config.image_height - 0.5) * depth)
        view = pose[:3, 3] - point
        reach = np.linalg.norm(view, axis=1)
        area = (normal * view).sum(1) / reach**3
        index = np.flatnonzero(inside & (area > 0))
        rays = np.concatenate(
            [np.broadcast_to(pose[:3, 3], (len(index), 3)), -view[index] / reach[index, None]], 1
        ).astype(np.float32)
        hits = caster.cast(rays)
        clear = (hits.face >= 0) & (caster.agent[hits.face] == owner[index])
        for i, weight, ok in zip(owner[index].tolist(), area[index].tolist(), clear.tolist(), strict=True):
            total[i] = total.get(i, 0.0) + weight
            seen[i] = seen.get(i, 0.0) + weight * ok
    return {i: seen[i] / w for i, w in total.items() if w > 0}


def _surface_points(agent: Agent, count: int = 48) -> tuple[Array, Array]:
    """Points [count, 3] spread evenly over an agent's surface in the world, and normals away from its middle."""
    mesh = placed_mesh(agent)
    a, b, c = (mesh.vertices[mesh.faces[:, k]].astype(np.float64) for k in range(3))
    cross = np.cross(b - a, c - a)
    area = np.linalg.norm(cross, axis=1)
    place = (np.arange(count) + 0.5) / count
    face = np.searchsorted(np.cumsum(area) / area.sum(), place).clip(0, len(area) - 1)
    # A fixed pattern of barycentric weights keeps the samples deterministic.
    u, v = (np.arange(count) * 0.7549) % 1.0, (np.arange(count) * 0.5698) % 1.0
    flip = u + v > 1
    u, v = np.where(flip, 1 - u, u), np.where(flip, 1 - v, v)
    point = a[face] + u[:, None] * (b - a)[face] + v[:, None] * (c - a)[face]
    normal = cross[face] / np.maximum(area[face], 1e-12)[:, None]
    outward = ((point - (agent.x, agent.y, agent.z)) * normal).sum(1)
    return point, normal * np.where(outward >= 0, 1.0, -1.0)[:, None]
