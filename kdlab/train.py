"""Trains a detector, alone or distilled, into a run folder."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from kdlab.allocator import keep_freed_memory
from kdlab.cache import FeatureCache, sides
from kdlab.checkpoint import (
    RunFolder,
    discard,
    load_detector,
    load_run_config,
    open_run,
    save_weights,
    start_camera,
    versions,
    write_versions,
)
from kdlab.config import RunConfig
from kdlab.cost import read_cost, training_cost, write_cost
from kdlab.data.batch import Loader
from kdlab.data.nuscenes import NuScenesDataset, find_version
from kdlab.distill import Distiller, copy_start
from kdlab.gradients import Gradients
from kdlab.loop import Interrupted, Loop, OnStep
from kdlab.models import Detector, build_detector
from kdlab.models.detector import channels_of
from kdlab.models.norm import sync_batchnorm
from kdlab.optim import check_schedule
from kdlab.pairing import check_camera_start, check_pair, check_teacher, method_for, sensors_of
from kdlab.precision import autocast, resolve
from kdlab.sample import Batch, Features
from kdlab.stages import run_stages
from kdlab.validation import Validation

__all__ = ["Interrupted", "Training", "check_teacher", "train"]


class Training(nn.Module):
    """What the optimiser trains and DDP wraps: the student and the distillation's adapters. The teacher stands outside.

    Args:
        student: the detector.
        distiller: the method, None without distillation.
        precision: as in `TrainConfig.precision`.
        keep: the student's map that is kept for `take_shared`, as in `TrainConfig.gradients_at`; none.
        cache: where the teacher's features are kept.
    """

    def __init__(
        self,
        student: Detector,
        distiller: Distiller | None = None,
        precision: str = "fp32",
        keep: Literal["bev", "image"] | None = None,
        cache: FeatureCache | None = None,
    ) -> None:
        super().__init__()
        self.student, self.distiller, self.precision, self.keep = student, distiller, precision, keep
        self.cache = cache
        self._shared: Tensor | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted losses of a batch; a distillation term's name has ``kd/`` in front."""
        with autocast(batch.boxes.values.device, self.precision):
            features = self._kept(batch)
            losses: dict[str, Tensor] = dict(self.student.loss(features, batch))
            if self.distiller is not None:
                batch = batch if self.cache is None else self.cache.fill(batch, self.distiller.run)
                losses |= {f"kd/{name}": result.value for name, result in self.distiller(features, batch).items()}
        return losses

    def take_shared(self) -> Tensor:
        """The student's kept map of the last forward pass, with its graph; it is let go of here."""
        shared, self._shared = self._shared, None
        assert shared is not None
        return shared

    def _kept(self, batch: Batch) -> Features:
        """The student's features; its map that is to be kept is."""
        if self.keep != "image":
            features: Features = self.student(batch)
            self._shared = features.bev if self.keep == "bev" else None
            return features
        assert self.student.camera is not None
        seen: list[Tensor] = []
        # Only for this pass: a hook that stays would be called by evaluations, and copied with the student.
        hook = self.student.camera.neck.register_forward_hook(lambda _, __, image: seen.append(image))
        try:
            features = self.student(batch)
        finally:
            hook.remove()
        self._shared = seen[0]  # the key frame comes first
        return features


@dataclass
class _Run:
    """What the parts of one training share."""

    config: RunConfig
    folder: RunFolder
    accelerator: Accelerator
    resume: bool
    progress: bool
    on_step: OnStep | None


def train(
    config: RunConfig,
    out: Path | str,
    *,
    resume: bool = True,
    progress: bool = True,
    cpu: bool = False,
    on_step: OnStep | None = None,
) -> Path:
    """Train a detector into a run folder; the same call goes on after a kill and does nothing once the run is finished.

    Under ``accelerate launch`` or ``torchrun`` it trains on all processes.

    Args:
        config: everything that decides the run.
        out: the run folder.
        resume: False throws away what the folder holds of an earlier run.
        progress: show a bar, or plain lines where there is no terminal.
        cpu: train on the CPU although there is a GPU.
        on_step: called after every step with its number and its row of losses.csv.

    Returns:
        The run folder, with detector.safetensors.

    Raises:
        FileNotFoundError: no data set, no teacher, or no run to start the camera branch from.
        ValueError: the folder holds another config, or the config does not fit data, teacher or feature cache.
        RuntimeError: a loss is not finite.
        Interrupted: stopped by Ctrl-C or SIGTERM, after a checkpoint.
    """
    folder = RunFolder(Path(out))
    accelerator = _accelerator(config, cpu)
    if accelerator.is_main_process:
        if not (resume and folder.finished):
            _check(config, started=resume and folder.checkpoint.exists())
        if not resume:
            discard(folder)
        open_run(folder, config)
    accelerator.wait_for_everyone()
    if folder.finished:
        if progress and accelerator.is_main_process:
            print(f"{folder.path} is finished already")
        return folder.path
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    run = _Run(config, folder, accelerator, resume, progress, on_step)
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        loader = _loader(run, keep_images=config.distill is None or not config.distill.cache)
        _write_versions(run, loader)
        torch.manual_seed(config.train.seed)
        student = build_detector(config.detector).to(memory_format=torch.channels_last).to(accelerator.device)
        if config.train.camera_start and not folder.checkpoint.exists():
            start_camera(student, config.train.camera_start)
        distiller = _distiller(run, student) if config.distill is not None else None
        loader, cache = _cached(run, loader, distiller)
        with contextlib.closing(loader):
            _train(run, loader, student, distiller, cache)
    accelerator.wait_for_everyone()
    return folder.path


def check_student(config: RunConfig, teacher: RunConfig) -> None:
    """See that a distilled run could begin once its teacher is trained; errors as `train`."""
    find_version(Path(config.data.root), config.data.version)
    _check_config(config)
    check_pair(config, teacher)
    check_camera_start(config)


def _check(config: RunConfig, started: bool) -> None:
    """See that a run can go on, before anything of its folder is made or removed; errors as `train`."""
    _check_config(config)
    check_teacher(config)
    if not started:  # a checkpoint holds what was copied
        check_camera_start(config)


def _check_config(config: RunConfig) -> None:
    check_schedule(config.train)
    if config.train.gradients_every and config.train.gradients_at == "image" and config.detector.modality == "lidar":
        raise ValueError("train.gradients_at is image, and the detector has no cameras; take bev")
    channels_of(config.detector)


def _train(
    run: _Run, loader: Loader, student: Detector, distiller: Distiller | None, cache: FeatureCache | None
) -> None:
    config, accelerator = run.config, run.accelerator
    watched = config.train.gradients_at if config.train.gradients_every else None
    training = Training(student, distiller, config.train.precision, watched, cache).to(accelerator.device)
    if accelerator.num_processes > 1:
        sync_batchnorm(training)
    validation = Validation(config, run.folder, accelerator, run.progress)
    loop = Loop(
        training,
        loader,
        config.train,
        run.folder,
        accelerator,
        averaged=student,
        frozen=_changing(distiller),
        title=run.folder.path.name,
        show=run.progress,
        resume=run.resume,
        on_step=run.on_step,
    )
    if watched:
        write = accelerator.is_main_process
        loop.on_losses = Gradients(run.folder.gradients, config.train.gradients_every, training.take_shared, write)
    loop.on_epoch = lambda epoch: validation(epoch, student if loop.average is None else loop.average.module)
    loop.run()
    if accelerator.is_main_process:
        if distiller is not None and len(distiller.state_dict()):
            save_weights(run.folder.distiller, distiller)
        beside = (distiller.teacher, distiller.labels) if distiller is not None else ()
        stages = [read_cost(folder) for folder in (run.folder.path / "stages").glob("*")]
        cost = training_cost(loop.meter.state(), loop.steps, training, student, beside, stages)
        write_cost(run.folder.path, cost)
        save_weights(run.folder.weights, student if loop.average is None else loop.average.module)
        shutil.rmtree(run.folder.checkpoint.parent, ignore_errors=True)


def _accelerator(config: RunConfig, cpu: bool) -> Accelerator:
    # Its state is global: without this, a notebook could not train on the CPU after it has trained on a GPU.
    AcceleratorState._reset_state(reset_partial_state=True)
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.distill is not None)
    return Accelerator(
        cpu=cpu, mixed_precision="no", kwargs_handlers=[unused]
    )  # autocast is kdlab's own, see precision.py


def _cached(run: _Run, loader: Loader, distiller: Distiller | None) -> tuple[Loader, FeatureCache | None]:
    """The feature cache that a config asks for, and what loads the batches: without the teacher's sensors if it can.

    The given loader is only asked what it would show: it reserves no room for images that are not read in the end.
    """
    config, device = run.config, run.accelerator.device
    if distiller is None or config.distill is None or not config.distill.cache:
        return loader, None
    assert isinstance(loader.dataset, NuScenesDataset)
    tokens, shown = loader.dataset.tokens, loader.shown(config.train.epochs)
    cache = FeatureCache(config.distill.cache, sides(config, distiller, loader.dataset.digest, device))

    def entry() -> dict[str, int]:
        return cache.measure(loader.single(*shown[0]).to(device), distiller.run, config.train.precision)

    complete, text = cache.prepare([(tokens[index], draw) for index, draw in shown], entry)
    if run.progress and run.accelerator.is_main_process:
        print(text, flush=True)
    return _loader(run, cache if complete else None), cache


def _loader(run: _Run, stored: FeatureCache | None = None, keep_images: bool = True) -> Loader:
    """Batches for student and teacher; for the student alone where what the terms want of the teacher is stored."""
    config, camera = run.config, run.config.detector.camera
    teacher = load_run_config(config.distill.teacher) if config.distill is not None and stored is None else None
    if teacher is not None and config.detector.modality == "lidar":
        camera = teacher.detector.camera
    seen = sensors_of(config, teacher)
    data = config.data
    dataset = NuScenesDataset(
        data.root,
        data.version,
        data.train,
        frames=seen.frames,
        sweeps=seen.sweeps,
        images=seen.images,
        points=seen.points,
        image_cache=data.image_cache if keep_images else "",
    )
    supervised = config.detector.modality != "lidar" and camera.depth_supervision
    return Loader(
        dataset,
        image_size=camera.image_size,
        batch_size=config.train.batch_size,
        augment=data.augment,
        seed=config.train.seed,
        workers=data.workers,
        shuffle=True,
        cbgs=data.cbgs,
        drop_last=True,
        depth_stride=camera.stride if supervised else None,
        max_depth=camera.depth[1],
        rank=run.accelerator.process_index,
        world=run.accelerator.num_processes,
        exact=data.images == "exact",
        draws=data.draws or None,
        pin_memory=run.accelerator.device.type == "cuda",
        stored=stored,
    )


def _distiller(run: _Run, student: Detector) -> Distiller:
    assert run.config.distill is not None
    source = run.config.distill.teacher
    teacher = load_detector(source, run.accelerator.device)
    teacher.to(memory_format=torch.channels_last)
    method = method_for(run.config, load_run_config(source).detector.modality)
    together = run.accelerator.num_processes > 1 and method.teacher_mode.batch_statistics
    if together:
        sync_batchnorm(teacher)
    labels = run_stages(method, student, teacher, run.config, run.folder, run.accelerator, run.progress)
    if together:
        for network in labels:
            sync_batchnorm(network)
    torch.manual_seed(run.config.train.seed + 1)
    distiller = Distiller(method, student, teacher, labels[-1] if labels else None, grid=student.grid)
    copy_start(method, student, teacher)
    return distiller


def _changing(distiller: Distiller | None) -> dict[str, nn.Module]:
    """Networks outside the training that a quirk lets change from step to step: a resumed run needs their state."""
    if distiller is None or distiller.cacheable:
        return {}
    found = {"teacher": distiller.teacher, "labels": distiller.labels}
    return {name: module for name, module in found.items() if module is not None}


def _write_versions(run: _Run, loader: Loader) -> None:
    if not run.accelerator.is_main_process:
        return
    assert isinstance(loader.dataset, NuScenesDataset)
    device = run.accelerator.device
    made = versions() | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": resolve(run.config.train.precision, device),
        "processes": str(run.accelerator.num_processes),
        "threads": str(torch.get_num_threads()),
        "data": loader.dataset.digest,
    }
    if run.config.distill is not None:
        made["teacher"] = RunFolder(Path(run.config.distill.teacher)).digest
    if run.config.train.camera_start and not run.folder.checkpoint.exists():
        made["camera_start"] = RunFolder(Path(run.config.train.camera_start)).digest
    write_versions(run.folder, made)
