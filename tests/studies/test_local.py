"""Studies on one machine: what runs, what does not, and what is left after kills. Most with a stub for the commands."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture

from kdlab.checkpoint import RunFolder, open_run
from kdlab.config import RunConfig, load_config
from kdlab.data.simulate_config import SimulationConfig
from kdlab.loop import Interrupted
from kdlab.losslog import read_losses
from kdlab.studies import Change, LocalEngine, Study, Trial, expand, job, load_study, local, run, run_study
from kdlab.studies.measured import load_measured
from kdlab.studies.plan import unique
from kdlab.studies.results import pending
from kdlab.studies.status import state
from kdlab.train import train

FAILS = Change("bad", {"train.weight_decay": 13.0})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("local") / "set")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Call it with the seconds of a stub's step."""
    monkeypatch.setattr(job, "COMMAND", (sys.executable, str(Path(__file__).with_name("stub_run.py"))))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return lambda seconds: monkeypatch.setenv("STUB_SECONDS", str(seconds))


def study(root: Path, out: Path, *changes: Change, seeds: tuple[int, ...] = (0, 1), **values: object) -> Study:
    return Study("mini", mini_config(root, **values), changes, seeds, "tiny_val", out, cpu=True)


def calls(trial: Trial) -> list[str]:
    path = trial.folder / "calls.txt"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def states(of: Study) -> list[str]:
    return [state(trial)[0] for trial in unique(expand(of))]


def wait(until: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


@pytest.fixture
def background() -> Iterator[Callable[..., Any]]:
    """Runs a study in a process of its own."""
    started: list[Any] = []

    def start(of: Study, jobs: int = 1) -> Any:
        target = lambda: run_study(of, LocalEngine(jobs), progress=False)  # noqa: E731
        started.append(multiprocessing.get_context("fork").Process(target=target))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


WHOLE = ["train", "end", "evaluate", "end"]


@pytest.mark.usefixtures("stub")
def test_a_study_runs_and_does_not_run_again(root: Path, tmp_path: Path) -> None:
    small = study(root, tmp_path / "s", Change("lr", {"train.lr": 1.0}), Change("same", {}), seeds=(0,))
    assert states(small) == ["missing"] * 2
    (tmp_path / "study.toml").write_text("# mine")
    outcome = run_study(small, progress=False, source=tmp_path / "study.toml")
    assert (outcome.finished, outcome.failed) == (2, ()) and states(small) == ["finished"] * 2
    runs = unique(expand(small))
    assert [calls(trial) for trial in runs] == [WHOLE] * 2
    for trial in runs:
        assert load_config(RunConfig, trial.folder / "config.json") == trial.config
        about = json.loads((trial.folder / "trial.json").read_text())
        assert about["change"] == trial.change and tuple(about["command"]) == trial.command
        log = (trial.folder / "log.txt").read_text()
        assert " ".join(trial.command) in log and " ".join(trial.evaluation) in log
    plan = json.loads((small.out / "study.json").read_text())
    assert [t["folder"] for t in plan["trials"]] == [str(t.folder.relative_to(small.out)) for t in expand(small)]
    assert (small.out / "study.toml").read_text() == "# mine" and load_study(small.out) == small
    before = {path: path.stat().st_mtime_ns for trial in runs for path in trial.folder.iterdir()}
    assert run_study(small, progress=False).finished == 2
    more = replace(small, changes=(*small.changes, Change("wd", {"train.weight_decay": 0.5})), seeds=(0, 1))
    assert run_study(more, progress=False).finished == 6
    assert before == {path: path.stat().st_mtime_ns for path in before}
    other = replace(small, split="all")
    assert states(other) == ["trained"] * 2
    run_study(other, progress=False)
    assert [calls(trial) for trial in runs] == [[*WHOLE, "evaluate", "end"]] * 2


@pytest.mark.usefixtures("stub")
def test_a_failing_run_does_not_stop_the_others(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = study(root, tmp_path / "s", FAILS, Change("lr", {"train.lr": 1.0}), seeds=(0,))
    outcome = run_study(mixed)
    assert outcome.finished == 2 and [(t.change, why) for t, why in outcome.failed] == [("bad", "13 brings bad luck")]
    assert "bad seed 0: FAILED after" in capsys.readouterr().out
    bad = expand(mixed)[1]
    assert state(bad) == ("failed", "13 brings bad luck")
    lines = (bad.folder / "error.txt").read_text().splitlines()
    assert (
        lines[1] == "exit code 1" and "kdlab: error: 13 brings bad luck" in lines and lines[-1] == "13 brings bad luck"
    )
    assert len(run_study(mixed, progress=False).failed) == 1
    assert calls(bad) == ["train"] * 2 and [calls(t) for t in expand(mixed)[::2]] == [WHOLE] * 2


def test_a_killed_run_is_named_and_goes_on_with_the_next_call(
    root: Path, tmp_path: Path, stub: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(0.05)
    lone = study(root, tmp_path / "s", seeds=(0,), epochs=5)
    (trial,) = expand(lone)

    class Killing(LocalEngine):
        def ended(self) -> Iterator[tuple[Trial, int, str]]:
            if len(read_losses(trial.folder / "losses.csv")) >= 4:
                self._running[trial.folder][1].kill()
            yield from super().ended()

    ((_, why),) = run_study(lone, Killing(), progress=False).failed
    assert why == "killed by SIGKILL; the machine may have run out of memory"
    at = int((trial.folder / "checkpoint.txt").read_text())
    assert 3 <= at < 15 and state(trial) == ("failed", why)
    assert run_study(lone, progress=False).finished == 1
    assert [r["step"] for r in read_losses(trial.folder / "losses.csv")][-1] == 14 and calls(trial) == ["train", *WHOLE]
    assert not (trial.folder / "error.txt").exists()


def test_a_study_that_is_killed_leaves_no_process_and_goes_on(
    root: Path, tmp_path: Path, stub: Callable[[float], None], background: Callable[..., Any]
) -> None:
    stub(0.05)
    long = study(root, tmp_path / "s", Change("lr", {"train.lr": 1.0}), seeds=(0,), epochs=20)
    first, second = expand(long)
    process = background(long)
    wait(lambda: len(read_losses(first.folder / "losses.csv")) >= 3)
    with pytest.raises(BlockingIOError, match=rf"is run by process {process.pid} on {socket.gethostname()}; wait"):
        run_study(long, progress=False)
    child = psutil.Process(int((first.folder / "calls.txt").read_text().split()[1]))
    process.kill()
    process.join()
    wait(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert calls(first) == ["train", "stopped"] and states(long) == ["unfinished", "missing"]
    at = int((first.folder / "checkpoint.txt").read_text())
    assert 3 <= at < 60
    stub(0)
    assert run_study(long, progress=False).finished == 2
    assert [r["step"] for r in read_losses(first.folder / "losses.csv")] == list(range(60))
    assert calls(first) == ["train", "stopped", *WHOLE] and calls(second) == WHOLE


def test_the_next_attempt_waits_for_a_process_that_is_still_ending(
    root: Path, tmp_path: Path, stub: Callable[[float], None], background: Callable[..., Any]
) -> None:
    stub(1.5)  # the step at hand ends long after the study's death
    long = study(root, tmp_path / "s", seeds=(0,), epochs=1)
    (trial,) = expand(long)
    process = background(long)
    wait(lambda: read_losses(trial.folder / "losses.csv"))
    process.kill()
    process.join()
    stub(0)
    assert run_study(long, progress=False).finished == 1
    assert calls(trial) == ["train", "stopped", *WHOLE]
    assert [r["step"] for r in read_losses(trial.folder / "losses.csv")] == [0, 1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_after_their_checkpoints(
    root: Path, tmp_path: Path, stub: Callable[[float], None], number: int
) -> None:
    stub(0.05)
    two = study(root, tmp_path / "s", epochs=20)

    class Signalling(LocalEngine):
        sent = False

        def ended(self) -> Iterator[tuple[Trial, int, str]]:
            begun = [f for f in self._running if len(read_losses(f / "losses.csv")) >= 2]
            if len(begun) == 2 and not self.sent:
                self.sent = True
                os.kill(os.getpid(), number)
            yield from super().ended()

    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "measured.json").write_text('{"memory": 1, "memory_known": true}')
    with pytest.raises(Interrupted, match=r"stopped with 0 of 2 runs done; the same command goes on from there"):
        run_study(two, Signalling(2), progress=False)
    assert [calls(trial) for trial in expand(two)] == [["train", "stopped"]] * 2
    assert states(two) == ["unfinished"] * 2
    stub(0)
    assert run_study(two, progress=False).finished == 2


def overlap(trials: tuple[Trial, ...]) -> int:
    """Most runs at a time."""
    events = []
    for trial in trials:
        times = [float(line.split()[2]) for line in (trial.folder / "calls.txt").read_text().splitlines()]
        events += [(times[0], 1), (times[-1], -1)]
    now, most = 0, 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize(("available", "expected"), [(1 << 40, 2), (1 << 20, 1)])
def test_jobs_run_side_by_side_where_memory_allows(
    root: Path,
    tmp_path: Path,
    stub: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    available: int,
    expected: int,
) -> None:
    stub(0.15)
    four = study(root, tmp_path / "s", Change("lr", {"train.lr": 1.0}))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    assert run_study(four, LocalEngine(2), progress=False).finished == 4
    runs = unique(expand(four))
    assert overlap(runs) == expected
    assert overlap(runs[:1] + runs[2:3]) == 1  # the first ran alone: what a run needs was not known yet
    assert load_measured(four.out).memory > 5e6
    threads = {line.split()[3] for t in runs for line in (t.folder / "calls.txt").read_text().splitlines()}
    assert threads == {str(max((os.cpu_count() or 1) // 2, 1))}


def test_a_resumed_run_goes_alone_until_its_memory_is_known(
    root: Path, tmp_path: Path, stub: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(0.02)
    two = study(root, tmp_path / "s", epochs=40)
    first, second = expand(two)
    first.folder.mkdir(parents=True)
    old = "".join(f"{step // 3},{step},0.1,1.0,1.0\n" for step in range(60))
    (first.folder / "losses.csv").write_text("epoch,step,lr,grad_norm,total\n" + old)
    (first.folder / "checkpoint.txt").write_text("60")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 40))
    at: list[int] = []

    class Noting(LocalEngine):
        def start(self, trial: Trial) -> None:
            at.append(len(read_losses(first.folder / "losses.csv")))
            super().start(trial)

    assert run_study(two, Noting(2), progress=False).finished == 2
    assert at[0] == 60 and 60 + local.WARM_STEPS <= at[1] < 120 and calls(second) == WHOLE
    assert load_measured(two.out).memory_known


@pytest.mark.usefixtures("stub")
def test_runs_of_another_teacher_are_named_and_left(root: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    open_run(RunFolder(teacher), mini_config(root))
    (teacher / "detector.safetensors").write_text("weights")
    kd = Change("kd", {"distill.method": "unidistill", "distill.teacher": str(teacher)})
    camera = replace(study(root, tmp_path / "s", kd, seeds=(0,)), base=mini_config(root, "camera"))
    assert run_study(camera, progress=False).finished == 2
    trial = expand(camera)[1]
    digest = hashlib.sha256(b"weights").hexdigest()[:12]
    (trial.folder / "versions.json").write_text(json.dumps({"teacher": digest}))
    assert state(trial) == ("finished", "")
    (teacher / "detector.safetensors").write_text("other weights")
    why = f"the teacher {teacher} has changed since; remove {trial.folder} to train it again"
    assert state(trial) == ("stale", why)
    outcome = run_study(camera, progress=False)
    assert outcome.finished == 1 and [reason for _, reason in outcome.failed] == [why] and calls(trial) == WHOLE
    assert pending(camera)[["change", "state", "why"]].values.tolist() == [["kd", "stale", why]]


def test_several_gpus_are_dealt_out(
    root: Path, tmp_path: Path, stub: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(0.15)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 40))
    two = replace(study(root, tmp_path / "s"), cpu=False)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "measured.json").write_text('{"memory": 1, "memory_known": true}')
    run_study(two, LocalEngine(2), progress=False)
    assert [(t.folder / "calls.txt").read_text().split()[4] for t in expand(two)] == ["3", "5"]


@pytest.mark.usefixtures("stub")
def test_nothing_starts_where_something_is_missing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tmp_path / "teacher"
    open_run(RunFolder(teacher), mini_config(root))
    (teacher / "detector.safetensors").write_text("weights")
    camera = replace(study(root, tmp_path / "s"), base=mini_config(root, "camera"))

    def refused(message: str, kind: type[Exception] = ValueError, **values: Any) -> None:
        given = {"distill.method": "unidistill", "distill.teacher": str(teacher), **values}
        changed = replace(camera, changes=(Change("kd", given),))
        with pytest.raises(kind, match=message):
            run_study(changed, progress=False)
        assert states(changed) == ["missing"] * 4

    refused("kd: unidistill needs a teacher: give its run folder", **{"distill.teacher": ""})
    refused("kd: no teacher: .*none: no such run folder", FileNotFoundError, **{"distill.teacher": f"{teacher}/none"})
    refused("has no split 'dawn'", **{"data.train": "dawn"})
    refused("no data set at", FileNotFoundError, **{"data.root": str(tmp_path / "none")})
    refused("give no batch of 64", **{"train.batch_size": 64})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused("runs and 0 worlds want about .* GB of disk, 0.0 GB are free", OSError)
    monkeypatch.undo()
    (teacher / "detector.safetensors").unlink()
    refused("the run .* is not finished; run its `kdlab train`", FileNotFoundError)
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        LocalEngine(0)


@pytest.mark.usefixtures("stub")
def test_locks(root: Path, tmp_path: Path) -> None:
    lone = study(root, tmp_path / "s", seeds=(0,))
    lone.out.mkdir()
    lock = lone.out / ".lock"
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "began": 0.0}))
    with pytest.raises(BlockingIOError, match=rf"by process 1 on elsewhere; .*\(if it no longer runs, remove {lock}\)"):
        run_study(lone, progress=False)
    for dead in ({"pid": 2**22, "host": socket.gethostname(), "began": 1.0}, "half"):
        lock.write_text(json.dumps(dead)[:-1] if dead == "half" else json.dumps(dead))
        assert run_study(lone, progress=False).finished == 1
        assert lock.read_text() == ""


@pytest.mark.usefixtures("stub")
def test_a_changed_world_is_written_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(out: Path, world: SimulationConfig) -> Path:
        record = {"digest": world.digest(), "complete": True, "config": asdict(world)}
        (out / "v1.0-tiny" / "simulation.json").write_text(json.dumps(record))
        return out

    base = write(shutil.copytree(root, tmp_path / "sim"), SimulationConfig())
    made: list[Path] = []

    def simulate(out: Path, world: SimulationConfig, progress: bool) -> Path:
        if not out.exists():
            made.append(out)
            write(shutil.copytree(root, out), world)
        return out

    monkeypatch.setattr(run, "simulate", simulate)
    foggy = study(base, tmp_path / "s", Change("fog", {"simulation.fog": 1.0}), seeds=(0,))
    assert run_study(foggy, progress=False).finished == 2
    assert made == [tmp_path / "s" / "worlds" / replace(SimulationConfig(), fog=1.0).digest()]
    trial = expand(foggy)[1]
    assert load_config(RunConfig, trial.folder / "config.json").data.root == str(made[0])
    assert run_study(replace(foggy, seeds=(0, 1)), progress=False).finished == 4 and len(made) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_study_ends_with_the_bits_of_a_plain_training(
    root: Path, tmp_path: Path, background: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    real = study(root, tmp_path / "s", Change("diverges", {"train.lr": 1e30}), seeds=(0,), epochs=30)
    good, bad = expand(real)
    process = background(real)
    wait(lambda: len(read_losses(good.folder / "losses.csv")) >= 5, 200)
    process.kill()
    process.join()
    wait(lambda: (good.folder / "checkpoint" / "state.pt").exists())
    outcome = run_study(real, progress=False)
    assert [trial.change for trial, _ in outcome.failed] == ["diverges"] and outcome.finished == 1
    whole = train(good.config, tmp_path / "whole", progress=False, cpu=True)
    for name in ("detector.safetensors", "losses.csv"):
        assert (whole / name).read_bytes() == (good.folder / name).read_bytes()
    assert state(good) == ("finished", "") and state(bad)[0] == "failed"
