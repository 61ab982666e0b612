from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from mini_run import one_thread  # noqa: F401
from sight_fakes import features_of, observer_of, sight_of

from kdlab.geometry import BEVGrid, transform, unproject
from kdlab.sample import Detections, Lift, Sample
from kdlab.view.sight import Sight
from kdlab.view.sight.cell import inspect, pixels_of


@pytest.fixture
def sight(sample: Sample, grid: BEVGrid) -> Sight:
    return sight_of(sample, grid, teacher=features_of(0, grid.shape), student=features_of(1, grid.shape))


def test_pixels_look_at_the_cell(sample: Sample) -> None:
    """The ray of each pixel, at its depth, ends in the cell: through the stored image's calibration."""
    sight = observer_of("unidistill").see(sample)
    assert sight.student is not None and sight.student.lift is not None
    lift, seen, cameras = sight.student.lift, 0, set()
    for cell in lift.cell.unique().tolist()[::5]:
        row, col = divmod(cell, sight.grid.width)
        pixels = pixels_of(sight, row, col)
        assert sum(p.weight for p in pixels) == pytest.approx(float(lift.weight[lift.cell == cell].sum()), rel=1e-5)
        assert [p.weight for p in pixels] == sorted((p.weight for p in pixels), reverse=True)
        assert len({(p.camera, p.u, p.v) for p in pixels}) == len(pixels)
        for pixel in pixels:
            cameras.add(pixel.camera)
            at, depth = torch.tensor([[pixel.u, pixel.v]]), torch.tensor([pixel.depth])
            ray = unproject(sample.image_from_camera[0, pixel.camera], at, depth)
            place = transform(sample.frame_from_camera[0, pixel.camera], ray)[0]
            column, line, inside = sight.grid.locate(place[:2])
            assert inside and (int(line), int(column)) == (row, col)
            seen += 1
    assert seen > 100 and cameras == set(range(6))


def test_bins_of_one_pixel_are_one(sight: Sight) -> None:
    assert sight.student is not None
    row, col = 4, 6
    cell = row * 32 + col
    lift = Lift(
        torch.tensor([cell, cell, cell, cell + 1]),
        torch.tensor([5, 5, 8 + 3, 5]),  # on a feature map of 2 x 4 cells: camera 0 and 1
        torch.tensor([0, 2, 1, 3]),
        torch.tensor([0.1, 0.3, 0.2, 0.5]),
    )
    image = torch.zeros(1, 1, 6, 3, 2, 4)
    sight.student, sight.depth_bins = replace(sight.student, lift=lift, image=image), (1.0, 41.0, 2.0)
    first, second = pixels_of(sight, row, col)
    assert (first.camera, second.camera) == (0, 1) and first.weight == pytest.approx(0.4)
    assert first.depth == pytest.approx((0.1 * 2 + 0.3 * 6) / 0.4) and second.depth == pytest.approx(4)
    assert (first.u, first.v) == (pytest.approx(33), pytest.approx(33))  # images are 32 x 88: blocks of 22 pixels
    assert pixels_of(sight, 0, 0) == []
    assert len(inspect(sight, row, col).pixels) == 2


def test_points_losses_gradients_and_boxes(sample: Sample) -> None:
    sight = observer_of("distillbev").see(sample)
    values = sample.boxes.values[:1].repeat(2, 1)
    sight.detections = {"teacher": Detections(values, torch.tensor([1, 0]), torch.tensor([0.9, 0.1]))}
    column, row, _ = (int(v) for v in sight.grid.locate(sample.boxes.values[0, :2]))
    report = inspect(sight, row, column)
    x, y = sight.grid.centres()[row, column].tolist()
    assert (report.x, report.y) == (pytest.approx(x), pytest.approx(y))
    assert report.boxes == ["car (truth)", "truck 0.90 (teacher)"]
    near = (sample.points[:, :2] - torch.tensor([x, y])).abs().amax(-1) <= sight.grid.cell / 2
    assert len(report.points) == int(near.sum()) > 0
    assert report.losses.keys() == sight.results.keys() and report.gradients == {}
    assert report.losses["foreground_H"] == pytest.approx(float(sight.loss_map("foreground_H")[row, column]))
    assert report.losses["foreground_B2"] == float(sight.loss_map("foreground_B2")[row // 2, column // 2])
    asked = inspect(sight, row, column, gradients=True)
    assert asked.gradients["spatial_H"] == float(sight.gradient_map("spatial_H")[row, column]) > 0
    assert inspect(sight, row, column).gradients == asked.gradients  # made once, they are shown
    text = asked.markdown()
    assert "car (truth)" in text and "| spatial_H |" in text and "LiDAR points: " in text and "weight" in text
    assert inspect(sight, 0, 0).boxes == []


def test_a_small_object_is_named_by_its_centre(sight: Sight) -> None:
    column, row, _ = (int(v) for v in sight.grid.locate(sight.sample.boxes.values[1, :2]))
    assert inspect(sight, row, column).boxes == ["pedestrian (truth)"]


def test_vectors_are_compared_where_they_can_be(sight: Sight) -> None:
    assert sight.teacher is not None and sight.student is not None
    report = inspect(sight, 3, 5)
    a, b = sight.teacher.bev[0, :, 3, 5], sight.student.bev[0, :, 3, 5]
    assert report.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)))
    assert report.norms == {"teacher": pytest.approx(float(a.norm())), "student": pytest.approx(float(b.norm()))}
    deep = inspect(sight, 3, 5, "stages[1]")
    assert deep.norms["teacher"] == pytest.approx(float(sight.teacher.stages[1][0, :, 1, 2].norm()))
    wide = replace(sight, teacher=features_of(0, sight.grid.shape, bev=9))
    assert math.isnan(inspect(wide, 3, 5).cosine) and len(inspect(wide, 3, 5).norms) == 2
    wide.adapted["bev"] = torch.ones(9, 32, 32)
    assert not math.isnan(inspect(wide, 3, 5).cosine)
    assert inspect(sight, 3, 5, "lidar_bev").norms == {}
    alone = inspect(replace(sight, teacher=None), 3, 5)
    assert math.isnan(alone.cosine) and "cosine" not in alone.markdown()
    sight.student.bev[0, :, 3, 5] = 0
    assert math.isnan(inspect(sight, 3, 5).cosine)


@pytest.mark.parametrize("cell", [(-1, 0), (0, 32), (40, 2)])
def test_a_cell_off_the_grid_is_refused(cell: Any, sight: Sight) -> None:
    with pytest.raises(ValueError, match="on a grid of 32 x 32 cells"):
        inspect(sight, *cell)
