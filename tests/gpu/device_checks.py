"""What a CUDA device is asked, as functions of a device: a CPU is asked the same, which tests the questions."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from mini_run import mini_config
from torch import Tensor

from kdlab.config import DistillConfig
from kdlab.distill import Distiller, build_method, usual_teacher
from kdlab.geometry import BEVGrid
from kdlab.models import build_detector
from kdlab.models.lift import lift_index, splat
from kdlab.pairing import fit_student
from kdlab.sample import Features
from kdlab.train import Training

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from model_fakes import random_batch

GRID = BEVGrid((-8.0, 8.0), (-6.0, 6.0), 2.0)
Z = (-1.0, 1.0)


def check_splat(device: str) -> None:
    """Values and gradients against float64 sums over single points on the CPU, to 1e-5: float32 sums of tens of terms.

    Points stand well inside cells that are known beforehand, so that no rounding moves one. The grid's last column
    stays empty, the first pixel sees nothing, and points lie outside the grid, above and below.
    """
    g = torch.Generator().manual_seed(0)
    batch, cameras, bins, channels, size = 2, 2, 16, 37, (4, 6)  # 37: not a multiple of a GPU's 32 lanes
    shape = (batch, cameras, size[0] * size[1], bins)
    row = torch.randint(0, GRID.height, shape, generator=g)
    column = torch.randint(-1, GRID.width - 1, shape, generator=g)
    column[0, 0, 0] = -1
    xy = GRID.to_metres(torch.stack((column, row), -1) + 0.1 + 0.8 * torch.rand(*shape, 2, generator=g))
    z = 3 * torch.rand(shape, generator=g) - 1.5
    inside = (column >= 0) & (z >= Z[0]) & (z < Z[1])
    cell = (torch.arange(batch).view(-1, 1, 1, 1) * GRID.height + row) * GRID.width + column

    given = torch.randn(batch * cameras, channels, *size, generator=g)
    depths = torch.rand(batch * cameras, bins, *size, generator=g)
    weights = torch.randn(batch, channels, *GRID.shape, generator=g)

    context, depth = (t.double().requires_grad_() for t in (given, depths))
    lifted = context.flatten(2).mT[:, :, None] * depth.flatten(2).mT[..., None]  # [B * N, h * w, D, C]
    sums = lifted.new_zeros(batch * GRID.height * GRID.width, channels)
    sums = sums.index_add(0, cell[inside], lifted.view(*shape, channels)[inside])
    truth = sums.view(batch, *GRID.shape, channels).permute(0, 3, 1, 2)
    wanted = (truth, *torch.autograd.grad((truth * weights).sum(), (context, depth)))

    context, depth = (t.to(device).requires_grad_() for t in (given, depths))
    index = lift_index(torch.cat((xy, z[..., None]), -1).to(device), GRID, Z)
    bev = splat(context, depth, index, batch, GRID)
    found = (bev, *torch.autograd.grad((bev * weights.to(device)).sum(), (context, depth)))
    value, to_context, to_depth = (t.detach().cpu() for t in found)
    for ours, theirs in zip((value, to_context, to_depth), wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-5, atol=1e-5)
    assert not value[..., -1].any() and value[..., :-1].any(1).all()
    assert not to_context[0, :, 0, 0].any()
    assert not to_depth.flatten(2).mT.reshape(shape)[~inside].any()


@dataclass(frozen=True)
class Step:
    """What a training step of a distilled camera student computes.

    Attributes:
        maps: of the student's forward pass.
        losses: all of them.
        gradients: of the student and the adapters.
    """

    maps: dict[str, Tensor]
    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]


def step(method_name: str, device: str, seed: int = 0) -> Step:
    """One step of a tiny student from fresh weights; the seed is the batch's."""
    torch.manual_seed(0)
    modality = usual_teacher(method_name, "camera")
    config, _ = fit_student(replace(mini_config(Path(), "camera"), distill=DistillConfig(method_name)))
    assert config.distill is not None
    student, teacher = (build_detector(c) for c in (config.detector, mini_config(Path(), modality).detector))
    method = build_method(config.distill, "camera", modality)
    labels = method.stages[0].build(teacher, method.on) if method.needs_labels else None
    training = Training(student, Distiller(method, student, teacher, labels, grid=student.grid)).to(device).train()
    seen: list[Features] = []
    student.register_forward_hook(lambda _, __, features: seen.append(features))
    losses = training(random_batch(config.detector, seed=seed).to(device))
    torch.stack(list(losses.values())).sum().backward()
    maps = {"bev": seen[0].bev, "heatmap": seen[0].predictions.heatmap, "boxes": seen[0].predictions.regression}
    gradients = {name: p.grad for name, p in training.named_parameters() if p.grad is not None}
    return Step(maps, losses, gradients)


def assert_same(one: Step, two: Step, losses: float = 0.0, gradients: float = 0.0) -> None:
    """Maps are equal bit for bit; losses and gradients are, but for these relative tolerances.

    A gradient is compared by its norm, beside a hundredth of the whole gradient's: some are zero but for rounding.
    """
    assert one.losses.keys() == two.losses.keys() and one.gradients.keys() == two.gradients.keys()
    for name, value in one.maps.items():
        assert torch.equal(value, two.maps[name]), name
    for name, value in one.losses.items():
        assert (value - two.losses[name]).abs() <= losses * value.abs(), name
    whole = torch.stack([g.norm() for g in one.gradients.values()]).norm()
    assert whole > 0
    for name, value in one.gradients.items():
        assert (value - two.gradients[name]).norm() <= gradients * (value.norm() + whole / 100), name
