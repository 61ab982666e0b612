from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from study_fakes import rows_of, write_gradients, write_study

from kdlab.studies.conflict import PARTS
from kdlab.studies.report import analyse
from kdlab.studies.verdict import verdicts
from kdlab.view.results.studies import conflict_maps, cost_plot, difference_plot, draw_report, shapley_bars

Draw = Callable[[Figure], Figure]
LONG = "a_change_with_a_name_that_goes_on_and_on_and_on_and_on_and_on_and_on_and_on_and_on_until_it_ends"


def differing(changes: list[str], seeds: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    values = {name: 0.2 + 0.01 * i + 0.01 * rng.standard_normal(seeds) for i, name in enumerate(["base", *changes])}
    return rows_of({name: list(map(float, v)) for name, v in values.items()}, NDS=0.3)


def conflicts(names: list[str]) -> pd.DataFrame:
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    rows = [("x", part, a, b, 0.9 - 0.3 * i, 0.1, 0.25, 0.0, 2, 9) for part in PARTS for i, (a, b) in enumerate(pairs)]
    columns = ["change", "part", "first", "second", "cosine", "cosine_sd", "conflict", "conflict_sd", "seeds", "steps"]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize(("changes", "seeds"), [(["x"], 1), (["x", LONG], 5), ([f"change {i}" for i in range(20)], 3)])
def test_differences(changes: list[str], seeds: int, draw: Draw) -> None:
    rows = differing(changes, seeds)
    judged = verdicts(rows)
    figure = draw(difference_plot(rows, judged))
    assert [ax.get_title() for ax in figure.axes] == ["mAP", "NDS"]
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in dots] == [seeds] * len(changes)
    assert len(figure.axes[0].texts) == len(changes)
    first = judged.iloc[0]
    assert figure.axes[0].texts[0].get_text() == f"{first['verdict']}\n{seeds} seed{'s' if seeds > 1 else ''}"
    spans = [line for line in figure.axes[0].lines if line.get_linewidth() == 2.2]
    assert len(spans) == (len(changes) if seeds > 1 else 0)  # one seed has no interval
    if spans:
        assert list(spans[0].get_xdata()) == [first["low"], first["high"]]


def test_what_cannot_be_compared_has_no_dots(draw: Draw) -> None:
    rows = differing(["x"], 3)
    rows.loc[rows["change"] == "x", "data"] = "other"
    figure = draw(difference_plot(rows, verdicts(rows)))
    assert "NOT COMPARABLE" in figure.axes[0].texts[0].get_text()
    assert all(len(line.get_xdata()) == 0 for line in figure.axes[0].lines if line.get_marker() == "o")


def test_another_reference_is_named(draw: Draw) -> None:
    rows = differing(["x", "y"], 3)
    rows["reference"] = ["base"] * 6 + ["x"] * 3
    figure = draw(difference_plot(rows, verdicts(rows)))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["x", "y\n(against x)"]


def test_errors_are_better_to_the_left(draw: Draw) -> None:
    rows = rows_of({"base": [0.5, 0.6], "x": [0.4, 0.52]}, "mATE")
    figure = draw(difference_plot(rows, verdicts(rows), ["mATE"]))
    assert "left is better" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize("names", [["detection", "kd/feature"], ["heatmap", "box", "detection", "kd/" + "long" * 8]])
def test_conflicts(names: list[str], draw: Draw) -> None:
    figure = draw(conflict_maps(conflicts(names), "x"))
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == list(PARTS)
    words = [text.get_text() for text in panels[0].texts]
    assert words[:2] == ["+0.90", "25 %"] and len(words) == 2 * len(names) * (len(names) - 1)
    assert panels[0].images[0].get_clim() == (-1, 1)


def test_shares(draw: Draw) -> None:
    columns = ["metric", "term", "share", "sd", "low", "high", "seeds"]
    rows = [
        (metric, term, share, 0.01, share - gap, share + gap, 3)
        for metric in ("mAP", "NDS")
        for term, share, gap in (("feature", 0.02, 0.01), (LONG, -0.01, np.nan), ("all together", 0.01, 0.03))
    ]
    figure = draw(shapley_bars(pd.DataFrame(rows, columns=columns)))
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.02, -0.01, 0.01]
    assert [text.get_text() for text in figure.axes[0].texts] == ["+0.020", "−0.010", "+0.010"]
    assert figure.axes[1].get_title() == "NDS, 3 seeds"


@pytest.mark.parametrize("changes", [["x"], [LONG, *(f"{i} {LONG}" for i in range(25))]])
def test_cost(changes: list[str], draw: Draw) -> None:
    rows = differing(changes, 2)
    rows = rows.assign(train_seconds=range(len(rows)), test_seconds=0.5, test_memory_mb=np.nan)
    figure = draw(cost_plot(rows))
    assert [ax.get_xlabel() for ax in figure.axes] == ["training time (s)"]  # what all share is not drawn
    assert len(figure.legends[0].get_texts()) == len(changes) + 1
    looks = {(handle.get_color(), handle.get_marker()) for handle in figure.legends[0].legend_handles}
    assert len(looks) == len(changes) + 1
    legend = figure.legends[0].get_window_extent()
    assert legend.y0 >= 0 and legend.x1 <= figure.bbox.x1


def test_all_figures_of_a_study(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"uni distill": 0.01}, seeds=2)
    for run in (study / "uni distill").iterdir():
        write_gradients(run, {("detection", "kd/feature"): [0.1, -0.2, 0.3]})
    files = draw_report(analyse(study), study / "figures")
    names = [
        f"{stem}.{kind}" for stem in ("differences", "conflict-uni_distill", "cost") for kind in ("png", "svg", "pdf")
    ]
    assert [path.name for path in files] == names and all(path.stat().st_size > 1000 for path in files)
    assert sorted(path.name for path in (study / "figures").iterdir()) == sorted(names)


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert draw_report(analyse(tmp_path), tmp_path / "figures") == []
