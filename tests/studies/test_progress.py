"""What a running study shows."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mini_run import mini_config

from kdlab.studies import Change, Study, Trial, expand, progress
from kdlab.studies.measured import Measured, load_measured, save_measured
from kdlab.studies.progress import Board, View, duration
from kdlab.studies.status import Steps, steps_of

HEAD = "epoch,step,lr,grad_norm,total,box\n"


def losses(run: Path, text: str) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "losses.csv").write_text(text)
    return run


def test_steps_are_read_from_the_last_whole_line(tmp_path: Path) -> None:
    assert steps_of(tmp_path) == Steps()
    for text, expected in (
        ("", Steps()),
        ("epoch,st", Steps()),
        (HEAD, Steps()),
        (HEAD + "0,0,1e-3,2", Steps()),
        (HEAD + "0,0,1e-3,2,3.5,1\n", Steps(1, 3.5)),
        (HEAD + "0,0,1e-3,2,3.5,1\n0,1,1e-3,2,3.2", Steps(1, 3.5)),
        (HEAD + "".join(f"0,{i},1e-3,2,{i / 8},1\n" for i in range(40_000)), Steps(40_000, 39_999 / 8)),
    ):
        assert steps_of(losses(tmp_path, text)) == expected


def test_a_long_log_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = losses(tmp_path, HEAD + "".join(f"0,{i},1e-3,2,3,1\n" for i in range(10_000)))
    read = []
    real = open

    def counting(path: Path, mode: str) -> object:
        file = real(path, mode)
        read.append(file)
        return file

    monkeypatch.setattr("kdlab.studies.status.open", counting, raising=False)
    monkeypatch.setattr("kdlab.studies.status._TAIL", 100)
    assert steps_of(run) == Steps(10_000, 3.0)
    assert len(read) == 1


def test_durations() -> None:
    assert [duration(s) for s in (4.4, 89, 91, 3570, 3600, 11_100)] == [
        "4 s", "89 s", "2 min", "1 h 00 min", "1 h 00 min", "3 h 05 min"
    ]  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def trials(out: Path) -> tuple[Trial, ...]:
    changes = (Change("kd", {"train.lr": 1.0}), Change("slow", {"train.lr": 2.0}))
    return expand(Study("s", mini_config(out), changes, (0, 1), "tiny_val", out))


def rows(count: int) -> str:
    return HEAD + "".join(f"0,{i},1e-3,2,3.25,1\n" for i in range(count))


def test_the_time_left_follows_measured_steps(tmp_path: Path, clock: list[float]) -> None:
    base, kd, slow, *others = trials(tmp_path)
    board = Board("s", (base, kd, slow), 3, {t.folder: 100 for t in (base, kd, slow)}, Measured())
    losses(kd.folder, rows(50))  # half of it was trained before
    board.start(base)
    board.start(kd)
    assert board.lines() == [
        "s: 3 of 6 runs done, time left not known yet", "  base seed 0  starting", "  kd seed 0  step 50/100  loss 3.25"
    ]  # fmt: skip
    clock[0] += 10  # start-up
    losses(base.folder, rows(1))
    losses(kd.folder, rows(51))
    board.look()
    clock[0] += 20
    losses(base.folder, rows(11))
    losses(kd.folder, rows(56))
    head, *lines = board.lines()
    assert board.measured.seconds_per_step == {"base": 2.0, "kd": 4.0}
    # Start-up took 8 s. base: 89 steps of 2 s; kd: 50 of 4 s; slow, not measured: 100 of 3 s; two at a time.
    assert board.left == pytest.approx((178 + (200 + 8 - 30) + (300 + 8)) / 2)
    assert head == "s: 3 of 6 runs done, about 6 min left"
    assert lines == ["  base seed 0  step 11/100  loss 3.25", "  kd seed 0  step 56/100  loss 3.25"]
    clock[0] += 178
    losses(base.folder, rows(100))
    board.look()
    (base.folder / "detector.safetensors").write_text("")
    clock[0] += 42  # evaluation
    assert board.lines()[1] == "  base seed 0  evaluating"
    assert board.end(base, ok=True) == 250
    assert board.measured.seconds_beside == pytest.approx(50)
    assert board.end(kd, ok=False) == 250
    assert board.lines() == ["s: 4 of 6 runs done, 1 failed, about 42 min left"]  # 100 steps of (2 + 48) / 2 s + 50 s
    assert len(others) == 3


def test_measurements_are_kept(tmp_path: Path) -> None:
    assert load_measured(tmp_path) == Measured()
    measured = Measured(123, True, {"base": 1.5}, 20.0)
    save_measured(tmp_path, measured)
    assert load_measured(tmp_path) == measured
    (tmp_path / "measured.json").write_text("{")
    assert load_measured(tmp_path) == Measured()
    assert replace(measured, seconds_per_step={"a": 1.0, "b": 3.0}).step_of("c") == 2.0


def test_plain_lines_come_every_half_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    view = View()
    assert view.kind == "plain" and not view.due
    clock[0] += 29
    assert not view.due
    clock[0] += 1
    assert view.due
    view.show(["s: 1 of 2", "  base seed 0"])
    assert not view.due
    view.say("an event")
    view.close()
    assert capsys.readouterr().out == "s: 1 of 2; base seed 0\nan event\n"


def test_a_terminal_has_one_block(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setenv("LINES", "5")
    view = View()
    assert view.kind == "terminal"
    view.show(["a long line of a block", "two", "three", "four"])
    view.show(["again"])
    view.say("an event")
    view.close()
    up = "\x1b[{}A\x1b[J".format
    assert capsys.readouterr().out == f"a long line\ntwo\nthree\n{up(3)}again\n{up(1)}an event\n"


def test_a_notebook_updates_one_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    display = pytest.importorskip("IPython.display")
    shown: list[str] = []

    class Handle:
        def update(self, value: object) -> None:
            shown.append(value.data)  # type: ignore[attr-defined]

    def show(value: object, display_id: bool) -> Handle:
        shown.append(value.data)  # type: ignore[attr-defined]
        return Handle()

    monkeypatch.setattr("kdlab.studies.progress.in_notebook", lambda: True)
    monkeypatch.setattr(display, "display", show)
    view = View()
    view.show(["one", "two"])
    view.show(["three"])
    view.close()
    assert shown == ["one\ntwo", "three", ""] and capsys.readouterr().out == ""


def test_nothing_is_shown_where_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    view = View(show=False)
    view.say("an event")
    assert not view.due and capsys.readouterr().out == ""
