"""`kdlab compare`."""

# No `from __future__ import annotations`: tyro reads the annotations of classes that are defined inside functions.
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

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
    from kdlab.view.curves import metric_comparison

    comparison = set_side_by_side(given.runs, given.split)
    print(comparison.markdown() if given.markdown else comparison.text())
    metric_comparison(comparison.metrics).savefig(given.figure)
    print(f"\ndrawn in {given.figure}")
    return 0
