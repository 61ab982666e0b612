"""Result files and metrics, by the official code."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture

from kdlab.data.nuscenes import NuScenesDataset
from kdlab.data.simulate import simulate
from kdlab.data.simulate_config import SimulationConfig
from kdlab.evaluate import (
    Metrics,
    Results,
    Scorer,
    attribute,
    evaluate_run,
    evaluation_loader,
    load_metrics,
    predict,
    result_boxes,
    write_results,
)
from kdlab.models import Detector, build_detector
from kdlab.sample import ATTRIBUTES, CLASSES, Batch, Detections, Features
from kdlab.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("evaluate") / "set")


@pytest.fixture(scope="module")
def scorer(root: Path) -> Scorer:
    return Scorer(root)


def truth(root: Path, split: str) -> Results:
    """The annotations as if a detector had found them."""
    results = {}
    for sample in NuScenesDataset(root, split=split, images=False, points=False):
        boxes = sample.boxes
        names = [ATTRIBUTES[i] if i >= 0 else "" for i in boxes.attributes.tolist()]
        found = Detections(boxes.values, boxes.labels, torch.ones(len(boxes)))
        results[sample.token] = result_boxes(sample.token, found, sample.global_from_key, names)
    return results


def assert_perfect(metrics: Metrics) -> None:
    assert metrics.mean_ap_present > 0.99
    for name in metrics.present:
        errors = metrics.label_tp_errors[name]
        assert errors["trans_err"] < 1e-3 and errors["scale_err"] < 1e-4
        assert math.isnan(errors["orient_err"]) or errors["orient_err"] < 0.01


def test_annotations_as_detections_are_perfect(root: Path, scorer: Scorer, tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", truth(root, "all"), "lidar")
    metrics = scorer.score(tmp_path / "r.json", "all")
    assert metrics.samples == 6 and metrics.present == ["car", "pedestrian"]
    assert_perfect(metrics)
    car = metrics.label_tp_errors["car"]
    assert car["vel_err"] < 0.01 and car["attr_err"] == 0  # the ego is pitched and turned, the car moves
    assert metrics.mean_ap == pytest.approx(0.2, abs=1e-3)  # two of ten classes


def test_annotations_of_the_real_keyframe(keyframe_root: Path, tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", truth(keyframe_root, "keyframe"), "lidar")
    assert_perfect(Scorer(keyframe_root).score(tmp_path / "r.json", "keyframe"))


@pytest.mark.slow
def test_annotations_of_a_simulated_set(tmp_path: Path) -> None:
    config = SimulationConfig(
        scenes=3,
        keyframes=4,
        image_width=176,
        image_height=99,
        sweeps_per_keyframe=2,
        lidar_azimuth_steps=360,
        antialias=False,
    )
    simulate(tmp_path / "sim", config, workers=1, progress=False)
    write_results(tmp_path / "r.json", truth(tmp_path / "sim", "sim_train"), "lidar")
    metrics = Scorer(tmp_path / "sim").score(tmp_path / "r.json", "sim_train")
    assert metrics.present == list(CLASSES)
    assert_perfect(metrics)
    assert metrics.nd_score > 0.99 and metrics.tp_errors["vel_err"] < 0.01 and metrics.tp_errors["attr_err"] < 0.01


def test_no_detection_at_all_scores_zero(root: Path, scorer: Scorer, tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", {token: [] for token in truth(root, "all")}, "camera")
    metrics = scorer.score(tmp_path / "r.json", "all")
    assert metrics.mean_ap == 0 and metrics.counts["car"] > 0
    assert json.loads((tmp_path / "r.json").read_text())["meta"]["use_lidar"] is False


def test_results_of_other_samples_are_refused(root: Path, scorer: Scorer, tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", truth(root, "tiny_train"), "lidar")
    with pytest.raises(ValueError, match=r"r\.json cannot be scored on split 'tiny_val' of v1\.0-tiny"):
        scorer.score(tmp_path / "r.json", "tiny_val")
    with pytest.raises(ValueError, match="nonsense"):
        scorer.score(tmp_path / "r.json", "nonsense")
    with pytest.raises(FileNotFoundError, match="no such result file"):
        scorer.score(tmp_path / "none.json", "all")


def test_result_boxes() -> None:
    pose = torch.eye(4, dtype=torch.float64)
    pose[:2, :2] = torch.tensor([[0.0, -1], [1, 0]])  # a quarter turn to the left
    pose[:3, 3] = torch.tensor([100.0, 200, 1])
    values = torch.tensor([[1.0, 2, 3, 4, 5, 6, 0.0, 2.0, 0.0]]).repeat(600, 1)
    values[599, 7:] = math.nan
    boxes = result_boxes("t", Detections(values, torch.zeros(600, dtype=torch.long), torch.linspace(0, 1, 600)), pose)
    assert len(boxes) == 500 and boxes[0]["detection_score"] == 1.0
    assert boxes[0]["velocity"] == [0.0, 0.0] and boxes[0]["attribute_name"] == "vehicle.parked"
    assert boxes[1]["translation"] == [98.0, 201.0, 4.0] and boxes[1]["size"] == [5.0, 4.0, 6.0]
    assert boxes[1]["velocity"] == pytest.approx([0.0, 2.0]) and boxes[1]["attribute_name"] == "vehicle.moving"
    assert boxes[1]["rotation"] == pytest.approx([math.sqrt(0.5), 0, 0, math.sqrt(0.5)])


def test_attributes_fit_their_class() -> None:
    for name in CLASSES:
        for speed in (0.0, 5.0):
            kind = {"pedestrian": "pedestrian", "bicycle": "cycle", "motorcycle": "cycle"}.get(name, "vehicle")
            given = attribute(name, speed)
            assert (
                given == ""
                if name in ("barrier", "traffic_cone")
                else given.startswith(kind + ".") and given in ATTRIBUTES
            )
    assert attribute("pedestrian", 1.0) == "pedestrian.moving" and attribute("bus", 0.0) == "vehicle.stopped"


def test_a_camera_detector_sees_images_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Batch] = []

    def look(self: Detector, batch: Batch) -> Features:
        seen.append(batch)
        return real(self, batch)

    real = Detector.forward
    monkeypatch.setattr(Detector, "forward", look)
    config = mini_config(root, "camera")
    detector = build_detector(config.detector)
    results = predict(detector, evaluation_loader(config, root, "all", workers=0).epoch(0), "camera")
    assert len(results) == 6 and detector.training
    assert all(len(b.points) == 0 and b.depth is None and not b.boxes.valid.any() for b in seen)


def test_evaluate_run(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(mini_config(root, epochs=1), tmp_path / "run", progress=False, cpu=True)
    capfd.readouterr()
    metrics = evaluate_run(run, workers=0, device="cpu")
    assert capfd.readouterr() == ("", "")
    evaluate_run(run, root, "all", workers=0, device="cpu")
    assert list(load_metrics(run)) == ["tiny_val", "all"]
    assert load_metrics(run)["tiny_val"].counts == metrics.counts and metrics.pretrained is False
    assert load_metrics(run)["all"].data == metrics.data == NuScenesDataset(root).digest
    assert "mAP" in str(metrics) and "none of:" in str(metrics)
    with pytest.raises(ValueError, match=r"known splits: .*tiny_train"):
        evaluate_run(run, root, "val", workers=0, device="cpu")


def test_metrics_survive_json(root: Path, scorer: Scorer, tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", truth(root, "all"), "lidar")
    metrics = scorer.score(tmp_path / "r.json", "all")
    again = Metrics.from_dict(json.loads(json.dumps(metrics.to_dict(), allow_nan=False)))
    assert math.isnan(again.label_tp_errors["traffic_cone"]["vel_err"])
    assert Metrics.from_dict({k: v for k, v in metrics.to_dict().items() if k != "data"}).data is None  # an older file
    assert again.to_dict() == metrics.to_dict() and replace(again, split="x").split == "x"
