"""The table of a study's finished trials."""

import json
from pathlib import Path

import pandas as pd
import pytest
from study_fakes import metrics, run_config, write_run, write_study, write_trial

from kdlab.config import config_hash
from kdlab.sample import CLASSES
from kdlab.studies.plan import Change, Study
from kdlab.studies.results import collect, pending, write_csv
from kdlab.studies.verdict import COSTS


def plan(study: Path, changes: dict[str, int], split: str = "sim_test") -> None:
    """A study.json that plans so many seeds of each change, and takes the folders that are there."""
    trials = []
    for change, seeds in changes.items():
        for seed in range(seeds):
            there = next(iter(sorted((study / change).glob(f"seed{seed}-*"))), Path(f"{change}/seed{seed}-00000000"))
            folder = f"{change}/{there.name}"
            train = ["kdlab", "train", "a config.json"]
            words = {"command": train, "evaluation": ["kdlab", "evaluate", "--run", folder]}
            trials.append({"change": change, "seed": seed, "folder": folder, **words})
    (study / "study.json").write_text(json.dumps({"name": "s", "split": split, "trials": trials}))


def test_a_row_says_everything(tmp_path: Path) -> None:
    run = write_trial(tmp_path, "unidistill", 3, 0.25, ["feature"], device="H100", seconds=7.0)
    row = collect(tmp_path).iloc[0]
    scores = {"mAP": 0.25, "NDS": 0.3, "mATE": 0.65, "mAAE": 0.65, "AP car": 0.25}
    assert {name: row[name] for name in scores} == pytest.approx(scores)
    made = {
        "change": "unidistill",
        "seed": 3,
        "split": "sim_test",
        "device": "H100",
        "precision": "fp32",
        "torch": "2.9",
    }
    made |= {"data": "digest", "train_data": "train", "teacher": "0123456789ab", "pretrained": False, "python": "3.11"}
    assert {name: row[name] for name in made} == made
    assert row["config_hash"] == config_hash(run_config(3, ["feature"])) and row["folder"] == str(run)
    assert (row["train_seconds"], row["train_parameters"], row["test_seconds"]) == (7.0, 1000, 0.02)
    assert pd.isna(row["test_memory_mb"]) and set(COSTS) <= set(row.index)  # not measured
    classes = [name for name in row.index if name.startswith("AP ")]
    assert classes == [f"AP {name}" for name in CLASSES if name != "bus"]  # no ground truth, no number


def test_finished_and_scored_trials_only_and_the_others_are_listed(tmp_path: Path) -> None:
    write_study(tmp_path, {"x": 0.01}, seeds=2)
    write_trial(tmp_path, "y", 0, None, ["feature"], finished=False)
    failed = write_trial(tmp_path, "y", 1, None, ["feature"], finished=False)
    (failed / "error.txt").write_text("exit code 1\n\nloss is NaN\n")
    write_trial(tmp_path, "y", 2, None, ["feature"])
    unscored = write_trial(tmp_path, "y", 3, None, ["feature"])
    (unscored / "error.txt").write_text("no data set\n")
    plan(tmp_path, {"y": 5, "x": 2, "base": 2})
    assert list(zip(*collect(tmp_path)[["change", "seed"]].values.T, strict=True)) == [
        ("base", 0),
        ("base", 1),
        ("x", 0),
        ("x", 1),
    ]
    rest = pending(tmp_path)
    assert list(rest["change"]) == ["y"] * 5 and list(rest["seed"]) == [0, 1, 2, 3, 4]
    assert list(rest["state"]) == ["unfinished", "failed", "trained", "failed", "missing"]
    assert list(rest["why"]) == ["", "loss is NaN", "", "no data set", ""]
    assert rest["command"][4].startswith("kdlab train 'a config.json' && kdlab evaluate --run y/")


def test_the_plan_leaves_stale_runs_out(tmp_path: Path) -> None:
    write_trial(tmp_path, "base", 0, 0.2)
    stale = run_config(0, epochs=3)
    write_run(tmp_path / "base" / "seed0-zz", stale, metrics(0.9))
    assert len(collect(tmp_path)) == 2
    plan(tmp_path, {"base": 1})
    assert list(collect(tmp_path)["mAP"]) == pytest.approx([0.2])


def test_the_command_is_the_one_that_ran(tmp_path: Path) -> None:
    run = write_trial(tmp_path, "base", 0, 0.2)
    plan(tmp_path, {"base": 1})
    assert collect(tmp_path)["command"][0].startswith("kdlab train 'a config.json' && kdlab evaluate")
    (run / "trial.json").write_text(
        json.dumps({"command": ["kdlab", "train", "x"], "evaluation": ["kdlab", "e", "--cpu"]})
    )
    assert collect(tmp_path)["command"][0] == "kdlab train x && kdlab e --cpu"
    (run / "versions.json").write_text(json.dumps({"command": "python -m kdlab train x --cpu", "threads": "3"}))
    row = collect(tmp_path).iloc[0]
    assert row["command"] == "python -m kdlab train x --cpu && kdlab e --cpu" and row["threads"] == "3"
    assert row["run_hash"] == run.name.removeprefix("seed0-")


def test_a_study_itself(tmp_path: Path) -> None:
    study = Study("s", run_config(), (Change("long", {"train.epochs": 99}),), (0, 1), "sim_test", tmp_path)
    trials = study.trials()
    write_run(trials[0].folder, trials[0].config, metrics(0.2))
    rows = collect(study)
    assert list(rows["change"]) == ["base"] and rows["command"][0].startswith("kdlab train ")
    assert len(pending(study)) == 3 and set(pending(study)["state"]) == {"missing"}


def test_split(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = write_trial(tmp_path, "base", seed, 0.2)
        both = {split: metrics(0.2 + 0.1 * (split == "val"), split).to_dict() for split in ("sim_test", "val", "other")}
        (run / "metrics.json").write_text(json.dumps(both))
    write_trial(tmp_path, "x", 0, 0.3, ["feature"])
    assert set(collect(tmp_path)["split"]) == {"sim_test"} and len(collect(tmp_path)) == 3
    assert list(collect(tmp_path, "val")["mAP"]) == pytest.approx([0.3, 0.3])
    plan(tmp_path, {"base": 2}, split="other")
    assert set(collect(tmp_path)["split"]) == {"other"}


def test_csv_keeps_every_digit(tmp_path: Path) -> None:
    write_trial(tmp_path, "base", 0, 1 / 3)
    rows = collect(tmp_path)
    path = write_csv(rows, tmp_path / "results.csv")
    again = pd.read_csv(path, float_precision="round_trip")
    assert list(again.columns) == list(rows.columns) and again["mAP"][0] == 1 / 3
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["results.csv"]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such study folder"):
        collect(tmp_path / "none")
    assert len(collect(tmp_path)) == 0 and "mAP" in collect(tmp_path)
    run = write_trial(tmp_path, "base", 0, 0.2)
    (run / "versions.json").write_text("{")
    with pytest.raises(ValueError, match=r"versions\.json cannot be read"):
        collect(tmp_path)
