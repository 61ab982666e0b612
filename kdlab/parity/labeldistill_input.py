"""LabelDistill's released input pipeline: depth targets, augmentation, frustum.

kdlab takes the centres of pixels' blocks and the middle of depth bins, and keeps the nearest point of a pixel; what
differs from the released pipeline stands here alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kdlab.data.augment import ImageTransform
from kdlab.geometry import transform, transform_boxes, unproject, yaw_pose
from kdlab.models.camera import depth_loss
from kdlab.parity.labeldistill_case import Case

WEIGHT = 3.0
"""Of the depth loss."""


class Depth(Case):
    """Depth targets and loss."""

    @property
    def bounds(self) -> tuple[float, float, float]:
        """Lower and upper bound and width of the bins, metres."""
        low, high, width = (float(v) for v in self.given("dbound"))
        return low, high, width

    def nearest(self) -> Tensor:
        """Nearest depth of each block of pixels [B, N, h, w]; 0 where there is none."""
        depth, (height, width) = self.given("depth").float(), self.given("logits").shape[-2:]
        rows, columns = depth.shape[-2] // height, depth.shape[-1] // width
        blocks = depth.unflatten(-1, (width, columns)).unflatten(-3, (height, rows)).movedim(-3, -2).flatten(-2)
        least = torch.where(blocks == 0, torch.inf, blocks).amin(-1)
        return least.where(least.isfinite(), 0)

    def bins(self) -> Tensor:
        """Bin of each block [B * N, h, w], -1 where it has none."""
        low, high, width = self.bounds
        depth = self.nearest().flatten(0, 1)
        index = ((depth - (low - width)) / width).floor() - 1
        return torch.where((index >= 0) & (index < round((high - low) / width)), index, -1)

    def _loss(self, probability: Tensor) -> Tensor:
        nearest = self.nearest()
        return WEIGHT * depth_loss(probability.unflatten(0, nearest.shape[:2]), nearest, self.bounds)

    def loss(self) -> Tensor:
        """The weighted loss."""
        return self._loss(self.given("logits").float().softmax(1))

    def gradient(self, what: str) -> Tensor:
        """Its gradient at the logits or at the probabilities (``prob``), [B * N, D, h, w]."""
        logits = self.given("logits").float().requires_grad_()
        probability = logits.softmax(1)
        leaf = probability if what == "prob" else logits
        return torch.autograd.grad(self._loss(probability), leaf)[0]


class BEVAugmentation(Case):
    """Rotation, scale and flips of the ego frame."""

    def pose(self) -> Tensor:
        """The similarity, float64 [4, 4]: flip x scale x rotation."""
        degrees, scale, flip_x, flip_y = (float(v) for v in self.given("param"))
        signs = torch.tensor((-1.0 if flip_x else 1.0, -1.0 if flip_y else 1.0, 1.0, 1.0), dtype=torch.float64)
        stretch = torch.tensor((scale, scale, scale, 1.0), dtype=torch.float64)
        matrix: Tensor = torch.diag(signs * stretch) @ yaw_pose(np.radians(degrees))
        return matrix

    def matrix(self) -> Tensor:
        """The same without translation, [3, 3]."""
        return self.pose()[:3, :3]

    def boxes(self) -> Tensor:
        """Boxes [M, 9]; the released yaw is not wrapped, so that whole turns do not count."""
        found, stored = transform_boxes(self.pose(), self.given("boxes_in").double()), self.given("boxes_out").double()
        turns = ((stored - found) / (2 * torch.pi)).round() * 2 * torch.pi
        found[:, 6] += turns[:, 6]
        return found


class ImageAugmentation(Case):
    """Resize, crop, flip and rotation of an image, and of points in it."""

    def pixels(self) -> np.ndarray:  # type: ignore[type-arg]
        """Pixel transform, float64 [3, 3]."""
        resize, left, top, right, bottom, flip, degrees = (float(v) for v in self.given("param"))
        size = (bottom - top, right - left)
        change = ImageTransform((resize, resize), left, top, size, bool(flip), -np.radians(degrees))  # type: ignore[arg-type]
        return change.matrix(1, 1)

    def matrix(self) -> Tensor:
        """The same as released, [4, 4], with the translation in the last column."""
        pixels, out = self.pixels(), np.eye(4)
        out[:2, :2], out[:2, 3] = pixels[:2, :2], pixels[:2, 2]
        return torch.from_numpy(out)

    def _seen(self) -> dict[tuple[int, int], float]:
        """Depth by (row, column): the last of the points in the order of the file."""
        points = self.given("points_uvd").double().numpy()
        uv = (np.c_[points[:, :2], np.ones(len(points))] @ self.pixels().T)[:, :2]
        cells = np.trunc(uv).astype(int)  # toward zero
        left, top, right, bottom = self.given("param").tolist()[1:5]
        inside = (cells >= 0).all(1) & (cells < np.array((right - left, bottom - top))).all(1)
        rows = zip(cells[inside], points[inside, 2], strict=True)
        seen = {(int(v), int(u)): float(depth) for (u, v), depth in rows}
        return {cell: seen[cell] for cell in sorted(seen) if seen[cell]}

    def cells(self) -> Tensor:
        """Row and column of the pixels with a depth [K, 2]."""
        return torch.tensor(list(self._seen()), dtype=torch.long).reshape(-1, 2)

    def depths(self) -> Tensor:
        """Their depth [K]."""
        return torch.tensor(list(self._seen().values()))


class Geometry(Case):
    """From pixels with depths to cells: corner pixels and lower edges of the bins, as released."""

    def frustum(self) -> Tensor:
        """(u, v, depth, 1) [D, h, w, 4]."""
        low, high, step = (float(v) for v in self.given("d_bound"))
        depth, (rows, columns) = torch.arange(low, high, step), self.given("frustum").shape[1:3]
        u, v = (torch.linspace(0, 16 * n - 1, n) for n in (columns, rows))
        d, v, u = torch.meshgrid(depth, v, u, indexing="ij")
        return torch.stack((u, v, d, torch.ones_like(d)), -1)

    def points(self) -> Tensor:
        """Points in the ego frame [B, N, D, h, w, 3]."""
        frustum = self.frustum().double()
        ida, intrinsic = self.given("ida").double(), self.given("intrin").double()[..., :3, :3]
        pixels = torch.eye(3, dtype=torch.float64).repeat(*ida.shape[:2], 1, 1)
        pixels[..., :2, :2], pixels[..., :2, 2] = ida[..., :2, :2], ida[..., :2, 3]
        flat = frustum.flatten(0, 2)
        seen = unproject(pixels @ intrinsic, flat[:, :2], flat[:, 2])
        ego = transform(self.given("sensor2ego").double(), seen)
        points: Tensor = transform(self.given("bda").double()[:, None], ego).unflatten(2, frustum.shape[:3])
        return points

    def cells(self) -> Tensor:
        """Column, row and layer of the stored points, rounded toward zero."""
        size, first = self.given("voxel_size"), self.given("voxel_coord")
        cells: Tensor = (self.given("xyz") - (first - size / 2)) / size
        return cells.trunc()
