"""How to compare: readings at points, relations, class scores, normalisers."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def mean_over_ranks(normaliser: Tensor) -> Tensor:
    """A count's mean over all processes, where there are several; the count itself otherwise. Carries no gradient.

    Every rank must call it, also one without any box.
    """
    normaliser = normaliser.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return normaliser
    shared = normaliser.clone()
    dist.all_reduce(shared)
    return shared / dist.get_world_size()


def normalised(uv: Tensor, height: int, width: int) -> Tensor:
    """Cell coordinates (column, row) [..., 2] to what ``grid_sample(align_corners=False)`` takes, in [-1, 1]."""
    half = uv.new_tensor((width / 2, height / 2))
    return (uv - half) / half


def read_points(maps: Tensor, uv: Tensor) -> Tensor:
    """Read maps [B, C, H, W] bilinearly at cell coordinates (column, row) [B, ..., 2], zeros outside: [B, ..., C].

    The centre of cell i, i + 1/2, reads cell i exactly.
    """
    where = normalised(uv, maps.shape[-2], maps.shape[-1]).flatten(1, -2).unsqueeze(1)
    read = F.grid_sample(maps, where.to(maps.dtype), align_corners=False)[:, :, 0]
    return read.transpose(1, 2).reshape(*uv.shape[:-1], maps.shape[1])


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
    return mask * (student - teacher).abs().mean(1) / (mean_over_ranks(mask.sum()) + eps)
