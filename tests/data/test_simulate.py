"""The simulated world on disk: the devkit loads, draws and evaluates it; bytes, resuming and errors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from pyquaternion import Quaternion

from kdlab.data import simulate as sim
from kdlab.data.simulate import SimulationConfig, simulate

CONFIG = SimulationConfig(scenes=3, keyframes=3, image_width=176, image_height=99, sweeps_per_keyframe=2)
SPLITS = ("sim_train", "sim_val", "sim_test")
CLASSES = {
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
    "traffic_cone",
}  # fmt: skip


def hashes(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("simulated") / "data", CONFIG, workers=2, progress=False)


@pytest.fixture(scope="session")
def nusc(simulated: Path):
    from nuscenes import NuScenes

    return NuScenes("v1.0-sim", str(simulated), verbose=False)


def test_tables_are_whole_and_linked(nusc) -> None:
    assert len(nusc.scene) == 3 and len(nusc.sample) == 9
    for scene in nusc.scene:
        token, count = scene["first_sample_token"], 0
        while token:
            sample = nusc.get("sample", token)
            assert set(sample["data"]) == {
                "LIDAR_TOP",
                "CAM_FRONT",
                "CAM_FRONT_LEFT",
                "CAM_FRONT_RIGHT",
                "CAM_BACK",
                "CAM_BACK_LEFT",
                "CAM_BACK_RIGHT",
            }
            stamps = {nusc.get("sample_data", d)["timestamp"] for d in sample["data"].values()}
            assert stamps == {sample["timestamp"]}
            token, count = sample["next"], count + 1
        assert count == scene["nbr_samples"]
        sweep = nusc.get("sample_data", nusc.get("sample", scene["first_sample_token"])["data"]["LIDAR_TOP"])
        sweeps = 1
        while sweep["next"]:
            assert nusc.get("sample_data", sweep["next"])["timestamp"] > sweep["timestamp"]
            sweep, sweeps = nusc.get("sample_data", sweep["next"]), sweeps + 1
        assert sweeps == 2 * (3 - 1) + 1
    for instance in nusc.instance:
        token, count = instance["first_annotation_token"], 0
        while token:
            annotation = nusc.get("sample_annotation", token)
            assert annotation["instance_token"] == instance["token"]
            last, token, count = token, annotation["next"], count + 1
        assert (last, count) == (instance["last_annotation_token"], instance["nbr_annotations"])
    tokens = [row["token"] for table in nusc.table_names if table != "ego_pose" for row in getattr(nusc, table)]
    assert len(tokens) == len(set(tokens))


def test_devkit_draws_it(nusc, tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg", force=True)
    import matplotlib.pyplot as plt

    sample = nusc.sample[1]
    for channel in ("LIDAR_TOP", "CAM_FRONT"):
        nusc.render_sample_data(sample["data"][channel], nsweeps=2 if channel == "LIDAR_TOP" else 1, verbose=False)
    nusc.render_pointcloud_in_image(sample["token"], out_path=str(tmp_path / "points.png"), verbose=False)
    nusc.render_annotation(sample["anns"][0], out_path=str(tmp_path / "annotation.png"))
    plt.close("all")
    assert (tmp_path / "points.png").exists()


@pytest.mark.parametrize("split", SPLITS)
def test_ground_truth_scores_full_marks(nusc, split: str, tmp_path: Path) -> None:
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.loaders import load_gt_of_sample_tokens
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.eval.detection.evaluate import DetectionEval
    from nuscenes.utils.splits import get_scenes_of_split

    names = get_scenes_of_split(split, nusc)
    tokens = [s["token"] for s in nusc.sample if nusc.get("scene", s["scene_token"])["name"] in names]
    truth = load_gt_of_sample_tokens(nusc, tokens, DetectionBox)
    results = {}
    for token in tokens:
        boxes = [b.serialize() for b in truth[token]]
        for box in boxes:
            box["detection_score"] = 1.0
            box["velocity"] = np.nan_to_num(box["velocity"]).tolist()
        results[token] = sorted(boxes, key=lambda b: -b["num_pts"])[:500]
    meta = dict.fromkeys(("use_camera", "use_radar", "use_map", "use_external"), False) | {"use_lidar": True}
    (tmp_path / "result.json").write_text(json.dumps({"meta": meta, "results": results}))
    judge = DetectionEval(
        nusc, config_factory("detection_cvpr_2019"), str(tmp_path / "result.json"), split, str(tmp_path), verbose=False
    )
    metrics, _ = judge.evaluate()
    assert metrics.mean_ap > 0.99
    assert metrics.nd_score > 0.95
    assert set(metrics.mean_dist_aps) == CLASSES


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_all_classes_in_sight(nusc, simulated: Path, split: str) -> None:
    names = json.loads((simulated / "v1.0-sim" / "splits.json").read_text())[split]
    seen: dict[str, int] = dict.fromkeys(CLASSES, 0)
    short = {c: n for n, c in sim_categories().items()}
    for sample in nusc.sample:
        if nusc.get("scene", sample["scene_token"])["name"] not in names:
            continue
        ego = nusc.get("ego_pose", sample["data"]["LIDAR_TOP"])["translation"]
        rows = [nusc.get("sample_annotation", t) for t in sample["anns"]]
        near = [r for r in rows if np.hypot(r["translation"][0] - ego[0], r["translation"][1] - ego[1]) < 30]
        for name in {short[r["category_name"]] for r in near if r["num_lidar_pts"] >= 5}:
            seen[name] += 1
    assert min(seen.values()) >= 2, seen


def sim_categories() -> dict[str, str]:
    from kdlab.data.simulate_shapes import CATEGORIES

    return CATEGORIES


def test_points_in_boxes_are_counted(nusc) -> None:
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.geometry_utils import points_in_box

    total = 0
    for sample in nusc.sample[::4]:
        path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        cloud = LidarPointCloud.from_file(path)
        raw = np.fromfile(path, np.float32).reshape(-1, 5)
        assert raw[:, 3].min() >= 0 and raw[:, 3].max() <= 255 and set(np.unique(raw[:, 4])) <= set(range(32))
        assert np.linalg.norm(raw[:, :3], axis=1).max() < CONFIG.lidar_range + 1
        for box in boxes:
            inside = int(points_in_box(box, cloud.points[:3]).sum())
            stated = nusc.get("sample_annotation", box.token)["num_lidar_pts"]
            assert abs(inside - stated) <= 1 + 0.01 * stated  # Points on a face may fall either way.
            total += stated
    assert total > 1000


def test_velocities_match_displacements(nusc) -> None:
    fast = 0
    for annotation in nusc.sample_annotation:
        velocity = nusc.box_velocity(annotation["token"])
        if not annotation["prev"] or not annotation["next"]:
            continue
        before, after = (nusc.get("sample_annotation", annotation[k])["translation"] for k in ("prev", "next"))
        assert np.allclose(velocity[:2], np.subtract(after, before)[:2] / 1.0, atol=1e-3)
        attributes = [nusc.get("attribute", t)["name"] for t in annotation["attribute_tokens"]]
        if attributes == ["vehicle.parked"]:
            assert np.linalg.norm(velocity) < 1e-6
        if attributes == ["vehicle.moving"] and np.linalg.norm(velocity) > 2:
            heading = Quaternion(annotation["rotation"]).yaw_pitch_roll[0]
            along = velocity[0] * np.cos(heading) + velocity[1] * np.sin(heading)
            assert along > 0.97 * np.linalg.norm(velocity[:2])
            fast += 1
    assert fast > 0


def test_same_bytes_with_any_number_of_workers(simulated: Path, tmp_path: Path) -> None:
    again = simulate(tmp_path / "again", CONFIG, workers=1, progress=False)
    assert hashes(simulated) == hashes(again)


def test_an_interrupted_run_continues(simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    whole, out = hashes(simulated), tmp_path / "half"
    shutil.copytree(simulated, out)
    for table in (out / "v1.0-sim").glob("*.json"):
        table.unlink()
    (out / ".parts" / "scene-0002.json").unlink()
    (out / "samples" / "CAM_FRONT" / ".half.jpg.1.tmp").write_bytes(b"half")
    next((out / "samples" / "CAM_FRONT").glob("scene-0002*.jpg")).unlink()
    record = {"digest": CONFIG.digest(), "complete": False, "config": dataclasses.asdict(CONFIG)}
    (out / "v1.0-sim" / "simulation.json").write_text(json.dumps(record))
    rendered: list[int] = []
    run = sim._run

    def spy(folder: Path, config: SimulationConfig, todo: list[int], *rest: object) -> None:
        rendered.extend(todo)
        run(folder, config, todo, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sim, "_run", spy)
    simulate(out, CONFIG, workers=1, progress=False)
    assert rendered == [1]
    assert hashes(out) == whole
    simulate(out, CONFIG, workers=1, progress=False)
    assert rendered == [1]  # A finished data set is not touched.


def test_a_kill_at_any_folder_or_record_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    calls, real_mkdir, real_replace = 0, Path.mkdir, os.replace

    def count(limit: int) -> None:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise Killed

    for limit in range(100):
        out, calls = tmp_path / str(limit), 0
        with monkeypatch.context() as patch:

            def mkdir(self: Path, *args: object, limit: int = limit, **options: object) -> None:
                count(limit)
                real_mkdir(self, *args, **options)  # type: ignore[arg-type]

            def replace(*args: str, limit: int = limit) -> None:
                count(limit)
                real_replace(*args)

            patch.setattr(Path, "mkdir", mkdir)
            patch.setattr(os, "replace", replace)
            try:
                sim._prepare(out, sim._record(CONFIG, [0, 1, 2]))
                break
            except Killed:
                pass
        assert sim._prepare(out, sim._record(CONFIG, [0, 1, 2])) is False
        assert json.loads((out / "v1.0-sim" / "simulation.json").read_text())["complete"] is False
    assert 8 < limit < 99


def test_other_settings_in_the_same_folder_are_refused(simulated: Path) -> None:
    with pytest.raises(ValueError, match=r"fog=0\.0 \(now 0\.5\).*another folder"):
        simulate(simulated, dataclasses.replace(CONFIG, fog=0.5), progress=False)


def test_a_part_of_the_world_has_the_bytes_of_the_whole(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = simulate(tmp_path / "part", CONFIG, workers=1, progress=False, only=("scene-0003", "scene-0001"))
    whole, part = hashes(simulated), hashes(out)
    tables = {name for name in part if name.startswith("v1.0-sim/")}
    assert {name: whole[name] for name in part if name not in tables} == {n: part[n] for n in part if n not in tables}
    assert sum(name.startswith("samples/LIDAR_TOP/") for name in part) == 6
    splits = json.loads((out / "v1.0-sim" / "splits.json").read_text())
    assert splits == {"sim_train": ["scene-0001"], "sim_val": [], "sim_test": ["scene-0003"]}
    rows, all_rows = (json.loads((r / "v1.0-sim" / "sample_annotation.json").read_text()) for r in (out, simulated))
    samples = {row["token"] for row in json.loads((out / "v1.0-sim" / "sample.json").read_text())}
    assert len(samples) == 6 and rows == [row for row in all_rows if row["sample_token"] in samples]
    record = json.loads((out / "v1.0-sim" / "simulation.json").read_text())
    assert record["digest"] == CONFIG.digest() and record["scenes"] == ["scene-0001", "scene-0003"]
    assert "scenes" not in json.loads((simulated / "v1.0-sim" / "simulation.json").read_text())
    monkeypatch.setattr(sim, "_run", None)  # a finished part is reused
    assert simulate(out, CONFIG, progress=False, only=["scene-0001", "scene-0003"]) == out


def test_another_part_or_an_unknown_scene_is_refused(simulated: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another part .* the whole world \(now scene-0001\)"):
        simulate(simulated, CONFIG, progress=False, only=["scene-0001"])
    with pytest.raises(ValueError, match="no scene scene-0009; its scenes are scene-0001 to scene-0003"):
        simulate(tmp_path / "out", CONFIG, progress=False, only=["scene-0001", "scene-0009"])
    with pytest.raises(ValueError, match="none is named"):
        simulate(tmp_path / "out", CONFIG, progress=False, only=[])
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        simulate(tmp_path, CONFIG, progress=False)


def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose a folder"):
        simulate(tmp_path / "file" / "out", CONFIG, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"scenes": 2}, "scenes must be at least 3"), ({"night": 1.5}, "night"), ({"keyframes": 0}, "keyframes")],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(tmp_path / "out", dataclasses.replace(CONFIG, **change), progress=False)  # type: ignore[arg-type]


def test_every_knob_at_once_still_makes_a_valid_set(tmp_path: Path) -> None:
    from nuscenes import NuScenes

    config = SimulationConfig(
        scenes=3, keyframes=2, image_width=64, image_height=36, sweeps_per_keyframe=2, lidar_azimuth_steps=180,
        lidar_beams=16, lidar_rolling=True, lidar_time_offset=-0.05, camera_time_offset=0.1, calibration_rotation=0.5,
        calibration_translation=0.05, night=0.7, fog=0.3, traffic=0.5, occlusion=0.7, speed=0.5, antialias=False,
    )  # fmt: skip
    out = simulate(tmp_path / "knobs", config, workers=1, progress=False)
    nusc = NuScenes("v1.0-sim", str(out), verbose=False)
    sample = nusc.sample[0]
    stamps = {d: nusc.get("sample_data", t)["timestamp"] - sample["timestamp"] for d, t in sample["data"].items()}
    assert stamps["LIDAR_TOP"] == -50_000
    assert 0 < max(abs(v) for d, v in stamps.items() if d != "LIDAR_TOP") <= 100_000
    written = nusc.get("sample_data", sample["data"]["CAM_FRONT"])["calibrated_sensor_token"]
    rotation = Quaternion(nusc.get("calibrated_sensor", written)["rotation"])
    true = sim.real_rig(config)["CAM_FRONT"].ego_from_sensor[:3, :3]
    error = np.degrees((rotation.inverse * Quaternion(matrix=true, atol=1e-6)).radians)
    assert 0.01 < abs(error) < 5
