from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from model_fakes import random_batch, small_config
from torch import Tensor

from kdlab.config import DetectorConfig
from kdlab.models import Detector, build_detector
from kdlab.models.deformable import GeometryCompensation
from kdlab.models.detector import named_stages

SIZES = [(5, 7), (6, 4), (1, 3)]


def made(size: tuple[int, int], corner: bool = False, seed: int = 0) -> GeometryCompensation:
    """With weights everywhere: offsets of a few cells that differ from cell to cell."""
    torch.manual_seed(seed)
    module = GeometryCompensation(8, size, 7, heads=4, corner_reference=corner)
    with torch.no_grad():
        for layer in (module.offsets, module.weights, module.value, module.output):
            layer.weight.copy_(torch.randn_like(layer.weight) * 0.3)
            layer.bias.add_(torch.randn_like(layer.bias) * 0.3)
    return module


def bilinear(image: Tensor, u: float, v: float) -> Tensor:
    """A map [C, H, W] at column u, row v, where i + 1/2 is the centre of cell i; zeros outside."""
    out = torch.zeros(len(image))
    for i in (math.floor(v - 0.5), math.floor(v - 0.5) + 1):
        for j in (math.floor(u - 0.5), math.floor(u - 0.5) + 1):
            if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
                out = out + image[:, i, j] * (1 - abs(u - 0.5 - j)) * (1 - abs(v - 0.5 - i))
    return out


def naive(module: GeometryCompensation, maps: Tensor, corner: bool) -> Tensor:
    """The layer by loops over samples, cells, heads and points."""
    out = torch.zeros_like(maps)
    heads, points, each = module.heads, module.points, maps.shape[1] // module.heads
    for b, image in enumerate(maps):
        value = module.value.weight @ image.flatten(1) + module.value.bias[:, None]
        value = value.view(image.shape)
        for i in range(image.shape[1]):
            for j in range(image.shape[2]):
                query = image[:, i, j] + torch.cat((module.columns[j], module.rows[i]))
                offsets = (module.offsets.weight @ query + module.offsets.bias).view(heads, points, 2)
                shares = (module.weights.weight @ query + module.weights.bias).view(heads, points).softmax(-1)
                read = []
                for m in range(heads):
                    part = value[m * each : (m + 1) * each]
                    total = torch.zeros(each)
                    for p in range(points):
                        at = 0.0 if corner else 0.5
                        u, v = j + at + float(offsets[m, p, 0]), i + at + float(offsets[m, p, 1])
                        total = total + shares[m, p] * bilinear(part, u, v)
                    read.append(total)
                out[b, :, i, j] = module.output.weight @ torch.cat(read) + module.output.bias
    return out


@pytest.mark.parametrize("corner", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_layer_matches_loops(size: tuple[int, int], corner: bool) -> None:
    module, maps = made(size, corner), torch.randn(2, 8, *size)
    with torch.no_grad():
        torch.testing.assert_close(module.attend(maps), naive(module, maps, corner), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module(maps), maps + module.attend(maps))


def test_start_is_that_of_deformable_detr() -> None:
    module = GeometryCompensation(16, (4, 4), 3)
    bias = module.offsets.bias.view(8, 3, 2)
    assert not module.offsets.weight.any() and not module.weights.weight.any() and not module.weights.bias.any()
    assert torch.equal(bias.abs().amax(-1), torch.tensor([1.0, 2.0, 3.0]).expand(8, 3))
    for m in range(8):
        angle = torch.atan2(bias[m, :, 1], bias[m, :, 0])
        assert torch.cos(angle - 2 * math.pi * m / 8).min() > 0.9999
    tables = torch.cat((module.rows, module.columns)).detach()
    assert tables.min() >= 0 and tables.max() <= 1


@pytest.mark.parametrize("corner", [False, True])
def test_no_offset_reads_the_own_cell_or_half_a_cell_away(corner: bool) -> None:
    module = GeometryCompensation(8, (6, 6), 1, corner_reference=corner)
    with torch.no_grad():
        module.offsets.bias.zero_()
        for layer in (module.value, module.output):
            layer.weight.copy_(torch.eye(8))
    maps = torch.randn(1, 8, 6, 6)
    want = maps
    if corner:
        padded = torch.nn.functional.pad(maps, (1, 0, 1, 0))
        want = torch.nn.functional.avg_pool2d(padded, 2, 1)
    torch.testing.assert_close(module.attend(maps), want, rtol=1e-5, atol=1e-5)


def test_reading_again_for_the_gradient_changes_nothing() -> None:
    module, maps = made((5, 7)).double(), torch.randn(1, 8, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        plain = module.attend(maps)
    leaf = maps.clone().requires_grad_()
    assert torch.equal(module.attend(leaf), plain)
    value = module.attend(leaf).square().sum()
    again, gradient = (torch.autograd.grad(value, leaf, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(again, gradient)  # several losses ask for gradients one after another
    direction, step = torch.randn_like(maps), 1e-5
    with torch.no_grad():
        ahead, behind = (module.attend(maps + s * step * direction).square().sum() for s in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


def test_float32_under_autocast() -> None:
    module, maps = made((5, 7)), torch.randn(2, 8, 5, 7)
    plain = module(maps)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(maps)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, plain)


def test_wrong_widths_and_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="12 channels do not split into 8 heads"):
        GeometryCompensation(12, (4, 4), 2)
    with pytest.raises(ValueError, match=r"camera\.context as multiples of 8"):
        build_detector(student_config(context=12))
    with pytest.raises(ValueError, match=r"\(5, 7\) cells, not \(7, 5\)"):
        made((5, 7))(torch.zeros(1, 8, 7, 5))


def student_config(frames: int = 1, **camera: object) -> DetectorConfig:
    return small_config("camera", frames, **{"simulated_lidar": True, "context": 16, **camera})


def student(config: DetectorConfig, seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    return build_detector(config)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_simulated_student_sees_images_only(frames: int, shared: bool) -> None:
    config = student_config(frames, shared_lift=shared)
    detector, batch = student(config).eval(), random_batch(config)
    with torch.no_grad():
        seen, blind = detector(batch), detector(batch.images_only())
    assert detector.lidar is None and detector.config.modality == "camera"
    assert seen.lidar_bev.shape == (2, detector.channels.lidar_bev, *config.grid.shape)
    for (name, a), (_, b) in zip(named_stages(seen), named_stages(blind), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(detector.predict(seen), detector.predict(blind), strict=True):
        assert torch.equal(a.values, b.values) and torch.equal(a.scores, b.scores)


@pytest.mark.parametrize("shared", [False, True])
def test_every_weight_of_the_student_learns(shared: bool) -> None:
    config = student_config(shared_lift=shared)
    detector, batch = student(config), random_batch(config, points=0, boxes=0)
    losses = detector.loss(detector(batch), batch)
    sum(losses.values()).backward()
    without = [n for n, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    assert (detector.camera.simulated.depth_net is None) == shared


def test_branches_start_from_one_map_only_where_the_lift_is_shared() -> None:
    for shared in (False, True):
        config = student_config(shared_lift=shared)
        detector, batch = student(config).eval(), random_batch(config)
        with torch.no_grad():
            for part in (detector.camera.simulated.in_bev.output, detector.camera.simulated.in_images.output):
                part.weight.zero_(), part.bias.zero_()
            found = detector(batch)
        assert torch.equal(found.lidar_bev, found.camera_bev[:, 0]) == shared


def test_the_past_reaches_the_camera_branch_alone() -> None:
    config = student_config(2)
    detector, batch = student(config).eval(), random_batch(config)
    other = dataclasses.replace(batch, images=batch.images.clone())
    other.images[:, 1] = 255 - other.images[:, 1]
    with torch.no_grad():
        a, b = detector(batch), detector(other)
    assert torch.equal(a.lidar_bev, b.lidar_bev)
    assert not torch.equal(a.bev, b.bev)


def test_samples_of_a_batch_do_not_mix() -> None:
    config = student_config()
    detector, batch, other = student(config).eval(), random_batch(config), random_batch(config, seed=1)
    mixed = dataclasses.replace(batch, images=torch.stack((batch.images[0], other.images[1])))
    with torch.no_grad():
        a, b = detector(batch), detector(mixed)
    torch.testing.assert_close(a.lidar_bev[0], b.lidar_bev[0])
    assert not torch.equal(a.lidar_bev[1], b.lidar_bev[1])


def test_only_camera_detectors_simulate_lidar() -> None:
    config = student_config()
    with pytest.raises(ValueError, match="simulated_lidar is for camera detectors"):
        build_detector(dataclasses.replace(config, modality="fusion"))
    assert build_detector(dataclasses.replace(config, modality="lidar")).camera is None
    plain = build_detector(small_config("camera"))
    assert plain.camera.simulated is None and plain.channels.lidar_bev == 0 and plain.fuser is None


def test_bfloat16_stays_close() -> None:
    config = student_config()
    detector, batch = student(config).eval(), random_batch(config)
    with torch.no_grad():
        full = detector(batch)
        detector.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            half = detector(batch)
    for (name, a), (_, b) in zip(named_stages(full), named_stages(half), strict=True):
        assert (a - b.float()).norm() < 0.05 * a.norm().clamp(min=1e-6), name
