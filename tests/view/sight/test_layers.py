from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from mini_run import one_thread  # noqa: F401
from sight_fakes import features_of, observer_of, sight_of, without_boxes

from kdlab.distill import Cells, TermResult
from kdlab.geometry import BEVGrid
from kdlab.sample import Sample
from kdlab.view.sight import ALL, Sight
from kdlab.view.sight.layers import Layer, cell_of, feature_layers, mask_layers, similarity_layers, term_layer


@pytest.fixture
def sight(sample: Sample, grid: BEVGrid) -> Sight:
    return sight_of(sample, grid, teacher=features_of(0, grid.shape), student=features_of(1, grid.shape))


def other_width(sight: Sight, **changes: Any) -> Sight:
    return replace(sight, teacher=features_of(2, sight.grid.shape, **changes))


def check(layer: Layer, shape: tuple[int, ...]) -> None:
    """A layer is of this shape, of one of the two types, and its scale has a length."""
    assert layer.values.shape == shape and layer.title and layer.low < layer.high
    assert layer.values.dtype == (np.uint8 if len(shape) == 3 else np.float32)


def test_both_sides_share_one_scale_and_the_difference_is_centred(sight: Sight) -> None:
    assert sight.student is not None and sight.teacher is not None
    sight.student.bev.mul_(5)
    for view in ("norm", "mean", 2):
        layers = feature_layers(sight, "bev", view)  # type: ignore[arg-type]
        teacher, student, difference = layers["teacher"], layers["student"], layers["difference"]
        for layer in layers.values():
            check(layer, (32, 32))
        assert (teacher.low, teacher.high) == (student.low, student.high) and teacher.palette == "viridis"
        assert difference.low == -difference.high and difference.palette == "RdBu_r"
        np.testing.assert_allclose(difference.values, student.values - teacher.values)
    np.testing.assert_allclose(feature_layers(sight, "bev", 2)["teacher"].values, sight.teacher.bev[0, 2].numpy())
    assert feature_layers(sight, "stages[1]", "norm")["teacher"].values.shape == (16, 16)


def test_pca_has_one_basis(sight: Sight) -> None:
    assert sight.teacher is not None
    same = replace(sight, student=sight.teacher)
    layers = feature_layers(same, "bev", "pca")
    check(layers["teacher"], (32, 32, 3))
    assert np.array_equal(layers["teacher"].values, layers["student"].values) and "PCA" in layers["teacher"].title
    assert not layers["difference"].values.any() and layers["difference"].palette == "magma"
    assert not np.array_equal(*(layer.values for layer in list(feature_layers(sight, "bev", "pca").values())[:2]))


def test_sides_of_other_widths(sight: Sight) -> None:
    wide = other_width(sight, bev=7)
    assert set(feature_layers(wide, "bev", "norm")) == {"teacher", "student", "difference"}
    assert set(feature_layers(wide, "bev", 3)) == {"teacher", "student"}  # one channel has no partner
    assert set(feature_layers(wide, "bev", 5)) == {"teacher"}
    layers = feature_layers(wide, "bev", "pca")
    assert set(layers) == {"teacher", "student"} and "of its own" in layers["student"].title
    with pytest.raises(ValueError, match="bev has no channel 7; its channels go to 6"):
        feature_layers(wide, "bev", 7)


def test_the_adapter_stands_for_the_student(sight: Sight) -> None:
    wide = other_width(sight, bev=7)
    wide.adapted["bev"] = torch.randn(7, 32, 32)
    layers = feature_layers(wide, "bev", 6)
    assert set(layers) == {"teacher", "student", "difference"} and layers["student"].title.startswith("adapted student")
    np.testing.assert_allclose(layers["student"].values, wide.adapted["bev"][6].numpy())
    assert layers["difference"].title == "adapted student − teacher"


def test_other_cells_have_no_difference(sight: Sight) -> None:
    assert sight.teacher is not None
    coarse = replace(sight, teacher=replace(sight.teacher, bev=torch.randn(1, 4, 16, 16)))
    layers = feature_layers(coarse, "bev", "norm")
    assert set(layers) == {"teacher", "student"} and layers["teacher"].values.shape == (16, 16)


def test_a_stage_that_one_side_has_is_shown_alone(sight: Sight) -> None:
    assert sight.teacher is not None
    more = replace(sight, teacher=replace(sight.teacher, lidar_bev=torch.randn(1, 4, 32, 32)))
    assert set(feature_layers(more, "lidar_bev", "norm")) == {"teacher"}
    assert set(feature_layers(replace(sight, teacher=None), "bev", "norm")) == {"student"}
    with pytest.raises(ValueError, match="teacher: no BEV stage 'camera_bev' here"):
        feature_layers(sight, "camera_bev", "norm")
    labelled = replace(sight, labels=features_of(3, sight.grid.shape))
    assert set(feature_layers(labelled, "bev", "norm")) == {"teacher", "student", "difference"}
    layers = feature_layers(labelled, "bev", "norm", ("labels", "teacher"))
    assert set(layers) == {"labels", "teacher"} and layers["labels"].title.startswith("label encoder")


def test_terms(sample: Sample) -> None:
    sight = observer_of("distillbev").see(sample)
    for term in (*sight.results, ALL):
        for what in ("loss", "gradient"):
            layer = term_layer(sight, term, what)  # type: ignore[arg-type]
            size = sight.loss_map(term).shape if what == "loss" else sight.grid.shape
            check(layer, tuple(size))
            assert layer.low == 0
    assert term_layer(sight, ALL).title == f"all terms: {sight.value(ALL):.4g}"
    assert term_layer(sight, "foreground_H", "gradient").title == "foreground_H: gradient at student.bev"
    with pytest.raises(ValueError, match="no term 'foreground'"):
        term_layer(sight, "foreground")


def test_coarse_losses_are_shared_out_in_all(sight: Sight) -> None:
    fine, coarse = torch.zeros(1, 32, 32), torch.zeros(1, 16, 16)
    fine[0, 3, 4], coarse[0, 2, 5] = 1.0, 8.0
    for name, errors, grid in (("fine", fine, sight.grid), ("coarse", coarse, sight.grid.strided(2))):
        sight.results[name] = TermResult.of(errors, Cells(), grid)
    both = sight.loss_map(ALL)
    assert both[3, 4] == 1 and (both[4:6, 10:12] == 2).all() and both.sum() == 9 == sight.value(ALL)


def test_masks_are_shares(sample: Sample) -> None:
    wanted = {
        "unidistill": {"response mask"},
        "distillbev": {"foreground B1", "background H", "false positives H", "scale B2", "attention H"},
        "simdistill": {"object mask"},
        "labeldistill": {"foreground label_0", "foreground lidar_1"},
    }
    for name, masks in wanted.items():
        sight = observer_of(name).see(sample)
        layers = mask_layers(sight)
        assert {"foreground", "Gaussians", "label maps"} | masks <= set(layers)
        for layer in layers.values():
            assert layer.values.min() >= 0 and layer.values.max() <= 1 and (layer.low, layer.high) == (0, 1)
    assert "share of its maximum" in mask_layers(observer_of("distillbev").see(sample))["attention H"].title


def test_masks_lie_where_the_boxes_are(sample: Sample) -> None:
    layers = mask_layers(sight_of(sample, BEVGrid.square(32.0, 0.5)))
    row, col = 64, 84  # the car at 10 m ahead
    assert all(layer.values[row, col] > 0.9 and layer.values[row, 30] == 0 for layer in layers.values())
    assert layers["foreground"].values.sum() == 4 * 8 + 4  # 4 x 2 m; a pedestrian on the corner of four cells


def test_masks_without_boxes_are_empty(sample: Sample, grid: BEVGrid) -> None:
    layers = mask_layers(sight_of(without_boxes(sample), grid))
    assert set(layers) == {"foreground", "Gaussians", "label maps"}
    assert not any(layer.values.any() for layer in layers.values())


def test_a_cell_is_most_like_itself(sight: Sight) -> None:
    assert sight.student is not None
    sight.student.bev[0, :, 7, 9] = 0
    layers = similarity_layers(sight, "bev", 5, 9)
    assert set(layers) == {"teacher", "student"}
    for layer in layers.values():
        assert layer.values[5, 9] == pytest.approx(1) and np.nanmax(layer.values) <= 1 + 1e-6
        assert (layer.low, layer.high, layer.palette) == (-1, 1, "PuOr")
    assert np.isnan(layers["student"].values[7, 9]) and not np.isnan(layers["teacher"].values).any()
    coarse = similarity_layers(sight, "stages[1]", 5, 9)["teacher"].values
    assert coarse.shape == (16, 16) and coarse[2, 4] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"no cell \(32, 0\) on a grid of 32 x 32 cells"):
        similarity_layers(sight, "bev", 32, 0)


def test_cells_of_coarser_maps(sight: Sight) -> None:
    assert cell_of(sight, (32, 32), 31, 17) == (31, 17)
    assert cell_of(sight, (16, 16), 31, 17) == (15, 8)
    assert cell_of(sight, (11, 11), 31, 0) == (10, 0)
