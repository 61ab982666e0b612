"""Run folders: loading, shipping, comparing."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture
from safetensors.torch import load_file, save_file

import kdlab
from kdlab.checkpoint import LossLog, differing_key, read_losses, write_json
from kdlab.config import DistillConfig, save_config
from kdlab.evaluate import Metrics, evaluate_run
from kdlab.runs import compare, describe
from kdlab.sample import CLASSES
from kdlab.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_set(tmp_path_factory.mktemp("runs") / "set")
    path = train(mini_config(root, epochs=1), root.parent / "run", progress=False, cpu=True)
    evaluate_run(path, workers=0, device="cpu")
    return path


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def test_shipped_half_precision_weights(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.json", tmp_path)
    weights = load_file(run / "detector.safetensors")
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}, tmp_path / "detector.safetensors"
    )
    detector = kdlab.load_detector(tmp_path)
    assert all(p.dtype == torch.float32 for p in detector.parameters())


def test_errors_of_loading(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        kdlab.load_detector(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        kdlab.load_detector(tmp_path)
    broken = copy(run, tmp_path / "broken")
    weights = load_file(run / "detector.safetensors")
    weights.pop("head.shared.0.weight")
    save_file(weights, broken / "detector.safetensors")
    with pytest.raises(ValueError, match=r"does not fit its config\.json: lacks .*head\.shared"):
        kdlab.load_detector(broken)
    (broken / "detector.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not finished"):
        kdlab.load_detector(broken)


def test_compare(run: Path, tmp_path: Path) -> None:
    other = copy(run, tmp_path / "other")
    plain = json.loads((other / "metrics.json").read_text())
    plain["tiny_val"]["mean_ap"] = 0.9
    write_json(other / "metrics.json", plain)
    table = compare([run, other])
    assert table.split == "tiny_val" and table.names == ("run", "other")
    assert table.best("mAP") == 1 and table.rows["mAP"][1] == 0.9
    assert {"NDS", "mATE", "mASE", "mAOE", "mAVE", "mAAE", "AP car"} <= table.rows.keys()
    assert "**0.9000**" in table.markdown() and "0.9000*" in table.text() and "No ground truth" in table.text()
    assert table.metrics["other"].mean_ap == 0.9
    write_json(other / "metrics.json", {"tiny_val": {**plain["tiny_val"], "data": "elsewhere"}})
    with pytest.raises(ValueError, match="different data sets"):
        compare([run, other])
    (other / "metrics.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"other has no metrics on tiny_val; .*: kdlab evaluate --run .*other --data .*set --split tiny_val",
    ):
        compare([run, other])
    with pytest.raises(ValueError, match="at least one"):
        compare([])


def test_same_names_are_told_apart(run: Path, tmp_path: Path) -> None:
    paths = [copy(run, tmp_path / name / "run") for name in ("a", "b")]
    assert compare(paths).names == ("a/run", "b/run")


def test_describe(run: Path, tmp_path: Path) -> None:
    assert describe(run) == "lidar"
    other = copy(run, tmp_path / "other")
    config = replace(mini_config(tmp_path, "camera"), distill=DistillConfig("unidistill", "t", "released"))
    save_config(config, other / "config.json")
    assert describe(other) == "camera + unidistill (released)"


def test_loss_log_holds_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    log = LossLog(path, 0)
    for step in range(5):
        log.add({"step": step, "total": 0.1 * step})
    log.close()
    with path.open("a") as file:
        file.write("5,0.")  # a kill in the middle of a row
    log = LossLog(path, 3)
    log.add({"step": 3, "total": 7.0})
    with pytest.raises(RuntimeError, match="losses are step, other"):
        log.add({"step": 4, "other": 7.0})
    log.close()
    assert [(r["step"], r["total"]) for r in read_losses(path)] == [(0, 0), (1, 0.1), (2, 0.2), (3, 7)]


def test_differing_key() -> None:
    assert differing_key({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert differing_key({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b"
    assert differing_key({"a": None}, {"a": {"b": 2}}) == "a"


def test_metrics_of_few_classes() -> None:
    counts = {name: int(name == "car") for name in CLASSES}
    aps = {name: 0.5 if name == "car" else 0.0 for name in CLASSES}
    metrics = Metrics("s", 1, 0.05, 0.1, {}, aps, {}, counts)
    assert metrics.present == ["car"] and metrics.mean_ap_present == 0.5


def test_import_is_light() -> None:
    heavy = ("torch", "open3d", "nuscenes", "timm", "accelerate")
    code = f"import sys, kdlab; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
