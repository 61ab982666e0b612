"""The demo and the overfit check: their parts quickly, the whole of them where time allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import kdlab.demo
import kdlab.shipping
from kdlab.checkpoint import RunFolder, load_run_config, save_weights
from kdlab.config import save_config
from kdlab.demo import Clock, DemoConfig, demo, make_teacher, run_config, verdict
from kdlab.evaluate import TP_ERRORS, Metrics
from kdlab.models import build_detector
from kdlab.overfit import Recall, keyframe_root, overfit, overfit_config, recall
from kdlab.sample import CLASSES, Boxes3D, Detections
from kdlab.shipping import weights_of


def metrics(ap: float, nds: float, present: tuple[str, ...] = CLASSES) -> Metrics:
    return Metrics(
        split="sim_test",
        samples=4,
        mean_ap=ap,
        nd_score=nds,
        tp_errors=dict.fromkeys(TP_ERRORS, 0.4),
        label_aps={name: {"2.0": ap} for name in CLASSES},
        label_tp_errors={},
        counts={name: int(name in present) for name in CLASSES},
    )


@pytest.mark.parametrize(
    ("ap", "nds", "word"),
    [(0.3, 0.3, "is better than"), (0.1, 0.1, "NOT better"), (0.2, 0.2, "NOT"), (0.3, 0.1, "not in")],
)
def test_the_verdict_says_it_plainly(ap: float, nds: float, word: str) -> None:
    text = verdict(metrics(0.2, 0.2), metrics(ap, nds))
    assert word in text
    assert f"mAP {ap - 0.2:+.4f}" in text
    assert "One seed" in text


def test_students_differ_in_the_loss_alone() -> None:
    config = DemoConfig()
    alone = run_config(config, Path("world"), "camera")
    distilled = run_config(config, Path("world"), "camera", Path("teacher"))
    assert alone.distill is None
    assert distilled.distill is not None
    assert distilled.distill.teacher == "teacher"
    assert replace(distilled, distill=None) == alone


def test_the_clock_adds_up_over_calls(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), Clock(tmp_path / "seconds.json")("part"):
            raise KeyError
    clock = Clock(tmp_path / "seconds.json")
    assert clock.seconds["part"] > 0


@pytest.fixture
def no_shipped_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kdlab.shipping, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


def test_a_shipped_teacher_serves_its_own_world_only(
    no_shipped_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DemoConfig.smoke()
    shipped = RunFolder(weights_of("lidar", config.simulation))
    shipped.path.mkdir(parents=True)
    settings = run_config(config, tmp_path / "elsewhere", "lidar")
    save_config(settings, shipped.config)
    save_weights(shipped.weights, build_detector(settings.detector).half())

    trained: list[Path] = []
    monkeypatch.setattr(kdlab.demo, "train", lambda config, out: trained.append(out) or out)
    clock = Clock(tmp_path / "seconds.json")
    taken = make_teacher(tmp_path / "a", config, tmp_path / "world", clock)
    assert not trained
    assert RunFolder(taken).finished
    assert load_run_config(taken).data.root == str(tmp_path / "world")

    other = replace(config, simulation=replace(config.simulation, seed=8))
    make_teacher(tmp_path / "b", other, tmp_path / "world", clock)
    assert trained == [tmp_path / "b" / "teacher"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_demo(no_shipped_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = demo(tmp_path / "demo", fast=True)
    first = capsys.readouterr().out
    for word in ("mAP", "NDS", "mATE", "AP car", "seconds:", "One seed", "kdlab compare", "00_quickstart"):
        assert word in first
    figures = sorted((out / "figures").glob("*.png"))
    assert [f.stem for f in figures] == [
        "bev",
        "cameras",
        "features_bev",
        "features_neck",
        "losses",
        "metrics",
        "regions",
    ]
    assert all(Image.open(f).size[0] > 600 for f in figures)
    weights = RunFolder(out / "student").weights
    before = weights.stat().st_mtime_ns
    demo(tmp_path / "demo", fast=True)
    assert weights.stat().st_mtime_ns == before
    assert "finished already" in capsys.readouterr().out


def test_found_missed_and_extra() -> None:
    at = torch.tensor([[10.0, 0], [20, 0], [60, 0], [10, 5]])
    truth = Boxes3D.make(torch.cat((at, torch.ones(4, 7)), 1), torch.tensor([0, 0, 0, 8]))
    truth.points[:] = 5
    near = torch.tensor([[10.5, 0], [11.0, 0], [20.0, 1.9], [10, 5]])
    found = Detections(
        torch.cat((near, torch.ones(4, 7)), 1), torch.tensor([0, 0, 0, 8]), torch.tensor([0.9, 0.8, 0.7, 0.1])
    )
    rows = recall(truth, found, metrics(0.5, 0.5, ("car", "pedestrian")), min_score=0.2)
    assert rows == {"car": Recall(2, 2, 1, 0.5), "pedestrian": Recall(1, 0, 0, 0.5)}


needs_keyframe = pytest.mark.skipif(not keyframe_root().is_dir(), reason="needs a real keyframe, see KDLAB_KEYFRAME")


@needs_keyframe
def test_overfit_wants_a_single_sample() -> None:
    config = overfit_config(keyframe_root(), "camera", steps=100)
    assert config.data.augment.bev_rotate == 0
    assert 100 <= config.train.epochs * 8 < 108
    with pytest.raises(ValueError, match="no split"):
        overfit_config(keyframe_root(), "camera", split="nonsense")


@needs_keyframe
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_overfit_says_when_it_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="below the target"):
        overfit(out=tmp_path / "run", modality="lidar", steps=8, cell=1.6)
    result = overfit(out=tmp_path / "run", modality="lidar", steps=8, cell=1.6, target=0.0)
    assert result.passed
    assert all(path.exists() for path in result.figures)
    assert "missed" in capsys.readouterr().out


@needs_keyframe
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("modality", ["lidar", "camera"])
def test_a_real_keyframe_is_learnt_by_heart(modality: str, tmp_path: Path) -> None:
    assert overfit(out=tmp_path / "run", modality=modality).passed  # type: ignore[arg-type]
