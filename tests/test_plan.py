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
from kdlab.plan import POINTS_PER_SWEEP, plan_step
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


@pytest.mark.parametrize("modality", ["camera", "lidar", "fusion"])
def test_the_plan_of_a_detector_is_what_its_step_takes(modality: Modality) -> None:
    config = PRESETS["tiny"](modality)
    plan, (kept, flop, trained) = plan_step(config, batch=2), real_step(config, None, 2)
    counted = sum(part.step_flop for part in plan.parts if "lift" not in part.name)
    assert plan.trained == trained and plan.frozen == 0
    assert counted == pytest.approx(flop, rel=0.05)  # PyTorch does not count the lift's sums
    index = 2 * 6 * 8 * 22 * 40 * 5 * 8 if modality != "lidar" else 0  # the lift's, which autograd does not keep
    assert plan.kept("fp32") - index == pytest.approx(kept, rel=0.25)


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

    def of(frames: int, gradient: bool) -> tuple[float, float]:
        camera = replace(config.detector.camera, frames=frames, past_gradient=gradient)
        plan = plan_step(replace(config, detector=replace(config.detector, camera=camera)), batch=1)
        part = next(p for p in plan.parts if p.name == "image backbone and neck")
        return part.kept["fp32"], part.step_flop

    (one, flop), (past, more), (trained, most) = of(1, False), of(3, False), of(3, True)
    assert past == one and trained == 3 * one
    assert more == pytest.approx(flop * 5 / 3) and most == 3 * flop


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
    assert main(["plan", "tiny", "camera", "--teacher-modality", "fusion"]) == 1
    assert "--method" in capsys.readouterr().err
