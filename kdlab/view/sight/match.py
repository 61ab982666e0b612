"""Networks, method, adapters and label encoder that go together, found from run folders; in words where they do not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import nn

from kdlab.checkpoint import RunFolder, load_detector, load_run_config, load_weights
from kdlab.config import RunConfig
from kdlab.distill import Distiller, Method, Stage, build_method
from kdlab.distill.distiller import check
from kdlab.distill.method import Variant
from kdlab.pairing import distillation
from kdlab.presets import PRESETS
from kdlab.shipping import WEIGHTS

if TYPE_CHECKING:
    from kdlab.models.detector import Detector


@dataclass(frozen=True)
class Together:
    """What an Observer is made of.

    Attributes:
        teacher: detector.
        student: detector.
        method: compares them.
        labels: the method's label encoder.
        config: of the student's run; the teacher's, where that is alone.
        adapters: file of the method's adapters.
        notes: what a viewer should know, in words.
    """

    teacher: Detector | None
    student: Detector | None
    method: Method | None
    labels: nn.Module | None
    config: RunConfig
    adapters: Path | None
    notes: list[str]


def together(
    student: Path | str | None,
    teacher: Path | str | None,
    method: str | Method | None,
    quirks: Collection[str],
    variant: Variant | None,
    device: str | None,
) -> Together:
    """Load what belongs together; arguments and errors as of `kdlab.view.sight.Observer.of_runs`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if student is None:
        if teacher is None:
            raise ValueError("Observer.of_runs: name a student's run, a teacher's, or both")
        notes = [] if method is None else ["a method compares a teacher with a student: name both"]
        config = load_run_config(teacher)
        return Together(load_detector(teacher, device), None, None, None, config, None, notes)
    run, config, notes = Path(student), load_run_config(student), []
    source = Path(teacher) if teacher is not None else None
    if source is None and config.distill is not None:
        source = find_run(config.distill.teacher, run.parent)
        if source is None:
            notes.append(f"the teacher {config.distill.teacher} is not here: name its run folder")
    seeing = load_detector(run, device)
    if source is None:
        notes += ["a method compares a teacher with a student: name both"] if method is not None else []
        return Together(None, seeing, None, None, config, None, notes)
    taught = load_detector(source, device)
    if isinstance(method, Method):
        chosen: Method | None = method.flip(quirks)
    else:
        chosen = method_for_run(config, taught, method, variant, quirks)
    if chosen is None:
        return Together(taught, seeing, None, None, config, None, notes)
    trained = config.distill is not None and chosen.name == config.distill.method
    if not trained:
        notes.append(f"{run.name} was not trained with {chosen.name}")
    labels = label_encoder(chosen.stages[-1], taught, run, chosen.on) if chosen.needs_labels else None
    return Together(taught, seeing, chosen, labels, config, RunFolder(run).distiller if trained else None, notes)


def find_run(path: str | Path, near: Path | None = None) -> Path | None:
    """A run folder by its path from the working folder; else shipped weights, or a neighbour, of that name.

    Args:
        path: as a config names it.
        near: folder that may hold it.
    """
    places = [Path(path), WEIGHTS / Path(path).name, *([near / Path(path).name] if near is not None else [])]
    return next((place for place in places if RunFolder(place).config.exists()), None)


def method_for_run(
    config: RunConfig, teacher: Detector, name: str | None, variant: Variant | None, quirks: Collection[str]
) -> Method | None:
    """The method of a student's run, or one by name for it; None where neither is.

    Args:
        config: of the student's run.
        teacher: gives the modality.
        name: see `kdlab.distill.papers`; left out: what the run was trained with.
        variant: all quirks off or on; left out: as in the run, else off.
        quirks: to flip from there.

    Raises:
        ValueError: unknown method or quirk.
    """
    distill = config.distill
    if name is not None and (distill is None or distill.method != name):
        own = (p for p in ("tiny", "small") if PRESETS[p](config.detector.modality).detector.bev == config.detector.bev)
        distill = distillation(next(own, ""), name, "")
    if distill is None:
        return None
    if variant is not None:
        distill = replace(distill, variant=variant, quirks=())
    return build_method(distill, config.detector.modality, teacher.config.modality).flip(quirks)


def label_encoder(stage: Stage, teacher: Detector, run: Path, on: frozenset[str] = frozenset()) -> nn.Module | None:
    """The trained network of a run's stage, in eval mode; None where the run has none.

    Args:
        stage: of the method.
        teacher: that it was trained with.
        run: folder of the student's run.
        on: names of the quirks that are on.

    Raises:
        ValueError: it was trained for another teacher.
    """
    weights = RunFolder(run / "stages" / stage.name).weights
    if not weights.exists():
        return None
    with torch.random.fork_rng(devices=[]):
        network = stage.build(teacher, on)
    load_weights(weights, network)
    return network.to(next(teacher.parameters()).device).eval()


def repainted(method: Method, labels: nn.Module, teacher: Detector) -> nn.Module:
    """A label encoder's weights in the network that the method's quirks build, which may paint labels another way."""
    stage = method.stages[-1]
    with torch.random.fork_rng(devices=[]):
        network = stage.build(teacher, method.on)
    network.load_state_dict(labels.state_dict())
    return network.to(next(teacher.parameters()).device).eval()


def fitted(
    method: Method, student: Detector, teacher: Detector, labels: nn.Module | None
) -> tuple[Method, dict[str, str]]:
    """As much of a method as a pair can have, and what is left out, in words by term or quirk.

    Quirks that say how a student is built follow the student.
    """
    errors: dict[str, str] = {}
    for quirk in method.quirks:
        on = quirk.name in method.on
        if quirk.student and quirk.concerns(student.config) and attrgetter(quirk.student)(student.config) != on:
            built = "without" if on else "with"
            errors[quirk.name] = f"quirk {quirk.name} stays as this student is built, {built} {quirk.student}"
            method = method.flip([quirk.name])
        for part in quirk.teacher_mode.trainable if on and quirk.teacher_mode is not None else ():
            if getattr(teacher, part, None) is None:
                errors[quirk.name] = f"quirk {quirk.name} trains the teacher's {part}, and this teacher has none"
                method = method.flip([quirk.name])
    sides = {"student": student.channels, "teacher": teacher.channels}
    if labels is not None:
        sides["labels"] = labels.channels  # type: ignore[assignment]
    for term in method.active:
        try:
            check(method.only([term.name]), sides)
        except ValueError as error:
            errors[term.name] = "; ".join(line.partition("; or go without")[0] for line in str(error).split("\n"))
    return method.reweight({name: 0.0 for name in errors if name in {t.name for t in method.terms}}), errors


def load_adapters(distiller: Distiller, source: Path | Distiller | None) -> list[str]:
    """Take adapters over from a file or another Distiller, as far as they fit; the names of those that stay fresh."""
    own = distiller.state_dict()
    if isinstance(source, Path):
        given = load_file(source) if source.exists() else {}
    else:
        given = source.state_dict() if source is not None else {}
    fit = {k: v.to(own[k].dtype) for k, v in given.items() if k in own and own[k].shape == v.shape}
    distiller.load_state_dict({**own, **fit})
    fresh = (key.split(".")[1].replace("/", ".") for key in own if key not in fit)
    return list(dict.fromkeys(fresh))
