"""Pretraining: a recipe, unlabelled data, a run directory."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning_fabric import Fabric

from meristem.errors import CheckpointError, MeristemError
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import loader
from meristem.platform.data.source import Data
from meristem.platform.encoders.base import Encoder
from meristem.platform.recipe import Recipe
from meristem.platform.training import checkpoint
from meristem.platform.training.loop import Outcome, launch, train
from meristem.platform.training.progress import Reporter


def describe(recipe: Recipe, kind: str) -> dict[str, Any]:
    """What a checkpoint says of itself, beside what it was trained on, its step and reference embedding."""
    modality = recipe.modality
    prefix = "teacher.copies.encoder." if recipe.transfer == "teacher" else "encoder."
    return {"kind": kind, "recipe": recipe.record(), "recipe_hash": recipe.hash, "modality": modality.name,
            "axes": [{"name": a.name, "unit": a.unit} for a in modality.axes], "channels": modality.channels,
            "transfer": prefix, "versions": checkpoint.versions()}


def card(recipe: Recipe, data: Data, identities: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """`describe`, and what it was trained on."""
    return {**describe(recipe, kind), "manifest": data.manifest.hash, "samples": len(data.cache), "seen": dict(identities),
            **({"shards": data.cache.ordering} if data.cache.ordering else {}),
            "licence": "Weights inherit the terms of the data they were trained on; check them before sharing."}


def reference(assembly: Assembly) -> dict[str, Any]:
    """The card's built-in input: its size, what the encoder that transfers saw, and what came out."""
    recipe = assembly.recipe
    encoder, size = assembly.module(recipe.transfer, "encoder"), tuple(next(iter(recipe.views.values())).size)  # type: ignore[attr-defined]
    assert isinstance(encoder, Encoder)
    embedding = checkpoint.reference_embedding(encoder, recipe.modality, recipe.encoder.sees, size)
    return {"reference": {"size": list(size), "sees": sorted(recipe.encoder.sees), "embedding": embedding}}


def open_run(fabric: Fabric, directory: Path, about: Mapping[str, Any], data: Data, resume: bool) -> Path | None:
    """Make a run directory, or find the checkpoint to go on from: None where nothing was saved yet, as by a job that was
    stopped before it came to that.

    about: the card of what is to be trained. Rank 0 writes; all ranks return the same.
    Raises MeristemError rather than overwrite a run, or go on with another recipe, other samples or another start.
    """
    begun = (directory / "recipe.yaml").exists()
    saved = any((directory / "checkpoints").glob("step-*"))
    other = not begun and directory.is_dir() and any(not inside.name.startswith(".") for inside in directory.iterdir())
    fabric.barrier()  # all have looked before one writes
    if begun and not resume:
        raise MeristemError(f"{directory} already holds a run", "Choose another --out, or pass --resume to go on with it.")
    if resume and (saved or other):
        found = checkpoint.locate(directory)
        before = checkpoint.read_card(found, joint=True)
        for key, what in (("recipe_hash", "the recipe differs"), ("kind", "the kind of run differs"),
                          ("init", "the initial weights differ"), ("shards", "the shards differ")):
            if before.get(key) != about.get(key):
                raise CheckpointError(f"{what} from what {directory.name} was started with",
                                      "Resume with the same arguments, or start a new directory.")
        if _samples(before) != _samples(about):
            raise CheckpointError(f"the training samples differ from those {directory.name} was started with",
                                  "Resume with the same --data, --split and --labels, or start a new directory.")
        return found
    if fabric.global_rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(directory / "recipe.yaml", yaml.safe_dump(about["recipe"], sort_keys=False, allow_unicode=True))
        data.cache.write_quarantine(directory / "quarantine.csv")
    return None


def _samples(card: Mapping[str, Any]) -> Any:
    """What tells the samples of a run; of one that began with weights from elsewhere not all contents are known."""
    return card["seen"]["contents"] or card["manifest"]


def close_run(directory: Path, outcome: Outcome, more: Mapping[str, Any]) -> None:
    """metrics.json: the final figures."""
    figures = {"steps": outcome.steps, "seconds": round(outcome.seconds, 2), "samples": outcome.samples,
               "devices": outcome.devices, "joules": None if outcome.joules is None else round(outcome.joules, 1),
               "metered": outcome.metered,
               "skipped_steps": outcome.skipped, "stopped_early": outcome.stopped,
               **{k: round(v, 6) if math.isfinite(v) else None for k, v in outcome.last.items()}, **more}
    checkpoint.write_text(directory / "metrics.json", json.dumps(figures, indent=1))


def met(identities: dict[str, Any], init: Path | None) -> dict[str, Any]:
    """Whom the weights have met: in this training, and before it. key_id: of none when the pseudonyms are of two keys.

    subjects, contents: None where that is not known of what they started from. fingerprints: None also where they were made by
    two methods, or not at all.
    """
    if init is None:
        return identities
    before = checkpoint.read_card(init)["seen"]
    if before["contents"] is None:
        return {"subjects": None, "contents": None, "fingerprints": None, "key_id": ""}
    here, there = identities["fingerprints"], before.get("fingerprints")
    comparable = here and there and here["method"] == there["method"]
    return {"subjects": sorted({*identities["subjects"], *before["subjects"]}),
            "contents": sorted({*identities["contents"], *before["contents"]}),
            "fingerprints": {**here, "codes": sorted({*here["codes"], *there["codes"]})} if comparable else None,
            "key_id": identities["key_id"] if identities["key_id"] == before["key_id"] else ""}


def pretrain(recipe: Recipe, data: Data, directory: Path, *, init: Path | None = None, resume: bool = False,
             quiet: bool = False) -> Outcome:
    """Train a recipe on the rows that pretraining may see. Writes recipe.yaml, metrics.jsonl, metrics.json and checkpoints.

    init: a run whose encoder is where this one's, and its teacher's, starts.
    """
    began = time.perf_counter()
    fabric = launch(recipe.train)
    rows = data.rows("train")
    if not rows:
        raise MeristemError("the training split is empty", "Give more data, or another --split.")
    about = {**card(recipe, data, met(data.identities(rows), init), "pretraining"),
             **({} if init is None else {"init": checkpoint.identity(init)})}
    start = open_run(fabric, directory, about, data, resume)
    fabric.seed_everything(recipe.train.seed, verbose=False)
    assembly = Assembly(recipe)
    if init is not None:
        load = checkpoint.load_encoder(init, assembly.encoder, recipe.modality, recipe.encoder.sees)
        if assembly.teacher is not None:
            assembly.teacher.follow({name: assembly.module("encoder", name) for name in assembly.teacher.copies}, 0.0)
        if not quiet and fabric.global_rank == 0:
            print(f"{recipe.name}  {load.line()}", file=sys.stderr)

    def batches(first: int, rank: int, world: int) -> Any:
        return iter(loader(data.cache, rows, recipe, fields=recipe.reads, start=first, steps=recipe.train.steps, rank=rank,
                           world=world, workers=recipe.train.workers))

    first = fabric.global_rank == 0
    with Reporter(f"{recipe.name} {recipe.modality.name}", recipe.train.steps, directory if first else None, quiet) as reporter:
        outcome = train(recipe.train, assembly, batches, fabric, reporter, directory=directory,
                        card=lambda usable: {**about, **reference(usable)}, resume=start)
        if outcome.stopped:
            reporter.say(f"stopped after {outcome.steps} of {recipe.train.steps} steps; --resume goes on")
    if first:
        close_run(directory, outcome, {"samples_seen": len(rows), "quarantined": len(data.cache.quarantine),
                                       "wall_seconds": round(time.perf_counter() - began, 2)})
    return outcome
