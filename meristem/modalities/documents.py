"""JSON that somebody else wrote."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

from meristem.errors import DataError

MISSHAPEN = (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError, AssertionError,
             csv.Error)  # what plain data raises that is not of the shape its format has


def read_json(path: Path, what: str, remedy: str = "Export it again.") -> Any:
    """What a file holds. what: its role, for the message. Raises DataError (unreadable) for whatever is no JSON in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(found, ensure_ascii=False).encode()  # half a character, which nobody could write down again
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("unreadable", f"{what} is no JSON that can be read ({type(error).__name__})", remedy) from None
    return found
