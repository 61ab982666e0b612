"""Detections -> nuScenes result file -> mAP, NDS and true-positive errors: the numbers of nuscenes-devkit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import torch
from torch import Tensor

from kdlab.checkpoint import RunFolder, load_detector, load_run_config, replacing, write_json
from kdlab.config import AugmentConfig, Modality, RunConfig
from kdlab.cost import Stopwatch
from kdlab.metrics.boxes import EvalBoxes, from_detections, to_global
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.diagnose import Finding, diagnose
from kdlab.metrics.evaluation import Evaluation
from kdlab.metrics.evaluation import evaluate as evaluate_boxes
from kdlab.metrics.metrics import TP_ERRORS, Metrics, read_metrics, read_stored
from kdlab.metrics.results import read_results
from kdlab.metrics.subset import Subset
from kdlab.metrics.truth import Truth, load_truth
from kdlab.precision import autocast
from kdlab.sample import ATTRIBUTES, CLASSES, Batch, Detections, to_device

if TYPE_CHECKING:
    from kdlab.data.batch import Loader
    from kdlab.models.detector import Detector

__all__ = [
    "TP_ERRORS",
    "Finding",
    "Found",
    "Metrics",
    "Scorer",
    "diagnose",
    "evaluate_file",
    "evaluate_run",
    "evaluation_loader",
    "load_metrics",
    "of_present",
    "predict",
    "result_boxes",
    "store_metrics",
    "write_results",
]


@dataclass(frozen=True)
class Found:
    """What a detector found in one sample.

    Attributes:
        token: sample token.
        detections: boxes in the key ego frame, on the CPU.
        global_from_key: float64 [4, 4].
    """

    token: str
    detections: Detections
    global_from_key: Tensor


@torch.no_grad()
def predict(
    detector: Detector,
    batches: Iterable[Batch],
    precision: str = "fp32",
    watch: Stopwatch | None = None,
) -> list[Found]:
    """Run a detector over batches and collect what it finds.

    It gets what it may see at test time, see `Detector.seen`: of a camera detector neither points, depth nor boxes.

    Args:
        detector: put into eval mode for the time; stays on its device.
        batches: without augmentation.
        precision: as in `TrainConfig.precision`.
        watch: times the detector alone.
    """
    device = next(detector.parameters()).device
    was_training, results = detector.training, []
    detector.eval()
    try:
        for batch in batches:
            seen = detector.seen(batch).to(device)
            with watch.batch(seen.size) if watch is not None else contextlib.nullcontext():
                with autocast(device, precision):
                    features = detector(seen)
                boxes = to_device(detector.predict(features), "cpu", False)
            results += [Found(*found) for found in zip(batch.tokens, boxes, batch.global_from_key.cpu(), strict=True)]
    finally:
        detector.train(was_training)
    return results


def result_boxes(token: str, detections: Detections, global_from_key: Tensor) -> list[dict[str, Any]]:
    """One sample's detections as nuScenes result entries in the global frame, the best 500 of them.

    Args:
        token: sample token.
        detections: boxes [M, 9] in the key ego frame; an unknown (NaN) velocity is written as 0.
        global_from_key: float64 [4, 4].

    Raises:
        ValueError: a number is not finite.
    """
    boxes = to_global(detections, global_from_key)
    columns = (boxes.translation, boxes.size, boxes.rotation, boxes.velocity, boxes.score)
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError(f"sample {token!r}: a detection has a number that is not finite")
    names = [CLASSES[i] for i in boxes.label]
    attributes = [ATTRIBUTES[i] if i >= 0 else "" for i in boxes.attribute]
    return [
        {
            "sample_token": token,
            "translation": translation,
            "size": size,
            "rotation": rotation,
            "velocity": velocity,
            "detection_name": name,
            "detection_score": score,
            "attribute_name": attribute,
        }
        for translation, size, rotation, velocity, score, name, attribute in zip(
            *(column.tolist() for column in columns), names, attributes, strict=True
        )
    ]


def write_results(path: Path, found: Iterable[Found], modality: Modality) -> None:
    """Write a nuScenes detection result file, sample after sample, whole or not at all.

    Raises:
        ValueError: a number is not finite.
    """
    used = {"use_camera": modality != "lidar", "use_lidar": modality != "camera"}
    meta = {**used, "use_radar": False, "use_map": False, "use_external": False}
    with replacing(path) as part, open(part, "wb") as file:
        file.write(b'{"meta": ' + orjson.dumps(meta) + b', "results": {')
        for i, one in enumerate(found):
            boxes = result_boxes(one.token, one.detections, one.global_from_key)
            file.write((b",\n" if i else b"\n") + orjson.dumps(one.token) + b": " + orjson.dumps(boxes))
        file.write(b"}}\n")


class Scorer:
    """The evaluation of one data set; the truth of a split is read once, for any number of results.

    Args:
        root: nuScenes-format root.
        version: version folder; inferred where there is a single one.
        config: settings; those of the nuScenes detection challenge where left out.
    """

    def __init__(self, root: Path | str, version: str | None = None, config: EvaluationConfig | None = None) -> None:
        self.root, self.version, self.config = Path(root), version, config or EvaluationConfig()
        self._truths: dict[str, Truth] = {}

    def truth(self, split: str) -> Truth:
        """The annotations of a split.

        Raises:
            FileNotFoundError: no data set at the root, or no such version.
            ValueError: no such split, or annotations that cannot be evaluated.
        """
        if split not in self._truths:
            self._truths[split] = load_truth(self.root, split, self.version)
        return self._truths[split]

    def boxes(self, results: Path | str | Sequence[Found], split: str) -> EvalBoxes:
        """The boxes of a result file, or of detections in memory, for the samples of a split.

        Of detections in memory the best `EvaluationConfig.max_boxes_per_sample` of each sample; a result file of
        `write_results` holds the best 500.

        Raises:
            FileNotFoundError: no such result file or data set.
            ValueError: no such split, or what nuScenes refuses: samples that are missing, too many boxes, bad numbers.
        """
        truth = self.truth(split)
        if isinstance(results, Path | str):
            return read_results(results, truth, self.config)
        columns = ([one.token for one in results], [one.detections for one in results])
        poses = [one.global_from_key for one in results]
        return from_detections(*columns, poses, truth, self.config.max_boxes_per_sample)

    def score(
        self, results: Path | str | Sequence[Found] | EvalBoxes, split: str, subset: Subset | None = None
    ) -> Evaluation:
        """Metrics and curves of results on a split, or on a subset of it.

        Args:
            results: result file, detections in memory, or `boxes` of either.
            split: name of the split.
            subset: what counts; everything where left out.

        Raises:
            FileNotFoundError: no such result file or data set.
            ValueError: as `boxes`, boxes that were read for another split, or a subset without a sample or annotation.
        """
        boxes = results if isinstance(results, EvalBoxes) else self.boxes(results, split)
        return evaluate_boxes(self.truth(split), boxes, self.config, subset)


def evaluate_file(
    result: Path | str,
    root: Path | str,
    split: str,
    *,
    version: str | None = None,
    config: EvaluationConfig | None = None,
    subset: Subset | None = None,
) -> Evaluation:
    """Evaluate a nuScenes detection result file, whatever code wrote it.

    Args:
        result: the file, in the format of the nuScenes detection challenge.
        root: nuScenes-format root.
        split: name of the split.
        version: version folder; inferred where there is a single one.
        config: settings; those of the nuScenes detection challenge where left out.
        subset: what counts; everything where left out.

    Raises:
        FileNotFoundError: no such result file or data set.
        ValueError: no such split, or what nuScenes refuses: samples that are missing, too many boxes, bad numbers.
    """
    return Scorer(root, version, config).score(result, split, subset)


def of_present(metrics: Metrics, config: EvaluationConfig | None = None) -> Metrics:
    """The metrics with mAP, errors and NDS taken over the classes with ground truth alone.

    nuScenes counts an absent class as AP 0 and errors 1, which says nothing of a detector where a class cannot be, as
    in a ring beyond the class's range. An error that no class has is NaN, and counts as 1 in NDS; all numbers are NaN
    where there is no ground truth at all.
    """
    errors = {}
    for key in metrics.tp_errors:
        known = [e for name in metrics.present if not np.isnan(e := metrics.label_tp_errors[name][key])]
        errors[key] = float(np.mean(known)) if known else float("nan")
    weight = (config or EvaluationConfig()).mean_ap_weight
    mean_ap = metrics.mean_ap_present if metrics.present else float("nan")
    changed = replace(metrics, mean_ap=mean_ap, tp_errors=errors)
    total = weight * changed.mean_ap + sum(changed.tp_scores.values())
    return replace(changed, nd_score=total / (weight + len(errors)))


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
        frames=detector.camera.frames if detector.sensors != "lidar" else 1,
        sweeps=detector.lidar.sweeps if detector.sensors != "camera" else 1,
        images=detector.sensors != "lidar",
        points=detector.sensors != "camera",
        image_cache=config.data.image_cache,
    )
    return Loader(
        dataset,
        image_size=detector.camera.image_size,
        augment=AugmentConfig.none(),
        batch_size=max(config.train.batch_size // world, 1) * world,
        workers=workers,
        rank=rank,
        world=world,
        exact=config.data.images == "exact",
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

    Writes ``results_SPLIT.json`` (the nuScenes result file), adds the split to ``metrics.json`` and what the detector
    costs to ``cost.json``.

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
        ValueError: no such split, or the earlier metrics.json is damaged.
    """
    config = load_run_config(run)
    root, version = (config.data.root, config.data.version) if root is None else (root, version)
    split = split or config.data.val
    detector = load_detector(run, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder, watch = RunFolder(Path(out or run)), Stopwatch(detector)
    read_stored(folder.metrics)  # what the result will be added to: a damaged file is said before the work
    with contextlib.closing(evaluation_loader(config, root, split, version, workers=workers)) as loader:
        found = predict(detector, loader.epoch(0), config.train.precision, watch)
    watch.store(folder.path)
    write_results(folder.path / f"results_{split}.json", found, config.detector.sensors)
    metrics = (scorer or Scorer(root, version)).score(found, split).metrics
    pretrained = config.detector.modality != "lidar" and config.detector.camera.pretrained
    metrics = replace(metrics, pretrained=pretrained)
    store_metrics(folder.metrics, metrics.split, metrics)
    return metrics


def store_metrics(path: Path, key: str, metrics: Metrics) -> None:
    """Add metrics to a JSON file by key (a split or an epoch), in place of earlier ones of that key.

    Raises:
        ValueError: the file is damaged.
    """
    write_json(path, {**read_stored(path), key: metrics.to_dict()})


def load_metrics(run: Path | str) -> dict[str, Metrics]:
    """Metrics by split of a run; empty where it was not evaluated.

    Raises:
        ValueError: the file is damaged, or an earlier version wrote it.
    """
    return read_metrics(RunFolder(Path(run)).metrics)
