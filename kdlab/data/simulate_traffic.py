"""Who is in a scene and how everyone moves: lane following, traffic lights, parked rows, work zones, pedestrians."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdlab.data.simulate_config import Array, SimulationConfig
from kdlab.data.simulate_ground import open_spans
from kdlab.data.simulate_layout import KERB, PAVEMENT, SIDE_STREET, Cross, Layout, Path
from kdlab.data.simulate_shapes import Size, agent_size
from kdlab.data.simulate_vehicles import car_style

STEP = 0.1
"""Time step of the motion in seconds."""
MARGIN = 1.0
"""Motion is known this long before the first and after the last keyframe, in seconds."""
EGO_SIZE: Size = (4.1, 1.75, 1.56)
EGO_AXLE = 3.3
"""From the ego vehicle's front bumper back to its rear axle, the origin of its frame, in metres."""


@dataclass(frozen=True)
class Track:
    """One agent's motion over a scene.

    Attributes:
        name: nuScenes detection class.
        style: Variant of its shape; "rider", "walk" and "stand" have a meaning.
        size: Length, width, height in metres.
        seed: Seed of its looks.
        xyz: Box centre [T, 3] every STEP seconds from -MARGIN on; NaN where the agent is not there.
        yaw: Heading [T], unwrapped.
        parked: Never moves and is not about to.
        rank: In a collision the one of higher rank is taken out.
        unit: Agents of one unit (a towing truck and its trailer) are taken out together.
    """

    name: str
    style: str
    size: Size
    seed: int
    xyz: Array = field(repr=False)
    yaw: Array = field(repr=False)
    parked: bool
    rank: int
    unit: int


@dataclass
class _Unit:
    """A vehicle, or a train of them, in a lane; s is its front bumper's place."""

    parts: list[tuple[str, str, Size]]
    s: float
    speed: float
    wish: float
    length: float
    ego: bool = False


class Planner:
    """Fills a layout with tracks; one random generator, used in a fixed order."""

    def __init__(self, layout: Layout, config: SimulationConfig, duration: float, rng: np.random.Generator) -> None:
        self.layout, self.config, self.rng = layout, config, rng
        self.times: Array = np.arange(-MARGIN, duration + MARGIN + STEP / 2, STEP)
        self.tracks: list[Track] = []
        self.ego = np.zeros((len(self.times), 3))
        self._units = 0

    def plan(self) -> None:
        """Make all tracks and the ego vehicle's poses [T, 3] (x, y, yaw at the rear axle)."""
        self._parked_rows()
        ego_lane = int(self.rng.integers(self.layout.lanes))
        for direction in (1, -1):
            for lane in range(self.layout.lanes):
                self._lane(direction, lane, direction == 1 and lane == ego_lane)
            self._bike_lane(direction)
        for cross in self.layout.crosses:
            for direction in (1, -1):
                self._cross_lane(cross, direction)
        self._people()
        self.tracks = without_collisions(self.tracks, self.ego)

    def _add(
        self, name: str, style: str, size: Size, xyz: Array, yaw: Array, parked: bool, rank: int, unit: int
    ) -> None:
        seed = int(self.rng.integers(2**31))
        self.tracks.append(Track(name, style, size, seed, xyz, np.unwrap(yaw), parked, rank, unit))

    def _next_unit(self) -> int:
        self._units += 1
        return self._units

    # Parked rows -------------------------------------------------------------------------------------------------

    def _parked_rows(self) -> None:
        deck = [
            "work",
            "moto",
            "car",
            "car",
            "truck",
            "bikes",
            "bus",
            "car",
            "trailer",
            "moto",
            "car",
            "gap",
            "bikes",
            "car",
        ]
        start = int(self.rng.integers(len(deck)))
        for side in (-1, 1):
            card = start if side < 0 else start + len(deck) // 2
            for a, b in open_spans(self.layout, 9.0, side):
                s, skipped = max(a, 4.0), 0
                while s < min(b, self.layout.path.length - 4) - 4 and skipped < len(deck):
                    length = self._park(deck[card % len(deck)], s, side, min(b, self.layout.path.length - 4) - s)
                    card += 1
                    skipped = 0 if length else skipped + 1
                    s += length + (self.rng.uniform(0.3, 1.6) * self.config.distance if length else 0)

    def _park(self, kind: str, s: float, side: int, room: float) -> float:
        """Park one card of the deck at s; returns the length used, 0 where it does not fit."""
        rng, d = self.rng, self.layout.parking
        need = {"work": 18.5, "bus": 13.5, "trailer": 12.0, "truck": 9.0, "moto": 3.4, "bikes": 3.2}.get(kind, 6.0)
        if need > room:
            return 0.0
        if kind == "work":
            return self._work_zone(s, side)
        if kind in ("moto", "bikes"):
            name = "motorcycle" if kind == "moto" else "bicycle"
            for k in range(2):
                lean = side * rng.uniform(0.9, 1.2)
                self._stand(name, "", s + 0.9 + 1.25 * k, side, d + 0.35, lean + (np.pi if rng.random() < 0.5 else 0.0))
            return need
        if kind == "gap" or (kind == "car" and rng.random() > 0.85 * self.config.occlusion):
            return float(rng.uniform(3, 6))
        style = {"car": car_style(rng), "truck": str(rng.choice(["box", "flat"])),
                 "trailer": str(rng.choice(["box", "container"])), "bus": ""}[kind]  # fmt: skip
        size = agent_size(kind, style, rng)
        self._stand(kind, style, s + size[0] / 2, side, d + rng.uniform(-0.08, 0.12), rng.normal(0, 0.01), size)
        if kind == "bus":
            for k in range(int(rng.integers(1, 4))):  # People wait at the stop.
                self._stand(
                    "pedestrian",
                    "stand",
                    s + 9 + 0.9 * k,
                    side,
                    self.layout.half_width + rng.uniform(1.2, 2),
                    rng.uniform(-3, 3),
                )
        return size[0] + 0.4

    def _stand(
        self, name: str, style: str, s: float, side: int, d: float, turn: float, size: Size | None = None
    ) -> None:
        """Put something that stays where it is, side * d off the middle; turn is relative to the traffic there."""
        size = size or agent_size(name, style, self.rng)
        x, y, yaw = self.layout.path.at(s, side * d)
        z = (KERB if d > self.layout.half_width and not self.layout.near_cross(s, 0, side) else 0.0) + size[2] / 2
        n = len(self.times)
        heading = float(yaw) + (np.pi if side > 0 else 0.0) + turn
        rank = {"pedestrian": 5, "car": 3}.get(name, 1)
        xyz = np.tile(np.array([float(x), float(y), z]), (n, 1))
        self._add(name, style, size, xyz, np.full(n, heading), name != "pedestrian", rank, self._next_unit())

    def _work_zone(self, s: float, side: int) -> float:
        rng, d = self.rng, self.layout.parking
        style = str(rng.choice(["concrete", "plastic", "board"]))
        self._stand("barrier", style, s + 0.6, side, d - 0.05, rng.normal(0, 0.03))
        self._stand("barrier", style, s + 1.9, side, d + 0.05, rng.normal(0, 0.03))
        self._stand("barrier", style, s + 16.9, side, d, rng.normal(0, 0.03))
        for k in range(6):
            self._stand("traffic_cone", "", s + 3.2 + 2.5 * k, side, d - 1.95 + rng.normal(0, 0.03), rng.uniform(-3, 3))
        for k in range(2):
            self._stand("traffic_cone", "", s + 3.6 + 0.4 * k, side, d - 0.9 + 1.4 * k, rng.uniform(-3, 3))
        kind = str(rng.choice(["excavator", "loader"]))
        turn = np.pi if rng.random() < 0.4 else 0.0
        self._stand("construction_vehicle", kind, s + 9.6, side, d + 0.05, turn + rng.normal(0, 0.015))
        self._stand("pedestrian", "stand", s + 14.6, side, d + rng.uniform(-0.4, 0.6), rng.uniform(-3, 3))
        return 17.8

    # Moving traffic ----------------------------------------------------------------------------------------------

    def _new_unit(self, s: float) -> _Unit:
        rng = self.rng
        kind = str(rng.choice(["car", "truck", "bus", "train", "motorcycle"], p=[0.52, 0.12, 0.12, 0.09, 0.15]))
        parts: list[tuple[str, str, Size]] = []
        if kind == "train":
            box = str(rng.choice(["box", "container"]))
            parts = [
                ("truck", "tractor", agent_size("truck", "tractor", rng)),
                ("trailer", box, agent_size("trailer", box, rng)),
            ]
        else:
            style = {"car": car_style(rng), "truck": str(rng.choice(["box", "flat"])), "motorcycle": "rider"}.get(
                kind, ""
            )
            parts = [(kind, style, agent_size(kind, style, rng))]
        wish = rng.uniform(6.5, 10.5) * self.config.speed
        return _Unit(parts, s, wish * 0.9, wish, sum(p[2][0] for p in parts) + 0.5 * (len(parts) - 1))

    def _lane(self, direction: int, lane: int, with_ego: bool) -> None:
        layout, rng = self.layout, self.rng
        units: list[_Unit] = []
        back = (self.times[-1] - self.times[0]) * 8 * self.config.speed if direction < 0 else 50.0
        ego_front = layout.start + EGO_AXLE
        s = layout.path.length - rng.uniform(0, 15)
        while s > -back:
            unit = self._new_unit(s)
            if with_ego and s - unit.length < ego_front + 9 and not any(u.ego for u in units):
                wish = rng.uniform(6.0, 8.5) * self.config.speed
                units.append(_Unit([("ego", "", EGO_SIZE)], ego_front, wish * 0.9, wish, EGO_SIZE[0], True))
                s = ego_front - EGO_SIZE[0] - rng.uniform(8, 18)
                continue
            units.append(unit)
            s -= unit.length + 6 + rng.uniform(2, 34) * self.config.distance / max(self.config.traffic, 0.05)
        d = -(lane + 0.5) * layout.lane_width
        self._drive(units, layout.path, direction, d, self._lines(direction), (3.0, layout.path.length - 3), 2)

    def _lines(self, direction: int) -> list[tuple[float, tuple[float, float]]]:
        """Stop lines of a direction (along its travel) with their red intervals."""
        length, gap = self.layout.path.length, self.layout.cross_half + 5.6
        return [((c.s if direction > 0 else length - c.s) - gap, c.red) for c in self.layout.crosses]

    def _bike_lane(self, direction: int) -> None:
        rng, units = self.rng, []
        s = self.layout.path.length - rng.uniform(0, 10)
        while s > -60:
            size = agent_size("bicycle", "rider", rng)
            wish = rng.uniform(3.5, 6.0) * min(self.config.speed, 1.3)
            units.append(_Unit([("bicycle", "rider", size)], s, wish, wish, size[0]))
            s -= rng.uniform(12, 42) / max(self.config.traffic, 0.05)
        layout = self.layout
        self._drive(
            units, layout.path, direction, -layout.bike, self._lines(direction), (3.0, layout.path.length - 3), 3
        )

    def _cross_lane(self, cross: Cross, direction: int) -> None:
        """Traffic of a cross street: it may go while the road has red, and only where it has somewhere to go."""
        layout, rng = self.layout, self.rng
        origin = -direction  # The arm it comes from.
        if origin not in cross.arms:
            return
        units, line = [], SIDE_STREET - layout.half_width - 5.4
        s = line - rng.uniform(0, 12)
        for _ in range(int(rng.poisson(1.6 * self.config.traffic))):
            unit = self._new_unit(s)
            unit.speed = 0.0 if s > line - 8 else 4.0 * self.config.speed
            units.append(unit)
            s -= unit.length + rng.uniform(2.5, 14)
        through = direction in cross.arms
        start, end = cross.red[0] + 2.0, cross.red[1] - 3.5
        closed = [(line, (-1e9, start)), (line, (end, 1e9))] if through and end > start else [(line, (-1e9, 1e9))]
        limits = (2.0, 2 * SIDE_STREET - 2.0) if through else (2.0, SIDE_STREET)
        self._drive(units, cross.path, direction, -layout.cross_half * 0.48, closed, limits, 4)

    def _drive(
        self, units: list[_Unit], path: Path, direction: int, d: float,
        lines: list[tuple[float, tuple[float, float]]], limits: tuple[float, float], rank: int,
    ) -> None:  # fmt: skip
        """Move a lane's units, front one first, by the intelligent driver model, and store their tracks."""
        fronts = np.zeros((len(self.times), len(units)))
        for i, t in enumerate(self.times):
            lead: tuple[float, float] | None = None
            for j, unit in enumerate(units):
                fronts[i, j] = unit.s
                blocks = [(line - unit.s, 0.0) for line, (a, b) in lines
                          if a <= t < b and line > unit.s and unit.speed**2 < 9.0 * (line - unit.s)]  # fmt: skip
                if lead is not None:
                    blocks.append((lead[0] - unit.s, lead[1]))
                tail = (unit.s - unit.length, unit.speed)
                unit.speed = max(0.0, unit.speed + _acceleration(unit.speed, unit.wish, blocks) * STEP)
                unit.s += unit.speed * STEP
                lead = tail
        for j, unit in enumerate(units):
            self._store(unit, fronts[:, j], path, direction, d, limits, rank)

    def _store(
        self, unit: _Unit, fronts: Array, path: Path, direction: int, d: float, limits: tuple[float, float], rank: int
    ) -> None:
        number, behind = self._next_unit(), 0.0
        for name, style, size in unit.parts:
            s = fronts - behind - (EGO_AXLE if unit.ego else size[0] / 2)
            behind += size[0] + 0.5
            x, y, yaw = path.at(s if direction > 0 else path.length - s, d * direction)
            yaw = yaw + (0.0 if direction > 0 else np.pi)
            if unit.ego:
                self.ego = np.stack([x, y, np.unwrap(yaw)], -1)
                continue
            xyz = np.stack([x, y, np.full(len(x), size[2] / 2)], -1)
            xyz[(s < limits[0] + size[0] / 2) | (s > limits[1] - size[0] / 2)] = np.nan
            if not np.isnan(xyz).all():
                self._add(name, style, size, xyz, yaw, False, rank, number)

    # People ------------------------------------------------------------------------------------------------------

    def _people(self) -> None:
        layout, rng = self.layout, self.rng
        for side in (-1, 1):
            s = rng.uniform(0, 10)
            while s < layout.path.length and self.config.traffic > 0:
                d = layout.half_width + rng.uniform(1.35, PAVEMENT - 0.35)
                if rng.random() < 0.22 and not layout.near_cross(float(s), 1.0, side):
                    self._stand("pedestrian", "stand", s, side, d, rng.uniform(-3, 3))
                else:
                    self._walk(layout.path, s, side * d, rng.choice([-1, 1]) * rng.uniform(0.9, 1.6), side)
                s += rng.uniform(3, 20) / self.config.traffic
        for cross in layout.crosses:
            for _ in range(int(rng.poisson(3.0 * self.config.traffic))):
                self._crosser(cross)

    def _walk(self, path: Path, s: float, d: float, speed: float, side: int) -> None:
        size = agent_size("pedestrian", "walk", self.rng)
        along = s + speed * self.times
        x, y, yaw = path.at(along, d)
        on_road = np.array([self.layout.near_cross(float(v), 0.2, side) for v in along])
        z = np.where(on_road, 0.0, KERB) + size[2] / 2
        xyz = np.stack([x, y, z], -1)
        xyz[(along < 2) | (along > path.length - 2)] = np.nan
        if not np.isnan(xyz).all():
            self._add("pedestrian", "walk", size, xyz, yaw + (0.0 if speed > 0 else np.pi), False, 5, self._next_unit())

    def _crosser(self, cross: Cross) -> None:
        """Someone who crosses the road at a zebra crossing while its traffic has red, waiting before and after."""
        layout, rng = self.layout, self.rng
        size, way = agent_size("pedestrian", "walk", rng), int(rng.choice([-1, 1]))
        speed, edge = rng.uniform(1.2, 1.8), layout.half_width + 0.8
        go = max(cross.red[0], -12.0) + rng.uniform(0.8, 5.0)
        if go + 2 * edge / speed > cross.red[1] + 1.0:
            go = 1e9  # Not enough time left: waits at the kerb.
        d = -way * edge + way * np.clip((self.times - go) * speed, 0, 2 * edge)
        s = cross.s + rng.choice([-1, 1]) * (layout.cross_half + rng.uniform(1.1, 3.3))
        x, y, yaw = layout.path.at(np.full(len(d), s), d)
        z = np.where(np.abs(d) > layout.half_width, KERB, 0.0) + size[2] / 2
        style = "walk" if go < self.times[-1] else "stand"
        self._add("pedestrian", style, size if style == "walk" else agent_size("pedestrian", "stand", rng),
                  np.stack([x, y, z], -1), yaw + way * np.pi / 2, False, 5, self._next_unit())  # fmt: skip


def _acceleration(speed: float, wish: float, blocks: list[tuple[float, float]]) -> float:
    """Intelligent driver model; blocks are (gap in metres, speed of what is there)."""
    strongest = 0.0
    for gap, other in blocks:
        safe = 2.0 + max(0.0, speed * 1.2 + speed * (speed - other) / (2 * np.sqrt(1.6 * 2.5)))
        strongest = max(strongest, (safe / max(gap, 0.3)) ** 2)
    return float(max(1.6 * (1 - (speed / max(wish, 0.1)) ** 4 - strongest), -7.0))


def corners_of(x: Array, y: Array, yaw: Array, length: float, width: float) -> Array:
    """Corners [..., 4, 2] of rectangles with centres x, y and headings [...]."""
    c, s = np.cos(yaw)[..., None], np.sin(yaw)[..., None]
    dx, dy = np.array([-1, 1, 1, -1]) * length / 2, np.array([-1, -1, 1, 1]) * width / 2
    return np.stack([x[..., None] + c * dx - s * dy, y[..., None] + s * dx + c * dy], -1)


def overlap(a: Array, b: Array) -> NDArray[np.bool_]:
    """Whether rectangles [..., 4, 2] overlap (separating axes), [...] bool."""
    apart = np.zeros(a.shape[:-2], dtype=bool)
    for box in (a, b):
        for k in (0, 1):
            axis = box[..., k + 1, :] - box[..., k, :]
            pa, pb = (a * axis[..., None, :]).sum(-1), (b * axis[..., None, :]).sum(-1)
            apart |= (pa.max(-1) < pb.min(-1)) | (pb.max(-1) < pa.min(-1))
    return np.asarray(~apart, dtype=np.bool_)


def without_collisions(tracks: list[Track], ego: Array, gap: float = 0.12) -> list[Track]:
    """Take out agents until no two of them, nor one and the ego vehicle, ever come closer than a gap in metres."""
    shift = EGO_AXLE - EGO_SIZE[0] / 2
    boxes = [corners_of(t.xyz[:, 0], t.xyz[:, 1], t.yaw, t.size[0] + gap, t.size[1] + gap) for t in tracks]
    own = corners_of(
        ego[:, 0] + shift * np.cos(ego[:, 2]),
        ego[:, 1] + shift * np.sin(ego[:, 2]),
        ego[:, 2],
        EGO_SIZE[0] + 1.0,
        EGO_SIZE[1] + 0.5,
    )
    boxes.append(own)
    ranks = [t.rank for t in tracks] + [0]
    centres = np.stack([b.mean(1) for b in boxes])
    reach = np.array([np.hypot(t.size[0], t.size[1]) / 2 for t in tracks] + [2.6]) + gap
    hit: list[tuple[int, int]] = []
    for i in range(len(boxes)):
        distance = np.linalg.norm(centres[i + 1 :] - centres[i], axis=-1)
        close = (distance < (reach[i] + reach[i + 1 :])[:, None]).any(1)
        hit += [(i, int(j) + i + 1) for j in np.flatnonzero(close) if overlap(boxes[i], boxes[int(j) + i + 1]).any()]
    gone: set[int] = set()
    units = [t.unit for t in tracks] + [-1]
    for i, j in sorted(hit, key=lambda pair: (max(ranks[pair[0]], ranks[pair[1]]), pair)):
        if units[i] == units[j] or units[i] in gone or units[j] in gone:
            continue
        gone.add(units[j] if ranks[j] >= ranks[i] and units[j] != -1 else units[i])
    return [t for t in tracks if t.unit not in gone]
