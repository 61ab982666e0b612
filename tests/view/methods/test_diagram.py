from __future__ import annotations

from collections.abc import Callable

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from mini_run import one_thread  # noqa: F401
from sight_fakes import PAIRS, observer_of

from kdlab.sample import Sample
from kdlab.view.methods.diagram import method_diagram

Draw = Callable[[Figure], Figure]


@pytest.mark.parametrize("name", PAIRS)
def test_every_term_has_an_arrow_its_weight_and_its_loss(name: str, sample: Sample, draw: Draw) -> None:
    observer = observer_of(name)
    sight = observer.see(sample)
    figure = draw(method_diagram(sight, observer))
    board = figure.axes[0]
    texts = [text.get_text() for text in board.texts]
    assert observer.method is not None
    terms = observer.method.active
    for term in terms:
        place = texts.index(term.name)
        assert texts[place + 1].startswith(f"weight {term.weight:.3g}")
        assert texts[place + 2] == f"loss {sight.value(term.name):.3g}"
    thick = [p for p in board.patches if isinstance(p, FancyArrowPatch) and p.get_linewidth() == 2.0]
    assert len(thick) == len(terms)
    assert figure.get_size_inches()[0] * figure.dpi == pytest.approx(1200)
    rows = {"TEACHER, frozen", "STUDENT, trained"} | ({"LABEL ENCODER, frozen"} if name == "labeldistill" else set())
    assert rows <= set(texts)


def test_maps_of_a_column_share_one_scale(sample: Sample) -> None:
    observer = observer_of("distillbev")
    figure = method_diagram(observer.see(sample), observer)
    maps = [ax for ax in figure.axes[1:] if ax.images and ax.images[0].get_array().ndim == 2]
    by_column: dict[float, set[tuple[float, float]]] = {}
    for ax in maps:
        norm = ax.images[0].norm
        by_column.setdefault(round(ax.get_position().x0, 3), set()).add((norm.vmin, norm.vmax))
    assert len(maps) == 10 and all(len(scales) == 1 for scales in by_column.values())
    assert "stages[0], 16 channels" in [text.get_text() for text in figure.axes[0].texts]


def test_what_is_copied_trained_first_or_read_besides_is_said(sample: Sample) -> None:
    words = {}
    for name in ("distillbev", "labeldistill", "unidistill"):
        observer = observer_of(name)
        words[name] = method_diagram(observer.see(sample), observer).axes[0].texts[-1].get_text()
    assert "head.tasks is copied from the teacher" in words["distillbev"] and "Dotted" in words["distillbev"]
    assert "Trained first: label encoder." in words["labeldistill"]
    assert "Dotted" not in words["unidistill"]


def test_without_a_method_there_is_nothing_to_draw(sample: Sample) -> None:
    observer = observer_of(None)
    with pytest.raises(ValueError, match="method_diagram needs a method"):
        method_diagram(observer.see(sample), observer)
