"""The training loop: steps, logs, checkpoints, for any module that turns a batch into named losses."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdlab.checkpoint import RunFolder, load_state, save_state
from kdlab.config import TrainConfig
from kdlab.cost import Meter
from kdlab.losslog import LossLog
from kdlab.models.norm import across_ranks
from kdlab.optim import MovingAverage, adamw, set_learning_rate
from kdlab.progress import Progress
from kdlab.sample import Batch

OnStep = Callable[[int, Mapping[str, float]], None]
"""Called after every step with its number and its row of losses.csv."""

OnLosses = Callable[[int, Mapping[str, Tensor]], None]
"""Called in every step with its number and its losses, whose graph is still there."""


class Batches(Protocol):
    """What the loop wants of a loader."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in every epoch."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from a position on, always the same ones."""
        ...


class Interrupted(KeyboardInterrupt):
    """The training was stopped by a signal, after a checkpoint; the message says how to go on."""


class StopSignal:
    """Notes Ctrl-C or SIGTERM, so that the step at hand ends first; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass
class Loop:
    """One training, resumable at any step.

    Randomness (dropout) is drawn anew from seed and step before every step, so a checkpoint holds no generator state.

    Attributes:
        module: ``module(batch) -> named losses``; what the optimiser trains and DDP wraps. On the device already.
        loader: this process's batches.
        config: epochs, optimiser, seed, time between checkpoints.
        folder: where checkpoint and losses.csv go.
        accelerator: the processes and the device.
        averaged: submodule whose moving average is kept, where ``config.ema`` asks for one.
        frozen: modules beside ``module`` whose weights change all the same, stored in the checkpoint.
        title: shown beside the progress.
        show: show progress.
        resume: go on from the folder's checkpoint.
        on_step: called after every step, on the main process.
        on_losses: called between forward and backward pass, on every process.
        on_epoch: called after every epoch with its number (1 for the first), on every process; once more for the last
            one where a training goes on at an epoch's border.
        average: the moving average, once the loop runs.
        meter: time and memory of the training, once the loop runs; ``on_epoch`` is left out, and ``on_losses`` in every
            ``config.gradients_every``-th step.
    """

    module: nn.Module
    loader: Batches
    config: TrainConfig
    folder: RunFolder
    accelerator: Accelerator
    averaged: nn.Module | None = None
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)
    title: str = "train"
    show: bool = True
    resume: bool = True
    on_step: OnStep | None = None
    on_losses: OnLosses | None = None
    on_epoch: Callable[[int], None] | None = None
    average: MovingAverage | None = None
    meter: Meter = field(init=False, repr=False)

    def run(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: stopped by a signal; the checkpoint is written.
            RuntimeError: a loss is not finite, or the data set holds fewer samples than a batch.
        """
        if self.loader.steps_per_epoch < 1:
            raise RuntimeError("the training split holds fewer samples than one batch; lower --train.batch-size")
        self._optimizer = adamw(self.module, self.config)
        if self.config.ema > 0 and self.averaged is not None:
            self.average = MovingAverage(self.averaged, self.config.ema)
        state = load_state(self.folder) if self.resume else None
        done = self._restore(state) if state is not None else 0
        self.meter = Meter(self.accelerator.device, state.get("cost") if state is not None else None)
        self._done = self._saved = done
        self._asked = False
        self._model = self.accelerator.prepare_model(self.module)
        self._model.train()
        self._pending: list[tuple[dict[str, float], list[str], Tensor]] = []
        self._last = time.monotonic()
        main = self.accelerator.is_main_process
        self._log = LossLog(self.folder.losses, done) if main else None
        self._board = _board(self.folder, done) if main else None
        self._progress = Progress(self.steps, done, self.show and main, self.title)
        cuda = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        try:
            with StopSignal() as self._stop, torch.random.fork_rng(devices=cuda), self.meter:
                self._epochs()
        finally:
            self._progress.close()
            if self._log is not None:
                self._log.close()
            if self._board is not None:
                self._board.close()

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.config.epochs * self.loader.steps_per_epoch

    def _epochs(self) -> None:
        per_epoch = self.loader.steps_per_epoch
        first, skip = divmod(self._done, per_epoch)
        if first and not skip:  # a kill may have come between the epoch's checkpoint and the end of on_epoch
            self._epoch_ends(first)
        for epoch in range(first, self.config.epochs):
            for batch in self._batches(epoch, skip):
                self._step(epoch, batch)
                self._after_step()
            skip = 0
            self._flush()
            if self._done != self._saved:
                self._save()
            self._epoch_ends(epoch + 1)

    def _epoch_ends(self, epoch: int) -> None:
        if self.on_epoch is not None:
            with self.meter.paused():
                self.on_epoch(epoch)
            self._model.train()

    def _batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        try:
            yield from self.loader.epoch(epoch, skip)
        except Exception:
            if not self._stop.requested:  # a signal to the process group ends the loader's processes too
                raise
            self._interrupt()

    def _step(self, epoch: int, batch: Batch) -> None:
        step, device = self._done, self.accelerator.device
        torch.manual_seed(((self.config.seed * 1_000_003 + step) * 4099 + self.accelerator.process_index) % 2**63)
        lr = set_learning_rate(self._optimizer, step, self.steps, self.config)
        losses: dict[str, Tensor] = self._model(batch.to(device))
        self._watch(step, losses)
        total = torch.stack([v.float() for v in losses.values()]).sum()
        self._optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.grad_clip)
        numbers = [norm, total, *losses.values(), torch.full((), float(self._stop.requested), device=device)]
        place = {"epoch": float(epoch), "step": float(step), "lr": lr}
        stacked = across_ranks(torch.stack([n.detach().float() for n in numbers]))
        self._pending.append((place, ["grad_norm", "total", *losses], stacked))
        if device.type == "cpu":
            self._flush()  # before the weights take a step that is not finite
        self._optimizer.step()
        if self.average is not None and self.averaged is not None:
            self.average.update(self.averaged, step)
        self._done += 1

    def _watch(self, step: int, losses: Mapping[str, Tensor]) -> None:
        if self.on_losses is None:
            return
        every = self.config.gradients_every
        # Only where something is measured: on a GPU, a pause waits for it.
        with self.meter.paused() if every > 0 and step % every == 0 else contextlib.nullcontext():
            self.on_losses(step, losses)

    def _after_step(self) -> None:
        # On a GPU the numbers of a step are read while the next one runs, so that the GPU never waits.
        self._flush(keep=0 if self.accelerator.device.type == "cpu" else 1)
        if self._asked or (self._stop.requested and self.accelerator.num_processes == 1):
            self._interrupt()
        if time.monotonic() - self._last >= 60 * self.config.checkpoint_minutes:
            self._save()

    def _flush(self, keep: int = 0) -> None:
        """Log the pending steps but the last ``keep``, and note whether any process was asked to stop."""
        while len(self._pending) > keep:
            place, names, stacked = self._pending.pop(0)
            *numbers, asked = stacked.tolist()
            values = dict(zip(names, numbers, strict=True))
            self._check(int(place["step"]), values)
            self._asked = self._asked or asked > 0
            if self._log is not None and self._board is not None:
                row = {**place, **values}
                self._log.add(row)
                for name, value in {"lr": place["lr"], **values}.items():
                    self._board.add_scalar(
                        name if name in ("lr", "grad_norm") else f"loss/{name}", value, int(place["step"])
                    )
                self._progress.step(int(place["epoch"]) + 1, {n: v for n, v in values.items() if n != "grad_norm"})
                if self.on_step is not None:
                    self.on_step(int(place["step"]), row)

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        # The single losses first: the total and the gradient only follow them.
        for name in [*list(values)[2:], "total", "grad_norm"]:
            if not math.isfinite(values[name]):
                what = "the gradient's norm" if name == "grad_norm" else f"loss {name!r}"
                raise RuntimeError(
                    f"{what} is {values[name]} at step {step}; the checkpoint of step {self._saved} "
                    f"in {self.folder.path} is kept. "
                    "Lower --train.lr, or switch that term off, and give another --out"
                )

    def _interrupt(self) -> None:
        self._flush()
        self._save()
        raise Interrupted(
            f"stopped after step {self._done} of {self.steps}; the same command goes on from there ({self.folder.path})"
        )

    def _save(self) -> None:
        self._flush()
        if self.accelerator.is_main_process:
            state: dict[str, Any] = {
                "step": self._done,
                "steps_per_epoch": self.loader.steps_per_epoch,
                "module": self.module.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "frozen": {name: module.state_dict() for name, module in self.frozen.items()},
                "cost": self.meter.state(),
            }
            if self.average is not None:
                state["average"] = self.average.module.state_dict()
            save_state(self.folder, state)
        self._saved, self._last = self._done, time.monotonic()

    def _restore(self, state: Mapping[str, Any]) -> int:
        """Load a checkpoint; returns the steps done."""
        if state["steps_per_epoch"] != self.loader.steps_per_epoch:
            raise ValueError(
                f"{self.folder.path} was trained on {state['steps_per_epoch']} batches an epoch, the data set has "
                f"{self.loader.steps_per_epoch} now; give another --out"
            )
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        for name, module in self.frozen.items():
            module.load_state_dict(state["frozen"][name])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        return int(state["step"])


def _board(folder: RunFolder, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder.path / "tensorboard"), purge_step=step)
