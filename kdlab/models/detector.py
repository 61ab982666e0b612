"""The detector: sensors -> BEV -> encoder -> neck -> head, each stage named in `Features`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kdlab.config import DetectorConfig
from kdlab.models.bev import BEVEncoder, BEVNeck
from kdlab.models.camera import CameraEncoder, depth_loss
from kdlab.models.fusion import FUSERS
from kdlab.models.head import CenterHead
from kdlab.models.layers import ConvNorm
from kdlab.models.lidar import PillarEncoder
from kdlab.models.lift import depth_bins
from kdlab.models.targets import CODES, targets
from kdlab.sample import CLASSES, TASKS, Batch, Detections, Features, Predictions


@dataclass(frozen=True)
class Channels:
    """Widths of a detector's named stages, known before anything runs; 0 where it has no such stage.

    Attributes:
        image: of `Features.image`.
        depth: depth bins of `Features.depth`.
        camera_bev: of `Features.camera_bev`, per frame.
        lidar_bev: of `Features.lidar_bev`.
        bev: of `Features.bev`.
        stages: of `Features.stages`.
        neck: of `Features.neck`.
        heatmap: of `Predictions.heatmap`.
        regression: of `Predictions.regression`.
        frames: frames of `Features.camera_bev`.
    """

    image: int
    depth: int
    camera_bev: int
    lidar_bev: int
    bev: int
    stages: tuple[int, ...]
    neck: int
    heatmap: int
    regression: int
    frames: int = 1


def channels_of(config: DetectorConfig) -> Channels:
    """Widths of the stages of a config's detector, without building it.

    Raises:
        ValueError: the config's parts do not fit.
    """
    camera, has_camera, has_lidar = config.camera, config.modality != "lidar", config.modality != "camera"
    simulated = has_camera and camera.simulated_lidar
    if simulated and has_lidar:
        raise ValueError("CameraConfig.simulated_lidar is for camera detectors: a fusion detector has real LiDAR")
    if has_camera and camera.lidar_depth and camera.frames > 1:
        raise ValueError("CameraConfig.lidar_depth is for one frame: points of past frames are not at hand")
    return Channels(
        image=camera.channels if has_camera else 0,
        depth=depth_bins(camera.depth) if has_camera else 0,
        camera_bev=camera.context if has_camera else 0,
        lidar_bev=camera.context if simulated else config.lidar.channels if has_lidar else 0,
        bev=config.bev.channels,
        stages=config.bev.stages,
        neck=config.bev.neck,
        heatmap=len(CLASSES),
        regression=CODES * len(TASKS),
        frames=camera.frames if has_camera else 1,
    )


class Detector(nn.Module):
    """A BEV detector for LiDAR, cameras or both.

    A LiDAR detector never touches images, a camera detector never touches points; none touches boxes before the loss.
    A camera detector with simulated LiDAR is one with cameras alone: it has a LiDAR BEV map, made from its images. The
    one exception is ``camera.lidar_depth``, a quirk of released code: with it the lift reads points, and needs them.

    Args:
        config: what to build.
        load_pretrained: false leaves ``camera.pretrained`` aside, where weights will be loaded anyway.

    Attributes:
        grid: of every BEV map of stride 1.
        channels: widths of the stages.

    Raises:
        ValueError: the config's parts do not fit.
        RuntimeError: pretrained weights cannot be had.
    """

    def __init__(self, config: DetectorConfig, load_pretrained: bool = True) -> None:
        super().__init__()
        self.config, self.grid = config, config.grid
        self.channels = channels_of(config)
        has_camera, has_lidar = config.modality != "lidar", config.modality != "camera"
        bev, lidar_bev = config.bev.channels, self.channels.lidar_bev
        self.camera = CameraEncoder(config, load_pretrained) if has_camera else None
        self.lidar = PillarEncoder(config) if has_lidar else None
        self.fuser = FUSERS[config.fuser](bev, lidar_bev, bev) if has_camera and lidar_bev else None
        same = config.lidar.channels == bev or has_camera
        self.lidar_project = nn.Identity() if same else ConvNorm(config.lidar.channels, bev, 1)
        self.encoder = BEVEncoder(config.bev)
        self.neck = BEVNeck(config.bev)
        self.head = CenterHead(config.bev.neck, config.head, config.grid)

    def seen(self, batch: Batch) -> Batch:
        """What it may see of a batch at test time: images alone, where they are all that it reads."""
        return batch.images_only() if self.config.sensors == "camera" else batch

    def encode(self, batch: Batch, keep_lift: bool = False) -> Features:
        """Sensors to BEV: features with everything up to ``bev`` filled in.

        Args:
            batch: on the detector's device.
            keep_lift: also keep `Features.lift`.

        Raises:
            ValueError: a camera detector is given no images, images of another size or too few frames, or no points
                although it reads LiDAR depths.
        """
        lidar_bev = None if self.lidar is None else self.lidar(batch.points, batch.point_batch, batch.size)
        if self.camera is None:
            assert lidar_bev is not None
            return Features(bev=self.lidar_project(lidar_bev), lidar_bev=lidar_bev)
        seen = self.camera(batch, keep_lift)
        lidar_bev = seen.simulated_lidar if lidar_bev is None else lidar_bev
        return Features(
            bev=seen.bev if self.fuser is None else self.fuser(seen.bev, lidar_bev),
            image=seen.image,
            depth=seen.depth,
            camera_bev=seen.camera_bev,
            camera_bev_aligned=seen.camera_bev_aligned,
            lidar_bev=lidar_bev,
            lift=seen.lift,
        )

    def decode_bev(self, bev: Tensor) -> tuple[Tensor, ...]:
        """BEV map [B, bev, H, W] to the encoder's stages, finest first."""
        stages: tuple[Tensor, ...] = self.encoder(bev)
        return stages

    def decode_stages(self, stages: tuple[Tensor, ...]) -> tuple[Tensor, Predictions]:
        """The encoder's stages, own or made elsewhere, to the neck's map [B, neck, H, W] and the predictions."""
        neck = self.neck(stages)
        return neck, self.head(neck)

    def forward(self, batch: Batch, keep_lift: bool = False) -> Features:
        """All stages of a batch, see `encode` for arguments and errors."""
        features = self.encode(batch, keep_lift)
        stages = self.decode_bev(features.bev)
        neck, predictions = self.decode_stages(stages)
        return replace(features, stages=stages, neck=neck, predictions=predictions)

    def loss(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """Weighted detection losses, scalars to be summed: ``heatmap``, ``box`` and, with depth supervision, ``depth``.

        Normalisers are means over processes, so averaged gradients of several processes are those of the whole batch.

        Raises:
            ValueError: the features hold no predictions, or the batch lacks depth targets that the config asks for.
        """
        if features.predictions is None:
            raise ValueError("Detector.loss: the features hold no predictions; call the detector, not only encode")
        losses = self.head.loss(features.predictions, targets(batch.boxes, self.grid, self.config.head))
        camera = self.config.camera
        if features.depth is not None and camera.depth_supervision:
            if batch.depth is None:
                raise ValueError(
                    "camera.depth_supervision needs depth targets, but batch.depth is None: load the samples with "
                    "depth targets, or set it to false"
                )
            losses["depth"] = camera.depth_weight * depth_loss(features.depth[:, 0], batch.depth, camera.depth)
        return losses

    def predict(self, features: Features) -> list[Detections]:
        """Final boxes of each sample, best first, in the key ego frame (with the batch's BEV augmentation, if any).

        Raises:
            ValueError: the features hold no predictions.
            FloatingPointError: a value is not finite; names the first stage where it is so.
        """
        if features.predictions is None:
            raise ValueError("Detector.predict: the features hold no predictions; call the detector, not only encode")
        try:
            return self.head.decode(features.predictions)
        except FloatingPointError as error:
            raise FloatingPointError(f"not finite: first in stage {first_nonfinite(features)!r}") from error


def named_stages(features: Features) -> Iterator[tuple[str, Tensor]]:
    """Name and map of each stage that the features hold, in the order of computation."""
    for name in ("image", "depth", "camera_bev", "camera_bev_aligned", "lidar_bev", "bev"):
        value = getattr(features, name)
        if value is not None:
            yield name, value
    for index, stage in enumerate(features.stages):
        yield f"stages[{index}]", stage
    if features.neck is not None:
        yield "neck", features.neck
    if features.predictions is not None:
        yield "predictions.heatmap", features.predictions.heatmap
        yield "predictions.regression", features.predictions.regression


def first_nonfinite(features: Features) -> str | None:
    """Name of the first stage that holds a NaN or infinity; None where all is finite."""
    return next((name for name, value in named_stages(features) if not bool(torch.isfinite(value).all())), None)


def build_detector(config: DetectorConfig, load_pretrained: bool = True) -> Detector:
    """The detector of a config, in training mode, with fresh weights; see `Detector`."""
    return Detector(config, load_pretrained)
