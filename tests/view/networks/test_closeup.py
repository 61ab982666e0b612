"""A part of the ground as a figure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sight_fakes import sight_of

from kdlab.geometry import BEVGrid
from kdlab.sample import Detections, Sample
from kdlab.view.networks.closeup import close_up
from kdlab.view.sight.data import Sight
from kdlab.view.sight.layers import Layer


@pytest.fixture
def sight(sample: Sample, grid: BEVGrid) -> Sight:
    found = Detections(sample.boxes.values, sample.boxes.labels, torch.tensor([0.9, 0.1]))
    return sight_of(sample, grid, detections={"student": found})


def test_it_shows_the_place_and_what_lies_there(sight: Sight, grid: BEVGrid, draw: Callable[[Figure], Figure]) -> None:
    values = np.arange(grid.height * grid.width, dtype=np.float32).reshape(grid.shape)
    layers = [
        Layer("norm", values, 0, 99, "viridis", "units"),
        Layer("colours", np.zeros((*grid.shape, 3), np.uint8)),
        Layer("where", values, 0, 1, "greys"),
    ]
    figure = draw(close_up(sight, (10.0, 3.0), layers, reach=8))
    maps = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in maps] == ["500 LiDAR points", "norm", "colours", "where"]
    for ax in maps:
        assert ax.get_xlim() == (11, -5) and ax.get_ylim() == (2, 18), "y to the left, x up"
    assert maps[1].images[0].norm.vmax == 99 and maps[1].images[0].get_cmap().name == "viridis"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["truth (2)", "student (1, score ≥ 0.3)"]


def test_the_ego_vehicle_is_drawn_where_it_is_near(sight: Sight) -> None:
    near, far = close_up(sight, (3.0, 0.0), []), close_up(sight, (25.0, 0.0), [])
    assert len(near.axes[0].patches) == 2 and not far.axes[0].patches
