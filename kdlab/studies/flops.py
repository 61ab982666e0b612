"""Operations of a run, from its config alone."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

from kdlab.checkpoint import load_run_config
from kdlab.config import DetectorConfig, RunConfig, from_dict, to_dict
from kdlab.plan import plan_step


def gflop(config: RunConfig) -> dict[str, float]:
    """GFLOP of a sample, a multiplication and an addition counting as two, see `kdlab.plan`.

    Args:
        config: of the run; its teacher's config is read where it lies.

    Returns:
        ``train_gflop``, of a step with its backward pass and the teacher online, without a stage that came first; and
        ``test_gflop``, of the detector alone. NaN where the teacher's config is gone or nothing can be planned.
    """
    distill = config.distill
    try:
        teacher = None if distill is None else load_run_config(Path(distill.teacher)).detector
        return _gflop(_key(config), "" if teacher is None else json.dumps(to_dict(teacher)))
    except (OSError, ValueError):
        return {"train_gflop": math.nan, "test_gflop": math.nan}


def _key(config: RunConfig) -> str:
    """What decides the operations."""
    plain = to_dict(config)
    return json.dumps({"detector": plain["detector"], "distill": plain["distill"]})


@functools.lru_cache(maxsize=256)
def _gflop(key: str, teacher: str) -> dict[str, float]:
    config = from_dict(RunConfig, json.loads(key))
    source = from_dict(DetectorConfig, json.loads(teacher)) if teacher else None
    alone = plan_step(replace(config, distill=None), None, 1)
    return {
        "train_gflop": plan_step(config, source, 1).flop / 1e9,
        "test_gflop": sum(part.flop for part in alone.parts) / 1e9,
    }
