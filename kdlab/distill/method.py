"""A method is data: quirks, adapters, terms with weights and sources, starts and stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from kdlab.config import DetectorConfig, Modality
from kdlab.distill.paths import Part, TensorPath
from kdlab.sample import Batch

if TYPE_CHECKING:
    from kdlab.distill.context import Context
    from kdlab.distill.places import TermResult

Variant = Literal["intended", "released"]
ALL: frozenset[Modality] = frozenset(("lidar", "camera", "fusion"))


@dataclass(frozen=True)
class TeacherMode:
    """What a quirk does to networks that are otherwise frozen, in eval mode and without gradient.

    Attributes:
        batch_statistics: run in training mode.
        restore: put running statistics back after each step.
        trainable: submodules of the teacher that receive gradients; they join the Distiller's parameters.
    """

    batch_statistics: bool = False
    restore: bool = True
    trainable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quirk:
    """One difference between what a paper means and what its released code computes.

    Attributes:
        name: with the method's name in front, such as ``unidistill.transpose_points``.
        what: what the released code does, one sentence.
        evidence: file:line of the released code, or where else it is known from.
        where: the part that it acts on.
        teacher_mode: set where it changes how frozen networks run.
        change: set where it changes what terms name, such as their channels; called with each term.
        student: the field of the student's `kdlab.config.DetectorConfig` that is true where it is on, such as
            ``camera.shared_lift``; the student is built by its config, which must agree. It is about camera students.
        within: the field that has to be true for the quirk to be about a student at all.
        means: what the paper means instead, one sentence.
    """

    name: str
    what: str
    evidence: str
    where: Literal["term", "adapter", "student", "teacher", "data"] = "term"
    teacher_mode: TeacherMode | None = None
    change: Callable[[Term], Term] | None = None
    student: str | None = None
    within: str | None = None
    means: str = ""

    def concerns(self, student: DetectorConfig) -> bool:
        """Whether a student is built one way or another by it."""
        if self.student is None or student.modality != "camera":
            return False
        return self.within is None or bool(attrgetter(self.within)(student))


@dataclass(frozen=True)
class Adapter:
    """A trained module on the student's side of a comparison, dropped at inference.

    Attributes:
        name: by which terms refer to it.
        build: makes the module from the student's and the source's widths.
        what: what it is, a few words.
        source: method, venue, file:line.
        resize: bring the input to the source's rows and columns first; ``corners`` aligns corners.
        unless: quirk that, when on, leaves the adapter out.
        only: quirk that must be on, or the adapter is left out.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    what: str
    source: str
    resize: Literal["no", "bilinear", "corners"] = "no"
    unless: str | None = None
    only: str | None = None


@dataclass(frozen=True, kw_only=True)
class Term:
    """One comparison.

    Attributes:
        name: unique in its method.
        function: takes the context and this term, returns unweighted errors.
        weight: the paper's value.
        source: method, venue, file:line of function and weight.
        teacher: path of the source tensor (``teacher.`` or ``labels.``); None where only the student is needed.
        student: path of the student's tensor.
        adapter: name of the adapter that the student's tensor goes through.
        channels: slice of the student's channels, before the adapter.
        modules: names of further adapters that the function itself calls (`Context.module`).
        reads: paths of further tensors that the function itself reads (`Context.tensor`).
        options: further numbers for the function.
        scale: factor on the weight, tuned per preset; sums over channels do not port between widths.
        adapt: what puts an adapter into it on the command line, where it has none and widths differ.
    """

    name: str
    function: Callable[[Context, Term], TermResult]
    weight: float
    source: str
    teacher: str | None = "teacher.bev"
    student: str = "student.bev"
    adapter: str | None = None
    channels: slice | Part | None = None
    modules: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    adapt: str = ""

    def __post_init__(self) -> None:
        if TensorPath.parse(self.student).side != "student":
            raise ValueError(f"term {self.name}: the student's tensor cannot be {self.student!r}")
        if self.teacher is not None and TensorPath.parse(self.teacher).side == "student":
            raise ValueError(f"term {self.name}: the source tensor cannot be {self.teacher!r}")

    @property
    def paths(self) -> tuple[TensorPath, ...]:
        """Every tensor that the term names: the student's, the source's, further ones."""
        return tuple(TensorPath.parse(text) for text in (self.student, self.teacher, *self.reads) if text)


@dataclass(frozen=True)
class Start:
    """Weights that the student takes over from the teacher before training.

    Attributes:
        module: submodule's name, the same on both sides, such as ``head.tasks``.
        source: method, venue, file:line.
        without: what leaves it out on the command line.
    """

    module: str
    source: str
    without: str = ""


@dataclass(frozen=True)
class Stage:
    """A training that comes before the student's, such as that of a label encoder.

    Attributes:
        name: of the trained network.
        what: one sentence.
        build: makes the network from the teacher and the names of the quirks that are on.
        loss: of the network, the teacher, a batch and the quirks that are on.
        source: method, venue, file:line.
        epochs: its length.
        lr: its learning rate.
        weight_decay: its weight decay.
        milestones: epochs after which its learning rate is a tenth, in a run whose schedule is ``steps``; of its
            ``epochs``.
        gate: makes a detector of the trained network and the teacher, whose mAP on the validation split, with the
            annotations given to it, tells before the student's training how good the network is.
    """

    name: str
    what: str
    build: Callable[[nn.Module, frozenset[str]], nn.Module]
    loss: Callable[[nn.Module, nn.Module, Batch, frozenset[str]], Tensor]
    source: str
    epochs: int
    lr: float
    weight_decay: float
    milestones: tuple[int, ...] = ()
    gate: Callable[[nn.Module, nn.Module], nn.Module] | None = None


@dataclass(frozen=True)
class Method:
    """Terms, adapters and quirks of a paper, or of several.

    Attributes:
        name: of the method.
        teacher: modalities of the teacher that the weights were made for, see `between`.
        student: those of the student.
        terms: what is compared.
        adapters: modules that terms refer to.
        quirks: known differences between paper and released code.
        start: weights copied from the teacher before training.
        stages: trainings that come first.
        on: names of the quirks that are switched on.
    """

    name: str
    teacher: frozenset[Modality]
    student: frozenset[Modality]
    terms: tuple[Term, ...]
    adapters: tuple[Adapter, ...] = ()
    quirks: tuple[Quirk, ...] = ()
    start: tuple[Start, ...] = ()
    stages: tuple[Stage, ...] = ()
    on: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        names = [t.name for t in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: two terms have the same name: {', '.join(names)}")
        _known(self.on, (q.name for q in self.quirks), f"{self.name}: unknown quirk")
        asked = {a for t in self.terms for a in (t.adapter, *t.modules) if a}
        _known(asked, (a.name for a in self.adapters), f"{self.name}: unknown adapter")

    def between(self, student: Modality, teacher: Modality) -> Method:
        """This method for a pair of modalities; where its weights are another pair's, their sources say so.

        Whether the pair has the tensors that the terms name is another question, see `kdlab.distill.distiller.check`.
        """
        if student in self.student and teacher in self.teacher:
            return self
        own = f"{'/'.join(sorted(self.teacher))} to {'/'.join(sorted(self.student))}"
        note = f"; a weight for {own}, not for {teacher} to {student}"
        terms = tuple(replace(t, source=t.source + note) for t in self.terms)
        return replace(self, teacher=frozenset((teacher,)), student=frozenset((student,)), terms=terms)

    def __add__(self, other: Method) -> Method:
        """All that both methods have; terms of equal name get their method's name in front."""
        clash = {t.name for t in self.terms} & {t.name for t in other.terms}
        terms = [
            replace(t, name=f"{m.name}.{t.name}") if t.name in clash else t for m in (self, other) for t in m.terms
        ]
        adapters = {a.name: a for m in (self, other) for a in m.adapters}
        for adapter in self.adapters:
            if adapters[adapter.name] != adapter:
                raise ValueError(f"{self.name} + {other.name}: both have an adapter {adapter.name!r}, and they differ")
        return Method(
            f"{self.name}+{other.name}",
            self.teacher & other.teacher,
            self.student & other.student,
            tuple(terms),
            tuple(adapters.values()),
            tuple({q.name: q for q in (*self.quirks, *other.quirks)}.values()),
            tuple(dict.fromkeys((*self.start, *other.start))),
            tuple({s.name: s for s in (*self.stages, *other.stages)}.values()),
            self.on | other.on,
        )

    def variant(self, variant: Variant) -> Method:
        """All quirks off (``intended``) or on (``released``).

        Raises:
            ValueError: another word.
        """
        if variant not in ("intended", "released"):
            raise ValueError(f"{self.name}: unknown variant {variant!r}; known: intended, released")
        return replace(self, on=frozenset(q.name for q in self.quirks) if variant == "released" else frozenset())

    def flip(self, names: Iterable[str]) -> Method:
        """Switch these quirks to what they are not.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        flipped = frozenset(names)
        _known(flipped, (q.name for q in self.quirks), f"{self.name}: unknown quirk")
        return replace(self, on=self.on ^ flipped)

    def reweight(self, weights: Mapping[str, float]) -> Method:
        """Replace weights by term name; 0 switches a term off.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        _known(weights, (t.name for t in self.terms), f"{self.name}: unknown term")
        return replace(self, terms=tuple(replace(t, weight=weights.get(t.name, t.weight)) for t in self.terms))

    def scaled(self, factor: float | Mapping[str, float]) -> Method:
        """Multiply the scale of every term, or of the named ones; the papers' weights stay beside it.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        factors = {t.name: factor for t in self.terms} if isinstance(factor, int | float) else factor
        _known(factors, (t.name for t in self.terms), f"{self.name}: unknown term")
        return replace(self, terms=tuple(replace(t, scale=t.scale * factors.get(t.name, 1.0)) for t in self.terms))

    def only(self, names: Iterable[str]) -> Method:
        """These terms alone.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        kept = frozenset(names)
        _known(kept, (t.name for t in self.terms), f"{self.name}: unknown term")
        return replace(self, terms=tuple(t for t in self.terms if t.name in kept))

    @property
    def active(self) -> tuple[Term, ...]:
        """Terms whose weight is not 0, changed by the quirks that are on, without the adapters they leave out."""
        out = {a.name for a in self.adapters if a.unless in self.on or (a.only and a.only not in self.on)}
        changes = [q.change for q in self.quirks if q.change is not None and q.name in self.on]

        def without(term: Term) -> Term:
            for change in changes:
                term = change(term)
            modules = tuple(m for m in term.modules if m not in out)
            return replace(term, adapter=None if term.adapter in out else term.adapter, modules=modules)

        terms = (without(t) for t in self.terms)
        return tuple(t for t in terms if t.weight * t.scale != 0)

    @property
    def needs_labels(self) -> bool:
        """A term compares with a label encoder."""
        return any(path.side == "labels" for t in self.active for path in t.paths)

    @property
    def teacher_mode(self) -> TeacherMode:
        """How frozen networks run, with the quirks that are on."""
        modes = [q.teacher_mode for q in self.quirks if q.teacher_mode and q.name in self.on]
        return TeacherMode(
            any(m.batch_statistics for m in modes),
            all(m.restore for m in modes),
            tuple(dict.fromkeys(name for m in modes for name in m.trainable)),
        )

    def describe(self) -> str:
        """Printable table of terms, weights with their sources, adapters, quirks with their evidence."""
        from kdlab.distill.describe import describe

        return describe(self)


def _known(names: Iterable[str], known: Iterable[str], problem: str) -> None:
    listed = list(known)
    for name in names:
        if name not in listed:
            raise ValueError(f"{problem} {name!r}; known: {', '.join(listed) or 'none'}")
