"""Detection metrics: nuscenes-devkit against kdlab on the same made-up boxes, in one run.

pytest runs it small. `python tests/bench/bench_evaluation.py` takes a tenth of nuScenes val (602 samples of 500 boxes),
and kdlab alone at its full size; `... 60` takes a smaller number of samples.
"""

import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import Row, row

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "metrics"))
from evaluation_cases import Box, Case, assert_equal_to_devkit, box, quiet

from kdlab.metrics.boxes import from_detections
from kdlab.metrics.evaluation import Evaluation, evaluate
from kdlab.metrics.results import read_results
from kdlab.metrics.truth import Truth
from kdlab.sample import ATTRIBUTES, CLASSES, Detections

SAMPLES, BOXES = 602, 500
DEVKIT = "nuscenes-devkit 1.2.0"
Times = dict[str, list[float]]
SHARE = np.array([0.43, 0.08, 0.015, 0.02, 0.025, 0.13, 0.015, 0.015, 0.19, 0.08])  # of the annotations, by class


def made_up(samples: int, boxes: int, seed: int = 0) -> Case:
    """About 31 annotations a sample; of the predictions some lie near an annotation, the others anywhere in range."""
    rng = np.random.default_rng(seed)
    case = Case({}, {})
    for s in range(samples):
        token = f"{s:032x}"
        case.ego[token] = (float(rng.uniform(0, 2000)), float(rng.uniform(0, 2000)), 0.0)
        near = rng.poisson(31.4)
        centre = np.array(case.ego[token][:2]) + rng.uniform(-45, 45, (near, 2))
        label = rng.choice(10, near, p=SHARE / SHARE.sum())
        case.truths[token] = [
            _random(rng, *centre[i], int(label[i]), num_pts=int(rng.integers(0, 20))) for i in range(near)
        ]
        goal = rng.integers(0, max(near, 1), boxes)
        for_truth = (rng.random(boxes) < 0.3) & (near > 0)
        place = np.array(case.ego[token][:2]) + rng.uniform(-50, 50, (boxes, 2))
        wanted = rng.choice(10, boxes, p=SHARE / SHARE.sum())
        if near:
            place[for_truth] = (centre[goal] + rng.normal(0, 0.8, (boxes, 2)))[for_truth]
            wanted[for_truth] = label[goal][for_truth]
        score = np.where(for_truth, rng.beta(4, 2, boxes), rng.beta(1, 4, boxes)).round(3)  # Rounded: ties.
        case.results[token] = [
            _random(rng, *place[i], int(wanted[i]), sample_token=token, detection_score=float(score[i]))
            for i in range(boxes)
        ]
        if s % 10 == 0:
            case.racks[token] = [_random(rng, *centre[0], 0, detection_name="rack", attribute_name="")] if near else []
    return case


def _random(rng: np.random.Generator, x: float, y: float, label: int, **more: Any) -> Box:
    yaw = rng.uniform(-np.pi, np.pi)
    values = {
        "translation": [float(x), float(y), float(rng.normal())],
        "size": rng.uniform(0.4, 5, 3).tolist(),
        "rotation": [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))],
        "velocity": rng.normal(0, 2, 2).tolist(),
        "attribute_name": str(rng.choice(["", *ATTRIBUTES[:3]])),
    }
    return box(0, 0, CLASSES[label], **{**values, **more})


class Workbench:
    """The same boxes in a result file, as columns and in the devkit's hands. Times are CPU seconds of this process."""

    def __init__(self, samples: int = SAMPLES, boxes: int = BOXES) -> None:
        self.samples, self.shape = samples, f"{samples} x {boxes}"
        case = made_up(samples, boxes)
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.path = case.write(self.folder / "results.json")
        case.results = {}
        self.case, self.truth = case, case.truth()
        (self.folder / "case.pickle").write_bytes(pickle.dumps(case))

    @cached_property
    def times(self) -> dict[str, float]:
        """Seconds of each stage; kdlab takes three turns between the devkit's, whose median counts. Both must agree."""
        with quiet():
            import nuscenes.eval.detection.evaluate  # noqa: F401  # Its imports are not part of the work.
        times: Times = {}
        ours = self._ours(times)
        official = timed(times, "devkit read and filter", lambda: self.case.official(self.path))
        self._ours(times)
        with quiet():
            theirs = timed(times, "devkit evaluate", official.evaluate)
        assert_equal_to_devkit(ours, theirs)
        del official, theirs
        loaded = timed(times, "devkit read", lambda: self.case.load(self.path))
        assert len(loaded.sample_tokens) == self.samples
        self._ours(times)
        return {name: float(np.median(each)) for name, each in times.items()}

    def _ours(self, times: Times) -> Evaluation:
        boxes = timed(times, "read", lambda: read_results(self.path, self.truth))
        return timed(times, "filter and evaluate", lambda: evaluate(self.truth, boxes))

    def peak(self, who: str) -> float:
        """MiB that reading and evaluating take at most in a process of its own."""
        words = [sys.executable, __file__, "--peak", who, str(self.folder)]
        return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def timed(times: Times, name: str, function: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = function()
    times.setdefault(name, []).append(time.process_time() - start)
    return result


def measure_filter_and_evaluate(bench: Workbench) -> Row:
    times = bench.times
    theirs = times["devkit read and filter"] - times["devkit read"] + times["devkit evaluate"]
    return row("filter and evaluate", bench.shape, times["filter and evaluate"] * 1e3, DEVKIT, theirs * 1e3, 30)


def measure_file_to_metrics(bench: Workbench) -> Row:
    times = bench.times
    ours = times["read"] + times["filter and evaluate"]
    theirs = times["devkit read and filter"] + times["devkit evaluate"]
    return row("JSON file to metrics", bench.shape, ours * 1e3, DEVKIT, theirs * 1e3, 8)


def measure_memory(bench: Workbench) -> Row:
    """Both sides' peak memory in MiB stands where times stand elsewhere."""
    return row("JSON file to metrics, peak memory", bench.shape, bench.peak("kdlab"), DEVKIT, bench.peak("devkit"), 5,
               unit="MiB")  # fmt: skip


def measure_training_time(samples: int = 200, boxes: int = BOXES) -> Row:
    """Detections in memory to metrics, as during a training. The devkit has no such way; the target is 500 ms."""
    case = made_up(samples, 0)
    truth = case.truth()
    generator = torch.Generator().manual_seed(0)
    found, poses = [], []
    for token in truth.tokens:
        values = torch.rand(boxes, 9, generator=generator) * torch.tensor([100.0, 100, 1, 5, 3, 2, 6, 2, 2])
        values[:, :2] -= 50
        labels = torch.randint(0, 10, (boxes,), generator=generator)
        found.append(Detections(values, labels, torch.rand(boxes, generator=generator)))
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, 3] = torch.tensor(case.ego[token])
        poses.append(pose)
    times: Times = {}
    for _ in range(3):
        timed(times, "ours", lambda: evaluate(truth, from_detections(truth.tokens, found, poses, truth)))
    return alone("detections in memory to metrics", f"{samples} x {boxes}", min(times["ours"]), "500 ms")


def measure_full_val(bench: Workbench, copies: int = 10) -> list[Row]:
    """kdlab alone on so many copies of the boxes, each with tokens of its own."""
    path, truth = bench.folder / "full.json", _copied(bench, copies)
    times: Times = {}
    boxes = timed(times, "read", lambda: read_results(path, truth))
    path.unlink()
    result = timed(times, "filter and evaluate", lambda: evaluate(truth, boxes))
    single = evaluate(bench.truth, read_results(bench.path, bench.truth)).metrics
    assert result.metrics.counts == {name: n * copies for name, n in single.counts.items()}
    shape = f"{len(truth.tokens)} x {bench.shape.split()[-1]}"
    return [alone(f"{name}, full val", shape, times[name][0], "none") for name in ("filter and evaluate", "read")]


def alone(name: str, shape: str, seconds: float, target: str) -> Row:
    """A row without a peer."""
    return {"name": name, "shape": shape, "ours_ms": seconds * 1e3, "peer": "none", "peer_ms": None, "ratio": None,
            "target": target}  # fmt: skip


def _copied(bench: Workbench, copies: int) -> Truth:
    """The annotations so many times; writes the predictions likewise to full.json."""
    case, text = Case({}, {}), bench.path.read_text()
    members = text[text.index('"results": {') + len('"results": {') : -2]
    with (bench.folder / "full.json").open("w") as file:
        file.write('{"meta": {}, "results": {')
        for k in range(copies):
            old, new = f'"{"0" * 24}', f'"{k + 1:024x}'  # The beginning of every token.
            file.write((", " if k else "") + members.replace(old, new))
            for token in bench.case.truths:
                name = new[1:] + token[24:]
                case.truths[name], case.ego[name] = bench.case.truths[token], bench.case.ego[token]
                case.racks[name] = bench.case.racks.get(token, [])
        file.write("}}")
    return case.truth()


def measure_all(samples: int = SAMPLES) -> list[Row]:
    bench = Workbench(samples)
    return [measure_filter_and_evaluate(bench), measure_file_to_metrics(bench), measure_memory(bench),
            measure_training_time(), *measure_full_val(bench)]  # fmt: skip


def test_equal_faster_and_smaller() -> None:
    bench = Workbench(30)
    for measured, floor in ((measure_filter_and_evaluate(bench), 8), (measure_file_to_metrics(bench), 4)):
        assert measured["ratio"] > floor, measured  # A loaded machine; the full size is far above.
    memory = measure_memory(bench)
    assert memory["ratio"] > 2, memory


def test_evaluation_during_training() -> None:
    assert measure_training_time(50)["ours_ms"] < 500


def _peak(who: str, folder: Path) -> float:
    from timing import peak_growth

    case = pickle.loads((folder / "case.pickle").read_bytes())
    truth = case.truth()
    with quiet():
        import nuscenes.eval.detection.evaluate  # noqa: F401
    run = {
        "kdlab": lambda: evaluate(truth, read_results(folder / "results.json", truth)),
        "devkit": lambda: case.devkit(folder / "results.json"),
    }
    return peak_growth(run[who])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(_peak(sys.argv[2], Path(sys.argv[3])))
    else:
        for measured in measure_all(*map(int, sys.argv[1:2])):
            unit, ratio = measured.get("unit", "ms"), measured["ratio"]
            theirs = "" if ratio is None else f"   {measured['peer']} {measured['peer_ms']:.0f} {unit}   {ratio:.1f}x"
            print(f"{measured['name']:36s} {measured['shape']:>10s} {measured['ours_ms']:9.0f} {unit}{theirs}"
                  f"   target {measured['target']}")  # fmt: skip
