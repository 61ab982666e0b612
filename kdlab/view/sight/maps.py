"""BEV maps of the stages of a network, and how their channels become numbers and colours."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdlab.sample import Features
from kdlab.view.style import Array, array

Reduction = Literal["norm", "mean", "pca"]
"""How channels become a picture; a channel's index does too."""


def stage_map(features: Features, stage: str, item: int = 0) -> Tensor:
    """The map [C, H, W] of one stage: "bev", "lidar_bev", "camera_bev" (key frame), "stages[0]", "neck", "heatmap".

    Args:
        features: of one forward pass.
        stage: a field of `Features` or "heatmap" (class probabilities of the predictions); stages take an index.
        item: place of the sample in the batch.

    Raises:
        ValueError: unknown stage, or the detector has none of it.
    """
    found = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", stage)
    name, index = (found[1], int(found[2] or 0)) if found else (stage, 0)
    value: Any = getattr(features, name, None)
    if name == "heatmap" and features.predictions is not None:
        value = features.predictions.heatmap.sigmoid()
    elif isinstance(value, tuple):
        value = value[index] if index < len(value) else None
    elif isinstance(value, Tensor) and name in ("camera_bev", "camera_bev_aligned"):
        value = value[:, index]
    if not isinstance(value, Tensor) or value.dim() != 4:
        raise ValueError(f"no BEV stage {stage!r} here; this detector has {', '.join(bev_stages(features))}")
    return value[item].detach().float().cpu()


def bev_stages(features: Features) -> list[str]:
    """Names of the BEV maps that `stage_map` finds in the features."""
    single = ("lidar_bev", "camera_bev", "camera_bev_aligned", "bev")
    have = [name for name in single if getattr(features, name) is not None]
    have += [f"stages[{i}]" for i in range(len(features.stages))]
    return have + ["neck"] * (features.neck is not None) + ["heatmap"] * (features.predictions is not None)


def principal(*maps: Tensor) -> list[Tensor]:
    """The three main directions of several maps [C, H, W] together, as colours [H, W, 3] in 0..1: one basis, one scale.

    Raises:
        ValueError: the maps differ in their number of channels.
    """
    if len({m.shape[0] for m in maps}) > 1:
        widths = " and ".join(str(m.shape[0]) for m in maps)
        raise ValueError(f"one basis needs equal numbers of channels, got {widths}; use how='norm', or adapt one first")
    rows = [m.flatten(1).T for m in maps]
    known = torch.cat([r[r.isfinite().all(-1)] for r in rows])
    if not len(known):
        return [torch.full((*m.shape[1:], 3), torch.nan) for m in maps]
    centre = known.mean(0)
    basis = torch.linalg.eigh((known - centre).T @ (known - centre)).eigenvectors[:, -3:].flip(-1)
    basis = F.pad(basis, (0, 3 - basis.shape[1]))  # fewer than three channels: the rest stays grey
    seen = (known - centre) @ basis
    # A direction's sign is arbitrary; the longer tail is made the bright one, so that colours stay from frame to frame.
    sign = torch.where(seen.pow(3).sum(0) < 0, -1.0, 1.0)
    basis, seen = basis * sign, seen * sign
    low, high = torch.from_numpy(np.percentile(seen.numpy(), (1, 99), axis=0)).float()
    scaled = [((r - centre) @ basis - low) / (high - low).clamp(min=1e-12) for r in rows]
    return [s.clamp(0, 1).unflatten(0, m.shape[1:]) for s, m in zip(scaled, maps, strict=True)]


def reduce_channels(maps: Tensor, how: Reduction | int) -> Array:
    """A picture [H, W] of a map [C, H, W]: its norm or mean over channels, or one channel.

    Raises:
        ValueError: no such channel or reduction.
    """
    if how == "norm":
        return array(maps.norm(dim=0))
    if how == "mean":
        return array(maps.mean(0))
    if isinstance(how, int) and 0 <= how < len(maps):
        return array(maps[how])
    raise ValueError(f"how={how!r}: give 'norm', 'mean', 'pca' or a channel from 0 to {len(maps) - 1}")


def cosine_map(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity [H, W] of two maps [C, H, W], cell by cell; NaN where one of them is all zero."""
    known = (a.norm(dim=0) > 0) & (b.norm(dim=0) > 0)
    return torch.where(known, F.cosine_similarity(a, b, dim=0), torch.nan)
