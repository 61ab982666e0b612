"""A thread that does the newest of the jobs it is asked for: what keeps a widget usable while networks run."""

from __future__ import annotations

from collections.abc import Callable, Generator
from threading import Condition, Thread, current_thread
from typing import TypeAlias

Job: TypeAlias = Generator[None, None, None]
"""Work in steps: after each ``yield`` it may be left for good, because something newer was asked for."""


def in_words(error: Exception) -> str:
    """What a person is told of an error; one that was not foreseen comes with its type."""
    words = str(error) or type(error).__name__
    return words if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {words}"


class Background:
    """One thread for the newest job; it begins with a job and ends when there is none.

    Args:
        failed: called in that thread with what a job raised.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._change = Condition()
        self._next: Job | None = None
        self._thread: Thread | None = None

    def ask(self, job: Job) -> None:
        """Do this as soon as the running job comes to a ``yield``; a job that still waits is forgotten."""
        with self._change:
            self._next = job
            if self._thread is None:
                self._thread = Thread(target=self._run, name="kdlab view", daemon=True)
                self._thread.start()

    @property
    def busy(self) -> bool:
        """Something runs or waits."""
        return self._thread is not None

    def wait(self, seconds: float = 60.0) -> bool:
        """Wait until nothing runs and nothing waits.

        Args:
            seconds: at most.

        Returns:
            whether that was reached; False at once where a job itself asks.
        """
        if self._thread is current_thread():
            return False
        with self._change:
            return self._change.wait_for(lambda: self._thread is None, seconds)

    def _run(self) -> None:
        try:
            self._work()
        finally:  # telling a failure may fail as well, such as while a kernel ends: the next job gets a new thread
            with self._change:
                if self._thread is current_thread():
                    self._thread = None
                    self._change.notify_all()

    def _work(self) -> None:
        while True:
            with self._change:
                job, self._next = self._next, None
                if job is None:
                    self._thread = None
                    self._change.notify_all()
                    return
            try:
                for _ in job:
                    if self._next is not None:
                        break
            except Exception as error:
                if self._next is None:  # else nobody waits for it any more
                    self._failed(error)
            finally:
                job.close()
