"""UniDistill's settings (CVPR 2023): BEVDet, a LiDAR detector and their fusion on one grid of 0.6 m."""

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


def paper_unidistill(modality: Modality, root: str = "data/nuscenes") -> RunConfig:
    """Teacher and student of any sensors: all are built alike, so that every pair of tensors has one shape."""
    detector = DetectorConfig(
        modality=modality,
        grid=BEVGrid.square(54.0, 0.6),
        z=(-3.16, 4.84),
        fuser="gated",
        camera=CameraConfig(
            backbone="resnet50",
            pretrained=True,
            image_size=(256, 704),
            stride=16,
            deepest=32,
            neck="concatenation",
            channels=512,
            context=256,
            depth=(2.0, 58.0, 0.5),
            depth_supervision=False,
            depth_blocks=0,
        ),
        lidar=LidarConfig(channels=256, finer=(64, 128), layers=2, sweeps=11),
        bev=BEVConfig(channels=256, stages=(128, 256), blocks=(3, 3), neck=512),
        head=HeadConfig(branch=64, score_threshold=0.1, local_max=1, nms="rotated", nms_iou=0.1, max_detections=500),
    )
    augment = AugmentConfig(resize=resized(0.386, 0.55), bev_rotate=45.0, bev_scale=(0.9, 1.1))
    train = TrainConfig(
        epochs=20,
        batch_size=20,
        lr=2e-4 if modality == "camera" else 1e-3,
        schedule="steps",
        warm_up=0.0,
        milestones=(10, 15),
        weight_decay=1e-7,
        grad_clip=0.1,
        precision="fp32",
    )
    return RunConfig(detector, on_nuscenes(root, augment, cbgs=True), train)


UNIDISTILL = Paper(
    title="UniDistill (CVPR 2023)",
    method="unidistill",
    code="megvii-research/CVPR2023-UniDistill, commit 32f02b4; CFG = base_nuscenes_cfg.py, BASE = "
    "BEVFusion_nuscenes_base_exp.py, FUS = ..._centerhead_fusion_exp.py, L2C = ..._camera_exp_distill_lidar.py, LSS = "
    "layers/blocks_3d/mmdet3d/lss_fpn.py, DATA = nuscenes_multimodal.py, TF = transforms3d.py",
    sources={
        "detector.grid": "CFG:1-5, cells of 8 voxels",
        "detector.z": "CFG:1, [-5, 3] m of the LiDAR's frame, 1.84 m above the ground",
        "detector.fuser": "BASE:107-135",
        "detector.camera.backbone": "FUS:24-31",
        "detector.camera.pretrained": "FUS:24-31",
        "detector.camera.image_size": "CFG:4",
        "detector.camera.stride": "FUS:34-39",
        "detector.camera.deepest": "FUS:24-31",
        "detector.camera.neck": "FUS:34-39",
        "detector.camera.channels": "FUS:34-39, 4 x 128",
        "detector.camera.context": "LSS:161-171",
        "detector.camera.depth": "CFG:133, LSS:178-182, 112 bins",
        "detector.camera.depth_supervision": "LSS, none",
        "detector.camera.depth_blocks": "LSS:161-171",
        "detector.lidar.channels": "layers/blocks_3d/det3d/spconv_backbone.py:252, 128 x 2",
        "detector.lidar.finer": "kdlab's, in place of sparse voxels",
        "detector.lidar.layers": "kdlab's, in place of sparse voxels",
        "detector.lidar.sweeps": "DATA, key and 10 sweeps",
        "detector.bev.channels": "FUS:143-155",
        "detector.bev.stages": "CFG:166-174",
        "detector.bev.blocks": "CFG:166-174, six convolutions a stage",
        "detector.bev.neck": "FUS:152-155, 2 x 256",
        "detector.head.branch": "CFG:222-283",
        "detector.head.score_threshold": "CFG:239-255",
        "detector.head.local_max": "CFG:239-255, best cells without a search for peaks",
        "detector.head.nms": "CFG:239-255",
        "detector.head.nms_iou": "CFG:239-255",
        "detector.head.max_detections": "CFG:239-255, 100 a task there",
        "data.version": "nuScenes",
        "data.train": "nuScenes",
        "data.val": "nuScenes",
        "data.cbgs": "CFG:101, DATA:142-177",
        "data.images": "TF:298-347, resized by Pillow",
        "data.augment.resize": "CFG:31-39, 0.386 to 0.55 of 900 x 1600",
        "data.augment.image_rotate": "CFG:31-39",
        "data.augment.bev_rotate": "CFG:42-48",
        "data.augment.bev_scale": "CFG:42-48",
        "train.epochs": "README of the released code",
        "train.batch_size": "the paper, second-hand; its code has 4 a device",
        "train.lr": "camera L2C 2e-4; others BASE:286 1e-3, where the paper has 1e-4, second-hand",
        "train.schedule": "BASE:440",
        "train.warm_up": "BASE:440, none",
        "train.milestones": "BASE:440",
        "train.weight_decay": "BASE:436-441",
        "train.grad_clip": "exps/base_cli.py:40-45",
        "train.precision": "fp32",
    },
    deviations=(
        ("heat maps and losses of centres; no IoU branch", "one head for all papers, so that terms compare"),
        ("the depth net knows the camera and has a 3x3 convolution before the 1x1", "one depth net for all papers"),
        ("the BEV encoder's convolutions stand in residual blocks", "kdlab's blocks"),
        ("the camera's map passes a 1x1 convolution and ReLU before it is compared", "a lift's width is free in kdlab"),
        ("images are RGB", "the released code swaps the colours once too often (TF:361-366)"),
        ("no random translation of the BEV", "kdlab's augmentation has none"),
    ),
)
"""Where these settings come from."""
