"""SimDistill (AAAI 2024): a camera student with simulated LiDAR, compared with a fusion teacher stage by stage.

Method from ViTAE-Transformer/SimDistill, commit 2d0d5eb. Cited: MB = mmdet3d/models/fusion_models/bevfusion.py, MH =
mmdet3d/models/heads/bbox/centerpoint.py, MD = mmdet3d/models/fusion_models/deformAttention.py, MV =
mmdet3d/models/vtransforms. The paper's body was not at hand: what it intends is reconstructed from its abstract and
figures, reviews of its preprint and the code.

The student has what the teacher has: a camera branch, a branch that stands in for LiDAR, and a fuser, see
`kdlab.models.camera.SimulatedLidar`; it is a camera detector with ``camera.simulated_lidar``, and sees images only. So
four things can be compared: camera BEV (intra-modal), LiDAR BEV around objects (cross-modal), fused BEV, predictions.

Differences between paper, released code and kdlab that are no quirks stand in `DIFFERENCES`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlab.distill.context import Context
from kdlab.distill.method import Adapter, Method, Quirk, TeacherMode, Term, Variant
from kdlab.distill.options import PaperMethod
from kdlab.distill.places import Cells, Slots, TermResult
from kdlab.distill.regions import gaussian_mask
from kdlab.distill.terms import class_probability
from kdlab.geometry import BEVGrid
from kdlab.models.layers import ConvNorm
from kdlab.models.targets import CODES, TASK_OF_CLASS
from kdlab.sample import CLASSES, TASKS

SLOTS = 500
"""Rows per task of the released targets, filled or not."""
BETA = 1 / 9
"""Where the smooth L1 error turns from square to straight."""
CODE_WEIGHTS = (1.0,) * 8 + (0.2, 0.2)
"""Of reg, height, dim, rot and vel."""
_VENUE = "SimDistill (AAAI 2024)"


def difference(context: Context, term: Term) -> TermResult:
    """Squared difference, mean over all channels and cells (MB:709-712)."""
    student, teacher = context.pair(term)
    error = (student - teacher).square().mean(1) / student[:, 0].numel()
    return TermResult.of(error, Cells(), context.grid_of(student))


def masked_difference(context: Context, term: Term) -> TermResult:
    """`difference` of maps that are multiplied by `object_mask` (MB:765-772)."""
    student, teacher = context.pair(term)
    grid = context.grid_of(student)
    mask = object_mask(context, grid)
    error = (mask * student - mask * teacher).square().mean(1) / student[:, 0].numel()
    return TermResult.of(error, Cells(), grid)


def object_mask(context: Context, grid: BEVGrid) -> Tensor:
    """Gaussians at box centres [B, 1, H, W], the greatest of each class, added up over classes (MH:515-566)."""
    return context.once(("simdistill.mask", grid), lambda: class_gaussians(context, grid).sum(1, keepdim=True))


def class_gaussians(context: Context, grid: BEVGrid) -> Tensor:
    """Gaussians at box centres [B, 10, H, W], of the released targets' radii (MH:568-719)."""
    return gaussian_mask(
        context.boxes.values,
        centre_cells(context, grid)[1],
        grid,
        overlap=0.1,
        min_radius=2,
        truncate="simdistill.truncate_centre" in context.on,
        channel=context.boxes.labels,
        channels=len(CLASSES),
    )


def centre_cells(context: Context, grid: BEVGrid) -> tuple[Tensor, Tensor]:
    """Flat cells of box centres, int64 [B, M], 0 where the centre is outside, and which boxes count, bool [B, M]."""
    boxes = context.boxes
    centre = grid.to_cells(boxes.values[..., :2])
    centre = centre.trunc() if "simdistill.truncate_centre" in context.on else centre.floor()
    column, row = centre.nan_to_num(-1).long().unbind(-1)
    counted = boxes.valid & (boxes.values[..., 3:5] > 0).all(-1)
    counted &= (column >= 0) & (column < grid.width) & (row >= 0) & (row < grid.height)
    return torch.where(counted, row * grid.width + column, 0), counted


def prediction_class(context: Context, term: Term) -> TermResult:
    """Quality focal error of the class scores, with the teacher's as targets (MH:1049-1075, 18-33).

    Over the number of cells where the teacher's score exceeds option ``positive``, per sample and class, at least 1. As
    released, scores are taken for logits: all second scores are over 0.5, and so every cell is a positive.
    """
    student, teacher = context.pair(term)
    if "simdistill.double_sigmoid" in context.on:
        error = score_error(class_probability(student, 1e-4), class_probability(teacher, 1e-4))
        together = error.new_tensor([len(TASKS[task]) for task in TASK_OF_CLASS])  # classes of each class's task
        error = error * together.view(-1, 1, 1) / student[0, 0].numel()
    else:
        positives = (teacher.sigmoid() > term.options["positive"]).sum((2, 3), keepdim=True)
        error = score_error(student, teacher) / positives.clamp(min=1)
    return TermResult.of(error * _per_sample(context, student), Cells(), context.grid_of(student))


def score_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Quality focal error of logits, entry by entry: cross entropy times the squared difference of probabilities."""
    score = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student, score, reduction="none")
    return entropy * (student.sigmoid() - score).square()


def prediction_box(context: Context, term: Term) -> TermResult:
    """Smooth L1 error of the box codes at the centres of the boxes, each in its task's map (MH:1118-1167).

    Summed over codes, mean over the boxes of a sample and task.
    """
    found = slots(context, term)
    return TermResult.of(found.error, Slots(found.cell), context.grid_of(context.student_tensor(term)))


@dataclass(frozen=True)
class BoxSlots:
    """Errors of boxes, and where they are read.

    Attributes:
        error: [B, K].
        cell: int64 [B, K], flat.
        task: int64 [B, K].
    """

    error: Tensor
    cell: Tensor
    task: Tensor


def slots(context: Context, term: Term) -> BoxSlots:
    """The errors of `prediction_box`: a column per box; with ``unmasked_boxes`` one per task for its empty slots."""
    student, teacher = (m.unflatten(1, (len(TASKS), CODES)).flatten(3) for m in context.pair(term))
    cell, counted = centre_cells(context, context.grid_of(context.student_tensor(term)))
    task = torch.tensor(TASK_OF_CLASS, device=cell.device)[context.boxes.labels]
    number = F.one_hot(task, len(TASKS)).mul(counted.unsqueeze(-1)).sum(1)  # boxes of each sample and task
    share = counted / number.gather(1, task).clamp(min=1)
    if "simdistill.unmasked_boxes" in context.on:
        every = torch.arange(len(TASKS), device=cell.device).expand(len(cell), -1)
        cell, task = torch.cat((cell, torch.zeros_like(every)), 1), torch.cat((task, every), 1)
        share = torch.cat((counted, SLOTS - number), 1) / SLOTS
    batch = torch.arange(len(cell), device=cell.device)[:, None]
    error = box_error(
        student[batch, task, :, cell], teacher[batch, task, :, cell], "simdistill.sine_of_sine" in context.on
    )
    return BoxSlots(error * share * _per_sample(context, student), cell, task)


def box_error(student: Tensor, teacher: Tensor, sine: bool) -> Tensor:
    """Weighted smooth L1 of codes [..., 10], summed over codes; where the teacher's code is NaN, nothing.

    Args:
        student: codes.
        teacher: codes.
        sine: take the sine of the difference of the yaw's sines.
    """
    apart = student - torch.where(teacher.isnan(), student, teacher)
    if sine:
        apart = torch.cat((apart[..., :6], apart[..., 6:7].sin(), apart[..., 7:]), -1)
    apart = apart * apart.new_tensor(CODE_WEIGHTS)
    return F.smooth_l1_loss(apart, torch.zeros_like(apart), reduction="none", beta=BETA).sum(-1)


def _per_sample(context: Context, maps: Tensor) -> float:
    """What makes a sum over samples their mean, or leaves it a sum, as released."""
    return 1.0 if "simdistill.sum_over_batch" in context.on else 1 / len(maps)


QUIRKS = (
    Quirk(
        "simdistill.double_sigmoid",
        "takes class probabilities, clamped at 1e-4, for logits: a second sigmoid; no cell is told from another",
        "MH:739-740, 791-792, 1049-1075",
        means="quality focal loss of the scores over all cells, divided by how many of the teacher's are positive",
    ),
    Quirk(
        "simdistill.unmasked_boxes",
        "compares boxes in all 500 slots of a task; empty ones read the map's first cell, over 0.99 of the term",
        "MH:1118-1160, the mask commented out at 1153",
        means="boxes are compared where there are boxes",
    ),
    Quirk(
        "simdistill.sine_of_sine",
        "takes the sine of the difference of two sines of yaws",
        "MH:1161-1167",
        means="the sine of a yaw is a code like the others",
    ),
    Quirk(
        "simdistill.sum_over_batch",
        "adds up the samples of a batch in both prediction terms, so that they grow with it",
        "MH:1049-1075, 1118-1160",
        means="kdlab's choice, as for every other loss: a batch's loss is the mean of its samples'",
    ),
    Quirk(
        "simdistill.truncate_centre",
        "rounds centres toward zero, not down: boxes up to a cell below the range count",
        "MH:568-719",
        means="a centre's cell is the one that holds it",
    ),
    Quirk(
        "simdistill.trained_fuser",
        "forgets the teacher's fuser when it freezes the teacher, and trains it along",
        "MB:216-255, 693",
        "teacher",
        TeacherMode(trainable=("fuser",)),
        means="the teacher is frozen",
    ),
    Quirk(
        "simdistill.shared_lift",
        "lifts both branches by one module, compensated images included, so they start from the same map",
        "MB:125-126, 348, 362; MV/depth_lss.py:90, 110",
        "student",
        student="camera.shared_lift",
        within="camera.simulated_lidar",
        means="two projections into the BEV, one for each branch",
    ),
    Quirk(
        "simdistill.corner_reference",
        "lets geometry compensation count from cells' lower corners, half a cell off",
        "MD:134-142",
        "student",
        student="camera.corner_reference",
        within="camera.simulated_lidar",
        means="offsets count from a cell's centre, as in Deformable DETR",
    ),
    Quirk(
        "simdistill.lidar_depth",
        "feeds the LiDAR's depths to the student's lift, in training and at test time: it is no camera detector",
        "configs camera/default.yaml:36; MB:348-361; MV/base.py:239-294; MV/depth_lss.py",
        "student",
        student="camera.lidar_depth",
        means="the student sees images only",
    ),
)

ADAPTER = Adapter(
    "simdistill.lidar",
    lambda student, teacher: ConvNorm(student, teacher),
    "3x3 convolution, norm, ReLU",
    f"{_VENUE}, MB:702",
)

TERMS = (
    Term(
        name="intra_modal",
        function=difference,
        weight=1.0,
        source=f"{_VENUE}, IMD, MB:711-712",
        teacher="teacher.camera_bev[0]",
        student="student.camera_bev[0]",
    ),
    Term(
        name="cross_modal",
        function=masked_difference,
        weight=100.0,
        source=f"{_VENUE}, CMD, MB:765-772, mask MH:515-566",
        teacher="teacher.lidar_bev",
        student="student.lidar_bev",
        adapter=ADAPTER.name,
    ),
    Term(
        name="fusion",
        function=difference,
        weight=1.0,
        source=f"{_VENUE}, MMD-F, MB:709-710",
        teacher="teacher.bev",
        student="student.bev",
    ),
    Term(
        name="prediction_class",
        function=prediction_class,
        weight=0.25,
        source=f"{_VENUE}, MMD-P, MH:1049-1075",
        teacher="teacher.predictions.heatmap",
        student="student.predictions.heatmap",
        options={"positive": 0.1},
    ),
    Term(
        name="prediction_box",
        function=prediction_box,
        weight=0.25,
        source=f"{_VENUE}, MMD-P, MH:1118-1167",
        teacher="teacher.predictions.regression",
        student="student.predictions.regression",
    ),
)


def simdistill(variant: Variant = "intended") -> Method:
    """SimDistill.

    Args:
        variant: all quirks off or on; the student's own follow its config, see `Quirk.student`.

    Raises:
        ValueError: no such variant.
    """
    return Method(
        name="simdistill",
        teacher=frozenset(("fusion",)),
        student=frozenset(("camera",)),
        terms=TERMS,
        adapters=(ADAPTER,),
        quirks=QUIRKS,
    ).variant(variant)


DIFFERENCES = (
    "The cross-modal mask is as released: Gaussians of a class merge by maximum, classes add up (to more than 1 where "
    'they overlap), and both sides are multiplied, so errors count by its square. The paper draws an "object-aware '
    'mask".',
    "The mean of the cross-modal errors is over all cells, not the mask's, as released: hence its weight of 100.",
    "The intended class term is what its code was adapted from, a helper for distillation in OpenPCDet; the intended "
    "box term is the released one at the boxes alone. Nobody has tuned the weights of 0.25 for these.",
    "Comparisons off in every released config are in `kdlab.parity` alone: unmasked cross-modal errors, image "
    "features, and what was left of a TransFusion head. Supervised depth belongs to kdlab's camera detectors "
    "(`camera.depth_weight`).",
    "The quirk `lidar_depth` is kdlab's in detail: the nearest of several points counts in a pixel, a 1x1 convolution "
    "and 3x3 ones of stride 2 read the depths, one more mixes them into the image features. The released code keeps "
    "the point that was written last (MV/base.py:239-294), has convolutions 1x1, 5x5 of stride 4 and 5x5 of stride 2, "
    "and hands both to the depth net side by side (MV/depth_lss.py).",
    "Nothing but the teacher's backbone takes the pretrained weights (MB:213-215), and the student's heat-map bias is "
    "never set: the released student starts from random weights, unless the checkpoint it is loaded from has its own. "
    "kdlab has `camera.pretrained`, and sets the bias.",
    "The rule that trains the backbone at a tenth of the rate names the frozen teacher's alone, so the released "
    "student's is trained at the full rate; kdlab has `train.camera_lr`.",
    "The checkpoint that the released README names for the teacher has another decoder and head and no geometry "
    "compensation, and loads all the same: these parts of the teacher may have been random and frozen. kdlab's teacher "
    "is trained.",
    "They belong to the released detectors, and kdlab distils between its own: geometry compensation and LiDAR depths "
    "in the teacher's lift; the fuser's order of camera and LiDAR.",
)
"""No quirks, and why."""

PAPER = PaperMethod(
    lambda student, teacher: simdistill().between(student, teacher), (("camera", "fusion"),), (), DIFFERENCES
)
