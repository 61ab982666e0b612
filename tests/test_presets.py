import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from accelerate import init_empty_weights

from kdlab.config import DistillConfig, Modality, RunConfig, from_dict, to_dict
from kdlab.distill import build_method, usual_teacher
from kdlab.distill.distiller import check
from kdlab.models.detector import Channels, build_detector, channels_of
from kdlab.models.labels import label_channels
from kdlab.pairing import check_pair
from kdlab.presets import PAPERS, PRESETS, SCALES
from kdlab.presets.paper import leaves, setting

MODALITIES: tuple[Modality, ...] = get_args(Modality)
PAIRS = [
    ("paper-unidistill", "camera", "lidar"),
    ("paper-unidistill", "camera", "fusion"),
    ("paper-unidistill", "lidar", "camera"),
    ("paper-unidistill", "lidar", "fusion"),
    ("paper-distillbev", "camera", "lidar"),
    ("paper-distillbev", "camera", "fusion"),
    ("paper-simdistill", "camera", "fusion"),
    ("paper-labeldistill", "camera", "lidar"),
    ("paper-labeldistill", "camera", "fusion"),
]


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("name", PAPERS)
def test_every_setting_that_is_not_the_default_has_a_source(name: str, modality: Modality) -> None:
    config, paper = PRESETS[name](modality), PAPERS[name]
    plain, here = leaves(RunConfig()), leaves(replace(config, distill=None))
    differing = {key for key, value in here.items() if value != plain[key]}
    assert differing - {"detector.modality", "data.root", "data.workers"} <= set(paper.sources)
    for key, source in paper.sources.items():
        setting(config, key)
        assert source
    assert all(what and why for what, why in paper.deviations)


def test_papers_weights_hold_without_scales() -> None:
    assert not {preset for preset, _ in SCALES} & set(PAPERS)


@pytest.mark.parametrize(("name", "student", "teacher"), PAIRS)
def test_a_papers_pair_fits(name: str, student: Modality, teacher: Modality) -> None:
    config = replace(PRESETS[name](student), distill=DistillConfig(PAPERS[name].method))
    check_pair(config, PRESETS[name](teacher))


def sides(name: str) -> tuple[Channels, Channels]:
    teacher = usual_teacher(PAPERS[name].method, "camera")
    return channels_of(PRESETS[name]("camera").detector), channels_of(PRESETS[name](teacher).detector)


def test_widths_are_the_papers() -> None:
    """What the specifications' tables of shapes say of the tensors that are compared."""
    student, teacher = sides("paper-unidistill")
    assert (student.bev, student.neck) == (teacher.bev, teacher.neck) == (256, 512)
    student, teacher = sides("paper-distillbev")
    assert (student.stages, student.neck) == ((128, 256, 512), 256)
    assert (teacher.stages[-2:], teacher.neck) == ((128, 256), 384)
    student, teacher = sides("paper-simdistill")
    assert (student.camera_bev, student.lidar_bev, student.bev) == (80, 80, 256)
    assert (teacher.camera_bev, teacher.lidar_bev, teacher.bev) == (80, 256, 256)
    student, teacher = sides("paper-labeldistill")
    assert (student.camera_bev * student.frames, student.stages[1]) == (750, 300)
    assert (teacher.stages, teacher.neck) == ((128, 256), 512)
    method = build_method(DistillConfig("labeldistill"), "camera", "lidar")
    check(method, {"student": student, "teacher": teacher, "labels": label_channels(teacher.stages)})


def test_bins_and_cells_are_the_papers() -> None:
    bins = {name: sides(name)[0].depth for name in PAPERS}
    assert bins == {
        "paper-unidistill": 112,
        "paper-distillbev": 59,
        "paper-simdistill": 118,
        "paper-labeldistill": 112,
    }
    cells = [PRESETS[name]("camera").detector.grid.shape[0] for name in PAPERS]
    assert cells == [180, 128, 180, 128]


def test_the_description_tells_what_was_changed() -> None:
    preset = PRESETS["paper-labeldistill"]("camera")
    changed = replace(preset, train=replace(preset.train, lr=1e-3))
    paper = PAPERS["paper-labeldistill"]
    assert "changed" not in paper.describe(preset, preset)
    row = next(line for line in paper.describe(changed, preset).splitlines() if "train.lr" in line)
    assert "0.001 (changed, 0.0004 there)" in row and "4KEY:36-43" in row
    assert "deviations from the paper" in paper.describe(preset, preset)
    assert "detector.lidar" not in paper.describe(preset, preset)


def test_configs_of_before_are_still_read() -> None:
    """Fields that came later are filled with what was true then."""
    for name in ("tiny", "small"):
        plain = to_dict(PRESETS[name]("camera"))
        for section, keys in (("camera", ("neck", "depth_channels", "bev_blocks")), ("bev", ("first_stride",))):
            for key in keys:
                del plain["detector"][section][key]
        del plain["detector"]["lidar"]["finer"]
        for key in ("camera_lr", "schedule", "warm_up", "milestones"):
            del plain["train"][key]
        assert from_dict(RunConfig, plain) == PRESETS[name]("camera")


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name: str, modality: Modality) -> None:
    config = PRESETS[name](modality).detector
    with init_empty_weights():
        detector = build_detector(config, load_pretrained=False)
    assert detector.channels == channels_of(config)
    assert detector.grid.shape[0] % config.bev.first_stride == 0


def step(preset: str, method: str, batch: int) -> dict:
    script = Path(__file__).parent / "paper_step.py"
    words = [sys.executable, str(script), preset, method, str(batch)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_step_at_full_size_fits_into_16_gb(name: str) -> None:
    took = step(name, PAPERS[name].method, 1)
    assert took["precision"] == PRESETS[name]("camera").train.precision
    assert took["peak_gb"] < 16
    assert took["finite"] and not took["without_gradient"]
    planned = took["planned"]
    assert (took["trained"], took["frozen"]) == (planned["trained"], planned["frozen"])
    assert took["flop"] == pytest.approx(planned["flop"], rel=0.03)
    assert took["kept"] == pytest.approx(planned["kept"], rel=0.25)  # of the process, so the allocator's waste counts
