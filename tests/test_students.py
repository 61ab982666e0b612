"""Every kind of student trains on the mini set, alone; what a kind is shows in its losses and gradients."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401
from student_kinds import KINDS, kind

from kdlab.checkpoint import RunFolder, load_detector, load_run_config
from kdlab.config import DistillConfig, RunConfig
from kdlab.evaluate import evaluate_run
from kdlab.hub import _card
from kdlab.losslog import read_losses
from kdlab.runs import list_runs
from kdlab.runs.comparison import describe
from kdlab.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"))


def short(root: Path, name: str) -> RunConfig:
    config = mini_config(root, epochs=1)
    return replace(config, detector=kind(config.detector, name))


@pytest.mark.parametrize("name", KINDS)
def test_a_short_training(name: str, root: Path, tmp_path: Path) -> None:
    config = short(root, name)
    torch.manual_seed(0)
    run = train(config, tmp_path / "run", progress=False, cpu=True)
    rows, camera = read_losses(run / "losses.csv"), config.detector.camera
    supervised = config.detector.modality != "lidar" and camera.depth_supervision
    assert len(rows) == 3 and ("depth" in rows[0]) == supervised
    assert load_run_config(run).detector == config.detector
    trained = load_detector(run)
    assert (trained.fuser is not None) == (config.detector.modality == "fusion" or camera.simulated_lidar)
    assert trained.channels.frames == (camera.frames if config.detector.modality != "lidar" else 1)


def test_released_simdistill_is_scored_with_points(root: Path, tmp_path: Path) -> None:
    base = mini_config(root, "fusion", epochs=1)
    teacher = train(base, tmp_path / "teacher", progress=False, cpu=True)
    student = replace(
        base.detector,
        modality="camera",
        camera=replace(
            base.detector.camera, simulated_lidar=True, shared_lift=True, corner_reference=True, lidar_depth=True
        ),
    )
    config = replace(base, detector=student, distill=DistillConfig("simdistill", str(teacher), variant="released"))
    config = replace(config, train=replace(config.train, evaluate_every=1))
    run = train(config, tmp_path / "run", progress=False, cpu=True)
    assert set(json.loads((run / "validation.json").read_text())) == {"1"}
    assert list_runs(run)[0].modality == "fusion" and "- fusion\n" in _card(RunFolder(run), config, 1)
    evaluate_run(run, workers=0)
    written = (run / "results_tiny_val.json").read_text()
    assert '"use_camera":true,"use_lidar":true' in written.replace(" ", "")[:200]
    plain = json.loads((run / "config.json").read_text())
    plain["detector"]["camera"].pop("lidar_depth")  # a run of before the quirk was known
    (run / "config.json").write_text(json.dumps(plain))
    assert train(load_run_config(run), run, progress=False, cpu=True) == run
    with pytest.raises(ValueError, match=r"or flip the quirk: --quirks simdistill\.lidar_depth"):
        train(load_run_config(run), run, resume=False, progress=False, cpu=True)
    assert RunFolder(run).finished


def test_a_teacher_with_fewer_frames_sees_the_first_ones(root: Path, tmp_path: Path) -> None:
    teacher = train(mini_config(root, "fusion", epochs=1), tmp_path / "teacher", progress=False, cpu=True)
    config = replace(short(root, "BEVDepth4D"), distill=DistillConfig("unidistill", str(teacher)))
    run = train(config, tmp_path / "run", progress=False, cpu=True)
    assert "kd/feature" in read_losses(run / "losses.csv")[0]


def test_methods_of_two_papers_train_together_with_their_stage(root: Path, tmp_path: Path) -> None:
    teacher = train(mini_config(root, epochs=1), tmp_path / "teacher", progress=False, cpu=True)
    distill = DistillConfig("unidistill+labeldistill", str(teacher), scale=1e-3, stage_epochs=1)
    config = replace(short(root, "BEVDepth4D with gradient"), distill=replace(distill, options={"levels": "1"}))
    run = train(config, tmp_path / "run", progress=False, cpu=True)
    assert {"kd/feature", "kd/label_1", "kd/lidar_1", "kd/response_box"} <= set(read_losses(run / "losses.csv")[0])
    assert "kd/label_0" not in read_losses(run / "losses.csv")[0]
    assert (run / "stages" / "label_encoder" / "metrics.json").exists()
    assert "unidistill+labeldistill, levels 1" in describe(run)
