"""Files that somebody else wrote: JSON, and bytes that no claim can exceed."""

from __future__ import annotations

import csv
import json
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meristem.errors import DataError

MISSHAPEN = (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError, AssertionError,
             csv.Error)  # what plain data raises that is not of the shape its format has


def regular(path: Path) -> Path:
    """The path of a file. Raises FileNotFoundError for what is none: a pipe would be waited for, a device read for ever."""
    if not path.is_file():
        raise FileNotFoundError("no file")
    return path


def read_json(path: Path, what: str, remedy: str = "Export it again.") -> Any:
    """What a file holds. what: its role, for the message. Raises DataError (unreadable) for whatever is no JSON in UTF-8."""
    try:
        text = regular(path).read_text(encoding="utf-8-sig")
        found = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(found, ensure_ascii=False).encode()  # half a character, which nobody could write down again
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("unreadable", f"{what} is no JSON that can be read ({type(error).__name__})", remedy) from None
    return found


@contextmanager
def opened(path: Path) -> Iterator[mmap.mmap]:
    """A file's bytes. An open file that is asked for the 4 GiB that a header claims makes room for them before it looks."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data
