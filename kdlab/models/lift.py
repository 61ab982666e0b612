"""From pixels with depth distributions to BEV cells, and from a past ego frame to the key frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlab.geometry import BEVGrid, transform, unproject
from kdlab.models.layers import full_precision


@dataclass(frozen=True)
class Frustum:
    """The points that are lifted: pixels of the feature map times depth bins.

    Attributes:
        size: rows h and columns w of the feature map.
        stride: pixels of the input per cell of the feature map.
        depth: lower bound, upper bound and width of the bins, metres.
    """

    size: tuple[int, int]
    stride: int
    depth: tuple[float, float, float]

    @property
    def bins(self) -> int:
        """D."""
        return depth_bins(self.depth)

    def points(self, image_from_camera: Tensor, frame_from_camera: Tensor) -> Tensor:
        """Points in the ego frame [..., h * w, D, 3], metres, of cameras [..., 3, 3] and [..., 4, 4].

        A feature cell stands for the centre of its block of pixels, a bin for its middle.
        """
        device = image_from_camera.device
        v, u = (((torch.arange(n, device=device) + 0.5) * self.stride) for n in self.size)
        pixels = torch.stack(torch.meshgrid(v, u, indexing="ij")[::-1], -1).flatten(0, 1)  # [h * w, 2]
        rays = unproject(image_from_camera, pixels, pixels.new_ones(len(pixels)))
        rays = rays @ frame_from_camera[..., :3, :3].mT  # turned once per ray, not once per point
        middles = (torch.arange(self.bins, device=device) + 0.5) * self.depth[2] + self.depth[0]
        return rays.unsqueeze(-2) * middles[:, None] + frame_from_camera[..., None, None, :3, 3]


def depth_bins(depth: tuple[float, float, float]) -> int:
    """Number of depth bins of (lower, upper, width).

    Raises:
        ValueError: the range does not hold a whole, positive number of bins, or starts at or behind the camera.
    """
    low, high, width = depth
    bins = (high - low) / width
    if low <= 0 or round(bins) < 1 or abs(bins - round(bins)) > 1e-3:
        raise ValueError(f"CameraConfig.depth: {depth} must be (lower > 0, upper, width) of whole bins, got {bins:.3f}")
    return round(bins)


@dataclass(frozen=True)
class LiftIndex:
    """Frustum points sorted by BEV cell: bags for `torch.nn.functional.embedding_bag`.

    Attributes:
        cell: int64 [K], flat cell b * H * W + row * W + column, rising.
        source: int64 [K], flat index of each point into depths [B, N, h, w, D].
        pixel: int64 [K], flat index of each point into pixels [B, N, h, w].
        offsets: int64 [B * H * W], where each cell's bag starts.
    """

    cell: Tensor
    source: Tensor
    pixel: Tensor
    offsets: Tensor


@torch.no_grad()
def lift_index(points: Tensor, grid: BEVGrid, z: tuple[float, float]) -> LiftIndex:
    """Sort frustum points [B, N, h * w, D, 3] by cell; those outside the grid or the z range are left out."""
    cells = points.shape[0] * grid.height * grid.width
    column, row, inside = grid.locate(points[..., :2])
    inside &= (points[..., 2] >= z[0]) & (points[..., 2] < z[1])
    batch = torch.arange(points.shape[0], device=points.device).view(-1, 1, 1, 1)
    flat = ((batch * grid.height + row) * grid.width + column).flatten()
    source = inside.flatten().nonzero().squeeze(1)
    bits = max(1, int(points[..., 0].numel()).bit_length())
    packed = _sorted((flat.index_select(0, source) << bits) | source)  # one sort of unique keys: stable and quick
    cell, source = packed >> bits, packed & ((1 << bits) - 1)
    counts = torch.bincount(cell, minlength=cells)
    return LiftIndex(cell, source, source.div(points.shape[3], rounding_mode="floor"), counts.cumsum(0) - counts)


def _sorted(keys: Tensor) -> Tensor:
    if keys.is_cuda:
        return keys.sort().values
    values = keys.numpy()
    values.sort()  # numpy's vectorised sort: several times faster than torch.sort on a CPU
    return torch.from_numpy(values)


def splat(context: Tensor, depth: Tensor, index: LiftIndex, batch: int, grid: BEVGrid) -> Tensor:
    """Sum depth-weighted pixel features into BEV cells, without ever holding the lifted features.

    "Lift, Splat, Shoot" (ECCV 2020) by the gather-and-sum of "BEVPoolv2" (arXiv 2211.17111), a stock embedding bag.

    Args:
        context: [B * N, C, h, w] features.
        depth: [B * N, D, h, w] weights.
        index: of this batch's geometry.
        batch: B.
        grid: the BEV grid.

    Returns:
        float32 [B, C, H, W].
    """
    with full_precision(context):
        table = context.float().permute(0, 2, 3, 1).flatten(0, 2)
        weights = depth.float().permute(0, 2, 3, 1).flatten().index_select(0, index.source)
        bags = F.embedding_bag(index.pixel, table, index.offsets, mode="sum", per_sample_weights=weights)
    return bags.view(batch, grid.height, grid.width, -1).permute(0, 3, 1, 2)


class LiftCache:
    """Keeps the index of the last geometry: a rig that stands still is sorted once."""

    def __init__(self, frustum: Frustum, grid: BEVGrid, z: tuple[float, float]) -> None:
        self.frustum, self.grid, self.z = frustum, grid, z
        self._key: tuple[Tensor, Tensor] | None = None
        self._index: LiftIndex | None = None

    @torch.no_grad()
    def index(self, image_from_camera: Tensor, frame_from_camera: Tensor) -> LiftIndex:
        """Index of cameras [B, N, 3, 3] and [B, N, 4, 4]; a new one only where these differ from the last call's."""
        if self._index is not None and self._key is not None:
            pairs = zip(self._key, (image_from_camera, frame_from_camera), strict=True)
            if all(a.device == b.device and a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
                return self._index
        with full_precision(image_from_camera):
            points = self.frustum.points(image_from_camera.float(), frame_from_camera.float())
            index = lift_index(points, self.grid, self.z)
        self._key, self._index = (image_from_camera.clone(), frame_from_camera.clone()), index
        return index


def align(bev: Tensor, key_from_frame: Tensor, grid: BEVGrid) -> Tensor:
    """Warp BEV maps of past ego frames to the key frame, bilinearly, with zeros where they did not reach.

    Only the motion in the ground plane counts. The identity gives the maps back unchanged, bit for bit.

    Args:
        bev: [B, C, H, W] in the frame's own ego frame.
        key_from_frame: [B, 4, 4].
        grid: of the maps.

    Returns:
        [B, C, H, W] in the key ego frame.
    """
    with full_precision(bev):
        matrix = key_from_frame.double()
        ground = F.pad(grid.centres(bev.device).double().flatten(0, 1), (0, 1))  # [H * W, 3] at z = 0
        source = transform(torch.linalg.inv(matrix), ground)[..., :2]
        warped = grid.sample(bev.float(), source.float()).mT.reshape(bev.shape).to(bev.dtype)
        still = (matrix == torch.eye(4, dtype=matrix.dtype, device=matrix.device)).all(-1).all(-1)
        return torch.where(still.view(-1, 1, 1, 1), bev, warped)
