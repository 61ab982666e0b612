"""Detections in memory give the numbers that a result file gives."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import Case, box

from kdlab.evaluate import result_boxes
from kdlab.geometry import yaw_pose
from kdlab.metrics.boxes import COLUMNS, MAX_BOXES, EvalBoxes, from_detections, to_global
from kdlab.metrics.results import read_results
from kdlab.sample import ATTRIBUTES, CLASSES, Detections


def detections(seed: int, boxes: int) -> Detections:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(boxes, 9, generator=generator) * torch.tensor([20.0, 20, 1, 1, 1, 1, 3, 0.3, 0.3])
    values[:, 3:6] = values[:, 3:6].abs() + 0.1
    values[::7, 7:] = math.nan
    scores = torch.randint(0, 50, (boxes,), generator=generator) / 50
    return Detections(values, torch.randint(0, 10, (boxes,), generator=generator), scores)


@pytest.mark.parametrize("predefined", [False, True])
def test_as_through_a_file(tmp_path: Path, predefined: bool) -> None:
    tokens = ["s2", "s0", "s1"]
    found = [detections(i, n) for i, n in enumerate((40, 0, 700))]
    poses = [yaw_pose(0.7 * i + 0.1, (600.0 + i, 1600.0, 0.5)) for i in range(3)]
    case = Case({t: [box(600, 1600)] for t in ("s0", "s1", "s2")}, {}, predefined=predefined)
    truth, path = case.truth(), tmp_path / "r.json"
    results = {t: result_boxes(t, d, p) for t, d, p in zip(tokens, found, poses, strict=True)}
    path.write_text(json.dumps({"meta": {}, "results": results}))
    direct, read = from_detections(tokens, found, poses, truth), read_results(path, truth)
    assert len(direct) == 40 + MAX_BOXES
    for name in COLUMNS:
        np.testing.assert_allclose(getattr(direct, name), getattr(read, name), rtol=0, atol=1e-12, err_msg=name)
    assert np.array_equal(direct.score, read.score) and np.array_equal(direct.translation, read.translation)


def test_the_global_frame_and_usual_attributes() -> None:
    pose = torch.eye(4, dtype=torch.float64)
    pose[:2, :2] = torch.tensor([[0.0, -1], [1, 0]])  # A quarter turn to the left.
    pose[:3, 3] = torch.tensor([100.0, 200, 1])
    values = torch.tensor([[1.0, 2, 3, 4, 5, 6, 0.0, 2.0, 0.0]]).repeat(20, 1)
    values[10:, 7] = 0.125  # Not moving.
    found = to_global(Detections(values, torch.arange(20) % 10, torch.linspace(1, 0.5, 20)), pose, 7)
    assert set(found.sample.tolist()) == set(found.owner.tolist()) == {7} and found.label.tolist() == [*range(10)] * 2
    assert found.translation[0].tolist() == [98.0, 201.0, 4.0] and found.size[0].tolist() == [5.0, 4.0, 6.0]
    assert found.rotation[0].tolist() == pytest.approx([0.5**0.5, 0, 0, 0.5**0.5])
    assert found.velocity[0].tolist() == pytest.approx([0.0, 2.0]) and found.points.tolist() == [-1] * 20
    names = ["" if i < 0 else ATTRIBUTES[i] for i in found.attribute]
    for i, name in enumerate(CLASSES):
        kind = {"pedestrian": "pedestrian", "bicycle": "cycle", "motorcycle": "cycle"}.get(name, "vehicle")
        for given in (names[i], names[10 + i]):
            assert given == "" if name in ("barrier", "traffic_cone") else given.startswith(f"{kind}.")
    assert names[0] == "vehicle.moving" and names[10] == "vehicle.parked" and names[13] == "vehicle.stopped"
    assert names[8] == "pedestrian.moving" and names[16] == "cycle.without_rider"


def test_detections_that_cannot_be_evaluated() -> None:
    truth = Case({"s0": [box(0, 0)], "s1": []}, {}).truth()
    eye, some = torch.eye(4, dtype=torch.float64), detections(0, 3)
    with pytest.raises(ValueError, match=r"the detections: 1 of the 2 samples of split 'own'.* missing, such as 's1'"):
        from_detections(["s0"], [some], [eye], truth)
    with pytest.raises(ValueError, match=r"2 tokens \(1 different\), 2 detections, 1 poses"):
        from_detections(["s0", "s0"], [some, some], [eye], truth)
    some.values[1, 0] = math.inf
    with pytest.raises(ValueError, match=r"a box of sample 's1' has a number that is not finite"):
        from_detections(["s0", "s1"], [detections(1, 2), some], [eye, eye], truth)


def test_the_number_of_boxes_is_a_setting() -> None:
    truth, eye = Case({"s0": [box(0, 0)]}, {}).truth(), torch.eye(4, dtype=torch.float64)
    many = detections(0, 600)
    for most, left in ((3, 3), (500, 500), (550, 550), (700, 600)):
        found = from_detections(["s0"], [many], [eye], truth, most)
        assert len(found) == left and found.of == truth.name
        assert found.score.tolist() == sorted(many.scores.double().tolist(), reverse=True)[:left]


def test_join_and_take() -> None:
    truth = Case({"s0": [box(1, 2), box(3, 4)], "s1": [box(5, 6, "bus")]}, {}).truth()
    both = EvalBoxes.join([truth.boxes, EvalBoxes.empty(), truth.boxes.take(np.array([2]))])
    assert both.label.tolist() == [0, 0, 3, 3] and both.meta == {} and len(EvalBoxes.join([])) == 0
    assert both.take(both.label == 3).translation[:, 0].tolist() == [5, 5]
