"""Trains a detector, alone or distilled, into a run folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from kdlab.allocator import keep_freed_memory
from kdlab.checkpoint import (
    RunFolder,
    discard,
    load_detector,
    load_run_config,
    open_run,
    save_weights,
    versions,
    write_versions,
)
from kdlab.config import Modality, RunConfig
from kdlab.cost import read_cost, training_cost, write_cost
from kdlab.data.batch import Loader
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.distill import Distiller, Method, build_method, copy_start
from kdlab.evaluate import Scorer, evaluation_loader, predict, store_metrics
from kdlab.gradients import Gradients
from kdlab.loop import Interrupted, Loop, OnStep
from kdlab.models import Detector, build_detector
from kdlab.models.norm import sync_batchnorm
from kdlab.precision import autocast, resolve
from kdlab.sample import Batch
from kdlab.stages import run_stages

__all__ = ["Interrupted", "Training", "check_teacher", "train"]


class Training(nn.Module):
    """What the optimiser trains and DDP wraps: the student and the distillation's adapters. The teacher stands outside.

    Args:
        student: the detector.
        distiller: the method, None without distillation.
        precision: as in `TrainConfig.precision`.
        keep_bev: keep the student's shared BEV map for `take_bev`.
    """

    def __init__(
        self, student: Detector, distiller: Distiller | None = None, precision: str = "fp32", keep_bev: bool = False
    ) -> None:
        super().__init__()
        self.student, self.distiller, self.precision, self.keep_bev = student, distiller, precision, keep_bev
        self._bev: Tensor | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted losses of a batch; a distillation term's name has ``kd/`` in front."""
        with autocast(batch.boxes.values.device, self.precision):
            features = self.student(batch)
            self._bev = features.bev if self.keep_bev else None
            losses: dict[str, Tensor] = dict(self.student.loss(features, batch))
            if self.distiller is not None:
                losses |= {f"kd/{name}": result.value for name, result in self.distiller(features, batch).items()}
        return losses

    def take_bev(self) -> Tensor:
        """The student's shared BEV map in the last forward pass, with its graph; it is let go of here."""
        bev, self._bev = self._bev, None
        assert bev is not None
        return bev


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
        FileNotFoundError: no data set or no teacher.
        ValueError: the folder holds another config, or the config does not fit data or teacher.
        RuntimeError: a loss is not finite.
        Interrupted: stopped by Ctrl-C or SIGTERM, after a checkpoint.
    """
    folder = RunFolder(Path(out))
    accelerator = _accelerator(config, cpu)
    if accelerator.is_main_process:
        if not resume:
            discard(folder)
        check_teacher(config)
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
    with torch.random.fork_rng(devices=cuda), contextlib.closing(_loader(run)) as loader:
        _train(run, loader)
    accelerator.wait_for_everyone()
    return folder.path


def _train(run: _Run, loader: Loader) -> None:
    config, accelerator = run.config, run.accelerator
    _write_versions(run, loader)
    torch.manual_seed(config.train.seed)
    student = build_detector(config.detector).to(memory_format=torch.channels_last).to(accelerator.device)
    distiller = _distiller(run, student) if config.distill is not None else None
    watched = config.train.gradients_every > 0
    training = Training(student, distiller, config.train.precision, keep_bev=watched).to(accelerator.device)
    if accelerator.num_processes > 1:
        sync_batchnorm(training)
    validation = _Validation(run)
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
        loop.on_losses = Gradients(run.folder.gradients, config.train.gradients_every, training.take_bev, write)
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


def check_teacher(config: RunConfig) -> None:
    """See that a distillation's teacher is there and sees what the student sees; nothing to do without one.

    Raises:
        FileNotFoundError: no teacher, or its training has not ended.
        ValueError: none is named, both want one sensor in different forms, or the method has no such path.
    """
    if config.distill is None:
        return
    if not config.distill.teacher:
        raise ValueError(
            f"{config.distill.method} needs a teacher: give its run folder with --teacher (distill.teacher in a config)"
        )
    try:
        teacher = load_run_config(config.distill.teacher)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no teacher: {error}") from error
    if not RunFolder(Path(config.distill.teacher)).finished:
        raise FileNotFoundError(
            f"no teacher: the run {config.distill.teacher} is not finished; run its `kdlab train` again to go on"
        )
    _sensors(config, teacher)
    _method(config, teacher.detector.modality)


def _method(config: RunConfig, teacher: Modality) -> Method:
    assert config.distill is not None
    return build_method(config.distill, config.detector.modality, teacher)


@dataclass(frozen=True)
class _Sensors:
    images: bool
    points: bool
    frames: int
    sweeps: int


def _sensors(config: RunConfig, teacher: RunConfig | None) -> _Sensors:
    """The union of what student and teacher see.

    Raises:
        ValueError: they want one sensor in different forms.
    """
    detectors = [config.detector, *([teacher.detector] if teacher is not None else [])]
    cameras = [d.camera for d in detectors if d.modality != "lidar"]
    lidars = [d.lidar for d in detectors if d.modality != "camera"]
    for what, values in (
        ("camera.image_size", {c.image_size for c in cameras}),
        ("camera.frames", {c.frames for c in cameras}),
        ("lidar.sweeps", {c.sweeps for c in lidars}),
        ("grid.x and grid.y", {(d.grid.x, d.grid.y) for d in detectors}),
    ):
        if len(values) > 1:
            wanted, given = (" and ".join(map(str, values)), config.distill.teacher if config.distill else "")
            raise ValueError(f"student and teacher ({given}) must agree on detector.{what}, which is {wanted}")
    depth = config.detector.modality != "lidar" and config.detector.camera.depth_supervision
    return _Sensors(
        bool(cameras),
        bool(lidars) or depth,
        max((c.frames for c in cameras), default=1),
        max((c.sweeps for c in lidars), default=1),
    )


def _loader(run: _Run) -> Loader:
    config, camera = run.config, run.config.detector.camera
    teacher = load_run_config(config.distill.teacher) if config.distill is not None else None
    if teacher is not None and config.detector.modality == "lidar":
        camera = teacher.detector.camera
    seen = _sensors(config, teacher)
    data = config.data
    dataset = NuScenesDataset(
        data.root,
        data.version,
        data.train,
        frames=seen.frames,
        sweeps=seen.sweeps,
        images=seen.images,
        points=seen.points,
        image_cache=data.image_cache,
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
        pin_memory=run.accelerator.device.type == "cuda",
    )


def _distiller(run: _Run, student: Detector) -> Distiller:
    assert run.config.distill is not None
    source = run.config.distill.teacher
    teacher = load_detector(source, run.accelerator.device)
    teacher.to(memory_format=torch.channels_last)
    method = _method(run.config, load_run_config(source).detector.modality)
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
        weights = RunFolder(Path(run.config.distill.teacher)).weights
        made["teacher"] = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    write_versions(run.folder, made)


class _Validation:
    """Evaluates on the validation split every so many epochs."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._loader: Loader | None = None
        self._scorer: Scorer | None = None

    def __call__(self, epoch: int, detector: nn.Module) -> None:
        """Evaluate after an epoch, where its turn has come and it is not done yet; every process calls it."""
        config, accelerator = self._run.config, self._run.accelerator
        every = config.train.evaluate_every
        if not every or (epoch % every and epoch != config.train.epochs):
            return
        stored = self._run.folder.validation
        if stored.exists() and str(epoch) in json.loads(stored.read_text()):
            return
        data, rank, world = config.data, accelerator.process_index, accelerator.num_processes
        if self._loader is None:
            self._loader = evaluation_loader(
                config, data.root, data.val, data.version, workers=0, rank=rank, world=world
            )
        assert isinstance(detector, Detector)
        found = predict(detector, self._loader.epoch(0), config.detector.modality, config.train.precision)
        if world > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        if accelerator.is_main_process:
            self._scorer = self._scorer or Scorer(data.root, data.version)
            metrics = self._scorer.score(found, data.val).metrics
            store_metrics(stored, str(epoch), metrics)
            if self._run.progress:
                print(f"epoch {epoch}: mAP {metrics.mean_ap:.4f}  NDS {metrics.nd_score:.4f}", flush=True)
        accelerator.wait_for_everyone()
