"""DistillBEV (ICCV 2023): BEV maps cell by cell, weighted by region, object size and attention.

Method from qcraftai/distill-bev, commit 3e8f6a4. Cited: BD = mmdet3d/models/detectors/bevdet_distill.py; CFG4D = the
config centerpoint_..._to_bevdepth4d_r50.py; SH = scripts/teacher_to_bevdepth4d/centerpoint2bevdepth.sh, whose settings
are the released recipe. The paper's body was not at hand: what it intends is reconstructed from its abstract, its
poster, the authors' answers in the repository's issues and the code; its spatial term is second-hand.

The regions of a sample: foreground, cells in a ground-truth box; false positives, cells where the teacher fires and no
target stands; background, the rest. Each has a weight of its own, and scales that make the background's and the false
positives' errors means, and an object's error grow with the root of its cells only.

Errors are sums over channels, so the weights do not port to other widths: see `kdlab.presets.SCALES`. A weight of 0 for
the false positives leaves their cells out of the background too; ``false_positives=()`` makes them background.
Differences between paper, released code and kdlab that are no quirks stand in `DIFFERENCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdlab.distill.context import Context
from kdlab.distill.method import Adapter, Method, Quirk, Start, Term, Variant
from kdlab.distill.options import SWITCH, Option, PaperMethod
from kdlab.distill.places import Cells, TermResult
from kdlab.distill.regions import fires_wrongly, footprint_owner, gaussian_mask, share, size_scale
from kdlab.distill.terms import cell_attention, channel_attention, class_probability, squared_error
from kdlab.geometry import BEVGrid

Region = Literal["foreground", "background", "false_positive"]
Attention = Literal["both", "teacher", "none"]
POSITIONS = {"B0": "stages[-3]", "B1": "stages[-2]", "B2": "stages[-1]", "H": "neck"}
"""Where maps may be compared: the BEV encoder's stages, counted from the deepest, and what the head sees."""
WEIGHTS = {"foreground": 6e-3, "background": 4e-2, "false_positive": 6e-2, "spatial": 2.5e-3}
"""The recipe's, the same at every position."""
HEATMAP = "teacher.predictions.heatmap"
_VENUE = "DistillBEV (ICCV 2023)"


@dataclass(frozen=True)
class Regions:
    """The parts of a map; cells are [B, H, W].

    Attributes:
        foreground: bool, in a box.
        false_positive: bool, where the teacher fires without reason.
        size: float32, 1 / sqrt(cells of the box) in the foreground, 0 elsewhere.
    """

    foreground: Tensor
    false_positive: Tensor
    size: Tensor

    @property
    def background(self) -> Tensor:
        """Bool, the rest."""
        return ~(self.foreground | self.false_positive)

    def weight(self, region: Region, combined: bool = False, adaptive: bool = True) -> Tensor:
        """Scale of a region's cells, 0 elsewhere, float32 [B, H, W].

        Args:
            region: which.
            combined: foreground and background take the greater of both scales, as released (BD:1118-1129); it differs
                where there is less background than the root of a box's cells.
            adaptive: without, the foreground's total is spread evenly over its cells, whatever the object's size.
        """
        if region == "false_positive":
            return self.false_positive * share(self.false_positive)
        background = share(self.background)
        if region == "background":
            return self.background * background
        scale = self.size if adaptive else self.size.sum((1, 2), keepdim=True) * share(self.foreground)
        return self.foreground * (scale.maximum(background) if combined else scale)


def regions(context: Context, term: Term) -> Regions:
    """The regions at a term's position.

    Options: ``false_positives``, whether they are told from the background; ``split``, whether the foreground is.
    """
    grid, fires = context.grid_of(context.teacher_tensor(term)), term.options["false_positives"]
    split = term.options.get("split", True)

    def make() -> Regions:
        values, counted = context.boxes.values, context.boxes.valid
        if "distillbev.centre_in_range" in context.on:
            counted = counted & context.grid.locate(values[..., :2])[2]
        owner = footprint_owner(values, counted, grid, 0.0 if "distillbev.corner_points" in context.on else 0.5)
        foreground = (owner < values.shape[1]) & split
        wrong = ~foreground & _teacher_fires(context, term, grid) if fires else torch.zeros_like(foreground)
        return Regions(foreground, wrong, size_scale(values, owner, grid))

    return context.once(("distillbev.regions", grid, split, fires and term.options["threshold"]), make)


def _teacher_fires(context: Context, term: Term, grid: BEVGrid) -> Tensor:
    scores = class_probability(context.tensor(HEATMAP), 1e-4).amax(1)
    boxes, heads = context.boxes, context.grid_of(scores)
    drawn = boxes.valid & heads.locate(boxes.values[..., :2])[2]
    truth = gaussian_mask(boxes.values, drawn, heads, overlap=0.1, min_radius=2)[:, 0]
    return fires_wrongly(truth, scores, term.options["threshold"], term.options["threshold"], grid.shape)


def strengths(context: Context, term: Term) -> tuple[Tensor, Tensor]:
    """Mean |value| over the channels of the student's and the teacher's map, [B, H, W]."""

    def make() -> tuple[Tensor, Tensor]:
        student, teacher = context.pair(term)
        return student.abs().mean(1), teacher.abs().mean(1)

    return context.once(("distillbev.strengths", term.student, term.teacher, term.adapter), make)


def attention(context: Context, term: Term) -> Tensor:
    """Where the maps are strong, [B, H, W], without gradient (BD:1084-1106).

    Options: ``attention``, "teacher", "both", which takes the mean of the teacher's and the adapted student's, or
    "none", which is 1; and ``temperature``.
    """
    temperature, both = term.options["temperature"], term.options["attention"] == "both"
    none = term.options["attention"] == "none"

    def make() -> Tensor:
        student, teacher = (strength.detach() for strength in strengths(context, term))
        if none:
            return torch.ones_like(teacher)
        found = cell_attention(teacher, temperature)
        return (found + cell_attention(student, temperature)) / 2 if both else found

    how = (temperature, both, none)
    return context.once(("distillbev.attention", term.student, term.teacher, term.adapter, *how), make)


def imitate(context: Context, term: Term, weight: Tensor) -> TermResult:
    """Squared difference, summed over channels, times weight [B, H, W] and attention, over the batch (BD:973-1324).

    Option ``channel_attention``: the channels' errors carry the teacher's channel attention too.
    """
    student, teacher = context.pair(term)
    channels = term.options.get("channel_attention", False)

    def make() -> Tensor:
        if not channels:
            return squared_error(student, teacher)
        weight = channel_attention(teacher, term.options["temperature"]).detach()
        return ((student - teacher).square() * weight).sum(1)

    error = context.once(("distillbev.error", term.student, term.teacher, term.adapter, channels), make)
    error = error * weight * attention(context, term) / len(error)
    return TermResult.of(error, Cells(), context.grid_of(student))


def regional(context: Context, term: Term) -> TermResult:
    """`imitate` in the region that option ``region`` names."""
    region: Region = term.options["region"]
    if region == "false_positive" and "distillbev.channel_attention" in context.on:
        term = replace(term, options={**term.options, "channel_attention": True})
    weight = regions(context, term).weight(
        region, "distillbev.combined_scale" in context.on, term.options.get("scaling", True)
    )
    return imitate(context, term, weight)


def spatial(context: Context, term: Term) -> TermResult:
    """Difference of the channels' mean strength, summed over all cells, over the batch (BD:1273-1277)."""
    student, teacher = context.pair(term)
    grid = context.grid_of(student)
    signed = "distillbev.signed_means" in context.on
    ours, theirs = (student.mean(1), teacher.mean(1)) if signed else strengths(context, term)
    for name in term.modules:
        ours = context.module(name)(ours.unsqueeze(1)).squeeze(1)
    return TermResult.of((theirs - ours).abs() / len(ours), Cells(), grid)


QUIRKS = (
    Quirk(
        "distillbev.corner_points",
        "tests a cell's lower corner for lying in a box, not its centre",
        "BD:766-767",
        means="a cell is in a box where its centre is",
    ),
    Quirk(
        "distillbev.channel_attention",
        "puts the teacher's channel attention on the false positives' errors",
        "BD:1284; the repository's issue 6",
        means="attention is spatial alone",
    ),
    Quirk(
        "distillbev.signed_means",
        "compares signed means over channels, not those of |values|",
        "BD:1273-1277",
        means="the spatial term compares spatial attention, the mean of |values| over channels",
    ),
    Quirk(
        "distillbev.spatial_conv",
        "sends the student's means through a learned 3x3 convolution",
        "BD:348-351, 1273-1277",
        "adapter",
        means="the spatial term compares both sides' maps as they are",
    ),
    Quirk(
        "distillbev.combined_scale",
        "gives an object's cells the background's scale where that is greater",
        "BD:1118-1129 (combine_gt)",
        means="each region has its own scale",
    ),
    Quirk(
        "distillbev.centre_in_range",
        "counts a box only if its centre lies in range",
        "the released training pipeline's range filter",
        "data",
        means="kdlab's choice: a cell in a box is foreground, wherever the box's centre lies",
    ),
)


def one_layer(student: int, teacher: int) -> nn.Module:
    """A 1x1 convolution between these widths."""
    return nn.Conv2d(student, teacher, 1)


def three_layers(student: int, teacher: int) -> nn.Module:
    """Three times 1x1 convolution, norm, ReLU; only the last changes the width (BD:99-132)."""
    layers: list[nn.Module] = []
    for width, after in pairwise((student, student, student, teacher)):
        layers += [nn.Conv2d(width, after, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)


def _adapters(position: str) -> tuple[Adapter, Adapter]:
    build: Callable[[int, int], nn.Module] = one_layer if position == "H" else three_layers
    what = "1x1 convolution" if position == "H" else "upsampling, 3 x (1x1 convolution, norm, ReLU)"
    source = f"{_VENUE}, BD:99-132, 275-288, kind SH:32-38"
    return (
        Adapter(f"distillbev.{position}", build, what, source, resize="corners"),
        Adapter(
            f"distillbev.spatial_{position}",
            lambda student, teacher: nn.Conv2d(1, 1, 3, padding=1),
            "3x3 convolution of one channel",
            f"{_VENUE}, BD:348-351",
            only="distillbev.spatial_conv",
        ),
    )


START = Start("head.tasks", f"{_VENUE}, BD:367-373, SH:24", "--options inherit_head off")
"""The student's task heads start from the teacher's."""

_LINES = {"foreground": "SH:39-40", "background": "CFG4D and SH", "false_positive": "SH:39-40"}
"""Where the regions' weights stand."""


def _terms(position: str, options: Mapping[str, Any]) -> tuple[Term, ...]:
    path, phi, psi = POSITIONS[position], *(a.name for a in _adapters(position))
    imitated = {region: f"weight {line}" for region, line in _LINES.items()}
    if not options["false_positives"]:
        del imitated["false_positive"]
    if not options["split"]:
        imitated = {"background": f"{imitated['background']}; the paper's ablation without regions does not tell its"}
    sides = {"teacher": f"teacher.{path}", "student": f"student.{path}", "adapter": phi}
    found = [
        Term(
            name=f"{region}_{position}",
            function=regional,
            weight=WEIGHTS[region],
            source=f"{_VENUE}, BD:973-1324, {weight}",
            reads=(HEATMAP,) if options["false_positives"] else (),
            options={"region": region, "temperature": 0.5, "threshold": 0.1, **options},
            **sides,  # type: ignore[arg-type]
        )
        for region, weight in imitated.items()
    ]
    last = Term(
        name=f"spatial_{position}",
        function=spatial,
        weight=WEIGHTS["spatial"],
        source=f"{_VENUE}, BD:1273-1277, weight CFG4D and SH",
        modules=(psi,),
        **sides,  # type: ignore[arg-type]
    )
    return (*found, last)


def distillbev(
    variant: Variant = "intended",
    *,
    positions: Sequence[str] = ("B1", "B2", "H"),
    false_positives: Sequence[str] | None = None,
    attention: Attention = "both",
    scaling: bool = True,
    regions: Literal["split", "whole"] = "split",
    inherit_head: bool = True,
) -> Method:
    """DistillBEV at some positions of `POSITIONS`.

    Args:
        variant: all quirks off or on.
        positions: where to compare; B1 and B2 are the two deepest stages of the BEV encoder, on either side.
        false_positives: positions where the teacher's false positives are a region of their own; by default H, where
            that is compared and regions are split.
        attention: of the teacher's maps, of both sides' ("teacher" is what the released BEVFormer recipe takes), or
            none.
        scaling: weigh an object's cells by its size; without, all foreground cells of a sample alike, their total kept.
        regions: "whole" makes all cells background, so that ``scaling`` has nothing to scale; attention and the spatial
            term stay as they are.
        inherit_head: start the student's task heads from the teacher's, which must be as wide.

    Raises:
        ValueError: no such position or variant, or false positives where nothing is compared or no region is told.
    """
    split = regions == "split"
    if false_positives is None:
        false_positives = ("H",) if split and "H" in positions else ()
    _check_positions(positions, false_positives, split)
    how = {
        p: {
            "attention": attention,
            "scaling": scaling,
            "split": split,
            "false_positives": p in false_positives,
        }
        for p in positions
    }
    return Method(
        name="distillbev",
        teacher=frozenset(("lidar", "fusion")),
        student=frozenset(("camera",)),
        terms=tuple(t for p, options in how.items() for t in _terms(p, options)),
        adapters=tuple(a for p in positions for a in _adapters(p)),
        quirks=QUIRKS,
        start=(START,) if inherit_head else (),
    ).variant(variant)


def _check_positions(positions: Sequence[str], false_positives: Sequence[str], split: bool) -> None:
    for position in (*positions, *false_positives):
        if position not in POSITIONS:
            raise ValueError(f"distillbev: unknown position {position!r}; known: {', '.join(POSITIONS)}")
    if false_positives and not split:
        raise ValueError("distillbev: regions whole tells no false positives apart; leave false_positives out, or none")
    if not {*false_positives} <= {*positions}:
        raise ValueError(
            f"distillbev: false_positives {','.join(false_positives)} are not all among the positions that are "
            f"compared, {','.join(positions) or 'none'}; take some of these"
        )


DIFFERENCES = (
    "The authors name 20 as the weight of false positives over foreground (issue 7); the recipe has 10, and so has "
    "kdlab.",
    "False positives count at position H alone, as in the recipe; the paper's text is said to know one region for all. "
    "`distillbev` takes the positions. The code's in-place sigmoid, which spoils them at a second position, is in "
    "`kdlab.parity` alone, as are its options that no release uses.",
    "The targets' heat map that parts false positives from the rest is drawn with CenterPoint's radii, as released.",
    "A box's size counts in cells of the position's map; the paper's unit is not known.",
    "Under mixed precision adapters run in bfloat16, as the student's layers do (all methods'); terms, and the modules "
    "that they call themselves (the quirk's 3x3 convolution), stay in float32. The released code distils in float32 "
    "throughout, as a run with `--train.precision fp32` does.",
    "They belong to the released detectors, and kdlab distils between its own: strides of the BEV encoder, the neck's "
    "extra norm, the velocity branch that is taken over although the student's unit differs, past frames drawn at "
    "random.",
)
"""No quirks, and why."""

PAPER = PaperMethod(
    lambda student, teacher, **options: distillbev(**options).between(student, teacher),
    (("camera", "lidar"), ("camera", "fusion")),
    (
        Option("positions", tuple(POSITIONS), "B1,B2,H", "where maps are compared", several=True),
        Option("false_positives", tuple(POSITIONS), "H", "compared positions with a region for them", several=True),
        Option("attention", ("both", "teacher", "none"), "both", "whose spatial attention weighs the cells"),
        Option("scaling", SWITCH, "on", "weigh cells by their object's size; off: all foreground cells alike"),
        Option(
            "regions", ("split", "whole"), "split", "tell foreground from background; whole: all cells are background"
        ),
        Option("inherit_head", SWITCH, "on", "start the task heads from the teacher's"),
    ),
    DIFFERENCES,
)
