"""Where sensors sit, how points become pixels, what a box means, cells and metres."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from kdlab.geometry import BEVGrid
from kdlab.sample import Boxes3D, Sample
from kdlab.view.sensors import sensing

Draw = Callable[[Figure], Figure]


def test_window_is_centred_on_the_place() -> None:
    grid = sensing.window(torch.tensor([10.0, -4.0]), 3.0)
    assert (grid.x, grid.y) == ((7.0, 13.0), (-7.0, -1.0))


def test_wedge_of_the_front_camera_opens_as_its_matrix_says(sample: Sample) -> None:
    place, left, right = sensing.view_wedge(sample, 0, 30.0)
    assert torch.allclose(place, torch.zeros(2), atol=1e-5)
    assert torch.allclose(left, torch.tensor([30.0, 30 * 44 / 60]), atol=1e-4)  # 44 pixels left of the middle, f = 60
    assert torch.allclose(right, torch.tensor([30.0, -30 * 44 / 60]), atol=1e-4)


def test_wedge_needs_images(sample: Sample) -> None:
    sample.images = sample.images[:, :0]
    with pytest.raises(ValueError, match="images=True"):
        sensing.view_wedge(sample, 0, 30.0)


def test_rig_and_projection_are_drawn(sample: Sample, draw: Draw) -> None:
    draw(sensing.rig(sample))
    draw(sensing.projection_steps(sample))


def test_projection_keeps_a_point_through_all_panels(sample: Sample) -> None:
    sample.points = torch.tensor([[20.0, 5.0, 1.5, 1.0, 0.0], [-20.0, 0, 1, 1, 0], [20.0, 5.0, 1.5, 1.0, 0.5]])
    _, own, plane, image = sensing.projection_steps(sample).axes[:4]
    assert np.allclose(
        own.collections[0].get_offsets(), [[-5.0, 20.0]], atol=1e-4
    )  # the key sweep's alone, ahead alone
    assert np.allclose(plane.collections[0].get_offsets(), [[-0.25, 0.0]], atol=1e-4)
    assert np.allclose(image.collections[-1].get_offsets(), [[44 - 60 * 0.25, 16.0]], atol=1e-3)


def test_clearest_takes_the_vehicle_with_most_points_in_range() -> None:
    values = torch.zeros(4, 9)
    values[:, 0] = torch.tensor([3.0, 15.0, 20.0, 25.0])
    boxes = Boxes3D.make(values, torch.tensor([0, 0, 1, 8]))
    boxes.points = torch.tensor([900, 0, 40, 500])  # too near, empty, the one, a pedestrian
    assert sensing.clearest(boxes, torch.ones(4, dtype=torch.bool)) == 2
    assert sensing.clearest(boxes, torch.tensor([True, True, False, True])) == 1
    with pytest.raises(ValueError, match="no such vehicle"):
        sensing.clearest(boxes, torch.tensor([True, False, False, True]))


@pytest.mark.parametrize("yaw", [0.0, 0.7, -2.0, math.pi])
def test_box_anatomy_counts_the_points_inside(yaw: float, draw: Draw) -> None:
    box = torch.tensor([12.0, -3.0, 1.0, 4.0, 2.0, 1.6, yaw, 3.0, 1.0])
    points = torch.tensor([[12.0, -3, 1, 0, 0], [12.2, -2.9, 1.2, 0, 0], [12.0, -3, 3, 0, 0], [40.0, 0, 1, 0, 0]])
    side = draw(sensing.box_anatomy(box, points, 0)).axes[1]
    assert side.get_legend().get_texts()[0].get_text() == "2 points inside"


def test_points_right_of_a_box_hide_no_side_view() -> None:
    box = torch.tensor([0.0, 0, 1, 4, 2, 1.6, math.pi / 2, 0, 0])
    along = sensing._in_box_frame(torch.tensor([[0.5, 1.5, 0.0], [5.0, 0.0, 0.0]]), box)
    assert torch.allclose(along[0], torch.tensor([1.5, -0.5]), atol=1e-6)
    assert along[1, 0].isnan()


def test_array_has_rows_of_y_and_columns_of_x(draw: Draw) -> None:
    grid = BEVGrid.square(8.0, 2.0)
    points = torch.tensor([[7.0, -5.0, 0.0], [7.5, -5.5, 0.0], [100.0, 0, 0]])
    boxes = Boxes3D.make(torch.tensor([[6.0, -4.0, 1, 4, 2, 2, 0, 0, 0]]), torch.zeros(1, dtype=torch.long))
    raw, map_, *_ = draw(sensing.array_and_metres(points, grid, boxes)).axes
    values = np.asarray(raw.images[0].get_array())
    assert values[1, 7] == 2 and np.nansum(values) == 2  # row of y = -5, column of x = 7
    assert np.asarray(map_.images[0].get_array())[7, 1] == 2
