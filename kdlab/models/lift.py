"""From pixels with depth distributions to BEV cells, and from a past ego frame to the key frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdlab.geometry import BEVGrid, transform, unproject
from kdlab.models.layers import full_precision
from kdlab.models.voxels import sort_by_cell


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
    """The K frustum points inside the grid, sorted by BEV cell for the sum and by pixel for its gradient.

    Attributes:
        cell: int64 [K], flat cell b * H * W + row * W + column, rising.
        source: int64 [K], flat index of each point into depths [B, N, h, w, D].
        pixel: int64 [K], flat index of each point into pixels [B, N, h, w].
        offsets: int64 [B * H * W], where each cell's points start.
        seen: int64 [K], ``source`` in rising order: pixel after pixel.
        seen_cell: int64 [K], the cells of ``seen``.
        seen_offsets: int64 [B * N * h * w], where each pixel's points start in ``seen``.
    """

    cell: Tensor
    source: Tensor
    pixel: Tensor
    offsets: Tensor
    seen: Tensor
    seen_cell: Tensor
    seen_offsets: Tensor


@torch.no_grad()
def lift_index(points: Tensor, grid: BEVGrid, z: tuple[float, float]) -> LiftIndex:
    """Sort frustum points [B, N, h * w, D, 3] by cell; those outside the grid or the z range are left out."""
    bins = points.shape[3]
    column, row, inside = grid.locate(points[..., :2])
    inside &= (points[..., 2] >= z[0]) & (points[..., 2] < z[1])
    batch = torch.arange(points.shape[0], device=points.device).view(-1, 1, 1, 1)
    flat = ((batch * grid.height + row) * grid.width + column).flatten()
    seen = inside.flatten().nonzero().squeeze(1)
    seen_cell = flat.index_select(0, seen)
    cell, source = sort_by_cell(seen_cell, seen, len(flat))
    offsets = _starts(cell, points.shape[0] * grid.height * grid.width)
    seen_offsets = _starts(seen.div(bins, rounding_mode="floor"), len(flat) // bins)
    pixel = source.div(bins, rounding_mode="floor")
    return LiftIndex(cell, source, pixel, offsets, seen, seen_cell, seen_offsets)


def _starts(bag: Tensor, bags: int) -> Tensor:
    """Where each bag starts among entries sorted by bag."""
    counts = bag.new_zeros(bags).scatter_add_(0, bag, torch.ones_like(bag))  # bincount would wait for a GPU
    return counts.cumsum(0) - counts


class _Splat(torch.autograd.Function):
    """Sum over cells of features [pixels, C] times depth weights [points]; the gradient is the sum over pixels.

    Autograd's own gradient of an embedding bag sorts the pixels at every step and reads columns of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, depth: Tensor, index: LiftIndex) -> Tensor:
        ctx.save_for_backward(table, depth)
        ctx.index = index
        weights = depth.index_select(0, index.source)
        return F.embedding_bag(index.pixel, table, index.offsets, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        table, depth = ctx.saved_tensors
        index: LiftIndex = ctx.index
        rows = gradient.contiguous()
        weights = depth.index_select(0, index.seen)
        to_table = F.embedding_bag(index.seen_cell, rows, index.seen_offsets, mode="sum", per_sample_weights=weights)
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            rows, table, index.pixel, index.offsets, index.cell, 0
        )  # of each point's feature and its cell's gradient
        return to_table, torch.zeros_like(depth).index_copy_(0, index.source, products), None


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
        bags: Tensor = _Splat.apply(table, depth.float().permute(0, 2, 3, 1).flatten(), index)
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
        source = transform(torch.linalg.inv_ex(matrix).inverse, ground)[..., :2]  # inv would wait for a GPU
        warped = grid.sample(bev.float(), source.float()).mT.reshape(bev.shape).to(bev.dtype)
        still = (matrix == torch.eye(4, dtype=matrix.dtype, device=matrix.device)).all(-1).all(-1)
        return torch.where(still.view(-1, 1, 1, 1), bev, warped)
