"""The numbers of nuscenes-devkit on everything it takes, and its refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import Case, both, box, random_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.evaluation import evaluate
from kdlab.metrics.results import read_results
from kdlab.sample import CLASSES

CASES = st.builds(
    random_case,
    st.integers(0, 2**32),
    samples=st.integers(1, 6),
    truths=st.integers(1, 15),
    boxes=st.integers(1, 40),
    classes=st.sampled_from([1, 2, 10]),
    grid=st.sampled_from([0.1, 0.5]),
    spread=st.sampled_from([3.0, 6.0, 30.0]),
    scores=st.sampled_from([0, 1, 3]),
    odd=st.sampled_from([0.0, 0.1, 0.4]),
    predefined=st.booleans(),
)


@given(CASES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equal_to_the_devkit(tmp_path: Path, case: Case) -> None:
    both(case, tmp_path / "r.json")


@pytest.mark.parametrize("predefined", [False, True])
def test_equal_on_a_larger_set(tmp_path: Path, predefined: bool) -> None:
    case = random_case(1, samples=40, truths=40, boxes=300, grid=0.1, spread=40, scores=50, predefined=predefined)
    result = both(case, tmp_path / "r.json")
    assert sum(map(len, case.results.values())) > 3000 and 0.001 < result.metrics.mean_ap < 0.9


def test_many_equal_boxes_in_a_sample(tmp_path: Path) -> None:
    truths = [box(i % 3, i // 3 % 3, CLASSES[i % 10], num_pts=1) for i in range(60)]
    boxes = [box(i % 5 * 0.5, i % 7 * 0.5, CLASSES[i % 10], 0.25 * (i % 4), sample_token="s0") for i in range(500)]
    result = both(Case({"s0": truths, "s1": []}, {"s0": boxes, "s1": []}), tmp_path / "r.json")
    assert result.metrics.mean_ap > 0


@pytest.mark.parametrize("distance", [0.5, 1.0, 2.0, 4.0])
def test_a_distance_equal_to_the_threshold_is_no_match(tmp_path: Path, distance: float) -> None:
    result = both(Case({"s0": [box(0, 0)]}, {"s0": [box(distance, 0)]}), tmp_path / "r.json")
    assert result.metrics.label_aps["car"][str(distance)] == 0
    closer = both(Case({"s0": [box(0, 0)]}, {"s0": [box(distance - 1e-9, 0)]}), tmp_path / "r.json")
    assert closer.metrics.label_aps["car"][str(distance)] == pytest.approx(1)


def test_ties_of_distance_and_score(tmp_path: Path) -> None:
    truths = [box(1, 0, size=[1.0, 1, 1]), box(-1, 0, size=[2.0, 2, 2])]
    boxes = [box(0, 0, score=0.5, size=[2.0, 2, 2]), box(0, 0.0, score=0.5, size=[1.0, 1, 1])]
    result = both(Case({"s0": truths}, {"s0": boxes}), tmp_path / "r.json")
    assert result.metrics.label_tp_errors["car"]["scale_err"] == 0  # The last box takes the first annotation.


def test_the_nearest_free_annotation_and_only_then_the_threshold(tmp_path: Path) -> None:
    case = Case({"s0": [box(0, 0), box(3, 0)]}, {"s0": [box(0.1, 0, score=0.9), box(0.2, 0, score=0.8)]})
    aps = both(case, tmp_path / "r.json").metrics.label_aps["car"]
    assert aps["0.5"] == aps["2.0"] < aps["4.0"] == pytest.approx(1)


def test_nan_rules(tmp_path: Path) -> None:
    nan = [math.nan, math.nan]
    truths = [box(0, 0, velocity=nan), box(5, 0, velocity=nan), box(0, 5, "bus", attribute_name="vehicle.moving")]
    truths += [box(9, 9, "traffic_cone"), box(9, -9, "barrier")]
    boxes = [{**b, "detection_score": 0.9 - i / 10} for i, b in enumerate(truths)]
    boxes[2] = {**boxes[2], "attribute_name": "vehicle.parked", "velocity": nan}
    errors = both(Case({"s0": truths}, {"s0": boxes}), tmp_path / "r.json").metrics.label_tp_errors
    assert errors["car"]["vel_err"] == errors["car"]["attr_err"] == errors["bus"]["vel_err"] == 1
    assert errors["bus"]["attr_err"] == 1 and errors["truck"]["trans_err"] == 1
    assert math.isnan(errors["traffic_cone"]["orient_err"]) and math.isnan(errors["barrier"]["vel_err"])
    assert errors["barrier"]["orient_err"] == 0


def test_a_barrier_is_the_same_after_half_a_turn(tmp_path: Path) -> None:
    turned = {"rotation": [0.0, 0.0, 0.0, 1.0]}
    case = Case(
        {"s0": [box(0, 0, "barrier"), box(5, 5)]}, {"s0": [box(0, 0, "barrier", **turned), box(5, 5, **turned)]}
    )
    errors = both(case, tmp_path / "r.json").metrics.label_tp_errors
    assert errors["barrier"]["orient_err"] == pytest.approx(0) and errors["car"]["orient_err"] == pytest.approx(math.pi)


@pytest.mark.parametrize("rotation", [[0, 0, 0, 0], [3.0, 0, 0, 4.0], [0.5**0.5, 0, 0.5**0.5, 0], [1e-9, 0, 0, 1e-9],
                                      [1 + 1e-14, 0, 0, 1e-8], [math.inf, 0, 0, 0], [0.1, 0.7, -0.3, 0.2]])  # fmt: skip
def test_unusual_quaternions(tmp_path: Path, rotation: list[float]) -> None:
    both(Case({"s0": [box(0, 0)]}, {"s0": [box(0, 0, rotation=rotation)]}), tmp_path / "r.json")


def test_range_points_and_racks(tmp_path: Path) -> None:
    rack = box(0, 0, "rack", size=[2.0, 4.0, 2.0], rotation=[math.cos(0.3), 0.0, 0.0, math.sin(0.3)])
    truths = [box(3, 4, "bicycle"), box(0.5, 0, "bicycle"), box(0, 0.5, "car"), box(50, 0), box(49.99, 0)]
    truths += [box(8, 8, num_pts=0)]
    case = Case({"s0": truths, "s1": [box(0, 0, "motorcycle")]}, {}, {"s0": [rack, rack]})
    case.ego["s0"] = (0.0, 0.0, 1.0)
    case.results = {t: [{**b, "sample_token": t} for b in boxes] for t, boxes in case.truths.items()}
    counts = both(case, tmp_path / "r.json").metrics.counts
    assert counts["bicycle"] == 1 and counts["motorcycle"] == 1 and counts["car"] == 2


def test_the_border_of_a_rack_belongs_to_it(tmp_path: Path) -> None:
    rack = box(0, 0, "rack", size=[2.0, 4.0, 2.0])
    case = Case(
        {"s0": [box(2, 1, "bicycle"), box(2.001, 1, "bicycle")]}, {"s0": [box(2, 1, "bicycle")]}, {"s0": [rack]}
    )
    assert both(case, tmp_path / "r.json").metrics.counts["bicycle"] == 1


def test_rotated_racks_agree_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    turn = rng.normal(size=4)
    rack = box(3, 4, "rack", size=[2.0, 3.0, 1.5], rotation=turn.tolist())
    from nuscenes.utils.data_classes import Box as DevkitBox
    from pyquaternion import Quaternion

    corners = DevkitBox(rack["translation"], rack["size"], Quaternion(rack["rotation"])).corners().T
    places = np.concatenate([corners, (corners[:, None] * 0.25 + corners[None] * 0.75).reshape(-1, 3)])
    truths = [box(0, 0, "bicycle", translation=p.tolist()) for p in places]
    case = Case({"s0": truths}, {"s0": truths[:3]}, {"s0": [rack]})
    assert 0 < both(case, tmp_path / "r.json").metrics.counts["bicycle"] < len(truths)


def test_a_box_matches_in_the_sample_that_it_names(tmp_path: Path) -> None:
    boxes = [box(0, 0, sample_token="s1"), box(1, 0, sample_token="nowhere")]
    case = Case({"s0": [box(1, 0)], "s1": [box(0, 0)]}, {"s0": boxes, "s1": []}, ego={"s1": (100.0, 0.0, 0.0)})
    case.truths["s1"].append(box(90, 0))
    metrics = both(case, tmp_path / "r.json").metrics
    assert metrics.counts["car"] == 2  # The one 100 m away from its own ego vehicle does not count.


def test_unusual_predictions(tmp_path: Path) -> None:
    boxes = [
        box(0, 0, velocity=[math.inf, 0.0]),
        box(1, 0, num_pts=0),
        box(0, 1, num_pts=0.5),
        box(2, 0, num_pts="3"),
        box(math.inf, 0),
        box(0, 0, translation=[1, 0, math.inf], detection_score="0.25", size=[1, 2, 3]),
    ]
    case = Case({"s0": [box(0, 0), box(1, 0), box(2, 0)]}, {"s0": boxes})
    assert both(case, tmp_path / "r.json").metrics.counts["car"] == 3


def test_a_missing_score_is_minus_one(tmp_path: Path) -> None:
    alone = {k: v for k, v in box(0, 0).items() if k != "detection_score"}
    both(
        Case({"s0": [box(0, 0)]}, {"s0": [alone]}), tmp_path / "r.json"
    )  # All recall is reached: nothing to complain of.


@pytest.mark.parametrize("score", [-1.0, -math.inf])
def test_scores_without_a_curve_are_refused(tmp_path: Path, score: float) -> None:
    case = Case({"s0": [box(0, 0), box(9, 9)]}, {"s0": [box(0, 0, score=score), box(30, 0, score=score / 2)]})
    truth, path = case.truth(), case.write(tmp_path / "r.json")
    with pytest.raises(ValueError, match=r"car at 0\.5 m: its scores give no falling curve"):
        evaluate(truth, read_results(path, truth))
    with pytest.raises(AssertionError):
        case.devkit(path)


def test_infinite_scores(tmp_path: Path) -> None:
    boxes = [box(0, 0, score=math.inf), box(9, 9, score=0.5), box(20, 0, score=0.25), box(0, 9, score=math.inf)]
    both(Case({"s0": [box(0, 0), box(9, 9), box(20, 0)]}, {"s0": boxes}), tmp_path / "r.json")


@pytest.mark.parametrize("side", ["truths", "results"])
def test_a_matched_box_needs_a_size(tmp_path: Path, side: str) -> None:
    case = Case({"s0": [box(0, 0)]}, {"s0": [box(0, 0)]})
    getattr(case, side)["s0"][0]["size"] = [1.0, 0.0, 2.0]
    truth, path = case.truth(), case.write(tmp_path / "r.json")
    what = "annotation" if side == "truths" else "prediction"
    with pytest.raises(
        ValueError, match=rf"sample 's0': the {what} car at \(0, 0, 0\) is matched and has size \[1\.0, 0"
    ):
        evaluate(truth, read_results(path, truth))
    with pytest.raises(AssertionError, match="must be >0"):
        case.devkit(path)
    case.results["s0"][0]["translation"] = [9.0, 0.0, 0.0]
    both(case, tmp_path / "r.json")  # Without a match the size does not matter.


def test_no_prediction_at_all_scores_zero() -> None:
    truth = Case({"s0": [box(0, 0)], "s1": []}, {}).truth()
    from kdlab.metrics.boxes import EvalBoxes

    metrics = evaluate(truth, EvalBoxes.empty()).metrics
    assert metrics.mean_ap == 0 == metrics.nd_score and metrics.tp_errors["trans_err"] == 1 and metrics.samples == 2


def test_annotations_that_are_all_left_out(tmp_path: Path) -> None:
    metrics = both(Case({"s0": [box(60, 0)]}, {"s0": [box(0, 0)]}), tmp_path / "r.json").metrics
    assert metrics.mean_ap == 0 and metrics.present == []


@pytest.mark.parametrize("seed", range(4))
def test_other_settings(tmp_path: Path, seed: int) -> None:
    config = EvaluationConfig(
        class_range={name: 3.0 + i for i, name in enumerate(CLASSES)},
        dist_ths=(0.25, 3.0, 1.0),
        dist_th_tp=3.0,
        min_recall=0.3,
        min_precision=0.0,
        mean_ap_weight=2,
    )
    both(random_case(seed, samples=5, truths=20, boxes=60, classes=3), tmp_path / "r.json", config)


def test_pairs_are_taken_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdlab.metrics.matching._CHUNK", 7)
    both(random_case(5, samples=4, truths=20, boxes=40, classes=2), tmp_path / "r.json")
