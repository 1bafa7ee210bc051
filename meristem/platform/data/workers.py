"""Processes that load or decode for another: how their death is noticed."""

from __future__ import annotations

import signal
import threading

DEATH = (RuntimeError, ConnectionError, EOFError)  # what a loader raises of it


def killed(error: Exception) -> bool:
    """Whether a loader's error is that one of its processes was killed, as it worked or handed over, not that it failed."""
    text = str(error)
    return text.startswith("DataLoader worker") or (not isinstance(error, RuntimeError) and not text.startswith("Caught"))


def notice_deaths_where_waited() -> None:
    """To be called once a loader has its processes: torch would raise the death of one wherever the program happens to be."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
