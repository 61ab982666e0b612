"""Which run folders lie below a folder, and their state."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdlab.checkpoint import RunFolder, load_run_config
from kdlab.config import RunConfig, config_hash
from kdlab.evaluate import Metrics, load_metrics

State = Literal["finished", "unfinished", "failed", "missing"]


@dataclass(frozen=True)
class RunInfo:
    """A run folder at a glance.

    Attributes:
        path: the folder.
        state: finished, unfinished, failed, or broken where a file of it cannot be read.
        modality: of the detector.
        method: that distilled it, empty without.
        teacher: run folder of the teacher as the config names it, empty without.
        seed: of the training.
        epochs: of the training.
        metrics: by split.
        size: bytes on disk.
        changed: when a file of it was last written, seconds since 1970.
        config_hash: of the config.
        why: which file cannot be read; empty where all can.
    """

    path: Path
    state: State | Literal["broken"]
    modality: str
    method: str
    teacher: str
    seed: int
    epochs: int
    metrics: Mapping[str, Metrics]
    size: int
    changed: float
    config_hash: str
    why: str = ""

    @property
    def age(self) -> float:
        """Seconds since a file of it was last written."""
        return max(time.time() - self.changed, 0.0)


def run_state(run: Path) -> tuple[State, str]:
    """State of a run folder; and the last line of its error.txt, which says why training or evaluation failed."""
    folder, error = RunFolder(run), run / "error.txt"
    lines = error.read_text(errors="replace").strip().splitlines() if error.exists() else []
    why = lines[-1] if lines else ""
    if not folder.config.exists():
        return "missing", ""
    if folder.finished:
        return "finished", why
    return ("failed" if why else "unfinished"), why


def find_runs(root: Path | str) -> list[Path]:
    """Run folders at or below a folder, sorted; links to folders are not followed, data sets not searched.

    Raises:
        FileNotFoundError: no such folder.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such folder; `kdlab train` makes run folders")
    found = []
    for path, folders, files in os.walk(root):
        if "config.json" in files and _config(Path(path)) is not None:
            found.append(Path(path))
        if Path(path) in found[-1:] or any(name.startswith("v1.0-") for name in folders):
            folders.clear()
    return sorted(found)


def _config(path: Path) -> RunConfig | None:
    """The config of a run folder; None for any other folder, such as one made for the Hugging Face hub."""
    try:
        parts = json.loads((path / "config.json").read_text()).keys() >= {"detector", "data", "train"}
        return load_run_config(path) if parts and not (path / "model.safetensors").exists() else None
    except (OSError, ValueError, AttributeError):
        return None


def list_runs(root: Path | str) -> tuple[RunInfo, ...]:
    """The run folders at or below a folder; those that are removed meanwhile are left out.

    Raises:
        FileNotFoundError: no such folder.
    """
    found = []
    for path in find_runs(root):
        with contextlib.suppress(FileNotFoundError):
            found.append(_info(path))
    return tuple(found)


def _info(path: Path) -> RunInfo:
    config = load_run_config(path)
    stats = [path.lstat(), *_stats(path)]
    metrics: Mapping[str, Metrics] = {}
    why = ""
    try:
        metrics = load_metrics(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{RunFolder(path).metrics} cannot be read ({error}); remove it and evaluate the run again"
    return RunInfo(
        path,
        "broken" if why else run_state(path)[0],
        config.detector.sensors,
        config.distill.method if config.distill is not None else "",
        config.distill.teacher if config.distill is not None else "",
        config.train.seed,
        config.train.epochs,
        metrics,
        sum(s.st_size for s in stats if not stat.S_ISDIR(s.st_mode)),
        max(s.st_mtime for s in stats),
        config_hash(config),
        why,
    )


def _stats(folder: Path) -> Iterator[os.stat_result]:
    """Of everything in a folder; what a training removes meanwhile is left out."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                yield entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                yield from _stats(Path(entry))


def find_studies(root: Path | str) -> list[Path]:
    """The study.json of studies at or below a folder, sorted; run folders, links and data sets are not searched."""
    found = []
    for path, folders, files in os.walk(root):
        if "study.json" in files:
            found.append(Path(path) / "study.json")
        if "config.json" in files or any(name.startswith("v1.0-") for name in folders):
            folders.clear()
    return sorted(found)


def table(runs: Sequence[RunInfo]) -> str:
    """Runs as plain text, one a line, with the mAP and NDS of each split that they were scored on."""
    head = ("run", "state", "detector", "method", "seed", "epochs", "size", "age", "hash", "scores")
    rows = [head, *(_cells(info) for info in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cells(info: RunInfo) -> tuple[str, ...]:
    scores = (f"{split} mAP {m.mean_ap:.3f} NDS {m.nd_score:.3f}" for split, m in info.metrics.items())
    numbers = (str(info.seed), str(info.epochs), megabytes(info.size), duration(info.age))
    words = (str(info.path), info.state, info.modality, info.method or "-")
    return (*words, *numbers, info.config_hash, info.why or ", ".join(scores) or "-")


def megabytes(size: int) -> str:
    """Bytes as megabytes."""
    return f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as the largest unit that fits: s, min, h or d."""
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
