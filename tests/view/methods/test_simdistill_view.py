from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mini_run import one_thread  # noqa: F401
from sight_fakes import observer_of

from kdlab.sample import Sample
from kdlab.view.methods.simdistill import branches, class_errors, compensation_off, cross_modal, two_lifts
from kdlab.view.sight import Observer, Sight

Draw = Callable[[Figure], Figure]
Seen = tuple[Sight, Observer]


@pytest.fixture(scope="module")
def _kept() -> dict[str, Seen]:
    return {}


@pytest.fixture
def seen(sample: Sample, _kept: dict[str, Seen]) -> Seen:
    if not _kept:
        observer = observer_of("simdistill")
        _kept["simdistill"] = observer.see(sample), observer
    return _kept["simdistill"]


def test_branches_are_what_the_student_made(seen: Seen) -> None:
    sight, _ = seen
    found = branches(*seen)
    assert sight.student is not None
    torch.testing.assert_close(found.compensated, sight.student.lidar_bev[0])  # type: ignore[index]
    torch.testing.assert_close(found.camera, sight.student.camera_bev[0, 0])  # type: ignore[index]
    torch.testing.assert_close(found.lidar_depth.sum(1), torch.ones_like(found.lidar_depth[:, 0]))
    assert not torch.equal(found.camera_depth, found.lidar_depth)  # each lift has a depth net of its own
    assert not torch.equal(found.lifted, found.compensated)


def test_both_lifts_share_the_maps_scale(seen: Seen, draw: Draw) -> None:
    figure = draw(two_lifts(*seen))
    assert len({id(ax.images[0].norm) for ax in figure.axes[3:6]}) == 1
    camera, lidar = (line.get_ydata() for line in figure.axes[2].lines[:2])
    assert len(camera) == len(lidar) > 0


def test_compensation_off_leaves_the_lift(seen: Seen, draw: Draw) -> None:
    sight, observer = seen
    figure = draw(compensation_off(sight, observer))
    with_it, without, change = (np.asarray(ax.images[0].get_array()).T for ax in figure.axes[:3])
    assert sight.student is not None and sight.student.lidar_bev is not None
    np.testing.assert_allclose(with_it, sight.student.lidar_bev[0].norm(dim=0), atol=1e-5)
    assert change.max() > 0 and not np.allclose(with_it, without)
    again = observer.see(sight.sample).student
    assert again is not None and torch.equal(again.lidar_bev, sight.student.lidar_bev)  # type: ignore[arg-type]


def test_the_cross_modal_map_lies_in_the_mask(seen: Seen, draw: Draw) -> None:
    sight, observer = seen
    figure = draw(cross_modal(sight, observer))
    mask, loss = (np.asarray(figure.axes[i].images[0].get_array()) for i in (2, 3))
    assert loss.sum() == pytest.approx(sight.value("cross_modal"), rel=1e-4)
    assert not loss[mask == 0].any() and loss.any()


def test_the_second_sigmoid_flattens_the_error(draw: Draw) -> None:
    intended, released = draw(class_errors((0.3,))).axes
    far = [ax.lines[0].get_ydata().max() for ax in (intended, released)]  # type: ignore[union-attr]
    assert far[0] > 10 * far[1]
    for ax in (intended, released):
        scores, errors = ax.lines[0].get_data()
        assert scores[int(np.argmin(errors))] == pytest.approx(0.3, abs=0.01)


def test_a_student_without_a_second_branch_says_so(sample: Sample) -> None:
    other = observer_of("unidistill")
    sight = other.see(sample)
    for draw_it in (branches, two_lifts, compensation_off):
        with pytest.raises(ValueError, match="no simulated LiDAR"):
            draw_it(sight, other)
    with pytest.raises(ValueError, match="has no such term"):
        cross_modal(sight, other)
