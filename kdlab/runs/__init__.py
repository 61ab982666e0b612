"""Run folders: load a detector, set runs side by side, list what a folder holds, remove what is no longer needed."""

from kdlab.checkpoint import load_detector
from kdlab.runs.comparison import Comparison, compare, describe, shared_split
from kdlab.runs.listing import RunInfo, find_runs, list_runs, run_state, table
from kdlab.runs.pruning import Pruning, prune

__all__ = [
    "Comparison",
    "Pruning",
    "RunInfo",
    "compare",
    "describe",
    "find_runs",
    "list_runs",
    "load_detector",
    "prune",
    "run_state",
    "shared_split",
    "table",
]
