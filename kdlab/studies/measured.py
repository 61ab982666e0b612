"""What the runs of a study have used so far, kept in its folder: for the time left and for the memory to set aside."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kdlab.checkpoint import write_json
from kdlab.config import from_dict

MEASURED = "measured.json"


@dataclass
class Measured:
    """Measurements over all runs of a study.

    Attributes:
        memory: most that the processes of one run had resident, bytes.
        memory_known: whether a run has gone on for long enough for `memory` to count.
        seconds_per_step: by change, of its latest run.
        seconds_beside: of one run, beside its steps: start, loading, evaluation; of the latest.
    """

    memory: int = 0
    memory_known: bool = False
    seconds_per_step: dict[str, float] = field(default_factory=dict)
    seconds_beside: float = 0.0

    def step_of(self, change: str) -> float | None:
        """Seconds per step of a change; the mean of the others where it has not run, None before any has."""
        known = self.seconds_per_step
        if change in known or not known:
            return known.get(change)
        return sum(known.values()) / len(known)


def load_measured(study: Path) -> Measured:
    """What is known of a study; nothing where the file is missing or cannot be read."""
    try:
        return from_dict(Measured, json.loads((study / MEASURED).read_text()))
    except (OSError, ValueError):
        return Measured()


def save_measured(study: Path, measured: Measured) -> None:
    """Keep it for the next call."""
    write_json(study / MEASURED, asdict(measured))
