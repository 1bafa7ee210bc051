"""One fine-tuning: a task recipe, labelled rows, an initialisation; trained, then tested on held-out rows."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError, RecipeError
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import loader
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.data.splits import NAMES, budget
from meristem.platform.encoders.lora import adapt
from meristem.platform.evaluation import detection
from meristem.platform.evaluation.metrics import means, set_metrics
from meristem.platform.evaluation.results import QUERIES, SHAPES, Case
from meristem.platform.origin import SCRATCH
from meristem.platform.recipe import build, override, read
from meristem.platform.step import first_rank
from meristem.platform.training import checkpoint
from meristem.platform.training.loop import Outcome, launch, train
from meristem.platform.training.pretrain import card, close_run, met, open_run, reference
from meristem.platform.training.progress import Reporter
from meristem.tasks.base import Keep, Scope, TaskRecipe, TaskSettings, objective


@dataclass
class Tuned:
    """What came of one fine-tuning. load: what happened to the checkpoint's tensors; None from scratch."""

    outcome: Outcome
    scope: Scope
    rows: list[Row]
    trainable: int
    load: checkpoint.LoadReport | None


def resolve(task: str, modality: str, assignments: Sequence[str], like: Path | None = None) -> TaskRecipe:
    """The recipe of a task: its own file, with the modality and encoder of a checkpoint laid over it, then overrides.

    task: `segmentation` (then `<modality>/segmentation`), a recipe name, or a YAML file. Of a checkpoint of another modality
    the encoder alone is taken. Raises CheckpointError where its weights cannot serve this modality.
    """
    data = read(task if "/" in task or task.endswith((".yaml", ".yml")) else f"{modality}/{task}")
    if like is not None:
        found = checkpoint.read_card(like)
        taken = ("encoder", "summary") if found["modality"] != modality else ("encoder", "summary", "modality")
        data = {**data, **{name: found["recipe"][name] for name in taken}}
        recipe = build(override(data, assignments), TaskRecipe)
        if found["modality"] != modality:  # refused before any file is read
            checkpoint.load_encoder(like, Assembly(recipe).encoder, recipe.modality, recipe.encoder.sees)
        return recipe
    return build(override(data, assignments), TaskRecipe)


def choose(rows: Sequence[Row], labels: str | int | float, seed: int, data: Data) -> list[Row]:
    """The labelled rows of a budget: a count of subjects, a fraction, or `all`."""
    if labels == "all":
        return list(rows)
    amount = labels
    if isinstance(labels, str):
        try:
            amount = int(labels) if labels.isdigit() else float(labels)
        except ValueError:
            raise RecipeError(f"a label budget is a count, a fraction or all; got '{labels}'", "E.g. --labels 10") from None
    assert not isinstance(amount, str)
    if not math.isfinite(amount):
        raise RecipeError(f"a label budget is a count, a fraction or all; got '{labels}'", "E.g. --labels 10")
    volumes = {row.index: data.cache.volume(row.index) for row in rows if "mask" in row.fields}
    return budget(rows, amount, seed, volumes)


def tune(recipe: TaskRecipe, data: Data, rows: Sequence[Row], scope: Scope, init: Path | None, title: str, *,
         directory: Path | None = None, log: Path | None = None, resume: bool = False, quiet: bool = False) -> Tuned:
    """Train a task recipe on labelled rows.

    directory: a run directory to write; None keeps the weights in memory. log: where metrics.jsonl goes then, if anywhere.
    """
    if not rows:
        raise DataError("label", "there is no labelled training sample for this task", "Check --split and the labels.")
    fabric = launch(recipe.train)
    fabric.seed_everything(recipe.train.seed, verbose=False)
    assembly = recipe.assemble(scope.classes)
    load = None
    if init is not None:
        load = checkpoint.load_encoder(init, assembly.encoder, recipe.modality, recipe.encoder.sees)
        if not quiet and fabric.global_rank == 0:
            print(f"{title}  {load.line()}", file=sys.stderr)
    if recipe.lora is not None:
        adapt(assembly.encoder, recipe.lora)

    samples = objective(assembly).learn_from(data, rows)

    def batches(first: int, rank: int, world: int) -> Any:
        return iter(loader(data.cache, samples, recipe, fields=recipe.task.fields, start=first, steps=recipe.train.steps,
                           rank=rank, world=world, workers=recipe.train.workers))

    own = {**card(recipe, data, met(data.identities(rows), init), "fine-tuned"), "classes": list(scope.values.values()),
           "scored": list(scope.scored), "init": None if init is None else checkpoint.identity(init),
           "load": load.dump() if load else None}
    start = open_run(fabric, directory, own, data, resume) if directory is not None else None
    with Reporter(title, recipe.train.steps, (directory or log) if fabric.global_rank == 0 else None, quiet) as reporter:
        outcome = train(recipe.train, assembly, batches, fabric, reporter, directory=directory,
                        card=lambda usable: {**own, **reference(usable)}, resume=start)
        if outcome.stopped and directory is not None:
            reporter.say(f"stopped after {outcome.steps} of {recipe.train.steps} steps, not tested; --resume goes on")
    trainable = sum(p.numel() for p in assembly.parameters() if p.requires_grad)
    return Tuned(outcome, scope, list(rows), trainable, load)


def mean_scores(cases: Sequence[Case], task: TaskSettings | None = None, classes: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of a run's metrics.json: means over cases, or metrics of the set; None where one is undefined.

    task, classes: of detections, how they are scored and the names of their classes.
    """
    if not cases:
        return {}
    if cases[0].truth is not None:
        assert task is not None
        boxes = detection.figures(cases, classes, task.scoring, getattr(task, "overlaps", {}))
        return {f"{name}/{c}" if c else name: round(v, 6) if math.isfinite(v) else None for name, values in boxes.items()
                for c, v in values.items()}
    if cases[0].target is not None:
        target = np.array([case.target for case in cases])
        probabilities = np.array([case.probabilities for case in cases])
        scores = {name: float(metric(target, probabilities)) for name, metric in set_metrics(probabilities.shape[1]).items()}
        return {name: round(v, 6) if math.isfinite(v) else None for name, v in scores.items()}
    found = means([case.metrics for case in cases], [case.category for case in cases])
    return {f"{name}/{c}" if c else name: round(v, 6) for name, values in found.items() for c, v in values.items()
            if c not in (QUERIES, SHAPES)}


def finetune(recipe: TaskRecipe, data: Data, directory: Path, *, init: Path | None, labels: str = "all",
             train_on: Sequence[str] = ("train",), resume: bool = False, quiet: bool = False,
             keep: Keep | None = None) -> Tuned:
    """Fine-tune into a run directory and score the test split. Writes metrics.json and cases.json beside the checkpoint.

    train_on: splits whose labels are learned from; where `test` is among them, nothing is scored.

    A run that was asked to stop is not scored. Every rank scores, so that none waits for another; rank 0 writes.
    """
    began = time.perf_counter()
    if not recipe.task.learns:
        raise RecipeError(f"{recipe.task.kind} trains nothing", "Compare encoders by it: `meristem evaluate`.")
    scope = recipe.task.scope(data)
    unknown = set(train_on) - set(NAMES)
    if unknown:
        raise RecipeError(f"there is no split '{min(unknown)}' to train on", f"Name splits of {', '.join(NAMES)}.")
    rows = choose(recipe.task.cases(data, tuple(train_on)), labels, recipe.train.seed, data)
    test = recipe.task.cases(data, "test") if "test" not in train_on else []
    tuned = tune(recipe, data, rows, scope, init, f"{recipe.name} {recipe.modality.name}", directory=directory, resume=resume,
                 quiet=quiet)
    cases = [] if tuned.outcome.stopped else score(tuned.outcome.assembly, data, test, scope, keep)
    if first_rank():
        if not tuned.outcome.stopped:
            checkpoint.write_text(directory / "cases.json", json.dumps([case.model_dump() for case in cases], indent=1))
        close_run(directory, tuned.outcome, {"labelled_subjects": len({row.subject for row in rows}), "test_cases": len(cases),
                                             "init": checkpoint.identity(init) if init else SCRATCH,
                                             "test": mean_scores(cases, recipe.task, scope.scored),
                                             "wall_seconds": round(time.perf_counter() - began, 2)})
    return tuned


def score(assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, keep: Keep | None = None) -> list[Case]:
    """Test an assembly on rows; nothing to test gives nothing."""
    return objective(assembly).test(assembly, data, rows, scope, keep) if rows else []
