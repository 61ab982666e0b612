"""LiDAR depths as an input of the lift: what SimDistill's released student reads although its paper says images only.

After DepthLSS of SimDistill's mmdet3d/models/vtransforms (depth_lss.py, base.py:239-294), which has it from BEVFusion.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlab.models.layers import ConvNorm, full_precision
from kdlab.sample import Batch

NEAREST = 1e-3
"""Metres; points that are nearer to the camera's plane, or behind it, are on no image."""


@torch.no_grad()
def depth_images(batch: Batch) -> Tensor:
    """Depths of a batch's points in its key images, metres, float32 [B * N, 1, H, W]; 0 where no point fell.

    Of several points in a pixel the nearest counts.

    Raises:
        ValueError: the batch holds no points.
    """
    if not len(batch.points):
        raise ValueError(
            "this camera detector reads LiDAR depths (camera.lidar_depth, quirk simdistill.lidar_depth), but the batch "
            "holds no points: it cannot run on images alone; load points, or train it without the quirk"
        )
    size, cameras = batch.size, batch.images.shape[2]
    height, width = batch.images.shape[-2:]
    with full_precision(batch.points):
        camera_from_frame = torch.linalg.inv_ex(batch.frame_from_camera[:, 0].float()).inverse  # [B, N, 4, 4]
        image_from_frame = batch.image_from_camera[:, 0].float() @ camera_from_frame[..., :3, :]
        points = F.pad(batch.points[:, :3].float(), (0, 1), value=1.0)[:, None, :, None]
        u, v, depth = (image_from_frame[batch.point_batch] @ points)[..., 0].unbind(-1)  # [P, N] each
        column, row = ((pixel / depth.clamp(min=NEAREST)).floor() for pixel in (u, v))
        seen = (depth > NEAREST) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        image = batch.point_batch[:, None] * cameras + torch.arange(cameras, device=depth.device)
        flat = torch.where(seen, (image * height + row) * width + column, 0).long().flatten()
        values = torch.where(seen, depth, math.inf).flatten()
        found = depth.new_full((size * cameras * height * width,), math.inf).scatter_reduce_(0, flat, values, "amin")
    return torch.where(found.isinf(), 0, found).view(-1, 1, height, width)


class LidarDepth(nn.Module):
    """Image features with those of LiDAR depth images mixed in, of the same width.

    Args:
        channels: of the image features.
        stride: pixels per feature cell, a power of two.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        halvings = round(math.log2(stride))
        widths = [8, *([32] * max(halvings - 1, 0)), 64]
        layers: list[nn.Module] = [ConvNorm(1, 8, 1)]
        layers += [ConvNorm(a, b, 3, 2) for a, b in pairwise(widths)][:halvings]
        self.layers = nn.Sequential(*layers)
        self.mix = ConvNorm(widths[halvings] + channels, channels)

    def forward(self, image: Tensor, depth: Tensor) -> Tensor:
        """Features [B, channels, h, w] and depths [B, 1, H, W] of `depth_images` to features [B, channels, h, w]."""
        mixed: Tensor = self.mix(torch.cat((self.layers(depth).to(image.dtype), image), 1))
        return mixed
