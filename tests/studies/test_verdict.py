"""Paired differences, intervals and the words for them."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from study_fakes import rows_of

from kdlab.studies.comparable import twins
from kdlab.studies.verdict import (
    BEATS,
    DOES_NOT_BEAT,
    INCONCLUSIVE,
    NOT_COMPARABLE,
    Interval,
    check_options,
    differences,
    holm,
    interval,
    judge,
    seeds_needed,
    verdicts,
)


def only(table: pd.DataFrame, metric: str = "mAP") -> pd.Series:
    rows = table[table["metric"] == metric]
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_as_scipy_paired_t(level: float) -> None:
    rng = np.random.default_rng(0)
    base, ours = rng.normal(0.2, 0.02, 7), rng.normal(0.21, 0.02, 7)
    row = only(verdicts(rows_of({"base": base, "x": ours}), level=level))
    expected = stats.ttest_rel(ours, base)
    low, high = expected.confidence_interval(level)
    assert row["p"] == pytest.approx(expected.pvalue, rel=1e-12)
    assert (row["low"], row["high"]) == pytest.approx((low, high), rel=1e-12)
    assert row["difference"] == pytest.approx((ours - base).mean()) and row["sd"] == pytest.approx(
        np.std(ours - base, ddof=1)
    )
    assert (row["seeds"], row["base"], row["value"]) == (7, pytest.approx(base.mean()), pytest.approx(ours.mean()))


def test_t_interval_covers_and_the_bootstrap_of_five_seeds_is_too_narrow() -> None:
    rng = np.random.default_rng(1)
    draws = rng.normal(0.01, 0.02, (600, 5))
    found = {
        "t": [interval(d) for d in draws],
        "bootstrap": [interval(d, method="bootstrap", resamples=400) for d in draws],
    }
    covered = {name: np.mean([i.low <= 0.01 <= i.high for i in some]) for name, some in found.items()}
    assert 0.93 < covered["t"] < 0.97
    assert 0.75 < covered["bootstrap"] < 0.89


def test_no_gain_seldom_beats() -> None:
    draws = np.random.default_rng(2).normal(0.0, 0.02, (2000, 4))
    words = [judge(interval(d), worth=0.005) for d in draws]
    assert 0.015 < words.count(BEATS) / len(words) < 0.036  # 2.5 % on the better side


def test_bootstrap_is_seeded_and_close_to_t_for_many_values() -> None:
    values = np.random.default_rng(3).normal(1.0, 0.5, 200)
    first, again = (interval(values, method="bootstrap") for _ in range(2))
    other, t = interval(values, method="bootstrap", seed=1), interval(values)
    assert first == again and first != other
    assert (first.low, first.high) == pytest.approx((t.low, t.high), abs=0.006)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.001, 0.03, BEATS),
        (0.0, 0.03, INCONCLUSIVE),
        (-0.01, 0.004, DOES_NOT_BEAT),
        (-0.01, 0.006, INCONCLUSIVE),
        (-0.03, -0.01, DOES_NOT_BEAT),
        (0.001, 0.003, BEATS),
    ],
)
def test_words(low: float, high: float, word: str) -> None:
    assert judge(Interval(5, (low + high) / 2, 0.01, low, high), worth=0.005) == word


def test_less_is_better_for_errors_and_costs() -> None:
    up = {"base": [0.5, 0.6, 0.55, 0.52], "x": [0.7, 0.79, 0.76, 0.73]}
    down = {"base": up["x"], "x": up["base"]}
    for metric, values in (("mATE", down), ("train_seconds", down), ("mAP", up), ("AP car", up)):
        assert only(verdicts(rows_of(values, metric)), metric)["verdict"] == BEATS
    for metric, values in (("mATE", up), ("mAP", down)):
        row = only(verdicts(rows_of(values, metric)), metric)
        assert row["verdict"] == DOES_NOT_BEAT and "worse" in row["note"]
    row = only(verdicts(rows_of(down, "mATE")), "mATE")
    assert row["low"] < row["difference"] < row["high"] < 0  # as measured, not turned round


def test_worth_of_a_cost_is_a_share_of_the_bases() -> None:
    values = {"base": [100.0, 101.0, 99.0], "x": [98.0, 99.1, 96.9]}
    row = only(verdicts(rows_of(values, "train_seconds")), "train_seconds")
    assert row["worth"] == pytest.approx(5.0) and "less than is worth having" in row["note"]
    assert only(verdicts(rows_of(values, "train_seconds"), worth={"train_seconds": 1.0}), "train_seconds")["note"] == ""


def test_seeds_that_would_settle_it() -> None:
    found = interval([0.03, -0.01, 0.02, -0.005])
    n = int(seeds_needed(found, 0.005))
    half = [stats.t.ppf(0.975, k - 1) * found.sd / math.sqrt(k) for k in (n - 1, n)]
    margin = max(found.mean, 0.005 - found.mean)
    assert half[0] >= margin > half[1] and n > found.n
    assert math.isinf(seeds_needed(Interval(3, 0.0025, 1.0, -1, 1), 0.005))
    assert math.isnan(seeds_needed(interval([0.1]), 0.005))
    row = only(verdicts(rows_of({"base": [0.2] * 4, "x": 0.2 + np.array([0.03, -0.01, 0.02, -0.005])})))
    assert row["verdict"] == INCONCLUSIVE and row["seeds_needed"] == n


def test_only_shared_seeds_with_numbers_count() -> None:
    rows = rows_of({"base": [0.2, 0.21, 0.22, math.nan], "x": [0.25, 0.26, 0.27, 0.3, 0.9]})
    row = only(verdicts(rows))
    assert row["seeds"] == 3 and row["difference"] == pytest.approx(0.05)
    assert "without a partner: seed 4" in row["note"] and "no number: seed 3" in row["note"]
    assert list(differences(rows, "mAP")["difference"]) == pytest.approx([0.05] * 3)


def test_one_seed_and_none() -> None:
    one = only(verdicts(rows_of({"base": [0.2], "x": [0.3]})))
    assert one["verdict"] == INCONCLUSIVE and one["difference"] == pytest.approx(0.1)
    assert all(math.isnan(one[name]) for name in ("low", "high", "sd", "p", "seeds_needed"))
    none = only(verdicts(rows_of({"base": [0.2, 0.3], "x": [math.nan, math.nan]})))
    assert none["verdict"] == INCONCLUSIVE and none["seeds"] == 0 and math.isnan(none["difference"])


def test_no_spread() -> None:
    same = only(verdicts(rows_of({"base": [0.25, 0.5], "x": [0.25, 0.5]})))
    assert same["verdict"] == DOES_NOT_BEAT and same["p"] == 1 and "same difference" in same["note"]
    better = only(verdicts(rows_of({"base": [0.25, 0.5], "x": [0.375, 0.625]})))
    assert better["verdict"] == BEATS and better["p"] == 0 and better["low"] == better["high"] == 0.125
    assert judge(Interval(2, 0.0, 0.0, 0.0, 0.0), worth=0.0) == DOES_NOT_BEAT


def test_another_data_set_is_refused_by_change() -> None:
    rows = rows_of({"base": [0.2, 0.3, 0.25], "x": [0.3, 0.4, 0.36], "night": [0.5, 0.6, 0.7]})
    rows.loc[rows["change"] == "night", "data"] = "other"
    table = verdicts(rows).set_index("change")
    assert table.loc["x", "verdict"] == BEATS
    assert table.loc["night", "verdict"] == NOT_COMPARABLE and math.isnan(table.loc["night", "difference"])
    assert table.loc["night", "note"] == "another data set than the reference's"
    allowed = verdicts(rows, other_data=True).set_index("change").loc["night"]
    assert allowed["verdict"] == BEATS and allowed["note"] == "another data set than the reference's"


def test_measured_costs_want_one_device() -> None:
    rows = rows_of({"base": [100.0, 101.0], "x": [50.0, 51.0]}, "train_seconds", test_parameters=5)
    rows.loc[rows["change"] == "x", "device"] = "H100"
    table = verdicts(rows).set_index("metric")
    assert table.loc["train_seconds", "verdict"] == NOT_COMPARABLE
    assert table.loc["test_parameters", "verdict"] == DOES_NOT_BEAT
    threads = rows_of({"base": [100.0], "x": [50.0]}, "train_seconds").assign(threads=["1", "2"])
    assert only(verdicts(threads), "train_seconds")["note"].startswith("measured with another number of threads")


def test_runs_of_several_teachers_or_precisions_are_refused() -> None:
    values = {"base": [0.2, 0.3], "x": [0.3, 0.4]}

    def note(ours: dict[str, list[object]], name: str = "x") -> tuple[str, str]:
        rows = rows_of(values)
        for column, cells in ours.items():
            rows.loc[rows["change"] == name, column] = cells
        row = only(verdicts(rows))
        return row["verdict"], row["note"]

    assert note({"teacher": ["a", "b"]}) == (NOT_COMPARABLE, "the seeds of x had different teachers")
    assert note({"train_data": ["a", "b"]}, "base")[1] == "the seeds of base were trained on different data"
    assert note({"teacher": ["a", "a"]})[0] == BEATS
    mixed = rows_of(values, precision="fp32", wanted_precision="auto", teacher_run="t", teacher="a")
    mixed.loc[mixed["change"] == "x", "precision"] = "bf16"
    assert only(verdicts(mixed))["note"] == "trained in another precision than the reference"
    mixed.loc[mixed["change"] == "x", "wanted_precision"] = "bf16"  # the very change
    assert only(verdicts(mixed))["verdict"] == BEATS
    mixed.loc[mixed["change"] == "x", "teacher"] = "b"
    assert only(verdicts(mixed))["note"] == "the teacher was trained again in between"


def test_a_change_may_name_what_it_is_judged_against() -> None:
    rows = rows_of({"base": [0.2, 0.3], "fog": [0.1, 0.2], "fog-kd": [0.15, 0.251], "kd": [0.25, 0.351]})
    rows["reference"] = rows["change"].map({"fog-kd": "fog"}).fillna("base")
    rows.loc[rows["change"].str.startswith("fog"), "data"] = "foggy"
    table = verdicts(rows).set_index("change")
    assert table["reference"].to_dict() == {"fog": "base", "fog-kd": "fog", "kd": "base"}
    assert table["verdict"].to_dict() == {"fog": NOT_COMPARABLE, "fog-kd": BEATS, "kd": BEATS}
    assert table.loc["fog-kd", "difference"] == pytest.approx(0.0505)
    paired = differences(rows, "mAP").set_index("change")["difference"]
    assert list(paired["fog-kd"]) == pytest.approx([0.05, 0.051])
    assert list(verdicts(rows[rows["change"] != "fog"])["change"]) == ["kd"]  # nothing to compare it with yet


def test_shared_runs_count_once() -> None:
    base = np.array([0.2, 0.21, 0.22, 0.23])
    rows = rows_of({"base": base, "a": base + 0.01, "b": base + 0.01, "c": base, "d": base - 0.01}, reference="base")
    rows.loc[rows["change"] == "b", "folder"] = list(rows[rows["change"] == "a"]["folder"])
    rows.loc[rows["change"] == "c", "folder"] = list(rows[rows["change"] == "base"]["folder"])
    assert twins(rows) == {"b": "a", "c": "base"}
    table = verdicts(rows, adjust="mAP")
    assert list(table["change"]) == ["a", "d"] and set(table["comparisons"]) == {2}


def test_options_that_cannot_be() -> None:
    for values, message in (
        ({"worth": {"mPA": 0.1}}, "worth: unknown metric 'mPA'; known: mAP, NDS"),
        ({"worth": {"mAP": -0.1}}, "worth: mAP wants a number from 0 on"),
        ({"level": 95}, "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_options(**values)  # type: ignore[arg-type]
    check_options({"AP car": 0.1}, 0.9, "bootstrap")


def test_errors() -> None:
    rows = rows_of({"base": [0.2, 0.3], "x": [0.3, 0.4]})
    with pytest.raises(ValueError, match="no finished run of 'base'"):
        verdicts(rows[rows["change"] == "x"])
    with pytest.raises(ValueError, match="several splits, sim_test, val"):
        verdicts(rows.assign(split=["sim_test", "val"] * 2))
    with pytest.raises(ValueError, match="'base' were scored on different data sets"):
        verdicts(rows.assign(data=["a", "b", "a", "b"]))
    with pytest.raises(ValueError, match="x has 2 runs of seed 0: x/0, x/1"):
        verdicts(rows.assign(seed=[0, 1, 0, 0]))
    with pytest.raises(ValueError, match="unknown method 'z'"):
        interval([1.0, 2.0], method="z")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="between 0 and 1"):
        interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="p-values"):
        verdicts(rows, method="bootstrap", adjust="mAP")


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    base = np.array([0.2, 0.21, 0.22, 0.23])
    gain = np.array([0.01, 0.02, 0.015, 0.006])
    rows = rows_of({"base": base, **{f"x{i}": base + gain * (1 if i < 1 else -1) for i in range(4)}})
    table = verdicts(rows, adjust="mAP").set_index("change")
    assert table.loc["x0", "p"] < 0.05 < table.loc["x0", "p_holm"]
    assert table.loc["x0", "verdict"] == BEATS and table.loc["x0", "adjusted"] == INCONCLUSIVE
    assert table.loc["x1", "adjusted"] == DOES_NOT_BEAT


def test_few_seeds_of_a_bootstrap_are_noted() -> None:
    values = {"base": [0.2, 0.21, 0.22], "x": [0.25, 0.27, 0.26]}
    row = only(verdicts(rows_of(values), method="bootstrap"))
    assert "too narrow" in row["note"] and math.isnan(row["p"]) and row["method"] == "bootstrap"
