from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from kdlab.evaluate import TP_ERRORS, Metrics
from kdlab.sample import CLASSES
from kdlab.view.results.curves import loss_columns, loss_curves, metric_comparison, smoothed

Draw = Callable[[Figure], Figure]


def rows(names: tuple[str, ...], steps: int = 40) -> list[dict[str, float]]:
    place = {"epoch": 0.0, "lr": 1e-3, "grad_norm": 1.0}
    return [{**place, "step": i, "total": 9.0 / (i + 1), **dict.fromkeys(names, 1.0)} for i in range(steps)]


def metrics(ap: float = 0.5, absent: str = "bus") -> Metrics:
    return Metrics(
        split="sim_test",
        samples=4,
        mean_ap=ap,
        nd_score=ap,
        tp_errors=dict.fromkeys(TP_ERRORS, 0.4) | {"attr_err": math.nan},
        label_aps={name: {"2.0": 0.0 if name == absent else ap} for name in CLASSES},
        label_tp_errors={},
        counts=dict.fromkeys(CLASSES, 7) | {absent: 0},
    )


def test_one_panel_per_loss(draw: Draw) -> None:
    figure = draw(loss_curves({"alone": rows(("heatmap",)), "UniDistill": rows(("heatmap", "feature"))}))
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == ["total", "heatmap", "feature"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["alone", "UniDistill"]
    assert len(figure.axes[2].lines) == 2


def test_losses_that_are_missing_or_not_finite(draw: Draw, tmp_path: Path) -> None:
    broken = [{"step": 0, "total": math.nan}, {"step": 1, "total": math.inf}, {"step": 2, "total": 1.0}]
    draw(loss_curves({"broken": broken, "none": []}))
    draw(loss_curves({}))
    draw(loss_curves({"no file": tmp_path / "losses.csv"}))


def test_reads_a_training_log(draw: Draw, tmp_path: Path) -> None:
    log = tmp_path / "losses.csv"
    log.write_text("epoch,step,lr,grad_norm,total,heatmap\n0,0,0.1,1,2.0,2.0\n0,1,0.1,1,1.0,1.0\n")
    figure = draw(loss_curves({"run": log}))
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == ["total", "heatmap"]
    assert loss_columns({"run": rows(("a",))}) == ["total", "a"]


def test_running_mean() -> None:
    np.testing.assert_allclose(smoothed(np.array([1.0, 2, 3, np.nan, 5]), 2), [1, 1.5, 2.5, 3, 5])


def test_metrics_side_by_side(draw: Draw) -> None:
    figure = draw(metric_comparison({"teacher": metrics(0.6), "student": metrics(0.2), "student + X": metrics(0.3)}))
    scores, errors, classes = figure.axes
    heights = [bar.get_height() for bar in scores.patches]
    assert heights == [0.6, 0.6, 0.2, 0.2, 0.3, 0.3]
    assert scores.get_title() == "higher is better"
    assert errors.get_title() == "lower is better"
    assert "mATE\n(m)" in [t.get_text() for t in errors.get_xticklabels()]
    words = [t.get_text() for t in classes.texts]
    assert words.count("no ground\ntruth") == 1
    assert words.count("0.00") == 0


def test_only_runs_of_one_split_are_compared() -> None:
    with pytest.raises(ValueError, match="one split"):
        metric_comparison({"a": metrics(), "b": replace(metrics(), split="sim_val")})
    with pytest.raises(ValueError, match="none"):
        metric_comparison({})


def test_many_runs_and_all_zero(draw: Draw) -> None:
    draw(metric_comparison({f"run {i}": metrics(0.0) for i in range(7)}))
