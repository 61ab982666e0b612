"""What is known of one cell, as small HTML for a widget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from kdlab.sample import CAMERAS

if TYPE_CHECKING:
    from kdlab.view.sight.cell import CellReport

PIXELS = 6
"""Pixels that are listed; all of them are marked on the images."""

_STYLE = """<style>
.kdlab-cell { display: flex; flex-wrap: wrap; gap: 4px 28px; min-height: 175px; font-size: 13px; line-height: 1.45; }
.kdlab-cell > div { min-width: 215px; }
.kdlab-cell h4 { margin: 6px 0 3px; font-size: 13px; }
.kdlab-cell table { border-collapse: collapse; margin: 0; }
.kdlab-cell td, .kdlab-cell th { padding: 1px 10px 1px 0; text-align: right; white-space: nowrap; }
.kdlab-cell td { font-variant-numeric: tabular-nums; }
.kdlab-cell td:first-child, .kdlab-cell th:first-child { text-align: left; }
.kdlab-cell th { font-weight: normal; opacity: 0.7; }
</style>"""


def number(value: float) -> str:
    """Three digits; "–" for what is not known."""
    return f"{value:.3g}" if math.isfinite(value) else "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table, with a first line where a column has a name; texts are escaped."""
    lines = ["<table>"]
    if any(head):
        lines.append("<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>")
    lines += ["<tr>" + "".join(f"<td>{escape(v)}</td>" for v in row) + "</tr>" for row in rows]
    return "".join(lines) + "</table>"


def camera_name(index: int) -> str:
    """A camera's name in small letters, without what all of them begin with."""
    return CAMERAS[index].removeprefix("CAM_").replace("_", " ").lower()


def cell_html(report: CellReport, stage: str, pending: bool) -> str:
    """A cell's report side by side: vectors, pixels, points, terms.

    Args:
        report: of the cell.
        stage: that its vectors are of.
        pending: gradients that are missing are still being computed.
    """
    blocks = [_vectors(report, stage), _points(report), _pixels(report)]
    if report.losses:
        blocks.append(_terms(report, pending))
    return _STYLE + '<div class="kdlab-cell">' + "".join(f"<div>{block}</div>" for block in blocks) + "</div>"


def _vectors(report: CellReport, stage: str) -> str:
    rows = [("x, forward", f"{report.x:.1f} m"), ("y, to the left", f"{report.y:.1f} m")]
    rows += [(f"norm of the {side}", number(norm)) for side, norm in report.norms.items()]
    if len(report.norms) > 1:
        zero = "– (one is all zero)" if 0 in report.norms.values() else "– (lengths differ)"
        rows.append(("cosine of the two", number(report.cosine) if math.isfinite(report.cosine) else zero))
    over = ", ".join(report.boxes) or "none"
    head = f"<h4>Cell {report.row}, {report.col} at {escape(stage)}</h4>"
    return f'{head}{table(("", ""), rows)}<div style="max-width: 260px">boxes over it: {escape(over)}</div>'


def _pixels(report: CellReport) -> str:
    if not report.pixels:
        return "<h4>Pixels that feed it</h4>none: no camera lift brings a pixel here"
    rows = [
        (camera_name(p.camera), f"{p.u:.0f}, {p.v:.0f}", f"{p.depth:.1f} m", number(p.weight))
        for p in report.pixels[:PIXELS]
    ]
    more = len(report.pixels) - len(rows)
    rest = f"and {more} with less weight" if more > 0 else ""
    return f"<h4>Pixels that feed it</h4>{table(('camera', 'u, v', 'depth', 'weight'), rows)}{rest}"


def _points(report: CellReport) -> str:
    count = len(report.points)
    if not count:
        return "<h4>LiDAR points in it</h4>none"
    height, strength = report.points[:, 2], report.points[:, 3]
    rows = [
        ("points", str(count)),
        ("height", f"{height.min():.1f} to {height.max():.1f} m"),
        ("mean intensity", f"{strength.mean():.2f}"),
    ]
    return f"<h4>LiDAR points in it</h4>{table(('', ''), rows)}"


def _terms(report: CellReport, pending: bool) -> str:
    missing = "…" if pending else number(math.nan)
    pulls = {name: number(value) for name, value in report.gradients.items()}
    rows = [(name, number(loss), pulls.get(name, missing)) for name, loss in report.losses.items()]
    return f"<h4>Terms here</h4>{table(('term', 'loss', 'gradient'), rows)}"
