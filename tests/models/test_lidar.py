from __future__ import annotations

import dataclasses

import pytest
import torch
from model_fakes import random_batch, small_config
from torch import Tensor

from kdlab.models.lidar import PillarEncoder


def naive_decoration(encoder: PillarEncoder, points: Tensor, point_batch: Tensor) -> dict[tuple[int, int, int], Tensor]:
    """Decorated points of each pillar, point by point."""
    grid, (low, high) = encoder.grid, encoder.z
    pillars: dict[tuple[int, int, int], list[Tensor]] = {}
    for point, b in zip(points, point_batch.tolist(), strict=True):
        column, row, inside = grid.locate(point[:2])
        if inside and low <= point[2] < high:
            pillars.setdefault((b, int(row), int(column)), []).append(point)
    decorated = {}
    for (b, row, column), members in pillars.items():
        here = torch.stack(members)
        centre = torch.tensor([grid.x[0] + (column + 0.5) * grid.cell, grid.y[0] + (row + 0.5) * grid.cell])
        parts = (here[:, :3] - here[:, :3].mean(0), (here[:, :2] - centre) / grid.cell, here[:, 2:])
        decorated[b, row, column] = torch.cat(parts, 1)
    return decorated


@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_equals_the_loop_over_pillars(layers: int) -> None:
    config = small_config("lidar")
    config = dataclasses.replace(config, lidar=dataclasses.replace(config.lidar, layers=layers))
    encoder, batch = PillarEncoder(config).eval(), random_batch(config)
    want = torch.zeros(2, 16, *config.grid.shape)
    for (b, row, column), decorated in naive_decoration(encoder, batch.points, batch.point_batch).items():
        features = encoder.first(decorated).relu()
        if encoder.second is not None:
            features = encoder.second(torch.cat((features, features.amax(0).expand_as(features)), 1)).relu()
        want[b, :, row, column] = features.amax(0)
    torch.testing.assert_close(encoder(batch.points, batch.point_batch, 2), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("layers", [1, 2])
def test_nearly_empty_clouds_are_finite(count: int, layers: int) -> None:
    config = small_config("lidar")
    config = dataclasses.replace(config, lidar=dataclasses.replace(config.lidar, layers=layers))
    encoder = PillarEncoder(config).train()
    points = torch.full((count, 5), 0.3)
    bev = encoder(points, torch.zeros(count, dtype=torch.long), 2)
    assert bev.shape == (2, 16, *config.grid.shape) and bev.isfinite().all() and (count or bev.abs().sum() == 0)
    bev.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert all(b.isfinite().all() for b in encoder.buffers())


def test_points_outside_change_nothing() -> None:
    config = small_config("lidar")
    encoder, batch = PillarEncoder(config).eval(), random_batch(config)
    outside = torch.tensor([[99.0, 0, 0, 0, 0], [0, 99.0, 0, 0, 0], [0, 0, 9.0, 0, 0], [0, 0, -9.0, 0, 0]])
    more = torch.cat((batch.points, outside))
    index = torch.cat((batch.point_batch, batch.point_batch.new_ones(4)))
    assert torch.equal(encoder(more, index, 2), encoder(batch.points, batch.point_batch, 2))


def test_moving_points_by_whole_cells_moves_the_map() -> None:
    config = small_config("lidar")
    encoder, batch = PillarEncoder(config).eval(), random_batch(config)
    near = batch.points[batch.points[:, 0].abs() < 10]
    index = torch.zeros(len(near), dtype=torch.long)
    moved = near.clone()
    moved[:, 0] += 2 * config.grid.cell
    first, second = encoder(near, index, 1), encoder(moved, index, 1)
    torch.testing.assert_close(first[..., :-2], second[..., 2:], atol=1e-4, rtol=1e-3)
