"""Shows how a training goes: a live bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

LINE_SECONDS = 20.0
"""Time between plain lines."""


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _live() -> bool:
    return sys.stderr.isatty() or in_notebook()


class Progress:
    """Steps done of a training, with every named loss.

    Args:
        total: steps of the whole training.
        done: steps that an earlier run has done.
        show: False shows nothing.
        title: what is trained.
    """

    def __init__(self, total: int, done: int, show: bool, title: str) -> None:
        self.total, self.done, self.show = total, done, show
        self._bar: Any = None
        self._began, self._first, self._last = time.monotonic(), done, time.monotonic()
        if show and _live():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, initial=done, desc=title, unit="step", dynamic_ncols=True)
        elif show:
            print(f"{title}: {total} steps" + (f", goes on at step {done}" if done else ""), flush=True)

    def step(self, epoch: int, losses: Mapping[str, float]) -> None:
        """One more step, with its losses."""
        self.done += 1
        if not self.show:
            return
        named = "  ".join(f"{name} {value:.3g}" for name, value in losses.items())
        if self._bar is not None:
            self._bar.set_postfix_str(f"epoch {epoch}  {named}", refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last > LINE_SECONDS or self.done == self.total:
            self._last = time.monotonic()
            rate = (self.done - self._first) / max(self._last - self._began, 1e-9)
            print(f"step {self.done}/{self.total}  epoch {epoch}  {rate:.2f} step/s  {named}", flush=True)

    def say(self, text: str) -> None:
        """A line beside the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self.show:
            print(text, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
