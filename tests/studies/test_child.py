"""The process of one command: it waits for an earlier attempt, but not for ever."""

import fcntl
import os
from pathlib import Path

import pytest

from kdlab.studies import child


def test_it_says_what_it_waits_for_and_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(child, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(child, "WATCH_SECONDS", 0.02)
    lock = tmp_path / ".lock"
    with open(lock, "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        first.write("4711\n")
        first.flush()
        with open(lock, "a+") as file, pytest.raises(SystemExit, match=r"^kdlab: error: .*process 4711.* still holds"):
            child._acquire(file)
    assert capsys.readouterr().out.count("waiting for an earlier attempt at this run to end (process 4711") == 1
    with open(lock, "a+") as file:
        child._acquire(file)
        assert lock.read_text() == f"{os.getpid()}\n"
