"""Shipped weights: small, whole, of the world that they were trained on, without paths of the machine."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from mini_run import mini_config, write_set

import kdlab.shipping
from kdlab.checkpoint import RunFolder, load_detector, load_run_config, save_weights
from kdlab.config import save_config
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.models import build_detector
from kdlab.shipping import ship, weights_of, world_of


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run on a data set that says it is simulated."""
    monkeypatch.setattr(kdlab.shipping, "WEIGHTS", tmp_path / "weights")
    root = write_set(tmp_path / "world")
    version = next(root.glob("*/scene.json")).parent
    (version / "simulation.json").write_text(json.dumps({"complete": True, "digest": "cafe"}))
    made = RunFolder(tmp_path / "made")
    (made.path / "stages" / "label_encoder").mkdir(parents=True)
    config = mini_config(root, camera_start=str(tmp_path / "elsewhere" / "start"))
    save_config(config, made.config)
    torch.manual_seed(0)
    for path in (made.weights, RunFolder(made.path / "stages" / "label_encoder").weights):
        save_weights(path, build_detector(config.detector))
    data = NuScenesDataset(root, split="all", images=False, points=False).digest
    made.versions.write_text(json.dumps({"torch": "2", "data": data, "command": f"kdlab train --data {root}"}))
    made.losses.write_text("step\n")
    return made.path


def test_a_shipped_run_predicts_and_names_no_path(run: Path, tmp_path: Path) -> None:
    folder = ship(run, "lidar")
    assert folder == weights_of("lidar", "cafe")
    for text in folder.glob("*.json"):
        assert str(tmp_path) not in text.read_text()
    assert load_run_config(folder).train.camera_start == "start"
    ours, theirs = load_detector(run).state_dict(), load_detector(folder).state_dict()
    assert all(torch.equal(value.half().float(), theirs[name].float()) for name, value in ours.items())
    assert (folder / "detector.safetensors").stat().st_size < 0.7 * (run / "detector.safetensors").stat().st_size
    assert RunFolder(folder / "stages" / "label_encoder").finished
    assert (folder / "losses.csv").exists()


@pytest.mark.parametrize("what", ["another world", "unfinished", "too large", "infinite", "not simulated", "part"])
def test_what_is_wrong_is_not_shipped(run: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ship(run, "lidar")
    old = (before / "config.json").read_bytes()
    config = load_run_config(run)
    if what == "another world":
        RunFolder(run).versions.write_text(json.dumps({"data": "other"}))
    elif what == "unfinished":
        RunFolder(run).weights.unlink()
    elif what == "too large":
        monkeypatch.setattr(kdlab.shipping, "LIMIT", 10.0)
    elif what == "infinite":
        detector = build_detector(config.detector)
        next(detector.parameters()).data.fill_(1e6)
        save_weights(RunFolder(run).weights, detector)
    elif what == "part":
        record = next(Path(config.data.root).glob("*/simulation.json"))
        record.write_text(json.dumps({"complete": True, "digest": "cafe", "scenes": ["scene-0001"]}))
    else:
        next(Path(config.data.root).glob("*/simulation.json")).unlink()
    reasons = r"another data set|not finished|at most|not finite|no finished simulated|part of a world"
    with pytest.raises(ValueError, match=reasons):
        ship(run, "lidar")
    assert (before / "config.json").read_bytes() == old
    assert [f.name for f in before.parent.iterdir()] == [before.name]


def test_a_world_is_told_by_its_digest(run: Path) -> None:
    root = Path(load_run_config(run).data.root)
    assert world_of(root) == "cafe"
    assert weights_of("fusion", world_of(root)).name == "fusion-cafe"


def test_what_is_shipped_is_small() -> None:
    root = Path(__file__).resolve().parents[1]
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "data/weights/**/*.safetensors"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    sizes = {name: (root / name).stat().st_size for name in listed if name}
    assert sizes and max(sizes.values()) <= 4e6 and sum(sizes.values()) <= 25e6, sizes
