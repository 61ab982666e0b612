"""One training step of a preset's method in a process of its own: prints what it took, as JSON, beside the plan."""

import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent / "models"))
from model_fakes import random_batch

from kdlab.config import DistillConfig
from kdlab.distill import Distiller, build_method, copy_start, usual_teacher
from kdlab.models import build_detector
from kdlab.pairing import fit_student
from kdlab.plan import POINTS_PER_SWEEP, plan_step
from kdlab.precision import resolve
from kdlab.presets import PRESETS
from kdlab.train import Training


def main(preset: str, name: str, batch_size: int) -> dict[str, Any]:
    """Build student and teacher with fresh weights, run the method forward and backward on made-up samples.

    Arithmetic is the preset's.
    """
    torch.manual_seed(0)
    modality = usual_teacher(name, "camera")
    config, _ = fit_student(replace(PRESETS[preset]("camera"), distill=DistillConfig(name)))
    assert config.distill is not None
    precision = resolve(config.train.precision, torch.device("cpu"))
    teacher_config = PRESETS[preset](modality).detector
    student, teacher = (
        build_detector(c, load_pretrained=False).to(memory_format=torch.channels_last)
        for c in (config.detector, teacher_config)
    )
    method = build_method(config.distill, "camera", modality)
    labels = method.stages[0].build(teacher, method.on) if method.needs_labels else None
    distiller = Distiller(method, student, teacher, labels, grid=student.grid)
    copy_start(method, student, teacher)
    training = Training(student, distiller, precision).train()
    points = teacher_config.lidar.sweeps * POINTS_PER_SWEEP
    batch = random_batch(config.detector, batch_size, cameras=6, points=points, boxes=30)
    process, began = psutil.Process(), time.process_time()
    before = process.memory_info().rss
    with FlopCounterMode(display=False) as counter:
        losses = training(batch)
        kept, forward = process.memory_info().rss - before, time.process_time()
        torch.stack(list(losses.values())).sum().backward()
    ended, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    plan = plan_step(config, teacher_config, batch_size)
    return {
        "precision": precision,
        "peak_gb": peak / 1e9,
        "forward_s": forward - began,
        "backward_s": ended - forward,
        "terms": sum(name.startswith("kd/") for name in losses),
        "finite": all(bool(value.isfinite()) for value in losses.values()),
        "without_gradient": [
            n for n, p in training.named_parameters() if p.grad is None or not p.grad.isfinite().all()
        ],
        "trained": sum(p.numel() for p in training.parameters()),
        "frozen": sum(p.numel() for network in (teacher, labels) if network is not None for p in network.parameters()),
        "kept": kept,
        "flop": counter.get_total_flops(),
        "planned": {
            "trained": plan.trained,
            "frozen": plan.frozen,
            "kept": plan.kept(precision),
            "flop": sum(part.step_flop for part in plan.parts if "lift" not in part.name),
        },
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
