"""LabelDistill's files: label maps, targets, losses, the label encoder, adaptors and the released input pipeline.

The cases of a file have a name in front, such as ``typical/``; boxes and maps come as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlab.distill.labeldistill import GROUPS, adaptor, foreground, imitate
from kdlab.distill.paths import Part
from kdlab.distill.terms import class_probability
from kdlab.models.labels import label_maps
from kdlab.parity.compare import Arrays, Family, Row, compare, not_computed
from kdlab.parity.labeldistill_case import Case, Encoder, Labelled, at_cells, block_name
from kdlab.parity.labeldistill_input import BEVAugmentation, Depth, Geometry, ImageAugmentation
from kdlab.parity.oracles import ForeignGrid
from kdlab.sample import TASKS, Boxes3D

Match = re.Match[str]
Output = tuple[str, Callable[..., Tensor], float]


class Polygons(Case):
    """Footprints in cells, each on a grid of its own."""

    def mask(self) -> Tensor:
        """Painted cells [K, H, W]."""
        place, size, box = (self.given(n).float() for n in ("center", "size", "box"))
        height, width = self.given("mask").shape[-2:]
        values = torch.cat((place, box[:, 2:3], size, box[:, 5:]), 1)[:, None]
        grid = ForeignGrid((0.0, float(width)), (0.0, float(height)), 1.0, (height, width))
        return label_maps(Boxes3D.make(values, torch.zeros(len(values), 1, dtype=torch.long)), grid, released=True).mask


class FeatureLoss(Case):
    """Maps of both sides, level by level, and the targets' heat map."""

    @property
    def levels(self) -> list[int]:
        """Indices of the levels."""
        return [i for i in range(9) if self.holds(f"teacher_{i}")]

    def mask(self, kind: str, level: int) -> Tensor:
        """Foreground [B, h, w]; the LiDAR's is soft, the labels' is binary."""
        height, width = self.given(f"teacher_{level}").shape[-2:]
        return foreground(self.given("heatmap").float(), (height, width), binary=kind == "label")

    def leaf(self, level: int) -> Tensor:
        """The student's map."""
        return self.given(f"student_{level}").float().requires_grad_()

    def error(self, kind: str, level: int, student: Tensor) -> Tensor:
        """A level's loss; ``nomask`` counts every cell alike."""
        mask = self.mask(kind, level)
        mask = torch.ones_like(mask) if kind == "nomask" else mask
        return imitate(student, self.given(f"teacher_{level}").float(), mask, local=True).sum()

    def loss(self, kind: str, factor: str = "1") -> Tensor:
        """All levels together."""
        return sum((self.error(kind, i, self.leaf(i)) for i in self.levels), torch.zeros(())) * float(factor)

    def gradient(self, kind: str, level: int) -> Tensor:
        """Gradient of a loss at the student's map."""
        student = self.leaf(level)
        return torch.autograd.grad(self.error(kind, level, student), student)[0]


class Partition(Case):
    """Maps whose channels are parted, and the adaptors behind two of the parts."""

    def run(self, mode: str, group: str, level: int, maps: Tensor) -> Tensor:
        """A group's part of a level's map, adapted."""
        weights = self.weights(f"{group}/blocks.{level}.")
        part = Part(GROUPS.index(group), len(GROUPS)).take(maps)
        width = len(self.given(f"{group}/blocks.{level}.0.bias"))
        module = adaptor(part.shape[1], width).train(mode == "train")
        module.load_state_dict({block_name(name): value for name, value in weights.items()})
        adapted: Tensor = module(part)
        return adapted

    def output(self, mode: str, group: str, level: int) -> Tensor:
        """What an adaptor makes of a stored map."""
        return self.run(mode, group, level, self.given(f"in_{level}").float())

    def used(self, mode: str, level: int) -> Tensor:
        """Channels of a level that a group's output depends on, bool."""
        maps = self.given(f"in_{level}").float().requires_grad_()
        total = torch.stack([self.run(mode, g, level, maps).square().sum() for g in GROUPS[:2]]).sum()
        return torch.autograd.grad(total, maps)[0].abs().sum((0, 2, 3)) > 0


def _codes(case: Labelled, match: Match) -> Tensor:
    kinds = ("anno_box", "ind", "mask")
    most = next(case.given(n).shape[2] for n in kinds if case.holds(n))
    return case.targets(most)[kinds.index(match.string)]


def _losses(case: Labelled, which: str) -> tuple[Tensor, Tensor]:
    """Heat map and box losses by task of ``det``, ``resp`` or ``step1``."""
    if which == "resp":
        return case.response("heatmap"), case.response("box")
    return case.detection(*case.student, velocity=0.5 if which == "step1" else 1.0)


def _per_task(case: Labelled, match: Match) -> Tensor:
    return _losses(case, match["which"])[match["part"] == "box"]


def _total(case: Labelled, match: Match) -> Tensor:
    return torch.stack(_losses(case, match["which"])).sum()


def _head_gradient(case: Labelled, match: Match) -> Tensor:
    total = torch.stack(_losses(case, match["which"])).sum()
    found = torch.autograd.grad(total, case.student, materialize_grads=True)
    what = match["what"]
    if what == "heatmap":
        return found[0]
    if what == "box_abs_sum":
        return found[1].abs().sum()
    return at_cells(found[1], case.targets(case.given("ind").shape[-1])[1])


def _target_max(case: Labelled, match: Match) -> Tensor:
    scores = class_probability(case.given("teacher_heatmap_logit").float(), 1e-4) * case.heatmap
    most = scores.amax((0, 2, 3))
    return torch.stack([most[list(classes)].max() for classes in TASKS])


def _running_mean(case: Encoder, match: Match) -> Tensor:
    return case.run(match["mode"])[0].get_buffer("block.first.1.running_mean")


@dataclass(frozen=True)
class Kind:
    """A kind of group.

    Attributes:
        case: reads it.
        marks: inputs by which it is known; all of them.
        inputs: pattern of its inputs' names.
        outputs: patterns of its outputs' names, what computes them, tolerances relative to the greatest value.
    """

    case: type[Case]
    marks: tuple[str, ...]
    inputs: str
    outputs: tuple[Output, ...]


_MODE = r"(?P<mode>eval|train)"
_BOXES = r"n_samples|gt_(boxes|labels)_\d+"
_TARGETS: tuple[Output, ...] = (
    (r"bev_mask", lambda case, match: case.maps.mask, 0.0),
    (r"bev_box", lambda case, match: case.maps.box, 1e-6),
    (r"bev_label", lambda case, match: case.maps.label, 0.0),
    (r"heatmap", lambda case, match: case.heatmap, 1e-6),
    (r"anno_box", _codes, 2e-6),
    (r"ind|mask", _codes, 0.0),
)
_KINDS = (
    Kind(
        Labelled,
        ("n_samples", "student_heatmap_logit", "student_box"),
        rf"{_BOXES}|(student|teacher)_heatmap_logit|student_box|teacher_box_at_ind",
        (
            *_TARGETS,
            (r"(?P<which>det|resp)_(?P<part>heatmap|box)_per_task", _per_task, 1e-5),
            (r"(?P<which>det|resp|step1)_loss", _total, 1e-5),
            (r"resp_heatmap_target_max", _target_max, 1e-5),
            (r"(?P<which>det|resp|step1)_grad_(?P<what>heatmap|box_at_ind|box_abs_sum)", _head_gradient, 1e-5),
        ),
    ),
    Kind(
        Encoder,
        ("n_samples", "w/ln2.weight"),
        _BOXES,
        (
            *_TARGETS,
            (rf"{_MODE}_out_(?P<level>\d+)", lambda c, m: c.run(m["mode"])[1][int(m["level"])], 1e-5),
            (rf"{_MODE}_step1_loss", lambda c, m: c.step(m["mode"])[1], 1e-5),
            (rf"{_MODE}_grad_mlp_(?P<layer>box|label)_fc1", lambda c, m: c.gradient(m["mode"], m["layer"]), 1e-4),
            (rf"{_MODE}_bn1_running_mean_after", _running_mean, 1e-5),
        ),
    ),
    Kind(Labelled, ("n_samples",), _BOXES, _TARGETS),
    Kind(
        FeatureLoss,
        ("heatmap", "teacher_0", "student_0"),
        r"heatmap|(teacher|student)_\d",
        (
            (
                r"(?P<kind>lidar|label)_mask_(?P<level>\d)",
                lambda c, m: c.mask(m["kind"], int(m["level"]))[:, None],
                1e-6,
            ),
            (
                r"(?P<kind>lidar|label|nomask)_loss(_x(?P<factor>[\d.]+))?",
                lambda c, m: c.loss(m["kind"], m["factor"] or "1"),
                1e-5,
            ),
            (r"(?P<kind>lidar|label)_grad_(?P<level>\d)", lambda c, m: c.gradient(m["kind"], int(m["level"])), 1e-5),
        ),
    ),
    Kind(
        Partition,
        ("in_0",),
        r"in_\d",
        (
            (
                rf"{_MODE}_(?P<group>label|lidar)_(?P<level>\d)",
                lambda c, m: c.output(m["mode"], m["group"], int(m["level"])),
                1e-5,
            ),
            (rf"{_MODE}_used_channels_(?P<level>\d)", lambda c, m: c.used(m["mode"], int(m["level"])), 0.0),
        ),
    ),
    Kind(Polygons, ("center", "size", "box"), r"center|size|box|cls", ((r"mask", lambda c, m: c.mask(), 0.0),)),
    Kind(
        Depth,
        ("depth", "logits", "dbound"),
        r"depth|logits|dbound|edge_values",
        (
            (r"bin", lambda c, m: c.bins(), 0.0),
            (r"loss", lambda c, m: c.loss(), 1e-5),
            (r"grad_(?P<what>logits|prob)", lambda c, m: c.gradient(m["what"]), 1e-5),
        ),
    ),
    Kind(
        BEVAugmentation,
        ("param", "boxes_in"),
        r"param|boxes_in",
        ((r"rot_mat", lambda c, m: c.matrix(), 1e-6), (r"boxes_out", lambda c, m: c.boxes(), 1e-6)),
    ),
    Kind(
        ImageAugmentation,
        ("param", "points_uvd"),
        r"param|points_uvd",
        (
            (r"ida_mat", lambda c, m: c.matrix(), 1e-6),
            (r"nz_yx", lambda c, m: c.cells(), 0.0),
            (r"nz_depth", lambda c, m: c.depths(), 1e-6),
        ),
    ),
    Kind(
        Geometry,
        ("sensor2ego", "intrin", "ida", "bda"),
        r"d_bound|sensor2ego|intrin|ida|bda|voxel_size|voxel_coord",
        (
            (r"frustum", lambda c, m: c.frustum(), 1e-6),
            (r"xyz", lambda c, m: c.points(), 1e-6),
            (r"voxel_idx", lambda c, m: c.cells(), 0.0),
        ),
    ),
)
_WEIGHTS = re.compile(r"(w|neck|head)/.+|(label|lidar)/blocks\..+")


def _groups(names: frozenset[str]) -> dict[str, frozenset[str]]:
    """Names of arrays by prefix, without it; weights are none of them."""
    found: dict[str, set[str]] = {}
    for name in names:
        if not _WEIGHTS.fullmatch(name):
            prefix, slash, base = name.rpartition("/")
            found.setdefault(prefix + slash, set()).add(base)
    return {prefix: frozenset(bases) for prefix, bases in sorted(found.items())}


def _kind(bases: frozenset[str], names: frozenset[str]) -> Kind | None:
    return next((kind for kind in _KINDS if all(mark in bases or mark in names for mark in kind.marks)), None)


def _owns(names: frozenset[str]) -> bool:
    return any(_kind(bases, names) for bases in _groups(names).values())


def _row(file: str, name: str, match: Match, output: Output, case: Case) -> Row:
    _, function, tolerance = output
    stored = case.arrays[name]
    try:
        scale = max(1.0, float(abs(stored).max())) if stored.size else 1.0
        return compare(file, name, function(case, match), stored, tolerance, scale)
    except Exception as error:  # whatever is wrong with one array, the others are still judged
        return Row(file, name, None, tolerance, note=str(error.args[0] if error.args else error))


def _group_rows(file: str, prefix: str, bases: frozenset[str], kinds: list[Kind], arrays: Arrays) -> list[Row]:
    """Rows of a group of this kind; of no kind are arrays that the file's groups share, and may be any one's inputs."""
    own = _kind(bases, frozenset(arrays))
    case = own.case(arrays, prefix) if own else Case(arrays, prefix)
    rows = []
    for base in sorted(bases):
        tried = ((re.fullmatch(output[0], base), output) for output in (own.outputs if own else ()))
        match, output = next(((m, o) for m, o in tried if m), (None, None))
        if match and output:
            rows.append(_row(file, prefix + base, match, output, case))
        elif not any(re.fullmatch(kind.inputs, base) for kind in ([own] if own else kinds)):
            names = bases | frozenset(arrays)
            why = not_computed(base, names, ((k.marks, [pattern for pattern, _, _ in k.outputs]) for k in _KINDS))
            rows.append(Row(file, prefix + base, None, 0.0, note=why))
    return rows


def _rows(file: str, arrays: Arrays) -> list[Row]:
    names = frozenset(arrays)
    groups = _groups(names)
    kinds = [kind for bases in groups.values() if (kind := _kind(bases, names))]
    return [row for prefix, bases in groups.items() for row in _group_rows(file, prefix, bases, kinds, arrays)]


_MARKS = frozenset(mark for kind in _KINDS for mark in kind.marks)
FAMILY = Family("labeldistill", _owns, _rows, _MARKS)
"""How to tell and compare such files."""
