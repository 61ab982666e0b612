"""Whether a change beats the base: paired differences by seed, their intervals, and a verdict in words.

Base and change share a seed's order of samples and augmentation, so the difference by seed is what is judged. Student's
t wants differences that are about normal; the percentile bootstrap (Efron, 1979) does not, but needs more seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from kdlab.studies.comparable import OTHER_DATA, not_comparable, twins
from kdlab.studies.plan import BASE

BEATS, DOES_NOT_BEAT, INCONCLUSIVE = "BEATS", "DOES NOT BEAT", "INCONCLUSIVE"
NOT_COMPARABLE = "NOT COMPARABLE"

SCORES = ("mAP", "NDS")
ERRORS = ("mATE", "mASE", "mAOE", "mAVE", "mAAE")
MEASURED = ("train_seconds", "train_memory_mb", "test_seconds", "test_memory_mb")
"""Costs that depend on the machine: runs of one device and number of threads alone are compared."""

OPERATIONS = ("train_gflop", "test_gflop")
"""Costs that follow from a config, see `kdlab.studies.flops`."""

COSTS = (*MEASURED[:2], "train_parameters", "teacher_parameters", *MEASURED[2:], "test_parameters", *OPERATIONS)

WORTH = {"mAP": 0.005, "NDS": 0.005, "mATE": 0.01, "mASE": 0.01, "mAOE": 0.02, "mAVE": 0.02, "mAAE": 0.01}
"""Smallest difference worth having, in the metric's unit."""

WORTH_OF_CLASS = 0.01
"""The same for the AP of one class, which varies more than the mean of ten."""

WORTH_OF_COST = 0.05
"""The same for a cost, as a share of the base's."""

MANY_SEEDS = 1000
"""More seeds than this are not counted: `math.inf` says so."""

FEW_SEEDS = 8
"""Below this the percentile bootstrap's interval is too narrow: at 5 seeds a 95 % interval covers about 83 %."""

COLUMNS = (
    *("change", "reference", "metric", "seeds", "base", "value", "difference", "sd", "low", "high", "worth"),
    *("verdict", "seeds_needed", "p", "level", "method", "note"),
)
"""Of `verdicts`."""

Kind = Literal["t", "bootstrap"]


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie.

    Attributes:
        n: values that are numbers.
        mean: of them; NaN for none.
        sd: their standard deviation (n - 1); NaN below two.
        low: lower end; NaN below two values.
        high: upper end; NaN below two values.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float

    def better(self, metric: str) -> Interval:
        """The same with better as positive: turned round for a metric of which less is better."""
        return self if higher(metric) else replace(self, mean=-self.mean, low=-self.high, high=-self.low)


def higher(metric: str) -> bool:
    """Whether more of a metric is better: scores and APs; errors and costs are not."""
    return metric in SCORES or metric.startswith("AP ")


def metrics_of(rows: pd.DataFrame) -> list[str]:
    """The metrics that a table of results has a number of: scores, errors, costs, APs by class."""
    names = [*SCORES, *ERRORS, *COSTS, *(c for c in rows.columns if c.startswith("AP "))]
    return [name for name in names if name in rows.columns and pd.to_numeric(rows[name]).notna().any()]


def interval(
    values: ArrayLike, level: float = 0.95, method: Kind = "t", resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of values and its confidence interval; what is no finite number is left out.

    Args:
        values: one per seed.
        level: share of intervals that hold the true mean.
        method: Student's t with n - 1 degrees of freedom, or the percentile bootstrap.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: an unknown method, or a level outside (0, 1).
    """
    if method not in ("t", "bootstrap"):
        raise ValueError(f"interval: unknown method {method!r}; known: t, bootstrap")
    if not 0 < level < 1:
        raise ValueError(f"interval: the level must lie between 0 and 1, got {level}")
    known = np.asarray(values, float).ravel()
    known = known[np.isfinite(known)]
    n = len(known)
    if n < 2:
        return Interval(n, float(known[0]) if n else math.nan, math.nan, math.nan, math.nan)
    mean, sd = float(known.mean()), float(known.std(ddof=1))
    if method == "t":
        half = float(stats.t.ppf((1 + level) / 2, n - 1)) * sd / math.sqrt(n)
        return Interval(n, mean, sd, mean - half, mean + half)
    means = known[np.random.default_rng(seed).integers(n, size=(resamples, n))].mean(1)
    low, high = (float(v) for v in np.quantile(means, ((1 - level) / 2, (1 + level) / 2)))
    return Interval(n, mean, sd, low, high)


def judge(better: Interval, worth: float) -> str:
    """The verdict on an interval of differences, better as positive (`Interval.better`).

    BEATS: the whole interval is better. DOES NOT BEAT: not better, or by less than ``worth`` even at its better end.
    INCONCLUSIVE: anything else, and fewer than two seeds.
    """
    if better.n < 2:
        return INCONCLUSIVE
    if better.low > 0:
        return BEATS
    return DOES_NOT_BEAT if better.high < worth or better.high <= 0 else INCONCLUSIVE


def seeds_needed(better: Interval, worth: float, level: float = 0.95) -> float:
    """Seeds after which the t interval would settle the matter, were mean and spread to stay.

    The fewest, more than there are, whose half-width is below the larger of the mean (it would be BEATS) and the
    distance from the mean to ``worth`` (DOES NOT BEAT). `math.inf` for more than MANY_SEEDS, NaN below two seeds.
    """
    if better.n < 2:
        return math.nan
    margin = max(better.mean, worth - better.mean)
    n = np.arange(better.n + 1, MANY_SEEDS + 1)
    enough = stats.t.ppf((1 + level) / 2, n - 1) * better.sd / np.sqrt(n) < margin
    return float(n[enough][0]) if enough.any() else math.inf


def worth_of(metric: str, base: float, given: Mapping[str, float] | None = None) -> float:
    """Smallest difference of a metric that is worth having.

    Args:
        metric: its name.
        base: the base's mean, of which a cost's worth is a share.
        given: values by metric that replace the defaults, in the metric's unit.
    """
    if given is not None and metric in given:
        return given[metric]
    if metric in COSTS:
        return WORTH_OF_COST * abs(base)
    return WORTH.get(metric, WORTH_OF_CLASS)


def p_value(found: Interval) -> float:
    """Two-sided p of the paired t-test that the mean difference is 0; NaN below two seeds."""
    if found.n < 2:
        return math.nan
    if found.sd == 0:
        return float(found.mean == 0)
    return float(2 * stats.t.sf(abs(found.mean) / (found.sd / math.sqrt(found.n)), found.n - 1))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values in the order given; NaN stays NaN and does not count."""
    order = [i for i in np.argsort(p) if not math.isnan(p[i])]
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def verdicts(
    rows: pd.DataFrame,
    *,
    base: str = BASE,
    worth: Mapping[str, float] | None = None,
    level: float = 0.95,
    method: Kind = "t",
    other_data: bool = False,
    adjust: str | None = None,
) -> pd.DataFrame:
    """Every change against the base, or the change that it names as its reference, on every metric.

    A change that shares its runs with its reference, or with a change before it, has no verdict of its own (`twins`).
    Nor has one whose reference has no finished run.

    Args:
        rows: finished trials (`kdlab.studies.results.collect`).
        base: the change that the others are compared with, where the rows name no ``reference``.
        worth: smallest differences worth having by metric, in place of the defaults (WORTH, 0.01 AP, 5 % of a cost).
        level: of the intervals.
        method: of the intervals, see `interval`.
        other_data: also compare changes that were scored on another data set than the base; their note says so.
        adjust: a metric on which BEATS is also judged with Holm's correction for the number of changes that have a p.

    Returns:
        One row per change and metric: change, reference, metric, seeds (paired), base, value (means over them; base is
        the reference's), difference (value - base), sd, low, high, worth, verdict, seeds_needed (NaN once settled), p,
        level, method, note, and with ``adjust`` p_holm, adjusted and comparisons (their number).

    Raises:
        ValueError: no reference, several splits, a reference on several data sets, two runs of one change and seed, or
            an option that cannot be.
    """
    check_options(worth, level, method)
    rows = rows if "reference" in rows else rows.assign(reference=base)
    judged = _pairs(rows)
    _check(rows, judged, base)
    if adjust is not None and method != "t":
        raise ValueError(
            "verdicts: Holm's correction wants p-values, which the bootstrap does not give; use method='t'"
        )
    found = []
    for change, reference in judged.items():
        ours, theirs = (rows[rows["change"] == name].set_index("seed") for name in (reference, change))
        for metric in metrics_of(rows):
            row = _verdict(ours, theirs, metric, worth, level, method, other_data)
            found.append({"change": change, "reference": reference, **row, "level": level, "method": method})
    table = pd.DataFrame(found, columns=list(COLUMNS))
    return table if adjust is None else _adjusted(table, adjust, level)


def differences(rows: pd.DataFrame, metric: str, base: str = BASE) -> pd.DataFrame:
    """Differences to the base, or the reference of a change, by seed: change, seed, difference.

    Of seeds that both have with a number.
    """
    rows = rows if "reference" in rows else rows.assign(reference=base)
    known = rows.set_index(["change", "seed"])[metric].astype(float)
    others = rows[rows["change"] != rows["reference"]]
    pairs = pd.MultiIndex.from_arrays([others["reference"], others["seed"]])
    paired = others[metric].astype(float).to_numpy() - known.reindex(pairs).to_numpy()
    return others[["change", "seed"]].assign(difference=paired).dropna()


def check_options(
    worth: Mapping[str, float] | None = None, level: float = 0.95, method: str = "t", other_data: bool = False
) -> None:
    """See that options of `verdicts` can be, before hours of training.

    Raises:
        ValueError: an unknown metric or method, a level outside (0, 1).
    """
    known = (*SCORES, *ERRORS, *COSTS)
    for metric, value in (worth or {}).items():
        if metric not in known and not metric.startswith("AP "):
            raise ValueError(f"worth: unknown metric {metric!r}; known: {', '.join(known)}, AP CLASS")
        if not value >= 0:
            raise ValueError(f"worth: {metric} wants a number from 0 on, got {value}")
    interval([], level, method)  # type: ignore[arg-type]


def _pairs(rows: pd.DataFrame) -> dict[str, str]:
    """The changes to judge, and against which each."""
    same, there = twins(rows), set(rows["change"])
    named = rows.drop_duplicates("change").set_index("change")["reference"]
    return {c: r for c, r in named.items() if c != r and r in there and c not in same}


def _check(rows: pd.DataFrame, judged: Mapping[str, str], base: str) -> None:
    missing = sorted(set(rows["reference"]) - set(rows["change"]))
    if not judged and missing:
        raise ValueError(f"no finished run of {missing[0]!r}, which the others are compared with; run the study on")
    splits = rows["split"].dropna().unique()
    if len(splits) > 1:
        raise ValueError(f"the runs were scored on several splits, {', '.join(splits)}; compare one at a time")
    twice = rows[rows.duplicated(["change", "seed"], keep=False)]
    if len(twice):
        first = twice.iloc[0]
        folders = twice[(twice["change"] == first["change"]) & (twice["seed"] == first["seed"])]["folder"]
        raise ValueError(
            f"{first['change']} has {len(folders)} runs of seed {first['seed']}: {', '.join(map(str, folders))}; "
            "move all but one out of the study"
        )
    for reference in dict.fromkeys([base, *judged.values()]):
        if rows[rows["change"] == reference]["data"].nunique() > 1:
            raise ValueError(f"the runs of {reference!r} were scored on different data sets; evaluate them on one")


def _verdict(
    ours: pd.DataFrame,
    theirs: pd.DataFrame,
    metric: str,
    worth: Mapping[str, float] | None,
    level: float,
    method: Kind,
    other_data: bool,
) -> dict[str, object]:
    shared = ours.index.intersection(theirs.index)
    pairs = pd.DataFrame({"base": ours[metric].reindex(shared), "value": theirs[metric].reindex(shared)}, dtype=float)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    reason = not_comparable(ours.reindex(pairs.index), theirs.reindex(pairs.index), metric in MEASURED)
    refused = reason if not other_data or reason != OTHER_DATA else ""
    found = interval([] if refused else pairs["value"] - pairs["base"], level, method)
    base = float(pairs["base"].mean())
    better, least = found.better(metric), worth_of(metric, base, worth)
    word = NOT_COMPARABLE if refused else judge(better, least)
    notes = [reason, *_notes(ours, theirs, pairs, better, least, word, method)]
    return {
        "metric": metric,
        "seeds": len(pairs),
        "base": base,
        "value": float(pairs["value"].mean()),
        "difference": found.mean,
        "sd": found.sd,
        "low": found.low,
        "high": found.high,
        "worth": least,
        "verdict": word,
        "seeds_needed": seeds_needed(better, least, level) if word == INCONCLUSIVE else math.nan,
        "p": p_value(found) if method == "t" else math.nan,
        "note": "; ".join(filter(None, notes)),
    }


def _notes(
    ours: pd.DataFrame,
    theirs: pd.DataFrame,
    pairs: pd.DataFrame,
    better: Interval,
    worth: float,
    word: str,
    method: Kind,
) -> list[str]:
    notes = []
    alone = sorted(set(ours.index) ^ set(theirs.index))
    lost = sorted((set(ours.index) & set(theirs.index)) - set(pairs.index))
    if alone:
        notes.append(f"without a partner: seed {', '.join(map(str, alone))}")
    if lost:
        notes.append(f"no number: seed {', '.join(map(str, lost))}")
    if better.n >= 2 and better.sd <= 1e-12 * max(abs(better.mean), 1e-12):
        notes.append("the same difference for every seed")
    elif better.n >= 2 and method == "bootstrap" and better.n < FEW_SEEDS:
        notes.append(f"a bootstrap of fewer than {FEW_SEEDS} seeds is too narrow")
    if word == BEATS and better.high < worth:
        notes.append("better, but by less than is worth having")
    if word == DOES_NOT_BEAT and better.high < 0:
        notes.append("worse than the reference")
    return notes


def _adjusted(table: pd.DataFrame, metric: str, level: float) -> pd.DataFrame:
    chosen = table["metric"] == metric
    table = table.assign(p_holm=math.nan, adjusted="", comparisons=0)
    p = table.loc[chosen, "p"].to_numpy(float)
    table.loc[chosen, "p_holm"] = holm(list(p))
    table.loc[chosen, "comparisons"] = int(np.isfinite(p).sum())
    word = table.loc[chosen, "verdict"]
    lost = (word == BEATS) & ~(table.loc[chosen, "p_holm"] < 1 - level)
    table.loc[chosen, "adjusted"] = word.where(~lost, INCONCLUSIVE)
    return table
