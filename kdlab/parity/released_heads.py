"""Forward passes of released networks that kdlab has in another form, from stored weights: for parity alone.

SECONDFPN and CenterHead as in mmdet3d 1.0.0rc4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlab.sample import TASKS

_BOX = ("reg", "height", "dim", "rot", "vel")
Weights = Mapping[str, Tensor]


def _norm(weights: Weights, name: str, x: Tensor, eps: float, train: bool) -> Tensor:
    mean, variance = (None, None) if train else (weights[f"{name}.running_mean"], weights[f"{name}.running_var"])
    return F.batch_norm(x, mean, variance, weights[f"{name}.weight"], weights[f"{name}.bias"], train, eps=eps).relu()


def released_neck(weights: Weights, stages: Sequence[Tensor], train: bool) -> Tensor:
    """Stages to one map: each by a transposed convolution (at stride 1 a convolution), norm, ReLU, side by side."""
    maps = []
    for i, stage in enumerate(stages):
        kernel = weights[f"deblocks.{i}.0.weight"]
        stride = kernel.shape[-1]
        moved = F.conv2d(stage, kernel) if stride == 1 else F.conv_transpose2d(stage, kernel, stride=stride)
        maps.append(_norm(weights, f"deblocks.{i}.1", moved, 1e-3, train))
    return torch.cat(maps, 1)


def center_head(weights: Weights, neck: Tensor, train: bool) -> tuple[Tensor, Tensor]:
    """Class logits [B, 10, H, W] and box maps [B, tasks, 10, H, W]."""

    def hidden(name: str, x: Tensor) -> Tensor:
        bias = weights.get(f"{name}.conv.bias")
        return _norm(weights, f"{name}.bn", F.conv2d(x, weights[f"{name}.conv.weight"], bias, padding=1), 1e-5, train)

    shared = hidden("shared_conv", neck)

    def output(task: int, name: str) -> Tensor:
        branch = f"task_heads.{task}.{name}"
        return F.conv2d(
            hidden(f"{branch}.0", shared), weights[f"{branch}.1.weight"], weights[f"{branch}.1.bias"], padding=1
        )

    logits = torch.cat([output(task, "heatmap") for task in range(len(TASKS))], 1)
    boxes = [torch.cat([output(task, name) for name in _BOX], 1) for task in range(len(TASKS))]
    return logits, torch.stack(boxes, 1)
