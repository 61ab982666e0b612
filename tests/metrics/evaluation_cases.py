"""Made-up annotations and predictions that nuscenes-devkit evaluates without a data set on disk."""

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from kdlab.metrics.boxes import ATTRIBUTE_INDEX, EvalBoxes
from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.evaluation import Evaluation, evaluate
from kdlab.metrics.metrics import TP_ERRORS
from kdlab.metrics.results import read_results
from kdlab.metrics.subset import Subset
from kdlab.metrics.truth import Racks, Truth
from kdlab.sample import ATTRIBUTES, CLASSES

Box = dict[str, Any]
CATEGORIES = {
    "car": "vehicle.car", "truck": "vehicle.truck", "construction_vehicle": "vehicle.construction",
    "bus": "vehicle.bus.rigid", "trailer": "vehicle.trailer", "barrier": "movable_object.barrier",
    "motorcycle": "vehicle.motorcycle", "bicycle": "vehicle.bicycle", "pedestrian": "human.pedestrian.adult",
    "traffic_cone": "movable_object.trafficcone", "rack": "static_object.bicycle_rack",
}  # fmt: skip


def box(x: float, y: float, name: str = "car", score: float = 0.5, **more: Any) -> Box:
    """An entry of a result file; annotations have the same form and num_pts, visibility."""
    return {
        "sample_token": "s0",
        "translation": [x, y, 0.0],
        "size": [2.0, 4.0, 1.5],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "velocity": [0.0, 0.0],
        "detection_name": name,
        "detection_score": score,
        "attribute_name": "",
        **more,
    }


@dataclass
class Case:
    """Annotations, racks and predictions by sample token; sample.json has the order of ``truths``."""

    truths: dict[str, list[Box]]
    results: dict[str, list[Box]]
    racks: dict[str, list[Box]] = field(default_factory=dict)
    ego: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    scene: dict[str, str] = field(default_factory=dict)
    predefined: bool = False

    def ego_of(self, token: str) -> tuple[float, float, float]:
        return self.ego.get(token, (0.0, 0.0, 0.0))

    def scene_of(self, token: str) -> str:
        return self.scene.get(token, "scene-0003")  # One of the split val.

    def truth(self) -> Truth:
        tokens = list(self.truths)
        rows = [(i, b) for i, token in enumerate(tokens) for b in self.truths[token]]
        racks = [r for token in tokens for r in self.racks.get(token, [])]
        counts = [len(self.racks.get(token, [])) for token in tokens]
        sample = np.array([i for i, _ in rows], np.int64)
        return Truth(
            tokens=tokens,
            scene=[self.scene_of(t) for t in tokens],
            night=np.array([self.scene_of(t).endswith("night") for t in tokens]),
            ego=np.array([self.ego_of(t) for t in tokens], np.float64),
            boxes=EvalBoxes(
                sample=sample,
                owner=sample,
                translation=_column(rows, "translation", 3),
                size=_column(rows, "size", 3),
                rotation=_column(rows, "rotation", 4),
                velocity=_column(rows, "velocity", 2),
                label=np.array([CLASSES.index(b["detection_name"]) for _, b in rows], np.int64),
                score=np.full(len(rows), -1.0),
                attribute=np.array([ATTRIBUTE_INDEX[b["attribute_name"]] for _, b in rows], np.int64),
                points=np.array([b.get("num_pts", 3) for _, b in rows], np.int64),
                visibility=np.array([b.get("visibility", 0) for _, b in rows], np.int64),
            ),
            racks=Racks(
                np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
                *(np.array([r[k] for r in racks], np.float64).reshape(-1, n)
                  for k, n in (("translation", 3), ("size", 3), ("rotation", 4))),
            ),
            version="v1.0-trainval" if self.predefined else "v1.0-made",
            split="val" if self.predefined else "own",
            predefined=self.predefined,
            digest="0",
        )  # fmt: skip

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps({"meta": {"use_lidar": True}, "results": self.results}))
        return path

    def official(self, path: Path, config: EvaluationConfig | None = None, scenes: list[str] | None = None) -> Any:
        """The devkit's `DetectionEval` of a result file, on all samples or a custom split of the scenes."""
        from nuscenes.eval.detection.data_classes import DetectionConfig
        from nuscenes.eval.detection.evaluate import DetectionEval

        own = path.parent / "splits.json"
        own.write_text(json.dumps({"own": scenes or sorted(set(map(self.scene_of, self.truths)))}))
        settings = DetectionConfig.deserialize((config or EvaluationConfig()).to_dict())
        split = "val" if self.predefined else "own"
        with patch("nuscenes.utils.splits._get_custom_splits_file_path", lambda _: str(own)), quiet():
            return DetectionEval(_Tables(self), settings, str(path), split, str(path.parent), verbose=False)

    def devkit(self, path: Path, config: EvaluationConfig | None = None, scenes: list[str] | None = None) -> Any:
        """Its metrics and curves."""
        official = self.official(path, config, scenes)
        with quiet():
            return official.evaluate()

    def load(self, path: Path) -> Any:
        """The devkit's boxes of a result file, not yet filtered."""
        from nuscenes.eval.common.loaders import load_prediction_of_sample_tokens
        from nuscenes.eval.detection.data_classes import DetectionBox

        return load_prediction_of_sample_tokens(str(path), 500, DetectionBox, list(self.truths))[0]


def _column(rows: list[tuple[int, Box]], key: str, length: int) -> np.ndarray:
    return np.array([b[key] for _, b in rows], np.float64).reshape(-1, length)


class _Tables:
    """As much of `nuscenes.NuScenes` as the evaluation touches."""

    def __init__(self, case: Case) -> None:
        self.version, self.dataroot = ("v1.0-trainval" if case.predefined else "v1.0-made"), ""
        self.attribute = [{"token": f"attribute-{name}", "name": name} for name in ATTRIBUTES]
        self._records: dict[tuple[str, str], Any] = {}
        self.sample_annotation = [None]
        self.sample = []
        for token, boxes in case.truths.items():
            scene, anns = case.scene_of(token), []
            for i, given in enumerate([*boxes, *case.racks.get(token, [])]):
                anns.append(f"{token}-{i}")
                self._records["sample_annotation", anns[-1]] = self._annotation(anns[-1], given)
            self._records["sample", token] = {"scene_token": scene, "data": {"LIDAR_TOP": token}, "anns": anns}
            self._records["scene", scene] = {"name": scene}
            self._records["sample_data", token] = {"ego_pose_token": token}
            self._records["ego_pose", token] = {"translation": list(case.ego_of(token))}
            self.sample.append({"token": token})

    @staticmethod
    def _annotation(token: str, given: Box) -> Any:
        name = given["attribute_name"]
        return {
            "token": token,
            "category_name": CATEGORIES[given["detection_name"]],
            "attribute_tokens": [f"attribute-{name}"] if name else [],
            "translation": given["translation"],
            "size": given["size"],
            "rotation": given["rotation"],
            "velocity": given["velocity"],
            "num_lidar_pts": given.get("num_pts", 3),
            "num_radar_pts": 0,
        }

    def get(self, table: str, token: str) -> Any:
        return self._records[table, token]

    def box_velocity(self, token: str) -> np.ndarray:
        return np.array([*self._records["sample_annotation", token]["velocity"], 0.0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with out, err, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def assert_equal_to_devkit(ours: Evaluation, theirs: Any, tolerance: float = 1e-9) -> None:
    """AP, errors, summary and every curve."""
    metrics, curves = theirs
    for (name, distance), data in curves.md.items():
        mine = ours.curves[name, distance]
        for key in ("recall", "precision", "confidence", *TP_ERRORS):
            np.testing.assert_allclose(getattr(mine, key), getattr(data, key), rtol=0, atol=tolerance,
                                       err_msg=f"{name} {distance} {key}")  # fmt: skip
        ap = ours.metrics.label_aps[name][str(distance)]
        np.testing.assert_allclose(ap, metrics.get_label_ap(name, distance), rtol=0, atol=tolerance)
    for name in CLASSES:
        for key in TP_ERRORS:
            error = ours.metrics.label_tp_errors[name][key]
            np.testing.assert_allclose(error, metrics.get_label_tp(name, key), rtol=0, atol=tolerance)
    with quiet():
        summary = metrics.serialize()
    for key in ("mean_ap", "nd_score"):
        np.testing.assert_allclose(getattr(ours.metrics, key), summary[key], rtol=0, atol=tolerance)
    for key in ("tp_errors", "tp_scores", "mean_dist_aps"):
        given = getattr(ours.metrics, key)
        assert list(given) == list(summary[key])
        np.testing.assert_allclose(list(given.values()), list(summary[key].values()), rtol=0, atol=tolerance)


def both(case: Case, path: Path, config: EvaluationConfig | None = None) -> Evaluation:
    """Evaluate with both, assert that they agree, return ours."""
    truth = case.truth()
    case.write(path)
    ours = evaluate(truth, read_results(path, truth, config), config)
    assert_equal_to_devkit(ours, case.devkit(path, config))
    assert ours.metrics.samples == len(case.truths)
    return ours


def random_case(
    seed: int,
    *,
    samples: int = 3,
    truths: int = 8,
    boxes: int = 20,
    classes: int = 10,
    grid: float = 0.5,
    spread: float = 6.0,
    scores: int = 4,
    odd: float = 0.1,
    predefined: bool = False,
) -> Case:
    """A case full of ties: centres on a grid, few different scores.

    Args:
        seed: of everything.
        samples: how many; a fifth of them has no annotation, another no prediction.
        truths: annotations of a sample, at most.
        boxes: predictions of a sample, at most; half of them near an annotation.
        classes: how many of the ten occur.
        grid: metres between possible coordinates.
        spread: half side of the square that holds the boxes, metres.
        scores: how many different scores there are; 0: all different.
        odd: share of boxes with something unusual.
        predefined: a split of nuScenes' own.
    """
    rng = np.random.default_rng(seed)
    case = Case({}, {}, predefined=predefined)
    names = list(rng.permutation(CLASSES)[:classes])
    tokens = [f"s{i}" for i in rng.permutation(samples)]
    for i, token in enumerate(tokens):
        ego = rng.integers(-4, 5, 3) * 0.5
        case.ego[token] = (float(ego[0]), float(ego[1]), 0.0)
        case.scene[token] = f"scene-{('0003', '0012', '0013')[i % 3]}" + ("" if predefined or i % 2 else "-night")
        count = 0 if rng.random() < 0.2 else int(rng.integers(0, truths + 1))
        case.truths[token] = [_random_truth(rng, ego, names, grid, spread, odd) for _ in range(count)]
        if rng.random() < 0.4:
            rack = _random_truth(rng, ego, names, grid, spread, 0) | {"detection_name": "rack", "size": [4.0, 4.0, 3.0]}
            case.racks[token] = [rack | {"attribute_name": ""}] * int(rng.integers(1, 3))
    for token in rng.permutation(tokens) if predefined else tokens:
        count = 0 if rng.random() < 0.2 else int(rng.integers(0, boxes + 1))
        case.results[str(token)] = [
            _random_prediction(rng, case, str(token), names, grid, spread, scores, odd) for _ in range(count)
        ]
    if not any(case.results.values()):
        case.results[tokens[0]] = [box(1, 1, sample_token=tokens[0])]
    if not any(case.truths.values()):
        case.truths[tokens[0]] = [box(1, 1, names[0], sample_token=tokens[0])]
    return case


def _random_truth(
    rng: np.random.Generator, ego: np.ndarray, names: list[str], grid: float, spread: float, odd: float
) -> Box:
    name, steps = str(rng.choice(names)), int(spread / grid)
    place = [*(np.round(rng.integers(-steps, steps + 1, 2) * grid, 6) + ego[:2]), 0.0]
    unusual = rng.random(6) < odd
    if unusual[0]:  # Exactly at the class's range.
        place = [EvaluationConfig().class_range[name] + ego[0], ego[1], 0.0]
    angle = float(rng.choice([0.0, 0.5, np.pi / 2, np.pi, rng.uniform(-4, 4)]))
    rotation = [float(np.cos(angle / 2)), 0.0, 0.0, float(np.sin(angle / 2))]
    if unusual[1]:
        rotation = [[0.0, 0, 0, 0], [2.0, 0, 0, 1.0], [1.0, 0, 1.0, 0], [0.5, 0.5, 0.5, 0.5]][rng.integers(4)]
    attribute = str(rng.choice(["", ATTRIBUTES[rng.integers(2)], ATTRIBUTES[rng.integers(8)]]))
    return box(
        float(place[0]),
        float(place[1]),
        name,
        sample_token="",
        translation=[float(v) for v in place],
        size=rng.choice([0.5, 1.0, 2.0, 4.0], 3).tolist(),
        rotation=rotation,
        velocity=[float("nan")] * 2 if unusual[2] else rng.choice([0.0, 0.5, 1.0, 3.0], 2).tolist(),
        attribute_name=attribute,
        num_pts=0 if unusual[3] else int(rng.integers(1, 9)),
        visibility=int(rng.integers(0, 5)),
    )


def _random_prediction(
    rng: np.random.Generator,
    case: Case,
    token: str,
    names: list[str],
    grid: float,
    spread: float,
    scores: int,
    odd: float,
) -> Box:
    near, ego = case.truths[token], np.array(case.ego[token])
    new = _random_truth(rng, ego, names, grid, spread, odd)
    if near and rng.random() < 0.6:
        goal = near[rng.integers(len(near))]
        offset = rng.integers(-4, 5, 2) * grid
        new |= {k: goal[k] for k in ("detection_name", "attribute_name") if rng.random() < 0.9}
        place = np.round(np.array(goal["translation"][:2]) + offset, 6)
        new["translation"] = [float(place[0]), float(place[1]), 0.0]
    score = float(rng.integers(1, scores + 1) / scores) if scores else float(rng.random())
    new |= {"sample_token": token, "detection_score": score}
    del new["visibility"]
    if rng.random() >= odd:
        del new["num_pts"]
    if rng.random() < odd / 2:
        new["sample_token"] = str(rng.choice([*case.truths, "elsewhere"]))
    if rng.random() < odd / 2:
        new |= {"ego_translation": [0.0, 0.0, 0.0], "detection_score": str(score), "extra": [{"a": "}]"}]}
    if rng.random() < odd / 4:
        new["translation"] = [float("inf"), 0.0, 0.0]
    return new


def restricted(case: Case, subset: Subset) -> Evaluation:
    """Ours on a subset, without a file."""
    truth = case.truth()
    return evaluate(truth, columns(case, truth), None, subset, allow_empty=True)


def columns(case: Case, truth: Truth) -> EvalBoxes:
    from kdlab.metrics.results import _columns

    parts = [_columns(case.results[t], t, truth.index[t], truth.index)
             for t in truth.arrange(list(case.results), "case") if case.results[t]]  # fmt: skip
    return EvalBoxes.join(parts)
