"""What opening a run folder does to the files in it."""

import os
import subprocess
import sys
from pathlib import Path

from mini_run import mini_config

from kdlab.checkpoint import RunFolder, open_run


def test_unfinished_files_of_running_processes_stay(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    open_run(folder, mini_config(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    parts = {who: folder.path / f".metrics.json.{who}.part" for who in (os.getpid(), ended.pid, "x")}
    for part in parts.values():
        part.touch()
    open_run(folder, mini_config(tmp_path))
    assert [who for who, part in parts.items() if part.exists()] == [os.getpid()]
