"""Configs: strict reading, exact round trip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kdlab.config import DistillConfig, RunConfig, config_hash, from_dict, load_config, save_config, to_dict
from kdlab.geometry import BEVGrid
from kdlab.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("modality", ["lidar", "camera", "fusion"])
def test_presets_survive_json(name: str, modality: str, tmp_path: Path) -> None:
    config = replace(PRESETS[name](modality), distill=DistillConfig(weights={"feature": 0.5}, quirks=("a",)))
    save_config(config, tmp_path / "config.json")
    assert load_config(RunConfig, tmp_path / "config.json") == config


def test_hash_tells_configs_apart() -> None:
    one = RunConfig()
    assert config_hash(one) == config_hash(RunConfig())
    assert config_hash(one) != config_hash(replace(one, train=replace(one.train, seed=1)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"tran": {}}, "unknown key 'tran'"),
        ({"train": {"epochs": "many"}}, r"RunConfig.train.epochs: expected int"),
        ({"train": {"precision": "fp8"}}, r"'fp8' is not one of 'auto'"),
        ({"detector": {"z": [1.0]}}, r"RunConfig.detector.z: needs 2 values"),
        ({"data": {"cbgs": 1}}, r"RunConfig.data.cbgs: expected bool"),
    ],
)
def test_wrong_values_are_named_with_their_path(edit: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, {**to_dict(RunConfig()), **edit})


def test_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"train": ')
    with pytest.raises(ValueError, match=r"config\.json"):
        load_config(RunConfig, tmp_path / "config.json")


def test_grid_must_hold_whole_cells() -> None:
    with pytest.raises(ValueError, match="whole"):
        BEVGrid((-1.0, 1.0), (-1.0, 1.05), 0.4)
