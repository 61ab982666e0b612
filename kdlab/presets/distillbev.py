"""DistillBEV's settings (ICCV 2023): BEVDepth4D from CenterPoint with pillars, on a grid of 0.8 m."""

from __future__ import annotations

from kdlab.config import (
    AugmentConfig,
    BEVConfig,
    CameraConfig,
    DetectorConfig,
    HeadConfig,
    LidarConfig,
    Modality,
    RunConfig,
    TrainConfig,
)
from kdlab.geometry import BEVGrid
from kdlab.presets.paper import TEST_SCALE, Paper, on_nuscenes, resized

STEPS = 24 * 123_580 // 64
"""Of the student's training: CBGS makes 123,580 samples of the training split."""


def paper_distillbev(modality: Modality, root: str = "data/nuscenes") -> RunConfig:
    """The student of cameras (BEVDepth4D, two frames); the teacher of LiDAR, or of both sensors in place of MVP."""
    student = modality == "camera"
    detector = DetectorConfig(
        modality=modality,
        grid=BEVGrid.square(51.2, 0.8),
        z=(-3.16, 4.84),
        camera=CameraConfig(
            backbone="resnet50",
            pretrained=True,
            image_size=(256, 704),
            stride=16,
            deepest=32,
            channels=512,
            depth_channels=256,
            context=64,
            depth=(1.0, 60.0, 1.0),
            depth_blocks=3,
            bev_blocks=2,
            frames=2 if student else 1,
        ),
        lidar=LidarConfig(channels=128, finer=(64, 64), layers=2, sweeps=10),
        bev=BEVConfig(channels=128, stages=(128, 256, 512), blocks=(2, 2, 2), first_stride=2, neck=256)
        if student
        else BEVConfig(channels=128, stages=(128, 256), blocks=(3, 3), neck=384),
        head=HeadConfig(branch=64, score_threshold=0.1, local_max=1, nms="rotated", max_detections=500),
    )
    augment = AugmentConfig(resize=resized(0.38, 0.55))
    if student:
        train = TrainConfig(
            epochs=24,
            batch_size=64,
            lr=2e-4,
            schedule="steps",
            warm_up=500 / STEPS,
            milestones=(16, 22),
            precision="fp32",
        )
    else:
        train = TrainConfig(epochs=20, batch_size=64, lr=1e-3, warm_up=0.4, grad_clip=35.0, precision="fp32")
    return RunConfig(detector, on_nuscenes(root, augment, cbgs=True), train)


DISTILLBEV = Paper(
    title="DistillBEV (ICCV 2023)",
    method="distillbev",
    code="qcraftai/distill-bev, commit 3e8f6a4; CFG4D = centerpoint_..._to_bevdepth4d_r50.py, SH = "
    "scripts/teacher_to_bevdepth4d/centerpoint2bevdepth.sh, CP = configs/dynamic_centerpoint and "
    "_base_/models/centerpoint_02pillar_second_secfpn_nus.py",
    sources={
        "detector.grid": "CFG4D:94-160",
        "detector.z": "CFG4D, [-5, 3] m of the LiDAR's frame, 1.84 m above the ground",
        "detector.camera.backbone": "CFG4D:94-160",
        "detector.camera.pretrained": "CFG4D:94-160",
        "detector.camera.image_size": "CFG4D:94-160",
        "detector.camera.stride": "CFG4D:94-160",
        "detector.camera.deepest": "CFG4D:94-160, stages 3 and 4",
        "detector.camera.channels": "CFG4D:94-160",
        "detector.camera.depth_channels": "CFG4D:94-160",
        "detector.camera.context": "CFG4D:94-160",
        "detector.camera.depth": "CFG4D:94-160, 59 bins",
        "detector.camera.depth_blocks": "CFG4D:94-160",
        "detector.camera.bev_blocks": "CFG4D:94-160, before alignment",
        "detector.camera.frames": "CFG4D; past frames detached, bevdet_distill_more.py",
        "detector.lidar.channels": "CP, SECOND's second stage",
        "detector.lidar.finer": "CP, canvas of 0.2 m and SECOND's first stage",
        "detector.lidar.layers": "kdlab's",
        "detector.lidar.sweeps": "CP, key and 9 sweeps",
        "detector.bev.channels": "CFG4D:94-160, 2 x 64 (camera); CP (teacher)",
        "detector.bev.stages": "CFG4D:94-160, B0 to B2 (camera); CP, the teacher's side of B1 and B2",
        "detector.bev.blocks": "CFG4D:94-160 (camera); CP, six convolutions a stage (teacher)",
        "detector.bev.first_stride": "CFG4D:94-160 (camera); CP, stride 4 of its canvas (teacher)",
        "detector.bev.neck": "CFG4D:94-160 (camera); CP, 3 x 128 (teacher)",
        "detector.head.branch": "CFG4D:94-160, CP",
        "detector.head.score_threshold": "CFG4D",
        "detector.head.local_max": "CFG4D, best cells without a search for peaks",
        "detector.head.nms": "CFG4D",
        "detector.head.max_detections": "CFG4D",
        "data.version": "nuScenes",
        "data.train": "nuScenes",
        "data.val": "nuScenes",
        "data.cbgs": "CFG4D, CP",
        "data.images": "BEVDet's pipeline",
        "data.augment.resize": "CFG4D, 704 / 1600 - 0.06 to + 0.11",
        "data.augment.image_rotate": "CFG4D",
        "data.augment.bev_rotate": "CFG4D, CP",
        "data.augment.bev_scale": "CFG4D, CP",
        "train.epochs": "CFG4D (camera), CP (teacher)",
        "train.batch_size": "SH, 8 on each of 8 GPUs; the teacher's is not known",
        "train.lr": "CFG4D (camera); CP, the peak of 10 x 1e-4 (teacher)",
        "train.schedule": "CFG4D, steps (camera); CP, cyclic (teacher)",
        "train.warm_up": "CFG4D, 500 steps (camera); CP, 0.4 (teacher)",
        "train.milestones": "CFG4D",
        "train.weight_decay": "CFG4D, CP",
        "train.grad_clip": "SH (camera), CP (teacher)",
        "train.precision": "fp32",
    },
    deviations=(
        ("no deformable convolution in the depth net", "it needs a compiled operator, or a slow one"),
        (
            "depth loss: cross entropy of softmax bins at pixels with a point, weight 3 (BEVDepth), not 100 x that of "
            "sigmoid bins over all",
            "one depth loss for all papers",
        ),
        (
            "the lift keeps points between -3.16 and 4.84 m, the detector's range, not between -10 and 10 m",
            "one range of heights for both sensors",
        ),
        (
            "a 3x3 convolution (128 to 128) mixes the frames before the BEV encoder, and feeds its first stage",
            "kdlab's temporal mix",
        ),
        (
            "the teacher's one-cycle starts at a tenth of the peak and ends at a thousandth; its momentum stays",
            "kdlab's schedule",
        ),
        ("past frames are the keyframe before, not drawn at random", "kdlab's frames are keyframes"),
        ("velocities in m/s, not displacements between frames", "one unit on both sides of the copied task heads"),
        ("the neck takes all three stages by 1x1 convolutions, not the first and the last", "kdlab's neck"),
        (
            "the teacher's neck takes the two coarser of CenterPoint's three stages",
            "the finer ones stand in its pillars",
        ),
        ("a fusion teacher stands for MVP", "virtual points come from another project"),
        TEST_SCALE,
        (
            "the context, too, passes a gate of the camera and a 3x3 convolution, not a 1x1 convolution alone",
            "one depth net for all papers",
        ),
        ("no pasted objects in the teacher's training", "kdlab has no data base of objects"),
    ),
)
"""Where these settings come from."""
