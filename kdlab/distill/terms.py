"""How to compare: readings at points, relations, class scores, attention, normalisers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdlab.models.norm import across_ranks


def normalised(uv: Tensor, height: int, width: int, exchange: bool = False) -> Tensor:
    """Cell coordinates (column, row) [..., 2] to what ``grid_sample(align_corners=False)`` takes, in [-1, 1].

    Args:
        uv: [..., 2].
        height: rows of the map.
        width: its columns.
        exchange: swap the two components afterwards, as some released codes do: the place read is then the mirror
            image at the map's diagonal.
    """
    half = uv.new_tensor((width / 2, height / 2))
    where = (uv - half) / half  # u / half - 1 rounds differently, and where a vector is nearly 0 that shows
    return where.flip(-1) if exchange else where


def places_read(uv: Tensor, height: int, width: int, exchange: bool = False) -> Tensor:
    """The cell coordinates that `read_points` reads when it is given ``uv``: itself, or the exchanged place."""
    return uv.flip(-1) * uv.new_tensor((width / height, height / width)) if exchange else uv


def read_points(maps: Tensor, uv: Tensor, exchange: bool = False) -> Tensor:
    """Read maps [B, C, H, W] bilinearly at cell coordinates (column, row) [B, ..., 2], zeros outside: [B, ..., C].

    The centre of cell i, i + 1/2, reads cell i exactly; for ``exchange`` see `normalised`.
    """
    where = normalised(uv, maps.shape[-2], maps.shape[-1], exchange).flatten(1, -2)
    read: Tensor = _Read.apply(maps, where.to(maps.dtype))
    return read.reshape(*uv.shape[:-1], maps.shape[1])


class _Read(torch.autograd.Function):
    """grid_sample of maps [B, C, H, W] at [B, K, 2]; its gradient has channels last in memory.

    grid_sample's own comes with channels first; adding that to the network's gradient costs more than all the rest.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(where)
        ctx.shape = maps.shape
        return F.grid_sample(maps, where.unsqueeze(1), align_corners=False)[:, :, 0].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (where,) = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        size = where.new_tensor((width, height))
        at = (where + 1) * (size / 2) - 0.5
        low = at.floor()
        steps = where.new_tensor(((0, 0), (1, 0), (0, 1), (1, 1)))
        share = (at - low).unsqueeze(-2)
        weight = torch.where(steps == 1, share, 1 - share).prod(-1)  # [B, K, 4]
        cells = low.unsqueeze(-2) + steps
        inside = ((cells >= 0) & (cells < size)).all(-1)
        flat = torch.where(inside, cells[..., 1] * width + cells[..., 0], 0).long()
        flat = flat + torch.arange(batch, device=where.device)[:, None, None] * height * width
        rows = gradient.unsqueeze(-2) * torch.where(inside, weight, 0).unsqueeze(-1)
        table = gradient.new_zeros(batch * height * width, channels).index_add_(0, flat.flatten(), rows.flatten(0, 2))
        return table.view(batch, height, width, channels).permute(0, 3, 1, 2), None


def cosine_relation(vectors: Tensor, eps: float = 1e-4) -> Tensor:
    """Inner products [..., K, K] of vectors [..., K, C], each divided by (its norm + eps); zero vectors give zeros.

    A smaller eps makes entries of nearly empty cells ill-conditioned.
    """
    unit: Tensor = vectors / (torch.linalg.vector_norm(vectors, dim=-1, keepdim=True) + eps)
    return torch.matmul(unit, unit.mT)


def class_probability(logits: Tensor, eps: float, temperature: float = 1.0) -> Tensor:
    """Sigmoid of logits over a temperature, kept within [eps, 1 - eps]."""
    return torch.sigmoid(logits / temperature).clamp(eps, 1 - eps)


def masked_mean_l1(student: Tensor, teacher: Tensor, mask: Tensor, eps: float = 1e-4) -> Tensor:
    """Unreduced mask * mean over channels of |student - teacher| / (sum of the mask + eps), [B, H, W].

    Maps are [B, C, H, W], the mask [B, H, W]; its sum is averaged over ranks.
    """
    return mask * (student - teacher).abs().mean(1) / (across_ranks(mask.sum()) + eps)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of maps [B, C, H, W], summed over channels, [B, H, W]."""
    error: Tensor = _SquaredError.apply(student, teacher)
    return error


class _SquaredError(torch.autograd.Function):
    """What autograd would do step by step, with one pass over the maps in the backward pass instead of three."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        apart = student - teacher
        ctx.save_for_backward(apart)
        return apart.square().sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        (apart,) = ctx.saved_tensors
        ours = apart * (2 * gradient).unsqueeze(1)
        return ours, -ours if ctx.needs_input_grad[1] else None


def spatial_attention(maps: Tensor, temperature: float) -> Tensor:
    """`cell_attention` of the mean |value| over the channels of maps [B, C, H, W], [B, H, W]."""
    return cell_attention(maps.abs().mean(1), temperature)


def cell_attention(strength: Tensor, temperature: float) -> Tensor:
    """Softmax of strength / temperature over a sample's cells, times their number, [B, H, W]; its mean is 1."""
    attention: Tensor = (strength / temperature).flatten(1).softmax(1) * strength[0].numel()
    return attention.reshape(strength.shape)


def channel_attention(maps: Tensor, temperature: float) -> Tensor:
    """Which channels of maps [B, C, H, W] are strong, [B, C, 1, 1]: softmax over channels, times their number.

    Of mean |value| over cells / temperature; its mean over the channels is 1.
    """
    strength = maps.abs().mean((2, 3), keepdim=True) / temperature
    attention: Tensor = strength.softmax(1) * maps.shape[1]
    return attention
