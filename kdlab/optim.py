"""Optimiser, moving average of the weights, and the schedule, a pure function of the step."""

from __future__ import annotations

import copy
import math
import re

import torch
from torch import nn

from kdlab.config import TrainConfig

WARM_UP = 0.3
"""Share of the steps in which a one-cycle's learning rate rises, where a config does not say."""
CAMERA = re.compile(r"(student\.)?camera\.(?!temporal\.)")
"""How names of the camera branch's parameters begin, in a detector and in its training."""


def learning_rate(step: int, steps: int, peak: float, warm_up: float = WARM_UP) -> float:
    """One-cycle schedule: a cosine from a tenth of ``peak`` up to it, then a cosine down to a thousandth.

    Args:
        step: 0 .. steps - 1.
        steps: of the whole training.
        peak: highest learning rate.
        warm_up: share of the steps in which it rises.
    """
    top = warm_up * steps
    if step < top:
        low, share = 0.1, 1 - step / top
    else:
        low, share = 1e-3, (step - top) / max(steps - 1 - top, 1e-9)
    return peak * (low + (1 - low) * (1 + math.cos(math.pi * min(share, 1.0))) / 2)


def stepped_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The config's ``steps`` schedule: linearly up from a thousandth, then a tenth after each milestone's epoch.

    Args:
        step: 0 .. steps - 1.
        steps: of the whole training, as many in each epoch.
        config: peak, epochs, milestones, warm-up.
    """
    passed = sum(step >= epoch * steps / config.epochs for epoch in config.milestones)
    rise = min(step / (config.warm_up * steps), 1.0) if config.warm_up > 0 else 1.0
    return config.lr * (1e-3 + (1 - 1e-3) * rise) * 0.1**passed


def check_schedule(config: TrainConfig) -> None:
    """See that a training reaches the milestones of its schedule.

    Raises:
        ValueError: it ends before.
    """
    late = [epoch for epoch in config.milestones if epoch >= config.epochs]
    if config.schedule == "steps" and late:
        raise ValueError(
            f"train.milestones: the learning rate is to fall after epoch {late[0]}, but train.epochs is "
            f"{config.epochs}; give earlier --train.milestones, or none, or more epochs"
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, config: TrainConfig) -> float:
    """Give an optimiser of `adamw` its learning rates for a step; returns that of all but the camera branch."""
    if config.schedule == "steps":
        rate = stepped_rate(step, steps, config)
    else:
        rate = learning_rate(step, steps, config.lr, config.warm_up)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
    return rate


def adamw(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that want gradients; biases and normalisation weights do not decay.

    Where the camera branch has a learning rate of its own, its parameters are groups of their own.
    """
    groups = []
    for factor in dict.fromkeys((1.0, config.camera_lr)):
        own = factor != 1.0
        wanted = [
            p
            for name, p in module.named_parameters()
            if p.requires_grad and (config.camera_lr == 1.0 or bool(CAMERA.match(name)) == own)
        ]
        share = {"factor": factor} if own else {}
        groups.append({"params": [p for p in wanted if p.ndim > 1], "weight_decay": config.weight_decay, **share})
        groups.append({"params": [p for p in wanted if p.ndim <= 1], "weight_decay": 0.0, **share})
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
