"""Geometry compensation: each cell of a map reads others, at places that it learns ("SimDistill", AAAI 2024)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdlab.models.layers import full_precision

HEADS = 8
"""Of both of SimDistill's modules (its MB:193-201, MV/depth_lss.py:81-93)."""
_TOGETHER = 5
"""Points that are read at a time: what is read for all of them would be 20 maps at 180 x 180 cells."""


class GeometryCompensation(nn.Module):
    """A map plus one layer of deformable attention on it ("Deformable DETR", ICLR 2021), in plain PyTorch.

    Each head of each cell reads the map at learned offsets from the cell and takes their mean by learned weights. No
    norm, no further layer. It starts as in Deformable DETR: heads look in directions of their own, the k-th point k
    cells away, all with equal weight.

    Args:
        channels: of the maps.
        size: their rows and columns.
        points: that a head reads.
        heads: parts of the channels that read at places of their own.
        corner_reference: offsets count from a cell's lower corner, not from its centre, as in SimDistill's released
            code: the map is read half a cell away.

    Raises:
        ValueError: the channels do not split evenly into heads, or not into two halves for the position code.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], points: int, heads: int = HEADS, corner_reference: bool = False
    ) -> None:
        super().__init__()
        if channels % heads or channels % 2:
            raise ValueError(
                f"geometry compensation: {channels} channels do not split into {heads} heads and two halves; "
                f"choose camera.channels and camera.context as multiples of {math.lcm(heads, 2)}"
            )
        self.size, self.heads, self.points = size, heads, points
        self.reference = 0.0 if corner_reference else 0.5
        self.columns = nn.Parameter(torch.rand(size[1], channels // 2))
        self.rows = nn.Parameter(torch.rand(size[0], channels // 2))
        self.offsets = nn.Linear(channels, heads * points * 2)
        self.weights = nn.Linear(channels, heads * points)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        for layer in (self.offsets, self.weights, self.value, self.output):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.offsets.weight)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.output.weight)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)
        self.offsets.bias.copy_((direction[:, None] * steps[:, None]).flatten())

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, channels, H, W] of the size that it was made for, compensated, float32."""
        with full_precision(maps):  # an offset of 20 cells in bfloat16 would be off by a sixteenth of a cell
            whole = maps.float()
            compensated: Tensor = whole + self.attend(whole)
            return compensated

    def attend(self, maps: Tensor) -> Tensor:
        """The layer alone, without the map itself: [B, channels, H, W] to the same.

        Raises:
            ValueError: maps of another size.
        """
        batch, channels, height, width = maps.shape
        if (height, width) != self.size:
            raise ValueError(f"geometry compensation was made for maps of {self.size} cells, not {(height, width)}")
        tokens = maps.permute(0, 2, 3, 1)
        query = (tokens + self.position()).flatten(1, 2)  # [B, H * W, C]
        value = self.value(tokens).permute(0, 3, 1, 2).reshape(batch * self.heads, -1, height, width)
        offsets = self._by_head(self.offsets(query), 2)
        weights = self._by_head(self.weights(query), 1).squeeze(-1).softmax(-1)
        extent = maps.new_tensor((width, height))
        where = ((self.cells(maps.device)[:, None] + offsets) / extent) * 2 - 1
        read = self._read(value, where, weights).reshape(batch, channels, height, width)
        attended: Tensor = self.output(read.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return attended

    def position(self) -> Tensor:
        """Position code [H, W, channels]: the first half tells the column, the second the row."""
        height, width = self.size
        columns, rows = self.columns.expand(height, -1, -1), self.rows[:, None].expand(-1, width, -1)
        return torch.cat((columns, rows), -1)

    def cells(self, device: torch.device | None = None) -> Tensor:
        """Where offsets count from, (column, row) in cells [H * W, 2]; the centre of cell i is i + 1/2."""
        row, column = (torch.arange(n, device=device) + self.reference for n in self.size)
        return torch.stack(torch.meshgrid(row, column, indexing="ij")[::-1], -1).flatten(0, 1)

    def _by_head(self, flat: Tensor, numbers: int) -> Tensor:
        """[B, H * W, heads * points * numbers] to [B * heads, H * W, points, numbers]."""
        parts: Tensor = flat.unflatten(-1, (self.heads, self.points, numbers))
        return parts.transpose(1, 2).flatten(0, 1)

    def _read(self, value: Tensor, where: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of what is read [B * heads, channels / heads, H * W], some points at a time."""
        total = value.new_zeros(value.shape[0], value.shape[1], where.shape[1])
        parts = zip(where.split(_TOGETHER, 2), weights.split(_TOGETHER, 2), strict=True)
        for places, shares in parts:
            if torch.is_grad_enabled():  # what was read is read again for the gradient, not kept
                total += checkpoint(_weighted, value, places, shares, use_reentrant=False, preserve_rng_state=False)
            else:
                total += _weighted(value, places, shares)
        return total


def _weighted(value: Tensor, where: Tensor, weights: Tensor) -> Tensor:
    """Sum over points of value [B, C, H, W] read at [B, N, P, 2], zeros outside, times weights [B, N, P]."""
    read: Tensor = F.grid_sample(value, where, align_corners=False) * weights.unsqueeze(1)
    return read.sum(-1)
