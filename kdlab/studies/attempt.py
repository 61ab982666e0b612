"""Before and after an attempt at a trial: its config and what is left to do, a note of what went wrong."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from kdlab.checkpoint import RunFolder, replacing, write_json
from kdlab.config import save_config
from kdlab.evaluate import load_metrics
from kdlab.studies.job import HEADER, LOG
from kdlab.studies.plan import Trial
from kdlab.studies.status import ERROR

RUN = "trial.json"
"""File of a run folder that says which trial of which study it is."""

_TAIL = 4096
_LINES = 20


def commands_left(trial: Trial) -> list[tuple[str, ...]]:
    """The commands of a trial that are still to do."""
    if not RunFolder(trial.folder).finished:
        return [trial.command, trial.evaluation]
    return [] if trial.split in load_metrics(trial.folder) else [trial.evaluation]


def prepare(trial: Trial, study: str) -> None:
    """Write the config that a trial's command reads, and what the folder is; forget an earlier failure."""
    folder = RunFolder(trial.folder)
    if not folder.finished:
        with replacing(folder.config) as part:
            save_config(trial.config, part)
    about = {"study": study, "change": trial.change, "seed": trial.seed, "split": trial.split}
    command = _trained_by(trial) if folder.finished else trial.command
    write_json(trial.folder / RUN, {**about, "command": command, "evaluation": trial.evaluation})
    (trial.folder / ERROR).unlink(missing_ok=True)


def _trained_by(trial: Trial) -> Sequence[str]:
    """The command that trained a finished run."""
    try:
        command: Sequence[str] = json.loads((trial.folder / RUN).read_text())["command"]
    except (OSError, ValueError, KeyError):
        return trial.command
    return command


def note_failure(trial: Trial, code: int, why: str = "") -> str:
    """Write error.txt: time, exit code, last lines of the log, and the reason as the last line.

    Args:
        trial: the one that failed.
        code: exit code of its command; negative for a signal.
        why: the reason, where it is not in the log.

    Returns:
        The reason.
    """
    lines = _last_lines(trial.folder / LOG)
    reason = why or _reason(code, lines)
    text = [time.strftime("%Y-%m-%d %H:%M:%S"), f"exit code {code}", "", *lines[-_LINES:], "", reason]
    trial.folder.mkdir(parents=True, exist_ok=True)
    with replacing(trial.folder / ERROR) as part:
        part.write_text("\n".join(text) + "\n")
    return reason


def _reason(code: int, lines: Sequence[str]) -> str:
    if code < 0:
        hint = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    said = [line for line in lines if line.startswith("kdlab: ")] or list(lines)
    return said[-1].removeprefix("kdlab: ").removeprefix("error: ") if said else f"exit code {code}, and no word why"


def _last_lines(log: Path) -> list[str]:
    """What the last command printed, its end."""
    if not log.exists():
        return []
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - _TAIL, 0))
        lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith(HEADER)]
    return lines[starts[-1] + 1 :] if starts else lines
