"""What benchmarks keep between calls."""

from __future__ import annotations

import json
from pathlib import Path


def finished(run: Path) -> bool:
    """Whether a run came to its last step; one that was asked to stop goes on with resume."""
    figures = run / "metrics.json"
    return figures.is_file() and not json.loads(figures.read_text())["stopped_early"]
