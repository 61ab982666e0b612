"""SimDistill's settings (AAAI 2024): BEVFusion and a student of images that simulates it, on a grid of 0.6 m."""

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


def paper_simdistill(modality: Modality, root: str = "data/nuscenes") -> RunConfig:
    """The student of cameras, with simulated LiDAR; the teacher of both sensors; its LiDAR part alone."""
    detector = DetectorConfig(
        modality=modality,
        grid=BEVGrid.square(54.0, 0.6),
        z=(-3.16, 4.84),
        camera=CameraConfig(
            backbone="swin_tiny_patch4_window7_224",
            pretrained=True,
            image_size=(256, 704),
            stride=8,
            deepest=32,
            channels=256,
            context=80,
            depth=(1.0, 60.0, 0.5),
            depth_supervision=False,
            depth_blocks=1,
            bev_blocks=1,
            simulated_lidar=modality == "camera",
        ),
        lidar=LidarConfig(channels=256, finer=(64, 128), layers=2, sweeps=10),
        bev=BEVConfig(channels=256, stages=(128, 256, 512), blocks=(2, 2, 2), first_stride=2, neck=256),
        head=HeadConfig(branch=64, score_threshold=0.1, local_max=1, nms="rotated", max_detections=500),
    )
    augment = AugmentConfig(resize=resized(0.38, 0.55))
    train = TrainConfig(epochs=20, batch_size=48, lr=1e-3, warm_up=0.4, grad_clip=35.0, precision="bf16")
    return RunConfig(detector, on_nuscenes(root, augment, cbgs=True), train)


SIMDISTILL = Paper(
    title="SimDistill (AAAI 2024)",
    method="simdistill",
    code="ViTAE-Transformer/SimDistill, commit 2d0d5eb; CFG = configs/nuscenes/det/centerhead/lssfpn, MB = "
    "mmdet3d/models/fusion_models/bevfusion.py, MH = mmdet3d/models/heads/bbox/centerpoint.py, MV = vtransforms",
    sources={
        "detector.grid": "CFG/camera/256x704/swint/default.yaml:1-2, cells of 8 voxels",
        "detector.z": "CFG/camera/256x704/swint/default.yaml:1-2, [-5, 3] m of the LiDAR's frame, 1.84 m up",
        "detector.fuser": "MB, a convolution",
        "detector.camera.backbone": "CFG/camera/256x704/swint",
        "detector.camera.pretrained": "CFG/camera/256x704/swint, nuImages there",
        "detector.camera.image_size": "CFG/camera/256x704",
        "detector.camera.stride": "CFG/camera/256x704/swint, finest level of its neck",
        "detector.camera.deepest": "CFG/camera/256x704/swint",
        "detector.camera.channels": "CFG/camera/256x704/swint",
        "detector.camera.context": "MV/depth_lss.py",
        "detector.camera.depth": "MV/depth_lss.py, 118 bins",
        "detector.camera.depth_supervision": "CFG, off in every one",
        "detector.camera.bev_blocks": "MV/depth_lss.py, convolutions behind the lift",
        "detector.camera.simulated_lidar": "MB:348-362, 675-681",
        "detector.lidar.channels": "MB, 128 x 2",
        "detector.lidar.finer": "kdlab's, in place of sparse voxels",
        "detector.lidar.layers": "kdlab's, in place of sparse voxels",
        "detector.lidar.sweeps": "10 sweeps, BEVFusion's",
        "detector.bev.channels": "CFG/camera/256x704/swint/default.yaml, ConvFuser",
        "detector.bev.stages": "CFG/camera/256x704/swint/default.yaml:58-71",
        "detector.bev.blocks": "CFG/camera/256x704/swint/default.yaml:58-71",
        "detector.bev.first_stride": "CFG/camera/256x704/swint/default.yaml:58-71",
        "detector.bev.neck": "CFG/camera/256x704/swint/default.yaml:58-71",
        "detector.head.branch": "MH",
        "detector.head.score_threshold": "CFG/default.yaml",
        "detector.head.local_max": "CFG/default.yaml, best cells without a search for peaks",
        "detector.head.nms": "CFG/default.yaml, circles for cars and barriers there",
        "detector.head.max_detections": "CFG/default.yaml, 83 a task there",
        "data.version": "nuScenes",
        "data.train": "nuScenes",
        "data.val": "nuScenes",
        "data.cbgs": "the repository's configs",
        "data.images": "BEVFusion's pipeline, resized by Pillow",
        "data.augment.resize": "the repository's configs, 0.38 to 0.55 of 900 x 1600",
        "data.augment.image_rotate": "the repository's configs",
        "data.augment.bev_rotate": "the repository's configs",
        "data.augment.bev_scale": "the repository's configs",
        "train.epochs": "the repository's configs",
        "train.batch_size": "README, 3 on each of 8 GPUs, two accumulated",
        "train.lr": "CFG/camera/256x704/swint, the peak of 5 x 2e-4",
        "train.schedule": "CFG/camera/256x704/swint, cyclic",
        "train.warm_up": "CFG/camera/256x704/swint, 0.4",
        "train.weight_decay": "the repository's configs",
        "train.grad_clip": "the repository's configs",
        "train.precision": "fp16 in the released code",
    },
    deviations=(
        (
            "the student sees images only; its lift reads no LiDAR depth",
            "what the paper says; camera.lidar_depth has the other",
        ),
        ("the teacher's lift reads images only, and has no geometry compensation", "kdlab's fusion detector"),
        ("the lift goes to the grid at once, not to cells half as wide first", "one lift for all papers"),
        (
            "the lift keeps points between -3.16 and 4.84 m, the detector's range, not between -10 and 10 m",
            "one range of heights for both sensors",
        ),
        ("the camera's map passes a 1x1 convolution (80 to 256) before the fuser", "kdlab's temporal mix of one frame"),
        ("the BEV encoder's third stage has stride 8, not 4", "each of kdlab's stages halves the map"),
        TEST_SCALE,
        (
            "the depth net knows the camera, and has one 3x3 convolution and a residual block",
            "one depth net for all papers",
        ),
        ("a sum of levels in the image neck, not two-step concatenation", "kdlab's neck"),
        (
            "a one-cycle from a tenth of the peak to a thousandth, not from a fifth to 1e-5; momentum stays",
            "kdlab's schedule",
        ),
        (
            "backbones start from ImageNet; in the released code the teacher's from nuImages, the student's at random",
            "what timm has; and what the student's file was meant for",
        ),
        ("the heat map's bias starts at -2.19", "the released code never calls the routine that would set it"),
        ("the backbone drops paths at rates up to 0.1, not 0.2", "timm's backbones as they are"),
        (
            "the backbone's tables of relative positions decay with the other weights",
            "kdlab's rule: what is no vector decays",
        ),
        ("the teacher is trained by the student's recipe", "the released checkpoint has another head"),
    ),
)
"""Where these settings come from."""
