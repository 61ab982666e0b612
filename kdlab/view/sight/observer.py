"""The engine under explorer, living scene, replay and notebooks: teacher, student and method look at samples."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlab.config import AugmentConfig, RunConfig
from kdlab.data.augment import augment
from kdlab.data.batch import collate
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.distill import Context, Distiller, Method, TensorPath, TermResult, run_terms
from kdlab.distill.method import Variant
from kdlab.models.detector import Detector
from kdlab.pairing import Sensors, sensors_of
from kdlab.precision import autocast
from kdlab.sample import Batch, Features, Sample, to_device
from kdlab.view.sight.data import SIDES, Live, Sight
from kdlab.view.sight.masks import masks_of
from kdlab.view.sight.match import fitted, load_adapters, repainted, together

_LEAVES = ("camera_bev", "camera_bev_aligned", "lidar_bev")
"""Maps that the BEV map is made of."""


class Observer:
    """Teacher, student and method, ready to look at samples.

    The networks run in eval mode, without gradients for their weights, and are left in the mode that they came in: a
    student in training may be looked at between two steps. What of a method the pair cannot have is left out, and said.

    Args:
        teacher: a detector.
        student: a detector, on the same device.
        method: compares the two; needs both.
        labels: the label encoder, for methods with one.
        config: of the student's run, or the teacher's where that is alone: image size, precision, sweeps, frames.
        adapters: file of trained adapters (`RunFolder.distiller`); without, they are fresh ones, by the run's seed.

    Attributes:
        grid: of the BEV maps at stride 1.
        method: as far as the pair can have it.
        distiller: runs it; None without a method.
        notes: what a viewer should know, in words.
        errors: what of the method is left out, in words by term or quirk.

    Raises:
        ValueError: neither teacher nor student, or they want one sensor in different forms.
    """

    def __init__(
        self,
        teacher: Detector | None,
        student: Detector | None,
        method: Method | None = None,
        labels: nn.Module | None = None,
        *,
        config: RunConfig,
        adapters: Path | None = None,
    ) -> None:
        first = student if student is not None else teacher
        if first is None:
            raise ValueError("Observer: give a teacher, a student or both")
        self.teacher, self.student, self.labels = teacher, student, labels
        self.config = replace(config, detector=first.config)
        other = replace(config, detector=teacher.config) if teacher is not None else None
        self.sensors: Sensors = sensors_of(self.config, other)
        self.grid = first.grid
        self.device = next(first.parameters()).device
        self.notes: list[str] = []
        self.errors: dict[str, str] = {}
        self.asked, self.method = method, method
        self.distiller: Distiller | None = None
        self._adapters = adapters
        self._lock = threading.RLock()  # a network is run by one thread at a time
        if method is not None:
            self._distil(method, adapters)

    @classmethod
    def of_runs(
        cls,
        student: Path | str | None = None,
        teacher: Path | str | None = None,
        method: str | Method | None = None,
        *,
        quirks: Collection[str] = (),
        variant: Variant | None = None,
        device: str | None = None,
    ) -> Observer:
        """Load trained networks, with the method, adapters and label encoder that belong to them.

        Args:
            student: run folder or shipped weights.
            teacher: likewise; left out: the one that the student's run names, where it is there.
            method: a name, several with + between them, or a method; left out: what the student was trained with.
            quirks: names to flip.
            variant: all quirks off ("intended") or on; left out: as in the student's run.
            device: CUDA where there is one, else the CPU.

        Raises:
            FileNotFoundError: no such run, or its training has not ended.
            ValueError: no run at all, unknown method or quirk, or runs that want one sensor in different forms.
        """
        found = together(student, teacher, method, quirks, variant, device)
        networks = (found.teacher, found.student, found.method, found.labels)
        observer = cls(*networks, config=found.config, adapters=found.adapters)
        observer.notes[:0] = found.notes
        return observer

    def with_quirks(self, names: Collection[str]) -> Observer:
        """The same networks and adapters, the method with these quirks on and all others off.

        Raises:
            ValueError: no method here, or an unknown quirk.
        """
        if self.asked is None:
            raise ValueError("with_quirks: there is no method here; an Observer needs teacher, student and method")
        method = replace(self.asked, on=frozenset(names))
        labels = self.labels
        if labels is not None and self.teacher is not None and method.needs_labels:
            labels = repainted(method, labels, self.teacher)
        other = Observer(self.teacher, self.student, None, labels, config=self.config)
        other._lock, other._adapters = self._lock, self._adapters
        other.asked, other.notes = method, list(self.notes)
        other._distil(method, self.distiller if self.distiller is not None else self._adapters)
        other.notes = list(dict.fromkeys(other.notes))
        return other

    def dataset(self, root: Path | str, split: str | None = None, version: str | None = None) -> NuScenesDataset:
        """A data set opened with all that these networks and their pictures need; errors as `NuScenesDataset`."""
        frames, sweeps = self.sensors.frames, self.sensors.sweeps
        return NuScenesDataset(root, version, split, frames=frames, sweeps=sweeps)

    def see(self, sample: Sample) -> Sight:
        """Look at a sample, as a data set gives it: not augmented, with points, images and annotations."""
        size, exact = self.config.detector.camera.image_size, self.config.data.images == "exact"
        batch = collate([augment(sample, AugmentConfig.none(), size, seed=0, draw=0, exact=exact)])
        with self._lock, _evaluating(self.student, self.teacher, self.labels):
            return self._see(sample, batch)

    def compare(self, sight: Sight) -> Sight:
        """A sight of the same networks under this Observer's method: only the terms run again, where that is enough.

        It is not where a quirk, here or there, changes how the teacher runs.

        Args:
            sight: of an Observer with these networks, such as the one that `with_quirks` was called on.
        """
        live = sight.live
        if self.distiller is None or live is None or not (self.distiller.cacheable and live.frozen):
            return self.see(sight.sample)
        errors = self.errors | {side: sight.errors[side] for side in SIDES if side in sight.errors}
        other = replace(sight, results={}, errors=errors, pulls={}, gradients={}, adapted={}, masks={})
        other.again, other.live = lambda: self.see(sight.sample), None
        on = sight.batch.to(self.device)
        with self._lock, _evaluating(self.student, self.teacher, self.labels):
            with torch.no_grad(), autocast(self.device, self.config.train.precision):
                context = self.distiller.context(live.context.student, on, live.context.teacher)
            self._compare(other, context, live.leaves)
        other.labels = _settled(context.labels)
        return other

    def _see(self, sample: Sample, batch: Batch) -> Sight:
        on = batch.to(self.device)
        sight = Sight(sample, batch, self.grid, errors=dict(self.errors), again=lambda: self.see(sample))
        sight.image_size = self.config.detector.camera.image_size
        student, leaves = self._student(on) if self.student is not None else (None, {})
        teacher, labels = None, None
        if self.distiller is not None and student is not None:
            with torch.no_grad(), autocast(self.device, self.config.train.precision):
                context = self.distiller.context(student, on)
            teacher, labels = context.teacher, context.labels
            self._compare(sight, context, leaves)
        if teacher is None and self.teacher is not None:
            with torch.no_grad(), autocast(self.device, self.config.train.precision):
                teacher = self.teacher(self.teacher.seen(on), keep_lift=student is None)
        for side, network, found in (("teacher", self.teacher, teacher), ("student", self.student, student)):
            if network is not None and found is not None:
                self._keep(sight, side, network, found)
        sight.labels = _settled(labels)
        return sight

    def _student(self, on: Batch) -> tuple[Features, dict[str, Tensor]]:
        """The student's features, and the maps that gradients end at, by path.

        Weights need none, so the graph begins at the BEV map: what it costs does not grow with the cameras.
        """
        assert self.student is not None
        with torch.no_grad(), autocast(self.device, self.config.train.precision):
            encoded = self.student.encode(self.student.seen(on), keep_lift=True)
        found: dict[str, Any] = {name: getattr(encoded, name) for name in (*_LEAVES, "bev")}
        leaves: dict[str, Tensor] = {}
        for name, value in found.items():
            if value is not None:
                past = value[:, 1:].float() if value.ndim == 5 else None  # past frames get no gradient
                leaf = (value if past is None else value[:, :1]).detach().float().requires_grad_(True)
                leaves[f"student.{name}"] = leaf
                found[name] = leaf if past is None else torch.cat((leaf, past), 1)
        graph = self.distiller is not None
        with torch.set_grad_enabled(graph), autocast(self.device, self.config.train.precision):
            stages = self.student.decode_bev(found["bev"])
            neck, predictions = self.student.decode_stages(stages)
        return replace(encoded, **found, stages=stages, neck=neck, predictions=predictions), leaves

    def _compare(self, sight: Sight, context: Context, leaves: dict[str, Tensor]) -> None:
        """Run the terms, each for itself: one that fails says so, and the others go on."""
        assert self.method is not None
        values: dict[str, Tensor] = {}
        for term in self.method.active:
            try:
                with torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
                    result = run_terms(self.method.only([term.name]), context)[term.name]
            except (ValueError, RuntimeError) as error:
                sight.errors[term.name] = str(error)
                continue
            values[term.name] = result.value
            cut = TermResult(result.value.detach(), result.errors, result.places, result.grid)
            sight.results[term.name] = to_device(cut, "cpu", False)
            name = f"student.{TensorPath.parse(term.student).name}"
            sight.pulls[term.name] = name if name in leaves else "student.bev"
        ran = self.method.only(values)
        assert self.distiller is not None
        sight.live = Live(context, values, leaves, self.distiller.cacheable)
        sight.masks = masks_of(ran, context)
        sight.adapted = _adapted(ran, context)

    def _keep(self, sight: Sight, side: str, network: Detector, found: Features) -> None:
        setattr(sight, side, _settled(found))
        if found.lift is not None:
            sight.depth_bins = network.config.camera.depth
        try:
            with torch.no_grad():
                sight.detections[side] = to_device(network.predict(_cut(found))[0], "cpu", False)
        except FloatingPointError as error:
            sight.errors[side] = str(error)

    def _distil(self, method: Method, adapters: Path | Distiller | None) -> None:
        if self.teacher is None or self.student is None:
            self.errors[method.name] = f"{method.name} compares a teacher with a student, and one of them is missing"
            self.method = None
            return
        fit, self.errors = fitted(method, self.student, self.teacher, self.labels)
        was = self.teacher.training
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.train.seed + 1)
                distiller = Distiller(fit, self.student, self.teacher, self.labels, grid=self.grid)
        except ValueError as error:
            self.errors[method.name], self.method = str(error), None
            return
        finally:
            self.teacher.train(was)
        fresh = load_adapters(distiller, adapters)
        if fresh:
            self.notes.append(f"no trained adapters here, but fresh ones by the run's seed: {', '.join(fresh)}")
        self.distiller, self.method = distiller.to(self.device).eval(), fit


def _adapted(method: Method, context: Context) -> dict[str, Tensor]:
    """What adapters hand to the terms [C, H, W], by the teacher's stage, where that differs in width or cells."""
    found: dict[str, Tensor] = {}
    for term in method.active:
        ours, theirs = TensorPath.parse(term.student), TensorPath.parse(term.teacher or term.student)
        if not term.adapter or theirs.side != "teacher" or ours.name != theirs.name or ours.joined:
            continue
        assert context.teacher is not None
        index = (
            theirs.index % len(context.teacher.stages) if theirs.name == "stages" and theirs.index is not None else 0
        )
        stage = f"stages[{index}]" if theirs.name == "stages" else theirs.name
        raw, teacher = context.tensor(term.student), context.tensor(term.teacher or "")
        if raw.shape != teacher.shape and stage not in found:
            found[stage] = context.student_tensor(term)[0].detach().float().cpu()
    return found


def _settled(value: Any) -> Any:
    """A copy on the CPU, floats in full precision."""
    return _mapped(value, lambda t: (t.detach().float() if t.is_floating_point() else t.detach()).cpu())


def _cut(value: Any) -> Any:
    return _mapped(value, Tensor.detach)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(v, change) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), change) for f in fields(value)})
    return value


@contextmanager
def _evaluating(*networks: nn.Module | None) -> Iterator[None]:
    """Eval mode for the time; modes and buffers are as before afterwards, also where a quirk changes statistics."""
    there = [network for network in networks if network is not None]
    modes = [{m: m.training for m in network.modules()} for network in there]
    buffers = [{name: b.clone() for name, b in network.named_buffers()} for network in there[1:]]
    try:
        for network in there:
            network.eval()
        yield
    finally:
        for was in modes:
            for module, training in was.items():
                module.training = training
        with torch.no_grad():
            for network, kept in zip(there[1:], buffers, strict=True):
                for name, buffer in kept.items():
                    network.get_buffer(name).copy_(buffer)
