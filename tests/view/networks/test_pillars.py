"""Points in pillars and the maps of the stages."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from kdlab.geometry import BEVGrid
from kdlab.sample import Features, Predictions, Sample
from kdlab.view.networks import pillars

Draw = Callable[[Figure], Figure]


def features(grid: BEVGrid) -> Features:
    torch.manual_seed(0)
    heat, boxes = torch.randn(1, 10, *grid.shape), torch.randn(1, 60, *grid.shape)
    stage = torch.randn(1, 6, grid.height // 2, grid.width // 2)
    return Features(bev=torch.randn(1, 4, *grid.shape), stages=(stage,), predictions=Predictions.of_maps(heat, boxes))


def test_points_per_cell_leaves_out_what_is_too_high_or_outside() -> None:
    grid = BEVGrid.square(4.0, 2.0)
    points = torch.tensor([[3.0, -3.0, 0], [3.5, -2.5, 1], [3.0, -3.0, 9], [9.0, 0, 0], [-1.0, 1.0, 0]])
    counts = pillars.points_per_cell(points, grid, (-3.0, 5.0))
    assert counts[0, 3] == 2 and counts[2, 1] == 1 and counts.sum() == 3


def test_pillars_show_the_fullest_one(sample: Sample, grid: BEVGrid, draw: Draw) -> None:
    tall = torch.zeros(40, 5)
    tall[:, 0], tall[:, 1], tall[:, 2] = 10.5, 0.5, torch.linspace(0.6, 2, 40)
    points = torch.cat((sample.points, tall))
    figure = draw(pillars.pillars(points, grid, (-3.0, 5.0), sample.boxes, torch.tensor([10.0, 0.0])))
    count = int(pillars.points_per_cell(points, grid, (-3.0, 5.0))[16, 21])
    assert figure.axes[2].get_title() == f"one pillar from the side: {count} points"


def test_pillars_of_an_empty_cloud_are_drawn(sample: Sample, grid: BEVGrid, draw: Draw) -> None:
    draw(pillars.pillars(torch.zeros(0, 5), grid, (-3.0, 5.0), sample.boxes, torch.zeros(2)))


@pytest.mark.parametrize("how", ["norm", "pca", 1])
def test_stage_maps_show_each_stage(how: str | int, sample: Sample, grid: BEVGrid, draw: Draw) -> None:
    seen = features(grid)
    figure = draw(pillars.stage_maps(seen, grid, ["bev", "stages[0]", "heatmap"], how, sample.boxes))  # type: ignore[arg-type]
    assert figure.axes[0].get_title() == "bev: 4 channels, 32 × 32 cells"
    if how == "norm":
        drawn = np.asarray(figure.axes[0].images[0].get_array())
        assert np.allclose(drawn, seen.bev[0].norm(dim=0).T, atol=1e-5)


def test_unknown_stage_is_named(grid: BEVGrid) -> None:
    with pytest.raises(ValueError, match="lidar_bev"):
        pillars.stage_maps(features(grid), grid, ["lidar_bev"])
