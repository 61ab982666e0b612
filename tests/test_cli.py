"""The command line: help, errors, exit codes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture

from kdlab import cli
from kdlab.config import RunConfig, load_config
from kdlab.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("cli") / "set")


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    return train(mini_config(root, epochs=1), root.parent / "run", progress=False, cpu=True)


SMALL = """--detector.grid.cell 6.4 --detector.lidar.channels 8 --detector.lidar.sweeps 1 --detector.bev.channels 8
--detector.bev.stages 16 16 --detector.bev.blocks 1 1 --detector.bev.neck 16 --detector.head.channels 8
--detector.camera.image-size 32 64 --detector.camera.channels 8 --detector.camera.context 8
--data.train all --data.val tiny_val --data.workers 0 --train.batch-size 2 --cpu""".split()  # noqa: SIM905


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = cli.main(list(args))
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("kdlab: error: ")
    return code, said[0].removeprefix("kdlab: error: ")


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(
        name in out
        for name in (
            *("simulate", "train", "evaluate", "compare", "runs", "ablate"),
            *("methods", "parity", "doctor", "demo", "overfit"),
        )
    )
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = "print([m for m in ('torch', 'timm', 'nuscenes') if m in sys.modules])"
    code = f"import sys; from kdlab.cli import main; main(['--help']); {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command", ["simulate", "train", "evaluate", "compare", "runs", "ablate", "methods", "parity", "doctor"]
)
def test_help_of_a_command_shows_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"kdlab {command}" in out and ("default" in out or command in ("parity", "doctor"))


def test_help_of_train_shows_the_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "small", "camera", "--help"])
    assert "resnet18" in capsys.readouterr().out


def test_train_evaluate_compare(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert (
        cli.main(
            ["train", "tiny", "lidar", "--data", str(root), "--out", str(out), "--epochs", "1", "--seed", "3", *SMALL]
        )
        == 0
    )
    config = load_config(RunConfig, out / "config.json")
    assert (config.train.epochs, config.train.seed, config.data.root, config.train.batch_size) == (1, 3, str(root), 2)
    assert (
        cli.main(["evaluate", "--data", str(root), "--split", "all", "--run", str(out), "--cpu", "--workers", "0"]) == 0
    )
    assert "mAP" in capsys.readouterr().out
    assert cli.main(["compare", str(out), "--markdown", "--figure", str(tmp_path / "f.svg")]) == 0
    assert "| mAP |" in capsys.readouterr().out and (tmp_path / "f.svg").exists()


def test_train_from_a_config(root: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "again"
    assert cli.main(["train", str(run / "config.json"), "--out", str(out), "--cpu"]) == 0
    assert (out / "detector.safetensors").read_bytes() == (run / "detector.safetensors").read_bytes()
    before = (run / "detector.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert cli.main(["train", str(run), "--out", str(run)]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert (run / "detector.safetensors").stat().st_mtime_ns == before
    for words, text in (
        (
            (str(run), "--out", str(out), "--epochs", "3"),
            "--epochs: .* decides everything; beside it go --out, --restart",
        ),
        ((str(tmp_path / "none.json"), "--out", str(out)), "none.json"),
    ):
        code, said = error_of(capsys, "train", *words)
        assert code == 1 and re.search(text, said)


STUDY = """
name = "mini"
base = "{base}"
seeds = [0]
[changes.slow]
train.lr = 1e-4
[changes.diverges]
train.lr = 1e30
"""


def test_ablate_lists(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.toml").write_text(STUDY.format(base=run))
    words = ["ablate", str(tmp_path / "study.toml"), "--out", str(tmp_path / "s"), "--cpu"]
    assert cli.main([*words, "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in listed[::2]] == [["missing", n] for n in ("base", "slow", "diverges")]
    assert "kdlab train " in listed[1] and f"kdlab evaluate --run {tmp_path / 's' / 'base'}" in listed[1]
    assert not (tmp_path / "s").exists()
    (tmp_path / "study.toml").write_text(STUDY.format(base=run) + "spede = 3\n")
    code, said = error_of(capsys, *words)
    assert code == 1 and said.startswith(f"{tmp_path / 'study.toml'}: changes.diverges: unknown key 'spede'; known in")
    assert error_of(capsys, "ablate", str(tmp_path / "s.toml"))[1].endswith("s.toml: no such study")


@pytest.mark.slow
def test_ablate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.toml").write_text(STUDY.format(base=run))
    words = ["ablate", str(tmp_path / "study.toml"), "--out", str(tmp_path / "s"), "--cpu"]
    assert cli.main(words) == 1
    said = capsys.readouterr().out
    assert "slow seed 0: done in" in said and "FAILED: diverges seed 0: " in said
    assert (tmp_path / "s" / "study.toml").read_text() == STUDY.format(base=run)
    finished = (tmp_path / "s" / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in finished[1:]] == ["base", "slow"]
    (tmp_path / "s" / "results.csv").unlink()
    assert cli.main(["ablate", str(tmp_path / "s"), "--report-only"]) == 0
    assert (tmp_path / "s" / "results.csv").read_text().splitlines() == finished


def test_distil(root: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    words = [
        "train",
        "tiny",
        "camera",
        "--data",
        str(root),
        "--out",
        str(out),
        "--train.epochs",
        "1",
        "--method",
        "unidistill",
    ]
    words += [
        "--teacher",
        str(run),
        "--variant",
        "released",
        "--quirks",
        "unidistill.truncate_centre",
        "--weights",
        "feature",
        "2",
    ]
    small = [w for w in SMALL if w != "--detector.lidar.sweeps"]
    small.remove("1")
    small[small.index("6.4")] = "3.2"
    assert cli.main([*words, *small]) == 0
    config = load_config(RunConfig, out / "config.json").distill
    assert config is not None and config.variant == "released" and config.weights == {"feature": 2.0}
    assert config.quirks == ("unidistill.truncate_centre",)


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    assert "unidistill" in capsys.readouterr().out
    assert cli.main(["methods", "unidistill", "--variant", "released"]) == 0
    assert "UniDistill (CVPR 2023)" in capsys.readouterr().out


def test_user_errors_are_one_line(root: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert error_of(capsys, "trian") == (2, f"no command 'trian'; did you mean train? known: {', '.join(cli.COMMANDS)}")
    for words, text in (
        (["train", "tiny", "lidar", "--out", out, "--data", str(tmp_path / "none")], "no data set at"),
        (["train", "--out", out, "tiny", "lidar"], "PRESET and MODALITY must be the first two words"),
        (["train", "tiny", "camera", "--out", out, "--teacher", "x"], "name its --method"),
        (["train", "tiny", "camera", "--out", out, "--method", "unidistill"], "unidistill needs a teacher"),
        (["train", "tiny", "lidar", "--out", str(run), "--data", str(root)], "holds a run of another config"),
        (["evaluate", "--run", str(tmp_path / "none")], "no such run folder"),
        (["compare", str(run)], "kdlab evaluate --run"),
        (["methods", "nonsense"], "unknown method 'nonsense'; known: unidistill"),
    ):
        code, said = error_of(capsys, *words)
        assert code == 1 and text in said


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_file_is_one_line(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: str
) -> None:
    data = shutil.copytree(root, tmp_path / "set")
    file = sorted((data / "samples" / "LIDAR_TOP").iterdir())[0]
    file.write_bytes(file.read_bytes()[:-1])
    words = ["train", "tiny", "lidar", "--data", str(data), "--out", str(tmp_path / "out"), *SMALL]
    words[words.index("--data.workers") + 1] = workers
    assert cli.main(words) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if "Training" not in line]
    assert said[-1].startswith(f"kdlab: error: {file} is cut off: ") and "Traceback" not in "".join(said)


@pytest.mark.parametrize("module", ["kdlab", "kdlab.cli"])
def test_python_m_is_the_command(module: str) -> None:
    def call(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True)

    done, wrong = call("--version"), call("trian")
    assert done.returncode == 0 and done.stdout.startswith("kdlab "), done.stderr
    assert wrong.returncode == 2 and "did you mean train?" in wrong.stderr


def test_wrong_options_exit_with_2() -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "tiny", "lidar", "--nonsense", "1"])
    assert stop.value.code == 2


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["evaluate", "--run", "none", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("KDLAB_DEBUG", "1")
    assert cli.main(["evaluate", "--run", "none"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(args: object) -> int:
        raise KeyboardInterrupt("stopped after step 3")

    monkeypatch.setitem(cli.COMMANDS, "doctor", stop)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "kdlab: stopped after step 3\n"
