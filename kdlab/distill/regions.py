"""Where to distil: rows that count, points of boxes, Gaussian masks, footprints, cells that fire.

No loops over boxes or cells. Boxes are [B, M, 9] tensors; padding and unknown velocities are dealt with here. Nothing
here carries a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlab.geometry import BEVGrid, footprint
from kdlab.models.targets import gaussian_radius


def with_midpoints(corners: Tensor) -> Tensor:
    """Nine points [..., 9, 2] of a box from its corners [..., 4, 2] in the order of `kdlab.geometry.footprint`.

    Corners; centre; midpoints of the rear, left, front and right side.
    """
    centre = corners.mean(-2, keepdim=True)
    sides = (corners + corners.roll(-1, -2)) / 2  # rear, left, front, right
    return torch.cat((corners, centre, sides), -2)


def nine_points(boxes: Tensor) -> Tensor:
    """Corners, centre and side midpoints of boxes [..., 9] in metres [..., 9, 2], in the order of `with_midpoints`."""
    return with_midpoints(footprint(boxes))


def rows_to_last_box(boxes: Tensor) -> Tensor:
    """Rows [B, M] up to the last one whose nine values do not sum to 0, row 0 always included.

    How UniDistill's released code counts (L2C:448-455): a sample without boxes counts one of zero size.
    """
    filled = boxes.nan_to_num().sum(-1) != 0
    counted = filled.flip(1).cummax(1).values.flip(1) if boxes.shape[1] else filled
    counted[:, :1] = True
    return counted


def rows_to_first_zero(boxes: Tensor, labels: Tensor) -> Tensor:
    """Rows [B, M] before the first whose nine values and label + 1 sum to 0; padding (label 0) is among them.

    How UniDistill's released code draws its mask (L2C:100-178 with :456-458).
    """
    filled = boxes.nan_to_num().sum(-1) + labels + 1 != 0
    return filled.long().cumprod(1).bool()


def gaussian_mask(
    boxes: Tensor,
    drawn: Tensor,
    grid: BEVGrid,
    *,
    overlap: float,
    min_radius: int,
    truncate: bool = False,
    channel: Tensor | None = None,
    channels: int = 1,
) -> Tensor:
    """Gaussians at box centres, merged by maximum.

    Args:
        boxes: [B, M, 9].
        drawn: bool [B, M], rows that are drawn.
        grid: of the mask.
        overlap: IoU that sizes the radius, by the formulas of released codes (UniDistill's stand at L2C:100-130).
        min_radius: least radius, cells.
        truncate: round the centre's cell toward zero instead of down, as released codes do.
        channel: int64 [B, M], the channel of each box; channel 0 by default.
        channels: number of channels.

    Returns:
        float32 [B, channels, H, W] in [0, 1]; a centre outside the map draws the part that reaches in.
    """
    batch = boxes.shape[0]
    mask = torch.zeros(batch, channels * grid.height * grid.width, device=boxes.device)
    if boxes.shape[1] == 0:
        return mask.reshape(batch, channels, *grid.shape)
    sizes = boxes[..., 3:5] / grid.cell
    radius = gaussian_radius(sizes[..., 0], sizes[..., 1], overlap, released=True)
    radius = torch.where(drawn, radius.floor().clamp(min=min_radius), 0)
    centre = grid.to_cells(boxes[..., :2])
    centre = centre.trunc() if truncate else centre.floor()
    reach = min(int(radius.max()), max(grid.shape))
    steps = torch.arange(-reach, reach + 1, device=boxes.device, dtype=boxes.dtype)
    dv, du = (d.flatten() for d in torch.meshgrid(steps, steps, indexing="ij"))
    sigma = (2 * radius + 1) / 6
    value = torch.exp(-(du**2 + dv**2) / (2 * sigma[..., None] ** 2))  # [B, M, window]
    column, row = centre[..., :1] + du, centre[..., 1:] + dv
    kept = drawn[..., None] & (du.abs() <= radius[..., None]) & (dv.abs() <= radius[..., None])
    kept &= (column >= 0) & (column < grid.width) & (row >= 0) & (row < grid.height)
    layer = 0 if channel is None else channel[..., None] * (grid.height * grid.width)
    flat = torch.where(kept, layer + row * grid.width + column, 0).long()
    mask.scatter_reduce_(1, flat.flatten(1), torch.where(kept, value, 0).flatten(1).to(mask.dtype), "amax")
    return mask.reshape(batch, channels, *grid.shape)


def footprint_owner(boxes: Tensor, counted: Tensor, grid: BEVGrid, at: float = 0.5) -> Tensor:
    """Which box holds each cell: the lowest index, int64 [B, H, W]; M where none does.

    A box holds a cell if the cell's test point lies strictly inside its footprint. Only the cells around each box are
    looked at, as many as the largest box spans.

    Args:
        boxes: [B, M, 9].
        counted: bool [B, M], boxes that hold cells.
        grid: of the map.
        at: the test point along both sides of a cell: 0.5 its centre, 0 its lower corner.
    """
    batch, many = boxes.shape[:2]
    owner = torch.full((batch, grid.height * grid.width), many, dtype=torch.long, device=boxes.device)
    if many == 0:
        return owner.reshape(batch, *grid.shape)
    cos, sin = boxes[..., 6].cos(), boxes[..., 6].sin()
    length, width = boxes[..., 3], boxes[..., 4]
    sides = (length * cos.abs() + width * sin.abs(), length * sin.abs() + width * cos.abs())
    half = torch.where(counted[..., None], torch.stack(sides, -1) / (2 * grid.cell), 0)
    reach = min(int(half.max() * 2) + 2, max(grid.shape))
    first = (grid.to_cells(boxes[..., :2]) - at - half).ceil().clamp(min=0, max=max(grid.shape))
    cells = first[..., None] + torch.arange(reach, device=boxes.device, dtype=boxes.dtype)  # [B, M, 2, reach]
    low = boxes.new_tensor((grid.x[0], grid.y[0]))
    offset = (cells + at) * grid.cell + (low - boxes[..., :2])[..., None]
    (dx, dy), (column, row) = (v.unbind(2) for v in (offset, cells.long()))
    along = dx[..., None, :] * cos[..., None, None] + dy[..., :, None] * sin[..., None, None]  # [B, M, rows, columns]
    across = dy[..., :, None] * cos[..., None, None] - dx[..., None, :] * sin[..., None, None]
    inside = (along.abs() < length[..., None, None] / 2) & (across.abs() < width[..., None, None] / 2)
    inside &= ((row < grid.height) & counted[..., None])[..., None] & (column < grid.width)[..., None, :]
    flat = torch.where(inside, row[..., None] * grid.width + column[..., None, :], 0)
    index = torch.where(inside, torch.arange(many, device=boxes.device)[:, None, None], many)
    owner.scatter_reduce_(1, flat.flatten(1), index.flatten(1), "amin")
    return owner.reshape(batch, *grid.shape)


def size_scale(boxes: Tensor, owner: Tensor, grid: BEVGrid) -> Tensor:
    """1 / sqrt(cells that the owner's footprint would fill) of each cell, float32 [B, H, W]; 0 without an owner.

    Args:
        boxes: [B, M, 9].
        owner: from `footprint_owner`.
        grid: of the map.
    """
    scale = grid.cell / (boxes[..., 3] * boxes[..., 4]).sqrt()
    return F.pad(scale, (0, 1)).gather(1, owner.flatten(1)).reshape(owner.shape).float()


def fires_wrongly(truth: Tensor, found: Tensor, below: float, above: float, size: tuple[int, int]) -> Tensor:
    """Cells where no target stands and a detector yet fires, bool [B, *size].

    A larger map is brought to ``size`` by the maximum of the cells that fall together, a smaller one by repetition.

    Args:
        truth: heat map of the targets [B, h, w].
        found: of the detector's scores [B, h, w].
        below: targets under this are none.
        above: scores over this fire.
        size: rows and columns of the result.
    """
    fires = ((truth < below) & (found > above)).float()
    if fires.shape[-1] > size[1]:
        fires = F.adaptive_max_pool2d(fires, size)
    elif fires.shape[-1] < size[1]:
        fires = F.interpolate(fires[:, None], size, mode="nearest")[:, 0]
    return fires.bool()


def share(mask: Tensor) -> Tensor:
    """1 / number of a sample's cells in a mask [B, H, W], as float32 [B, 1, 1]; 0 where it has none."""
    count = mask.sum((1, 2), keepdim=True)
    return torch.where(count > 0, 1 / count.clamp(min=1), 0).float()
