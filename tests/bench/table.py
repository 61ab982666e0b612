"""Runs every benchmark, each in a process of its own, and writes one table of ratios.

`make bench` runs it in .venv, `make bench PEERS=1` with all peers in .venv-bench. It prints Markdown and writes it to
build/bench/bench.md, with the numbers in build/bench/bench.json. Names of benchmarks (voxels, bev_pool, ...) run only
these. `--keep-memory` lets glibc keep freed memory for both sides, as kdlab's trainings do.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from timing import Row, ceilings

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "build" / "bench"
BENCHES = ("evaluation", "voxels", "bev_pool", "targets", "nms", "images", "step", "tables")
PACKAGES = ("torch", "numpy", "mmcv", "mmdet3d", "spconv", "torch-scatter", "numba", "nuscenes-devkit", "pillow",
            "opencv-python-headless", "simplejpeg")  # fmt: skip


def run(name: str, keep_memory: bool) -> Any:
    """What a benchmark returns, from a process of its own; a row that says so where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KDLAB_BENCH_KEEP": str(int(keep_memory))}
    words = [sys.executable, __file__, "--one", name]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        error = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return [{"name": name, "shape": "", "peer": "", "ratio": None, "target": "none", "note": f"FAILED: {error}"}]
    return json.loads(done.stdout.splitlines()[-1])


def one(name: str) -> Any:
    return ceilings() if name == "ceilings" else importlib.import_module(f"bench_{name}").measure_all()


def machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{found.group(1) if found else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "load": " ".join(f"{v:.1f}" for v in os.getloadavg()) + " (1, 5, 15 minutes)",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def verdict(measured: Row) -> str:
    """The target and whether it is met: a least ratio, or a most in ms."""
    target, ratio = measured["target"], measured["ratio"]
    if isinstance(target, str):
        if not (most := re.fullmatch(r"([\d.]+) ms", target)):
            return "-"
        return f"<= {target}: {'met' if measured['ours_ms'] <= float(most.group(1)) else '**short**'}"
    met = "not run" if ratio is None else "met" if ratio >= target else "**short**"
    return f">= {target:.3g}: {met}"


def limit(measured: Row, rates: dict[str, float]) -> str:
    """The least time that the machine's ceilings allow for the bytes and operations, and its share of ours."""
    bounds = []
    if "bytes" in measured:
        bounds.append((measured["bytes"] / rates["memory GB/s"] / 1e6, "memory"))
    if "flops" in measured:
        name = measured.get("ceiling", "conv training fp32 GFLOP/s")
        bounds.append((measured["flops"] / rates[name] / 1e6, name.removesuffix(" GFLOP/s")))
    if not bounds:
        return ""
    least, what = max(bounds)
    return f"{what} {number(least)} ms ({100 * least / measured['ours_ms']:.0f} %)"


def markdown(report: dict[str, Any]) -> str:
    rates = report["ceilings"]
    lines = [
        "# kdlab beside its peers",
        "",
        *(f"- {name}: {value}" for name, value in report["machine"].items()),
        "- versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "- one thread's ceilings: " + ", ".join(f"{name} {value:.0f}" for name, value in rates.items()),
        f"- freed memory: {'kept by both sides' if report['keep_memory'] else 'as glibc has it'}",
        "",
        "One process per benchmark, one thread, the sides in turns, least CPU time; equality checked first. The ratio "
        "is the peer's time over kdlab's. Limit: least time for the bytes or operations at the ceilings above.",
        "",
        "| operation | shape | kdlab | peer | its figure | ratio | target | limit |",
        "|---|---|---:|---|---:|---:|---|---|",
    ]
    for measured in report["rows"]:
        unit = measured.get("unit", "ms")
        ours, theirs = measured.get("ours_ms"), measured.get("peer_ms")
        cells = [
            measured["name"],
            measured["shape"],
            f"{number(ours)} {unit}" if ours is not None else "-",
            measured["peer"],
            measured.get("note") or (f"{number(theirs)} {unit}" if theirs is not None else "-"),
            f"{measured['ratio']:.2f}x" if measured["ratio"] else "-",
            verdict(measured),
            limit(measured, rates),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one)))
        return 0
    if unknown := set(arguments.names) - set(BENCHES):
        parser.error(f"unknown benchmark {min(unknown)!r}; known: {', '.join(BENCHES)}")
    rows: list[Row] = []
    for name in arguments.names or BENCHES:
        print(f"bench: {name}", file=sys.stderr)
        rows += run(name, arguments.keep_memory)
    report = {"machine": machine(), "versions": versions(), "ceilings": run("ceilings", arguments.keep_memory),
              "keep_memory": arguments.keep_memory, "rows": rows}  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    text = markdown(report)
    (OUT / "bench.md").write_text(text)
    (OUT / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    print(text)
    return int(any(str(r.get("note", "")).startswith("FAILED") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
