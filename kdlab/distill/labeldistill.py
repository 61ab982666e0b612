"""LabelDistill (ECCV 2024): a third of the student's BEV channels imitates encoded labels, another the teacher's.

Method from sanmin0312/LabelDistill, commit 274ab26. Cited: 4KEY and STEP1 = exps/nuscenes/labeldistill/
LabelDistill_r50_128x128_e24_4key.py and LabelDistill_step1.py, other files by their name below ``labeldistill/``. The
paper's body was not at hand: what it intends is reconstructed from its abstract, a second-hand formula of the total
loss and the code.

Three trainings, each on what the one before gave: the teacher; a label encoder E, so that the frozen teacher's neck and
head find the annotations in E(annotations) (`kdlab.models.labels`); the student. The last third of its channels is left
alone, for what images alone tell.

Feature errors are sums over channels, so the weights do not port to other widths: see `kdlab.presets.SCALES`.
Differences between paper, released code and kdlab that are no quirks stand in `DIFFERENCES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlab.config import Modality
from kdlab.distill.context import Context
from kdlab.distill.method import Adapter, Method, Quirk, Stage, TeacherMode, Term, Variant
from kdlab.distill.options import SWITCH, Option, PaperMethod
from kdlab.distill.paths import Part
from kdlab.distill.places import Cells, Slots, TermResult
from kdlab.distill.regions import gaussian_mask
from kdlab.distill.terms import class_probability, squared_error
from kdlab.geometry import BEVGrid
from kdlab.models.detector import Detector
from kdlab.models.labels import LabelDetector, LabelEncoder
from kdlab.models.layers import ResidualBlock
from kdlab.models.norm import mean_count
from kdlab.models.targets import TASK_OF_CLASS
from kdlab.sample import CLASSES, TASKS, Batch, Boxes3D

GROUPS = ("label", "lidar", "image")
"""What each third of the student's channels is for."""
_VENUE = "LabelDistill (ECCV 2024)"


def centre_cells(boxes: Boxes3D, grid: BEVGrid, truncate: bool) -> tuple[Tensor, Tensor]:
    """Flat cell of each box's centre, int64 [B, M] (0 where it does not count), and whether it counts, bool [B, M].

    Args:
        boxes: padded.
        grid: of the cells.
        truncate: round toward zero, so that a centre up to a cell below the border counts, as released.
    """
    uv = grid.to_cells(boxes.values[..., :2])
    u, v = (uv.trunc() if truncate else uv.floor()).unbind(-1)
    counted = boxes.valid & (boxes.values[..., 3:5] > 0).all(-1)
    counted &= (u >= 0) & (u < grid.width) & (v >= 0) & (v < grid.height)
    return torch.where(counted, v * grid.width + u, 0).long(), counted


def truth(context: Context) -> Tensor:
    """The targets' heat map [B, 10, H, W] on the context's grid (kd_head.py:173-413)."""

    def draw() -> Tensor:
        truncate = "labeldistill.truncate_centre" in context.on
        boxes, grid = context.boxes, context.grid
        drawn = centre_cells(boxes, grid, truncate)[1]
        channel, channels = boxes.labels, len(CLASSES)
        how = {"overlap": 0.1, "min_radius": 2, "truncate": truncate}
        return gaussian_mask(boxes.values, drawn, grid, channel=channel, channels=channels, **how)  # type: ignore[arg-type]

    return context.once("labeldistill.truth", draw)


def foreground(heatmap: Tensor, size: tuple[int, int], binary: bool) -> Tensor:
    """Where features are compared, float32 [B, *size]: the classes' sum of heat maps [B, 10, H, W] (4KEY:221-250).

    Args:
        heatmap: of the targets.
        size: rows and columns; other than the heat map's, it is read bilinearly with aligned corners.
        binary: 1 wherever the sum is above 0.
    """
    mask = heatmap.sum(1, keepdim=True)
    if tuple(mask.shape[-2:]) != size:
        mask = F.interpolate(mask, size, mode="bilinear", align_corners=True)
    return ((mask > 0).float() if binary else mask)[:, 0]


def imitate(student: Tensor, source: Tensor, mask: Tensor, local: bool = False) -> Tensor:
    """Squared difference summed over channels, times mask, over the mask's sum, at least 1 (4KEY:221-250): [B, H, W].

    Args:
        student: adapted, [B, C, H, W].
        source: [B, C, H, W].
        mask: [B, H, W].
        local: sum over this process's batch alone, as released, not the mean over processes.
    """
    count = mask.sum().clamp(min=1) if local else mean_count(mask.sum())
    return mask * squared_error(student, source) / count


def feature(context: Context, term: Term) -> TermResult:
    """`imitate` in the `foreground`; option ``binary``."""
    student, source = context.pair(term)
    height, width = source.shape[-2:]
    mask = foreground(truth(context), (height, width), term.options["binary"])
    error = imitate(student, source, mask, "labeldistill.local_normaliser" in context.on)
    return TermResult.of(error, Cells(), context.grid_of(source))


def focal(probability: Tensor, target: Tensor, positive: Tensor) -> Tensor:
    """Gaussian focal loss of each cell, alpha 2 and gamma 4: probabilities, soft targets, weights of the positive part.

    With ``positive`` where the target is 1 it is "CornerNet"'s (ECCV 2018).
    """
    hit = (1 - probability).square() * -probability.log() * positive
    return hit + (1 - target).pow(4) * probability.square() * -(1 - probability).log()


def response_heatmap(context: Context, term: Term) -> TermResult:
    """Focal loss towards the teacher's scores times the targets, per task over its centres (kd_head.py:475-562).

    A centre's cell pulls up by the teacher's score there; every cell pulls down, the less the higher the teacher's
    score. It is no difference: 0 is not reached where student and teacher agree.
    """
    student, teacher = (class_probability(maps, 1e-4) for maps in context.pair(term))
    heatmap = truth(context)
    target = teacher * heatmap
    centres = heatmap == 1
    positive = (target == 1).float() if "labeldistill.no_positives" in context.on else centres * target
    tasks = torch.tensor(TASK_OF_CLASS, device=heatmap.device)
    counts = heatmap.new_zeros(len(TASKS)).index_add(0, tasks, centres.sum((0, 2, 3)).float())
    error = focal(student, target, positive) / mean_count(counts)[tasks, None, None]
    return TermResult.of(error, Cells(), context.grid_of(student))


def response_box(context: Context, term: Term) -> TermResult:
    """|Difference| of the box codes at centres' cells, per task over its boxes (kd_head.py:475-562); ``box_weight``."""
    student, teacher = context.pair(term)
    grid, boxes = context.grid_of(student), context.boxes
    cell, counted = centre_cells(boxes, grid, "labeldistill.truncate_centre" in context.on)
    task = torch.tensor(TASK_OF_CLASS, device=cell.device)[boxes.labels]
    counts = student.new_zeros(len(TASKS)).index_add(0, task.flatten(), counted.flatten().float())
    batch = torch.arange(len(cell), device=cell.device)[:, None]
    ours, theirs = (m.unflatten(1, (len(TASKS), -1)).flatten(3)[batch, task, :, cell] for m in (student, teacher))
    error = term.options["box_weight"] * (ours - theirs).abs().sum(-1) * counted / mean_count(counts)[task]
    return TermResult.of(error, Slots(cell), grid)


def adaptor(student: int, source: int) -> nn.Module:
    """3x3 convolution between these widths, norm, ReLU, residual block (layers/backbones/adaptor.py:5-35)."""
    convolution = nn.Conv2d(student, source, 3, padding=1, padding_mode="replicate")
    return nn.Sequential(convolution, nn.BatchNorm2d(source), nn.ReLU(), ResidualBlock(source, source))


def build_encoder(teacher: nn.Module, on: frozenset[str]) -> nn.Module:
    """A label encoder for a teacher's stages and grid."""
    detector = cast(Detector, teacher)
    return LabelEncoder(
        detector.grid,
        detector.channels.stages,
        released="labeldistill.half_footprint" in on,
        first_stride=detector.config.bev.first_stride,
    )


def encoder_loss(network: nn.Module, teacher: nn.Module, batch: Batch, on: frozenset[str]) -> Tensor:
    """The teacher's detection loss of what its neck and head find in encoded labels (STEP1:163-174)."""
    teacher.train("labeldistill.batch_statistics" in on)
    found = LabelDetector(network, teacher)(batch)
    return torch.stack(list(cast(Detector, teacher).loss(found, batch).values())).sum()


def _across(term: Term) -> Term:
    return replace(term, channels=replace(term.channels, across=True)) if isinstance(term.channels, Part) else term


QUIRKS = (
    Quirk(
        "labeldistill.half_footprint",
        "paints labels at half the box's length and width, by integer polygons: centres may stay empty, and what lies "
        "beyond the last row or column is painted there",
        "utils/bev_mask.py:17-52",
        "data",
        means="labels fill the box's footprint, its centre's cell at least",
    ),
    Quirk(
        "labeldistill.global_thirds",
        "splits the channels of all frames together, so that a third holds frames, not a part of each",
        "models/labeldistill.py:131-138",
        "adapter",
        change=_across,
        means="a third of each frame's channels, so that every frame has its parts",
    ),
    Quirk(
        "labeldistill.batch_statistics",
        "runs teacher and label encoder in training mode, on the batch's statistics",
        "models/labeldistill.py:60, 70 and models/labelencoder.py:29, undone by Lightning 1.6's trainer.py:1349",
        "teacher",
        TeacherMode(batch_statistics=True, restore=False),
        means="teacher and label encoder are frozen, their batch norms too",
    ),
    Quirk(
        "labeldistill.no_positives",
        "pulls scores down alone: its targets never reach the 1 that would pull up",
        "layers/heads/kd_head.py:475-562",
        means="a centre's score is pulled up toward the teacher's",
    ),
    Quirk(
        "labeldistill.truncate_centre",
        "rounds centres toward zero, not down, and so takes in those up to a cell below the border",
        "layers/heads/kd_head.py:173-413",
        means="a centre's cell is the one that holds it",
    ),
    Quirk(
        "labeldistill.local_normaliser",
        "divides feature errors by the mask of one process's batch",
        "4KEY:221-250",
        means="kdlab's choice: several processes compute what one would of the whole batch",
    ),
)

ENCODER = Stage(
    name="label_encoder",
    what="annotations to the features in which the teacher's neck and head find them; belongs to one grid",
    build=build_encoder,
    loss=encoder_loss,
    source=f"{_VENUE}, layers/backbones/label_backbone.py:112-173, STEP1",
    epochs=12,
    lr=1e-3,
    weight_decay=1e-7,
    milestones=(10, 11),
    gate=LabelDetector,
)
"""The training of the label encoder."""


def _features(group: str, level: int, partition: bool) -> tuple[Term, Adapter]:
    name = f"{group}_{level}"
    source = "labels" if group == "label" else "teacher"
    term = Term(
        name=name,
        function=feature,
        weight=0.3,
        source=f"{_VENUE}, 4KEY:221-250, weight 4KEY:209-219",
        teacher=f"{source}.stages[{level}]",
        student=f"student.stages[{level}]" if level else "student.camera_bev_aligned[:]",
        adapter=f"labeldistill.{name}",
        channels=Part(GROUPS.index(group), len(GROUPS)) if partition else None,
        options={"binary": group == "label"},
    )
    made = f"{_VENUE}, layers/backbones/adaptor.py:5-35"
    return term, Adapter(
        f"labeldistill.{name}", adaptor, "3x3 convolution, norm, ReLU, residual block", made, resize="bilinear"
    )


def _responses() -> tuple[Term, Term]:
    source = f"{_VENUE}, layers/heads/kd_head.py:475-562, weight 4KEY:209-219"
    heatmap = Term(
        name="response_heatmap",
        function=response_heatmap,
        weight=1.0,
        source=source,
        teacher="teacher.predictions.heatmap",
        student="student.predictions.heatmap",
    )
    box = Term(
        name="response_box",
        function=response_box,
        weight=1.0,
        source=source,
        teacher="teacher.predictions.regression",
        student="student.predictions.regression",
        options={"box_weight": 0.25},
    )
    return heatmap, box


def labeldistill(variant: Variant = "intended", *, levels: Sequence[int] = (0, 1), partition: bool = True) -> Method:
    """LabelDistill.

    Args:
        variant: all quirks off or on.
        levels: where features are compared: 0 is the student's camera BEV maps, all frames, with the teacher's first
            stage; i > 0 stage i of both.
        partition: compare with labels and LiDAR a third of the channels each; without, all channels with both.

    Raises:
        ValueError: no such variant.
    """
    pairs = [_features(group, level, partition) for group in GROUPS[:2] for level in levels]
    return Method(
        name="labeldistill",
        teacher=frozenset(("lidar",)),
        student=frozenset(("camera",)),
        terms=(*(term for term, _ in pairs), *_responses()),
        adapters=tuple(adapter for _, adapter in pairs),
        quirks=QUIRKS,
        stages=(ENCODER,),
    ).variant(variant)


def by_modality(
    student: Modality, teacher: Modality, levels: Sequence[str] = ("0", "1"), partition: bool = True
) -> Method:
    """LabelDistill between these modalities; arguments as of `labeldistill`."""
    return labeldistill(levels=[int(level) for level in levels], partition=partition).between(student, teacher)


DIFFERENCES = (
    "The weights of the paper's three terms could not be read; the code's stand here. An author's configuration of "
    "another backbone halves the response term (issue 3).",
    "The masks are drawn with CenterPoint's radii, hardly ever more than 5 x 5 cells of 0.8 m whatever the object's "
    "size, and brought to the second level with aligned corners, as released.",
    "What the responses are divided by is at least 1 over the batch of all processes; in the released code the mean "
    "over processes is at least 1.",
    "The encoder is trained by the kind of schedule that its run has: one-cycle with kdlab's own presets, with the "
    "paper's a tenth of the rate after epochs 10 and 11, as released. There is no moving average, where the released "
    "training has one. A velocity counts in its loss as in the detector's configuration (there 0.5).",
    "They belong to the released detectors and their data, and kdlab distils between its own: past frames encoded "
    "without gradient (see `CameraConfig.past_gradient`; the LiDAR's third of all frames together then gets none at "
    "level 0), the teacher's three future sweeps, its own head, the start of the heat map's bias, geometry in half "
    "precision.",
)
"""No quirks, and why."""

PAPER = PaperMethod(
    by_modality,
    (("camera", "lidar"),),
    (
        Option("levels", ("0", "1", "2"), "0,1", "where features are compared; 0: camera BEV maps", several=True),
        Option("partition", SWITCH, "on", "a third of the channels for labels, a third for LiDAR; off: all for both"),
    ),
    DIFFERENCES,
)
