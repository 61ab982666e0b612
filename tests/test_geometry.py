"""Frames, boxes and the BEV grid: properties, and agreement with nuscenes-devkit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nuscenes.eval.common.utils import quaternion_yaw
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import points_in_box, transform_matrix, view_points
from pyquaternion import Quaternion

from kdlab.geometry import (
    BEVGrid,
    box_corners,
    footprint,
    points_in_boxes,
    pose,
    project,
    rotate,
    transform,
    transform_boxes,
    unproject,
    wrap_angle,
    yaw_pose,
)

settings.register_profile("kdlab-geometry", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("kdlab-geometry")

angles = st.floats(-10, 10)
metres = st.floats(-80, 80)
sizes = st.floats(0.2, 15)
points3 = st.tuples(metres, metres, st.floats(-4, 6))
quaternions = st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: sum(x * x for x in q) > 0.01)
speeds = st.floats(-20, 20)
boxes9 = st.tuples(metres, metres, st.floats(-4, 6), sizes, sizes, sizes, angles, speeds, speeds)


def devkit_box(box: tuple[float, ...]) -> Box:
    x, y, z, length, width, height, yaw, vx, vy = box
    turn = Quaternion(axis=(0, 0, 1), angle=yaw)
    return Box([x, y, z], [width, length, height], turn, velocity=(vx, vy, 0.0))


def assert_same_angle(a: float, b: float, atol: float = 1e-4) -> None:
    assert abs(math.remainder(a - b, 2 * math.pi)) < atol


# BEV grid


def test_grid_shape_is_rows_y_columns_x() -> None:
    grid = BEVGrid((-10, 20), (-4, 4), 0.5)
    assert (grid.width, grid.height, grid.shape) == (60, 16, (16, 60))
    assert BEVGrid.square(51.2, 0.8) == BEVGrid((-51.2, 51.2), (-51.2, 51.2), 0.8)
    assert BEVGrid.square(51.2, 0.8).strided(4).shape == (32, 32)


@pytest.mark.parametrize(
    ("x", "cell", "message"),
    [((-1, 1), 0.0, "must be positive"), ((-1, 1), 0.3, "x range"), ((1, -1), 0.5, "x range"), ((0, 0), 1, "x range")],
)
def test_grid_rejects(x: tuple[float, float], cell: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BEVGrid(x, (-1, 1), cell)


@given(st.lists(st.tuples(metres, metres), min_size=1, max_size=8))
def test_cells_and_metres_invert_each_other(xy: list[tuple[float, float]]) -> None:
    grid, where = BEVGrid((-60, 40), (-30, 50), 0.4), torch.tensor(xy, dtype=torch.float64)
    torch.testing.assert_close(grid.to_metres(grid.to_cells(where)), where, atol=1e-9, rtol=0)


def test_centres_lie_in_their_cells() -> None:
    grid = BEVGrid((-3, 5), (-2, 4), 0.5)
    column, row, inside = grid.locate(grid.centres())
    assert inside.all() and grid.centres().shape == (*grid.shape, 2)
    assert torch.equal(column, torch.arange(16).expand(12, 16))
    assert torch.equal(row, torch.arange(12)[:, None].expand(12, 16))
    torch.testing.assert_close(grid.centres()[0, 0], torch.tensor((-2.75, -1.75)))


def test_lower_border_is_inside_upper_is_not() -> None:
    grid = BEVGrid((-2, 2), (-1, 1), 1.0)
    xy = torch.tensor(((-2.0, -1.0), (2.0, 0.0), (0.0, 1.0), (-2.001, 0.0), (1.999, 0.999)))
    assert grid.locate(xy)[2].tolist() == [True, False, False, False, True]


def test_sampling_reads_metres() -> None:
    grid = BEVGrid((-8, 8), (-4, 4), 0.5)
    maps = grid.centres().permute(2, 0, 1)[None]  # Channels hold x and y.
    xy = torch.tensor([[[0.3, -1.2], [-7.0, 3.7], [7.7, 0.0]]])
    torch.testing.assert_close(grid.sample(maps, xy), xy, atol=1e-5, rtol=0)
    assert grid.sample(maps, torch.tensor([[[9.0, 0.0]]])).abs().max() == 0
    assert grid.sample(maps, torch.zeros(1, 5, 9, 2)).shape == (1, 5, 9, 2)


def test_normalised_borders() -> None:
    grid = BEVGrid((-8, 4), (-4, 2), 0.5)
    corners = torch.tensor(((-8.0, -4.0), (4.0, 2.0)))
    torch.testing.assert_close(grid.normalise(corners), torch.tensor(((-1.0, -1.0), (1.0, 1.0))))


# Poses


@given(quaternions, points3)
def test_pose_matches_devkit(rotation: tuple[float, ...], translation: tuple[float, ...]) -> None:
    expected = transform_matrix(translation, Quaternion(rotation).normalised)
    np.testing.assert_allclose(pose(rotation, translation), expected, atol=1e-9)


@pytest.mark.parametrize("rotation", [(0, 0, 0, 0), (math.nan, 0, 0, 1)])
def test_pose_rejects(rotation: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="norm"):
        pose(rotation, (0, 0, 0))


@given(angles, points3)
def test_yaw_pose_turns_counter_clockwise(yaw: float, translation: tuple[float, ...]) -> None:
    moved = transform(yaw_pose(yaw, translation), torch.tensor([[1.0, 0, 0]], dtype=torch.float64))[0]
    expected = (translation[0] + math.cos(yaw), translation[1] + math.sin(yaw), translation[2])
    torch.testing.assert_close(moved, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    rotation = Quaternion(matrix=yaw_pose(yaw)[:3, :3].numpy())
    assert_same_angle(quaternion_yaw(rotation), yaw, 1e-6)


@given(quaternions, points3, st.lists(points3, min_size=1, max_size=5))
def test_transform_round_trip(
    rotation: tuple[float, ...], translation: tuple[float, ...], points: list[tuple[float, ...]]
) -> None:
    a_from_b, cloud = pose(rotation, translation), torch.tensor(points, dtype=torch.float64)
    back = transform(torch.linalg.inv(a_from_b), transform(a_from_b, cloud))
    torch.testing.assert_close(back, cloud, atol=1e-8, rtol=0)


def test_transform_broadcasts_over_leading_sizes() -> None:
    poses = torch.stack([yaw_pose(a) for a in (0.0, 1.0, 2.0)]).view(3, 1, 4, 4)
    cloud = torch.rand(3, 2, 7, 3, dtype=torch.float64)
    moved = transform(poses, cloud)
    torch.testing.assert_close(moved[2, 1], transform(poses[2, 0], cloud[2, 1]))


@given(angles)
def test_wrap_angle(angle: float) -> None:
    wrapped = float(wrap_angle(torch.tensor(angle, dtype=torch.float64)))
    assert -math.pi <= wrapped < math.pi
    assert_same_angle(wrapped, angle, 1e-9)


def test_rotate() -> None:
    turned = rotate(torch.tensor((1.0, 0.0)), torch.tensor(math.pi / 2))
    torch.testing.assert_close(turned, torch.tensor((0.0, 1.0)), atol=1e-6, rtol=0)


# Boxes


@given(boxes9)
def test_corners_match_devkit(box: tuple[float, ...]) -> None:
    mine = box_corners(torch.tensor(box, dtype=torch.float64)).numpy()
    theirs = devkit_box(box).corners().T
    order = lambda c: c[np.lexsort(c.round(4).T)]  # noqa: E731
    np.testing.assert_allclose(order(mine), order(theirs), atol=1e-6)
    assert (mine[:4, 2] < mine[4:, 2]).all()
    np.testing.assert_array_equal(mine[:4, :2], mine[4:, :2])


def test_footprint_order_and_units() -> None:
    box = torch.tensor((10.0, 5, 0, 4, 2, 1, math.pi / 2, 0, 0))  # Heading +y: left is -x.
    expected = torch.tensor(((11.0, 3.0), (9.0, 3.0), (9.0, 7.0), (11.0, 7.0)))
    torch.testing.assert_close(footprint(box), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(footprint(box, [(0.5, 0.0)]), torch.tensor([[10.0, 7.0]]), atol=1e-5, rtol=0)


@given(boxes9, angles, points3)
def test_moving_boxes_matches_devkit(box: tuple[float, ...], yaw: float, shift: tuple[float, ...]) -> None:
    moved = transform_boxes(yaw_pose(yaw, shift), torch.tensor([box], dtype=torch.float64))[0]
    expected = devkit_box(box)
    expected.rotate(Quaternion(axis=(0, 0, 1), angle=yaw))
    expected.translate(np.array(shift))
    np.testing.assert_allclose(moved[:3], expected.center, atol=1e-6)
    np.testing.assert_allclose(moved[3:6], box[3:6], atol=1e-6)
    assert_same_angle(float(moved[6]), quaternion_yaw(expected.orientation))
    np.testing.assert_allclose(moved[7:], expected.velocity[:2], atol=1e-6)


@given(boxes9, angles, st.floats(0.5, 2), st.booleans(), st.booleans())
def test_corners_follow_a_similarity(
    box: tuple[float, ...], yaw: float, scale: float, flip_x: bool, flip_y: bool
) -> None:
    signs = torch.tensor((-scale if flip_x else scale, -scale if flip_y else scale, scale, 1.0), dtype=torch.float64)
    matrix = torch.diag(signs) @ yaw_pose(yaw)
    values = torch.tensor(box, dtype=torch.float64)
    moved = box_corners(transform_boxes(matrix, values[None])[0])
    expected = transform(matrix, box_corners(values))
    assert torch.cdist(moved, expected).min(1).values.max() < 1e-6  # A flip swaps left and right corners.


def test_unknown_velocity_stays_unknown() -> None:
    box = torch.tensor([[1.0, 2, 0, 4, 2, 1, 0.3, math.nan, math.nan]])
    moved = transform_boxes(yaw_pose(1.0).float(), box)
    assert moved[0, 7:].isnan().all() and moved[0, :7].isfinite().all()


def test_no_boxes() -> None:
    assert transform_boxes(torch.eye(4), torch.zeros(0, 9)).shape == (0, 9)
    assert box_corners(torch.zeros(0, 9)).shape == (0, 8, 3)
    assert points_in_boxes(torch.zeros(5, 3), torch.zeros(0, 9)).shape == (5, 0)
    assert points_in_boxes(torch.zeros(0, 5), torch.zeros(2, 9)).shape == (0, 2)


@given(boxes9, st.integers(0, 1000))
def test_points_in_boxes_match_devkit(box: tuple[float, ...], seed: int) -> None:
    spread = np.array(box[3:6]).max()
    cloud = np.random.default_rng(seed).normal(size=(60, 3)) * spread / 2 + box[:3]
    mine = points_in_boxes(torch.from_numpy(cloud), torch.tensor([box], dtype=torch.float64))[:, 0]
    np.testing.assert_array_equal(mine, points_in_box(devkit_box(box), cloud.T))


# Projection


@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(-5, 5), st.floats(1, 60)), min_size=1, max_size=6))
def test_projection_matches_devkit_and_inverts(points: list[tuple[float, ...]]) -> None:
    camera = torch.tensor(((1266.4, 0, 816.3), (0, 1266.4, 491.5), (0, 0, 1)), dtype=torch.float64)
    cloud = torch.tensor(points, dtype=torch.float64)
    pixels, depth = project(camera, cloud)
    np.testing.assert_allclose(pixels, view_points(cloud.numpy().T, camera.numpy(), normalize=True)[:2].T, atol=1e-6)
    torch.testing.assert_close(depth, cloud[:, 2])
    torch.testing.assert_close(unproject(camera, pixels, depth), cloud, atol=1e-8, rtol=0)


def test_projection_behind_the_camera_is_finite() -> None:
    pixels, depth = project(torch.eye(3), torch.tensor(((1.0, 1.0, -2.0), (0.0, 0.0, 0.0))))
    assert pixels.isfinite().all() and depth.tolist() == [-2.0, 0.0]
