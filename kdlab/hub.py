"""Detectors from and to the Hugging Face hub's format: config.json, model.safetensors and a model card in one folder.

Such a folder is also a run folder: `kdlab evaluate --run`, a distillation's teacher and the views take it as one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlab import checkpoint
from kdlab.checkpoint import EXPORT, EXPORTED_WEIGHTS, RunFolder, load_run_config, replacing, versions, write_json
from kdlab.config import RunConfig, to_dict
from kdlab.sample import CLASSES

if TYPE_CHECKING:
    import torch

    from kdlab.metrics.metrics import Metrics
    from kdlab.models.detector import Detector

FILES = ("config.json", EXPORTED_WEIGHTS, "README.md")
"""What an exported folder holds."""

EVALUATED = ("metrics.json", "cost.json", "results_*.json")
"""What `kdlab evaluate` adds to an exported folder, by pattern; not meant for the hub."""

_REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")


def load_detector(source: Path | str, device: torch.device | str = "cpu") -> Detector:
    """A trained detector, in eval mode; needs neither teacher nor method nor training code.

    Args:
        source: a run folder, an exported folder, or as a string ``user/repository`` on the Hugging Face hub, where a
            revision (a branch, tag or commit) may follow after ``@``. Where USER is a folder here, only a local path
            is meant.
        device: where it goes.

    Raises:
        FileNotFoundError: no such folder or repository, it lacks a file, or the run is not finished.
        ValueError: config and weights do not fit each other.
    """
    named = _REPOSITORY.fullmatch(source) if isinstance(source, str) else None
    if named is not None and not Path(source).exists():
        if Path(named[1]).parent.is_dir():
            raise FileNotFoundError(
                f"{source}: no such run folder in {Path(named[1]).parent}, a folder that is here; the Hugging Face hub "
                "is asked only where no local folder is called like the user"
            )
        source = _download(named[1], named[2])
    return checkpoint.load_detector(source, device)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES[:2])))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{name}: no such run folder here, and no such repository could be had from the Hugging Face hub{at} "
            f"({type(error).__name__}: {reason})"
        ) from error
    missing = [file for file in FILES[:2] if not (folder / file).exists()]
    if missing:
        raise FileNotFoundError(f"{name}: the repository on the Hugging Face hub has no {' and no '.join(missing)}")
    return folder


def save_pretrained(run: Path | str, folder: Path | str) -> Path:
    """Export a finished run's detector in the Hugging Face hub's format; returns the folder.

    config.json is the run's, with data set and teacher by name in place of their paths, and kdlab's version and classes
    under ``kdlab`` and no folder of this machine. The weights are the run's bytes.

    An earlier export in the folder is replaced, and what evaluations wrote there (`EVALUATED`) is removed: it is of the
    earlier weights. Nor is it for the hub what a later evaluation writes there: ``kdlab evaluate --out`` puts it
    elsewhere. A folder exported onto itself, for a card with new metrics, keeps them.

    Args:
        run: run folder.
        folder: to write to.

    Raises:
        FileNotFoundError: no such run, or it is not finished.
        FileExistsError: the folder holds something else, or is a file.
        ValueError: the run's config and weights do not fit each other, or its metrics.json is damaged.
    """
    source, folder = RunFolder(Path(run)), Path(folder)
    detector = checkpoint.load_detector(run)
    _check_target(folder)
    config = load_run_config(run)
    card = _card(source, config, sum(p.numel() for p in detector.parameters()))
    plain = to_dict(config)
    plain["data"] |= {"root": _name(config.data.root), "image_cache": ""}
    if config.distill is not None:
        plain["distill"]["teacher"] = _name(config.distill.teacher)
    write_json(folder / "config.json", {EXPORT: {"version": versions()["kdlab"], "classes": list(CLASSES)}, **plain})
    with replacing(folder / EXPORTED_WEIGHTS) as part:
        shutil.copyfile(source.weights, part)
    with replacing(folder / "README.md") as part:
        part.write_text(card)
    for path in _evaluated(folder) if folder.resolve() != source.path.resolve() else ():
        path.unlink()
    return folder


def _evaluated(folder: Path) -> list[Path]:
    return [path for pattern in EVALUATED for path in folder.glob(pattern)]


def _name(path: Path | str) -> str:
    return Path(path).resolve().name


def _check_target(folder: Path) -> None:
    """Refuse a folder that is neither empty nor an earlier export; hidden files, such as git's, do not count."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give another folder")
    held = {p.name for p in folder.glob("*") if not p.name.startswith(".")}
    ours = {*FILES, *(p.name for p in _evaluated(folder))}
    config = folder / "config.json"
    earlier = config.exists() and f'"{EXPORT}"' in config.read_text()
    others = sorted(held - ours if earlier else held)
    if others:
        raise FileExistsError(f"{folder} holds something else ({others[0]}); give another folder")


def _card(source: RunFolder, config: RunConfig, size: int) -> str:
    """The model card: a YAML header for the hub, then what the detector is and how well it does."""
    from kdlab.metrics.metrics import read_metrics

    metrics = read_metrics(source.metrics)
    made = json.loads(source.versions.read_text()) if source.versions.exists() else {}
    name = _name(source.path)
    return f"""---
{_header(name, config, metrics)}
---

# {name}

A bird's-eye-view 3D object detector of kdlab ({size:,} parameters).

| | |
|---|---|
{_facts(config, made)}

## Use

```python
import kdlab

detector = kdlab.load_detector("{name}")  # this folder, or user/repository once it is on the hub
detections = detector.predict(detector(batch))  # a kdlab.sample.Batch; kdlab.evaluate.evaluation_loader makes them
```

## Metrics

{_table(metrics, _name(config.data.root))}

## Licence

Whoever publishes these weights chooses their licence; the terms of the training data bind it. Put it into the header.
"""


def _header(name: str, config: RunConfig, metrics: Mapping[str, Metrics]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    data = _name(config.data.root)
    results = [
        EvalResult("3d-object-detection", data, data, kind, round(value, 6), dataset_split=split, metric_name=title)
        for split, found in metrics.items()
        for kind, title, value in (("mean_ap", "mAP", found.mean_ap), ("nd_score", "NDS", found.nd_score))
    ]
    tags = ["3d-object-detection", "birds-eye-view", "nuscenes", config.detector.sensors]
    if config.distill is not None:
        tags += ["knowledge-distillation", config.distill.method]
    card = ModelCardData(
        library_name="kdlab",
        license="other",
        license_name="not-chosen-yet",
        tags=tags,
        model_name=name,
        eval_results=results or None,
    )
    return str(card.to_yaml())


def _facts(config: RunConfig, made: Mapping[str, str]) -> str:
    digest = f" (digest {made['data'][:12]})" if "data" in made else ""
    facts = {
        "Sensors": {"fusion": "LiDAR and cameras", "lidar": "LiDAR", "camera": "cameras"}[config.detector.sensors],
        "Training data": f"{_name(config.data.root)}, split {config.data.train}{digest}",
        "Training": f"{config.train.epochs} epochs of batches of {config.train.batch_size}, seed {config.train.seed}",
        "Method": "none: trained alone",
        "kdlab": made.get("kdlab", versions()["kdlab"]),
    }
    if config.distill is not None:
        teacher = _name(config.distill.teacher) + (f" (digest {made['teacher']})" if "teacher" in made else "")
        facts["Method"] = f"{config.distill.method}, {config.distill.variant}; teacher {teacher}"
    return "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())


def _table(metrics: Mapping[str, Metrics], data: str) -> str:
    from kdlab.metrics.metrics import TP_ERRORS

    if not metrics:
        return f"Not evaluated yet: `kdlab evaluate --run RUN --data {data}`, then export again."
    rows = [
        ["Split", "Samples", "mAP", "NDS", *TP_ERRORS.values(), "Data digest"],
        ["---"] * (5 + len(TP_ERRORS)),
        *(
            [split, str(found.samples), *(_cell(v) for v in (found.mean_ap, found.nd_score))]
            + [_cell(found.tp_errors[error]) for error in TP_ERRORS]
            + [(found.data or "-")[:12]]
            for split, found in metrics.items()
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any) -> str:
    return "-" if value != value else f"{value:.4f}"
