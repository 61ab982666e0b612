"""`kdlab compare`, `kdlab runs`."""

# No `from __future__ import annotations`: tyro reads the annotations of classes that are defined inside functions.
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from kdlab.commands.parse import parse


def compare(args: Sequence[str]) -> int:
    """Set evaluated runs side by side."""

    @dataclass
    class Compare:
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
        """Run folders."""
        split: str | None = None
        """Split; one that all runs were evaluated on where left out."""
        markdown: bool = False
        """Print Markdown."""
        figure: Path = Path("compare.png")
        """Where to draw the same as bars (.png, .svg, .pdf)."""

    given = parse(Compare, "compare", args, str(compare.__doc__))
    from kdlab.runs import compare as set_side_by_side
    from kdlab.view.results.curves import metric_comparison

    comparison = set_side_by_side(given.runs, given.split)
    print(comparison.markdown() if given.markdown else comparison.text())
    metric_comparison(comparison.metrics).savefig(given.figure)
    print(f"\ndrawn in {given.figure}")
    return 0


def runs(args: Sequence[str]) -> int:
    """List run folders, and remove what is no longer needed from them.

    The weights of a finished run are removed only where --runs names it. Without --yes nothing is removed.
    """

    @dataclass
    class Runs:
        root: Annotated[Path, tyro.conf.Positional] = Path("runs")
        """Folder that holds run folders, at any depth."""
        prune: tuple[Literal["checkpoints", "results", "tensorboard", "unfinished"], ...] = ()
        """What to remove: whole runs that did not end or failed ("unfinished"); of finished runs left-over checkpoints,
        result files of splits whose metrics are stored, TensorBoard logs."""
        older_than: float = 7.0
        """Days for which nothing was written in a run before --prune touches it."""
        runs: tuple[Path, ...] = ()
        """Run folders to remove, weights and all."""
        yes: bool = False
        """Remove it; without, only say what would be removed."""

    given = parse(Runs, "runs", args, str(runs.__doc__))
    from kdlab.runs import list_runs, prune, table

    if given.prune or given.runs:
        done = prune(given.root, given.prune, runs=given.runs, older_than=given.older_than, yes=given.yes)
        print(done.text())
        return 0
    found = list_runs(given.root)
    print(table(found) if found else f"no run folder at or below {given.root}")
    return 0
