"""The notebooks' room: a small part of the demo's world, made once by whoever comes first."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdlab.classroom as classroom
from kdlab.classroom import FAST_SCENES, SCENES, Room, open_room
from kdlab.data.simulate import SimulationConfig
from kdlab.data.simulate_tables import splits_of
from kdlab.demo import WORLD

SMALL = SimulationConfig(
    scenes=4, keyframes=2, image_width=96, image_height=54, sweeps_per_keyframe=2, lidar_azimuth_steps=180
)


@pytest.fixture(scope="module")
def small_world() -> Iterator[pytest.MonkeyPatch]:
    """A world of four scenes in the place of the demo's, the test environment of the notebooks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classroom, "WORLD", SMALL)
        patch.setattr(classroom, "FAST_SCENES", ("scene-0001", "scene-0004"))
        patch.setattr(classroom, "SCENES", ("scene-0001", "scene-0002", "scene-0003", "scene-0004"))
        patch.setenv("KDLAB_FAST", "1")
        yield patch


@pytest.fixture(scope="module")
def room(small_world: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Room:
    out = tmp_path_factory.mktemp("room")
    small_world.setenv("KDLAB_OUT", str(out))
    return open_room()


def test_the_scenes_are_of_the_splits_that_are_promised() -> None:
    splits = splits_of(WORLD.scenes)
    count = {name: len(set(SCENES) & set(scenes)) for name, scenes in splits.items()}
    assert count == {"sim_train": 2, "sim_val": 1, "sim_test": 1}
    count = {name: len(set(FAST_SCENES) & set(scenes)) for name, scenes in splits.items()}
    assert count == {"sim_train": 1, "sim_val": 0, "sim_test": 1}


def test_opens_on_a_part_of_the_world_that_keeps_its_name(room: Room) -> None:
    assert room.fast and room.steps(100) == 2 and room.steps(100, fast=5) == 5
    assert dataclasses.replace(room, fast=False).steps(100) == 100
    assert len(room.data("sim_train")) == len(room.data()) == 2
    assert len(room.data("sim_val")) == 0
    assert classroom.world_of(room.world) == SMALL.digest()
    sample = room.sample()
    assert sample.images.shape[1] == 6 and len(sample.points)
    counts = [int((s.boxes.values[:, :2].norm(dim=-1) < 40).sum()) for s in room.data()]
    assert room.richest == counts.index(max(counts))
    assert room.sample(1).token == room.data().tokens[1]


def test_the_second_to_open_it_finds_it(room: Room, small_world: pytest.MonkeyPatch) -> None:
    made = (room.world / "v1.0-sim" / "sample.json").stat().st_mtime_ns
    assert open_room() == open_room(room.out) == room
    assert (room.world / "v1.0-sim" / "sample.json").stat().st_mtime_ns == made


def test_two_at_once_make_it_once(tmp_path: Path, small_world: pytest.MonkeyPatch) -> None:
    inside: list[int] = []
    most: list[int] = []

    def slow(*_: object, **__: object) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classroom, "simulate", slow)
        people = [threading.Thread(target=open_room, args=(tmp_path,)) for _ in range(4)]
        for person in people:
            person.start()
        for person in people:
            person.join()
    assert most == [1, 1, 1, 1]


def test_a_script_without_a_main_guard_does_not_wait_for_itself(
    tmp_path: Path, small_world: pytest.MonkeyPatch
) -> None:
    import fcntl

    with pytest.MonkeyPatch.context() as patch, (tmp_path / ".room-fast.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        patch.setattr(classroom.multiprocessing, "parent_process", lambda: "the simulation")
        with pytest.raises(RuntimeError, match="__main__"):
            open_room(tmp_path)


def test_shipped_networks_by_name(room: Room, small_world: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kdlab import shipping

    with pytest.raises(FileNotFoundError, match="no network 'lidar' is shipped for this world; `make weights`"):
        room.weights("lidar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipping, "WEIGHTS", tmp_path)
        (tmp_path / f"lidar-{SMALL.digest()}").mkdir()
        assert room.weights("lidar") == tmp_path / f"lidar-{SMALL.digest()}"
        with pytest.raises(FileNotFoundError, match=r"no network 'radar'.*there are lidar"):
            room.weights("radar")


def test_every_network_that_is_named_is_shipped() -> None:
    for name in ("lidar", "fusion", "camera", "unidistill", "distillbev", "simdistill", "labeldistill"):
        assert (classroom.weights_of(name, WORLD) / "detector.safetensors").is_file()
