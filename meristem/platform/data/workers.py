"""Processes that load or decode for another: how their death is noticed."""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import sys
import threading

DEATH = (RuntimeError, ConnectionError, EOFError)  # what a loader raises of it


def killed(error: Exception) -> bool:
    """Whether a loader's error is that one of its processes was killed, as it worked or handed over, not that it failed."""
    text = str(error)
    return text.startswith("DataLoader worker") or (not isinstance(error, RuntimeError) and not text.startswith("Caught"))


def lose_nothing(worker: int = 0) -> None:
    """To be called in such a process: it ends with what it cannot hand over, as where shared memory is full, and that is
    noticed. Python would drop the thing, and who asked for it would wait for ever.
    """
    def unsent(error: Exception, thing: object) -> None:
        if not isinstance(error, ConnectionError | EOFError):  # else who asked for it has left
            print("a sample could not be handed over by the process that read it: shared memory (/dev/shm) may be full",
                  file=sys.stderr, flush=True)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(unsent)  # type: ignore[attr-defined]


def notice_deaths_where_waited() -> None:
    """To be called once a loader has its processes: torch would raise the death of one wherever the program happens to be."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
