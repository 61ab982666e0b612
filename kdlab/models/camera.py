"""Camera branch: timm backbone, image neck, camera-aware depth net, lift-splat, temporal alignment, simulated LiDAR."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlab.config import CameraConfig, DetectorConfig
from kdlab.models.deformable import GeometryCompensation
from kdlab.models.image import build_backbone, build_neck
from kdlab.models.layers import ConvNorm, ResidualBlock, full_precision
from kdlab.models.lidar_depth import LidarDepth, depth_images
from kdlab.models.lift import Frustum, LiftCache, LiftIndex, align, depth_bins, splat
from kdlab.models.norm import mean_count
from kdlab.sample import Batch, Lift

IMAGENET_MEAN = (123.675, 116.28, 103.53)
"""Mean of R, G, B over ImageNet, in 0..255: what timm's weights were trained with."""
IMAGENET_STD = (58.395, 57.12, 57.375)
"""Standard deviation of R, G, B over ImageNet, in 0..255."""

IMAGE_POINTS, BEV_POINTS = 10, 20
"""Points of the geometry compensation in images and in the BEV (SimDistill's MV/depth_lss.py:81-93, MB:193-201)."""
_CAMERA_ENTRIES = 18  # two rows of image_from_camera, three of frame_from_camera


class _Gate(nn.Module):
    """Scales channels by what the camera's parameters say; squeeze-and-excitation fed from outside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_CAMERA_ENTRIES, channels), nn.ReLU(), nn.Linear(channels, channels))

    def forward(self, x: Tensor, entries: Tensor) -> Tensor:
        with full_precision(entries):
            gate: Tensor = self.mlp(entries).sigmoid()
        return x * gate.to(x.dtype)[:, :, None, None]


class DepthNet(nn.Module):
    """Image features to a depth distribution and context per pixel, aware of the camera ("BEVDepth", AAAI 2023)."""

    def __init__(self, config: CameraConfig) -> None:
        super().__init__()
        width, bins = config.depth_channels or config.channels, depth_bins(config.depth)
        self.reduce = ConvNorm(config.channels, width)
        self.depth_gate, self.context_gate = _Gate(width), _Gate(width)
        self.depth_blocks = nn.Sequential(*(ResidualBlock(width, width) for _ in range(config.depth_blocks)))
        self.depth = nn.Conv2d(width, bins, 1)
        self.context = nn.Conv2d(width, config.context, 1)

    def forward(self, image: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Run the net.

        Args:
            image: [B, channels, h, w].
            entries: [B, 18] of `camera_entries`.

        Returns:
            Depth probabilities, float32 [B, D, h, w], and context [B, context, h, w].
        """
        shared = self.reduce(image)
        context = self.context(self.context_gate(shared, entries))
        logits = self.depth(self.depth_blocks(self.depth_gate(shared, entries)))
        with full_precision(image):
            # Bins last in memory: the lift reads them so.
            depth = logits.float().permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2)
        return depth, context


def camera_entries(image_from_camera: Tensor, frame_from_camera: Tensor, size: tuple[int, int]) -> Tensor:
    """What the depth net knows of cameras [B, 3, 3] and [B, 4, 4], float32 [B, 18], all of order one.

    Focal lengths and principal points count in image heights and widths: to scale picture and camera changes nothing.
    """
    image_size = image_from_camera.new_tensor((size[1], size[0], 1.0))
    intrinsic = (image_from_camera / image_size[:, None])[:, :2].flatten(1)
    return torch.cat((intrinsic, frame_from_camera[:, :3].flatten(1)), 1).float()


@dataclass
class CameraFeatures:
    """What the camera branch found; shapes as in `kdlab.sample.Features`."""

    image: Tensor
    depth: Tensor
    camera_bev: Tensor
    camera_bev_aligned: Tensor
    bev: Tensor
    simulated_lidar: Tensor | None
    lift: Lift | None


@dataclass
class _Lifted:
    """What was found in the images of some frames on the way to their BEV maps; N images are B x T x cameras.

    Attributes:
        image: [N, C, h, w].
        entries: [N, 18], see `camera_entries`.
        depth: [N, D, h, w].
        index: of the lift.
        bev: [B * T, C, H, W].
        lidar: [N, 1, rows, columns] depths of LiDAR points, where the lift reads them.
    """

    image: Tensor
    entries: Tensor
    depth: Tensor
    index: LiftIndex
    bev: Tensor
    lidar: Tensor | None


def _bev_blocks(config: CameraConfig) -> nn.Module:
    return nn.Sequential(*(ResidualBlock(config.context, config.context) for _ in range(config.bev_blocks)))


class SimulatedLidar(nn.Module):
    """A BEV map from images that stands in for that of LiDAR ("SimDistill", AAAI 2024).

    Image features are compensated and lifted by a depth net of their own; the map is compensated again. In the released
    code the lift, with the compensation before it, is the camera branch's, and both maps start from one tensor: so it
    is with ``camera.shared_lift``. Without ``camera.geometry_compensation`` maps go on as they come.

    Raises:
        ValueError: the widths do not split into the heads of the compensation.
    """

    def __init__(self, config: DetectorConfig, size: tuple[int, int]) -> None:
        super().__init__()
        camera, corner = config.camera, config.camera.corner_reference
        self.grid = config.grid
        self.in_images, self.in_bev = (
            GeometryCompensation(channels, cells, points, corner_reference=corner)
            if camera.geometry_compensation
            else nn.Identity()
            for channels, cells, points in (
                (camera.channels, size, IMAGE_POINTS),
                (camera.context, config.grid.shape, BEV_POINTS),
            )
        )
        own = not camera.shared_lift
        self.depth_net = DepthNet(camera) if own else None
        self.refine = _bev_blocks(camera) if own else nn.Identity()
        self.lidar_depth = LidarDepth(camera.channels, camera.stride) if own and camera.lidar_depth else None

    def forward(self, seen: _Lifted) -> Tensor:
        """BEV map [B, context, H, W] of key frames, float32."""
        lifted = seen.bev
        if self.depth_net is not None:
            image = self.in_images(seen.image)
            if self.lidar_depth is not None:
                image = self.lidar_depth(image, seen.lidar)
            depth, context = self.depth_net(image, seen.entries)
            lifted = self.refine(splat(context, depth, seen.index, len(seen.bev), self.grid))
        bev: Tensor = self.in_bev(lifted)
        return bev


class CameraEncoder(nn.Module):
    """Surround images of several frames to one BEV map ("BEVDet4D", arXiv 2203.17054; "BEVDepth", AAAI 2023).

    Args:
        config: of the detector.
        load_pretrained: false leaves ``camera.pretrained`` aside, where weights will be loaded anyway.

    Raises:
        ValueError: image size, stride and backbone do not fit.
        RuntimeError: pretrained weights cannot be had.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: DetectorConfig, load_pretrained: bool = True) -> None:
        super().__init__()
        camera = config.camera
        height, width = camera.image_size
        if height % camera.stride or width % camera.stride:
            raise ValueError(
                f"CameraConfig.image_size: {camera.image_size} must be multiples of stride {camera.stride}"
            )
        self.config, self.grid = camera, config.grid
        self.backbone = build_backbone(camera, camera.pretrained and load_pretrained)
        self.neck = build_neck(camera, self.backbone)
        self.depth_net = DepthNet(camera)
        self.lidar_depth = LidarDepth(camera.channels, camera.stride) if camera.lidar_depth else None
        self.refine = _bev_blocks(camera)
        mixed = camera.context * camera.frames
        self.temporal = ConvNorm(mixed, config.bev.channels, 1 if camera.frames == 1 else 3)
        size = (height // camera.stride, width // camera.stride)
        self.simulated = SimulatedLidar(config, size) if camera.simulated_lidar else None
        frustum = Frustum(size, camera.stride, camera.depth)
        self._caches = tuple(LiftCache(frustum, config.grid, config.z) for _ in range(2))  # key frame, past frames
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, batch: Batch, keep_lift: bool = False) -> CameraFeatures:
        """Encode the images of a batch; of more frames than the config's the first ones.

        Raises:
            ValueError: no images, too few frames, or not the size of the config.
        """
        self._check(batch)
        key = self._frames(batch, slice(0, 1), self._caches[0])
        image, depth, camera_bev = self._by_frame(batch, 1, key)
        aligned = camera_bev
        if self.config.frames > 1:
            with contextlib.nullcontext() if self.config.past_gradient else torch.no_grad():
                found = self._frames(batch, slice(1, self.config.frames), self._caches[1])
                past = self._by_frame(batch, self.config.frames - 1, found)
                poses = batch.key_from_frame[:, 1 : self.config.frames].flatten(0, 1)
                warped = align(found.bev, poses, self.grid).view_as(past[2])
            image, depth = torch.cat((image, past[0]), 1), torch.cat((depth, past[1]), 1)
            camera_bev, aligned = torch.cat((camera_bev, past[2]), 1), torch.cat((camera_bev, warped), 1)
        return CameraFeatures(
            image,
            depth,
            camera_bev,
            aligned,
            self.temporal(aligned.flatten(1, 2)),
            None if self.simulated is None else self.simulated(key),
            describe_lift(key.index, key.depth) if keep_lift else None,
        )

    def _check(self, batch: Batch) -> None:
        frames, cameras, _, *size = batch.images.shape[1:]
        if cameras == 0:
            raise ValueError("a detector with cameras needs images, but the batch holds none (N = 0); load them")
        if frames < self.config.frames:
            raise ValueError(f"CameraConfig.frames is {self.config.frames}, but the batch holds {frames} frames")
        if tuple(size) != self.config.image_size:
            raise ValueError(f"CameraConfig.image_size is {self.config.image_size}, but the images are {tuple(size)}")

    def _frames(self, batch: Batch, which: slice, cache: LiftCache) -> _Lifted:
        """Lift the images of some frames."""
        images = batch.images[:, which]
        intrinsic, extrinsic = batch.image_from_camera[:, which], batch.frame_from_camera[:, which]
        index = cache.index(intrinsic.flatten(0, 1), extrinsic.flatten(0, 1))
        image = self.neck(self.backbone(self.normalise(images.movedim(3, -1).flatten(0, 2).movedim(-1, 1))))
        entries = camera_entries(intrinsic.flatten(0, 2), extrinsic.flatten(0, 2), self.config.image_size)
        lifted = image
        if self.simulated is not None and self.config.shared_lift:
            lifted = self.simulated.in_images(image)
        lidar = None
        if self.lidar_depth is not None:
            lidar = depth_images(batch)
            lifted = self.lidar_depth(lifted, lidar)
        depth, context = self.depth_net(lifted, entries)
        bev = self.refine(splat(context, depth, index, images.shape[0] * images.shape[1], self.grid))
        return _Lifted(image, entries, depth, index, bev, lidar)

    def _by_frame(self, batch: Batch, frames: int, found: _Lifted) -> tuple[Tensor, Tensor, Tensor]:
        """Image, depth and BEV maps, [B, T, N, C, h, w] twice and [B, T, C, H, W]."""
        unflat = (batch.size, frames, batch.images.shape[2])
        image, depth = found.image.unflatten(0, unflat), found.depth.unflatten(0, unflat)
        return image, depth, found.bev.unflatten(0, unflat[:2])

    def normalise(self, images: Tensor) -> Tensor:
        """Uint8 RGB [B, 3, H, W] to float32 as timm's backbones expect it, channels last in memory."""
        rows = images.movedim(1, -1).flatten(2)  # [B, H, W * 3]: colours are last in memory, and long rows are fast
        mean, std = (values.flatten().repeat(images.shape[3]) for values in (self.mean, self.std))
        floats: Tensor = rows.float().sub_(mean).div_(std).unflatten(2, (-1, 3)).movedim(-1, 1)
        return floats


@torch.no_grad()
def describe_lift(index: LiftIndex, depth: Tensor) -> Lift:
    """The lift of a batch whose depth probabilities are [B * N, D, h, w], for drawing."""
    weight = depth.permute(0, 2, 3, 1).flatten().index_select(0, index.source)
    return Lift(index.cell, index.pixel, index.source % depth.shape[1], weight)


def depth_loss(depth: Tensor, target: Tensor, bins: tuple[float, float, float]) -> Tensor:
    """Binary cross entropy of depth bins where LiDAR points fell, per such pixel ("BEVDepth", AAAI 2023).

    Args:
        depth: probabilities [B, N, D, h, w].
        target: metres [B, N, h, w]; those that are 0 or outside the bins do not count.
        bins: lower bound, upper bound, width, metres.

    Returns:
        Scalar: sum over bins, mean over counting pixels (of all processes); 0 where there is none.

    Raises:
        ValueError: the shapes do not fit.
    """
    if target.shape != depth.shape[:2] + depth.shape[3:]:
        raise ValueError(f"depth targets {tuple(target.shape)} do not fit depth probabilities {tuple(depth.shape)}")
    with full_precision(depth):
        known = (target >= bins[0]) & (target < bins[1])
        index = ((target - bins[0]) / bins[2]).floor().clamp(0, depth.shape[2] - 1).long()
        hit = F.one_hot(index, depth.shape[2]).to(torch.float32)
        probability, counts = depth.float().movedim(2, -1), known.unsqueeze(-1).float()  # a mask would wait for a GPU
        loss = F.binary_cross_entropy(probability, hit, counts, reduction="sum")
        return loss / mean_count(known.sum().to(loss.dtype))
