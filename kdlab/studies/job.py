"""The processes of one trial, one after the other, with a log. Imports nothing heavy: Ray's workers start with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

LOG = "log.txt"
"""File of a run folder with all that its commands printed."""

HEADER = "== "
"""Begins the line of the log that names a command."""

POLL_SECONDS = 0.2

COMMAND = (sys.executable, "-m", "kdlab.studies.child")
"""What runs a command, see there."""


class Job:
    """Commands of a trial, one process after the other.

    The processes do not outlive this one, and Ctrl-C on the terminal reaches them only through `stop`.

    Args:
        folder: the run folder.
        commands: the words of each, ``kdlab`` in front.
        environment: variables beside this process's own.
    """

    def __init__(
        self, folder: Path, commands: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self._left = folder, list(commands)
        self._environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self._start_next()

    def poll(self) -> int | None:
        """Exit code once all commands have ended or one has failed, None before; starts the next command."""
        if self.process is None:
            return 0
        code = self.process.poll()
        if code == 0:
            self._start_next()
            return 0 if self.process is None else None
        return code

    def stop(self) -> None:
        """Ask the command to stop: a training writes its checkpoint first."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()  # not SIGINT, which Ray's workers and shells in the background keep from children

    def kill(self) -> None:
        """End the command and its processes now."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def memory(self) -> int:
        """Resident memory of the command and its processes, bytes; memory that they share counts for each."""
        if self.process is None:
            return 0
        total = 0
        try:
            top = psutil.Process(self.process.pid)
            for process in (top, *top.children(recursive=True)):
                total += process.memory_info().rss
        except psutil.Error:  # ended meanwhile
            pass
        return total

    def _start_next(self) -> None:
        self.process = self._start(self._left.pop(0)) if self._left else None

    def _start(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        with open(self.folder / LOG, "a") as log:
            log.write(f"{HEADER}{time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(words)}\n")
            log.flush()
            return subprocess.Popen(
                (*COMMAND, str(os.getpid()), str(self.folder / ".lock"), *words[1:]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )


def run_commands(
    folder: Path, commands: Sequence[Sequence[str]], where: str, environment: Mapping[str, str] | None = None
) -> int:
    """Run the commands of a trial to their end from a working folder; returns the exit code."""
    os.chdir(where)
    job = Job(folder, commands, environment)
    try:
        while (code := job.poll()) is None:
            time.sleep(POLL_SECONDS)
        return code
    finally:
        job.stop()
        if job.process is not None:
            job.process.wait()
