"""Simulated worlds that differ from the base's in a few knobs, each written once per study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdlab.config import DataConfig, from_dict
from kdlab.data.nuscenes import find_version
from kdlab.data.simulate_config import SimulationConfig

WORLDS = "worlds"
"""Folder of a study's worlds."""


def changed_world(data: DataConfig, knobs: Mapping[str, Any], out: Path) -> tuple[SimulationConfig | None, str]:
    """The world of a data set with some knobs turned, and the root where the study keeps it.

    Args:
        data: the data set to start from.
        knobs: values by field of SimulationConfig.
        out: the study's folder.

    Returns:
        None and the data set's own root where the knobs stand like that already.

    Raises:
        FileNotFoundError: no data set at the root.
        ValueError: the data set is not simulated or not complete, an unknown knob, a value that cannot work.
    """
    version = find_version(Path(data.root), data.version)
    record = Path(data.root) / version / "simulation.json"
    if not record.exists():
        raise ValueError(f"simulation.{next(iter(knobs))}: {data.root} is not a simulated data set, it has no {record}")
    known = json.loads(record.read_text())
    if not known["complete"]:
        raise ValueError(f"{data.root} is not complete; run its `kdlab simulate` again to go on")
    start = from_dict(SimulationConfig, known["config"], str(record))
    world = from_dict(SimulationConfig, {**asdict(start), **knobs}, "simulation")
    world.check()
    return (None, data.root) if world == start else (world, str(out / WORLDS / world.digest()))


def world_ready(root: Path | str, world: SimulationConfig) -> bool:
    """Whether a world is written and complete."""
    for record in Path(root).glob("*/simulation.json"):
        known = json.loads(record.read_text())
        return bool(known["complete"]) and known["digest"] == world.digest()
    return False
