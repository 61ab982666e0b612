"""Trained weights that come with a checkout: in half precision, each for the simulated world that it was trained on.

python -m kdlab.shipping RUN=NAME ...
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from kdlab.checkpoint import RunFolder, load_run_config, replacing, write_json
from kdlab.config import RunConfig, save_config
from kdlab.data.nuscenes import NuScenesDataset, find_version
from kdlab.data.simulate_config import SimulationConfig
from kdlab.data.simulate_record import read_record

WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "weights"
"""Shipped weights, in a checkout."""

LOGS = ("losses.csv", "metrics.json", "cost.json")
"""What goes with them as it is, as far as it is there."""

LIMIT = 4e6
"""Bytes that a shipped file of weights may have."""

ADAPTERS = 2e6
"""Adapters of more bytes than this, in full precision, stay behind: all that is shipped is to be below 25 MB."""


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
    record = read_record(Path(root) / find_version(Path(root), version))
    if record is None or not record.complete:
        raise ValueError(f"{root} is no finished simulated world; weights are shipped for those alone")
    return record.digest


def ship(run: Path | str, name: str) -> Path:
    """Write a finished run's networks, in half precision, with its logs to the `weights_of` its world.

    What was shipped there before is replaced as a whole, and stays where anything is wrong.

    Args:
        run: run folder, on a simulated world that is still where it was.
        name: what it is called there.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: no run or no data set.
        ValueError: the run is not finished; its world is no simulated one, or another than it was trained on; a file is
            larger than `LIMIT`, or holds what half precision cannot.
    """
    source = RunFolder(Path(run))
    config = load_run_config(source.path)
    if not source.finished:
        raise ValueError(f"{source.path} is not finished; run its `kdlab train` again to go on")
    made = json.loads(source.versions.read_text())
    dataset = NuScenesDataset(config.data.root, config.data.version, config.data.train, images=False, points=False)
    if made["data"] != dataset.digest:
        raise ValueError(f"{source.path} was trained on another data set than lies at {config.data.root} now")
    to = weights_of(name, _whole_world(config))
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _copy(source, RunFolder(part))
        save_config(_portable(config), RunFolder(part).config)
        write_json(RunFolder(part).versions, {key: value for key, value in made.items() if key != "command"})
        for stage in sorted((source.path / "stages").glob("*")):
            _copy(RunFolder(stage), RunFolder(part / "stages" / stage.name))
        shutil.rmtree(to, ignore_errors=True)
        part.rename(to)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return to


def _whole_world(config: RunConfig) -> str:
    """Digest of the world that a run was trained on; a part of a world shares it, but makes no weights to ship."""
    record = read_record(Path(config.data.root) / find_version(Path(config.data.root), config.data.version))
    if record is not None and record.scenes is not None:
        raise ValueError(f"{config.data.root} holds a part of a world; weights are shipped for whole ones alone")
    return world_of(config.data.root, config.data.version)


def _portable(config: RunConfig) -> RunConfig:
    """Without paths of this machine."""
    data = replace(config.data, root="data/sim", version=None, image_cache="")
    distill = config.distill and replace(config.distill, teacher=_below(config.distill.teacher), cache="")
    train = replace(config.train, camera_start=_below(config.train.camera_start))
    return replace(config, data=data, distill=distill, train=train)


def _below(path: str) -> str:
    """A path relative to the working folder; of one that lies elsewhere, its name."""
    absolute = Path(path).resolve()
    if not path or absolute.is_relative_to(Path.cwd()):
        return path and str(absolute.relative_to(Path.cwd()))
    return absolute.name


def _copy(source: RunFolder, to: RunFolder) -> None:
    to.path.mkdir(parents=True)
    for log in LOGS:
        if (source.path / log).exists():
            shutil.copy(source.path / log, to.path / log)
    _halve(source.weights, to.weights)
    if source.distiller.exists() and source.distiller.stat().st_size < ADAPTERS:
        _halve(source.distiller, to.distiller)


def _halve(source: Path, to: Path) -> None:
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(source).items()}
    wrong = next((name for name, t in tensors.items() if not t.isfinite().all()), None)
    if wrong is not None:
        raise ValueError(f"{source}: {wrong} is not finite in half precision")
    size = sum(t.nbytes for t in tensors.values())
    if size > LIMIT:
        raise ValueError(f"{source}: {size / 1e6:.1f} MB in half precision; at most {LIMIT / 1e6:.0f} MB are shipped")
    with replacing(to) as part:
        save_file(tensors, part)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        folder, _, called = given.partition("=")
        print(ship(folder, called))
