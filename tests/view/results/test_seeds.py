"""The chances agree with the verdicts that studies are given, the pictures with their numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from kdlab.studies.verdict import BEATS, DOES_NOT_BEAT, INCONCLUSIVE, interval, judge
from kdlab.view.results import seeds
from kdlab.view.results.studies import COLOURS

Draw = Callable[[Figure], Figure]

ROWS = pd.DataFrame(
    {
        "change": ["base"] * 3 + ["better"] * 3 + ["later"] * 2,
        "reference": ["base"] * 6 + ["better"] * 2,
        "seed": [0, 1, 2, 0, 1, 2, 0, 2],
        "mAP": [0.20, 0.25, 0.30, 0.221, 0.270, 0.319, 0.23, 0.31],
    }
)


def test_half_width_is_that_of_the_interval() -> None:
    values = np.array([0.01, 0.03, 0.02, 0.05])
    found = interval(values)
    assert seeds.half_width(found.sd, 4) == pytest.approx((found.high - found.low) / 2)
    assert seeds.half_width(1.0, [2, 3, 1000]) == pytest.approx([8.985, 2.484, 0.0621], abs=1e-3)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_chances_are_those_of_the_verdicts(n: int) -> None:
    drawn = 0.004 + 0.005 * np.random.default_rng(0).standard_normal((seeds.IMAGINED, n))
    words = [judge(interval(values), 0.005) for values in drawn[:500]]
    shares = seeds.verdict_shares(0.004, 0.005, n)
    assert shares.sum() == pytest.approx(1)
    for word, share in zip(seeds.VERDICTS, shares, strict=True):
        assert words.count(word) / 500 == pytest.approx(share, abs=0.06)


def test_chances_of_the_clear_cases() -> None:
    assert seeds.verdict_shares(0.1, 0.001, 3)[2] > 0.99  # BEATS
    assert seeds.verdict_shares(-0.1, 0.001, 3)[0] > 0.99  # DOES NOT BEAT
    assert seeds.verdict_shares(0.0, 0.01, 5)[2] == pytest.approx(0.025, abs=0.01)  # a false BEATS
    with pytest.raises(ValueError, match="at least 2 seeds"):
        seeds.verdict_shares(0.0, 0.01, 1)


def test_rule_shows_every_verdict(draw: Draw) -> None:
    ax = draw(seeds.rule()).axes[0]
    said = [text.get_text() for text in ax.texts]
    assert said == [BEATS, BEATS, INCONCLUSIVE, DOES_NOT_BEAT, DOES_NOT_BEAT]
    assert len(said) == len(seeds.EXAMPLES)


def test_pairs_show_both_runs_of_a_seed_and_both_intervals(draw: Draw) -> None:
    left, right = draw(seeds.pairs(ROWS)).axes
    assert [list(line.get_ydata()) for line in left.lines[:3]] == [[0.20, 0.221], [0.25, 0.270], [0.30, 0.319]]
    assert len(left.lines) == 5  # "later" has two seeds, and is judged against "better"
    assert left.get_xticklabels()[1].get_text() == "better  to\nlater"
    bars = [list(line.get_xdata()) for line in right.lines if line.get_linewidth() == 2.4]
    found = interval([0.021, 0.020, 0.019])
    assert bars[0] == pytest.approx([found.low, found.high])
    assert bars[1][0] < 0 < bars[1][1]  # without pairs the spread of the seeds hides it
    assert right.texts[0].get_text() == BEATS


def test_pairs_of_a_single_seed_have_no_interval(draw: Draw) -> None:
    right = draw(seeds.pairs(ROWS[ROWS["seed"] == 0])).axes[1]
    assert {text.get_text() for text in right.texts} == {INCONCLUSIVE}
    assert not [line for line in right.lines if line.get_linewidth() == 2.4]


def test_pairs_want_a_common_seed() -> None:
    with pytest.raises(ValueError, match="same seed"):
        seeds.pairs(ROWS[(ROWS["change"] == "base") | (ROWS["seed"] == 7)])


def test_resolution_falls_with_seeds(draw: Draw) -> None:
    figure = draw(seeds.resolution({"narrow": 0.002, "wide": 0.01}, (2, 3, 10)))
    narrow, wide = (np.asarray(line.get_ydata(), float) for line in figure.axes[0].lines if line.get_marker() != "None")
    assert (np.diff(narrow) < 0).all()
    assert wide == pytest.approx(5 * narrow)
    assert "3 seeds resolve 0.005" in figure.legends[0].get_texts()[0].get_text()


def test_repeated_studies_hold_the_truth(draw: Draw) -> None:
    figure = draw(seeds.repeats(0.01, 0.005, (3, 10), studies=40))
    few, many = figure.axes
    assert "of 40 hold the truth" in few.get_title()
    lines = [line for line in many.lines if line.get_linewidth() == 1.8]
    assert len(lines) == 40
    inside = sum(low <= 0.01 <= high for low, high in (line.get_xdata() for line in lines))
    assert 35 <= inside <= 40
    assert many.get_title().startswith(f"10 seeds: {inside} of 40")
    beats = [same_color(line.get_color(), COLOURS[BEATS]) for line in lines]
    assert beats == [line.get_xdata()[0] > 0 for line in lines]


def test_chances_and_peeking_draw(draw: Draw) -> None:
    assert [ax.get_title() for ax in draw(seeds.chances(0.005, (3, 10))).axes] == ["3 seeds", "10 seeds"]
    stopped, once = (np.asarray(line.get_ydata(), float) for line in draw(seeds.peeking(12)).axes[0].lines)
    assert (np.diff(stopped) >= 0).all()
    assert stopped[0] == once[0]
    assert stopped[-1] > 3 * once[-1]
    assert once == pytest.approx(2.5, abs=0.9)


def test_finished_says_which_seeds_are_there(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.toml").write_text(f"# Claim {name}. More of it.\nseeds = [0, 1, 2]\n")
    ROWS.to_csv(tmp_path / "results" / "b.csv")
    ROWS[ROWS["seed"] < 1].to_csv(tmp_path / "results" / "c.csv")
    found = seeds.finished(tmp_path)
    assert list(found["study"]) == ["a", "b", "c"]
    assert set(found["planned"]) == {"0 1 2"}
    assert list(found["there"]) == ["", "base: 0 1 2, better: 0 1 2, later: 0 2", "0"]
    assert found["claim"][0] == "Claim a"
    with pytest.raises(FileNotFoundError, match="no study here"):
        seeds.finished(tmp_path / "results")


def test_the_committed_studies_are_read() -> None:
    found = seeds.finished(Path(__file__).parents[3] / "studies").set_index("study")
    assert found["there"]["core"] == "0 1 2"
    assert all(found["claim"].str.len() > 20)
