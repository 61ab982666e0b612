from dataclasses import replace

import pytest
import torch
from torch import nn

from kdlab.config import TrainConfig
from kdlab.optim import CAMERA, adamw, learning_rate, set_learning_rate, stepped_rate
from kdlab.presets import PRESETS


class Two(nn.Module):
    """A camera branch and the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.camera, self.head = nn.Linear(3, 3), nn.Linear(3, 3)


def test_steps_divide_the_rate_by_ten_after_the_milestones_epochs() -> None:
    config = TrainConfig(epochs=20, lr=2e-4, schedule="steps", warm_up=0.0, milestones=(10, 15))
    rates = [stepped_rate(step, 200, config) for step in range(200)]  # ten steps an epoch
    assert rates[:100] == [2e-4] * 100
    assert rates[100:150] == pytest.approx([2e-5] * 50) and rates[150:] == pytest.approx([2e-6] * 50)


def test_steps_warm_up_linearly_from_a_thousandth() -> None:
    config = TrainConfig(epochs=1, lr=1.0, schedule="steps", warm_up=0.1)
    rates = [stepped_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3) and rates[5] == pytest.approx(0.5005) and set(rates[10:]) == {1.0}


def test_the_optimiser_gets_its_rate_by_schedule() -> None:
    module = Two()
    config = TrainConfig(lr=1.0)
    optimizer = adamw(module, config)
    assert set_learning_rate(optimizer, 7, 100, config) == learning_rate(7, 100, 1.0)  # as it was before schedules
    assert {group["lr"] for group in optimizer.param_groups} == {learning_rate(7, 100, 1.0)}
    late = replace(config, warm_up=0.4)
    assert set_learning_rate(optimizer, 40, 100, late) == pytest.approx(1.0)


def test_the_camera_branch_may_learn_at_a_rate_of_its_own() -> None:
    module = Two()
    config = TrainConfig(lr=1.0, camera_lr=0.5, schedule="steps", warm_up=0.0)
    optimizer = adamw(module, config)
    assert set_learning_rate(optimizer, 3, 100, config) == 1.0
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {id(p): 0.5 if name.startswith("camera.") else 1.0 for name, p in module.named_parameters()}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(module.camera.bias)] == 0 and decays[id(module.camera.weight)] == config.weight_decay
    again = adamw(module, config)
    again.load_state_dict(optimizer.state_dict())
    assert set_learning_rate(again, 3, 100, config) == 1.0 and again.param_groups[-1]["lr"] == 0.5


def test_the_camera_branch_is_the_students_up_to_a_frames_map() -> None:
    names = (
        "camera.neck.weight",
        "student.camera.simulated.depth_net.depth.weight",
        "student.camera.temporal.0.weight",
        "student.head.shared.weight",
        "distiller.adapters.camera.weight",
        "network.0.camera.weight",
    )
    assert [bool(CAMERA.match(name)) for name in names] == [True, True, False, False, False, False]


def test_one_rate_keeps_the_groups_of_before() -> None:
    """A checkpoint's optimiser state is that of the same groups."""
    groups = adamw(Two(), TrainConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [2, 2] and all("factor" not in group for group in groups)


def test_labeldistills_schedule() -> None:
    config = PRESETS["paper-labeldistill"]("camera").train
    optimizer = adamw(Two(), config)
    rates = [set_learning_rate(optimizer, epoch * 10, 300, config) for epoch in (0, 18, 19, 22, 23, 29)]
    assert rates == pytest.approx([4e-4, 4e-4, 4e-5, 4e-5, 4e-6, 4e-6])
    torch.testing.assert_close(optimizer.param_groups[-1]["lr"], 2e-6)
