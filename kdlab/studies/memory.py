"""Memory that may still be used here: of the machine, and of the container where one is set a limit."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that may still be used: the least of the machine's and of what the control groups (v2) of Linux leave."""
    return min([int(psutil.virtual_memory().available), *_left_by_groups()])


def _left_by_groups() -> list[int]:
    """What the limits of this process's group and of those above it leave; files in the page cache can be let go of."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    name = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    group = CGROUPS / name
    left = []
    for folder in (group, *group.parents):
        if folder != CGROUPS and CGROUPS not in folder.parents:
            break
        try:
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                used = int((folder / "memory.current").read_text()) - _cached(folder)
                left.append(max(int(limit) - used, 0))
        except (OSError, ValueError):  # the root has no limit; not Linux; another version of control groups
            continue
    return left


def _cached(folder: Path) -> int:
    rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == "inactive_file"), 0)
