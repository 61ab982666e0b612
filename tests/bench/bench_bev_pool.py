"""BEV pooling of 6 x 59 x 16 x 44 frustum points: "Lift, Splat, Shoot" by its formula, and torch-scatter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timing
import torch
from model_fakes import rig
from timing import Row, interleaved, peak_growth, row
from torch import Tensor

from kdlab.geometry import BEVGrid
from kdlab.models.lift import Frustum, LiftCache, LiftIndex, splat

CHANNELS, Z = 80, (-3.0, 5.0)
FRUSTUM = Frustum((16, 44), 16, (1.0, 60.0, 1.0))
GRIDS = (BEVGrid.square(51.2, 0.8), BEVGrid.square(54.0, 0.6))


class _QuickCumsum(torch.autograd.Function):
    """A running sum, read at the end of each cell's run of points; the gradient goes to every point of the run."""

    @staticmethod
    def forward(ctx, lifted: Tensor, cell: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        last = torch.ones(len(cell), dtype=torch.bool)
        last[:-1] = cell[1:] != cell[:-1]
        ctx.run = last.cumsum(0) - last.long()
        sums = lifted.cumsum(0)[last]
        return torch.cat((sums[:1], sums[1:] - sums[:-1]))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradients[0][ctx.run], None


class Pooling:
    """One rig's features, depths and geometry, and the ways to pool them; each gives [1, C, H, W]."""

    def __init__(self, grid: BEVGrid) -> None:
        self.grid = grid
        generator = torch.Generator().manual_seed(0)
        intrinsic, extrinsic = rig(6, (256, 704))
        self.cameras = intrinsic[None], extrinsic[None]
        self.cache = LiftCache(FRUSTUM, grid, Z)
        self.context = torch.randn(6, CHANNELS, 16, 44, generator=generator)
        self.depth = torch.randn(6, 59, 16, 44, generator=generator).softmax(1)
        for tensor in (self.context, self.depth):
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
            tensor.requires_grad_()
        self.gradient = torch.randn(1, CHANNELS, *grid.shape, generator=generator)
        self.index: LiftIndex = self.cache.index(*self.cameras)

    def ours(self) -> Tensor:
        return splat(self.context, self.depth, self.index, 1, self.grid)

    def ours_with_index(self) -> Tensor:
        index = LiftCache(FRUSTUM, self.grid, Z).index(*self.cameras)
        return splat(self.context, self.depth, index, 1, self.grid)

    def lss(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Lift all points, drop those outside, sort by cell, running sum: geometry and order anew at every call."""
        points = FRUSTUM.points(*self.cameras)
        lifted = (self.context.movedim(1, -1).unsqueeze(3) * self.depth.movedim(1, -1).unsqueeze(4)).flatten(0, 3)
        column, row, inside = self.grid.locate(points[..., :2].flatten(0, -2))
        height = points[..., 2].flatten()
        inside &= (height >= Z[0]) & (height < Z[1])
        cell = (row * self.grid.width + column)[inside]
        order = cell.argsort()
        cell = cell[order]
        sums = _QuickCumsum.apply(lifted[inside][order].to(dtype), cell)
        bev = sums.new_zeros(self.grid.height * self.grid.width, CHANNELS)
        bev[cell.unique_consecutive()] = sums
        return bev.view(1, *self.grid.shape, -1).permute(0, 3, 1, 2)

    def segment_csr(self) -> Tensor:
        """torch-scatter on our sorted index, gathered features times depths: nothing is lifted beforehand."""
        scatter = timing.peer("torch_scatter")
        assert scatter is not None
        weights = self.depth.movedim(1, -1).flatten()[self.index.source]
        lifted = self.context.movedim(1, -1).flatten(0, 2)[self.index.pixel] * weights[:, None]
        ends = torch.cat((self.index.offsets, torch.tensor([len(self.index.cell)])))
        bev = scatter.segment_csr(lifted, ends, reduce="sum")
        return bev.view(1, *self.grid.shape, -1).permute(0, 3, 1, 2)

    def gradients(self, method: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        bev = method()
        return (bev, *torch.autograd.grad(bev, (self.context, self.depth), self.gradient.to(bev.dtype)))

    def check(self, method: Callable[[], Tensor]) -> None:
        for mine, other in zip(self.gradients(self.ours), self.gradients(method), strict=True):
            torch.testing.assert_close(mine, other.to(mine.dtype), atol=1e-5, rtol=1e-4)


def _ways(grid: BEVGrid) -> tuple[Pooling, str, dict[str, int]]:
    pooling = Pooling(grid)
    kept = len(pooling.index.cell)
    shape = f"{kept:,} points, C={CHANNELS}, {grid.height}x{grid.width}"
    return pooling, shape, {"bytes": 4 * CHANNELS * kept * 3}  # gather forwards; gather and add backwards


def measure_memory() -> Row:
    pooling, shape, _ = _ways(GRIDS[0])
    for method in (pooling.ours, pooling.lss):
        pooling.gradients(method)
    ours, lss = (peak_growth(partial(pooling.gradients, method)) for method in (pooling.ours, pooling.lss))
    return row("bev_pool, memory growth", shape, ours, "LSS formula", lss, 4.0, unit="MiB")


def measure_speed() -> list[Row]:
    rows = []
    for grid in GRIDS:
        pooling, shape, work = _ways(grid)
        pooling.check(partial(pooling.lss, torch.float64))
        ways: list[Callable[[], Tensor]] = [pooling.ours, pooling.ours_with_index, pooling.lss]
        if timing.peer("torch_scatter"):
            pooling.check(pooling.segment_csr)
            ways.append(pooling.segment_csr)
        fixed, built, lss, *csr = interleaved(*(partial(pooling.gradients, way) for way in ways))
        rows += [
            row("bev_pool, fixed rig", shape, fixed, "LSS formula", lss, 15.0, **work),
            row("bev_pool, index included", shape, built, "LSS formula", lss, 10.0),
            row("bev_pool, fixed rig", shape, fixed, "torch-scatter segment_csr", csr[0] if csr else None, 5.0, **work),
        ]
    return rows


def measure_all() -> list[Row]:
    return [measure_memory(), *measure_speed()]


def test_bev_pool() -> None:
    fixed, built, *_ = measure_speed()
    assert fixed["ratio"] > 6 and built["ratio"] > 4
