"""What is shown and stored of an evaluation, and the settings in the devkit's form."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation_cases import Case, box, quiet, random_case, restricted
from nuscenes.eval.common.config import config_factory

from kdlab.metrics.config import EvaluationConfig
from kdlab.metrics.metrics import Metrics
from kdlab.metrics.subset import Subset
from kdlab.sample import CLASSES


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return restricted(random_case(4, samples=5, truths=20, boxes=60), Subset()).metrics


def test_metrics_survive_json(metrics: Metrics) -> None:
    stored = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    again = Metrics.from_dict(stored)
    assert again.to_dict() == metrics.to_dict() and math.isnan(again.label_tp_errors["traffic_cone"]["vel_err"])
    assert replace(again, pretrained=True).pretrained and again.mean_ap_present == metrics.mean_ap_present


def test_summary_is_the_devkits(tmp_path: Path) -> None:
    case = random_case(4, samples=5, truths=20, boxes=60)
    path = case.write(tmp_path / "r.json")
    official = case.official(path)
    with quiet():
        theirs = official.main(render_curves=False)
    ours = restricted(case, Subset()).metrics.summary(EvaluationConfig(), theirs["eval_time"], official.meta)
    written = json.loads((tmp_path / "metrics_summary.json").read_text())
    ours = json.loads(json.dumps(ours))
    assert list(ours) == list(written)

    def assert_close(a: object, b: object) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            assert list(a) == list(b)
            for key in a:
                assert_close(a[key], b[key])
        else:
            assert a == pytest.approx(b, abs=1e-9, nan_ok=True)

    assert_close(ours, written)


def test_table() -> None:
    all_classes = [box(i, 0, name) for i, name in enumerate(CLASSES)]
    metrics = restricted(Case({"s0": all_classes}, {"s0": all_classes[::2]}), Subset()).metrics
    text = str(metrics)
    assert text.startswith("own: 1 samples\nmAP ") and "NDS" in text and "none of" not in text
    rows = {line.split()[0]: line.split() for line in text.splitlines()[3:]}
    assert set(rows) == set(CLASSES) and rows["traffic_cone"][4:7] == ["-", "-", "-"]
    assert rows["car"][1] == f"{metrics.mean_dist_aps['car']:.4f}" and rows["car"][-1] == "boxes)"
    few = restricted(Case({"s0": [box(0, 0)]}, {"s0": [box(0, 0)]}), Subset()).metrics
    assert "1 classes that are there: 1.0000 (none of: truck" in str(few) and few.present == ["car"]


def test_config_is_that_of_the_challenge(tmp_path: Path) -> None:
    official = config_factory("detection_cvpr_2019").serialize()
    assert EvaluationConfig().to_dict() == official
    assert list(EvaluationConfig().class_range) == list(official["class_range"])
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps({**official, "min_recall": 0, "dist_ths": [1, 2], "class_range": dict.fromkeys(CLASSES, 9)})
    )
    config = EvaluationConfig.from_file(path)
    assert config.dist_ths == (1.0, 2.0) and config.min_recall == 0 and config.class_range["car"] == 9
    path.write_text(json.dumps(config.to_dict()))
    assert EvaluationConfig.from_file(path) == config


@pytest.mark.parametrize(("change", "message"), [
    ({"class_range": {"car": 5}}, "class_range must name the ten nuScenes classes"),
    ({"dist_th_tp": 3}, r"dist_th_tp is 3\.0, which is not one of dist_ths"),
    ({"min_recall": 1.5}, r"min_recall must lie in \[0, 1\]"),
    ({"min_precision": 1}, r"min_precision must lie in \[0, 1\)"),
    ({"dist_fcn": "iou"}, "dist_fcn must be 'center_distance', got 'iou'"),
    ({"dist_ths": "far"}, "no nuScenes evaluation config"),
    ({"class_range": 5}, "no nuScenes evaluation config"),
])  # fmt: skip
def test_settings_that_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**EvaluationConfig().to_dict(), **change}))
    with pytest.raises(ValueError, match=rf"c\.json: .*{message}"):
        EvaluationConfig.from_file(path)


def test_config_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such evaluation config"):
        EvaluationConfig.from_file(tmp_path / "none.json")
    for text, message in (("{", "no nuScenes evaluation config"), ("{}", "the evaluation config lacks 'dist_fcn'")):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            EvaluationConfig.from_file(tmp_path / "c.json")
