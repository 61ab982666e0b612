"""Exact Shapley shares."""

import math
from collections.abc import Callable
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from study_fakes import TERMS, metrics, run_config, write_run, write_trial

from kdlab.config import config_hash
from kdlab.studies.results import collect
from kdlab.studies.shapley import complete_games, shapley, shares, terms_on

Subset = frozenset[str]


def game(terms: str, value: Callable[[Subset], float]) -> dict[Subset, float]:
    return {frozenset(s): value(frozenset(s)) for n in range(len(terms) + 1) for s in combinations(terms, n)}


def test_shares_are_the_mean_over_all_orders_and_add_up() -> None:
    rng = np.random.default_rng(0)
    values = game("abcd", lambda s: float(rng.normal()))
    found = shares(values, "abcd")
    for term in "abcd":
        gains = [
            values[frozenset(o[: o.index(term) + 1])] - values[frozenset(o[: o.index(term)])]
            for o in permutations("abcd")
        ]
        assert found[term] == pytest.approx(np.mean(gains), abs=1e-12)
    assert sum(found.values()) == pytest.approx(values[frozenset("abcd")] - values[frozenset()], abs=1e-12)


def test_axioms() -> None:
    gains = {"a": 0.1, "b": -0.2, "c": 0.0}
    additive = game("abc", lambda s: 0.3 + sum(gains[t] for t in s))
    assert shares(additive, "abc") == pytest.approx(gains)  # a term without effect gets nothing
    twins = game("abc", lambda s: 1.0 if {"a", "b"} <= s else 0.0)
    assert shares(twins, "abc") == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.0})  # equals get the same
    total = shares({s: 2 * additive[s] + twins[s] for s in twins}, "abc")
    assert total == pytest.approx({t: 2 * gains[t] + (0.5 if t != "c" else 0) for t in "abc"})  # linear


def subsets(study: Path, terms: tuple[str, ...], seed: int, gains: dict[str, float]) -> None:
    for size in range(len(terms) + 1):
        for on in combinations(terms, size):
            value = 0.2 + 0.01 * seed + sum(gains[t] for t in on) * (1 + seed)
            write_trial(study, "+".join(on) or "base", seed, value, on or None)


def test_from_runs(tmp_path: Path) -> None:
    gains = dict(zip(TERMS, (0.01, 0.02, -0.01, 0.0), strict=True))
    for seed in (0, 1):
        subsets(tmp_path, TERMS, seed, gains)
    write_trial(tmp_path, "base", 2, 0.5)  # a seed with nothing else does not count
    table = shapley(collect(tmp_path)).set_index("term")
    for term, gain in gains.items():
        assert table.loc[term, "share"] == pytest.approx(1.5 * gain)
        assert table.loc[term, "sd"] == pytest.approx(abs(gain) / math.sqrt(2), abs=1e-12)
    assert table.loc["all together", "share"] == pytest.approx(1.5 * 0.02)
    assert set(table["seeds"]) == {2} and list(table.index) == [*sorted(TERMS), "all together"]
    assert shapley(collect(tmp_path), "mATE").set_index("term").loc["relation", "share"] == pytest.approx(-0.03)


def test_what_differs_in_more_than_terms_takes_no_part(tmp_path: Path) -> None:
    subsets(tmp_path, ("feature", "relation"), 0, {"feature": 0.01, "relation": 0.02})
    before = shapley(collect(tmp_path))
    config = run_config(0, ("feature",), epochs=99)
    write_run(tmp_path / "longer" / f"seed0-{config_hash(config)[:8]}", config, metrics(0.9))
    config = run_config(0, ("feature",), gradients_every=7)
    write_run(tmp_path / "measured" / "seed0-again", config, metrics(0.21))  # how often it looks changes no number
    pd.testing.assert_frame_equal(shapley(collect(tmp_path)), before)


def test_some_terms_beside_others_that_stay_on(tmp_path: Path) -> None:
    for on, value in ((("feature", "relation"), 0.3), (("relation",), 0.26), ((), 0.1)):
        write_trial(tmp_path, "+".join(on) or "base", 0, value, on or None)
    table = shapley(collect(tmp_path), terms=["feature"])  # the base has relation off, too: another game
    assert table.set_index("term").loc["feature", "share"] == pytest.approx(0.04)


def test_a_game_beside_a_run_with_more_terms(tmp_path: Path) -> None:
    subsets(tmp_path, ("feature", "relation"), 0, {"feature": 0.01, "relation": 0.02})
    write_trial(tmp_path, "whole", 0, 0.9, TERMS)
    rows = collect(tmp_path)
    assert complete_games(rows) == {"unidistill": ("feature", "relation")}
    table = shapley(rows, terms=["feature", "relation"], of="unidistill").set_index("term")
    assert table.loc["feature", "share"] == pytest.approx(0.01)
    assert complete_games(rows[rows["change"] != "relation"]) == {}


def test_several_teachers_are_refused(tmp_path: Path) -> None:
    subsets(tmp_path, ("feature", "relation"), 0, {"feature": 0.01, "relation": 0.02})
    rows = collect(tmp_path)
    rows.loc[rows["change"] == "relation", "teacher"] = "another"
    with pytest.raises(
        ValueError, match="Shapley shares: the seeds of the runs of every subset had different teachers"
    ):
        shapley(rows)


def test_missing_subsets_are_named(tmp_path: Path) -> None:
    for on, seeds in (((), (0, 1)), (("feature",), (0,)), (("feature", "relation"), (0, 1))):
        for seed in seeds:
            write_trial(tmp_path, "+".join(on) or "base", seed, 0.2, on or None)
    write_trial(tmp_path, "relation", 0, None, ("relation",), finished=False)
    with pytest.raises(
        ValueError, match=r"all 4 subsets of feature, relation; missing: feature \(seed 1\); relation \(seed 0, 1\)\. "
    ):
        shapley(collect(tmp_path))


def test_errors(tmp_path: Path) -> None:
    write_trial(tmp_path, "base", 0, 0.2)
    with pytest.raises(ValueError, match="none is finished"):
        shapley(collect(tmp_path))
    write_trial(tmp_path, "all", 0, 0.2, TERMS)
    with pytest.raises(ValueError, match="no term 'nonsense' is on; on are feature"):
        shapley(collect(tmp_path), terms=["nonsense"])
    with pytest.raises(ValueError, match="at most 4 terms, got 5"):
        shapley(collect(tmp_path), terms=[*TERMS, "feature"])


def test_terms_on() -> None:
    assert terms_on(run_config()) == frozenset()
    assert terms_on(run_config(0, ())) == frozenset()
    assert terms_on(run_config(0, ("relation",))) == {"relation"}
