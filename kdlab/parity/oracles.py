"""What only explains released code and plays no part in kdlab: for `kdlab.parity` alone, imported by nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlab.distill.regions import footprint_owner
from kdlab.geometry import BEVGrid


@dataclass(frozen=True)
class ForeignGrid(BEVGrid):
    """The cells of a released script: sizes from the maps, range and cell from the constants.

    Attributes:
        size: rows and columns.
        factor: voxels per cell; released codes divide by voxel and factor one after another, which decides borders.
        exchanged: give column and row in exchanged order, as the ``*_unswapped`` arrays were made.
    """

    size: tuple[int, int] = (0, 0)
    factor: float = 1.0
    exchanged: bool = False

    def __post_init__(self) -> None:
        """Ranges need not hold whole cells here."""

    @property
    def width(self) -> int:
        """Columns."""
        return self.size[1]

    @property
    def height(self) -> int:
        """Rows."""
        return self.size[0]

    def to_cells(self, xy: Tensor) -> Tensor:
        """Metres [..., 2] to cells, in float32 and in the released order of operations."""
        low = torch.tensor((self.x[0], self.y[0]), dtype=torch.float32)
        uv = (xy.float() - low) / torch.tensor(self.cell / self.factor, dtype=torch.float32) / self.factor
        return uv.flip(-1) if self.exchanged else uv


@dataclass(frozen=True)
class Assignment:
    """Targets of one class of one sample.

    Attributes:
        heatmap: float32 [H, W], 1 at positives.
        index: int64 [P], row * W + column of the positives, rising.
        encoding: float32 [P, 10]: dx, dy (cells), z, ln l, ln w, ln h, sin yaw, cos yaw, vx, vy of each positive's box.
    """

    heatmap: Tensor
    index: Tensor
    encoding: Tensor


def nearest_cells(
    boxes: Tensor, low: Sequence[float], cell: float, shape: tuple[int, int], count: int = 9
) -> Assignment:
    """UniDistill's FCOS-like assigner (.../target_assigner/fcos_assigner.py:73-285) for boxes [M, 9] of one class.

    The ``count`` cells whose lower corners are nearest to a box's centre are positives; a cell near several boxes
    takes the nearest. Everything in float32, which decides ties as the released code does.

    Args:
        boxes: float32 [M, 9].
        low: lower bounds x, y of the map, metres.
        cell: side of a cell, metres.
        shape: rows and columns.
        count: positives per box.
    """
    height, width = shape
    boxes = boxes.float()
    centre = (boxes[:, :2] - torch.tensor([float(v) for v in low[:2]])) / torch.tensor(cell)
    row, column = (
        v.flatten().float() for v in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    offset = centre[:, None] - torch.stack((column, row), -1)  # [M, H W, 2]
    distance = offset.square().sum(-1)
    nearest = distance.topk(min(count, height * width), largest=False).indices
    positive = torch.zeros_like(distance, dtype=torch.bool).scatter_(1, nearest, True)
    index = positive.any(0).nonzero()[:, 0]
    heatmap = positive.any(0).float().reshape(height, width)
    if not len(boxes):
        return Assignment(heatmap, index, torch.zeros(0, 10))
    owner = distance[:, index].argmin(0)
    taken = boxes[owner]
    parts = (
        offset[owner, index],
        taken[:, 2:3],
        taken[:, 3:6].log(),
        taken[:, 6:7].sin(),
        taken[:, 6:7].cos(),
        taken[:, 7:9],
    )
    return Assignment(heatmap, index, torch.cat(parts, 1))


def context_ring(boxes: Tensor, counted: Tensor, grid: BEVGrid, cells: float, weight: float) -> tuple[Tensor, Tensor]:
    """DistillBEV's option of a ring of less weight around each box (bevdet_distill.py:755-843): mask and scale.

    The scale lacks the root, and the ring of a box takes over cells that lie within another.

    Args:
        boxes: [B, M, 9].
        counted: bool [B, M].
        grid: of the map.
        cells: by how much a box grows, both sides together.
        weight: of the ring.

    Returns:
        Two maps, float32 [B, H, W].
    """
    grown = boxes.clone()
    grown[..., 3:5] += cells * grid.cell
    inner = footprint_owner(boxes, counted, grid, 0.0) < boxes.shape[1]
    outer = footprint_owner(grown, counted, grid, 0.0)
    mask = torch.where(inner, 1.0, torch.where(outer < boxes.shape[1], weight, 0.0))
    scale = grid.cell**2 / (boxes[..., 3] * boxes[..., 4])
    return mask, F.pad(scale, (0, 1)).gather(1, outer.flatten(1)).reshape(outer.shape).float()


def queued_size_scale(cells: Tensor) -> Tensor:
    """DistillBEV's mode ``dfs`` (bevdet_distill.py:938-962): 1 / size of each cell's component, sizes as counted there.

    Its queue marks a cell when it leaves, so a cell is counted once for each shortest way from the component's first
    cell (first row, then column).

    Args:
        cells: bool [B, H, W].

    Returns:
        float64 [B, H, W], 0 elsewhere.
    """
    scale = cells.new_zeros(cells.shape, dtype=torch.float64)
    for sample, out in zip(cells, scale, strict=True):
        left = sample.clone()
        while left.any():
            ways = torch.zeros_like(out)
            ways.view(-1)[left.flatten().nonzero()[0]] = 1
            seen, size = ways > 0, 0.0
            while ways.any():
                size += float(ways.sum())
                pad = F.pad(ways, (1, 1, 1, 1))
                ways = (pad[:-2, 1:-1] + pad[2:, 1:-1] + pad[1:-1, :-2] + pad[1:-1, 2:]) * (sample & ~seen)
                seen |= ways > 0
            out[seen] = 1 / size
            left &= ~seen
    return scale


def foreground_affinity(student: Tensor, teacher: Tensor, foreground: Tensor) -> Tensor:
    """DistillBEV's unused relation of foreground cells: mean smooth L1 between products of cells, summed over samples.

    Args:
        student: adapted, [B, C, H, W].
        teacher: [B, C, H, W].
        foreground: bool [B, H, W].
    """
    total = student.new_zeros(())
    for ours, theirs, cells in zip(student, teacher, foreground, strict=True):
        if cells.any():
            a, b = ours[:, cells], theirs[:, cells]
            total = total + F.smooth_l1_loss(a.mT @ a, b.mT @ b)
    return total


def channel_means(student: Tensor, teacher: Tensor) -> Tensor:
    """DistillBEV's loss of channel means, off in its recipe: |difference| of means over cells, summed, over the batch.

    Args:
        student: adapted, [B, C, H, W].
        teacher: [B, C, H, W].
    """
    return (teacher.mean((2, 3)) - student.mean((2, 3))).abs().sum() / len(student)


def view_counts(scores: Tensor) -> Tensor:
    """How SimDistill's code counts positives of a TransFusion head (heads/bbox/transfusion.py:976-1052): [B, C, P].

    It takes [B, C, P] for [B, C, P / C, C] and counts scores over 0.1 along the third axis, at least 1.
    """
    batch, classes, proposals = scores.shape
    view = (scores > 0.1).reshape(batch, classes, proposals // classes, classes)
    return view.sum(2, keepdim=True).clamp(min=1).expand(view.shape).reshape(scores.shape)


def view_weights(scores: Tensor) -> Tensor:
    """How SimDistill's code weights boxes of a TransFusion head (heads/bbox/transfusion.py:976-1052): [B, P].

    It takes [B, C, P] for [B, P, C], and adds up the rows of that in which a score is over 0.1.
    """
    rows = scores.reshape(len(scores), scores.shape[2], scores.shape[1])
    return rows.sum(2) * (rows > 0.1).any(2)
