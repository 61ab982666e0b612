"""A killed training goes on to the very same weights and log."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture

import kdlab.validation
from kdlab.checkpoint import RunFolder, load_state, replacing, save_state
from kdlab.config import DistillConfig, RunConfig, save_config
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.evaluate import Metrics
from kdlab.loop import Interrupted, StopSignal
from kdlab.losslog import read_losses
from kdlab.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("resume") / "set")


@pytest.fixture(scope="module")
def teacher(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(mini_config(root, epochs=1), tmp_path_factory.mktemp("teacher") / "run", progress=False, cpu=True)


class Killed(Exception):  # noqa: N818
    """Stands for a kill: nothing is written any more."""


def run_with_kills(config: RunConfig, out: Path, steps: list[int]) -> None:
    """Train, dying when each of the steps is reached, and start again after each."""
    for at in steps:

        def die(step: int, row: Mapping[str, float], at: int = at) -> None:
            if step == at:
                raise Killed

        with pytest.raises(Killed):
            train(config, out, progress=False, cpu=True, on_step=die)
    train(config, out, progress=False, cpu=True)


def assert_equal_runs(one: Path, two: Path) -> None:
    for name in ("detector.safetensors", "losses.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize(("minutes", "steps"), [(0.0, [0, 2, 5]), (60.0, [1, 4, 8])])
def test_kills_change_nothing(root: Path, tmp_path: Path, minutes: float, steps: list[int]) -> None:
    config = mini_config(root, epochs=3, ema=0.9)
    whole = train(config, tmp_path / "whole", progress=False, cpu=True)
    other = replace(config, train=replace(config.train, checkpoint_minutes=minutes))
    run_with_kills(other, tmp_path / "killed", steps)
    assert_equal_runs(whole, tmp_path / "killed")


@pytest.mark.parametrize("variant", ["intended", "released"])
def test_kills_change_nothing_in_a_distillation(root: Path, teacher: Path, tmp_path: Path, variant: str) -> None:
    config = mini_config(root, "camera")
    config = replace(config, distill=DistillConfig("unidistill", str(teacher), variant))  # type: ignore[arg-type]
    whole = train(config, tmp_path / "whole", progress=False, cpu=True)
    run_with_kills(replace(config, train=replace(config.train, checkpoint_minutes=0.0)), tmp_path / "killed", [1, 4])
    assert_equal_runs(whole, tmp_path / "killed")
    header = (whole / "losses.csv").read_text().splitlines()[0].split(",")
    assert "kd/feature" in header and "depth" in header


def test_a_kill_during_the_validation_is_made_up_for(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = mini_config(root, epochs=2, evaluate_every=1), RunFolder(tmp_path / "run")
    scored: list[str] = []
    real = kdlab.validation.store_metrics

    def die(*_: object) -> None:
        raise Killed

    def note(path: Path, key: str, metrics: Metrics) -> None:
        scored.append(key)
        real(path, key, metrics)

    for _ in range(2):
        monkeypatch.setattr(kdlab.validation, "store_metrics", die)
        with pytest.raises(Killed):
            train(config, folder.path, progress=False, cpu=True)
        assert not folder.validation.exists() and len(read_losses(folder.losses)) == 3
    monkeypatch.setattr(kdlab.validation, "store_metrics", note)

    def stop(step: int, row: Mapping[str, float]) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(config, folder.path, progress=False, cpu=True, on_step=stop)
    train(config, folder.path, progress=False, cpu=True)  # from the same border: the first epoch's is there already
    assert scored == ["1", "2"] and list(json.loads(folder.validation.read_text())) == ["1", "2"]
    monkeypatch.undo()
    whole = train(config, tmp_path / "whole", progress=False, cpu=True)
    assert_equal_runs(whole, folder.path)
    assert folder.validation.read_bytes() == RunFolder(whole).validation.read_bytes()


def test_going_on_with_other_data_is_refused(root: Path, tmp_path: Path) -> None:
    data = shutil.copytree(root, tmp_path / "set")
    config, out = mini_config(data), tmp_path / "run"

    def die(step: int, row: Mapping[str, float]) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        train(config, out, progress=False, cpu=True, on_step=die)
    made = json.loads((out / "versions.json").read_text())
    assert made["data"] == NuScenesDataset(data).digest
    (data / "v1.0-tiny" / "generator.json").write_text('{"seed": 2}')
    with pytest.raises(
        ValueError, match=rf"begun with a data set of digest {made['data'][:12]}, which is \w+ now; give"
    ):
        train(config, out, progress=False, cpu=True)
    (data / "v1.0-tiny" / "generator.json").unlink()
    train(config, out, progress=False, cpu=True)


def test_the_number_of_workers_changes_nothing(root: Path, tmp_path: Path) -> None:
    config = mini_config(root, epochs=1)
    one = train(config, tmp_path / "one", progress=False, cpu=True)
    two = train(replace(config, data=replace(config.data, workers=1)), tmp_path / "two", progress=False, cpu=True)
    assert_equal_runs(one, two)


def test_the_callers_random_numbers_are_left_alone(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(mini_config(root, epochs=1), tmp_path / "run", progress=False, cpu=True)
    assert torch.equal(torch.rand(3), expected)


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(root: Path, tmp_path: Path) -> None:
    config, out = mini_config(root), tmp_path / "run"

    def interrupt(step: int, row: Mapping[str, float]) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"stopped after step [23] of 6; the same command goes on"):
        train(config, out, progress=False, cpu=True, on_step=interrupt)
    state = load_state(RunFolder(out))
    assert state is not None and state["step"] in (2, 3)
    train(config, out, progress=False, cpu=True)
    assert_equal_runs(train(config, tmp_path / "whole", progress=False, cpu=True), out)
    assert not (out / "checkpoint").exists()


def test_a_second_ctrl_c_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_write_that_dies_leaves_the_old_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save_state(folder, {"step": 1})
    with pytest.raises(RuntimeError), replacing(folder.checkpoint) as part:
        part.write_bytes(b"half")
        raise RuntimeError
    assert load_state(folder) == {"step": 1}
    assert [p.name for p in folder.checkpoint.parent.iterdir()] == ["state.pt"]


def test_a_damaged_checkpoint_is_named(root: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save_state(folder, {"step": 1})
    folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state\.pt cannot be read"):
        load_state(folder)


RUN = """
import sys, torch
from pathlib import Path
from kdlab.config import RunConfig, load_config
from kdlab.train import train
torch.set_num_threads(1)
train(load_config(RunConfig, Path(sys.argv[1])), Path(sys.argv[2]), progress=False, cpu=True)
"""


def start(config: Path, out: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", RUN, str(config), str(out)], start_new_session=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_at_random_moments(root: Path, teacher: Path, tmp_path: Path, seed: int) -> None:
    config = mini_config(root, "camera", epochs=12, ema=0.9)
    config = replace(config, distill=DistillConfig("unidistill", str(teacher)), data=replace(config.data, workers=1))
    save_config(config, tmp_path / "calm.json")
    # A checkpoint after every step: most kills then fall into a write.
    save_config(replace(config, train=replace(config.train, checkpoint_minutes=0.0)), tmp_path / "config.json")
    assert start(tmp_path / "calm.json", tmp_path / "whole").wait(300) == 0
    dice, out = random.Random(seed), tmp_path / "killed"
    reached = []
    for fraction in sorted(dice.uniform(0.05, 0.7) for _ in range(2)):
        process = start(tmp_path / "config.json", out)
        lines = 0
        while process.poll() is None and lines < fraction * 36:
            time.sleep(0.002)
            lines = (out / "losses.csv").read_bytes().count(b"\n") if (out / "losses.csv").exists() else 0
        time.sleep(dice.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        state = load_state(RunFolder(out))
        assert state is not None
        reached.append(state["step"])
    assert 0 < reached[0] <= reached[1] < 36
    assert start(tmp_path / "config.json", out).wait(300) == 0
    assert_equal_runs(tmp_path / "whole", out)
    steps = [line.split(",")[1] for line in (out / "losses.csv").read_text().splitlines()[1:]]
    assert steps == [str(i) for i in range(36)]
    assert not list(out.rglob(".*.part"))
    shutil.rmtree(out)
