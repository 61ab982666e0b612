"""A made-up sample with six cameras, and a strong augmentation."""

import math

import torch

from kdlab.config import AugmentConfig
from kdlab.geometry import pose
from kdlab.sample import Boxes3D, Sample

STRONG = AugmentConfig(resize=(-0.1, 0.3), image_rotate=10, bev_rotate=90, bev_scale=(0.8, 1.2))


def scene(height: int = 90, width: int = 160, frames: int = 1) -> Sample:
    """A made-up sample: black images, six cameras, a few boxes and points in and around them."""
    random = torch.Generator().manual_seed(3)
    walker = [-8, -6, 0.8, 0.7, 0.6, 1.8, -2, math.nan, math.nan]
    values = torch.tensor([[10.0, 4, 1, 4.5, 1.9, 1.6, 0.5, 3, 1], walker])
    points = torch.rand(4000, 5, generator=random) - torch.tensor((0.5, 0.5, 0, 0, 0))
    points = points * torch.tensor((40, 40, 3, 1, 0))
    image_from_camera = torch.tensor([[width * 0.6, 0, width / 2], [0, width * 0.6, height / 2], [0, 0, 1]])
    optical = torch.tensor([[0.0, 0, 1, 1], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
    cameras = torch.stack([pose((math.cos(a / 2), 0, 0, math.sin(a / 2)), (0, 0, 0)).float() @ optical
                           for a in torch.arange(0, -6, -math.pi / 3).tolist()])  # fmt: skip
    past = pose((1, 0, 0, 0.05), (-3, 0.5, 0)).float()
    return Sample(
        token="token",
        scene="scene",
        timestamp=0.0,
        images=torch.zeros(frames, 6, 3, height, width, dtype=torch.uint8),
        image_from_camera=image_from_camera.expand(frames, 6, 3, 3).clone(),
        frame_from_camera=cameras.expand(frames, 6, 4, 4).clone(),
        key_from_frame=torch.stack([torch.eye(4)] + [past] * (frames - 1)),
        frame_times=torch.arange(frames) * 0.5,
        points=points,
        boxes=Boxes3D.make(values, torch.tensor((0, 8))),
        global_from_key=torch.eye(4, dtype=torch.float64),
        bev_augmentation=torch.eye(4),
        lidar_origin=torch.tensor((0.9, 0.0, 1.84)),
    )
