"""Trainings that come before the student's, such as that of a label encoder, and the gate behind each."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdlab.checkpoint import RunFolder, load_weights, save_weights
from kdlab.config import AugmentConfig, RunConfig, TrainConfig
from kdlab.cost import parameters, training_cost, write_cost
from kdlab.data.batch import Loader
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.distill import HasChannels, Method, Stage
from kdlab.distill.distiller import check
from kdlab.evaluate import Scorer, load_metrics, predict, store_metrics
from kdlab.loop import Loop
from kdlab.metrics.metrics import Metrics
from kdlab.models.norm import sync_batchnorm
from kdlab.optim import WARM_UP
from kdlab.precision import autocast
from kdlab.sample import Batch

if TYPE_CHECKING:
    from kdlab.models.detector import Detector

LOW = 0.5
"""mAP over the classes that occur below which a stage's gate warns: annotations given, a detector should find most."""


class StageTraining(nn.Module):
    """What the optimiser trains in a stage; the teacher stands outside.

    Args:
        stage: gives the loss.
        network: what is trained.
        teacher: frozen.
        on: names of the method's quirks that are on.
        precision: as in `TrainConfig.precision`.
    """

    def __init__(
        self, stage: Stage, network: nn.Module, teacher: nn.Module, on: frozenset[str], precision: str
    ) -> None:
        super().__init__()
        self.stage, self.network, self.on, self.precision = stage, network, on, precision
        self._teacher = (teacher,)  # not a submodule

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The stage's loss."""
        with autocast(batch.boxes.values.device, self.precision):
            return {self.stage.name: self.stage.loss(self.network, self._teacher[0], batch, self.on)}


def run_stages(
    method: Method,
    student: HasChannels,
    teacher: Detector,
    config: RunConfig,
    run: RunFolder,
    accelerator: Accelerator,
    show: bool,
) -> Sequence[nn.Module]:
    """The networks that a method needs trained first, in eval mode: loaded where that is done, trained otherwise.

    Each has a folder below ``RUN/stages``, and goes on there after a kill. They see annotations alone, with the run's
    BEV augmentation. The gate's metrics on the validation split stand in that folder's metrics.json. No term that
    compares with them, no stage.

    Args:
        method: with its stages.
        student: its widths are read, so that a method that does not fit fails before anything is trained.
        teacher: on its device; left as it came, but for its parameters, which want no gradient.
        config: of the run.
        run: its folder.
        accelerator: processes and device.
        show: print progress and gate.

    Raises:
        ValueError: a term names a tensor that a side lacks, or widths differ.
    """
    networks = []
    for stage in method.stages if method.needs_labels else ():
        torch.manual_seed(config.train.seed + 2)
        networks.append(stage.build(teacher, method.on).to(accelerator.device))
    sides = {"student": student, "teacher": teacher} | ({"labels": cast(HasChannels, networks[-1])} if networks else {})
    check(method, {side: network.channels for side, network in sides.items()})
    for stage, network in zip(method.stages, networks, strict=False):
        _run(stage, network, method, teacher, config, run, accelerator, show)
    return networks


def setting_of(stage: Stage, run: TrainConfig, epochs: int = 0) -> TrainConfig:
    """How a stage is trained: by its own schedule, of the run's kind; all else but the optimiser is as in the run.

    Args:
        stage: gives length, learning rate, weight decay and milestones.
        run: of the student.
        epochs: in place of the stage's, whose milestones move along; 0: the stage's.
    """
    epochs = epochs or stage.epochs
    return replace(
        run,
        epochs=epochs,
        lr=stage.lr,
        warm_up=0.0 if run.schedule == "steps" else WARM_UP,
        milestones=tuple(epoch * epochs // stage.epochs for epoch in stage.milestones),
        weight_decay=stage.weight_decay,
        ema=0.0,
    )


def _run(
    stage: Stage,
    network: nn.Module,
    method: Method,
    teacher: nn.Module,
    config: RunConfig,
    run: RunFolder,
    accelerator: Accelerator,
    show: bool,
) -> None:
    folder = RunFolder(run.path / "stages" / stage.name)
    main = accelerator.is_main_process
    teacher.requires_grad_(False)
    assert config.distill is not None
    if not folder.finished:
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        training = StageTraining(stage, network, teacher, method.on, config.train.precision)
        if accelerator.num_processes > 1:
            sync_batchnorm(training)
        setting = setting_of(stage, config.train, config.distill.stage_epochs)
        if show and main:
            print(f"{stage.name}: {stage.what}; {parameters(network):,} parameters", flush=True)
        loop = Loop(training, _boxes(config, accelerator), setting, folder, accelerator, title=stage.name, show=show)
        loop.run()
        teacher.load_state_dict(before)
        teacher.eval()
        if main:
            write_cost(folder.path, training_cost(loop.meter.state(), loop.steps, training))
            save_weights(folder.weights, network)
            shutil.rmtree(folder.checkpoint.parent, ignore_errors=True)
        accelerator.wait_for_everyone()
    load_weights(folder.weights, network)
    network.eval()
    if main and stage.gate is not None:
        text = _gate(stage.gate(network, teacher).eval(), config, folder)
        if show:
            print(f"{stage.name}: {text}", flush=True)
    accelerator.wait_for_everyone()


def _boxes(config: RunConfig, accelerator: Accelerator | None = None) -> Loader:
    """Batches of annotations without sensors: of the training split, or without processes the validation split."""
    data, split = config.data, config.data.train if accelerator is not None else config.data.val
    dataset = NuScenesDataset(data.root, data.version, split, images=False, points=False)
    return Loader(
        dataset,
        image_size=config.detector.camera.image_size,
        batch_size=config.train.batch_size,
        augment=data.augment if accelerator is not None else AugmentConfig.none(),
        seed=config.train.seed,
        shuffle=accelerator is not None,
        drop_last=accelerator is not None,
        rank=accelerator.process_index if accelerator is not None else 0,
        world=accelerator.num_processes if accelerator is not None else 1,
    )


def _gate(detector: nn.Module, config: RunConfig, folder: RunFolder) -> str:
    """What a detector that is given the annotations finds on the validation split, in words; measured once, stored."""
    split = config.data.val
    try:
        stored = load_metrics(folder.path)
        if split not in stored:
            batches = _boxes(config).epoch(0)
            found = predict(cast("Detector", detector), batches, config.train.precision)
            metrics = Scorer(config.data.root, config.data.version).score(found, split).metrics
            store_metrics(folder.metrics, split, metrics)
            stored = {split: metrics}
    except (FileNotFoundError, ValueError, FloatingPointError) as error:
        return f"gate not measured on {split}: {error}"
    return _verdict(split, stored[split])


def _verdict(split: str, metrics: Metrics) -> str:
    value = metrics.mean_ap_present
    text = f"with the annotations given, mAP {metrics.mean_ap:.4f} and NDS {metrics.nd_score:.4f} on {split}"
    if math.isnan(value) or value >= LOW:
        return text
    return f"{text}. WARNING: below {LOW:g} the student would be shown features that miss objects; train it for longer"
