from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from mini_run import one_thread  # noqa: F401
from sight_fakes import observer_of, without_boxes

from kdlab.models.labels import LabelDetector
from kdlab.models.labels import label_maps as maps_of_labels
from kdlab.sample import Sample
from kdlab.view.methods.told import by_points, feature_losses, find_labels, fit_adapters, footprints, gate
from kdlab.view.results.lapse_terms import term_losses
from kdlab.view.results.timelapse import Timelapse
from kdlab.view.sight import Observer, Sight

Draw = Callable[[Figure], Figure]
Seen = tuple[Sight, Observer]
TERMS = ["label_0", "label_1", "lidar_0", "lidar_1"]


@pytest.fixture
def seen(sample: Sample) -> Seen:
    observer = observer_of("labeldistill")
    return observer.see(sample), observer


def counted(sample: Sample, points: list[int]) -> Sample:
    return replace(sample, boxes=replace(sample.boxes, points=torch.tensor(points)))


def test_adapters_learn_and_all_else_stays(seen: Seen) -> None:
    sight, observer = seen
    assert observer.student is not None and observer.labels is not None and observer.teacher is not None
    others = (observer.student, observer.labels, observer.teacher)
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in others]
    start = feature_losses(observer, [sight])
    assert start == pytest.approx({name: sight.value(name) for name in TERMS}, rel=1e-4)
    losses = fit_adapters(observer, [sight], 25)
    assert list(losses) == TERMS and all(len(values) == 25 for values in losses.values())
    after = feature_losses(observer, [sight])
    assert sum(v[-1] for v in losses.values()) < 0.8 * sum(v[0] for v in losses.values())
    assert after != start
    assert observer.see(sight.sample).value("label_1") == pytest.approx(after["label_1"], rel=1e-4)
    for net, states in zip(others, before, strict=True):
        assert all(torch.equal(v, states[k]) for k, v in net.state_dict().items())


def test_what_is_told_is_what_neck_and_head_find(seen: Seen, draw: Draw) -> None:
    sight, observer = seen
    assert observer.labels is not None and observer.teacher is not None
    with torch.no_grad():
        detector = LabelDetector(observer.labels, observer.teacher)
        expected = detector.predict(detector(sight.batch))[0]
    torch.testing.assert_close(find_labels(sight, observer).scores, expected.scores)
    assert len(draw(gate(sight, observer)).axes) == 2


def test_objects_are_grouped_by_their_points(sampler: Callable[..., Sample], draw: Draw) -> None:
    observer = observer_of("labeldistill")
    sights = [observer.see(counted(sampler(), points)) for points in ([1, 20], [3, 0])]
    figure = draw(by_points(sights, observer))
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1\n(1)", "2-3\n(1)", "16-63\n(1)"]
    labels = np.asarray(figure.axes[1].lines[0].get_ydata())
    columns, rows, _ = sights[0].grid.locate(sights[0].sample.boxes.values[:1, :2])
    assert sights[0].labels is not None
    expected = sights[0].labels.stages[0][0, :, rows[0], columns[0]].norm()
    assert labels[0] == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ValueError, match="no annotated object"):
        by_points([observer.see(without_boxes(sampler()))], observer)


def test_footprints_count_empty_centres(seen: Seen, draw: Draw) -> None:
    sight, _ = seen
    figure = draw(footprints(sight))
    whole = replace(sight.grid, cell=0.8)
    for ax, released in zip(figure.axes, (False, True), strict=True):
        mask = maps_of_labels(sight.batch.boxes, whole, released=released).mask
        assert f"{int(mask.sum())} cells" in ax.get_title()
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["centres with a label: 2", "centres left empty: 0"]


def test_another_method_says_what_is_missing(sample: Sample) -> None:
    other = observer_of("unidistill")
    sight = other.see(sample)
    for ask in (lambda: fit_adapters(other, [sight], 1), lambda: feature_losses(other, [sight])):
        with pytest.raises(ValueError, match="feature terms"):
            ask()
    with pytest.raises(ValueError, match="no label encoder here"):
        gate(sight, other)


def test_losses_are_shares_of_what_they_were(seen: Seen, draw: Draw) -> None:
    sight, observer = seen
    fit_adapters(observer, [sight], 10)
    after = observer.see(sight.sample)
    lapse = Timelapse([sight, after], [0, 10], pd.DataFrame(), [0.0, 0.0], [], "bev", "labeldistill")
    figure = draw(term_losses(lapse, "label_0"))
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    expected = after.value("label_0") / sight.value("label_0")
    assert list(curves["label_0"]) == pytest.approx([1.0, expected])
    assert figure.axes[1].images[0].norm is figure.axes[2].images[0].norm
    with pytest.raises(ValueError, match="no term 'nothing'"):
        term_losses(lapse, "nothing")
