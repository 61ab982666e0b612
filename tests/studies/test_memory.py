"""Memory that a study may use."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from kdlab.studies import memory

CGROUP = Path("/proc/self/cgroup")


@pytest.mark.skipif(not CGROUP.exists() or "0::" not in CGROUP.read_text(), reason="no control groups v2")
def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = next(line for line in CGROUP.read_text().splitlines() if line.startswith("0::"))
    group = tmp_path / lines[3:].strip("/")
    group.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert memory.available() == 1000
    for name, text in (("max", "700\n"), ("current", "500\n"), ("stat", "anon 100\ninactive_file 300\n")):
        (group / f"memory.{name}").write_text(text)
    assert memory.available() == 500
    (group / "memory.max").write_text("max\n")
    assert memory.available() == 1000
