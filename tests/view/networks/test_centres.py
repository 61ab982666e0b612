"""Gaussian radii, targets, decoding and calibration of the centre head."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from kdlab.config import HeadConfig
from kdlab.geometry import BEVGrid
from kdlab.models.targets import gaussian_radius, targets
from kdlab.sample import TASKS, Boxes3D, Predictions, Sample
from kdlab.view.networks import centres

Draw = Callable[[Figure], Figure]


@pytest.mark.parametrize(("length", "width", "overlap"), [(5.0, 2.0, 0.1), (2.0, 2.0, 0.5), (12.0, 3.0, 0.7)])
def test_the_least_case_by_trying_is_the_radius_of_the_formula(length: float, width: float, overlap: float) -> None:
    tried = min(centres._radius_of_case(length, width, overlap, case) for case in range(3))
    formula = gaussian_radius(torch.tensor(length), torch.tensor(width), overlap)
    assert tried == pytest.approx(float(formula), rel=1e-4)


def test_one_case_is_marked_as_taken(draw: Draw) -> None:
    titles = [ax.get_title() for ax in draw(centres.gaussian_cases(5.0, 2.0, 0.1)).axes]
    assert sum("taken" in title for title in titles) == 1
    assert all("IoU 0.10" in title for title in titles)


def test_targets_are_drawn_with_the_offset_of_the_centre(sample: Sample, draw: Draw) -> None:
    grid = BEVGrid.square(32.0, 2.0)
    figure = draw(centres.target_maps(sample.boxes, grid, HeadConfig(), 1))
    assert figure.axes[1].get_title() == "pedestrian: its cell, offset (0.50, 0.50) cells"


def perfect(boxes: Boxes3D, grid: BEVGrid) -> Predictions:
    """What a head that knows the truth would say."""
    wanted = targets(Boxes3D.pad([boxes]), grid, HeadConfig())
    heat = torch.logit(wanted.heatmap.clamp(0.001, 0.95))
    maps = torch.zeros(1, len(TASKS), 10, grid.height * grid.width)
    for task, cell, code in zip(wanted.task[0], wanted.cell[0], wanted.codes[0], strict=True):
        maps[0, task, :, cell] = code
    return Predictions.of_maps(heat, maps.view(1, -1, *grid.shape))


def test_decoding_of_a_perfect_head_leaves_one_box(sample: Sample, draw: Draw) -> None:
    grid = BEVGrid.square(32.0, 2.0)
    figure = draw(centres.decoding(perfect(sample.boxes, grid), grid, HeadConfig(), sample.boxes, 0))
    titles = [ax.get_title() for ax in figure.axes]
    counts = [int(title.rsplit(": ")[-1]) for title in titles[1:4]]
    assert counts[0] > 1 and counts[1:] == [1, 1]


def test_decoding_of_nothing_is_drawn(sample: Sample, grid: BEVGrid, draw: Draw) -> None:
    cold = Predictions.of_maps(torch.full((1, 10, *grid.shape), -9.0), torch.zeros(1, 60, *grid.shape))
    draw(centres.decoding(cold, grid, HeadConfig(), sample.boxes, 3))


def test_calibration_finds_the_gap(draw: Draw) -> None:
    scores = np.concatenate((np.full(100, 0.25), np.full(100, 0.75)))
    hits = np.concatenate((np.arange(100) < 25, np.arange(100) < 55))
    figure = draw(centres.calibration(scores, hits))
    curve = figure.axes[0]
    assert curve.get_title() == "mean gap between score and share: 0.100"
    assert [bar.get_height() for bar in figure.axes[1].containers[0]] == [0, 0, 100, 0, 0, 0, 0, 100, 0, 0]
    assert math.isclose(float(curve.lines[1].get_ydata()[0]), 0.25)
