"""What a simulated data set says of itself: the file `simulation.json` in its version folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = "simulation.json"


@dataclass(frozen=True)
class WorldRecord:
    """A simulated data set's own record.

    Attributes:
        config: values by field of `SimulationConfig`, as they were when it was written.
        digest: of these settings and of the generator's version.
        complete: all scenes are written.
        scenes: names of the scenes of a part of a world; None for the whole.
    """

    config: dict[str, Any]
    digest: str
    complete: bool
    scenes: tuple[str, ...] | None = None

    @property
    def whole(self) -> bool:
        """Every scene of the world is there."""
        return self.complete and self.scenes is None


def read_record(version: Path) -> WorldRecord | None:
    """The record in a version folder, such as ``root/v1.0-sim``; None where the data set is not simulated."""
    path = version / RECORD
    if not path.is_file():
        return None
    known = json.loads(path.read_text())
    scenes = known.get("scenes")
    complete = bool(known.get("complete"))
    return WorldRecord(known.get("config", {}), known["digest"], complete, scenes and tuple(scenes))
