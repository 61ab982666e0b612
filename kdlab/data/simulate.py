"""A seeded driving world written as a nuScenes-format data set.

`simulate` writes a whole data set; `scene_at`, `render_lidar` and `render_cameras` give single moments of it, which may
be changed (objects moved, fog and night set) before they are rendered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from kdlab.data.simulate_camera import CameraImage, render_cameras
from kdlab.data.simulate_config import (
    CAMERAS,
    LIDAR,
    VERSION,
    SimulationConfig,
    camera_offsets,
    real_rig,
    rng_of,
    written_rig,
)
from kdlab.data.simulate_layout import ASPHALT, BIKELANE, MANHOLE, PARKING, PATCH, WHITE, YELLOW, Layout
from kdlab.data.simulate_sensors import Caster, points_in_boxes, render_lidar, rolling_sweep, visible_shares
from kdlab.data.simulate_tables import (
    SceneTables,
    Tables,
    describe,
    microseconds,
    scene_name,
    write_atomic,
    write_json,
    write_tables,
)
from kdlab.data.simulate_world import KEYFRAME_STEP, Agent, SceneState, scene_at

__all__ = [
    "Agent", "CameraImage", "SceneState", "SimulationConfig", "real_rig", "render_cameras", "render_lidar", "scene_at",
    "simulate", "written_rig",
]  # fmt: skip

_PARTS = ".parts"


class _StoppedError(Exception):
    """Another process asked this one to stop."""


_stop: Any = None
_done: Any = None


def simulate(
    out: Path,
    config: SimulationConfig,
    workers: int | None = None,
    progress: bool = True,
    only: Collection[str] | None = None,
) -> Path:
    """Write a simulated data set in the nuScenes format, or continue one that was interrupted.

    The same settings give the same bytes on the same machine, whatever the number of workers.

    Args:
        out: Folder of the data set (its "dataroot"); the tables go to its folder v1.0-sim.
        config: All settings.
        workers: Processes; by default one per processor core, at most one per scene.
        progress: Show a progress bar.
        only: Names of the scenes to write, such as scene-0001; the whole world where left out. Their files are those
            of the whole world, and tables and splits hold these scenes alone.

    Returns:
        The folder.

    Raises:
        ValueError: Settings that cannot work, a scene that the world has not, or a folder that holds something else or
            another selection of scenes.
        OSError: The folder cannot be written to, or the disk is full.
    """
    config.check()
    out = Path(out)
    chosen = _chosen(config, only)
    record = _record(config, chosen)
    with _clear_disk_errors(out):
        if _prepare(out, record):
            return out
        todo = [k for k in chosen if _part(out, config, k) is None]
        if todo:
            _run(out, config, todo, workers, progress)
        parts = [part for k in chosen if (part := _part(out, config, k)) is not None]
        write_tables(out, parts, config.scenes)
        write_json(out / VERSION / "simulation.json", {**record, "complete": True}, indent=1)
    return out


def _chosen(config: SimulationConfig, only: Collection[str] | None) -> list[int]:
    """Indices of the scenes to write, in order."""
    names = [scene_name(k) for k in range(config.scenes)]
    if only is None:
        return list(range(config.scenes))
    unknown = sorted(set(only) - set(names))
    if unknown or not only:
        which = f"no scene {', '.join(unknown)}" if unknown else "scenes to write, but none is named"
        raise ValueError(f"the world has {which}; its scenes are {names[0]} to {names[-1]}")
    return [k for k, name in enumerate(names) if name in only]


@contextlib.contextmanager
def _clear_disk_errors(out: Path) -> Iterator[None]:
    """Say what to do about a full disk or a folder without permission."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, f"the disk of {out} is full; free some space and run again: finished scenes are kept"
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError) or error.errno == errno.EROFS:
            raise OSError(error.errno, f"cannot write to {out}; choose a folder that you may write to") from error
        raise


def _record(config: SimulationConfig, chosen: list[int]) -> dict[str, Any]:
    """What the folder says of itself until it is complete; a part of a world names its scenes."""
    record = {"digest": config.digest(), "complete": False, "config": dataclasses.asdict(config)}
    whole = len(chosen) == config.scenes
    return record if whole else {**record, "scenes": [scene_name(k) for k in chosen]}


def _prepare(out: Path, wanted: dict[str, Any]) -> bool:
    """Make the folders; True where the same data set is already complete."""
    record = out / VERSION / "simulation.json"
    if record.exists():
        known = json.loads(record.read_text())
        if known["digest"] != wanted["digest"]:
            old, new = known["config"], wanted["config"]
            other = (
                ", ".join(f"{k}={old.get(k)} (now {v})" for k, v in new.items() if old.get(k) != v)
                or "another version of the simulator"
            )
            raise ValueError(
                f"{out} holds a simulation with other settings: {other}. Choose another folder, or delete this one."
            )
        if known.get("scenes") != wanted.get("scenes"):
            held, now = (" ".join(r.get("scenes", ["the whole world"])) for r in (known, wanted))
            raise ValueError(
                f"{out} holds another part of the world: {held} (now {now}). Choose another folder, or delete this one."
            )
        if known["complete"]:
            return True
    elif out.exists() and any(p.name != VERSION for p in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no simulation. Choose another folder, or delete this one.")
    # The record comes first: a folder that a kill left without it could not be told from somebody else's.
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, wanted, indent=1)
    for name in (VERSION, "maps", _PARTS, f"sweeps/{LIDAR}", *(f"samples/{c}" for c in (*CAMERAS, LIDAR))):
        (out / name).mkdir(parents=True, exist_ok=True)
        for leftover in (out / name).glob(".*.tmp"):  # From a run that was killed.
            leftover.unlink(missing_ok=True)
    return False


def _part_path(out: Path, scene_index: int) -> Path:
    return out / _PARTS / f"{scene_name(scene_index)}.json"


def _part(out: Path, config: SimulationConfig, scene_index: int) -> Tables | None:
    """A finished scene's rows, None where it is not finished."""
    path = _part_path(out, scene_index)
    if not path.exists():
        return None
    part = json.loads(path.read_text())
    tables: Tables = part["tables"]
    return tables if part["digest"] == config.digest() else None


# Processes ----------------------------------------------------------------------------------------------------------


def _run(out: Path, config: SimulationConfig, todo: list[int], workers: int | None, progress: bool) -> None:
    """Render scenes in worker processes, always fresh ones, so that their libraries' settings are always the same."""
    from tqdm import tqdm

    cores = os.cpu_count() or 1
    count = min(workers or cores, len(todo))
    if count < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    context = multiprocessing.get_context("spawn")
    stop, done = context.Event(), context.Value("i", 0)
    bar = tqdm(total=len(todo) * config.keyframes, desc="simulate", unit="keyframe", disable=not progress)
    with _single_threaded_libraries():
        pool = ProcessPoolExecutor(count, context, _start_worker, (stop, done))
        futures: set[Future[None]] = {
            pool.submit(_simulate_scene, str(out), config, k, max(1, cores // count)) for k in todo
        }
    try:
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=0.3, return_when=FIRST_EXCEPTION)
            if done.value > bar.n:
                bar.update(done.value - bar.n)
            for future in finished:
                future.result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        bar.update(done.value - bar.n)
        bar.close()


@contextlib.contextmanager
def _single_threaded_libraries() -> Iterator[None]:
    """Linear algebra on one thread in the processes started inside: parallelism comes from scenes and cameras."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start_worker(stop: Any, done: Any) -> None:
    global _stop, _done
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent hears Ctrl-C and asks workers to stop between keyframes.
    cv2.setNumThreads(1)
    _stop, _done = stop, done


def _simulate_scene(out: str, config: SimulationConfig, scene_index: int, threads: int) -> None:
    """Render one scene and write its part file."""
    writer = _SceneWriter(Path(out), config, scene_index, threads)
    for keyframe in range(config.keyframes):
        if _stop is not None and _stop.is_set():
            raise _StoppedError
        writer.keyframe(keyframe)
        if _done is not None:
            with _done.get_lock():
                _done.value += 1
    writer.finish()


class _SceneWriter:
    """Renders a scene's keyframes and sweeps to files and collects its rows."""

    def __init__(self, out: Path, config: SimulationConfig, scene_index: int, threads: int) -> None:
        self.out, self.config, self.index, self.threads = out, config, scene_index, threads
        self.rig, self.tables = real_rig(config), SceneTables(config, scene_index)

    def _state(self, time: float) -> SceneState:
        return scene_at(self.config, self.index, time)

    def _stem(self, channel: str, time: float) -> str:
        return f"{scene_name(self.index)}__{channel}__{microseconds(self.index, time)}"

    def keyframe(self, k: int) -> None:
        """Render a keyframe and the sweeps up to the next one."""
        config, time = self.config, k * KEYFRAME_STEP
        state = self._state(time)
        caster = Caster(state, self.threads)
        points = self._sweep(
            k, time + config.lidar_time_offset, True, caster if config.lidar_time_offset == 0 else None
        )
        self._cameras(k, caster)
        ego = state.ego_pose[:2, 3]
        agents = [a for a in state.agents if np.hypot(a.x - ego[0], a.y - ego[1]) < config.annotation_range]
        shares = visible_shares(state, self.rig, config, caster)
        self.tables.add_annotations(k, agents, points_in_boxes(points, agents).tolist(), shares)
        if k + 1 < config.keyframes:
            for j in range(1, config.sweeps_per_keyframe):
                moment = time + j * KEYFRAME_STEP / config.sweeps_per_keyframe
                near = k if j * 2 <= config.sweeps_per_keyframe else k + 1
                self._sweep(near, moment + config.lidar_time_offset, False, None)

    def _sweep(self, k: int, time: float, key: bool, caster: Caster | None) -> Any:
        """Write one LiDAR sweep; returns its points [P, 3] in the world."""
        config, state = self.config, self._state(time)
        rng = rng_of(config.seed, self.index, LIDAR, round(time * 1e6))
        if config.lidar_rolling:
            points, _ = rolling_sweep(self._state, time, self.rig, config, rng)
        else:
            points, _ = render_lidar(state, self.rig, config, rng, caster or Caster(state, self.threads))
        name = f"{'samples' if key else 'sweeps'}/{LIDAR}/{self._stem(LIDAR, time)}.pcd.bin"
        write_atomic(self.out / name, points.tobytes())
        self.tables.add_data(LIDAR, k, time, name, state, key)
        pose = state.ego_pose @ self.rig[LIDAR].ego_from_sensor
        return points[:, :3].astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]

    def _cameras(self, k: int, caster: Caster) -> None:
        for channel, time, state, result in images_at(self._state, self.config, self.index, k, caster, self.threads):
            name = f"samples/{channel}/{self._stem(channel, time)}.jpg"
            write_atomic(self.out / name, jpeg(result))
            self.tables.add_data(channel, k, time, name, state, True)

    def finish(self) -> None:
        """Write the scene's map mask and, last, its part file."""
        state = self._state(0.0)
        write_atomic(self.out / self.tables.map_file, _map_mask(state.layout))
        tables = self.tables.finish(describe(self.config, self.index, state.agents))
        write_json(_part_path(self.out, self.index), {"digest": self.config.digest(), "tables": tables})


def images_at(
    state_at: Callable[[float], SceneState],
    config: SimulationConfig,
    scene_index: int,
    keyframe: int,
    caster: Caster,
    threads: int = 1,
) -> Iterator[tuple[str, float, SceneState, CameraImage]]:
    """Render the cameras of a keyframe, each at its own moment.

    Args:
        state_at: State of the scene at a time in seconds.
        config: All settings.
        scene_index: Which scene; with the keyframe it decides the noise.
        keyframe: Which keyframe.
        caster: The triangles at the keyframe's time.
        threads: Cameras rendered at the same time.

    Yields:
        Channel, time in seconds, state at that time and image.
    """
    rig, time = real_rig(config), keyframe * KEYFRAME_STEP
    if config.camera_time_offset == 0:
        groups = [((*CAMERAS,), time)]
    else:
        offsets = camera_offsets(config, scene_index)
        groups = [((c,), time + offsets[c]) for c in CAMERAS]
    for channels, moment in groups:
        state = state_at(moment)
        rng = rng_of(config.seed, scene_index, keyframe, *channels)
        known = caster if config.camera_time_offset == 0 else Caster(state, threads)
        images = render_cameras(state, {c: rig[c] for c in channels}, config, rng, known, threads)
        for channel, result in images.items():
            yield channel, moment, state, result


def jpeg(result: CameraImage) -> bytes:
    """An image as the data set holds it."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(result.image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _map_mask(layout: Layout) -> bytes:
    """The drivable ground as nuScenes keeps it: PNG, 0.1 m a pixel, 255 drivable, y upwards."""
    import cv2
    from PIL import Image

    drivable = (
        np.isin(layout.ground, [ASPHALT, WHITE, YELLOW, BIKELANE, PATCH, PARKING, MANHOLE]).astype(np.uint8) * 255
    )
    rows, columns = (round(n * layout.cell / 0.1) for n in drivable.shape)
    mask = cv2.resize(drivable, (columns, rows), interpolation=cv2.INTER_NEAREST)[::-1]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask)).save(buffer, "PNG", optimize=False)
    return buffer.getvalue()
