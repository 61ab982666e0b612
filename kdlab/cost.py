"""What a run costs: time, memory and parameters of its training and of its detector at test time."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from kdlab.checkpoint import RunFolder, write_json

MEMORY_SECONDS = 30.0
"""Time between looks at the memory of loader processes, which take tens of milliseconds."""


@dataclass(frozen=True)
class Cost:
    """Costs of a run; None where one was not measured.

    Memory is in MB (10^6 bytes). On a GPU it is the most that torch held allocated there; on a CPU the most that was
    resident in the main process, and in its loader processes beside what they share with it (seen now and then).

    Attributes:
        train_seconds: wall time of the steps that led to the weights, over all resumes; without evaluations.
        train_steps: number of these steps.
        train_memory_mb: peak of the training, on the first of several processes.
        train_parameters: trained ones: student, adapters, label encoder.
        teacher_parameters: of the teacher, and of a label encoder, that ran beside the training; 0 without.
        test_parameters: of the detector.
        test_seconds: per sample, forward pass and decoding alone: median over an evaluation's batches but the first.
        test_memory_mb: peak of the evaluation.
    """

    train_seconds: float | None = None
    train_steps: int | None = None
    train_memory_mb: float | None = None
    train_parameters: int | None = None
    teacher_parameters: int | None = None
    test_parameters: int | None = None
    test_seconds: float | None = None
    test_memory_mb: float | None = None


def read_cost(run: Path | str) -> Cost | None:
    """The costs of a run; None where none were measured.

    Raises:
        ValueError: the file is damaged.
    """
    path = RunFolder(Path(run)).cost
    if not path.exists():
        return None
    try:
        plain: dict[str, Any] = json.loads(path.read_text())
        return Cost(**{f.name: plain.get(f.name) for f in fields(Cost)})
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it") from error


def write_cost(run: Path | str, cost: Cost) -> None:
    """Store a run's costs, whole or not at all."""
    write_json(RunFolder(Path(run)).cost, asdict(cost))


def parameters(*modules: nn.Module | None, trained: bool = False) -> int:
    """Number of parameters of modules, those that they share once.

    Args:
        modules: None counts as empty.
        trained: only those that want gradients.
    """
    found = {id(p): p for module in modules if module is not None for p in module.parameters()}
    return sum(p.numel() for p in found.values() if p.requires_grad or not trained)


class PeakMemory:
    """The most memory in use, see `Cost`.

    The peak of a GPU and, on Linux, that of this process start anew here. Elsewhere, and for other processes, it is the
    most that was seen at any `look`.

    Args:
        device: whose memory.
        mb: an earlier peak.
    """

    def __init__(self, device: torch.device, mb: float = 0.0) -> None:
        self.device, self.mb = device, mb
        self._children, self._last = 0, -MEMORY_SECONDS
        self.restart()

    def restart(self) -> None:
        """Leave out what happened since the last look."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak of this process becomes what it has now
            self._kernel = True
        except OSError:
            self._kernel = False

    def look(self, now: bool = False) -> None:
        """Note the memory in use; other processes at most every `MEMORY_SECONDS`, unless ``now`` is wanted."""
        if self.device.type == "cuda":
            self.mb = max(self.mb, torch.cuda.max_memory_allocated(self.device) / 1e6)
            return
        if now or time.monotonic() - self._last >= MEMORY_SECONDS:
            self._children, self._last = _held_by_children(), time.monotonic()
        here = _kernel_peak() if self._kernel else int(psutil.Process().memory_info().rss)
        self.mb = max(self.mb, (here + self._children) / 1e6)


def _kernel_peak() -> int:
    """The most bytes that were resident in this process, by Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _held_by_children() -> int:
    """Bytes that the processes started by this one hold alone: pages shared since the fork are this one's."""
    total = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            total += int(child.memory_full_info().uss)
    return total


class Meter:
    """Time and memory of a training over all its resumes; ``with meter: ...`` measures, see also `paused`.

    Args:
        device: where it trains.
        before: `state` of the training that goes on.
    """

    def __init__(self, device: torch.device, before: Mapping[str, float] | None = None) -> None:
        before = before or {}
        self._past = before.get("seconds", 0.0)
        self._began: float | None = None
        self._memory = PeakMemory(device, before.get("memory_mb", 0.0))

    def __enter__(self) -> Meter:
        self._memory.restart()
        self._began = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        if self._memory.device.type == "cuda" and error[0] is None:
            torch.cuda.synchronize(self._memory.device)
        self._memory.look()
        self._past, self._began = self._seconds(), None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens in the block."""
        self.__exit__(None)
        yield
        self.__enter__()

    def _seconds(self) -> float:
        return self._past + (time.monotonic() - self._began if self._began is not None else 0.0)

    def state(self) -> dict[str, float]:
        """Seconds and peak so far (``seconds``, ``memory_mb``): what a checkpoint keeps."""
        self._memory.look()
        return {"seconds": self._seconds(), "memory_mb": self._memory.mb}


def training_cost(
    state: Mapping[str, float],
    steps: int,
    trained: nn.Module,
    detector: nn.Module | None = None,
    beside: Iterable[nn.Module | None] = (),
    before: Iterable[Cost | None] = (),
) -> Cost:
    """Costs of a training that has ended.

    Args:
        state: of its `Meter`.
        steps: of the training.
        trained: what the optimiser saw; parameters that want no gradient are not counted.
        detector: what is left of it at test time.
        beside: networks that ran without being trained.
        before: costs of trainings that came before this one and belong to it; None counts as nothing.
    """
    this = Cost(state["seconds"], steps, state["memory_mb"], parameters(trained, trained=True))
    found = [this, *(cost for cost in before if cost is not None)]
    return Cost(
        train_seconds=sum(c.train_seconds or 0.0 for c in found),
        train_steps=sum(c.train_steps or 0 for c in found),
        train_memory_mb=max(c.train_memory_mb or 0.0 for c in found),
        train_parameters=sum(c.train_parameters or 0 for c in found),
        teacher_parameters=parameters(*beside),
        test_parameters=parameters(detector) if detector is not None else None,
    )


class Stopwatch:
    """Times a detector alone, batch by batch; the first batch is for warming up and does not count.

    ``with watch.batch(samples): ...`` stands around forward pass and decoding, not around loading or writing.

    Args:
        detector: on its device.
    """

    def __init__(self, detector: nn.Module) -> None:
        self._parameters = parameters(detector)
        self._device = next(detector.parameters()).device
        self._memory = PeakMemory(self._device)
        self._batches: list[float] = []

    @contextlib.contextmanager
    def batch(self, samples: int) -> Iterator[None]:
        """Time one batch of so many samples."""
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self._batches.append((time.perf_counter() - began) / samples)
        self._memory.look()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @property
    def seconds(self) -> float | None:
        """Per sample; None before the second batch."""
        return statistics.median(self._batches[1:]) if len(self._batches) > 1 else None

    def store(self, run: Path | str) -> None:
        """Put what was measured into a run's costs, beside those of its training."""
        self._memory.look(now=True)
        write_cost(
            run,
            replace(
                read_cost(run) or Cost(),
                test_parameters=self._parameters,
                test_seconds=self.seconds,
                test_memory_mb=self._memory.mb,
            ),
        )
