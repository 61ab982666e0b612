"""Frames, poses, boxes and the BEV grid: the one place that turns metres into cells.

Conventions, used everywhere in kdlab:

* Frame: ego at the key LiDAR sweep's timestamp; x forward, y left, z up; metres, radians, seconds.
* A pose is a 4x4 matrix named ``a_from_b``: it takes points of frame b to frame a, so in a chain neighbouring names
  match.
* Box: (x, y, z, l, w, h, yaw, vx, vy); geometric centre; l along the heading; yaw counter-clockwise from +x.
* BEV map: [B, C, H, W] with row H = y and column W = x; cell i covers [min + i s, min + (i + 1) s), its centre is i
  + 1/2.
* Pixel (u, v): u right, v down, the centre of the first pixel at (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class BEVGrid:
    """A rectangular grid of square cells in the ego's ground plane.

    Attributes:
        x: lower and upper bound along x (columns), metres.
        y: lower and upper bound along y (rows), metres.
        cell: side of a cell, metres.

    Raises:
        ValueError: the bounds do not span a whole, positive number of cells.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    cell: float

    def __post_init__(self) -> None:
        if not self.cell > 0:
            raise ValueError(f"BEVGrid: cell must be positive, got {self.cell}")
        for name, (low, high) in (("x", self.x), ("y", self.y)):
            cells = (high - low) / self.cell
            if round(cells) < 1 or abs(cells - round(cells)) > 1e-3:
                raise ValueError(
                    f"BEVGrid: {name} range [{low}, {high}] holds {cells:.4f} cells of {self.cell} m; need whole"
                )

    @classmethod
    def square(cls, reach: float, cell: float) -> BEVGrid:
        """A grid over [-reach, reach) in x and y."""
        return cls((-reach, reach), (-reach, reach), cell)

    @property
    def width(self) -> int:
        """Number of columns W (along x)."""
        return round((self.x[1] - self.x[0]) / self.cell)

    @property
    def height(self) -> int:
        """Number of rows H (along y)."""
        return round((self.y[1] - self.y[0]) / self.cell)

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width

    def strided(self, stride: int) -> BEVGrid:
        """The grid of the same area whose cells are ``stride`` times as wide."""
        return BEVGrid(self.x, self.y, self.cell * stride)

    def to_cells(self, xy: Tensor) -> Tensor:
        """Metres [..., 2] to continuous cell coordinates (column u, row v) [..., 2]."""
        return (xy - xy.new_tensor((self.x[0], self.y[0]))) / self.cell

    def to_metres(self, uv: Tensor) -> Tensor:
        """Continuous cell coordinates (column u, row v) [..., 2] to metres [..., 2]."""
        return uv * self.cell + uv.new_tensor((self.x[0], self.y[0]))

    def locate(self, xy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Column, row (both int64 [...], by floor) and whether inside (bool [...]) of points in metres [..., 2]."""
        cells = self.to_cells(xy).floor().long()
        column, row = cells[..., 0], cells[..., 1]
        inside = (column >= 0) & (column < self.width) & (row >= 0) & (row < self.height)
        return column, row, inside

    def centres(self, device: torch.device | str | None = None) -> Tensor:
        """Cell centres in metres, float32 [H, W, 2] as (x, y)."""
        rows = torch.arange(self.height, device=device) + 0.5
        columns = torch.arange(self.width, device=device) + 0.5
        v, u = torch.meshgrid(rows, columns, indexing="ij")
        return self.to_metres(torch.stack((u, v), -1))

    def normalise(self, xy: Tensor) -> Tensor:
        """Metres [..., 2] to the (x, y) in [-1, 1] that ``grid_sample(align_corners=False)`` takes."""
        return self.to_cells(xy) / xy.new_tensor((self.width, self.height)) * 2 - 1

    def sample(self, maps: Tensor, xy: Tensor) -> Tensor:
        """Read maps [B, C, H, W] bilinearly at points in metres [B, ..., 2]; zeros outside. Returns [B, ..., C]."""
        where = self.normalise(xy).flatten(1, -2).unsqueeze(1)  # [B, 1, K, 2]
        read = F.grid_sample(maps, where.to(maps.dtype), align_corners=False)[:, :, 0]  # [B, C, K]
        return read.transpose(1, 2).reshape(*xy.shape[:-1], maps.shape[1])


def pose(rotation: Sequence[float], translation: Sequence[float]) -> Tensor:
    """Pose of a unit quaternion (w, x, y, z) and a translation in metres, float64 [4, 4].

    Raises:
        ValueError: the quaternion's norm is zero or not finite.
    """
    w, x, y, z = (float(v) for v in rotation)
    norm = math.sqrt(w * w + x * x + y * y + z * z)
    if not (math.isfinite(norm) and norm > 0):
        raise ValueError(f"pose: quaternion {tuple(rotation)} has norm {norm}")
    w, x, y, z = w / norm, x / norm, y / norm, z / norm
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )
    matrix[:3, 3] = torch.tensor([float(v) for v in translation], dtype=torch.float64)
    return matrix


def yaw_pose(yaw: float, translation: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    """Pose of a turn by ``yaw`` radians about +z and a translation, float64 [4, 4]."""
    return pose((math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)), translation)


def transform(a_from_b: Tensor, points: Tensor) -> Tensor:
    """Take points [..., P, 3] from frame b to frame a by a pose [..., 4, 4]; leading sizes broadcast."""
    rotation, translation = a_from_b[..., :3, :3], a_from_b[..., :3, 3]
    return points @ rotation.mT + translation.unsqueeze(-2)


def wrap_angle(angle: Tensor) -> Tensor:
    """Angles in radians, brought into [-pi, pi)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def rotate(xy: Tensor, yaw: Tensor) -> Tensor:
    """Turn vectors [..., 2] counter-clockwise by yaw [...] radians."""
    cos, sin = yaw.cos(), yaw.sin()
    x, y = xy[..., 0], xy[..., 1]
    return torch.stack((x * cos - y * sin, x * sin + y * cos), -1)


_UNIT_CORNERS = ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5))  # rear right, rear left, front left, front right


def footprint(boxes: Tensor, points: Sequence[tuple[float, float]] = _UNIT_CORNERS) -> Tensor:
    """Points of boxes [..., 9] given in units of (l, w) in the box frame, in metres [..., K, 2].

    By default the four corners: rear right, rear left, front left, front right (counter-clockwise order reversed).
    """
    unit = boxes.new_tensor(points)  # [K, 2]
    local = unit * boxes[..., None, 3:5]
    return rotate(local, boxes[..., None, 6]) + boxes[..., None, :2]


def box_corners(boxes: Tensor) -> Tensor:
    """Corners of boxes [..., 9] in metres [..., 8, 3]: the four of the footprint at the bottom, then at the top."""
    flat = footprint(boxes)
    low = (boxes[..., 2] - boxes[..., 5] / 2)[..., None, None].expand(*flat.shape[:-1], 1)
    high = (boxes[..., 2] + boxes[..., 5] / 2)[..., None, None].expand(*flat.shape[:-1], 1)
    return torch.cat((torch.cat((flat, low), -1), torch.cat((flat, high), -1)), -2)


def transform_boxes(a_from_b: Tensor, boxes: Tensor) -> Tensor:
    """Take boxes [..., M, 9] by a similarity [..., 4, 4] that keeps z up: centre, size, yaw and velocity follow."""
    linear = a_from_b[..., :3, :3]
    scale = torch.linalg.det(linear).abs().pow(1 / 3)[..., None, None]
    flat = linear[..., :2, :2].mT
    heading = torch.stack((boxes[..., 6].cos(), boxes[..., 6].sin()), -1) @ flat
    yaw = torch.atan2(heading[..., 1], heading[..., 0])[..., None]
    centre = transform(a_from_b, boxes[..., :3])
    return torch.cat((centre, boxes[..., 3:6] * scale, yaw, boxes[..., 7:9] @ flat), -1)


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Which points [P, 3+] lie in which boxes [M, 9] (borders included), bool [P, M]."""
    offset = points[:, None, :3] - boxes[None, :, :3]
    local = rotate(offset[..., :2], -boxes[None, :, 6])
    flat = (local.abs() <= boxes[None, :, 3:5] / 2).all(-1)
    return flat & (offset[..., 2].abs() <= boxes[None, :, 5] / 2)


def project(image_from_camera: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Project camera-frame points [..., P, 3] by a matrix [..., 3, 3]: pixels (u, v) [..., P, 2] and depth [..., P].

    Depth is metres along the optical axis; pixels of points at or behind the camera plane mean nothing.
    """
    image = points @ image_from_camera.mT
    depth = points[..., 2]
    return image[..., :2] / depth.clamp(min=1e-5).unsqueeze(-1), depth


def unproject(image_from_camera: Tensor, pixels: Tensor, depth: Tensor) -> Tensor:
    """Camera-frame points [..., P, 3] of pixels (u, v) [..., P, 2] at depth [..., P] metres along the optical axis."""
    rays: Tensor = F.pad(pixels, (0, 1), value=1.0) @ torch.linalg.inv_ex(image_from_camera).inverse.mT
    return rays * depth.unsqueeze(-1)
