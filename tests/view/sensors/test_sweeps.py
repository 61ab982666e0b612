"""Ego motion between sweeps, density over distance, and the world's knobs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from kdlab.data.nuscenes import NuScenesDataset
from kdlab.sample import Boxes3D, Sample
from kdlab.view.sensors import sweeps

Draw = Callable[[Figure], Figure]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> NuScenesDataset:
    spec = importlib.util.spec_from_file_location("mini_set", Path(__file__).parents[2] / "data" / "mini_set.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return NuScenesDataset(module.write_mini_set(tmp_path_factory.mktemp("mini")), sweeps=4)


def test_ego_motion_has_a_pose_for_each_age(dataset: NuScenesDataset) -> None:
    motion = sweeps.ego_motion(dataset, 1, 4)
    sample = dataset[1]
    assert len(motion.lags) == 4 and motion.lags[0] == 0 and (np.diff(motion.lags) > 0).all()
    assert np.allclose(motion.key_from_ego[0], np.eye(4))
    assert np.allclose(sample.points[:, 4].unique().numpy(), motion.lags, atol=1e-4)
    assert np.allclose(np.linalg.norm(motion.key_from_ego[:, :2, 3], axis=1), 6 * motion.lags, rtol=0.05)  # 6 m/s


def test_a_wall_is_sharp_with_motion_taken_out_and_several_without(dataset: NuScenesDataset) -> None:
    sample, motion = dataset[1], sweeps.ego_motion(dataset, 1, 4)
    stale = sweeps.without_motion(sample.points, motion)
    key = sample.points[:, 4] == 0
    assert torch.allclose(stale[key], sample.points[key])
    assert float(stale[:, 0].std()) > 1.2 * float(sample.points[:, 0].std())
    for lag, pose in zip(motion.lags, motion.key_from_ego, strict=True):
        mine = (sample.points[:, 4] - lag).abs() < 1e-4
        back = stale[mine, :3].double() @ torch.from_numpy(pose[:3, :3]).T + torch.from_numpy(pose[:3, 3])
        assert torch.allclose(back.float(), sample.points[mine, :3], atol=1e-3)


def test_sweeps_are_drawn(dataset: NuScenesDataset, draw: Draw) -> None:
    places = {"the wall": (torch.tensor([15.0, 0.0]), 12.0), "beside": (torch.tensor([0.0, 5.0]), 6.0)}
    figure = draw(sweeps.sweeps(dataset[1], sweeps.ego_motion(dataset, 1, 4), places))
    assert len(figure.axes) == 7


def test_density_counts_boxes_and_those_with_few_points(sample: Sample, draw: Draw) -> None:
    values = torch.zeros(3, 9)
    values[:, 0], values[:, 3:6] = torch.tensor([5.0, 15.0, 16.0]), 1.0
    boxes = Boxes3D.make(values, torch.tensor([0, 0, 8]))
    boxes.points = torch.tensor([100, 10, 2])
    right = draw(sweeps.density([replace(sample, boxes=boxes)])).axes[1]
    assert [bar.get_height() for bar in right.containers[0]] == [1, 2, 0, 0, 0]
    assert [bar.get_height() for bar in right.containers[1]] == [0, 1, 0, 0, 0]


def test_knobs_draw_an_image_and_a_cloud_for_each_setting(sample: Sample, draw: Draw) -> None:
    thin = replace(sample, points=sample.points[::4])
    figure = draw(sweeps.knobs({"as it is": sample, "thin": thin, "same": sample, "again": sample}))
    titles = [ax.get_title() for ax in figure.axes]
    assert "as it is (front)" in titles and "500 points" in titles and "125 points" in titles
