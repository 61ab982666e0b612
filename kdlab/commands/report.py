"""The report of a study with its figures, for `kdlab ablate`."""

from pathlib import Path
from typing import Any


def report(folder: Path | str, **options: Any) -> str:
    """Write a study's tables, text and figures into its folder; returns the findings in plain words.

    Args:
        folder: of the study.
        options: of `kdlab.studies.report.analyse`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an option that cannot be, or a file of a run cannot be read.
    """
    from kdlab.studies.report import write_report
    from kdlab.view.results.studies import draw_report

    found = write_report(folder, draw_report, **options)
    names = [str(path.relative_to(folder)) for path in found.files if path.suffix not in (".svg", ".pdf")]
    return f"{found.text}\n\nwritten in {folder}: {', '.join(names)}"
