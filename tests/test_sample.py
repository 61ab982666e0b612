"""Typed values: boxes, padding, devices, prediction order."""

import math
from dataclasses import fields

import pytest
import torch
from nuscenes.eval.detection.constants import ATTRIBUTE_NAMES, DETECTION_NAMES

from kdlab.geometry import BEVGrid
from kdlab.sample import (
    ATTRIBUTES,
    CAMERAS,
    CLASSES,
    TASKS,
    Batch,
    Boxes3D,
    Detections,
    Features,
    Predictions,
    TaskPrediction,
    to_device,
)


def boxes(count: int) -> Boxes3D:
    values = torch.arange(count * 9, dtype=torch.float32).view(count, 9)
    return Boxes3D.make(values, torch.arange(count) % 10)


def test_names_are_those_of_nuscenes() -> None:
    assert set(CLASSES) == set(DETECTION_NAMES) and len(CLASSES) == 10
    assert set(ATTRIBUTES) == set(ATTRIBUTE_NAMES)
    assert len(set(CAMERAS)) == 6
    assert [c for task in TASKS for c in task] == list(range(10))


def test_make_checks_shapes_and_fills_in() -> None:
    made = boxes(3)
    assert len(made) == 3 and made.valid.all() and made.attributes.tolist() == [-1] * 3
    assert made.points.tolist() == made.visibility.tolist() == [0] * 3
    made.points[0] = 5
    assert made.visibility[0] == 0  # No shared memory.
    with pytest.raises(ValueError, match="must be"):
        Boxes3D.make(torch.zeros(3, 7), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="must be"):
        Boxes3D.make(torch.zeros(3, 9), torch.zeros(2, dtype=torch.long))


def test_picking_and_velocity() -> None:
    made = boxes(3)
    made.values[1, 7] = math.nan
    assert made.velocity_known.tolist() == [True, False, True]
    assert made[made.velocity_known].labels.tolist() == [0, 2]
    assert len(made[:2]) == 2


def test_padding() -> None:
    padded = Boxes3D.pad([boxes(2), Boxes3D.empty(), boxes(3)])
    assert padded.values.shape == (3, 3, 9)
    assert padded.valid.sum(1).tolist() == [2, 0, 3]
    assert padded.attributes[1].tolist() == [-1] * 3 and padded.values[1].abs().sum() == 0
    assert torch.equal(padded[2].values, boxes(3).values) and torch.equal(padded[0].values[:2], boxes(2).values)
    assert Boxes3D.pad([Boxes3D.empty(), Boxes3D.empty()]).values.shape == (2, 0, 9)


def batch() -> Batch:
    return Batch(
        tokens=["a", "b"],
        images=torch.zeros(2, 1, 6, 3, 4, 8, dtype=torch.uint8),
        image_from_camera=torch.zeros(2, 1, 6, 3, 3),
        frame_from_camera=torch.zeros(2, 1, 6, 4, 4),
        key_from_frame=torch.eye(4).expand(2, 1, 4, 4),
        points=torch.zeros(7, 5),
        point_batch=torch.tensor((0, 0, 0, 1, 1, 1, 1)),
        depth=torch.zeros(2, 6, 1, 2),
        boxes=Boxes3D.pad([boxes(1), boxes(2)]),
        global_from_key=torch.eye(4, dtype=torch.float64).expand(2, 4, 4),
        bev_augmentation=torch.eye(4).expand(2, 4, 4),
    )


def test_camera_students_see_images_only() -> None:
    bare = batch().images_only()
    assert bare.size == 2 and len(bare.points) == len(bare.point_batch) == 0
    assert bare.depth is None and bare.boxes.values.shape == (2, 0, 9)
    assert torch.equal(bare.images, batch().images)


def test_to_device_reaches_every_tensor() -> None:
    moved = batch().to("meta")
    tensors = [getattr(moved, f.name) for f in fields(moved) if isinstance(getattr(moved, f.name), torch.Tensor)]
    tensors += [getattr(moved.boxes, f.name) for f in fields(moved.boxes)]
    assert len(tensors) == 15 and all(t.device.type == "meta" for t in tensors)
    assert moved.tokens == ["a", "b"]
    features = to_device(Features(bev=torch.zeros(1), stages=(torch.zeros(1), torch.zeros(2))), "meta")
    assert features.stages[1].device.type == "meta" and features.neck is None
    grid = BEVGrid.square(8, 1)
    assert to_device((grid, [torch.zeros(1)], 3), "meta")[0] is grid


def test_predictions_are_in_class_order() -> None:
    parts = [
        TaskPrediction(
            heatmap=torch.stack([torch.full((2, 2), float(c)) for c in task])[None],
            **{n: torch.full((1, k, 2, 2), i + 0.1 * j) for j, (n, k) in enumerate(
                (("reg", 2), ("height", 1), ("dim", 3), ("rot", 2), ("vel", 2)))},
        )
        for i, task in enumerate(TASKS)
    ]  # fmt: skip
    predictions = Predictions(tuple(parts))
    assert predictions.heatmap[0, :, 0, 0].tolist() == list(range(10))
    assert predictions.regression.shape == (1, 60, 2, 2)
    torch.testing.assert_close(
        predictions.regression[0, 10:20, 0, 0], torch.tensor((1, 1, 1.1, 1.2, 1.2, 1.2, 1.3, 1.3, 1.4, 1.4))
    )


def test_joined_predictions_keep_their_gradient() -> None:
    heat, boxes = torch.zeros(1, 10, 2, 2, requires_grad=True), torch.zeros(1, 60, 2, 2, requires_grad=True)
    predictions = Predictions.of_maps(heat, boxes)
    with torch.no_grad():
        assert predictions.heatmap.shape == heat.shape and predictions.regression.shape == boxes.shape
    assert predictions.heatmap is predictions.heatmap and predictions.regression is predictions.regression
    (predictions.heatmap.sum() + predictions.regression.sum()).backward()
    assert heat.grad is not None and boxes.grad is not None and bool((heat.grad == 1).all() & (boxes.grad == 1).all())
    with torch.no_grad():
        plain = Predictions.of_maps(torch.zeros(1, 10, 2, 2), torch.zeros(1, 60, 2, 2))
        assert plain.heatmap is plain.heatmap


def test_detections_count_their_scores() -> None:
    assert len(Detections(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long))) == 0
    assert len(Detections(torch.zeros(2, 9), torch.zeros(2, dtype=torch.long), torch.ones(2))) == 2
