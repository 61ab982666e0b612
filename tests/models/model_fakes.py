"""A made-up rig and random batches: the models' tests need no data set."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from kdlab.config import BEVConfig, CameraConfig, DetectorConfig, LidarConfig
from kdlab.geometry import BEVGrid, yaw_pose
from kdlab.sample import Batch, Boxes3D

CAMERA_AXES = torch.tensor([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # camera x right, y down, z forward


def rig(cameras: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cameras [N, 3, 3] and [N, 4, 4] that look outwards from a circle 1.6 m above the ground."""
    height, width = size
    intrinsic = torch.tensor([[0.79 * width, 0.0, width / 2], [0.0, 0.79 * width, height / 2], [0.0, 0.0, 1.0]])
    poses = torch.eye(4).repeat(cameras, 1, 1)
    for n in range(cameras):
        yaw = -2 * math.pi * n / cameras
        turn = yaw_pose(yaw, (math.cos(yaw), math.sin(yaw), 1.6)).float()
        poses[n, :3, :3], poses[n, :3, 3] = turn[:3, :3] @ CAMERA_AXES, turn[:3, 3]
    return intrinsic.expand(cameras, 3, 3).clone(), poses


def random_boxes(batch: int, boxes: int, reach: float, generator: torch.Generator) -> Boxes3D:
    def uniform(low: float, high: float, *last: int) -> Tensor:
        return torch.rand(batch, boxes, *last, generator=generator) * (high - low) + low

    parts = (uniform(-reach, reach, 2), uniform(-1, 2, 1), uniform(0.5, 6, 3), uniform(-3, 3, 1), uniform(-9, 9, 2))
    return Boxes3D.make(torch.cat(parts, -1), torch.randint(0, 10, (batch, boxes), generator=generator))


def random_batch(
    config: DetectorConfig, batch: int = 2, cameras: int = 3, points: int = 200, boxes: int = 6, seed: int = 0
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    camera, frames = config.camera, config.camera.frames
    (height, width), stride, reach = camera.image_size, camera.stride, config.grid.x[1]
    intrinsic, extrinsic = rig(cameras, camera.image_size)
    key_from_frame = torch.eye(4).repeat(batch, frames, 1, 1)
    key_from_frame[:, :, 0, 3] = -2.0 * torch.arange(frames)
    cloud = torch.rand(batch * points, 5, generator=generator)
    cloud[:, :2] = (cloud[:, :2] * 2 - 1) * reach * 1.1
    cloud[:, 2] = cloud[:, 2] * 9 - 3.5
    depth = torch.rand(batch, cameras, height // stride, width // stride, generator=generator) * 50
    depth *= torch.rand(depth.shape, generator=generator) < 0.4
    return Batch(
        tokens=[str(i) for i in range(batch)],
        images=torch.randint(
            0, 256, (batch, frames, cameras, 3, height, width), dtype=torch.uint8, generator=generator
        ),
        image_from_camera=intrinsic.expand(batch, frames, cameras, 3, 3).clone(),
        frame_from_camera=extrinsic.expand(batch, frames, cameras, 4, 4).clone(),
        key_from_frame=key_from_frame,
        points=cloud,
        point_batch=torch.arange(batch).repeat_interleave(points),
        depth=depth,
        boxes=random_boxes(batch, boxes, reach, generator),
        global_from_key=torch.eye(4, dtype=torch.float64).repeat(batch, 1, 1),
        bev_augmentation=torch.eye(4).repeat(batch, 1, 1),
    )


def small_config(modality: str = "camera", frames: int = 1, **camera: object) -> DetectorConfig:
    """A detector that runs in milliseconds."""
    settings = dataclasses.replace(
        CameraConfig(image_size=(32, 64), channels=16, context=12, depth=(1.0, 21.0, 2.0), frames=frames),
        **camera,  # type: ignore[arg-type]
    )
    return DetectorConfig(
        modality=modality,  # type: ignore[arg-type]
        grid=BEVGrid((-16.0, 16.0), (-12.8, 12.8), 1.6),
        camera=settings,
        lidar=LidarConfig(channels=16),
        bev=BEVConfig(channels=20, stages=(16, 24), blocks=(1, 1), neck=21),
    )
