import dataclasses

import pytest
import torch
from model_fakes import random_batch, small_config

from kdlab.geometry import project, transform
from kdlab.models import build_detector
from kdlab.models.lidar_depth import LidarDepth, depth_images


def test_depths_match_loops() -> None:
    config = small_config()
    batch = random_batch(config, batch=2, cameras=3, points=150)
    height, width = config.camera.image_size
    expected = torch.zeros(2, 3, height, width)
    for point, b in zip(batch.points[:, :3], batch.point_batch.tolist(), strict=True):
        for n in range(3):
            camera = transform(torch.linalg.inv(batch.frame_from_camera[b, 0, n]), point[None])
            pixel, depth = project(batch.image_from_camera[b, 0, n], camera)
            (u, v), z = pixel[0].tolist(), float(depth[0])
            if z > 1e-3 and 0 <= u < width and 0 <= v < height:
                before = float(expected[b, n, int(v), int(u)])
                expected[b, n, int(v), int(u)] = min(before, z) if before else z
    found = depth_images(batch)
    assert found.shape == (6, 1, height, width) and 20 < int((found > 0).sum()) < 400
    torch.testing.assert_close(found.view_as(expected), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16])
def test_features_have_the_strides_size(stride: int) -> None:
    layer = LidarDepth(12, stride)
    assert layer(torch.rand(2, 12, 32 // stride, 64 // stride), torch.rand(2, 1, 32, 64)).shape[1] == 12


@pytest.mark.parametrize("shared", [False, True])
def test_every_weight_learns_and_one_frame_only(shared: bool) -> None:
    config = small_config(simulated_lidar=True, lidar_depth=True, shared_lift=shared, context=16)
    torch.manual_seed(0)
    detector, batch = build_detector(config), random_batch(config)
    sum(detector.loss(detector(batch), batch).values()).backward()
    without = [n for n, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    camera = dataclasses.replace(config.camera, frames=2)
    with pytest.raises(ValueError, match="lidar_depth is for one frame"):
        build_detector(dataclasses.replace(config, camera=camera))
