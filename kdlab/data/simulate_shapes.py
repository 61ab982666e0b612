"""Shapes of people, cycles, barriers and cones, and the one function that gives any agent its mesh."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np

from kdlab.data import simulate_vehicles as vehicles
from kdlab.data.simulate_config import rng_of
from kdlab.data.simulate_mesh import Builder, Color, Material, Mesh

Size = tuple[float, float, float]

# nuScenes detection class -> nuScenes category.
CATEGORIES: dict[str, str] = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "construction_vehicle": "vehicle.construction",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "barrier": "movable_object.barrier",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "pedestrian": "human.pedestrian.adult",
    "traffic_cone": "movable_object.trafficcone",
}

_SKIN: tuple[Color, ...] = ((0.55, 0.33, 0.22), (0.36, 0.20, 0.12), (0.16, 0.08, 0.05), (0.62, 0.42, 0.30))
_CLOTHES: tuple[Color, ...] = (
    (0.05, 0.07, 0.14), (0.45, 0.05, 0.05), (0.5, 0.5, 0.48), (0.08, 0.22, 0.12), (0.03, 0.03, 0.03), (0.5, 0.36, 0.08),
    (0.12, 0.2, 0.42), (0.4, 0.14, 0.3), (0.55, 0.52, 0.42), (0.2, 0.12, 0.07), (0.08, 0.35, 0.4),
)  # fmt: skip
_TROUSERS: tuple[Color, ...] = (
    (0.04, 0.06, 0.13),
    (0.03, 0.03, 0.035),
    (0.16, 0.13, 0.1),
    (0.10, 0.13, 0.2),
    (0.25, 0.23, 0.2),
)
GAIT_STEPS = 8
"""A stride is drawn in this many poses."""


def _choice(rng: np.random.Generator, colors: tuple[Color, ...]) -> Color:
    return colors[int(rng.integers(len(colors)))]


def _limb(b: Builder, points: list[tuple[float, float, float]], radii: list[float], color: Color) -> None:
    for p, q, r, s in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
        b.tube(p, q, r, color, Material.CLOTH, s, 6)


def _upper_body(
    b: Builder, rng: np.random.Generator, hip: tuple[float, float], shoulder: tuple[float, float], helmet: bool
) -> None:
    """Torso, neck and head over a hip at (x, z), shoulders at (x, z)."""
    shirt, skin = _choice(rng, _CLOTHES), _choice(rng, _SKIN)
    (x0, z0), (x1, z1) = hip, shoulder
    rings = []
    for mix, rx, ry in (
        (0, 0.10, 0.15),
        (0.3, 0.095, 0.14),
        (0.75, 0.12, 0.20),
        (0.95, 0.10, 0.19),
        (1.05, 0.06, 0.08),
    ):
        angle = np.arange(8) * np.pi / 4
        x, z = x0 + mix * (x1 - x0), z0 + mix * (z1 - z0)
        rings.append(np.column_stack([x + rx * np.cos(angle), ry * np.sin(angle), np.full(8, z)]))
    b.loft(np.stack(rings), shirt, Material.CLOTH)
    b.tube((x1, 0, z1), (x1 + 0.01, 0, z1 + 0.12), 0.05, skin, Material.CLOTH, sides=6)
    b.blob((x1 + 0.03, 0, z1 + 0.21), (0.095, 0.08, 0.125), skin, Material.CLOTH)
    hair = _choice(rng, ((0.02, 0.015, 0.01), (0.10, 0.05, 0.02), (0.3, 0.2, 0.08), (0.3, 0.3, 0.3)))
    cap = _choice(rng, ((0.6, 0.6, 0.6), (0.5, 0.04, 0.03), (0.04, 0.04, 0.05), (0.05, 0.15, 0.4)))
    b.blob(
        (x1 + 0.008, 0, z1 + 0.255),
        (0.105, 0.092, 0.10),
        cap if helmet else hair,
        Material.PAINT if helmet else Material.CLOTH,
    )
    for side in (-1, 1):
        b.blob((x1, side * 0.2, z1 - 0.04), (0.07, 0.06, 0.07), shirt, Material.CLOTH, rings=2, sides=6)


def pedestrian(rng: np.random.Generator, moving: bool, phase: float) -> Builder:
    """A person of about 1.75 m, x forward; phase (radians) swings legs and arms of a moving one."""
    b = Builder()
    trousers, sleeve = _choice(rng, _TROUSERS), _choice(rng, _CLOTHES)
    swing = np.sin(phase) if moving else 0.04
    bag = rng.random() < 0.35
    for side in (-1, 1):
        s = side * swing * 0.34
        lift = max(0.0, float(np.cos(phase) * side)) * 0.08 if moving else 0.0
        foot = (s, side * 0.1, 0.06 + lift)
        _limb(
            b,
            [(0, side * 0.09, 0.92), (s * 0.45 + 0.05, side * 0.1, 0.5 + lift / 2), foot],
            [0.095, 0.075, 0.055],
            trousers,
        )
        b.box((foot[0] + 0.06, foot[1], foot[2] - 0.02), (0.26, 0.09, 0.08), (0.05, 0.04, 0.03), Material.RUBBER)
        a = -s * 0.8
        _limb(
            b,
            [(0, side * 0.22, 1.42), (a * 0.5, side * 0.26, 1.14), (a + 0.06, side * 0.25, 0.92)],
            [0.055, 0.045, 0.035],
            sleeve,
        )
        b.blob((a + 0.07, side * 0.25, 0.88), (0.04, 0.03, 0.05), (0.45, 0.27, 0.18), Material.CLOTH, rings=2, sides=6)
    _upper_body(b, rng, (0.0, 0.88), (0.0, 1.44), False)
    if bag:
        b.box((-0.17, 0, 1.22), (0.14, 0.28, 0.42), _choice(rng, _CLOTHES), Material.CLOTH, (0.7, 0.8))
    return b


def _rider(
    b: Builder,
    rng: np.random.Generator,
    seat: tuple[float, float],
    bar: tuple[float, float],
    pedal: tuple[float, float],
) -> None:
    """Someone sitting at seat (x, z), hands on the bar, feet on the pedals."""
    trousers, sleeve = _choice(rng, _TROUSERS), _choice(rng, _CLOTHES)
    shoulder = (seat[0] + 0.28, seat[1] + 0.52)
    _upper_body(b, rng, (seat[0], seat[1] + 0.02), shoulder, True)
    for side in (-1, 1):
        knee = ((seat[0] + pedal[0]) / 2 + 0.22, side * 0.15, (seat[1] + pedal[1]) / 2 + 0.08 + 0.07 * side)
        _limb(
            b, [(seat[0], side * 0.1, seat[1]), knee, (pedal[0], side * 0.13, pedal[1])], [0.09, 0.075, 0.05], trousers
        )
        b.box((pedal[0] + 0.05, side * 0.13, pedal[1] - 0.03), (0.24, 0.09, 0.08), (0.05, 0.04, 0.03), Material.RUBBER)
        elbow = ((shoulder[0] + bar[0]) / 2, side * 0.28, (shoulder[1] + bar[1]) / 2 - 0.06)
        _limb(
            b,
            [(shoulder[0], side * 0.2, shoulder[1] - 0.03), elbow, (bar[0], side * 0.24, bar[1])],
            [0.055, 0.045, 0.035],
            sleeve,
        )


def bicycle(rng: np.random.Generator, rider: bool) -> Builder:
    """A bicycle, with or without its rider."""
    b, paint = Builder(), _choice(rng, vehicles.CAR_COLORS)
    for x in (-0.53, 0.53):
        b.ring((x, 0, 0.34), 0.34, 0.022, (0.03, 0.03, 0.03), Material.RUBBER)
        for k in range(4):
            a = k * np.pi / 4
            d = np.array([np.cos(a), 0, np.sin(a)]) * 0.31
            b.tube(
                np.array([x, 0, 0.34]) - d, np.array([x, 0, 0.34]) + d, 0.006, (0.5, 0.5, 0.5), Material.METAL, sides=3
            )
    joints = {
        "crank": (-0.06, 0, 0.3),
        "seat": (-0.22, 0, 0.82),
        "head": (0.36, 0, 0.82),
        "rear": (-0.53, 0, 0.34),
        "front": (0.53, 0, 0.34),
    }
    for p, q in (
        ("crank", "seat"),
        ("crank", "head"),
        ("seat", "head"),
        ("rear", "crank"),
        ("rear", "seat"),
        ("head", "front"),
    ):
        b.tube(joints[p], joints[q], 0.026, paint, Material.PAINT, sides=6)
    b.tube((0.36, 0, 0.82), (0.34, 0, 1.0), 0.022, paint, Material.PAINT, sides=6)
    b.tube((0.36, -0.28, 1.0), (0.36, 0.28, 1.0), 0.02, (0.05, 0.05, 0.05), sides=6)
    b.box((-0.24, 0, 0.91), (0.26, 0.15, 0.07), (0.03, 0.03, 0.03))
    b.tube((-0.22, 0, 0.8), (-0.24, 0, 0.9), 0.02, (0.4, 0.4, 0.4), Material.METAL, sides=6)
    b.tube((-0.06, -0.12, 0.3), (-0.06, 0.12, 0.3), 0.07, (0.3, 0.3, 0.3), Material.METAL, sides=8)
    b.box((-0.62, 0, 0.6), (0.04, 0.08, 0.06), (0.5, 0.01, 0.01), Material.TAILLIGHT)
    if rider:
        _rider(b, rng, (-0.2, 0.93), (0.36, 1.02), (-0.02, 0.2))
    return b


def motorcycle(rng: np.random.Generator, rider: bool) -> Builder:
    """A motorcycle, with or without its rider."""
    b, paint = Builder(), _choice(rng, vehicles.CAR_COLORS)
    dark: Color = (0.05, 0.05, 0.055)
    for x in (-0.7, 0.72):
        b.tube((x, -0.07, 0.31), (x, 0.07, 0.31), 0.31, (0.03, 0.03, 0.03), Material.RUBBER, sides=14)
        b.tube((x, -0.08, 0.31), (x, 0.08, 0.31), 0.17, (0.4, 0.4, 0.42), Material.METAL, sides=10)
    b.hull(
        [(-0.35, 0.28, 0.62, 0.14), (0.0, 0.2, 0.7, 0.19), (0.3, 0.26, 0.62, 0.16)],
        0.05,
        (0.16, 0.16, 0.17),
        Material.METAL,
    )
    b.hull([(-0.12, 0.66, 0.86, 0.10), (0.1, 0.66, 0.98, 0.16), (0.38, 0.68, 0.9, 0.12)], 0.06, paint, Material.PAINT)
    b.hull([(-0.92, 0.76, 0.88, 0.08), (-0.5, 0.68, 0.84, 0.15), (-0.08, 0.68, 0.84, 0.12)], 0.04, dark, Material.MATTE)
    b.hull([(-0.98, 0.6, 0.76, 0.06), (-0.6, 0.5, 0.72, 0.12), (-0.3, 0.5, 0.66, 0.1)], 0.04, paint, Material.PAINT)
    b.hull([(0.36, 0.7, 1.12, 0.16), (0.56, 0.72, 1.0, 0.14), (0.66, 0.78, 0.92, 0.08)], 0.05, paint, Material.PAINT)
    for side in (-1, 1):
        b.tube((0.42, side * 0.09, 0.9), (0.72, side * 0.09, 0.31), 0.035, (0.5, 0.5, 0.5), Material.METAL, sides=6)
        b.tube((-0.1, side * 0.17, 0.3), (-0.85, side * 0.18, 0.42), 0.05, (0.5, 0.5, 0.5), Material.METAL, sides=6)
        b.tube((0.34, 0, 1.02), (0.28, side * 0.36, 1.06), 0.022, dark, sides=6)
        b.tube((0.32, side * 0.24, 1.06), (0.32, side * 0.27, 1.2), 0.02, dark, sides=5)
        b.box((0.32, side * 0.27, 1.22), (0.03, 0.13, 0.08), dark, Material.GLASS)
    b.box((0.67, 0, 0.86), (0.06, 0.16, 0.14), (0.9, 0.9, 0.85), Material.HEADLIGHT)
    b.box((-0.98, 0, 0.72), (0.05, 0.14, 0.08), (0.5, 0.01, 0.01), Material.TAILLIGHT)
    b.box((-1.0, 0, 0.55), (0.03, 0.18, 0.12), (0.7, 0.7, 0.6), Material.RETRO)
    if rider:
        _rider(b, rng, (-0.25, 0.86), (0.3, 1.06), (0.0, 0.36))
    return b


def barrier(rng: np.random.Generator, style: str) -> Builder:
    """A road barrier, long in y: concrete ("concrete"), plastic ("plastic") or a striped board on feet ("board")."""
    b = Builder()
    if style == "board":
        for y in (-0.95, 0.95):
            b.box((0, y, 0.06), (0.5, 0.2, 0.12), (0.06, 0.06, 0.06), Material.RUBBER)
            b.box((0, y, 0.5), (0.07, 0.07, 1.0), (0.6, 0.6, 0.6), Material.METAL)
        for z, count in ((0.85, 10), (0.45, 10)):
            for i in range(count):
                color: Color = (0.7, 0.13, 0.02) if i % 2 == 0 else (0.8, 0.8, 0.78)
                b.box((0, -1.125 + 0.25 * i, z), (0.06, 0.25, 0.26), color, Material.RETRO)
        return b
    tone = rng.uniform(0.42, 0.55)
    color = (
        (tone, tone * 0.98, tone * 0.94)
        if style == "concrete"
        else ((0.65, 0.12, 0.02), (0.75, 0.75, 0.73))[int(rng.integers(2))]
    )
    profile = [
        (0.25, 0.0),
        (0.25, 0.1),
        (0.13, 0.4),
        (0.09, 0.95),
        (-0.09, 0.95),
        (-0.13, 0.4),
        (-0.25, 0.1),
        (-0.25, 0.0),
    ]
    b.loft(np.array([[(x, y, z) for x, z in profile] for y in (-1.25, 1.25)]), color, Material.MATTE)
    for y in (-0.8, 0.0, 0.8):
        b.box(
            (0, y, 0.72),
            (0.245, 0.3, 0.14),
            (0.75, 0.45, 0.02) if style == "concrete" else (0.8, 0.8, 0.78),
            Material.RETRO,
        )
    return b


def cone() -> Builder:
    """A traffic cone: a square foot, an orange cone and two white bands."""
    b = Builder()
    orange: Color = (0.75, 0.12, 0.01)
    b.box((0, 0, 0.025), (0.42, 0.42, 0.05), (0.04, 0.04, 0.04), Material.RUBBER)
    levels = [(0.05, 0.17), (0.3, 0.132), (0.47, 0.106), (0.6, 0.087), (0.74, 0.066), (1.0, 0.028)]
    for i, ((z0, r0), (z1, r1)) in enumerate(pairwise(levels)):
        white = i in (1, 3)
        b.tube(
            (0, 0, z0),
            (0, 0, z1),
            r0,
            (0.85, 0.85, 0.84) if white else orange,
            Material.RETRO if white else Material.MATTE,
            r1,
            10,
        )
    return b


def agent_size(name: str, style: str, rng: np.random.Generator) -> Size:
    """Length, width, height in metres of a new agent of a class."""
    if name == "car":
        return vehicles.car_size(rng, style)
    rider = style == "rider"
    l, w, h, spread = {
        "truck": (5.6, 2.45, 3.3, 0.04) if style == "tractor" else (7.2, 2.4, 2.95, 0.09),
        "bus": (11.2, 2.85, 3.35, 0.05),
        "trailer": (9.6, 2.5, 3.7, 0.08),
        "construction_vehicle": (6.6, 2.6, 3.1, 0.06),
        "motorcycle": (2.1, 0.8, 1.66 if rider else 1.28, 0.03),
        "bicycle": (1.72, 0.62, 1.74 if rider else 1.04, 0.03),
        "pedestrian": (0.86 if style == "walk" else 0.42, 0.62, 1.74, 0.05),
        "barrier": (0.5, 2.45, 0.98, 0.03),
        "traffic_cone": (0.41, 0.41, 0.98, 0.06),
    }[name]
    k = rng.normal(1, spread, 3).clip(1 - 2 * spread, 1 + 2 * spread)
    if name in ("bus", "trailer", "truck"):
        k[1] = min(k[1], 1.03)
    return l * k[0], w * k[1], h * k[2]


def _shape(name: str, style: str, size: Size, rng: np.random.Generator, gait: int) -> Builder:
    if name == "car":
        return vehicles.car(rng, style, size)
    if name == "truck":
        return vehicles.truck(rng, style, size)
    if name == "bus":
        return vehicles.bus(rng, size)
    if name == "trailer":
        return vehicles.trailer(rng, style, size)
    if name == "construction_vehicle":
        return vehicles.construction(rng, style, size)
    if name == "motorcycle":
        return motorcycle(rng, style == "rider")
    if name == "bicycle":
        return bicycle(rng, style == "rider")
    if name == "barrier":
        return barrier(rng, style)
    if name == "traffic_cone":
        return cone()
    return pedestrian(rng, style == "walk", gait * 2 * np.pi / GAIT_STEPS)


VARIANTS = 20
"""Different shapes and colours per class and style; each is built once and stretched to an agent's size."""


@lru_cache(maxsize=1024)
def _variant(name: str, style: str, number: int) -> tuple[Mesh, ...]:
    """A variant in every pose of its stride (one pose unless it walks), scaled to a bounding box of 1 x 1 x 1.

    All poses are scaled alike: together they fill the box, and none leaves it.
    """
    size = agent_size(name, style, rng_of(number, "size", name))
    steps = GAIT_STEPS if style == "walk" else 1
    poses = [_shape(name, style, size, rng_of(number, "shape", name), k).mesh() for k in range(steps)]
    points = np.concatenate([m.vertices for m in poses])
    low, high = points.min(0), points.max(0)
    return tuple(Mesh((m.vertices - (low + high) / 2) / (high - low), m.faces, m.material, m.color) for m in poses)


def agent_mesh(name: str, style: str, size: Size, seed: int, gait: int = 0) -> Mesh:
    """An agent's mesh in its box frame: x forward, origin at the box's centre, bounding box `size`."""
    poses = _variant(name, style, seed % VARIANTS)
    mesh = poses[gait % len(poses)]
    return Mesh(mesh.vertices * np.asarray(size, dtype=np.float32), mesh.faces, mesh.material, mesh.color)
