"""From images to one feature map: a timm backbone and the image neck."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlab.config import CameraConfig
from kdlab.models.layers import ConvNorm

if TYPE_CHECKING:
    from timm.models import FeatureInfo

FINEST = 4
"""Stride of the finest map of the backbone that a neck by concatenation uses."""


def build_backbone(config: CameraConfig, pretrained: bool) -> nn.Module:
    """A timm backbone that returns the maps that the neck uses, up to stride ``config.deepest``, finest first.

    Raises:
        ValueError: unknown name, or no map of these strides.
        RuntimeError: pretrained weights cannot be had; the message names the cure.
    """
    import timm  # takes seconds to import: only detectors with cameras pay for it

    name = config.backbone
    try:
        plain = timm.create_model(name, features_only=True, pretrained=False)
    except RuntimeError as error:
        raise ValueError(
            f"CameraConfig.backbone: timm has no feature extractor {name!r}, see timm.list_models"
        ) from error
    strides, finest = levels(plain).reduction(), config.stride if config.neck == "sum" else min(FINEST, config.stride)
    used = [i for i, stride in enumerate(strides) if finest <= stride <= config.deepest]
    if not used or config.stride not in [strides[i] for i in used]:
        raise ValueError(f"CameraConfig: {name} has strides {strides}, not {config.stride} to {config.deepest}")
    windows: dict[str, Any] = {}
    if getattr(plain, "output_fmt", "NCHW") == "NHWC":  # windows of attention are laid out for one image size
        windows = {"feature_cls": "getter", "img_size": config.image_size}
    try:
        return timm.create_model(name, features_only=True, out_indices=used, pretrained=pretrained, **windows)
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"no pretrained weights for {name!r}: {error}. Connect to a network once so that timm can download them, "
            "point HF_HOME at a cache that holds them, or set camera.pretrained to false to start from random weights"
        ) from error


def levels(backbone: nn.Module) -> FeatureInfo:
    """Widths and strides of the maps that a timm backbone returns."""
    return cast("FeatureInfo", backbone.feature_info)


def build_neck(config: CameraConfig, backbone: nn.Module) -> nn.Module:
    """The image neck of a config behind its backbone."""
    widths = levels(backbone).channels()
    if config.neck == "sum":
        return ImageNeck(widths, config.channels)
    return ConcatNeck(widths, levels(backbone).reduction(), config.channels, config.stride)


class ImageNeck(nn.Module):
    """Top-down sum of the backbone's maps at the finest stride ("Feature Pyramid Networks", CVPR 2017)."""

    def __init__(self, inputs: list[int], outputs: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(ConvNorm(c, outputs, 1, act=False) for c in inputs)
        self.output = ConvNorm(outputs, outputs)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps [B, inputs[i], h_i, w_i], finest first, to [B, outputs, h_0, w_0]."""
        top = self.laterals[-1](maps[-1])
        for lateral, finer in zip(self.laterals[-2::-1], maps[-2::-1], strict=True):
            top = lateral(finer) + F.interpolate(top, size=finer.shape[-2:], mode="nearest")
        result: Tensor = self.output(F.relu(top))
        return result


class ConcatNeck(nn.Module):
    """Brings the backbone's maps to one stride, an equal share of the channels each ("SECOND", Sensors 2018).

    Maps of finer strides go through a convolution as wide as its stride, coarser ones through a transposed one.

    Raises:
        ValueError: the channels do not split evenly.
    """

    def __init__(self, inputs: list[int], strides: list[int], outputs: int, stride: int) -> None:
        super().__init__()
        if outputs % len(inputs):
            raise ValueError(f"CameraConfig.channels: {outputs} do not split evenly over {len(inputs)} maps")
        share = outputs // len(inputs)
        self.levels = nn.ModuleList(_to_stride(c, share, s, stride) for c, s in zip(inputs, strides, strict=True))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps [B, inputs[i], h_i, w_i], finest first, to [B, outputs, h, w] at the stride."""
        return torch.cat([level(found) for level, found in zip(self.levels, maps, strict=True)], 1)


def _to_stride(inputs: int, outputs: int, before: int, after: int) -> nn.Sequential:
    if before < after:
        convolution: nn.Module = nn.Conv2d(inputs, outputs, after // before, after // before, bias=False)
    else:
        convolution = nn.ConvTranspose2d(inputs, outputs, before // after, before // after, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
