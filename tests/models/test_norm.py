from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from kdlab.models.norm import PointNorm, across_ranks, sync_batchnorm


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {**module.state_dict(), **{f"{n} gradient": p.grad for n, p in module.named_parameters()}}


def step(module: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = module(x)
    out.square().mean().backward()
    return out.detach()


def test_one_process_equals_batch_norm() -> None:
    plain, x = network(), torch.randn(4, 3, 6, 6)
    synced = sync_batchnorm(copy.deepcopy(plain))
    assert set(synced.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(step(synced, x), step(plain, x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state(synced), state(plain), atol=1e-5, rtol=1e-4)
    plain.eval(), synced.eval()
    torch.testing.assert_close(synced(x), plain(x), atol=1e-5, rtol=1e-4)


def test_other_batch_norms_are_refused() -> None:
    with pytest.raises(TypeError, match="BatchNorm3d"):
        sync_batchnorm(nn.Sequential(nn.BatchNorm3d(2)))


def test_points_norm_takes_running_statistics_below_two_points() -> None:
    norm = PointNorm(3).train()
    assert torch.isfinite(norm(torch.randn(1, 3))).all() and norm(torch.randn(0, 3)).shape == (0, 3)
    many = torch.randn(50, 3)
    plain = nn.BatchNorm1d(3).train()
    torch.testing.assert_close(norm(many), plain(many))


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    points, pictures = torch.load(f"{folder}/input.pt")
    mine = [points[:3], points[3:]][rank], pictures[2 * rank : 2 * rank + 2]  # uneven numbers of points
    modules = sync_batchnorm(nn.ModuleList([PointNorm(5), network()]))
    sums = modules[0](mine[0]).pow(3).sum() / len(points) * 2  # a mean over all points, as averaged gradients see it
    (sums + modules[1](mine[1]).square().mean()).backward()
    for p in modules.parameters():
        dist.all_reduce(p.grad)
        p.grad /= 2
    counted = across_ranks(torch.tensor(float(rank * 4)))
    if rank == 0:
        torch.save((state(modules), counted), f"{folder}/output.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    points, pictures = torch.randn(11, 5), torch.randn(4, 3, 6, 6)
    torch.save((points, pictures), tmp_path / "input.pt")
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    found, counted = torch.load(tmp_path / "output.pt")
    modules = nn.ModuleList([PointNorm(5), network()])
    (modules[0](points).pow(3).sum() / len(points) + modules[1](pictures).square().mean()).backward()
    torch.testing.assert_close(found, state(modules), atol=1e-5, rtol=1e-4)
    assert float(counted) == 2.0
