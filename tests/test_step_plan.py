import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdlab.cli import main
from kdlab.config import DetectorConfig, DistillConfig, Modality, RunConfig
from kdlab.distill import Distiller, build_method
from kdlab.models import build_detector
from kdlab.plan import POINTS_PER_SWEEP, PartCost, plan_step
from kdlab.presets import PRESETS
from kdlab.train import Training

sys.path.insert(0, str(Path(__file__).parent / "models"))
from model_fakes import random_batch


def kept_by(training: Training, batch: object) -> tuple[int, int, dict[str, Tensor]]:
    """Bytes that autograd keeps of a real step (parameters left out), its FLOPs, its losses."""
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        owner = tensor._base if tensor._base is not None else tensor
        if not isinstance(owner, nn.Parameter):
            found[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            losses = training(batch)
        torch.stack(list(losses.values())).sum().backward()
    return sum(size for size, _ in found.values()), counter.get_total_flops(), losses


def real_step(config: RunConfig, teacher: DetectorConfig | None, batch: int) -> tuple[int, int, int]:
    torch.manual_seed(0)
    student = build_detector(config.detector)
    distiller = None
    if teacher is not None and config.distill is not None:
        method = build_method(config.distill, config.detector.modality, teacher.modality)
        distiller = Distiller(method, student, build_detector(teacher), grid=student.grid)
    training = Training(student, distiller, "fp32")
    points = config.detector.lidar.sweeps * POINTS_PER_SWEEP
    kept, flop, losses = kept_by(training, random_batch(config.detector, batch, cameras=6, points=points))
    assert all(bool(value.isfinite()) for value in losses.values())
    return kept, flop, sum(p.numel() for p in training.parameters())


def test_points_that_a_camera_detector_reads_are_counted() -> None:
    config = PRESETS["tiny"]("camera")
    reads = replace(config.detector, camera=replace(config.detector.camera, lidar_depth=True))
    more = plan_step(replace(config, detector=reads), batch=1).inputs - plan_step(config, batch=1).inputs
    assert more == config.detector.lidar.sweeps * POINTS_PER_SWEEP * 28


@pytest.mark.parametrize("modality", ["camera", "lidar", "fusion"])
def test_the_plan_of_a_detector_is_what_its_step_takes(modality: Modality) -> None:
    config = PRESETS["tiny"](modality)
    plan, (kept, flop, trained) = plan_step(config, batch=2), real_step(config, None, 2)
    counted = sum(part.step_flop for part in plan.parts if "lift" not in part.name)
    assert plan.trained == trained and plan.frozen == 0
    assert counted == pytest.approx(flop, rel=0.05)  # PyTorch does not count the lift's sums
    index = 2 * 6 * 8 * 22 * 40 * 5 * 8 if modality != "lidar" else 0  # the lift's, which autograd does not keep
    assert plan.kept("fp32") - index == pytest.approx(kept, rel=0.25)


@pytest.mark.parametrize("shared", [True, False])
def test_the_plan_of_the_released_simulation_counts_all_it_runs(shared: bool) -> None:
    config = PRESETS["tiny"]("camera")
    camera = replace(config.detector.camera, simulated_lidar=True, shared_lift=shared, lidar_depth=True)
    config = replace(config, detector=replace(config.detector, camera=camera))
    plan, (kept, flop, trained) = plan_step(config, batch=1), real_step(config, None, 1)
    assert sum(part.parameters for part in plan.parts) == plan.trained == trained
    assert sum(part.step_flop for part in plan.parts if "lift" not in part.name) == pytest.approx(flop, rel=0.05)
    assert plan.kept("fp32") - 6 * 8 * 22 * 40 * 5 * 8 == pytest.approx(kept, rel=0.25)
    assert plan.inputs > plan_step(PRESETS["tiny"]("camera"), batch=1).inputs  # it reads points


def test_the_plan_of_a_distillation_counts_teacher_and_adapters() -> None:
    config = replace(PRESETS["tiny"]("camera"), distill=DistillConfig("distillbev"))
    teacher = PRESETS["tiny"]("lidar").detector
    plan, (_, flop, trained) = plan_step(config, teacher, 2), real_step(config, teacher, 2)
    assert plan.trained == trained
    assert plan.frozen == sum(p.numel() for p in build_detector(teacher).parameters())
    assert sum(part.step_flop for part in plan.parts if "lift" not in part.name) == pytest.approx(flop, rel=0.05)
    whole = next(part for part in plan.parts if part.name == "teacher")
    assert whole.step_flop == whole.flop and whole.passing["fp32"] > 0  # no backward pass


def test_memory_grows_with_the_batch_and_shrinks_with_precision() -> None:
    config = replace(PRESETS["tiny"]("camera"), train=replace(PRESETS["tiny"]("camera").train, ema=0.99))
    two, four = plan_step(config, batch=2), plan_step(config, batch=4)
    assert four.kept("fp32") == pytest.approx(2 * two.kept("fp32"), rel=0.02)
    assert four.flop == pytest.approx(2 * two.flop, rel=0.02)
    assert two.kept("bf16") < 0.8 * two.kept("fp32")
    needs = two.memory("fp32")
    assert needs["AdamW"] == 2 * needs["gradients"] == 2 * needs["moving average"]
    assert two.total("fp32") == sum(needs.values())


def test_past_frames_keep_nothing_without_gradient() -> None:
    config = PRESETS["tiny"]("camera")

    def of(frames: int, gradient: bool, batch: int = 1) -> dict[str, PartCost]:
        camera = replace(config.detector.camera, frames=frames, past_gradient=gradient)
        plan = plan_step(replace(config, detector=replace(config.detector, camera=camera)), batch=batch)
        return {part.name: part for part in plan.parts}

    name = "image backbone and neck"
    one, past, trained = of(1, False), of(3, False), of(3, True)
    kept, flop = one[name].kept["fp32"], one[name].step_flop
    assert past[name].kept["fp32"] == kept and trained[name].kept["fp32"] == 3 * kept
    assert past[name].step_flop == pytest.approx(flop * 5 / 3) and trained[name].step_flop == 3 * flop
    assert one[name].passing["fp32"] == trained[name].passing["fp32"] == 0
    assert past[name].passing["fp32"] == pytest.approx(2 * of(2, False)[name].passing["fp32"], rel=0.01)
    assert past[name].passing["fp32"] > 0.1 * kept
    index = 6 * 8 * 22 * 40 * 5 * 8
    assert past["lift"].kept["fp32"] - one["lift"].kept["fp32"] == 2 * index and past["lift"].passing["fp32"] > 0
    assert trained["lift"].kept["fp32"] == 3 * one["lift"].kept["fp32"] and trained["lift"].passing["fp32"] == 0


def test_a_distillation_wants_its_teacher() -> None:
    config = PRESETS["tiny"]("camera")
    with pytest.raises(ValueError, match="teacher"):
        plan_step(replace(config, distill=DistillConfig("unidistill")))
    with pytest.raises(ValueError, match="teacher"):
        plan_step(config, PRESETS["tiny"]("lidar").detector)


def test_the_command_prints_sources_deviations_and_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "paper-distillbev", "lidar", "--batch", "1"]) == 0
    text = capsys.readouterr().out
    assert "configs/dynamic_centerpoint" in text and "deviations from the paper" in text
    assert "pillars" in text and "batch 1 on one device" in text and "GiB = weights" in text


def test_the_command_plans_a_distillation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "camera", "--method", "unidistill", "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "camera by unidistill" in text and "neck to teacher" in text and "deviations" not in text
    for words in (["--teacher-modality", "fusion"], ["--variant", "released"]):
        assert main(["plan", "tiny", "camera", *words]) == 1
        assert "--method" in capsys.readouterr().err


def test_the_command_plans_the_student_that_a_training_would_build(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "tiny", "camera", "--method", "simdistill", "--batch", "1"]
    assert main(words) == 0
    intended = capsys.readouterr().out
    assert "student: detector.camera.simulated_lidar is true" in intended and "simulated LiDAR's lift" in intended
    assert main([*words, "--variant", "released", "--quirks", "simdistill.lidar_depth"]) == 0
    released = capsys.readouterr().out
    assert "camera.shared_lift is true" in released and "simulated LiDAR's lift" not in released
    assert main(["plan", "tiny", "camera", "--method", "distillbev+labeldistill", "--batch", "1"]) == 0
    assert "label encoder" in capsys.readouterr().out
