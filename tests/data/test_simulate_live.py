"""A keyframe of the simulated world in memory: the same as on disk, and what each change does and leaves alone."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdlab.data.nuscenes import NuScenesDataset
from kdlab.data.simulate import simulate
from kdlab.data.simulate_config import SimulationConfig
from kdlab.data.simulate_live import Changes, LiveWorld
from kdlab.geometry import transform
from kdlab.sample import CAMERAS, Boxes3D, Sample

CONFIG = SimulationConfig(
    scenes=3,
    keyframes=3,
    image_width=88,
    image_height=50,
    sweeps_per_keyframe=2,
    lidar_azimuth_steps=270,
    calibration_rotation=0.3,
    lidar_time_offset=0.05,
    seed=3,
)
SCENE, KEYFRAME = 1, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("live") / "data", CONFIG, workers=1, progress=False, only=["scene-0002"])


@pytest.fixture(scope="module")
def world() -> LiveWorld:
    return LiveWorld(CONFIG, SCENE, KEYFRAME, sweeps=3, frames=2)


@pytest.fixture(scope="module")
def base(world: LiveWorld) -> Sample:
    return world.sample()


def same(a: Sample, b: Sample) -> None:
    for name in ("token", "scene", "timestamp", "draw"):
        assert getattr(a, name) == getattr(b, name), name
    for f in fields(Sample):
        one, two = getattr(a, f.name), getattr(b, f.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == two.dtype and torch.equal(one, two), f.name
    for f in fields(Boxes3D):
        one, two = getattr(a.boxes, f.name), getattr(b.boxes, f.name)
        assert torch.allclose(one.double(), two.double(), rtol=0, atol=1e-6, equal_nan=True), f.name


def near(world: LiveWorld, name: str) -> int:
    """The nearest agent of a class ahead that the LiDAR hits."""
    hit = world.sample().boxes.values[:, :2]
    rows = [(index, box.values[0, :2]) for index, label, box in world.agents if label == name]
    found = [(float(place.norm()), index) for index, place in rows if place[0] > 4 and (hit == place).all(1).any()]
    return min(found)[1]


@pytest.mark.parametrize("keyframe", [0, KEYFRAME])
def test_unchanged_equals_the_data_set(root: Path, world: LiveWorld, keyframe: int) -> None:
    dataset = NuScenesDataset(root, frames=2, sweeps=3)
    read = dataset.sample(dataset.scenes["scene-0002"][keyframe])
    live = world if keyframe == KEYFRAME else LiveWorld(CONFIG, SCENE, keyframe, sweeps=3, frames=2)
    assert len(read.points) > 1000 and len(read.boxes) > 5
    same(live.sample(), read)
    # The tables' calibration is off here, and the LiDAR late: both were followed.
    assert abs(read.timestamp - 1_600_001_000 - keyframe * 0.5 - 0.05) < 1e-6


def test_found_by_its_token(root: Path, base: Sample, tmp_path: Path) -> None:
    live = LiveWorld.of_data(root, base.token, sweeps=3, frames=2)
    assert (live.scene, live.keyframe, live.config) == (SCENE, KEYFRAME, CONFIG)
    with pytest.raises(ValueError, match="no sample 'x'"):
        LiveWorld.of_data(root, "x", sweeps=1)
    for name in ("scene", "sample"):
        (tmp_path / "v1.0-mini").mkdir(exist_ok=True)
        (tmp_path / "v1.0-mini" / f"{name}.json").write_text("[]")
    with pytest.raises(ValueError, match="no simulated data set"):
        LiveWorld.of_data(tmp_path, "x", sweeps=1)
    known = json.loads((root / "v1.0-sim" / "simulation.json").read_text())
    later = {"digest": "0", "config": {**known["config"], "a_setting_of_later": 1}}
    (tmp_path / "v1.0-mini" / "simulation.json").write_text(json.dumps(later))
    with pytest.raises(ValueError, match="another version of the simulator"):
        LiveWorld.of_data(tmp_path, "x", sweeps=1)


def test_moved_object(world: LiveWorld, base: Sample) -> None:
    agent = near(world, "car")
    box = world.box_of(agent)
    # To 12 m ahead on the left, whatever was there before.
    changes = Changes(moved={agent: (12 - float(box.values[0, 0]), 3 - float(box.values[0, 1]), 0.5)})
    moved, there = world.sample(changes), world.box_of(agent, changes)
    assert torch.allclose(there.values[0, :2], torch.tensor([12.0, 3.0]), atol=1e-5)
    turn = float(there.values[0, 6] - box.values[0, 6])
    assert math.isclose(math.remainder(turn - 0.5, math.tau), 0, abs_tol=1e-5)
    assert torch.allclose(there.values[0, 3:6], box.values[0, 3:6])
    c, s = math.cos(0.5), math.sin(0.5)
    vx, vy = box.values[0, 7:].tolist()
    assert torch.allclose(there.values[0, 7:], torch.tensor([c * vx - s * vy, s * vx + c * vy]), atol=1e-4)
    row = (moved.boxes.values - there.values).nan_to_num().abs().sum(1).argmin()
    assert moved.boxes.points[row] > 10
    # Points and pixels elsewhere are the very same ones, noise and all.
    old, new = ({tuple(p) for p in sample.points.tolist()} for sample in (base, moved))
    assert 0.8 < len(old & new) / len(old) < 1
    equal = (moved.images == base.images).float().mean((0, 2, 3, 4))
    assert equal[CAMERAS.index("CAM_BACK")] == 1 and equal[CAMERAS.index("CAM_FRONT")] < 1
    # Each sweep holds it: points of all three lie in the box.
    inside = transform(torch.linalg.inv(pose_of(there)), moved.points[:, :3])
    hit = moved.points[(inside.abs() < there.values[0, 3:6] / 2 + 0.1).all(-1)]
    assert len(hit[:, 4].unique()) >= (3 if abs(vx) + abs(vy) < 0.1 else 1)


def pose_of(box: Boxes3D) -> torch.Tensor:
    x, y, z, *_, yaw = box.values[0, :7].tolist()
    c, s = math.cos(yaw), math.sin(yaw)
    return torch.tensor([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1]])


def test_removed_object(world: LiveWorld, base: Sample) -> None:
    agent = near(world, "car")
    box = world.box_of(agent)
    gone = world.sample(Changes(removed=frozenset({agent})))
    assert torch.isclose(base.boxes.values[:, :2], box.values[:, :2], atol=1e-3).all(-1).any()
    assert not torch.isclose(gone.boxes.values[:, :2], box.values[:, :2], atol=1e-3).all(-1).any()
    local = transform(torch.linalg.inv(pose_of(box)), gone.points[gone.points[:, 4] == 0, :3])
    assert not (local.abs() < box.values[0, 3:6] / 2 - 0.05).all(-1).any()
    assert not torch.equal(gone.images, base.images)


def test_lidar_changes_leave_the_images(world: LiveWorld, base: Sample) -> None:
    fewer = world.sample(Changes(beams=8))
    assert torch.equal(fewer.images, base.images)
    assert 0.15 < len(fewer.points) / len(base.points) < 0.4
    thin = world.sample(Changes(dropout=0.6))
    old, new = ({tuple(p) for p in sample.points.tolist()} for sample in (base, thin))
    assert new < old and 0.3 < len(new) / len(old) < 0.5


def test_fewer_beams_are_those_of_a_world_with_fewer() -> None:
    live = LiveWorld(CONFIG, SCENE, 0, sweeps=1).sample(Changes(beams=8))
    other = LiveWorld(CONFIG, SCENE, 0, sweeps=1)
    other.config = replace(CONFIG, lidar_beams=8)  # Of the same plan.
    assert torch.equal(live.points, other.sample().points)


def test_fog_and_night(world: LiveWorld, base: Sample) -> None:
    night = world.sample(Changes(night=1.0))
    assert torch.equal(night.points, base.points)
    assert night.images.float().mean() < 0.6 * base.images.float().mean()
    fog = world.sample(Changes(fog=0.8))
    assert len(fog.points) < 0.95 * len(base.points)
    assert not torch.equal(fog.images, base.images)
    same(world.sample(Changes(fog=0.0, night=0.0)), base)


def test_written_calibration(world: LiveWorld, base: Sample) -> None:
    off = world.sample(Changes(calibration={"CAM_FRONT": (3.0, 0.0, 0.0), "CAM_BACK": (0.0, 2.0, 5.0)}))
    for name in ("images", "points", "image_from_camera"):
        assert torch.equal(getattr(off, name), getattr(base, name))
    differs = (off.frame_from_camera != base.frame_from_camera).flatten(2).any(2)
    assert differs.all(0).tolist() == [c in ("CAM_FRONT", "CAM_BACK") for c in CAMERAS]
    ahead, was = (s.frame_from_camera[0, CAMERAS.index("CAM_FRONT"), :3, 2].double() for s in (off, base))
    # Three degrees to the left.
    left = math.degrees(math.atan2(float(ahead[1]), float(ahead[0])) - math.atan2(float(was[1]), float(was[0])))
    assert abs(left - 3) < 0.01
    up, was = (s.frame_from_camera[0, CAMERAS.index("CAM_BACK"), :3, 2].double() for s in (off, base))
    assert abs(math.degrees(math.asin(float(up[2])) - math.asin(float(was[2]))) - 2) < 0.01


def test_order_of_changes_does_not_matter(world: LiveWorld, base: Sample) -> None:
    agent = near(world, "pedestrian")
    changes = Changes(moved={agent: (1.0, 1.0, 0.0)}, fog=0.2)
    first = world.sample(changes)
    world.sample(Changes(night=0.5))
    same(LiveWorld(CONFIG, SCENE, KEYFRAME, sweeps=3, frames=2).sample(changes), first)
    same(world.sample(Changes(moved={agent: (0.0, 0.0, 0.0)})), base)


def test_threads_share_a_world(world: LiveWorld) -> None:
    wanted = [Changes(moved={near(world, "car"): (step, 0.0, 0.0)}) for step in (2.0, 4.0)]
    alone = [world.sample(changes) for changes in wanted]
    other = LiveWorld(CONFIG, SCENE, KEYFRAME, sweeps=3, frames=2)
    with ThreadPoolExecutor(2) as pool:
        for one, two in zip(alone, pool.map(other.sample, wanted), strict=True):
            same(one, two)


def test_agents(world: LiveWorld, base: Sample) -> None:
    assert len(world.agents) >= len(base.boxes)
    rows = torch.cat([box.values[:, :7] for _, _, box in world.agents])
    assert all((rows - box[:7]).abs().sum(1).min() < 1e-4 for box in base.boxes.values)
    assert sorted(index for index, _, _ in world.agents) == [index for index, _, _ in world.agents]


@pytest.mark.parametrize(
    "changes, message",
    [
        (Changes(moved={9999: (1, 0, 0)}), "no agent 9999"),
        (Changes(removed=frozenset({-1})), "no agent -1"),
        (Changes(calibration={"FRONT": (1, 0, 0)}), "no camera 'FRONT'"),
        (Changes(beams=1), "beams must be between 2 and 128"),
        (Changes(fog=1.5), "fog must be between 0 and 1"),
        (Changes(night=-0.1), "night must be"),
        (Changes(dropout=np.nan), "dropout must be"),
    ],
)
def test_bad_changes(world: LiveWorld, changes: Changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        world.sample(changes)


def test_bad_world() -> None:
    with pytest.raises(ValueError, match="keyframe 3 is not there"):
        LiveWorld(CONFIG, SCENE, 3, sweeps=1)
    with pytest.raises(ValueError, match="scene 7"):
        LiveWorld(CONFIG, 7, 0, sweeps=1)
    with pytest.raises(ValueError, match="at least 1"):
        LiveWorld(CONFIG, 0, 0, sweeps=0)
