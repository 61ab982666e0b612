import math

import pytest
import torch
from distill_fakes import GRID, SQUARE, boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlab.distill.regions import (
    fires_wrongly,
    footprint_owner,
    gaussian_mask,
    nine_points,
    rows_to_first_zero,
    rows_to_last_box,
    share,
    size_scale,
)
from kdlab.geometry import BEVGrid, transform_boxes, yaw_pose
from kdlab.models.targets import gaussian_radius


def naive_radius(a, b, o):
    t, p = a + b, a * b
    r1 = (t + math.sqrt(t * t - 4 * p * (1 - o) / (1 + o))) / 2
    r2 = (2 * t + math.sqrt(4 * t * t - 16 * (1 - o) * p)) / 2
    r3 = (-2 * o * t + math.sqrt(4 * o * o * t * t + 16 * o * (1 - o) * p)) / 2
    return min(r1, r2, r3)


def naive_mask(values, drawn, grid, overlap, least, truncate=False):
    mask = torch.zeros(len(values), *grid.shape)
    for b, rows in enumerate(values.tolist()):
        for m, (x, y, _, length, width, *_rest) in enumerate(rows):
            if not drawn[b, m]:
                continue
            r = max(int(naive_radius(length / grid.cell, width / grid.cell, overlap)), least)
            u, v = (x - grid.x[0]) / grid.cell, (y - grid.y[0]) / grid.cell
            cx, cy = (int(u), int(v)) if truncate else (math.floor(u), math.floor(v))
            for i in range(max(cy - r, 0), min(cy + r + 1, grid.height)):
                for j in range(max(cx - r, 0), min(cx + r + 1, grid.width)):
                    g = math.exp(-((j - cx) ** 2 + (i - cy) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
                    mask[b, i, j] = max(float(mask[b, i, j]), g)
    return mask


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(0, 5), st.integers(0, 5)),
    st.sampled_from([(0.7, 0), (0.1, 2)]),
    st.sampled_from([GRID, SQUARE, BEVGrid((-3.0, 9.0), (-6.0, 3.0), 0.5)]),
    st.booleans(),
)
def test_mask_matches_loops(seed, counts, how, grid, truncate):
    found = boxes(seed, counts, reach=13.0)
    ours = gaussian_mask(found.values, found.valid, grid, overlap=how[0], min_radius=how[1], truncate=truncate)[:, 0]
    theirs = naive_mask(found.values, found.valid, grid, *how, truncate=truncate)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_mask_has_a_channel_per_class():
    found = boxes(3, (5, 3))
    how = {"overlap": 0.1, "min_radius": 2}
    ours = gaussian_mask(found.values, found.valid, GRID, channel=found.labels, channels=10, **how)
    for c in range(10):
        alone = gaussian_mask(found.values, found.valid & (found.labels == c), GRID, **how)[:, 0]
        torch.testing.assert_close(ours[:, c], alone)


def test_mask_turns_with_the_boxes():
    found = boxes(5, (6, 3), reach=13.0)
    turned = transform_boxes(yaw_pose(math.pi / 2), found.values.double())
    how = {"overlap": 0.1, "min_radius": 2}
    before = gaussian_mask(found.values.double(), found.valid, SQUARE, **how)[:, 0]
    after = gaussian_mask(turned, found.valid, SQUARE, **how)[:, 0]
    torch.testing.assert_close(after, before.rot90(1, (2, 1)))  # rows grow with y: counter-clockwise in the plane


@settings(max_examples=50, deadline=None)
@given(st.floats(0.0, 50.0), st.floats(0.0, 50.0), st.sampled_from([0.1, 0.3, 0.7]))
def test_radius_matches_the_formulas(length, width, overlap):
    found = gaussian_radius(torch.tensor(length).double(), torch.tensor(width).double(), overlap, released=True)
    assert float(found) == pytest.approx(naive_radius(length, width, overlap), abs=1e-6)


def test_nine_points_of_a_box():
    box = torch.tensor([1.0, 2.0, 0.0, 4.0, 2.0, 1.0, math.pi / 2, 0.0, 0.0])  # heading along +y
    expected = [(2, 0), (0, 0), (0, 4), (2, 4), (1, 2), (1, 0), (0, 2), (1, 4), (2, 2)]
    torch.testing.assert_close(nine_points(box), torch.tensor(expected).float())


def test_counted_rows():
    values = torch.zeros(4, 4, 9)
    values[0, :2, 0] = 1
    values[1, 2, 0] = 1  # an empty row before a filled one counts
    values[2, :, 0] = 1
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert rows_to_last_box(values).int().tolist() == expected
    assert rows_to_last_box(values[:, :0]).shape == (4, 0)
    values[0, 0, 7] = math.nan  # an unknown velocity counts as 0
    assert rows_to_last_box(values).int().tolist() == expected


def test_rows_before_the_first_of_all_zeros():
    values, labels = torch.zeros(1, 3, 9), torch.tensor([[0, -1, 0]])
    assert rows_to_first_zero(values, labels).tolist() == [[True, False, False]]
    assert rows_to_first_zero(values, labels * 0).all()


def naive_owner(values, counted, grid, at):
    owner = torch.full((len(values), *grid.shape), values.shape[1])
    for b, i, j in ((b, i, j) for b in range(len(values)) for i in range(grid.height) for j in range(grid.width)):
        x, y = grid.x[0] + (j + at) * grid.cell, grid.y[0] + (i + at) * grid.cell
        for m, (cx, cy, _, length, width, _, yaw, *_rest) in enumerate(values[b].tolist()):
            u = (x - cx) * math.cos(yaw) + (y - cy) * math.sin(yaw)
            v = (y - cy) * math.cos(yaw) - (x - cx) * math.sin(yaw)
            if counted[b, m] and abs(u) < length / 2 and abs(v) < width / 2:
                owner[b, i, j] = m
                break
    return owner


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(0, 3)),
    st.sampled_from([GRID, SQUARE, BEVGrid((-3.0, 9.0), (-6.0, 3.0), 0.5), BEVGrid((-9.0, 6.0), (-6.0, 0.0), 3.0)]),
    st.sampled_from([0.0, 0.5]),
)
def test_owner_matches_loops(seed, counts, grid, at):
    found = boxes(seed, counts, reach=14.0)
    values = found.values.double()
    values[:, ::2, 6] = (values[:, ::2, 6] / (math.pi / 4)).round() * (math.pi / 4)  # 0, 45, 90 degrees
    values[:, ::3, 3:5] *= 0.1  # less than a cell
    owner = footprint_owner(values, found.valid, grid, at)
    assert torch.equal(owner, naive_owner(values, found.valid, grid, at))
    scale = size_scale(values, owner, grid)
    for b, i, j in (owner < values.shape[1]).nonzero().tolist():
        length, width = values[b, owner[b, i, j], 3:5].tolist()
        assert float(scale[b, i, j]) == pytest.approx(grid.cell / math.sqrt(length * width), rel=1e-5)
    assert (scale[owner == values.shape[1]] == 0).all() and scale.dtype == torch.float32


def test_owner_of_a_box_larger_than_the_map_and_of_one_far_away():
    values = torch.zeros(1, 3, 9)
    values[0, 0, :5] = torch.tensor([500.0, -800.0, 0, 4, 2])
    values[0, 1, :7] = torch.tensor([3.0, 2.0, 0, 400, 300, 1, 0.3])
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    assert (footprint_owner(values, everywhere, GRID) == 1).all()
    assert (footprint_owner(values, everywhere & False, GRID) == 3).all()


def test_owner_reads_a_footprint_without_its_border():
    values = torch.zeros(1, 1, 9)
    values[0, 0, :5] = torch.tensor([0.375, 0.375, 0, 1.5, 0.75])  # centres at -0.375, 0.375, 1.125 lie on its ends
    owner = footprint_owner(values, torch.ones(1, 1, dtype=torch.bool), GRID)
    assert (owner == 0).nonzero().tolist() == [[0, 12, 16]]


def test_fires_wrongly_and_share():
    truth, found = torch.zeros(1, 4, 6), torch.zeros(1, 4, 6)
    found[0, 1, 2], found[0, 3, 5], truth[0, 3, 5] = 0.5, 0.5, 0.3
    assert fires_wrongly(truth, found, 0.1, 0.1, (4, 6)).nonzero().tolist() == [[0, 1, 2]]
    assert fires_wrongly(truth, found, 0.5, 0.1, (2, 3)).nonzero().tolist() == [[0, 0, 1], [0, 1, 2]]
    assert fires_wrongly(truth, found, 0.1, 0.1, (8, 12))[0, 2:4, 4:6].all()
    mask = torch.tensor([[[True, False], [True, True]], [[False, False], [False, False]]])
    torch.testing.assert_close(share(mask)[:, 0, 0], torch.tensor([1 / 3, 0.0]))
