"""BEV encoder and neck, common to all sensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlab.config import BEVConfig
from kdlab.models.layers import ConvNorm, ResidualBlock


class BEVEncoder(nn.Module):
    """Residual stages over the BEV map; stage i has stride first_stride * 2**i.

    Raises:
        ValueError: ``stages`` and ``blocks`` differ in length, a stage has no block, or the stride is no power of two.
    """

    def __init__(self, config: BEVConfig) -> None:
        super().__init__()
        if len(config.stages) != len(config.blocks) or not config.stages or min(config.blocks) < 1:
            raise ValueError(f"BEVConfig: stages {config.stages} and blocks {config.blocks} must pair up, blocks >= 1")
        if config.first_stride < 1 or config.first_stride & (config.first_stride - 1):
            raise ValueError(f"BEVConfig.first_stride: {config.first_stride} must be a power of two")
        self.config, self.stages = config, nn.ModuleList()
        inputs = config.channels
        for index, (width, blocks) in enumerate(zip(config.stages, config.blocks, strict=True)):
            first = ResidualBlock(inputs, width, stride=config.first_stride if index == 0 else 2)
            rest = [ResidualBlock(width, width) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            inputs = width

    def forward(self, bev: Tensor) -> tuple[Tensor, ...]:
        """[B, C, H, W] to one map per stage, finest first: [B, stages[i], H / stride, W / stride].

        Raises:
            ValueError: the first stage's stride does not divide the map.
        """
        stride = self.config.first_stride
        if bev.shape[-2] % stride or bev.shape[-1] % stride:
            raise ValueError(
                f"BEVConfig.first_stride: {stride} does not divide a grid of {tuple(bev.shape[-2:])} cells"
            )
        outputs = []
        for stage in self.stages:
            bev = stage(bev)
            outputs.append(bev)
        return tuple(outputs)


class BEVNeck(nn.Module):
    """Brings every stage to one stride by a 1x1 convolution and upsampling, and concatenates ("SECOND", Sensors 2018).

    That stride is 1, or else the first stage's: then a 3x3 convolution mixes the stages, and another one follows the
    upsampling to stride 1 ("BEVDet", arXiv 2112.11790).
    """

    def __init__(self, config: BEVConfig) -> None:
        super().__init__()
        count = len(config.stages)
        if config.neck < count:
            raise ValueError(f"BEVConfig: neck {config.neck} must hold a channel for each of {count} stages")
        widths = [config.neck // count + (1 if i < config.neck % count else 0) for i in range(count)]
        self.laterals = nn.ModuleList(ConvNorm(c, w, 1) for c, w in zip(config.stages, widths, strict=True))
        self.stride = config.first_stride
        self.mix, self.output = (
            ConvNorm(config.neck, config.neck) if self.stride > 1 else nn.Identity() for _ in range(2)
        )

    def forward(self, stages: tuple[Tensor, ...]) -> Tensor:
        """The stages' maps to [B, neck, H, W] at stride 1.

        Raises:
            ValueError: not as many maps as stages.
        """
        if len(stages) != len(self.laterals):
            raise ValueError(f"BEVNeck: needs {len(self.laterals)} stages, got {len(stages)}")
        size = stages[0].shape[-2:]
        maps = []
        for lateral, stage in zip(self.laterals, stages, strict=True):
            reduced = lateral(stage)
            if reduced.shape[-2:] != size:
                reduced = F.interpolate(reduced, size=size, mode="bilinear", align_corners=False)
            maps.append(reduced)
        neck = self.mix(torch.cat(maps, 1))
        if self.stride > 1:
            neck = F.interpolate(neck, scale_factor=float(self.stride), mode="bilinear", align_corners=False)
        found: Tensor = self.output(neck)
        return found
