"""Detection metrics by nuscenes-devkit itself: what `kdlab evaluate --official` and the tests compare with."""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdlab.data.nuscenes import find_version
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.metrics import Metrics
from kdlab.sample import CLASSES


def devkit_tables(root: Path | str, version: str | None = None) -> Any:
    """The devkit's own `NuScenes` object of a data set.

    Raises:
        FileNotFoundError: no data set at the root, or no such version.
        ValueError: several versions to choose from.
    """
    from nuscenes.nuscenes import NuScenes

    version = find_version(Path(root), version)
    with _quiet():
        return NuScenes(version, str(root), verbose=False)


def official(
    results: Path,
    root: Path | str,
    split: str,
    version: str | None = None,
    *,
    config: EvaluationConfig | None = None,
    tables: Any = None,
) -> Metrics:
    """Metrics of a result file by `nuscenes.eval.detection.DetectionEval`.

    Args:
        results: nuScenes detection result file.
        root: nuScenes-format root.
        split: name of the split.
        version: version folder; inferred where there is a single one.
        config: settings; those of the nuScenes detection challenge where left out.
        tables: `devkit_tables` of the data set, where they are loaded already.

    Raises:
        FileNotFoundError: no such result file or data set.
        ValueError: what the devkit refuses; the message ends in its words.
    """
    from nuscenes.eval.detection.data_classes import DetectionConfig
    from nuscenes.eval.detection.evaluate import DetectionEval

    if not results.exists():
        raise FileNotFoundError(f"{results}: no such result file")
    tables = devkit_tables(root, version) if tables is None else tables
    settings = DetectionConfig.deserialize((config or EvaluationConfig()).to_dict())
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        given = _never_empty(results, Path(scratch))
        try:
            judge = DetectionEval(tables, settings, str(given), split, scratch, verbose=False)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{results} cannot be scored on split {split!r} of {tables.version}: {error}") from error
        counts = dict.fromkeys(CLASSES, 0)
        for box in judge.gt_boxes.all:
            counts[box.detection_name] += 1
        metrics, _ = judge.evaluate()
    return _metrics(metrics.serialize(), split, len(judge.sample_tokens), counts)


def _metrics(summary: dict[str, Any], split: str, samples: int, counts: dict[str, int]) -> Metrics:
    def floats(values: dict[Any, Any]) -> dict[str, float]:
        return {str(key): float(value) for key, value in values.items()}

    return Metrics(
        split,
        samples,
        mean_ap=float(summary["mean_ap"]),
        nd_score=float(summary["nd_score"]),
        tp_errors=floats(summary["tp_errors"]),
        label_aps={name: floats(summary["label_aps"][name]) for name in CLASSES},
        label_tp_errors={name: floats(summary["label_tp_errors"][name]) for name in CLASSES},
        counts=counts,
    )


def largest_difference(a: Metrics, b: Metrics) -> float:
    """Of all numbers of two metrics; infinite where counts differ, or where one alone is NaN."""
    first, second = a.to_dict(), b.to_dict()
    if (a.split, a.samples, a.counts) != (b.split, b.samples, b.counts):
        return math.inf
    keys = ("mean_ap", "nd_score", "tp_errors", "label_aps", "label_tp_errors")
    return max(_difference(first[key], second[key]) for key in keys)


def _difference(a: Any, b: Any) -> float:
    if isinstance(a, dict) and isinstance(b, dict):
        return max((_difference(a[key], b[key]) for key in a), default=0.0) if a.keys() == b.keys() else math.inf
    if a is None or b is None:  # NaN
        return 0.0 if a is b else math.inf
    return abs(float(a) - float(b))


def _never_empty(results: Path, scratch: Path) -> Path:
    """The file itself; a copy with one box too far to count where it has none, which the devkit cannot read."""
    given = json.loads(results.read_text())
    if not given.get("results") or any(given["results"].values()):
        return results
    token = next(iter(given["results"]))
    far: dict[str, Any] = {
        "sample_token": token,
        "translation": [1e7, 1e7, 0.0],
        "size": [1.0, 1.0, 1.0],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "velocity": [0.0, 0.0],
        "detection_name": "car",
        "detection_score": 0.0,
        "attribute_name": "",
    }
    given["results"][token] = [far]
    copy = scratch / "results.json"
    copy.write_text(json.dumps(given))
    return copy


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # the devkit's mean over classes without any number
        yield
