"""What this machine has, what is missing for kdlab, and the cure for it.

Anything that may crash, hang or take long to import is tried in a process of its own: the doctor always answers.
"""

import contextlib
import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

#: Shared libraries that Open3D loads -> the Debian and Ubuntu packages that hold them.
SYSTEM_LIBRARIES = {
    "libusb-1.0.so.0": "libusb-1.0-0",
    "libGL.so.1": "libgl1",
    "libEGL.so.1": "libegl1",
    "libX11.so.6": "libx11-6",
    "libidn2.so.0": "libidn2-0",
    "libudev.so.1": "libudev1",
}
#: Packages whose import fails where a version, a build or a system library does not fit -> the cure.
FRAGILE_IMPORTS = {
    "torchvision": "torch and torchvision must come from one build (CPU or the same CUDA): make setup",
    "nuscenes.nuscenes": "nuscenes-devkit needs numpy < 2: make setup",
    "open3d": "install the system libraries named above, or: make setup",
}
IMPORT_TIMEOUT = 180.0
MIN_MEMORY_GIB = 4.0
MIN_DISK_GIB = 2.0
GIB = 2**30

_TORCH_PROBE = """
import json, torch
found = {"version": torch.__version__, "cuda_build": torch.version.cuda, "cuda": torch.cuda.is_available(), "gpus": []}
if found["cuda"]:
    for index in range(torch.cuda.device_count()):
        prop = torch.cuda.get_device_properties(index)
        found["gpus"].append([prop.name, prop.total_memory])
    found["bf16"] = torch.cuda.get_device_capability() >= (8, 0)
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report.

    Attributes:
        name: what was looked at.
        ok: whether kdlab can work with it.
        detail: what was found.
        cure: what to do about it; empty when it is fine.
    """

    name: str
    ok: bool
    detail: str
    cure: str = ""


def doctor() -> list[Check]:
    """Looks at Python, packages, GPU, processor, memory, disk, system libraries and fragile imports."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        gpu = pool.submit(check_gpu)
        imports = [pool.submit(check_import, module, cure) for module, cure in FRAGILE_IMPORTS.items()]
        checks = [check_python(), *check_packages(), check_cpu(), check_memory(), check_disk(), *check_libraries()]
        return [*checks, gpu.result(), *(item.result() for item in imports)]


def render(checks: Iterable[Check]) -> str:
    """Writes the checks as text: one line each, the cure below what is missing, a verdict at the end."""
    checks = list(checks)
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{'ok     ' if check.ok else 'MISSING'}  {check.name:<{width}}  {check.detail}".rstrip())
        if not check.ok and check.cure:
            lines.append(f"{'':9}{'':{width}}  cure: {check.cure}")
    bad = sum(not check.ok for check in checks)
    verdict = f"{bad} of {len(checks)} checks failed; see the cures above." if bad else "Everything needed is here."
    lines += ["", verdict]
    return "\n".join(lines)


def missing_packages() -> list[str]:
    """Debian and Ubuntu packages whose libraries Open3D needs and this machine lacks (none on other systems)."""
    if not sys.platform.startswith("linux"):
        return []
    return [package for library, package in SYSTEM_LIBRARIES.items() if not _loads(library)]


def check_python() -> Check:
    """The version of Python that runs."""
    ok = (3, 11) <= sys.version_info[:2] < (3, 13)
    cure = "" if ok else "use Python 3.11 or 3.12: make PYTHON=python3.12 setup"
    return Check("python", ok, f"{platform.python_version()} on {platform.platform(terse=True)}", cure)


def check_packages(requirements: list[str] | None = None) -> list[Check]:
    """Installed version of every requirement against its range.

    Args:
        requirements: requirement strings; by default those that the installed kdlab declares, and torchvision.
    """
    if requirements is None:
        try:
            requirements = [*(metadata.requires("kdlab") or []), "torchvision"]
        except metadata.PackageNotFoundError:
            return [Check("kdlab", False, "not installed", "make setup")]
    parsed = [Requirement(line) for line in requirements]
    return [_check_package(item) for item in parsed if item.marker is None or item.marker.evaluate({"extra": ""})]


def check_gpu() -> Check:
    """The CUDA devices that PyTorch sees; a machine without any is fine, one whose GPU is out of reach is not."""
    found, error = _probe(_TORCH_PROBE)
    if found is None:
        return Check("GPU", False, f"torch does not load: {error}", "make setup")
    if found["cuda"]:
        names = ", ".join(f"{name} ({memory / GIB:.0f} GiB)" for name, memory in found["gpus"])
        return Check("GPU", True, f"{names}, bf16 {'yes' if found['bf16'] else 'no'}, CUDA {found['cuda_build']}")
    if not Path("/proc/driver/nvidia/version").exists():
        return Check("GPU", True, "none: torch runs on the CPU")
    if found["cuda_build"] is None:
        return Check("GPU", False, "a GPU is here, but torch is a build for the CPU", "make setup in a new .venv")
    detail = f"a GPU is here, but torch (CUDA {found['cuda_build']}) cannot use it"
    return Check("GPU", False, detail, "update the NVIDIA driver, or install torch and torchvision for its CUDA")


def check_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Check:
    """Cores that this process may use, and whether they multiply in bfloat16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        flags = set(cpuinfo.read_text(errors="replace").split())
        bf16 = "yes" if "avx512_bf16" in flags else "no"
    except OSError:
        bf16 = "unknown"
    return Check("CPU", True, f"{cores} cores, AVX512-BF16 {bf16}")


def check_memory() -> Check:
    """Main memory, or the container's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (AttributeError, OSError, ValueError):
        return Check("memory", True, "unknown")
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max": no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()) / GIB)
    ok = total >= MIN_MEMORY_GIB
    return Check("memory", ok, f"{total:.1f} GiB", "" if ok else f"kdlab needs about {MIN_MEMORY_GIB:.0f} GiB")


def check_disk(folder: Path = Path(".")) -> Check:
    """Free space where data sets and runs go.

    Args:
        folder: a folder on the disk in question.
    """
    free = shutil.disk_usage(folder).free / GIB
    ok = free >= MIN_DISK_GIB
    cure = "" if ok else f"free {MIN_DISK_GIB:.0f} GiB, or work on another disk"
    return Check("free disk", ok, f"{free:.1f} GiB here", cure)


def check_libraries() -> list[Check]:
    """The system libraries that Open3D loads; Linux only, since its wheels for other systems bring them along."""
    if not sys.platform.startswith("linux"):
        return []
    checks = []
    for library, package in SYSTEM_LIBRARIES.items():
        ok = _loads(library)
        cure = "" if ok else f"sudo apt-get install -y {package}"
        checks.append(Check(library, ok, "found" if ok else "not found", cure))
    return checks


def check_import(module: str, cure: str = "", timeout: float = IMPORT_TIMEOUT) -> Check:
    """Imports a module in a process of its own.

    Args:
        module: dotted name.
        cure: what to do where it fails.
        timeout: seconds to wait.
    """
    found, error = _probe(f"import json, {module}; print(json.dumps({{}}))", timeout)
    name = f"import {module.partition('.')[0]}"
    return Check(name, True, "works") if found is not None else Check(name, False, error, cure)


def _check_package(requirement: Requirement) -> Check:
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, False, "not installed", f"make setup (or: pip install '{wanted}')")
    if requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, True, version)
    return Check(
        requirement.name, False, f"{version}, but {wanted} is needed", f"make setup (or: pip install '{wanted}')"
    )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _probe(code: str, timeout: float = IMPORT_TIMEOUT) -> tuple[dict[str, Any] | None, str]:
    """Runs code in a new Python and reads the JSON object on its last line: (object, "") or (None, what went wrong)."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {timeout:.0f} s"
    if done.returncode < 0:
        return None, f"crashed with signal {-done.returncode}"
    if done.returncode > 0:
        return None, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return None, "no readable answer"
    return (found, "") if isinstance(found, dict) else (None, "no readable answer")
