"""Every method along every path, on features that hold whatever a term may ask for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from distill_fakes import FakeChannels, batch_of
from torch import Tensor, nn

from kdlab.distill import Distiller, Method, TermResult
from kdlab.distill.distillbev import distillbev
from kdlab.distill.labeldistill import labeldistill
from kdlab.distill.simdistill import simdistill
from kdlab.distill.unidistill import PATHS, unidistill
from kdlab.geometry import BEVGrid
from kdlab.sample import Batch, Boxes3D, Features, Predictions, TaskPrediction

RECT = BEVGrid((-12.0, 12.0), (-9.0, 9.0), 1.5)  # 12 rows, 16 columns
SQUARE = BEVGrid.square(12.0, 1.2)
VARIANTS = ("intended", "released")
CHANNELS = FakeChannels(3, None, 7, 6, 6, (6, 9), 6, regression=60, frames=2)
_BUILD: dict[str, Callable[..., Method]] = {f"unidistill {path}": unidistill for path in PATHS}
_BUILD |= {"distillbev": distillbev, "simdistill": simdistill, "labeldistill": labeldistill}
NAMES = tuple(_BUILD)
CASES = tuple((name, variant) for name in NAMES for variant in VARIANTS)
ALL = {f"foreground_{p}" for p in ("B1", "B2", "H")}
MASKED = {
    **{
        (f"unidistill {p}", "intended"): {"feature", "relation", "response_class", "response_regression"} for p in PATHS
    },
    **{(f"unidistill {p}", "released"): set() for p in PATHS},  # padding rows count and light the ego's cell
    ("distillbev", "intended"): ALL,
    ("distillbev", "released"): ALL,
    ("simdistill", "intended"): {"cross_modal", "prediction_box"},
    ("simdistill", "released"): {"cross_modal"},  # empty slots of boxes read the map's first cell
    ("labeldistill", "intended"): {"label_0", "label_1", "lidar_0", "lidar_1", "response_box"},
    ("labeldistill", "released"): {"label_0", "label_1", "lidar_0", "lidar_1", "response_box"},
}
"""Terms that the ground truth masks: a sample without boxes adds nothing to them."""


def method_of(name: str, variant: str = "intended") -> Method:
    """A method by its name in `NAMES`."""
    build = _BUILD[name]
    return build(name.split()[1], variant) if build is unidistill else build(variant)


def identity(method: Method) -> Method:
    """The method with adapters that change nothing."""
    adapters = (replace(a, build=lambda s, t: nn.Identity(), resize="no") for a in method.adapters)
    return replace(method, adapters=tuple(adapters))


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Features, or a part of them, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(changed(v, change) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: changed(getattr(value, f.name), change) for f in fields(value)})
    return value


def leaves(features: Features) -> list[Tensor]:
    """All tensors of features that have channels."""
    found: list[Tensor] = []
    changed(features, lambda t: found.append(t) or t)
    return [t for t in found if t.numel()]


def maps(seed: int, batch: int, grid: BEVGrid, fires: float = -5.5) -> Features:
    """Random features, all leaves; ``fires`` is the mean of the heat map's logits."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int, stride: int = 1) -> Tensor:
        size = (grid.height // stride, grid.width // stride)
        return torch.randn(batch, *shape, *size, generator=g)

    c = CHANNELS
    tasks = TaskPrediction(rand(10) * 2 + fires, rand(c.regression), *(torch.zeros(batch, 0, *grid.shape),) * 4)
    found = Features(
        bev=rand(c.bev),
        camera_bev=rand(1, c.camera_bev),
        camera_bev_aligned=rand(c.frames, c.camera_bev),
        lidar_bev=rand(c.lidar_bev),
        stages=tuple(rand(width, stride=2**i) for i, width in enumerate(c.stages)),
        neck=rand(c.neck),
        predictions=Predictions((tasks,)),
    )
    return changed(found, lambda t: t.requires_grad_())


class Network(nn.Module):
    """Always finds the same; every tensor depends on a weight, the fused map on a fuser's."""

    def __init__(self, found: Features) -> None:
        super().__init__()
        self.found, self.channels = changed(found, lambda t: t.detach()), CHANNELS
        self.scale = nn.Parameter(torch.ones(()))
        self.fuser = nn.Conv2d(found.bev.shape[1], found.bev.shape[1], 1, bias=False)
        with torch.no_grad():
            self.fuser.weight.copy_(torch.eye(found.bev.shape[1])[..., None, None])

    def forward(self, batch: Batch) -> Features:
        """The features."""
        found = changed(self.found, lambda t: t * self.scale)
        return replace(found, bev=self.fuser(found.bev))


def some_boxes(
    seed: int, counts: tuple[int, ...], grid: BEVGrid = RECT, label: int | None = None, apart: bool = False
) -> Boxes3D:
    """Boxes of all sizes in the middle of a map and over its border; one velocity in each sample is unknown.

    Args:
        seed: of everything.
        counts: of each sample.
        grid: of the map.
        label: of all boxes, random by default.
        apart: small boxes in places of their own, so that no two touch.
    """
    g = torch.Generator().manual_seed(seed)
    samples = []
    for count in counts:
        unit = torch.rand(count, 9, generator=g, dtype=torch.float64)
        reach = torch.tensor((grid.x[1] * 1.02, grid.y[1] * 1.02), dtype=torch.float64)
        centre = (unit[:, :2] * 2 - 1) * reach
        sizes = unit[:, 3:6] * torch.tensor((7.0, 3.0, 2.0)) + 0.4
        if apart:
            column = torch.arange(count) % 3
            centre = torch.stack((column * 6.0 - 6, torch.arange(count).div(3, rounding_mode="floor") * 5.0 - 5), -1)
            centre, sizes = centre + unit[:, :2], sizes.clamp(max=2.4)
        values = torch.cat((centre, unit[:, 2:3], sizes, (unit[:, 6:7] * 2 - 1) * math.pi, unit[:, 7:]), 1)
        values[:1, 7:] = math.nan
        labels = torch.randint(0, 10, (count,), generator=g)
        samples.append(Boxes3D.make(values, labels if label is None else torch.full_like(labels, label)))
    return Boxes3D.pad(samples)


def distiller_of(method: Method, teacher: Features, labels: Features, grid: BEVGrid) -> Distiller:
    """The Distiller, adapters with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sides = Network(teacher), Network(teacher), Network(labels)
        return Distiller(method, *sides, grid=grid)


def found_by(
    method: Method, boxes: Boxes3D, grid: BEVGrid = RECT, seed: int = 0
) -> tuple[dict[str, TermResult], Features]:
    """Results with weight 1 of random features around these boxes, and the student's features."""
    size = len(boxes.values)
    student, teacher, labels = (maps(seed + i, size, grid) for i in (1, 2, 3))
    distiller = distiller_of(unit(method), teacher, labels, grid).eval()  # a norm's statistics would mix samples
    return distiller(student, batch_of(boxes)), student


def unit(method: Method) -> Method:
    """The method with weights 1."""
    return method.reweight({t.name: 1.0 for t in method.terms})
