"""Centre head: maps, loss and decoding ("CenterPoint", CVPR 2021)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlab.config import HeadConfig
from kdlab.geometry import BEVGrid
from kdlab.models.layers import ConvNorm, full_precision
from kdlab.models.nms import circle_nms, rotated_nms
from kdlab.models.norm import mean_count
from kdlab.models.targets import CODES, TASK_OF_CLASS, CenterTargets, decode_boxes
from kdlab.sample import TASKS, Detections, Predictions, TaskPrediction

CIRCLE_RADIUS = (2.0, 3.5, 3.2, 1.0, 0.9, 0.4)
"""Metres within which circle NMS keeps one box, per task."""
HEATMAP_BIAS = -2.19
"""Start of the class logits: probability 0.1 ("CornerNet", ECCV 2018)."""
_SPLIT = (2, 1, 3, 2, 2)  # reg, height, dim, rot, vel


class TaskHead(nn.Module):
    """Heat map and boxes of one task, each with a hidden convolution of its own."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.hidden = ConvNorm(inputs, 2 * hidden)  # both branches' convolutions as one
        self.heatmap = nn.Conv2d(hidden, classes, 1)
        self.boxes = nn.Conv2d(hidden, CODES, 1)
        nn.init.constant_(cast(Tensor, self.heatmap.bias), HEATMAP_BIAS)

    def forward(self, x: Tensor) -> TaskPrediction:
        """[B, inputs, H, W] to the task's maps, float32."""
        hidden = self.hidden(x)
        with full_precision(x):  # bfloat16 steps would tie scores and round velocities
            for_heatmap, for_boxes = hidden.float().chunk(2, 1)
            return TaskPrediction(self.heatmap(for_heatmap), *self.boxes(for_boxes).split(_SPLIT, 1))


class CenterHead(nn.Module):
    """A shared convolution and one `TaskHead` per task."""

    def __init__(self, inputs: int, config: HeadConfig, grid: BEVGrid) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.shared = ConvNorm(inputs, config.channels)
        self.tasks = nn.ModuleList(TaskHead(config.channels, config.branch, len(classes)) for classes in TASKS)

    def forward(self, neck: Tensor) -> Predictions:
        """[B, inputs, H, W] to raw predictions at the same size."""
        shared = self.shared(neck)
        return Predictions(tuple(task(shared) for task in self.tasks))

    def loss(self, predictions: Predictions, targets: CenterTargets) -> dict[str, Tensor]:
        """Weighted losses ``heatmap`` and ``box``, each normalised per task by its positives and summed over tasks."""
        with full_precision(targets.heatmap):
            positives = _positives(targets)
            return {
                "heatmap": (focal_sums(predictions.heatmap, targets.heatmap) / positives).sum(),
                "box": self.config.regression_weight * (self._box_sums(predictions, targets) / positives).sum(),
            }

    def _box_sums(self, predictions: Predictions, targets: CenterTargets) -> Tensor:
        """Weighted L1 summed over boxes, per task [6]."""
        weights = torch.ones(CODES, device=targets.codes.device)
        weights[8:] = self.config.velocity_weight
        gathered = gather_codes(predictions, targets.task, targets.cell)
        error = torch.where(targets.known, gathered - targets.codes, 0.0).abs() @ weights  # [B, M]
        return error.new_zeros(len(TASKS)).index_add(0, targets.task.flatten(), error.flatten())

    @torch.no_grad()
    def decode(self, predictions: Predictions) -> list[Detections]:
        """Boxes of each sample in the frame of the grid, best first, without duplicates.

        Raises:
            FloatingPointError: a heat map or box map is not finite.
        """
        with full_precision(predictions.tasks[0].heatmap):
            maps = (predictions.heatmap, predictions.regression)
            if not all(bool(m.isfinite().all()) for m in maps):  # a NaN is no peak: later it would go unseen
                raise FloatingPointError("predictions: the head's maps hold values that are not finite")
            scores, labels, boxes = self._candidates(predictions)
            return [self._suppress(s, c, b) for s, c, b in zip(scores, labels, boxes, strict=True)]

    def _candidates(self, predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
        """The best cells of all classes: scores and labels [B, K], boxes [B, K, 9]."""
        heat = predictions.heatmap.float().sigmoid()
        if self.config.local_max > 1:
            window = self.config.local_max
            heat = torch.where(F.max_pool2d(heat, window, 1, window // 2) == heat, heat, 0.0)
        cells = heat.shape[-2] * heat.shape[-1]
        scores, index = heat.flatten(1).topk(min(2 * self.config.max_detections, heat[0].numel()))
        labels, cell = index.div(cells, rounding_mode="floor"), index % cells
        task = torch.tensor(TASK_OF_CLASS, device=index.device)[labels]
        return scores, labels, decode_boxes(gather_codes(predictions, task, cell), cell, self.grid)

    def _suppress(self, scores: Tensor, labels: Tensor, boxes: Tensor) -> Detections:
        enough = scores >= self.config.score_threshold
        scores, labels, boxes = scores[enough], labels[enough], boxes[enough]
        groups = torch.tensor(TASK_OF_CLASS, device=labels.device)[labels]
        if self.config.nms == "circle":
            keep = circle_nms(boxes, groups, boxes.new_tensor(CIRCLE_RADIUS)[groups])
        else:
            keep = rotated_nms(boxes, groups, self.config.nms_iou)
        best = keep.nonzero().squeeze(1)[: self.config.max_detections]
        return Detections(boxes[best], labels[best], scores[best])


def gather_codes(predictions: Predictions, task: Tensor, cell: Tensor) -> Tensor:
    """Box codes float32 [B, K, 10] that the given task [B, K] predicts at flat cells [B, K]."""
    maps = predictions.regression.unflatten(1, (len(TASKS), CODES)).flatten(3)  # [B, tasks, 10, H * W]
    batch = torch.arange(len(maps), device=maps.device)[:, None]
    codes: Tensor = maps[batch, task, :, cell].float()
    return codes


def _positives(targets: CenterTargets) -> Tensor:
    """Positives per task, float32 [6], mean over processes, at least 1."""
    counts = targets.heatmap.new_zeros(len(TASKS))
    counts = counts.index_add(0, targets.task.flatten(), targets.mask.flatten().to(counts.dtype))
    return mean_count(counts)


def focal_sums(logits: Tensor, heatmap: Tensor) -> Tensor:
    """Gaussian focal loss summed per task, float32 [6] ("CornerNet", ECCV 2018, alpha 2, beta 4).

    Args:
        logits: [B, 10, H, W].
        heatmap: targets [B, 10, H, W]; exactly 1 marks a positive.
    """
    logits = logits.float()
    chance = logits.sigmoid()
    hit = (1 - chance).square() * F.logsigmoid(logits)
    miss = (1 - heatmap).pow(4) * chance.square() * F.logsigmoid(-logits)
    per_class = -torch.where(heatmap == 1, hit, miss).sum((0, 2, 3))
    tasks = torch.tensor(TASK_OF_CLASS, device=logits.device)
    return per_class.new_zeros(len(TASKS)).index_add(0, tasks, per_class)
