"""Training: run folder, errors, precision, sensors, several processes."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture

import kdlab
from kdlab.checkpoint import RunFolder, command
from kdlab.config import DistillConfig, RunConfig, load_config, save_config
from kdlab.cost import read_cost
from kdlab.gradients import read_gradients
from kdlab.losslog import read_losses
from kdlab.models import Detector
from kdlab.optim import MovingAverage, adamw, learning_rate
from kdlab.precision import resolve
from kdlab.train import Training, train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("train") / "set")


@pytest.fixture(scope="module")
def teacher(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(mini_config(root, epochs=1), tmp_path_factory.mktemp("teacher") / "run", progress=False, cpu=True)


def quiet(config: RunConfig, out: Path, **options: Any) -> Path:
    return train(config, out, progress=False, cpu=True, **options)


def test_run_folder(root: Path, tmp_path: Path) -> None:
    config = mini_config(root)
    run = quiet(config, tmp_path / "run")
    assert load_config(RunConfig, run / "config.json") == config
    made = json.loads((run / "versions.json").read_text())
    assert {"torch", "kdlab", "python", "device", "precision", "command"} <= made.keys()
    rows = list(csv.DictReader((run / "losses.csv").open()))
    assert [int(r["step"]) for r in rows] == list(range(6)) and [int(r["epoch"]) for r in rows] == [0, 0, 0, 1, 1, 1]
    assert list(rows[0]) == ["epoch", "step", "lr", "grad_norm", "total", "heatmap", "box"]
    for row in rows:
        assert float(row["total"]) == pytest.approx(float(row["heatmap"]) + float(row["box"]), rel=1e-6)
    assert list((run / "tensorboard").glob("events*")) and not (run / "checkpoint").exists()
    assert (run / "cost.json").exists()
    detector = kdlab.load_detector(run)
    assert not detector.training and detector.config == config.detector


def test_learns(root: Path, tmp_path: Path) -> None:
    run = quiet(mini_config(root, epochs=30, lr=5e-3), tmp_path / "run")
    losses = [row["total"] for row in read_losses(run / "losses.csv")]
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


def test_a_finished_run_is_not_done_again(root: Path, tmp_path: Path) -> None:
    run = quiet(mini_config(root, epochs=1), tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in run.iterdir()}
    quiet(mini_config(root, epochs=1), run)
    assert {p: p.stat().st_mtime_ns for p in run.iterdir()} == before
    quiet(mini_config(root, epochs=1), run, resume=False)
    assert (run / "detector.safetensors").stat().st_mtime_ns > before[run / "detector.safetensors"]


def test_the_command_that_began_a_run_is_kept(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def words(*given: str) -> str:
        monkeypatch.setattr(sys, "argv", list(given))
        return command()

    assert words("env/bin/kdlab", "train", "--out", "a run") == "kdlab train --out 'a run'"
    assert words("packages/kdlab/__main__.py", "train") == "python -m kdlab train"

    def stop(step: int, row: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(mini_config(root, epochs=1), tmp_path / "run", on_step=stop)
    words("kdlab", "train", "again")
    run = quiet(mini_config(root, epochs=1), tmp_path / "run")
    assert json.loads((run / "versions.json").read_text())["command"] == "python -m kdlab train"
    monkeypatch.setattr("kdlab.checkpoint.in_notebook", lambda: True)
    assert command() == "notebook"


def test_another_config_in_the_folder_is_refused(root: Path, tmp_path: Path) -> None:
    run = quiet(mini_config(root, epochs=1), tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"run holds a run of another config: train\.lr is 0\.002 there and 0\.5 now; give another"
    ):
        quiet(mini_config(root, epochs=1, lr=0.5), run)
    quiet(mini_config(root, epochs=1, checkpoint_minutes=5.0), run)  # changes no number
    quiet(mini_config(root, epochs=2), run, resume=False)
    assert load_config(RunConfig, run / "config.json").train.epochs == 2


def test_a_loss_that_is_not_finite_names_itself(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def broken(self: Detector, features: Any, batch: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        losses = real(self, features, batch)
        return {**losses, "box": losses["box"] * float("nan")} if calls == 5 else losses

    real = Detector.loss
    monkeypatch.setattr(Detector, "loss", broken)
    with pytest.raises(RuntimeError, match=r"loss 'box' is nan at step 4; the checkpoint of step 3 in .* is kept"):
        quiet(mini_config(root), tmp_path / "run")
    monkeypatch.undo()
    assert len(read_losses(quiet(mini_config(root), tmp_path / "run") / "losses.csv")) == 6


@pytest.mark.parametrize(
    ("modality", "expected"),
    [("lidar", (False, True, False)), ("camera", (True, True, True)), ("fusion", (True, True, True))],
)
def test_only_needed_sensors_are_loaded(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modality: Any, expected: tuple[bool, ...]
) -> None:
    seen = []

    def look(self: Training, batch: Any) -> dict[str, torch.Tensor]:
        seen.append((batch.images.numel() > 0, len(batch.points) > 0, batch.depth is not None))
        return real(self, batch)

    real = Training.forward
    monkeypatch.setattr(Training, "forward", look)
    quiet(mini_config(root, modality, epochs=1), tmp_path / "run")
    assert set(seen) == {expected}


def test_without_depth_supervision_a_camera_student_needs_no_lidar(root: Path, tmp_path: Path) -> None:
    config = mini_config(root, "camera", epochs=1)
    camera = replace(config.detector.camera, depth_supervision=False)
    config = replace(config, detector=replace(config.detector, camera=camera))
    without = tmp_path / "set"
    os.symlink(root, without)
    run = quiet(replace(config, data=replace(config.data, root=str(without))), tmp_path / "run")
    assert "depth" not in read_losses(run / "losses.csv")[0]


def test_distilled_student_stands_alone(root: Path, teacher: Path, tmp_path: Path) -> None:
    config = replace(mini_config(root, "camera", epochs=1), distill=DistillConfig("unidistill", str(teacher)))
    run = quiet(config, tmp_path / "run")
    teacher.rename(teacher.with_name("away"))
    try:
        kdlab.load_detector(run)
    finally:
        teacher.with_name("away").rename(teacher)
    assert json.loads((run / "versions.json").read_text())["teacher"]


def test_errors_about_the_teacher(root: Path, teacher: Path, tmp_path: Path) -> None:
    config = mini_config(root, "camera", epochs=1)
    for distill, problem, kind in (
        (
            DistillConfig("unidistill", str(tmp_path / "none")),
            "no teacher: .*none: no such run folder",
            FileNotFoundError,
        ),
        (DistillConfig("unidistill", ""), "unidistill needs a teacher: give its run folder with --teacher", ValueError),
        (DistillConfig("nonsense", str(teacher)), "unknown method 'nonsense'; known: .*unidistill", ValueError),
        (DistillConfig("unidistill", str(teacher), weights={"x": 1.0}), "unknown term 'x'", ValueError),
    ):
        with pytest.raises(kind, match=problem):
            quiet(replace(config, distill=distill), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fusion = replace(config.detector, modality="fusion", lidar=replace(config.detector.lidar, sweeps=1))
    with pytest.raises(ValueError, match=r"must agree on detector\.lidar\.sweeps"):
        quiet(replace(config, detector=fusion, distill=DistillConfig("unidistill", str(teacher))), tmp_path / "run")


@pytest.fixture(scope="module")
def start(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = mini_config(root, "camera", epochs=1, seed=5)
    return train(config, tmp_path_factory.mktemp("start") / "run", progress=False, cpu=True)


def stopped(config: RunConfig, out: Path, at: int) -> None:
    def stop(step: int, row: Any) -> None:
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(replace(config, train=replace(config.train, checkpoint_minutes=0.0)), out, on_step=stop)


def test_a_camera_branch_starts_from_another_run(root: Path, start: Path, tmp_path: Path) -> None:
    config = mini_config(root, "camera", epochs=1, lr=1e-9, weight_decay=0.0, camera_start=str(start))
    camera = replace(config.detector.camera, simulated_lidar=True)  # which the start has not
    run = quiet(replace(config, detector=replace(config.detector, camera=camera)), tmp_path / "run")
    ours, theirs = (dict(kdlab.load_detector(path).named_parameters()) for path in (run, start))
    for name, value in theirs.items():
        if name.startswith("camera."):
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-7)
    assert not torch.equal(ours["head.shared.0.weight"], theirs["head.shared.0.weight"])
    assert json.loads((run / "versions.json").read_text())["camera_start"] == RunFolder(start).digest


def test_past_frames_are_mixed_anew_where_the_start_has_none(root: Path, start: Path, tmp_path: Path) -> None:
    config = mini_config(root, "camera", epochs=1, lr=1e-9, weight_decay=0.0, camera_start=str(start))
    detector = replace(config.detector, camera=replace(config.detector.camera, frames=2))
    run = quiet(replace(config, detector=detector), tmp_path / "run")
    ours, theirs = (dict(kdlab.load_detector(path).named_parameters()) for path in (run, start))
    torch.testing.assert_close(
        ours["camera.depth_net.depth.weight"], theirs["camera.depth_net.depth.weight"], rtol=0, atol=1e-7
    )
    assert ours["camera.temporal.0.weight"].shape != theirs["camera.temporal.0.weight"].shape


def test_a_run_goes_on_without_its_camera_start(root: Path, start: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(start, tmp_path / "start"))
    config = mini_config(root, "camera", epochs=1, camera_start=str(source))
    whole = quiet(config, tmp_path / "whole")
    stopped(config, tmp_path / "early", at=0)  # nothing is stored yet
    stopped(config, tmp_path / "run", at=1)
    shutil.copy(whole / "detector.safetensors", source)
    with pytest.raises(ValueError, match=r"early was begun with a camera start of digest \w{12}, which is"):
        quiet(config, tmp_path / "early")
    shutil.rmtree(source)
    with pytest.raises(FileNotFoundError, match=r"train\.camera_start: .*start: no such run folder"):
        quiet(config, tmp_path / "early")
    run = quiet(config, tmp_path / "run")
    for name in ("detector.safetensors", "losses.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((run / "versions.json").read_text())["camera_start"] == RunFolder(start).digest


def test_errors_about_the_camera_start(root: Path, teacher: Path, start: Path, tmp_path: Path) -> None:
    config = mini_config(root, "camera", epochs=1)
    finished = quiet(config, tmp_path / "finished")
    wide = replace(config.detector, camera=replace(config.detector.camera, channels=16))
    open_run = Path(shutil.copytree(start, tmp_path / "open"))
    (open_run / "detector.safetensors").unlink()
    for given, detector, problem in (
        ("none", config.detector, r"train\.camera_start: none: no such run folder"),
        (str(open_run), config.detector, r"train\.camera_start: the run .*open is not finished"),
        (str(teacher), config.detector, r"train\.camera_start: .* has no cameras"),
        (str(start), replace(config.detector, modality="lidar"), "the trained detector has no cameras"),
        (str(start), wide, r"camera\..* is \(8, .* in .* and \(16, .* in the detector"),
    ):
        wrong = replace(config, detector=detector, train=replace(config.train, camera_start=given))
        for out, resume in ((tmp_path / "run", True), (finished, False)):
            with pytest.raises((FileNotFoundError, ValueError), match=problem):
                quiet(wrong, out, resume=resume)
    assert not (tmp_path / "run").exists() and RunFolder(finished).finished


def test_a_training_reaches_its_milestones(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"after epoch 2, but train\.epochs is 2; give earlier --train\.milestones"):
        quiet(mini_config(root, schedule="steps", milestones=(1, 2)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_while_training(root: Path, tmp_path: Path) -> None:
    run = quiet(mini_config(root, epochs=3, evaluate_every=2), tmp_path / "run")
    validation = json.loads((run / "validation.json").read_text())
    assert list(validation) == ["2", "3"] and validation["3"]["split"] == "tiny_val"
    plain = quiet(mini_config(root, epochs=3), tmp_path / "plain")
    assert (run / "detector.safetensors").read_bytes() == (plain / "detector.safetensors").read_bytes()


@pytest.mark.parametrize("modality", ["lidar", "camera", "fusion"])
def test_bf16_stays_close_to_fp32(root: Path, tmp_path: Path, modality: Any) -> None:
    first = [
        read_losses(quiet(mini_config(root, modality, epochs=1, precision=p), tmp_path / p) / "losses.csv")[0]["total"]
        for p in ("fp32", "bf16")
    ]
    assert first[1] == pytest.approx(first[0], rel=0.02)


@pytest.mark.parametrize(("fast", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision(fast: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdlab.precision.bf16_is_fast", lambda device: fast)
    cpu = torch.device("cpu")
    assert [resolve(p, cpu) for p in ("auto", "fp32", "bf16")] == [expected, "fp32", "bf16"]


def test_schedule() -> None:
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[30] == 1.0 and rates[-1] == pytest.approx(1e-3)
    assert all(a < b for a, b in pairwise(rates[:31]))
    assert all(a > b for a, b in pairwise(rates[30:]))
    assert all(learning_rate(step, n, 1.0) > 0 for n in (1, 2, 3) for step in range(n))


def test_moving_average_and_decay_groups() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    average = MovingAverage(module, 0.5)
    before = [p.clone() for p in average.module.parameters()]
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    average.update(module, 1000)
    for old, new in zip(before, average.module.parameters(), strict=True):
        assert torch.allclose(new, old + 0.5)
    groups = adamw(module, mini_config(Path()).train).param_groups
    assert [len(g["params"]) for g in groups] == [1, 3] and groups[1]["weight_decay"] == 0


RUN = """
import sys, torch
from pathlib import Path
from kdlab.config import RunConfig, load_config
from kdlab.train import train
torch.set_num_threads(1)
train(load_config(RunConfig, Path(sys.argv[1])), Path(sys.argv[2]), progress=False, cpu=True)
"""


def run_on_two(config: RunConfig, out: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    save_config(config, out.with_suffix(".json"))
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(out.with_suffix(".json")), str(out)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [r.wait(240) for r in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modality", "variant"), [("lidar", "intended"), ("camera", "intended"), ("camera", "released")]
)
def test_two_processes_are_one(root: Path, teacher: Path, tmp_path: Path, modality: Any, variant: Any) -> None:
    config = mini_config(root, modality, batch_size=6, epochs=3, lr=1e-4, gradients_every=2)
    if modality == "camera":
        config = replace(config, distill=DistillConfig("unidistill", str(teacher), variant))
    run_on_two(config, tmp_path / "two")
    quiet(config, tmp_path / "one")
    one, two = (read_losses(tmp_path / name / "losses.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for name in one[0]:
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3 if name == "grad_norm" else 3e-4, abs=1e-6), name
        if (
            name != "grad_norm"
        ):  # AdamW's first steps follow signs: what is almost zero may differ, the more the larger lr
            assert two[2][name] == pytest.approx(one[2][name], rel=1e-2, abs=1e-6), name
    assert json.loads((tmp_path / "two" / "versions.json").read_text())["processes"] == "2"
    first, second = (read_gradients(tmp_path / name) for name in ("one", "two"))
    assert first.step.unique().tolist() == [0, 2]
    pd.testing.assert_frame_equal(first[first.step == 0], second[second.step == 0], rtol=1e-2, atol=2e-3)
    costs = [read_cost(tmp_path / name) for name in ("one", "two")]
    assert costs[0] is not None and costs[1] is not None
    assert costs[0].train_parameters == costs[1].train_parameters and costs[1].train_steps == 3
