"""How the C library hands out memory during training on a CPU."""

from __future__ import annotations

import ctypes
import sys

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # parameter numbers of glibc's mallopt
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step instead of returning it to the system.

    Every step of a training allocates the same large tensors; returning their pages and faulting them in again cost up
    to half of a LiDAR step on two cores. It holds for the whole process.

    Returns:
        Whether it took effect: true with glibc, false with any other C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt and mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))
