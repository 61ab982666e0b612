"""Executes notebooks and keeps small, clean outputs: no progress bars, no warnings, no times, no machine paths.

Usage: python tests/notebooks/refresh.py [notebooks/00_quickstart.ipynb ...]     all of them where none is named
"""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb")) + sorted(FOLDER.glob("clinic/*.ipynb"))
WIDEST = 1250  # pixels of a stored picture
LARGE = 60_000  # bytes above which a PNG gets fewer colours
PHOTOGRAPHS = 300_000  # bytes that only photographs need
DROPPED = ("application/vnd.jupyter.widget-view+json",)


def execute(path: Path, folder: Path, timeout: int = 600) -> Any:
    """Run a notebook from top to bottom in a folder; returns it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def smaller(picture: str) -> dict[str, str]:
    """A base64 PNG, no wider than `WIDEST`, of 256 colours where it is large; as JPEG where it holds photographs."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    whole = encoded(image, "png", optimize=True)
    if len(whole) > PHOTOGRAPHS:
        return {"image/jpeg": base64.b64encode(encoded(image, "jpeg", quality=80, subsampling=0)).decode()}
    if len(whole) > LARGE:  # the method keeps rare colours, such as those of a legend
        few = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
        whole = encoded(few, "png", optimize=True)
    return {"image/png": base64.b64encode(whole).decode()}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def clean(notebook: Any) -> Any:
    """Keep what a reader needs of the outputs: text, tables and small pictures."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            data = output.get("data", {})
            if output.get("name") == "stderr" or any(kind in data for kind in DROPPED):
                continue
            if "image/png" in data:
                output["data"] = smaller(data["image/png"])
                output["metadata"] = {}
            kept.append(output)
        cell.outputs = kept
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(paths: list[str]) -> None:
    """Refresh the named notebooks in place, or all."""
    os.environ["OPEN3D_DISABLE_WEB_VISUALIZER"] = "true"
    os.environ.pop("KDLAB_FAST", None)
    for path in [Path(name) for name in paths] or NOTEBOOKS:
        began = time.monotonic()
        notebook = clean(execute(path, path.parent, timeout=3600))
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
