import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlab.geometry import BEVGrid, transform_boxes, yaw_pose
from kdlab.models.labels import LabelEncoder, label_maps
from kdlab.sample import Boxes3D

GRIDS = (BEVGrid((-12.0, 12.0), (-9.0, 9.0), 0.75), BEVGrid((-6.0, 3.0), (-9.0, 9.0), 0.75), BEVGrid.square(12.0, 0.6))


def boxes(seed: int, counts: tuple[int, ...], reach: float = 13.0) -> Boxes3D:
    """Random boxes, some over the border or beyond it, some without length, some velocities unknown."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for many in counts:
        unit = torch.rand(many, 9, generator=g)
        values = unit * torch.tensor([2 * reach, 2 * reach, 1, 9, 3, 2, 2 * math.pi, 4, 4])
        values[:, :2] -= reach
        values[:, 3:5] += 0.2
        values[:, 6] -= math.pi
        values[unit[:, 2] < 0.2, 7] = math.nan
        values[unit[:, 5] < 0.1, 3] = 0
        samples.append(Boxes3D.make(values, torch.randint(0, 10, (many,), generator=g)))
    return Boxes3D.pad(samples)


def inside(x: float, y: float, box: list[float]) -> bool:
    dx, dy, cos, sin = x - box[0], y - box[1], math.cos(box[6]), math.sin(box[6])
    return abs(dx * cos + dy * sin) < box[3] / 2 and abs(dy * cos - dx * sin) < box[4] / 2


def rows_in_order(found: Boxes3D, b: int) -> list[int]:
    rows = [m for m in range(len(found)) if found.valid[b, m] and (found.values[b, m, 3:5] > 0).all()]
    return sorted(rows, key=lambda m: int(found.labels[b, m]))


def naive_maps(found: Boxes3D, grid: BEVGrid) -> dict[tuple[int, int, int], int]:
    """Row of the box by sample, row and column of the cell."""
    out = {}
    for b in range(len(found.values)):
        for centres in (False, True):
            for m in rows_in_order(found, b):
                box = found.values[b, m].tolist()
                u, v = (found.values[b, m, :2] - torch.tensor([grid.x[0], grid.y[0]])).tolist()
                at = (math.floor(v / grid.cell), math.floor(u / grid.cell))
                for i in range(grid.height):
                    for j in range(grid.width):
                        x, y = grid.x[0] + (j + 0.5) * grid.cell, grid.y[0] + (i + 0.5) * grid.cell
                        if (i, j) == at if centres else inside(x, y, box):
                            out[b, i, j] = m
    return out


def in_polygon(x: int, y: int, corners: list[tuple[int, int]]) -> bool:
    """scikit-image 0.21's rule as the specification says it."""
    right = left = 0
    for (x0, y0), (x1, y1) in zip(corners, corners[-1:] + corners[:-1], strict=True):
        x0, y0, x1, y1 = x0 - x, y0 - y, x1 - x, y1 - y
        if x0 == 0 and y0 == 0:
            return True
        if (y0 > 0) != (y1 > 0):
            right += (x0 * y1 - x1 * y0) / (y1 - y0) > 0
        if (y0 < 0) != (y1 < 0):
            left += (x0 * y1 - x1 * y0) / (y1 - y0) < 0
    return right % 2 == 1 or left % 2 == 1


def naive_released(found: Boxes3D, grid: BEVGrid) -> dict[tuple[int, int, int], int]:
    out = {}
    for b in range(len(found.values)):
        for m in rows_in_order(found, b):
            x, y, _, length, width, _, yaw = found.values[b, m, :7].tolist()
            corners = []
            for s, t in ((-1, -1), (-1, 1), (1, 1), (1, -1)):
                p, q = s * length / 4, t * width / 4
                px, py = x + p * math.cos(yaw) - q * math.sin(yaw), y + p * math.sin(yaw) + q * math.cos(yaw)
                corners.append((int((px - grid.x[0]) / grid.cell), int((py - grid.y[0]) / grid.cell)))
            us, vs = zip(*corners, strict=True)
            for i in range(max(0, min(vs)), max(vs) + 1):
                for j in range(max(0, min(us)), max(us) + 1):
                    if in_polygon(j, i, corners):
                        out[b, min(i, grid.height - 1), min(j, grid.width - 1)] = m
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(0, 5), st.integers(0, 4)), st.sampled_from(GRIDS), st.booleans())
def test_maps_match_loops(seed, counts, grid, released):
    found = boxes(seed, counts)
    maps = label_maps(found, grid, released)
    expected = (naive_released if released else naive_maps)(found, grid)
    painted = {tuple(cell) for cell in maps.mask.nonzero().tolist()}
    assert painted == set(expected)
    for (b, i, j), m in expected.items():
        assert torch.equal(maps.box[b, i, j], found.values[b, m].nan_to_num())
        assert maps.label[b, i, j].argmax() == found.labels[b, m] and maps.label[b, i, j].sum() == 1
    assert not maps.box[~maps.mask].any() and not maps.label[~maps.mask].any()
    assert maps.box.shape == (2, *grid.shape, 9) and maps.label.shape == (2, *grid.shape, 10)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_every_centre_in_the_grid_is_painted(seed):
    """Also those of boxes smaller than a cell; the released rule leaves some out."""
    grid = GRIDS[0]
    found = boxes(seed, (12,))
    found.values[..., 3:5] = found.values[..., 3:5] / 8 + 0.05
    column, row, within = grid.locate(found.values[..., :2])
    mask = label_maps(found, grid).mask
    assert mask[0, row[0][within[0]], column[0][within[0]]].all()


def test_a_centre_goes_before_another_boxs_footprint():
    values = torch.tensor([[[0.1, 0.1, 0, 1, 1, 1, 0, 0, 0], [1.0, 0.1, 0, 8, 4, 1, 0, 0, 0]]])
    found = Boxes3D.make(values, torch.tensor([[0, 8]]))
    maps = label_maps(found, GRIDS[0])
    (column, row, _) = GRIDS[0].locate(values[0, :, :2])
    assert maps.label[0, row, column].argmax(-1).tolist() == [0, 8]
    assert (maps.label[0].argmax(-1)[maps.mask[0]] == 8).float().mean() > 0.9


def test_maps_turn_with_the_boxes():
    grid, found = BEVGrid.square(12.0, 0.6), boxes(3, (6, 4), 11.0)
    found.values = found.values.double()
    turned = Boxes3D.make(transform_boxes(yaw_pose(math.pi / 2), found.values), found.labels, found.valid)
    before, after = (label_maps(b, grid) for b in (found, turned))
    assert before.mask.sum() > 40
    assert torch.equal(after.mask, before.mask.rot90(1, (2, 1)))
    assert torch.equal(after.label, before.label.rot90(1, (2, 1)))


def test_nothing_to_paint():
    for counts in ((0, 0), (0, 3)):
        for released in (False, True):
            maps = label_maps(boxes(0, counts), GRIDS[0], released)
            assert not maps.mask[0].any() and not maps.box[0].any() and maps.box.isfinite().all()


class Annotated:
    """What an encoder reads of a batch."""

    def __init__(self, found: Boxes3D) -> None:
        self.boxes = found


def test_features_are_those_of_the_detectors_stages():
    grid = BEVGrid((-6.0, 3.0), (-9.0, 9.0), 0.9)  # 10 columns, 20 rows: the deepest stage has 3 and 5
    encoder = LabelEncoder(grid, (6, 8, 12))
    found = encoder(Annotated(boxes(0, (3, 0))))
    assert [tuple(s.shape) for s in found.stages] == [(2, 6, 20, 10), (2, 8, 10, 5), (2, 12, 5, 3)]
    assert encoder.channels.stages == (6, 8, 12) and encoder.channels.bev == found.bev.shape[1] == 12
    assert all((s >= 0).all() and s.isfinite().all() for s in found.stages)
    with pytest.raises(RuntimeError, match="size mismatch"):
        LabelEncoder(GRIDS[0], (6, 8, 12)).load_state_dict(encoder.state_dict())


def test_parameters_at_the_papers_size():
    with torch.device("meta"):
        encoder = LabelEncoder(BEVGrid.square(51.2, 0.8), (128, 256))
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == 8.63
    assert encoder.norm_parameters == 2 * (128 * 128 * 128 + 256 * 64 * 64)


def test_float32_under_autocast():
    encoder, batch = LabelEncoder(GRIDS[1], (4, 6)).eval(), Annotated(boxes(1, (3, 2)))
    plain = encoder(batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(batch)
    assert all(torch.equal(a, b) for a, b in zip(plain.stages, mixed.stages, strict=True))
