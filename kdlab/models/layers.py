"""Building blocks that the encoders, the neck and the head share."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def full_precision(like: Tensor) -> AbstractContextManager[None]:
    """Context without autocast on the device of ``like``, for geometry, softmax over depth, pooling and losses."""
    island: AbstractContextManager[None] = torch.autocast(like.device.type, enabled=False)
    return island


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm and, unless ``act`` is false, ReLU; padding keeps the size at stride 1."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, act: bool = True) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        if act:
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a short cut ("Deep Residual Learning", CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, stride=stride)
        self.second = ConvNorm(outputs, outputs, act=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))
