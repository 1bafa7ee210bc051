"""Pretraining: a recipe, unlabelled data, a run directory."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from meristem.errors import MeristemError
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import loader
from meristem.platform.data.source import Data
from meristem.platform.recipe import Recipe
from meristem.platform.training import checkpoint
from meristem.platform.training.loop import Outcome, launch, train
from meristem.platform.training.progress import Reporter


def card(recipe: Recipe, data: Data, identities: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What a checkpoint says of itself, beside its step and reference embedding."""
    modality = recipe.modality
    prefix = "teacher.copies.encoder." if recipe.transfer == "teacher" else "encoder."
    return {"kind": kind, "recipe": recipe.dump(), "recipe_hash": recipe.hash, "modality": modality.name,
            "axes": [{"name": a.name, "unit": a.unit} for a in modality.axes], "channels": modality.channels,
            "transfer": prefix, "manifest": data.manifest.hash, "samples": len(data.cache), "seen": dict(identities),
            "versions": checkpoint.versions(),
            "licence": "Weights inherit the terms of the data they were trained on; check them before sharing."}


def open_run(directory: Path, recipe: Recipe, data: Data | None, resume: bool) -> Path | None:
    """Make a run directory, or find the checkpoint to go on from. Raises MeristemError rather than overwrite a run."""
    if resume:
        found = checkpoint.locate(directory)
        if checkpoint.read_card(found)["recipe_hash"] != recipe.hash:
            raise MeristemError(f"the recipe differs from the one {directory.name} was started with",
                                "Resume with the same recipe and overrides, or start a new directory.")
        return found
    if (directory / "recipe.yaml").exists():
        raise MeristemError(f"{directory} already holds a run", "Choose another --out, or pass --resume to go on with it.")
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(directory / "recipe.yaml", yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True))
    if data is not None:
        data.cache.write_quarantine(directory / "quarantine.csv")
    return None


def close_run(directory: Path, outcome: Outcome, more: Mapping[str, Any]) -> None:
    """metrics.json: the final figures."""
    figures = {"steps": outcome.steps, "seconds": round(outcome.seconds, 2), "samples": outcome.samples,
               "skipped_steps": outcome.skipped, "stopped_early": outcome.stopped,
               **{k: round(v, 6) for k, v in outcome.last.items()}, **more}
    checkpoint.write_text(directory / "metrics.json", json.dumps(figures, indent=1))


def pretrain(recipe: Recipe, data: Data, directory: Path, *, resume: bool = False, quiet: bool = False) -> Outcome:
    """Train a recipe on the rows that pretraining may see. Writes recipe.yaml, metrics.jsonl, metrics.json and checkpoints."""
    began = time.perf_counter()
    fabric = launch(recipe.train)
    rows = data.unlabelled()
    if not rows:
        raise MeristemError("the training split is empty", "Give more data, or another --split.")
    start = None
    if fabric.global_rank == 0:
        start = open_run(directory, recipe, data, resume)
    fabric.barrier()
    if fabric.global_rank != 0 and resume:
        start = checkpoint.locate(directory)
    fabric.seed_everything(recipe.train.seed, verbose=False)
    assembly = Assembly(recipe)
    identities = data.identities(rows)

    def batches(first: int, rank: int, world: int) -> Any:
        return iter(loader(data.cache, rows, recipe, start=first, steps=recipe.train.steps, rank=rank, world=world,
                           workers=recipe.train.workers))

    first = fabric.global_rank == 0
    with Reporter(f"{recipe.name} {recipe.modality.name}", recipe.train.steps, directory if first else None, quiet) as reporter:
        outcome = train(recipe, assembly, batches, fabric, reporter, directory=directory,
                        card=card(recipe, data, identities, "pretraining"), resume=start)
    if first:
        close_run(directory, outcome, {"samples_seen": len(rows), "quarantined": len(data.cache.quarantine),
                                       "wall_seconds": round(time.perf_counter() - began, 2)})
    return outcome
