"""Result files and metrics: the fast evaluation, the devkit's beside it, and what is stored of a run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture

from kdlab.checkpoint import RunFolder, save_weights
from kdlab.config import save_config
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.data.simulate import simulate
from kdlab.data.simulate_config import SimulationConfig
from kdlab.evaluate import (
    Found,
    Metrics,
    Scorer,
    evaluate_file,
    evaluate_run,
    evaluation_loader,
    load_metrics,
    of_present,
    predict,
    result_boxes,
    store_metrics,
    write_results,
)
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.subset import Subset
from kdlab.models import Detector, build_detector
from kdlab.official import largest_difference, official
from kdlab.sample import ATTRIBUTES, CLASSES, Batch, Detections, Features
from kdlab.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("evaluate") / "set")


@pytest.fixture(scope="module")
def scorer(root: Path) -> Scorer:
    return Scorer(root)


def write_truth(path: Path, root: Path, split: str) -> Path:
    """The annotations as if a detector had found them, with their own attributes."""
    results = {}
    for sample in NuScenesDataset(root, split=split, images=False, points=False):
        found = Detections(sample.boxes.values, sample.boxes.labels, torch.ones(len(sample.boxes)))
        results[sample.token] = boxes = result_boxes(sample.token, found, sample.global_from_key)
        for box, attribute in zip(boxes, sample.boxes.attributes.tolist(), strict=True):
            box["attribute_name"] = ATTRIBUTES[attribute] if attribute >= 0 else ""
    path.write_text(json.dumps({"meta": {}, "results": results}))
    return path


def noisy(root: Path, split: str, seed: int = 0, copies: int = 4) -> list[Found]:
    """Annotations moved, turned and resized, some of another class, scores with many ties, some frames left empty."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for sample in NuScenesDataset(root, split=split, images=False, points=False):
        values, labels = sample.boxes.values.repeat(copies, 1), sample.boxes.labels.repeat(copies)
        draw = torch.rand(len(values), 12, generator=generator)
        values[:, :2] += 3 * (draw[:, :2] - 0.5)
        values[:, 3:6] *= 0.8 + 0.4 * draw[:, 2:5]
        values[:, 6:9] += draw[:, 5:8] - 0.5
        labels = torch.where(draw[:, 8] < 0.2, (10 * draw[:, 9]).long(), labels)
        scores = (10 * draw[:, 10]).round() / 10
        found.append(Found(sample.token, Detections(values, labels, scores), sample.global_from_key))
    return found


def assert_perfect(metrics: Metrics) -> None:
    assert metrics.mean_ap_present > 0.99
    for name in metrics.present:
        errors = metrics.label_tp_errors[name]
        assert errors["trans_err"] < 1e-3 and errors["scale_err"] < 1e-4
        assert math.isnan(errors["orient_err"]) or errors["orient_err"] < 0.01


def test_annotations_as_detections_are_perfect(root: Path, scorer: Scorer, tmp_path: Path) -> None:
    metrics = scorer.score(write_truth(tmp_path / "r.json", root, "all"), "all").metrics
    assert metrics.samples == 6 and metrics.present == ["car", "pedestrian"]
    assert_perfect(metrics)
    car = metrics.label_tp_errors["car"]
    assert car["vel_err"] < 0.01 and car["attr_err"] == 0  # the ego is pitched and turned, the car moves
    assert metrics.mean_ap == pytest.approx(0.2, abs=1e-3)  # two of ten classes


def test_annotations_of_the_real_keyframe(keyframe_root: Path, tmp_path: Path) -> None:
    path = write_truth(tmp_path / "r.json", keyframe_root, "keyframe")
    assert_perfect(evaluate_file(path, keyframe_root, "keyframe").metrics)


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
    path = write_truth(tmp_path / "r.json", tmp_path / "sim", "sim_train")
    metrics = Scorer(tmp_path / "sim").score(path, "sim_train").metrics
    assert metrics.present == list(CLASSES)
    assert_perfect(metrics)
    assert metrics.nd_score > 0.99 and metrics.tp_errors["vel_err"] < 0.01 and metrics.tp_errors["attr_err"] < 0.01
    assert largest_difference(metrics, official(path, tmp_path / "sim", "sim_train")) < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_the_devkit_says_the_same(root: Path, scorer: Scorer, tmp_path: Path, seed: int) -> None:
    found = noisy(root, "all", seed)
    write_results(tmp_path / "r.json", found, "lidar")
    ours = scorer.score(tmp_path / "r.json", "all")
    assert 0 < ours.metrics.label_aps["car"]["2.0"] < 1
    assert largest_difference(ours.metrics, official(tmp_path / "r.json", root, "all")) < 1e-9
    in_memory = scorer.score(found, "all")
    assert in_memory.metrics.to_dict() == ours.metrics.to_dict()
    for key, curve in ours.curves.items():
        for name, values in vars(curve).items():
            np.testing.assert_array_equal(getattr(in_memory.curves[key], name), values)


def test_the_devkit_says_the_same_of_the_real_keyframe(keyframe_root: Path, tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", noisy(keyframe_root, "keyframe"), "lidar")
    ours = evaluate_file(tmp_path / "r.json", keyframe_root, "keyframe").metrics
    assert ours.mean_ap > 0.05
    assert largest_difference(ours, official(tmp_path / "r.json", keyframe_root, "keyframe")) < 1e-9


def test_the_devkit_says_the_same_with_other_settings(root: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(dist_ths=(1.0, 3.0), dist_th_tp=3.0, min_recall=0.2, min_precision=0.0, mean_ap_weight=3)
    write_results(tmp_path / "r.json", noisy(root, "all"), "lidar")
    ours = Scorer(root, config=config).score(tmp_path / "r.json", "all").metrics
    assert list(ours.label_aps["car"]) == ["1.0", "3.0"]
    assert largest_difference(ours, official(tmp_path / "r.json", root, "all", config=config)) < 1e-9


def test_no_detection_at_all_scores_zero(root: Path, scorer: Scorer, tmp_path: Path) -> None:
    none = Detections(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    write_results(tmp_path / "r.json", [replace(one, detections=none) for one in noisy(root, "all")], "camera")
    metrics = scorer.score(tmp_path / "r.json", "all").metrics
    assert metrics.mean_ap == 0 and metrics.counts["car"] > 0
    assert largest_difference(metrics, official(tmp_path / "r.json", root, "all")) == 0
    assert json.loads((tmp_path / "r.json").read_text())["meta"]["use_lidar"] is False


def test_results_of_other_samples_are_refused(root: Path, scorer: Scorer, tmp_path: Path) -> None:
    path = write_truth(tmp_path / "r.json", root, "tiny_train")
    with pytest.raises(ValueError, match=r"r\.json: 3 of the 3 samples of split 'tiny_val' of v1\.0-tiny are missing"):
        scorer.score(path, "tiny_val")
    with pytest.raises(ValueError, match=r"r\.json cannot be scored on split 'tiny_val' of v1\.0-tiny"):
        official(path, root, "tiny_val")
    with pytest.raises(ValueError, match="nonsense"):
        scorer.score(path, "nonsense")
    for score in (scorer.score, lambda path, split: official(path, root, split)):
        with pytest.raises(FileNotFoundError, match="no such result file"):
            score(tmp_path / "none.json", "all")


def test_differences_of_metrics(root: Path, scorer: Scorer) -> None:
    metrics = scorer.score(noisy(root, "all"), "all").metrics
    assert largest_difference(metrics, metrics) == 0
    aps = metrics.label_aps | {"car": metrics.label_aps["car"] | {"4.0": metrics.label_aps["car"]["4.0"] + 0.25}}
    assert largest_difference(metrics, replace(metrics, label_aps=aps)) == 0.25
    assert largest_difference(metrics, replace(metrics, mean_ap=math.nan)) == math.inf
    assert largest_difference(metrics, replace(metrics, counts=metrics.counts | {"car": 1})) == math.inf


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


def test_numbers_that_are_not_finite_are_not_written(root: Path, tmp_path: Path) -> None:
    found = noisy(root, "all")
    found[1].detections.values[0, 2] = math.inf
    with pytest.raises(ValueError, match=f"sample '{found[1].token}': .*not finite"):
        write_results(tmp_path / "r.json", found, "lidar")
    assert not list(tmp_path.iterdir())


def test_a_camera_detector_sees_images_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Batch] = []

    def look(self: Detector, batch: Batch) -> Features:
        seen.append(batch)
        return real(self, batch)

    real = Detector.forward
    monkeypatch.setattr(Detector, "forward", look)
    config = mini_config(root, "camera")
    detector = build_detector(config.detector)
    results = predict(detector, evaluation_loader(config, root, "all", workers=0).epoch(0))
    assert [one.token for one in results] == NuScenesDataset(root, split="all").tokens and detector.training
    assert all(len(b.points) == 0 and b.depth is None and not b.boxes.valid.any() for b in seen)


def test_evaluate_run(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(mini_config(root, epochs=1, evaluate_every=1), tmp_path / "run", progress=False, cpu=True)
    capfd.readouterr()
    metrics = evaluate_run(run, workers=0, device="cpu")
    assert capfd.readouterr() == ("", "")
    evaluate_run(run, root, "all", workers=0, device="cpu")
    assert list(load_metrics(run)) == ["tiny_val", "all"]
    assert load_metrics(run)["tiny_val"].counts == metrics.counts and metrics.pretrained is False
    assert load_metrics(run)["all"].data == metrics.data == NuScenesDataset(root).digest
    assert "mAP" in str(metrics) and "none of:" in str(metrics)
    again = evaluate_file(run / "results_tiny_val.json", root, "tiny_val").metrics
    assert replace(again, pretrained=False).to_dict() == metrics.to_dict()
    assert largest_difference(metrics, official(run / "results_all.json", root, "all")) == math.inf  # another split
    assert largest_difference(load_metrics(run)["all"], official(run / "results_all.json", root, "all")) < 1e-9
    validated = json.loads(RunFolder(run).validation.read_text())["1"]
    assert Metrics.from_dict(validated).counts == metrics.counts
    with pytest.raises(ValueError, match=r"known splits: .*tiny_train"):
        evaluate_run(run, root, "val", workers=0, device="cpu")


def test_metrics_survive_json(root: Path, scorer: Scorer) -> None:
    metrics = scorer.score(noisy(root, "all"), "all").metrics
    again = Metrics.from_dict(json.loads(json.dumps(metrics.to_dict(), allow_nan=False)))
    assert math.isnan(again.label_tp_errors["traffic_cone"]["vel_err"])
    assert again.to_dict() == metrics.to_dict() and replace(again, split="x").split == "x"


def test_metrics_of_an_earlier_version_want_another_evaluation(root: Path, scorer: Scorer, tmp_path: Path) -> None:
    metrics = scorer.score(noisy(root, "all"), "all").metrics
    old = metrics.to_dict() | {"label_aps": metrics.mean_dist_aps}
    (tmp_path / "metrics.json").write_text(json.dumps({"all": old}))
    with pytest.raises(ValueError, match=r"metrics\.json: .* make them again: kdlab evaluate --run .* --split all"):
        load_metrics(tmp_path)


@pytest.mark.parametrize(("text", "message"), [
    ('{"all": ', "damaged .*; remove it and evaluate again: kdlab evaluate --run"),
    ("[]", "holds no metrics of kdlab; remove it"),
    ('{"all": 3}', "holds no metrics of kdlab"),
    ('{"all": {}}', r"the metrics on all cannot be read \(lacks 'label_aps'\); make them again: .* --split all"),
    ('{"all": {"label_aps": {}, "later": 1, "tp_errors": {}, "label_tp_errors": {}}}', "the metrics on all"),
])  # fmt: skip
def test_damaged_metrics(root: Path, scorer: Scorer, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"metrics\.json: {message}"):
        load_metrics(tmp_path)
    metrics = scorer.score(noisy(root, "all"), "all").metrics
    if text.startswith('{"all": {'):  # The cure that the message names works.
        store_metrics(path, "all", metrics)
        assert load_metrics(tmp_path)["all"].to_dict() == metrics.to_dict()
    else:
        with pytest.raises(ValueError, match=message):
            store_metrics(path, "all", metrics)
        assert path.read_text() == text


def test_damaged_metrics_are_said_before_the_work(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = mini_config(root), RunFolder(tmp_path)
    save_config(config, folder.config)
    save_weights(folder.weights, build_detector(config.detector))
    folder.metrics.write_text("{")
    monkeypatch.setattr("kdlab.evaluate.predict", lambda *_: pytest.fail("predicted"))
    with pytest.raises(ValueError, match=r"metrics\.json: damaged"):
        evaluate_run(tmp_path, workers=0, device="cpu")


def test_the_workers_end_also_after_an_error(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder, closed = mini_config(root), RunFolder(tmp_path), []
    save_config(config, folder.config)
    save_weights(folder.weights, build_detector(config.detector))
    monkeypatch.setattr("kdlab.data.batch.Loader.close", lambda loader: closed.append(loader))
    monkeypatch.setattr("kdlab.evaluate.predict", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_run(tmp_path, workers=0, device="cpu")
    assert len(closed) == 1


def test_boxes_of_another_split_are_refused(root: Path, scorer: Scorer, tmp_path: Path) -> None:
    path = write_truth(tmp_path / "r.json", root, "all")
    for given in (path, str(path), noisy(root, "all")):  # The file holds the samples of every split.
        boxes = scorer.boxes(given, "all")
        assert scorer.score(boxes, "all").metrics.samples == 6
        with pytest.raises(ValueError, match=r"read for split 'all' of v1\.0-tiny, samples .* for split 'tiny_val'"):
            scorer.score(boxes, "tiny_val")
    assert scorer.score(str(path), "tiny_val").metrics.samples == 3


def test_the_number_of_boxes_is_a_setting(root: Path) -> None:
    few = Scorer(root, config=EvaluationConfig(max_boxes_per_sample=1))
    assert np.bincount(few.boxes(noisy(root, "all"), "all").sample).max() == 1


def test_the_devkit_needs_a_box_in_the_split(root: Path, scorer: Scorer, tmp_path: Path) -> None:
    """Of a result file without any in the samples of the split, though others have some."""
    path = write_truth(tmp_path / "r.json", root, "all")
    content = json.loads(path.read_text())
    empty = set(scorer.truth("tiny_val").tokens)
    content["results"] = {token: [] if token in empty else boxes for token, boxes in content["results"].items()}
    path.write_text(json.dumps(content))
    ours = scorer.score(path, "tiny_val").metrics
    assert ours.mean_ap == 0 and sum(ours.counts.values()) > 0
    assert largest_difference(ours, official(path, root, "tiny_val")) == 0


@pytest.mark.parametrize("spoil", ["{", "[]", '{"meta": {}, "results": []}', '{"meta": {}}', "size"])
def test_whatever_the_devkit_raises_is_one_error(root: Path, tmp_path: Path, spoil: str) -> None:
    path = write_truth(tmp_path / "r.json", root, "all")
    if spoil == "size":  # It fails in evaluate(), where boxes are laid upon each other.
        content = json.loads(path.read_text())
        for boxes in content["results"].values():
            for box in boxes:
                box["size"] = [0.0, 1.0, 1.0]
        spoil = json.dumps(content)
    path.write_text(spoil)
    with pytest.raises(ValueError, match=r"r\.json cannot be scored on split 'all' of v1\.0-tiny: \w+"):
        official(path, root, "all")


def test_a_subset_of_everything_changes_nothing(root: Path, scorer: Scorer) -> None:
    found = noisy(root, "all")
    whole = scorer.score(found, "all").metrics
    assert scorer.score(found, "all", Subset(distance=(0, math.inf))).metrics.to_dict() == whole.to_dict()
    near = scorer.score(found, "all", Subset(distance=(0, 8))).metrics
    assert 0 < sum(near.counts.values()) < sum(whole.counts.values())


def test_metrics_of_the_classes_that_are_there(root: Path, scorer: Scorer) -> None:
    metrics = scorer.score(noisy(root, "all"), "all").metrics
    there = of_present(metrics)
    assert there.mean_ap == metrics.mean_ap_present == pytest.approx(5 * metrics.mean_ap)  # two of ten classes
    expected = {k: np.mean([metrics.label_tp_errors[c][k] for c in ("car", "pedestrian")]) for k in there.tp_errors}
    assert there.tp_errors == pytest.approx(expected)
    assert there.nd_score == pytest.approx((5 * there.mean_ap + sum(there.tp_scores.values())) / 10)
    none = of_present(replace(metrics, counts=dict.fromkeys(CLASSES, 0)))
    assert math.isnan(none.mean_ap) and math.isnan(none.nd_score) and math.isnan(none.tp_errors["trans_err"])
    cones = of_present(replace(metrics, counts=dict.fromkeys(CLASSES, 0) | {"traffic_cone": 1}))
    assert cones.mean_ap == 0 and math.isnan(cones.tp_errors["vel_err"]) and not math.isnan(cones.nd_score)
