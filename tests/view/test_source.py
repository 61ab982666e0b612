from __future__ import annotations

import linecache
from pathlib import Path

import pytest

from kdlab.distill import distillbev, unidistill
from kdlab.view import source
from kdlab.view.source import lines

ROOT = Path(__file__).resolve().parents[2]


def test_shows_the_very_lines_of_the_file() -> None:
    text = lines(unidistill.feature, "error = (", "error = error *").data
    head, code = text.split("```python\n")
    assert "`kdlab/distill/unidistill.py`" in head and "(`feature`)" in head
    first, last = (int(n) for n in head.split("lines ")[1].split(" ")[0].split("-"))
    file = str(ROOT / "kdlab/distill/unidistill.py")
    shown = code.removesuffix("\n```").split("\n")
    assert len(shown) == last - first + 1 == 2
    assert shown == [linecache.getline(file, n).strip() for n in (first, last)]


def test_without_an_end_the_whole_statement_is_shown() -> None:
    code = lines(distillbev.regional, "weight = regions(").data.split("```python\n")[1]
    assert code.count("\n") == 3 and code.startswith("weight = regions(") and "\n)\n" in code
    assert ", line " in lines(unidistill.feature, "return").data
    assert lines(unidistill.feature, "def feature").data.count("\n") == 4  # the head of a function, not all of it


def test_classes_methods_and_modules_have_lines_too() -> None:
    assert "`Regions.weight`" in lines(distillbev.Regions.weight, "share(self.background)").data
    assert "class Regions" in lines(distillbev.Regions, "class Regions").data
    assert "WEIGHTS = {" in lines(distillbev, "WEIGHTS = {").data
    assert "(`source`)" in lines(source, "_ROOT =").data


@pytest.mark.parametrize(("first", "last"), [("no such line", None), ("error = (", "student, teacher = context")])
def test_text_that_is_gone_is_an_error(first: str, last: str | None) -> None:
    with pytest.raises(ValueError, match="the source of feature has no line with"):
        lines(unidistill.feature, first, last)
