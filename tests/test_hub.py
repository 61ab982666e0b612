"""Export and load: bit-equal round trips, the hub's cache, and what loading does not need."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture

import kdlab
from kdlab.checkpoint import load_run_config, write_json
from kdlab.commands.export import export
from kdlab.config import DistillConfig
from kdlab.evaluate import evaluation_loader
from kdlab.hub import load_detector, save_pretrained
from kdlab.metrics.metrics import TP_ERRORS, Metrics
from kdlab.models import Detector
from kdlab.sample import CLASSES, Batch
from kdlab.train import train

HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("hub") / "worlds" / "set")


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled camera student whose teacher is gone, with metrics."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = train(mini_config(root, epochs=1), folder / "teacher", progress=False, cpu=True)
    config = mini_config(root, "camera", epochs=1)
    cached = replace(config.data, image_cache=str(folder / "cache"))
    config = replace(config, data=cached, distill=DistillConfig("unidistill", str(teacher)))
    student = train(config, folder / "student", progress=False, cpu=True)
    shutil.rmtree(teacher)
    write_json(student / "metrics.json", {"tiny_val": metrics().to_dict()})
    return student


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(run, tmp_path_factory.mktemp("out") / "student")


def metrics() -> Metrics:
    errors = {**dict.fromkeys(TP_ERRORS, 0.5), "vel_err": float("nan")}
    aps = {name: {"0.5": 0.1, "1.0": 0.2, "2.0": 0.3, "4.0": 0.4} for name in CLASSES}
    by_class = {name: dict(errors) for name in CLASSES}
    return Metrics("tiny_val", 3, 0.25, 0.375, errors, aps, by_class, dict.fromkeys(CLASSES, 1), False, "ab" * 16)


def outputs(detector: Detector, batch: Batch) -> list[torch.Tensor]:
    with torch.no_grad():
        features = detector(batch.images_only())
    assert features.predictions is not None
    found = [t for d in detector.predict(features) for t in (d.values, d.labels, d.scores)]
    return [features.predictions.heatmap, features.predictions.regression, *found]


def in_process(code: str, cwd: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_round_trip_is_bit_equal(root: Path, run: Path, exported: Path) -> None:
    batch = next(evaluation_loader(load_run_config(run), root, "tiny_val", workers=0).epoch(0))
    ours, theirs = (outputs(kdlab.load_detector(folder), batch) for folder in (run, exported))
    assert len(ours) == len(theirs) > 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not kdlab.load_detector(str(exported)).training


def test_what_the_folder_holds(root: Path, run: Path, exported: Path) -> None:
    assert sorted(p.name for p in exported.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    plain = json.loads((exported / "config.json").read_text())
    assert plain["kdlab"]["classes"] == list(CLASSES) and plain["kdlab"]["version"]
    original, config = load_run_config(run), load_run_config(exported)  # it is a run folder too
    assert config.detector == original.detector and config.train == original.train
    assert config.data.root == "set" and config.distill is not None and config.distill.teacher == "teacher"
    assert original.data.image_cache and config.data.image_cache == ""
    for name in ("config.json", "README.md"):
        for local in (root.parent, run.parent):
            assert str(local) not in (exported / name).read_text()


def test_model_card(exported: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "kdlab" and card.data.license == "other"
    assert {"camera", "knowledge-distillation", "unidistill"} <= set(card.data.tags)
    assert card.data.eval_results is not None
    assert {(r.metric_name, r.metric_value, r.dataset_split) for r in card.data.eval_results} == {
        ("mAP", 0.25, "tiny_val"),
        ("NDS", 0.375, "tiny_val"),
    }
    assert "| tiny_val | 3 | 0.2500 | 0.3750 | 0.5000 | 0.5000 | 0.5000 | - | 0.5000 | abababababab |" in card.text
    assert "unidistill, intended; teacher teacher (digest " in card.text and "split all (digest " in card.text
    assert 'kdlab.load_detector("student")' in card.text


def test_an_unevaluated_run_says_so(root: Path, tmp_path: Path) -> None:
    run = train(mini_config(root, epochs=1), tmp_path / "plain", progress=False, cpu=True)
    card = ModelCard.load(save_pretrained(run, tmp_path / "out") / "README.md")
    assert "Not evaluated yet" in card.text and "none: trained alone" in card.text and card.data.eval_results is None


def test_an_earlier_export_is_replaced_and_nothing_else(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".git").mkdir(parents=True)
    save_pretrained(run, out)
    (out / "README.md").write_text("old")
    assert "library_name: kdlab" in (save_pretrained(run, out) / "README.md").read_text()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out holds something else \(notes\.txt\); give another folder"):
        save_pretrained(run, out)
    with pytest.raises(FileExistsError, match="holds something else"):
        save_pretrained(run, run)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(FileExistsError, match=r"holds something else \(config\.json\)"):
        save_pretrained(run, tmp_path / "foreign")
    with pytest.raises(FileExistsError, match="is a file"):
        save_pretrained(run, out / "notes.txt")
    assert (out / "notes.txt").read_text() == "mine" and (run / "detector.safetensors").exists()


def test_an_evaluated_export_is_replaced(run: Path, tmp_path: Path) -> None:
    out = save_pretrained(run, tmp_path / "out")
    for name in ("results_tiny_val.json", "cost.json"):
        write_json(out / name, {})
    write_json(out / "metrics.json", {"tiny_train": metrics().to_dict()})
    assert "| tiny_train | 3 |" in (save_pretrained(out, out) / "README.md").read_text()
    assert (out / "metrics.json").exists()  # Of these very weights.
    save_pretrained(run, out)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    (out / "results.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds something else \(results\.txt\)"):
        save_pretrained(run, out)


def test_damaged_metrics_are_named_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json: damaged"):
        save_pretrained(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mistyped_path_does_not_go_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdlab.hub._download", lambda *_: pytest.fail("asked the hub"))
    (tmp_path / "runs").mkdir()
    for source in ("runs/studnet", "runs/studnet@main"):
        with pytest.raises(FileNotFoundError, match=f"{source}: no such run folder in runs, a folder that is here"):
            load_detector(source)


def test_errors(run: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: no such run folder"):
        save_pretrained(tmp_path / "none", tmp_path / "out")
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(run / "config.json", begun)
    with pytest.raises(FileNotFoundError, match="the run is not finished"):
        save_pretrained(begun, tmp_path / "out")
    foreign = Path(shutil.copytree(exported, tmp_path / "foreign"))
    write_json(foreign / "config.json", {"architectures": ["Other"]})
    with pytest.raises(ValueError, match=r"config\.json: not of kdlab, it has no 'detector'"):
        load_detector(foreign)
    plain = json.loads((exported / "config.json").read_text())
    write_json(foreign / "config.json", {**plain, "kdlab": {"version": "9", "classes": ["cat"]}})
    with pytest.raises(ValueError, match="knows other classes than this kdlab: cat"):
        load_detector(foreign)
    write_json(foreign / "config.json", {**plain, "train": {"of_a_later_kdlab": 1}})
    assert load_detector(foreign).config == load_run_config(run).detector  # loading looks at the detector alone


def test_loading_needs_no_training_code(exported: Path, run: Path, tmp_path: Path) -> None:
    code = f"""
import sys, kdlab
for folder in ({str(exported)!r}, {str(run)!r}):
    kdlab.load_detector(folder)
unwanted = ("kdlab.distill", "kdlab.train", "kdlab.loop", "kdlab.data", "kdlab.evaluate", "accelerate", "nuscenes")
print([m for m in sys.modules if any(m == u or m.startswith(u + ".") for u in unwanted)])
"""
    done = in_process(code, tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr


def test_repositories_come_from_the_hubs_cache(exported: Path, tmp_path: Path) -> None:
    repository = tmp_path / "home" / "hub" / "models--user--repo"
    snapshot = repository / "snapshots" / HASH
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    for ref in ("main", "v1"):
        (repository / "refs" / ref).write_text(HASH)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(exported / name, snapshot)
    shutil.copytree(exported, tmp_path / "other" / "local")
    code = f"""
import os, kdlab
for source in ("user/repo", "user/repo@v1", "other/local"):
    print(source, sum(p.numel() for p in kdlab.load_detector(source).parameters()))
for source in ("user/none", "user/repo@v2", "user/repo"):
    if source == "user/repo":
        os.remove({str(snapshot / "model.safetensors")!r})
    try:
        kdlab.load_detector(source)
    except FileNotFoundError as error:
        print(error)
"""
    done = in_process(
        code, tmp_path, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "home" / "hub")
    )
    size = sum(p.numel() for p in load_detector(exported).parameters())
    lines = done.stdout.splitlines()
    assert lines[:3] == [f"user/repo {size}", f"user/repo@v1 {size}", f"other/local {size}"], done.stderr
    assert lines[3].startswith("user/none: no such run folder here, and no such repository could be had from the Hug")
    assert lines[4].startswith("user/repo: no such run folder here") and "at revision v2" in lines[4]
    assert "user/repo: the repository on the Hugging Face hub has no model.safetensors" in lines[5]
    assert len(lines) == 6


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export([str(run), str(tmp_path / "out")]) == 0
    assert "hf upload USER/REPOSITORY" in capsys.readouterr().out
    assert kdlab.load_detector(tmp_path / "out").config == load_run_config(run).detector
