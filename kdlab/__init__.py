"""kdlab: cross-modal knowledge distillation for BEV 3D object detection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdlab.evaluate import evaluate_run as evaluate_run
    from kdlab.hub import load_detector as load_detector
    from kdlab.hub import save_pretrained as save_pretrained
    from kdlab.runs import compare as compare
    from kdlab.train import train as train_run

__all__ = ["compare", "evaluate_run", "load_detector", "save_pretrained", "train_run"]

_HOMES = {
    "compare": ("kdlab.runs", "compare"),
    "evaluate_run": ("kdlab.evaluate", "evaluate_run"),
    "load_detector": ("kdlab.hub", "load_detector"),
    "save_pretrained": ("kdlab.hub", "save_pretrained"),
    "train_run": ("kdlab.train", "train"),  # `kdlab.train` is the module
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``import kdlab`` is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kdlab' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """Lazy names included."""
    return sorted({*globals(), *__all__})
