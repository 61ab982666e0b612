"""`kdlab train`: options that say nothing without others."""

from pathlib import Path

import pytest

from kdlab import cli


@pytest.mark.parametrize(
    "option", ["--teacher x", "--scale 2", "--variant released", "--quirks x", "--weights feature 2"]
)
def test_options_of_a_distillation_want_a_method(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["train", "tiny", "camera", "--out", str(out), *option.split()]) == 1
    assert "want a distillation: name its --method" in capsys.readouterr().err and not out.exists()
