"""Meshes and textures of what never moves: ground, pavements, houses, trees, lamps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from kdlab.data import simulate_layout as lay
from kdlab.data.simulate_config import Array32, IntArray, rng_of, yaw_pose
from kdlab.data.simulate_ground import arm_span, open_spans
from kdlab.data.simulate_layout import KERB, PAVEMENT, Building, Layout, Path, Prop
from kdlab.data.simulate_mesh import Builder, Color, Material, Mesh, merged

LAMP_HEIGHT = 7.4
_MIPS = 6
GRASS_COLOR: Color = (0.10, 0.17, 0.045)
_PALETTE: dict[int, Color] = {
    lay.GRASS: GRASS_COLOR, lay.ASPHALT: (0.105, 0.105, 0.11), lay.WHITE: (0.62, 0.62, 0.6),
    lay.YELLOW: (0.62, 0.42, 0.06), lay.PAVING: (0.30, 0.285, 0.26), lay.KERBSTONE: (0.42, 0.41, 0.39),
    lay.BIKELANE: (0.26, 0.075, 0.055), lay.PATCH: (0.07, 0.07, 0.074), lay.PARKING: (0.135, 0.133, 0.13),
    lay.GRAVEL: (0.22, 0.20, 0.16), lay.MANHOLE: (0.035, 0.035, 0.035),
}  # fmt: skip
_WALLS: tuple[Color, ...] = (
    (0.36, 0.14, 0.09), (0.50, 0.44, 0.34), (0.55, 0.53, 0.49), (0.30, 0.28, 0.27), (0.46, 0.30, 0.19),
    (0.26, 0.11, 0.08), (0.60, 0.57, 0.50), (0.42, 0.45, 0.47), (0.56, 0.42, 0.26), (0.35, 0.38, 0.34),
)  # fmt: skip


@dataclass(frozen=True)
class Static:
    """A layout's fixed world, ready to cast against.

    Attributes:
        mesh: All fixed triangles.
        building: Int [F], the building that a triangle belongs to, -1 for none.
        middle, axis, seeds: Per building: its middle [B, 2], its length axis [B, 2], its seed [B].
        levels: Ground colours as linear RGB bytes, halved in size from level to level, flattened into [cells, 3].
        starts, shapes: Where each level begins in `levels`, and its rows and columns.
        lamps: Street light on the ground, float [rows, columns], one cell a metre.
    """

    mesh: Mesh
    building: IntArray
    middle: Array32
    axis: Array32
    seeds: NDArray[np.int64]
    levels: NDArray[np.uint8]
    starts: NDArray[np.int64]
    shapes: NDArray[np.int64]
    lamps: Array32


@lru_cache(maxsize=2)
def static_of(layout: Layout) -> Static:
    """The fixed world of a layout (kept for the last two layouts)."""
    parts, owners = [_ground_mesh(layout)], [-1]
    for i, building in enumerate(layout.buildings):
        parts.append(_building_mesh(building).placed(yaw_pose(building.x, building.y, 0.0, building.yaw)))
        owners.append(i)
    for prop in layout.props:
        parts.append(_prop_mesh(prop).placed(yaw_pose(prop.x, prop.y, prop.z, prop.yaw)))
        owners.append(-1)
    levels, starts, shapes = _ground_levels(layout)
    yaws = np.array([b.yaw for b in layout.buildings] or [0.0])
    return Static(
        merged(parts),
        np.repeat(np.array(owners, dtype=np.int32), [len(p.faces) for p in parts]),
        np.array([(b.x, b.y) for b in layout.buildings] or [(0, 0)], dtype=np.float32),
        np.stack([np.cos(yaws), np.sin(yaws)], -1).astype(np.float32),
        np.array([b.seed for b in layout.buildings] or [0], dtype=np.int64),
        levels, starts, shapes, _lamp_light(layout),
    )  # fmt: skip


def _ground_levels(layout: Layout) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Ground colours at several resolutions: far ground is looked up coarsely, which keeps lines from flickering."""
    table = np.zeros((16, 3), dtype=np.uint8)
    for label, color in _PALETTE.items():
        table[label] = np.round(np.array(color) * 255)
    level = table[layout.ground]
    flat, shapes = [], []
    for _ in range(_MIPS):
        flat.append(level.reshape(-1, 3))
        shapes.append(level.shape[:2])
        rows, columns = max(level.shape[0] // 2, 1), max(level.shape[1] // 2, 1)
        smaller = cv2.resize(level[: rows * 2, : columns * 2], (columns, rows), interpolation=cv2.INTER_AREA)
        level = np.asarray(smaller, dtype=np.uint8)
    starts = np.cumsum([0, *[len(f) for f in flat[:-1]]])
    return np.concatenate(flat), starts.astype(np.int64), np.array(shapes, dtype=np.int64)


def _lamp_light(layout: Layout) -> Array32:
    rows, columns = (int(n * layout.cell) + 1 for n in layout.ground.shape)
    light: Array32 = np.zeros((rows, columns), dtype=np.float32)
    for prop in layout.props:
        if prop.kind == "lamp":  # The lamp hangs 2.4 m over the road, to the prop's right... its local +y.
            x, y = prop.x - 2.2 * np.sin(prop.yaw), prop.y + 2.2 * np.cos(prop.yaw)
            i, j = int(y), int(x)
            if 0 <= i < rows and 0 <= j < columns:
                light[i, j] += 1
    blurred = cv2.GaussianBlur(light, (0, 0), 3.2) * 62 + cv2.GaussianBlur(light, (0, 0), 8.0) * 90
    return np.asarray(blurred, dtype=np.float32)


def _band(b: Builder, path: Path, span: tuple[float, float], d0: float, d1: float) -> None:
    """A pavement slab between two offsets of a path, with its kerb faces."""
    if span[1] - span[0] < 0.5:
        return
    s = np.append(np.arange(span[0], span[1] - 0.2, 3.0), span[1])
    low, high = path.points(s, d0), path.points(s, d1)
    flat, top = np.zeros((len(s), 1)), np.full((len(s), 1), KERB)
    ring = [np.hstack([low, flat]), np.hstack([low, top]), np.hstack([high, top]), np.hstack([high, flat])]
    b.loft(np.stack(ring, 1), (0.4, 0.4, 0.4), Material.GROUND)


def _ground_mesh(layout: Layout) -> Mesh:
    b = Builder()
    rows, columns = (n * layout.cell for n in layout.ground.shape)
    far, middle = 700.0, np.array([columns / 2, rows / 2])
    corners = np.array([[-far, -far, 0], [far, -far, 0], [far, far, 0], [-far, far, 0]])
    corners[:, :2] += middle
    b.add(corners, np.array([[0, 1, 2], [0, 2, 3]], dtype=np.int32), (0.3, 0.3, 0.3), Material.GROUND)
    half, outer = layout.half_width, layout.half_width + PAVEMENT
    for side in (-1, 1):
        for span in open_spans(layout, 0.0, side):
            _band(b, layout.path, span, side * half, side * outer)
    for c in layout.crosses:
        for arm in c.arms:
            for side in (-1, 1):
                _band(
                    b, c.path, arm_span(layout, arm, outer), side * layout.cross_half, side * (layout.cross_half + 2.4)
                )
    return b.mesh()


def _building_mesh(building: Building) -> Mesh:
    b, rng = Builder(), rng_of(building.seed, "building")
    l, w, h = building.size
    wall = _WALLS[int(rng.integers(len(_WALLS)))]
    tone = rng.uniform(0.8, 1.15)
    wall = (wall[0] * tone, wall[1] * tone, wall[2] * tone)
    trim: Color = (0.5, 0.48, 0.44) if rng.random() < 0.6 else (0.16, 0.16, 0.17)
    b.box((0, 0, h / 2), (l, w, h), wall, Material.FACADE)
    if h < 9 and rng.random() < 0.7:
        tiles: Color = (0.26, 0.08, 0.045) if rng.random() < 0.6 else (0.12, 0.12, 0.13)
        rise, over = w * 0.28, 0.4
        ridge = [[(x, -w / 2 - over, h), (x, 0, h + rise), (x, w / 2 + over, h)] for x in (-l / 2 - 0.2, l / 2 + 0.2)]
        b.loft(np.array(ridge), tiles, Material.ROOF)
        if rng.random() < 0.6:
            b.box((l * 0.2, w * 0.15, h + rise), (0.8, 0.8, 1.6), wall, Material.MATTE)
    else:
        b.box((0, 0, h + 0.15), (l + 0.5, w + 0.5, 0.3), trim)
        b.box((0, 0, h + 0.31), (l, w, 0.02), (0.2, 0.2, 0.2), Material.ROOF)
        if rng.random() < 0.6:
            b.box((rng.uniform(-0.2, 0.2) * l, 0, h + 1.2), (3.2, 3.0, 2.2), (0.4, 0.4, 0.42))
    b.box((0, -w / 2 - 0.06, 3.45), (l + 0.1, 0.2, 0.22), trim)
    if h > 7 and rng.random() < 0.5:
        cloth = ((0.45, 0.05, 0.04), (0.05, 0.2, 0.12), (0.1, 0.14, 0.3), (0.6, 0.5, 0.3))[int(rng.integers(4))]
        for x in np.arange(-l / 2 + 2.0, l / 2 - 2.0, 4.6):
            low, high = (
                [(x - 1.5, -w / 2 - 1.1, 2.75), (x + 1.5, -w / 2 - 1.1, 2.75)],
                [(x + 1.5, -w / 2, 3.3), (x - 1.5, -w / 2, 3.3)],
            )
            ring = np.array(low + high)
            b.loft(np.stack([ring, ring + np.array([0, 0, 0.05])]), cloth, Material.CLOTH)
    if h > 10 and rng.random() < 0.5:
        for z in np.arange(6.9, h - 2, 3.3):
            for x in np.arange(-l / 2 + 2.4, l / 2 - 1.5, 4.8):
                b.box((x, -w / 2 - 0.5, z - 0.05), (2.2, 1.0, 0.12), trim)
                b.box((x, -w / 2 - 0.97, z + 0.45), (2.2, 0.05, 0.9), trim, Material.METAL)
    return b.mesh()


def _tree(b: Builder, rng: np.random.Generator) -> None:
    height, spread = rng.uniform(6.0, 9.5), rng.uniform(1.5, 2.3)
    lean = rng.normal(0, 0.12, 2)
    bark: Color = (0.12, 0.085, 0.06)
    crown = np.array([lean[0], lean[1], height * 0.68])
    b.tube((0, 0, 0), (lean[0] * 0.6, lean[1] * 0.6, height * 0.5), 0.17, bark, Material.BARK, 0.1, 7)
    green = np.array([0.085, 0.17, 0.03]) * rng.uniform(0.75, 1.25, 3) * (1.5 if rng.random() < 0.15 else 1.0)
    for k in range(7):
        angle, out = k * 2.4 + rng.uniform(0, 1), spread * (0.62 if k else 0.0)
        offset = np.array([np.cos(angle) * out, np.sin(angle) * out, rng.uniform(-0.17, 0.2) * height])
        middle, radius = crown + offset, spread * rng.uniform(0.52, 0.78)
        low = 3.9 + radius * 0.8  # Crowns stay above buses.
        middle[2] = max(middle[2], low)
        if k % 2:
            b.tube((lean[0] * 0.6, lean[1] * 0.6, height * 0.45), middle, 0.07, bark, Material.BARK, 0.03, 5)
        shade = tuple(float(c) for c in green * rng.uniform(0.8, 1.15))
        b.blob(middle, (radius, radius, radius * 0.8), shade, Material.FOLIAGE, rng, 0.2, 5, 9)  # type: ignore[arg-type]


def _prop_mesh(prop: Prop) -> Mesh:
    b, rng = Builder(), rng_of(prop.seed, "prop")
    metal: Color = (0.12, 0.13, 0.13)
    if prop.kind == "tree":
        _tree(b, rng)
    elif prop.kind == "bush":
        for _ in range(3):
            r = rng.uniform(0.3, 0.5)
            b.blob(
                (rng.uniform(-0.5, 0.5), rng.uniform(-0.15, 0.15), r * 0.7),
                (r * 1.2, r, r),
                (0.07, 0.14, 0.03),
                Material.FOLIAGE,
                rng,
                0.2,
            )
    elif prop.kind == "lamp":
        b.tube((0, 0, 0), (0, 0, 1.0), 0.11, metal, Material.METAL, sides=8)
        b.tube((0, 0, 1.0), (0, 0, LAMP_HEIGHT), 0.075, metal, Material.METAL, 0.05, 8)
        b.tube((0, 0, LAMP_HEIGHT), (0, 2.0, LAMP_HEIGHT + 0.25), 0.045, metal, Material.METAL, sides=6)
        b.box((0, 2.2, LAMP_HEIGHT + 0.24), (0.26, 0.75, 0.1), metal, Material.METAL)
        b.box((0, 2.2, LAMP_HEIGHT + 0.17), (0.2, 0.6, 0.05), (1.0, 0.82, 0.55), Material.LAMP)
    elif prop.kind == "signal":
        b.tube((0, 0, 0), (0, 0, 5.6), 0.09, metal, Material.METAL, sides=8)
        b.tube((0, 0, 5.5), (0, 3.4, 5.7), 0.06, metal, Material.METAL, sides=6)
    elif prop.kind == "sign":
        b.tube((0, 0, 0), (0, 0, 2.6), 0.035, (0.4, 0.4, 0.4), Material.METAL, sides=6)
        color = ((0.5, 0.02, 0.02), (0.03, 0.1, 0.4), (0.75, 0.75, 0.73))[int(rng.integers(3))]
        b.tube((-0.03, 0, 2.5), (0.03, 0, 2.5), 0.33, color, Material.RETRO, sides=16 if rng.random() < 0.6 else 4)
        b.tube((0.03, 0, 2.5), (0.035, 0, 2.5), 0.22, (0.8, 0.8, 0.78), Material.RETRO, sides=12)
    else:
        for z, y in ((0.45, 0.0), (0.8, -0.22)):
            for k in range(3):
                flat = z < 0.6
                b.box((0, y + (0.14 * k - 0.14 if flat else 0), z + (0 if flat else 0.14 * k - 0.1)),
                      (1.7, 0.11 if flat else 0.05, 0.05 if flat else 0.11), (0.25, 0.14, 0.07))  # fmt: skip
        for x in (-0.7, 0.7):
            b.box((x, -0.05, 0.22), (0.08, 0.4, 0.44), metal, Material.METAL)
    return b.mesh()


def signal_heads(layout: Layout, red: tuple[bool, ...]) -> Mesh | None:
    """Traffic light heads, lit as the lights now stand; None in a layout without junctions."""
    b, index = Builder(), 0
    for prop in layout.props:
        if prop.kind != "signal":
            continue
        is_red = red[index // 2]
        index += 1
        c, s = np.cos(prop.yaw), np.sin(prop.yaw)
        for out, z in ((0.0, 3.2), (3.2, 5.3)):
            x, y = prop.x - s * out, prop.y + c * out
            b.box((x, y, prop.z + z), (0.3, 0.34, 1.0), (0.03, 0.03, 0.03), yaw=prop.yaw)
            for k, color in enumerate(((0.1, 1.0, 0.3), (1.0, 0.7, 0.05), (1.0, 0.05, 0.03))):
                lit = (k == 2 and is_red) or (k == 0 and not is_red)
                at = np.array([x, y, prop.z + z - 0.3 + 0.3 * k])
                face = np.array([c, s, 0.0])
                shown: Color = color if lit else (color[0] * 0.08, color[1] * 0.08, color[2] * 0.08)
                for sign in (-1, 1):
                    b.tube(
                        at + sign * face * 0.15,
                        at + sign * face * 0.19,
                        0.11,
                        shown,
                        Material.SIGNAL if lit else Material.MATTE,
                    )
    return b.mesh() if index else None
