"""Errors a user can act on: each says what is wrong, where, and what to do."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator


class MeristemError(Exception):
    """A user's mistake or bad input. The command line prints it without a traceback.

    what: what is wrong and where; remedy: what to do about it (may be empty).
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what, self.remedy = what, remedy
        super().__init__(f"{what}\n  {remedy}" if remedy else what)


class DataError(MeristemError):
    """A file cannot be used: unreadable, NaN, geometry missing, shapes that differ.

    `reason` is a short fixed word for counting (truncated, nan, no-affine, duplicate, shape, unreadable, …).
    """

    def __init__(self, reason: str, what: str, remedy: str = "") -> None:
        self.reason = reason
        super().__init__(what, remedy)

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str, str]]:
        return type(self), (self.reason, self.what, self.remedy)  # loader workers send it home


class RecipeError(MeristemError):
    """A recipe, or an override of one, is wrong: unknown key, impossible combination, missing view."""


class CheckpointError(MeristemError):
    """A checkpoint is missing, unreadable, or does not fit what it is loaded into."""


TRACEBACK = "MERISTEM_TRACEBACK"  # environment variable: set, unforeseen errors are shown with all that they say
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def unforeseen(error: BaseException) -> str:
    """Where an error came from that nobody foresaw, and of which kind it is, but not what it says: libraries quote files' names
    and headers in their messages. Places in code are shown without the folders above the package.
    """
    if os.environ.get(TRACEBACK):
        return "".join(traceback.format_exception(error)).rstrip()
    lines = [f"  {place}" for place in _places(error)]
    return "\n".join([f"an error that was not foreseen, {type(error).__name__}, at", *lines,
                      f"  Libraries quote names and headers in their messages, so this one's is not shown; {TRACEBACK}=1 shows "
                      "it, on a terminal that nobody keeps a log of."])


def _places(error: BaseException) -> Iterator[str]:
    """Outermost first, those in a loader worker last: torch sends them home in the text of the error."""
    found = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(error.__traceback__)]
    found += [(file, int(line), name) for file, line, name in _FRAME.findall(str(error))] if "Traceback" in str(error) else []
    for file, line, name in found:
        parts = file.replace("\\", "/").split("/")
        roots = [i + 1 for i, part in enumerate(parts) if part.endswith("-packages")]
        roots += [len(parts) - 1 - parts[::-1].index("meristem")] if "meristem" in parts[:-1] else []
        yield f"{'/'.join(parts[max(roots, default=len(parts) - 1):])}:{line} {name}"
