"""Run folders: loading, shipping, comparing, listing, pruning."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mini_run import mini_config, one_thread, write_set  # noqa: F401 - one_thread is a fixture
from safetensors.torch import load_file, save_file
from study_fakes import metrics, run_config, write_run

import kdlab
from kdlab.checkpoint import RunFolder, differing_key, write_json
from kdlab.commands.runs import runs
from kdlab.config import DistillConfig, save_config
from kdlab.evaluate import Metrics, evaluate_run
from kdlab.losslog import LossLog, read_losses
from kdlab.runs import compare, describe, list_runs, listing, prune, pruning, run_state, table
from kdlab.sample import CLASSES
from kdlab.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_set(tmp_path_factory.mktemp("runs") / "set")
    path = train(mini_config(root, epochs=1), root.parent / "run", progress=False, cpu=True)
    evaluate_run(path, workers=0, device="cpu")
    return path


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def test_shipped_half_precision_weights(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.json", tmp_path)
    weights = load_file(run / "detector.safetensors")
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}, tmp_path / "detector.safetensors"
    )
    detector = kdlab.load_detector(tmp_path)
    assert all(p.dtype == torch.float32 for p in detector.parameters())


def test_errors_of_loading(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        kdlab.load_detector(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        kdlab.load_detector(tmp_path)
    broken = copy(run, tmp_path / "broken")
    weights = load_file(run / "detector.safetensors")
    weights.pop("head.shared.0.weight")
    save_file(weights, broken / "detector.safetensors")
    with pytest.raises(ValueError, match=r"does not fit its config\.json: lacks .*head\.shared"):
        kdlab.load_detector(broken)
    (broken / "detector.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not finished"):
        kdlab.load_detector(broken)


def test_compare(run: Path, tmp_path: Path) -> None:
    other = copy(run, tmp_path / "other")
    plain = json.loads((other / "metrics.json").read_text())
    plain["tiny_val"]["mean_ap"] = 0.9
    write_json(other / "metrics.json", plain)
    table = compare([run, other])
    assert table.split == "tiny_val" and table.names == ("run", "other")
    assert table.best("mAP") == 1 and table.rows["mAP"][1] == 0.9
    assert {"NDS", "mATE", "mASE", "mAOE", "mAVE", "mAAE", "AP car"} <= table.rows.keys()
    assert "**0.9000**" in table.markdown() and "0.9000*" in table.text() and "No ground truth" in table.text()
    assert table.metrics["other"].mean_ap == 0.9
    write_json(other / "metrics.json", {"tiny_val": {**plain["tiny_val"], "data": "elsewhere"}})
    with pytest.raises(ValueError, match="different data sets"):
        compare([run, other])
    (other / "metrics.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"other has no metrics on tiny_val; .*: kdlab evaluate --run .*other --data .*set --split tiny_val",
    ):
        compare([run, other])
    with pytest.raises(ValueError, match="at least one"):
        compare([])


def test_same_names_are_told_apart(run: Path, tmp_path: Path) -> None:
    paths = [copy(run, tmp_path / name / "run") for name in ("a", "b")]
    assert compare(paths).names == ("a/run", "b/run")


def test_describe(run: Path, tmp_path: Path) -> None:
    assert describe(run) == "lidar"
    other = copy(run, tmp_path / "other")
    config = replace(mini_config(tmp_path, "camera"), distill=DistillConfig("unidistill", "t", "released"))
    save_config(config, other / "config.json")
    assert describe(other) == "camera + unidistill (released)"


def test_runs_of_a_study_are_labelled_by_change_and_seed(tmp_path: Path) -> None:
    paths = []
    for seed in (0, 1):
        paths.append(
            write_run(tmp_path / "kd" / f"seed{seed}-x", run_config(seed, ["feature", "relation"]), metrics(0.2))
        )
        write_json(paths[-1] / "trial.json", {"change": "kd", "seed": seed})
    paths.append(write_run(tmp_path / "alone", run_config(0), metrics(0.2)))
    assert compare(paths).names[:2] == ("kd seed 0", "kd seed 1") and compare(paths).names[2].endswith("alone")
    assert describe(paths[0]) == "camera + unidistill without response_class, response_regression"
    write_json(paths[1] / "trial.json", {"change": "kd", "seed": 0})  # of another study
    assert compare(paths[:2]).names == ("seed0-x", "seed1-x")


def test_loss_log_holds_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    log = LossLog(path, 0)
    for step in range(5):
        log.add({"step": step, "total": 0.1 * step})
    log.close()
    with path.open("a") as file:
        file.write("5,0.")  # a kill in the middle of a row
    log = LossLog(path, 3)
    log.add({"step": 3, "total": 7.0})
    with pytest.raises(RuntimeError, match="losses are step, other"):
        log.add({"step": 4, "other": 7.0})
    log.close()
    assert [(r["step"], r["total"]) for r in read_losses(path)] == [(0, 0), (1, 0.1), (2, 0.2), (3, 7)]


def test_differing_key() -> None:
    assert differing_key({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert differing_key({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b"
    assert differing_key({"a": None}, {"a": {"b": 2}}) == "a"


def test_metrics_of_few_classes() -> None:
    counts = {name: int(name == "car") for name in CLASSES}
    aps = {name: {"2.0": 0.5 if name == "car" else 0.0} for name in CLASSES}
    few = Metrics("s", 1, 0.05, 0.1, {}, aps, {}, counts)
    assert few.present == ["car"] and few.mean_ap_present == 0.5


def test_import_is_light() -> None:
    heavy = ("torch", "open3d", "nuscenes", "timm", "accelerate")
    code = f"import sys, kdlab; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def aged(run: Path, days: float = 30.0) -> Path:
    """A run in which nothing was written for so many days."""
    then = time.time() - days * 86400
    for path in [*run.rglob("*"), run]:
        os.utime(path, (then, then), follow_symlinks=False)
    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A teacher, a finished student of it, an unfinished run, a failed one; all of them old."""
    root = tmp_path / "runs"
    write_run(root / "teacher", run_config(7, epochs=5), metrics(0.5))
    student = write_run(root / "a" / "student", run_config(1, ["feature"], "../runs/teacher"), metrics(0.25))
    for name in ("results_sim_test.json", "results_val.json", "losses.csv", "notes.txt"):
        (student / name).write_text("x" * 100)
    for name in ("tensorboard/events", "checkpoint/state.pt"):
        (student / name).parent.mkdir()
        (student / name).write_text("x" * 1000)
    open_run = write_run(root / "b" / "unfinished", run_config(2), finished=False)
    (open_run / "checkpoint").mkdir()
    (open_run / "checkpoint" / "state.pt").write_text("x" * 500)
    failed = write_run(root / "b" / "failed", run_config(3), finished=False)
    (failed / "error.txt").write_text("12:00\n\nloss is NaN\n")
    for run in (root / "teacher", student, open_run, failed):
        aged(run)
    return root


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_list(root: Path) -> None:
    found = {str(info.path.relative_to(root)): info for info in list_runs(root)}
    assert {name: info.state for name, info in found.items()} == {
        "a/student": "finished",
        "b/failed": "failed",
        "b/unfinished": "unfinished",
        "teacher": "finished",
    }
    student = found["a/student"]
    assert (student.modality, student.method, student.seed, student.teacher) == (
        "camera",
        "unidistill",
        1,
        "../runs/teacher",
    )
    assert student.metrics["sim_test"].mean_ap == 0.25 and student.age == pytest.approx(30 * 86400, abs=60)
    assert student.size == sum(p.stat().st_size for p in student.path.rglob("*") if p.is_file())
    assert found["teacher"].epochs == 5 and len(found["teacher"].config_hash) == 12
    assert run_state(root / "b" / "failed") == ("failed", "loss is NaN")
    assert [info.path for info in list_runs(root / "teacher")] == [root / "teacher"]


def test_list_leaves_other_folders_out(root: Path, tmp_path: Path) -> None:
    for name, text in (("other", "{}"), ("broken", "{"), ("list", "[]")):
        (root / name).mkdir()
        (root / name / "config.json").write_text(text)
    exported = copy(root / "teacher", root / "exported")
    (exported / "detector.safetensors").rename(exported / "model.safetensors")
    copy(root / "teacher", root / "world" / "samples" / "x")
    (root / "world" / "v1.0-sim").mkdir()
    outside = copy(root / "teacher", tmp_path / "outside")
    (root / "link").symlink_to(outside)
    assert len(list_runs(root)) == 4
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_runs(tmp_path / "none")


def test_a_broken_file_is_named_and_blocks_no_other(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = root / "a" / "student"
    (student / "metrics.json").write_text("{")
    aged(student)
    found = {info.path: info for info in list_runs(root)}
    assert found[student].state == "broken" and str(student / "metrics.json") in found[student].why
    assert len(found) == 4 and "cannot be read" in table(list(found.values()))
    assert not any(student in path.parents for path in prune(root, ["checkpoints", "unfinished"]).paths)
    shutil.rmtree(root / "b")
    monkeypatch.setattr(listing, "find_runs", lambda _: [root / "b" / "failed", root / "teacher"])
    assert [info.path for info in list_runs(root)] == [root / "teacher"]


def test_the_teacher_of_a_study_stays(root: Path) -> None:
    shutil.rmtree(root / "a")
    plan = {"base": {"distill": None}, "changes": [{"name": "kd", "set": {"distill.teacher": "runs/teacher"}}]}
    (root / "s").mkdir()
    write_json(root / "s" / "study.json", plan)
    with pytest.raises(ValueError, match=r"is the teacher of .*study\.json"):
        prune(root, runs=[root / "teacher"], yes=True)
    assert (root / "teacher" / "detector.safetensors").exists()


def test_a_camera_start_stays(root: Path) -> None:
    started = run_config(4)
    started = replace(started, train=replace(started.train, camera_start="runs/teacher"))
    shutil.rmtree(root / "a")
    aged(write_run(root / "started", started))
    with pytest.raises(ValueError, match=r"teacher is the camera start of .*started, which names it"):
        prune(root, runs=[root / "teacher"], yes=True)
    shutil.rmtree(root / "started")
    write_json(root / "s" / "study.json", {"base": {"train": {"camera_start": "runs/teacher"}}, "changes": []})
    with pytest.raises(ValueError, match=r"is the camera start of .*study\.json"):
        prune(root, runs=[root / "teacher"], yes=True)
    shutil.rmtree(root / "s")
    other = aged(write_run(root / "other", run_config(4)))
    (other / "versions.json").write_text(json.dumps({"camera_start": RunFolder(root / "teacher").digest}))
    with pytest.raises(ValueError, match=r"teacher is the camera start of .*other"):
        prune(root, runs=[root / "teacher"], yes=True)


def test_a_run_that_begins_meanwhile_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = root / "b" / "failed"
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        aged(run)
        monkeypatch.setattr(pruning, "_locked", lambda _: False)
        found = prune(root, ["unfinished"], yes=True)
    assert found.kept == {run: "is being trained"} and (run / "config.json").exists()
    assert not (root / "b" / "unfinished").exists()


def test_prune_says_what_it_would_do(root: Path) -> None:
    before = files(root)
    found = prune(root, ["checkpoints", "results", "tensorboard", "unfinished"])
    assert files(root) == before and not found.done and "--yes removes it" in found.text()
    done = prune(root, ["checkpoints", "results", "tensorboard", "unfinished"], yes=True)
    assert done.paths == found.paths and done.text().endswith("MB removed")
    assert files(root) == {
        *(f"teacher/{name}" for name in ("config.json", "versions.json", "metrics.json", "detector.safetensors")),
        *(f"a/student/{name}" for name in ("config.json", "versions.json", "metrics.json", "detector.safetensors")),
        *(f"a/student/{name}" for name in ("losses.csv", "notes.txt", "results_val.json")),  # val has no metrics
    }
    assert not (root / "b" / "failed").exists() and not (root / "a" / "student" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("kind", "gone"),
    [
        ("checkpoints", {"a/student/checkpoint"}),
        ("results", {"a/student/results_sim_test.json"}),
        ("tensorboard", {"a/student/tensorboard"}),
    ],
)
def test_prune_one_kind(root: Path, kind: str, gone: set[str]) -> None:
    assert {str(p.relative_to(root)) for p in prune(root, [kind]).paths} == gone  # type: ignore[list-item]


def test_prune_keeps_young_and_busy_runs(root: Path) -> None:
    aged(root / "b" / "failed", 3)
    with open(root / "b" / "unfinished" / ".lock", "w") as lock:
        aged(root / "b" / "unfinished")
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = prune(root, ["unfinished"])
        assert not found.paths and found.kept == {
            root / "b" / "failed": "was written 3.0 days ago, less than 7",
            root / "b" / "unfinished": "is being trained",
        }
    assert {p.parent.name for p in prune(root, ["unfinished"], older_than=2).paths} == {"failed", "unfinished"}
    (root / "b" / "failed" / "losses.csv").write_text("step")  # just now
    why = prune(root, ["unfinished"], older_than=0).kept[root / "b" / "failed"]
    assert why.startswith("was written ") and why.endswith(" s ago and may be in use")


def test_prune_keeps_what_no_run_writes(root: Path) -> None:
    (root / "b" / "failed" / "notes.txt").write_text("why?")
    aged(root / "b" / "failed")
    prune(root, ["unfinished"], yes=True)
    assert files(root / "b") == {"failed/notes.txt"}


def test_weights_go_only_by_name(root: Path) -> None:
    found = prune(root, runs=[root / "a" / "student"], yes=True)
    assert root / "a" / "student" / "detector.safetensors" in found.paths
    assert files(root / "a") == {"student/notes.txt"} and (root / "teacher" / "detector.safetensors").exists()
    prune(root, runs=[root / "teacher"], yes=True)  # nobody's teacher any more
    assert not (root / "teacher").exists()


def test_a_teacher_stays(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher is the teacher of .*student, which names it"):
        prune(root, runs=[root / "a" / "student", root / "teacher"], yes=True)
    shutil.move(root / "teacher", root / "moved")  # the weights tell who it was
    digest = hashlib.sha256((root / "moved" / "detector.safetensors").read_bytes()).hexdigest()[:12]
    (root / "a" / "student" / "versions.json").write_text(json.dumps({"teacher": digest}))
    with pytest.raises(ValueError, match="moved is the teacher of"):
        prune(root, runs=[root / "moved"], yes=True)
    pupil = write_run(root / "pupil", run_config(0, ["feature"], str(root / "b" / "unfinished")), finished=False)
    kept = prune(aged(pupil).parent, ["unfinished"], yes=True).kept
    assert kept == {root / "b" / "unfinished": f"is the teacher of {pupil}"}
    assert (root / "b" / "unfinished" / "checkpoint").exists()


def test_prune_never_leaves_the_root(root: Path, tmp_path: Path) -> None:
    outside = aged(write_run(tmp_path / "outside", run_config(9), finished=False))
    (outside / "tensorboard").mkdir()
    (outside / "tensorboard" / "events").write_text("x")
    before = files(tmp_path / "outside")
    (root / "link").symlink_to(outside)
    student = root / "a" / "student"
    shutil.rmtree(student / "tensorboard")
    (student / "tensorboard").symlink_to(outside / "tensorboard")
    (student / "results_sim_test.json").unlink()
    (student / "results_sim_test.json").symlink_to(outside / "config.json")
    (student / "checkpoint" / "elsewhere").symlink_to(outside)
    aged(student)
    prune(root, ["checkpoints", "results", "tensorboard", "unfinished"], yes=True)
    assert files(tmp_path / "outside") == before and not (student / "checkpoint").exists()
    for run in (outside, root / "link", root / "a", tmp_path / "none"):
        with pytest.raises(ValueError, match=r"is no run folder at or below .*; nothing was removed"):
            prune(root, runs=[run], yes=True)
    with pytest.raises(ValueError, match="unknown kind 'weights'"):
        prune(root, ["weights"])  # type: ignore[list-item]


def test_a_run_that_is_being_written_cannot_be_named(root: Path) -> None:
    (root / "a" / "student" / "losses.csv").write_text("step")
    with pytest.raises(ValueError, match=r"student was written \d+ s ago and may be in use; nothing was removed"):
        prune(root, runs=[root / "a" / "student"], yes=True)
    assert (root / "a" / "student" / "config.json").exists()


def test_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs([str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].split()[:3] == ["run", "state", "detector"]
    assert "a/student" in lines[1] and "sim_test mAP 0.250 NDS 0.300" in lines[1] and "30 d" in lines[1]
    before = files(root)
    assert runs([str(root), "--prune", "results", "unfinished", "--older-than", "2"]) == 0
    assert "would be removed" in capsys.readouterr().out and files(root) == before
    assert runs([str(root), "--prune", "unfinished", "--yes"]) == 0
    assert runs([str(root), "--runs", str(root / "a" / "student"), "--yes"]) == 0
    assert {name.split("/")[0] for name in files(root)} == {"teacher", "a"} and files(root / "a") == {
        "student/notes.txt"
    }
    assert runs([str(root / "a")]) == 0
    assert "no run folder at or below" in capsys.readouterr().out
