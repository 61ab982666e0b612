from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from model_fakes import random_boxes
from torch import Tensor

from kdlab.config import HeadConfig
from kdlab.geometry import BEVGrid
from kdlab.models.head import CenterHead, focal_sums
from kdlab.models.targets import CenterTargets, targets
from kdlab.sample import TASKS, Boxes3D, Predictions, TaskPrediction

GRID = BEVGrid((-16.0, 16.0), (-12.8, 12.8), 1.6)


def predictions_of(made: CenterTargets, confident: float = 12.0) -> Predictions:
    """The predictions of a head that has learnt these targets by heart."""
    batch, _, height, width = made.heatmap.shape
    regression = torch.zeros(batch, len(TASKS), 10, height * width)
    for b in range(batch):
        for m in made.mask[b].nonzero().flatten().tolist():
            regression[b, made.task[b, m], :, made.cell[b, m]] = made.codes[b, m]
    logits = torch.where(made.heatmap == 1, confident, -confident)
    tasks = []
    for index, classes in enumerate(TASKS):
        maps = regression[:, index].view(batch, 10, height, width).split((2, 1, 3, 2, 2), 1)
        tasks.append(TaskPrediction(logits[:, list(classes)], *maps))
    return Predictions(tuple(tasks))


def boxes_on_separate_cells(seed: int) -> Boxes3D:
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(2, 12, 12.0, generator)
    cells = torch.stack([torch.randperm(5 * 4, generator=generator)[:12] for _ in range(2)])
    corner = torch.stack((cells % 5, cells // 5), -1) * 4 * GRID.cell + torch.tensor([-16.0, -12.8])
    boxes.values[..., :2] = corner + torch.rand(2, 12, 2, generator=generator) * GRID.cell
    return boxes


@pytest.mark.parametrize("nms", ["circle", "rotated"])
@pytest.mark.parametrize("local_max", [1, 3])
def test_decoding_targets_gives_the_boxes_back(nms: str, local_max: int) -> None:
    config = dataclasses.replace(HeadConfig(), nms=nms, local_max=local_max)
    boxes = boxes_on_separate_cells(3)
    boxes.values[..., 3:6].clamp_(max=3.0)  # no two may overlap
    head = CenterHead(8, config, GRID)
    found = head.decode(predictions_of(targets(boxes, GRID, config)))
    for b, detections in enumerate(found):
        assert len(detections) == 12
        distance = torch.cdist(boxes.values[b, :, :2], detections.values[:, :2])
        match = distance.argmin(1)
        torch.testing.assert_close(detections.values[match], boxes.values[b], atol=1e-4, rtol=1e-4)
        assert torch.equal(detections.labels[match], boxes.labels[b])
        assert (detections.scores.diff() <= 0).all()


def test_loss_is_nothing_for_perfect_predictions() -> None:
    config = HeadConfig()
    made = targets(boxes_on_separate_cells(5), GRID, config)
    losses = CenterHead(8, config, GRID).loss(predictions_of(made, 20.0), made)
    assert float(losses["box"]) == pytest.approx(0, abs=1e-6) and float(losses["heatmap"]) < 1e-4


def naive_focal(logits: Tensor, heatmap: Tensor) -> list[float]:
    """CornerNet's formula, cell by cell."""
    sums = []
    for classes in TASKS:
        total = 0.0
        for x, t in zip(
            logits[:, list(classes)].flatten().tolist(), heatmap[:, list(classes)].flatten().tolist(), strict=True
        ):
            p = 1 / (1 + math.exp(-x))
            total -= (1 - p) ** 2 * math.log(p) if t == 1 else (1 - t) ** 4 * p**2 * math.log(1 - p)
        sums.append(total)
    return sums


def test_focal_loss_equals_the_naive_sum() -> None:
    made = targets(boxes_on_separate_cells(7), GRID, HeadConfig())
    logits = torch.randn(made.heatmap.shape, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(
        focal_sums(logits, made.heatmap), torch.tensor(naive_focal(logits, made.heatmap)), rtol=1e-4, atol=1e-4
    )


def naive_box_loss(predictions: Predictions, made: CenterTargets, config: HeadConfig) -> float:
    total = 0.0
    for index, task in enumerate(predictions.tasks):
        maps, mine = task.regression().flatten(2), made.mask & (made.task == index)
        error = 0.0
        for b, m in mine.nonzero().tolist():
            for k in range(10):
                weight = config.velocity_weight if k >= 8 else 1.0
                if made.known[b, m, k]:
                    error += weight * abs(float(maps[b, k, made.cell[b, m]].detach() - made.codes[b, m, k]))
        total += error / max(1, int(mine.sum()))
    return total * config.regression_weight


def test_box_loss_equals_the_naive_sum_and_leaves_unknown_velocity_out() -> None:
    config, boxes = HeadConfig(), boxes_on_separate_cells(9)
    boxes.values[0, ::2, 7:] = float("nan")
    made = targets(boxes, GRID, config)
    head = CenterHead(8, config, GRID)
    predictions = head(torch.randn(2, 8, *GRID.shape, generator=torch.Generator().manual_seed(1)))
    loss = head.loss(predictions, made)["box"]
    assert float(loss.detach()) == pytest.approx(naive_box_loss(predictions, made, config), rel=1e-5)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


def test_no_boxes_give_finite_loss_and_gradient() -> None:
    head = CenterHead(8, HeadConfig(), GRID)
    made = targets(Boxes3D.pad([Boxes3D.empty()] * 2), GRID, HeadConfig())
    losses = head.loss(head(torch.randn(2, 8, *GRID.shape)), made)
    assert float(losses["box"].detach()) == 0 and losses["heatmap"].isfinite()
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_predictions_that_are_not_finite_are_an_error() -> None:
    head = CenterHead(8, HeadConfig(), GRID)
    predictions = head(torch.randn(1, 8, *GRID.shape))
    predictions.tasks[2].vel.data[0, 0, 3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        head.decode(predictions)


def test_limits_on_detections() -> None:
    head = CenterHead(8, dataclasses.replace(HeadConfig(), max_detections=7, score_threshold=0.0), GRID)
    assert [len(d) for d in head.decode(head(torch.randn(2, 8, *GRID.shape)))] == [7, 7]
    head = CenterHead(8, dataclasses.replace(HeadConfig(), score_threshold=0.99), GRID)
    assert [len(d) for d in head.decode(head(torch.randn(2, 8, *GRID.shape)))] == [0, 0]
