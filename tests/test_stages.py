import json
from dataclasses import replace

import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401

from kdlab.checkpoint import RunFolder, load_detector
from kdlab.config import BEVConfig, DistillConfig, RunConfig
from kdlab.cost import read_cost
from kdlab.distill.labeldistill import ENCODER
from kdlab.evaluate import load_metrics
from kdlab.losslog import read_losses
from kdlab.optim import WARM_UP, stepped_rate
from kdlab.presets import PRESETS
from kdlab.stages import setting_of
from kdlab.train import Interrupted, train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def teacher(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    return train(mini_config(root, epochs=1), out, progress=False, cpu=True)


def distilled(root, teacher, **changes) -> RunConfig:
    distill = DistillConfig("labeldistill", str(teacher), stage_epochs=2, scale=0.01)
    return replace(mini_config(root, "camera", epochs=1), distill=replace(distill, **changes))


def weights(run):
    return load_detector(run).state_dict()


def test_one_command_trains_encoder_and_student_and_goes_on(root, teacher, tmp_path, capsys, monkeypatch):
    config = distilled(root, teacher)
    whole = train(config, tmp_path / "whole", cpu=True)
    printed = capsys.readouterr().out
    assert "label_encoder: with the annotations given, mAP" in printed and "tiny_val" in printed
    assert printed.index("label_encoder: with") < printed.index("whole")
    stage = RunFolder(whole / "stages" / "label_encoder")
    assert len(read_losses(stage.losses)) == 6 and load_metrics(stage.path)["tiny_val"].samples > 0
    assert {n for n in read_losses(whole / "losses.csv")[0] if n.startswith("kd/")} == {
        f"kd/{n}" for n in ("label_0", "label_1", "lidar_0", "lidar_1", "response_heatmap", "response_box")
    }
    assert read_cost(whole).train_steps == 9 and read_cost(whole).teacher_parameters > 0

    from kdlab.loop import Loop

    steps, step = [], Loop._after_step

    def stopped(self) -> None:
        steps.append(self.title)
        self._stop.requested = self._stop.requested or len(steps) in (2, 8)
        step(self)

    monkeypatch.setattr(Loop, "_after_step", stopped)
    for _ in range(2):  # in the encoder's training, then in the student's
        with pytest.raises(Interrupted):
            train(config, tmp_path / "cut", cpu=True, progress=False)
    cut = train(config, tmp_path / "cut", cpu=True)
    assert steps == ["label_encoder"] * 6 + ["cut"] * 3
    assert "label_encoder: with the annotations given, mAP" in capsys.readouterr().out
    expected = weights(whole)
    assert all(torch.equal(v, expected[n]) for n, v in weights(cut).items())


def test_a_stage_has_its_own_schedule():
    paper = setting_of(ENCODER, PRESETS["paper-labeldistill"]("camera").train)
    assert (paper.epochs, paper.lr, paper.milestones) == (12, 1e-3, (10, 11))
    rates = [stepped_rate(step, 120, paper) for step in (0, 99, 100, 109, 110, 119)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    own = replace(PRESETS["tiny"]("camera").train, warm_up=0.5)
    assert setting_of(ENCODER, own).schedule == "one-cycle" and setting_of(ENCODER, own).warm_up == WARM_UP
    assert setting_of(ENCODER, own, 6).milestones == (5, 5) and setting_of(ENCODER, own, 6).epochs == 6


def test_no_stage_without_its_terms(root, teacher, tmp_path):
    config = distilled(root, teacher, weights={"label_0": 0.0, "label_1": 0.0})
    run = train(config, tmp_path / "run", cpu=True, progress=False)
    assert not (run / "stages").exists()


def test_an_impossible_pair_fails_before_the_stage(root, tmp_path):
    config = mini_config(root, epochs=1)
    flat = replace(config, detector=replace(config.detector, bev=BEVConfig(8, (16,), (1,), 16)))
    teacher = train(flat, tmp_path / "teacher", progress=False, cpu=True)
    with pytest.raises(ValueError, match=r"term lidar_1: teacher.stages\[1\] is missing, the teacher has"):
        train(distilled(root, teacher), tmp_path / "run", progress=False, cpu=True)
    assert not (tmp_path / "run" / "stages").exists()


def test_a_gate_that_cannot_be_measured_stops_nothing(root, teacher, tmp_path, capsys):
    config = distilled(root, teacher, variant="released", stage_epochs=1)
    config = replace(config, data=replace(config.data, val="nowhere"))
    run = train(config, tmp_path / "run", cpu=True)
    assert "gate not measured on nowhere" in capsys.readouterr().out
    assert RunFolder(run).finished and not (run / "stages" / "label_encoder" / "metrics.json").exists()


def test_a_low_gate_warns(root, teacher, tmp_path, capsys):
    train(distilled(root, teacher, stage_epochs=1), tmp_path / "run", cpu=True)
    assert "WARNING: below 0.5" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "stages" / "label_encoder" / "metrics.json").read_text())
    assert set(stored) == {"tiny_val"}
