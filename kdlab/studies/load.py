"""Studies from TOML, and from the folder of an earlier run of the study."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from kdlab.checkpoint import load_run_config
from kdlab.config import Modality, RunConfig, from_dict, load_config, to_dict
from kdlab.presets import PRESETS
from kdlab.studies.plan import BASE, SIMULATION, Change, Study, Terms, apply, expand
from kdlab.studies.terms import term_changes

PLAN = "study.json"
"""File of a study's folder that holds the whole study, as it was last run."""

TOML = "study.toml"
"""Copy of the file that the study was read from."""


@dataclass(frozen=True)
class _File:
    """Keys of a study's TOML file, beside ``base``."""

    name: str = ""
    seeds: tuple[int, ...] = ()
    split: str = ""
    out: str = ""
    set: dict = field(default_factory=dict)  # type: ignore[type-arg]
    changes: dict = field(default_factory=dict)  # type: ignore[type-arg]
    terms: Terms | None = None


def load_study(path: Path | str, out: Path | None = None) -> Study:
    """A study from its TOML file, or from its folder as it was last run.

    Keys: name; base = [PRESET, MODALITY], a run folder or a config.json; seeds; split (the base's validation split
    where left out); out (runs/NAME where left out); tables set (dotted keys of RunConfig, for every run), changes.NAME
    (see `Change`; beside the dotted keys ``base``, the change that it is judged against) and terms (see
    `term_changes`). A study that was begun with ``cpu`` keeps it. Paths are relative to the working folder, as on the
    command line.

    Args:
        path: the file, or a study's folder.
        out: the study's folder, in place of the file's.

    Raises:
        FileNotFoundError: no such file, or the base is missing.
        ValueError: unknown key, bad type, unknown method or term, a name that is there twice; the message names the
            file.
    """
    path = Path(path)
    folder = path.is_dir()
    source = path / PLAN if folder else path
    if not source.exists():
        raise FileNotFoundError(f"{path}: " + (f"no study's folder, it has no {PLAN}" if folder else "no such study"))
    try:
        if folder:
            return _from_plan(json.loads(source.read_text()), out or path)
        study = _from_toml(tomllib.loads(source.read_text()), out)
        expand(study)
        return study
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source}: {error}") from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"{source}: {error}") from error


def plain_study(study: Study) -> dict[str, Any]:
    """JSON-ready dictionary from which `load_study` reads a study again."""
    return {
        "name": study.name,
        "split": study.split,
        "seeds": list(study.seeds),
        "cpu": study.cpu,
        "base": to_dict(study.base),
        "changes": [{"name": c.name, "set": dict(c.set), "base": c.base} for c in study.changes],
        "terms": None if study.terms is None else to_dict(study.terms),
    }


def _from_plan(plan: Mapping[str, Any], out: Path) -> Study:
    changes = tuple(Change(c["name"], c["set"], c.get("base", BASE)) for c in plan["changes"])
    base = from_dict(RunConfig, plan["base"], "base")
    terms = plan.get("terms")
    made = None if terms is None else from_dict(Terms, terms, "terms")
    return Study(plan["name"], base, changes, tuple(plan["seeds"]), plan["split"], out, plan["cpu"], made)


def _begun_on_cpu(out: Path) -> bool:
    """Whether the study in a folder was begun on the CPU, where it has to go on."""
    try:
        return bool(json.loads((out / PLAN).read_text())["cpu"])
    except (OSError, ValueError, KeyError):
        return False


def _from_toml(table: dict[str, Any], out: Path | None) -> Study:
    given = table.pop("base", None)
    file = from_dict(_File, table, "study")
    if not file.name:
        raise ValueError("name: a study wants one")
    values = _flat(file.set)
    knob = next((key for key in values if key.startswith((SIMULATION, "train.seed"))), None)
    if knob is not None:
        raise ValueError(f"set: {knob} cannot be set for all runs; " + _instead(knob))
    try:
        base = apply(values, _base(given))[0]
    except ValueError as error:
        raise ValueError(f"set: {error}" if values else str(error)) from error
    changes = []
    for name, keys in file.changes.items():
        if not isinstance(keys, dict):
            raise ValueError(f"changes.{name}: expected a table, [changes.{name}], got {keys!r}")
        reference = keys.pop("base", BASE)
        if not isinstance(reference, str):
            raise ValueError(f"changes.{name}: base: expected the name of a change, got {reference!r}")
        changes.append(Change(name, _flat(keys), reference))
    if file.terms is not None:
        terms = file.terms
        try:
            changes += term_changes(base, terms.mode, terms.method, terms.teacher, terms.terms)
        except ValueError as error:
            raise ValueError(f"terms: {error}") from error
    folder = out or Path(file.out or f"runs/{file.name}")
    split, cpu = file.split or base.data.val, _begun_on_cpu(folder)
    return Study(file.name, base, tuple(changes), file.seeds, split, folder, cpu, file.terms)


def _instead(key: str) -> str:
    return "they are the study's seeds" if key == "train.seed" else "make that world with `kdlab simulate`"


def _base(given: Any) -> RunConfig:
    if isinstance(given, str):
        path = Path(given)
        config = load_config(RunConfig, path) if path.suffix == ".json" else load_run_config(path)
        return replace(config, train=replace(config.train, seed=0))
    if not isinstance(given, list) or len(given) != 2:
        raise ValueError(f"base: expected [preset, modality], a run folder or a config.json, got {given!r}")
    preset, modality = given
    if preset not in PRESETS or modality not in get_args(Modality):
        raise ValueError(
            f"base: {given!r} is not a preset ({', '.join(PRESETS)}) and a modality ({', '.join(get_args(Modality))})"
        )
    return PRESETS[preset](modality)


def _flat(table: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Values by dotted key, however deep the tables are."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = _flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
        for name in inner:
            if name in flat:
                raise ValueError(f"{name} is there twice")
        flat |= inner
    return flat
