"""Transfer evaluation: arms × label budgets × protocols × seeds, each cell trained and tested once, the rest resumed."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from rich.console import Console

from meristem.errors import MeristemError, RecipeError
from meristem.modalities.likeness import Likeness
from meristem.platform.assembly import Assembly
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.data.splits import NAMES
from meristem.platform.data.traits import traits
from meristem.platform.encoders.lora import adapt
from meristem.platform.evaluation.leakage import audit, copies
from meristem.platform.evaluation.metrics import LABELS
from meristem.platform.evaluation.results import FEW, QUERIES, Budget, Cell, Counts, Dataset, Results, Spent
from meristem.platform.origin import METADATA, SCRATCH
from meristem.platform.recipe import build
from meristem.platform.step import first_rank
from meristem.platform.training import checkpoint
from meristem.platform.training.energy import Meter
from meristem.tasks.base import Scope, TaskRecipe, TaskSettings
from meristem.tasks.classification import Classifying
from meristem.tasks.finetune import choose, mean_scores, score, tune
from meristem.tasks.probing import Frozen, Headers, probe, untrained
from meristem.tasks.propagation import Carrying
from meristem.tasks.ways import WAYS, kept

RETRIEVAL = "R@1"  # by which retrieval is compared
ALONE = {"retrieval": RETRIEVAL, "few-shot": FEW}  # protocols with a metric of their own


@dataclass(frozen=True)
class Entrant:
    """What is compared: init is a run's directory, `SCRATCH` or `METADATA`; recipe: the task's, with the run's encoder; data:
    read as the run read them.
    """

    init: str
    recipe: TaskRecipe
    data: Data


@dataclass(frozen=True)
class Arm:
    """name: on the page. init: a pretraining run, or None for random weights and for `METADATA`."""

    name: str
    init: Path | None
    recipe: TaskRecipe
    data: Data

    @property
    def hash(self) -> str | None:
        if self.init is None:
            return None
        return checkpoint.identity(self.init)

    @property
    def network(self) -> str:
        """Of the encoder's settings and those of what it reads: arms that share it differ in weights alone."""
        found = self.recipe.record()
        return checkpoint.digest([found["encoder"], found["modality"]])

    def takes(self, protocol: str) -> bool:
        """Without an encoder there is nothing to fine-tune and no token to attend to."""
        return self.name != METADATA or protocol in ("linear", "svm", "knn", "few-shot", "retrieval")


def named(inits: Sequence[str]) -> dict[str, str]:
    """init -> distinct names for the page: of runs, those of their recipes."""
    found: dict[str, str] = {}
    for init in dict.fromkeys(inits):
        name = init if init in (SCRATCH, METADATA) else checkpoint.read_card(Path(init))["recipe"]["name"]
        if name in found.values():
            name = f"{name} {checkpoint.identity(Path(init))[-6:]}"  # not its folder's name, which may be a person's
        found[init] = name
    return found


def arms(entrants: Sequence[Entrant]) -> list[Arm]:
    """Arms with distinct names. A claim needs random weights to compare with: where they are not entered, each network that was
    pretrained gets such an arm of its own.
    """
    names = named([entrant.init for entrant in entrants])
    first = {entrant.init: entrant for entrant in reversed(entrants)}
    found = [Arm(name, None if init in (SCRATCH, METADATA) else Path(init), first[init].recipe, first[init].data)
             for init, name in names.items()]
    for arm in [arm for arm in found if arm.init is not None]:
        random = [other for other in found if other.init is None and other.name != METADATA]
        if all(other.network != arm.network for other in random):
            found.append(replace(arm, name=f"{SCRATCH} {arm.name}" if random else SCRATCH, init=None))
    return found


def seeded(recipe: TaskRecipe, seed: int) -> TaskRecipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})


def _cell_file(directory: Path, arm: Arm, protocol: str, labels: str, seed: int) -> Path:
    """The name of a cell's file holds all that decides its content, so a changed recipe or data set is a new cell."""
    rows = arm.data.manifest
    digest = checkpoint.digest([arm.name, arm.hash, protocol, labels, seed, arm.recipe.hash, rows.hash,
                                [row.split for row in rows.rows]])
    return directory / "cells" / f"{protocol}-{labels}-{seed}-{digest}.json"


@dataclass(frozen=True)
class Share:
    """The part of a grid that one of several processes runs: every `of`-th piece of work, from `number` on."""

    number: int
    of: int


@dataclass(frozen=True)
class _Parts:
    """Who of the data is labelled, by seed and budget, and who tests; everyone: all of these, and who validates."""

    drawn: list[list[list[Row]]]
    test: list[Row]
    everyone: list[Row]

    @classmethod
    def of(cls, task: TaskSettings, data: Data, labels: Sequence[str], seeds: int) -> _Parts:
        pool, test = task.cases(data, "train") if task.learns else [], task.cases(data, "test")
        drawn = [[choose(pool, budget, seed, data) for budget in labels] for seed in range(seeds)]
        labelled = (row for budgets in drawn for rows in budgets for row in rows)
        return cls(drawn, test, [*labelled, *task.cases(data, "val"), *test])


def evaluate(entrants: Sequence[Entrant], directory: Path, labels: Sequence[str], seeds: int, protocols: Sequence[str],
             quiet: bool = False, share: Share | None = None, others: Callable[[], None] | None = None) -> Results | None:
    """Run the grid. Finished cells are kept in `directory`/cells and not run again.

    Writes results.json (every case), metrics.json (a line per cell) and recipe.yaml.
    protocols: of the task's and of `WAYS` to train on labels; the task's first where none is named. A seed draws the
    labelled subjects and trains; all arms share the draw. The first entrant's recipe and data are those of the study.
    Label maps and logs of the first seed's cells are kept for the report. Where nothing is trained, a seed draws the random
    weights of the scratch arms, and the others are tested once. share: run this part alone, and return nothing. others:
    runs the shares of other processes; called once all is checked.
    """
    recipe, data = entrants[0].recipe, entrants[0].data
    offered, learns = recipe.task.protocols, recipe.task.learns
    offered += tuple(way for way in WAYS if learns and way not in offered)
    protocols = list(dict.fromkeys(protocols)) or [offered[0]]
    unfit = [p for p in protocols if p not in offered]
    if unfit:
        raise RecipeError(f"{recipe.task.kind} has no protocol '{unfit[0]}'", f"Choose of {', '.join(offered)}.")
    if not learns and list(labels) != ["all"]:
        raise RecipeError(f"{recipe.task.kind} trains on no labels, so it has no label budgets", "Leave --labels out.")
    alone = next((p for p in protocols if p in ALONE), None)
    if alone and len(protocols) > 1:
        raise RecipeError(f"{alone} is scored by {LABELS[ALONE[alone]]}, the other protocols by {recipe.task.metric}",
                          "Evaluate it into a directory of its own; `meristem report` puts several on one page.")
    scope = recipe.task.scope(data)
    pool = recipe.task.cases(data, "train") if learns else []
    test = recipe.task.cases(data, "test")
    if not test:
        raise MeristemError("there is no labelled test sample", "Check --split; 0,0,1 tests all.")
    if seeds < 1:
        raise RecipeError(f"{seeds} seeds give nothing to report", "Use --seeds 1 or more.")
    labels = list(dict.fromkeys(labels))
    sizes = {label: len({row.subject for row in choose(pool, label, 0, data)}) for label in labels if label != "all"}
    twice = next((label for label, size in sizes.items() if list(sizes.values()).count(size) > 1), None)
    if twice is not None:
        raise RecipeError(f"two label budgets come to {sizes[twice]} subjects, '{twice}' is one of them", "Leave one out.")
    (directory / "cells").mkdir(parents=True, exist_ok=True)
    contestants = arms(entrants)
    grid = [(protocol, arm) for protocol in protocols for arm in contestants if arm.takes(protocol)]
    if not grid:
        raise RecipeError(f"{METADATA} has no encoder, which {protocols[0]} needs", "Use --protocol linear, knn or retrieval.")
    for arm in contestants:  # what does not fit is refused now, not after hours
        if arm.init is not None:
            own = arm.recipe
            checkpoint.load_encoder(arm.init, own.assemble(scope.classes).encoder, own.modality, own.encoder.sees)
    cells: list[Cell] = []
    total = len(grid) * len(labels) * seeds
    metric = ALONE[alone] if alone else recipe.task.metric
    readings = {id(arm.data): arm.data for arm in contestants}
    parts = {key: _Parts.of(recipe.task, read, labels, seeds) for key, read in readings.items()}
    pretrained = {arm.name: Frozen(arm.recipe, arm.data, arm.init, parts[id(arm.data)].everyone, directory)
                  for arm in contestants if arm.init is not None}
    if others is not None:
        others()
    pieces: dict[tuple[object, ...], int] = {}  # what belongs together: probes of one encoder, or one training
    done = 0
    for seed in range(seeds):  # seed by seed: an early stop leaves complete, comparable grids
        frozen = dict(pretrained)
        for arm in [arm for arm in contestants if arm.init is None]:  # random weights are the seed's own
            kind = Headers if arm.name == METADATA else Frozen
            frozen[arm.name] = kind(seeded(arm.recipe, seed), arm.data, None, parts[id(arm.data)].everyone, directory)
        for (place, budget), (protocol, arm) in product(enumerate(labels), grid):
            done += 1
            file, mine = _cell_file(directory, arm, protocol, budget, seed), parts[id(arm.data)]
            rows = mine.drawn[seed][place]
            piece = (seed, budget, protocol, arm.name) if protocol in WAYS else (arm.name, seed if arm.init is None else 0)
            turn = pieces.setdefault(piece, len(pieces))
            if share is not None and (turn % share.of != share.number or file.exists()):
                continue
            subjects = len({row.subject for row in rows})
            title = f"[{done}/{total}] {arm.name}, {protocol}, {subjects} labelled {recipe.task.counted}, seed {seed}"
            if file.exists():
                cell = Cell.model_validate_json(file.read_text())
            elif seed and not learns and arm.init is not None:
                if share is not None:
                    continue
                cell = next(c for c in cells if c.arm == arm.name).model_copy(update={"seed": seed})
            else:
                # fine-tuning has a bar of its own; a probe would leave the terminal still for minutes
                still = protocol not in WAYS and not quiet and share is None and first_rank() and sys.stderr.isatty()
                with Console(stderr=True).status(title) if still else nullcontext():
                    cell = _run(arm, protocol, budget, rows, mine.test, scope, seed, title, frozen[arm.name],
                                directory if seed == 0 and first_rank() else None, quiet or share is not None,
                                Meter.here() if share is None else None)
                if first_rank():
                    checkpoint.write_text(file, cell.model_dump_json())
            cells.append(cell)
            if not quiet:
                shown = mean_scores(cell.cases, recipe.task, scope.scored)[metric]
                print(f"{title}: {metric} {'undefined' if shown is None else f'{shown:.4f}'}", file=sys.stderr, flush=True)
    if share is not None:
        return None
    results = _results(recipe, data, scope, contestants, cells, test, pool, metric)
    if first_rank():
        results.save(directory / "results.json")
        checkpoint.write_text(directory / "recipe.yaml", yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True))
        figures = [{"arm": c.arm, "protocol": c.protocol, "labels": c.labels, "seed": c.seed,
                    **mean_scores(c.cases, recipe.task, scope.scored)} for c in cells]
        checkpoint.write_text(directory / "metrics.json", json.dumps(figures, indent=1))
    return results


def _run(arm: Arm, protocol: str, labels: str, rows: list[Row], test: list[Row], scope: Scope, seed: int, title: str,
         frozen: Frozen, keep: Path | None, quiet: bool, meter: Meter | None) -> Cell:
    """meter: of the energy of this process's device, where nothing else runs beside it."""
    began, trained = time.perf_counter(), 0.0
    recipe, data = seeded(arm.recipe, seed), arm.data
    chosen: dict[str, float] = {}
    subjects = len({row.subject for row in rows})
    amount: int | Literal["all"] = "all" if labels == "all" and recipe.task.learns else subjects
    name = kept(protocol, arm.name, amount)
    maps: dict[str, np.ndarray] = {}
    if protocol in WAYS:
        recipe = WAYS[protocol](recipe)
        with tempfile.TemporaryDirectory() as folder:
            tuned = tune(recipe, data, rows, scope, arm.init, title, log=Path(folder), quiet=quiet)
            if tuned.outcome.stopped:
                raise MeristemError(f"stopped in the middle of {title}", "The same command goes on with what is left.")
            if keep is not None:
                (keep / "logs").mkdir(exist_ok=True)
                shutil.copyfile(Path(folder) / "metrics.jsonl", keep / "logs" / f"{name}.jsonl")
        trained, meter = tuned.outcome.joules or 0.0, meter and Meter.here()
        cases = score(tuned.outcome.assembly, data, test, scope, lambda row, map_: maps.__setitem__(row.case, map_))
        cost = Budget(steps=tuned.outcome.steps, batch=recipe.train.batch, trainable=tuned.trainable, seconds=0.0,
                      devices=tuned.outcome.devices)
    elif isinstance(recipe.task, Carrying):
        assembly = untrained(recipe, arm.init, scope.classes)
        cases = score(assembly, data, test, scope, lambda row, map_: maps.__setitem__(row.case, map_))
        cost = Budget(steps=0, batch=0, trainable=0, seconds=0.0)
        if keep is not None:
            for row in test:
                recipe.task.save(data, row, maps[row.case], keep / "predictions" / arm.name)
    else:
        cases, chosen, cost = probe(frozen, protocol, rows, test, scope.classes, recipe.train.seed)
    tested = meter.read() if meter is not None and cost.devices == 1 else None  # several devices test, and this knows of one
    cost = cost.model_copy(update={"seconds": round(time.perf_counter() - began, 2)})
    if meter is not None and tested is not None:
        cost = cost.model_copy(update={"metered": meter.of, "joules": round(trained + tested, 1)})
    if maps and keep is not None:
        (keep / "pictures").mkdir(exist_ok=True)
        np.savez_compressed(keep / "pictures" / f"{name}.npz", **maps)  # type: ignore[arg-type]
    encoder = "" if arm.name == METADATA else next(iter(recipe.dump()["encoder"]))
    return Cell(arm=arm.name, init=arm.hash, protocol=protocol, labels=amount, labelled_subjects=subjects, seed=seed,
                budget=cost, cases=tuple(cases), encoder=encoder, network=arm.network, chosen=chosen,
                drawn=checkpoint.digest(sorted({row.subject for row in rows})))


def _results(recipe: TaskRecipe, data: Data, scope: Scope, contestants: Sequence[Arm], cells: Sequence[Cell],
             test: Sequence[Row], pool: Sequence[Row], metric: str) -> Results:
    tested, trained = data.identities(test), data.identities(pool)
    likeness: Likeness | None = getattr(data.modality, "likeness", None)
    looks = data.fingerprints(test)

    def alike(known: Mapping[str, Any] | None) -> set[str] | None:
        """The test contents that look like one of the fingerprints a card or `Data.identities` holds; None: not comparable."""
        if likeness is None or known is None or known["method"] != likeness.method:
            return None
        return copies(looks, known["codes"], likeness)

    with_labels = alike(trained["fingerprints"]) or ()
    leakage, pretraining = {}, {}
    for arm in contestants:
        if arm.init is None:
            continue
        found = checkpoint.read_card(arm.init)
        seen = found["seen"]
        leakage[arm.name] = audit(tested["subjects"], tested["contents"], seen["subjects"], seen["contents"],
                                  trained["subjects"], trained["contents"], seen["key_id"] == tested["key_id"],
                                  recipe.task.spoiled(recipe, found["recipe"]),
                                  alike(seen.get("fingerprints")), with_labels)
        about = {"recipe": found["recipe"]["name"], "follows": found["recipe"]["follows"], "recipe hash": found["recipe_hash"]}
        about |= {"weights from elsewhere": found["weights"]} if "weights" in found else \
            {"steps": found["step"], "data manifest": found["manifest"]}
        if seen["contents"] is not None:
            about |= {"samples": len(seen["contents"]), "subjects": len(seen["subjects"])}
        pretraining[arm.name] = about
    divided = {name: recipe.task.cases(data, name) if recipe.task.parts else data.rows(name) for name in NAMES}
    splits = {name: Counts(subjects=len({r.subject for r in rows}), cases=len(rows)) for name, rows in divided.items()}
    settings: dict[str, Any] = {f"{recipe.name} (task)": recipe.record()}
    settings |= {f"{arm.name} (pretraining)": checkpoint.read_card(arm.init)["recipe"] for arm in contestants if arm.init}
    kind, classes = _scored(recipe.task, metric, scope)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return Results(task=recipe.name, kind=kind, metric=metric, classes=classes,
                   dataset=Dataset(name="the given data", manifest=data.manifest.hash, splits=splits,
                                   quarantined=len(data.cache.quarantine), modality=data.modality.name),
                   cells=tuple(cells), counted=recipe.task.counted, scoring=recipe.task.scoring,
                   overlaps=dict(getattr(recipe.task, "overlaps", {})), unit=scope.unit or "mm",
                   tolerance=getattr(recipe.task, "tolerance", None), traits=traits(data.manifest.rows, test),
                   pretraining=pretraining, leakage=leakage, versions=checkpoint.versions(), settings=settings,
                   spent={a.name: spent for a in contestants if a.init and (spent := _spent(a.init))}, cost={"device": device})


def _scored(task: TaskSettings, metric: str, scope: Scope) -> tuple[Any, tuple[str, ...]]:
    """`Results.kind` and `Results.classes` of what is compared by a metric."""
    if metric == RETRIEVAL:
        return "retrieval", (QUERIES,)
    if metric == FEW:
        assert isinstance(task, Classifying)
        return "few-shot", tuple(task.few_shot.settings)
    return task.kind, scope.scored


def _spent(run: Path) -> Spent | None:
    """Of a pretraining run, as its metrics.json says; None where that is missing, or of weights trained elsewhere."""
    file = run / "metrics.json"
    if "weights" in checkpoint.read_card(run) or not file.is_file():
        return None
    figures = json.loads(file.read_text())
    return Spent.model_validate({name: figures[name] for name in Spent.model_fields if name in figures})


def reload(run: Path) -> tuple[Assembly, TaskRecipe, Scope]:
    """A fine-tuned assembly from its run directory, with its classes."""
    found = checkpoint.read_card(run)
    if found["kind"] != "fine-tuned":
        raise MeristemError(f"{run} is a pretraining run: it has no task head", "Fine-tune it first.")
    recipe = build(found["recipe"], TaskRecipe)
    scope = Scope(dict(enumerate(found["classes"])), tuple(found["scored"]), next((axis["unit"] for axis in found["axes"]), ""))
    assembly = recipe.assemble(scope.classes)
    if recipe.lora is not None:
        adapt(assembly.encoder, recipe.lora)
    assembly.load_state_dict(checkpoint.read_weights(run))
    return assembly.eval(), recipe, scope

