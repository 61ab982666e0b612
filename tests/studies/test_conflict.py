"""Conflicts of gradients, from the files that runs wrote."""

from pathlib import Path

import pytest
from study_fakes import write_gradients, write_trial

from kdlab.studies.conflict import PARTS, WHOLE, conflict, matrix, norms
from kdlab.studies.results import collect

PAIR = ("detection", "kd/feature")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for seed, cosines in enumerate(([0.5, 0.5, -0.5, -0.5, 0.0, 1.0], [0.1] * 6)):
        run = write_trial(tmp_path, "x", seed, 0.2, ["feature"])
        write_gradients(run, {PAIR: cosines, ("detection", "kd/relation"): [float("nan")] * 6})
    write_trial(tmp_path, "base", 0, 0.2)
    return tmp_path


def test_means_over_steps_then_seeds(study: Path) -> None:
    table = conflict(collect(study)).set_index(["part", "second"])
    whole = table.loc[(WHOLE, "kd/feature")]
    assert whole["cosine"] == pytest.approx((1 / 6 + 0.1) / 2)
    assert whole["cosine_sd"] == pytest.approx(abs(1 / 6 - 0.1) / 2**0.5)
    assert whole["conflict"] == pytest.approx((2 / 6 + 0) / 2)
    assert (whole["seeds"], whole["steps"]) == (2, 12)
    by_part = [table.loc[(part, "kd/feature"), "cosine"] for part in PARTS[1:]]
    assert by_part == pytest.approx([(c + 0.1) / 2 for c in (0.5, -0.5, 0.5)])
    assert set(table["change"]) == {"x"} and (WHOLE, "kd/relation") not in table.index  # a gradient of 0 has no angle


def test_matrix_is_symmetric(study: Path) -> None:
    full = matrix(conflict(collect(study)), "x", PARTS[1])
    assert list(full.index) == list(full.columns) == ["detection", "kd/feature"]
    assert full.loc["detection", "kd/feature"] == full.loc["kd/feature", "detection"] == pytest.approx(0.3)
    assert full.isna().to_numpy().diagonal().all()


def test_norms_are_relative_to_detection(study: Path) -> None:
    table = norms(collect(study))
    whole = table[table["part"] == WHOLE].set_index("loss")["norm"]
    assert whole.to_dict() == {"detection": 1.0, "kd/feature": 0.5, "kd/relation": 0.5}


def test_runs_without_gradients(tmp_path: Path) -> None:
    write_trial(tmp_path, "base", 0, 0.2)
    rows = collect(tmp_path)
    assert len(conflict(rows)) == len(norms(rows)) == 0
    assert len(conflict(rows[:0])) == 0
