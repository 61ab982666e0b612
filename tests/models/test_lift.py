from __future__ import annotations

import math

import pytest
import torch
from model_fakes import rig
from torch import Tensor

from kdlab.geometry import BEVGrid, project, transform, yaw_pose
from kdlab.models.lift import Frustum, LiftCache, LiftIndex, align, depth_bins, lift_index, splat

GRID = BEVGrid((-16.0, 16.0), (-12.8, 12.8), 1.6)
FRUSTUM = Frustum((4, 8), 8, (1.0, 21.0, 2.0))
Z = (-1.0, 4.0)


def cameras(batch: int = 2, count: int = 3) -> tuple[Tensor, Tensor]:
    intrinsic, extrinsic = rig(count, (32, 64))
    turned = torch.stack([yaw_pose(0.3 * b, (0.5 * b, 0.0, 0.0)).float() @ extrinsic for b in range(batch)])
    return intrinsic.expand(batch, count, 3, 3).clone(), turned


def build() -> tuple[Tensor, LiftIndex]:
    points = FRUSTUM.points(*cameras())
    return points, lift_index(points, GRID, Z)


def naive_splat(context: Tensor, depth: Tensor, points: Tensor) -> Tensor:
    """Every frustum point by itself, index_add into cells."""
    batch, count, pixels, bins, _ = points.shape
    lifted = context.flatten(2).mT[:, :, None] * depth.flatten(2).mT[..., None]  # [B * N, h * w, D, C]
    lifted = lifted.unflatten(0, (batch, count))
    column, row, inside = GRID.locate(points[..., :2])
    inside &= (points[..., 2] >= Z[0]) & (points[..., 2] < Z[1])
    sample = torch.arange(batch).view(-1, 1, 1, 1).expand(batch, count, pixels, bins)
    cell = (sample * GRID.height + row) * GRID.width + column
    bev = torch.zeros(batch * GRID.height * GRID.width, context.shape[1]).index_add(0, cell[inside], lifted[inside])
    return bev.view(batch, GRID.height, GRID.width, -1).permute(0, 3, 1, 2)


def test_splat_and_its_gradients_equal_the_naive_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    points, index = build()
    context = torch.randn(6, 5, 4, 8, generator=generator)
    depth = torch.rand(6, 10, 4, 8, generator=generator)
    weights = torch.randn(2, 5, *GRID.shape, generator=generator)
    results = []
    for function in (lambda c, d: splat(c, d, index, 2, GRID), lambda c, d: naive_splat(c, d, points)):
        c, d = context.clone().requires_grad_(), depth.clone().requires_grad_()
        bev = function(c, d)
        (bev * weights).sum().backward()
        results.append((bev.detach(), c.grad, d.grad))
    assert results[0][0].abs().sum() > 0
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


def test_a_feature_with_known_depth_lands_in_its_cell() -> None:
    intrinsic, extrinsic = cameras(1, 3)
    points = FRUSTUM.points(intrinsic, extrinsic)
    index = lift_index(points, GRID, Z)
    hits = 0
    for camera in range(3):
        for bin_ in range(10):
            i, j = 2, 3
            context, depth = torch.zeros(3, 1, 4, 8), torch.zeros(3, 10, 4, 8)
            context[camera, 0, i, j], depth[camera, bin_, i, j] = 1.0, 1.0
            bev = splat(context, depth, index, 1, GRID)[0, 0]
            # From the cell back to the pixel, through the projection: its centre lies less than half a diagonal off.
            lit = bev.nonzero()
            if len(lit) == 0:
                continue
            hits += 1
            assert len(lit) == 1 and float(bev.max()) == 1.0
            xy = GRID.centres()[lit[0, 0], lit[0, 1]]
            want = points[0, camera, i * 8 + j, bin_]
            assert ((xy - want[:2]).abs() <= GRID.cell / 2 + 1e-5).all()
            into_camera = torch.linalg.inv(extrinsic[0, camera])
            pixel, metres = project(intrinsic[0, camera], transform(into_camera, want[None]))
            torch.testing.assert_close(pixel[0], torch.tensor([(j + 0.5) * 8, (i + 0.5) * 8]), atol=1e-3, rtol=0)
            assert float(metres[0]) == pytest.approx(1.0 + 2.0 * (bin_ + 0.5), abs=1e-4)
    assert hits > 10


def test_nothing_in_range_gives_an_empty_map() -> None:
    points = FRUSTUM.points(*cameras()) + 1000
    index = lift_index(points, GRID, Z)
    bev = splat(torch.randn(6, 5, 4, 8), torch.rand(6, 10, 4, 8), index, 2, GRID)
    assert index.cell.numel() == 0 and bev.shape == (2, 5, *GRID.shape) and bev.abs().sum() == 0


def test_index_is_sorted_and_bags_cover_it() -> None:
    _, index = build()
    assert (index.cell.diff() >= 0).all()
    counts = torch.bincount(index.cell, minlength=2 * GRID.height * GRID.width)
    assert torch.equal(index.offsets, counts.cumsum(0) - counts)
    assert torch.equal(index.pixel, index.source // 10)


def test_cache_answers_only_for_equal_geometry() -> None:
    cache, (intrinsic, extrinsic) = LiftCache(FRUSTUM, GRID, Z), cameras()
    first = cache.index(intrinsic, extrinsic)
    assert cache.index(intrinsic.clone(), extrinsic.clone()) is first
    moved = extrinsic.clone()
    moved[1, 2, 0, 3] += 1e-4
    assert cache.index(intrinsic, moved) is not first
    extrinsic[0, 0, 0, 3] += 3  # in place: the cache must hold a copy
    assert not torch.equal(cache.index(intrinsic, extrinsic).source, first.source)
    assert cache.index(intrinsic[:1], extrinsic[:1]).offsets.shape == (GRID.height * GRID.width,)


def test_depth_bins_must_be_whole() -> None:
    assert depth_bins((1.0, 41.0, 1.0)) == 40 and depth_bins((1.0, 60.0, 0.5)) == 118
    for wrong in ((1.0, 41.0, 0.7), (0.0, 40.0, 1.0), (5.0, 5.0, 1.0)):
        with pytest.raises(ValueError, match=r"CameraConfig\.depth"):
            depth_bins(wrong)


def test_align_is_exact_for_the_identity() -> None:
    grid = BEVGrid((-27.0, 27.0), (-18.0, 18.0), 0.3)  # 180 x 120: coordinates that do not round to themselves
    bev = torch.randn(2, 3, *grid.shape)
    assert torch.equal(align(bev, torch.eye(4).expand(2, 4, 4), grid), bev)


def test_align_by_whole_cells_shifts() -> None:
    bev = torch.randn(2, 3, *GRID.shape)
    pose = torch.eye(4).repeat(2, 1, 1)
    pose[0, 0, 3], pose[0, 1, 3] = 2 * GRID.cell, -1 * GRID.cell  # the past frame stands 2 cells ahead, 1 to the right
    moved = align(bev, pose, GRID)
    torch.testing.assert_close(moved[0, :, :-1, 2:], bev[0, :, 1:, :-2], atol=1e-4, rtol=0)
    assert moved[0, :, :, :2].abs().max() < 1e-4 and moved[0, :, -1].abs().max() < 1e-4
    assert torch.equal(moved[1], bev[1])


def test_align_turns_a_point_as_the_pose_does() -> None:
    bev = torch.zeros(1, 1, *GRID.shape)
    bev[0, 0, 8, 15] = 1.0
    pose = yaw_pose(math.pi / 2, (0.0, 1.6, 0.0)).float()
    moved = align(bev, pose[None], GRID)
    at = transform(pose, torch.cat((GRID.centres()[8, 15], torch.zeros(1)))[None])
    column, row, inside = GRID.locate(at[..., :2])
    assert inside.all() and float(moved[0, 0, row, column]) == pytest.approx(1.0, abs=1e-4)
    assert float(moved.sum()) == pytest.approx(1.0, abs=1e-3)
