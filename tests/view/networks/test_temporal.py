"""A past frame before and after alignment, and depth nets side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

from kdlab.geometry import BEVGrid, yaw_pose
from kdlab.models.lift import Frustum, align
from kdlab.sample import Boxes3D, Sample
from kdlab.view.networks import temporal
from kdlab.view.networks.lifting import LiftSteps

Draw = Callable[[Figure], Figure]
GRID = BEVGrid.square(16.0, 2.0)
POSE = yaw_pose(0.0, (-4.0, 0.0, 0.0)).float()  # the vehicle has driven 4 m: old things are nearer now


def maps() -> tuple[torch.Tensor, torch.Tensor]:
    """A key map and the same world two cells farther ahead."""
    key = torch.randn(5, *GRID.shape, generator=torch.Generator().manual_seed(0))
    return key, key.roll(2, -1)


def boxes(*speeds: float) -> Boxes3D:
    values = torch.zeros(len(speeds), 9)
    values[:, 0] = torch.tensor([-5.0, 3.0])[: len(speeds)]
    values[:, 3:6], values[:, 7] = 1.0, torch.tensor(speeds)
    return Boxes3D.make(values, torch.zeros(len(speeds), dtype=torch.long))


def test_likeness_tells_standing_from_moving() -> None:
    key, past = maps()
    moved = align(past[None], POSE[None], GRID)[0]
    truth = boxes(0.0, 6.0)
    assert temporal.likeness(key, moved, GRID, truth, still=True) == pytest.approx(1.0, abs=1e-5)
    assert temporal.likeness(key, past, GRID, truth, still=True) < 0.9
    assert math.isnan(temporal.likeness(key, past, GRID, boxes(0.0), still=False))


def test_aligned_maps_are_drawn_with_their_likeness(draw: Draw) -> None:
    figure = draw(temporal.aligned_maps(*maps(), POSE, GRID, boxes(0.0, 6.0)))
    bars = figure.axes[3].containers
    assert bars[1][0].get_height() == pytest.approx(1.0, abs=1e-5)  # aligned, standing


def test_points_of_a_standing_thing_meet(sample: Sample, draw: Draw) -> None:
    then = sample.points[:, :1].new_tensor([4.0, 0, 0, 0, 0]) + sample.points
    places = {"here": (torch.tensor([10.0, 0.0]), 10.0)}
    figure = draw(temporal.aligned_points(sample, replace(sample, points=then), POSE, places))
    past, now = figure.axes[1].collections[:2]
    assert len(now.get_offsets()) > 20
    assert torch.allclose(torch.tensor(past.get_offsets()), torch.tensor(now.get_offsets()), atol=1e-4)


def test_depth_errors_leave_out_what_is_unknown_or_beyond() -> None:
    measured = torch.tensor([[0.0, 5.0, 50.0]])
    true, seen = temporal.depth_errors(torch.tensor([[3.0, 6.0, 9.0]]), measured, 41.0)
    assert true.tolist() == [5.0] and seen.tolist() == [6.0]


def test_depth_nets_name_their_mean_error(sample: Sample, draw: Draw) -> None:
    frustum = Frustum((4, 11), 8, (1.0, 5.0, 1.0))
    sure = torch.zeros(6, 4, 4, 11)
    sure[:, 2] = 1.0  # 3.5 m everywhere
    steps = LiftSteps(
        sure,
        torch.zeros(6, 2, 4, 11),
        torch.zeros(6, 44, 4, 3),
        frustum,
        GRID,
        (-3.0, 5.0),
        torch.eye(3).repeat(6, 1, 1),
    )
    measured = torch.full((6, 4, 11), 2.0)
    figure = draw(temporal.depth_nets({"one": steps, "two": steps}, sample, measured))
    assert "mean error 1.5 m" in [ax.get_title() for ax in figure.axes]
