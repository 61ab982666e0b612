"""Every notebook is short-worded, clean and runs from top to bottom."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from refresh import FOLDER, NOTEBOOKS, execute

MAX_BYTES = 1_500_000
MAX_FUNCTION_LINES = 10
PICTURES = {"image/png", "image/jpeg"}


WORDS = re.compile(r"\b(TODO|FIXME|XXX|localhost|127\.0\.0\.1|sandbox)\b")
LINES = re.compile(r"^`(\S+\.py)`, lines? (\d+)(?:-(\d+))? \(`\S+`\)\n\n```python\n(.*)\n```$", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|attachment:)([^)#\s]+)")


def named(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_reads_well_without_running(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    code = [c for c in cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code), "run tests/notebooks/refresh.py on it"
    assert any(PICTURES & set(o.get("data", {})) for c in code for o in c.outputs)
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    assert not WORDS.search(text)
    assert text.count("<details>") == text.count("</details>")
    missing = [link for link in LINK.findall(text) if not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_lines_of_code_stand_where_it_says(path: Path) -> None:
    outputs = [o.get("data", {}) for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])]
    for found in filter(None, (LINES.match(data.get("text/markdown", "")) for data in outputs)):
        file, first, last, shown = found.groups()
        rows = (FOLDER.parent / file).read_text().splitlines()[int(first) - 1 : int(last or first)]
        assert textwrap.dedent("\n".join(rows)) == shown, f"{file}:{first}; run tests/notebooks/refresh.py on it"


def processor_seconds() -> float:
    """Of all processes that this one has started and that have ended, such as kernels."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """One folder of world and runs for all notebooks, and one of compiled Python, which a kernel starts faster with."""
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLAB_FAST", "1")
        patch.setenv("KDLAB_OUT", str(folder / "runs"))
        patch.setenv("OPEN3D_DISABLE_WEB_VISUALIZER", "true")
        patch.setenv("PYTHONPYCACHEPREFIX", os.environ.get("PYTHONPYCACHEPREFIX") or str(folder / "compiled"))
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield patch


@pytest.mark.notebook
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_runs_from_top_to_bottom(
    path: Path, tmp_path: Path, shared: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began, used = time.monotonic(), processor_seconds()
    done = execute(path, tmp_path)
    seconds, used = time.monotonic() - began, processor_seconds() - used
    with capsys.disabled():
        print(f"\n{named(path)}: {seconds:.0f} s, {used:.0f} s of processor time", end=" ", flush=True)
    pictures = [o for c in done.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures
