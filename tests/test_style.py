"""Sizes, docstrings and words that a linter does not check."""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "kdlab").rglob("*.py"))
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

#: Written in pieces, so that this file passes its own test.
HOSTS = ["pypi" + r"\.org", r"files\.python" + "hosted", r"registry\.npm" + "js", r"deb\.deb" + r"ian\.org"]
FOLDERS = r"(?<![\w./~$}-])/(?:home|root|work|Users)" + r"/\w"
FORBIDDEN = re.compile("|".join([*HOSTS, FOLDERS]))


#: A page that sends its readers to /tmp was copied from somebody's terminal. Tests may name it.
SCRATCH = re.compile(r"(?<![\w./~$}-])/tmp" + "/")
PAGES = (".md", ".ipynb", ".rst", ".txt", ".html")


def forbidden(name: str, line: str) -> str | None:
    """What a line of a file may not hold."""
    found = FORBIDDEN.search(line)
    if found is None and name.endswith(PAGES) and not name.startswith("tests/"):
        found = SCRATCH.search(line)
    return found.group() if found else None


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def public_definitions(node: ast.AST) -> Iterator[Definition]:
    """Public classes and functions of a module, and the public methods of public classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child)


def is_declaration(node: Definition) -> bool:
    """Whether the body is `...`: an overload, or a member of a protocol, whose class says what it means."""
    return len(node.body) == 1 and ast.unparse(node.body[0]) == "..."


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_FILE_LINES, f"{named(path)} is longer than {MAX_FILE_LINES} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{named(path)}:{node.lineno} {node.name} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), f"{named(path)} has no docstring"
    bare = [
        f"{named(path)}:{node.lineno} {node.name}"
        for node in public_definitions(tree)
        if not ast.get_docstring(node) and not is_declaration(node)
    ]
    assert not bare


def test_nothing_names_a_package_host_or_a_folder_of_one_machine() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    hits = []
    for name in filter(None, listed):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() else b""
        if b"\0" in data:
            continue  # not text
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            if found := forbidden(name, line):
                hits.append(f"{name}:{number}: {found}")
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("--out /tm" + "p/run", True),
        ("see runs/tmp/x", False),
        ("see https://pypi" + ".org/project/x", True),
        ('DATA = "/home' + '/someone/data"', True),
        ("cd /wo" + "rk/main", True),
        ("KEYFRAME = ../shared/nuscenes-keyframe", False),
        ("frame/work/on", False),
        ("$HOME/work/on and ~/work/it", False),
    ],
)
def test_the_pattern_finds_what_it_should(line: str, bad: bool) -> None:
    assert bool(forbidden("docs/page.md", line)) is bad


def test_tests_and_code_may_name_the_scratch_folder() -> None:
    line = "/tm" + "p/x"
    assert forbidden("tests/README.md", line) is None and forbidden("kdlab/cli.py", line) is None
