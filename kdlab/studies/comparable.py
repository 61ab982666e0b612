"""Whether runs may be compared: nothing but what a study changes may differ between them."""

from __future__ import annotations

import pandas as pd

OTHER_DATA = "another data set than the reference's"
"""What may be compared where a person asks for it."""


def not_comparable(ours: pd.DataFrame, theirs: pd.DataFrame, measured: bool) -> str:
    """Why the runs of a change cannot be compared with those of its reference; empty where they can.

    Args:
        ours: rows of the reference (`kdlab.studies.results.collect`).
        theirs: of the change.
        measured: compare what depends on the machine.
    """
    both = pd.concat([ours, theirs])
    mixed = mixture(ours) or mixture(theirs) or _another(ours, theirs)
    if mixed:
        return mixed
    if both["data"].nunique() > 1:
        return OTHER_DATA
    if measured and both["device"].nunique() > 1:
        return "measured on another device than the reference's"
    if measured and _several(both, "threads"):
        return "measured with another number of threads than the reference's"
    return ""


def mixture(runs: pd.DataFrame) -> str:
    """Why runs that should differ in nothing but the seed are no sample of one thing; empty where they are."""
    name = runs["change"].iloc[0] if len(runs) else ""
    if _several(runs, "teacher"):
        return f"the seeds of {name} had different teachers"
    if _several(runs, "train_data"):
        return f"the seeds of {name} were trained on different data"
    return f"the seeds of {name} were trained in different precision" if _several(runs, "precision") else ""


def _another(ours: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """What differs between runs without being asked for."""
    both = pd.concat([ours, theirs])
    if _several(both, "precision") and not _several(both, "wanted_precision"):
        return "trained in another precision than the reference"
    if {"teacher", "teacher_run"} <= set(both) and (both.groupby("teacher_run")["teacher"].nunique() > 1).any():
        return "the teacher was trained again in between"
    return ""


def _several(runs: pd.DataFrame, column: str) -> bool:
    return column in runs and runs[column].nunique() > 1


def twins(rows: pd.DataFrame) -> dict[str, str]:
    """Changes that are the very runs of their reference, or of another change with that reference; and of which."""
    folders = {change: frozenset(group["folder"]) for change, group in rows.groupby("change", sort=False)}
    found, first = dict[str, str](), dict[tuple[str, frozenset[str]], str]()
    for change, group in rows.groupby("change", sort=False):
        reference = group["reference"].iloc[0]
        if reference != change and folders[change] == folders.get(reference):
            found[change] = reference
        elif (other := first.setdefault((reference, folders[change]), change)) != change:
            found[change] = other
    return found
