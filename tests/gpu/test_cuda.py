"""Training and evaluation on a CUDA device."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device_checks import assert_same, check_splat, step
from mini_run import mini_config, write_set

from kdlab.checkpoint import load_detector
from kdlab.config import DistillConfig
from kdlab.distill import METHODS
from kdlab.evaluate import evaluate_run
from kdlab.losslog import read_losses
from kdlab.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("gpu") / "set")


@pytest.fixture(scope="module")
def teacher(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(mini_config(root, epochs=1), tmp_path_factory.mktemp("teacher") / "run", progress=False)


class Killed(Exception):  # noqa: N818
    """Stands for a kill: nothing is written any more."""


@pytest.mark.parametrize("modality", ["lidar", "camera", "fusion"])
def test_first_losses_are_those_of_the_cpu(root: Path, tmp_path: Path, modality: Any) -> None:
    config = mini_config(root, modality, epochs=1)
    one, two = (
        read_losses(train(config, tmp_path / str(cpu), progress=False, cpu=cpu) / "losses.csv")[0]
        for cpu in (True, False)
    )
    for name in one:
        # TF32 convolutions: about three digits.
        assert two[name] == pytest.approx(one[name], rel=1e-2, abs=1e-4), name


def test_bf16_is_auto(root: Path, tmp_path: Path) -> None:
    config = mini_config(root, "fusion", epochs=1, precision="auto")
    run = train(config, tmp_path / "run", progress=False)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert '"precision": "bf16"' in (run / "versions.json").read_text()
    assert evaluate_run(run, workers=0).samples == 3


def test_resume_is_close(root: Path, teacher: Path, tmp_path: Path) -> None:
    """Atomic additions have no fixed order: losses agree to 2 percent, the first after the resume to 0.1 percent."""
    config = mini_config(root, "camera", epochs=3)
    config = replace(config, distill=DistillConfig("unidistill", str(teacher)))
    whole = read_losses(train(config, tmp_path / "whole", progress=False) / "losses.csv")

    def die(step: int, row: Mapping[str, float]) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "killed", progress=False, on_step=die)
    killed = read_losses(train(config, tmp_path / "killed", progress=False) / "losses.csv")
    assert [r["step"] for r in killed] == list(range(9))
    assert killed[3]["total"] == pytest.approx(whole[3]["total"], rel=1e-3)
    for one, two in zip(whole, killed, strict=True):
        assert two["total"] == pytest.approx(one["total"], rel=2e-2)


def test_weights_trained_on_a_gpu_load_on_a_cpu(teacher: Path) -> None:
    assert next(load_detector(teacher).parameters()).device.type == "cpu"


def test_splat_is_the_naive_sum() -> None:
    check_splat("cuda")


@pytest.mark.parametrize("method", METHODS)
def test_a_step_taken_twice_is_nearly_the_same(method: str) -> None:
    """The student's maps are the same bit for bit: nothing before them adds floats in an order that may change.

    Losses need not be: the head's sums over boxes and a LiDAR teacher's pillar means are atomic additions; 1e-4 is far
    above what that does, and far below what another seed would. Gradients (sums over places read) agree to 1 percent.
    """
    assert_same(step(method, "cuda"), step(method, "cuda"), losses=1e-4, gradients=1e-2)
