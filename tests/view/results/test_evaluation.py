from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from kdlab.evaluate import TP_ERRORS, Metrics
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.curves import RECALLS, Curve
from kdlab.metrics.evaluation import Evaluation
from kdlab.sample import CLASSES
from kdlab.view.results.evaluation import error_curves, frame_differences, precision_recall, ring_scores

Draw = Callable[[Figure], Figure]


def curve(reach: float, precision: float = 0.9) -> Curve:
    """Precision and confidence fall to 0 at a recall."""
    held = reach >= RECALLS
    errors = {key: np.linspace(0.1, 0.5, 101) for key in TP_ERRORS}
    return Curve(RECALLS, precision * held, (1 - RECALLS / 2) * held, **errors)


def evaluation(
    absent: tuple[str, ...] = ("bus",), reach: float = 0.8, config: EvaluationConfig | None = None
) -> Evaluation:
    config = config or EvaluationConfig()
    undefined = {"traffic_cone": ("orient_err", "vel_err", "attr_err"), "barrier": ("vel_err", "attr_err")}
    errors = {c: {k: math.nan if k in undefined.get(c, ()) else 0.4 for k in TP_ERRORS} for c in CLASSES}
    metrics = Metrics(
        split="sim_test",
        samples=4,
        mean_ap=0.5,
        nd_score=0.5,
        tp_errors=dict.fromkeys(TP_ERRORS, 0.4),
        label_aps={c: {str(d): 0.5 for d in config.dist_ths} for c in CLASSES},
        label_tp_errors=errors,
        counts={c: 0 if c in absent else 7 for c in CLASSES},
    )
    curves = {(c, d): curve(reach if c not in absent else 0.0) for c in CLASSES for d in config.dist_ths}
    return Evaluation(metrics, curves)


def test_precision_over_recall(draw: Draw) -> None:
    figure = draw(precision_recall(evaluation()))
    assert [ax.get_title() for ax in figure.axes][:4] == [
        "car: AP 0.500",
        "truck: AP 0.500",
        "construction vehicle: AP 0.500",
        "bus",
    ]
    car, bus = figure.axes[0], figure.axes[3]
    assert len(car.lines) == 4 and not bus.lines and bus.texts[0].get_text() == "no ground\ntruth"
    np.testing.assert_array_equal(car.lines[0].get_ydata(), curve(0.8).precision)
    assert next(t.get_text() for t in figure.legends[0].get_texts()) == "within 0.5 m"


def test_errors_over_recall(draw: Draw) -> None:
    figure = draw(error_curves(evaluation()))
    assert [ax.get_title() for ax in figure.axes][:2] == ["mATE 0.400", "mASE 0.400"]
    assert [len(ax.lines) for ax in figure.axes[:5]] == [9, 9, 8, 7, 7]  # neither a bus nor what has no such error
    recall = figure.axes[0].lines[0].get_xdata()
    assert recall[0] == pytest.approx(0.11) and recall[-1] == pytest.approx(0.8)
    assert len(figure.axes[5].get_legend().get_texts()) == 9


def test_classes_that_reach_too_little_have_no_errors(draw: Draw) -> None:
    figure = draw(error_curves(evaluation(reach=0.1)))
    assert not any(ax.lines for ax in figure.axes)
    nothing = evaluation(absent=CLASSES)
    draw(error_curves(nothing))
    assert not draw(precision_recall(nothing, title="nothing")).legends


def test_other_settings(draw: Draw) -> None:
    config = EvaluationConfig(dist_ths=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), dist_th_tp=3.0, min_recall=0.3)
    given = evaluation(config=config)
    assert len(draw(precision_recall(given, config)).axes[0].lines) == 6
    figure = draw(error_curves(given, config))
    assert figure.axes[0].lines[0].get_xdata()[0] == pytest.approx(0.31)
    assert "within 3 m" in figure.get_suptitle()


def test_thresholds_come_from_the_curves(draw: Draw) -> None:
    config = EvaluationConfig(dist_ths=tuple(0.5 * i for i in range(1, 10)), dist_th_tp=3.0)
    lines = draw(precision_recall(evaluation(config=config))).axes[0].lines  # Without the config: as many lines.
    assert len(lines) == len({line.get_color() if isinstance(line.get_color(), str) else tuple(line.get_color())
                              for line in lines}) == 9  # fmt: skip
    other = evaluation(config=EvaluationConfig(dist_ths=(1.0, 3.0), dist_th_tp=3.0))
    with pytest.raises(ValueError, match=r"no curves at 2 m, .* but at \[1\.0, 3\.0\]; give the config"):
        error_curves(other)


def test_scores_over_rings(draw: Draw) -> None:
    metrics = evaluation().metrics
    none = replace(metrics, mean_ap=math.nan, nd_score=math.nan, counts=dict.fromkeys(CLASSES, 0))
    near = {(0.0, 10.0): metrics, (10.0, 20.0): replace(metrics, mean_ap=0.2), (20.0, 30.0): none}
    figure = draw(ring_scores({"teacher": near, "student": dict.fromkeys(near, metrics)}))
    assert figure.axes[0].get_title() == "mAP: higher is better"
    assert list(figure.axes[0].lines[0].get_ydata())[:2] == [0.5, 0.2]
    assert [bar.get_height() for bar in figure.axes[7].patches] == [63, 63, 63]
    assert [t.get_text() for t in figure.axes[4].get_xticklabels()] == ["0–10", "10–20", "20–30"]
    with pytest.raises(ValueError, match="same rings"):
        ring_scores({"teacher": near, "student": {(0.0, 5.0): metrics}})
    with pytest.raises(ValueError, match="same rings"):
        ring_scores({})


def test_frames_that_differ(draw: Draw) -> None:
    frames = {f"scene-0001, {i}": {"teacher": 1 - i / 20, "student": i / 20} for i in range(10)}
    figure = draw(frame_differences(frames))
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths[0] == 1 and widths[10] == 0 and len(widths) == 20
    assert figure.axes[0].get_yticklabels()[0].get_text() == "scene-0001, 0"
    draw(frame_differences({"one": {"a": 0.0, "b": 1.0}}))
    with pytest.raises(ValueError, match="at least one"):
        frame_differences({})
