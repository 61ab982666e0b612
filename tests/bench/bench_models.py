"""Speed of the detectors and of their hot operations: equality first, then times from one interleaved run."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdlab.config import HeadConfig
from kdlab.geometry import BEVGrid
from kdlab.models import build_detector
from kdlab.models.lift import Frustum, LiftIndex, lift_index, splat
from kdlab.models.nms import rotated_nms
from kdlab.models.targets import targets
from kdlab.presets import tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from model_fakes import random_batch, random_boxes, rig

GRID = BEVGrid.square(51.2, 0.8)


def interleaved(*functions: Callable[[], object], rounds: int = 5) -> list[float]:
    """Least CPU milliseconds of each function on one thread; the functions take turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = [math.inf] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.process_time()
            function()
            best[i] = min(best[i], (time.process_time() - start) * 1e3)
    torch.set_num_threads(threads)
    return best


class _QuickCumsum(torch.autograd.Function):
    """The pooling of "Lift, Splat, Shoot" by its formula: a running sum, read at the end of each cell's run."""

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


def lss_splat(context: Tensor, depth: Tensor, index: LiftIndex) -> Tensor:
    lifted = (context.permute(0, 2, 3, 1).unsqueeze(3) * depth.permute(0, 2, 3, 1).unsqueeze(4)).flatten(0, 3)
    sums = _QuickCumsum.apply(lifted[index.source].double(), index.cell)
    bev = sums.new_zeros(len(index.offsets), context.shape[1])
    bev[index.cell.unique_consecutive()] = sums
    return bev.view(1, *GRID.shape, -1).permute(0, 3, 1, 2).float()


def test_bev_pool() -> None:
    frustum = Frustum((16, 44), 16, (1.0, 60.0, 1.0))
    intrinsic, extrinsic = rig(6, (256, 704))
    points = frustum.points(intrinsic[None], extrinsic[None])
    index = lift_index(points, GRID, (-3.0, 5.0))
    context = torch.randn(6, 80, 16, 44).contiguous(memory_format=torch.channels_last).requires_grad_()
    depth = torch.rand(6, 59, 16, 44).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(
        splat(context, depth, index, 1, GRID), lss_splat(context, depth, index), atol=1e-3, rtol=1e-3
    )
    ours, peer, build = interleaved(
        lambda: splat(context, depth, index, 1, GRID).sum().backward(),
        lambda: lss_splat(context, depth, index).sum().backward(),
        lambda: lift_index(frustum.points(intrinsic[None], extrinsic[None]), GRID, (-3.0, 5.0)),
        rounds=3,
    )
    print(f"\nbev_pool fwd+bwd: ours {ours:.1f} ms, LSS {peer:.1f} ms: {peer / ours:.1f}x; index {build:.1f} ms")
    assert peer / ours > 5


def test_targets() -> None:
    boxes = random_boxes(8, 35, 50.0, torch.Generator().manual_seed(0))
    (ours,) = interleaved(lambda: targets(boxes, GRID, HeadConfig()), rounds=20)
    print(f"\ntargets 8 x 35 boxes, 128 x 128: {ours:.2f} ms")
    assert ours < 20


@pytest.mark.parametrize("count", [500, 1000])
def test_rotated_nms(count: int) -> None:
    boxes = random_boxes(1, count, 50.0, torch.Generator().manual_seed(0)).values[0]
    groups = torch.zeros(count, dtype=torch.long)
    (ours,) = interleaved(lambda: rotated_nms(boxes, groups, 0.2), rounds=10)
    line = f"\nrotated_nms {count}: {ours:.1f} ms"
    try:
        from mmcv.ops import nms_rotated
    except ImportError:
        print(line + "; mmcv is not installed, so no comparison")
        return
    rectangles, scores = boxes[:, [0, 1, 3, 4, 6]].float(), torch.linspace(1, 0.1, count)
    kept = nms_rotated(rectangles, scores, 0.2)[1]
    assert torch.equal(kept.sort().values, rotated_nms(boxes, groups, 0.2).nonzero()[:, 0])
    ours, peer = interleaved(
        lambda: rotated_nms(boxes, groups, 0.2), lambda: nms_rotated(rectangles, scores, 0.2), rounds=10
    )
    print(f"{line}, mmcv {peer:.1f} ms: {peer / ours:.1f}x")


@pytest.mark.parametrize("modality", ["camera", "lidar", "fusion"])
def test_training_step(modality: str) -> None:
    """Forward, loss, backward and AdamW of the tiny detector at batch 8, bfloat16 autocast and channels_last."""
    config = tiny(modality).detector  # type: ignore[arg-type]
    detector = build_detector(config).to(memory_format=torch.channels_last)
    batch = random_batch(config, 8, cameras=6, points=30_000, boxes=20)
    optimiser = torch.optim.AdamW(detector.parameters(), 1e-3)

    def step() -> None:
        batch.frame_from_camera = batch.frame_from_camera + 1e-6  # augmentation: a new index at every step
        with torch.autocast("cpu", torch.bfloat16):
            total = sum(detector.loss(detector(batch), batch).values())
        optimiser.zero_grad()
        total.backward()  # type: ignore[union-attr]
        optimiser.step()

    step()
    (one_core,) = interleaved(step, rounds=3)
    wall = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        wall.append(time.perf_counter() - start)
    print(
        f"\n{modality}: {one_core / 8:.0f} core-ms a sample on one thread; "
        f"{8 / min(wall):.1f} samples/s on {torch.get_num_threads()} threads"
    )
    assert one_core / 8 < 300
