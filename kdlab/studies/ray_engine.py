"""Trials on the machines of a Ray cluster that share the study's folder (``pip install kdlab[ray]``)."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from kdlab.studies.attempt import commands_left
from kdlab.studies.job import run_commands
from kdlab.studies.measured import Measured
from kdlab.studies.plan import Study, Trial

RETRIES = 3
"""Times that a trial is started again after its worker or machine was lost; it goes on from its checkpoint."""


class RayEngine:
    """Runs each trial as a Ray task, which starts the same commands as on one machine.

    Every machine wants the same Python environment, and the study's folder, data and teachers under the same path.

    Args:
        address: ``auto`` joins the cluster that runs here, ``local`` starts one of this machine alone, HOST:PORT joins
            another.
        jobs: trials at a time; as many as the cluster holds where left out.
        cpus_per_run: cores that a trial occupies, also its number of threads.
        gpus_per_run: GPUs that a trial occupies; where left out one if the cluster has any and the study is not one for
            the CPU. A trial without sees none.
        grace: seconds that a stopped run has to write its checkpoint.

    Raises:
        ImportError: Ray is not installed.
        ValueError: a number that cannot work.
    """

    def __init__(
        self,
        address: str = "auto",
        jobs: int | None = None,
        *,
        cpus_per_run: float = 1.0,
        gpus_per_run: float | None = None,
        grace: float = 600.0,
    ) -> None:
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        if cpus_per_run <= 0 or (gpus_per_run or 0) < 0:
            raise ValueError(f"a run wants some CPU and no negative GPU, got {cpus_per_run} and {gpus_per_run}")
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ImportError("Ray is not installed: pip install 'kdlab[ray]'") from error
        self.address, self.jobs, self.grace = address, jobs, grace
        self._gpus = gpus_per_run
        self._wanted = {"CPU": cpus_per_run, "GPU": gpus_per_run or 0.0}
        self._running: dict[Any, Trial] = {}
        self._own = False

    def open(self, study: Study, measured: Measured) -> None:
        """Join the cluster.

        Raises:
            ConnectionError: there is none at the address.
            ValueError: no machine of it has what a run wants.
        """
        if not self._ray.is_initialized():
            try:
                self._ray.init(
                    address=self.address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **({"include_dashboard": False} if self.address == "local" else {}),
                )
            except ConnectionError as error:
                raise ConnectionError(
                    f"no Ray cluster at {self.address!r}; start one with `ray start --head`, or give --address local"
                ) from error
            self._own = True
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if self._gpus is None:
            self._wanted["GPU"] = float(not study.cpu and any(m.get("GPU", 0) >= 1 for m in machines))
        if not any(all(m.get(name, 0) >= n for name, n in self._wanted.items()) for m in machines):
            wanted = " and ".join(f"{n:g} {name}" for name, n in self._wanted.items())
            raise ValueError(f"no machine of the Ray cluster has the {wanted} that a run wants")
        self._remote = self._ray.remote(
            num_cpus=self._wanted["CPU"], num_gpus=self._wanted["GPU"], max_retries=RETRIES, max_calls=1
        )(run_commands)

    def room(self) -> bool:
        """Whether another trial may start now: one always, so that a cluster may grow for it."""
        if self.jobs is not None:
            return len(self._running) < self.jobs
        has = self._ray.cluster_resources()
        fits = min(int(has.get(name, 0) / n) for name, n in self._wanted.items() if n > 0)
        return len(self._running) < max(fits, 1)

    def start(self, trial: Trial) -> None:
        """Submit a trial."""
        hidden = {} if self._wanted["GPU"] > 0 else {"CUDA_VISIBLE_DEVICES": ""}
        self._running[self._remote.remote(trial.folder, commands_left(trial), os.getcwd(), hidden)] = trial

    def ended(self) -> Iterator[tuple[Trial, int, str]]:
        """Trials that have ended since the last call: exit code, and the reason where it is not in the log."""
        tasks = list(self._running)
        if not tasks:
            return
        for task in self._ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]:
            trial = self._running.pop(task)
            try:
                yield trial, int(self._ray.get(task)), ""
            except self._ray.exceptions.RayError as error:
                cause = str(getattr(error, "cause", None) or error).strip() or type(error).__name__
                yield trial, 1, f"Ray: {cause.splitlines()[0]}"

    def close(self) -> None:
        """Stop what still runs, after its checkpoint, and leave the cluster."""
        tasks = list(self._running)
        self._running.clear()
        try:
            for task in tasks:
                self._ray.cancel(task)
            if tasks:
                self._ray.wait(tasks, num_returns=len(tasks), timeout=self.grace)
        finally:
            if self._own:
                self._ray.shutdown()
