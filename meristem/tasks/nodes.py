"""Classification of nodes: the unit that is labelled, counted, tested and resampled is the node, not its graph."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from meristem.errors import DataError
from meristem.platform.assembly import Assembly
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.data.splits import NAMES, drawn
from meristem.platform.objectives import Loss
from meristem.platform.step import Step
from meristem.tasks.base import Scope, TaskRecipe
from meristem.tasks.classification import Classifying, LinearObjective
from meristem.tasks.embedding import parts

Fraction = Annotated[float, Field(ge=0, le=1)]


class NodeObjective(LinearObjective):
    """Of the tokens of nodes. A view may hold any of them; only those that it was told to learn from have a target."""

    def __init__(self, assembly: Assembly, settings: Nodes, classes: int) -> None:
        super().__init__(assembly, settings, classes)
        self.first: dict[int, int] = {}  # of each graph's nodes in the table
        (self.size,) = assembly.recipe.views["x"].size  # type: ignore[attr-defined]
        self.register_buffer("target", torch.empty(0, dtype=torch.int64), persistent=False)

    def learn_from(self, data: Data, rows: Sequence[Row]) -> list[Row]:
        graphs = data.samples(rows)
        sizes = [data.cache.header(row.index).shape[1] for row in graphs]
        self.first = dict(zip((row.index for row in graphs), np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        self.target = torch.full((sum(sizes),), -1)
        self.target[[self.first[row.index] + row.element for row in rows]] = torch.tensor([row.labels["class"] for row in rows])
        fit = {row.index for row, n in zip(graphs, sizes, strict=True) if n <= self.size}
        windows = [row for row in rows if row.index not in fit]  # of a larger graph, one about each node that teaches
        return [*(row for row in graphs if row.index in fit), *windows]

    def forward(self, step: Step) -> dict[str, Loss]:
        view, encoded = step.batch.views["x"], step.encode("x")
        assert view.index is not None
        if not self.first:  # a recipe that is looked at, without data
            return self.loss(encoded.tokens[encoded.valid], view.index[encoded.valid] % self.out.out_features)
        first = torch.tensor([self.first[row] for row in step.batch.items.row[view.item].tolist()], device=view.index.device)
        target = self.target[first[:, None] + view.index.clamp_min(0)].masked_fill(view.index < 0, -1)
        return self.loss(encoded.tokens[encoded.valid], target[encoded.valid])

    @torch.no_grad()
    def probabilities(self, assembly: Assembly, data: Data, rows: Sequence[Row]) -> Tensor:
        return parts(assembly, data, rows, lambda encoded: self.scores(encoded.tokens).softmax(-1))[:, 0]

    def write(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, out: Path) -> list[Path]:
        """predictions.csv: file, node, predicted class, probability of each class; of every node."""
        path = out / "predictions.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "node", "class", *scope.values.values()])
            for row in rows:
                header = data.cache.header(row.index)
                found = self.probabilities(assembly, data, [row.part(k, -1, "") for k in range(header.shape[1])])
                names = data.called(row) or range(len(found))
                for name, p in zip(names, found, strict=True):
                    writer.writerow([row.local, name, scope.values[int(p.argmax())], *(f"{x:.6f}" for x in p.tolist())])
        return [path]


class Nodes(Classifying):
    """split: train, val and test shares of the nodes, where the data declares none and has no labelled graph to test on.

    The field `mask` of a graph holds its nodes' classes, −1 none; `split`, where it is there, 0 train, 1 val, 2 test, −1 none.
    The rest as in `Classifying`.
    """

    counted = "nodes"
    protocols: ClassVar[tuple[str, ...]] = ("finetune", "linear", "svm", "knn", "retrieval")
    split: tuple[Fraction, Fraction, Fraction] = (0.6, 0.2, 0.2)

    @model_validator(mode="after")
    def _divides(self) -> Nodes:
        if abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"split {list(self.split)} does not sum to 1")
        return self

    def check(self, recipe: TaskRecipe) -> list[str]:
        if not recipe.modality.tokenizer().edge_kinds:
            return [f"classifying nodes needs graphs; the modality '{recipe.modality.name}' has no edges"]
        return ["features: nodes have no summaries; leave it out"] if self.features else []

    def cases(self, data: Data, split: str | Sequence[str]) -> list[Row]:
        """The nodes of a split: as the data declares it, else that of their graph, else drawn."""
        wanted = (split,) if isinstance(split, str) else tuple(split)
        return [row for row in self._divided(data) if row.split in wanted]

    def _divided(self, data: Data) -> list[Row]:
        graphs = [row for row in data.rows() if "mask" in data.cache.fields(row.index)]
        apart = any(row.split == "test" for row in graphs)
        found, open_ = [], []
        for row in graphs:
            label = data.cache.field(row.index, "mask").astype(int)
            labelled = np.flatnonzero(label >= 0).tolist()
            if "split" in data.cache.fields(row.index):
                declared = data.cache.field(row.index, "split").astype(int)
                found += [row.part(k, int(label[k]), NAMES[declared[k]]) for k in labelled if declared[k] >= 0]
            elif apart:
                found += [row.part(k, int(label[k]), row.split) for k in labelled]
            else:
                open_ += [row.part(k, int(label[k]), "") for k in labelled]
        chosen = drawn(open_, self.split) if open_ else {}
        return [*found, *(replace(row, split=chosen[row.subject]) for row in open_)]

    def scope(self, data: Data) -> Scope:
        top = max(_values(data), default=-1)
        if top < 1:
            raise DataError("label", "the nodes have no classes", "Give files that hold them, or classify whole graphs.")
        names = data.manifest.mask_names
        return self.fits(tuple(names[v] if v < len(names) and names[v] else f"class {v}" for v in range(top + 1)))

    def build(self, assembly: Assembly, classes: int) -> NodeObjective:
        return NodeObjective(assembly, self, classes)


def _values(data: Data) -> Iterator[int]:
    for row in data.rows():
        yield from data.cache.counts(row.index)
