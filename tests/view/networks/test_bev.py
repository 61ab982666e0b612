from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure

from kdlab.geometry import BEVGrid
from kdlab.sample import Boxes3D, Detections, Features, Sample
from kdlab.view.methods.regions import masks
from kdlab.view.networks.bev import bev_boxes, feature_maps
from kdlab.view.style import STUDENT, TEACHER, TRUTH, run_colours

Draw = Callable[[Figure], Figure]


def in_metres(ax: Axes) -> bool:
    return ax.get_xlabel() == "y, to the left (m)" and ax.get_ylabel() == "x, forward (m)"


def maps(channels: int, seed: int, size: int = 32) -> Features:
    values = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(seed))
    return Features(bev=values, stages=(values, values[..., ::2, ::2]), neck=values)


def test_forward_is_up_and_left_is_left(sample: Sample, grid: BEVGrid, draw: Draw) -> None:
    figure = draw(bev_boxes(torch.tensor([[20.0, 10.0, 0.5]]), {"truth": sample.boxes}, grid))
    ax = figure.axes[0]
    assert in_metres(ax)
    spot = next(c for c in ax.collections if isinstance(c, PathCollection)).get_offsets()[0]
    x, y = ax.transData.transform(spot)
    middle = ax.transData.transform((0, 0))
    assert x < middle[0]
    assert y > middle[1]


def test_sets_of_boxes_have_their_colours(sample: Sample, grid: BEVGrid, draw: Draw) -> None:
    found = Detections(sample.boxes.values, sample.boxes.labels, torch.tensor([0.9, 0.1]))
    sets = {"truth": sample.boxes, "teacher": found, "student": found}
    figure = draw(bev_boxes(sample.points, sets, grid, title="t"))
    drawn = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    assert [len(c.get_segments()) for c in drawn] == [4, 2, 2]
    colours = [h.get_color() for h in figure.legends[0].get_lines()]
    assert colours == [TRUTH, TEACHER, STUDENT]


@pytest.mark.parametrize("points", [torch.zeros(0, 5), torch.full((3, 5), torch.nan), torch.full((2, 5), 1e4)])
def test_draws_without_points_and_boxes(points: torch.Tensor, grid: BEVGrid, draw: Draw) -> None:
    draw(bev_boxes(points, {}, grid))
    draw(bev_boxes(points, {"truth": Boxes3D.empty()}, grid))
    draw(masks(points, Boxes3D.empty(), grid))


def test_teacher_and_student_share_one_scale(grid: BEVGrid, sample: Sample, draw: Draw) -> None:
    figure = draw(feature_maps(maps(8, 0), maps(8, 1), grid, boxes=sample.boxes))
    first, second, third, fourth = (ax.images[0] for ax in figure.axes[:4])
    assert first.norm is second.norm
    assert third.norm.vmin == -third.norm.vmax
    assert (fourth.norm.vmin, fourth.norm.vmax) == (-1, 1)
    assert all(in_metres(ax) for ax in figure.axes[:4])


def test_the_scale_shrugs_off_outliers(grid: BEVGrid) -> None:
    teacher = maps(8, 0)
    teacher.bev[0, 0, 0, 0] = 1e6
    assert feature_maps(teacher, maps(8, 1), grid).axes[0].images[0].norm.vmax < 10


@pytest.mark.parametrize("how", ["norm", "mean", "pca", 3])
@pytest.mark.parametrize("stage", ["bev", "stages[1]", "neck"])
def test_every_stage_and_reduction(how: str | int, stage: str, grid: BEVGrid, draw: Draw) -> None:
    draw(feature_maps(maps(8, 0), maps(8, 1), grid, stage, how))  # type: ignore[arg-type]


def test_other_widths_have_no_cosine(grid: BEVGrid, draw: Draw) -> None:
    figure = draw(feature_maps(maps(8, 0), maps(4, 1), grid))
    assert "cosine similarity" not in [ax.get_title() for ax in figure.axes]
    with pytest.raises(ValueError, match="8 and 4"):
        feature_maps(maps(8, 0), maps(4, 1), grid, how="pca")


def test_numbers_that_are_none_are_drawn_grey(grid: BEVGrid, draw: Draw) -> None:
    teacher = maps(8, 0)
    teacher.bev[:, :, 5] = torch.nan
    for how in ("norm", "pca"):
        draw(feature_maps(teacher, maps(8, 1), grid, how=how))  # type: ignore[arg-type]
    everywhere = Features(bev=torch.full((1, 8, 32, 32), torch.nan))
    draw(feature_maps(everywhere, maps(8, 1), grid))
    draw(feature_maps(everywhere, everywhere, grid, how="pca"))


def test_runs_keep_the_teachers_colour() -> None:
    assert run_colours(["student", "teacher (LiDAR)", "student + UniDistill"])[:2] == [STUDENT, TEACHER]
    assert len(set(run_colours(["a", "b", "teacher", "c"]))) == 4
