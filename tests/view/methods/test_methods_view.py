from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mini_run import one_thread  # noqa: F401
from sight_fakes import observer_of, without_boxes

from kdlab.distill import distillbev, unidistill
from kdlab.distill.terms import cosine_relation, read_points
from kdlab.models.labels import label_maps as maps_of_labels
from kdlab.sample import Sample
from kdlab.view.methods.distillbev import regions
from kdlab.view.methods.labeldistill import label_features, label_maps, partition
from kdlab.view.methods.shared import terms_of
from kdlab.view.methods.simdistill import compensation, sampling_offsets
from kdlab.view.methods.unidistill import crucial_points, relation_matrices
from kdlab.view.sight import Observer, Sight

Draw = Callable[[Figure], Figure]


@pytest.fixture(scope="module")
def _seen() -> dict[str, tuple[Sight, Observer]]:
    return {}


@pytest.fixture
def look(sample: Sample, _seen: dict[str, tuple[Sight, Observer]]) -> Callable[[str], tuple[Sight, Observer]]:
    def find(name: str) -> tuple[Sight, Observer]:
        if name not in _seen:
            observer = observer_of(name)
            _seen[name] = observer.see(sample), observer
        return _seen[name]

    return find


Look = Callable[[str], tuple[Sight, Observer]]


def test_points_lie_on_the_boxes_and_carry_the_loss(look: Look, draw: Draw) -> None:
    sight, observer = look("unidistill")
    figure = draw(crucial_points(sight, observer))
    places = figure.axes[0].collections
    drawn = next(c for c in places if c.get_label() == "nine points of each box").get_offsets()
    centres = sight.sample.boxes.values[:, :2].flip(-1).numpy()  # (y, x), as drawn
    np.testing.assert_allclose(np.asarray(drawn)[4::9], centres, atol=1e-3)
    losses = figure.axes[2].collections[-1].get_array()
    assert losses is not None and float(losses.sum()) == pytest.approx(sight.value("feature"), rel=1e-4)


def test_the_quirk_shows_where_the_maps_are_read_instead(sample: Sample, draw: Draw) -> None:
    observer = observer_of("unidistill").with_quirks(["unidistill.transpose_points"])
    figure = draw(crucial_points(observer.see(sample), observer))
    sets = {c.get_label(): np.asarray(c.get_offsets()) for c in figure.axes[0].collections}
    read, points = sets["where the maps are read"], sets["nine points of each box"]
    np.testing.assert_allclose(read, points[:, ::-1], atol=1e-3)  # mirrored at the diagonal


def test_relations_are_those_that_the_term_compares(look: Look, draw: Draw) -> None:
    sight, observer = look("unidistill")
    figure = draw(relation_matrices(sight, observer, [1]))
    context, terms = terms_of(sight, observer, unidistill.relation, "relations")
    student, teacher = context.pair(terms[0])
    points = unidistill.box_points(context, student)
    for ax, maps in zip(figure.axes[:2], (teacher, student), strict=True):
        expected = cosine_relation(read_points(maps, points))[0, 1].detach()
        np.testing.assert_allclose(ax.images[0].get_array(), expected, atol=1e-6)
    assert figure.axes[0].images[0].norm is figure.axes[1].images[0].norm
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][4] == "centre"
    with pytest.raises(ValueError, match="there are 2 boxes in range"):
        relation_matrices(sight, observer, [2])


def test_regions_cover_the_map_once(look: Look, draw: Draw) -> None:
    sight, observer = look("distillbev")
    figure = draw(regions(sight, observer, ["H"]))
    context, terms = terms_of(sight, observer, distillbev.regional, "regions")
    found = distillbev.regions(context, next(t for t in terms if t.name == "foreground_H"))
    kinds = np.asarray(figure.axes[0].images[0].get_array()).T
    np.testing.assert_array_equal(kinds == 1, found.foreground[0].numpy())
    np.testing.assert_array_equal(kinds == 2, found.false_positive[0].numpy())
    attention = [np.asarray(ax.images[0].get_array()) for ax in figure.axes[2:4]]
    assert [a.mean() for a in attention] == pytest.approx([1, 1], rel=1e-4)
    assert figure.axes[2].images[0].norm is figure.axes[3].images[0].norm
    assert len(draw(regions(sight, observer)).subfigs) == 3
    with pytest.raises(ValueError, match="not all among those of the method"):
        regions(sight, observer, ["B0"])


def test_offsets_are_those_that_the_compensation_reads(look: Look, draw: Draw) -> None:
    sight, observer = look("simdistill")
    places, weights = compensation(sight, observer)
    assert observer.student is not None and observer.student.camera is not None
    simulated = observer.student.camera.simulated
    assert simulated is not None
    module = simulated.in_bev
    assert places.shape == (*sight.grid.shape, module.heads, module.points, 2)  # type: ignore[union-attr]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    start = module.cells().view(*sight.grid.shape, 2)  # type: ignore[union-attr, operator]
    first = (places[..., 0, 0, :] - start)[3, 5]  # fresh: the first head looks along the columns, a cell away
    torch.testing.assert_close(first, torch.tensor([1.0, 0.0]), atol=1e-4, rtol=0)
    draw(sampling_offsets(sight, observer))
    draw(sampling_offsets(sight, observer, [(10.0, 5.0), (500.0, 0.0)]))
    with pytest.raises(ValueError, match="no simulated LiDAR"):
        sampling_offsets(*look("unidistill"))


def test_label_maps_are_the_encoder_s(look: Look, draw: Draw) -> None:
    sight, _ = look("labeldistill")
    figure = draw(label_maps(sight))
    mask = maps_of_labels(sight.batch.boxes, sight.grid).mask[0].numpy()
    for ax in figure.axes[:3]:
        shown = np.asarray(np.ma.getmaskarray(ax.images[0].get_array())).T
        np.testing.assert_array_equal(~shown, mask)
    assert int((np.asarray(figure.axes[3].images[0].get_array()) > 0).sum()) >= int(mask.sum())


def test_label_features_have_a_row_per_level_on_one_scale(look: Look, draw: Draw) -> None:
    figure = draw(label_features(*look("labeldistill")))
    assert len(figure.subfigs) == 2
    axes = figure.subfigs[0].axes[:4]
    assert [ax.get_title() for ax in axes[::2]] == ["labels.stages[0]", "teacher.stages[0]"]
    assert len({id(ax.images[0].norm) for ax in axes}) == 1


def test_each_term_pulls_at_its_part_of_the_channels(look: Look, draw: Draw) -> None:
    sight, observer = look("labeldistill")
    figure = draw(partition(sight, observer))
    assert [ax.get_title() for ax in figure.axes[:3]] == [
        "2 channels for labels",
        "2 channels for LiDAR",
        "4 channels for images alone",
    ]
    bars = [bar.get_height() for bar in figure.axes[3].patches]
    label, lidar = (np.array(bars[i : i + 8]) > 0 for i in (0, 8))
    assert label.tolist() == [True] * 2 + [False] * 6
    assert lidar.tolist() == [False] * 2 + [True] * 2 + [False] * 4


def test_a_scene_without_boxes_can_be_drawn(sampler: Callable[..., Sample], draw: Draw) -> None:
    observer = observer_of("unidistill")
    sight = observer.see(without_boxes(sampler()))
    draw(crucial_points(sight, observer))
    with pytest.raises(ValueError, match="there are 0 boxes in range"):
        relation_matrices(sight, observer)


def test_another_method_s_picture_says_what_is_missing(look: Look) -> None:
    sight, observer = look("unidistill")
    with pytest.raises(ValueError, match="regions: the method unidistill has no such term"):
        regions(sight, observer)
    with pytest.raises(ValueError, match="belong to a method"):
        crucial_points(sight, observer_of(None))
