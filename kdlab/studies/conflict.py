"""Do the terms of a method pull the map that they share the same way? From the gradients that finished runs wrote down.

A run trained with ``train.gradients_every`` > 0 holds the cosine and norms of every two losses' gradients at that map.
Where the cosine is below 0 they are in conflict: a step down one loss is, to first order, a step up the other.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from kdlab.gradients import read_gradients

DETECTION = "detection"
"""The sum of the detection losses, to which norms are relative."""

WHOLE = "whole training"
PARTS = (WHOLE, "first third", "second third", "last third")


def conflict(rows: pd.DataFrame) -> pd.DataFrame:
    """How every two losses pull, by change and part of the training.

    Args:
        rows: finished trials (`kdlab.studies.results.collect`).

    Returns:
        One row per change, part (PARTS) and pair: change, part, first, second, cosine (mean over steps, then seeds),
        cosine_sd (over seeds; NaN for one), conflict (share of steps with a cosine below 0), conflict_sd, seeds, steps
        (in all seeds). Empty where no run wrote gradients.
    """
    found = []
    for change, seed, log in _logs(rows):
        for part, steps in _parts(log):
            for (first, second), pair in steps.groupby(["first", "second"], sort=False):
                cosine = pair["cosine"].dropna()
                if len(cosine):
                    share = float((cosine < 0).mean())
                    found.append((change, part, first, second, seed, float(cosine.mean()), share, len(cosine)))
    keys = ["change", "part", "first", "second"]
    table = pd.DataFrame(found, columns=[*keys, "seed", "cosine", "conflict", "steps"])
    return table.groupby(keys, sort=False, as_index=False).agg(
        cosine=("cosine", "mean"),
        cosine_sd=("cosine", "std"),
        conflict=("conflict", "mean"),
        conflict_sd=("conflict", "std"),
        seeds=("seed", "nunique"),
        steps=("steps", "sum"),
    )


def norms(rows: pd.DataFrame) -> pd.DataFrame:
    """How hard every loss pulls, relative to the detection losses together.

    Returns:
        One row per change, part and loss: change, part, loss, norm (mean of its gradient's norm over the mean of the
        detection losses', then over seeds), norm_sd, seeds.
    """
    found = []
    for change, seed, log in _logs(rows):
        for part, steps in _parts(log):
            first = steps[["step", "first", "first_norm"]].set_axis(["step", "loss", "norm"], axis=1)
            second = steps[["step", "second", "second_norm"]].set_axis(["step", "loss", "norm"], axis=1)
            mean = (
                pd.concat([first, second]).drop_duplicates(["step", "loss"]).groupby("loss", sort=False)["norm"].mean()
            )
            unit = float(mean.get(DETECTION, math.nan))
            found += [(change, part, loss, seed, norm / unit if unit > 0 else math.nan) for loss, norm in mean.items()]
    table = pd.DataFrame(found, columns=["change", "part", "loss", "seed", "norm"])
    return table.groupby(["change", "part", "loss"], sort=False, as_index=False).agg(
        norm=("norm", "mean"), norm_sd=("norm", "std"), seeds=("seed", "nunique")
    )


def matrix(table: pd.DataFrame, change: str, part: str = WHOLE, value: str = "cosine") -> pd.DataFrame:
    """The pairs of `conflict` as a symmetric table of losses by losses, NaN on the diagonal and where there is no pair.

    Args:
        table: what `conflict` returned.
        change: which.
        part: one of PARTS.
        value: its column.
    """
    pairs = table[(table["change"] == change) & (table["part"] == part)]
    names = list(dict.fromkeys([*pairs["first"], *pairs["second"]]))
    full = pd.DataFrame(np.full((len(names), len(names)), np.nan), index=names, columns=names)
    for first, second, number in pairs[["first", "second", value]].itertuples(index=False):
        full.loc[first, second] = full.loc[second, first] = number
    return full


def _logs(rows: pd.DataFrame) -> list[tuple[str, int, pd.DataFrame]]:
    """Change, seed and gradients of the runs that wrote any; the pair of a loss with itself says nothing."""
    logs = [
        (change, seed, read_gradients(Path(run))) for change, seed, run in rows[["change", "seed", "folder"]].values
    ]
    return [(change, seed, log[log["first"] != log["second"]]) for change, seed, log in logs if len(log)]


def _parts(log: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    third = log["step"] * 3 // (log["step"].max() + 1)
    return [(WHOLE, log), *((part, log[third == i]) for i, part in enumerate(PARTS[1:]))]
