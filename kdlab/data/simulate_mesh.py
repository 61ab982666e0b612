"""Triangle meshes for the simulated world: materials and the primitives that shapes are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kdlab.data.simulate_config import Array, Array32, IntArray

Color = tuple[float, float, float]
Point = Sequence[float] | Array


class Material(IntEnum):
    """What a surface is made of: decides its procedural texture, its shine and its LiDAR reflectivity."""

    MATTE = 0
    PAINT = 1
    GLASS = 2
    RUBBER = 3
    METAL = 4
    HEADLIGHT = 5
    TAILLIGHT = 6
    CLOTH = 7
    RETRO = 8
    GROUND = 9
    FACADE = 10
    FOLIAGE = 11
    LAMP = 12
    BARK = 13
    ROOF = 14
    SHOP = 15
    SIGNAL = 16


@dataclass(frozen=True)
class Mesh:
    """Triangles with a material and a colour each.

    Attributes:
        vertices: Float [V, 3] in metres.
        faces: Int [F, 3], indices into vertices.
        material: Uint8 [F], values of Material.
        color: Float [F, 3], linear RGB in 0..1.
    """

    vertices: Array32
    faces: IntArray
    material: NDArray[np.uint8]
    color: Array32

    def placed(self, pose: Array) -> Mesh:
        """The mesh moved by a pose [4, 4]."""
        vertices = self.vertices @ pose[:3, :3].T.astype(np.float32) + pose[:3, 3].astype(np.float32)
        return Mesh(vertices, self.faces, self.material, self.color)

    def fitted(self, size: tuple[float, float, float]) -> Mesh:
        """The mesh stretched so that its bounding box is exactly (length, width, height), centred at the origin."""
        low, high = self.vertices.min(0), self.vertices.max(0)
        scale = np.asarray(size, dtype=np.float32) / (high - low)
        return Mesh((self.vertices - (low + high) / 2) * scale, self.faces, self.material, self.color)


def merged(meshes: Sequence[Mesh]) -> Mesh:
    """One mesh of several, in order."""
    starts = np.cumsum([0, *[len(m.vertices) for m in meshes[:-1]]])
    return Mesh(
        np.concatenate([m.vertices for m in meshes]),
        np.concatenate([m.faces + np.int32(s) for m, s in zip(meshes, starts, strict=True)]),
        np.concatenate([m.material for m in meshes]),
        np.concatenate([m.color for m in meshes]),
    )


@lru_cache(maxsize=256)
def _skin(count: int, k: int, caps: bool) -> IntArray:
    """Faces of a skin over `count` rings of k points."""
    i, j = np.meshgrid(np.arange(count - 1), np.arange(k), indexing="ij")
    a, b = (i * k + j).ravel(), (i * k + (j + 1) % k).ravel()
    faces = [np.stack([a, b, b + k], 1), np.stack([a, b + k, a + k], 1)]
    if caps:
        fan = np.arange(1, k - 1)
        for start in (0, (count - 1) * k):
            faces.append(np.stack([np.full(k - 2, start), start + fan, start + fan + 1], 1))
    return np.asarray(np.concatenate(faces), dtype=np.int32)


@lru_cache(maxsize=64)
def _circle(sides: int) -> tuple[Array, Array]:
    """Cosines and sines [sides, 1] around a circle."""
    angle = (np.arange(sides) + 0.5) * 2 * np.pi / sides
    return np.cos(angle)[:, None], np.sin(angle)[:, None]


def _cross(a: Array, b: Array) -> Array:
    """Cross product of two vectors [3]; much faster than NumPy's for single ones."""
    (ax, ay, az), (bx, by, bz) = a.tolist(), b.tolist()
    return np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])


class Builder:
    """Collects primitives into a Mesh. Faces may wind either way: shading turns normals to the viewer."""

    def __init__(self) -> None:
        self._vertices: list[Array] = []
        self._faces: list[IntArray] = []
        self._looks: list[tuple[int, int, Color]] = []
        self._count = 0

    def add(self, vertices: Array, faces: IntArray, color: Color, material: Material) -> None:
        """Add triangles: vertices [V, 3], faces [F, 3], all of one colour and material."""
        self._vertices.append(vertices)
        self._faces.append((faces + self._count).astype(np.int32))
        self._looks.append((len(faces), int(material), color))
        self._count += len(vertices)

    def mesh(self) -> Mesh:
        """Everything added so far."""
        counts = [count for count, _, _ in self._looks]
        return Mesh(
            np.concatenate(self._vertices).astype(np.float32),
            np.concatenate(self._faces),
            np.repeat(np.array([m for _, m, _ in self._looks], dtype=np.uint8), counts),
            np.repeat(np.array([c for _, _, c in self._looks], dtype=np.float32), counts, axis=0),
        )

    def loft(self, sections: Array, color: Color, material: Material, caps: bool = True) -> None:
        """A skin over rings of points [S, K, 3], each ring closed; caps close both ends."""
        count, k = sections.shape[:2]
        self.add(sections.reshape(-1, 3), _skin(count, k, caps), color, material)

    def box(
        self,
        center: Point,
        size: Point,
        color: Color,
        material: Material = Material.MATTE,
        taper: tuple[float, float] = (1.0, 1.0),
        yaw: float = 0.0,
    ) -> None:
        """A box; taper scales its top in x and y; yaw turns it about z."""
        base = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.float64) * 0.5
        size = np.asarray(size, dtype=np.float64)
        low = base * size[:2]
        c, s = np.cos(yaw), np.sin(yaw)
        turn = np.array([[c, s], [-s, c]])
        rings = [
            np.column_stack([ring @ turn, np.full(4, z * size[2])]) for ring, z in ((low, -0.5), (low * taper, 0.5))
        ]
        self.loft(np.stack(rings) + np.asarray(center, dtype=np.float64), color, material)

    def tube(
        self,
        start: Point,
        end: Point,
        radius: float,
        color: Color,
        material: Material = Material.MATTE,
        end_radius: float | None = None,
        sides: int = 8,
    ) -> None:
        """A cylinder or cone frustum between two points."""
        a, b = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
        axis = (b - a) / np.sqrt(((b - a) ** 2).sum())
        helper = np.array([0.0, 0.0, 1.0]) if abs(axis[2]) < 0.9 else np.array([1.0, 0.0, 0.0])
        u = _cross(axis, helper)
        u /= np.sqrt((u * u).sum())
        cosine, sine = _circle(sides)
        ring = cosine * u + sine * _cross(axis, u)
        self.loft(
            np.stack([a + ring * radius, b + ring * (radius if end_radius is None else end_radius)]), color, material
        )

    def blob(
        self,
        center: Point,
        radii: Point,
        color: Color,
        material: Material,
        rng: np.random.Generator | None = None,
        rough: float = 0.0,
        rings: int = 4,
        sides: int = 8,
    ) -> None:
        """An ellipsoid; rough displaces its points at random (share of the radius)."""
        phi = np.linspace(-np.pi / 2, np.pi / 2, rings + 2)
        phi[0], phi[-1] = phi[0] + 0.12, phi[-1] - 0.12
        theta = np.arange(sides) * 2 * np.pi / sides
        unit = np.stack(
            [
                np.cos(phi)[:, None] * np.cos(theta),
                np.cos(phi)[:, None] * np.sin(theta),
                np.repeat(np.sin(phi)[:, None], sides, 1),
            ],
            -1,
        )
        if rng is not None and rough > 0:
            unit = unit * (1 + rough * rng.uniform(-1, 1, unit.shape[:2]))[..., None]
        self.loft(unit * np.asarray(radii, dtype=np.float64) + np.asarray(center, dtype=np.float64), color, material)

    def hull(
        self,
        stations: Sequence[tuple[float, float, float, float]],
        bevel: float,
        color: Color,
        material: Material,
        y: float = 0.0,
    ) -> None:
        """A body along x from stations (x, z low, z high, half width) about y, its edges cut by the bevel in metres."""
        rings = []
        for x, low, high, half in stations:
            c = min(bevel, 0.45 * (high - low), 0.45 * half)
            yz = [(-half + c, low), (half - c, low), (half, low + c), (half, high - c),
                  (half - c, high), (-half + c, high), (-half, high - c), (-half, low + c)]  # fmt: skip
            rings.append([(x, y + dy, z) for dy, z in yz])
        self.loft(np.array(rings), color, material)

    def wheel(self, x: float, y: float, radius: float, width: float, hub: Color = (0.45, 0.46, 0.48)) -> None:
        """A wheel standing on z = 0 with its outer face at y (its sign says on which side)."""
        side = 1.0 if y > 0 else -1.0
        self.tube(
            (x, y - side * width, radius), (x, y, radius), radius, (0.025, 0.025, 0.028), Material.RUBBER, sides=14
        )
        self.tube((x, y, radius), (x, y + side * 0.012, radius), radius * 0.62, hub, Material.METAL, radius * 0.5, 10)
        self.tube((x, y + side * 0.012, radius), (x, y + side * 0.02, radius), radius * 0.2, (0.1, 0.1, 0.1), sides=6)

    def ring(
        self, center: Point, radius: float, thickness: float, color: Color, material: Material, sides: int = 14
    ) -> None:
        """A wheel rim in the x-z plane: a loop of square cross-section."""
        angle = np.arange(sides + 1) * 2 * np.pi / sides
        t = thickness
        cross = [(radius, -t), (radius, t), (radius - 2 * t, t), (radius - 2 * t, -t)]
        rings: Array = np.array(
            [[(r * np.cos(a), y, r * np.sin(a)) for r, y in cross] for a in angle], dtype=np.float64
        )
        self.loft(rings + np.asarray(center, dtype=np.float64), color, material, caps=False)
