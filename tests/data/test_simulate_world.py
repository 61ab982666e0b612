"""The simulated world in memory: nobody overlaps, meshes fill boxes, images and boxes agree, knobs act."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from kdlab.data.simulate import SceneState, SimulationConfig, real_rig, render_cameras, render_lidar, scene_at
from kdlab.data.simulate_config import CAMERAS, LIDAR
from kdlab.data.simulate_ground import footprint
from kdlab.data.simulate_sensors import Caster, points_in_boxes
from kdlab.data.simulate_shapes import GAIT_STEPS, agent_mesh
from kdlab.data.simulate_traffic import EGO_AXLE, EGO_SIZE, corners_of, overlap
from kdlab.data.simulate_world import plan_scene, state_of

CONFIG = SimulationConfig(scenes=3, keyframes=8, image_width=176, image_height=99)


@pytest.fixture(scope="module")
def state() -> SceneState:
    return scene_at(CONFIG, 1, 1.5)


def rectangles(state: SceneState) -> np.ndarray:
    x, y, yaw, l, w = (np.array(v) for v in zip(*[(a.x, a.y, a.yaw, *a.size[:2]) for a in state.agents], strict=True))
    boxes = [corners_of(x[i], y[i], yaw[i], l[i], w[i]) for i in range(len(x))]
    ego = state.ego_pose @ np.array([EGO_AXLE - EGO_SIZE[0] / 2, 0, 0, 1])
    heading = np.arctan2(state.ego_pose[1, 0], state.ego_pose[0, 0])
    return np.stack([*boxes, corners_of(ego[0], ego[1], heading, EGO_SIZE[0], EGO_SIZE[1])])


def test_nobody_overlaps_anyone() -> None:
    for scene in range(3):
        plan = plan_scene(CONFIG, scene, 0)
        for time in (0.0, 1.0, 2.75):
            boxes = rectangles(state_of(plan, CONFIG, time))
            i, j = np.triu_indices(len(boxes), 1)
            near = np.linalg.norm(boxes[i].mean(1) - boxes[j].mean(1), axis=-1) < 15
            assert not overlap(boxes[i[near]], boxes[j[near]]).any()


def test_nobody_stands_in_a_house(state: SceneState) -> None:
    houses = np.stack([footprint(b) for b in state.layout.buildings])
    for box in rectangles(state):
        assert not overlap(houses, np.broadcast_to(box, houses.shape)).any()


def test_meshes_fill_their_boxes(state: SceneState) -> None:
    for agent in state.agents:
        strides = range(GAIT_STEPS) if agent.style == "walk" else range(1)
        poses = [agent_mesh(agent.name, agent.style, agent.size, agent.seed, k).vertices for k in strides]
        extent = np.abs(np.concatenate(poses)).max(0) * 2
        assert np.allclose(extent, agent.size, rtol=1e-4), (agent.name, agent.style)


def test_points_on_an_agent_lie_in_its_box(state: SceneState) -> None:
    quiet = dataclasses.replace(CONFIG, lidar_range_noise=0.0, lidar_dropout=0.0)
    points, owner = render_lidar(state, real_rig(quiet), quiet, np.random.default_rng(0))
    pose = state.ego_pose @ real_rig(quiet)[LIDAR].ego_from_sensor
    world = points[:, :3].astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]
    grown = [dataclasses.replace(a, size=(a.size[0] + 0.01, a.size[1] + 0.01, a.size[2] + 0.01)) for a in state.agents]
    counts = points_in_boxes(world, grown)
    hits = np.array([(owner == a.index).sum() for a in state.agents])
    assert (counts >= hits).all()
    assert 10_000 < len(points) <= 32 * 1080


def test_projected_boxes_cover_the_pixels_of_their_objects(state: SceneState) -> None:
    rig, checked = real_rig(CONFIG), 0
    for channel, result in render_cameras(state, rig, CONFIG, np.random.default_rng(0)).items():
        sensor = rig[channel]
        assert sensor.intrinsic is not None
        sensor_from_world = np.linalg.inv(state.ego_pose @ sensor.ego_from_sensor)
        for agent in state.agents:
            rows, columns = np.nonzero(result.instances == agent.index)
            corners = np.stack(np.meshgrid(*[(-s / 2, s / 2) for s in agent.size], indexing="ij"), -1).reshape(-1, 3)
            local = np.c_[corners, np.ones(8)] @ (sensor_from_world @ agent.pose).T
            if len(rows) == 0 or local[:, 2].min() < 0.5:
                continue
            pixel = local[:, :3] @ sensor.intrinsic.T
            pixel = pixel[:, :2] / pixel[:, 2:]
            low, high = pixel.min(0) - 0.51, pixel.max(0) + 0.51
            assert columns.min() >= low[0] and columns.max() <= high[0]
            assert rows.min() >= low[1] and rows.max() <= high[1]
            checked += 1
    assert checked > 15


def test_images_depend_on_the_generator_only_and_not_on_threads(state: SceneState) -> None:
    rig, caster = real_rig(CONFIG), Caster(state)
    one = render_cameras(state, rig, CONFIG, np.random.default_rng(3), caster)
    two = render_cameras(state, rig, CONFIG, np.random.default_rng(3), caster, threads=2)
    for channel in CAMERAS:
        assert one[channel].image.shape == (99, 176, 3)
        assert np.array_equal(one[channel].image, two[channel].image)


def test_a_changed_state_changes_what_the_sensors_see(state: SceneState) -> None:
    rig = real_rig(CONFIG)
    clear, _ = render_lidar(state, rig, CONFIG, np.random.default_rng(0))
    foggy, _ = render_lidar(dataclasses.replace(state, fog=0.8), rig, CONFIG, np.random.default_rng(0))
    assert len(foggy) < 0.9 * len(clear)
    assert np.linalg.norm(foggy[:, :3], axis=1).max() < np.linalg.norm(clear[:, :3], axis=1).max()
    front = {"CAM_FRONT": rig["CAM_FRONT"]}
    day, dark = (
        render_cameras(s, front, CONFIG, np.random.default_rng(0))["CAM_FRONT"].image.mean()
        for s in (state, dataclasses.replace(state, night=1.0))
    )
    assert dark < 0.6 * day
    empty = dataclasses.replace(state, agents=())
    assert (render_cameras(empty, front, CONFIG, np.random.default_rng(0))["CAM_FRONT"].instances == -1).all()
    agent = min(state.agents, key=lambda a: np.hypot(*(np.array([a.x, a.y]) - state.ego_pose[:2, 3])))
    alone = dataclasses.replace(state, agents=(dataclasses.replace(agent, z=agent.z + 0.5),))
    assert set(np.unique(render_lidar(alone, rig, CONFIG, np.random.default_rng(0))[1])) <= {-1, agent.index}


def test_scenes_of_a_seed_are_alike_and_of_another_seed_are_not() -> None:
    a, b, other = (
        state_of(plan_scene(c, 0, 0), c, 1.0).agents
        for c in (CONFIG, dataclasses.replace(CONFIG), dataclasses.replace(CONFIG, seed=8))
    )
    assert a == b != other


def test_importing_the_simulator_does_not_import_open3d() -> None:
    code = "import sys, kdlab.data.simulate; sys.exit('open3d' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
