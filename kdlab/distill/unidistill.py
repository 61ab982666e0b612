"""UniDistill (CVPR 2023): features at nine points of each box, relations within it, responses at its centre.

Method from megvii-research/CVPR2023-UniDistill, commit 32f02b4. Its four scripts stand below
``unidistill/exps/multisensor_fusion/nuscenes/BEVFusion/`` and are cited by their path, teacher to student: L2C =
..._camera_exp_distill_lidar.py, F2C = ..._camera_exp_distill_fusion.py, C2L = ..._lidar_exp_distill_camera.py, F2L =
..._lidar_exp_distill_fusion.py. The paper's body was not at hand: what it intends is reconstructed from its abstract,
reviews of it and the code. Its equations are 3 (feature), 4-5 (relation) and 6-7 (response), second-hand.

Differences between paper, released code and kdlab that are no quirks stand in `DIFFERENCES`. The released loader keeps
a box only if one of its corners is in range; `Distiller.context` does so for every method, by the footprint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from kdlab.config import Modality
from kdlab.distill.context import Context
from kdlab.distill.method import Adapter, Method, Quirk, TeacherMode, Term, Variant
from kdlab.distill.options import SWITCH, Option, PaperMethod
from kdlab.distill.places import Cells, Pairs, Points, TermResult
from kdlab.distill.regions import gaussian_mask, rows_to_first_zero, rows_to_last_box, with_midpoints
from kdlab.distill.terms import class_probability, cosine_relation, masked_mean_l1, places_read, read_points
from kdlab.geometry import footprint
from kdlab.models.norm import across_ranks

Path = Literal["L2C", "C2L", "F2C", "F2L"]
EPS = 1e-4


@dataclass(frozen=True)
class PathRow:
    """A path: modalities, weights of feature, relation and response, their lines in the path's script."""

    teacher: Modality
    student: Modality
    weights: tuple[float, float, float]
    lines: str


PATHS: dict[str, PathRow] = {
    "L2C": PathRow("lidar", "camera", (100.0, 40.0, 10.0), "506-511"),
    "C2L": PathRow("camera", "lidar", (10.0, 5.0, 1.0), "504-509"),
    "F2C": PathRow("fusion", "camera", (10.0, 5.0, 10.0), "500-505"),
    "F2L": PathRow("fusion", "lidar", (10.0, 1.0, 10.0), "500-505"),
}


def counted_rows(context: Context) -> Tensor:
    """Which rows count in the feature and relation terms, bool [B, M]."""
    if "unidistill.count_first_row" in context.on:
        return rows_to_last_box(context.boxes.values)
    return context.boxes.valid


def box_points(context: Context, maps: Tensor) -> Tensor:
    """Each box's nine points, cell coordinates of ``maps`` [B, M, 9, 2]."""
    return with_midpoints(context.grid_of(maps).to_cells(footprint(context.boxes.values)))


def exchanged(context: Context) -> bool:
    """Whether maps are read with grid_sample's coordinates swapped (L2C:226, 276), see `kdlab.distill.terms`."""
    return "unidistill.transpose_points" in context.on


def row_weights(context: Context) -> Tensor:
    """What each box counts, float32 [B, M]: 1 over the number of counted boxes (its mean over processes), else 0."""
    counted = counted_rows(context).float()
    return counted / (across_ranks(counted.sum()) + EPS)


def feature(context: Context, term: Term) -> TermResult:
    """Mean |difference| over channels and nine points of each box, over the number of boxes (L2C:196-245)."""
    student, teacher = context.pair(term)
    uv, swap = box_points(context, student), exchanged(context)
    error = (read_points(student, uv, swap) - read_points(teacher, uv, swap)).abs().mean(-1) / uv.shape[-2]
    error = error * row_weights(context)[..., None]  # [B, M, 9]
    uv = places_read(uv, student.shape[-2], student.shape[-1], swap)
    return TermResult.of(error.flatten(1), Points(uv.flatten(1, 2)), context.grid_of(student))


def relation(context: Context, term: Term) -> TermResult:
    """Mean |difference| of the 9 x 9 cosine relations within each box, over the number of boxes (L2C:248-323)."""
    student, teacher = context.pair(term)
    uv, swap = box_points(context, student), exchanged(context)
    relations = [cosine_relation(read_points(maps, uv, swap)) for maps in (student, teacher)]
    error = (relations[0] - relations[1]).abs()
    error = error / error[0, 0].numel() if error.numel() else error
    error = error * row_weights(context)[..., None, None]  # [B, M, 9, 9]
    uv = places_read(uv, student.shape[-2], student.shape[-1], swap)
    first = uv[:, :, :, None].expand(*error.shape, 2).flatten(1, 3)
    second = uv[:, :, None].expand(*error.shape, 2).flatten(1, 3)
    return TermResult.of(error.flatten(1), Pairs(first, second), context.grid_of(student))


def response_mask(context: Context, term: Term, maps: Tensor) -> Tensor:
    """Small Gaussians at box centres [B, H, W] (L2C:100-178); options ``overlap`` and ``min_radius``."""
    overlap, min_radius = term.options["overlap"], term.options["min_radius"]
    grid, boxes = context.grid_of(maps), context.boxes

    def draw() -> Tensor:
        pads = "unidistill.pad_lights_ego" in context.on
        drawn = rows_to_first_zero(boxes.values, boxes.labels) if pads else boxes.valid
        truncate = "unidistill.truncate_centre" in context.on
        return gaussian_mask(boxes.values, drawn, grid, overlap=overlap, min_radius=min_radius, truncate=truncate)[:, 0]

    return context.once(("unidistill.mask", grid, overlap, min_radius), draw)


def response_class(context: Context, term: Term) -> TermResult:
    """Masked |difference| of the greatest class probability (L2C:326-385)."""
    student, teacher = context.pair(term)
    temperature = 2.0 if "unidistill.teacher_temperature" in context.on else 1.0
    eps = 1e-3 if "unidistill.wide_teacher_clamp" in context.on else EPS
    ours = class_probability(student, EPS).max(1, keepdim=True).values
    theirs = class_probability(teacher, eps, temperature).max(1, keepdim=True).values
    error = masked_mean_l1(ours, theirs, response_mask(context, term, student))
    return TermResult.of(error, Cells(), context.grid_of(student))


def response_regression(context: Context, term: Term) -> TermResult:
    """Masked mean |difference| of all tasks' regression maps, whatever the box's class (L2C:326-385)."""
    student, teacher = context.pair(term)
    error = masked_mean_l1(student, teacher, response_mask(context, term, student))
    return TermResult.of(error, Cells(), context.grid_of(student))


_OWN = {
    "F2C": (
        Quirk(
            "unidistill.wide_teacher_clamp",
            "clamps the teacher's probabilities at 1e-3, not 1e-4",
            "F2C:190-192, 335",
            means="one clamp for both sides",
        ),
    ),
    "C2L": (
        Quirk(
            "unidistill.no_adapters",
            "runs without the paper's adaptive layers on the student's maps",
            "C2L has none; candidates commented out in the base experiment:219-220",
            "adapter",
            means="where the teacher is the weaker, adaptive layers stand on the student's two maps",
        ),
    ),
}
"""Quirks of one path alone."""


def _quirks(path: Path) -> tuple[Quirk, ...]:
    swap = {"F2C": "F2C:225, 275"}.get(path, f"{path}:226, 276") + "; the repository's issue 7"
    reload = {
        "L2C": " (state reloaded at L2C:462)",
        "C2L": " (state reloaded at C2L:460)",
        "F2L": " (state reloaded at F2L:457)",
    }
    lines = "; the same functions stand one line earlier in F2C" if path == "F2C" else ""
    return (
        Quirk(
            "unidistill.transpose_points",
            "exchanges the points' coordinates, so maps are read at the mirror image",
            swap,
            means="features and relations are read at the points of the box",
        ),
        Quirk(
            "unidistill.teacher_temperature",
            "halves the teacher's class logits, not the student's",
            "L2C:336" + lines,
            means="probabilities of both sides alike; no temperature is known of",
        ),
        Quirk(
            "unidistill.count_first_row",
            "counts row 0 as a box even where a sample has none",
            "L2C:448-455" + lines,
            means="boxes alone count",
        ),
        Quirk(
            "unidistill.pad_lights_ego",
            "draws padding rows into the mask, at the ego's cell",
            "L2C:100-178, 456-458" + lines,
            means="boxes alone are drawn",
        ),
        Quirk(
            "unidistill.truncate_centre",
            "rounds the mask's centres toward zero, not down",
            "L2C:100-178" + lines,
            means="a centre's cell is the one that holds it",
        ),
        Quirk(
            "unidistill.teacher_train_mode",
            "runs the teacher in training mode, on the batch's statistics",
            ("F2C:420" if path == "F2C" else "L2C:424") + reload.get(path, " (state not reloaded)"),
            "teacher",
            TeacherMode(batch_statistics=True, restore=path != "F2C"),
            means="the teacher is frozen, its batch norms too",
        ),
        *_OWN.get(path, ()),
    )


def _adapter(name: str, path: Path) -> Adapter:
    unless = "unidistill.no_adapters" if path == "C2L" else None
    source = "UniDistill (CVPR 2023), adaptive layers, 1x1 second-hand; not in the released code"
    return Adapter(
        name, lambda student, teacher: nn.Conv2d(student, teacher, 1), "1x1 convolution", source, unless=unless
    )


def _terms(path: Path, adapt: bool) -> tuple[Term, ...]:
    low, high, resp = PATHS[path].weights
    venue, shift = "UniDistill (CVPR 2023)", 1 if path == "F2C" else 0
    at = f"weight {path}:{PATHS[path].lines}"

    def source(first: int, last: int) -> str:
        return f"{venue}, {path}:{first - shift}-{last - shift}, {at}"

    options = {"overlap": 0.7, "min_radius": 0}
    adapters = ("unidistill.low", "unidistill.high") if adapt else (None, None)
    cure = "" if adapt else "--options adapt on"
    return (
        Term(name="feature", function=feature, weight=low, source=source(196, 245), adapter=adapters[0], adapt=cure),
        Term(
            name="relation",
            function=relation,
            weight=high,
            source=source(248, 323),
            teacher="teacher.neck",
            student="student.neck",
            adapter=adapters[1],
            adapt=cure,
        ),
        Term(
            name="response_class",
            function=response_class,
            weight=resp,
            source=source(326, 385),
            teacher="teacher.predictions.heatmap",
            student="student.predictions.heatmap",
            options=options,
        ),
        Term(
            name="response_regression",
            function=response_regression,
            weight=resp,
            source=source(326, 385),
            teacher="teacher.predictions.regression",
            student="student.predictions.regression",
            options=options,
        ),
    )


def unidistill(path: Path = "L2C", variant: Variant = "intended", adapt: bool | None = None) -> Method:
    """UniDistill along one of its four paths.

    Args:
        path: teacher's to student's modality (L LiDAR, C camera, F fusion).
        variant: all quirks off or on.
        adapt: put 1x1 adapters on the student's two maps; by default for C2L (its quirk takes them away).

    Raises:
        ValueError: no such path or variant.
    """
    if path not in PATHS:
        raise ValueError(f"unidistill: unknown path {path!r}; known: {', '.join(PATHS)}")
    row, adapt = PATHS[path], path == "C2L" if adapt is None else adapt
    return Method(
        name="unidistill",
        teacher=frozenset((row.teacher,)),
        student=frozenset((row.student,)),
        terms=_terms(path, adapt),
        adapters=(_adapter("unidistill.low", path), _adapter("unidistill.high", path)) if adapt else (),
        quirks=_quirks(path),
    ).variant(variant)


def nearest(student: Modality, teacher: Modality) -> Path:
    """The path of these modalities; for a pair without one, the path whose weights and quirks are taken.

    It is kdlab's choice, by what the weaker side sees. Cameras teach a fusion student as they teach a LiDAR (C2L, with
    adapters), and cameras teach cameras as fusion does (F2C). The rest goes by F2L: LiDAR or fusion to their like, as
    no worse teachers, and LiDAR to fusion, where LiDAR is most of what either knows, although the student sees more;
    adapters, as for a weaker teacher, are there with option ``adapt``.
    """
    for path, row in PATHS.items():
        if (row.student, row.teacher) == (student, teacher):
            return path  # type: ignore[return-value]
    if student == "camera":
        return "F2C"
    return "C2L" if teacher == "camera" else "F2L"


def by_modality(student: Modality, teacher: Modality, path: str = "auto", adapt: str = "auto") -> Method:
    """UniDistill between these modalities.

    Args:
        student: its modality.
        teacher: its modality.
        path: whose weights and quirks to take; auto: that of the modalities, see `nearest`.
        adapt: on or off: adapters on the student's maps; auto: as the path has it.
    """
    chosen = nearest(student, teacher) if path == "auto" else path
    method = unidistill(chosen, adapt=None if adapt == "auto" else adapt == "on")  # type: ignore[arg-type]
    return method.between(student, teacher)


DIFFERENCES = (
    "Too little is known of the paper's form, second-hand: the response terms as one masked sum over the class maximum "
    "and the regression channels together; a mask as wide as CenterPoint's (set `overlap` 0.1 and `min_radius` 2 in "
    "the response terms' options); the learning rate of LiDAR and fusion models, 1e-4 in the paper and 1e-3 in the "
    "code (kdlab's belongs to the training config, not to a method).",
    "They belong to the released detectors, and kdlab distils between its own: the IoU-aware head with top-9 "
    "assignment and learned loss weights, 66 regression channels where kdlab's head has 60 (the term averages over "
    "channels, whatever their number); the lift that truncates cell indices toward zero, where kdlab's rounds down.",
    "They are faults of the released input pipeline, before any tensor that a term sees: clouds padded with zeros to "
    "equal length, which adds points at the origin where a batch has more than one sample; images in BGR order "
    "normalised with the statistics of RGB.",
)
"""No quirks, and why."""

PAPER = PaperMethod(
    by_modality,
    tuple((row.student, row.teacher) for row in PATHS.values()),
    (
        Option("path", ("auto", *PATHS), "auto", "whose weights and quirks to take; auto: those of the modalities"),
        Option("adapt", ("auto", *SWITCH), "auto", "1x1 adapters on the student's two maps; auto: for C2L alone"),
    ),
    DIFFERENCES,
)
