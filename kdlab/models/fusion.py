"""How camera and LiDAR (real or simulated) BEV maps become one."""

from __future__ import annotations

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
        fused: Tensor = self.mix(torch.cat((camera_bev, lidar_bev.to(camera_bev.dtype)), 1))
        return fused
