"""A camera student must not see at test time what only its teacher may see: points, depths, boxes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mini_run import mini_config, one_thread  # noqa: F401
from student_kinds import CAMERAS, kind

from kdlab.config import DistillConfig
from kdlab.distill import Distiller, build_method, copy_start, total
from kdlab.distill.simdistill import QUIRKS
from kdlab.models import Detector
from kdlab.models.detector import named_stages
from kdlab.models.labels import LabelEncoder

sys.path.insert(0, str(Path(__file__).parent / "models"))
from model_fakes import random_batch

BASE = mini_config(Path(), "camera").detector
METHODS = {"unidistill": "BEVDepth", "distillbev": "BEVDepth4D", "simdistill": "simulated fusion",
           "labeldistill": "BEVDepth4D with gradient"}  # fmt: skip


def bytes_of(detector, batch):
    """What a detector finds, to the bit."""
    with torch.no_grad():
        features = detector.eval()(batch)
        found = detector.predict(features)
    stages = [tensor.contiguous().numpy().tobytes() for _, tensor in named_stages(features)]
    return stages + [tensor.numpy().tobytes() for d in found for tensor in (d.values, d.scores, d.labels)]


def blind(detector, batch):
    """Whether a detector finds the same without points, depths and boxes, and with others in their place."""
    other = replace(random_batch(detector.config, seed=1), images=batch.images)
    return bytes_of(detector, batch) == bytes_of(detector, batch.images_only()) == bytes_of(detector, other)


@pytest.mark.parametrize("name", CAMERAS)
def test_camera_students_see_images_alone(name):
    torch.manual_seed(0)
    config = kind(BASE, name)
    detector = Detector(config, load_pretrained=False)
    assert config.sensors == "camera" and blind(detector, random_batch(config))


@pytest.mark.parametrize("name", METHODS)
def test_distilled_students_see_images_alone(name):
    torch.manual_seed(0)
    config = kind(BASE, METHODS[name])
    student, teacher = (Detector(c, load_pretrained=False) for c in (config, kind(BASE, "fusion")))
    method = build_method(DistillConfig(name), "camera", "fusion")
    labels = LabelEncoder(teacher.grid, teacher.channels.stages) if method.stages else None
    distiller = Distiller(method, student, teacher, labels, grid=student.grid)
    copy_start(method, student, teacher)
    batch = random_batch(config)
    optimiser = torch.optim.SGD([*student.parameters(), *distiller.parameters()], 1e-4)
    features = student(batch)
    (total(distiller(features, batch)) + sum(student.loss(features, batch).values())).backward()
    optimiser.step()
    assert blind(student, batch)


@pytest.mark.parametrize("quirk", [q.student for q in QUIRKS if q.student])
def test_one_quirk_alone_leaks(quirk):
    torch.manual_seed(0)
    field = quirk.removeprefix("camera.")
    simulated = kind(BASE, "simulated fusion")
    config = replace(simulated, camera=replace(simulated.camera, **{field: True}))
    detector, batch = Detector(config, load_pretrained=False), random_batch(config)
    if field != "lidar_depth":
        assert config.sensors == "camera" and blind(detector, batch)
        return
    assert config.sensors == "fusion"
    with pytest.raises(
        ValueError, match=r"reads LiDAR depths \(camera.lidar_depth, quirk simdistill.lidar_depth\), but"
    ):
        detector(batch.images_only())
    moved = replace(batch, points=batch.points + torch.tensor([3.0, 0, 0, 0, 0]))
    assert bytes_of(detector, batch) != bytes_of(detector, moved)
    other = replace(batch, depth=None, boxes=batch.images_only().boxes)  # what it reads are points, nothing else
    assert bytes_of(detector, batch) == bytes_of(detector, other)
