"""Camera images of a state: primary rays, procedural surfaces, sun with shadows, lamps, haze and the camera itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdlab.data.simulate_config import Array, Array32, IntArray, Rig, Sensor, SimulationConfig
from kdlab.data.simulate_sensors import Caster, Hits
from kdlab.data.simulate_shading import Shader
from kdlab.data.simulate_world import SceneState

# Sub-pixel places of the extra rays on edges; the first ray went through the pixel's middle.
_EXTRA = ((-0.33, -0.17), (0.17, -0.33), (0.30, 0.30))


@dataclass(frozen=True)
class CameraImage:
    """One rendered image.

    Attributes:
        image: RGB uint8 [H, W, 3].
        instances: Int32 [H, W]: index of the agent in each pixel, -1 for none.
        depth: Float32 [H, W]: distance along the ray's direction of unit depth, in metres; inf for the sky.
    """

    image: NDArray[np.uint8]
    instances: IntArray
    depth: Array32


def render_cameras(
    state: SceneState,
    rig: Rig,
    config: SimulationConfig,
    rng: np.random.Generator,
    caster: Caster | None = None,
    threads: int = 1,
) -> dict[str, CameraImage]:
    """Images of every camera in the rig.

    Args:
        state: The world at the cameras' time.
        rig: True calibrations; other sensors than cameras are passed over.
        config: Image size, noise, antialiasing.
        rng: Sensor noise; the same generator state gives the same images, whatever the number of threads.
        caster: The state's triangles, if the caller has them already.
        threads: Cameras rendered at the same time.
    """
    shader = Shader(state, caster or Caster(state))
    cameras = [sensor for sensor in rig.values() if sensor.intrinsic is not None]
    noises = rng.spawn(len(cameras))

    def one(item: tuple[Sensor, np.random.Generator]) -> CameraImage:
        return _render(shader, item[0], config, item[1])

    work = list(zip(cameras, noises, strict=True))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            images = list(pool.map(one, work))
    else:
        images = [one(item) for item in work]
    return {sensor.channel: image for sensor, image in zip(cameras, images, strict=True)}


def _rays(state: SceneState, sensor: Sensor, u: Array, v: Array) -> Array32:
    """World rays [N, 6] through pixels; directions have depth 1, so that hit distances are depths."""
    assert sensor.intrinsic is not None
    k = sensor.intrinsic
    pose = state.ego_pose @ sensor.ego_from_sensor
    local = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones_like(u)], -1)
    rays = np.empty((len(u), 6), dtype=np.float32)
    rays[:, :3], rays[:, 3:] = pose[:3, 3], local @ pose[:3, :3].T
    return rays


def _render(shader: Shader, sensor: Sensor, config: SimulationConfig, rng: np.random.Generator) -> CameraImage:
    assert sensor.intrinsic is not None
    height, width = config.image_height, config.image_width
    v, u = (grid.ravel().astype(np.float64) for grid in np.mgrid[:height, :width])
    rays = _rays(shader.state, sensor, u, v)
    hits = shader.caster.cast(rays)
    pixel = float(1 / sensor.intrinsic[0, 0])
    light = shader.shade(rays, hits, pixel)
    owner = np.where(hits.face >= 0, shader.caster.agent[hits.face], np.int32(-1)).astype(np.int32)
    if config.antialias:
        edge = np.flatnonzero(_edges(shader, hits, owner, (height, width)))
        more = np.concatenate([_rays(shader.state, sensor, u[edge] + du, v[edge] + dv) for du, dv in _EXTRA])
        extra = shader.shade(more, shader.caster.cast(more), pixel)
        # Averaged after tone mapping: a bright lamp then has no jagged rim.
        tones = develop(extra, shader.exposure).reshape(len(_EXTRA), -1, 3)
        tone = develop(light, shader.exposure)
        tone[edge] = (tone[edge] + tones.sum(0)) / (len(_EXTRA) + 1)
    else:
        tone = develop(light, shader.exposure)
    image = _expose(tone.reshape(height, width, 3), config, shader.state.night, rng)
    return CameraImage(image, owner.reshape(height, width), hits.distance.reshape(height, width))


def _edges(shader: Shader, hits: Hits, owner: IntArray, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels whose neighbour to the right or below shows another surface."""
    face = np.maximum(hits.face, 0)
    material = np.where(hits.face >= 0, shader.caster.mesh.material[face], 255).astype(np.int32)
    key = (owner * 512 + material).reshape(shape)
    depth = np.where(hits.face >= 0, hits.distance, 1e4).reshape(shape)
    code = (np.round(shader.caster.mesh.color[face] @ np.array([31.0, 57.0, 83.0], np.float32), 1)).reshape(shape)
    edge = np.zeros(shape, dtype=bool)
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        differs = (key[a] != key[b]) | (code[a] != code[b])
        differs |= np.abs(depth[a] - depth[b]) > 0.12 * np.minimum(depth[a], depth[b]) + 0.1
        differs &= ~((material.reshape(shape)[a] == 9) & (material.reshape(shape)[b] == 9))
        edge[a] |= differs
        edge[b] |= differs
    return edge.ravel()


def develop(light: Array32, exposure: float) -> Array32:
    """Linear light to display values in 0..1: a soft shoulder, then gamma."""
    tone = 1 - np.exp(-exposure * np.maximum(light, 0))
    return np.asarray(np.sqrt(tone) ** np.float32(0.93), dtype=np.float32)


def _expose(tone: Array32, config: SimulationConfig, night: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The camera: slight vignette and sensor noise."""
    height, width = tone.shape[:2]
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)
    tone = tone * (1 - 0.10 * (x * x + y * y))[..., None]
    level = config.image_noise * (0.008 + 0.022 * night)
    if level > 0:
        tone = tone + rng.standard_normal(tone.shape, dtype=np.float32) * np.float32(level)
    return np.asarray((tone * 255 + 0.5).clip(0, 255), dtype=np.uint8)
