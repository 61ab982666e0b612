"""Removes what is no longer needed from run folders, and never a finished run's weights unless that run is named."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from kdlab.checkpoint import RunFolder, load_run_config
from kdlab.runs.listing import RunInfo, duration, find_studies, list_runs, megabytes

Kind = Literal["checkpoints", "results", "tensorboard", "unfinished"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MADE = (
    "detector.safetensors",  # first: without it the run does not count as finished
    *("metrics.json", "validation.json", "losses.csv", "gradients.csv", "cost.json", "error.txt", "trial.json"),
    *("results_*.json", "log.txt", ".lock", ".*.part", "distiller.safetensors", "checkpoint", "tensorboard", "stages"),
    *("versions.json", "config.json"),  # last: until then it is a run folder
)
"""What a run writes into its folder: nothing else is ever removed."""

QUIET_SECONDS = 600
"""A run in which nothing was written for so long is not being trained."""

DAY = 86400.0

_ROLES = {"teacher": "teacher", "camera_start": "camera start"}  # what a run is to another, by key of versions.json
_Use = tuple[Path, str, str]  # run or study, the run that its config names, key of the role


@dataclass(frozen=True)
class Pruning:
    """What `prune` removed, or would remove.

    Attributes:
        paths: files and folders, with their bytes.
        kept: run folders left alone, with the reason.
        done: whether they were removed.
    """

    paths: dict[Path, int]
    kept: dict[Path, str]
    done: bool

    def text(self) -> str:
        """One line per path, the reasons, the sum."""
        lines = [f"{megabytes(size):>10s}  {path}" for path, size in self.paths.items()]
        lines += [f"{'kept':>10s}  {path}: {why}" for path, why in self.kept.items()]
        verb = "removed" if self.done else "would be removed; --yes removes it"
        return "\n".join([*lines, f"{megabytes(sum(self.paths.values()))} {verb}"])


def prune(
    root: Path | str,
    what: Collection[Kind] = (),
    *,
    runs: Sequence[Path | str] = (),
    older_than: float = 7.0,
    yes: bool = False,
) -> Pruning:
    """Remove what is no longer needed from the runs at or below a folder; only tells what it would do by default.

    The weights of a finished run stay unless ``runs`` names it; a run that is being written, anything behind a link and
    files that no run writes always stay.

    Args:
        root: folder of runs.
        what: "unfinished": runs that did not end or failed. Of finished runs: "checkpoints", "tensorboard", and
            "results", the result files of splits whose metrics are stored (`kdlab evaluate` makes them again).
        runs: finished or unfinished runs to remove, weights and all.
        older_than: days for which nothing was written in a run; those named in ``runs`` may be younger.
        yes: do it.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an unknown kind; or a run that lies outside the root, is no run folder, is a link, is being written,
            or is the teacher or camera start of another run, or of a study, at or below the root.
    """
    unknown = [kind for kind in what if kind not in KINDS]
    if unknown:
        raise ValueError(f"prune: unknown kind {unknown[0]!r}; known: {', '.join(KINDS)}")
    infos, kept = list_runs(root), dict[Path, str]()
    uses = [use for info in infos for use in _uses(info)] + _planned(root)
    named = {_named(Path(run), Path(root), infos, uses) for run in runs}
    sizes = dict[Path, int]()
    for info in infos:
        chosen = _made(info.path, MADE) if info.path in named else _chosen(info, what)
        why = "" if info.path in named or not chosen else _reason(info, uses, older_than)
        if why:
            kept[info.path] = why
            continue
        with _held(info.path) if yes and chosen else contextlib.nullcontext(True) as free:
            if not free:  # since it was looked at
                kept[info.path] = "is being trained"
                continue
            sizes |= {path: _size(path) for path in chosen}
            if yes:
                _remove(chosen)
    for folder in {path.parent for path in sizes} if yes else ():
        with contextlib.suppress(OSError):  # holds something that no run writes, or the rest of a finished run
            folder.rmdir()
    return Pruning(sizes, kept, yes)


def _uses(info: RunInfo) -> list[_Use]:
    """What a run takes from other runs."""
    start = ""
    with contextlib.suppress(OSError, ValueError):
        start = load_run_config(info.path).train.camera_start
    return [(info.path, info.teacher, "teacher"), (info.path, start, "camera_start")]


def _planned(root: Path | str) -> list[_Use]:
    """What the studies at or below a folder take from runs."""
    found = []
    for path in find_studies(root):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            plan = json.loads(path.read_text())
            for section, key in (("distill", "teacher"), ("train", "camera_start")):
                names = [change["set"].get(f"{section}.{key}") for change in plan["changes"]]
                names.append((plan["base"].get(section) or {}).get(key))
                found += [(path, name, key) for name in names if name]
    return found


@contextlib.contextmanager
def _held(run: Path) -> Iterator[bool]:
    """Hold a run's lock, so that no process of a study begins to train it; False where one does already."""
    lock, new = run / ".lock", not (run / ".lock").exists()
    try:
        with open(lock, "a") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield False
                    return
            yield True
            if new:
                lock.unlink(missing_ok=True)
    except PermissionError as error:
        raise PermissionError(f"{run} cannot be written to; nothing of it was removed") from error


def _chosen(info: RunInfo, what: Collection[Kind]) -> list[Path]:
    """Files and folders of the kinds that a run has."""
    if info.state == "broken":
        return []
    if info.state != "finished":
        return _made(info.path, MADE) if "unfinished" in what else []
    patterns = {
        "checkpoints": ["checkpoint"],
        "tensorboard": ["tensorboard"],
        "results": [f"results_{split}.json" for split in info.metrics],
    }
    return _made(info.path, [pattern for kind in what for pattern in patterns.get(kind, ())])


def _made(run: Path, patterns: Iterable[str]) -> list[Path]:
    found = [path for pattern in patterns for path in sorted(run.glob(pattern))]
    return [path for path in found if not path.is_symlink()]


def _reason(info: RunInfo, uses: Sequence[_Use], older_than: float) -> str:
    """Why a run that nobody named is left alone; empty where nothing speaks for it."""
    if busy := _busy(info):
        return busy
    if info.age < older_than * DAY:
        return f"was written {info.age / DAY:.1f} days ago, less than {older_than:g}"
    role = _role(info, uses) if info.state != "finished" else ""
    return f"is {role}" if role else ""


def _named(run: Path, root: Path, infos: Sequence[RunInfo], uses: Sequence[_Use]) -> Path:
    """The listed folder of a run that a person named for removal, weights and all.

    Raises:
        ValueError: it must not be removed.
    """
    found = [i for i in infos if not run.is_symlink() and i.path.resolve() == run.resolve()]
    if not found:
        raise ValueError(f"{run} is no run folder at or below {root}, or a link; nothing was removed")
    if busy := _busy(found[0]):
        raise ValueError(f"{run} {busy}; nothing was removed")
    if role := _role(found[0], uses):
        raise ValueError(f"{run} is {role}, which names it in its config; nothing was removed")
    return found[0].path


def _busy(info: RunInfo) -> str:
    """Why a run may be in use; empty where it is not."""
    if _locked(info.path):
        return "is being trained"
    return f"was written {duration(info.age)} ago and may be in use" if info.age < QUIET_SECONDS else ""


def _locked(run: Path) -> bool:
    """Whether a process of a study holds the run, or the study that it lies in (STUDY/CHANGE/RUN)."""
    for lock in (run / ".lock", run.parent.parent / ".lock"):
        with contextlib.suppress(FileNotFoundError, PermissionError), open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:  # a file system without locks
                continue
    return False


def _role(info: RunInfo, uses: Sequence[_Use]) -> str:
    """What a run is to another run or a study that uses it, in words; empty where none does.

    It is known by the path that the other names, wherever that ran, or by the weights' digest.
    """
    own, folder = info.path.resolve(), RunFolder(info.path)
    digest = folder.digest if folder.finished else None
    for other, named, key in uses:
        words = tuple(part for part in Path(named).parts if part not in ("..", "/"))
        by_path = bool(words) and own.parts[-len(words) :] == words
        if other != info.path and (by_path or (digest is not None and digest == _noted(other, key))):
            return f"the {_ROLES[key]} of {other}"
    return ""


def _noted(run: Path, key: str) -> str | None:
    """The digest of a run's teacher or camera start as its versions.json has it."""
    versions = RunFolder(run).versions
    found: str | None = json.loads(versions.read_text()).get(key) if versions.exists() else None
    return found


def _size(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
