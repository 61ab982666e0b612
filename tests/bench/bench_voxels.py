"""Points to pillars and voxels: kdlab's groups without caps; the hard voxels of mmcv and spconv, which are padded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import timing
import torch
from timing import Row, interleaved, row
from torch import Tensor

from kdlab.config import DetectorConfig
from kdlab.geometry import BEVGrid
from kdlab.models.lidar import PillarEncoder, group_points
from kdlab.models.voxels import Groups, group_by_cell

POINTS = (34_693, 312_286)  # one sweep and nine
Z = (-5.0, 3.0)


def cloud(points: int) -> Tensor:
    """A synthetic 32-beam LiDAR between walls, [P, 5], sweep after sweep from a moving car."""
    generator = torch.Generator().manual_seed(0)
    elevation = torch.deg2rad(torch.linspace(-30.67, 10.67, 32))[:, None]
    azimuth = torch.arange(1090) * (2 * math.pi / 1090)
    boxes = 12 * (torch.rand(109, generator=generator).repeat_interleave(10) > 0.7)
    wall = 18 + 9 * (3 * azimuth + 1).sin() + 6 * (7 * azimuth).sin() + 4 * (19 * azimuth + 2).sin() + boxes
    ground = torch.where(elevation < 0, 1.84 / (-elevation).sin().clamp(min=1e-3), 1e3)
    sweeps = []
    for number in range(math.ceil(points / (32 * 1090))):
        noise = 1 + 0.01 * torch.randn(32, 1090, generator=generator)
        reach = torch.minimum(ground, wall / elevation.cos()) * noise
        x, y = reach * elevation.cos() * azimuth.cos() - 0.5 * number, reach * elevation.cos() * azimuth.sin()
        rest = torch.rand(reach.shape, generator=generator), torch.full(reach.shape, 0.05 * number)
        sweeps.append(torch.stack((x, y, reach * elevation.sin(), *rest), -1).flatten(0, 1))
    return torch.cat(sweeps)[:points]


@dataclass(frozen=True)
class Case:
    """A grid and the caps that its public configs have.

    Attributes:
        name: for the table.
        grid: the BEV grid.
        height: of a voxel, metres.
        most_points: per voxel.
        most_voxels: in all.
        mmcv_target: how many times faster than mmcv, which fills a dense index of the whole grid at every call.
    """

    name: str
    grid: BEVGrid
    height: float
    most_points: int
    most_voxels: int
    mmcv_target: float

    def ours(self, points: Tensor) -> tuple[Groups, Tensor]:
        """Groups and the points in their order."""
        if self.height == Z[1] - Z[0]:
            groups = group_points(points, torch.zeros(len(points), dtype=torch.long), self.grid, Z)
            return groups, points.index_select(0, groups.order)
        column, row_, inside = self.grid.locate(points[:, :2])
        layer = ((points[:, 2] - Z[0]) / self.height).floor().long()
        kept = (inside & (layer >= 0) & (layer < self.layers)).nonzero().squeeze(1)
        cell = ((layer * self.grid.height + row_) * self.grid.width + column).index_select(0, kept)
        groups = group_by_cell(cell)
        return groups, points.index_select(0, kept.index_select(0, groups.order))

    @property
    def layers(self) -> int:
        return round((Z[1] - Z[0]) / self.height)

    def box(self) -> tuple[list[float], list[float]]:
        """Sides of a voxel and (low, high) corner of the space, as the peers take them."""
        (x0, x1), (y0, y1) = self.grid.x, self.grid.y
        return [self.grid.cell, self.grid.cell, self.height], [x0, y0, Z[0], x1, y1, Z[1]]

    def mmcv(self, cap: bool = True) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        ops = timing.peer("mmcv.ops")
        return ops and ops.Voxelization(*self.box(), self.most_points, self.most_voxels if cap else 400_000)

    def spconv(self, cap: bool = True) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        utils = timing.peer("spconv.pytorch.utils")
        most = self.most_voxels if cap else 400_000
        return utils and utils.PointToVoxel(*self.box(), 5, most, self.most_points)

    def check(self, points: Tensor, peer: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        """Without a cap on voxels: the same voxels, and in each the same number of points up to the cap."""
        _, index, counts = peer(points)
        z, y, x = index.long().unbind(1)
        cell, order = ((z * self.grid.height + y) * self.grid.width + x).sort()
        groups, _ = self.ours(points)
        assert torch.equal(cell, groups.cell), f"{self.name}: other voxels"
        assert torch.equal(counts.long()[order], groups.counts.clamp(max=self.most_points)), (
            f"{self.name}: other counts"
        )


CASES = (
    Case("pillar 0.2 m", BEVGrid.square(51.2, 0.2), Z[1] - Z[0], 20, 30_000, 0.4),
    Case("voxel 0.075 x 0.2 m", BEVGrid.square(54.0, 0.075), 0.2, 10, 120_000, 8.0),
)


def measure_groups(case: Case, points: int) -> list[Row]:
    here = cloud(points)
    rows, names, ways = [], [], [partial(case.ours, here)]
    for name, make in (("spconv PointToVoxel", case.spconv), ("mmcv hard_voxelize", case.mmcv)):
        peer, uncapped = make(), make(cap=False)
        if peer is not None and uncapped is not None:
            case.check(here, uncapped)
            names.append(name)
            ways.append(partial(peer, here))
    ours, *theirs = interleaved(*ways, rounds=20)
    times = dict(zip(names, theirs, strict=True))
    shape = f"{points:,} points, {case.name} ({len(case.ours(here)[0].cell):,})"
    moved = points * (2 * 20 + 6 * 8)  # points in and out, six passes over keys
    for name, target in (("spconv PointToVoxel", 0.4), ("mmcv hard_voxelize", case.mmcv_target)):
        rows.append(row("voxelize", shape, ours, name, times.get(name), target, bytes=moved))
    return rows


def measure_encoder(size: int, points: int, cell: float) -> Row:
    """Pillar features forwards and backwards, beside torch's scatter operations in the order of the points."""
    encoder = PillarEncoder(DetectorConfig(modality="lidar", grid=BEVGrid.square(51.2, cell)))
    clouds = cloud(points).repeat(size, 1)
    clouds[:, 2] += 1.84
    batch = torch.arange(size).repeat_interleave(points)
    ways = partial(encoder, clouds, batch, size), partial(by_scatter, encoder, clouds, batch, size)
    torch.testing.assert_close(*(way() for way in ways), atol=1e-3, rtol=1e-3)
    gradient = torch.randn(size, 64, *encoder.grid.shape)
    ours, scatter = interleaved(*(partial(backward, way, gradient) for way in ways), rounds=5)
    shape = f"{size} x {points:,} points, {cell} m cells, C=64, fwd+bwd"
    moved = 4 * 64 * len(clouds) * 12  # passes over the points' features: linear 2, norm 5, maximum 3, gradients 2
    return row("pillar features", shape, ours, "torch scatter_reduce", scatter, 1.0, bytes=moved)


def backward(way: Callable[[], Tensor], gradient: Tensor) -> None:
    way().backward(gradient)


def by_scatter(encoder: PillarEncoder, points: Tensor, batch: Tensor, size: int) -> Tensor:
    """The one-layer encoder in unsorted order by torch's scatter operations, as a textbook has it."""
    grid = encoder.grid
    column, row_, inside = grid.locate(points[:, :2])
    inside &= (points[:, 2] >= encoder.z[0]) & (points[:, 2] < encoder.z[1])
    points, column, row_ = points[inside], column[inside], row_[inside]
    cell = (batch[inside] * grid.height + row_) * grid.width + column
    cells = size * grid.height * grid.width
    sums = torch.zeros(cells, 4).index_add_(0, cell, torch.cat((points[:, :3], torch.ones(len(points), 1)), 1))[cell]
    centre = grid.to_metres(torch.stack((column, row_), 1).float() + 0.5)
    parts = (points[:, :3] - sums[:, :3] / sums[:, 3:], (points[:, :2] - centre) / grid.cell, points[:, 2:])
    features = encoder.first.norm(encoder.first.linear(torch.cat(parts, 1))).relu()
    index = cell[:, None].expand_as(features)
    bev = features.new_zeros(cells, features.shape[1]).scatter_reduce(0, index, features, "amax")
    return bev.view(size, *grid.shape, -1).permute(0, 3, 1, 2)


def measure_all() -> list[Row]:
    groups = [measure_groups(case, points) for points in POINTS for case in CASES]
    return [*itertools.chain(*groups), measure_encoder(8, POINTS[0], 1.6), measure_encoder(1, POINTS[1], 0.2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_groups(case: Case) -> None:
    assert all(measured["ratio"] is None or measured["ratio"] > 0.2 for measured in measure_groups(case, POINTS[0]))


def test_encoder() -> None:
    assert measure_encoder(2, POINTS[0], 1.6)["ratio"] > 1
