"""What an installation promises: a light import, a lock that fits, make targets that exist."""

import ast
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
TARGETS = ["setup", "demo", "test", "slow", "browser", "lab", "bench", "peers", "weights", "lint", "lock", "clean"]


def pinned() -> list[Requirement]:
    return [Requirement(line) for line in LOCK.splitlines() if line and not line.lstrip().startswith("#")]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def cpu_seconds_of_children() -> float:
    """Processor time, not the clock's: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_import_is_light() -> None:
    code = "import sys, kdlab; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    seconds = []
    for _ in range(3):
        start = cpu_seconds_of_children()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        seconds.append(cpu_seconds_of_children() - start)
        heavy = {"open3d", "nuscenes", "matplotlib", "timm", "torchvision", "plotly"} & set(done.stdout.split())
        assert not heavy, f"`import kdlab` also imports {sorted(heavy)}"
        if seconds[-1] < 3:
            break
    assert min(seconds) < 3, f"`import kdlab` takes {min(seconds):.1f} s of a processor at best"


def test_every_imported_package_is_declared() -> None:
    from importlib.metadata import packages_distributions

    given = packages_distributions()
    declared = {normal(Requirement(line).name) for line in PROJECT["dependencies"]}
    undeclared = set()
    for path in sorted((ROOT / "kdlab").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"kdlab"}:
                if not declared & {normal(name) for name in given.get(top, [top])}:
                    undeclared.add(f"{path.relative_to(ROOT)}: {top}")
    assert not undeclared, f"add them to pyproject.toml's dependencies: {sorted(undeclared)}"


def test_python_versions_agree() -> None:
    versions = SpecifierSet(PROJECT["requires-python"])
    assert {minor for minor in range(8, 20) if f"3.{minor}.4" in versions} == {11, 12}


def test_environment_yml_holds_python_pip_and_the_project_only() -> None:
    """Only the file is checked: conda itself is not run here."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [item for item in environment["dependencies"] if isinstance(item, str)]
    nested = [item for item in environment["dependencies"] if not isinstance(item, str)]
    python, pip = plain
    assert python.split()[0] == "python"
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])
    assert pip == "pip"
    assert nested == [{"pip": ["-e ."]}]
    assert environment["name"] == PROJECT["name"]


def test_lock_pins_exactly_and_names_no_host() -> None:
    assert not re.search(r"://|--(extra-)?index-url|--find-links|^/|\s/\w+/", LOCK, re.MULTILINE)
    for requirement in pinned():
        assert re.fullmatch(r"==[^*]+", str(requirement.specifier)), requirement


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_lock_fits_pyproject(python: str) -> None:
    extras = PROJECT["optional-dependencies"]
    assert "kdlab[ray]" in extras["dev"]
    lines = [*PROJECT["dependencies"], *extras["ray"], *(line for line in extras["dev"] if line != "kdlab[ray]")]
    wanted = [Requirement(line) for line in lines]
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    locked = {}
    for pin in pinned():
        if pin.marker is None or pin.marker.evaluate(environment):
            assert normal(pin.name) not in locked, f"{pin.name} is pinned twice"
            locked[normal(pin.name)] = str(pin.specifier).removeprefix("==")
    for requirement in wanted:
        assert requirement.specifier.contains(locked[normal(requirement.name)], prereleases=True), (
            f"requirements.lock does not fit {requirement}: run `make lock`"
        )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", [*TARGETS, "help"])
def test_make_target_exists(target: str) -> None:
    done = subprocess.run(["make", "-n", target], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_names_the_targets() -> None:
    done = subprocess.run(["make"], capture_output=True, text=True, cwd=ROOT, check=True)
    named = set(re.findall(r"^make (\w+)", done.stdout, re.MULTILINE))
    assert named == set(TARGETS)


def setup(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the set-up script, without any network, in a folder that holds nothing else."""
    (folder / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
    (folder / "requirements.lock").write_text("")
    return subprocess.run(["sh", str(script)], capture_output=True, text=True, cwd=folder, env=environment)


def fake(folder: Path, name: str, body: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_setup_names_the_cure_for_a_wrong_python(tmp_path: Path) -> None:
    python = fake(tmp_path / "bin", "python3.14", 'case "$1" in --version) echo Python 3.14.1;; *) exit 1;; esac')
    done = setup(tmp_path, PYTHON=python, PATH="/usr/bin:/bin")
    assert done.returncode == 1
    assert "3.14.1" in done.stderr and "make PYTHON=" in done.stderr and "environment.yml" in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Debian's packages")
def test_setup_names_the_command_for_a_missing_venv_module(tmp_path: Path) -> None:
    """As on Debian without python3-venv, and not root: version 3.12, but no ensurepip."""
    body = 'case "$2" in *ensurepip*) exit 1;; *print*) echo 12;; esac'
    python = fake(tmp_path / "bin", "python3.12", body)
    fake(tmp_path / "bin", "id", "echo 1000")
    fake(tmp_path / "bin", "apt-get", "exit 1")
    done = setup(tmp_path, PYTHON=python, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 1
    assert "sudo apt-get install -y python3.12-venv" in done.stderr
