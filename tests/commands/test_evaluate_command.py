"""`kdlab evaluate`: a result file or runs, subsets, tables, files, figures, the devkit beside it, errors."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture

import kdlab.official
from kdlab import cli
from kdlab.checkpoint import RunFolder, save_weights
from kdlab.config import save_config
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.evaluate import Found, Metrics, evaluate_file, load_metrics, write_results
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.subset import Subset
from kdlab.models import build_detector
from kdlab.sample import Detections


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("commands") / "set")


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    """A detector that was never trained."""
    folder = RunFolder(root.parent / "run")
    folder.path.mkdir()
    config = mini_config(root)
    save_config(config, folder.config)
    torch.manual_seed(0)
    save_weights(folder.weights, build_detector(config.detector))
    return folder.path


def result_file(path: Path, root: Path, shift: float) -> Path:
    """Annotations of the set, each moved by up to some metres."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for sample in NuScenesDataset(root, split="all", images=False, points=False):
        values = sample.boxes.values.clone()
        values[:, :2] += shift * torch.rand(len(values), 2, generator=generator)
        scores = torch.rand(len(values), generator=generator)
        found.append(Found(sample.token, Detections(values, sample.boxes.labels, scores), sample.global_from_key))
    write_results(path, found, "camera")
    return path


@pytest.fixture(scope="module")
def result(root: Path) -> Path:
    return result_file(root.parent / "near.json", root, 0.6)


@pytest.fixture(scope="module")
def other(root: Path) -> Path:
    return result_file(root.parent / "far.json", root, 3.0)


def words(root: Path, result: Path, *more: object) -> list[str]:
    return ["evaluate", "--result", str(result), "--data", str(root), "--split", "all", *map(str, more)]


def test_a_result_file(root: Path, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(root, result, "--json", tmp_path / "m.json")) == 0
    metrics = evaluate_file(result, root, "all").metrics
    assert capsys.readouterr().out == f"{result}\n{metrics}\n"
    summary = json.loads((tmp_path / "m.json").read_text())
    assert summary["mean_ap"] == metrics.mean_ap > 0 and summary["meta"]["use_camera"] is True
    assert {"label_aps", "mean_dist_aps", "label_tp_errors", "tp_errors", "tp_scores", "nd_score"} < set(summary)
    origin = {"split": "all", "subset": None, "samples": 6, "counts": metrics.counts, "data": metrics.data}
    assert summary["kdlab"] == origin
    assert cli.main(words(root, result, "--json", tmp_path / "near.json", "--distance", 0, 10)) == 0
    near = json.loads((tmp_path / "near.json").read_text())["kdlab"]
    assert near["subset"] == "distance (0.0, 10.0)" and 0 < near["counts"]["car"] < metrics.counts["car"]
    capsys.readouterr()

    from nuscenes.eval.detection.data_classes import DetectionMetrics

    theirs = DetectionMetrics.deserialize(summary)
    assert theirs.mean_ap == pytest.approx(metrics.mean_ap) and theirs.nd_score == pytest.approx(metrics.nd_score)


def test_both_numbers_side_by_side(
    root: Path, result: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(words(root, result, "--official")) == 0
    out = capsys.readouterr().out
    assert "nuscenes-devkit" in out and "mAAE" in out and "largest difference" in out and "DIFFER" not in out

    assert "its tables included" in out and "times as long" in out
    real = kdlab.official.timed_official

    def wrong(*args: object, **options: object) -> tuple[Metrics, float]:
        metrics, seconds = real(*args, **options)  # type: ignore[arg-type]
        return replace(metrics, mean_ap=metrics.mean_ap + 2e-9), seconds

    monkeypatch.setattr(kdlab.official, "timed_official", wrong)
    assert cli.main(words(root, result, "--official")) == 1
    assert "THEY DIFFER by more than 1e-09" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "subset", "said"),
    [
        ("--scenes tiny-0001", Subset(scenes=("tiny-0001",)), "scenes tiny-0001"),
        ("--distance 0 8", Subset(distance=(0, 8)), "distance 0 to 8 m"),
        ("--visibility 1 3", Subset(visibility=(1, 3)), "visibility 1 3"),
        ("--points 4 inf", Subset(points=(4, float("inf"))), "points 4 to inf"),
        ("--time day", Subset(time="day"), "time of day day"),
    ],
)
def test_subsets(
    root: Path, other: Path, capsys: pytest.CaptureFixture[str], flags: str, subset: Subset, said: str
) -> None:
    assert cli.main(words(root, other, *flags.split())) == 0
    metrics = evaluate_file(other, root, "all", subset=subset).metrics
    assert capsys.readouterr().out == f"{other}\nnot the official numbers of the split: {said}\n{metrics}\n"


def test_settings_of_ones_own(root: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = EvaluationConfig(dist_ths=(1.0, 2.0, 3.0, 5.0), min_recall=0.0)
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    file = tmp_path / "m.json"
    assert cli.main(words(root, other, "--config", tmp_path / "c.json", "--json", file, "--official")) == 0
    assert f"settings {tmp_path / 'c.json'}" in capsys.readouterr().out
    summary = json.loads(file.read_text())
    assert summary["cfg"] == config.to_dict() and list(summary["label_aps"]["car"]) == ["1.0", "2.0", "3.0", "5.0"]


def test_rings(root: Path, result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(root, result, "--rings", 0, 8, 12, 50, 60)) == 0
    table = capsys.readouterr().out.split("by distance")[1].splitlines()[2:]
    assert [line.split(" m")[0].strip() for line in table] == ["0 to 8", "8 to 12", "12 to 50", "50 to 60"]
    whole = evaluate_file(result, root, "all").metrics
    assert sum(int(line.split()[4]) for line in table) == sum(whole.counts.values())
    assert table[3].split()[5:] == ["0", *["-"] * 7]


def test_frames_that_differ_and_scores_by_sample(
    root: Path, result: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, figures = tmp_path / "s.csv", tmp_path / "deep" / "figures"
    more = ["--against", other, "--by-sample", file, "--figures", figures, "--rings", 0, 8, 50, "--time", "day"]
    assert cli.main(words(root, result, *more)) == 0
    out = capsys.readouterr().out
    assert "the frames where near and far differ most" in out and "far by distance" in out
    rows = list(csv.DictReader(file.open()))
    assert len(rows) == 12 and {row["result"] for row in rows} == {"near", "far"}
    assert rows[0]["scene"] == "tiny-0001" and 0 < float(rows[0]["ap"]) <= 1 and int(rows[0]["true_positives"]) > 0
    assert sorted(f.name for f in figures.iterdir()) == [
        "errors.png",
        "frames.png",
        "precision_recall.png",
        "rings.png",
    ]


def test_results_of_one_name_are_told_apart(
    root: Path, result: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, file in (("one", result), ("two", other)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.json").write_bytes(file.read_bytes())
    assert cli.main(words(root, tmp_path / "one" / "r.json", "--against", tmp_path / "two" / "r.json")) == 0
    assert "the frames where one and two differ most" in capsys.readouterr().out


def test_a_run(root: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["evaluate", "--run", str(run), "--split", "all", "--cpu", "--workers", "0"]
    assert cli.main(start) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{run}\n{load_metrics(run)['all']}\n")
    assert "odd (almost certain): nothing is found" in said  # fresh weights
    more = ["--distance", "0", "10", "--figures", str(tmp_path / "figures"), "--json", str(tmp_path / "m.json")]
    assert cli.main([*start, "--out", str(tmp_path / "out"), *more]) == 0
    assert "not the official numbers of the split: distance 0 to 10 m" in capsys.readouterr().out
    whole, near = (
        load_metrics(tmp_path / "out")["all"],
        evaluate_file(tmp_path / "out" / "results_all.json", root, "all", subset=Subset(distance=(0, 10))),
    )
    assert whole.to_dict() == load_metrics(run)["all"].to_dict()
    assert json.loads((tmp_path / "m.json").read_text())["mean_ap"] == near.metrics.mean_ap
    assert sum(near.metrics.counts.values()) < sum(whole.counts.values())
    assert cli.main([*start, "--official"]) == 0
    assert "largest difference" in capsys.readouterr().out


def test_what_does_not_go_together(root: Path, result: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = words(root, result)
    for line, said in (
        (["evaluate"], "name run folders with --run or a result file with --result, one of the two"),
        ([*given, "--run", "x"], "one of the two"),
        (given[:-2], "--result wants --data (the data set) and --split"),
        ([*given, "--out", "x"], "--out goes with --run"),
        ([*given, "--workers", "3"], "--workers goes with --run"),
        ([*given, "--cpu"], "--cpu goes with --run"),
        ([*given, "--against", str(result)], "that is the very file that is scored; name another one"),
        ([*given, "--distance", "9", "3"], "distance must be two numbers, the first below the second, got (9.0, 3.0)"),
        ([*given, "--distance", "90", "99"], "no annotation that counts within distance (90.0, 99.0)"),
        (["evaluate", "--run", str(run), "--version", "v9", "--split", "all"], "holds no version 'v9'"),
        (["evaluate", "--run", "a", "b", "--by-sample", "x.csv"], "--by-sample goes with a single --run"),
        ([*given, "--rings", "0"], "--rings wants two or more rising distances"),
        ([*given, "--rings", "0", "20", "10"], "--rings wants two or more rising distances"),
        ([*given, "--rings", "0", "5", "--distance", "0", "5"], "exclude each other"),
        ([*given, "--official", "--time", "day"], "the devkit knows no subsets"),
        ([*given, "--by-sample", "x.csv", "--visibility", "1"], "score whole samples"),
    ):
        assert cli.main(line) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_what_cannot_be_scored_is_one_sentence(
    root: Path, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(result.read_text())
    token = next(iter(content["results"]))
    broken = tmp_path / "broken.json"
    content["results"][token][0]["detection_name"] = "tram"
    broken.write_text(json.dumps(content))
    (tmp_path / "c.json").write_text("{}")
    for line, said in (
        (words(root, broken), f"{broken}: sample '{token}', box 0 (tram): detection_name 'tram' is none of the ten"),
        (words(root, tmp_path / "none.json"), "no such result file"),
        (words(tmp_path / "none", result), "no data set at"),
        ([*words(root, result)[:-1], "nonsense"], "no split 'nonsense'"),
        (words(root, result, "--version", "v9"), "holds no version 'v9'"),
        (words(root, result, "--scenes", "moon"), "no scene 'moon'"),
        (words(root, result, "--time", "night"), "no sample"),
        (words(root, result, "--config", tmp_path / "c.json"), "the evaluation config lacks"),
        (words(root, result, "--against", broken), "is none of the ten"),
    ):
        assert cli.main(line) == 1
        error = capsys.readouterr().err
        assert error.startswith("kdlab: error: ") and said in error and error.count("\n") == 1
