"""Time, memory and parameters: what is counted, what is left out, and that resumes add up."""

import math
import mmap
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture
from torch import nn

import kdlab.cost
import kdlab.validation
from kdlab.checkpoint import write_json
from kdlab.config import DistillConfig
from kdlab.cost import Cost, Meter, PeakMemory, Stopwatch, parameters, read_cost, training_cost, write_cost
from kdlab.train import train

CPU = torch.device("cpu")


class Clock:
    """A clock that only goes on when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        read = lambda: self.now  # noqa: E731
        monkeypatch.setattr(kdlab.cost, "time", SimpleNamespace(monotonic=read, perf_counter=read))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("cost") / "set")


def test_file(tmp_path: Path) -> None:
    assert read_cost(tmp_path) is None
    cost = Cost(train_seconds=1.5, train_steps=3, teacher_parameters=0)
    write_cost(tmp_path, cost)
    assert read_cost(tmp_path) == cost
    write_json(tmp_path / "cost.json", {"train_steps": 3, "of_a_later_kdlab": 1})
    assert read_cost(tmp_path) == Cost(train_steps=3)
    (tmp_path / "cost.json").write_text("{")
    with pytest.raises(ValueError, match=r"cost\.json cannot be read .*; remove it"):
        read_cost(tmp_path)


def test_parameters() -> None:
    one, two = nn.Linear(3, 4), nn.Linear(4, 4, bias=False)
    two.requires_grad_(False)
    both = nn.Sequential(one, two, nn.BatchNorm1d(4))  # running statistics are no parameters
    assert parameters(both) == 16 + 16 + 8 and parameters(both, trained=True) == 24
    assert parameters(both, one, None) == parameters(both) and parameters() == 0


def test_meter_leaves_pauses_out_and_goes_on(clock: Clock) -> None:
    meter = Meter(CPU)
    with meter:
        clock.now += 5
        with meter.paused():
            clock.now += 100
        clock.now += 2
        kept = meter.state()
    clock.now += 100
    assert kept["seconds"] == meter.state()["seconds"] == 7 and kept["memory_mb"] > 0
    later = Meter(CPU, {**kept, "memory_mb": 1e9})
    with later:
        clock.now += 1
    assert later.state() == {"seconds": 8, "memory_mb": 1e9}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own peak is Linux's")
def test_memory_that_was_given_back_counts() -> None:
    before = psutil.Process().memory_info().rss / 1e6
    memory = PeakMemory(CPU)
    size = 200_000_000
    # Past the C library, which may keep what is freed.
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        for start in range(0, size, mmap.PAGESIZE):
            pages[start] = 1
    memory.look()
    assert before + 150 < memory.mb < before + 600
    fresh = PeakMemory(CPU)
    fresh.look()
    assert fresh.mb < memory.mb - 100


def test_memory_of_children_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = PeakMemory(CPU)
    memory.look()
    code = "import time; held = b'1' * 150_000_000; print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        before = memory.mb
        memory.look()  # too early to look at other processes again
        assert memory.mb < before + 100
        memory.look(now=True)
        child.kill()
    assert before + 140 < memory.mb < before + 300


def test_cost_of_a_training_with_an_earlier_stage() -> None:
    detector, teacher, labels = nn.Linear(2, 2), nn.Linear(10, 10), nn.Linear(3, 1)
    trained = nn.ModuleList([detector, nn.Linear(1, 1)])
    stage = Cost(train_seconds=2.0, train_steps=5, train_memory_mb=70.0, train_parameters=4, teacher_parameters=0)
    state = {"seconds": 10.0, "memory_mb": 60.0}
    assert training_cost(state, 20, trained, detector, (teacher, labels, None), [stage, None]) == Cost(
        train_seconds=12.0,
        train_steps=25,
        train_memory_mb=70.0,
        train_parameters=8 + 4,
        teacher_parameters=114,
        test_parameters=6,
    )


def test_stopwatch(clock: Clock, tmp_path: Path) -> None:
    watch = Stopwatch(nn.Linear(2, 2))
    for seconds, samples in ((100, 2), (4, 2), (8, 2), (3, 1), (4, 2)):
        with watch.batch(samples):
            clock.now += seconds
        clock.now += 50  # loading, writing
        assert watch.seconds is None or watch.seconds < 10
    assert watch.seconds == 2.5
    write_cost(tmp_path, Cost(train_steps=3, test_seconds=9.0))
    watch.store(tmp_path)
    cost = read_cost(tmp_path)
    assert cost is not None and cost.train_steps == 3 and cost.test_parameters == 6 and cost.test_seconds == 2.5
    assert cost.test_memory_mb is not None and cost.test_memory_mb > 50
    Stopwatch(nn.Linear(2, 2)).store(tmp_path / "other")
    other = read_cost(tmp_path / "other")
    assert other is not None and other.test_seconds is None and other.train_steps is None


def test_a_run_and_its_distilled_student(root: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    teacher = train(mini_config(root, epochs=1), tmp_path / "teacher", progress=False, cpu=True)
    cost = read_cost(teacher)
    assert cost is not None and cost.train_seconds is not None and cost.train_memory_mb is not None
    assert 0 < cost.train_seconds < time.monotonic() - began and cost.train_steps == 3 and cost.train_memory_mb > 100
    detector = kdlab.load_detector(teacher)
    assert cost.test_parameters == cost.train_parameters == parameters(detector) and cost.teacher_parameters == 0
    config = replace(mini_config(root, "camera", epochs=1), distill=DistillConfig("unidistill", str(teacher)))
    student = read_cost(train(config, tmp_path / "student", progress=False, cpu=True))
    assert student is not None and student.teacher_parameters == parameters(detector)
    assert student.train_parameters is not None and student.test_parameters is not None
    assert student.train_parameters >= student.test_parameters == parameters(kdlab.load_detector(tmp_path / "student"))
    assert student.test_seconds is None and student.test_memory_mb is None
    train(config, tmp_path / "student", progress=False, cpu=True, resume=False)
    again = read_cost(tmp_path / "student")
    assert again is not None and again.train_steps == 3


class Killed(Exception):  # noqa: N818
    """Stands for a kill: nothing is written any more."""


def test_resumes_add_up_and_evaluations_are_left_out(
    root: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*_: object) -> None:
        clock.now += 10_000

    monkeypatch.setattr(kdlab.validation.Validation, "__call__", evaluate)
    config = mini_config(root, epochs=2, checkpoint_minutes=0.0, evaluate_every=1)
    for at in (1, 4, math.inf):

        def step_takes_100(step: int, row: Mapping[str, float], at: float = at) -> None:
            clock.now += 100
            if step == at:
                raise Killed

        try:
            train(config, tmp_path / "run", progress=False, cpu=True, on_step=step_takes_100)
        except Killed:
            assert at < 6
    cost = read_cost(tmp_path / "run")
    assert cost is not None and cost.train_seconds == 600 and cost.train_steps == 6
