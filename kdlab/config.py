"""Typed configurations: what a preset returns, the CLI edits, a notebook holds and a run folder stores as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kdlab.geometry import BEVGrid

Modality = Literal["lidar", "camera", "fusion"]


@dataclass(frozen=True)
class CameraConfig:
    """Camera branch: backbone, depth net, lift-splat."""

    backbone: str = "resnet10t"
    """timm model name."""
    pretrained: bool = False
    """Start the backbone from timm's pretrained weights (needs a network or a filled cache)."""
    image_size: tuple[int, int] = (64, 176)
    """Height and width of the network's input, pixels."""
    stride: int = 8
    """Pixels of input per cell of the feature map that is lifted; a power of two."""
    neck: Literal["sum", "concatenation"] = "sum"
    """sum: the backbone's maps from the lifted stride on, added top-down (FPN). concatenation: those from stride 4 on,
    an equal share of the channels each (SECOND's neck, as in BEVDepth)."""
    channels: int = 64
    """Width of the image neck."""
    depth_channels: int = 0
    """Width of the depth net; 0: the image neck's."""
    context: int = 64
    """Channels that are lifted into the BEV."""
    depth: tuple[float, float, float] = (1.0, 41.0, 1.0)
    """Depth bins: lower bound, upper bound, width, metres."""
    depth_supervision: bool = True
    """Train the depth net on projected LiDAR points (BEVDepth); without, BEVDet."""
    depth_weight: float = 3.0
    """Weight of the depth loss."""
    depth_blocks: int = 1
    """Residual blocks of the depth net's depth branch."""
    bev_blocks: int = 0
    """Residual blocks on each frame's BEV map before it is aligned."""
    deepest: int = 16
    """Largest stride of the backbone that the image neck uses; layers beyond it are left out."""
    frames: int = 1
    """Key frame and frames - 1 past keyframes, aligned by ego motion."""
    past_gradient: bool = False
    """Train through past frames too; without, they are encoded without gradient."""
    simulated_lidar: bool = False
    """A second branch from the key frame's images stands in for LiDAR and is fused with the first (SimDistill): a lift
    of its own, with geometry compensation before and after. For camera detectors."""
    shared_lift: bool = False
    """The simulated LiDAR takes the camera branch's lift, as SimDistill's released code does by mistake."""
    corner_reference: bool = False
    """Geometry compensation counts from cells' lower corners, not centres, as SimDistill's released code does."""
    geometry_compensation: bool = True
    """Let the simulated LiDAR compensate geometry, in images and in the BEV; false for the ablation of that claim."""
    lidar_depth: bool = False
    """The lift also reads the depths of LiDAR points, in training and at test time, as SimDistill's released student
    does: such a detector is no camera detector any more, and refuses batches without points. For one frame."""


@dataclass(frozen=True)
class LidarConfig:
    """LiDAR branch: dynamic pillars."""

    channels: int = 64
    """Width of the branch's BEV map."""
    finer: tuple[int, ...] = ()
    """Widths at finer resolutions, finest first: pillars are cells / 2**len(finer) wide, and each residual block that
    follows halves the resolution; (): a pillar is a cell."""
    layers: int = 1
    """Point layers: 1, or 2 where the second sees each pillar's maximum of the first."""
    sweeps: int = 2
    """Key sweep and sweeps - 1 past ones."""


@dataclass(frozen=True)
class BEVConfig:
    """Common BEV encoder and neck."""

    channels: int = 64
    """Width of the encoder's input, `Features.bev`."""
    stages: tuple[int, ...] = (64, 128)
    """Width of each stage; stage i has stride first_stride * 2**i."""
    blocks: tuple[int, ...] = (2, 2)
    """Residual blocks per stage."""
    neck: int = 128
    """Width of the neck's output, `Features.neck`, at stride 1."""
    first_stride: int = 1
    """Stride of the first stage, a power of two."""


@dataclass(frozen=True)
class HeadConfig:
    """CenterPoint head."""

    channels: int = 64
    """Width of the shared convolution."""
    branch: int = 16
    """Hidden width of each task's heat-map branch and of its box branch."""
    min_radius: int = 2
    """Least Gaussian radius of a target, cells."""
    overlap: float = 0.1
    """IoU that sizes the Gaussian radius."""
    velocity_weight: float = 0.2
    """Weight of the two velocity codes in the L1 loss."""
    regression_weight: float = 0.25
    """Weight of the L1 loss beside the focal loss."""
    score_threshold: float = 0.05
    """Detections below this score are dropped."""
    max_detections: int = 300
    """Detections kept per sample (nuScenes allows 500)."""
    local_max: int = 3
    """Side of the window, cells, in which only the highest score counts; 1: every cell may be a detection."""
    nms: Literal["circle", "rotated"] = "circle"
    """How duplicates are removed."""
    nms_iou: float = 0.2
    """Overlap in the ground plane from which rotated NMS removes the lower score."""


@dataclass(frozen=True)
class DetectorConfig:
    """One detector: which sensors, which grid, how wide."""

    modality: Modality = "camera"
    """Sensors that the detector sees."""
    grid: BEVGrid = BEVGrid((-51.2, 51.2), (-51.2, 51.2), 1.6)
    """The BEV grid, metres."""
    z: tuple[float, float] = (-3.0, 5.0)
    """Heights above the ground that count, metres."""
    fuser: Literal["conv", "gated"] = "conv"
    """How camera and LiDAR (real or simulated) maps become one: a convolution, or UniDistill's gate before it."""
    camera: CameraConfig = CameraConfig()
    lidar: LidarConfig = LidarConfig()
    bev: BEVConfig = BEVConfig()
    head: HeadConfig = HeadConfig()

    @property
    def sensors(self) -> Modality:
        """What it reads, also at test time: its modality, but both for cameras with ``camera.lidar_depth``."""
        return "fusion" if self.modality == "camera" and self.camera.lidar_depth else self.modality


@dataclass(frozen=True)
class AugmentConfig:
    """Ranges of training augmentation; `AugmentConfig.none()` is what evaluation uses."""

    resize: tuple[float, float] = (-0.06, 0.11)
    """Image scale, relative to the scale that fits the width: drawn from 1 + this range."""
    image_rotate: float = 5.4
    """Image rotation, degrees either way."""
    image_flip: bool = True
    """Flip each image with probability 1/2."""
    bev_rotate: float = 22.5
    """BEV rotation, degrees either way."""
    bev_scale: tuple[float, float] = (0.95, 1.05)
    """BEV scale."""
    bev_flip: bool = True
    """Flip x and y of the BEV, each with probability 1/2."""

    @classmethod
    def none(cls) -> AugmentConfig:
        """No augmentation: fit the width, crop at the top."""
        return cls((0.0, 0.0), 0.0, False, 0.0, (1.0, 1.0), False)


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from."""

    root: str = "data/sim"
    """Folder that holds the version folder and samples/."""
    version: str | None = None
    """Version folder, such as v1.0-trainval; inferred where the root holds a single one."""
    train: str = "sim_train"
    """Split to train on."""
    val: str = "sim_val"
    """Split for validation during training."""
    cbgs: bool = False
    """Class-balanced grouping and sampling."""
    workers: int = 2
    """Loader processes."""
    images: Literal["fast", "exact"] = "fast"
    """fast: decoded at 1/2 to 1/8 where they shrink that far, read bilinearly; exact: decoded in full and resized by
    Pillow (bicubic, antialiased), as in BEVDet's pipeline."""
    image_cache: str = ""
    """Folder where decoded images are kept, so that later epochs do not decode; "" for none."""
    augment: AugmentConfig = AugmentConfig()
    draws: int = 0
    """Augmented versions of each sample, shown in turn from epoch to epoch; 0: a new one in every epoch."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser, schedule, precision."""

    epochs: int = 12
    batch_size: int = 8
    """Samples per optimiser step, over all processes."""
    lr: float = 2e-3
    """Peak learning rate of AdamW."""
    camera_lr: float = 1.0
    """Factor on the learning rate of the camera branch, up to each frame's BEV map."""
    schedule: Literal["one-cycle", "steps"] = "one-cycle"
    """one-cycle: a cosine up and one down; steps: constant, a tenth after each of the milestones."""
    warm_up: float = 0.3
    """Share of the training in which the learning rate rises, from a tenth of the peak (steps: a thousandth)."""
    milestones: tuple[int, ...] = ()
    """Epochs after which ``steps`` divides the learning rate by ten."""
    weight_decay: float = 1e-2
    grad_clip: float = 5.0
    """Norm to which gradients are clipped."""
    ema: float = 0.0
    """Decay of the weights' moving average; 0 switches it off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the processor or GPU has it, fp32 elsewhere."""
    seed: int = 0
    """Seeds weights, order and augmentation."""
    camera_start: str = ""
    """Run folder of a detector with cameras, from which the camera branch starts: backbone, image neck, depth net, and
    how frames are mixed where both have as many."""
    checkpoint_minutes: float = 2.0
    """Time between checkpoints; one is also written after every epoch."""
    evaluate_every: int = 0
    """Epochs between evaluations on the validation split; 0: never during training."""
    gradients_every: int = 0
    """Steps between measurements of the losses' gradients at a map that they share; 0: never."""
    gradients_at: Literal["bev", "image"] = "bev"
    """Which map: the input of the BEV encoder, or what the image neck makes of the key frame. Losses of what lies
    before a map do not pull at it."""


@dataclass(frozen=True)
class DistillConfig:
    """Which method distils which teacher."""

    method: str = "unidistill"
    """A name in kdlab.distill.METHODS, or several with + between them."""
    teacher: str = ""
    """Run folder of the teacher."""
    variant: Literal["intended", "released"] = "intended"
    """All quirks off or all on."""
    quirks: tuple[str, ...] = ()
    """Quirks to flip from the variant's setting."""
    scale: float = 1.0
    """One factor on every weight of the method."""
    scales: dict[str, float] = field(default_factory=dict)
    """Factors on the weights by term name, see `kdlab.presets.SCALES`; a weight given below is taken as it is."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights by term name that replace the method's own; 0 switches a term off."""
    stage_epochs: int = 0
    """Epochs of each training that comes first, such as LabelDistill's label encoder; 0: as many as the method says."""
    cache: str = ""
    """Folder where the teacher's features are kept, so that it runs once per sample and draw (wants data.draws); ""
    for none."""
    options: dict[str, str] = field(default_factory=dict)
    """How the method is built, by option name, see `kdlab methods NAME`: {"attention": "none"}. Several values stand
    with commas between them."""
    only: tuple[str, ...] = ()
    """Terms to keep, all others are left out; empty: all."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a training run."""

    detector: DetectorConfig = DetectorConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    distill: DistillConfig | None = None


C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON-ready dictionary of a config."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(cls: type[C], values: dict[str, Any], where: str = "") -> C:
    """Config of class ``cls`` from a dictionary; missing keys take the default.

    Raises:
        ValueError: an unknown key or a value of the wrong type, named with its path.
    """
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{where or cls.__name__}: unknown key {unknown[0]!r}; known keys: {', '.join(hints)}")
    return cls(**{key: _convert(hints[key], value, f"{where or cls.__name__}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list | tuple):
        variadic = len(args) == 2 and args[1] is Ellipsis
        if not variadic and len(value) != len(args):
            raise ValueError(f"{where}: needs {len(args)} values, got {len(value)}")
        inner = [args[0]] * len(value) if variadic else args
        return tuple(_convert(a, v, where) for a, v in zip(inner, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {k: _convert(args[1], v, where) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(hint, type) or not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return value


def save_config(config: Any, path: Path) -> None:
    """Write a config as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load_config(cls: type[C], path: Path) -> C:
    """Read a config written by `save_config`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, an unknown key or a wrong type; the message names the file.
    """
    try:
        return from_dict(cls, json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def config_hash(config: Any) -> str:
    """Twelve hexadecimal digits that identify a config."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
