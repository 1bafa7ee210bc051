"""The built-in recipes as a list, read without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parent / "configs"
STATUSES = ("verified", "tested", "expressible")
# of the engine that an objective belongs to; a test holds every objective to be here
FAMILIES = {
    "masked": "masked",
    "contrastive": "contrastive", "infomax": "contrastive", "bag_of_words": "contrastive", "overlap": "contrastive",
    "pretext": "pretext",
    "links": "relational", "hops": "relational", "property": "relational",
    "distil": "distillation"}


def names() -> list[str]:
    """All built-in recipes that are whole: not a base, not a method part."""
    found = (p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.glob("*/*.yaml"))
    return sorted(n for n in found if not n.startswith("method/") and not n.endswith("/base"))


def family(objectives: Mapping[str, Any]) -> str:
    """The engines that a recipe's `objectives` belong to, e.g. `contrastive + masked`; `task` where there are none."""
    kinds = {FAMILIES[o if isinstance(o, str) else next(iter(o))] for o in objectives.values() if o}
    return " + ".join(sorted(kinds)) or "task"


def rows() -> list[dict[str, str]]:
    """name, modality, family, status and source of each recipe, by modality, family and status.

    Bases are merged for these keys only; a status is nobody's but its own.
    """
    def look(name: str) -> dict[str, Any]:
        data = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) or {}
        bases = data.get("extends", [])
        merged: dict[str, Any] = {"objectives": {}}
        for base in [bases] if isinstance(bases, str) else bases:
            below = look(base)
            merged |= below | {"objectives": merged["objectives"] | below["objectives"]}
        for member in (data.get("members") or {}).values():
            merged["objectives"] |= look(member["extends"])["objectives"]
        merged.pop("status", None)
        merged["objectives"] |= data.get("objectives") or {}
        return merged | {k: str(data[k]) for k in ("status", "follows", "departs") if k in data}

    found = []
    for name in names():
        row = {"status": "expressible", "follows": "", "departs": "", **look(name)}
        found.append({"name": name, "modality": name.split("/")[0], "family": family(row.pop("objectives")), **row})
    return sorted(found, key=lambda row: (row["modality"], row["family"], STATUSES.index(row["status"]), row["name"]))


def like(modality: str, objectives: Mapping[str, Any]) -> list[str]:
    """The built-in recipes of a modality that share an engine with these objectives."""
    wanted = set(family(objectives).split(" + "))
    return [row["name"] for row in rows() if row["modality"] == modality and wanted & set(row["family"].split(" + "))]
