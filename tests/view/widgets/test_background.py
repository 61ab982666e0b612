from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kdlab.view.widgets.background import Background


class Told:
    """Keeps what jobs did and what failed."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failures: list[str] = []
        self.go = threading.Event()
        self.background = Background(lambda error: self.failures.append(str(error)))

    def job(self, name: str, steps: int = 2) -> Iterator[None]:
        for step in range(steps):
            assert self.go.wait(10)
            self.done.append(f"{name}{step}")
            yield

    def broken(self, name: str) -> Iterator[None]:
        yield
        assert self.go.wait(10)
        raise OSError(name)


def test_a_job_runs_to_its_end_and_the_thread_ends_with_it() -> None:
    told = Told()
    told.go.set()
    told.background.ask(told.job("a"))  # type: ignore[arg-type]
    assert told.background.wait(10) and not told.background.busy
    told.background.ask(told.job("b", 1))  # type: ignore[arg-type]
    assert told.background.wait(10) and told.done == ["a0", "a1", "b0"]


def test_the_newest_job_stops_the_running_one_and_forgets_those_between() -> None:
    told = Told()
    for name in "abc":
        told.background.ask(told.job(name))  # type: ignore[arg-type]
    assert told.background.busy and not told.background.wait(0.01)
    told.go.set()
    assert told.background.wait(10)
    assert told.done in (["a0", "c0", "c1"], ["b0", "c0", "c1"], ["c0", "c1"])  # the others where the thread began late


def test_a_failure_is_told_and_the_next_job_runs() -> None:
    told = Told()
    told.go.set()
    told.background.ask(told.broken("no such file"))  # type: ignore[arg-type]
    assert told.background.wait(10) and told.failures == ["no such file"]
    told.background.ask(told.job("a"))  # type: ignore[arg-type]
    assert told.background.wait(10) and told.done == ["a0", "a1"]


def test_a_failure_that_nobody_waits_for_is_not_told() -> None:
    told = Told()
    told.background.ask(told.broken("old"))  # type: ignore[arg-type]
    told.background.ask(told.job("new", 1))  # type: ignore[arg-type]
    told.go.set()
    assert told.background.wait(10) and told.failures == [] and told.done == ["new0"]


def test_a_job_that_waits_for_itself_is_not_stuck() -> None:
    told = Told()
    found: list[bool] = []

    def job() -> Iterator[None]:
        found.append(told.background.wait(10))
        yield

    told.background.ask(job())  # type: ignore[arg-type]
    assert told.background.wait(10) and found == [False]


def test_a_failure_that_cannot_be_told_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def deaf(_: Exception) -> None:
        raise RuntimeError("the kernel ends")

    told = Told()
    told.go.set()
    told.background = Background(deaf)
    told.background.ask(told.broken("a"))  # type: ignore[arg-type]
    assert told.background.wait(10)
    told.background.ask(told.job("b"))  # type: ignore[arg-type]
    assert told.background.wait(10) and told.done == ["b0", "b1"]
