"""Where the errors of a term belong, and how they become a map: places, `TermResult`, gradient maps.

Points are given in continuous cell coordinates (column u, row v) of the result's grid; cell i covers [i, i + 1).
Every place spreads errors over a map so that map and what falls off it add up to the errors' sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from kdlab.geometry import BEVGrid, rotate


class Place(Protocol):
    """Says where errors belong."""

    def spread(self, errors: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
        """Map [B, H, W] of errors on ``grid``, and the sum (scalar) of what is nowhere or outside the map."""
        ...


@dataclass(frozen=True)
class Cells:
    """Errors [B, H, W] (or [B, C, H, W], summed over C) of the grid's cells."""

    def spread(self, errors: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
        """See `Place`."""
        if tuple(errors.shape[-2:]) != grid.shape:
            raise ValueError(f"Cells: errors {tuple(errors.shape)} do not lie on a grid of {grid.shape}")
        return (errors.sum(1) if errors.ndim == 4 else errors), errors.new_zeros(())


@dataclass(frozen=True)
class Points:
    """Errors [B, K] of points; each is spread over the four cells that bilinear sampling reads.

    Attributes:
        uv: [B, K, 2] in cells.
    """

    uv: Tensor

    @classmethod
    def at(cls, xy: Tensor, grid: BEVGrid) -> Points:
        """Points in metres [B, K, 2]."""
        return cls(grid.to_cells(xy))

    def spread(self, errors: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
        """See `Place`."""
        corner = (self.uv - 0.5).floor()
        part = self.uv - 0.5 - corner  # [B, K, 2]
        steps = part.new_tensor(((0, 0), (1, 0), (0, 1), (1, 1)))
        cells = corner.unsqueeze(-2) + steps  # [B, K, 4, 2]
        weight = torch.where(steps == 1, part.unsqueeze(-2), 1 - part.unsqueeze(-2)).prod(-1)
        return _deposit((errors.unsqueeze(-1) * weight).flatten(1), cells.flatten(1, 2), grid)


@dataclass(frozen=True)
class Pairs:
    """Errors [B, K] of pairs of points, halved between the two.

    Attributes:
        first: [B, K, 2] in cells.
        second: [B, K, 2] in cells.
    """

    first: Tensor
    second: Tensor

    def spread(self, errors: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
        """See `Place`."""
        both = Points(torch.cat((self.first, self.second), 1))
        return both.spread(torch.cat((errors, errors), 1) / 2, grid)


@dataclass(frozen=True)
class Boxes:
    """Errors [B, M] of boxes, spread evenly over the cells with centres in the footprint, else on their centre's cell.

    Attributes:
        values: [B, M, 9] boxes in metres.
    """

    values: Tensor

    def spread(self, errors: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
        """See `Place`."""
        centres = grid.centres(errors.device).to(errors.dtype)
        offset = centres - self.values[..., None, None, :2]  # [B, M, H, W, 2]
        local = rotate(offset, -self.values[..., None, None, 6]).abs()
        inside = (local <= self.values[..., None, None, 3:5] / 2).all(-1)
        count = inside.sum((-2, -1))
        share = torch.where(count > 0, errors / count.clamp(min=1), 0)
        covered = (inside * share[..., None, None]).sum(1)
        cell = grid.to_cells(self.values[..., :2]).floor()
        rest, off = _deposit(torch.where(count > 0, 0, errors), cell, grid)
        return covered + rest, off


@dataclass(frozen=True)
class Slots:
    """Errors [B, K] of single cells, such as ground truth's centre cells.

    Attributes:
        index: int64 [B, K], row * W + column; anything outside [0, H * W) is off the map.
    """

    index: Tensor

    def spread(self, errors: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
        """See `Place`."""
        row = self.index.div(grid.width, rounding_mode="floor")
        return _deposit(errors, torch.stack((self.index - row * grid.width, row), -1), grid)


@dataclass(frozen=True)
class Nowhere:
    """Errors of any shape without a place in the bird's-eye view, such as those of image features.

    Attributes:
        batch: B.
    """

    batch: int

    def spread(self, errors: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
        """See `Place`."""
        return errors.new_zeros(self.batch, *grid.shape), errors.sum()


def _deposit(errors: Tensor, cells: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
    """Add errors [B, K] to whole cells (column, row) [B, K, 2]; map [B, H, W] and the sum of those outside."""
    column, row = cells[..., 0], cells[..., 1]
    inside = (column >= 0) & (column < grid.width) & (row >= 0) & (row < grid.height)
    flat = torch.where(inside, row * grid.width + column, 0).long()
    spread = errors.new_zeros(len(errors), grid.height * grid.width)
    spread = spread.scatter_add(1, flat, torch.where(inside, errors, 0))
    return spread.reshape(-1, *grid.shape), torch.where(inside, 0, errors).sum()


@dataclass(frozen=True)
class TermResult:
    """What a term found.

    Attributes:
        value: scalar; carries the gradient.
        errors: weighted errors, unreduced; they add up to ``value``.
        places: where they belong.
        grid: the grid of the map.
    """

    value: Tensor
    errors: Tensor
    places: Place
    grid: BEVGrid

    @classmethod
    def of(cls, errors: Tensor, places: Place, grid: BEVGrid) -> TermResult:
        """Result of weighted errors: their sum, and where they belong."""
        return cls(errors.sum(), errors, places, grid)

    def weighted(self, weight: float) -> TermResult:
        """The result times a weight, its errors cut from the graph (the value is not)."""
        return TermResult(self.value * weight, self.errors.detach() * weight, self.places, self.grid)

    @cached_property
    def _spread(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.places.spread(self.errors.detach(), self.grid)

    def map(self) -> Tensor:
        """Where the errors lie on the grid, [B, H, W], detached.

        Made when first asked for; value == map().sum() + off_map.
        """
        return self._spread[0]

    @property
    def off_map(self) -> Tensor:
        """Sum (scalar) of the errors that lie nowhere or outside the map."""
        return self._spread[1]


def gradient_map(value: Tensor, tensor: Tensor) -> Tensor:
    """How strongly a loss pulls on each cell of a tensor [B, ..., C, H, W]: sum of |d value / d tensor|, [B, H, W].

    Zeros where the loss does not depend on the tensor.
    """
    (gradient,) = torch.autograd.grad(value, tensor, retain_graph=True, allow_unused=True, materialize_grads=True)
    return gradient.abs().flatten(1, -3).sum(1)
