"""The settings of the nuScenes detection evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdlab.sample import CLASSES


def _default_range() -> dict[str, float]:
    near = {"pedestrian": 40.0, "motorcycle": 40.0, "bicycle": 40.0, "traffic_cone": 30.0, "barrier": 30.0}
    vehicles = ("car", "truck", "bus", "trailer", "construction_vehicle")
    return {**dict.fromkeys(vehicles, 50.0), **near}


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of the evaluation; the defaults are nuScenes' own, ``detection_cvpr_2019``.

    Attributes:
        class_range: class -> distance to the ego vehicle in metres from which on its boxes do not count.
        dist_ths: distances of centres in the ground plane below which a prediction matches a truth, metres.
        dist_th_tp: the one of them at which the true-positive errors are taken.
        min_recall: recalls up to this one do not count, 0..1.
        min_precision: what is subtracted from precisions, 0..1.
        max_boxes_per_sample: a result file with more is rejected.
        mean_ap_weight: weight of the mAP in NDS; each of the five true-positive scores has weight 1.

    Raises:
        ValueError: a setting that nuScenes does not take.
    """

    class_range: dict[str, float] = field(default_factory=_default_range)
    dist_ths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    dist_th_tp: float = 2.0
    min_recall: float = 0.1
    min_precision: float = 0.1
    max_boxes_per_sample: int = 500
    mean_ap_weight: float = 5

    def __post_init__(self) -> None:
        if set(self.class_range) != set(CLASSES):
            wrong = sorted(set(self.class_range) ^ set(CLASSES))[0]
            raise ValueError(f"class_range must name the ten nuScenes classes, each once: see {wrong!r}")
        if self.dist_th_tp not in self.dist_ths:
            raise ValueError(f"dist_th_tp is {self.dist_th_tp}, which is not one of dist_ths {self.dist_ths}")
        if not 0 <= self.min_recall <= 1:
            raise ValueError(f"min_recall must lie in [0, 1], got {self.min_recall}")
        if not 0 <= self.min_precision < 1:
            raise ValueError(f"min_precision must lie in [0, 1), got {self.min_precision}")

    @classmethod
    def from_file(cls, path: Path | str) -> EvaluationConfig:
        """Read the devkit's JSON form.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, a setting is missing or not possible; the message names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such evaluation config; leave it out for nuScenes' own settings")
        try:
            content = json.loads(path.read_text())
            if content["dist_fcn"] != "center_distance":
                raise ValueError(f"dist_fcn must be 'center_distance', got {content['dist_fcn']!r}")
            return cls(
                class_range={str(name): float(reach) for name, reach in content["class_range"].items()},
                dist_ths=tuple(float(d) for d in content["dist_ths"]),
                dist_th_tp=float(content["dist_th_tp"]),
                min_recall=float(content["min_recall"]),
                min_precision=float(content["min_precision"]),
                max_boxes_per_sample=int(content["max_boxes_per_sample"]),
                mean_ap_weight=float(content["mean_ap_weight"]),
            )
        except KeyError as error:
            raise ValueError(f"{path}: the evaluation config lacks {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no nuScenes evaluation config: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The devkit's JSON form, as `from_file` reads it and ``metrics_summary.json`` holds it under ``cfg``."""
        return {
            "class_range": dict(self.class_range),
            "dist_fcn": "center_distance",
            "dist_ths": list(self.dist_ths),
            "dist_th_tp": self.dist_th_tp,
            "min_recall": self.min_recall,
            "min_precision": self.min_precision,
            "max_boxes_per_sample": self.max_boxes_per_sample,
            "mean_ap_weight": self.mean_ap_weight,
        }
