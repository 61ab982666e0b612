"""Open3D without what its import does to a notebook."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any


def open3d() -> Any:
    """The module ``open3d``.

    In a notebook its import starts a viewer of its own and says so, and Dash, which it brings, opens a channel to an
    extension that JupyterLab does not have, an error in the page's console. Neither is of use here.
    """
    os.environ.setdefault("OPEN3D_DISABLE_WEB_VISUALIZER", "true")
    if "dash" not in sys.modules:
        kept = sys.modules.get("retrying")
        sys.modules["retrying"] = None  # type: ignore[assignment]  # what only Dash's part for notebooks needs
        try:
            with contextlib.suppress(ImportError):
                importlib.import_module("dash")
        finally:
            del sys.modules["retrying"]
            if kept is not None:
                sys.modules["retrying"] = kept
    return importlib.import_module("open3d")
