"""Simulated worlds that differ from the base's in a few knobs, each written once per study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdlab.config import DataConfig, from_dict
from kdlab.data.nuscenes import find_version
from kdlab.data.simulate_config import SimulationConfig
from kdlab.data.simulate_record import RECORD, read_record

WORLDS = "worlds"
"""Folder of a study's worlds."""


def changed_world(data: DataConfig, knobs: Mapping[str, Any], out: Path) -> tuple[SimulationConfig | None, str]:
    """The world of a data set with some knobs turned, and the root where the study keeps it.

    It is written whole, also where the data set holds a part of its world alone.

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
    version = Path(data.root) / find_version(Path(data.root), data.version)
    record = read_record(version)
    if record is None:
        raise ValueError(
            f"simulation.{next(iter(knobs))}: {data.root} is not a simulated data set, it has no {version / RECORD}"
        )
    if not record.complete:
        raise ValueError(f"{data.root} is not complete; run its `kdlab simulate` again to go on")
    start = from_dict(SimulationConfig, record.config, str(version / RECORD))
    world = from_dict(SimulationConfig, {**asdict(start), **knobs}, "simulation")
    world.check()
    return (None, data.root) if world == start else (world, str(out / WORLDS / world.digest()))


def world_ready(root: Path | str, world: SimulationConfig) -> bool:
    """Whether a world is written and complete."""
    records = (read_record(path.parent) for path in Path(root).glob(f"*/{RECORD}"))
    return any(record is not None and record.whole and record.digest == world.digest() for record in records)
