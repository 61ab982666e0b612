"""A short real training in memory, watched on one sample: does the student move towards its teacher?"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor, nn

from kdlab.config import RunConfig, TrainConfig
from kdlab.data.batch import Loader
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.distill import Method
from kdlab.distill.regions import footprint_owner
from kdlab.optim import adamw, set_learning_rate
from kdlab.sample import Batch, Boxes3D, Sample
from kdlab.train import Training
from kdlab.view.sight import Observer
from kdlab.view.sight.data import Sight
from kdlab.view.sight.layers import side_maps
from kdlab.view.sight.maps import cosine_map
from kdlab.view.sight.match import Together, together
from kdlab.view.style import (
    GREY,
    STUDENT,
    array,
    bev_axes,
    bev_boxes_on,
    bev_image,
    colour_bar,
    new_figure,
    robust_norm,
)


@dataclass
class Timelapse:
    """What a short training did to one sample's features.

    Attributes:
        sights: of the sample, before the first step, every few steps and after the last one.
        steps: number of steps before each sight.
        losses: a row for each step: ``step``, ``lr``, ``total`` and each loss; a method's terms begin with ``kd/``.
        cosines: mean cosine similarity of student and teacher over the boxes' footprints, at each sight.
        plain: likewise of a training that differs in nothing but the method, which is left out; empty without a method.
        stage: the map of which the cosines are.
        method: name of the method; "" without one.
    """

    sights: list[Sight]
    steps: list[int]
    losses: pd.DataFrame
    cosines: list[float]
    plain: list[float]
    stage: str
    method: str

    def figure(self) -> Figure:
        """Teacher, student before and after on one scale; below, both cosine maps and how the mean cosine went."""
        return _figure(self)


def short_training(
    student: Path | str,
    teacher: Path | str | None,
    method: str | Method | None,
    data: NuScenesDataset,
    watch: Sample,
    steps: int,
    every: int,
    seed: int = 0,
    lr: float | None = None,
    *,
    stage: str = "bev",
    quirks: Collection[str] = (),
    beside: bool = True,
) -> Timelapse:
    """Train a student for some steps in memory and look at one sample in between; nothing is written.

    The losses are those of a run: the student's own and the method's terms with their scales, under the optimiser, the
    schedule and the augmentation of the student's run, shortened to these steps. Trained adapters and label encoder are
    taken over where the student's run has them. Plain training moves features too, so the same steps are done once more
    without the method.

    Args:
        student: run folder or shipped weights to start from.
        teacher: likewise; left out: the one that the student's run names.
        method: a name, or a method of one's own (`Method.scaled` shows in fewer steps what it does); left out: what the
            student was trained with.
        data: training samples, opened with images and points.
        watch: the sample to look at; a training sample or another.
        steps: optimiser steps.
        every: steps between two looks.
        seed: of order, augmentation and fresh adapters; on one machine it decides every number.
        lr: peak learning rate; the run's own where left out.
        stage: map to compare, see `kdlab.view.sight.maps.stage_map`; the adapted student's where the method adapts it.
        quirks: of the method, to turn on.
        beside: also train without the method.

    Raises:
        FileNotFoundError: no such run, or its training has not ended.
        ValueError: no teacher, unknown method or quirk, fewer than one step, no such stage, or maps of other widths.
        RuntimeError: a loss is not finite.
    """
    if steps < 1 or every < 1:
        raise ValueError(f"short_training: steps and every must be at least 1, got {steps} and {every}")
    looked = sorted({*range(0, steps, every), steps})
    run = _Run(student, teacher, method, quirks, data, watch, steps, seed, lr)
    sights, losses, name = run.train(looked, distil=True)
    cosines = [foreground_cosine(sight, stage) for sight in sights]
    others = run.train(looked, distil=False)[0] if name and beside else []
    plain = [foreground_cosine(sight, stage) for sight in others]
    return Timelapse(sights, looked, pd.DataFrame(losses), cosines, plain, stage, name)


@torch.no_grad()
def foreground_cosine(sight: Sight, stage: str = "bev") -> float:
    """Mean cosine similarity of student and teacher over the cells in boxes; NaN where there is none.

    A cell of which the teacher knows nothing (all zero) is left out; one where the student has nothing counts 0.

    Raises:
        ValueError: a side lacks the stage, or the two differ in width and no adapter stands between.
    """
    teacher, student = _both(sight, stage)
    inside = _foreground(sight, teacher.shape[-2:]) & (teacher.norm(dim=0) > 0)
    return float(cosine_map(teacher, student)[inside].nan_to_num().mean()) if inside.any() else math.nan


def _both(sight: Sight, stage: str) -> tuple[Tensor, Tensor]:
    """Maps [C, H, W] of teacher and student."""
    maps, _ = side_maps(sight, stage)
    if len(maps) < 2 or maps["teacher"].shape != maps["student"].shape:
        sizes = ", ".join(f"{side} {tuple(m.shape)}" for side, m in maps.items())
        raise ValueError(f"{stage} cannot be compared ({sizes}); name a stage that both have, or that a method adapts")
    return maps["teacher"], maps["student"]


def _foreground(sight: Sight, size: torch.Size) -> Tensor:
    """Cells [H, W] of a map in which a box stands."""
    boxes = Boxes3D.pad([sight.sample.boxes])
    owner = footprint_owner(boxes.values.nan_to_num(), boxes.valid, sight.grid)[0]
    inside = (owner < boxes.values.shape[1]).float()
    return F.adaptive_max_pool2d(inside[None, None], (size[0], size[1]))[0, 0] > 0


# The training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """One training from a run's weights; fields as of `short_training`."""

    student: Path | str
    teacher: Path | str | None
    method: str | Method | None
    quirks: Collection[str]
    data: NuScenesDataset
    watch: Sample
    steps: int
    seed: int
    lr: float | None

    def train(self, looked: list[int], distil: bool) -> tuple[list[Sight], list[dict[str, float]], str]:
        """Train; returns the sights at the steps to look at, the losses of every step and the method's name."""
        found = self._load()
        student, method = found.student, found.method
        assert student is not None
        config = replace(found.config, train=replace(found.config.train, seed=self.seed))
        observer = Observer(found.teacher, student, method, found.labels, config=config, adapters=found.adapters)
        training = Training(student, observer.distiller if distil else None, config.train.precision)
        cuda = [observer.device] if observer.device.type == "cuda" else []
        losses = []
        with torch.random.fork_rng(devices=cuda):
            settings = config.train if self.lr is None else replace(config.train, lr=self.lr)
            optimizer = adamw(training, settings)
            sights = [_look(observer, self.watch)]
            for step, batch in enumerate(islice(self._batches(config), self.steps)):
                torch.manual_seed(self.seed * 1_000_003 + step)
                losses.append(_step(training, optimizer, batch, step, self.steps, settings))
                if step + 1 in looked:
                    sights.append(_look(observer, self.watch))
        return sights, losses, method.name if method is not None else ""

    def _load(self) -> Together:
        """Fresh copies of the networks, and what belongs to them."""
        found = together(self.student, self.teacher, self.method, self.quirks, None, None)
        if found.teacher is None:
            raise ValueError(f"short_training: {self.student} names no teacher that is here; give its run folder")
        for network in (found.student, found.teacher):
            if network is not None:
                network.to(memory_format=torch.channels_last)  # as in a run; much faster on a CPU
        return found

    def _batches(self, config: RunConfig) -> Iterator[Batch]:
        """Epoch after epoch, loaded in this process."""
        camera = config.detector.camera
        supervised = config.detector.modality != "lidar" and camera.depth_supervision
        loader = Loader(
            self.data,
            image_size=camera.image_size,
            batch_size=min(config.train.batch_size, len(self.data)),
            augment=config.data.augment,
            seed=self.seed,
            shuffle=True,
            drop_last=True,
            depth_stride=camera.stride if supervised else None,
            max_depth=camera.depth[1],
            exact=config.data.images == "exact",
        )
        return (batch for epoch in count() for batch in loader.epoch(epoch))


def _step(
    training: Training, optimizer: torch.optim.Optimizer, batch: Batch, step: int, steps: int, settings: TrainConfig
) -> dict[str, float]:
    """One step as in `kdlab.loop`; returns its losses."""
    training.train()
    rate = set_learning_rate(optimizer, step, steps, settings)
    losses: dict[str, Tensor] = training(batch.to(next(training.parameters()).device))
    total = torch.stack([v.float() for v in losses.values()]).sum()
    if not total.isfinite():
        raise RuntimeError(f"short_training: the loss is {float(total)} at step {step}; give a lower lr")
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(training.parameters(), settings.grad_clip)
    optimizer.step()
    values = {name: float(value.detach()) for name, value in losses.items()}
    return {"step": step, "lr": rate, "total": float(total.detach()), **values}


def _look(observer: Observer, sample: Sample) -> Sight:
    """A sight that keeps nothing of the networks: they will change, and what is made later would be of others."""
    if observer.distiller is not None:
        observer.distiller.eval()
    sight = observer.see(sample)
    sight.live = sight.again = None
    return sight


# The picture ----------------------------------------------------------------------------------------------------------


def _figure(lapse: Timelapse) -> Figure:
    first, last = lapse.sights[0], lapse.sights[-1]
    maps = {
        "teacher": side_maps(last, lapse.stage, ("teacher",))[0]["teacher"],
        "student before": side_maps(first, lapse.stage, ("student",))[0]["student"],
        f"student after {lapse.steps[-1]} steps": side_maps(last, lapse.stage, ("student",))[0]["student"],
    }
    norms = {name: array(m.norm(dim=0)) for name, m in maps.items()}
    norm, grid, boxes = robust_norm(*norms.values()), last.grid, last.sample.boxes
    figure = new_figure(13.0, 9.6)
    axes = figure.subplots(2, 3)
    for ax, (name, values) in zip(axes[0], norms.items(), strict=True):
        shown = bev_image(ax, values, grid, norm=norm, cmap="viridis")
        bev_axes(ax, grid, name)
        bev_boxes_on(ax, boxes, "white", linewidths=0.6)
    colour_bar(list(axes[0]), shown, f"norm of {lapse.stage}", shrink=0.75)
    for ax, sight, name in zip(axes[1][1:], (first, last), ("before", "after"), strict=True):
        shown = bev_image(ax, array(cosine_map(*_both(sight, lapse.stage))), grid, norm=Normalize(-1, 1), cmap="PuOr")
        bev_axes(ax, grid, f"cosine to the teacher, {name}")
        bev_boxes_on(ax, boxes, "black", linewidths=0.6)
    colour_bar(list(axes[1][1:]), shown, "cosine similarity", extend="neither", shrink=0.75)
    _curve(axes[1][0], lapse)
    return figure


def _curve(ax: Axes, lapse: Timelapse) -> None:
    style: dict[str, Any] = {"marker": "o", "markersize": 4}
    label = f"with {lapse.method}" if lapse.method else "student"
    ax.plot(lapse.steps, lapse.cosines, color=STUDENT, label=label, **style)
    if lapse.plain:
        ax.plot(lapse.steps, lapse.plain, color=GREY, label="the same steps without it", **style)
    ax.set(title="towards the teacher", xlabel="steps", ylabel=f"mean cosine in boxes, {lapse.stage}")
    ax.set_box_aspect(1)
    ax.grid(alpha=0.3)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
