from dataclasses import replace

import pytest
import torch
from distill_fakes import FakeChannels, features
from torch import nn

from kdlab.config import DistillConfig
from kdlab.distill import (
    METHODS,
    Adapter,
    Part,
    Quirk,
    TeacherMode,
    TensorPath,
    Term,
    build_method,
    usual_pair,
    usual_teacher,
)
from kdlab.distill.unidistill import unidistill


def test_variants_and_flips():
    method = unidistill("C2L")
    assert method.on == frozenset()
    released = method.variant("released")
    assert released.on == {q.name for q in method.quirks}
    assert released.flip(released.on) == method
    with pytest.raises(ValueError, match=r"unknown quirk 'unidistill\.nope'; known: unidistill\.transpose_points"):
        method.flip(["unidistill.nope"])
    with pytest.raises(ValueError, match="known: intended, released"):
        method.variant("paper")


def test_weights():
    method = unidistill("L2C").scaled(0.5).reweight({"feature": 3.0}).scaled({"feature": 0.1})
    feature, relation, *_ = method.terms
    assert (feature.weight, feature.scale) == (3.0, pytest.approx(0.05))
    assert (relation.weight, relation.scale) == (40.0, 0.5)
    for change in (method.reweight, method.scaled):
        with pytest.raises(ValueError, match="unknown term 'features'; known: feature, relation"):
            change({"features": 1.0})
    assert [t.name for t in method.reweight({"relation": 0}).active] == [
        "feature",
        "response_class",
        "response_regression",
    ]


def test_only():
    assert [t.name for t in unidistill().only(["relation"]).terms] == ["relation"]
    with pytest.raises(ValueError, match="unknown term"):
        unidistill().only(["nope"])


def test_adapters_leave_with_their_quirk():
    method = unidistill("C2L")
    assert [t.adapter for t in method.active][:2] == ["unidistill.low", "unidistill.high"]
    assert not any(t.adapter for t in method.flip(["unidistill.no_adapters"]).active)
    assert unidistill("L2C", adapt=True).active[0].adapter == "unidistill.low"
    assert not any(t.adapter for t in unidistill("C2L", adapt=False).active)


def test_methods_add_up():
    first, second = unidistill("L2C"), replace(unidistill("L2C").only(["feature"]), name="other")
    both = first + second
    assert [t.name for t in both.terms] == [
        "unidistill.feature",
        "relation",
        "response_class",
        "response_regression",
        "other.feature",
    ]
    assert len(both.quirks) == len(first.quirks)
    adapter = Adapter("unidistill.low", nn.Conv2d, "", "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="they differ"):
        unidistill("C2L") + replace(second, adapters=(adapter,))


def test_names_must_be_known_and_unique():
    method = unidistill()
    with pytest.raises(ValueError, match="same name"):
        replace(method, terms=method.terms * 2)
    with pytest.raises(ValueError, match="unknown adapter 'x'; known: none"):
        replace(method, terms=(replace(method.terms[0], adapter="x"),))
    with pytest.raises(ValueError, match="unknown quirk"):
        replace(method, on=frozenset(["x"]))


def test_describe_names_everything():
    method = unidistill("C2L").scaled(0.25).flip(["unidistill.transpose_points"])
    text = method.describe()
    for part in [t.name for t in method.terms] + [t.source for t in method.terms] + [q.evidence for q in method.quirks]:
        assert part in text
    assert "unidistill.low(student.bev)" in text and "1x1 convolution" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert lines["feature"][3:6] == ["10", "0.25", "2.5"]
    assert lines["unidistill.transpose_points"][1] == "on" and lines["unidistill.count_first_row"][1] == "off"


@pytest.mark.parametrize(
    "text",
    [
        "teacher.nope",
        "techer.bev",
        "teacher.stages",
        "teacher.bev[0]",
        "teacher.bev.heatmap",
        "bev",
        "teacher.neck[1]",
        "teacher.camera_bev[-1]",
    ],
)
def test_wrong_tensor_names(text):
    with pytest.raises(ValueError, match="unknown tensor"):
        TensorPath.parse(text)


def test_sides_of_a_term():
    base = {"name": "x", "function": lambda c, t: None, "weight": 1.0, "source": ""}
    with pytest.raises(ValueError, match="source tensor cannot be"):
        Term(teacher="student.bev", **base)
    with pytest.raises(ValueError, match="student's tensor cannot be"):
        Term(student="teacher.bev", **base)
    assert Term(teacher="labels.stages[0]", **base).paths[1].side == "labels"


def test_widths_and_reading():
    channels, found = FakeChannels(camera_bev=5), features(0)
    found.camera_bev = torch.zeros(2, 3, 5, 4, 4)
    for text, width in [
        ("bev", 4),
        ("stages[1]", 6),
        ("stages[-2]", 4),
        ("stages[-3]", None),
        ("stages[2]", None),
        ("camera_bev_aligned", 5),
        ("image", None),
    ]:
        assert TensorPath.parse(f"teacher.{text}").width(channels) == width
    assert TensorPath.parse("teacher.predictions.heatmap").width(channels) == 10
    assert TensorPath.parse("student.stages[1]").read(found) is found.stages[1]
    assert TensorPath.parse("student.stages[-1]").read(found) is found.stages[1]
    assert TensorPath.parse("student.camera_bev[2]").read(found).shape == (2, 5, 4, 4)
    assert TensorPath.parse("student.predictions").read(found) is found.predictions
    with pytest.raises(ValueError, match=r"teacher.stages\[4\] is missing"):
        TensorPath.parse("teacher.stages[4]").read(found)


def test_parts_cover_the_channels():
    assert [Part(i, 3).slice(10) for i in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 10)]


def test_teacher_modes_combine():
    method = unidistill("L2C", "released")
    assert method.teacher_mode == TeacherMode(True, True)
    assert unidistill("F2C", "released").teacher_mode == TeacherMode(True, False)
    assert unidistill("L2C").teacher_mode == TeacherMode()
    trains = Quirk("x.fuser", "", "", "teacher", TeacherMode(trainable=("fuser",)))
    more = replace(method, quirks=(*method.quirks, trains), on=method.on | {"x.fuser"})
    assert more.teacher_mode == TeacherMode(True, True, ("fuser",))


def test_build_method():
    config = DistillConfig(
        variant="released", quirks=("unidistill.transpose_points",), weights={"relation": 0.0}, scale=0.1
    )
    method = build_method(config, "camera", "lidar")
    assert "unidistill.transpose_points" not in method.on and "unidistill.count_first_row" in method.on
    assert [t.weight for t in method.terms] == [100, 0, 10, 10] and {t.scale for t in method.terms} == {0.1}
    paths = {("camera", "lidar"): 100, ("lidar", "camera"): 10, ("lidar", "fusion"): 10, ("camera", "fusion"): 10}
    for (student, teacher), weight in paths.items():
        method = build_method(DistillConfig(), student, teacher)
        assert method.student == {student} and method.teacher == {teacher} and method.terms[0].weight == weight
    with pytest.raises(ValueError, match=f"known: {', '.join(METHODS)}"):
        build_method(DistillConfig(method="nope"), "camera", "lidar")


def test_methods_of_several_papers_by_name():
    names = [{t.name for t in paper(*paper.pairs[0]).terms} for paper in METHODS.values()]
    assert len(set.union(*names)) == sum(map(len, names))  # so that presets' scales of several methods do not clash
    config = DistillConfig(
        "unidistill+labeldistill",
        variant="released",
        quirks=("labeldistill.no_positives",),
        scales={"feature": 0.1, "label_0": 0.5, "lidar_0": 0.2},
        options={"levels": "0", "adapt": "on"},
        only=("feature", "label_0", "response_box"),
    )
    method = build_method(config, "camera", "lidar")
    assert method.name == "unidistill+labeldistill" and [s.name for s in method.stages] == ["label_encoder"]
    assert {t.name: t.scale for t in method.terms} == {"feature": 0.1, "label_0": 0.5, "response_box": 1.0}
    assert method.terms[0].adapter == "unidistill.low" and "labeldistill.no_positives" not in method.on
    assert {"unidistill.transpose_points", "labeldistill.global_thirds"} <= method.on
    scaled = DistillConfig("labeldistill", scales={"label_1": 0.1}, options={"levels": "0"})
    assert "label_1" not in {t.name for t in build_method(scaled, "camera", "lidar").terms}  # a preset's, left out
    for changes, said in (
        ({"method": "unidistill+nope"}, "unknown method 'nope'"),
        ({"method": "unidistill+unidistill"}, "unidistill stands there twice"),
        ({"options": {"attention": "none"}}, "unknown option 'attention'; known: path, adapt, levels, partition"),
        ({"only": ("x",)}, "unknown term 'x'; known: feature"),
        ({"scales": {"x": 1.0}}, "unknown term 'x'"),
    ):
        with pytest.raises(ValueError, match=said):
            build_method(replace(config, **changes), "camera", "lidar")


def test_terms_that_options_add_want_a_scale_beside_scaled_ones():
    scaled = DistillConfig("labeldistill", scales={"label_0": 0.1}, options={"levels": "0,2"})
    said = "labeldistill: no preset scale for label_2, lidar_2, which the options add; give .*: --weights label_2 X"
    with pytest.raises(ValueError, match=said):
        build_method(scaled, "camera", "lidar")
    given = replace(scaled, weights={"label_2": 0.1, "lidar_2": 0.0})
    assert [t.name for t in build_method(given, "camera", "lidar").active][:2] == ["label_0", "label_2"]
    for fine in (replace(scaled, only=("label_0",)), replace(scaled, scales={}), replace(scaled, options={})):
        build_method(fine, "camera", "lidar")
    other = replace(scaled, method="unidistill+labeldistill", scales={"feature": 0.1})
    build_method(other, "camera", "lidar")  # of the other method none is scaled


def test_usual_teachers():
    assert usual_pair("unidistill", teacher="camera") == ("lidar", "camera")
    assert usual_pair("unidistill+labeldistill") == ("camera", "lidar")
    assert usual_pair("labeldistill", "fusion", "camera") == ("fusion", "camera")
    assert usual_teacher("unidistill", "camera") == "lidar" and usual_teacher("unidistill", "lidar") == "camera"
    assert usual_teacher("simdistill", "lidar") == "fusion" and usual_teacher("unidistill+simdistill", "camera") == (
        "fusion"
    )


def test_every_quirk_says_what_is_meant():
    for paper in METHODS.values():
        for pair in paper.pairs:
            assert all(q.means and q.what and q.evidence for q in paper(*pair).quirks)
