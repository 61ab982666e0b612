"""The lines of code that compute something, shown beside its formula: cut out of the file that runs, never copied."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.display import Markdown

_ROOT = Path(__file__).resolve().parents[2]


def lines(part: Any, first: str, last: str | None = None) -> Markdown:
    """Lines of a function's source as they stand in its file, with the file's name and the lines' numbers.

    Args:
        part: function, class or module.
        first: text that the first line holds; where several lines do, the first of them counts.
        last: text that the last line holds, at or after the first line; by default the whole statement is shown.

    Raises:
        ValueError: no line of it holds such a text, so that what shows code cannot drift from the code.
    """
    from IPython.display import Markdown

    name, path, start, rows = _source(part)
    begin = _find(rows, first, 0, name)
    end = _find(rows, last, begin, name) if last is not None else _end(rows, begin)
    shown = textwrap.dedent("\n".join(rows[begin : end + 1]))
    numbers = f"line {start + begin}" if begin == end else f"lines {start + begin}-{start + end}"
    return Markdown(f"`{path}`, {numbers} (`{name}`)\n\n```python\n{shown}\n```")  # type: ignore[no-untyped-call]


def _source(part: Any) -> tuple[str, str, int, list[str]]:
    """Name, file, number of the first line, and lines of a part's source."""
    part = inspect.unwrap(part) if callable(part) else part
    rows, start = inspect.getsourcelines(part)
    file = Path(inspect.getsourcefile(part) or "").resolve()
    path = file.relative_to(_ROOT).as_posix() if file.is_relative_to(_ROOT) else file.name
    name = part.__name__.rpartition(".")[2] if isinstance(part, ModuleType) else part.__qualname__
    return name, path, max(start, 1), [row.rstrip("\n") for row in rows]


def _find(rows: list[str], text: str, begin: int, name: str) -> int:
    for index in range(begin, len(rows)):
        if text in rows[index]:
            return index
    after = f" from {rows[begin].strip()!r} on" if begin else ""
    raise ValueError(f"the source of {name} has no line with {text!r}{after}; look it up there and mend the call")


def _end(rows: list[str], begin: int) -> int:
    """The last line of the smallest statement that begins on a line; the line itself where none does."""
    tree = ast.parse(textwrap.dedent("\n".join(rows)))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno == begin + 1]
    ends = [(node.end_lineno or node.lineno) - 1 for node in found if not hasattr(node, "body")]
    return min(ends, default=begin)
