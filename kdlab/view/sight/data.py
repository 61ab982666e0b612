"""What teacher, student and method made of one sample: the record that every picture reads."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlab.distill import Context, TermResult, gradient_map
from kdlab.geometry import BEVGrid
from kdlab.sample import Batch, Detections, Features, Sample
from kdlab.view.sight.maps import bev_stages

ALL = "all"
"""Stands for every term of the method, where a term is asked for."""

SIDES = ("teacher", "student", "labels")


@dataclass
class Live:
    """What gradients are made from; it holds the student's graph from its BEV map on, on the networks' device.

    Attributes:
        context: what the terms looked at.
        values: weighted loss of each term, with its graph.
        leaves: where gradients end: "student.bev", and the maps of the key frame that it is made of.
        frozen: the teacher ran as it is, no quirk changed how.
    """

    context: Context
    values: dict[str, Tensor]
    leaves: dict[str, Tensor]
    frozen: bool = True


@dataclass
class Sight:
    """One sample as teacher, student and method see it; on the CPU, float32, without gradients.

    Attributes:
        sample: images at their stored size, points, annotations.
        batch: the sample alone, images at the networks' size.
        grid: of BEV maps at stride 1.
        teacher: its features; None without a teacher.
        student: its features, with `Features.lift` where it has cameras; None without a student.
        labels: features of the label encoder, of methods that have one.
        detections: final boxes, best first, of "teacher" and "student".
        results: of each term, weighted; {} without a method.
        errors: what could not be made, in words, by term or side.
        pulls: the tensor that the gradient map of each term is taken at.
        adapted: the student's map [C, H, W] as its adapter hands it to the method, by the teacher's stage; where the
            two sides' maps differ in width or cells.
        masks: where the method compares, [H, W] by name, as it weighs them (`kdlab.view.sight.masks`).
        depth_bins: lower bound, upper bound and width of the bins of the lift, metres; None without cameras.
        image_size: height and width of the networks' images.
        gradients: maps that were made so far, by term.
        live: what further gradients are made from; None once dropped.
        again: sees the sample once more, where gradients are asked for later; None for one that was read from a file.
    """

    sample: Sample
    batch: Batch
    grid: BEVGrid
    teacher: Features | None = None
    student: Features | None = None
    labels: Features | None = None
    detections: dict[str, Detections] = field(default_factory=dict)
    results: dict[str, TermResult] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    adapted: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    depth_bins: tuple[float, float, float] | None = None
    image_size: tuple[int, int] = (0, 0)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    live: Live | None = field(default=None, repr=False)
    again: Callable[[], Sight] | None = field(default=None, repr=False)

    @property
    def features(self) -> dict[str, Features]:
        """The features that are there, by side."""
        sides = ((side, getattr(self, side)) for side in SIDES)
        return {side: found for side, found in sides if found is not None}

    def stages(self) -> dict[str, tuple[str, ...]]:
        """Names of the BEV maps of each side, as `kdlab.view.sight.maps.stage_map` takes them."""
        return {side: tuple(bev_stages(found)) for side, found in self.features.items()}

    def value(self, term: str) -> float:
        """Weighted loss of a term, or of "all".

        Raises:
            ValueError: no such term.
        """
        return sum(float(self._result(name).value) for name in self._named(term))

    def loss_map(self, term: str) -> Tensor:
        """Where a term's loss comes from, [H, W] on its grid.

        "all" adds every term on the finest of their grids; a coarser cell's loss is shared evenly by its parts.

        Raises:
            ValueError: no such term.
        """
        maps = [self._result(name).map()[0] for name in self._named(term)]
        if not maps:
            return torch.zeros(self.grid.shape)
        size = max(tuple(m.shape) for m in maps)
        parts = ((m, m.numel() / (size[0] * size[1])) for m in maps)
        return torch.stack([F.interpolate(m[None, None], size)[0, 0] * share for m, share in parts]).sum(0)

    def gradient_map(self, term: str) -> Tensor:
        """How strongly a term, or "all", pulls on each cell of the student: |d value / d map| summed over channels.

        The map is ``student.bev``; for a term that reads a map which that is made of, such as a camera BEV map, it is
        this one (`pulls`). Made when first asked for, and kept.

        Returns:
            [H, W] on the grid.

        Raises:
            ValueError: no such term, or it is not in the file that the sight was read from.
        """
        if term not in self.gradients:
            live = self.graph(term)
            value = torch.stack([live.values[name] for name in self._named(term)]).sum()
            leaf = live.leaves[self.pulls.get(term, "student.bev")]
            self.gradients[term] = gradient_map(value, leaf)[0].float().cpu()
        return self.gradients[term]

    def gradient(self, terms: str | Collection[str] = ALL, at: str = "student.bev") -> Tensor:
        """Gradient of some terms' sum at a map of the student, [C, H, W]; it is linear in the terms.

        Args:
            terms: a term, several, or "all".
            at: a name in ``live.leaves``.

        Raises:
            ValueError: no such term, or the sight was read from a file.
        """
        names = self._named(terms) if isinstance(terms, str) else tuple(terms)
        live = self.graph(*names)
        leaf = live.leaves[at]
        if not names:
            return torch.zeros(leaf.shape[-3:])
        value = torch.stack([live.values[name] for name in names]).sum()
        (found,) = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True, materialize_grads=True)
        return found[0].flatten(0, -3).cpu()  # of frames there is the key frame alone

    def graph(self, *terms: str) -> Live:
        """What gradients of some terms are made from; where it was dropped the sample is seen once more.

        Raises:
            ValueError: no such term, or the sight was read from a file.
        """
        for term in terms:
            self._named(term)
        live = self.live  # another thread may drop it meanwhile
        if live is None:
            if self.again is None or not self.results:
                what = f"of {', '.join(terms)} " if terms else ""
                raise ValueError(f"no gradient {what}here: a sight without a method, or from a file, makes none")
            live = self.live = self.again().live
        assert live is not None
        return live

    def drop_graph(self) -> None:
        """Free the student's graph; maps that were made stay."""
        if self.again is not None:
            self.live = None

    def _named(self, term: str) -> tuple[str, ...]:
        if term == ALL:
            return tuple(self.results)
        self._result(term)
        return (term,)

    def _result(self, term: str) -> TermResult:
        if term in self.results:
            return self.results[term]
        known = ", ".join((*self.results, ALL)) if self.results else "none, there is no method"
        raise ValueError(self.errors.get(term) or f"no term {term!r}; known: {known}")
