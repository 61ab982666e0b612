"""Annotations as maps, and the encoder that turns them into a detector's BEV features ("LabelDistill", ECCV 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlab.geometry import BEVGrid, footprint
from kdlab.models.detector import Channels, Detector
from kdlab.models.layers import ResidualBlock, full_precision
from kdlab.sample import CLASSES, Batch, Boxes3D, Detections, Features

VALUES = 9
"""Numbers of a box."""


@dataclass(frozen=True)
class LabelMaps:
    """Annotations written into the cells of a grid; zeros where there is none.

    Attributes:
        box: float32 [B, H, W, 9], the values of the cell's box, as they are; an unknown velocity is 0.
        label: float32 [B, H, W, 10], its class, one-hot.
        mask: bool [B, H, W], where there is one.
    """

    box: Tensor
    label: Tensor
    mask: Tensor


@torch.no_grad()
def label_maps(boxes: Boxes3D, grid: BEVGrid, released: bool = False) -> LabelMaps:
    """Write padded boxes [B, M, ...] into the cells of their footprints.

    A cell belongs to a box if its centre lies inside the footprint; where several boxes do, the last one in the order
    of classes, then of the annotations, has it. The cell of a box's centre goes to that box before all footprints.
    Boxes without length or width are left out.

    Args:
        boxes: annotations.
        grid: of the maps.
        released: paint as the released code does, see `_released_cells`; a centre is then a cell like any other.
    """
    values, batch = boxes.values.nan_to_num(), len(boxes.values)
    counted = boxes.valid & (values[..., 3:5] > 0).all(-1)
    order = boxes.labels.argsort(stable=True, dim=1)
    labels, counted = boxes.labels.gather(1, order), counted.gather(1, order)
    values = values.gather(1, order[..., None].expand_as(values))
    many = values.shape[1]
    rank = torch.arange(1, many + 1, device=values.device)[:, None]
    winner = torch.zeros(batch, grid.height * grid.width, dtype=torch.long, device=values.device)
    if many:
        painted = [_released_cells(values, grid)] if released else [_inner_cells(values, grid), _centre(values, grid)]
        for first, (cell, filled) in enumerate(painted):
            won = torch.where(filled & counted[..., None], rank + first * many, 0)
            winner.scatter_reduce_(1, cell.flatten(1), won.flatten(1), "amax")
        owner = (winner - 1).clamp(min=0) % many
        values = values.gather(1, owner[..., None].expand(-1, -1, VALUES))
        labels = labels.gather(1, owner)
    else:
        values, labels = values.new_zeros(*winner.shape, VALUES), torch.zeros_like(winner)
    mask = winner > 0
    box = values.float() * mask[..., None]
    label = F.one_hot(labels, len(CLASSES)).float() * mask[..., None]
    shape = (batch, *grid.shape)
    return LabelMaps(box.view(*shape, VALUES), label.view(*shape, len(CLASSES)), mask.view(shape))


def _inner_cells(values: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
    """Flat cells [B, M, K] around boxes [B, M, 9], and which of them have their centre inside the footprint."""
    cos, sin = values[..., 6].cos(), values[..., 6].sin()
    length, width = values[..., 3], values[..., 4]
    sides = torch.stack((length * cos.abs() + width * sin.abs(), length * sin.abs() + width * cos.abs()), -1)
    half = sides / (2 * grid.cell)
    first = (grid.to_cells(values[..., :2]) - 0.5 - half).ceil().clamp(min=0, max=max(grid.shape))
    u, v = _window(first, min(int(half.max() * 2) + 2, max(grid.shape)))
    offset = grid.to_metres(torch.stack((u, v), -1) + 0.5) - values[..., None, :2]  # [B, M, K, 2]
    along = offset[..., 0] * cos[..., None] + offset[..., 1] * sin[..., None]
    across = offset[..., 1] * cos[..., None] - offset[..., 0] * sin[..., None]
    inside = (along.abs() < length[..., None] / 2) & (across.abs() < width[..., None] / 2)
    return _flat(u, v, inside, grid)


def _centre(values: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
    """Flat cell [B, M, 1] of each box's centre, and whether it lies in the grid."""
    u, v = grid.to_cells(values[..., :2]).floor()[..., None].unbind(2)
    return _flat(u, v, torch.ones_like(u, dtype=torch.bool), grid)


def _released_cells(values: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
    """Flat cells [B, M, K] and which of them LabelDistill's code paints (utils/bev_mask.py:17-52).

    A rectangle of half the length and half the width, its corners rounded toward zero, is filled by the rule of
    scikit-image 0.21: corners, and cells to whose right or left an odd number of sides is crossed; so the middle of a
    quadrangle that rounding has folded stays empty. What lies beyond the last column or row is painted there.
    """
    cells = torch.cat((grid.to_cells(values[..., :2]), values[..., 2:3], values[..., 3:5] / grid.cell / 2), -1)
    corners = footprint(torch.cat((cells, values[..., 5:]), -1)).trunc()  # [B, M, 4, 2]
    low, high = corners.amin(2).clamp(min=0), corners.amax(2)
    u, v = _window(low, int((high - low).max().clamp(min=0)) + 1)
    x = corners[..., 0, None] - u[:, :, None]  # [B, M, 4, K], seen from the cell
    y = corners[..., 1, None] - v[:, :, None]
    x1, y1 = x.roll(1, 2), y.roll(1, 2)
    crossed = (x * y1 - x1 * y) / (y1 - y)  # where a side meets the cell's row; only used where y1 is not y
    right = ((y > 0) != (y1 > 0)) & (crossed > 0)
    left = ((y < 0) != (y1 < 0)) & (crossed < 0)
    filled = ((x == 0) & (y == 0)).any(2) | (right.sum(2) % 2 == 1) | (left.sum(2) % 2 == 1)
    filled &= (u <= high[..., :1]) & (v <= high[..., 1:])
    return _flat(u.clamp(max=grid.width - 1), v.clamp(max=grid.height - 1), filled, grid)


def _window(first: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Columns and rows [B, M, side * side] of the square that begins at cells (column, row) [B, M, 2]."""
    steps = torch.arange(side, device=first.device, dtype=first.dtype)
    dv, du = torch.meshgrid(steps, steps, indexing="ij")
    return first[..., :1] + du.flatten(), first[..., 1:] + dv.flatten()


def _flat(u: Tensor, v: Tensor, filled: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
    filled = filled & (u >= 0) & (u < grid.width) & (v >= 0) & (v < grid.height)
    return torch.where(filled, v * grid.width + u, 0).long(), filled


def label_channels(stages: Sequence[int], hidden: int | None = None) -> Channels:
    """Widths of a label encoder's features; arguments as of `LabelEncoder`."""
    return Channels(0, 0, 0, 0, 2 * stages[0] if hidden is None else hidden, tuple(stages), 0, 0, 0)


class LabelEncoder(nn.Module):
    """Annotations to the BEV encoder stages that would make a detector find them.

    Each cell's box and class go through layers of their own, are added and mixed; a residual block and one convolution
    per stage look around. Every stage ends in a layer norm over its whole volume (C, H, W) with a weight and a bias of
    its own for every element: so the encoder belongs to one grid, and most of its parameters stand there (at the
    paper's widths and 128 x 128 cells 6.3 of 8.6 million, see `norm_parameters`).

    Runs in float32: in half precision a box's place in metres would be known to 0.25 m only.

    Args:
        grid: of the detector.
        stages: widths of its BEV encoder; stage i has stride first_stride * 2**i.
        hidden: width of the hidden layers, by default twice that of the first stage, as in the paper (256 and 128).
        released: paint the labels as the released code does, see `label_maps`.
        first_stride: of the first stage.

    Attributes:
        grid: as given.
        channels: widths of the features.
    """

    def __init__(
        self,
        grid: BEVGrid,
        stages: Sequence[int],
        hidden: int | None = None,
        released: bool = False,
        first_stride: int = 1,
    ) -> None:
        super().__init__()
        self.grid, self.released = grid, released
        self.channels = label_channels(stages, hidden)
        hidden = self.channels.bev
        self.box, self.label = _two_layers(VALUES, hidden), _two_layers(len(CLASSES), hidden)
        self.both = _two_layers(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.block = ResidualBlock(hidden, hidden)
        self.levels = nn.ModuleList()
        for index, width in enumerate(stages):
            stride = first_stride * 2**index
            shape = (width, *(math.ceil(side / stride) for side in grid.shape))
            convolution = nn.Conv2d(hidden, width, 3, stride, 1, padding_mode="replicate")
            self.levels.append(nn.Sequential(convolution, nn.LayerNorm(shape), nn.ReLU()))

    @property
    def norm_parameters(self) -> int:
        """Parameters in the layer norms over whole stages."""
        return sum(p.numel() for level in self.levels for p in cast(nn.Sequential, level)[1].parameters())

    def forward(self, batch: Batch) -> Features:
        """Features of a batch's boxes: ``stages``, and in ``bev`` what they are made from."""
        maps = label_maps(batch.boxes, self.grid, self.released)
        return self.encode(maps)

    def encode(self, maps: LabelMaps) -> Features:
        """Features of label maps, float32."""
        with full_precision(maps.box):
            cells = self.norm(self.both(self.box(maps.box) + self.label(maps.label)))
            bev = self.block(cells.permute(0, 3, 1, 2).contiguous())
            return Features(bev=bev, stages=tuple(level(bev) for level in self.levels))


def _two_layers(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden))


class LabelDetector(nn.Module):
    """A label encoder before a detector's neck and head: finds what it is told.

    Args:
        encoder: makes the stages.
        detector: its neck and head.
    """

    def __init__(self, encoder: nn.Module, detector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.detector = encoder, cast(Detector, detector)

    def forward(self, batch: Batch) -> Features:
        """Features with predictions; the batch must hold its boxes."""
        features: Features = self.encoder(batch)
        neck, predictions = self.detector.decode_stages(features.stages)
        return replace(features, neck=neck, predictions=predictions)

    def seen(self, batch: Batch) -> Batch:
        """All of a batch, see `Detector.seen`: it is told the annotations."""
        return batch

    def predict(self, features: Features) -> list[Detections]:
        """Final boxes of each sample, see `Detector.predict`."""
        return self.detector.predict(features)
