from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlab.distill.places import Cells, TermResult
from kdlab.geometry import BEVGrid
from kdlab.sample import Sample
from kdlab.view.methods.regions import masks, term_map, term_maps, window_at_nearest

Draw = Callable[[Figure], Figure]


def in_metres(ax: Axes) -> bool:
    return ax.get_xlabel() == "y, to the left (m)" and ax.get_ylabel() == "x, forward (m)"


def test_maps_are_drawn_where_they_lie(draw: Draw) -> None:
    grid = BEVGrid((-10.0, 30.0), (-20.0, 20.0), 10.0)
    values = torch.zeros(4, 4)
    column, row, _ = grid.locate(torch.tensor([25.0, 15.0]))
    values[row, column] = 1.0
    ax = draw(term_map(values, grid, "term")).axes[0]
    image = ax.images[0]
    left, right, low, high = image.get_extent()
    shown = np.argwhere(np.asarray(image.get_array()) == 1)[0]
    y = left + (shown[1] + 0.5) * (right - left) / 4
    x = low + (shown[0] + 0.5) * (high - low) / 4
    assert (x, y) == (25.0, 15.0)
    assert ax.get_title() == "term: sum 1"


def test_term_map_draws_losses_gradients_and_nothing(grid: BEVGrid, sample: Sample, draw: Draw) -> None:
    draw(term_map(torch.zeros(32, 32), grid, boxes=sample.boxes))
    draw(term_map(torch.full((32, 32), torch.nan), grid))
    norm = draw(term_map(torch.randn(32, 32), grid)).axes[0].images[0].norm
    assert norm.vmin == -norm.vmax
    with pytest.raises(ValueError, match="one sample"):
        term_map(torch.zeros(2, 32, 32), grid)


def test_masks(sample: Sample, grid: BEVGrid, draw: Draw) -> None:
    figure = draw(masks(sample.points, sample.boxes, grid))
    wide, narrow = (np.asarray(ax.images[0].get_array()) for ax in figure.axes[:2])
    assert (narrow <= wide + 1e-6).all()
    assert narrow.max() == wide.max() == 1
    assert all(in_metres(ax) for ax in figure.axes[:3])
    window = window_at_nearest(sample.boxes, grid)
    assert window.x[0] < 10 < window.x[1]


def test_one_map_per_term(sample: Sample, grid: BEVGrid, draw: Draw) -> None:
    term = TermResult.of(torch.ones(1, 32, 32), Cells(), grid)
    figure = draw(term_maps({"feature": term, "relation": term.weighted(0.5)}, sample.boxes))
    assert [ax.get_title() for ax in figure.axes[:2]] == ["feature: sum 1024", "relation: sum 512"]
    draw(term_maps({}))
