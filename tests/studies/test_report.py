"""The report of a study: words and files."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from study_fakes import TERMS, run_config, write_gradients, write_study, write_trial

from kdlab.commands.report import report
from kdlab.studies.load import plain_study
from kdlab.studies.plan import Study, Terms
from kdlab.studies.report import analyse, score_table, write_report
from kdlab.studies.text import escape, latex, markdown, number, sentence, signed, significant


def test_plain_words(tmp_path: Path) -> None:
    study = write_study(tmp_path / "mine", {"unidistill": 0.013, "worse": -0.02, "maybe": 0.004})
    write_trial(study, "half", 0, None, finished=False)
    failed = write_trial(study, "half", 1, None, finished=False)
    (failed / "error.txt").write_text("RuntimeError\nloss is NaN\n")
    lines = analyse(study).text.splitlines()
    assert lines[0] == "mine: 20 of 22 trials finished and scored on sim_test."
    assert "half: seed 0 unfinished." in lines and "half: seed 1 failed: loss is NaN." in lines
    assert "unidistill BEATS the base on mAP by 0.013 (95 % 0.008..0.018, 5 seeds)." in lines
    assert any(re.match(r"worse DOES NOT BEAT the base on mAP: difference −0\.020 \(95 % −", line) for line in lines)
    assert any(
        re.match(r"maybe is INCONCLUSIVE .*; about \d+ seeds would settle it if mean and spread stay\.", line)
        for line in lines
    )
    assert any(line.startswith("unidistill costs 1.39 x the training time; the same training memory") for line in lines)
    assert lines[-1].startswith("3 changes were compared") and lines[-1].endswith("on mAP, every BEATS stands.")


def test_holm_is_said(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"x": 0.005, **{f"same{i}": 0.0 for i in range(4)}}, spread=0.0038)
    found = analyse(study)
    assert "x BEATS the base on mAP" in found.text
    assert "comparisons on mAP, x no longer BEATS the base." in found.text
    assert found.verdicts.set_index(["change", "metric"]).loc[("x", "mAP"), "adjusted"] == "INCONCLUSIVE"
    names = list(score_table(found).columns)
    assert (
        names[names.index("mAP verdict") + 1] == "mAP verdict (Holm)" and "with Holm's correction for 5" in found.text
    )


def test_files_hold_the_tables(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"uni_distill & more": 0.013}, seeds=3)
    for run in (study / "uni_distill & more").iterdir():
        write_gradients(run, {("detection", "kd/feature"): [-0.5, 0.25, -0.5]})
    found = write_report(study)
    assert [p.name for p in found.files] == ["results.csv", "verdicts.csv", "study.md", "study.tex"]
    assert len(pd.read_csv(study / "results.csv")) == len(found.rows) == 6
    stored = pd.read_csv(study / "verdicts.csv", float_precision="round_trip")
    assert np.array_equal(stored["difference"], found.verdicts["difference"], equal_nan=True)
    page, tex = (study / "study.md").read_text(), (study / "study.tex").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| uni_distill & more | 3 |"))
    assert "**BEATS**" in row and row.count("|") == page.splitlines()[page.splitlines().index(row) - 3].count("|")
    assert "| detection | 1.00 |  | −0.25 |" in page and "Student's t" in page
    assert r"uni\_distill \& more & 3 &" in tex and r"\toprule" in tex and "BEATS" in tex
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == page.count("\n## ")
    assert tex.isascii() and "nan" not in page.replace("finance", "")


def test_shapley_in_the_report(tmp_path: Path) -> None:
    for seed in (0, 1):
        for on, ap in (((), 0.2), (TERMS[:1], 0.22), (TERMS[1:2], 0.21), (TERMS[:2], 0.25)):
            write_trial(tmp_path, "+".join(on) or "base", seed, ap, on or None)
    found = write_report(tmp_path)
    assert found.shapley.set_index(["metric", "term"]).loc[("mAP", "feature"), "share"] == pytest.approx(0.03)
    assert "| mAP | feature | +0.030 [" in (tmp_path / "study.md").read_text()
    assert not found.shapley_note


def test_half_finished_studies(tmp_path: Path) -> None:
    assert "Nothing to compare yet: no run of the base is finished." in report(tmp_path)
    write_trial(tmp_path, "x", 0, 0.2, ["feature"])
    assert "no run of the base is finished" in write_report(tmp_path).text
    assert len(pd.read_csv(tmp_path / "verdicts.csv")) == 0
    write_trial(tmp_path, "base", 0, 0.2)
    assert "(1 seed has no interval; run at least two)" in write_report(tmp_path).text
    page = (tmp_path / "study.md").read_text()
    assert "No Shapley shares" not in page and "`train.gradients_every = 50` under `[set]`" in page


def test_verdicts_are_preliminary_while_their_runs_are_missing(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"x": 0.013, "y": 0.02})
    write_trial(study, "x", 7, None, finished=False)
    lines = analyse(study).text.splitlines()
    assert any(line.startswith("x BEATS") and line.endswith("; PRELIMINARY: 1 run is missing.") for line in lines)
    assert not any("PRELIMINARY" in line for line in lines if line.startswith("y "))


def test_what_cannot_be_judged_is_a_line_of_the_report(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"x": 0.01}, seeds=2)
    again = next((study / "x").glob("seed0-*"))
    shutil.copytree(again, again.with_name("seed0-again"))
    found = write_report(study)
    assert "No verdicts: x has 2 runs of seed 0: " in found.text and len(pd.read_csv(study / "results.csv")) == 5


def test_subsets_are_asked_for_by_the_study_alone(tmp_path: Path) -> None:
    base = run_config()
    study = Study("s", base, (), (0,), "sim_test", tmp_path, terms=Terms("subsets", "unidistill", "t", TERMS[:2]))
    runs = [
        write_trial(tmp_path, "+".join(on) or "base", 0, 0.2, on or None) for on in ((), TERMS[:1], TERMS[:2], TERMS)
    ]
    trials = [
        {
            "change": run.parent.name,
            "seed": 0,
            "folder": f"{run.parent.name}/{run.name}",
            "command": [],
            "evaluation": [],
        }
        for run in runs
    ]
    for terms, said in ((study.terms, True), (Terms("each-off", "unidistill"), False), (None, False)):
        plan = {**plain_study(replace(study, terms=terms)), "trials": trials}
        (tmp_path / "study.json").write_text(json.dumps(plan))
        note = analyse(tmp_path).shapley_note
        assert ("all 4 subsets of feature, relation; missing: relation (seed 0)" in note) == said and bool(note) == said


def test_a_base_alone(tmp_path: Path) -> None:
    write_trial(tmp_path, "base", 0, 0.2)
    assert "no run of any other change is finished" in analyse(tmp_path).text


def test_another_data_set_is_said(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"x": 0.01}, seeds=2)
    for seed in (0, 1):
        write_trial(study, "night", seed, 0.1, data="other")
    words = "night is NOT COMPARABLE with the base on mAP: another data set than the reference's."
    assert words in analyse(study).text
    assert words not in analyse(study, other_data=True).text


def test_the_command_draws_and_names_the_files(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", {"x": 0.01}, seeds=2)
    text = report(study, method="bootstrap", level=0.9)
    assert "(90 %" in text and f"written in {study}: results.csv" in text and "figures/differences.png" in text
    assert (study / "figures" / "differences.pdf").stat().st_size > 1000
    assert "![differences](figures/differences.png)" in (study / "study.md").read_text()


def test_numbers() -> None:
    assert [number(v) for v in (0.01234, -0.5, -0.0001, 12345.6, math.nan)] == [
        "0.012",
        "−0.500",
        "0.000",
        "12,300",
        "-",
    ]
    assert [significant(v) for v in (0.00012345, -40.0, 0.0, 1234.0)] == ["0.000123", "−40", "0", "1,230"]
    assert [signed(number(v)) for v in (0.5, -0.5, 0.0, math.nan)] == ["+0.500", "−0.500", "0.000", "-"]


def test_sentence_of_an_error() -> None:
    row = {"change": "x", "metric": "mATE", "verdict": "BEATS", "difference": -0.02, "low": -0.03, "high": -0.01}
    row |= {"seeds": 4, "level": 0.95, "note": ""}
    assert sentence(row) == "x BEATS the base on mATE by 0.020 less (95 % 0.010..0.030, 4 seeds)."
    row |= {"verdict": "INCONCLUSIVE", "seeds_needed": math.inf}
    assert "more than 1000 seeds would settle it" in sentence(row)
    row |= {"seeds": 0}
    assert "no seed with a number of both" in sentence(row)


def test_tables_are_escaped() -> None:
    table = pd.DataFrame({"a|b": ["50 % & $1_{x}^2~\\#"], "c": [1]})
    assert markdown(table).splitlines()[0] == "| a\\|b | c |"
    lines = latex(table, "A & B").splitlines()
    assert lines[0] == r"\begin{table}" and r"\caption{A \& B}" in lines[2]
    assert escape("50 % & $1_{x}^2~\\#") == r"50 \% \& \$1\_\{x\}\textasciicircum{}2\textasciitilde{}\textbackslash{}\#"
