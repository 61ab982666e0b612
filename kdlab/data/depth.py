"""Depth targets: what the LiDAR tells of each cell of an image's feature map."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def depth_targets(
    points: Tensor,
    image_from_camera: Tensor,
    frame_from_camera: Tensor,
    image_size: tuple[int, int],
    stride: int,
    max_depth: float = float("inf"),
) -> Tensor:
    """Nearest depth of the key sweep's points in each cell of the feature map.

    Args:
        points: [P, 5] in the key ego frame; only those with time lag 0 count.
        image_from_camera: [N, 3, 3] of the key frame, image augmentation included.
        frame_from_camera: [N, 4, 4] of the key frame. It holds the BEV augmentation just as the points do, so depths
            stay true metres.
        image_size: height and width of the images, pixels; multiples of the stride.
        stride: pixels per cell.
        max_depth: points farther along the optical axis are left out, metres.

    Returns:
        Depth along the optical axis [N, h, w], metres; 0 where no point fell.

    Raises:
        ValueError: the stride does not divide the image size.
    """
    if image_size[0] % stride or image_size[1] % stride:
        raise ValueError(f"depth_targets: stride {stride} does not divide {image_size[0]} x {image_size[1]} pixels")
    height, width, cameras = image_size[0] // stride, image_size[1] // stride, len(image_from_camera)
    cells_from_image = torch.diag(points.new_tensor((1 / stride, 1 / stride, 1)))
    cells_from_frame = cells_from_image @ image_from_camera @ torch.linalg.inv(frame_from_camera)[:, :3]  # [N, 3, 4]
    key = points[points[:, 4] == 0, :3]
    column, row, depth = (cells_from_frame[:, :, :3] @ key.T).add_(cells_from_frame[:, :, 3:]).unbind(1)  # [N, P] each
    seen = (depth > 1e-3) & (depth < max_depth)
    for place, size in ((column, width), (row, height)):  # With a cell to spare: few points are left to divide.
        seen &= (place > -depth) & (place < (size + 1) * depth)
    near = torch.from_numpy(np.flatnonzero(seen.numpy()))  # torch's nonzero takes four times as long.
    camera, depth = near // len(key), depth.take(near)
    column, row = (column.take(near) / depth).floor_().long(), (row.take(near) / depth).floor_().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    cells = cameras * height * width
    index = torch.where(inside, (camera * height + row) * width + column, cells)  # One more cell takes the rest.
    nearest = depth.new_full((cells + 1,), float("inf")).scatter_reduce_(0, index, depth, "amin")[:cells]
    targets: Tensor = nearest.masked_fill(nearest.isinf(), 0).view(cameras, height, width)
    return targets
