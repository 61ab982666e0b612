"""``python -m kdlab.studies.child PARENT LOCK WORD...``: a ``kdlab`` command that ends with the process it works for.

Where that process dies without a word, this one gets SIGTERM: a training then writes its checkpoint and stops. The lock
keeps the next attempt at the same run waiting until it has, for a while.
"""

from __future__ import annotations

import fcntl
import os
import runpy
import signal
import sys
import threading
import time
from typing import IO

WATCH_SECONDS = 0.5
"""Time between looks at the parent."""

WAIT_SECONDS = 900.0
"""Time that an earlier attempt at the run has to end: more than a study gives one for its checkpoint."""


def main(parent: int, lock: str, words: list[str]) -> None:
    """Run a command under a lock.

    Args:
        parent: process that this one must not outlive.
        lock: file to lock; waits until it is free.
        words: the command's, without ``kdlab``.

    Raises:
        SystemExit: the lock did not become free in `WAIT_SECONDS`.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    with open(lock, "a+") as file:
        _acquire(file)
        sys.argv = ["kdlab", *words]
        runpy.run_module("kdlab", run_name="__main__", alter_sys=True)


def _acquire(file: IO[str]) -> None:
    """Hold a run's lock, with this process's number in it; says what it waits for."""
    end, said = time.monotonic() + WAIT_SECONDS, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            pass
        except OSError:  # a file system without locks
            break
        file.seek(0)
        owner = file.read().strip() or "unknown"
        if not said:
            print(f"waiting for an earlier attempt at this run to end (process {owner}, {file.name})", flush=True)
            said = True
        if time.monotonic() > end:
            sys.exit(
                f"kdlab: error: an earlier attempt at this run (process {owner}) still holds {file.name} after "
                f"{WAIT_SECONDS:.0f} s; end that process"
            )
        time.sleep(WATCH_SECONDS)
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
