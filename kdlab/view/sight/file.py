"""Sights in a file: what pictures need of them, for a viewer without networks or data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdlab.checkpoint import replacing
from kdlab.config import AugmentConfig
from kdlab.data.augment import augment
from kdlab.data.batch import collate
from kdlab.distill import TermResult
from kdlab.geometry import BEVGrid
from kdlab.sample import Boxes3D, Detections, Features, Lift, Predictions, Sample
from kdlab.view.sight.data import ALL, SIDES, Sight

_KIND = "kdlab sights"
_QUALITY = 92  # of JPEG
_PARTS = ("bev", "image", "depth", "camera_bev", "camera_bev_aligned", "lidar_bev", "neck")
_LARGEST = torch.finfo(torch.half).max


@dataclass(frozen=True)
class Stored:
    """Errors of a term that were read as a map, with what lies off it.

    Attributes:
        off: sum (scalar) of what is nowhere or outside the map.
    """

    off: Tensor

    def spread(self, errors: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
        """See `kdlab.distill.places.Place`."""
        return errors, self.off


def save_sights(path: Path | str, sights: Sequence[Sight]) -> None:
    """Write sights to one safetensors file, whole or not at all: "features loaded from a file".

    Features, masks and points go in half precision, images as JPEG. All gradient maps are made first, where they can
    be; nothing else of the graph is kept.

    Args:
        path: of the file.
        sights: at least one.

    Raises:
        ValueError: no sights.
    """
    if not sights:
        raise ValueError("save_sights: no sights; give at least one")
    tensors: dict[str, Tensor] = {}
    notes = []
    for index, sight in enumerate(sights):
        parts, note = _packed(sight)
        tensors |= {f"{index}/{name}": value for name, value in parts.items()}
        notes.append(note)
    with replacing(Path(path)) as part:
        save_file(tensors, part, metadata={"kind": _KIND, "sights": json.dumps(notes)})


def load_sights(path: Path | str) -> list[Sight]:
    """Read what `save_sights` wrote; gradient maps are there for the terms they were made for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a file of sights, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no sights at {path}: there is no such file; `save_sights` writes one")
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {}).get("sights", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as sights ({error}); write it again with `save_sights`") from error
    if notes is None:
        raise ValueError(f"{path} holds tensors, but no sights; write it with `save_sights`")
    found: list[dict[str, Tensor]] = [{} for _ in notes]
    for name, value in tensors.items():
        index, _, rest = name.partition("/")
        found[int(index)][rest] = value.float() if value.dtype == torch.half else value
    return [_unpacked(parts, note) for parts, note in zip(found, notes, strict=True)]


def _packed(sight: Sight) -> tuple[dict[str, Tensor], dict[str, Any]]:
    parts: dict[str, Tensor] = {}
    for side, features in sight.features.items():
        parts |= {f"{side}/{name}": value for name, value in _of_features(features).items()}
    for side, found in sight.detections.items():
        parts |= {f"found/{side}/{f.name}": getattr(found, f.name) for f in fields(found)}
    terms = {}
    for term, result in sight.results.items():
        parts |= {f"loss/{term}": result.map(), f"off/{term}": result.off_map.double()}
        terms[term] = {"value": float(result.value), "grid": _grid(result.grid)}
    if sight.live is not None or sight.again is not None:
        dropped = sight.live is None
        for term in (*sight.results, ALL) if sight.results else ():
            sight.gradient_map(term)
        if dropped:  # its graph was made for this alone
            sight.drop_graph()
    for kind in ("gradients", "adapted", "masks"):
        parts |= {f"{kind}/{name}": value for name, value in getattr(sight, kind).items()}
    parts |= {f"sample/{name}": value for name, value in _of_sample(sight.sample).items()}
    note = {
        "token": sight.sample.token,
        "scene": sight.sample.scene,
        "timestamp": sight.sample.timestamp,
        "image_size": sight.image_size,
        "depth_bins": sight.depth_bins,
        "grid": _grid(sight.grid),
        "errors": sight.errors,
        "pulls": sight.pulls,
        "terms": terms,
    }
    return {name: _half(name, value) for name, value in parts.items()}, note


def _half(name: str, value: Tensor) -> Tensor:
    # Losses and gradients of a cell can be smaller than a half can hold.
    exact = name.startswith(("sample/", "found/", "loss/", "gradients/")) and name != "sample/points"
    if value.dtype != torch.float32 or exact:
        return value.contiguous().clone()
    return value.clamp(-_LARGEST, _LARGEST).half().contiguous()


def _of_features(features: Features) -> dict[str, Tensor]:
    found = {name: getattr(features, name) for name in _PARTS if getattr(features, name) is not None}
    found |= {f"stages/{i}": stage for i, stage in enumerate(features.stages)}
    if features.predictions is not None:
        found |= {"heatmap": features.predictions.heatmap, "regression": features.predictions.regression}
    if features.lift is not None:
        found |= {f"lift/{f.name}": getattr(features.lift, f.name) for f in fields(Lift)}
    return {name: v.int() if v.dtype == torch.long else v for name, v in found.items()}


def _of_sample(sample: Sample) -> dict[str, Tensor]:
    import cv2

    found = {f.name: getattr(sample, f.name) for f in fields(Sample)}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor) and name != "images"}
    tensors |= {f"boxes/{f.name}": getattr(sample.boxes, f.name) for f in fields(Boxes3D)}
    images = sample.images.permute(0, 1, 3, 4, 2).flatten(0, 1)
    for index, image in enumerate(images.numpy()):
        written = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1]
        tensors[f"jpeg/{index}"] = torch.from_numpy(written)
    tensors["shape"] = torch.tensor(sample.images.shape)
    return tensors


def _unpacked(parts: Mapping[str, Tensor], note: Mapping[str, Any]) -> Sight:
    sample = _sample(_below(parts, "sample"), note)
    size = (int(note["image_size"][0]), int(note["image_size"][1]))
    batch = collate([augment(sample, AugmentConfig.none(), size, seed=0, draw=0)])
    sight = Sight(sample, batch, _read_grid(note["grid"]), errors=note["errors"], pulls=note["pulls"], image_size=size)
    sight.depth_bins = tuple(note["depth_bins"]) if note["depth_bins"] else None
    for side in SIDES:
        found = _below(parts, side)
        setattr(sight, side, _features(found) if found else None)
    sight.detections = {s: Detections(**_below(parts, f"found/{s}")) for s in SIDES if _below(parts, f"found/{s}")}
    for term, values in note["terms"].items():
        place = Stored(parts[f"off/{term}"])
        value = torch.tensor(values["value"])
        sight.results[term] = TermResult(value, parts[f"loss/{term}"], place, _read_grid(values["grid"]))
    for kind in ("gradients", "adapted", "masks"):
        setattr(sight, kind, _below(parts, kind))
    return sight


def _below(parts: Mapping[str, Tensor], folder: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{folder}/"): v for n, v in parts.items() if n.startswith(f"{folder}/")}


def _features(parts: dict[str, Tensor]) -> Features:
    stages = tuple(parts[f"stages/{i}"] for i in range(len(_below(parts, "stages"))))
    lift = {name: v.long() if v.dtype == torch.int32 else v for name, v in _below(parts, "lift").items()}
    predictions = Predictions.of_maps(parts["heatmap"], parts["regression"]) if "heatmap" in parts else None
    whole = {name: parts[name] for name in _PARTS if name in parts}
    return Features(**whole, stages=stages, predictions=predictions, lift=Lift(**lift) if lift else None)


def _sample(parts: dict[str, Tensor], note: Mapping[str, Any]) -> Sample:
    import cv2

    shape = parts["shape"].tolist()
    images = [cv2.imdecode(parts[f"jpeg/{i}"].numpy(), cv2.IMREAD_COLOR)[..., ::-1] for i in range(shape[0] * shape[1])]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) if images else torch.zeros(0, dtype=torch.uint8)
    names = {f.name for f in fields(Sample)}
    return Sample(
        token=note["token"],
        scene=note["scene"],
        timestamp=note["timestamp"],
        images=pixels.reshape(shape),
        boxes=Boxes3D(**_below(parts, "boxes")),
        **{name: value for name, value in parts.items() if name in names},  # type: ignore[arg-type]
    )


def _grid(grid: BEVGrid) -> list[float]:
    return [*grid.x, *grid.y, grid.cell]


def _read_grid(values: Sequence[float]) -> BEVGrid:
    return BEVGrid((values[0], values[1]), (values[2], values[3]), values[4])
