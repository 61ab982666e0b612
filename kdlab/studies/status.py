"""How far a trial is, read from its run folder."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from kdlab.checkpoint import RunFolder, load_run_config
from kdlab.evaluate import load_metrics
from kdlab.runs import run_state
from kdlab.studies.plan import Trial

State = Literal["missing", "unfinished", "failed", "trained", "finished", "stale"]

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
    """State of a trial, and why it failed.

    ``trained`` is finished but not scored on the study's split; ``stale`` was trained with other weights of its teacher
    than those that are there now.
    """
    found, why = run_state(trial.folder)
    if old := stale(trial.folder):
        return "stale", old
    if found != "finished":
        return found, why
    if trial.split in load_metrics(trial.folder):
        return "finished", ""
    error = trial.folder / ERROR
    lines = error.read_text(errors="replace").strip().splitlines() if error.exists() else []
    return ("failed", lines[-1]) if lines else ("trained", "")


def stale(run: Path) -> str:
    """Why a run no longer belongs to its study, with the cure; empty where it does or its teacher is not there."""
    try:
        distill = load_run_config(run).distill
        digest = json.loads(RunFolder(run).versions.read_text()).get("teacher")
    except (OSError, ValueError, AttributeError):
        return ""
    if distill is None or not digest:
        return ""
    weights = RunFolder(Path(distill.teacher)).weights
    if not weights.exists() or _digest(weights, weights.stat().st_mtime_ns) == digest:
        return ""
    return f"the teacher {distill.teacher} has changed since; remove {run} to train it again"


@lru_cache(maxsize=64)
def _digest(weights: Path, changed: int) -> str:
    """As in versions.json; ``changed`` is when the file was written."""
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]


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
