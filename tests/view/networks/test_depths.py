from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mini_run import one_thread  # noqa: F401
from sight_fakes import observer_of

from kdlab.geometry import project, transform
from kdlab.sample import CAMERAS, Sample
from kdlab.view.networks.depths import (
    bin_centres,
    cell_at,
    depth_of,
    expected_depth,
    extent_of,
    lidar_depth,
    pixel_depth,
)
from kdlab.view.sight.data import Sight

Draw = Callable[[Figure], Figure]


@pytest.fixture(scope="module")
def _sights() -> dict[str, Sight]:
    return {}


@pytest.fixture
def sight(sample: Sample, _sights: dict[str, Sight]) -> Sight:
    if "camera" not in _sights:
        _sights["camera"] = observer_of("unidistill").see(sample)
    return _sights["camera"]


def test_the_bars_are_the_pixel_s_distribution(sight: Sight, draw: Draw) -> None:
    figure = draw(pixel_depth(sight, "CAM_FRONT", 44, 20))
    assert sight.depth_bins is not None and sight.student is not None and sight.student.depth is not None
    chances = depth_of(sight, sight.depth_bins)
    row, column = cell_at(sight, 0, 44, 20, (chances.shape[-2], chances.shape[-1]))
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    np.testing.assert_allclose(heights, chances[0, :, row, column], atol=1e-6)
    assert sum(heights) == pytest.approx(1, abs=1e-4)
    centres = bin_centres(sight.depth_bins)
    expected = f"expected depth, {float((centres * heights).sum()):.1f} m"
    assert expected in [text.get_text() for text in figure.axes[1].get_legend().get_texts()]


def test_a_point_s_depth_stands_beside_the_distribution_of_its_pixel(
    sampler: Callable[..., Sample], draw: Draw
) -> None:
    point = torch.tensor([[15.0, 1.0, 1.0, 0.5, 0.0]])
    sample = replace(sampler(), points=point)
    sight = observer_of("unidistill").see(sample)
    seen = transform(torch.linalg.inv(sample.frame_from_camera[0, 0]), point[:, :3])
    (u, v), depth = project(sample.image_from_camera[0, 0], seen)[0][0].tolist(), float(seen[0, 2])
    texts = draw(pixel_depth(sight, 0, u, v)).axes[1].get_legend().get_texts()
    assert f"LiDAR, {depth:.1f} m" in [text.get_text() for text in texts]
    texts = draw(pixel_depth(sight, 0, 2, v)).axes[1].get_legend().get_texts()
    assert "no LiDAR point fell into this cell" in [text.get_text() for text in texts]
    measured = lidar_depth(sight, (8, 16))
    assert measured.shape[0] == len(CAMERAS) and int((measured > 0).sum()) == 1


def test_the_crop_lies_where_the_network_sees(sight: Sight) -> None:
    left, right, bottom, top = extent_of(sight, 0)
    height, width = sight.batch.images.shape[-2:]
    matrix = sight.batch.image_from_camera[0, 0, 0] @ torch.linalg.inv(sight.sample.image_from_camera[0, 0])
    for corner, seen in (((left, top), (0, 0)), ((right, bottom), (width, height))):
        mapped = matrix @ torch.tensor([*corner, 1.0])
        torch.testing.assert_close(mapped[:2], torch.tensor(seen).float(), atol=1e-3, rtol=0)


def test_six_cameras_share_one_scale_of_metres(sight: Sight, draw: Draw) -> None:
    figure = draw(expected_depth(sight))
    titles = [ax.get_title() for ax in figure.axes]
    assert sum(t.endswith("expected depth") for t in titles) == sum(t.endswith("LiDAR") for t in titles) == 6
    norms = {id(ax.images[1].norm) for ax in figure.axes if len(ax.images) == 2}
    assert len(norms) == 1
    assert figure.axes[-1].get_ylabel() == "depth along the camera's axis (m)"


def test_what_has_no_depth_says_so(sight: Sight) -> None:
    assert sight.depth_bins is not None
    with pytest.raises(ValueError, match="no teacher with a depth net"):
        pixel_depth(sight, 0, 44, 20, side="teacher")
    with pytest.raises(ValueError, match="not in what the network sees of CAM_FRONT"):
        pixel_depth(sight, 0, 1000, 20)
    with pytest.raises(ValueError, match="but the depth net has"):
        depth_of(sight, (1.0, 3.0, 1.0))
    with pytest.raises(ValueError, match="neither student nor teacher has cameras"):
        expected_depth(replace(sight, depth_bins=None))
