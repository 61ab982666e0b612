"""A training that takes seconds: the mini set of tests/data and a detector of a few thousand weights."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdlab.config import (
    BEVConfig,
    CameraConfig,
    DataConfig,
    DetectorConfig,
    HeadConfig,
    LidarConfig,
    Modality,
    RunConfig,
    TrainConfig,
)
from kdlab.geometry import BEVGrid


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These networks are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_set(root: Path) -> Path:
    """Six samples in two scenes; splits all, tiny_train, tiny_val."""
    spec = importlib.util.spec_from_file_location("mini_set", Path(__file__).parent / "data" / "mini_set.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path: Path = module.write_mini_set(root)
    return path


def mini_config(root: Path, modality: Modality = "lidar", **train: object) -> RunConfig:
    """Three steps an epoch."""
    detector = DetectorConfig(
        modality=modality,
        grid=BEVGrid.square(51.2, 3.2),
        camera=CameraConfig(image_size=(32, 64), channels=8, context=8, depth=(1.0, 41.0, 4.0)),
        lidar=LidarConfig(channels=8, sweeps=2),
        bev=BEVConfig(channels=8, stages=(16, 32), blocks=(1, 1), neck=16),
        head=HeadConfig(channels=8),
    )
    values = {"epochs": 2, "batch_size": 2, "precision": "fp32", "checkpoint_minutes": 60.0, **train}
    return RunConfig(
        detector=detector,
        data=DataConfig(root=str(root), train="all", val="tiny_val", workers=0),
        train=TrainConfig(**values),  # type: ignore[arg-type]
    )
