"""Every notebook is short-worded, clean and runs from top to bottom."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from refresh import execute

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 1_500_000
MAX_FUNCTION_LINES = 10
PICTURES = {"image/png", "image/jpeg"}


def named(path: Path) -> str:
    return path.stem


def python(source: str) -> str:
    """A cell's source without magics."""
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_defines_no_class_and_no_long_function(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(python(cell.source))):
                assert not isinstance(node, ast.ClassDef), node.name
                if isinstance(node, ast.FunctionDef):
                    assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_is_valid_small_and_names_no_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size <= MAX_BYTES
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    text = json.dumps([{k: v for k, v in c.items() if k != "outputs"} for c in notebook.cells])
    text += json.dumps(
        [o for c in notebook.cells for o in c.get("outputs", []) if not PICTURES & set(o.get("data", {}))]
    )
    assert not re.search(r"(?<![\w./~$}-])/(?:home|root|tmp|work|Users)/", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_outputs_hold_no_error(path: Path) -> None:
    outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


@pytest.mark.notebook
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDLAB_FAST", "1")
    monkeypatch.setenv("KDLAB_OUT", str(tmp_path / "runs"))
    monkeypatch.setenv("OPEN3D_DISABLE_WEB_VISUALIZER", "true")
    done = execute(path, tmp_path)
    pictures = [o for c in done.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures
