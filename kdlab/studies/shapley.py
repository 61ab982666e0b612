"""Which term of a method earned how much: exact Shapley shares from finished runs with every subset of its terms.

A term's share is its gain over all orders in which the terms could be switched on, averaged (Shapley, 1953). The shares
of a seed add up to what all terms together gain over none; an interval over seeds says how far they can be trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd

from kdlab.checkpoint import NEUTRAL, load_run_config
from kdlab.config import RunConfig, to_dict
from kdlab.studies.plan import method_of
from kdlab.studies.verdict import Kind, interval

MAX_TERMS = 4
"""More would need more than 16 runs a seed."""

Subset = frozenset[str]


def shares(values: Mapping[Subset, float], terms: Sequence[str]) -> dict[str, float]:
    """Shapley share of every term.

    Args:
        values: the metric of every subset of the terms.
        terms: names.

    Raises:
        KeyError: a subset has no value.
    """
    n = len(terms)
    found = dict.fromkeys(terms, 0.0)
    for term in terms:
        others = [t for t in terms if t != term]
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for subset in map(frozenset, combinations(others, size)):
                found[term] += weight * (values[subset | {term}] - values[subset])
    return found


def shapley(
    rows: pd.DataFrame,
    metric: str = "mAP",
    terms: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    method: Kind = "t",
) -> pd.DataFrame:
    """Shapley shares of a metric by term, over the seeds that have a run of every subset.

    Runs that differ in anything but the seed and which of the terms are on do not take part. A run without distillation
    is the one without terms, if there are no other terms.

    Args:
        rows: finished trials (`kdlab.studies.results.collect`).
        metric: a column of it.
        terms: at most four; by default all that are on in the run with the most.
        level: of the intervals.
        method: of the intervals, see `kdlab.studies.verdict.interval`.

    Returns:
        One row per term and one, "all together", for their sum: metric, term, share (mean over seeds, in the metric's
        unit), sd, low, high, seeds.

    Raises:
        ValueError: no distilled run, more than four terms, an unknown one, or no seed with every subset; the message
            names the trials that are missing.
    """
    games, terms = _games(rows, metric, terms)
    subsets = _subsets(terms)
    whole = [seed for seed, game in games.items() if all(s in game for s in subsets)]
    if not whole:
        raise ValueError(_missing(games, subsets, metric, terms))
    found = [shares(games[seed], terms) for seed in whole]
    parts = {term: [by[term] for by in found] for term in terms} | {"all together": [sum(by.values()) for by in found]}
    table = []
    for term, values in parts.items():
        mean = interval(values, level, method)
        table.append((metric, term, mean.mean, mean.sd, mean.low, mean.high, mean.n))
    return pd.DataFrame(table, columns=["metric", "term", "share", "sd", "low", "high", "seeds"])


def terms_on(config: RunConfig) -> Subset:
    """Names of the distillation terms that a run has on: their weight is not 0. Empty without distillation.

    Raises:
        ValueError: the method is unknown or has no such path.
    """
    method = method_of(config)
    return frozenset() if method is None else frozenset(term.name for term in method.active)


def _setting(config: RunConfig, off: Subset) -> str:
    """What decides a run beside its seed and the terms that are off in it."""
    plain = to_dict(config)
    plain["train"].pop("seed")
    for key in NEUTRAL:
        section, name = key.split(".")
        plain[section].pop(name)
    for name in ("weights", "scales") if plain["distill"] is not None else ():
        plain["distill"][name] = {k: v for k, v in plain["distill"][name].items() if k not in off}
    return json.dumps(plain, sort_keys=True)


def _games(
    rows: pd.DataFrame, metric: str, terms: Sequence[str] | None
) -> tuple[dict[int, dict[Subset, float]], tuple[str, ...]]:
    """By seed, the metric of every subset that was run; and the terms."""
    runs = [(load_run_config(run), value) for run, value in zip(rows["folder"], rows[metric], strict=True)]
    on = [terms_on(config) for config, _ in runs]
    most = max(on, key=len, default=frozenset())
    if not most:
        raise ValueError("Shapley shares want runs with distillation; none is finished")
    players = tuple(sorted(most) if terms is None else terms)
    _check(players, most)
    found: list[dict[int, dict[Subset, float]]] = []
    for full in (config for (config, _), active in zip(runs, on, strict=True) if active == most):
        games: dict[int, dict[Subset, float]] = {}
        for (config, value), active in zip(runs, on, strict=True):
            if _takes_part(config, active, full, most, frozenset(players)) and math.isfinite(value):
                games.setdefault(config.train.seed, {})[active & set(players)] = float(value)
        found.append(games)
    return max(found, key=lambda games: sum(map(len, games.values()))), players


def _takes_part(config: RunConfig, active: Subset, full: RunConfig, most: Subset, players: Subset) -> bool:
    """Whether a run differs from the one with all terms in nothing but its seed and which of the players are off."""
    if config.distill is None:
        return most == players and _setting(config, players) == _setting(_without(full), players)
    off = players - active
    return active | off == most and _setting(config, off) == _setting(full, off)


def _without(config: RunConfig) -> RunConfig:
    return RunConfig(config.detector, config.data, config.train, None)


def _check(players: Sequence[str], known: Subset) -> None:
    unknown = [term for term in players if term not in known]
    if unknown:
        raise ValueError(f"Shapley shares: no term {unknown[0]!r} is on; on are {', '.join(sorted(known))}")
    if len(players) > MAX_TERMS:
        raise ValueError(
            f"Shapley shares want at most {MAX_TERMS} terms, got {len(players)}; name them among {', '.join(players)}"
        )


def _subsets(terms: Sequence[str]) -> list[Subset]:
    return [frozenset(s) for size in range(len(terms) + 1) for s in combinations(terms, size)]


def _missing(
    games: Mapping[int, Mapping[Subset, float]], subsets: Sequence[Subset], metric: str, terms: Sequence[str]
) -> str:
    lines = []
    for subset in subsets:
        seeds = [seed for seed, game in games.items() if subset not in game]
        if seeds:
            name = " + ".join(t for t in terms if t in subset) or "no term"
            lines.append(f"{name} (seed {', '.join(map(str, sorted(seeds)))})")
    return (
        f"Shapley shares of {metric} want a finished run of all {len(subsets)} subsets of {', '.join(terms)}; "
        f"missing: {'; '.join(lines)}. A weight of 0 in distill.weights switches a term off"
    )
