"""Detections -> nuScenes result file -> mAP, NDS and true-positive errors by the unchanged nuscenes-devkit."""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdlab.checkpoint import RunFolder, load_detector, load_run_config, replacing, write_json
from kdlab.config import AugmentConfig, Modality, RunConfig
from kdlab.geometry import transform
from kdlab.precision import autocast
from kdlab.sample import CLASSES, Batch, Detections

if TYPE_CHECKING:
    from kdlab.data.batch import Loader
    from kdlab.models.detector import Detector

MAX_BOXES = 500
"""Boxes per sample that nuScenes allows."""

MOVING = 0.2
"""Speed above which a box counts as moving, m/s."""

TP_ERRORS = {"trans_err": "mATE", "scale_err": "mASE", "orient_err": "mAOE", "vel_err": "mAVE", "attr_err": "mAAE"}
"""The devkit's true-positive errors and their usual names: metres, 1 - IoU, radians, m/s, 1 - accuracy."""

_ATTRIBUTES = {  # class -> attribute when moving, when not; the defaults that nuScenes detectors commonly use
    "car": ("vehicle.moving", "vehicle.parked"),
    "truck": ("vehicle.moving", "vehicle.parked"),
    "construction_vehicle": ("vehicle.moving", "vehicle.parked"),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    "trailer": ("vehicle.moving", "vehicle.parked"),
    "barrier": ("", ""),
    "motorcycle": ("cycle.with_rider", "cycle.without_rider"),
    "bicycle": ("cycle.with_rider", "cycle.without_rider"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    "traffic_cone": ("", ""),
}

Results = dict[str, list[dict[str, Any]]]
"""Boxes by sample token, as the nuScenes result format wants them."""


@dataclass(frozen=True)
class Metrics:
    """Official nuScenes detection metrics of one split.

    Attributes:
        split: name of the split.
        samples: its number of samples.
        mean_ap: over the ten classes and the four distances; a class without ground truth counts as 0, as in nuScenes.
        nd_score: NDS.
        tp_errors: mean true-positive error by name (keys of TP_ERRORS).
        label_aps: AP by class, mean over the four distances.
        label_tp_errors: true-positive errors by class and name; NaN where nuScenes defines none.
        counts: ground-truth boxes by class that the evaluation counts; 0: the class's numbers mean nothing.
        pretrained: whether the detector's backbone started from pretrained weights; None where that is unknown.
        data: digest of the data set (`NuScenesDataset.digest`); None where that is unknown.
    """

    split: str
    samples: int
    mean_ap: float
    nd_score: float
    tp_errors: dict[str, float]
    label_aps: dict[str, float]
    label_tp_errors: dict[str, dict[str, float]]
    counts: dict[str, int]
    pretrained: bool | None = None
    data: str | None = None

    @property
    def present(self) -> list[str]:
        """Classes with ground truth, in the order of CLASSES."""
        return [name for name in CLASSES if self.counts[name] > 0]

    @property
    def mean_ap_present(self) -> float:
        """MAP over the classes with ground truth alone."""
        return sum(self.label_aps[name] for name in self.present) / max(len(self.present), 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; NaN becomes None."""
        plain: dict[str, Any] = _map_leaves(self.__dict__, lambda v: None if v != v else v)
        return {**plain, "mean_ap_present": self.mean_ap_present}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Metrics:
        """The inverse of `to_dict`."""
        values = {k: v for k, v in plain.items() if k != "mean_ap_present"}
        for key in ("tp_errors", "label_aps", "label_tp_errors"):
            values[key] = _map_leaves(values[key], lambda v: math.nan if v is None else v)
        return cls(**values)

    def __str__(self) -> str:
        errors = "  ".join(f"{short} {self.tp_errors[name]:.3f}" for name, short in TP_ERRORS.items())
        lines = [f"{self.split}: {self.samples} samples", f"mAP {self.mean_ap:.4f}  NDS {self.nd_score:.4f}  {errors}"]
        if len(self.present) < len(CLASSES):
            absent = ", ".join(name for name in CLASSES if name not in self.present)
            lines.append(
                f"mAP of the {len(self.present)} classes that are there: {self.mean_ap_present:.4f} (none of: {absent})"
            )
        lines += [f"  {name:21s} AP {self.label_aps[name]:.4f}  ({self.counts[name]} boxes)" for name in self.present]
        return "\n".join(lines)


def _map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    return {k: _map_leaves(v, change) for k, v in value.items()} if isinstance(value, dict) else change(value)


def attribute(name: str, speed: float) -> str:
    """Attribute of a class at a speed in m/s; empty for barrier and cone."""
    return _ATTRIBUTES[name][0 if speed > MOVING else 1]


def result_boxes(
    token: str, detections: Detections, global_from_key: Tensor, attributes: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """One sample's detections as nuScenes result entries in the global frame, the best `MAX_BOXES` of them.

    Args:
        token: sample token.
        detections: boxes [M, 9] in the key ego frame; an unknown (NaN) velocity is written as 0.
        global_from_key: float64 [4, 4].
        attributes: attribute names by box; chosen by class and speed where not given.
    """
    order = detections.scores.argsort(descending=True, stable=True)[:MAX_BOXES].tolist()
    values = detections.values.double().cpu()
    pose = global_from_key.double().cpu()
    centres = transform(pose, values[:, :3])
    # nuScenes boxes stand upright in the global frame: only the heading is turned.
    heading = torch.stack((values[:, 6].cos(), values[:, 6].sin()), -1) @ pose[:2, :2].mT
    yaw = torch.atan2(heading[:, 1], heading[:, 0])
    velocity = values[:, 7:9].nan_to_num(0.0) @ pose[:2, :2].mT
    boxes = []
    for i in order:
        name, (length, width, height) = CLASSES[int(detections.labels[i])], values[i, 3:6].tolist()
        boxes.append(
            {
                "sample_token": token,
                "translation": centres[i].tolist(),
                "size": [width, length, height],
                "rotation": [math.cos(float(yaw[i]) / 2), 0.0, 0.0, math.sin(float(yaw[i]) / 2)],
                "velocity": velocity[i].tolist(),
                "detection_name": name,
                "detection_score": float(detections.scores[i]),
                "attribute_name": attributes[i]
                if attributes is not None
                else attribute(name, float(velocity[i].norm())),
            }
        )
    return boxes


def write_results(path: Path, results: Results, modality: Modality) -> None:
    """Write a nuScenes detection result file, whole or not at all.

    Raises:
        ValueError: a number is not finite.
    """
    used = {"use_camera": modality != "lidar", "use_lidar": modality != "camera"}
    meta = {**used, "use_radar": False, "use_map": False, "use_external": False}
    text = json.dumps({"meta": meta, "results": results}, allow_nan=False)
    with replacing(path) as part:
        part.write_text(text)


@torch.no_grad()
def predict(detector: Detector, batches: Iterable[Batch], modality: Modality, precision: str = "fp32") -> Results:
    """Run a detector over batches and collect its boxes in the global frame.

    A camera detector gets ``batch.images_only()``: it cannot see points, depth or boxes.

    Args:
        detector: put into eval mode for the time; stays on its device.
        batches: without augmentation.
        modality: the detector's sensors.
        precision: as in `TrainConfig.precision`.
    """
    device = next(detector.parameters()).device
    was_training, results = detector.training, Results()
    detector.eval()
    try:
        for batch in batches:
            seen = (batch.images_only() if modality == "camera" else batch).to(device)
            with autocast(device, precision):
                features = detector(seen)
            for token, pose, found in zip(batch.tokens, batch.global_from_key, detector.predict(features), strict=True):
                results[token] = result_boxes(token, found, pose)
    finally:
        detector.train(was_training)
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # the devkit's mean over classes without any number
        yield


class Scorer:
    """The official evaluation of one data set; its tables are read once, for any number of result files.

    Args:
        root: nuScenes-format root.
        version: version folder; inferred where there is a single one.
    """

    def __init__(self, root: Path | str, version: str | None = None) -> None:
        from nuscenes.nuscenes import NuScenes

        from kdlab.data.nuscenes import find_version

        self.version = find_version(Path(root), version)
        with _quiet():
            self.tables = NuScenes(self.version, str(root), verbose=False)

    def score(self, results: Path, split: str) -> Metrics:
        """Metrics of a result file on a split.

        Raises:
            FileNotFoundError: no such result file.
            ValueError: no such split, it has no ground truth, or the results are not of its samples.
        """
        from nuscenes.eval.common.config import config_factory
        from nuscenes.eval.detection.evaluate import DetectionEval

        if not results.exists():
            raise FileNotFoundError(f"{results}: no such result file")
        with tempfile.TemporaryDirectory() as scratch, _quiet():
            given = _never_empty(results, Path(scratch))
            try:
                official = DetectionEval(
                    self.tables, config_factory("detection_cvpr_2019"), str(given), split, scratch, verbose=False
                )
            except (AssertionError, KeyError, ValueError) as error:
                raise ValueError(f"{results} cannot be scored on split {split!r} of {self.version}: {error}") from error
            counts = dict.fromkeys(CLASSES, 0)
            for box in official.gt_boxes.all:
                counts[box.detection_name] += 1
            metrics, _ = official.evaluate()
            summary = metrics.serialize()
        aps = {name: float(sum(by.values()) / len(by)) for name, by in summary["label_aps"].items()}
        errors = {name: {k: float(v) for k, v in by.items()} for name, by in summary["label_tp_errors"].items()}
        return Metrics(
            split,
            len(official.sample_tokens),
            mean_ap=float(summary["mean_ap"]),
            nd_score=float(summary["nd_score"]),
            tp_errors={k: float(v) for k, v in summary["tp_errors"].items()},
            label_aps={name: aps[name] for name in CLASSES},
            label_tp_errors={name: errors[name] for name in CLASSES},
            counts=counts,
        )


def _never_empty(results: Path, scratch: Path) -> Path:
    """The file itself; a copy with one box too far to count where it has none, which the devkit cannot read."""
    given = json.loads(results.read_text())
    if any(given["results"].values()) or not given["results"]:
        return results
    token = next(iter(given["results"]))
    far = Detections(
        torch.tensor([[1e7, 1e7, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]), torch.tensor([0]), torch.tensor([0.0])
    )
    given["results"][token] = result_boxes(token, far, torch.eye(4, dtype=torch.float64))
    copy = scratch / "results.json"
    copy.write_text(json.dumps(given))
    return copy


def evaluation_loader(
    config: RunConfig,
    root: Path | str,
    split: str,
    version: str | None = None,
    *,
    workers: int = 2,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Batches of a split for one detector: its sensors alone, no augmentation, no shuffling, every sample once.

    Raises:
        FileNotFoundError: no such data set.
        ValueError: no such split.
    """
    from kdlab.data.batch import Loader
    from kdlab.data.nuscenes import NuScenesDataset

    detector = config.detector
    dataset = NuScenesDataset(
        root,
        version,
        split,
        frames=detector.camera.frames if detector.modality != "lidar" else 1,
        sweeps=detector.lidar.sweeps if detector.modality != "camera" else 1,
        images=detector.modality != "lidar",
        points=detector.modality != "camera",
    )
    return Loader(
        dataset,
        image_size=detector.camera.image_size,
        augment=AugmentConfig.none(),
        batch_size=max(config.train.batch_size // world, 1) * world,
        workers=workers,
        rank=rank,
        world=world,
    )


def evaluate_run(
    run: Path | str,
    root: Path | str | None = None,
    split: str | None = None,
    *,
    version: str | None = None,
    device: str | None = None,
    workers: int = 2,
    scorer: Scorer | None = None,
    out: Path | None = None,
) -> Metrics:
    """Evaluate a run's detector and store its metrics.

    Writes ``results_SPLIT.json`` (the nuScenes result file) and adds the split to ``metrics.json``.

    Args:
        run: run folder, or shipped weights.
        root: nuScenes-format root; by default the one it was trained on.
        split: by default the run's validation split.
        version: version folder; inferred where there is a single one.
        device: by default CUDA where there is one, else CPU.
        workers: loader processes.
        scorer: tables that are already loaded.
        out: folder for the two files, by default the run folder.

    Raises:
        FileNotFoundError: no such run or data set, or the run is not finished.
        ValueError: no such split.
    """
    config = load_run_config(run)
    root, version = (config.data.root, config.data.version) if root is None else (root, version)
    split = split or config.data.val
    detector = load_detector(run, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loader = evaluation_loader(config, root, split, version, workers=workers)
    results = predict(detector, loader.epoch(0), config.detector.modality, config.train.precision)
    loader.close()
    folder = RunFolder(Path(out or run))
    path = folder.path / f"results_{split}.json"
    write_results(path, results, config.detector.modality)
    metrics = (scorer or Scorer(root, version)).score(path, split)
    pretrained = config.detector.modality != "lidar" and config.detector.camera.pretrained
    metrics = replace(metrics, pretrained=pretrained, data=getattr(loader.dataset, "digest", None))
    store_metrics(folder.metrics, metrics.split, metrics)
    return metrics


def store_metrics(path: Path, key: str, metrics: Metrics) -> None:
    """Add metrics to a JSON file by key (a split or an epoch), in place of earlier ones of that key."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**stored, key: metrics.to_dict()})


def load_metrics(run: Path | str) -> dict[str, Metrics]:
    """Metrics by split of a run; empty where it was not evaluated."""
    folder = RunFolder(Path(run))
    if not folder.metrics.exists():
        return {}
    return {split: Metrics.from_dict(plain) for split, plain in json.loads(folder.metrics.read_text()).items()}
