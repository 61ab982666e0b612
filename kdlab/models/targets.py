"""What the centre head is trained towards: heat maps and box codes, vectorised over all boxes of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdlab.config import HeadConfig
from kdlab.geometry import BEVGrid
from kdlab.sample import CLASSES, TASKS, Boxes3D

CODES = 10
"""Numbers per box: reg (2), height, dim (3), rot (2), vel (2), as in `TaskPrediction.regression`."""
TASK_OF_CLASS = tuple(next(t for t, classes in enumerate(TASKS) if c in classes) for c in range(len(CLASSES)))
"""Task of each class."""
_LEAST_SIZE = 1e-3  # metres; keeps the logarithm of a degenerate box finite


@dataclass
class CenterTargets:
    """Targets of the centre head.

    Attributes:
        heatmap: float32 [B, 10, H, W], Gaussians with value 1 at the centres' cells.
        cell: int64 [B, M], flat cell row * W + column of each box's centre; 0 where ``mask`` is false.
        task: int64 [B, M].
        codes: float32 [B, M, 10], see CODES; unknown velocities are 0.
        known: bool [B, M, 10], the codes that count in the loss.
        mask: bool [B, M], the box is real and its centre lies in the grid.
    """

    heatmap: Tensor
    cell: Tensor
    task: Tensor
    codes: Tensor
    known: Tensor
    mask: Tensor


def gaussian_radius(length: Tensor, width: Tensor, overlap: float, released: bool = False) -> Tensor:
    """Largest shift of a box's two corners that keeps its IoU with the box at ``overlap`` ("CornerNet", ECCV 2018).

    The least of three cases: both corners move the same way, both inwards, both outwards.

    Args:
        length: [...], in cells.
        width: [...], in cells.
        overlap: IoU, in (0, 1).
        released: take the roots (b + sqrt(b^2 - 4ac)) / 2 that CenterPoint's code takes in all three cases, which are
            solutions only for a = 1 and are not the smaller ones; radii come out larger.

    Returns:
        Radius in cells [...].
    """
    total, area = length + width, length * width
    cases = (
        (torch.ones_like(total), total, area * (1 - overlap) / (1 + overlap)),
        (torch.full_like(total, 4.0), 2 * total, area * (1 - overlap)),
        (torch.full_like(total, 4 * overlap), -2 * overlap * total, area * (overlap - 1)),
    )
    radii = []
    for a, b, c in cases:
        root = (b * b - 4 * a * c).clamp(min=0).sqrt()
        radii.append((b + root) / 2 if released else 2 * c.abs() / (b.abs() + root))  # the least positive root
    return torch.stack(radii).amin(0)


def encode_boxes(values: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., 10], flat cells int64 [...] (0 outside) and "inside" bool [...] of boxes [..., 9]."""
    column, row, inside = grid.locate(values[..., :2])
    offset = grid.to_cells(values[..., :2]) - torch.stack((column, row), -1)
    sizes = values[..., 3:6].clamp(min=_LEAST_SIZE).log()
    yaw = values[..., 6:7]
    codes = torch.cat((offset, values[..., 2:3], sizes, yaw.sin(), yaw.cos(), values[..., 7:9]), -1)
    return codes, torch.where(inside, row * grid.width + column, 0), inside


def decode_boxes(codes: Tensor, cell: Tensor, grid: BEVGrid) -> Tensor:
    """Boxes [..., 9] of codes [..., 10] at flat cells [...]; the inverse of `encode_boxes`."""
    column, row = cell % grid.width, cell.div(grid.width, rounding_mode="floor")
    centre = grid.to_metres(torch.stack((column, row), -1) + codes[..., :2])
    yaw = torch.atan2(codes[..., 6], codes[..., 7]).unsqueeze(-1)
    sizes = codes[..., 3:6].clamp(max=5.0).exp()  # e^5 = 148 m: an untrained head must not overflow
    return torch.cat((centre, codes[..., 2:3], sizes, yaw, codes[..., 8:10]), -1)


@torch.no_grad()
def targets(boxes: Boxes3D, grid: BEVGrid, config: HeadConfig) -> CenterTargets:
    """Targets of padded boxes [B, M, ...] on the grid.

    Boxes whose centre lies outside the grid are ignored; velocities that are unknown do not count.
    """
    values = boxes.values.float()
    codes, cell, inside = encode_boxes(values, grid)
    mask = boxes.valid & inside & values[..., :7].isfinite().all(-1)
    known = (mask.unsqueeze(-1) & codes.isfinite()).clone()
    known[..., 8:10] &= boxes.velocity_known.unsqueeze(-1)
    radius = gaussian_radius(values[..., 3] / grid.cell, values[..., 4] / grid.cell, config.overlap).nan_to_num()
    radius = torch.where(mask, radius.floor().clamp(min=config.min_radius), 0).long()
    cell = torch.where(mask, cell, 0)
    task = torch.tensor(TASK_OF_CLASS, device=cell.device)[boxes.labels]
    heatmap = draw_gaussians(cell, radius, boxes.labels, mask, grid)
    return CenterTargets(heatmap, cell, task, torch.where(known, codes, 0.0), known, mask)


def draw_gaussians(cell: Tensor, radius: Tensor, labels: Tensor, mask: Tensor, grid: BEVGrid) -> Tensor:
    """Heat maps [B, 10, H, W]: at each cell the largest of its class's Gaussians, with sigma (2 radius + 1) / 6.

    Args:
        cell: int64 [B, M], flat cells of the centres.
        radius: int64 [B, M], cells; a Gaussian is cut to the square of side 2 radius + 1.
        labels: int64 [B, M].
        mask: bool [B, M]: which to draw.
        grid: of the maps.
    """
    height, width = grid.shape
    heatmap = torch.zeros(len(cell), len(CLASSES), height * width, device=cell.device)
    if cell.numel() == 0:
        return heatmap.view(-1, len(CLASSES), height, width)
    reach = int(radius.max())
    step = torch.arange(-reach, reach + 1, device=cell.device)
    dy, dx = torch.meshgrid(step, step, indexing="ij")
    row = cell.div(width, rounding_mode="floor")[..., None, None] + dy  # [B, M, 2 reach + 1, 2 reach + 1]
    column = (cell % width)[..., None, None] + dx
    drawn = (row >= 0) & (row < height) & (column >= 0) & (column < width) & mask[..., None, None]
    wide = torch.arange(reach + 1, device=cell.device).view(-1, 1, 1)
    sigma = (2 * wide + 1).double() / 6
    gaussians = (-(dx * dx + dy * dy) / (2 * sigma * sigma)).exp() * ((dy.abs() <= wide) & (dx.abs() <= wide))
    value = gaussians.float().index_select(0, radius.flatten()).view(drawn.shape) * drawn  # fewer radii than boxes
    where = labels[..., None, None] * height * width + torch.where(drawn, row * width + column, 0)
    heatmap.flatten(1).scatter_reduce_(1, where.flatten(1), value.flatten(1), "amax")
    return heatmap.view(-1, len(CLASSES), height, width)
