"""The C library's memory, on a CPU: what a step frees, the next one asks for."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # glibc's names for what `mallopt` sets


def keep_freed() -> None:
    """Let glibc keep what is freed for this process, and not give it to the system and ask for it again in every step, page by
    page. With another C library nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, -1)
