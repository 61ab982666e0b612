"""Batch norm where counts differ: point clouds that may be empty, and statistics over several processes."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def world_size() -> int:
    """Number of processes that train together; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_count(count: Tensor) -> Tensor:
    """Mean of a count over all processes; the least is one in all of them together, so that nothing is divided by 0.

    Losses divided by it and averaged over processes are those of one process on the whole batch.
    """
    return across_ranks(count).clamp(min=1.0 / world_size())


def across_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, without gradient; the tensor itself where there is one process."""
    value = value.detach()
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world_size()


class PointNorm(nn.BatchNorm1d):
    """Batch norm of points [P, C]; fewer than two points have no variance and take the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """[P, C] to [P, C], P >= 0."""
        if self.training and len(x) < 2:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class _RankSum(torch.autograd.Function):
    """Sum over ranks whose gradient is summed over ranks too."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def _rank_sum(value: Tensor) -> Tensor:
    if world_size() == 1:
        return value
    summed: Tensor = _RankSum.apply(value)
    return summed


class CrossRankNorm(nn.Module):
    """Batch norm over all processes' entries, weighted by their counts; any backend, CPU included.

    One process with the whole batch and several with parts of it give equal results. All must call it equally often.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.eps, self.momentum = norm.eps, norm.momentum
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    def forward(self, x: Tensor) -> Tensor:
        """[P, C] or [B, C, H, W] to the same shape and type."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        axes = [0, *range(2, x.ndim)]
        shape = (1, -1, *[1] * (x.ndim - 2))
        values = x.float()
        here = values.new_tensor([values.numel() / x.shape[1]])
        total = _rank_sum(torch.cat((values.sum(axes), here)))
        count = total[-1].detach()
        enough = count >= 2  # stays a tensor: to ask for its value would make every layer wait for a GPU
        mean = torch.where(enough, total[:-1] / count.clamp(min=1), self.running_mean)
        centred = values - mean.view(shape)
        variance = torch.where(enough, _rank_sum(centred.square().sum(axes)) / count.clamp(min=1), self.running_var)
        self._track(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1), enough)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, enough: Tensor) -> None:
        self.num_batches_tracked += enough
        share = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked.clamp(min=1)
        self.running_mean.lerp_(mean, enough * share)
        self.running_var.lerp_(variance, enough * share)


def sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every batch norm in ``module`` by one with statistics over all processes; the state dict stays the same.

    Args:
        module: changed in place; a batch norm itself is not, so use the return value.

    Raises:
        TypeError: a kind of batch norm that does more than normalise.
    """
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, PointNorm):
        return CrossRankNorm(cast("nn.BatchNorm1d | nn.BatchNorm2d", module)).train(module.training)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"sync_batchnorm: {type(module).__name__} is not a plain batch norm")
    for name, child in module.named_children():
        replacement = sync_batchnorm(child)
        if replacement is not child:
            setattr(module, name, replacement)
    return module
