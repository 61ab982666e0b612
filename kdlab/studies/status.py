"""How far a trial is, read from its run folder."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdlab.checkpoint import RunFolder
from kdlab.evaluate import load_metrics
from kdlab.runs import run_state
from kdlab.studies.plan import Trial

State = Literal["missing", "unfinished", "failed", "trained", "finished"]

ERROR = "error.txt"
"""File of a run folder that says why the last attempt failed."""

_TAIL = 8192


@dataclass(frozen=True)
class Steps:
    """How far a training is.

    Attributes:
        done: steps in losses.csv.
        loss: total loss of the last; None before the first.
    """

    done: int = 0
    loss: float | None = None


def state(trial: Trial) -> tuple[State, str]:
    """State of a trial, and why it failed: ``trained`` is finished but not scored on the study's split."""
    found, why = run_state(trial.folder)
    if found != "finished":
        return found, why
    if trial.split in load_metrics(trial.folder):
        return "finished", ""
    error = trial.folder / ERROR
    lines = error.read_text(errors="replace").strip().splitlines() if error.exists() else []
    return ("failed", lines[-1]) if lines else ("trained", "")


def steps_of(run: Path) -> Steps:
    """Steps and loss of a run from the first and the last line of losses.csv, however long it is."""
    try:
        with open(RunFolder(run).losses, "rb") as file:
            names = file.readline().decode()
            start = file.tell()
            size = os.fstat(file.fileno()).st_size
            file.seek(max(start, size - _TAIL))
            whole = file.read().decode(errors="replace").rpartition("\n")[0]
    except FileNotFoundError:
        return Steps()
    last = whole.rpartition("\n")[2]
    if not names.endswith("\n") or not last:
        return Steps()
    row = dict(zip(next(csv.reader([names])), next(csv.reader([last])), strict=False))
    try:
        return Steps(int(row["step"]) + 1, float(row["total"]))
    except (KeyError, ValueError):
        return Steps()
