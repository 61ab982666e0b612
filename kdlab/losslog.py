"""The loss log of a run, losses.csv: one row per step, each step once, whatever was killed in between."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from kdlab.checkpoint import replacing


def keep_rows(path: Path, before: int) -> list[str]:
    """Drop the rows of a CSV file with a column ``step`` that are of this step or later, and one that a kill cut short.

    Returns:
        The file's columns; none where there is no row left, the file is then empty.
    """
    lines = whole_lines(path)
    names = next(csv.reader(lines[:1]), [])
    kept = [line for line, row in zip(lines[1:], csv.DictReader(lines), strict=True) if float(row["step"]) < before]
    with replacing(path) as part:
        part.write_bytes("".join([*lines[:1], *kept] if kept else []).encode())
    return names if kept else []


class LossLog:
    """losses.csv: one row per step, each step once, also over kills and resumes.

    Args:
        path: the file.
        keep: rows of steps before this one stay, later ones are dropped (they will be trained again).
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.names = keep_rows(path, keep)
        self._file = open(path, "a", newline="")  # noqa: SIM115 - held over the training

    def add(self, row: Mapping[str, float]) -> None:
        """Write one row.

        Raises:
            RuntimeError: the row has other columns than those before.
        """
        writer = csv.writer(self._file)
        if not self.names:
            self.names = list(row)
            writer.writerow(self.names)
        if list(row) != self.names:
            raise RuntimeError(f"{self.path}: losses are {', '.join(row)}; before they were {', '.join(self.names)}")
        writer.writerow([_cell(v) for v in row.values()])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cell(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


def whole_lines(path: Path) -> list[str]:
    """Lines of a file with their ends; a last one that a kill cut short is left out, an absent file has none."""
    text = path.read_bytes().decode() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines(keepends=True)


def read_losses(path: Path) -> list[dict[str, float]]:
    """Rows of losses.csv; a last row that a kill cut short is left out, an absent file has none."""
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(whole_lines(path))]
