"""The studies that the repository ships expand, and their students can start where they say."""

from functools import cache
from pathlib import Path

import pytest
from accelerate import init_empty_weights

from kdlab.checkpoint import taken_over
from kdlab.config import DetectorConfig
from kdlab.models.camera import CameraEncoder
from kdlab.presets import tiny
from kdlab.studies import expand, load_study

FILES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))


@cache
def camera_of(config: DetectorConfig) -> CameraEncoder:
    with init_empty_weights():
        return CameraEncoder(config)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tables_are_for_the_test_split_and_all_runs_start_alike(file: Path) -> None:
    study = load_study(file)
    assert study.name == file.stem
    assert study.split == ("sim_val" if file.stem == "strength" else "sim_test")  # that one is tuning
    trials = expand(study)
    assert len({trial.config.train.camera_start for trial in trials}) == 1
    if not trials[0].config.train.camera_start:
        return
    start = camera_of(tiny("camera").detector)
    for trial in trials:
        camera = camera_of(trial.config.detector)
        held = camera.state_dict()
        for name, value in taken_over(camera, start).items():
            assert held[name].shape == value.shape, f"{trial.change}: {name}"
