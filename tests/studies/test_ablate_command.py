"""`kdlab ablate`: what it hands on to the report."""

from pathlib import Path
from typing import Any

import pytest
from study_fakes import run_config, write_study

from kdlab import studies
from kdlab.checkpoint import write_json
from kdlab.commands import report as reporting
from kdlab.commands.ablate import ablate
from kdlab.studies.load import plain_study
from kdlab.studies.plan import Study
from kdlab.studies.run import Outcome


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = write_study(tmp_path / "s", {}, seeds=2)
    plan = Study("s", run_config(), (), (0, 1), "sim_test", folder)
    write_json(folder / "study.json", {**plain_study(plan), "trials": []})
    return folder


def test_options_of_the_report(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(reporting, "report", lambda folder, **options: seen.append(options) or "")
    words = ["--intervals", "bootstrap", "--level", "0.9", "--worth", "mAP", "0.01", "NDS", "0.02", "--other-data"]
    assert ablate([str(study), "--report-only", *words]) == 0
    assert ablate([str(study), "--report-only"]) == 0
    given = {"method": "bootstrap", "level": 0.9, "worth": {"mAP": 0.01, "NDS": 0.02}, "other_data": True}
    assert seen == [given, {"method": "t", "level": 0.95, "worth": {}, "other_data": False}]


def test_wrong_options_are_refused_before_anything_runs(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "run_study", None, raising=False)
    for words, message in ((["--level", "95"], "between 0 and 1"), (["--worth", "mPA", "1"], "unknown metric 'mPA'")):
        with pytest.raises(ValueError, match=message):
            ablate([str(study), *words])


def test_failed_runs_are_named_before_the_report(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(of: Study, *_: Any, **__: Any) -> Outcome:
        return Outcome(of.out, 1, ((of.trials()[0], "loss is NaN"),))

    monkeypatch.setattr(studies, "run_study", fails, raising=False)
    assert ablate([str(study)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("FAILED: base seed 0: loss is NaN") and "written in" in said
