"""Evaluation on the validation split while a training goes on."""

from __future__ import annotations

import json

from accelerate import Accelerator
from torch import nn

from kdlab.checkpoint import RunFolder
from kdlab.config import RunConfig
from kdlab.data.batch import Loader
from kdlab.evaluate import Scorer, evaluation_loader, predict, store_metrics
from kdlab.models import Detector


class Validation:
    """Evaluates on the validation split every ``train.evaluate_every`` epochs and after the last one.

    Args:
        config: of the run.
        folder: the run's, where validation.json goes.
        accelerator: the processes.
        show: print the metrics.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, accelerator: Accelerator, show: bool) -> None:
        self._config, self._folder, self._accelerator, self._show = config, folder, accelerator, show
        self._loader: Loader | None = None
        self._scorer: Scorer | None = None

    def __call__(self, epoch: int, detector: nn.Module) -> None:
        """Evaluate after an epoch, where its turn has come and it is not done yet; every process calls it."""
        config, accelerator = self._config, self._accelerator
        every = config.train.evaluate_every
        if not every or (epoch % every and epoch != config.train.epochs):
            return
        stored = self._folder.validation
        if stored.exists() and str(epoch) in json.loads(stored.read_text()):
            return
        data, rank, world = config.data, accelerator.process_index, accelerator.num_processes
        if self._loader is None:
            self._loader = evaluation_loader(
                config, data.root, data.val, data.version, workers=0, rank=rank, world=world
            )
        assert isinstance(detector, Detector)
        found = predict(detector, self._loader.epoch(0), config.train.precision)
        if world > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        if accelerator.is_main_process:
            self._scorer = self._scorer or Scorer(data.root, data.version)
            metrics = self._scorer.score(found, data.val).metrics
            store_metrics(stored, str(epoch), metrics)
            if self._show:
                print(f"epoch {epoch}: mAP {metrics.mean_ap:.4f}  NDS {metrics.nd_score:.4f}", flush=True)
        accelerator.wait_for_everyone()
