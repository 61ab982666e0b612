"""The results of a study as one table: a row per finished trial with its numbers and how to get them again."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kdlab.checkpoint import RunFolder, load_run_config, replacing
from kdlab.config import config_hash
from kdlab.cost import Cost, read_cost
from kdlab.evaluate import TP_ERRORS, Metrics, load_metrics
from kdlab.runs import run_state, shared_split
from kdlab.sample import CLASSES
from kdlab.studies.attempt import RUN as TRIAL
from kdlab.studies.flops import gflop
from kdlab.studies.load import PLAN
from kdlab.studies.plan import BASE
from kdlab.studies.status import stale
from kdlab.studies.verdict import COSTS

if TYPE_CHECKING:
    from kdlab.studies.plan import Study

VERSIONS = ("kdlab", "torch", "python", "device", "threads", "precision")
"""Columns from versions.json."""


@dataclass(frozen=True)
class _Planned:
    change: str
    seed: int
    folder: Path
    train: str
    evaluate: str
    base: str = BASE

    @property
    def command(self) -> str:
        """Both commands, as one would type them."""
        return " && ".join(filter(None, (self.train, self.evaluate)))


def collect(study: Study | Path | str, split: str | None = None) -> pd.DataFrame:
    """The finished trials of a study.

    Args:
        study: a study, its folder, or any folder of CHANGE/RUN run folders.
        split: whose metrics; by default the study's, else the one that all runs were scored on.

    Returns:
        One row per trial that is trained and scored: change, reference (the change that it is judged against), seed,
        split; mAP, NDS, mATE, mASE, mAOE, mAVE, mAAE, "AP CLASS" of classes with ground truth; costs (columns of
        `kdlab.cost.Cost` and `kdlab.studies.flops.gflop`); config_hash, run_hash (in the folder's name), kdlab, torch,
        python, device, threads, precision, wanted_precision (of the config), data (digest of the data set scored on),
        train_data, teacher (digest), teacher_run, pretrained, command (that ran), folder. What was not measured is NaN
        or None.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file of a run cannot be read.
    """
    planned, split = _trials(study, split)
    scored = ((trial, _metrics(trial.folder, split)) for trial in planned)
    rows = [_row(trial, metrics) for trial, metrics in scored if metrics is not None]
    table = pd.DataFrame(rows, columns=_columns(rows))
    return table.sort_values(["change", "seed"], key=lambda c: c.map(_place(planned)) if c.name == "change" else c)


def pending(study: Study | Path | str, split: str | None = None) -> pd.DataFrame:
    """The trials of a study that `collect` leaves out.

    Returns:
        change, seed, state (missing, unfinished, failed, stale, or trained but not scored), why (it failed or is
        stale), command, folder.
    """
    planned, split = _trials(study, split)
    rows = []
    for trial in planned:
        if _metrics(trial.folder, split) is not None:
            continue
        state, why = run_state(trial.folder)
        old = stale(trial.folder)
        word = "stale" if old else state if state != "finished" else "failed" if why else "trained"
        why = old or why
        rows.append((trial.change, trial.seed, word, why, trial.command, str(trial.folder)))
    return pd.DataFrame(rows, columns=["change", "seed", "state", "why", "command", "folder"])


def write_csv(table: pd.DataFrame, path: Path) -> Path:
    """Write a table as CSV, whole or not at all; numbers keep all their digits."""
    with replacing(path) as part:
        table.to_csv(part, index=False)
    return path


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    names = ["change", "reference", "seed", "split", "samples", "mAP", "NDS", *TP_ERRORS.values()]
    classes = [f"AP {name}" for name in CLASSES if any(f"AP {name}" in row for row in rows)]
    made = ("config_hash", "run_hash", *VERSIONS, "wanted_precision", "data", "train_data", "teacher", "teacher_run")
    return [*names, *classes, *COSTS, *made, "pretrained", "command", "folder"]


def _place(planned: list[_Planned]) -> dict[str, int]:
    names = dict.fromkeys([BASE, *(trial.change for trial in planned)])
    return {name: place for place, name in enumerate(names)}


def _metrics(run: Path, split: str | None) -> Metrics | None:
    """Of a finished run on a split; None while it is not trained or not scored, and where it is stale."""
    return load_metrics(run).get(split or "") if RunFolder(run).finished and not stale(run) else None


def _row(trial: _Planned, metrics: Metrics) -> dict[str, Any]:
    config = load_run_config(trial.folder)
    made = _json(RunFolder(trial.folder).versions)
    cost = read_cost(trial.folder)
    return {
        "change": trial.change,
        "reference": trial.base,
        "seed": config.train.seed,
        "split": metrics.split,
        **_scores(metrics),
        **{f.name: math.nan if cost is None else _number(getattr(cost, f.name)) for f in fields(Cost)},
        **gflop(config),
        "config_hash": config_hash(config),
        "run_hash": trial.folder.name.rpartition("-")[2],
        **{name: made.get(name) for name in VERSIONS},
        "wanted_precision": config.train.precision,
        "data": metrics.data,
        "train_data": made.get("data"),
        "teacher": made.get("teacher"),
        "teacher_run": None if config.distill is None else config.distill.teacher,
        "pretrained": metrics.pretrained,
        "command": _ran(trial, made.get("command")),
        "folder": str(trial.folder),
    }


def _ran(trial: _Planned, began: str | None) -> str | None:
    """The commands that trained and scored a run; the plan's where it does not say."""
    about = _json(trial.folder / TRIAL)
    train, evaluation = about.get("command"), about.get("evaluation")
    words = (
        began or (_words(train) if train else trial.train),
        _words(evaluation) if evaluation else trial.evaluate,
    )
    return " && ".join(filter(None, words)) or None


def _scores(metrics: Metrics) -> dict[str, float]:
    classes = {f"AP {name}": metrics.mean_dist_aps[name] for name in metrics.present}
    errors = {short: metrics.tp_errors[name] for name, short in TP_ERRORS.items()}
    return {"samples": metrics.samples, "mAP": metrics.mean_ap, "NDS": metrics.nd_score, **errors, **classes}


def _trials(study: Study | Path | str, split: str | None) -> tuple[list[_Planned], str | None]:
    """What a study plans, and its split; of a folder without a plan, what lies in it."""
    if not isinstance(study, Path | str):
        bases = {change.name: change.base for change in study.changes}
        planned = [
            _Planned(t.change, t.seed, t.folder, _words(t.command), _words(t.evaluation), bases.get(t.change, BASE))
            for t in study.trials()
        ]
        return planned, split or study.split
    folder = Path(study)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such study folder; `kdlab ablate` makes one")
    plan = read_plan(folder)
    if plan:
        bases = {change["name"]: change.get("base", BASE) for change in plan.get("changes", ())}
        planned = [
            _Planned(
                t["change"],
                t["seed"],
                folder / t["folder"],
                _words(t["command"]),
                _words(t["evaluation"]),
                bases.get(t["change"], BASE),
            )
            for t in plan["trials"]
        ]
        return planned, split or plan["split"]
    runs = [config.parent for config in sorted(folder.glob("*/*/config.json"))]
    planned = [_Planned(run.parent.name, load_run_config(run).train.seed, run, "", "") for run in runs]
    return planned, split or shared_split([load_metrics(run) for run in runs if RunFolder(run).finished])


def _words(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(command)


def read_plan(folder: Path) -> dict[str, Any]:
    """What a study's folder says of itself (study.json); empty where it says nothing.

    Raises:
        ValueError: the file is damaged.
    """
    return _json(folder / PLAN)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return found
