"""`kdlab evaluate`."""

# No `from __future__ import annotations`: tyro reads the annotations of classes that are defined inside functions.
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlab.commands.parse import parse


def evaluate(args: Sequence[str]) -> int:
    """MAP, NDS and true-positive errors of finished runs by the official nuScenes code."""

    @dataclass
    class Evaluate:
        run: tuple[Path, ...]
        """Run folders, or shipped weights."""
        data: Path | None = None
        """Data set; the runs' own where left out."""
        split: str | None = None
        """Split; the runs' validation split where left out."""
        version: str | None = None
        """Version folder; inferred where there is a single one."""
        out: Path | None = None
        """Folder for metrics and results; the run folder where left out."""
        workers: int = 2
        """Loader processes."""
        cpu: bool = False
        """Run on the CPU although there is a GPU."""

    given = parse(Evaluate, "evaluate", args, str(evaluate.__doc__))
    from kdlab.checkpoint import load_run_config
    from kdlab.evaluate import Scorer, evaluate_run

    if given.out is not None and len(given.run) > 1:
        raise ValueError("--out goes with a single --run")
    scorers: dict[tuple[str, str | None], Scorer] = {}
    for run in given.run:
        data = load_run_config(run).data
        place = (data.root, data.version) if given.data is None else (str(given.data), given.version)
        scorers[place] = scorers.get(place) or Scorer(*place)
        metrics = evaluate_run(
            run,
            place[0],
            given.split,
            version=place[1],
            device="cpu" if given.cpu else None,
            workers=given.workers,
            scorer=scorers[place],
            out=given.out,
        )
        print(f"{run}\n{metrics}")
    return 0
