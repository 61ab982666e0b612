"""LabelDistill's settings (ECCV 2024): BEVDepth with five frames, widened, from CenterPoint on a grid of 0.8 m."""

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
from kdlab.presets.paper import Paper, on_nuscenes, resized


def paper_labeldistill(modality: Modality, root: str = "data/nuscenes") -> RunConfig:
    """The student of cameras (key frame and four past ones); the teacher of LiDAR, or of both sensors."""
    student = modality == "camera"
    detector = DetectorConfig(
        modality=modality,
        grid=BEVGrid.square(51.2, 0.8),
        z=(-5.0, 3.0),
        camera=CameraConfig(
            backbone="resnet50",
            pretrained=True,
            image_size=(256, 704),
            stride=16,
            deepest=32,
            neck="concatenation",
            channels=512,
            context=150,
            depth=(2.0, 58.0, 0.5),
            depth_blocks=3,
            frames=5 if student else 1,
        ),
        lidar=LidarConfig(channels=256, finer=(64, 128), layers=2, sweeps=9),
        bev=BEVConfig(channels=150, stages=(150, 300, 600, 1200), blocks=(1, 2, 2, 2), neck=256)
        if student
        else BEVConfig(channels=256, stages=(128, 256), blocks=(3, 3), neck=512),
        head=HeadConfig(branch=64, velocity_weight=1.0 if student else 0.5, score_threshold=0.1, max_detections=500),
    )
    augment = AugmentConfig(resize=resized(0.386, 0.55))
    train = TrainConfig(
        epochs=30 if student else 20,
        batch_size=16,
        lr=4e-4 if student else 1e-4,
        camera_lr=0.5 if student else 1.0,
        schedule="steps",
        warm_up=0.0,
        milestones=(19, 23) if student else (16, 19),
        ema=0.999,
        precision="bf16",
    )
    return RunConfig(detector, on_nuscenes(root, augment, cbgs=False), train)


LABELDISTILL = Paper(
    title="LabelDistill (ECCV 2024)",
    method="labeldistill",
    code="sanmin0312/LabelDistill, commit 274ab26; 4KEY = LabelDistill_r50_128x128_e24_4key.py, TEACHER = "
    "centerpoint_vox01_128x128_20e_10sweeps.py, EXP = exps/nuscenes/base_exp.py, LSS = "
    "layers/backbones/base_lss_fpn.py",
    sources={
        "detector.grid": "4KEY",
        "detector.z": "4KEY, of the ego's frame",
        "detector.camera.backbone": "EXP:28-57",
        "detector.camera.pretrained": "EXP:28-57",
        "detector.camera.image_size": "EXP:28-57",
        "detector.camera.stride": "EXP:28-57",
        "detector.camera.deepest": "EXP:28-57",
        "detector.camera.neck": "EXP:28-57",
        "detector.camera.channels": "EXP:28-57, 4 x 128; the depth net is as wide",
        "detector.camera.context": "4KEY",
        "detector.camera.depth": "EXP:28-57, 112 bins",
        "detector.camera.depth_blocks": "LSS",
        "detector.camera.frames": "4KEY; past frames without gradient, LSS:602-610",
        "detector.lidar.channels": "4KEY:99-151, 2 heights of 128",
        "detector.lidar.finer": "kdlab's, in place of sparse voxels",
        "detector.lidar.layers": "kdlab's, in place of sparse voxels",
        "detector.lidar.sweeps": "datasets/nusc_det_dataset_lidar.py:376",
        "detector.bev.channels": "kdlab's, a frame's channels (camera); 4KEY:99-151 (teacher)",
        "detector.bev.stages": "4KEY, 300 / 600 / 1200 behind its input (camera); 4KEY:99-151 (teacher)",
        "detector.bev.blocks": "4KEY (camera); 4KEY:99-151, six convolutions a stage (teacher)",
        "detector.bev.neck": "4KEY, 4 x 64 (camera); 4KEY:99-151, 2 x 256 (teacher)",
        "detector.head.branch": "4KEY:99-151",
        "detector.head.velocity_weight": "4KEY:30-32 (camera); TEACHER (teacher)",
        "detector.head.score_threshold": "EXP",
        "detector.head.max_detections": "EXP",
        "data.version": "nuScenes",
        "data.train": "nuScenes",
        "data.val": "nuScenes",
        "data.images": "BEVDepth's pipeline, resized by Pillow",
        "data.augment.resize": "EXP, 0.386 to 0.55 of 900 x 1600",
        "data.augment.image_rotate": "EXP",
        "data.augment.bev_rotate": "EXP",
        "data.augment.bev_scale": "EXP",
        "train.epochs": "4KEY, last lines, although it is named e24 (camera); TEACHER (teacher)",
        "train.batch_size": "README, 4 on each of 4 GPUs",
        "train.lr": "4KEY:36-43, 301 (camera); TEACHER (teacher)",
        "train.camera_lr": "4KEY:36-43",
        "train.schedule": "4KEY:302; TEACHER",
        "train.warm_up": "none",
        "train.milestones": "4KEY:302; TEACHER",
        "train.weight_decay": "4KEY:36-43; TEACHER",
        "train.grad_clip": "exps/base_cli.py:36-45",
        "train.ema": "callbacks/ema.py:125-168",
        "train.precision": "fp16 in the released code",
    },
    deviations=(
        ("past frames lie half a second apart, not one", "kdlab's frames are keyframes one after another"),
        (
            "a 3x3 convolution mixes the frames' 750 channels to 150 before trunk and neck, which see all there",
            "kdlab's temporal mix",
        ),
        ("a residual block at full resolution before the trunk, whose stages are residual too", "kdlab's BEV encoder"),
        ("no ASPP, dropout and deformable convolution in the depth net", "one depth net for all papers"),
        ("the depth net knows each frame's own camera, not the key frame's", "each frame has its own poses"),
        ("sweeps of the past alone, not three of the future", "a teacher that could run on a car"),
        ("the heat map's bias starts at -2.19", "the released code never calls the routine that would set it"),
        ("the teacher starts from random weights", "kdlab's pillars have no released ones"),
        ("the moving average rises to its decay in the first steps and holds the student alone", "kdlab's average"),
    ),
)
"""Where these settings come from."""
