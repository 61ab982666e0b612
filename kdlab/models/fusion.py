"""How camera and LiDAR (real or simulated) BEV maps become one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kdlab.models.layers import ConvNorm


class ConvFuser(nn.Module):
    """Concatenation and a 3x3 convolution ("BEVFusion", ICRA 2023 and NeurIPS 2022)."""

    def __init__(self, camera: int, lidar: int, outputs: int) -> None:
        super().__init__()
        self.mix = ConvNorm(camera + lidar, outputs)

    def forward(self, camera_bev: Tensor, lidar_bev: Tensor) -> Tensor:
        """[B, camera, H, W] and [B, lidar, H, W] to [B, outputs, H, W]."""
        fused: Tensor = self.mix(_together(camera_bev, lidar_bev))
        return fused


class GatedFuser(nn.Module):
    """Concatenation, a gate per channel from the whole map's mean, a 3x3 convolution ("UniDistill", CVPR 2023).

    BEVFusion_nuscenes_base_exp.py:107-135 of its released code. The gate tells how much each channel of either sensor
    counts in a sample.
    """

    def __init__(self, camera: int, lidar: int, outputs: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(camera + lidar, camera + lidar, 1)
        self.mix = ConvNorm(camera + lidar, outputs)

    def forward(self, camera_bev: Tensor, lidar_bev: Tensor) -> Tensor:
        """[B, camera, H, W] and [B, lidar, H, W] to [B, outputs, H, W]."""
        both = _together(camera_bev, lidar_bev)
        fused: Tensor = self.mix(both * self.gate(both.mean((2, 3), keepdim=True)).sigmoid())
        return fused


FUSERS: dict[Literal["conv", "gated"], type[ConvFuser] | type[GatedFuser]] = {"conv": ConvFuser, "gated": GatedFuser}
"""By `kdlab.config.DetectorConfig.fuser`."""


def _together(camera_bev: Tensor, lidar_bev: Tensor) -> Tensor:
    return torch.cat((camera_bev, lidar_bev.to(camera_bev.dtype)), 1)
