"""What a training step will need, before one is run: parameters, FLOPs and memory by part.

Parts are run on tensors without data (torch's fake ones), whose operations are counted and whose tensors kept for the
backward pass are added up. What depends on data is a formula: points of the lift are bounded by all that there are,
LiDAR points are `parts.POINTS_PER_SWEEP` a sweep, comparisons keep two maps each. Not counted: workspaces of
convolutions, the allocator's reserve, the libraries themselves, and what the loader holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import init_empty_weights

from kdlab.config import DetectorConfig, RunConfig
from kdlab.cost import parameters
from kdlab.distill import build_method
from kdlab.models import build_detector
from kdlab.plan.measure import PRECISIONS, PartCost, Precision
from kdlab.plan.parts import CAMERAS, POINTS_PER_SWEEP, Parts, distillation

__all__ = ["POINTS_PER_SWEEP", "PRECISIONS", "PartCost", "Precision", "StepPlan", "plan_step"]

_MIB, _GIB = 2.0**20, 2.0**30


@dataclass(frozen=True)
class StepPlan:
    """A training step's needs.

    Attributes:
        title: what is trained.
        batch: samples of the step on one device.
        parts: of the step.
        trained: trained parameters: student, adapters.
        frozen: parameters of teacher and label encoder.
        averaged: parameters of a moving average, 0 without.
        inputs: bytes of the batch.
    """

    title: str
    batch: int
    parts: tuple[PartCost, ...]
    trained: int
    frozen: int
    averaged: int
    inputs: float

    @property
    def flop(self) -> float:
        """Of the step."""
        return sum(part.step_flop for part in self.parts)

    def kept(self, precision: Precision) -> float:
        """Bytes of activations at the end of the forward pass."""
        return sum(part.kept[precision] for part in self.parts)

    def memory(self, precision: Precision) -> dict[str, float]:
        """Bytes by purpose; weights, gradients and the optimiser's two moments are float32 whatever the precision."""
        return {
            "weights": 4.0 * (self.trained + self.frozen),
            "gradients": 4.0 * self.trained,
            "AdamW": 8.0 * self.trained,
            "moving average": 4.0 * self.averaged,
            "batch": self.inputs,
            "activations": self.kept(precision),
            "passing": max((part.passing[precision] for part in self.parts), default=0.0),
        }

    def total(self, precision: Precision) -> float:
        """Bytes at the step's peak."""
        return sum(self.memory(precision).values())

    def text(self) -> str:
        """Printable table."""
        head = f"{'part':28s} {'params M':>9s} {'GFLOP':>9s} {'step':>9s} {'fp32 MiB':>9s} {'bf16 MiB':>9s}"
        lines = [f"plan of a training step: {self.title}, batch {self.batch} on one device", head]
        for p in self.parts:
            kept = " ".join(f"{p.kept[precision] / _MIB:9.1f}" for precision in PRECISIONS)
            lines.append(f"{p.name:28s} {p.parameters / 1e6:9.2f} {p.flop / 1e9:9.1f} {p.step_flop / 1e9:9.1f} {kept}")
        total = " ".join(f"{self.kept(precision) / _MIB:9.1f}" for precision in PRECISIONS)
        forward = sum(p.flop for p in self.parts)
        count = sum(p.parameters for p in self.parts)
        lines.append(f"{'all':28s} {count / 1e6:9.2f} {forward / 1e9:9.1f} {self.flop / 1e9:9.1f} {total}")
        for precision in PRECISIONS:
            needs = self.memory(precision)
            shares = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in needs.items() if size)
            lines.append(f"{precision}: {self.total(precision) / _GIB:.2f} GiB = {shares}")
        return "\n".join(lines)


def plan_step(config: RunConfig, teacher: DetectorConfig | None = None, batch: int = 0) -> StepPlan:
    """The plan of a training step of a config.

    Args:
        config: of the run.
        teacher: of its teacher, where it distils.
        batch: samples on one device; 0: the config's batch, on one device.

    Raises:
        ValueError: a distillation without a teacher, or student, teacher and method do not fit each other.
    """
    if (config.distill is None) != (teacher is None):
        raise ValueError("a plan needs a teacher where the run distils, and only there")
    batch = batch or config.train.batch_size
    with torch.random.fork_rng(devices=[]), init_empty_weights():
        student = build_detector(config.detector, load_pretrained=False)
        parts = [*Parts(student, batch, trained=True)]
        method, frozen, adapters = None, 0, 0
        if config.distill is not None and teacher is not None:
            method = build_method(config.distill, config.detector.modality, teacher.modality)
            source = build_detector(teacher, load_pretrained=False)
            found = distillation(method, student, source, batch)
            parts += found
            adapters = sum(part.parameters for part in found if part.trained)
            frozen = sum(part.parameters for part in found if not part.trained)
    count = parameters(student)
    return StepPlan(
        config.detector.modality if method is None else f"{config.detector.modality} by {method.name}",
        batch,
        tuple(parts),
        count + adapters,
        frozen,
        count if config.train.ema > 0 else 0,
        _inputs([config.detector, *([teacher] if teacher is not None else [])], batch),
    )


def _inputs(detectors: list[DetectorConfig], batch: int) -> float:
    """Bytes of images and points."""
    images = max(
        d.camera.image_size[0] * d.camera.image_size[1] * d.camera.frames * (d.modality != "lidar") for d in detectors
    )
    sweeps = max(d.lidar.sweeps * (d.sensors != "camera") for d in detectors)
    return batch * (images * CAMERAS * 3.0 + sweeps * POINTS_PER_SWEEP * (5 * 4 + 8))
