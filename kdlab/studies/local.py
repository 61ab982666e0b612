"""Trials on this machine, one or several at a time, as many as memory allows."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from kdlab.checkpoint import RunFolder
from kdlab.studies.attempt import commands_left
from kdlab.studies.job import Job
from kdlab.studies.measured import Measured
from kdlab.studies.memory import available
from kdlab.studies.plan import Study, Trial
from kdlab.studies.status import steps_of

HEADROOM = 1.2
"""Memory set aside for a run, as a multiple of the most that one has used."""

WARM_STEPS = 20
"""Steps of an attempt after which a training's memory counts as known."""

SAMPLE_SECONDS = 0.5
"""Time between looks at the memory of the runs."""


class LocalEngine:
    """Runs trials as processes of this machine.

    A further one starts only where free memory holds the most that a run of the study has used so far, times HEADROOM;
    until that is known, the first runs alone. Memory of GPUs is not looked at.

    Args:
        jobs: trials at a time. With more than one, each gets its share of the cores (OMP_NUM_THREADS) and, of several
            GPUs, one that few others use.
        grace: seconds that a stopped run has to write its checkpoint.

    Raises:
        ValueError: jobs below 1.
    """

    def __init__(self, jobs: int = 1, *, grace: float = 600.0) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        self.jobs, self.grace = jobs, grace
        self._running: dict[Path, tuple[Trial, Job]] = {}
        self._used: dict[Path, str] = {}
        self._first: dict[Path, int] = {}
        self._sampled = 0.0

    def open(self, study: Study, measured: Measured) -> None:
        """Begin, knowing what earlier runs of the study used."""
        self._devices = [] if study.cpu else _devices()
        self._measured = measured

    def room(self) -> bool:
        """Whether another trial may start now."""
        if not self._running:
            return True
        if len(self._running) >= self.jobs:
            return False
        self._measured.memory_known |= self._measured.memory > 0 and any(map(self._warm, self._running))
        if not self._measured.memory_known:
            return False
        peak = self._measured.memory
        growth = sum(max(peak - job.memory(), 0) for _, job in self._running.values())
        return available() > HEADROOM * peak + growth

    def _warm(self, run: Path) -> bool:
        """Whether a training has gone on for long enough since its start; losses.csv holds earlier attempts, too."""
        done = steps_of(run).done
        self._first[run] = min(self._first[run], done)  # the attempt drops rows that are beyond its checkpoint
        return not RunFolder(run).finished and done - self._first[run] >= WARM_STEPS

    def start(self, trial: Trial) -> None:
        """Start a trial."""
        self._first[trial.folder] = steps_of(trial.folder).done
        extra = {}
        if self.jobs > 1:
            extra["OMP_NUM_THREADS"] = os.environ.get(
                "OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // self.jobs, 1))
            )
        if self._devices:
            used = list(self._used.values())
            self._used[trial.folder] = min(self._devices, key=used.count)
            extra["CUDA_VISIBLE_DEVICES"] = self._used[trial.folder]
        self._running[trial.folder] = trial, Job(trial.folder, commands_left(trial), extra)

    def ended(self) -> Iterator[tuple[Trial, int, str]]:
        """Trials that have ended since the last call: exit code, and the reason where it is not in the log."""
        self._sample()
        for folder, (trial, job) in list(self._running.items()):
            code = job.poll()
            if code is not None:
                self._running.pop(folder)
                self._used.pop(folder, None)
                trained = steps_of(folder).done > self._first.pop(folder)
                self._measured.memory_known |= code == 0 and trained and self._measured.memory > 0
                yield trial, code, ""

    def _sample(self) -> None:
        if time.monotonic() - self._sampled >= SAMPLE_SECONDS:
            self._sampled = time.monotonic()
            used = [job.memory() for _, job in self._running.values()]
            self._measured.memory = max([self._measured.memory, *used])

    def close(self) -> None:
        """Stop what still runs, after its checkpoint; what takes longer than `grace` is killed."""
        jobs = [job for _, job in self._running.values()]
        self._running.clear()
        try:
            for job in jobs:
                job.stop()
            end = time.monotonic() + self.grace
            while (
                any(job.process is not None and job.process.poll() is None for job in jobs) and time.monotonic() < end
            ):
                time.sleep(0.05)
        finally:
            for job in jobs:
                job.kill()


def _devices() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES wants them; none where there is only one."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        import torch

        names = [str(i) for i in range(torch.cuda.device_count())]
    else:
        names = [name for name in given.split(",") if name]
    return names if len(names) > 1 else []
