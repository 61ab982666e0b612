"""The whole chain on a small simulated world: simulate, teach, train with and without distillation, evaluate, draw.

Every part goes on where an earlier call stopped, and finished parts are reused.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from kdlab.checkpoint import RunFolder, load_run_config, replacing, write_json
from kdlab.config import Modality, RunConfig, save_config
from kdlab.data.nuscenes import NuScenesDataset
from kdlab.data.simulate import simulate
from kdlab.data.simulate_config import SimulationConfig
from kdlab.evaluate import Metrics, Scorer, evaluate_run, load_metrics
from kdlab.presets import distilled, tiny
from kdlab.runs import compare
from kdlab.shipping import weights_of
from kdlab.train import train
from kdlab.view.methods.regions import masks
from kdlab.view.networks.bev import bev_boxes, feature_maps
from kdlab.view.results.curves import loss_curves, metric_comparison
from kdlab.view.sensors.cameras import cameras
from kdlab.view.sight.look import look
from kdlab.view.style import Boxes

SPLIT = "sim_test"
"""The split of the reported numbers; no training and no tuning sees it."""

WORLD = SimulationConfig(scenes=30, keyframes=14, image_width=352, image_height=198, sweeps_per_keyframe=2)
"""The demo's world."""


@dataclass(frozen=True)
class DemoConfig:
    """Everything that decides how long the demo takes and how good its numbers get."""

    simulation: SimulationConfig = WORLD
    """The world; the first scenes train, about 15 % each are for validation and test."""
    epochs_teacher: int = 20
    """Epochs of the LiDAR teacher, where none is shipped for this world."""
    epochs_student: int = 12
    """Epochs of each camera student."""
    batch_size: int = 4
    lr: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Of weights, order and augmentation, the same for both students."""
    method: str = "unidistill"
    """Distillation method of the second student."""
    min_score: float = 0.2
    """Detections below are not drawn."""

    @classmethod
    def short(cls) -> DemoConfig:
        """For the notebook: about four minutes on two cores."""
        return cls(replace(WORLD, scenes=12, keyframes=10), epochs_teacher=40, epochs_student=14)

    @classmethod
    def smoke(cls) -> DemoConfig:
        """For tests: seconds; its numbers mean nothing."""
        simulation = SimulationConfig(
            scenes=3, keyframes=2, image_width=176, image_height=99, sweeps_per_keyframe=2, lidar_azimuth_steps=360
        )
        return cls(simulation, epochs_teacher=1, epochs_student=1, batch_size=1)


def run_config(config: DemoConfig, root: Path, modality: Modality, teacher: Path | None = None) -> RunConfig:
    """The tiny preset with the demo's budget.

    Args:
        config: the demo's settings.
        root: the simulated data set.
        modality: sensors of the detector.
        teacher: run folder of the teacher that it is distilled from; None trains it alone.
    """
    base = tiny(modality, str(root))
    epochs = config.epochs_teacher if modality == "lidar" else config.epochs_student
    sweeps = min(base.detector.lidar.sweeps, config.simulation.sweeps_per_keyframe)
    distill = None if teacher is None else distilled("tiny", config.method, str(teacher))
    return replace(
        base,
        detector=replace(base.detector, lidar=replace(base.detector.lidar, sweeps=sweeps)),
        data=replace(base.data, workers=1),
        train=replace(base.train, epochs=epochs, batch_size=config.batch_size, lr=config.lr, seed=config.seed),
        distill=distill,
    )


def demo(out: Path = Path("demo"), fast: bool = False) -> Path:
    """Simulate a small world, train a teacher, a student alone and a distilled one, evaluate and draw them.

    The same call goes on after a stop and reuses what is finished.

    Args:
        out: folder of the world, the runs and the figures.
        fast: a smoke test of seconds; its numbers mean nothing.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds a demo with other settings.
        OSError: the folder cannot be written to.
        Interrupted: stopped by Ctrl-C, after a checkpoint.
    """
    run_demo(out, DemoConfig.smoke() if fast else DemoConfig())
    if fast:
        print("\nThis was the smoke test: its numbers mean nothing.")
    return out


def run_demo(out: Path, config: DemoConfig) -> Path:
    """The demo with settings of one's own; see `demo`."""
    clock = Clock(out / "seconds.json")
    say("1/5 simulated world", out / "world")
    with clock("world"):
        world = simulate(out / "world", config.simulation)
    say("2/5 LiDAR teacher", out / "teacher")
    teacher = make_teacher(out, config, world, clock)
    students = {"student": None, f"student-{config.method}": teacher}
    for number, (name, source) in enumerate(students.items(), 3):
        say(f"{number}/5 camera student, {'distilled by ' + config.method if source else 'alone'}", out / name)
        with clock(name):
            train(run_config(config, world, "camera", source), out / name)
    runs = [teacher, *(out / name for name in students)]
    say(f"5/5 official evaluation on {SPLIT}, figures", out / "figures")
    with clock("evaluation"):
        metrics = {run.name: evaluated(run, world) for run in runs}
    with clock("figures"):
        figures = draw(out, config, runs, metrics)
    print("\n" + report(out, config, runs, metrics, clock, figures), flush=True)
    return out


def say(title: str, where: Path) -> None:
    """Announce a part of the demo."""
    print(f"\n[{title}: {where}]", flush=True)


class Clock:
    """Seconds that each part of the demo took, summed over interrupted calls; finding a part finished adds almost none.

    Args:
        path: JSON file that keeps them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time the block and store the sum, also when it is interrupted."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began
            if self.path.parent.is_dir():
                write_json(self.path, self.seconds)


def make_teacher(out: Path, config: DemoConfig, world: Path, clock: Clock) -> Path:
    """The LiDAR teacher in ``out``/teacher: the shipped one of this very world where there is one, else a trained one.

    A teacher of another world is of no use: this world's test scenes may have been among its training scenes.
    """
    run, shipped = RunFolder(out / "teacher"), RunFolder(weights_of("lidar", config.simulation))
    if not run.finished and not run.checkpoint.exists() and shipped.finished:
        run.path.mkdir(parents=True, exist_ok=True)
        save_config(replace(load_run_config(shipped.path), data=run_config(config, world, "lidar").data), run.config)
        with replacing(run.weights) as part:  # last: it is what makes the run a finished one
            shutil.copy(shipped.weights, part)
        print(f"its weights are shipped ({shipped.path.name}): nothing to train")
    if run.finished:
        return run.path
    with clock("teacher"):
        return train(run_config(config, world, "lidar"), run.path)


def evaluated(run: Path, world: Path) -> Metrics:
    """Official metrics of a run on the test split, computed once."""
    return load_metrics(run).get(SPLIT) or evaluate_run(run, world, SPLIT, scorer=_scorer(world.resolve()))


@functools.cache
def _scorer(world: Path) -> Scorer:
    return Scorer(world)


def richest(world: Path) -> int:
    """Index of the test sample with most annotated boxes."""
    dataset = NuScenesDataset(world, split=SPLIT, images=False, points=False)
    counts = [int((s.boxes.values[:, :2].norm(dim=-1) < 40).sum()) for s in dataset]
    return int(torch.tensor(counts).argmax())


def draw(out: Path, config: DemoConfig, runs: list[Path], metrics: dict[str, Metrics]) -> dict[str, Path]:
    """Write the demo's figures as PNG, each with what it shows.

    Args:
        out: the demo's folder.
        config: its settings.
        runs: folders of teacher, student and distilled student.
        metrics: of each run, by folder name.
    """
    index = richest(out / "world")
    seen = [look(run, out / "world", SPLIT, index) for run in runs]
    teacher, _, student = seen
    sample, grid = teacher.sample, teacher.config.detector.grid
    sets: dict[str, Boxes] = {
        "truth": sample.boxes,
        "teacher": teacher.detections,
        "student": student.detections,
    }
    on_images = {k: sets[k] for k in ("truth", "student")}
    logs = {run.name: RunFolder(run).losses for run in runs if RunFolder(run).losses.exists()}
    pictures: dict[str, Callable[[], Figure]] = {
        "cameras": lambda: cameras(student.sample, on_images, config.min_score, title="six cameras"),
        "bev": lambda: bev_boxes(sample.points, sets, grid, config.min_score, "seen from above"),
        "features_bev": lambda: feature_maps(teacher.features, student.features, grid, "bev", boxes=sample.boxes),
        "features_neck": lambda: feature_maps(teacher.features, student.features, grid, "neck", boxes=sample.boxes),
        "regions": lambda: masks(sample.points, sample.boxes, grid),
        "losses": lambda: loss_curves(logs),
        "metrics": lambda: metric_comparison(metrics),
    }
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    paths = {name: folder / f"{name}.png" for name in pictures}
    for name, picture in pictures.items():
        picture().savefig(paths[name])
    return paths


def report(
    out: Path, config: DemoConfig, runs: list[Path], metrics: dict[str, Metrics], clock: Clock, figures: dict[str, Path]
) -> str:
    """What the demo prints at the end: the table, a plain verdict, where things are and what to open next."""
    times = ", ".join(f"{part} {seconds:.0f}" for part, seconds in clock.seconds.items())
    lines = [compare(runs, SPLIT).text(), "", f"seconds: {times}; together {sum(clock.seconds.values()):.0f}", ""]
    lines += [verdict(*(metrics[run.name] for run in runs[1:])), "", "figures:"]
    lines += [f"  {path}" for path in figures.values()]
    folders = " ".join(str(run) for run in runs)
    settings = f"--epochs {config.epochs_student} --train.batch-size {config.batch_size} --seed {config.seed + 1}"
    again = f"--data {out / 'world'} {settings} --out {out}/second-seed"
    taught = f"--data {out / 'world'} {settings} --method {config.method} --teacher {runs[0]} --out {out}/second-taught"
    lines += [
        "",
        "next:",
        "  make lab                        the notebooks; begin with notebooks/00_quickstart.ipynb",
        f"  kdlab compare {folders}",
        "a second seed:",
        f"  kdlab train tiny camera {again}",
        f"  kdlab train tiny camera {taught}",
        f"  kdlab evaluate --run {out}/second-seed {out}/second-taught --split {SPLIT}",
    ]
    return "\n".join(lines)


def verdict(alone: Metrics, distilled: Metrics) -> str:
    """In plain words whether the distilled student is better, and how little one seed says."""
    ap = round(distilled.mean_ap - alone.mean_ap, 4)
    nds = round(distilled.nd_score - alone.nd_score, 4)
    if ap > 0 and nds > 0:
        start = "The distilled student is better than the student alone"
    elif ap <= 0 and nds <= 0:
        start = "The distilled student is NOT better than the student alone"
    else:
        start = "The distilled student is better in one number and not in the other"
    return (
        f"{start}: mAP {ap:+.4f}, NDS {nds:+.4f} ({alone.samples} test samples).\n"
        "One seed on one small world decides nothing: other seeds move these numbers too."
    )
