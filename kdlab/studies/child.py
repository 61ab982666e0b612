"""``python -m kdlab.studies.child PARENT LOCK WORD...``: a ``kdlab`` command that ends with the process it works for.

Where that process dies without a word, this one gets SIGTERM: a training then writes its checkpoint and stops. The lock
keeps the next attempt at the same run waiting until it has.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import runpy
import signal
import sys
import threading
import time

WATCH_SECONDS = 0.5
"""Time between looks at the parent."""


def main(parent: int, lock: str, words: list[str]) -> None:
    """Run a command under a lock.

    Args:
        parent: process that this one must not outlive.
        lock: file to lock; waits until it is free.
        words: the command's, without ``kdlab``.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    with open(lock, "a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        sys.argv = ["kdlab", *words]
        runpy.run_module("kdlab", run_name="__main__", alter_sys=True)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
