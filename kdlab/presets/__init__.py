"""Ready-made run configs: plain functions that return what the CLI, a notebook and a run folder hold."""

from __future__ import annotations

from collections.abc import Callable

from kdlab.config import DistillConfig, RunConfig
from kdlab.presets.distillbev import DISTILLBEV, paper_distillbev
from kdlab.presets.labeldistill import LABELDISTILL, paper_labeldistill
from kdlab.presets.own import small, tiny
from kdlab.presets.paper import Paper
from kdlab.presets.simdistill import SIMDISTILL, paper_simdistill
from kdlab.presets.unidistill import UNIDISTILL, paper_unidistill

__all__ = ["PAPERS", "PRESETS", "SCALES", "Paper", "distilled", "small", "tiny"]


def distilled(preset: str, method: str, teacher: str) -> DistillConfig:
    """Distillation by a method with the preset's scales.

    Args:
        preset: a name in PRESETS.
        method: a name in `kdlab.distill.METHODS`.
        teacher: run folder of the teacher.
    """
    return DistillConfig(method, teacher, scales=SCALES.get((preset, method), {}))


SCALES: dict[tuple[str, str], dict[str, float]] = {
    ("tiny", "unidistill"): {"feature": 0.03, "relation": 0.025, "response_class": 0.4, "response_regression": 1.0},
    ("tiny", "distillbev"): {
        "foreground_B1": 0.0033,
        "foreground_B2": 0.0167,
        "foreground_H": 0.083,
        "background_B1": 0.025,
        "background_B2": 0.1,
        "background_H": 0.5,
        "false_positive_H": 0.33,
        **dict.fromkeys(("spatial_B1", "spatial_B2", "spatial_H"), 0.3),
    },
    ("tiny", "simdistill"): {
        "intra_modal": 3.0,
        "cross_modal": 0.5,
        "fusion": 5.0,
        "prediction_class": 3.0,
        "prediction_box": 0.5,
    },
    ("tiny", "labeldistill"): {
        **dict.fromkeys(("label_0", "label_1", "lidar_0"), 0.03),
        "lidar_1": 0.01,
        "response_heatmap": 0.1,
        "response_box": 0.5,
    },
}
"""Factors on the papers' weights by preset and method: weights do not port between widths. Presets of papers have none.

tiny: from the terms' gradients at the student's shared BEV map (`train.gradients_every`): together about as large as a
third of the detection losses' gradient, those that point against it small; from the terms' sizes for maps that lie
before it (SimDistill's intra_modal and cross_modal, LabelDistill's label_0 and lidar_0). docs/results.md has what other
strengths gave on sim_val.
"""

PRESETS: dict[str, Callable[..., RunConfig]] = {
    "tiny": tiny,
    "small": small,
    "paper-unidistill": paper_unidistill,
    "paper-distillbev": paper_distillbev,
    "paper-simdistill": paper_simdistill,
    "paper-labeldistill": paper_labeldistill,
}
"""What `kdlab train` takes as its first word; each is called with a modality, and with a root where that is another."""

PAPERS: dict[str, Paper] = {
    "paper-unidistill": UNIDISTILL,
    "paper-distillbev": DISTILLBEV,
    "paper-simdistill": SIMDISTILL,
    "paper-labeldistill": LABELDISTILL,
}
"""Sources and deviations of the presets that carry a paper's settings."""
