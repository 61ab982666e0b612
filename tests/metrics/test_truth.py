"""Annotations from the table cache against those that the devkit loads from the same data set."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_cases import assert_equal_to_devkit, quiet

from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.evaluation import evaluate
from kdlab.metrics.results import read_results
from kdlab.metrics.truth import Truth, load_truth
from kdlab.sample import ATTRIBUTES, CLASSES

Record = dict[str, Any]
VERSION = "v1.0-tiny"


def write_set(root: Path) -> Path:
    spec = importlib.util.spec_from_file_location("mini_set", Path(__file__).parents[1] / "data" / "mini_set.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path: Path = module.write_mini_set(root)
    return path


def edit(folder: Path, table: str, change: Callable[[list[Record]], list[Record]]) -> None:
    path = folder / f"{table}.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mini set with bicycle racks, a bicycle, a night, and its records in another order."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_set(tmp_path / "set")
    folder = root / VERSION

    def more(rows: list[Record]) -> list[Record]:
        animals = [r for r in rows if r["instance_token"] == "instance-animal"]
        for k, row in enumerate(animals):  # They become racks; in every second one stands a bicycle.
            row |= {"instance_token": "instance-rack", "size": [2.0, 3.0, 2.0], "attribute_tokens": []}
            bicycle = {"token": f"bicycle-{k}", "instance_token": "instance-bicycle", "prev": "", "next": ""}
            place = [row["translation"][0] + 2 * (k % 2), *row["translation"][1:]]
            rows.append({**row, **bicycle, "translation": place, "size": [0.5, 1.5, 1.2], "num_lidar_pts": 5})
        return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]

    for kind, name in (("rack", "static_object.bicycle_rack"), ("bicycle", "vehicle.bicycle")):
        edit(folder, "category", lambda rows, n=name: [*rows, {"token": f"category-{n}", "name": n, "description": ""}])
        instance = {"token": f"instance-{kind}", "category_token": f"category-{name}", "nbr_annotations": 3,
                    "first_annotation_token": "", "last_annotation_token": ""}  # fmt: skip
        edit(folder, "instance", lambda rows, i=instance: [*rows, i])
    edit(folder, "sample_annotation", more)
    edit(folder, "sample", lambda rows: rows[::-2] + rows[-2::-2])
    edit(folder, "scene", lambda rows: [rows[0], {**rows[1], "description": "Rain, NIGHT, peds"}])
    return root


def devkit_boxes(root: Path, version: str, split: str) -> Any:
    from nuscenes import NuScenes
    from nuscenes.eval.common.loaders import get_samples_of_custom_split, load_gt, load_gt_of_sample_tokens
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.utils.splits import is_predefined_split

    with quiet():
        tables = NuScenes(version, str(root), verbose=False)
        if is_predefined_split(split):
            return load_gt(tables, split, DetectionBox)
        return load_gt_of_sample_tokens(tables, get_samples_of_custom_split(split, tables), DetectionBox)


def assert_same_boxes(truth: Truth, theirs: Any) -> None:
    assert truth.tokens == theirs.sample_tokens
    boxes = truth.boxes
    for i, theirs_box in enumerate(theirs.all):
        assert truth.tokens[boxes.sample[i]] == theirs_box.sample_token and boxes.owner[i] == boxes.sample[i]
        for key in ("translation", "size", "rotation", "velocity"):
            assert np.array_equal(getattr(boxes, key)[i], getattr(theirs_box, key), equal_nan=True), key
        assert CLASSES[boxes.label[i]] == theirs_box.detection_name and boxes.points[i] == theirs_box.num_pts
        assert ("" if boxes.attribute[i] < 0 else ATTRIBUTES[boxes.attribute[i]]) == theirs_box.attribute_name
    assert len(boxes) == len(theirs.all) > 0


@pytest.mark.parametrize("split", ["all", "tiny_train", "tiny_val"])
def test_annotations_of_a_custom_split(root: Path, split: str) -> None:
    truth = load_truth(root, split)
    assert_same_boxes(truth, devkit_boxes(root, VERSION, split))
    assert truth.version == VERSION and not truth.predefined and len(truth.scene) == len(truth.tokens)
    assert [s == "tiny-0002" for s in truth.scene] == truth.night.tolist()
    assert set(truth.boxes.visibility.tolist()) == {1, 2, 3, 4} and len(truth.racks.size) == truth.racks.start[-1]
    assert len(truth.racks.start) == len(truth.tokens) + 1 and truth.racks.size[0].tolist() == [2.0, 3.0, 2.0]


def test_evaluation_from_disk(root: Path, tmp_path: Path) -> None:
    """Ego poses and racks come from the tables on both sides."""
    from nuscenes import NuScenes
    from nuscenes.eval.detection.data_classes import DetectionConfig
    from nuscenes.eval.detection.evaluate import DetectionEval

    truth, results = load_truth(root, "all"), {}
    for s, token in enumerate(truth.tokens):
        results[token] = [
            {"sample_token": token, "translation": (truth.boxes.translation[i] + 0.3).tolist(),
             "size": truth.boxes.size[i].tolist(), "rotation": truth.boxes.rotation[i].tolist(), "velocity": [0.5, 0],
             "detection_name": CLASSES[truth.boxes.label[i]], "detection_score": 0.5, "attribute_name": ""}
            for i in np.flatnonzero(truth.boxes.sample == s)
        ]  # fmt: skip
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"meta": {}, "results": results}))
    ours = evaluate(truth, read_results(path, truth))
    with quiet():
        settings = DetectionConfig.deserialize(EvaluationConfig().to_dict())
        tables = NuScenes(VERSION, str(root), verbose=False)
        theirs = DetectionEval(tables, settings, str(path), "all", str(tmp_path), verbose=False).evaluate()
    assert_equal_to_devkit(ours, theirs)
    in_racks = (truth.boxes.label == CLASSES.index("bicycle")).sum() - ours.metrics.counts["bicycle"]
    assert in_racks > 0 and ours.metrics.mean_ap > 0 and ours.metrics.data == truth.digest


@pytest.fixture
def official(root: Path) -> Path:
    """The same as v1.0-trainval with scenes of val and train, and a splits.json that says otherwise."""
    folder = root / VERSION
    names = {"tiny-0001": "scene-0003", "tiny-0002": "scene-0061"}
    edit(folder, "scene", lambda rows: [{**r, "name": names[r["name"]]} for r in rows])
    (folder / "splits.json").write_text(json.dumps({"val": ["scene-0061"], "own": ["scene-0061"]}))
    folder.rename(root / "v1.0-trainval")
    return root


def test_nuscenes_own_splits(official: Path) -> None:
    for split, scene in (("val", "scene-0003"), ("train", "scene-0061"), ("train_detect", "scene-0061")):
        truth = load_truth(official, split)
        assert truth.predefined and set(truth.scene) == {scene}
        assert_same_boxes(truth, devkit_boxes(official, "v1.0-trainval", split))
    assert set(load_truth(official, "own").scene) == {"scene-0061"}


def test_splits_that_do_not_fit(root: Path, official: Path) -> None:
    for split in ("mini_val", "test", "train_track"):
        with pytest.raises(
            ValueError, match=rf"'{split}' is one of nuScenes' own splits and needs scenes of a version"
        ):
            load_truth(official, split)
    with pytest.raises(ValueError, match=r"has no split 'nonsense'; known splits: own, "):
        load_truth(official, "nonsense")
    (official / "v1.0-trainval").rename(official / VERSION)
    with pytest.raises(ValueError, match=r"'val' is one of nuScenes' own splits .* 'trainval'; give a split"):
        load_truth(official, "val")
    with pytest.raises(FileNotFoundError):
        load_truth(root / "nowhere", "val")


@pytest.mark.parametrize(("change", "message"), [
    ({"attribute_tokens": ["attribute-vehicle.moving", "attribute-pedestrian.standing"]}, "more than one attribute"),
    ({"attribute_tokens": ["attribute-other"]}, "an attribute that nuScenes does not know"),
    ({"size": [float("nan"), 1.0, 1.0]}, "a NaN in its centre, size or rotation"),
])  # fmt: skip
def test_annotations_that_nuscenes_does_not_take(root: Path, change: Record, message: str) -> None:
    edit(
        root / VERSION, "attribute", lambda rows: [*rows, {"token": "attribute-other", "name": "o", "description": ""}]
    )

    def spoil(rows: list[Record]) -> list[Record]:
        wrong = next(r for r in rows if r["instance_token"] == "instance-vehicle.car" and "0001" in r["sample_token"])
        wrong.update(change)
        return rows

    edit(root / VERSION, "sample_annotation", spoil)
    with pytest.raises(ValueError, match=rf"split 'all': a car of sample 'tiny-0001-\d' has {message}"):
        load_truth(root, "all")
    assert len(load_truth(root, "tiny_val").boxes) > 0
    with pytest.raises(Exception, match=r"attribute|NaN"):
        devkit_boxes(root, VERSION, "all")


def test_nothing_to_evaluate(root: Path) -> None:
    edit(root / VERSION, "sample_annotation", lambda rows: [r for r in rows if "0001" in r["sample_token"]])
    with pytest.raises(ValueError, match=r"split 'tiny_val': no annotation of the ten classes"):
        load_truth(root, "tiny_val")
