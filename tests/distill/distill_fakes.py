"""Small stand-ins for detectors, features and batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdlab.geometry import BEVGrid
from kdlab.sample import Batch, Boxes3D, Features, Predictions, TaskPrediction

GRID = BEVGrid((-12.0, 12.0), (-9.0, 9.0), 0.75)  # 24 rows, 32 columns
SQUARE = BEVGrid.square(12.0, 0.6)


@dataclass(frozen=True)
class FakeChannels:
    image: int | None = None
    depth: int | None = None
    camera_bev: int | None = None
    lidar_bev: int | None = 4
    bev: int | None = 4
    stages: tuple[int, ...] = (4, 6)
    neck: int | None = 6
    heatmap: int | None = 10
    regression: int | None = 10
    frames: int = 1


def features(seed: int, batch: int = 2, grid: BEVGrid = GRID, channels: FakeChannels = FakeChannels()) -> Features:
    """Random features that require a gradient."""
    g = torch.Generator().manual_seed(seed)
    h, w = grid.shape

    def rand(c: int, stride: int = 1) -> Tensor:
        return torch.randn(batch, c, h // stride, w // stride, generator=g).requires_grad_()

    heat, reg = rand(channels.heatmap or 1), rand(channels.regression or 1)
    none = torch.zeros(batch, 0, h, w)
    return Features(
        bev=rand(channels.bev or 1),
        lidar_bev=rand(channels.lidar_bev) if channels.lidar_bev else None,
        stages=tuple(rand(c, 2**i) for i, c in enumerate(channels.stages)),
        neck=rand(channels.neck) if channels.neck else None,
        predictions=Predictions((TaskPrediction(heat, reg, none, none, none, none),)),
    )


def boxes(seed: int, counts: tuple[int, ...] = (4, 2), reach: float = 10.0) -> Boxes3D:
    """Random boxes; some reach over the border, one velocity is unknown."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for count in counts:
        unit = torch.rand(count, 9, generator=g)
        values = torch.stack(
            (
                (unit[:, 0] * 2 - 1) * reach,
                (unit[:, 1] * 2 - 1) * reach,
                unit[:, 2],
                unit[:, 3] * 8 + 0.4,
                unit[:, 4] * 3 + 0.4,
                unit[:, 5] + 1,
                (unit[:, 6] * 2 - 1) * math.pi,
                unit[:, 7],
                unit[:, 8],
            ),
            -1,
        )
        if count:
            values[0, 7:] = math.nan
        samples.append(Boxes3D.make(values, torch.randint(0, 10, (count,), generator=g)))
    return Boxes3D.pad(samples)


def batch_of(found: Boxes3D) -> Batch:
    """A batch with these boxes and no sensors."""
    size = len(found.values)
    none = torch.zeros(size, 1, 0, 4, 4)
    eye = torch.eye(4).expand(size, 1, 4, 4)
    return Batch(
        [str(i) for i in range(size)],
        torch.zeros(size, 1, 0, 3, 2, 2, dtype=torch.uint8),
        none[..., :3, :3],
        none,
        eye,
        torch.zeros(0, 5),
        torch.zeros(0, dtype=torch.long),
        None,
        found,
        eye[:, 0].double(),
        eye[:, 0],
    )


class FakeDetector(nn.Module):
    """Detector whose maps depend on its weights and, in training mode, on the batch."""

    def __init__(self, seed: int, channels: FakeChannels = FakeChannels(), grid: BEVGrid = GRID) -> None:
        super().__init__()
        self.channels = channels
        self.grid = grid
        self.seed = seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = nn.Conv2d(channels.bev or 1, channels.bev or 1, 1)
        self.norm = nn.BatchNorm2d(channels.bev or 1)

    def forward(self, batch: Batch) -> Features:
        found = features(self.seed, batch.size, self.grid, self.channels)
        found.bev = self.norm(self.encoder(found.bev.detach()) + 1)
        return found
