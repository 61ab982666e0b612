"""Overfits a detector to one real nuScenes keyframe and scores it as nuScenes does: a check of the whole chain.

A detector that cannot learn one sample by heart has a broken projection, target, loss or decoder. Passing says nothing
about generalisation.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from kdlab.config import AugmentConfig, DataConfig, RunConfig
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.evaluate import Metrics, evaluate_run
from kdlab.geometry import BEVGrid
from kdlab.metrics.config import EvaluationConfig
from kdlab.presets import tiny
from kdlab.sample import CLASSES, Boxes3D, Detections
from kdlab.train import train
from kdlab.view.networks.bev import bev_boxes
from kdlab.view.sensors.cameras import cameras
from kdlab.view.sight.look import Look, look
from kdlab.view.style import Boxes

TARGETS = {"lidar": 0.8, "camera": 0.5}
"""Least mAP over the classes present that counts as learnt."""

STEPS = {"lidar": 160, "camera": 240}
"""Training steps that suffice for it."""

MATCH = 2.0  # metres between centres, the largest of the devkit's four


@dataclass(frozen=True)
class Recall:
    """One class of the sample.

    Attributes:
        truth: annotated boxes that the official evaluation counts (in range, with points).
        found: of these, with a detection of the class within `MATCH` metres and ``min_score``.
        extra: detections of the class without such a box.
        ap: official average precision.
    """

    truth: int
    found: int
    extra: int
    ap: float


@dataclass(frozen=True)
class OverfitResult:
    """What came of it.

    Attributes:
        run: run folder.
        metrics: official metrics of the keyframe.
        classes: what was found and missed, by class with ground truth.
        target: least mAP over the classes present.
        figures: pictures written.
        seconds: training and evaluation.
    """

    run: Path
    metrics: Metrics
    classes: dict[str, Recall]
    target: float
    figures: tuple[Path, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the target was reached."""
        return self.metrics.mean_ap_present >= self.target

    def __str__(self) -> str:
        lines = [f"{'class':22s} {'boxes':>5s} {'found':>5s} {'missed':>6s} {'extra':>5s}     AP"]
        for name, row in self.classes.items():
            lines.append(
                f"{name:22s} {row.truth:5d} {row.found:5d} {row.truth - row.found:6d} {row.extra:5d}  {row.ap:.3f}"
            )
        m, verdict = self.metrics, "reached" if self.passed else "NOT reached"
        lines.append(f"official mAP over the {len(m.present)} classes with ground truth: {m.mean_ap_present:.3f}")
        lines.append(f"target {self.target:g}: {verdict} ({self.seconds:.0f} s)")
        lines.append(
            f"official mAP over all ten classes {m.mean_ap:.3f}, NDS {m.nd_score:.3f} (an absent class counts as 0)"
        )
        return "\n".join([*lines, *(f"picture: {path}" for path in self.figures)])


def keyframe_root() -> Path:
    """Where the keyframe lies: environment variable KDLAB_KEYFRAME, or shared/nuscenes-keyframe beside the project."""
    return Path(os.environ.get("KDLAB_KEYFRAME", "../shared/nuscenes-keyframe"))


def overfit_config(
    root: Path,
    modality: Literal["lidar", "camera"],
    split: str = "keyframe",
    steps: int | None = None,
    cell: float = 0.8,
    image_size: tuple[int, int] = (128, 352),
    seed: int = 0,
) -> RunConfig:
    """The tiny preset with a finer grid, larger images, one sweep and no augmentation, on a split of one sample.

    Raises:
        FileNotFoundError: no data set.
        ValueError: no such split, or it holds more than one sample.
    """
    dataset = NuScenesDataset(root, split=split, images=False, points=False)
    if len(dataset) != 1:
        raise ValueError(f"overfit: {root}, split {split!r} holds {len(dataset)} samples; it must hold a single one")
    # Class-balanced sampling shows the one sample once per class in an epoch: longer epochs, so fewer checkpoints.
    repeats = max(1, int(dataset.class_presence().sum()))
    base = tiny(modality, str(root))
    detector = replace(
        base.detector,
        grid=BEVGrid.square(51.2, cell),
        lidar=replace(base.detector.lidar, sweeps=1),
        camera=replace(base.detector.camera, image_size=image_size, depth=(1.0, 61.0, 1.0)),
    )
    none = AugmentConfig.none()
    data = DataConfig(str(root), dataset.version, train=split, val=split, cbgs=True, workers=1, augment=none)
    epochs = -(-(STEPS[modality] if steps is None else steps) // repeats)
    return RunConfig(detector, data, replace(base.train, epochs=epochs, batch_size=1, seed=seed))


def overfit(
    root: Path | None = None,
    out: Path | None = None,
    modality: Literal["lidar", "camera"] = "lidar",
    steps: int | None = None,
    split: str = "keyframe",
    cell: float = 0.8,
    image_size: tuple[int, int] = (128, 352),
    seed: int = 0,
    target: float | None = None,
    min_score: float = 0.2,
    progress: bool = True,
    cpu: bool = False,
) -> OverfitResult:
    """Train on one real sample until its boxes are found: a check of the whole chain.

    Args:
        root: data set whose split holds one sample; $KDLAB_KEYFRAME, or ../shared/nuscenes-keyframe, where left out.
        out: run folder; runs/overfit-MODALITY where left out. A finished one is only scored again.
        modality: sensors of the detector.
        steps: training steps; 160 (LiDAR) or 240 (camera) where left out.
        split: name of the split.
        cell: side of a BEV cell, metres.
        image_size: height and width of the network's input, pixels (camera).
        seed: of the weights.
        target: least official mAP over the classes present; 0.8 (LiDAR) or 0.5 (camera) where left out.
        min_score: detections below are neither drawn nor counted as found (the official scores take all).
        progress: show the training and print the result.
        cpu: train on the CPU although there is a GPU.

    Raises:
        FileNotFoundError: no data set.
        ValueError: the split does not hold a single sample, or ``out`` holds another run.
        RuntimeError: the target was not reached.
    """
    began = time.monotonic()
    config = overfit_config(keyframe_root() if root is None else root, modality, split, steps, cell, image_size, seed)
    run = train(config, out or Path(f"runs/overfit-{modality}"), progress=progress, cpu=cpu)
    metrics = evaluate_run(run, split=split, workers=0, device="cpu" if cpu else None)
    seconds = time.monotonic() - began
    seen = look(run, split=split, device="cpu" if cpu else None)
    figures = tuple(_draw(seen, run, min_score))
    classes = recall(seen.sample.boxes, seen.detections, metrics, min_score)
    result = OverfitResult(run, metrics, classes, TARGETS[modality] if target is None else target, figures, seconds)
    if progress:
        print(result)
    if not result.passed:
        reached = f"{metrics.mean_ap_present:.3f} over the classes present"
        raise RuntimeError(f"{modality}: mAP {reached} is below the target {result.target:g}; see {figures[0]}")
    return result


def recall(truth: Boxes3D, found: Detections, metrics: Metrics, min_score: float) -> dict[str, Recall]:
    """What was found and missed of each class with ground truth, nearest pairs of centres first.

    Args:
        truth: annotations [M] of the sample, key ego frame.
        found: detections of the sample.
        metrics: official metrics of the sample alone.
        min_score: detections below do not count.
    """
    class_range = EvaluationConfig().class_range
    reach = torch.tensor([class_range[name] for name in CLASSES])
    counted = truth.valid & (truth.values[:, :2].norm(dim=-1) < reach[truth.labels]) & (truth.points > 0)
    near = (found.scores >= min_score) & (found.values[:, :2].norm(dim=-1) < reach[found.labels])
    rows = {}
    for name in metrics.present:
        label = CLASSES.index(name)
        ours = truth.values[counted & (truth.labels == label), :2]
        theirs = found.values[near & (found.labels == label), :2]
        pairs = len(_pairs(torch.cdist(ours, theirs)))
        rows[name] = Recall(len(ours), pairs, len(theirs) - pairs, metrics.mean_dist_aps[name])
    return rows


def _pairs(distance: torch.Tensor) -> list[tuple[int, int]]:
    """Greedy one-to-one pairs of rows and columns no farther apart than `MATCH`, the nearest first."""
    order = distance.flatten().argsort().tolist()
    rows: Counter[int] = Counter()
    columns: Counter[int] = Counter()
    pairs = []
    for place in order:
        i, j = divmod(place, distance.shape[1])
        if float(distance[i, j]) <= MATCH and not rows[i] and not columns[j]:
            rows[i] = columns[j] = 1
            pairs.append((i, j))
    return pairs


def _draw(seen: Look, run: Path, min_score: float) -> Iterator[Path]:
    sets: dict[str, Boxes] = {"truth": seen.sample.boxes, "detector": seen.detections}
    title = f"one keyframe, learnt by heart: {seen.config.detector.modality}"
    pictures = {
        "cameras.png": cameras(seen.sample, sets, min_score, title=title),
        "bev.png": bev_boxes(seen.sample.points, sets, seen.config.detector.grid, min_score, title),
    }
    for name, figure in pictures.items():
        figure.savefig(run / name)
        yield run / name
