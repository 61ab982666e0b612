"""What a term may look at: both sides' features, boxes, grid, adapted tensors, and which quirks are on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlab.distill.method import Adapter, Term
from kdlab.distill.paths import Part, TensorPath
from kdlab.geometry import BEVGrid
from kdlab.sample import Batch, Boxes3D, Features, Predictions, TaskPrediction

V = TypeVar("V")


@dataclass
class Context:
    """One step's material. Tensors are handed out in float32, adapted tensors and regions are made once.

    Adapters are layers of the student's side: they run in its arithmetic, ``mixed``. Terms run in float32, and with
    them the modules that they call themselves.

    Attributes:
        student: the student's features.
        teacher: the teacher's features.
        boxes: padded annotations [B, M, ...]; NaN velocities count as 0.
        grid: of the maps at stride 1.
        labels: the label encoder's features, where a method has one.
        batch: the whole batch, for terms that need depth or poses.
        on: names of the quirks that are on.
        adapters: the method's adapters by name.
        modules: their modules by name.
        mixed: type that autocast gives adapters; None without mixed precision.
    """

    student: Features
    teacher: Features | None
    boxes: Boxes3D
    grid: BEVGrid
    labels: Features | None = None
    batch: Batch | None = None
    on: frozenset[str] = frozenset()
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    mixed: torch.dtype | None = None
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Any, make: Callable[[], V]) -> V:
        """What ``make`` returns, made once a step per key; for regions and targets that several terms share."""
        if key not in self._made:
            self._made[key] = make()
        value: V = self._made[key]
        return value

    def module(self, name: str) -> nn.Module:
        """A module that a term's function calls itself (the term lists it in ``modules``), in float32 as the term."""
        return self.modules[name]

    def predictions(self, side: str) -> Predictions:
        """Predictions of ``student``, ``teacher`` or ``labels``, in float32."""
        found = self.once(("read", f"{side}.predictions"), lambda: self._read(f"{side}.predictions"))
        assert isinstance(found, Predictions)
        return found

    def tensor(self, path: str) -> Tensor:
        """A tensor by path, such as ``teacher.stages[0]``, in float32.

        Raises:
            ValueError: no such tensor.
        """
        found = self.once(("read", path), lambda: self._read(path))
        if not isinstance(found, Tensor):
            raise ValueError(f"{path} is not one tensor; use Context.predictions")
        return found

    def _read(self, path: str) -> Tensor | Predictions:
        parsed = TensorPath.parse(path)
        stored = self.batch.stored if self.batch is not None else {}
        if path in stored:
            return stored[path].float()
        if f"{path}.heatmap" in stored:
            return Predictions.of_maps(*(self.tensor(f"{path}.{part}") for part in ("heatmap", "regression")))
        features: Features | None = getattr(self, parsed.side)
        if features is None:
            raise ValueError(f"{path} is missing: there are no {parsed.side} features")
        found = parsed.read(features)
        if isinstance(found, Tensor):
            return found.float()
        tasks = ({f.name: getattr(t, f.name).float() for f in fields(TaskPrediction)} for t in found.tasks)
        return Predictions(tuple(TaskPrediction(**t) for t in tasks))

    def teacher_tensor(self, term: Term) -> Tensor:
        """The tensor that a term takes as its example, from the teacher or the label encoder.

        Raises:
            ValueError: the term names none, or it is missing.
        """
        if term.teacher is None:
            raise ValueError(f"term {term.name} names no source tensor")
        return self.tensor(term.teacher)

    def student_tensor(self, term: Term) -> Tensor:
        """The student's tensor of a term: sliced, resized and adapted as the term says; adapters run once a step."""
        size: tuple[int, int] | None = None
        if term.adapter and self.adapters[term.adapter].resize != "no":
            height, width = self.teacher_tensor(term).shape[-2:]
            size = (height, width)
        key = ("adapted", term.student, repr(term.channels), term.adapter, size)
        return self.once(key, lambda: self._adapt(term, size))

    def _adapt(self, term: Term, size: tuple[int, int] | None) -> Tensor:
        tensor = self.tensor(term.student)
        if isinstance(term.channels, Part):
            tensor = term.channels.take(tensor, TensorPath.parse(term.student).frames_in(self.student))
        elif term.channels is not None:
            tensor = tensor[..., term.channels, :, :]
        if not term.adapter:
            return tensor
        flat = tensor.flatten(0, -4) if tensor.ndim > 4 else tensor
        if size is not None and tuple(flat.shape[-2:]) != size:
            corners = self.adapters[term.adapter].resize == "corners"
            flat = F.interpolate(flat, size, mode="bilinear", align_corners=corners)
        with torch.autocast(flat.device.type, self.mixed, enabled=self.mixed is not None):
            adapted: Tensor = self.modules[term.adapter](flat)
        adapted = adapted.float()
        return adapted.reshape(*tensor.shape[:-3], *adapted.shape[-3:])

    def pair(self, term: Term) -> tuple[Tensor, Tensor]:
        """Student's and source's tensor of a term.

        Raises:
            ValueError: their shapes differ.
        """
        student, teacher = self.student_tensor(term), self.teacher_tensor(term)
        if student.shape != teacher.shape:
            raise ValueError(
                f"term {term.name}: {term.student} is {tuple(student.shape)} and {term.teacher} is "
                f"{tuple(teacher.shape)}; an adapter (with resize, where rows differ) must bring them together"
            )
        return student, teacher

    def grid_of(self, tensor: Tensor) -> BEVGrid:
        """The grid of a map [..., H, W]: the context's area in as many cells as the map has.

        Raises:
            ValueError: its cells would not be square.
        """
        height, width = tensor.shape[-2:]
        if (height, width) == self.grid.shape:
            return self.grid
        grid = BEVGrid(self.grid.x, self.grid.y, (self.grid.x[1] - self.grid.x[0]) / width)
        if grid.shape != (height, width):
            raise ValueError(
                f"a map of {height} x {width} cells does not lie on the grid's area, {self.grid.shape} cells"
            )
        return grid
