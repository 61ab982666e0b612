"""What a number of seeds can settle: pairs of runs, intervals and verdicts as pictures, and the state of the studies.

Every chance here is counted over imagined studies whose differences are normal; the dice are always the same.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from kdlab.studies.plan import BASE
from kdlab.studies.verdict import (
    BEATS,
    DOES_NOT_BEAT,
    INCONCLUSIVE,
    WORTH,
    Interval,
    differences,
    higher,
    interval,
    judge,
    worth_of,
)
from kdlab.view.results.studies import COLOURS, MARKERS
from kdlab.view.style import OTHERS, STUDENT, TEACHER, new_figure

GAINS = (0.02, 0.05)
"""About the smallest and the largest gain in mAP that the four papers report."""

BAND = "#EFE9D5"
"""Colour of differences that are not worth having, as in `kdlab.view.results.studies`."""

VERDICTS = (DOES_NOT_BEAT, INCONCLUSIVE, BEATS)
IMAGINED = 4000
"""Imagined studies behind a chance: good to about one percent."""

EXAMPLES = {
    "clearly better": (0.012, 0.022),
    "better, but by little": (0.001, 0.004),
    "may be nothing, may be much": (-0.004, 0.016),
    "at best a little better": (-0.006, 0.003),
    "worse": (-0.020, -0.008),
}
"""Intervals by what they say."""


def finished(studies: Path | str) -> pd.DataFrame:
    """Which runs of the committed studies are there: what NAME.toml plans beside what results/NAME.csv holds.

    Args:
        studies: folder of the TOML files, with the tables in ``results``.

    Returns:
        A row per study: study, claim (the file's first line), planned (seeds), there ("0 1 2" where all changes have
        the same seeds, else by change; "" for none).

    Raises:
        FileNotFoundError: the folder has no study.
    """
    folder, rows = Path(studies), []
    for path in sorted(folder.glob("*.toml")):
        text = path.read_text()
        seeds = " ".join(map(str, tomllib.loads(text)["seeds"]))
        claim = text.partition("\n")[0].lstrip("# ").partition(". ")[0].rstrip(".")
        rows.append((path.stem, claim, seeds, _there(folder / "results" / f"{path.stem}.csv")))
    if not rows:
        raise FileNotFoundError(f"{folder}: no study here; the checkout's folder studies/ holds them as NAME.toml")
    return pd.DataFrame(rows, columns=["study", "claim", "planned", "there"])


def _there(table: Path) -> str:
    if not table.exists():
        return ""
    rows = pd.read_csv(table, usecols=["change", "seed"])
    seeds = {change: " ".join(map(str, sorted(group))) for change, group in rows.groupby("change", sort=False)["seed"]}
    if len(set(seeds.values())) == 1:
        return next(iter(seeds.values()))
    return ", ".join(f"{change}: {found}" for change, found in seeds.items())


def rule(worth: float = WORTH["mAP"], examples: Mapping[str, tuple[float, float]] | None = None) -> Figure:
    """How an interval becomes a verdict: example intervals against 0 and the smallest difference worth having.

    Args:
        worth: that difference.
        examples: (low, high) by what they say; `EXAMPLES` where left out.
    """
    shown = EXAMPLES if examples is None else examples
    figure = new_figure(8.4, 1.2 + 0.42 * len(shown))
    ax = figure.subplots()
    ax.axvspan(0, worth, color=BAND, linewidth=0, zorder=0)
    ax.axvline(0, color="black", linewidth=1)
    for place, (low, high) in enumerate(shown.values()):
        verdict = judge(Interval(3, (low + high) / 2, 1.0, low, high), worth)
        _bar(ax, place, (low + high) / 2, low, high, COLOURS[verdict])
        _beside(ax, place, verdict)
    ax.set_yticks(range(len(shown)), list(shown))
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlabel("difference to the base (right is better)\nband: less than is worth having", fontsize=9)
    ax.grid(axis="x", alpha=0.3)
    return figure


def pairs(rows: pd.DataFrame, metric: str = "mAP") -> Figure:
    """Every change beside its base, a line for each seed; and the intervals with and without pairing.

    Args:
        rows: finished trials (`kdlab.studies.results.collect`, or a committed table).
        metric: a column of it.

    Raises:
        ValueError: no change has a seed in common with its base.
    """
    rows = rows if "reference" in rows else rows.assign(reference=BASE)
    found = differences(rows, metric)
    changes = list(found["change"].unique())
    if not changes:
        raise ValueError(f"pairs: no change and its base have a number of {metric} for the same seed")
    wide = 1.9 * min(len(changes), 6)
    figure = new_figure(wide + 5.6, max(3.2, 1.2 + 0.7 * len(changes)))
    left, right = figure.subplots(1, 2, width_ratios=(wide, 4.6))
    base = dict(zip(rows["change"], rows["reference"], strict=True))
    seeds = sorted(found["seed"].unique())
    for place, change in enumerate(changes):
        before, after = (rows[rows["change"] == name].set_index("seed")[metric] for name in (base[change], change))
        for index, seed in enumerate(seeds):
            if seed in before.index and seed in after.index:
                style: dict[str, Any] = {"color": _seed_colour(index), "marker": MARKERS[index % len(MARKERS)]}
                left.plot(
                    [place - 0.28, place + 0.28], [before[seed], after[seed]], markersize=5, linewidth=1.4, **style
                )
        _two_intervals(right, place, before, after, found[found["change"] == change]["difference"], metric)
    left.set_xticks(range(len(changes)), [f"{base[change]}  to\n{change}" for change in changes], fontsize=9)
    left.set_ylabel(metric)
    left.grid(axis="y", alpha=0.3)
    left.margins(x=0.08)
    marks = [
        Line2D([], [], color=_seed_colour(i), marker=MARKERS[i % len(MARKERS)], label=f"seed {seed}", markersize=5)
        for i, seed in enumerate(seeds)
    ]
    figure.legend(handles=marks, loc="outside upper left", ncols=len(marks), frameon=False, fontsize=9)
    _difference_axes(right, changes, metric)
    return figure


def _two_intervals(ax: Axes, place: int, before: pd.Series, after: pd.Series, paired: pd.Series, metric: str) -> None:
    found, mean = interval(paired), float(np.mean(paired))
    verdict = judge(found.better(metric), worth_of(metric, float(before.mean())))
    ax.plot(paired, np.full(len(paired), place - 0.32), "o", color=COLOURS[verdict], markersize=3.5, alpha=0.5)
    _bar(ax, place - 0.14, mean, found.low, found.high, COLOURS[verdict])
    if len(before) > 1 and len(after) > 1:
        loose = stats.ttest_ind(after, before, equal_var=False).confidence_interval(0.95)
        _bar(ax, place + 0.2, float(after.mean() - before.mean()), float(loose.low), float(loose.high), "#999999")
    _beside(ax, place - 0.05, verdict)


def _difference_axes(ax: Axes, changes: Sequence[str], metric: str) -> None:
    worth = WORTH.get(metric, 0.0)
    ax.axvspan(0, worth if higher(metric) else -worth, color=BAND, linewidth=0, zorder=0)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(changes)), changes)
    ax.set_ylim(len(changes) - 0.4, -0.6)
    side = "right" if higher(metric) else "left"
    ax.set_xlabel(
        f"difference in {metric} ({side} is better)\ncoloured: paired by seed; grey: as if not paired", fontsize=9
    )
    ax.grid(axis="x", alpha=0.3)
    ax.locator_params(axis="x", nbins=6)


def resolution(
    spreads: Mapping[str, float],
    seeds: Sequence[int] = range(2, 31),
    *,
    worth: float = WORTH["mAP"],
    gains: tuple[float, float] = GAINS,
    marked: int = 3,
    level: float = 0.95,
) -> Figure:
    """Half the width of the t interval against the number of seeds: the difference that so many seeds resolve.

    Args:
        spreads: standard deviation of the paired difference, by name.
        seeds: numbers of seeds.
        worth: smallest difference worth having.
        gains: a band to compare with.
        marked: number of seeds at which the values are written.
        level: of the intervals.
    """
    n = np.asarray(seeds)
    figure = new_figure(8.4, 4.6)
    ax = figure.subplots()
    ax.axhspan(*gains, color="#DCEBF5", linewidth=0, zorder=0)
    ax.text(n[-1], gains[1] * 0.94, "gains that the papers report", ha="right", va="top", fontsize=9, color=TEACHER)
    ax.axhline(worth, color="#8A7B3C", linewidth=1.2, linestyle="--")
    ax.text(n[-1], worth * 1.04, "worth having", ha="right", va="bottom", fontsize=9, color="#8A7B3C")
    for index, (name, sd) in enumerate(spreads.items()):
        colour, marker = _seed_colour(index), MARKERS[index % len(MARKERS)]
        label = f"{name}: spread {sd:.4f}, {marked} seeds resolve {half_width(sd, marked, level):.3f}"
        ax.plot(n, half_width(sd, n, level), color=colour, linewidth=1.6, marker=marker, markersize=4, label=label)
    ax.axvline(marked, color="black", linewidth=0.8, linestyle=":")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    ax.set_xlabel("seeds")
    ax.set_ylabel("half of the 95 % interval (mAP)" if level == 0.95 else f"half of the {level:.0%} interval (mAP)")
    ax.grid(alpha=0.3, which="both")
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)
    return figure


def half_width(sd: float, seeds: ArrayLike, level: float = 0.95) -> NDArray[np.float64]:
    """Half of Student's t interval of a mean over so many seeds: t with n - 1 degrees of freedom, times sd / √n."""
    n = np.asarray(seeds, float)
    return np.asarray(stats.t.ppf((1 + level) / 2, n - 1) * sd / np.sqrt(n))


def repeats(
    difference: float,
    sd: float,
    seeds: Sequence[int] = (3, 10),
    *,
    studies: int = 40,
    worth: float = WORTH["mAP"],
    seed: int = 0,
) -> Figure:
    """The same study made many times, each with fresh seeds: its intervals and verdicts, a panel per number of seeds.

    Args:
        difference: the true one.
        sd: standard deviation of a seed's difference.
        seeds: numbers of seeds.
        studies: how many.
        worth: smallest difference worth having.
        seed: of the dice.
    """
    figure = new_figure(4.4 * len(seeds), 5.0)
    panels = figure.subplots(1, len(seeds), sharex=True, sharey=True, squeeze=False)[0]
    for ax, n in zip(panels, seeds, strict=True):
        drawn = difference + sd * np.random.default_rng([seed, n]).standard_normal((studies, n))
        made = [interval(values) for values in drawn]
        words = [judge(one, worth) for one in made]
        ax.axvspan(0, worth, color=BAND, linewidth=0, zorder=0)
        ax.axvline(0, color="black", linewidth=1)
        ax.axvline(difference, color=TEACHER, linewidth=1.2, linestyle="--")
        for place, (one, word) in enumerate(zip(made, words, strict=True)):
            ax.plot([one.low, one.high], [place, place], color=COLOURS[word], linewidth=1.8, solid_capstyle="butt")
            ax.plot(one.mean, place, "o", color=COLOURS[word], markersize=3)
        inside = sum(one.low <= difference <= one.high for one in made)
        counts = "\n".join(f"{words.count(word)} {word}" for word in reversed(VERDICTS))
        ax.set_title(f"{n} seeds: {inside} of {studies} hold the truth\n{counts}", fontsize=10)
        ax.set_xlabel(f"difference (true: {difference:+g}, dashed)", fontsize=9)
        ax.set_yticks([])
        ax.grid(axis="x", alpha=0.3)
    panels[0].set_ylabel("one line for each study")
    reach = 1.6 * float(half_width(sd, min(seeds)))
    panels[0].set_xlim(min(-0.3 * reach, difference - reach), difference + reach)
    return figure


def chances(
    sd: float,
    seeds: Sequence[int] = (3, 5, 10),
    *,
    worth: float = WORTH["mAP"],
    reach: float = 0.03,
    level: float = 0.95,
) -> Figure:
    """The chance of each verdict against the true difference, a panel per number of seeds.

    Args:
        sd: standard deviation of a seed's difference.
        seeds: numbers of seeds.
        worth: smallest difference worth having.
        reach: largest true difference that is drawn.
        level: of the intervals.
    """
    true = np.linspace(-reach / 2, reach, 46)
    figure = new_figure(3.5 * len(seeds) + 0.6, 3.6)
    for ax, n in zip(figure.subplots(1, len(seeds), sharey=True, squeeze=False)[0], seeds, strict=True):
        shares = np.array([verdict_shares(d, sd, n, worth, level) for d in true])
        colours = [COLOURS[DOES_NOT_BEAT], "#C9C9C9", COLOURS[BEATS]]
        ax.stackplot(true, 100 * shares.T, colors=colours, labels=VERDICTS, alpha=0.9)
        ax.axvline(0, color="black", linewidth=1)
        ax.axvline(worth, color="black", linewidth=1, linestyle="--")
        ax.set_title(f"{n} seeds", fontsize=11)
        ax.set_xlabel("true difference (dashed: worth having)", fontsize=9)
        ax.set_xlim(true[0], true[-1])
        ax.set_ylim(0, 100)
    figure.axes[0].set_ylabel("studies that end so (%)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def verdict_shares(
    difference: float, sd: float, seeds: int, worth: float = WORTH["mAP"], level: float = 0.95
) -> NDArray[np.float64]:
    """Shares of `IMAGINED` studies that end in each verdict, in the order of `VERDICTS`.

    Args:
        difference: the true one.
        sd: standard deviation of a seed's difference.
        seeds: of each study.
        worth: smallest difference worth having.
        level: of the intervals.

    Raises:
        ValueError: fewer than two seeds, which have no interval.
    """
    if seeds < 2:
        raise ValueError(f"verdict_shares: an interval wants at least 2 seeds, got {seeds}")
    drawn = difference + sd * np.random.default_rng(0).standard_normal((IMAGINED, seeds))
    mean, half = drawn.mean(1), half_width(1.0, seeds, level) * drawn.std(1, ddof=1)
    beats = mean - half > 0
    lost = ~beats & ((mean + half < worth) | (mean + half <= 0))
    return np.array([lost.mean(), (~beats & ~lost).mean(), beats.mean()])


def peeking(most: int = 20, level: float = 0.95) -> Figure:
    """What looking after every seed does: the chance that a change without any effect is said to win.

    Args:
        most: seeds at which one gives up.
        level: of the intervals.
    """
    n = np.arange(2, most + 1)
    drawn = np.random.default_rng(0).standard_normal((IMAGINED, most))
    wins = np.stack([drawn[:, :k].mean(1) > half_width(1.0, k, level) * drawn[:, :k].std(1, ddof=1) for k in n], 1)
    figure = new_figure(6.4, 3.4)
    ax = figure.subplots()
    stopped = 100 * np.maximum.accumulate(wins, 1).mean(0)
    ax.plot(n, stopped, "s-", color=STUDENT, markersize=4, label="stop as soon as it says BEATS")
    ax.plot(n, 100 * wins.mean(0), "o-", color=TEACHER, markersize=4, label="look once, at that number of seeds")
    ax.set_xlabel("seeds")
    ax.set_ylabel("false BEATS (%)")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    return figure


def _seed_colour(index: int) -> str:
    palette = (TEACHER, OTHERS[1], OTHERS[0], OTHERS[2], "#000000")
    return palette[index % len(palette)]


def _bar(ax: Axes, place: float, mean: float, low: float, high: float, colour: str) -> None:
    if np.isfinite(low):
        ax.plot([low, high], [place, place], color=colour, linewidth=2.4, solid_capstyle="butt")
    ax.plot(mean, place, "D", color=colour, markersize=6)


def _beside(ax: Axes, place: float, verdict: str) -> None:
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    ax.annotate(verdict, (1, place), (6, 0), color=COLOURS[verdict], fontsize=9, **where)
