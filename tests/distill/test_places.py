import pytest
import torch
from distill_fakes import GRID, boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlab.distill import Boxes, Cells, Nowhere, Pairs, Points, Slots, TermResult, gradient_map


def _places(seed: int):
    g = torch.Generator().manual_seed(seed)
    uv = torch.rand(2, 7, 2, generator=g) * 50 - 5
    yield torch.rand(2, 7, generator=g), Points(uv)
    yield torch.rand(2, 7, generator=g), Pairs(uv, uv.flip(1))
    yield torch.rand(2, 4, generator=g), Boxes(boxes(seed, (4, 3), reach=14).values)
    yield torch.rand(2, 5, generator=g), Slots(torch.randint(-20, 800, (2, 5), generator=g))
    yield torch.rand(2, *GRID.shape, generator=g), Cells()
    yield torch.rand(2, 3, *GRID.shape, generator=g), Cells()
    yield torch.rand(2, 3, 5, generator=g), Nowhere(2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_value_is_map_and_what_is_off_it(seed):
    for errors, place in _places(seed):
        result = TermResult.of(errors, place, GRID).weighted(2.0)
        assert result.map().shape == (2, *GRID.shape)
        assert not result.map().requires_grad
        torch.testing.assert_close(result.map().sum() + result.off_map, result.value, rtol=1e-4, atol=1e-5)
        assert (result.map() >= 0).all()


def test_points_are_spread_by_bilinear_weights():
    uv = torch.tensor([[[3.5, 2.5], [4.25, 2.5], [0.0, 0.0], [100.0, 3.0]]])
    found = TermResult.of(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), Points(uv), GRID)
    assert found.map()[0, 2, 3] == pytest.approx(1 + 0.25)
    assert found.map()[0, 2, 4] == pytest.approx(0.75)
    assert found.map()[0, 0, 0] == pytest.approx(0.25)
    assert found.off_map == pytest.approx(1.75)


def test_points_in_metres_are_points_in_cells():
    xy = torch.tensor([[[-11.625, -8.625], [0.0, 0.0]]])
    torch.testing.assert_close(Points.at(xy, GRID).uv, torch.tensor([[[0.5, 0.5], [16.0, 12.0]]]))


def test_a_pair_is_halved():
    first, second = torch.tensor([[[3.5, 2.5]]]), torch.tensor([[[8.5, 9.5]]])
    found = TermResult.of(torch.ones(1, 1), Pairs(first, second), GRID).map()
    assert found[0, 2, 3] == found[0, 9, 8] == 0.5


def test_slots_are_cells_by_flat_index():
    found = TermResult.of(torch.ones(1, 3), Slots(torch.tensor([[33, -1, 768]])), GRID)
    assert found.map()[0, 1, 1] == 1
    assert found.off_map == 2


def test_boxes_fill_their_footprint_or_their_centre():
    values = torch.zeros(1, 3, 9)
    values[0, 0, :5] = torch.tensor([0.375, 0.375, 0.0, 2.25, 0.75])  # three cells
    values[0, 1, :5] = torch.tensor([3.1, 3.1, 0.0, 0.1, 0.1])  # between cell centres
    values[0, 2, 0] = 99
    found = TermResult.of(torch.ones(1, 3), Boxes(values), GRID)
    torch.testing.assert_close(found.map()[0, 12, 15:18], torch.full((3,), 1 / 3))
    assert found.map()[0, 16, 20] == 1 and found.off_map == 1


def test_empty_places():
    for place in (Points(torch.zeros(2, 0, 2)), Slots(torch.zeros(2, 0).long()), Boxes(torch.zeros(2, 0, 9))):
        found = TermResult.of(torch.zeros(2, 0), place, GRID)
        assert found.value == 0 and found.map().shape == (2, *GRID.shape) and found.off_map == 0


def test_cells_of_another_grid_are_refused():
    with pytest.raises(ValueError, match="do not lie on a grid"):
        TermResult.of(torch.zeros(2, 3, 3), Cells(), GRID).map()


def test_gradient_map():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    torch.testing.assert_close(gradient_map((2 * x).sum(), x), torch.full((2, 4, 5), 6.0))
    assert gradient_map(torch.zeros((), requires_grad=True) * 1, x).sum() == 0
