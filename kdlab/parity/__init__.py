"""Recompute stored outputs of the methods' released code: the one place that converts foreign conventions.

A folder holds ``.npz`` files of inputs and outputs. What a file is about is told by its arrays' names, not by its own.
Every output is computed anew with the functions that training uses, all quirks on, and compared. Each paper has a
module that knows its files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdlab.parity.compare import Family, Row
from kdlab.parity.distillbev import FAMILY as DISTILLBEV
from kdlab.parity.labeldistill import FAMILY as LABELDISTILL
from kdlab.parity.simdistill import FAMILY as SIMDISTILL
from kdlab.parity.unidistill import FAMILY as UNIDISTILL

FAMILIES: tuple[Family, ...] = (UNIDISTILL, DISTILLBEV, SIMDISTILL, LABELDISTILL)
"""How each kind of file is told apart and compared; a paper adds one."""

_OTHER = (".npy", ".pt", ".pth", ".pkl", ".safetensors")


def parity(folder: Path) -> list[Row]:
    """Compare every array of every ``.npz`` file below a folder.

    A file of an unknown kind, an unreadable file, a folder without such files, arrays of another format and an array
    that nobody computes are rows that fail.

    Raises:
        FileNotFoundError: there is no such folder, or no such file in it.
    """
    files = sorted(folder.rglob("*.npz")) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{folder}: no folder with .npz files")
    rows = [row for file in files for row in _file_rows(str(file.relative_to(folder)), file)]
    unread = [name for name in sorted(path.relative_to(folder) for path in folder.rglob("*")) if _unread(folder, name)]
    return rows + [Row(str(name), "-", None, 0.0, note="only .npz files can be read") for name in unread]


def _unread(folder: Path, name: Path) -> bool:
    """It holds arrays of another format, or is a folder without a file that can be read; hidden ones do not count."""
    if any(part.startswith((".", "__")) for part in name.parts):
        return False
    path = folder / name
    return not any(path.rglob("*.npz")) if path.is_dir() else path.suffix in _OTHER


def _file_rows(name: str, file: Path) -> list[Row]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except Exception as error:  # whatever is wrong with the file, the others are still judged
        return [Row(name, "-", None, 0.0, note=f"cannot be read: {error}")]
    for family in FAMILIES:
        if family.owns(frozenset(arrays)):
            return family.rows(name, arrays) or [Row(name, "-", None, 0.0, note=f"{family.name}: holds no outputs")]
    return [Row(name, "-", None, 0.0, note=_unknown(frozenset(arrays)))]


def _unknown(names: frozenset[str]) -> str:
    near = [f"{mark} ({f.name})" for f in FAMILIES for mark in sorted(f.marks - names) if f.owns(names | {mark})]
    listed = f"no known family holds these arrays: {', '.join(sorted(names)[:8]) or 'none'}"
    return f"{listed}; one does with {' or '.join(near)}" if near else listed


def render(rows: Sequence[Row]) -> str:
    """The comparisons as a table, and a last line that counts them."""
    table = [("file", "array", "max relative error", "tolerance", "")]
    for row in rows:
        error = "-" if row.error is None else f"{row.error:.1e}"
        verdict = ("ok" if row.passed else "OFF") if row.judged else "not judged"
        table.append((row.file, row.array, error, f"{row.tolerance:.0e}", f"{verdict} {row.note}".strip()))
    widths = [max(len(line[i]) for line in table) for i in range(5)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
    off = sum(not row.passed for row in rows)
    lines.append(f"{len(rows)} arrays in {len({row.file for row in rows})} files: {off or 'none'} off")
    return "\n".join(lines)


def run(folder: Path) -> int:
    """Print a folder's table; 0 where all is well, 1 where an array is off, 2 where there is nothing to compare."""
    try:
        rows = parity(folder)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print(render(rows))
    return 0 if all(row.passed for row in rows) else 1


__all__ = ["FAMILIES", "Family", "Row", "parity", "render", "run"]
