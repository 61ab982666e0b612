"""The report of a study: one set of tables, and the CSV, Markdown, LaTeX and plain words that are made from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from kdlab.checkpoint import RunFolder, load_run_config, replacing
from kdlab.studies.comparable import twins
from kdlab.studies.conflict import DETECTION, WHOLE, conflict, matrix, norms
from kdlab.studies.plan import BASE, NO_METHOD
from kdlab.studies.results import collect, pending, read_plan, write_csv
from kdlab.studies.shapley import complete_games, shapley
from kdlab.studies.text import (
    bold_beats,
    latex,
    markdown,
    number,
    reference,
    sentence,
    signed,
    significant,
    with_interval,
)
from kdlab.studies.verdict import BEATS, COLUMNS, COSTS, ERRORS, INCONCLUSIVE, SCORES, Kind, check_options, verdicts

SHARED = {"bev": "the shared BEV map", "image": "the images' features"}
"""Where gradients are measured, by `TrainConfig.gradients_at`."""

PRIMARY = "mAP"
"""The metric on which BEATS is also judged with Holm's correction for the number of changes."""


@dataclass(frozen=True)
class Report:
    """What a study found; everything that is written or drawn comes from these tables.

    Attributes:
        name: of the study.
        rows: finished trials (`kdlab.studies.results.collect`).
        missing: the other trials (`kdlab.studies.results.pending`).
        verdicts: every change against the base or the reference that it names (`kdlab.studies.verdict.verdicts`).
        conflict: how the losses pull (`kdlab.studies.conflict.conflict`).
        norms: how hard (`kdlab.studies.conflict.norms`).
        shapley: shares of the terms in mAP and NDS, by method of distillation (``of``); empty where runs are missing.
        shapley_note: why a study of subsets has no shares; empty where it has, and for other studies.
        trouble: why there are no verdicts although there are runs; empty where there are.
        text: the findings in plain words.
        files: what was written.
    """

    name: str
    rows: pd.DataFrame
    missing: pd.DataFrame
    verdicts: pd.DataFrame
    conflict: pd.DataFrame
    norms: pd.DataFrame
    shapley: pd.DataFrame
    shapley_note: str = ""
    trouble: str = ""
    text: str = ""
    files: tuple[Path, ...] = ()


def analyse(
    folder: Path | str,
    *,
    split: str | None = None,
    worth: Mapping[str, float] | None = None,
    level: float = 0.95,
    method: Kind = "t",
    other_data: bool = False,
) -> Report:
    """The tables and the words of a study, finished or not; writes nothing.

    Args:
        folder: of the study.
        split: by default the study's.
        worth: smallest differences worth having by metric, see `verdicts`.
        level: of all intervals.
        method: of all intervals.
        other_data: also compare changes that were scored on another data set than the base.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an option that cannot be, or a file of a run cannot be read.
    """
    check_options(worth, level, method)
    rows, missing = collect(folder, split), pending(folder, split)
    judged, trouble = pd.DataFrame(columns=list(COLUMNS)), ""
    if ((rows["reference"] != rows["change"]) & rows["reference"].isin(rows["change"])).any():
        adjust = PRIMARY if method == "t" else None
        try:
            judged = verdicts(rows, worth=worth, level=level, method=method, other_data=other_data, adjust=adjust)
            judged["note"] = [_preliminary(row, missing) for row in judged.to_dict("records")]
        except ValueError as error:
            trouble = str(error)
    plan = read_plan(Path(folder))
    shares, why = _shares(rows, _terms(plan), level, method)
    found = Report(
        plan.get("name") or Path(folder).resolve().name,
        rows,
        missing,
        judged,
        conflict(rows),
        norms(rows),
        shares,
        why,
        trouble,
    )
    return replace(found, text=_text(found))


def _preliminary(row: Mapping[Any, Any], missing: pd.DataFrame) -> str:
    """The note of a verdict, with what is still to come for it."""
    waiting = missing[missing["change"].isin([row["change"], row["reference"]])]
    runs = "1 run is" if len(waiting) == 1 else f"{len(waiting)} runs are"
    return "; ".join(filter(None, [row["note"], f"PRELIMINARY: {runs} missing" if len(waiting) else ""]))


def _terms(plan: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a study's [terms] say, where they are of subsets."""
    terms: Mapping[str, Any] | None = plan.get("terms")
    if terms is None or terms["mode"] != "subsets":
        return None
    own = (plan["base"].get("distill") or {}).get("method", NO_METHOD)
    return {**terms, "method": terms["method"] or own}


def write_report(
    folder: Path | str, draw: Callable[[Report, Path], Sequence[Path]] | None = None, **options: Any
) -> Report:
    """Write a study's results.csv, verdicts.csv, study.md and study.tex into its folder.

    Args:
        folder: of the study.
        draw: draws the figures of a report into a folder (`kdlab.view.results.studies.draw_report`); none without it.
        options: of `analyse`.
    """
    folder = Path(folder)
    write_csv(collect(folder, options.get("split")), folder / "results.csv")  # there whatever comes of the rest
    found = analyse(folder, **options)
    files = [write_csv(found.rows, folder / "results.csv"), write_csv(found.verdicts, folder / "verdicts.csv")]
    figures = tuple(draw(found, folder / "figures")) if draw is not None else ()
    shown = [path.relative_to(folder) for path in figures if path.suffix == ".png"]
    for name, text in (("study.md", _markdown(found, shown)), ("study.tex", _latex(found))):
        with replacing(folder / name) as part:
            part.write_text(text)
        files.append(folder / name)
    return replace(found, files=(*files, *figures))


def _shares(rows: pd.DataFrame, plan: Mapping[str, Any] | None, level: float, method: Kind) -> tuple[pd.DataFrame, str]:
    """Shapley shares of the terms that the study names, or of the most that have all their runs; else none and why."""
    games: Mapping[str, Sequence[str] | None] = complete_games(rows)
    if plan is not None:
        games = {plan["method"]: plan["terms"] or None}
    found = []
    for of, terms in games.items():
        try:
            shares = [shapley(rows, metric, terms, of=of, level=level, method=method) for metric in SCORES]
        except ValueError as error:
            return pd.DataFrame(), str(error)
        found.append(pd.concat(shares).assign(of=of))
    return (pd.concat(found) if found else pd.DataFrame()), ""


def score_table(found: Report, metrics: Sequence[str] = SCORES) -> pd.DataFrame:
    """Words for a reader: a row per change with mean, difference to its reference, interval and verdict by metric."""
    table = []
    for change, rows in found.rows.groupby("change", sort=False):
        against = "-" if rows["reference"].iloc[0] == change else str(rows["reference"].iloc[0])
        cells = {"change": change, **({"against": against} if _several_references(found) else {})}
        cells["seeds"] = str(rows["seed"].nunique())
        for metric in metrics:
            judged = _judged(found, change, metric) or {}
            cells[metric] = _spread(rows[metric])
            cells[f"Δ {metric}"] = with_interval(judged) if judged else "-"
            cells[f"{metric} verdict"] = judged.get("verdict", "-")
            if metric == PRIMARY and _comparisons(found) > 1:
                cells[f"{metric} verdict (Holm)"] = judged.get("adjusted") or "-"
        table.append(cells)
    return pd.DataFrame(table).fillna("-")


def difference_table(found: Report, metrics: Sequence[str]) -> pd.DataFrame:
    """Words for a reader: a row per metric and change with both means, difference, interval and verdict."""
    if not len(found.verdicts):
        return found.verdicts
    table = []
    for metric in metrics:
        for row in found.verdicts[found.verdicts["metric"] == metric].to_dict("records"):
            write = significant if metric in COSTS else number
            against = {"against": row["reference"]} if _several_references(found) else {}
            means = {**against, "its mean" if against else "base": write(row["base"]), "value": write(row["value"])}
            judged = {"difference": with_interval(row), "verdict": row["verdict"]}
            table.append({"metric": metric, "change": row["change"], **means, **judged})
    return pd.DataFrame(table)


def _several_references(found: Report) -> bool:
    return bool((found.rows["reference"] != BASE).any())


def _judged(found: Report, change: Any, metric: str) -> Mapping[str, Any] | None:
    if not len(found.verdicts):
        return None
    rows = found.verdicts[(found.verdicts["change"] == change) & (found.verdicts["metric"] == metric)]
    first: Mapping[str, Any] | None = rows.iloc[0].to_dict() if len(rows) else None
    return first


def _spread(values: pd.Series) -> str:
    return number(values.mean()) + (f" ± {number(values.std())}" if values.count() > 1 else "")


def _text(found: Report) -> str:
    lines = [_progress(found), *_absences(found), *_same_runs(found)]
    if found.trouble:
        return "\n".join([*lines, f"No verdicts: {found.trouble}."])
    if not len(found.verdicts):
        which = "the base" if not (found.rows["change"] == BASE).any() else "any other change"
        return "\n".join([*lines, f"Nothing to compare yet: no run of {which} is finished."])
    for change in found.verdicts["change"].unique():
        for metric in SCORES:
            judged = _judged(found, change, metric)
            lines += [sentence(judged)] if judged is not None else []
        lines += _cost_line(found, change)
    for change, rows in found.rows.groupby("change", sort=False):
        if rows["reference"].iloc[0] not in set(found.rows["change"]):
            lines.append(f"{change} has no verdict yet: no run of {rows['reference'].iloc[0]} is finished.")
    return "\n".join([*lines, *_corrected(found)])


def _progress(found: Report) -> str:
    done, total = len(found.rows), len(found.rows) + len(found.missing)
    split = f" on {found.rows['split'].iloc[0]}" if done else ""
    return f"{found.name}: {done} of {total} trials finished and scored{split}."


def _absences(found: Report) -> list[str]:
    lines = []
    for (change, state), rows in found.missing.groupby(["change", "state"], sort=False):
        why = next((f": {w}" for w in rows["why"] if w), "")
        lines.append(f"{change}: seed {', '.join(map(str, rows['seed']))} {state}{why}.")
    return lines


def _same_runs(found: Report) -> list[str]:
    same = twins(found.rows).items()
    return [f"{change} shares its runs with {other}, and has no verdict of its own." for change, other in same]


def _cost_line(found: Report, change: str) -> list[str]:
    words = {
        "train_seconds": "training time",
        "train_memory_mb": "training memory",
        "train_parameters": "trained parameters",
        "test_seconds": "time at test",
        "test_memory_mb": "memory at test",
        "test_parameters": "parameters at test",
        "train_gflop": "operations of a step",
        "test_gflop": "operations at test",
    }
    parts, same = [], []
    for metric, word in words.items():
        judged = _judged(found, change, metric)
        if judged is not None and not math.isnan(judged["difference"]) and judged["base"] > 0:
            ratio = f"{judged['value'] / judged['base']:.2f}"
            parts += [f"{ratio} x the {word}"] if ratio != "1.00" else []
            same += [word] if ratio == "1.00" else []
    costs = [", ".join(parts), f"the same {', '.join(same)}" if same else ""]
    return (
        [f"{change} costs {'; '.join(filter(None, costs))} ({reference(_judged(found, change, PRIMARY) or {})} = 1)."]
        if parts or same
        else []
    )


def _corrected(found: Report) -> list[str]:
    count = _comparisons(found)
    if count < 2:
        return []
    chosen = found.verdicts[found.verdicts["metric"] == PRIMARY]
    lost = chosen[(chosen["verdict"] == BEATS) & (chosen["adjusted"] == INCONCLUSIVE)]["change"]
    rival = "its reference" if _several_references(found) else "the base"
    if not (chosen["verdict"] == BEATS).any():
        end = "there is no BEATS to correct"
    else:
        end = f"{' and '.join(lost)} no longer BEATS {rival}" if len(lost) else "every BEATS stands"
    return [
        f"{count} changes were compared, each with an interval of its own; with Holm's correction for {count} "
        f"comparisons on {PRIMARY}, {end}."
    ]


def _comparisons(found: Report) -> int:
    """Number that Holm's correction was made for; 0 without one."""
    counts = found.verdicts.get("comparisons", pd.Series(dtype=int))
    return int(counts.max()) if len(counts) else 0


def _markdown(found: Report, figures: Sequence[Path]) -> str:
    parts = [f"# {found.name}", "\n".join(f"- {line}" for line in found.text.splitlines())]
    parts += [f"## {title}\n\n{markdown(bold_beats(table))}" for title, table in _tables(found)]
    if found.shapley_note and len(found.rows):
        parts.append(f"No Shapley shares: {found.shapley_note}.")
    parts += [_no_gradients(found)] if _no_gradients(found) else []
    parts += [f"![{path.stem}]({path.as_posix()})" for path in figures]
    parts.append(
        f"Differences are paired by seed, change minus what it is judged against; {_method(found)}. "
        "BEATS: the interval is wholly on the better side of 0. "
        "DOES NOT BEAT: even its better end is below the smallest difference worth having (column `worth` of "
        "verdicts.csv). Every run with its seed, config hash, versions and command stands in results.csv. "
        "An interval holds for a number of seeds that was fixed beforehand: after adding seeds because of what was "
        "seen here, confirm a finding on new seeds alone."
    )
    return "\n\n".join(parts) + "\n"


def _no_gradients(found: Report) -> str:
    if not len(found.rows) or any(RunFolder(Path(run)).gradients.exists() for run in found.rows["folder"]):
        return ""
    return (
        "No finished run has gradients.csv, so nothing can be said of the conflict of losses: set "
        "`train.gradients_every = 50` under `[set]` before the first run. Set later, it trains no finished run again."
    )


def _method(found: Report) -> str:
    if not len(found.verdicts):
        return "there are none yet"
    first = found.verdicts.iloc[0]
    name = "Student's t" if first["method"] == "t" else "percentile bootstrap"
    return f"intervals are of {100 * first['level']:g} % ({name})"


def _tables(found: Report) -> list[tuple[str, pd.DataFrame]]:
    """Title and table, in words, of everything that there is to show."""
    classes = [name for name in found.rows.columns if name.startswith("AP ")]
    tables = [("Scores", score_table(found))]
    for title, metrics in (("Errors", ERRORS), ("AP by class", classes), ("Costs", COSTS)):
        tables.append((f"{title}: differences", difference_table(found, metrics)))
    for change in found.conflict["change"].unique():
        folder = found.rows["folder"][found.rows["change"] == change].iloc[0]
        place = SHARED[load_run_config(folder).train.gradients_at]
        tables.append((f"Cosine of gradients at {place}: {change}", _cosines(found, change)))
    if len(found.shapley):
        shares = found.shapley.assign(share=[with_interval(r) for r in _as_difference(found.shapley)])
        columns = [*(["of"] if shares["of"].nunique() > 1 else []), "metric", "term", "share", "seeds"]
        tables.append(("Shapley shares of the terms", shares[columns]))
    return [(title, table) for title, table in tables if len(table)]


def _as_difference(shares: pd.DataFrame) -> list[dict[str, Any]]:
    named: list[dict[str, Any]] = shares.rename(columns={"share": "difference"}).to_dict("records")
    return named


def _cosines(found: Report, change: str) -> pd.DataFrame:
    table = matrix(found.conflict, change, WHOLE)
    sizes = found.norms[(found.norms["change"] == change) & (found.norms["part"] == WHOLE)].set_index("loss")["norm"]
    words = table.map(lambda v: "" if math.isnan(v) else signed(number(v, 2)))
    words.insert(0, f"norm / {DETECTION}", [number(sizes.get(name, math.nan), 2) for name in table.index])
    return words.reset_index(names="loss")


def _latex(found: Report) -> str:
    return "\n\n".join(latex(table, f"{found.name}: {title}.") for title, table in _tables(found)) + "\n"
