"""What a frozen encoder is worth to classification: probes and retrieval on what it makes of whole samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from meristem.platform.assembly import Assembly
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.evaluation.probes import AttentiveClassifier, Features, Shallow, Split, Tokens, retrieve
from meristem.platform.evaluation.results import FEW, QUERIES, Budget, Case
from meristem.platform.training import checkpoint
from meristem.tasks.base import TaskRecipe
from meristem.tasks.classification import Classification, Classifying
from meristem.tasks.embedding import embed, facts, features

UNTRAINED = Budget(steps=0, batch=0, trainable=0, seconds=0.0)


def untrained(recipe: TaskRecipe, init: Path | None, classes: int | None = None) -> Assembly:
    """The encoder of a run, or random by the recipe's seed, on the device; beside the head for so many classes, if told."""
    torch.manual_seed(recipe.train.seed)
    assembly = Assembly(recipe) if classes is None else recipe.assemble(classes)
    if init is not None:
        checkpoint.load_encoder(init, assembly.encoder, recipe.modality, recipe.encoder.sees)
    return assembly.cuda() if torch.cuda.is_available() else assembly


class Frozen:
    """One encoder, pretrained or random by the recipe's seed, that sees a sample once whatever budgets and probes ask for it.

    rows: whoever will be asked for. directory: for features of all tokens that are too large for memory.
    """

    def __init__(self, recipe: TaskRecipe, data: Data, init: Path | None, rows: Sequence[Row], directory: Path) -> None:
        self.recipe, self.data, self.init, self.directory = recipe, data, init, directory
        self.rows = list({_key(row): row for row in rows}.values())
        self._embedded: dict[tuple[int, int, int], np.ndarray] = {}

    def _embed(self, rows: Sequence[Row]) -> np.ndarray:
        task = self.recipe.task
        assert isinstance(task, Classifying)
        return embed(untrained(self.recipe, self.init), self.data, rows, summaries=task.features)

    def vectors(self, rows: Sequence[Row]) -> np.ndarray:
        """(n, D)."""
        if any(_key(row) not in self._embedded for row in rows):
            known = {_key(row): row for row in (*self.rows, *rows) if _key(row) not in self._embedded}
            self._embedded.update(zip(known, self._embed(list(known.values())), strict=True))
        return np.stack([self._embedded[_key(row)] for row in rows])

    @cached_property
    def _features(self) -> Features:
        task = self.recipe.task
        assert isinstance(task, Classification)
        return features(untrained(self.recipe, self.init), self.data, self.rows, task.attentive.memory, self.directory)

    def tokens(self, rows: Sequence[Row]) -> Tokens:
        place = {_key(row): i for i, row in enumerate(self.rows)}
        return Tokens(self._features, np.array([place[_key(row)] for row in rows]), targets(rows))


class Headers(Frozen):
    """No encoder: what can be read off samples before any pixel."""

    def vectors(self, rows: Sequence[Row]) -> np.ndarray:
        return facts(self.data, rows)


def _key(row: Row) -> tuple[int, int, int]:
    return row.index, row.element, row.other


def targets(rows: Sequence[Row]) -> np.ndarray:
    return np.array([row.labels["class"] for row in rows])


def probe(frozen: Frozen, protocol: str, rows: Sequence[Row], test: Sequence[Row], classes: int,
          seed: int) -> tuple[list[Case], dict[str, float], Budget]:
    """Cases of a protocol, what it picked on the validation split (within the labelled rows, where there is none), its cost."""
    task = frozen.recipe.task
    assert isinstance(task, Classifying)

    def split(part: Sequence[Row]) -> Split:
        return Split(frozen.vectors(part), targets(part))

    if protocol == "retrieval":
        scores = retrieve(split(rows), split(test))
        return [Case(case=row.case, subject=row.subject, metrics={name: {QUERIES: float(v[i])} for name, v in scores.items()})
                for i, row in enumerate(test)], {}, UNTRAINED
    if protocol == "few-shot":
        trials = task.few_shot(split(task.cases(frozen.data, "train")), split(test))
        return [Case(case=f"trial {i}", subject=f"trial {i}", metrics={FEW: {name: float(v[i]) for name, v in trials.items()}})
                for i in range(task.few_shot.trials)], {}, UNTRAINED
    validation, cost, chosen = task.cases(frozen.data, "val"), UNTRAINED, {}
    if protocol == "attentive":
        assert isinstance(task, Classification)
        attentive = task.attentive
        train = frozen.tokens(rows)
        found = attentive(train, frozen.tokens(validation or rows), frozen.tokens(test), classes, seed)
        probabilities, chosen = found.probabilities, dict(zip(("lr", "weight_decay"), found.chosen, strict=True))
        size = sum(p.numel() for p in AttentiveClassifier(train.features.tokens.shape[-1], classes).parameters())
        cost = Budget(steps=attentive.steps, batch=attentive.batch, trainable=size, seconds=0.0)
    else:
        shallow: dict[str, Shallow] = {"knn": task.knn, "linear": task.linear, "svm": task.svm}
        picked = shallow[protocol](split(rows), split(validation) if validation else None, frozen.vectors(test), classes)
        probabilities, chosen = picked.probabilities, {"k" if protocol == "knn" else "C": picked.chosen}
    return [Case(case=row.case, subject=row.subject, target=row.labels["class"], probabilities=tuple(p.tolist()))
            for row, p in zip(test, probabilities, strict=True)], chosen, cost
