"""How the benchmarks measure: functions take turns on one thread, the least CPU time counts."""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kdlab.allocator import keep_freed_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))  # model_fakes

Row = dict[str, Any]
"""A row of the table: name, shape, ours_ms, peer, peer_ms, ratio (peer_ms / ours_ms), target (least ratio, or text);
and where they mean something: unit (instead of ms), bytes and flops that ours must move or do, note."""

INSTALL = "not installed: make peers"


def peer(name: str) -> ModuleType | None:
    """A module of the peers' environment; None where it is not installed."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None


def interleaved(*functions: Callable[[], object], rounds: int = 10, seconds: float = 4.0) -> list[float]:
    """Least CPU milliseconds of each function on one thread.

    The functions take turns, after one turn that does not count, for ``rounds`` turns, or for fewer (at least three)
    if these take longer than ``seconds``. KDLAB_BENCH_KEEP=1 lets glibc keep freed memory for all of them, as kdlab's
    trainings do: what allocates much gains most.
    """
    if os.environ.get("KDLAB_BENCH_KEEP") == "1":
        keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = [math.inf] * len(functions)
    for function in functions:
        function()
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - began > seconds:
            break
        for i, function in enumerate(functions):
            start = time.process_time()
            function()
            best[i] = min(best[i], (time.process_time() - start) * 1e3)
    torch.set_num_threads(threads)
    return best


def peak_growth(function: Callable[[], object]) -> float:
    """MiB by which the resident memory grows at most while the function runs; NaN where the system does not say."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    clear.write_text("5")  # the peak starts anew
    function()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def row(name: str, shape: str, ours: float, peer_name: str, theirs: float | None, target: float, **more: Any) -> Row:
    """One row; without the peer's time it says how to get the peer."""
    ratio = None if theirs is None else theirs / ours
    if theirs is None:
        more = {**more, "note": INSTALL}
    return {
        "name": name,
        "shape": shape,
        "ours_ms": ours,
        "peer": peer_name,
        "peer_ms": theirs,
        "ratio": ratio,
        "target": target,
        **more,
    }


def ceilings() -> dict[str, float]:
    """What one thread of this machine does at most: convolutions and matrix products (GFLOP/s), memory (GB/s)."""
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.randn(1024, 1024).to(dtype)
        (ms,) = interleaved(lambda m=matrix: m @ m, rounds=20)  # type: ignore[misc]
        rates[f"matmul {name} GFLOP/s"] = 2 * 1024**3 / ms / 1e6
        layer = torch.nn.Conv2d(64, 64, 3, padding=1, bias=False).to(dtype).to(memory_format=torch.channels_last)
        maps = torch.randn(8, 64, 64, 64).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        gradient = torch.ones_like(maps)
        (ms,) = interleaved(lambda c=layer, x=maps, g=gradient: c(x).backward(g), rounds=20)  # type: ignore[misc]
        rates[f"conv training {name} GFLOP/s"] = 3 * 2 * maps.numel() * 64 * 9 / ms / 1e6
    source = torch.zeros(2**26)  # 256 MiB: far more than any cache
    copy = torch.zeros_like(source)
    (ms,) = interleaved(lambda: copy.copy_(source), rounds=20)
    rates["memory GB/s"] = 2 * 4 * source.numel() / ms / 1e6
    return rates
