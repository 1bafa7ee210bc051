from pathlib import Path
from typing import Any
def draw(dirs: Any, out: Path, data: Any = None, inits: Any = None) -> Path:
    return out
