"""`kdlab export`."""

# No `from __future__ import annotations`: tyro reads the annotations of classes that are defined inside functions.
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from kdlab.commands.parse import parse


def export(args: Sequence[str]) -> int:
    """Write a finished run's detector in the Hugging Face hub's format."""

    @dataclass
    class Export:
        run: Annotated[Path, tyro.conf.Positional]
        """Run folder."""
        folder: Annotated[Path, tyro.conf.Positional]
        """New folder, or that of an earlier export."""

    given = parse(Export, "export", args, str(export.__doc__))
    from kdlab.hub import save_pretrained

    folder = save_pretrained(given.run, given.folder)
    others = " ".join(f"--exclude '{name}'" for name in ("results_*.json", "metrics.json", "cost.json"))
    print(f"{folder} is ready; to publish it: hf upload USER/REPOSITORY {folder} {others}")
    return 0
