"""A study on a real Ray cluster of several workers, one of which is killed while it trains."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture

from kdlab.loop import Interrupted
from kdlab.losslog import read_losses
from kdlab.studies import Change, RayEngine, Study, Trial, expand, run_study
from kdlab.studies.measured import Measured
from kdlab.studies.status import state
from kdlab.train import train


def test_numbers_that_cannot_work() -> None:
    pytest.importorskip("ray")
    for values in ({"jobs": 0}, {"cpus_per_run": 0}, {"gpus_per_run": -1}):
        with pytest.raises(ValueError, match=r"at least 1|some CPU"):
            RayEngine(**values)  # type: ignore[arg-type]


def test_gpus_are_taken_where_the_cluster_has_some(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    started: list[tuple[Any, ...]] = []
    remote = SimpleNamespace(remote=lambda *words: started.append(words))

    def open_(gpus: float | None, cpu: bool, there: float) -> float:
        engine = RayEngine(gpus_per_run=gpus)
        wanted: list[float] = []

        def make(num_gpus: float, **_: Any) -> Any:
            wanted.append(num_gpus)
            return lambda _: remote

        node = {"Alive": True, "Resources": {"CPU": 4, "GPU": there}}
        engine._ray = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: [node], remote=make)
        study = Study("s", mini_config(tmp_path), (), (0,), "tiny_val", tmp_path, cpu=cpu)
        engine.open(study, Measured())
        engine.start(study.trials()[0])
        return wanted[0]

    assert [open_(None, False, 2), open_(None, True, 2), open_(None, False, 0), open_(0.5, False, 1)] == [1, 0, 0, 0.5]
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert [words[3] for words in started] == [{}, hidden, hidden, {}]


def test_without_ray_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'kdlab\[ray\]'"):
        RayEngine()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs, and two machines of one CPU each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    memory = {"object_store_memory": 80 << 20}
    for attempt in range(3):  # a busy machine may be too slow for Ray's own time limits
        made = Cluster()
        try:
            made.add_node(num_cpus=0, include_dashboard=False, **memory)
            for _ in range(2):
                made.add_node(num_cpus=1, **memory)
            break
        except Exception:
            made.shutdown()
            if attempt == 2:
                raise
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()
    os.environ.pop("OMP_NUM_THREADS")
    os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})


def parent_of_the_training(run: Path) -> int | None:
    """The Ray worker whose process trains into a run folder."""
    for process in psutil.process_iter(["cmdline", "ppid"]):
        words = process.info["cmdline"] or []
        if "kdlab.studies.child" in words and str(run) in words:
            return int(process.info["ppid"])
    return None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    changes = (Change("lr", {"train.lr": 1e-3}), Change("diverges", {"train.lr": 1e30}))
    study = Study("mini", mini_config(root, epochs=20), changes, (0,), "tiny_val", tmp_path / "s", cpu=True)
    base, lr, diverges = expand(study)
    killed: list[tuple[int, int]] = []

    def kill() -> None:
        while len(read_losses(base.folder / "losses.csv")) < 5:
            time.sleep(0.02)
        worker = parent_of_the_training(base.folder)
        assert worker is not None and "ray::" in " ".join(psutil.Process(worker).cmdline())
        os.kill(worker, signal.SIGKILL)
        killed.append((worker, len(read_losses(base.folder / "losses.csv"))))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    outcome = run_study(study, RayEngine(), progress=False)
    killer.join(1)
    assert killed and killed[0][1] < 60, "the worker was to be killed while it trained"
    assert outcome.finished == 2 and [trial.change for trial, _ in outcome.failed] == ["diverges"]
    assert [state(trial)[0] for trial in (base, lr, diverges)] == ["finished", "finished", "failed"]
    for trial, attempts in ((base, 2), (lr, 1)):
        log = (trial.folder / "log.txt").read_text()
        assert log.count(" ".join(trial.command)) == attempts and log.count(" ".join(trial.evaluation)) == 1
        assert [row["step"] for row in read_losses(trial.folder / "losses.csv")] == list(range(60))
    assert "goes on at step" in (base.folder / "log.txt").read_text()
    whole = train(base.config, tmp_path / "whole", progress=False, cpu=True)
    for name in ("detector.safetensors", "losses.csv"):
        assert (whole / name).read_bytes() == (base.folder / name).read_bytes()
    changed = {path: path.stat().st_mtime_ns for path in base.folder.iterdir()}
    assert run_study(replace(study, changes=changes[:1]), RayEngine(jobs=1), progress=False).finished == 2
    assert changed == {path: path.stat().st_mtime_ns for path in changed}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_stops_the_workers_after_their_checkpoints(cluster: Any, tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    study = Study("mini", mini_config(root, epochs=300), (), (0,), "tiny_val", tmp_path / "s", cpu=True)
    (trial,) = expand(study)

    class Signalling(RayEngine):
        def ended(self) -> Iterator[tuple[Trial, int, str]]:
            if len(read_losses(trial.folder / "losses.csv")) >= 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield from super().ended()

    with pytest.raises(Interrupted, match="stopped with 0 of 1 runs done"):
        run_study(study, Signalling(), progress=False)
    assert state(trial) == ("unfinished", "") and (trial.folder / "checkpoint" / "state.pt").exists()
    assert parent_of_the_training(trial.folder) is None
    assert "the same command goes on from there" in (trial.folder / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_no_machine_has_is_refused(cluster: Any, tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    study = Study("mini", mini_config(root), (), (0,), "tiny_val", tmp_path / "s", cpu=True)
    with pytest.raises(ValueError, match="no machine of the Ray cluster has the 8 CPU and 1 GPU that a run wants"):
        run_study(study, RayEngine(cpus_per_run=8, gpus_per_run=1), progress=False)
    assert state(expand(study)[0])[0] == "missing"
