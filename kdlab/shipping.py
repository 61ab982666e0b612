"""Trained weights that come with a checkout: in half precision, each for the simulated world that it was trained on."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from kdlab.checkpoint import RunFolder, load_run_config, replacing
from kdlab.config import RunConfig, save_config
from kdlab.data.nuscenes import find_version
from kdlab.data.simulate_config import SimulationConfig

WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "weights"
"""Shipped weights, in a checkout."""

LOGS = ("losses.csv", "metrics.json", "versions.json", "cost.json", "gate.json")
"""What goes with them, as far as it is there."""

LIMIT = 4e6
"""Bytes that a shipped file may have."""


def weights_of(name: str, world: SimulationConfig | str) -> Path:
    """Where a network that was trained on a world is shipped, if it is.

    Another world's test scenes may have been among its training scenes: it serves its own world alone.

    Args:
        name: ``lidar``, ``fusion``, ``camera``, ``unidistill``, ...
        world: settings of the world, or their digest.
    """
    return WEIGHTS / f"{name}-{world if isinstance(world, str) else world.digest()}"


def world_of(root: Path | str, version: str | None = None) -> str:
    """Digest of the simulated world at a root.

    Raises:
        FileNotFoundError: no data set at the root.
        ValueError: the data set is no finished simulated one.
    """
    record = Path(root) / find_version(Path(root), version) / "simulation.json"
    known = json.loads(record.read_text()) if record.exists() else {"complete": False}
    if not known["complete"]:
        raise ValueError(f"{root} is no finished simulated world; weights are shipped for those alone")
    return str(known["digest"])


def ship(run: Path | str, name: str) -> Path:
    """Write a finished run's networks, in half precision, with its logs to the `weights_of` its world.

    Args:
        run: run folder, on a simulated world that is still where it was.
        name: what it is called there.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: no run or no data set.
        ValueError: the run is not finished, its world is no simulated one, a file is larger than `LIMIT`.
    """
    source = RunFolder(Path(run))
    config = load_run_config(source.path)
    if not source.finished:
        raise ValueError(f"{source.path} is not finished; run its `kdlab train` again to go on")
    to = RunFolder(weights_of(name, world_of(config.data.root, config.data.version)))
    _copy(source, to, config)
    for stage in sorted((source.path / "stages").glob("*")):
        _copy(RunFolder(stage), RunFolder(to.path / "stages" / stage.name), None)
    return to.path


def _copy(source: RunFolder, to: RunFolder, config: RunConfig | None) -> None:
    to.path.mkdir(parents=True, exist_ok=True)
    if config is not None:
        save_config(
            replace(config, data=replace(config.data, root="data/sim", version=None, image_cache="")), to.config
        )
    for log in LOGS:
        if (source.path / log).exists():
            shutil.copy(source.path / log, to.path / log)
    for weights, smaller in ((source.distiller, to.distiller), (source.weights, to.weights)):
        if weights.exists():
            _halve(weights, smaller)


def _halve(source: Path, to: Path) -> None:
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(source).items()}
    size = sum(t.nbytes for t in tensors.values())
    if size > LIMIT:
        raise ValueError(
            f"{source}: {size / 1e6:.1f} MB in half precision, more than the {LIMIT / 1e6:.0f} MB that are shipped"
        )
    with replacing(to) as part:
        save_file(tensors, part)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        folder, _, called = given.partition("=")
        print(ship(folder, called))
