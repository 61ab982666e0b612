"""One view of a running study: runs done, how far each running one is, the time left."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdlab.checkpoint import RunFolder
from kdlab.progress import in_notebook
from kdlab.studies.measured import Measured
from kdlab.studies.plan import Trial
from kdlab.studies.status import Steps, steps_of

LOOK_SECONDS = 1.0
"""Time between looks at the running trials."""

LIVE_SECONDS, NOTEBOOK_SECONDS, PLAIN_SECONDS = 0.5, 2.0, 30.0
"""Time between two pictures on a terminal, in a notebook, and elsewhere, where each is a line of its own."""


class View:
    """Shows a block of lines that changes in place, with lasting lines above it.

    Args:
        show: False shows nothing.
    """

    def __init__(self, show: bool = True) -> None:
        self.kind = (
            "none" if not show else "notebook" if in_notebook() else "terminal" if sys.stdout.isatty() else "plain"
        )
        every = {"terminal": LIVE_SECONDS, "notebook": NOTEBOOK_SECONDS}
        self._every, self._last, self._height = every.get(self.kind, PLAIN_SECONDS), time.monotonic(), 0
        self._handle: Any = None

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.kind != "none":
            self._clear()
            print(text, flush=True)

    @property
    def due(self) -> bool:
        """Whether it is time for another picture."""
        return self.kind != "none" and time.monotonic() - self._last >= self._every

    def show(self, lines: Sequence[str]) -> None:
        """Replace the block."""
        self._last = time.monotonic()
        if self.kind == "terminal":
            size = shutil.get_terminal_size()
            self._clear()
            shown = [line[: size.columns - 1] for line in lines[: max(size.lines - 2, 1)]]
            sys.stdout.write("\n".join(shown) + "\n")
            sys.stdout.flush()
            self._height = len(shown)
        elif self.kind == "notebook":
            self._display("\n".join(lines))
        elif self.kind == "plain":
            print("; ".join(line.strip() for line in lines), flush=True)

    def close(self) -> None:
        """Remove the block."""
        self._clear()
        if self._handle is not None:
            self._display("")

    def _clear(self) -> None:
        if self._height:
            sys.stdout.write(f"\x1b[{self._height}A\x1b[J")
            self._height = 0

    def _display(self, text: str) -> None:
        from IPython import display

        shown = display.Pretty(text)  # type: ignore[no-untyped-call]
        if self._handle is None:
            self._handle = display.display(shown, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(shown)


@dataclass
class _Running:
    trial: Trial
    began: float
    first: Steps
    """Where it stood when it was started."""
    seen: tuple[float, int] | None = None
    """When the first step after that was seen, and how many there were."""
    steps: Steps = field(default_factory=Steps)


class Board:
    """Counts what is done and measures what is left.

    Args:
        name: of the study.
        todo: trials that were not finished.
        done: number that were.
        totals: steps of each trial in ``todo``, by folder.
        measured: of earlier runs; gets what this one measures.
    """

    def __init__(
        self, name: str, todo: Sequence[Trial], done: int, totals: Mapping[Path, int], measured: Measured
    ) -> None:
        self.name, self.totals, self.measured = name, totals, measured
        self.all, self.done, self.failed = done + len(todo), done, 0
        self.waiting = list(todo)
        self.running: dict[Path, _Running] = {}
        self._looked = 0.0

    def start(self, trial: Trial) -> None:
        """A trial was started."""
        self.waiting = [other for other in self.waiting if other.folder != trial.folder]
        self.running[trial.folder] = _Running(trial, time.monotonic(), steps_of(trial.folder))

    def end(self, trial: Trial, ok: bool) -> float:
        """A trial has ended; returns its seconds."""
        self.look(now=True)
        run = self.running.pop(trial.folder)
        seconds = time.monotonic() - run.began
        if ok:
            self.done += 1
            steps = run.steps.done - run.first.done
            if steps > 0:
                known = self.measured.seconds_per_step
                known.setdefault(trial.change, seconds / steps)  # too short for `look` to measure it
                self.measured.seconds_beside = max(seconds - steps * known[trial.change], 0.0)
        else:
            self.failed += 1
        return seconds

    def look(self, now: bool = False) -> None:
        """Read how far the running trials are, where the last look is not just past."""
        clock = time.monotonic()
        if clock - self._looked < LOOK_SECONDS and not now:
            return
        self._looked = clock
        for run in self.running.values():
            run.steps = steps_of(run.trial.folder)
            if run.seen is None and run.steps.done > run.first.done:
                run.seen = clock, run.steps.done
            elif run.seen is not None and not RunFolder(run.trial.folder).finished:
                began, done = run.seen
                if run.steps.done > done:
                    self.measured.seconds_per_step[run.trial.change] = (clock - began) / (run.steps.done - done)

    @property
    def left(self) -> float | None:
        """Estimated seconds until all have ended; None before a step was measured."""
        now, total, beside = time.monotonic(), 0.0, self.measured.seconds_beside
        for run in self.running.values():
            step, steps = self.measured.step_of(run.trial.change), self.totals[run.trial.folder]
            if step is None:
                return None
            spent = now - run.began
            beside = max(beside, spent - step * (run.steps.done - run.first.done))
            total += max(step * (steps - run.first.done) + beside - spent, step * (steps - run.steps.done), 0.0)
        for trial in self.waiting:
            step = self.measured.step_of(trial.change)
            if step is None:
                return None
            total += step * (self.totals[trial.folder] - steps_of(trial.folder).done) + beside
        return total / max(len(self.running), 1)

    def lines(self) -> list[str]:
        """The view: one line of all, one per running trial."""
        self.look(now=True)
        failed = f", {self.failed} failed" if self.failed else ""
        left = "time left not known yet" if self.left is None else f"about {duration(self.left)} left"
        lines = [f"{self.name}: {self.done} of {self.all} runs done{failed}, {left}"]
        for run in self.running.values():
            total = self.totals[run.trial.folder]
            if RunFolder(run.trial.folder).finished:
                how = "evaluating"
            elif run.steps.loss is None:
                how = "starting"
            else:
                how = f"step {run.steps.done}/{total}  loss {run.steps.loss:.3g}"
            lines.append(f"  {run.trial.name}  {how}")
        return lines


def duration(seconds: float) -> str:
    """Seconds in words: 40 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
