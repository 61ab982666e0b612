from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from kdlab.sample import Boxes3D, Detections, Features, Sample
from kdlab.view.sensors.cameras import NEAR, box_segments, cameras, clip_near, depth, project_boxes

Draw = Callable[[Figure], Figure]


def lines(figure: Figure) -> list[int]:
    return [sum(len(c.get_segments()) for c in ax.collections if isinstance(c, LineCollection)) for ax in figure.axes]


def test_segments_are_cut_at_the_near_plane() -> None:
    crossing = torch.tensor([[[0.0, 0, -1], [0, 0, 3]]])
    behind = torch.tensor([[[0.0, 0, -2], [1, 0, -1]]])
    ahead = torch.tensor([[[0.0, 1, 5], [1, 0, 6]]])
    cut = clip_near(torch.cat((crossing, behind, ahead)))
    assert cut.shape == (2, 2, 3)
    torch.testing.assert_close(cut[0], torch.tensor([[0.0, 0, NEAR], [0, 0, 3]]))
    torch.testing.assert_close(cut[1], ahead[0])


def test_a_box_ahead_is_projected_where_a_pinhole_puts_it(sample: Sample) -> None:
    box = torch.tensor([[10.0, 0, 1.5, 2, 2, 1, 0, 0, 0]])  # at the camera's height, front camera, f = 60
    seen, tops = project_boxes(sample, 0, box)
    assert seen[0].shape == (13, 2, 2)
    near = 44 + 60 * 1 / 9  # the rear face is 9 m away, 1 m to the right
    assert seen[0][..., 0].max().item() == pytest.approx(near, abs=1e-3)
    assert tops[0, 1].item() == pytest.approx(16 - 60 * 0.5 / 9, abs=1e-3)
    assert not len(project_boxes(sample, 3, box)[0][0])  # behind the rear camera's plane


def test_the_heading_line_leads_to_the_front() -> None:
    ends = box_segments(torch.tensor([[0.0, 0, 1, 4, 2, 2, torch.pi / 2, 0, 0]]))[0, 12]
    torch.testing.assert_close(ends, torch.tensor([[0.0, 0, 0], [0, 2, 0]]), atol=1e-6, rtol=0)


def test_a_box_around_the_camera_stays_finite(sample: Sample) -> None:
    seen, tops = project_boxes(sample, 0, torch.tensor([[0.0, 0, 1, 30, 30, 3, 0.3, 0, 0]]))
    assert seen[0].isfinite().all()
    assert tops.isnan().all()


def test_six_cameras_in_their_places(sample: Sample, draw: Draw) -> None:
    student = Detections(sample.boxes.values, sample.boxes.labels, torch.tensor([0.9, 0.1]))
    figure = draw(cameras(sample, {"truth": sample.boxes, "student": student}, labels=True, title="title"))
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["front left", "front", "front right", "back left", "back", "back right"]
    assert lines(figure)[1] == 13 * 3
    assert lines(figure)[4] == 0
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert legend == ["truth (2)", "student (1, score ≥ 0.2)"]


def test_draws_without_boxes(sampler: Callable[..., Sample], draw: Draw) -> None:
    empty = sampler(Boxes3D.empty())
    nothing = Detections(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long))
    assert sum(lines(draw(cameras(empty, {"truth": empty.boxes, "student": nothing})))) == 0
    draw(cameras(empty, {}))


def test_boxes_that_are_not_numbers_are_left_out(sampler: Callable[..., Sample], draw: Draw) -> None:
    bad = Boxes3D.make(torch.full((1, 9), torch.nan), torch.tensor([0]))
    assert sum(lines(draw(cameras(sampler(bad))))) == 0


def test_says_when_images_are_missing(sample: Sample) -> None:
    with pytest.raises(ValueError, match="0 images"):
        cameras(replace(sample, images=torch.zeros(1, 0, 3, 4, 4, dtype=torch.uint8)))


def test_depth(sample: Sample, draw: Draw) -> None:
    chances = torch.zeros(1, 1, 6, 40, 4, 11)
    chances[:, :, :, 9] = 1.0
    figure = draw(depth(sample, Features(bev=torch.zeros(1, 1, 1, 1), depth=chances), (1.0, 41.0, 1.0)))
    assert figure.axes[1].images[0].get_array().mean() == pytest.approx(10.5)
    assert "(m)" in figure.axes[3].get_xlabel()
    with pytest.raises(ValueError, match="no depth net"):
        depth(sample, Features(bev=torch.zeros(1, 1, 1, 1)), (1.0, 41.0, 1.0))
