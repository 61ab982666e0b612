"""`kdlab ablate`."""

# No `from __future__ import annotations`: tyro reads the annotations of classes that are defined inside functions.
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from kdlab.commands.parse import parse

if TYPE_CHECKING:
    from kdlab.studies import Study


def ablate(args: Sequence[str]) -> int:
    """Run a study: a base, changes, seeds; say which changes beat the base.

    The same command goes on after a stop, tries failed runs again and never repeats a finished one.
    """

    @dataclass
    class Ablate:
        study: Annotated[Path, tyro.conf.Positional]
        """Study in TOML, or the folder of one that was run before."""
        out: Path | None = None
        """The study's folder; runs/NAME, or the file's own, where left out."""
        jobs: int | None = None
        """Runs at a time; where left out 1 on this machine, and on Ray as many as the cluster holds."""
        engine: Literal["local", "ray"] = "local"
        """Run on this machine, or on a Ray cluster (pip install kdlab[ray])."""
        address: str = "auto"
        """Ray: auto joins the cluster that runs here, local starts one, HOST:PORT joins another."""
        cpus_per_run: float = 1.0
        """Ray: cores of a run."""
        gpus_per_run: float | None = None
        """Ray: GPUs of a run; where left out 1 if the cluster has GPUs and the study runs on them, else 0."""
        cpu: bool = False
        """Run on the CPU although there is a GPU; a study that was begun so goes on so."""
        dry_run: bool = False
        """List the runs, their state and their commands, and do nothing."""
        report_only: bool = False
        """Run nothing; write the report of what is finished."""
        intervals: Literal["t", "bootstrap"] = "t"
        """Report: Student's t, or the percentile bootstrap."""
        level: float = 0.95
        """Report: share of intervals that hold the true difference."""
        worth: dict[str, float] = field(default_factory=dict)
        """Report: smallest differences worth having, such as mAP 0.01 NDS 0.01; others keep their default."""
        other_data: bool = False
        """Report: also compare changes that were scored on another data set than what they are judged against."""

    given = parse(Ablate, "ablate", args, str(ablate.__doc__))
    from kdlab.studies import load_study, run_study

    study = load_study(given.study, given.out)
    study = replace(study, cpu=study.cpu or given.cpu)
    if given.dry_run:
        _list(study)
        return 0
    from kdlab.commands.report import report
    from kdlab.studies.verdict import check_options

    options: dict[str, Any] = {
        "worth": given.worth,
        "level": given.level,
        "method": given.intervals,
        "other_data": given.other_data,
    }
    check_options(**options)
    failed = [] if given.report_only else run_study(study, _engine(given), source=given.study).failed
    for trial, reason in failed:
        print(f"FAILED: {trial.name}: {reason}\n    {trial.folder}/log.txt; the same command tries it again")
    print(report(study.out, **options))
    return 1 if failed else 0


def _engine(given: Any) -> Any:
    from kdlab.studies import LocalEngine, RayEngine

    if given.engine == "local":
        return LocalEngine(1 if given.jobs is None else given.jobs)
    return RayEngine(given.address, given.jobs, cpus_per_run=given.cpus_per_run, gpus_per_run=given.gpus_per_run)


def _list(study: "Study") -> None:
    from kdlab.studies.run import listing, words

    for trial, state, why in listing(study):
        print(f"{state:10s}  {trial.name}" + (f"  ({why})" if why else ""))
        print(f"    {words(trial)}")
