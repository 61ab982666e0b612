"""DistillBEV's files: masks, regions, attention, losses and their gradients.

What no release uses is computed by `kdlab.parity.oracles`; files whose name holds ``knifeedge`` depend on the released
code's rounding and are shown, not judged.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlab.distill.terms import channel_attention, spatial_attention
from kdlab.parity.compare import Arrays, Family, Row, compare
from kdlab.parity.distillbev_case import Case, Size, false_scale, modern, size_of
from kdlab.parity.distillbev_losses import Losses

_INPUT = re.compile(
    r"gt_(boxes|offsets|labels)|geom_.+|(teacher|student)_(?!.*__)(?!attention).+|param__.+|config_json|"
    r"output_threshold|context_(length|weight)"
)
Match = re.Match[str]


def _false_output(case: Case, match: Match, shape: Size) -> Tensor:
    """False positives of a name such as ``fp_mask__teacher_average_32`` or ``fp_scale__gtthr05``."""
    mode, below = match["mode"] or "teacher", None
    if match["below"]:
        below = float(f"{match['below'][0]}.{match['below'][1:]}")
    beside = match.string.replace("fp_count", "fp_mask")  # a count has no rows: they are those of the map beside it
    size = size_of(case.given(beside)) if match["what"] == "count" else shape
    masks = (v for n, v in sorted(case.arrays.items()) if n.startswith("fg_mask_") and size_of(v) == size)
    found = next(masks, None)
    foreground = case.owned(size) if found is None else torch.from_numpy(found[:, 0] > 0)
    return _shown(case.false_positive(mode, foreground, below), match["what"], match["scale"])


def _shown(cells: Tensor, what: str, mode: str | None = None) -> Tensor:
    if what == "count":
        return cells.sum((1, 2))
    return (cells if what == "mask" else false_scale(cells, mode or "average"))[:, None]


def _called(case: Case, match: Match, shape: Size) -> Tensor:
    foreground = case.given("fg_mask")[:, 0] > 0
    return _shown(case.false_positive("teacher", foreground, calls=int(match["calls"])), match["what"])


def _by_boxes(case: Case, match: Match, shape: Size) -> Tensor:
    size = shape
    if match["what"] == "count":
        size = next(size_of(v) for n, v in case.arrays.items() if n.startswith(("fp_mask_", "fg_mask_")))
    return _shown(case.false_boxes(size), match["what"])


def _attention(case: Case, match: Match, shape: Size) -> Tensor:
    temperature, which = float(match["temperature"]), match["which"]
    teacher, student = (case.given(n).float() for n in ("teacher_feat", "student_feat_adapted"))
    if which == "channel_attention":
        return channel_attention(teacher, temperature)
    theirs, ours = (spatial_attention(maps, temperature)[:, None] for maps in (teacher, student))
    sums = {"t_attention": theirs, "s_attention": ours, "sum_attention__teacher": theirs}
    return sums.get(which, (theirs + ours) / 2)


def _middle(case: Case, match: Match, shape: Size) -> Tensor:
    assert isinstance(case, Losses)
    name, p = match["middle"], case.positions[0]
    if name.endswith("attention_mask"):
        return case.attention(name.removesuffix("_attention_mask"))
    if name == "student_feat_adapted":
        return case.context.pair(case.term(p))[0]
    found = case.regions(p)
    weights: dict[str, Callable[[], Tensor]] = {
        "foreground_mask": lambda: found.foreground,
        "fg_scale_mask": lambda: found.size,
        "bg_scale_mask": lambda: case.background_share(p).expand(found.size.shape),
        "fp_region": lambda: found.false_positive,
        "fp_scale_mask": lambda: case.false_scale(p),
        "fg_mask": lambda: case.weight(p, "foreground") * case.attention("sum")[:, 0],
        "bg_mask": lambda: case.weight(p, "background") * case.attention("sum")[:, 0],
    }
    return weights[name]()[:, None]


def _loss(case: Case, match: Match, shape: Size) -> Tensor:
    assert isinstance(case, Losses)
    return case.loss(match["loss"])


def _total(case: Case, match: Match, shape: Size) -> Tensor:
    assert isinstance(case, Losses)
    return torch.stack(list(case.values.values())).sum()


def _gradient(case: Case, match: Match, shape: Size) -> Tensor:
    assert isinstance(case, Losses)
    return case.gradients[match["leaf"]]


def _modern(case: Case, match: Match, shape: Size) -> Tensor:
    ours, stored = modern(case.given("gt_boxes").double()), case.given("gt_boxes_modern").double()
    turns = ((stored - ours) / (2 * torch.pi)).round() * 2 * torch.pi  # -pi and pi are one direction
    ours[:, 6] += turns[:, 6]
    return ours


def _mask(case: Case, match: Match, shape: Size) -> Tensor:
    if match["which"] == "bg_scale":
        return case.background_scale(shape)[:, None]
    return case.foreground(shape)[match["which"] == "fg_scale"][:, None]


_MIDDLE = (
    "foreground_mask|fg_scale_mask|bg_scale_mask|fg_mask|bg_mask|fp_region|fp_scale_mask|student_feat_adapted|"
    "(t|s|c_t|sum)_attention_mask"
)
_OUTPUTS: list[tuple[re.Pattern[str], Callable[[Case, Match, Size], Tensor], float]] = [
    (re.compile(pattern), function, tolerance)
    for pattern, function, tolerance in (
        (r"gt_boxes_modern", _modern, 1e-6),
        (r"(?P<which>fg_mask)_\w+", _mask, 0.0),
        (r"(?P<which>fg_scale|bg_scale)_\w+", _mask, 1e-6),
        (r"gt_heatmap", lambda case, match, shape: case.heatmap(), 1e-6),
        (
            r"fp_(?P<what>mask|scale|count)__(gtthr(?P<below>\d+)|(?P<mode>\w+)_(?P<scale>average|dfs)_\w+)",
            _false_output,
            1e-6,
        ),
        (r"fp_(?P<what>mask|scale)_call(?P<calls>\d+)", _called, 1e-6),
        (r"fp_(?P<what>mask|scale|count)(_[^_]+)?", _by_boxes, 1e-6),
        (
            r"(?P<which>[ts]_attention|channel_attention|sum_attention__(teacher|teacher_student))"
            r"_T(?P<temperature>[\d.]+)",
            _attention,
            1e-6,
        ),
        (rf"mid__(?P<middle>{_MIDDLE})", _middle, 2e-6),
        (r"loss__(?P<loss>.+)", _loss, 1e-5),
        (r"loss_total", _total, 1e-5),
        (r"grad__(?P<leaf>student_.+)", _gradient, 2e-5),
        (r"gradparam__(?P<leaf>spatial.+bias)", _gradient, 2e-4),  # a float32 sum of +-1 over all cells, which drifts
        (r"gradparam__(?P<leaf>.+)", _gradient, 2e-5),
    )
]
"""Names of outputs, what computes them, and the tolerance relative to the greatest stored value."""


def _find(name: str) -> tuple[Match, Callable[[Case, Match, Size], Tensor], float] | None:
    for pattern, function, tolerance in _OUTPUTS:
        if match := pattern.fullmatch(name):
            return match, function, tolerance
    return None


def _is_output(name: str, names: frozenset[str]) -> bool:
    if name == "gt_heatmap" or name.startswith("fg_mask"):
        return bool({"gt_boxes", "gt_offsets"} & names)  # an input where nothing says how it came about
    return not _INPUT.fullmatch(name)


def _owns(names: frozenset[str]) -> bool:
    return "geom_point_cloud_range" in names and any(_find(n) or _INPUT.fullmatch(n) for n in names)


def _scale(name: str, arrays: Arrays) -> float:
    """Greatest stored value; a bias's gradient is measured by its weight's, too, since a norm behind makes it 0."""
    beside = [name, name.removesuffix("bias") + "weight"] if name.startswith("gradparam__") else [name]
    stored: list[Any] = [arrays[n] for n in beside if n in arrays]
    return max((float(np.abs(v).max()) for v in stored if v.size), default=0.0)


def _row(file: str, name: str, case: Case) -> Row:
    found = _find(name)
    if found is None:
        return Row(file, name, None, 0.0, note="nothing computes this array")
    match, function, tolerance = found
    stored = case.arrays[name]
    try:
        shape = size_of(stored) if stored.ndim > 1 else (0, 0)
        scale = _scale(name, case.arrays)
        return compare(file, name, function(case, match, shape), stored, tolerance, scale)
    except Exception as error:  # whatever is wrong with one array, the others are still judged
        return Row(file, name, None, tolerance, note=str(error.args[0] if error.args else error))


def _rows(file: str, arrays: Arrays) -> list[Row]:
    names = frozenset(arrays)
    case = Losses(arrays) if "config_json" in names or any(n.startswith("loss_") for n in names) else Case(arrays)
    rows = [_row(file, name, case) for name in sorted(names) if _is_output(name, names)]
    if "knifeedge" in Path(file).name:
        rows = [replace(r, judged=False, note=r.note or "depends on the released rounding") for r in rows]
    return rows


FAMILY = Family("distillbev", _owns, _rows, frozenset(("geom_point_cloud_range",)))
"""How to tell and compare such files."""
