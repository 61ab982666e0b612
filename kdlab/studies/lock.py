"""One process at a time in a study's folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a study's folder; the lock of a process that is dead is taken over.

    Raises:
        BlockingIOError: another process runs the study, or one on another machine did not end in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a+") as file:
        # The system's own lock ends with its process; pid and host are for people, for other machines and for file
        # systems without locks.
        free = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass
        file.seek(0)
        owner = _read(file.read())
        if not free or _alive(owner):
            raise BlockingIOError(
                f"{folder} is run by process {owner.get('pid', '?')} on {owner.get('host', '?')}; "
                f"wait for it or stop it (if it no longer runs, remove {path})"
            )
        _write(file, json.dumps(_self()))
        try:
            yield
        finally:
            _write(file, "")


def _self() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "began": psutil.Process().create_time()}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the process that a lock names may still run; on another machine that cannot be seen."""
    if not owner:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    try:
        process = psutil.Process(owner["pid"])
        return bool(process.create_time() == owner["began"] and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, KeyError, ValueError):
        return False


def _read(text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text or "{}")
    except ValueError:  # half written by a process that was killed
        return {}
    return found


def _write(file: Any, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
