"""How the losses of a training pull at a map that they share, and whether they pull the same way.

At a loss's gradient with respect to the BEV encoder's input, `Features.bev`, everything that the loss asks of the part
before it has come together. Losses of what lies before that map, such as of camera BEV maps, do not pull at it; at the
image neck's output for the key frame (`TrainConfig.gradients_at`) all of a camera student's do. The cosine of two such
gradients says whether the losses agree (1), ignore each other (0) or fight (-1). As in Yu et al., "Gradient Surgery for
Multi-Task Learning" (NeurIPS 2020), with the map in the place of the weights.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdlab.checkpoint import RunFolder
from kdlab.losslog import keep_rows, whole_lines
from kdlab.models.norm import across_ranks, world_size

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("step", "first", "second", "cosine", "first_norm", "second_norm")
"""Of gradients.csv."""

DETECTION = "detection"
"""Name of the sum of the detection losses."""


def read_gradients(run: Path | str) -> pd.DataFrame:
    """What a run's training measured: one row per step and pair of losses, each pair once.

    Returns:
        step; first, second (names as in losses.csv, or `DETECTION`); cosine of their gradients; first_norm,
        second_norm. A loss without a gradient there in a step has no rows of it. Empty where nothing was measured.
    """
    import pandas as pd

    lines = whole_lines(RunFolder(Path(run)).gradients)
    return pd.read_csv(io.StringIO("".join(lines))) if lines else pd.DataFrame(columns=list(COLUMNS))


class Gradients:
    """Measures on the way: called with a step's losses after the forward pass, before the backward one.

    It reads the graph and leaves it as it is, so a training gives the same bits with and without. Over several
    processes the numbers are those of the whole batch; all processes must call it.

    Args:
        path: gradients.csv; rows of the first step that is seen, and later ones, are dropped (they come again).
        every: steps between two measurements.
        shared: hands over, and lets go of, the student's map of this step.
        write: whether this process writes the file.
    """

    def __init__(self, path: Path, every: int, shared: Callable[[], Tensor], write: bool = True) -> None:
        self.path, self.every, self.shared, self.write = path, every, shared, write
        self._begun = False

    def __call__(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Measure, where the step's turn has come.

        Args:
            step: its number.
            losses: weighted, by name, with their graph.
        """
        shared = self.shared()
        if self.write and not self._begun:
            keep_rows(self.path, step)
            self._begun = True
        if step % self.every:
            return
        names, products = gradient_products(losses, shared)
        if self.write:
            self._add(step, names, products.tolist())

    def _add(self, step: int, names: list[str], products: list[list[float]]) -> None:
        norms = [math.sqrt(products[i][i]) for i in range(len(names))]
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if not file.tell():
                writer.writerow(COLUMNS)
            for i, first in enumerate(names):
                for j in range(i + 1, len(names)):
                    cosine = products[i][j] / (norms[i] * norms[j])
                    writer.writerow([step, first, names[j], cosine, norms[i], norms[j]])


def gradient_products(losses: Mapping[str, Tensor], shared: Tensor) -> tuple[list[str], Tensor]:
    """Scalar products of the losses' gradients at a tensor, over the whole batch and all processes.

    Args:
        losses: scalars by name; those of a distillation begin with ``kd/``, the others are the detection's.
        shared: with its graph.

    Returns:
        Names of the losses that pull at the tensor at all, the detection losses first, then their sum (`DETECTION`),
        then the distillation's; products, float64 [K, K].
    """
    found = {name: _gradient(loss, shared).float().flatten() for name, loss in losses.items()}
    rows = {name: gradient for name, gradient in found.items() if not name.startswith("kd/")}
    rows[DETECTION] = sum(rows.values(), torch.zeros_like(shared, dtype=torch.float32).flatten())
    rows |= {name: gradient for name, gradient in found.items() if name.startswith("kd/")}
    stacked = torch.stack(list(rows.values()))
    # Losses are averaged over processes: each holds its part of the batch, pulled at with the sum of all their losses.
    products = across_ranks(torch.stack([(row * stacked).sum(1, dtype=torch.float64) for row in stacked]))
    pulls = products.diagonal() > 0
    return [n for n, p in zip(rows, pulls.tolist(), strict=True) if p], products[pulls][:, pulls] / world_size()


def _gradient(loss: Tensor, shared: Tensor) -> Tensor:
    """Zeros where the loss does not depend on the tensor."""
    if not loss.requires_grad:
        return torch.zeros_like(shared)
    (gradient,) = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True, materialize_grads=True)
    return gradient
