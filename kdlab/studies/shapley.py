"""Which term of a method earned how much: exact Shapley shares from finished runs with every subset of its terms.

A term's share is its gain over all orders in which the terms could be switched on, averaged (Shapley, 1953). The shares
of a seed add up to what all terms together gain over none; an interval over seeds says how far they can be trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd

from kdlab.checkpoint import deciding, load_run_config
from kdlab.config import RunConfig
from kdlab.pairing import method_of
from kdlab.studies.comparable import mixture
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
    of: str | None = None,
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
        of: method of distillation; any where left out.
        level: of the intervals.
        method: of the intervals, see `kdlab.studies.verdict.interval`.

    Returns:
        One row per term and one, "all together", for their sum: metric, term, share (mean over seeds, in the metric's
        unit), sd, low, high, seeds.

    Raises:
        ValueError: no distilled run, more than four terms, an unknown one, no seed with every subset (the message names
            the trials that are missing), or runs of several teachers, training data or precisions.
    """
    runs = _runs(rows, metric, of)
    terms = _players(runs, terms)
    game = _game(runs, terms)
    subsets = _subsets(terms)
    whole = [seed for seed, by in game.items() if all(s in by for s in subsets)]
    if not whole:
        raise ValueError(_missing(game, subsets, metric, terms))
    part = [run for seed in whole for run in game[seed].values()]
    kinds = pd.DataFrame([run.row for run in part]).assign(change="the runs of every subset")
    if reason := mixture(kinds):
        raise ValueError(f"Shapley shares: {reason}")
    found = [shares({s: game[seed][s].value for s in subsets}, terms) for seed in whole]
    parts = {term: [by[term] for by in found] for term in terms} | {"all together": [sum(by.values()) for by in found]}
    table = []
    for term, values in parts.items():
        mean = interval(values, level, method)
        table.append((metric, term, mean.mean, mean.sd, mean.low, mean.high, mean.n))
    return pd.DataFrame(table, columns=["metric", "term", "share", "sd", "low", "high", "seeds"])


def complete_games(rows: pd.DataFrame, metric: str = "mAP") -> dict[str, tuple[str, ...]]:
    """By method of distillation, the most terms, two to four, of which some seed has a run of every subset."""
    runs = _runs(rows, metric)
    found: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(run.config.distill.method for run in runs if run.config.distill is not None):
        mine = [run for run in runs if run.config.distill is None or run.config.distill.method == name]
        known = sorted(frozenset[str]().union(*(run.on for run in mine)))
        sizes = range(min(MAX_TERMS, len(known)), 1, -1)
        for terms in (t for size in sizes for t in combinations(known, size)):
            if any(len(by) == 2 ** len(terms) for by in _game(mine, terms).values()):
                found[name] = terms
                break
    return found


def terms_on(config: RunConfig) -> Subset:
    """Names of the distillation terms that a run has on: their weight is not 0. Empty without distillation.

    Raises:
        ValueError: the method is unknown or has no such path.
    """
    method = method_of(config)
    return frozenset() if method is None else frozenset(term.name for term in method.active)


def _setting(config: RunConfig, off: Subset) -> str:
    """What decides a run beside its seed and the terms that are off in it."""
    plain = deciding(config)
    plain["train"].pop("seed")
    for name in ("weights", "scales") if plain["distill"] is not None else ():
        plain["distill"][name] = {k: v for k, v in plain["distill"][name].items() if k not in off}
    return json.dumps(plain, sort_keys=True)


@dataclass(frozen=True)
class _Run:
    config: RunConfig
    on: Subset
    value: float
    row: Mapping[Hashable, Any]


def _runs(rows: pd.DataFrame, metric: str, of: str | None = None) -> list[_Run]:
    """The runs with a number, of one method or any, and those without distillation."""
    found = []
    for row in rows.to_dict("records"):
        config = load_run_config(row["folder"])
        if math.isfinite(row[metric]) and (of is None or config.distill is None or config.distill.method == of):
            found.append(_Run(config, terms_on(config), float(row[metric]), row))
    return found


def _players(runs: Sequence[_Run], terms: Sequence[str] | None) -> tuple[str, ...]:
    most = max((run.on for run in runs), key=len, default=frozenset[str]())
    if not most:
        raise ValueError("Shapley shares want runs with distillation; none is finished")
    players = tuple(sorted(most) if terms is None else terms)
    _check(players, frozenset[str]().union(*(run.on for run in runs)))
    return players


def _game(runs: Sequence[_Run], terms: Sequence[str]) -> dict[int, dict[Subset, _Run]]:
    """By seed, the run of every subset that was run: of the settings with all terms on, the one with the most."""
    players = frozenset(terms)
    found: list[dict[int, dict[Subset, _Run]]] = [{}]
    settings = set[str]()
    for full in (run for run in runs if players <= run.on):
        setting = _setting(full.config, frozenset())
        if setting in settings:
            continue
        settings.add(setting)
        game: dict[int, dict[Subset, _Run]] = {}
        for run in runs:
            if _takes_part(run, full, players):
                game.setdefault(run.config.train.seed, {})[run.on & players] = run
        found.append(game)
    return max(found, key=lambda game: sum(map(len, game.values())))


def _takes_part(run: _Run, full: _Run, players: Subset) -> bool:
    """Whether a run differs from one with all terms in nothing but its seed and which of the players are off."""
    if run.config.distill is None:
        return full.on == players and _setting(run.config, players) == _setting(_without(full.config), players)
    off = players - run.on
    return run.on | off == full.on and _setting(run.config, off) == _setting(full.config, off)


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
    games: Mapping[int, Mapping[Subset, _Run]], subsets: Sequence[Subset], metric: str, terms: Sequence[str]
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
