"""A short training in memory: real losses, a curve that rises when the method pulls, the same numbers for a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from mini_run import mini_config, one_thread, write_set  # noqa: F401

from kdlab.checkpoint import RunFolder, load_detector, save_weights
from kdlab.config import DistillConfig, save_config
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.distill import Context, Term, TermResult, build_method
from kdlab.distill.places import Cells
from kdlab.models import build_detector
from kdlab.sample import Boxes3D, Sample
from kdlab.view.results.timelapse import Timelapse, foreground_cosine, short_training

Runs = dict[str, Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A data set and untrained runs of a LiDAR teacher and a camera student."""
    folder = tmp_path_factory.mktemp("timelapse")
    made = {"world": write_set(folder / "world")}
    for seed, name in enumerate(("lidar", "camera")):
        config = mini_config(made["world"], "lidar" if name == "lidar" else "camera")
        made[name] = folder / name
        made[name].mkdir()
        save_config(config, RunFolder(made[name]).config)
        torch.manual_seed(seed)
        save_weights(RunFolder(made[name]).weights, build_detector(config.detector))
    return made


@pytest.fixture(scope="module")
def data(runs: Runs) -> NuScenesDataset:
    return NuScenesDataset(runs["world"], split="all", sweeps=2)


def watched(data: NuScenesDataset) -> Sample:
    """The first sample, with a long box over the wall: the LiDAR teacher sees nothing where no points are."""
    values = torch.tensor([[20.0, 0, 1, 3, 14, 3, 0, 0, 0]])
    return replace(data[0], boxes=Boxes3D.make(values, torch.tensor([0])))


def short(runs: Runs, data: NuScenesDataset, **more: object) -> Timelapse:
    options = {"method": "unidistill", "steps": 3, "every": 2, "lr": 0.01, **more}
    return short_training(runs["camera"], runs["lidar"], data=data, watch=watched(data), **options)  # type: ignore[arg-type]


def test_the_method_acts_beside_the_students_own_losses(runs: Runs, data: NuScenesDataset) -> None:
    method = build_method(DistillConfig("unidistill"), "camera", "lidar")
    lapse = short(runs, data, steps=8, every=3, method=method.scaled(3.0), lr=0.003)
    assert lapse.steps == [0, 3, 6, 8] and len(lapse.sights) == len(lapse.cosines) == len(lapse.plain) == 4
    assert lapse.cosines[0] == lapse.plain[0] and lapse.cosines[-1] != lapse.plain[-1]
    terms = [name for name in lapse.losses if name.startswith("kd/")]
    assert len(terms) == 4 and len(lapse.losses) == 8 and {"heatmap", "box", "depth"} <= set(lapse.losses)
    assert lapse.losses["kd/feature"].iloc[-1] < 0.5 * lapse.losses["kd/feature"].iloc[0]
    parts = lapse.losses.drop(columns=["step", "lr", "total"]).sum(axis=1)
    assert torch.allclose(torch.tensor(parts.values), torch.tensor(lapse.losses["total"].values), rtol=1e-4)
    assert lapse.losses["lr"].max() <= 0.003 and lapse.losses["lr"].iloc[-1] < 1e-4


def test_the_sights_are_of_their_own_step(runs: Runs, data: NuScenesDataset) -> None:
    lapse = short(runs, data, beside=False)
    assert lapse.plain == []
    maps = [sight.student.bev for sight in lapse.sights if sight.student is not None]
    assert len(maps) == 3 and not maps[0].equal(maps[1]) and not maps[1].equal(maps[2])
    teachers = [sight.teacher.bev for sight in lapse.sights if sight.teacher is not None]
    assert teachers[0].equal(teachers[2])
    untouched = load_detector(runs["camera"])
    assert maps[0].shape[1] == untouched.channels.bev
    assert sorted(p.name for p in runs["camera"].iterdir()) == ["config.json", "detector.safetensors"]
    assert lapse.cosines == [foreground_cosine(sight) for sight in lapse.sights]
    with pytest.raises(ValueError, match="no gradient"):
        lapse.sights[0].gradient_map("feature")


def test_the_seed_decides_every_number(runs: Runs, data: NuScenesDataset) -> None:
    before = torch.random.get_rng_state()
    one, two, other = short(runs, data), short(runs, data), short(runs, data, seed=1, beside=False)
    assert before.equal(torch.random.get_rng_state())
    assert one.cosines == two.cosines and one.plain == two.plain and one.losses.equals(two.losses)
    assert one.cosines[-1] != other.cosines[-1] and one.cosines[0] == other.cosines[0]


def test_a_student_alone_is_watched_too(runs: Runs, data: NuScenesDataset) -> None:
    lapse = short(runs, data, method=None, steps=2)
    assert lapse.method == "" and lapse.plain == [] and not [n for n in lapse.losses if n.startswith("kd/")]
    assert all(math.isfinite(c) for c in lapse.cosines)


def test_adapters_learn_with_the_student(runs: Runs, data: NuScenesDataset) -> None:
    lapse = short(runs, data, method="distillbev", stage="stages[1]", steps=6, every=6, beside=False)
    first, last = (lapse.losses[[n for n in lapse.losses if n.startswith("kd/")]].iloc[k].sum() for k in (0, -1))
    assert last < first


def alike(context: Context, term: Term) -> TermResult:
    """1 - cosine of teacher and student, mean over all cells."""
    student, teacher = context.pair(term)
    error = 1 - torch.cosine_similarity(student, teacher, dim=1)
    return TermResult.of(error / error.numel(), Cells(), context.grid_of(student))


def test_what_the_method_asks_for_shows_in_the_curve(runs: Runs, data: NuScenesDataset) -> None:
    feature = build_method(DistillConfig("unidistill"), "camera", "lidar").only(["feature"])
    term = replace(feature.active[0], function=alike, weight=50.0, scale=1.0)
    lapse = short(runs, data, method=replace(feature, terms=(term,)), steps=12, every=6)
    assert lapse.cosines[-1] > lapse.cosines[0] + 0.02 and lapse.cosines[-1] > lapse.plain[-1] + 0.02


def test_the_figure_shows_both_curves(runs: Runs, data: NuScenesDataset, draw: Callable[[Figure], Figure]) -> None:
    lapse = short(runs, data, steps=2, every=1)
    figure = draw(lapse.figure())
    titles = [ax.get_title() for ax in figure.axes]
    assert "teacher" in titles and "student after 2 steps" in titles
    curves = next(ax for ax in figure.axes if ax.get_title() == "towards the teacher")
    assert [line.get_label() for line in curves.get_lines()] == ["with unidistill", "the same steps without it"]
    assert list(curves.get_lines()[0].get_ydata()) == lapse.cosines


def test_what_cannot_be_is_said(runs: Runs, data: NuScenesDataset) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        short(runs, data, steps=0)
    with pytest.raises(ValueError, match="names no teacher"):
        short_training(runs["camera"], None, "unidistill", data, data[0], 1, 1)
    with pytest.raises(ValueError, match="stages"):
        short(runs, data, stage="stages[7]", steps=1)
    empty = replace(short(runs, data, steps=1, beside=False).sights[0])
    empty.sample = replace(empty.sample, boxes=empty.sample.boxes[:0])
    assert math.isnan(foreground_cosine(empty))
