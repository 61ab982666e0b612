"""Studies: many runs from one description, and a verdict on each change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdlab.studies.load import load_study as load_study
    from kdlab.studies.local import LocalEngine as LocalEngine
    from kdlab.studies.plan import Change as Change
    from kdlab.studies.plan import Study as Study
    from kdlab.studies.plan import Trial as Trial
    from kdlab.studies.plan import expand as expand
    from kdlab.studies.ray_engine import RayEngine as RayEngine
    from kdlab.studies.run import run_study as run_study
    from kdlab.studies.terms import term_changes as term_changes

_HOMES = {
    "Change": "plan",
    "LocalEngine": "local",
    "RayEngine": "ray_engine",
    "Study": "plan",
    "Trial": "plan",
    "expand": "plan",
    "load_study": "load",
    "run_study": "run",
    "term_changes": "terms",
}

__all__ = ["Change", "LocalEngine", "RayEngine", "Study", "Trial", "expand", "load_study", "run_study", "term_changes"]


def __getattr__(name: str) -> Any:
    """Import on first use: the processes of a study's runs start quickly."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kdlab.studies' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"kdlab.studies.{_HOMES[name]}"), name)
