"""Any teacher teaches any student by any method: a step works, or an error says which tensor is missing where."""

import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401
from student_kinds import kind

from kdlab.config import DistillConfig, RunConfig
from kdlab.distill import METHODS, Distiller, total
from kdlab.geometry import BEVGrid
from kdlab.models import Detector
from kdlab.models.labels import LabelEncoder
from kdlab.pairing import check_pair, distillation, fit_student, method_for
from kdlab.studies.plan import apply
from kdlab.train import train

sys.path.insert(0, str(Path(__file__).parent / "models"))
from model_fakes import random_batch

BASE = mini_config(Path(), "camera")
STUDENTS = {"camera": "BEVDepth", "camera, two frames": "BEVDepth4D", "simulated fusion": "simulated fusion",
            "lidar": "LiDAR", "fusion": "fusion"}  # fmt: skip
TEACHERS = {"lidar": "LiDAR", "fusion": "fusion, gated", "camera": "BEVDepth"}
MISSING = {
    "simdistill": {
        ("student", "lidar_bev"): {"camera", "camera, two frames"},
        ("student", "camera_bev"): {"lidar"},
        ("teacher", "lidar_bev"): {"camera"},
        ("teacher", "camera_bev"): {"lidar"},
    },
    "labeldistill": {("student", "camera_bev_aligned"): {"lidar"}},
}
"""What each side lacks, by method: (side, tensor) -> kinds of that side."""


@cache
def detector(name: str, seed: int) -> Detector:
    torch.manual_seed(seed)
    return Detector(kind(BASE.detector, name), load_pretrained=False)


def step(config: RunConfig, teacher: RunConfig, student: str, taught_by: str) -> None:
    """Forward and backward of all terms: finite, and the student learns."""
    ours, theirs = detector(STUDENTS[student], 0), detector(TEACHERS[taught_by], 1)
    method = method_for(config, teacher.detector.modality)
    labels = LabelEncoder(theirs.grid, theirs.channels.stages) if method.needs_labels else None
    distiller = Distiller(method, ours, theirs, labels, grid=ours.grid)
    batch = random_batch(replace(config.detector, camera=replace(config.detector.camera, frames=2)), cameras=2)
    ours.zero_grad()
    results = distiller(ours(batch), batch)
    assert results and set(results) == {t.name for t in method.active}
    assert all(r.value.isfinite() for r in results.values())
    total(results).backward()
    assert any(p.grad is not None and p.grad.any() for p in ours.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("taught_by", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_a_step_works_or_the_missing_tensor_is_named(student: str, taught_by: str, method: str) -> None:
    config = replace(BASE, detector=kind(BASE.detector, STUDENTS[student]), distill=DistillConfig(method, scale=1e-3))
    teacher = replace(BASE, detector=kind(BASE.detector, TEACHERS[taught_by]))
    kinds = {"student": student, "teacher": taught_by}
    lacking = {key for key, names in MISSING.get(method, {}).items() if kinds[key[0]] in names}
    if lacking:
        with pytest.raises(ValueError) as caught:
            check_pair(config, teacher)
        said = str(caught.value)
        assert set(re.findall(r"(student|teacher)\.(\w+)[^ ]* is missing, the \1 has ", said)) == lacking
        off = dict.fromkeys(re.findall(r"or go without the term: --weights (\w+) 0", said), 0.0)
        config = replace(config, distill=replace(config.distill, weights=off))
    check_pair(config, teacher)
    step(config, teacher, student, taught_by)


def test_other_grids_and_widths_are_told_before_training() -> None:
    config = replace(BASE, distill=DistillConfig("unidistill"))
    coarse = replace(BASE.detector, modality="lidar", grid=BEVGrid.square(51.2, 6.4))
    with pytest.raises(ValueError, match=r"feature: student.bev has 32 x 32 cells and teacher.bev has 16 x 16; build"):
        check_pair(config, replace(BASE, detector=coarse))
    check_pair(replace(config, distill=DistillConfig("distillbev", options={"inherit_head": "off"})), replace(
        BASE, detector=coarse))  # fmt: skip
    wide = replace(BASE.detector, modality="lidar", bev=replace(BASE.detector.bev, neck=24))
    with pytest.raises(
        ValueError, match=r"student.neck has 16 channels and teacher.neck has 24; .* --weights relation 0"
    ):
        check_pair(config, replace(BASE, detector=wide))


def test_what_the_teacher_has_not_is_told_before_training() -> None:
    teacher, both = replace(BASE.detector, modality="lidar"), DistillConfig("distillbev+labeldistill")
    wide = replace(BASE, detector=replace(teacher, head=replace(teacher.head, branch=9)))
    said = r"head.tasks cannot be copied from the teacher: detector.head.branch is 9 there and \d+ in the student; .*"
    with pytest.raises(ValueError, match=said + "--options inherit_head off"):
        check_pair(replace(BASE, distill=both), wide)
    check_pair(replace(BASE, distill=replace(both, options={"inherit_head": "off"})), wide)
    fuser = DistillConfig("simdistill", quirks=("simdistill.trained_fuser",), only=("fusion",))
    with pytest.raises(
        ValueError, match=r"trains the teacher's fuser, but this lidar teacher has none; flip the quirk"
    ):
        check_pair(replace(BASE, distill=fuser), replace(BASE, detector=teacher))
    for has in ("fusion", "simulated fusion"):
        check_pair(replace(BASE, distill=fuser), replace(BASE, detector=kind(BASE.detector, has)))


def test_a_method_without_terms_is_refused() -> None:
    teacher = replace(BASE, detector=replace(BASE.detector, modality="lidar"))
    for nothing in (DistillConfig("distillbev", options={"positions": "none"}), DistillConfig(scale=0.0)):
        with pytest.raises(ValueError, match=f"{nothing.method} compares nothing: no term is left that counts"):
            check_pair(replace(BASE, distill=nothing), teacher)


def test_widths_name_the_option_that_adapts_them() -> None:
    bev = replace(BASE.detector.bev, neck=24)
    wide = replace(BASE, detector=replace(BASE.detector, modality="lidar", bev=bev))
    with pytest.raises(ValueError, match=r"needs an adapter between them: --options adapt on; or go without"):
        check_pair(replace(BASE, distill=DistillConfig("unidistill")), wide)
    check_pair(replace(BASE, distill=DistillConfig("unidistill", options={"adapt": "on"})), wide)


def test_lidar_depth_with_past_frames_fails_before_anything_is_written(tmp_path: Path) -> None:
    camera = replace(BASE.detector.camera, lidar_depth=True, frames=2)
    config = replace(BASE, detector=replace(BASE.detector, camera=camera))
    with pytest.raises(ValueError, match="lidar_depth is for one frame"):
        train(config, tmp_path / "run", progress=False, cpu=True)
    assert not (tmp_path / "run").exists()


def test_an_impossible_pair_fails_before_anything_is_written(tmp_path: Path) -> None:
    config = mini_config(write_set(tmp_path / "set"), "lidar", epochs=1)
    teacher = train(config, tmp_path / "teacher", progress=False, cpu=True)
    student = replace(config.detector, modality="camera")
    distilled = replace(config, detector=student, distill=DistillConfig("simdistill", str(teacher)))
    with pytest.raises(
        ValueError, match=r"term intra_modal: teacher.camera_bev\[0\] is missing, the teacher has lidar"
    ):
        train(distilled, tmp_path / "run", progress=False, cpu=True)
    assert not (tmp_path / "run").exists()


def test_a_student_is_built_as_its_method_wants_it() -> None:
    config, said = fit_student(replace(BASE, distill=DistillConfig("simdistill")))
    assert config.detector.camera.simulated_lidar and len(said) == 1
    assert said[0] == "detector.camera.simulated_lidar is true, for term cross_modal of simdistill"
    ablated = DistillConfig("simdistill", weights={"cross_modal": 0.0}, only=("fusion",))
    assert fit_student(replace(BASE, distill=ablated))[0].detector == config.detector
    released = DistillConfig("simdistill", variant="released", quirks=("simdistill.lidar_depth",))
    camera = fit_student(replace(BASE, distill=released))[0].detector.camera
    assert camera.shared_lift and camera.corner_reference and not camera.lidar_depth
    plain = fit_student(replace(BASE, distill=DistillConfig("simdistill")), {"camera.simulated_lidar"})
    assert plain == (replace(BASE, distill=DistillConfig("simdistill")), [])
    for other in (BASE, replace(BASE, distill=DistillConfig("unidistill"))):
        assert fit_student(other) == (other, [])


def test_scales_of_several_methods_go_together() -> None:
    both = distillation("tiny", "unidistill+labeldistill", "teacher")
    parts = [distillation("tiny", name, "teacher").scales for name in ("unidistill", "labeldistill")]
    assert both.scales == {**parts[0], **parts[1]} and both.scales and both.method == "unidistill+labeldistill"
    with pytest.raises(ValueError, match="unknown method 'nope'"):
        distillation("tiny", "nope", "teacher")


def test_studies_change_methods_options_and_students() -> None:
    def changed(**values: object) -> RunConfig:
        return apply({key.replace("__", "."): value for key, value in values.items()}, BASE)[0]

    both = changed(distill__method="unidistill+labeldistill", distill__options__levels="1", distill__only=["label_1"])
    assert both.distill is not None and both.distill.options == {"levels": "1"} and both.distill.only == ("label_1",)
    assert changed(distill__method="distillbev", distill__options={"attention": "none"}).distill.options == {
        "attention": "none"
    }
    released = changed(distill__method="simdistill", distill__variant="released")
    assert released.detector.camera.simulated_lidar and released.detector.camera.lidar_depth
    own = changed(distill__method="simdistill", detector__camera__simulated_lidar=False)
    assert not own.detector.camera.simulated_lidar
    with pytest.raises(ValueError, match="option levels: '7' is not one of 0, 1, 2"):
        changed(distill__method="labeldistill", distill__options__levels="7")
    with pytest.raises(ValueError, match=r"distill\.method: unknown method 'magic'; known: unidistill"):
        changed(distill__method="unidistill+magic")
