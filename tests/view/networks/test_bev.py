from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure

from kdlab.distill.places import Cells, TermResult
from kdlab.geometry import BEVGrid
from kdlab.sample import Boxes3D, Detections, Features, Sample
from kdlab.view.methods.regions import close_up, masks, term_maps
from kdlab.view.networks.bev import bev_boxes, feature_maps, term_map
from kdlab.view.sight.maps import bev_stages, cosine_map, principal, stage_map
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


def test_one_basis_for_both() -> None:
    a = torch.randn(6, 4, 5)
    first, second = principal(a, a.clone())
    assert first.shape == (4, 5, 3)
    torch.testing.assert_close(first, second)
    assert principal(a[:2], a[:2])[0].isfinite().all()


def test_cosine() -> None:
    a = torch.randn(6, 4, 5)
    torch.testing.assert_close(cosine_map(a, 2 * a), torch.ones(4, 5))
    assert cosine_map(a, torch.zeros_like(a)).isnan().all()


def test_stages_by_name() -> None:
    features = Features(bev=torch.zeros(2, 3, 4, 4), camera_bev=torch.ones(2, 1, 5, 4, 4))
    assert stage_map(features, "camera_bev", 1).shape == (5, 4, 4)
    assert bev_stages(features) == ["camera_bev", "bev"]
    for wrong in ("neck", "stages[0]", "beef", "lift", "heatmap"):
        with pytest.raises(ValueError, match="this detector has camera_bev, bev"):
            stage_map(features, wrong)


def test_masks(sample: Sample, grid: BEVGrid, draw: Draw) -> None:
    figure = draw(masks(sample.points, sample.boxes, grid))
    wide, narrow = (np.asarray(ax.images[0].get_array()) for ax in figure.axes[:2])
    assert (narrow <= wide + 1e-6).all()
    assert narrow.max() == wide.max() == 1
    assert all(in_metres(ax) for ax in figure.axes[:3])
    window = close_up(sample.boxes, grid)
    assert window.x[0] < 10 < window.x[1]


def test_runs_keep_the_teachers_colour() -> None:
    assert run_colours(["student", "teacher (LiDAR)", "student + UniDistill"])[:2] == [STUDENT, TEACHER]
    assert len(set(run_colours(["a", "b", "teacher", "c"]))) == 4


def test_one_map_per_term(sample: Sample, grid: BEVGrid, draw: Draw) -> None:
    term = TermResult.of(torch.ones(1, 32, 32), Cells(), grid)
    figure = draw(term_maps({"feature": term, "relation": term.weighted(0.5)}, sample.boxes))
    assert [ax.get_title() for ax in figure.axes[:2]] == ["feature: sum 1024", "relation: sum 512"]
    draw(term_maps({}))
