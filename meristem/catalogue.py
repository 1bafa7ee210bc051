"""The built-in recipes as a list, read without importing torch."""

from __future__ import annotations

from pathlib import Path

import yaml

CONFIGS = Path(__file__).parent / "configs"


def names() -> list[str]:
    """All built-in recipes that are whole: not a base, not a method part."""
    found = (p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.glob("*/*.yaml"))
    return sorted(n for n in found if not n.startswith("method/") and not n.endswith("/base"))


def rows() -> list[dict[str, str]]:
    """name, status and source of each recipe, bases merged for these keys only; a status is nobody's but its own."""
    def look(name: str) -> dict[str, str]:
        data = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) or {}
        bases = data.get("extends", [])
        merged: dict[str, str] = {}
        for base in [bases] if isinstance(bases, str) else bases:
            merged |= look(base)
        merged.pop("status", None)
        return merged | {k: str(data[k]) for k in ("status", "follows", "departs") if k in data}

    return [{"name": name, "status": "expressible", "follows": "", "departs": "", **look(name)} for name in names()]
