"""Finished runs without any training: the files that a run folder holds, with numbers made up."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kdlab.config import DataConfig, DetectorConfig, DistillConfig, RunConfig, TrainConfig, config_hash, save_config
from kdlab.metrics.metrics import TP_ERRORS, Metrics
from kdlab.sample import CLASSES

TERMS = ("feature", "relation", "response_class", "response_regression")


def run_config(
    seed: int = 0, on: Sequence[str] | None = None, teacher: str = "gone/teacher", **train: int
) -> RunConfig:
    """A camera detector's run; ``on`` names the terms of UniDistill that are on, None: no distillation."""
    distill = None
    if on is not None:
        distill = DistillConfig("unidistill", teacher, weights={t: 0.0 for t in TERMS if t not in on})
    return RunConfig(DetectorConfig("camera"), DataConfig("world"), TrainConfig(seed=seed, **train), distill)


def metrics(ap: float, split: str = "sim_test", data: str | None = "digest", absent: str = "bus") -> Metrics:
    """Metrics that rise with the mAP; one class without ground truth."""
    return Metrics(
        split=split,
        samples=4,
        mean_ap=ap,
        nd_score=0.1 + 0.8 * ap,
        tp_errors={name: 0.9 - ap for name in TP_ERRORS},
        label_aps={name: {"0.5": ap - 0.01, "1.0": ap + 0.01} for name in CLASSES},
        label_tp_errors={name: dict.fromkeys(TP_ERRORS, 0.5) for name in CLASSES},
        counts={name: 0 if name == absent else 7 for name in CLASSES},
        pretrained=False,
        data=data,
    )


def write_run(
    run: Path,
    config: RunConfig,
    scored: Metrics | None = None,
    *,
    finished: bool = True,
    device: str = "cpu",
    cost: Mapping[str, float] | None = None,
) -> Path:
    """The files of a run that was trained, and scored where ``scored`` is given."""
    run.mkdir(parents=True)
    save_config(config, run / "config.json")
    versions = {
        "kdlab": "0.1",
        "torch": "2.9",
        "python": "3.11",
        "device": device,
        "precision": "fp32",
        "data": "train",
    }
    versions |= {"teacher": "0123456789ab"} if config.distill is not None else {}
    (run / "versions.json").write_text(json.dumps(versions))
    if scored is not None:
        (run / "metrics.json").write_text(json.dumps({scored.split: scored.to_dict()}))
    if cost is not None:
        (run / "cost.json").write_text(json.dumps(dict(cost)))
    if finished:
        (run / "detector.safetensors").write_bytes(b"weights of " + config_hash(config).encode())
    return run


def write_trial(
    study: Path, change: str, seed: int, ap: float | None, on: Sequence[str] | None = None, **more: object
) -> Path:
    """A trial of a study in STUDY/CHANGE/seedS-HASH; not scored where ``ap`` is None."""
    config = run_config(seed, on)
    data = more.pop("data", "digest")
    seconds = more.pop("seconds", 100.0 + 40.0 * (on is not None) + seed)
    cost = {"train_seconds": seconds, "train_memory_mb": 900.0, "train_parameters": 1000, "test_parameters": 800}
    scored = None if ap is None else metrics(ap, data=data)  # type: ignore[arg-type]
    folder = study / change / f"seed{seed}-{config_hash(config)[:8]}"
    return write_run(folder, config, scored, cost={**cost, "test_seconds": 0.02}, **more)  # type: ignore[arg-type]


def write_study(study: Path, gains: Mapping[str, float], seeds: int = 5, spread: float = 0.004) -> Path:
    """A base and changes that gain so much mAP on average, with a seeded spread of that difference."""
    rng = np.random.default_rng(0)
    start = 0.2 + 0.02 * rng.standard_normal(seeds)
    for seed in range(seeds):
        write_trial(study, "base", seed, float(start[seed]))
    for index, (change, gain) in enumerate(gains.items()):
        noise = rng.standard_normal(seeds)
        noise = spread * (noise - noise.mean()) / noise.std(ddof=1) if seeds > 1 else noise * 0
        for seed in range(seeds):
            config_on = TERMS[: 1 + index % 4]
            write_trial(study, change, seed, float(start[seed] + gain + noise[seed]), config_on)
    return study


def rows_of(values: Mapping[str, Sequence[float]], metric: str = "mAP", **columns: object) -> pd.DataFrame:
    """A table of results with one metric: change -> its value by seed."""
    plain = {"split": "sim_test", "data": "digest", "device": "cpu", **columns}
    rows = [
        {"change": change, "seed": seed, metric: value, "folder": f"{change}/{seed}", **plain}
        for change, by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]
    return pd.DataFrame(rows)


def write_gradients(run: Path, cosines: Mapping[tuple[str, str], Sequence[float]]) -> None:
    """A gradients.csv with a row per step (0, 10, 20, ...) and pair; the norms are 2 for ``detection``, else 1."""
    rows = [
        (10 * i, first, second, cosine, 1.0 + (first == "detection"), 1.0 + (second == "detection"))
        for (first, second), values in cosines.items()
        for i, cosine in enumerate(values)
    ]
    names = ["step", "first", "second", "cosine", "first_norm", "second_norm"]
    pd.DataFrame(rows, columns=names).sort_values("step", kind="stable").to_csv(run / "gradients.csv", index=False)
