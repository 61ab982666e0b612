"""Opening the tables: nuscenes-devkit against kdlab's columns, on one synthetic data set, in processes of their own."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from timing import Row, row

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
RADARS = tuple(f"RADAR_{k}" for k in range(5))
BOXES = 34  # annotations per keyframe, as in nuScenes
RATES = {"LIDAR_TOP": 10, **dict.fromkeys(CAMERAS, 6), **dict.fromkeys(RADARS, 6)}  # files per keyframe

OPEN = """
import sys, time
{imports}
def peak():  # ru_maxrss would hold the parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before, start = peak(), time.perf_counter()
{call}
print(time.perf_counter() - start, (peak() - before) / 1024)
"""
DEVKIT = ("from nuscenes import NuScenes", "NuScenes('v1.0-big', sys.argv[1], verbose=False)")
KDLAB = ("from kdlab.data.nuscenes import NuScenesDataset", "NuScenesDataset(sys.argv[1])")


def token(kind: str, index: int) -> str:
    return f"{kind}{index:0{32 - len(kind)}d}"


def write_big(root: Path, keyframes: int) -> int:
    """Tables of 40-keyframe scenes; returns their size in bytes."""
    tables: dict[str, list[dict[str, Any]]] = {n: [] for n in (
        "scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sensor", "sample_annotation", "instance",
        "category", "attribute", "visibility", "log", "map")}  # fmt: skip
    turn = [0.5, 0.5, -0.5, 0.5]
    tables["category"].append({"token": "c", "name": "vehicle.car", "description": ""})
    tables["attribute"].append({"token": "a", "name": "vehicle.moving", "description": ""})
    tables["visibility"].append({"token": "4", "level": "v80-100", "description": ""})
    tables["log"].append({"token": "log", "logfile": "", "vehicle": "", "date_captured": "", "location": ""})
    tables["map"].append({"token": "map", "log_tokens": ["log"], "category": "", "filename": ""})
    for name in RATES:
        matrix = [[1266.4, 0.0, 816.3], [0.0, 1266.4, 491.5], [0.0, 0.0, 1.0]] if name in CAMERAS else []
        modality = name.split("_")[0].lower().replace("cam", "camera")
        tables["sensor"].append({"token": name, "channel": name, "modality": modality})
        tables["calibrated_sensor"].append({"token": name, "sensor_token": name, "translation": [1.0, 0.0, 1.5],
                                            "rotation": turn, "camera_intrinsic": matrix})  # fmt: skip
    for k in range(keyframes):
        if k % 40 == 0:
            last = min(k + 39, keyframes - 1)
            tables["scene"].append({"token": token("s", k), "name": f"scene-{k:05d}", "log_token": "log",
                                    "nbr_samples": 40, "first_sample_token": token("k", k),
                                    "last_sample_token": token("k", last), "description": ""})  # fmt: skip
        tables["sample"].append({"token": token("k", k), "timestamp": 1532402927647951 + 500000 * k, "prev": "",
                                 "next": "", "scene_token": token("s", k - k % 40)})  # fmt: skip
        _sensor_files(tables, k, turn)
        _annotations(tables, k)
    folder = root / "v1.0-big"
    folder.mkdir(parents=True)
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=0))
    return sum(f.stat().st_size for f in folder.iterdir())


def _sensor_files(tables: dict[str, list[dict[str, Any]]], k: int, turn: list[float]) -> None:
    for name, rate in RATES.items():
        for j in range(rate):
            own = token(name.lower(), k * rate + j)
            time = 1532402927647951 + 500000 * k + 500000 * j // rate
            tables["ego_pose"].append({"token": own, "timestamp": time, "rotation": turn,
                                       "translation": [411.3039245605469 + k, 1180.890576171875, 0.0]})  # fmt: skip
            tables["sample_data"].append({
                "token": own, "sample_token": token("k", k), "ego_pose_token": own, "calibrated_sensor_token": name,
                "timestamp": time, "fileformat": "jpg", "is_key_frame": j == 0, "height": 900, "width": 1600,
                "filename": f"samples/{name}/n015-2018-07-24-11-22-45+0800__{name}__{time}.jpg",
                "prev": token(name.lower(), k * rate + j - 1) if k * rate + j else "", "next": "",
            })  # fmt: skip


def _annotations(tables: dict[str, list[dict[str, Any]]], k: int) -> None:
    for j in range(BOXES):
        if k % 40 == 0:
            tables["instance"].append({"token": token("i", k * BOXES + j), "category_token": "c", "nbr_annotations": 40,
                                       "first_annotation_token": "", "last_annotation_token": ""})  # fmt: skip
        tables["sample_annotation"].append({
            "token": token("b", k * BOXES + j), "sample_token": token("k", k), "visibility_token": "4",
            "instance_token": token("i", (k - k % 40) * BOXES + j), "attribute_tokens": ["a"],
            "translation": [373.25612, 1130.419 + k, 0.8], "size": [1.621, 4.669, 1.642],
            "rotation": [0.983, 0.0, 0.0, -0.182], "num_lidar_pts": 5, "num_radar_pts": 0,
            "prev": token("b", (k - 1) * BOXES + j) if k % 40 else "", "next": "",
        })  # fmt: skip


def opening(root: Path, imports: str, call: str) -> tuple[float, float]:
    """Seconds and MiB of memory growth of one opening, in a process of its own, imports left out."""
    code = OPEN.format(imports=imports, call=call)
    out = subprocess.run([sys.executable, "-c", code, str(root)], check=True, capture_output=True, text=True).stdout
    seconds, memory = map(float, out.split())
    return seconds, memory


def measure_all(keyframes: int = 3400) -> list[Row]:
    """A tenth of v1.0-trainval. kdlab's first opening writes its cache, the later ones read it."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        size = write_big(root, keyframes) / 2**20
        first = opening(root, *KDLAB)
        runs = [(opening(root, *KDLAB), opening(root, *DEVKIT)) for _ in range(2)]
    ours, devkit = ([min(run[side][i] for run in runs) for i in (0, 1)] for side in (0, 1))
    shape, peer = f"{keyframes:,} keyframes, {size:.0f} MiB of JSON", "nuscenes-devkit NuScenes()"
    return [
        row("open the tables", shape, ours[0] * 1e3, peer, devkit[0] * 1e3, 20.0),
        {**row("open the tables, first time", shape, first[0] * 1e3, peer, devkit[0] * 1e3, 0.0), "target": "none"},
        row("open the tables, memory growth", shape, max(ours[1], 1.0), peer, devkit[1], 4.0, unit="MiB"),
    ]


def test_tables() -> None:
    again, _, memory = measure_all(800)
    assert again["ratio"] >= 10 and memory["ratio"] >= 3
