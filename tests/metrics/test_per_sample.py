"""Scores of single samples against evaluations of these samples alone."""

import math

import numpy as np
import pytest
from evaluation_cases import Case, box, columns, random_case

from kdlab.metrics.evaluation import evaluate
from kdlab.metrics.per_sample import sample_scores
from kdlab.metrics.subset import Subset


@pytest.mark.parametrize("seed", range(8))
def test_a_sample_alone(seed: int) -> None:
    case = random_case(seed, samples=5, truths=10, boxes=40, classes=3, odd=0.3)
    truth = case.truth()
    predictions = columns(case, truth)
    scores = sample_scores(truth, predictions)
    for i, token in enumerate(truth.tokens):
        metrics = evaluate(truth, predictions, None, Subset(tokens=(token,)), allow_empty=True).metrics
        assert scores.true_positives[i] + scores.misses[i] == sum(metrics.counts.values())
        if metrics.present:
            assert scores.ap[i] == pytest.approx(metrics.mean_ap_present, abs=1e-12)
        else:
            assert math.isnan(scores.ap[i])


def test_counts() -> None:
    truths = [box(0, 0), box(9, 0), box(0, 9, "bus")]
    boxes = [box(0.5, 0), box(0.6, 0), box(30, 0), box(0, 9, "bus"), box(90, 0)]
    case = Case({"s0": truths, "s1": []}, {"s0": boxes, "s1": [box(0, 0, sample_token="s1")]})
    truth = case.truth()
    scores = sample_scores(truth, columns(case, truth))
    assert scores.true_positives.tolist() == [2, 0] and scores.misses.tolist() == [1, 0]
    assert scores.false_positives.tolist() == [2, 1] and np.isnan(scores.ap).tolist() == [False, True]


def test_where_two_detectors_differ_most() -> None:
    case = Case({t: [box(0, 0, sample_token=t)] for t in "abc"}, {t: [box(0, 0, sample_token=t)] for t in "abc"})
    case.truths["d"], case.results["d"] = [], []
    truth = case.truth()
    teacher = sample_scores(truth, columns(case, truth))
    case.results |= {"b": [box(1.5, 0, sample_token="b")], "c": []}
    student = sample_scores(truth, columns(case, truth))
    assert teacher.difference(student) == [("c", pytest.approx(1)), ("b", pytest.approx(0.5)), ("a", 0)]
    assert student.difference(teacher)[0] == ("c", pytest.approx(-1))
    other = Case({"x": [box(0, 0)]}, {"x": []}).truth()
    with pytest.raises(ValueError, match="scores are of different samples"):
        teacher.difference(sample_scores(other, columns(case, truth).take(np.zeros(0, int))))
