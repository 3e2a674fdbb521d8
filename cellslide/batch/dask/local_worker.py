"""What Dask loads into the processes of `--jobs`: a signal to the whole group is for their owner, who tells them."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Worker


def dask_setup(worker: Worker) -> None:
    """Leave Ctrl-C, SIGTERM and SIGUSR1 to the process that started this one; called by Dask in the main thread."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
