"""Optimiser, moving average of the weights, and the schedule, a pure function of the step."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from kdlab.config import TrainConfig

WARM_UP = 0.3
"""Share of the steps in which the learning rate rises."""


def learning_rate(step: int, steps: int, peak: float) -> float:
    """One-cycle schedule: a cosine from a tenth of ``peak`` up to it, then a cosine down to a thousandth.

    Args:
        step: 0 .. steps - 1.
        steps: of the whole training.
        peak: highest learning rate.
    """
    top = WARM_UP * steps
    if step < top:
        low, share = 0.1, 1 - step / top
    else:
        low, share = 1e-3, (step - top) / max(steps - 1 - top, 1e-9)
    return peak * (low + (1 - low) * (1 + math.cos(math.pi * min(share, 1.0))) / 2)


def adamw(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that want gradients; biases and normalisation weights do not decay."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in wanted if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in wanted if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr)


class MovingAverage:
    """Exponential moving average of a module's parameters and floating-point buffers.

    Args:
        module: the module to follow.
        decay: share of the old average that a step keeps; less in the first steps.

    Attributes:
        module: a copy of the module that holds the average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the module's weights after a step."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for old, new in zip(self.module.state_dict().values(), module.state_dict().values(), strict=True):
            if old.is_floating_point():
                old.lerp_(new, weight)
            else:
                old.copy_(new)
