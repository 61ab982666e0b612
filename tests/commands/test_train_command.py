"""`kdlab train`: how its words become a config."""

from pathlib import Path

import pytest

import kdlab.train
from kdlab import cli
from kdlab.config import RunConfig, save_config
from kdlab.distill import build_method
from kdlab.presets import PRESETS


@pytest.mark.parametrize(
    "option",
    [
        "--teacher x",
        "--scale 2",
        "--variant released",
        "--quirks x",
        "--weights feature 2",
        "--only feature",
        "--options adapt on",
        "--cache x",
    ],
)
def test_options_of_a_distillation_want_a_method(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["train", "tiny", "camera", "--out", str(out), *option.split()]) == 1
    assert "want a distillation: name its --method" in capsys.readouterr().err and not out.exists()


def config_of(monkeypatch: pytest.MonkeyPatch, words: str) -> RunConfig:
    """What a command would train."""
    seen = []

    def start(config: RunConfig, out: Path, **_: object) -> Path:
        seen.append(config)
        return out

    monkeypatch.setattr(kdlab.train, "train", start)
    assert cli.main(["train", *words.split(), "--out", "nowhere", "--teacher", "no-teacher"]) == 0
    return seen[0]


def test_methods_options_and_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(
        monkeypatch,
        "tiny camera --method unidistill+distillbev --options attention none positions B1,H adapt on "
        "--only feature background_B1 --weights feature 5 --variant released --quirks unidistill.truncate_centre",
    )
    distill = config.distill
    assert distill is not None and distill.method == "unidistill+distillbev"
    assert distill.options == {"attention": "none", "positions": "B1,H", "adapt": "on"}
    assert {"relation", "foreground_B2"} <= set(distill.scales)  # the preset's, of both methods
    method = build_method(distill, "camera", "lidar")
    assert [t.name for t in method.terms] == ["feature", "background_B1"] and method.terms[0].weight == 5
    assert method.terms[1].options["attention"] == "none" and method.terms[1].scale == distill.scales["background_B1"]


def test_simdistill_builds_its_student(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    camera = config_of(monkeypatch, "tiny camera --method simdistill").detector.camera
    assert camera.simulated_lidar and not camera.lidar_depth
    assert "student: detector.camera.simulated_lidar is true, for term cross_modal of simdistill" in (
        capsys.readouterr().out
    )
    words = "tiny camera --method simdistill --variant released --quirks simdistill.shared_lift"
    camera = config_of(monkeypatch, words).detector.camera
    assert camera.simulated_lidar and camera.lidar_depth and camera.corner_reference and not camera.shared_lift
    assert "detector.camera.lidar_depth is true, for quirk simdistill.lidar_depth" in capsys.readouterr().out
    words = "tiny camera --method simdistill --detector.camera.no-simulated-lidar"
    assert not config_of(monkeypatch, words).detector.camera.simulated_lidar
    words = "tiny camera --method simdistill --detector.camera.no-geometry-compensation --detector.fuser gated"
    detector = config_of(monkeypatch, words).detector
    assert not detector.camera.geometry_compensation and detector.fuser == "gated"


def test_one_command_trains_the_teacher_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[tuple[Path, RunConfig]] = []

    def start(config: RunConfig, out: Path, **_: object) -> Path:
        trained.append((out, config))
        out.mkdir(exist_ok=True)
        save_config(config, out / "config.json")
        (out / "detector.safetensors").write_text("")
        return out

    def run(out: str, method: str, sensors: str, *more: str) -> int:
        words = f"--method {method} --teacher {tmp_path / 'teacher'} --train-teacher {sensors} --teacher-epochs 3"
        shared = f"--data {data} --train.batch-size 3 --seed 5 --train.lr 0.5"
        out = str(tmp_path / out)
        return cli.main(["train", "tiny", "camera", "--out", out, *words.split(), *shared.split(), *more])

    data = tmp_path / "set"
    for name in ("scene.json", "sample.json"):
        (data / "v1.0-mini").mkdir(parents=True, exist_ok=True)
        (data / "v1.0-mini" / name).write_text("[]")
    monkeypatch.setattr(kdlab.train, "train", start)
    for words, problem in (
        (("impossible", "simdistill", "lidar"), "teacher.camera_bev"),
        (("teacher", "labeldistill", "lidar"), "are one folder"),
        (("no-start", "labeldistill", "lidar", "--train.camera-start", "none"), "none: no such run folder"),
        (("no-data", "labeldistill", "lidar", "--data.version", "v9"), "holds no version 'v9'"),
    ):
        assert run(*words) == 1 and problem in capsys.readouterr().err, words
    assert not trained and not list(tmp_path.glob("*/config.json"))  # all said before the teacher is trained
    quirk = ("--quirks", "unidistill.wide_teacher_clamp")  # of a fusion teacher alone
    assert run("fusion", "unidistill", "fusion", *quirk, "--teacher", str(tmp_path / "other")) == 0
    trained.clear()
    assert run("run", "labeldistill", "lidar") == 0
    (where, teacher), (out, student) = trained
    assert (where, out) == (tmp_path / "teacher", tmp_path / "run")
    assert teacher.detector.modality == "lidar" and teacher.distill is None and student.distill is not None
    assert (teacher.train.epochs, teacher.train.batch_size, teacher.train.seed) == (3, 3, 5)
    assert teacher.train.lr == PRESETS["tiny"]("lidar").train.lr != student.train.lr
    assert teacher.data.root == student.data.root == str(data)
    assert "a lidar detector is trained first" in capsys.readouterr().out
    assert run("again", "labeldistill", "lidar") == 0 and len(trained) == 3
    assert "finished and taken as it is" in capsys.readouterr().out
    assert run("fused", "simdistill", "fusion") == 1 and "holds a finished lidar detector" in capsys.readouterr().err
    for words, problem in (
        (("--train-teacher", "lidar"), "--train-teacher wants a --method to distil by"),
        (("--teacher-epochs", "3"), "--teacher-epochs wants --train-teacher"),
    ):
        assert cli.main(["train", "tiny", "camera", "--out", str(tmp_path / "x"), *words]) == 1
        assert problem in capsys.readouterr().err


def test_a_papers_plan_is_printed_before_a_new_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kdlab.train, "train", lambda config, out, **_: out)
    monkeypatch.setattr("kdlab.commands.plan.plan_text", lambda *_: "THE PLAN")

    def printed(preset: str, *more: str) -> bool:
        assert cli.main(["train", preset, "lidar", "--out", str(tmp_path), *more]) == 0
        return "THE PLAN" in capsys.readouterr().out

    assert printed("paper-unidistill") and not printed("tiny")
    for name in ("checkpoint/state.pt", "detector.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
        assert not printed("paper-unidistill") and printed("paper-unidistill", "--restart")
