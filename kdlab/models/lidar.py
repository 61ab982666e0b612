"""LiDAR branch: dynamic pillars in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdlab.config import DetectorConfig
from kdlab.models.layers import full_precision
from kdlab.models.norm import PointNorm

_DECORATIONS = 8  # offset to the pillar's mean (3) and to its centre (2), z, intensity, time lag


def pillar_max(values: Tensor, cell: Tensor, cells: int) -> Tensor:
    """Largest value per cell and channel, zero in empty cells.

    Args:
        values: [P, C], not negative.
        cell: int64 [P], below ``cells``.
        cells: number of cells.

    Returns:
        [cells, C].
    """
    index = cell[:, None].expand_as(values)
    return values.new_zeros(cells, values.shape[1]).scatter_reduce(0, index, values, "amax")


class _PointLayer(nn.Module):
    """Linear layer, batch norm and ReLU on points."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = PointNorm(outputs)

    def forward(self, points: Tensor) -> Tensor:
        return torch.relu(self.norm(self.linear(points)))


class PillarEncoder(nn.Module):
    """Points to a BEV map: every point of a cell's column counts, with no cap on points or pillars.

    Point network of "PointPillars" (CVPR 2019) on the dynamic pillars of "End-to-End Multi-View Fusion" (CoRL 2019).
    Points outside the grid or the z range are dropped. An empty cloud gives zeros. It runs in float32.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        width = config.lidar.channels
        self.grid, self.z = config.grid, config.z
        self.first = _PointLayer(_DECORATIONS, width)
        self.second = _PointLayer(2 * width, width) if config.lidar.layers > 1 else None

    def forward(self, points: Tensor, point_batch: Tensor, size: int) -> Tensor:
        """Encode the clouds of a batch.

        Args:
            points: [P, 5], x, y, z (metres, key ego frame), intensity, time lag (seconds).
            point_batch: int64 [P], sample of each point.
            size: B.

        Returns:
            float32 [B, lidar.channels, H, W].
        """
        height, width = self.grid.shape
        with full_precision(points):
            column, row, inside = self.grid.locate(points[:, :2])
            inside &= (points[:, 2] >= self.z[0]) & (points[:, 2] < self.z[1])
            cell = ((point_batch * height + row) * width + column)[inside]
            features = self.first(self.decorate(points[inside].float(), column[inside], row[inside], cell, size))
            bev = pillar_max(features, cell, size * height * width)
            if self.second is not None:
                features = self.second(torch.cat((features, bev.index_select(0, cell)), 1))
                bev = pillar_max(features, cell, size * height * width)
        return bev.view(size, height, width, -1).permute(0, 3, 1, 2)

    def decorate(self, points: Tensor, column: Tensor, row: Tensor, cell: Tensor, size: int) -> Tensor:
        """What the first layer sees of each point, [P, 8]: nothing tells where in the grid its pillar stands."""
        cells = size * self.grid.height * self.grid.width
        homogeneous = torch.cat((points[:, :3], torch.ones_like(points[:, :1])), 1)
        sums = points.new_zeros(cells, 4).index_add_(0, cell, homogeneous).index_select(0, cell)
        from_mean = points[:, :3] - sums[:, :3] / sums[:, 3:]
        centre = self.grid.to_metres(torch.stack((column, row), 1).to(points.dtype) + 0.5)
        from_centre = (points[:, :2] - centre) / self.grid.cell
        return torch.cat((from_mean, from_centre, points[:, 2:5]), 1)
