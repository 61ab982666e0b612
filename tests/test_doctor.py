"""The doctor answers whatever the machine is like."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdlab import doctor as module
from kdlab.doctor import Check, check_import, check_packages, render


def answer(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any] | None, error: str = "") -> None:
    monkeypatch.setattr(module, "_probe", lambda *_: (found, error))


def test_render_puts_the_cure_under_what_is_missing() -> None:
    text = render([Check("a", True, "1.0"), Check("longer", False, "not found", "apt-get install x")])
    good, bad, cure, _, verdict = text.splitlines()
    assert good.split() == ["ok", "a", "1.0"]
    assert bad.startswith("MISSING") and cure.strip() == "cure: apt-get install x"
    assert good.index("1.0") == bad.index("not found") == cure.index("cure")
    assert verdict.startswith("1 of 2")
    assert render([Check("a", True, "")]).endswith("Everything needed is here.")
    assert render([])


def test_doctor_covers_this_machine() -> None:
    checks = module.doctor()
    names = {check.name for check in checks}
    assert {"python", "torch", "torchvision", "timm", "numpy", "open3d", "nuscenes-devkit", "accelerate"} <= names
    assert {"GPU", "CPU", "memory", "free disk", "import open3d"} <= names
    assert all(check.detail for check in checks)
    assert all(check.cure for check in checks if not check.ok)
    assert len(names) == len(checks)


def test_packages_too_old_or_absent() -> None:
    good, old, absent = check_packages(["numpy>=1", "numpy>=99", "kdlab-no-such-package>=2"])
    assert good.ok
    assert not old.ok and "numpy>=99 is needed" in old.detail and "make setup" in old.cure
    assert not absent.ok and absent.detail == "not installed" and "kdlab-no-such-package>=2" in absent.cure


def test_packages_of_extras_and_other_systems_are_left_out() -> None:
    assert check_packages(['pytest; extra == "dev"', 'x; sys_platform == "none"']) == []


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("import os; os.kill(os.getpid(), 9)", "crashed with signal 9"),
        ("raise OSError('libX.so: no such file')", "OSError: libX.so: no such file"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("import os; os._exit(0)", "no readable answer"),
    ],
)
def test_import_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, detail: str) -> None:
    (tmp_path / "fragile.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert check_import("fragile", "the cure", timeout=1 if "sleep" in body else 60) == Check(
        "import fragile", False, detail, "the cure"
    )


def test_import_that_works() -> None:
    assert check_import("json.decoder") == Check("import json", True, "works")


def test_missing_libraries_name_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(library: str) -> None:
        if library == "libusb-1.0.so.0":
            raise OSError

    monkeypatch.setattr(module.ctypes, "CDLL", load)
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert module.missing_packages() == ["libusb-1.0-0"]
    bad = [check for check in module.check_libraries() if not check.ok]
    assert [(check.name, check.cure) for check in bad] == [("libusb-1.0.so.0", "sudo apt-get install -y libusb-1.0-0")]
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert module.missing_packages() == [] and module.check_libraries() == []


def test_gpu_found(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {"cuda": True, "cuda_build": "13.2", "bf16": True, "gpus": [["Card", 80 * 2**30]]})
    assert module.check_gpu() == Check("GPU", True, "Card (80 GiB), bf16 yes, CUDA 13.2")


@pytest.mark.parametrize(
    ("driver", "build", "ok", "words"),
    [
        (False, "13.2", True, "none"),
        (True, "13.2", False, "cannot use it"),
        (True, None, False, "build for the CPU"),
    ],
)
def test_gpu_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, driver: bool, build: str | None, ok: bool, words: str
) -> None:
    answer(monkeypatch, {"cuda": False, "cuda_build": build})
    monkeypatch.setattr(module.Path, "exists", lambda _: driver)
    check = module.check_gpu()
    assert check.ok is ok and words in check.detail and bool(check.cure) is not ok


def test_torch_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, None, "ImportError: x")
    check = module.check_gpu()
    assert not check.ok and "ImportError: x" in check.detail


def test_little_disk_and_no_cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    assert not module.check_disk().ok
    assert "AVX512-BF16 unknown" in module.check_cpu(tmp_path / "absent").detail
    (tmp_path / "cpuinfo").write_text("flags : avx512f avx512_bf16\n")
    assert "AVX512-BF16 yes" in module.check_cpu(tmp_path / "cpuinfo").detail


def test_torch_probe_runs() -> None:
    found, error = module._probe(module._TORCH_PROBE)
    assert not error and found is not None and {"version", "cuda_build", "cuda", "gpus"} <= set(found)


def test_doctor_module_is_light() -> None:
    """The set-up asks it for missing system packages before anything heavy may load."""
    code = "import sys, kdlab.doctor; sys.exit('torch' in sys.modules and 'kdlab.doctor imports torch')"
    subprocess.run([module.sys.executable, "-c", code], check=True)
