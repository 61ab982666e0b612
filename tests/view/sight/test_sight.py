from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_run import one_thread  # noqa: F401
from sight_fakes import PAIRS, config_of, detector, method_of, observer_of, without_boxes

from kdlab.checkpoint import RunFolder, save_weights
from kdlab.config import DistillConfig, RunConfig, save_config
from kdlab.distill import Distiller, gradient_map
from kdlab.models.labels import LabelEncoder
from kdlab.sample import Sample
from kdlab.shipping import WEIGHTS
from kdlab.view.sight import ALL, Observer, load_sights, save_sights


@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_gradients_are_those_of_a_training_step(name: str, sample: Sample) -> None:
    observer = observer_of(name)
    sight = observer.see(sample)
    assert not sight.errors and not observer.errors
    assert observer.distiller is not None and observer.student is not None and observer.method is not None
    assert set(sight.results) == {term.name for term in observer.method.active}
    found = observer.student(sight.batch.images_only())
    results = observer.distiller(found, sight.batch)
    for term, result in results.items():
        assert sight.value(term) == pytest.approx(result.value.item(), rel=1e-5)
        kept = sight.results[term]
        assert float(kept.map().sum() + kept.off_map) == pytest.approx(sight.value(term), rel=1e-4, abs=1e-6)
        whole = getattr(found, sight.pulls[term].removeprefix("student."))
        torch.testing.assert_close(sight.gradient_map(term), gradient_map(result.value, whole)[0], rtol=1e-4, atol=1e-7)
        assert sight.gradient_map(term).any() or not result.value.item()
    every = sum(result.value for result in results.values())
    assert isinstance(every, torch.Tensor)
    torch.testing.assert_close(sight.gradient_map(ALL), gradient_map(every, found.bev)[0], rtol=1e-4, atol=1e-7)
    assert sum(float(sight.results[t].off_map) for t in results) + float(sight.loss_map(ALL).sum()) == pytest.approx(
        every.item(), rel=1e-4
    )
    assert (
        sight.teacher is not None and sight.student is not None and (sight.labels is None) == (name != "labeldistill")
    )
    assert not sight.student.bev.requires_grad and set(sight.detections) == {"teacher", "student"}


def test_gradients_are_linear_in_the_terms(sample: Sample) -> None:
    sight = observer_of("unidistill").see(sample)
    parts = [sight.gradient(term) for term in sight.results]
    assert parts[0].shape == (8, 32, 32)
    torch.testing.assert_close(sight.gradient(ALL), torch.stack(parts).sum(0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sight.gradient(list(sight.results)[:2]), parts[0] + parts[1], rtol=1e-4, atol=1e-7)
    assert not sight.gradient(()).any()


def test_a_map_before_the_student_s_bev_is_pulled_at_itself(sample: Sample) -> None:
    sight = observer_of("simdistill").see(sample)
    assert sight.pulls["intra_modal"] == "student.camera_bev" and sight.pulls["cross_modal"] == "student.lidar_bev"
    assert not sight.gradient("intra_modal").any()  # at student.bev
    assert sight.gradient("intra_modal", "student.camera_bev").shape == (8, 32, 32)
    assert sight.gradient_map("intra_modal").any()


def test_a_dropped_graph_is_made_again(sample: Sample) -> None:
    sight = observer_of("unidistill").see(sample)
    first = sight.gradient_map("feature")
    sight.drop_graph()
    assert sight.live is None and sight.gradient_map("feature") is first
    other = observer_of("unidistill").see(sample).gradient_map("response_class")
    torch.testing.assert_close(sight.gradient_map("response_class"), other)
    with pytest.raises(ValueError, match="no term 'nothing'; known: feature, relation, response_class"):
        sight.gradient_map("nothing")


def test_the_camera_student_sees_images_alone(sampler: Callable[..., Sample]) -> None:
    observer, sample = observer_of("unidistill"), sampler()
    seen = observer.see(sample)
    blind = observer.see(replace(without_boxes(sample), points=torch.zeros(0, 5)))
    assert seen.student is not None and blind.student is not None and seen.teacher is not None
    assert torch.equal(seen.student.bev, blind.student.bev)
    assert blind.teacher is not None and not torch.equal(seen.teacher.bev, blind.teacher.bev)
    assert blind.value("feature") == 0 and seen.value("feature") > 0


def test_a_student_in_training_may_be_looked_at(sample: Sample) -> None:
    observer = observer_of("distillbev")
    assert observer.student is not None
    observer.student.train()
    before = {name: b.clone() for name, b in observer.student.named_buffers()}
    first = observer.see(sample)
    assert observer.student.training and all(p.requires_grad for p in observer.student.head.parameters())
    assert all(torch.equal(b, before[name]) for name, b in observer.student.named_buffers())
    observer.student.eval()
    second = observer.see(sample)
    assert first.student is not None and second.student is not None
    assert torch.equal(first.student.bev, second.student.bev)


def test_quirks_act_and_leave_the_networks_alone(sample: Sample) -> None:
    observer = observer_of("unidistill")
    first = observer.see(sample)
    assert observer.teacher is not None
    before = {name: b.clone() for name, b in observer.teacher.named_buffers()}
    trained = observer.with_quirks(["unidistill.teacher_train_mode"])
    other = trained.see(sample)
    assert other.teacher is not None and first.teacher is not None
    assert not torch.allclose(other.teacher.bev, first.teacher.bev)
    assert all(torch.equal(b, before[name]) for name, b in observer.teacher.named_buffers())
    assert observer.see(sample).value(ALL) == first.value(ALL)
    assert trained.compare(first).value(ALL) == other.value(ALL)  # it sees again: the teacher runs otherwise
    with pytest.raises(ValueError, match="unknown quirk"):
        observer.with_quirks(["unidistill.nothing"])


@pytest.mark.parametrize("name", PAIRS)
def test_terms_alone_are_run_again_for_other_quirks(name: str, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    observer = observer_of(name)
    first = observer.see(sample)
    quirks = [q.name for q in observer.method.quirks if q.where == "term"] if observer.method is not None else []
    other = observer.with_quirks(quirks)
    whole = other.see(sample)
    monkeypatch.setattr(other, "see", lambda sample: pytest.fail("the networks ran again"))
    again = other.compare(first)
    assert again.results.keys() == whole.results.keys()
    for term in whole.results:
        assert again.value(term) == pytest.approx(whole.value(term), rel=1e-6)
        torch.testing.assert_close(again.gradient_map(term), whole.gradient_map(term))
    assert again.value(ALL) != first.value(ALL)


def test_adapters_stay_when_quirks_change(sample: Sample) -> None:
    observer = observer_of("distillbev")
    other = observer.with_quirks(["distillbev.spatial_conv"])
    assert observer.distiller is not None and other.distiller is not None
    kept = observer.distiller.state_dict()
    assert kept and all(torch.equal(other.distiller.state_dict()[name], value) for name, value in kept.items())
    assert any("distillbev.spatial_H" in note for note in other.notes)
    assert not other.see(sample).errors


def test_label_encoder_paints_as_the_quirk_says(sample: Sample) -> None:
    observer = observer_of("labeldistill")
    first, other = (o.see(sample) for o in (observer, observer.with_quirks(["labeldistill.half_footprint"])))
    assert first.labels is not None and other.labels is not None
    assert not torch.equal(first.labels.bev, other.labels.bev)


def test_what_a_pair_cannot_have_is_said_and_the_rest_goes_on(sample: Sample) -> None:
    observer = observer_of("simdistill", "BEVDepth", "LiDAR")
    sight = observer.see(sample)
    assert "teacher.camera_bev[0] is missing" in sight.errors["intra_modal"]
    assert "student.lidar_bev is missing" in sight.errors["cross_modal"]
    assert set(sight.results) == {"fusion", "prediction_class", "prediction_box"} and sight.gradient_map(ALL).any()
    with pytest.raises(ValueError, match=r"teacher.camera_bev\[0\] is missing"):
        sight.loss_map("intra_modal")
    other = observer.with_quirks(["simdistill.trained_fuser", "simdistill.lidar_depth"])
    assert "this teacher has none" in other.errors["simdistill.trained_fuser"]
    assert "without camera.lidar_depth" in other.errors["simdistill.lidar_depth"]


def test_mixed_widths_and_strides(sample: Sample) -> None:
    wide = {"channels": 12, "stages": (24, 40), "neck": 20, "first_stride": 2}
    sight = observer_of("distillbev", **wide).see(sample)
    assert not sight.errors and sight.gradient_map(ALL).any()
    assert sight.adapted["stages[0]"].shape == (24, 16, 16) and sight.adapted["neck"].shape == (20, 32, 32)
    assert sight.loss_map("background_B1").shape == (16, 16) and sight.loss_map(ALL).shape == (32, 32)
    off = sum(float(r.off_map) for r in sight.results.values())
    assert float(sight.loss_map(ALL).sum()) + off == pytest.approx(sight.value(ALL), rel=1e-4)
    other = observer_of("unidistill", **wide).see(sample)  # no adapters between different widths
    assert "8 channels" in other.errors["feature"] and set(other.results) == {"response_class", "response_regression"}


def test_one_side_alone(sample: Sample) -> None:
    student, teacher = config_of("BEVDepth"), config_of("fusion")
    left = Observer(None, detector(student.detector, 0), config=student).see(sample)
    assert left.teacher is None and left.student is not None and left.student.lift is not None and not left.results
    right = Observer(detector(teacher.detector, 0), None, config=teacher).see(sample)
    assert right.student is None and right.teacher is not None and right.teacher.lift is not None
    assert left.stages().keys() == {"student"} and right.stages().keys() == {"teacher"}
    assert left.depth_bins == (1.0, 41.0, 4.0)
    assert not left.loss_map(ALL).any()
    with pytest.raises(ValueError, match="without a method"):
        left.gradient_map(ALL)
    method = method_of("unidistill", "BEVDepth", "LiDAR")
    half = Observer(None, detector(student.detector, 0), method, config=student)
    assert "one of them is missing" in half.see(sample).errors["unidistill"]
    with pytest.raises(ValueError, match="give a teacher, a student or both"):
        Observer(None, None, config=student)


def test_mixed_precision_hands_on_float32(sample: Sample) -> None:
    observer = observer_of("unidistill")
    full = observer.see(sample)
    half = replace(observer.config, train=replace(observer.config.train, precision="bf16"))
    mixed = Observer(observer.teacher, observer.student, observer.asked, config=half).see(sample)
    assert mixed.student is not None and full.student is not None and mixed.student.bev.dtype == torch.float32
    assert not torch.equal(mixed.student.bev, full.student.bev)
    torch.testing.assert_close(mixed.student.bev, full.student.bev, rtol=0.1, atol=0.1)
    assert mixed.gradient_map(ALL).dtype == torch.float32


def write_run(path: Path, config: RunConfig, seed: int) -> Path:
    """A finished run."""
    path.mkdir(parents=True)
    save_config(config, path / "config.json")
    save_weights(RunFolder(path).weights, detector(config.detector, seed))
    return path


def test_of_runs_takes_what_belongs_together(tmp_path: Path, sample: Sample) -> None:
    teacher = write_run(tmp_path / "teacher", config_of("LiDAR"), 1)
    distilled = DistillConfig("distillbev", "somewhere/else/teacher", weights={"spatial_H": 0.0})
    config = replace(config_of("BEVDepth"), distill=distilled)
    student = write_run(tmp_path / "student", config, 0)
    fresh = Observer.of_runs(student)
    assert fresh.distiller is not None and any("no trained adapters" in note for note in fresh.notes)
    with torch.no_grad():
        for parameter in fresh.distiller.parameters():
            parameter.fill_(0.25)
    save_weights(RunFolder(student).distiller, fresh.distiller)
    found = Observer.of_runs(student)
    assert found.distiller is not None and not found.notes
    assert all((p == 0.25).all() for p in found.distiller.parameters())
    assert "spatial_H" not in found.see(sample).results and "spatial_B1" in found.see(sample).results
    released = Observer.of_runs(student, variant="released", quirks=["distillbev.signed_means"])
    assert released.method is not None and released.method.on == {
        "distillbev.corner_points", "distillbev.channel_attention", "distillbev.spatial_conv",
        "distillbev.combined_scale", "distillbev.centre_in_range",
    }  # fmt: skip
    named = Observer.of_runs(student, method="unidistill")
    assert named.method is not None and named.method.name == "unidistill"
    assert "student was not trained with unidistill" in named.notes
    assert Observer.of_runs(teacher=teacher).student is None


def test_of_runs_takes_the_label_encoder_or_says_that_there_is_none(tmp_path: Path, sample: Sample) -> None:
    write_run(tmp_path / "teacher", config_of("LiDAR"), 1)
    config = replace(config_of("BEVDepth"), distill=DistillConfig("labeldistill", "teacher"))
    student = write_run(tmp_path / "student", config, 0)
    lacking = Observer.of_runs(student)
    assert "there is no label encoder" in lacking.errors["label_0"] and "lidar_0" in lacking.see(sample).results
    network = LabelEncoder(config.detector.grid, config.detector.bev.stages)
    save_weights(RunFolder(student / "stages" / "label_encoder").weights, network)
    found = Observer.of_runs(student)
    assert not found.errors and found.see(sample).labels is not None


def test_of_runs_says_what_is_missing(tmp_path: Path) -> None:
    config = replace(config_of("BEVDepth"), distill=DistillConfig("unidistill", "gone"))
    student = write_run(tmp_path / "student", config, 0)
    found = Observer.of_runs(student, method="unidistill")
    assert found.teacher is None and found.method is None and "the teacher gone is not here" in found.notes[0]
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        Observer.of_runs(tmp_path / "nothing")
    with pytest.raises(ValueError, match="name a student's run, a teacher's, or both"):
        Observer.of_runs()


@pytest.mark.parametrize("name", PAIRS)
def test_shipped_students_find_their_teacher_from_anywhere(
    name: str, tmp_path: Path, sampler: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = sorted(WEIGHTS.glob(f"{name}-*"))
    if not runs:
        pytest.skip(f"no shipped weights of {name}")
    monkeypatch.chdir(tmp_path)
    observer = Observer.of_runs(runs[0])
    sight = observer.see(sampler())
    assert observer.method is not None and not observer.errors and not sight.errors
    assert set(sight.results) == {term.name for term in observer.method.active}
    assert all("no trained adapters" in note for note in observer.notes) and (name == "labeldistill") == bool(
        observer.notes
    )
    assert observer.sensors.sweeps == 2 or name == "simdistill"


@pytest.mark.parametrize("name", ["simdistill", "labeldistill"])
def test_sights_come_back_from_a_file(name: str, tmp_path: Path, sampler: Callable[..., Sample]) -> None:
    observer = observer_of(name)
    sights = [observer.see(sampler()), observer.see(replace(without_boxes(sampler()), token="other"))]
    save_sights(tmp_path / "sights.safetensors", sights)
    found = load_sights(tmp_path / "sights.safetensors")
    assert [s.sample.token for s in found] == ["token", "other"] and not list(tmp_path.glob(".*"))
    for sight, stored in zip(sights, found, strict=True):
        assert stored.stages() == sight.stages() and stored.grid == sight.grid and stored.pulls == sight.pulls
        assert stored.depth_bins == sight.depth_bins and stored.masks.keys() == sight.masks.keys()
        assert stored.student is not None and sight.student is not None and stored.student.lift is not None
        torch.testing.assert_close(stored.student.bev, sight.student.bev, rtol=1e-3, atol=1e-4)
        assert torch.equal(stored.student.lift.cell, sight.student.lift.cell)  # type: ignore[union-attr]
        assert torch.equal(stored.detections["teacher"].values, sight.detections["teacher"].values)
        for term in (*sight.results, ALL):
            assert stored.value(term) == pytest.approx(sight.value(term))
            torch.testing.assert_close(stored.loss_map(term), sight.loss_map(term), rtol=1e-5, atol=0)
            assert torch.equal(stored.gradient_map(term), sight.gradient_map(term))
        assert torch.equal(stored.sample.boxes.values.nan_to_num(), sight.sample.boxes.values.nan_to_num())
        assert stored.sample.images.shape == sight.sample.images.shape
        assert (stored.sample.images.int() - sight.sample.images.int()).abs().max() <= 3
        torch.testing.assert_close(stored.batch.image_from_camera, sight.batch.image_from_camera)
        with pytest.raises(ValueError, match="from a file"):
            stored.gradient("all")


def test_past_frames_count_and_pull_nowhere(sample: Sample) -> None:
    names = ("images", "image_from_camera", "frame_from_camera", "key_from_frame", "frame_times")
    two = replace(sample, **{name: getattr(sample, name).repeat_interleave(2, 0) for name in names})
    observer = observer_of("labeldistill", "BEVDepth4D", "LiDAR")
    sight = observer.see(two)
    assert observer.sensors.frames == 2 and not sight.errors and sight.student is not None
    assert sight.student.camera_bev is not None and sight.student.camera_bev.shape[1] == 2
    assert sight.gradient("label_0", sight.pulls["label_0"]).shape == (8, 32, 32)  # of the key frame
    assert sight.gradient_map("label_0").any()


def test_a_sight_without_images_is_kept_too(tmp_path: Path, sample: Sample) -> None:
    none = {name: getattr(sample, name)[:, :0] for name in ("images", "image_from_camera", "frame_from_camera")}
    sight = observer_of("unidistill", "LiDAR", "LiDAR").see(replace(sample, **none))
    save_sights(tmp_path / "sights", [sight])
    (stored,) = load_sights(tmp_path / "sights")
    assert stored.sample.images.shape[:2] == (1, 0) and stored.value(ALL) == pytest.approx(sight.value(ALL))
    assert stored.depth_bins is None and stored.student is not None and stored.student.lift is None


def test_a_file_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sights at"):
        load_sights(tmp_path / "nothing")
    with pytest.raises(ValueError, match="give at least one"):
        save_sights(tmp_path / "nothing", [])
    write_run(tmp_path / "run", config_of("LiDAR"), 0)
    with pytest.raises(ValueError, match="holds tensors, but no sights"):
        load_sights(RunFolder(tmp_path / "run").weights)
    (tmp_path / "text").write_text("no tensors at all")
    with pytest.raises(ValueError, match="cannot be read as sights"):
        load_sights(tmp_path / "text")


def test_a_stored_sight_without_gradients_says_so(tmp_path: Path, sample: Sample) -> None:
    sight: Any = observer_of("unidistill").see(sample)
    sight.live, sight.again = None, None
    save_sights(tmp_path / "sights", [sight])
    with pytest.raises(ValueError, match="no gradient of feature here"):
        load_sights(tmp_path / "sights")[0].gradient_map("feature")


def test_an_adapter_file_that_does_not_fit_is_left_aside(tmp_path: Path) -> None:
    observer = observer_of("distillbev", stages=(20, 36))
    assert isinstance(observer.distiller, Distiller)
    save_weights(tmp_path / "adapters.safetensors", observer.distiller)
    other = observer_of("distillbev")
    again = Observer(
        other.teacher, other.student, other.asked, config=other.config, adapters=tmp_path / "adapters.safetensors"
    )
    assert any("distillbev.B1" in note for note in again.notes)
