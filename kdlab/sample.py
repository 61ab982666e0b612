"""The typed values that flow through kdlab: boxes, samples, batches, features, predictions.

Letters in shapes: B batch, T frames (key first), N cameras, D depth bins, C channels, H W rows and columns, M boxes,
P points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlab.geometry import BEVGrid

CLASSES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)
"""The ten nuScenes detection classes, in the order of every label and class channel."""

TASKS = ((0,), (1, 2), (3, 4), (5,), (6, 7), (8, 9))
"""CenterPoint's six tasks as class indices; concatenated they are in class order."""

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
"""The six cameras, clockwise from the front: the order of every N axis."""

ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.standing",
    "pedestrian.sitting_lying_down",
)
"""The nuScenes attributes; index -1 stands for none."""

T_ = TypeVar("T_")


def to_device(value: T_, device: torch.device | str, non_blocking: bool = True) -> T_:
    """A copy of a dataclass, tuple, list, dictionary or tensor with every tensor in it moved to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)  # type: ignore[return-value]
    if isinstance(value, tuple | list):
        return type(value)(to_device(v, device, non_blocking) for v in value)
    if isinstance(value, dict):
        return {k: to_device(v, device, non_blocking) for k, v in value.items()}  # type: ignore[return-value]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, BEVGrid):
        names = [f.name for f in fields(value)]  # type: ignore[arg-type]
        moved = {name: to_device(getattr(value, name), device, non_blocking) for name in names}
        return replace(value, **moved)  # type: ignore[type-var]
    return value


@dataclass
class Boxes3D:
    """Annotated boxes of one sample ([M, ...]) or of a padded batch ([B, M, ...]).

    Attributes:
        values: float32 [..., M, 9]: x, y, z, l, w, h, yaw, vx, vy. An unknown velocity is NaN in a Sample, see
            ``velocity_known``.
        labels: int64 [..., M]: index into CLASSES; 0 in padding.
        valid: bool [..., M]: False in padding.
        points: int64 [..., M]: LiDAR points in the box, from the tables; 0 in padding.
        visibility: int64 [..., M]: nuScenes visibility level 1..4, 0 where not given.
        attributes: int64 [..., M]: index into ATTRIBUTES, -1 for none.
    """

    values: Tensor
    labels: Tensor
    valid: Tensor
    points: Tensor
    visibility: Tensor
    attributes: Tensor

    @classmethod
    def make(cls, values: Tensor, labels: Tensor, valid: Tensor | None = None) -> Boxes3D:
        """Boxes from values [..., M, 9] and labels [..., M]; the rest is filled in as unknown.

        Raises:
            ValueError: the shapes do not fit.
        """
        if values.shape[-1] != 9 or values.shape[:-1] != labels.shape:
            raise ValueError(
                f"Boxes3D: values {tuple(values.shape)} must be [..., M, 9] beside labels {tuple(labels.shape)}"
            )
        zeros = torch.zeros_like(labels)
        valid = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
        return cls(values, labels, valid, zeros, zeros.clone(), zeros - 1)

    @classmethod
    def empty(cls) -> Boxes3D:
        """No boxes: M = 0."""
        return cls.make(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long))

    def __len__(self) -> int:
        return self.values.shape[-2]

    def __getitem__(self, index: Tensor | slice | int) -> Boxes3D:
        """The boxes that a mask, slice or index picks along the first axis (M of a sample, B of a batch)."""
        return Boxes3D(*(getattr(self, f.name)[index] for f in fields(self)))

    def keep(self, mask: Tensor) -> Boxes3D:
        """The valid boxes that a mask [..., M] picks, moved to the front in order and padded to the largest number."""
        kept = mask & self.valid
        order = (~kept).long().argsort(stable=True, dim=-1)[..., : int(kept.sum(-1).max())]
        kept = kept.gather(-1, order)
        moved = {}
        for f in fields(self):
            rows: Tensor = getattr(self, f.name)
            if rows.ndim > order.ndim:
                moved[f.name] = rows.gather(-2, order[..., None].expand(*order.shape, rows.shape[-1]))
                moved[f.name] = moved[f.name].where(kept[..., None], moved[f.name].new_zeros(()))
            else:
                fill = -1 if f.name == "attributes" else 0
                moved[f.name] = rows.gather(-1, order).where(kept, rows.new_full((), fill))
        return Boxes3D(**moved)

    @property
    def velocity_known(self) -> Tensor:
        """Bool [..., M]: the velocity is a number."""
        return self.values[..., 7:9].isfinite().all(-1)

    @staticmethod
    def pad(samples: Iterable[Boxes3D]) -> Boxes3D:
        """Batch [B, M, ...] of samples, padded at the end to the largest M (0 where every sample is empty)."""
        items = list(samples)
        most = max(len(s) for s in items)
        padded = []
        for f in fields(Boxes3D):
            rows = [getattr(s, f.name) for s in items]
            fill = -1 if f.name == "attributes" else 0
            trailing = [0, 0] if f.name == "values" else []
            padded.append(torch.stack([F.pad(r, (*trailing, 0, most - len(r)), value=fill) for r in rows]))
        return Boxes3D(*padded)


@dataclass
class Sample:
    """One keyframe and its past frames.

    Attributes:
        token: nuScenes sample token.
        scene: scene name.
        timestamp: of the key LiDAR sweep, seconds.
        images: uint8 [T, N, 3, H, W], RGB; N = 0 where images were not asked for.
        image_from_camera: float32 [T, N, 3, 3]: intrinsics with the image augmentation multiplied in.
        frame_from_camera: float32 [T, N, 4, 4]: camera to the ego frame of frame t (at its LiDAR timestamp), by the
            camera's own ego pose.
        key_from_frame: float32 [T, 4, 4]: ego frame of frame t to that of the key frame; [0] is the identity.
        frame_times: float32 [T]: seconds before the key frame, 0 first.
        points: float32 [P, 5]: x, y, z (key ego frame, metres), intensity (0..1), time lag (seconds before the key,
            >= 0; 0 is the key sweep).
        boxes: annotations in the key ego frame.
        global_from_key: float64 [4, 4]: key ego frame to the map.
        bev_augmentation: float32 [4, 4]: similarity that BEV augmentation applied to the key frame (identity where
            none); points, boxes, frame_from_camera and key_from_frame already hold it, global_from_key does not.
        lidar_origin: float32 [3]: the LiDAR's place in the key ego frame (augmented with the points).
        draw: which random version of the sample this is.
    """

    token: str
    scene: str
    timestamp: float
    images: Tensor
    image_from_camera: Tensor
    frame_from_camera: Tensor
    key_from_frame: Tensor
    frame_times: Tensor
    points: Tensor
    boxes: Boxes3D
    global_from_key: Tensor
    bev_augmentation: Tensor
    lidar_origin: Tensor
    draw: int = 0


@dataclass
class Batch:
    """Collated samples.

    Attributes:
        tokens: B sample tokens.
        images: uint8 [B, T, N, 3, H, W].
        image_from_camera: float32 [B, T, N, 3, 3].
        frame_from_camera: float32 [B, T, N, 4, 4].
        key_from_frame: float32 [B, T, 4, 4].
        points: float32 [P, 5], the clouds of all samples one after another; P = 0 where points were dropped.
        point_batch: int64 [P]: which sample each point belongs to, rising.
        depth: float32 [B, N, h, w]: depth targets of the key frame at the feature stride, metres, 0 where no point
            fell; None where not asked for.
        boxes: padded annotations [B, M, ...]; velocities that are unknown stay NaN.
        global_from_key: float64 [B, 4, 4].
        bev_augmentation: float32 [B, 4, 4].
        draws: which random version each sample is.
        stored: tensors of frozen networks that were read instead of made, by path, such as ``teacher.bev``.
    """

    tokens: list[str]
    images: Tensor
    image_from_camera: Tensor
    frame_from_camera: Tensor
    key_from_frame: Tensor
    points: Tensor
    point_batch: Tensor
    depth: Tensor | None
    boxes: Boxes3D
    global_from_key: Tensor
    bev_augmentation: Tensor
    draws: list[int] = field(default_factory=list)
    stored: dict[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """B."""
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return to_device(self, device)

    def pin_memory(self) -> Batch:
        """A copy where a GPU fetches it faster; what a DataLoader with ``pin_memory`` calls."""

        def pinned(value: object) -> object:
            if isinstance(value, Boxes3D):
                return Boxes3D(*(getattr(value, f.name).pin_memory() for f in fields(value)))
            if isinstance(value, dict):
                return {k: v.pin_memory() for k, v in value.items()}
            return value.pin_memory() if isinstance(value, Tensor) else value

        return replace(self, **{f.name: pinned(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    def images_only(self) -> Batch:
        """The batch as a camera detector may see it at test time: no points, no depth, no boxes."""
        boxes = Boxes3D.pad([Boxes3D.empty()] * self.size)
        return replace(
            self,
            points=self.points[:0],
            point_batch=self.point_batch[:0],
            depth=None,
            boxes=to_device(boxes, self.images.device),
            stored={},
        )


@dataclass
class TaskPrediction:
    """Raw output of one task of the centre head, each [B, k, H, W].

    Attributes:
        heatmap: class logits, k = classes of the task.
        reg: 2, offset (x, y) of the centre from its cell's lower corner, in cells.
        height: 1, z of the centre, metres.
        dim: 3, ln l, ln w, ln h.
        rot: 2, sin yaw, cos yaw.
        vel: 2, vx, vy in m/s.
    """

    heatmap: Tensor
    reg: Tensor
    height: Tensor
    dim: Tensor
    rot: Tensor
    vel: Tensor

    def regression(self) -> Tensor:
        """[B, 10, H, W]: reg, height, dim, rot, vel."""
        return torch.cat((self.reg, self.height, self.dim, self.rot, self.vel), 1)


@dataclass
class Predictions:
    """Raw output of the centre head, all tasks in the order of TASKS; its joined maps are made once."""

    tasks: tuple[TaskPrediction, ...]

    @classmethod
    def of_maps(cls, heatmap: Tensor, regression: Tensor) -> Predictions:
        """The predictions whose joined maps are these."""
        maps = zip(heatmap.split([len(task) for task in TASKS], 1), regression.chunk(len(TASKS), 1), strict=True)
        return cls(tuple(TaskPrediction(heat, *boxes.split((2, 1, 3, 2, 2), 1)) for heat, boxes in maps))

    @property
    def heatmap(self) -> Tensor:
        """Class logits [B, 10, H, W] in class order."""
        return self._joined("_heatmap", lambda: [t.heatmap for t in self.tasks])

    @property
    def regression(self) -> Tensor:
        """Regression maps [B, 10 x tasks, H, W], task after task."""
        return self._joined("_regression", lambda: [t.regression() for t in self.tasks])

    def _joined(self, name: str, parts: Callable[[], list[Tensor]]) -> Tensor:
        kept: Tensor | None = self.__dict__.get(name)
        if kept is not None:
            return kept
        joined = torch.cat(parts(), 1)
        # What was joined while gradients were off is cut from the tasks' graph: a loss must not find it later.
        if joined.requires_grad or not any(getattr(t, f.name).requires_grad for t in self.tasks for f in fields(t)):
            self.__dict__[name] = joined
        return joined


@dataclass
class Lift:
    """How camera pixels reached BEV cells in the last lift of the key frame, for drawing a cell's pixels.

    Attributes:
        cell: int64 [K]: flat index b * H * W + row * W + column of each contribution.
        pixel: int64 [K]: flat index into [B, N, h, w] of the feature map.
        bin: int64 [K]: depth bin of each contribution.
        weight: float32 [K]: depth probability that the contribution carried.
    """

    cell: Tensor
    pixel: Tensor
    bin: Tensor
    weight: Tensor


@dataclass
class Features:
    """Every named stage of a detector's forward pass; None where the detector has no such stage.

    Attributes:
        image: [B, T, N, C, h, w] image neck output.
        depth: [B, T, N, D, h, w] depth probabilities (sum 1 over D).
        camera_bev: [B, T, C, H, W] camera BEV of each frame, in that frame's own ego frame.
        camera_bev_aligned: [B, T, C, H, W] the same, warped to the key frame.
        lidar_bev: [B, C, H, W] LiDAR (real or simulated) BEV.
        bev: [B, C, H, W] input of the BEV encoder, after fusion and temporal alignment.
        stages: outputs of the BEV encoder's stages, finest first.
        neck: [B, C, H, W] output of the BEV neck, what the head sees.
        predictions: output of the head.
        lift: kept on request only.
    """

    bev: Tensor
    image: Tensor | None = None
    depth: Tensor | None = None
    camera_bev: Tensor | None = None
    camera_bev_aligned: Tensor | None = None
    lidar_bev: Tensor | None = None
    stages: tuple[Tensor, ...] = ()
    neck: Tensor | None = None
    predictions: Predictions | None = None
    lift: Lift | None = None


@dataclass
class Detections:
    """Final boxes of one sample, best first.

    Attributes:
        values: float32 [M, 9] in the key ego frame.
        labels: int64 [M].
        scores: float32 [M].
    """

    values: Tensor
    labels: Tensor
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __len__(self) -> int:
        return len(self.scores)
