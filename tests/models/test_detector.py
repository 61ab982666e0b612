from __future__ import annotations

import dataclasses

import pytest
import torch
from model_fakes import random_batch, small_config
from torch import Tensor

from kdlab.config import DetectorConfig
from kdlab.geometry import BEVGrid
from kdlab.models import Detector, build_detector
from kdlab.models.camera import camera_entries, depth_loss
from kdlab.models.detector import first_nonfinite, named_stages
from kdlab.sample import Boxes3D, Features

MODALITIES = ("lidar", "camera", "fusion")


def build(config: DetectorConfig, seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    return build_detector(config)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("frames", [1, 2])
def test_shapes_are_those_documented(modality: str, frames: int) -> None:
    config = small_config(modality, frames)
    detector, batch = build(config), random_batch(config)
    features, widths = detector(batch, keep_lift=True), detector.channels
    height, width = config.grid.shape
    if modality == "lidar":
        assert (widths.image, widths.depth, widths.camera_bev) == (0, 0, 0)
        assert (
            features.image
            is features.depth
            is features.camera_bev
            is features.camera_bev_aligned
            is features.lift
            is None
        )
    else:
        assert features.image.shape == (2, frames, 3, widths.image, 4, 8)
        assert features.depth.shape == (2, frames, 3, widths.depth, 4, 8)
        torch.testing.assert_close(features.depth.sum(3), torch.ones(2, frames, 3, 4, 8))
        assert features.camera_bev.shape == (2, frames, widths.camera_bev, height, width)
        assert features.camera_bev_aligned.shape == features.camera_bev.shape
    if modality == "camera":
        assert features.lidar_bev is None and widths.lidar_bev == 0
    else:
        assert features.lidar_bev.shape == (2, widths.lidar_bev, height, width)
    assert features.bev.shape == (2, widths.bev, height, width)
    assert tuple(s.shape for s in features.stages) == ((2, 16, height, width), (2, 24, height // 2, width // 2))
    assert widths.stages == (16, 24)
    assert features.neck.shape == (2, widths.neck, height, width)
    assert features.predictions.heatmap.shape == (2, widths.heatmap, height, width)
    assert features.predictions.regression.shape == (2, widths.regression, height, width)


@pytest.mark.parametrize("modality", MODALITIES)
def test_wider_strides_finer_pillars_and_other_necks_give_maps_of_the_same_size(modality: str) -> None:
    config = small_config(modality, 2, neck="concatenation", channels=48, depth_channels=24, bev_blocks=1)
    config = dataclasses.replace(
        config,
        lidar=dataclasses.replace(config.lidar, finer=(16, 16)),
        bev=dataclasses.replace(config.bev, first_stride=2),
    )
    detector, batch = build(config), random_batch(config)
    features = detector(batch)
    height, width = detector.grid.shape
    assert features.predictions is not None and features.neck is not None
    assert features.neck.shape[-2:] == features.predictions.heatmap.shape[-2:] == (height, width)
    assert [s.shape[-2:] for s in features.stages] == [(height // 2, width // 2), (height // 4, width // 4)]
    if detector.lidar is not None:
        assert detector.lidar.grid.shape == (4 * height, 4 * width)
        assert features.lidar_bev is not None and features.lidar_bev.shape[-2:] == (height, width)
    sum(detector.loss(features, batch).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def test_a_stride_that_does_not_fit_the_grid_is_named() -> None:
    config = small_config("lidar")
    with pytest.raises(ValueError, match="power of two"):
        build(dataclasses.replace(config, bev=dataclasses.replace(config.bev, first_stride=3)))
    odd = dataclasses.replace(
        config, grid=BEVGrid((-16.0, 17.6), (-12.8, 12.8), 1.6), bev=dataclasses.replace(config.bev, first_stride=2)
    )
    with pytest.raises(ValueError, match="does not divide"):
        build(odd)(random_batch(odd))


def values_of(features: Features) -> list[Tensor]:
    return [value for _, value in named_stages(features)]


def test_a_camera_detector_sees_images_only() -> None:
    config = small_config("camera", 2)
    detector, batch = build(config).eval(), random_batch(config)
    with torch.no_grad():
        seen, blind = detector(batch), detector(batch.images_only())
    assert all(torch.equal(a, b) for a, b in zip(values_of(seen), values_of(blind), strict=True))
    for a, b in zip(detector.predict(seen), detector.predict(blind), strict=True):
        assert torch.equal(a.values, b.values) and torch.equal(a.scores, b.scores) and torch.equal(a.labels, b.labels)


def test_a_lidar_detector_sees_points_only() -> None:
    config = small_config("lidar")
    detector, batch = build(config).eval(), random_batch(config)
    dark = dataclasses.replace(
        batch, images=batch.images[:, :, :0], boxes=Boxes3D.pad([Boxes3D.empty()] * 2), depth=None,
        image_from_camera=batch.image_from_camera[:, :, :0], frame_from_camera=batch.frame_from_camera[:, :, :0],
    )  # fmt: skip
    with torch.no_grad():
        pairs = zip(values_of(detector(batch)), values_of(detector(dark)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("modality", MODALITIES)
def test_samples_of_a_batch_do_not_mix(modality: str) -> None:
    config = small_config(modality)
    detector, batch = build(config).eval(), random_batch(config)
    other = random_batch(config, seed=1)
    first = batch.point_batch == 0
    mixed = dataclasses.replace(
        batch,
        images=torch.stack((batch.images[0], other.images[1])),
        points=torch.cat((batch.points[first], other.points[~first])),
    )
    with torch.no_grad():
        a, b = detector(batch), detector(mixed)
    for (name, x), (_, y) in zip(named_stages(a), named_stages(b), strict=True):
        torch.testing.assert_close(x[0], y[0], msg=name)
        assert not torch.equal(x[1], y[1])


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("frames", [1, 2])
def test_no_points_and_no_boxes_are_finite_and_every_weight_learns(modality: str, frames: int) -> None:
    config = small_config(modality, frames)
    detector, batch = build(config), random_batch(config, points=0, boxes=0)
    features = detector(batch)
    losses = detector.loss(features, batch)
    assert set(losses) == {"heatmap", "box"} | ({"depth"} if modality != "lidar" else set())
    assert all(value.isfinite() and value.ndim == 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    assert len(detector.predict(features)) == 2


def test_two_entry_points_make_the_forward_pass() -> None:
    config = small_config("lidar")
    detector, batch = build(config).eval(), random_batch(config)
    with torch.no_grad():
        whole = detector(batch)
        stages = detector.decode_bev(detector.encode(batch).bev)
        neck, predictions = detector.decode_stages(stages)
    assert torch.equal(whole.neck, neck) and torch.equal(whole.predictions.heatmap, predictions.heatmap)


def test_lift_describes_the_key_frame() -> None:
    config = small_config("camera", 2)
    detector, batch = build(config).eval(), random_batch(config)
    with torch.no_grad():
        lift, depth = (features := detector(batch, keep_lift=True)).lift, features.depth[:, 0]
    assert detector(batch).lift is None
    by_pixel = depth.permute(0, 1, 3, 4, 2).flatten(0, 3)
    assert torch.equal(by_pixel[lift.pixel, lift.bin], lift.weight)
    assert int(lift.cell.max()) < 2 * config.grid.height * config.grid.width
    ones = torch.zeros(2 * config.grid.height * config.grid.width).index_add(0, lift.cell, lift.weight)
    reached = features.camera_bev[:, 0].abs().sum(1).flatten() > 0
    assert torch.equal(reached, ones > 0)


@pytest.mark.parametrize("past_gradient", [False, True])
def test_past_frames_learn_only_on_request(past_gradient: bool) -> None:
    config = small_config("camera", 2, past_gradient=past_gradient)
    detector, batch = build(config), random_batch(config)
    features = detector(batch)
    past = features.camera_bev[:, 1]
    assert past.requires_grad  # the stack does, the past part of it only by option
    detector.zero_grad()
    past.square().sum().backward()
    reached = [
        p.grad is not None and bool(p.grad.abs().sum() > 0) for p in detector.camera.depth_net.context.parameters()
    ]
    assert all(reached) == past_gradient


def test_missing_inputs_are_named() -> None:
    config = small_config("camera")
    detector, batch = build(config), random_batch(config)
    with pytest.raises(ValueError, match="N = 0"):
        detector(dataclasses.replace(batch, images=batch.images[:, :, :0]))
    with pytest.raises(ValueError, match="image_size"):
        detector(dataclasses.replace(batch, images=batch.images[..., :32]))
    with pytest.raises(ValueError, match="frames"):
        build(small_config("camera", 2))(batch)
    with pytest.raises(ValueError, match="depth_supervision"):
        detector.loss(detector(batch), dataclasses.replace(batch, depth=None))
    features = detector.encode(batch)
    for call in (lambda: detector.loss(features, batch), lambda: detector.predict(features)):
        with pytest.raises(ValueError, match="no predictions"):
            call()


def test_wrong_configs_are_named() -> None:
    for change, name in (
        ({"image_size": (30, 64)}, "image_size"),
        ({"backbone": "no_such_net"}, "backbone"),
        ({"stride": 3, "image_size": (33, 66)}, "stride"),
    ):
        with pytest.raises(ValueError, match=name if name != "stride" else "CameraConfig"):
            build_detector(small_config("camera", **change))
    config = small_config("lidar")
    with pytest.raises(ValueError, match="stages"):
        build_detector(dataclasses.replace(config, bev=dataclasses.replace(config.bev, blocks=(1,))))


def test_missing_pretrained_weights_name_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> object:
        if pretrained:
            raise OSError("no route to host")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    config = small_config("camera", pretrained=True)
    with pytest.raises(RuntimeError, match="pretrained to false"):
        build_detector(config)
    build_detector(config, load_pretrained=False)


def test_the_first_stage_that_is_not_finite_is_named() -> None:
    config = small_config("camera")
    detector, batch = build(config).eval(), random_batch(config)
    assert first_nonfinite(detector(batch)) is None
    with torch.no_grad():
        detector.encoder.stages[1][0].first[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"stages\[1\]"):
        detector.predict(detector(batch))


@pytest.mark.parametrize("modality", MODALITIES)
def test_bfloat16_and_channels_last_stay_close(modality: str) -> None:
    config = small_config(modality, 2)
    detector, batch = build(config).eval(), random_batch(config)
    with torch.no_grad():
        full = detector(batch)
        detector.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            half = detector(batch)
            losses = detector.loss(half, batch)
    assert all(v.dtype == torch.float32 for v in losses.values())
    assert half.predictions.heatmap.dtype == torch.float32
    for (name, a), (_, b) in zip(named_stages(full), named_stages(half), strict=True):
        error = (a - b.float()).norm() / a.norm().clamp(min=1e-6)
        assert error < 0.05, (name, float(error))


def test_depth_loss_counts_only_known_pixels_in_range() -> None:
    bins = (1.0, 5.0, 1.0)
    target = torch.tensor([0.0, 1.0, 4.99, 5.0, 0.5, 2.5]).view(1, 1, 2, 3)
    depth = torch.full((1, 1, 4, 2, 3), 1e-6)
    for place, at in (((0, 1), 0), ((0, 2), 3), ((1, 2), 1)):
        depth[0, 0, at, place[0], place[1]] = 1 - 3e-6
    assert float(depth_loss(depth, target, bins)) < 1e-4
    even = torch.full((1, 1, 4, 2, 3), 0.25)
    want = -(torch.tensor(0.25).log() + 3 * torch.tensor(0.75).log())
    torch.testing.assert_close(depth_loss(even, target, bins), want)
    assert float(depth_loss(even, torch.zeros_like(target), bins)) == 0.0
    with pytest.raises(ValueError, match="depth targets"):
        depth_loss(even, target[:, :, :1], bins)


def test_camera_entries_do_not_know_the_picture_scale() -> None:
    config = small_config()
    batch = random_batch(config)
    intrinsic, extrinsic = batch.image_from_camera[0, 0], batch.frame_from_camera[0, 0]
    twice = torch.diag(torch.tensor([2.0, 2.0, 1.0])) @ intrinsic
    torch.testing.assert_close(
        camera_entries(twice, extrinsic, (64, 128)), camera_entries(intrinsic, extrinsic, (32, 64))
    )


@pytest.mark.parametrize("modality", ["lidar", "camera"])
def test_training_on_one_sample_lowers_the_loss(modality: str) -> None:
    config = small_config(modality)
    detector, batch = build(config), random_batch(config)
    optimiser = torch.optim.AdamW(detector.parameters(), 3e-3)
    totals = []
    for _ in range(8):
        total = sum(detector.loss(detector(batch), batch).values())
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.7 * totals[0]
