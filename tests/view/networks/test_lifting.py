"""Lift-splat taken apart: sums, pixels of a cell, wrong depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

from kdlab.config import AugmentConfig, CameraConfig, DetectorConfig, HeadConfig
from kdlab.data.batch import augment, collate
from kdlab.geometry import BEVGrid
from kdlab.models import Detector
from kdlab.sample import Batch, Sample
from kdlab.view.networks import lifting

Draw = Callable[[Figure], Figure]
GRID = BEVGrid.square(32.0, 2.0)


def detector(**camera: object) -> Detector:
    torch.manual_seed(0)
    seen = CameraConfig(image_size=(32, 64), channels=8, context=8, depth=(1.0, 31.0, 1.0), **camera)  # type: ignore[arg-type]
    return Detector(DetectorConfig("camera", grid=GRID, camera=seen, head=HeadConfig(channels=8))).eval()


def batch_of(sample: Sample) -> Batch:
    return collate([augment(sample, AugmentConfig.none(), (32, 64), seed=0, draw=0)])


@pytest.fixture
def noisy(sample: Sample) -> Sample:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 255, sample.images.shape, generator=generator, dtype=torch.uint8)
    return replace(sample, images=images)


@pytest.fixture
def steps(noisy: Sample) -> lifting.LiftSteps:
    return lifting.lift_steps(detector(), batch_of(noisy), noisy)


def test_the_parts_sum_up_to_the_detectors_map(noisy: Sample, steps: lifting.LiftSteps) -> None:
    with torch.no_grad():
        own = detector().camera(batch_of(noisy)).camera_bev[0, 0]  # type: ignore[misc]
    assert torch.allclose(steps.bev(), own, atol=1e-5)
    assert torch.allclose(sum(steps.bev([camera]) for camera in range(6)), own, atol=1e-4)  # type: ignore[arg-type]


def test_mass_is_the_probability_inside_the_grid(steps: lifting.LiftSteps) -> None:
    flat = steps.points.flatten(0, 2)
    inside = GRID.locate(flat[:, :2])[2] & (flat[:, 2] >= steps.z[0]) & (flat[:, 2] < steps.z[1])
    weights = steps.depth.permute(0, 2, 3, 1).flatten()
    assert float(steps.mass().sum()) == pytest.approx(float(weights[inside].sum()), rel=1e-4)
    none = torch.zeros(6, *steps.frustum.size, dtype=torch.bool)
    assert float(steps.mass(none).sum()) == 0


def test_pixels_feeding_a_cell_carry_its_mass_and_lie_at_its_distance(steps: lifting.LiftSteps) -> None:
    row, column = 16, 25  # x = 19, y = 1: ahead
    weight, depth = lifting.feeding(steps, row, column)
    assert float(weight.sum()) == pytest.approx(float(steps.mass()[row, column]), rel=1e-4)
    assert weight[0].sum() > 0 and weight[3].sum() == 0  # the front camera's, not the back one's
    assert ((depth[0][weight[0] > 0] - 19).abs() <= 1.01).all()
    assert depth[3].isnan().all()


def test_pixels_of_a_box_are_those_in_front_of_it(noisy: Sample, steps: lifting.LiftSteps) -> None:
    box = noisy.boxes.values[0]  # 10 m ahead, in the middle of the front image
    found = lifting.pixels_of_box(steps, noisy, box)
    assert found[0].any() and not found[1:].any()
    rows, columns = found[0].nonzero().T
    assert float(columns.float().mean()) == pytest.approx((steps.frustum.size[1] - 1) / 2, abs=0.6)
    behind = lifting.pixels_of_box(steps, noisy, box * torch.tensor([-1.0, *[1] * 8]))
    assert not behind[0].any() and behind[3].any()
    assert rows.numel() < found[0].numel()


def test_measured_depth_puts_all_into_the_bin_of_the_lidar() -> None:
    target = torch.tensor([[[0.0, 5.3], [30.9, 31.0]]])
    found = lifting.measured_depth(target, (1.0, 31.0, 1.0))
    assert found.shape == (1, 30, 2, 2)
    assert found[0, 4, 0, 1] == 1 and found[0, 29, 1, 0] == 1 and found.sum() == 2


def test_shifted_depth_moves_away_and_loses_what_leaves() -> None:
    depth = torch.tensor([0.25, 0.75, 0.0]).view(1, 3, 1, 1)
    assert lifting.shifted_depth(depth, 1).flatten().tolist() == [0.0, 0.25, 0.75]
    assert lifting.shifted_depth(depth, 2).flatten().tolist() == [0.0, 0.0, 0.25]


def test_right_depth_lands_at_the_object_and_no_idea_smears(
    noisy: Sample, steps: lifting.LiftSteps, draw: Draw
) -> None:
    target = torch.full((6, *steps.frustum.size), 10.0)
    depths = {
        "right": lifting.measured_depth(target, steps.frustum.depth),
        "no idea": torch.full_like(steps.depth, 1 / 30),
    }
    figure = draw(lifting.smear(steps, noisy, noisy.boxes.values[0], depths))
    right, unsure = (int(ax.get_title().split("\n")[1].split(" %")[0]) for ax in figure.axes[:2])
    assert right == 100 and unsure < 40


def test_pictures_are_drawn(noisy: Sample, steps: lifting.LiftSteps, draw: Draw) -> None:
    draw(lifting.pixel_ray(noisy, 0, 40.0, 20.0))
    draw(lifting.one_camera(steps, noisy, 0, noisy.boxes))
    draw(lifting.six_cameras(steps, noisy.boxes))
    draw(lifting.cell_pixels(steps, noisy, 16, 25, noisy.boxes))


def test_a_detector_without_cameras_is_refused(noisy: Sample) -> None:
    lidar = Detector(DetectorConfig("lidar", grid=GRID, head=HeadConfig(channels=8)))
    for wrong in (lidar, detector(lidar_depth=True)):
        with pytest.raises(ValueError, match="images alone"):
            lifting.lift_steps(wrong, batch_of(noisy), noisy)
