"""The static street of a scene: a curved road with lanes, cross streets, pavements, buildings, trees and lamps.

Coordinates are metres in the scene's own world frame, x and y positive, so that the drawn ground doubles as the
nuScenes map mask. A place along the road is (s, d): arc length and offset to the left of the road's middle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdlab.data.simulate_config import Array, Array32, SimulationConfig, rng_of

KERB = 0.14
"""Height of pavements above the road, in metres."""
PAVEMENT = 3.6
"""Width of pavements, in metres."""
LEAD = 95.0
"""Road before the ego vehicle's start and after its end, in metres."""
SIDE_STREET = 75.0
"""Length of a cross street's arms, in metres."""

GRASS, ASPHALT, WHITE, YELLOW, PAVING, KERBSTONE, BIKELANE, PATCH, PARKING, GRAVEL, MANHOLE = range(11)


@dataclass(frozen=True)
class Path:
    """A curve sampled every metre.

    Attributes:
        xy: Points [N, 2].
        yaw: Headings [N], unwrapped.
    """

    xy: Array
    yaw: Array

    @property
    def length(self) -> float:
        """Arc length in metres."""
        return float(len(self.xy) - 1)

    def at(self, s: Array | float, d: Array | float = 0.0) -> tuple[Array, Array, Array]:
        """World x, y and heading at arc length s and left offset d (extrapolated straight beyond the ends)."""
        s = np.asarray(s, dtype=np.float64)
        grid = np.arange(len(self.xy), dtype=np.float64)
        inside = np.clip(s, 0, self.length)
        yaw = np.interp(inside, grid, self.yaw)
        over = s - inside
        x = np.interp(inside, grid, self.xy[:, 0]) + over * np.cos(yaw) - d * np.sin(yaw)
        y = np.interp(inside, grid, self.xy[:, 1]) + over * np.sin(yaw) + d * np.cos(yaw)
        return x, y, yaw

    def points(self, s: Array, d: Array | float) -> Array:
        """World points [N, 2]."""
        x, y, _ = self.at(s, d)
        return np.stack([x, y], -1)


@dataclass(frozen=True)
class Cross:
    """A street that crosses the road at a right angle.

    Attributes:
        s: Where, along the road.
        arms: Sides with an arm: 1 left, -1 right.
        path: The cross street from right to left; the road's middle lies at SIDE_STREET along it.
        red: Interval [start, end] in seconds in which the road's own traffic has a red light.
    """

    s: float
    arms: tuple[int, ...]
    path: Path
    red: tuple[float, float]


@dataclass(frozen=True)
class Building:
    """A block: middle x, y; yaw; size along the street, depth, height; seed of its looks; front faces local -y."""

    x: float
    y: float
    yaw: float
    size: tuple[float, float, float]
    seed: int


@dataclass(frozen=True)
class Prop:
    """A fixed thing at x, y, z, yaw: "tree", "bush", "lamp", "signal", "sign" or "bench"."""

    kind: str
    x: float
    y: float
    z: float
    yaw: float
    seed: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything of a scene that never moves.

    Attributes:
        path: Middle line of the road.
        lanes: Lanes per direction.
        lane_width: In metres.
        half_width: From the middle line to the kerb.
        bike: Offset of the bicycle lane's middle. parking: offset of the parking lane's middle.
        start: Arc length of the ego vehicle at time 0.
        cross_half: Half width of cross streets.
        ground: Labels [rows, columns] of the ground (GRASS ...), row = y, column = x.
        cell: Size of a ground cell in metres.
        sun: Unit vector to the sun. sky: 0 overcast to 1 clear.
        seed: Seed of the scene's looks.
    """

    path: Path
    lanes: int
    lane_width: float
    half_width: float
    bike: float
    parking: float
    start: float
    cross_half: float
    crosses: tuple[Cross, ...]
    buildings: tuple[Building, ...]
    props: tuple[Prop, ...]
    ground: NDArray[np.uint8] = field(repr=False)
    cell: float
    sun: tuple[float, float, float]
    sky: float
    seed: int

    def label(self, x: Array | Array32, y: Array | Array32) -> NDArray[np.uint8]:
        """Ground labels at world points; GRASS outside the drawn area."""
        rows, columns = self.ground.shape
        i, j = np.floor(y / self.cell).astype(np.int64), np.floor(x / self.cell).astype(np.int64)
        inside = (i >= 0) & (j >= 0) & (i < rows) & (j < columns)
        return np.where(inside, self.ground[i.clip(0, rows - 1), j.clip(0, columns - 1)], GRASS).astype(np.uint8)

    def near_cross(self, s: float, margin: float = 0.0, side: int = 0) -> bool:
        """Whether s lies on a cross street, or within a margin of one (side: only arms of that side)."""
        return any(abs(s - c.s) < self.cross_half + margin and (side == 0 or side in c.arms) for c in self.crosses)


def make_layout(config: SimulationConfig, scene_index: int, attempt: int, travel: float) -> Layout:
    """Lay out a scene's street.

    Args:
        config: The simulation's settings.
        scene_index: Which scene.
        attempt: Counts new tries of a scene that came out without all classes.
        travel: Metres of road that the ego vehicle may cover.
    """
    rng = rng_of(config.seed, scene_index, "layout", attempt)
    lanes = int(rng.choice([1, 2, 2]))
    lane_width = 3.5 * config.distance
    bike = lanes * lane_width + 0.9 * config.distance
    parking = bike + 0.9 * config.distance + 1.65
    half_width = parking + 1.65
    path = _curve(rng, 2 * LEAD + travel)
    crosses = _crosses(rng, path, LEAD, travel, half_width)
    margin = SIDE_STREET + 12.0
    shift = margin - path.xy.min(0)
    path = Path(path.xy + shift, path.yaw)
    crosses = tuple(Cross(c.s, c.arms, Path(c.path.xy + shift, c.path.yaw), c.red) for c in crosses)
    extent = path.xy.max(0) + margin
    azimuth, elevation = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(24, 62))
    sun = (
        float(np.cos(azimuth) * np.cos(elevation)),
        float(np.sin(azimuth) * np.cos(elevation)),
        float(np.sin(elevation)),
    )
    cell = max(0.08, float(np.sqrt(extent[0] * extent[1] / 6e7)))
    blank = Layout(
        path, lanes, lane_width, half_width, bike, parking, LEAD, 5.2, crosses, (), (), np.zeros((1, 1), np.uint8),
        cell, sun, float(rng.choice([0.25, 0.7, 1.0, 1.0])), int(rng.integers(2**31)),
    )  # fmt: skip
    from kdlab.data.simulate_ground import furnished, paint_ground

    ground = paint_ground(blank, rng, (float(extent[0]), float(extent[1])))
    return furnished(blank, ground, rng, config)


def _curve(rng: np.random.Generator, length: float) -> Path:
    """A random road: straight, one bend or an S, with a radius of at least about 70 m."""
    n = int(np.ceil(length)) + 1
    curvature = np.zeros(n)
    kind = rng.choice(["straight", "bend", "s", "bend"])
    peak = rng.uniform(1 / 220, 1 / 70) * rng.choice([-1, 1])
    s = np.arange(n)
    if kind == "bend":
        curvature += peak * np.exp(-(((s - n * rng.uniform(0.35, 0.6)) / 32) ** 2))
    elif kind == "s":
        curvature += peak * np.sin((s - n / 2) / max(n / 2, 60) * np.pi * 1.3)
    yaw = rng.uniform(-np.pi, np.pi) + np.cumsum(curvature)
    middle = (yaw[1:] + yaw[:-1]) / 2
    xy = np.concatenate([np.zeros((1, 2)), np.cumsum(np.stack([np.cos(middle), np.sin(middle)], -1), 0)])
    return Path(xy, yaw)


def _crosses(rng: np.random.Generator, path: Path, start: float, travel: float, half: float) -> tuple[Cross, ...]:
    """Cross streets at irregular distances, each with its arms and its traffic light."""
    crosses: list[Cross] = []
    s = start + rng.uniform(-60, -30)
    while s < path.length - 30:
        if s > 30:
            x, y, yaw = path.at(s)
            heading = float(yaw) + np.pi / 2
            steps = np.arange(-SIDE_STREET, SIDE_STREET + 1)
            xy = np.stack([x + steps * np.cos(heading), y + steps * np.sin(heading)], -1)
            arms = ((1, -1), (1, -1), (1,), (-1,))[int(rng.integers(4))]
            red = (-10.0, float(rng.uniform(3, 9))) if rng.random() < 0.35 else (float(rng.uniform(4, 12)), 60.0)
            crosses.append(Cross(float(s), arms, Path(xy, np.full(len(xy), heading)), red))
        s += rng.uniform(68, 105)
    return tuple(crosses)
