"""`kdlab methods`: what a person sees of a method, and the committed errata."""

from pathlib import Path

import pytest

from kdlab import cli
from kdlab.distill import METHODS
from kdlab.presets import SCALES

ERRATA = Path(__file__).resolve().parents[2] / "docs" / "errata.md"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["methods", *words]) == 0
    return capsys.readouterr().out


def test_committed_errata_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--errata") == ERRATA.read_text(), "run: kdlab methods --errata > docs/errata.md"


def test_errata_hold_every_quirk_with_its_evidence_and_switch() -> None:
    text = ERRATA.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and "`--quirks " in line]
    rows = {line.rpartition("`--quirks ")[2].partition("`")[0]: line for line in lines}
    quirks = {q.name: q for paper in METHODS.values() for pair in paper.pairs for q in paper(*pair).quirks}
    assert set(rows) == set(quirks)
    for name, quirk in quirks.items():
        parts = (quirk.what, quirk.means, f"| {quirk.where} |", *((quirk.student,) if quirk.student else ()))
        assert all(part.replace("|values|", r"\|values\|") in rows[name] for part in parts)
    for paper in METHODS.values():
        assert len(paper.differences) >= 3
        assert {f"* {difference}" for difference in paper.differences} <= set(text.splitlines())
    for line in lines:
        evidence = line.split(" | ")[3].split("; ")
        assert len(set(evidence)) == len(evidence)


def test_everything_of_a_method_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for name, paper in METHODS.items():
        text, method = said(capsys, name, "--variant", "released"), paper(*paper.pairs[0])
        parts = [*method.terms, *method.adapters, *method.quirks, *method.stages, *paper.options]
        assert all(part.name in text for part in parts)
        assert all(part.source in text for part in [*method.terms, *method.adapters, *method.start])
        assert all(q.evidence in text and q.means in text for q in method.quirks)


def test_scales_options_pairs_and_sums(capsys: pytest.CaptureFixture[str]) -> None:
    def row(text: str, term: str) -> list[str]:
        return next(line.split() for line in text.splitlines() if line.startswith(f"{term} "))

    assert row(said(capsys, "unidistill"), "feature")[3:6] == ["100", "1", "100"]
    scale = SCALES["tiny", "unidistill"]["feature"]
    tuned = row(said(capsys, "unidistill", "--preset", "tiny"), "feature")[3:6]
    assert tuned == ["100", f"{scale:g}", f"{100 * scale:g}"] and scale != 1
    assert row(said(capsys, "unidistill", "--student", "lidar"), "feature")[3] == "10"
    assert "; a weight for fusion to camera, not for lidar to camera" in said(
        capsys, "simdistill", "--teacher", "lidar"
    )
    other = said(capsys, "unidistill", "--options", "path", "F2C")  # although the paper has lidar to camera
    assert "weight F2C:500-505; a weight for fusion to camera, not for lidar to camera" in other
    assert "camera teacher -> lidar student" in said(capsys, "unidistill", "--teacher", "camera")
    whole = said(capsys, "distillbev", "--options", "regions", "whole", "positions", "H")
    assert "background_H" in whole and "foreground" not in whole.partition("adapter")[0]
    both = said(capsys, "unidistill+labeldistill")
    assert "label_0" in both and "relation" in both and "partition" in both and "label_encoder" in both
    for words, problem in (
        (["nope"], "unknown method 'nope'"),
        (["unidistill", "--preset", "nope"], "unknown preset 'nope'; known: tiny"),
        (["unidistill", "--options", "levels", "0"], "unknown option 'levels'; known: path, adapt"),
        (
            ["distillbev", "--preset", "tiny", "--options", "positions", "B0,H"],
            "distillbev: no preset scale for foreground_B0, background_B0, spatial_B0, which the options add; give a "
            "weight to each: --weights foreground_B0 X",
        ),
    ):
        assert cli.main(["methods", *words]) == 1
        assert problem in capsys.readouterr().err
