"""One array against another: rows, families of files, and how far off a number is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        file: path below the folder.
        array: name; "-" where the file as a whole is meant.
        error: greatest relative difference, see `compare`; None where nothing could be computed.
        tolerance: what the error may be.
        judged: whether it counts.
        note: why there is no error, or what is special.
    """

    file: str
    array: str
    error: float | None
    tolerance: float
    judged: bool = True
    note: str = ""

    @property
    def passed(self) -> bool:
        """Within the tolerance, or not judged."""
        return not self.judged or (self.error is not None and self.error <= self.tolerance)


class Inputs:
    """The arrays of a file, or of a group in it with one prefix and those without; what a family's cases build on.

    Args:
        arrays: of the file.
        prefix: of the group, with its slash.
    """

    def __init__(self, arrays: Arrays, prefix: str = "") -> None:
        self.arrays, self.prefix = arrays, prefix

    def given(self, name: str) -> Tensor:
        """An input of the group, or of the file.

        Raises:
            KeyError: there is none.
        """
        for key in (self.prefix + name, name):
            if key in self.arrays:
                return torch.from_numpy(np.array(self.arrays[key]))
        raise KeyError(f"needs the input {self.prefix}{name}")


@dataclass(frozen=True)
class Family:
    """Files of one kind.

    Attributes:
        name: for messages.
        owns: from a file's array names, whether it is of this kind.
        rows: from a file's name and arrays, its comparisons.
        marks: arrays by which such files are known, to say what a file lacks.
    """

    name: str
    owns: Callable[[frozenset[str]], bool]
    rows: Callable[[str, Arrays], list[Row]]
    marks: frozenset[str]


def not_computed(array: str, names: frozenset[str], kinds: Iterable[tuple[Iterable[str], Iterable[str]]]) -> str:
    """Why nothing computes an array: the fewest inputs that a kind of file would need for it, or no kind has it.

    Args:
        array: its name.
        names: of the arrays that there are.
        kinds: marks of each kind of file, and patterns of its outputs.
    """
    asked = (set(marks) - names for marks, outputs in kinds if any(re.fullmatch(o, array) for o in outputs))
    least = min((lacking for lacking in asked if lacking), key=len, default=None)
    return f"needs the input {', '.join(sorted(least))}" if least else "nothing computes this array"


def compare(
    name: str,
    array: str,
    ours: Tensor,
    stored: np.ndarray[Any, Any],
    tolerance: float,
    scale: float | np.ndarray[Any, Any] | None = None,
) -> Row:
    """A row for one array; shapes must be equal, and so must be where numbers are not finite.

    Args:
        name: of the file.
        array: its name.
        ours: computed anew.
        stored: in the file.
        tolerance: what the error may be.
        scale: what differences are relative to, one number or one per entry; by default the greater of 1 and |stored|.
    """
    mine = ours.detach().to("cpu", torch.float64).numpy()
    theirs = np.asarray(stored, dtype=np.float64)
    if mine.shape != theirs.shape:
        return Row(name, array, None, tolerance, note=f"is {mine.shape} here and {theirs.shape} in the file")
    if not mine.size:
        return Row(name, array, 0.0, tolerance, note="empty")
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(mine - theirs) / (np.maximum(1, np.abs(theirs)) if scale is None else scale)
    same = (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))
    return Row(name, array, float(np.where(same, 0.0, np.nan_to_num(error, nan=np.inf)).max()), tolerance)
