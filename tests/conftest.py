"""Fixtures that any test may use."""

import os
import signal
from pathlib import Path

import pytest

# A shell that runs this in the background has Ctrl-C ignored, for the tests' own processes too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def keyframe_root() -> Path:
    """A folder with one real nuScenes keyframe (version v1.0-keyframe)."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "nuscenes-keyframe"
    root = Path(os.environ.get("KDLAB_KEYFRAME") or beside)
    if not (root / "v1.0-keyframe" / "sample.json").is_file():
        pytest.skip(f"no real nuScenes keyframe at {root}; the environment variable KDLAB_KEYFRAME names its folder")
    return root
