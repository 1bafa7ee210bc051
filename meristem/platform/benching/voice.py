"""Telling which measurement is under way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def telling(quiet: bool) -> Generator[Callable[[str], None], None, None]:
    """What may be called with what is measured next: a line that changes on a terminal, plain lines where there is none."""
    if quiet:
        yield lambda text: None
    elif sys.stderr.isatty():
        with Console(stderr=True).status("starting") as status:
            yield lambda text: status.update(f"measuring: {text}")
    else:
        yield lambda text: print(f"measuring: {text}", file=sys.stderr, flush=True)
