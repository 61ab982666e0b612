"""DistillBEV's losses as a file's hyper-parameters say: terms, adapters with the file's weights, gradients."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kdlab.distill import Adapter, Context, Method, Term, run_terms
from kdlab.distill.distillbev import QUIRKS, Region, Regions, attention, distillbev, imitate, one_layer, three_layers
from kdlab.distill.distillbev import regions as term_regions
from kdlab.distill.terms import channel_attention, spatial_attention
from kdlab.parity.distillbev_case import Case, false_scale, size_of
from kdlab.parity.oracles import channel_means, foreground_affinity
from kdlab.sample import Features, Predictions, TaskPrediction

_REGIONS: dict[Region, str] = {
    "foreground": "kd_fg_feat_loss",
    "background": "kd_bg_feat_loss",
    "false_positive": "kd_fp_bg_feat_loss",
}
_KINDS = {"1x1conv": one_layer, "upsample_3layer": three_layers}
_PARAMETER = re.compile(r"(?P<kind>channel|spatial)_wise_adaptations\.(?P<position>\d+)\.(?P<name>.+)")
_LAYER = re.compile(r"\d+\.(conv|norm)(\d)\.(.+)")
_FIXED: Mapping[str, Any] = {
    "foreground_mask": "gt",
    "background_mask": "logical_not",
    "teacher_adaptation_type": "identity",
    "spatial_mask": True,
    "spatial_student_ratio": 1.0,
    "transpose_mask": False,
    "non_empty_weight": 0,
    "context_length": 0,
    "affinity_split": 1,
    "groundtruth_threshold": None,
}
"""Hyper-parameters that are understood with this value alone: no file of a release has another."""


@dataclass(frozen=True)
class Position:
    """One compared pair of maps, and the hyper-parameters that hold there.

    Attributes:
        index: place in the file's lists.
        student: name of the student's array.
        teacher: name of the teacher's array.
        suffix: of the position's losses.
        setting: hyper-parameters by name, one value each.
    """

    index: int
    student: str
    teacher: str
    suffix: str
    setting: Mapping[str, Any]

    @property
    def false_positives(self) -> bool:
        """They are a region of their own."""
        return bool(self.setting["fp_as_foreground"] != "none")


class Losses(Case):
    """One file of losses."""

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Hyper-parameters.

        Raises:
            KeyError: the file does not hold them.
            ValueError: a value that kdlab does not know.
        """
        if "config_json" not in self.arrays:
            raise KeyError("needs the input config_json")
        config: dict[str, Any] = json.loads(self.arrays["config_json"].item())
        for name, value in _FIXED.items():
            if config.get(name, value) != value:
                raise ValueError(f"{name} = {config[name]!r} is not known, only {value!r}")
        if config["channel_t"] != config["spatial_t"]:
            raise ValueError(f"channel_t = {config['channel_t']} is not spatial_t = {config['spatial_t']}")
        return config

    @cached_property
    def positions(self) -> list[Position]:
        """The compared pairs of maps."""
        students, teachers = self.config["student_feat_pos"], self.config["teacher_feat_pos"]
        found = []
        for k, (s, t) in enumerate(zip(students, teachers, strict=True)):
            names = ("student_feat", "teacher_feat") if len(students) == 1 else (f"student_{s}", f"teacher_{t}")
            lists = {n: v for n, v in self.config.items() if isinstance(v, list) and v}
            setting = {**self.config, **{n: v[k] if len(v) > 1 else v[0] for n, v in lists.items()}}
            found.append(Position(k, *names, "" if len(students) == 1 else f"_{s}_{t}", setting))
        return found

    def threshold(self) -> float:
        """Over which a detector fires."""
        return float(self.config["output_threshold"])

    @cached_property
    def adapters(self) -> dict[str, tuple[Adapter, nn.Module]]:
        """Adapters by name, with the file's weights.

        Raises:
            KeyError: weights are missing.
            ValueError: a kind that kdlab does not know, or weights that do not fit.
        """
        found = {}
        for p in self.positions:
            kind, where = p.setting["adaptation_type"], f"position {p.index}"
            widths = self.arrays[p.student].shape[1], self.arrays[p.teacher].shape[1]
            if kind != "identity":
                if kind not in _KINDS:
                    raise ValueError(f"{where}: adaptation {kind!r} is not known; known: identity, {', '.join(_KINDS)}")
                phi = Adapter(f"phi{p.index}", _KINDS[kind], kind, where, resize="corners")
                found[phi.name] = (phi, phi.build(*widths))
            psi = Adapter(f"psi{p.index}", lambda s, t: nn.Conv2d(1, 1, 3, padding=1), "3x3", where)
            found[psi.name] = (psi, psi.build(*widths))
        self._load({name: module for name, (_, module) in found.items()})
        return found

    def _load(self, modules: Mapping[str, nn.Module]) -> None:
        """Put the file's weights into the adapters.

        Raises:
            KeyError: weights are missing.
            ValueError: a name that no parameter has.
        """
        lacking = {(m, n) for m, module in modules.items() for n, _ in module.named_parameters()}
        for array in sorted(a for a in self.arrays if a.startswith("param__")):
            module, name = self._parameter(array.removeprefix("param__"))
            with torch.no_grad():
                dict(modules[module].state_dict(keep_vars=True))[name].copy_(self.given(array))
            lacking.discard((module, name))
        if lacking:
            raise KeyError(f"needs the input {', '.join(sorted(self._released(*names) for names in lacking))}")

    @staticmethod
    def _released(module: str, name: str) -> str:
        """The array of a parameter, the inverse of `_parameter`."""
        layer, _, last = name.rpartition(".")
        if layer:
            number, norm = divmod(int(layer), 3)
            last = f"1.{'norm' if norm else 'conv'}{number + 1}.{last}"
        return f"param__{'channel' if module.startswith('phi') else 'spatial'}_wise_adaptations.{module[3:]}.{last}"

    @staticmethod
    def _parameter(array: str) -> tuple[str, str]:
        """Adapter and the name in it of a released parameter.

        Raises:
            ValueError: no parameter has such a name.
        """
        match = _PARAMETER.fullmatch(array)
        if not match:
            raise ValueError(f"{array} is no parameter's name")
        layer, name = _LAYER.fullmatch(match["name"]), match["name"]
        if layer:
            name = f"{3 * (int(layer[2]) - 1) + (layer[1] == 'norm')}.{layer[3]}"
        return f"{'phi' if match['kind'] == 'channel' else 'psi'}{match['position']}", name

    @cached_property
    def method(self) -> Method:
        """The file's terms, everything as released; the file's boxes have passed the range filter."""
        on = {q.name for q in QUIRKS} - {"distillbev.centre_in_range"}
        if self.at != 0:
            on -= {"distillbev.corner_points"}
        if self.config["scale_mask"] == "separate_gt":
            on -= {"distillbev.combined_scale"}
        elif self.config["scale_mask"] != "combine_gt":
            raise ValueError(f"scale_mask = {self.config['scale_mask']!r} is not known: combine_gt or separate_gt")
        terms = tuple(t for p in self.positions for t in self._terms(p))
        used = tuple(a for a, _ in self.adapters.values())
        return Method("file", frozenset(), frozenset(), terms, used, QUIRKS, on=frozenset(on))

    def _terms(self, p: Position) -> list[Term]:
        how, s = {"teacher": "teacher", "teacher_student": "both"}, p.setting
        template = distillbev(positions=["H"], false_positives=["H"] if p.false_positives else ())
        weights = {
            "foreground": s["fg_feat_loss_weights"],
            "background": s["bg_feat_loss_weights"],
            "false_positive": s["fp_weight"],
            "spatial": s["spatial_loss_weights"],
        }
        phi, stage = f"phi{p.index}", f"stages[{p.index}]"
        terms = []
        for term in template.terms:
            region = term.options.get("region", "spatial")
            options = {
                **term.options,
                "attention": how[s["spatial_attentions"]],
                "temperature": s["spatial_t"],
                "threshold": s["output_threshold"],
                "channel_attention": s["channel_mask"],
            }
            changed = replace(
                term,
                name=_REGIONS.get(region, "kd_spatial_loss") + p.suffix,
                weight=float(weights[region]),
                teacher=f"teacher.{stage}",
                student=f"student.{stage}",
                adapter=phi if phi in self.adapters else None,
                modules=(f"psi{p.index}",) if region == "spatial" else (),
                options=options if region != "spatial" else {},
            )
            foreign = region != "spatial" and p.false_positives and (self.by_boxes or s["fp_scale_mode"] != "average")
            terms.append(replace(changed, function=self._foreign(p)) if foreign else changed)
        return terms

    def _foreign(self, p: Position) -> Callable[[Context, Term], Any]:
        def function(context: Context, term: Term) -> Any:
            region: Region = term.options["region"]
            channels = term.options["channel_attention"] or region == "false_positive"
            term = replace(term, options={**term.options, "channel_attention": channels})
            return imitate(context, term, self.weight(p, region))

        return function

    def weight(self, p: Position, region: Region) -> Tensor:
        """A region's cells times their scale [B, H, W]."""
        found = self.regions(p)
        if region == "false_positive":
            return self.false_scale(p)
        scale = self.background_share(p)
        if region == "background":
            return found.background * scale
        return found.foreground * (found.size.maximum(scale) if self.combined else found.size)

    @property
    def combined(self) -> bool:
        """Foreground and background share one map of scales."""
        return bool(self.config["scale_mask"] == "combine_gt")

    def background_share(self, p: Position) -> Tensor:
        """1 / background cells [B, 1, 1]: all less both regions' cells, which BEVFormer's exchange may overlap."""
        found = self.regions(p)
        regions = found.foreground.sum((1, 2), keepdim=True) + found.false_positive.sum((1, 2), keepdim=True)
        count = found.foreground[0].numel() - regions
        return torch.where(count > 0, 1 / count.clamp(min=1), 0).float()

    def false_scale(self, p: Position) -> Tensor:
        """Scale of false positives [B, H, W]."""
        return false_scale(self.regions(p).false_positive, p.setting["fp_scale_mode"])

    def term(self, p: Position, region: Region = "foreground") -> Term:
        """A position's term of a region."""
        return next(t for t in self.method.terms if t.name == _REGIONS[region] + p.suffix)

    def regions(self, p: Position) -> Regions:
        """The regions at a position."""

        def make() -> Regions:
            term = self.term(p)
            if not (p.false_positives and self.by_boxes):
                return term_regions(self.context, term)
            found = term_regions(self.context, replace(term, options={**term.options, "false_positives": False}))
            return replace(found, false_positive=self.false_boxes(size_of(found.foreground)))

        return self.context.once(("regions", p.index), make)

    @cached_property
    def context(self) -> Context:
        """What the terms see; one position after another as stages."""
        student = tuple(self.given(p.student).float().requires_grad_() for p in self.positions)
        teacher = tuple(self.given(p.teacher).float() for p in self.positions)
        predictions = None
        if "teacher_logits" in self.arrays or (not self.by_boxes and any(p.false_positives for p in self.positions)):
            logits = self.given("teacher_logits").float()
            none = logits[:, :0]
            predictions = Predictions((TaskPrediction(logits, none, none, none, none, none),))
        return Context(
            Features(student[0], stages=student),
            Features(teacher[0], stages=teacher, predictions=predictions),
            self.boxes,
            self.grid(size_of(teacher[0])),
            on=self.method.on,
            adapters={name: adapter for name, (adapter, _) in self.adapters.items()},
            modules={name: module for name, (_, module) in self.adapters.items()},
        )

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """Every loss by the file's name."""
        found = {name: r.value for name, r in run_terms(self.method, self.context).items()}
        for p in self.positions:
            student, teacher = self.context.pair(self.term(p))
            if p.setting["channel_mask"]:
                weight = float(p.setting["channel_loss_weights"])
                found[f"kd_channel_loss{p.suffix}"] = weight * channel_means(student, teacher)
            mode = p.setting["affinity_mode"]
            if mode == "foreground":
                cells = self.regions(p).foreground
                weight = float(p.setting["affinity_weights"])
                found[f"kd_affinity_loss{p.suffix}"] = weight * foreground_affinity(student, teacher, cells)
            elif mode != "none":
                raise ValueError(f"affinity_mode = {mode!r} is not known: none or foreground")
        return found

    def loss(self, name: str) -> Tensor:
        """A loss; those that the file's weights switch off are 0.

        Raises:
            KeyError: there is no such loss.
        """
        if name not in self.values and name not in {t.name for t in self.method.terms}:
            raise KeyError("nothing computes this loss")
        return self.values.get(name, torch.zeros(()))

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Gradient of the sum of all losses by the name of the student's array or the released parameter."""
        leaves = {p.student: self.context.student.stages[p.index] for p in self.positions}
        for array in self.arrays:
            if array.startswith("gradparam__"):
                name = array.removeprefix("gradparam__")
                module, parameter = self._parameter(name)
                leaves[name] = self.adapters[module][1].get_parameter(parameter)
        total = torch.stack(list(self.values.values())).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    def attention(self, which: str) -> Tensor:
        """A map of attention at the first position: ``t``, ``s``, ``c_t`` or ``sum``, [B, C, H, W]."""
        p = self.positions[0]
        student, teacher = self.context.pair(self.term(p))
        if which == "c_t":
            return channel_attention(teacher, p.setting["channel_t"])
        if which == "sum":
            return attention(self.context, self.term(p))[:, None]
        return spatial_attention(teacher if which == "t" else student, p.setting["spatial_t"])[:, None]
