"""Light and surfaces: what colour a ray sees where it hits. All textures are functions of place and seed."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from kdlab.data.simulate_config import Array32, IntArray
from kdlab.data.simulate_layout import BIKELANE, GRASS, KERB, PAVING
from kdlab.data.simulate_mesh import Material
from kdlab.data.simulate_sensors import Caster, Hits
from kdlab.data.simulate_static import GRASS_COLOR, Static
from kdlab.data.simulate_traffic import corners_of
from kdlab.data.simulate_world import SceneState

_TILE = 512
_F = np.float32


@lru_cache(maxsize=1)
def _noise_tile() -> Array32:
    """A tile of fractal noise with mean 0 and deviation 1, repeating in both directions."""
    white = np.random.default_rng(12345).normal(size=(_TILE, _TILE))
    fy, fx = np.meshgrid(np.fft.fftfreq(_TILE), np.fft.fftfreq(_TILE), indexing="ij")
    radius = np.maximum(np.hypot(fx, fy), 1 / _TILE)
    tile = np.fft.ifft2(np.fft.fft2(white) * radius**-0.8).real
    return np.asarray((tile - tile.mean()) / tile.std(), dtype=np.float32)


def noise(x: Array32, y: Array32, scale: float) -> Array32:
    """Noise at x, y; scale is the size of a tile's cell in metres."""
    i = np.floor(y * _F(1 / scale)).astype(np.int32) & (_TILE - 1)
    j = np.floor(x * _F(1 / scale)).astype(np.int32) & (_TILE - 1)
    return np.asarray(_noise_tile()[i, j], dtype=np.float32)


def smooth_noise(x: Array32, y: Array32, scale: float) -> Array32:
    """Noise at x, y without visible cells, for textures larger than a pixel."""
    u, v = x * _F(1 / scale), y * _F(1 / scale)
    j, i = np.floor(u), np.floor(v)
    fu, fv = u - j, v - i
    j0, i0 = j.astype(np.int32) & (_TILE - 1), i.astype(np.int32) & (_TILE - 1)
    j1, i1 = (j0 + 1) & (_TILE - 1), (i0 + 1) & (_TILE - 1)
    t = _noise_tile()
    mixed = (t[i0, j0] * (1 - fu) + t[i0, j1] * fu) * (1 - fv) + (t[i1, j0] * (1 - fu) + t[i1, j1] * fu) * fv
    return np.asarray(mixed, dtype=np.float32)


def _facet_noise(point: Array32, normal: Array32, scale: float) -> Array32:
    """Noise on a surface, laid along the two axes that its normal crosses most."""
    axis = np.abs(normal).argmax(1)
    u = np.where(axis == 0, point[:, 1], point[:, 0])
    v = np.where(axis == 2, point[:, 1], point[:, 2])
    return noise(u, v, scale)


def _hash(a: NDArray[np.int64]) -> Array32:
    """Integers to numbers in 0..1 that look random."""
    h = (a * 2654435761) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 2246822519) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 3266489917) & 0xFFFFFFFF
    return np.asarray((h ^ (h >> 16)) / 4294967296.0, dtype=np.float32)


class Shader:
    """Colours for one state; thread-safe once built."""

    def __init__(self, state: SceneState, caster: Caster) -> None:
        self.state, self.caster, self.layout = state, caster, state.layout
        self.night = float(state.night)
        day, clear = 1 - self.night, self.layout.sky
        self.sun = np.array(self.layout.sun, dtype=np.float32)
        warm = 1 - self.sun[2]
        self.sunlight = np.array([3.5, 3.2 - 0.5 * warm, 2.75 - 1.2 * warm], dtype=np.float32) * _F(
            (0.12 + 0.88 * clear) * day**2
        )
        ambient = np.array([0.46, 0.56, 0.74]) * clear + np.array([1.1, 1.13, 1.17]) * (1 - clear)
        self.ambient = (ambient * (day**1.5 + 0.035 * self.night * np.array([0.7, 0.8, 1.2]))).astype(np.float32)
        zenith = np.array([0.16, 0.33, 0.78]) * clear + np.array([0.62, 0.67, 0.74]) * (1 - clear)
        horizon = np.array([0.80, 0.90, 1.02]) * clear + np.array([0.86, 0.89, 0.93]) * (1 - clear)
        dark = np.array([0.035, 0.032, 0.04])
        self.zenith = (zenith * 1.15 * day**2 + dark * 0.35 * self.night).astype(np.float32)
        self.horizon = (horizon * 1.25 * day**2 + dark * self.night).astype(np.float32)
        fog_color = np.array([0.80, 0.82, 0.85]) * (1.1 * day**2) + dark * 1.2 * self.night
        self.haze = (self.horizon * (1 - min(1.0, state.fog * 5)) + fog_color * min(1.0, state.fog * 5)).astype(
            np.float32
        )
        self.extinction = _F(1 / 900 + 0.075 * state.fog**1.5)
        self.exposure = 1.02 + 1.4 * self.night
        self._contact = self._contact_shadows()

    # Sky and air ------------------------------------------------------------------------------------------------

    def sky(self, direction: Array32, clouds: bool = True) -> Array32:
        """Colour of the sky along unit directions [N, 3]."""
        up = np.clip(direction[:, 2], 0, 1)
        mix = np.sqrt(up)[:, None]
        color = self.horizon * (1 - mix) + self.zenith * mix
        glow = np.maximum(direction @ self.sun, 0)
        color = color + self.sunlight * (0.10 * glow**8 + 3.0 * glow**900)[:, None] * _F(self.layout.sky)
        if clouds:
            reach = 1 / np.maximum(up + 0.12, 0.02)
            x, y = direction[:, 0] * reach + _F(self.layout.seed % 97), direction[:, 1] * reach
            cover = np.clip(1.0 * smooth_noise(x, y, 0.03) - 0.1, 0, 1.4) * np.clip(up * 6, 0, 1)
            white = (self.ambient * 1.15 + self.sunlight * 0.1) * _F(0.95)
            color += (white - color) * (0.55 * cover.clip(0, 1))[:, None]
        return np.asarray(color, dtype=np.float32)

    def shade(self, rays: Array32, hits: Hits, pixel: float) -> Array32:
        """Linear colours [N, 3] that rays see; pixel is the size of a pixel at depth 1, for texture detail."""
        out = np.empty((len(rays), 3), dtype=np.float32)
        direction = rays[:, 3:]
        length = np.sqrt((direction * direction).sum(1))
        unit = direction / length[:, None]
        found = hits.face >= 0
        empty = np.flatnonzero(~found)
        out[empty] = self._aired(self.sky(unit[empty]), np.full(len(empty), 600, _F), sky=True)
        index = np.flatnonzero(found)
        view, face = unit[index], hits.face[index]
        distance = hits.distance[index] * length[index]
        point = rays[index, :3] + view * distance[:, None]
        out[index] = self._aired(self._surface(point, view, face, distance, pixel), distance)
        return out

    def _aired(self, color: Array32, distance: Array32, sky: bool = False) -> Array32:
        """Colour after the air between: haze always, fog on top."""
        if sky and self.state.fog == 0:
            return color
        clear = np.exp(-self.extinction * distance)[:, None]
        return np.asarray(color * clear + self.haze * (1 - clear), dtype=np.float32)

    # Surfaces ---------------------------------------------------------------------------------------------------

    def _surface(self, point: Array32, view: Array32, face: IntArray, distance: Array32, pixel: float) -> Array32:
        mesh = self.caster.mesh
        material, normal = mesh.material[face], self.caster.normal[face]
        facing = (normal * view).sum(1)
        normal = normal * np.where(facing > 0, _F(-1), _F(1))[:, None]
        cosine = np.abs(facing)
        base = mesh.color[face].copy()
        groups = {m: np.flatnonzero(material == m) for m in np.unique(material).tolist()}
        shine = np.zeros(len(face), dtype=np.float32)
        ambient_loss = np.ones(len(face), dtype=np.float32)
        emission = np.zeros((len(face), 3), dtype=np.float32)
        for m, i in groups.items():
            if m == Material.GROUND:
                base[i], ambient_loss[i] = self._ground(point[i], normal[i], distance[i], cosine[i], pixel)
            elif m == Material.FACADE:
                base[i], shine[i], emission[i] = self._facade(point[i], normal[i], face[i], distance[i])
            elif m == Material.FOLIAGE:
                p = point[i]
                grain = _facet_noise(p, normal[i], 0.07) * np.exp(-distance[i] / 60)
                base[i] *= (1 + 0.38 * grain)[:, None].clip(0.2, 2)
                normal[i] = _jittered(normal[i], p, 0.45)
            elif m in (Material.MATTE, Material.CLOTH, Material.BARK, Material.ROOF, Material.RUBBER):
                p = point[i]
                base[i] *= (1 + 0.07 * _facet_noise(p, normal[i], 0.03))[:, None]
            elif m in (Material.PAINT, Material.GLASS, Material.METAL):
                shine[i] = {Material.PAINT: 0.045, Material.GLASS: 0.09, Material.METAL: 0.12}[Material(m)]
            elif m in (Material.HEADLIGHT, Material.TAILLIGHT, Material.LAMP, Material.SIGNAL):
                lit, dark = {
                    Material.HEADLIGHT: (0.2, 4.0),
                    Material.TAILLIGHT: (0.25, 2.2),
                    Material.LAMP: (0.0, 5.0),
                }.get(Material(m), (1.3, 1.6))
                emission[i] = base[i] * _F(lit + (dark - lit) * self.night)
        color = base * self._light(point, normal, ambient_loss) + emission
        return self._polished(color, point, normal, view, cosine, shine)

    def _light(self, point: Array32, normal: Array32, ambient_loss: Array32) -> Array32:
        """Light that falls on surfaces: sky, bounce from the ground, sun with cast shadows, lamps and headlights."""
        height = normal[:, 2]
        light = self.ambient * ((0.60 + 0.40 * height) * ambient_loss)[:, None]
        bounce = self.sunlight * _F(0.055 * self.sun[2])
        light += bounce * ((1 - height) * ambient_loss)[:, None]
        slope = normal @ self.sun
        if self.sunlight[0] > 0.02:
            lit = np.flatnonzero(slope > 0)
            start = point[lit] + normal[lit] * _F(0.02) + self.sun * _F(0.01)
            rays = np.concatenate([start, np.broadcast_to(self.sun, start.shape)], 1)
            lit = lit[~self.caster.blocked(rays)]
            light[lit] += self.sunlight * slope[lit, None]
        if self.night > 0.02:
            light += self._lamps(point, normal)
        return np.asarray(light, dtype=np.float32)

    def _lamps(self, point: Array32, normal: Array32) -> Array32:
        """Street lamps as light on the ground that fades upwards, and the ego vehicle's headlights."""
        lamps = self.caster.static.lamps
        i = np.clip(point[:, 1].astype(np.int32), 0, lamps.shape[0] - 1)
        j = np.clip(point[:, 0].astype(np.int32), 0, lamps.shape[1] - 1)
        fade = (0.45 + 0.55 * np.maximum(normal[:, 2], 0)) * np.clip(1.15 - point[:, 2] / 9, 0.06, 1)
        light = np.array([1.0, 0.72, 0.42], _F) * (1.5 * lamps[i, j] * fade)[:, None]
        pose = self.state.ego_pose.astype(np.float32)
        local = (point - pose[:3, 3]) @ pose[:3, :3] - np.array([3.4, 0, 0.7], _F)
        reach = np.linalg.norm(local, axis=1) + _F(0.1)
        beam = np.exp(-((local[:, 1] / (0.30 * reach)) ** 2)) * np.exp(
            -((np.maximum(local[:, 2] / reach + 0.02, 0) / 0.09) ** 2)
        )
        beam *= (local[:, 0] > 0) * np.abs((normal * (local / reach[:, None]) @ pose[:3, :3].T).sum(1)).clip(0.12, 1)
        light += np.array([1.0, 0.95, 0.85], _F) * (beam * 3.2 / (1 + (reach / 11) ** 2))[:, None]
        return np.asarray(light * _F(self.night), dtype=np.float32)

    def _polished(
        self, color: Array32, point: Array32, normal: Array32, view: Array32, cosine: Array32, shine: Array32
    ) -> Array32:
        """Reflections of the sky, and the sun's glint, on what shines."""
        i = np.flatnonzero(shine > 0)
        mirror = view[i] - 2 * (view[i] * normal[i]).sum(1)[:, None] * normal[i]
        mirror = _jittered(mirror, point[i], 0.02)
        fresnel = shine[i] + (1 - shine[i]) * (1 - cosine[i]) ** 5 * 0.75
        seen = self.sky(mirror, clouds=False)
        # Rays that go down, or along the street, meet houses and asphalt rather than sky.
        town = np.clip(0.55 - 2.2 * mirror[:, 2], 0, 1)[:, None]
        seen = seen * (1 - town) + self.ambient * _F(0.22) * town
        glint = np.maximum(mirror @ self.sun, 0) ** 120
        color[i] = (
            color[i] * (1 - fresnel[:, None])
            + seen * fresnel[:, None]
            + self.sunlight * (glint * shine[i] * 6)[:, None]
        )
        return color

    # Ground -----------------------------------------------------------------------------------------------------

    def _contact_shadows(self) -> tuple[Array32, float, float, float]:
        """Share of the sky's light that reaches the ground around and below agents: a map with origin x, y, cell."""
        cell, half = 0.2, 60.0
        x0, y0 = self.state.ego_pose[0, 3] - half, self.state.ego_pose[1, 3] - half
        size = int(2 * half / cell)
        cover = np.zeros((size, size), dtype=np.float32)
        for a in self.state.agents:
            if abs(a.x - x0 - half) < half and abs(a.y - y0 - half) < half:
                quad = corners_of(np.array(a.x), np.array(a.y), np.array(a.yaw), a.size[0], a.size[1])
                weight = 0.85 if a.size[1] > 1 and a.size[0] > 1 else 0.5
                cv2.fillPoly(cover, [np.round((quad - (x0, y0)) / cell * 16).astype(np.int32)], [weight], cv2.LINE_8, 4)
        soft = 0.55 * cv2.GaussianBlur(cover, (0, 0), 1.6) + 0.45 * cv2.GaussianBlur(cover, (0, 0), 4.0)
        return np.asarray(1 - soft, dtype=np.float32), float(x0), float(y0), cell

    def _ground(
        self, p: Array32, normal: Array32, distance: Array32, cosine: Array32, pixel: float
    ) -> tuple[Array32, Array32]:
        """Colour of the ground and the share of the sky's light that reaches it."""
        static, layout = self.caster.static, self.layout
        footprint = distance * _F(pixel) / np.maximum(cosine, 0.03) ** 0.55
        level = np.clip(np.log2(np.maximum(footprint / layout.cell, 1)) + 0.3, 0, len(static.starts) - 1).astype(
            np.int64
        )
        size = (layout.cell * 2.0**level).astype(np.float32)
        color = _looked_up(static, level, p[:, 1] / size - _F(0.5), p[:, 0] / size - _F(0.5))
        label = layout.label(p[:, 0], p[:, 1])
        detail = np.exp(-distance / 22)
        x, y = p[:, 0], p[:, 1]
        grain = noise(x, y, 0.02) * detail
        stain = noise(x, y, 0.17)
        grass = label == GRASS
        factor = 1 + np.where(grass, 0.25, 0.10) * grain + np.where(grass, 0.16, 0.075) * stain
        worn = (color.min(1) > 0.35) | (label == BIKELANE)  # Paint wears off in patches.
        factor -= worn * np.clip(noise(x, y, 0.06) - 0.9, 0, 1) * 0.35
        joints = (label == PAVING) & (p[:, 2] > 0.5 * KERB) & (distance < 30)
        seam = joints & ((np.mod(x, 0.9) < 0.035) | (np.mod(y, 0.9) < 0.035))
        factor -= seam * (0.28 * np.clip(1 - distance / 30, 0, 1))
        vertical = normal[:, 2] < 0.5
        color[vertical] = (0.40, 0.39, 0.37)
        contact, x0, y0, cell = self._contact
        a, b = ((y - y0) / cell).astype(np.int32), ((x - x0) / cell).astype(np.int32)
        near = (a >= 0) & (b >= 0) & (a < len(contact)) & (b < len(contact))
        share = np.where(near, contact[a.clip(0, len(contact) - 1), b.clip(0, len(contact) - 1)], _F(1))
        return np.asarray(color * factor.clip(0.3, 1.7)[:, None], dtype=np.float32), np.asarray(share, dtype=np.float32)

    # Houses -----------------------------------------------------------------------------------------------------

    def _facade(
        self, p: Array32, normal: Array32, face: IntArray, distance: Array32
    ) -> tuple[Array32, Array32, Array32]:
        """Walls with brick courses, rows of framed windows and shop fronts: colour, shine and light of its own."""
        static = self.caster.static
        building = self.caster.building[face]
        seed, axis = static.seeds[building], static.axis[building]
        offset = p[:, :2] - static.middle[building]
        along = np.abs((normal[:, :2] * axis).sum(1)) < 0.5
        cross_axis = np.stack([-axis[:, 1], axis[:, 0]], -1)
        u = np.where(along, (offset * axis).sum(1), (offset * cross_axis).sum(1))
        z = p[:, 2]
        base = self.caster.mesh.color[face].copy()
        fade = np.exp(-distance / 18)
        course = (np.mod(z, 0.16) < 0.025) | (np.mod(u + 0.5 * 0.42 * np.mod(np.floor(z / 0.16), 2), 0.42) < 0.02)
        brick = _hash(seed) < 0.55
        base *= (1 - 0.22 * (course & brick) * fade + 0.05 * noise(u, z, 0.05) + 0.05 * noise(u, z, 0.4))[:, None]
        base *= np.clip(0.78 + z / 9, 0.78, 1)[:, None]  # Dirt gathers near the ground.
        pitch, storey = 2.4 + 1.2 * _hash(seed + 1), _F(3.3)
        floor = np.floor(z / storey)
        column = np.floor(u / pitch + 100.5)
        du, dz = u - (column - 100) * pitch, z - floor * storey
        shop = (floor < 1) & (_hash(seed + 5) < 0.7) & along
        half = np.where(shop, 0.44 * pitch, (0.22 + 0.12 * _hash(seed + 2)) * pitch)
        low, high = np.where(shop, 0.45, 0.95), np.where(shop, 2.75, 2.45)
        pane = (np.abs(du) < half) & (dz > low) & (dz < high) & (np.abs(normal[:, 2]) < 0.5)
        frame = (
            (np.abs(du) < half + 0.09) & (dz > low - 0.09) & (dz < high + 0.09) & ~pane & (np.abs(normal[:, 2]) < 0.5)
        )
        frame |= pane & (((np.abs(du) < 0.035) | (np.abs(dz - 1.9) < 0.03)) & (distance < 45))
        pane &= ~frame
        trim = np.where(
            (_hash(seed + 3) < 0.6)[:, None], np.array([0.52, 0.5, 0.46], _F), np.array([0.1, 0.1, 0.11], _F)
        )
        base = np.where(frame[:, None], trim, base)
        which = _hash(seed * 31 + column.astype(np.int64) * 977 + floor.astype(np.int64) * 131 + along * 7)
        curtain = np.where((which < 0.3)[:, None], np.array([0.32, 0.29, 0.24], _F), np.array([0.03, 0.04, 0.05], _F))
        depth = np.clip((high - dz) / (high - low), 0, 1)  # The lintel shades a window's top.
        base = np.where(pane[:, None], curtain * (0.6 + 0.4 * depth)[:, None], base)
        glow = pane & (which > 0.62)
        emission = np.where(glow[:, None], np.array([1.0, 0.72, 0.38], _F) * (0.25 + 0.5 * which)[:, None], _F(0)) * _F(
            self.night * 0.7
        )
        return base.astype(np.float32), (pane * _F(0.14)).astype(np.float32), emission.astype(np.float32)


def _looked_up(static: Static, level: NDArray[np.int64], row: Array32, column: Array32) -> Array32:
    """Ground colours [N, 3] between the four nearest cells of each point's level; grass outside."""
    i, j = np.floor(row).astype(np.int64), np.floor(column).astype(np.int64)
    rows, columns, start = static.shapes[level, 0], static.shapes[level, 1], static.starts[level]
    inside = (i >= 0) & (j >= 0) & (i < rows - 1) & (j < columns - 1)
    base = np.where(inside, start + i * columns + j, 0)
    below = np.where(inside, columns, 0)
    fi, fj = (row - i)[:, None].astype(np.float32), (column - j)[:, None].astype(np.float32)
    levels = static.levels
    upper = levels[base] * (1 - fj) + levels[base + 1] * fj
    lower = levels[base + below] * (1 - fj) + levels[base + below + 1] * fj
    color = (upper * (1 - fi) + lower * fi) * _F(1 / 255)
    color[~inside] = GRASS_COLOR
    return np.asarray(color, dtype=np.float32)


def _jittered(vector: Array32, point: Array32, amount: float) -> Array32:
    """Unit vectors turned a little by noise at their points."""
    a = noise(point[:, 0] + point[:, 2], point[:, 1], 0.11)
    b = noise(point[:, 1] - point[:, 2], point[:, 0] + 3, 0.11)
    moved = vector + _F(amount) * np.stack([a, b, a - b], -1)
    return np.asarray(moved / np.linalg.norm(moved, axis=1, keepdims=True), dtype=np.float32)
