"""Runs what a study lacks."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kdlab.checkpoint import replacing, write_json
from kdlab.data.simulate import simulate
from kdlab.loop import Interrupted, StopSignal
from kdlab.studies.attempt import note_failure, prepare
from kdlab.studies.check import check, total_steps
from kdlab.studies.load import PLAN, TOML, plain_study
from kdlab.studies.local import LocalEngine
from kdlab.studies.lock import locked
from kdlab.studies.measured import Measured, load_measured, save_measured
from kdlab.studies.plan import Study, Trial, expand, trial_hash, unique
from kdlab.studies.progress import Board, View, duration
from kdlab.studies.status import State, state

POLL_SECONDS = 0.1

SAVE_GROWTH = 1.05
"""Growth of the memory that a run was seen to use after which it is written down, for a study that is killed."""


class Engine(Protocol):
    """Where trials run."""

    def open(self, study: Study, measured: Measured) -> None:
        """Begin; ``measured`` is what earlier runs of the study used."""
        ...

    def room(self) -> bool:
        """Whether another trial may start now."""
        ...

    def start(self, trial: Trial) -> None:
        """Start a trial."""
        ...

    def ended(self) -> Iterator[tuple[Trial, int, str]]:
        """Trials that have ended since the last call: exit code, and the reason where it is not in the log."""
        ...

    def close(self) -> None:
        """Stop what still runs, after its checkpoint."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What became of a study.

    Attributes:
        folder: the study's.
        finished: number of runs that are trained and scored, earlier ones included.
        failed: trials of this call that failed, with the reason; and stale ones, which are not run (`state`).
    """

    folder: Path
    finished: int
    failed: tuple[tuple[Trial, str], ...]


def run_study(
    study: Study, engine: Engine | None = None, *, progress: bool = True, source: Path | None = None
) -> Outcome:
    """Run every trial that is not finished; the same call goes on after a stop and tries failed ones again.

    Args:
        study: what to run.
        engine: where; one after the other on this machine where left out.
        progress: show how far the study is.
        source: the study's TOML file, to copy into its folder.

    Raises:
        BlockingIOError: another process runs this study.
        FileNotFoundError: a teacher or a data set is missing.
        ValueError: a trial that cannot work.
        OSError: too little room on the disk.
        Interrupted: stopped by Ctrl-C or SIGTERM; running trainings have written their checkpoints.
    """
    trials = expand(study)
    runs = unique(trials)
    view = View(progress)
    with locked(study.out):
        states = {trial.folder: state(trial) for trial in runs}
        todo = [trial for trial in runs if states[trial.folder][0] not in ("finished", "stale")]
        stale = [(trial, why) for trial in runs for now, why in [states[trial.folder]] if now == "stale"]
        check(study, todo)
        _write_plan(study, trials, source)
        _write_worlds(todo, progress)
        measured = load_measured(study.out)
        board = Board(study.name, todo, len(runs) - len(todo) - len(stale), total_steps(todo), measured)
        try:
            failed = _run_all(study, todo, engine or LocalEngine(), board, view)
        finally:
            view.close()
    return Outcome(study.out, board.done, (*stale, *failed))


def _run_all(study: Study, todo: Sequence[Trial], engine: Engine, board: Board, view: View) -> list[tuple[Trial, str]]:
    waiting, failed = list(todo), list[tuple[Trial, str]]()
    if not waiting:
        return failed
    engine.open(study, board.measured)
    saved = board.measured.memory
    with StopSignal() as stop:
        try:
            while (waiting or board.running) and not stop.requested:
                for trial, code, why in engine.ended():
                    reason = _end(trial, code, why, board, view)
                    failed += [(trial, reason)] if reason else []
                    save_measured(study.out, board.measured)
                while waiting and not stop.requested and engine.room():
                    trial = waiting.pop(0)
                    prepare(trial, study.name)
                    engine.start(trial)
                    board.start(trial)
                board.look()
                if board.measured.memory > SAVE_GROWTH * saved:
                    saved = board.measured.memory
                    save_measured(study.out, board.measured)
                if view.due:
                    view.show(board.lines())
                time.sleep(POLL_SECONDS)
            if stop.requested and board.running:
                view.say("stopping: the running trainings write their checkpoints")
        finally:
            engine.close()
            save_measured(study.out, board.measured)
    if stop.requested:
        raise Interrupted(
            f"stopped with {board.done} of {board.all} runs done; the same command goes on from there ({study.out})"
        )
    return failed


def _end(trial: Trial, code: int, why: str, board: Board, view: View) -> str:
    """Note the end of a trial; returns the reason where it failed."""
    now, _ = state(trial)
    ok = code == 0 and now == "finished"
    seconds = board.end(trial, ok)
    if ok:
        view.say(f"{trial.name}: done in {duration(seconds)}")
        return ""
    if code == 0 and not why:
        why = f"its commands ended well, but the run is {now}"
    reason = note_failure(trial, code, why)
    view.say(f"{trial.name}: FAILED after {duration(seconds)}: {reason} ({trial.folder})")
    return reason


def _write_plan(study: Study, trials: Sequence[Trial], source: Path | None) -> None:
    rows = [
        {
            "change": trial.change,
            "seed": trial.seed,
            "folder": str(trial.folder.relative_to(study.out)),
            "hash": trial_hash(trial.config, trial.world),
            "command": trial.command,
            "evaluation": trial.evaluation,
        }
        for trial in trials
    ]
    write_json(study.out / PLAN, {**plain_study(study), "trials": rows})
    if source is not None and source.is_file():
        with replacing(study.out / TOML) as part:
            shutil.copyfile(source, part)


def _write_worlds(todo: Sequence[Trial], progress: bool) -> None:
    worlds = {trial.config.data.root: trial.world for trial in todo if trial.world is not None}
    with _stopped_by_sigterm():
        for root, world in worlds.items():
            simulate(Path(root), world, progress=progress)


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that the simulator's processes are ended too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def listing(study: Study) -> list[tuple[Trial, State, str]]:
    """Every trial, its state and why it failed; nothing is run or written."""
    return [(trial, *state(trial)) for trial in expand(study)]


def words(trial: Trial) -> str:
    """The commands of a trial, as one would type them."""
    return f"{shlex.join(trial.command)} && {shlex.join(trial.evaluation)}"
