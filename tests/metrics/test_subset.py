"""Parts of a split: the devkit's numbers where it has them, the rule by hand where it has not."""

import math
from pathlib import Path
from typing import Any

import pytest
from evaluation_cases import Case, assert_equal_to_devkit, box, columns, random_case, restricted

from kdlab.metrics.evaluation import Evaluation, evaluate
from kdlab.metrics.metrics import TP_ERRORS
from kdlab.metrics.subset import Subset


def assert_same(a: Evaluation, b: Evaluation) -> None:
    assert a.metrics.to_dict() == b.metrics.to_dict()
    for key, curve in a.curves.items():
        for name in ("precision", "confidence", *TP_ERRORS):
            assert getattr(curve, name).tolist() == getattr(b.curves[key], name).tolist()


@pytest.mark.parametrize("seed", range(12))
def test_everything_as_a_subset(tmp_path: Path, seed: int) -> None:
    case = random_case(seed, samples=5, truths=12, boxes=40, classes=3, predefined=seed % 2 == 0)
    whole = restricted(case, Subset())
    assert_equal_to_devkit(whole, case.devkit(case.write(tmp_path / "r.json")))
    for subset in (Subset(tokens=tuple(case.truths)), Subset(scenes=tuple(map(case.scene_of, case.truths))),
                   Subset(distance=(0, math.inf), points=(-1, math.inf), visibility=(0, 1, 2, 3, 4))):  # fmt: skip
        assert_same(restricted(case, subset), whole)


@pytest.mark.parametrize("seed", range(12))
def test_scenes_are_a_custom_split(tmp_path: Path, seed: int) -> None:
    case = random_case(seed, samples=6, truths=12, boxes=40, classes=2, odd=0.3)
    scenes = [case.scene_of(t) for t, boxes in case.truths.items() if boxes and case.results[t]][:1]
    if not scenes:
        pytest.skip("no scene with both sides")
    ours = restricted(case, Subset(scenes=tuple(scenes)))
    assert_equal_to_devkit(ours, case.devkit(case.write(tmp_path / "r.json"), scenes=scenes))
    tokens = tuple(t for t in case.truths if case.scene_of(t) in scenes)
    assert_same(restricted(case, Subset(tokens=tokens)), ours)
    assert ours.metrics.samples == len(tokens)


def ap(case: Case, **subset: Any) -> float:
    return restricted(case, Subset(**subset)).metrics.label_aps["car"]["2.0"]


def test_distance_bands() -> None:
    case = Case({"s0": [box(5, 0), box(20, 0)]}, {"s0": [box(5, 0, score=0.9), box(20, 0, score=0.2), box(30, 0)]})
    assert ap(case, distance=(0, 10)) == pytest.approx(1)  # What is far away, right or wrong, does not count.
    assert ap(case, distance=(10, 40)) == pytest.approx(0.2)  # The wrong one at 30 m comes first: precision 0 to 0.5.
    assert ap(case, distance=(20, 21)) == pytest.approx(1) and ap(case, distance=(19, 20)) == 0
    assert restricted(case, Subset(distance=(20, 40))).metrics.counts["car"] == 1


def test_a_prediction_counts_where_its_annotation_lies() -> None:
    case = Case({"s0": [box(9.5, 0)]}, {"s0": [box(10.5, 0)]})
    assert ap(case, distance=(0, 10)) == pytest.approx(1) and ap(case, distance=(10, 50)) == 0
    metrics = restricted(case, Subset(distance=(0, 10))).metrics
    assert metrics.label_aps["car"]["1.0"] == 0 and metrics.label_tp_errors["car"]["trans_err"] == pytest.approx(1)


def test_visibility_and_points() -> None:
    truths = [box(0, 0, visibility=1, num_pts=3), box(9, 0, visibility=4, num_pts=30)]
    boxes = [box(0, 0, score=0.5), box(9, 0, score=0.4), box(0, 9, score=0.45)]
    case = Case({"s0": truths}, {"s0": boxes})
    assert 0.99 < ap(case, visibility=(1,)) == ap(case, points=(1, 30)) == ap(case, points=(3, 4))
    assert ap(case, visibility=(3, 4)) == pytest.approx(0.2) and ap(case, points=(30, math.inf)) == ap(
        case, visibility=(4,)
    )
    assert ap(case, visibility=(2,)) == 0 == ap(case, points=(4, 30))


def test_day_and_night() -> None:
    case = Case({"s0": [box(0, 0)], "s1": [box(9, 9)]}, {"s0": [box(0, 0)], "s1": []}, scene={"s1": "scene-night"})
    assert ap(case, time="day") == pytest.approx(1) and ap(case, time="night") == 0
    assert restricted(case, Subset(time="night")).metrics.samples == 1


def test_the_nearest_annotation_is_matched_even_where_it_does_not_count() -> None:
    """COCO would prefer the one inside; there the prediction would count as right."""
    case = Case({"s0": [box(9.9, 0), box(10.2, 0)]}, {"s0": [box(10.1, 0)]})
    metrics = restricted(case, Subset(distance=(0, 10))).metrics
    assert metrics.counts["car"] == 1 and metrics.label_aps["car"]["4.0"] == 0
    assert ap(case, distance=(10, 20)) == pytest.approx(1)


@pytest.mark.parametrize(("given", "message"), [
    ({"distance": (10, 10)}, r"distance must be two numbers, the first below the second, got \(10, 10\)"),
    ({"distance": (20, 10)}, "distance must be"),
    ({"distance": (0, math.nan)}, "distance must be"),
    ({"distance": (0, 5, 10)}, "distance must be"),
    ({"points": (5, 1)}, "points must be two numbers"),
    ({"points": (math.nan, 1)}, "points must be two numbers"),
    ({"visibility": (1, 5)}, r"visibility must be levels of 0 to 4, got \(1, 5\)"),
    ({"time": "noon"}, "time must be 'day' or 'night', got 'noon'"),
])  # fmt: skip
def test_what_is_no_subset(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"subset: {message}"):
        Subset(**given)


def test_a_subset_without_annotations() -> None:
    case = Case({"s0": [box(5, 0), box(60, 0)], "s1": []}, {"s0": [box(5, 0)], "s1": []})
    truth = case.truth()
    for subset in (Subset(tokens=("s1",)), Subset(distance=(55, 70)), Subset(visibility=(4,))):
        with pytest.raises(ValueError, match=r"split 'own' has no annotation that counts within (tokens|dist|visib)"):
            evaluate(truth, columns(case, truth), None, subset)
        assert evaluate(truth, columns(case, truth), None, subset, allow_empty=True).metrics.present == []
    none = Case({"s0": [box(60, 0)]}, {"s0": []})
    truth = none.truth()  # The whole split is scored as the devkit does it.
    for everything in (None, Subset()):
        assert evaluate(truth, columns(none, truth), None, everything).metrics.mean_ap == 0


def test_messages() -> None:
    case = Case({"s0": [box(0, 0)]}, {"s0": []})
    truth = case.truth()
    for subset, message in (
        (Subset(scenes=("scene-9",)), "split 'own' has no scene 'scene-9'"),
        (Subset(tokens=("t",)), "split 'own' has no sample 't'"),
        (Subset(time="night"), "split 'own' has no sample that fits time night"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(truth, columns(case, truth), None, subset)
