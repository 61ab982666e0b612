"""What is measured for a study beside the training does not count as training."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from kdlab.checkpoint import RunFolder
from kdlab.config import TrainConfig
from kdlab.loop import Loop


class Watched:
    """Stands for a meter; counts its pauses."""

    def __init__(self) -> None:
        self.paused_now, self.pauses = False, 0

    def paused(self) -> "Watched":
        return self

    def __enter__(self) -> None:
        self.paused_now, self.pauses = True, self.pauses + 1

    def __exit__(self, *error: object) -> None:
        self.paused_now = False


def test_the_meter_stands_still_while_gradients_are_measured(tmp_path: Path) -> None:
    meter = Watched()
    config = TrainConfig(gradients_every=3)
    loop = Loop(nn.Linear(1, 1), None, config, RunFolder(tmp_path), Accelerator(cpu=True))  # type: ignore[arg-type]
    loop.meter = meter  # type: ignore[assignment]
    seen = []
    loop.on_losses = lambda step, losses: seen.append((step, meter.paused_now))
    for step in range(7):
        loop._watch(step, {"loss": torch.zeros(())})
    assert seen == [(step, step % 3 == 0) for step in range(7)] and meter.pauses == 3
