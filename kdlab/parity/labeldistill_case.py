"""What a file of LabelDistill's arrays says: boxes, targets, label maps, the head's losses, the label encoder.

Boxes come as they are. Nothing says where the grid lies: its cells are 0.8 m and its middle the ego, unless the stored
box codes say something else.
"""

from __future__ import annotations

from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlab.distill import Context
from kdlab.distill.labeldistill import centre_cells, focal, labeldistill, truth
from kdlab.distill.terms import class_probability
from kdlab.models.labels import LabelEncoder, LabelMaps, label_maps
from kdlab.models.targets import TASK_OF_CLASS, encode_boxes
from kdlab.parity.compare import Inputs
from kdlab.parity.oracles import ForeignGrid
from kdlab.parity.released_heads import center_head, released_neck
from kdlab.sample import TASKS, Boxes3D, Features, Predictions, TaskPrediction

CODES = 10
CELL, FACTOR = 0.8, 4.0
_LINEAR = {"mlp_box": "box", "mlp_label": "label", "mlp2": "both"}


class Case(Inputs):
    """A group of arrays with one prefix, and those without."""

    def holds(self, name: str) -> bool:
        """The group has such an array."""
        return self.prefix + name in self.arrays

    def weights(self, folder: str) -> dict[str, Tensor]:
        """Weights below a folder of the file, float32, without its name."""
        return {n.removeprefix(folder): self.given(n).float() for n in self.arrays if n.startswith(folder)}


class Labelled(Case):
    """A group that holds boxes, sample by sample."""

    @cached_property
    def boxes(self) -> Boxes3D:
        """Padded boxes."""
        samples = []
        for i in range(int(self.given("n_samples"))):
            values = self.given(f"gt_boxes_{i}").float().reshape(-1, 9)
            samples.append(Boxes3D.make(values, self.given(f"gt_labels_{i}").long().reshape(-1)))
        return Boxes3D.pad(samples)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the grid.

        Raises:
            KeyError: no map of the group tells.
        """
        for name in ("bev_mask", "heatmap", "student_heatmap_logit"):
            if self.holds(name):
                height, width = self.given(name).shape[-2:]
                return height, width
        for name in ("bev_box", "bev_label"):
            if self.holds(name):
                height, width = self.given(name).shape[1:3]
                return height, width
        raise KeyError("needs a map that tells the grid's size")

    @cached_property
    def grid(self) -> ForeignGrid:
        """Cells of the maps: around the ego, or where the stored codes put them."""
        height, width = self.size
        low, cell = np.array((-width, -height)) * CELL / 2, CELL
        uv, xy = self._known_places()
        if len(uv) and np.abs(low + uv * cell - xy).max() > 1e-2:
            spread = uv - uv.mean(0)
            if np.abs(spread).max() > 1:
                cell = round(float((spread * (xy - xy.mean(0))).sum() / np.square(spread).sum()), 4)
            low = (xy - uv * cell).mean(0).round(3)
        high = low + np.array((width, height)) * cell
        bounds = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
        return ForeignGrid(bounds[0], bounds[1], cell, (height, width), FACTOR)

    def _known_places(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Places of centres in cells and in metres [K, 2], as the stored codes tell."""
        none = np.zeros((0, 2))
        if not all(self.holds(n) for n in ("anno_box", "ind", "mask")):
            return none, none
        ind, codes, mask = self.given("ind"), self.given("anno_box").double(), self.given("mask").bool()
        rows, padded = self.slots(ind.shape[-1])
        known = mask & (rows < padded)
        centre = torch.cat((self.boxes.values[..., :2].double(), torch.zeros(len(rows), 1, 2)), 1)
        xy = centre.gather(1, rows.flatten(1)[..., None].expand(-1, -1, 2)).unflatten(1, rows.shape[1:])
        width = self.size[1]
        uv = torch.stack((ind % width, ind.div(width, rounding_mode="floor")), -1) + codes[..., :2]
        return uv[known].numpy(), xy[known].numpy()

    def slots(self, most: int) -> tuple[Tensor, int]:
        """Row of the k-th box of each task, int64 [B, tasks, most], and the number that stands for none."""
        padded = self.boxes.labels.shape[1]
        out = torch.full((len(self.boxes.labels), len(TASKS), most), padded)
        for b, (labels, valid) in enumerate(zip(self.boxes.labels, self.boxes.valid, strict=True)):
            free = [count() for _ in TASKS]
            for row in labels.argsort(stable=True).tolist():
                task = TASK_OF_CLASS[int(labels[row])]
                if valid[row] and (k := next(free[task])) < most:
                    out[b, task, k] = row
        return out, padded

    @cached_property
    def maps(self) -> LabelMaps:
        """The released label maps."""
        return label_maps(self.boxes, self.grid, released=True)

    @cached_property
    def heatmap(self) -> Tensor:
        """Targets [B, 10, H, W]; as stored where there are no boxes."""
        return truth(self.context) if self.holds("n_samples") else self.given("heatmap").float()

    def targets(self, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, tasks, most, 10], flat cells and mask of the boxes by slot."""
        cell, counted = centre_cells(self.boxes, self.grid, truncate=True)
        width = self.grid.width
        corner = torch.stack((cell % width, cell.div(width, rounding_mode="floor")), -1)
        codes = encode_boxes(self.boxes.values, self.grid)[0].float()
        codes[..., :2] = self.grid.to_cells(self.boxes.values[..., :2]) - corner
        rows, _ = self.slots(most)

        sample = torch.arange(len(rows))[:, None, None]

        def by_slot(values: Tensor) -> Tensor:
            kept = torch.where(counted.view(*counted.shape, *[1] * (values.ndim - 2)), values, 0)
            none = values.new_zeros(len(values), 1, *values.shape[2:])
            return torch.cat((kept, none), 1)[sample, rows]

        return by_slot(codes.nan_to_num()), by_slot(cell), by_slot(counted.long())

    @cached_property
    def student(self) -> tuple[Tensor, Tensor]:
        """Class logits [B, 10, H, W] and box maps [B, tasks, 10, H, W], leaves of the gradients."""
        return tuple(self.given(f"student_{n}").float().requires_grad_() for n in ("heatmap_logit", "box"))  # type: ignore[return-value]

    @cached_property
    def context(self) -> Context:
        """What the response terms see; the teacher's box maps hold what is known of them."""
        on = labeldistill("released").on
        if not self.holds("student_heatmap_logit"):
            return Context(Features(torch.zeros(0)), None, self.boxes, self.grid, on=on)
        logits, box = self.student
        there, (_, cell, _) = torch.zeros_like(box).flatten(3), self.targets(self.given("ind").shape[-1])
        known = self.given("teacher_box_at_ind").float().movedim(-1, 2)
        there.scatter_(3, cell[:, :, None].expand_as(known), known)
        sides = [_head(logits, box)]
        sides.append(_head(self.given("teacher_heatmap_logit").float(), there.view_as(box).detach()))
        features = [Features(torch.zeros(0), predictions=p) for p in sides]
        return Context(features[0], features[1], self.boxes, self.grid, on=on)

    def response(self, part: str) -> Tensor:
        """A response term by task [tasks]: ``heatmap`` or ``box``."""
        term = next(t for t in labeldistill("released").active if t.name == f"response_{part}")
        errors = term.function(self.context, term).errors
        if part == "heatmap":
            return _by_task(errors.sum((0, 2, 3)))
        tasks = torch.tensor(TASK_OF_CLASS)[self.boxes.labels]
        return errors.new_zeros(len(TASKS)).index_add(0, tasks.flatten(), errors.flatten())

    def detection(self, logits: Tensor, box: Tensor, velocity: float = 1.0) -> tuple[Tensor, Tensor]:
        """The released head's losses by task [tasks] twice: heat map and boxes (kd_head.py:415-473).

        Args:
            logits: [B, 10, H, W].
            box: [B, tasks, 10, H, W].
            velocity: weight of the velocity codes.
        """
        centres = (self.heatmap == 1).float()
        error = focal(class_probability(logits, 1e-4), self.heatmap, centres)
        heat = _by_task(error.sum((0, 2, 3))) / _by_task(centres.sum((0, 2, 3))).clamp(min=1)
        codes, cell, mask = self.targets(self.given("ind").shape[-1])
        weights = torch.tensor([1.0] * 8 + [velocity] * 2)
        error = (at_cells(box, cell) - codes).abs() @ weights * mask
        return heat, 0.25 * error.sum((0, 2)) / mask.sum((0, 2)).clamp(min=1e-4)


class Encoder(Labelled):
    """A group with a label encoder's outputs."""

    def run(self, mode: str) -> tuple[LabelEncoder, tuple[Tensor, ...]]:
        """A new encoder with the file's weights and its stages, in ``eval`` or ``train`` mode."""
        weights = self.weights("w/")
        levels = [n for n in weights if n.startswith("conv_blocks.") and n.endswith(".1.weight")]
        stages = [len(weights[n]) for n in sorted(levels)]
        encoder = LabelEncoder(self.grid, stages, len(weights["ln2.bias"]), released=True)
        encoder.load_state_dict({_ours(name): value for name, value in weights.items()})
        encoder.train(mode == "train")
        maps = self.maps
        if not self.holds("n_samples"):
            maps = LabelMaps(self.given("bev_box").float(), self.given("bev_label").float(), maps.mask)
        return encoder, encoder.encode(maps).stages

    def step(self, mode: str) -> tuple[LabelEncoder, Tensor]:
        """The encoder, and the loss of its training behind the released neck and head."""
        encoder, stages = self.run(mode)
        neck = released_neck(self.weights("neck/"), stages, mode == "train")
        logits, box = center_head(self.weights("head/"), neck, mode == "train")
        return encoder, torch.stack(self.detection(logits, box, 0.5)).sum()

    def gradient(self, mode: str, layer: str) -> Tensor:
        """Gradient of that loss at the first weights of a layer: ``box`` or ``label``."""
        encoder, loss = self.step(mode)
        return torch.autograd.grad(loss, encoder.get_parameter(f"{layer}.0.weight"))[0]


def at_cells(box: Tensor, cell: Tensor) -> Tensor:
    """Box maps [B, tasks, 10, H, W] at flat cells [B, tasks, K]: [B, tasks, K, 10]."""
    index = cell[:, :, None].expand(-1, -1, box.shape[2], -1)
    return box.flatten(3).gather(3, index).movedim(2, 3)


def _head(logits: Tensor, box: Tensor) -> Predictions:
    none = box[:, 0, :0]
    return Predictions((TaskPrediction(logits, box.flatten(1, 2), none, none, none, none),))


def _by_task(by_class: Tensor) -> Tensor:
    return by_class.new_zeros(len(TASKS)).index_add(0, torch.tensor(TASK_OF_CLASS), by_class)


def _ours(name: str) -> str:
    """Name of a released encoder's weight in kdlab's."""
    first, _, rest = name.partition(".")
    if first in _LINEAR:
        return f"{_LINEAR[first]}.{rest.replace('fc1', '0').replace('fc2', '2')}"
    return {"ln2": "norm.", "conv_blocks": "levels."}.get(first, "block.") + block_name(rest)


def block_name(name: str) -> str:
    """Name of a weight of the released residual block in kdlab's."""
    for old, new in (("conv1", "first.0"), ("bn1", "first.1"), ("conv2", "second.0"), ("bn2", "second.1")):
        name = name.replace(old, new)
    return name
