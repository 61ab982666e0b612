from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mini_run import one_thread  # noqa: F401
from sight_fakes import observer_of

from kdlab.sample import Sample
from kdlab.view.methods.effects import quirk_costs, terms_off

Draw = Callable[[Figure], Figure]


def test_each_panel_is_the_gradient_without_a_term(sample: Sample, draw: Draw) -> None:
    sight = observer_of("unidistill").see(sample)
    figure = draw(terms_off(sight))
    panels = {ax.get_title(): np.asarray(ax.images[0].get_array()).T for ax in figure.subfigs[0].axes if ax.images}
    np.testing.assert_allclose(panels["all terms"], sight.gradient_map("all"), rtol=1e-4, atol=1e-7)
    rest = [name for name in sight.results if name != "relation"]
    np.testing.assert_allclose(panels["without relation"], sight.gradient(rest).abs().sum(0), rtol=1e-3, atol=1e-6)
    assert len({id(ax.images[0].norm) for ax in figure.subfigs[0].axes if ax.images}) == 1
    bars = [bar.get_width() for bar in figure.subfigs[1].axes[0].patches]
    whole = float(sight.gradient("all").norm())
    assert bars == pytest.approx([float(sight.gradient(name).norm()) / whole for name in sight.results], rel=1e-4)


def test_a_term_that_acts_elsewhere_says_where(sample: Sample, draw: Draw) -> None:
    sight = observer_of("simdistill").see(sample)
    texts = [t.get_text().strip() for t in draw(terms_off(sight)).subfigs[1].axes[0].texts]
    assert texts[0] == "not at this map: it acts on student.camera_bev"
    assert texts[2].endswith("%")
    draw(terms_off(sight, "student.lidar_bev"))
    with pytest.raises(ValueError, match=r"no map 'student.neck' here; known: student.camera_bev"):
        terms_off(sight, "student.neck")
    with pytest.raises(ValueError, match="without a method"):
        terms_off(observer_of(None).see(sample))


def test_quirks_are_measured_one_by_one(sample: Sample, draw: Draw) -> None:
    observer = observer_of("unidistill")
    table, figure = quirk_costs(observer, sample)
    draw(figure)
    rows = table.set_index("quirk")
    assert observer.method is not None
    assert list(rows.index) == ["none (intended)", *(q.name.partition(".")[2] for q in observer.method.quirks)]
    sight = observer.see(sample)
    assert rows.loc["none (intended)", "loss"] == pytest.approx(sight.value("all"), rel=1e-5)
    moved = rows.loc["transpose_points"]
    assert moved["changes"] == "feature, relation" and moved["cosine of changed terms"] < 0.99
    on = observer.with_quirks(["unidistill.transpose_points"]).see(sample)
    assert moved["loss"] == pytest.approx(on.value("all"), rel=1e-5)
    assert rows.loc["count_first_row", "note"] == "nothing to act on in this sample"
    assert rows.loc["count_first_row", "cosine"] == pytest.approx(1) and not rows.loc["count_first_row", "changes"]
    assert "of this one sample" in rows.loc["teacher_train_mode", "note"]


def test_a_quirk_of_the_student_needs_another_student(sample: Sample, draw: Draw) -> None:
    table, figure = quirk_costs(observer_of("simdistill"), sample)
    draw(figure)
    rows = table.set_index("quirk")
    assert rows.loc["shared_lift", "note"] == "needs another student, trained with detector.camera.shared_lift"
    assert math.isnan(rows.loc["shared_lift", "loss"])
    assert "train the teacher's fuser along" in rows.loc["trained_fuser", "note"]
    assert rows.loc["trained_fuser", "loss"] == pytest.approx(rows.loc["none (intended)", "loss"])


def test_the_networks_are_as_before(sample: Sample) -> None:
    observer = observer_of("distillbev")
    assert observer.teacher is not None
    before = {name: value.clone() for name, value in observer.teacher.state_dict().items()}
    table, _ = quirk_costs(observer, sample)
    assert all(torch.equal(before[name], value) for name, value in observer.teacher.state_dict().items())
    assert "fresh" in table.set_index("quirk").loc["spatial_conv", "note"]
    with pytest.raises(ValueError, match="whose method has quirks"):
        quirk_costs(observer_of(None), sample)
