"""Detection metrics by nuscenes-devkit itself: what `kdlab evaluate --official` and the tests compare with."""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
import time
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
    return timed_official(results, root, split, version, config=config, tables=tables)[0]


def timed_official(
    results: Path,
    root: Path | str,
    split: str,
    version: str | None = None,
    *,
    config: EvaluationConfig | None = None,
    tables: Any = None,
) -> tuple[Metrics, float]:
    """`official`, and the seconds from the opened tables and the file to the metrics, the devkit's work alone."""
    from nuscenes.eval.detection.data_classes import DetectionConfig
    from nuscenes.eval.detection.evaluate import DetectionEval

    if not results.exists():
        raise FileNotFoundError(f"{results}: no such result file")
    tables = devkit_tables(root, version) if tables is None else tables
    settings = DetectionConfig.deserialize((config or EvaluationConfig()).to_dict())
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        try:
            given = _never_empty(results, Path(scratch), tables, split)
            began = time.perf_counter()
            judge = DetectionEval(tables, settings, str(given), split, scratch, verbose=False)
            metrics, _ = judge.evaluate()
            seconds = time.perf_counter() - began
        except Exception as error:  # of many kinds: it checks with assert, or fails where it did not check
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise ValueError(f"{results} cannot be scored on split {split!r} of {tables.version}: {why}") from error
        counts = dict.fromkeys(CLASSES, 0)
        for box in judge.gt_boxes.all:
            counts[box.detection_name] += 1
        summary = metrics.serialize()
    return _metrics(summary, split, len(judge.sample_tokens), counts), seconds


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


def _never_empty(results: Path, scratch: Path, tables: Any, split: str) -> Path:
    """The file itself; a copy with a box too far to count where it has none in the split, which the devkit needs."""
    from nuscenes.eval.common.loaders import get_samples_of_custom_split
    from nuscenes.utils.splits import is_predefined_split

    given = json.loads(results.read_text())
    found = given.get("results")
    if not found:
        return results
    tokens = list(found) if is_predefined_split(split) else get_samples_of_custom_split(split, tables)
    if not tokens or any(found.get(token) not in ([], {}, "") for token in tokens):
        return results
    token = tokens[0]
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
