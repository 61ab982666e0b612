"""Runs a method: owns its adapters, keeps the teacher frozen, hands terms their context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from kdlab.config import DetectorConfig
from kdlab.distill.context import Context
from kdlab.distill.method import Method, Term
from kdlab.distill.paths import Channels, HasChannels, Part, TensorPath
from kdlab.distill.places import TermResult
from kdlab.geometry import BEVGrid, footprint
from kdlab.sample import Batch, Features


class Distiller(nn.Module):
    """A method's terms between a student and a frozen teacher.

    The teacher (and a label encoder) is no submodule: it is absent from ``parameters()`` and ``state_dict()``, stays in
    eval mode without gradients, and follows the Distiller to its device. Adapters are submodules, and run in autocast's
    type, as the student's layers do. Terms run in float32, and with them the modules that they call themselves.

    Args:
        method: what to compare.
        student: its widths are read, nothing else.
        teacher: ``teacher(batch) -> Features``, with ``channels``.
        labels: a label encoder, ``labels(batch) -> Features``, with ``channels``; for terms that name ``labels.``.
        grid: of the BEV maps at stride 1.

    Raises:
        ValueError: a term names a tensor that a side lacks, or widths differ and no adapter stands between.
    """

    def __init__(
        self,
        method: Method,
        student: HasChannels,
        teacher: nn.Module,
        labels: nn.Module | None = None,
        *,
        grid: BEVGrid,
    ) -> None:
        super().__init__()
        self.method = method
        self.grid = grid
        self._frozen: Mapping[str, nn.Module] = {"teacher": teacher} | (
            {"labels": labels} if labels is not None else {}
        )
        sides: dict[str, HasChannels] = {"student": student, **self._frozen}  # type: ignore[dict-item]
        self._channels = {side: network.channels for side, network in sides.items()}
        self.check()
        agree(method, getattr(student, "config", None))
        self.adapters = nn.ModuleDict({_key(name): module for name, module in self._build_adapters().items()})
        self.adapters.to(memory_format=torch.channels_last)  # as maps are
        mode = method.teacher_mode
        for network in self._frozen.values():
            network.requires_grad_(False)
            network.train(mode.batch_statistics)
        trainable = {name: teacher.get_submodule(name) for name in mode.trainable}
        self.teacher_parts = nn.ModuleDict({_key(name): part for name, part in trainable.items()})
        self.teacher_parts.requires_grad_(True)

    def check(self) -> None:
        """Compare what the terms name with what both sides have.

        Raises:
            ValueError: one sentence for each tensor that is missing and each pair of widths that differ.
        """
        check(self.method, self._channels)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._frozen["teacher"]

    @property
    def labels(self) -> nn.Module | None:
        """The frozen label encoder, where there is one."""
        return self._frozen.get("labels")

    @property
    def cacheable(self) -> bool:
        """The teacher's features depend on the sample alone, so they may be stored."""
        return cacheable(self.method)

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """The networks beside the student: ``teacher``, and ``labels`` where there is a label encoder."""
        return self._frozen

    def paths(self, side: str) -> tuple[TensorPath, ...]:
        """What the method's terms name of a network, each once."""
        named = {p.text: p for t in self.method.active for p in t.paths if p.side == side}
        return tuple(named.values())

    def forward(
        self,
        student_features: Features,
        batch: Batch,
        teacher_features: Features | None = None,
        label_features: Features | None = None,
    ) -> dict[str, TermResult]:
        """Weighted results by term name; their values add up to the method's loss (see `total`).

        Args:
            student_features: with gradient.
            batch: what the student saw; the teacher runs on it unless its features are given, or stored in the batch.
            teacher_features: stored ones.
            label_features: stored ones.

        Raises:
            ValueError: stored features although a quirk makes them depend on the batch.
        """
        context = self.context(student_features, batch, teacher_features, label_features)
        with torch.autocast(context.boxes.values.device.type, enabled=False):
            return run_terms(self.method, context)

    def context(
        self,
        student_features: Features,
        batch: Batch,
        teacher_features: Features | None = None,
        label_features: Features | None = None,
    ) -> Context:
        """What the terms of this step look at; for single terms and for pictures. Arguments as in `forward`.

        Boxes that lie outside the grid with all corners of their footprint count for no term and are left out.
        """
        if (teacher_features or label_features or batch.stored) and not self.cacheable:
            on = ", ".join(sorted(self.method.on))
            raise ValueError(
                f"{self.method.name}: stored features cannot be used, "
                f"the teacher depends on the batch (quirks on: {on})"
            )
        device = batch.boxes.values.device.type
        mixed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return Context(
            student_features,
            self._features("teacher", batch, teacher_features),
            batch.boxes.keep(self.grid.locate(footprint(batch.boxes.values))[2].any(-1)),
            self.grid,
            self._features("labels", batch, label_features),
            batch,
            self.method.on,
            {a.name: a for a in self.method.adapters},
            {a.name: self.adapters[_key(a.name)] for a in self.method.adapters if _key(a.name) in self.adapters},
            mixed,
        )

    def _features(self, side: str, batch: Batch, given: Features | None) -> Features | None:
        if given is not None:
            return _detached(given)
        paths = self.paths(side) if side in self._frozen else ()
        if not paths or any(text.startswith(f"{side}.") for text in batch.stored):
            return None
        return self.run(side, batch)

    def run(self, side: str, batch: Batch) -> Features:
        """A frozen network's features of a batch."""
        network, mode = self._frozen[side], self.method.teacher_mode
        network.train(mode.batch_statistics)
        self.teacher_parts.train(self.training)
        with (
            torch.set_grad_enabled(bool(mode.trainable) and torch.is_grad_enabled()),
            _statistics(network, mode.restore),
        ):
            features: Features = network(batch)
        return features if mode.trainable else _detached(features)

    def _build_adapters(self) -> dict[str, nn.Module]:
        specs = {a.name: a for a in self.method.adapters}
        built: dict[str, tuple[tuple[Any, ...], nn.Module]] = {}
        for term in self.method.active:
            widths = _widths(term, self._channels)
            for name in (term.adapter, *term.modules):
                if name and name not in built:
                    built[name] = (widths, specs[name].build(*widths))
                elif name and name == term.adapter and built[name][0] != widths:
                    raise ValueError(
                        f"{self.method.name}, term {term.name}: adapter {name} is shared, "
                        f"but is {built[name][0]} for another term and would be {widths} (student, source width) here"
                    )
        return {name: module for name, (_, module) in built.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for network in self._frozen.values():
            network._apply(fn, recurse)
        return self


def cacheable(method: Method) -> bool:
    """Frozen networks' features depend on the sample alone, so they may be stored."""
    mode = method.teacher_mode
    return not (mode.batch_statistics or mode.trainable)


def agree(method: Method, config: object) -> None:
    """See that a student is built as the quirks about it say; one without a `DetectorConfig` is not asked.

    Raises:
        ValueError: one sentence for each quirk that the student's config does not follow.
    """
    if not isinstance(config, DetectorConfig):
        return
    problems = []
    for quirk in method.quirks:
        on = quirk.name in method.on
        if quirk.student and quirk.concerns(config) and attrgetter(quirk.student)(config) != on:
            problems.append(
                f"{method.name}: quirk {quirk.name} is {'on' if on else 'off'}, but the student's "
                f"detector.{quirk.student} is {not on}; make it {on}, or flip the quirk: --quirks {quirk.name}"
            )
    if problems:
        raise ValueError("\n".join(problems))


def check(method: Method, channels: Mapping[str, Channels]) -> None:
    """Compare what a method's terms name with the widths of both sides, and of a label encoder, by side.

    Raises:
        ValueError: one sentence for each tensor that is missing and each pair of widths that differ.
    """
    problems = [
        f"{text}; or go without the term: --weights {term.name} 0"
        for term in method.active
        for text in _problems(term, channels)
    ]
    if problems:
        raise ValueError("\n".join(f"{method.name}, {text}" for text in dict.fromkeys(problems)))


def run_terms(method: Method, context: Context) -> dict[str, TermResult]:
    """Weighted results of a method's terms by name, on a context that is at hand."""
    return {t.name: t.function(context, t).weighted(t.weight * t.scale) for t in method.active}


def total(results: Mapping[str, TermResult]) -> Tensor | float:
    """The method's loss: the sum of the weighted values (0.0 where there is no term)."""
    return sum((r.value for r in results.values()), 0.0)


def copy_start(method: Method, student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copy the weights that ``method.start`` names from the teacher; returns the names of the modules.

    Raises:
        ValueError: a side has no such module, or shapes differ.
    """
    for start in method.start:
        try:
            ours, theirs = (network.get_submodule(start.module).state_dict() for network in (student, teacher))
        except AttributeError as error:
            raise ValueError(f"{method.name}: {start.module} cannot be copied from the teacher: {error}") from error
        for name in sorted({*ours, *theirs}):
            shapes = [tuple(side[name].shape) if name in side else "missing" for side in (ours, theirs)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{method.name}: {start.module} cannot be copied from the teacher: {name} is {shapes[1]} there and "
                    f"{shapes[0]} in the student; build both alike"
                    + (f", or go without the copy: {start.without}" if start.without else "")
                )
        student.get_submodule(start.module).load_state_dict(theirs)
    return [start.module for start in method.start]


def _key(name: str) -> str:
    """A name as `nn.ModuleDict` takes it."""
    return name.replace(".", "/")


def _widths(term: Term, channels: Mapping[str, Channels]) -> tuple[int, int]:
    """Widths of a term's student tensor (after slicing) and of its source; 0 where there is none."""
    path = TensorPath.parse(term.student)
    width = path.width(channels["student"]) or 0
    if isinstance(term.channels, Part):
        width = term.channels.width(width, path.frames(channels["student"]))
    elif term.channels is not None:
        width = len(range(*term.channels.indices(width)))
    if term.teacher is None:
        return width, 0
    source = TensorPath.parse(term.teacher)
    return width, source.width(channels[source.side]) or 0


def _problems(term: Term, channels: Mapping[str, Channels]) -> Iterator[str]:
    missing = False
    for path in term.paths:
        if path.side not in channels:
            side = "label encoder" if path.side == "labels" else path.side
            yield f"term {term.name}: {path.text} is missing, there is no {side}"
            missing = True
        elif path.width(channels[path.side]) is None:
            yield f"term {term.name}: {path.text} is missing, the {path.side} has {_present(channels[path.side])}"
            missing = True
    if missing or term.teacher is None or term.adapter:
        return
    whole = all(p.name == "predictions" and not p.part for p in term.paths[:2])
    student, source = _widths(term, channels)
    if student != source and not whole:
        yield (
            f"term {term.name}: {term.student} has {student} channels and {term.teacher} has {source}; "
            "the term needs an adapter between them" + (f": {term.adapt}" if term.adapt else "")
        )


def _present(channels: Channels) -> str:
    names = ["image", "depth", "camera_bev", "lidar_bev", "bev", "neck"]
    found = [name for name in names if getattr(channels, name)]
    found += [f"stages[{i}]" for i in range(len(channels.stages))]
    return ", ".join(found + (["predictions"] if channels.heatmap else []))


def _detached(features: Features) -> Features:
    """A copy whose tensors are all cut from the graph."""
    cut: Features = _cut(features)
    return cut


def _cut(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(_cut(v) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _cut(getattr(value, f.name)) for f in fields(value)})
    return value


@contextmanager
def _statistics(network: nn.Module, restore: bool) -> Iterator[None]:
    """Put a network's buffers back afterwards, where it runs in training mode and they are to stay."""
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()} if restore and network.training else {}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in kept.items():
                network.get_buffer(name).copy_(buffer)
