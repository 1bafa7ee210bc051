"""Link prediction: does an edge join two nodes? The unit is the pair; edges that are asked for are in no view."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from meristem.errors import DataError
from meristem.platform.assembly import Assembly
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.data.splits import NAMES
from meristem.platform.objectives import Loss
from meristem.platform.step import Step
from meristem.tasks.base import Scope, TaskRecipe
from meristem.tasks.classification import Classifying, LinearObjective
from meristem.tasks.embedding import parts

CLASSES = ("no link", "link")


class LinkObjective(LinearObjective):
    """Logistic regression on products of two nodes' tokens, element by element (Grover and Leskovec 2016, node2vec)."""

    def __init__(self, assembly: Assembly, settings: Links, classes: int) -> None:
        super().__init__(assembly, settings, classes)
        self.pairs: dict[int, Tensor] = {}  # row of a graph -> (3, M) two nodes and whether an edge joins them

    def learn_from(self, data: Data, rows: Sequence[Row]) -> list[Row]:
        graphs = [row for row in data.rows() if row.index in {r.index for r in rows}]
        self.pairs = {graph.index: torch.tensor([(r.element, r.other, r.labels["class"]) for r in rows
                                                 if r.index == graph.index]).T for graph in graphs}
        return graphs

    def forward(self, step: Step) -> dict[str, Loss]:
        """Over the pairs whose two nodes are in a view."""
        view, encoded = step.batch.views["x"], step.encode("x")
        assert view.index is not None
        products, targets = [], []
        for row, index, tokens in zip(step.batch.items.row[view.item].tolist(), view.index, encoded.tokens, strict=True):
            asked = self.pairs[row].to(index.device) if self.pairs else torch.stack([index[:1], index[-1:], index[:1] * 0])
            place = torch.full((int(max(index.max(), asked[:2].max())) + 1,), -1, device=index.device)
            place[index[index >= 0]] = torch.arange(len(index), device=index.device)[index >= 0]
            ends = place[asked[:2]]
            inside = (ends >= 0).all(0)
            products.append(tokens[ends[:, inside]].prod(0))
            targets.append(asked[2, inside])
        return self.loss(torch.cat(products), torch.cat(targets))

    @torch.no_grad()
    def probabilities(self, assembly: Assembly, data: Data, rows: Sequence[Row]) -> Tensor:
        device = next(assembly.parameters()).device
        products = parts(assembly, data, rows, lambda encoded: encoded.tokens).prod(1)
        return self.scores(products.to(device)).softmax(-1).cpu()

    def write(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, out: Path) -> list[Path]:
        """predictions.csv: file, two nodes, probability of a link, of the pairs that were held out to test."""
        path = out / "predictions.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "node", "other", "probability"])
            for row in rows:
                pairs = asked(data, row, ("test",))
                names = data.cache.header(row.index).source.get("names")
                for pair, p in zip(pairs, self.probabilities(assembly, data, pairs), strict=True):
                    ends = [names[k] if names else k for k in (pair.element, pair.other)]
                    writer.writerow([row.local, *ends, f"{p[1]:.6f}"])
        return [path]


def asked(data: Data, row: Row, splits: Sequence[str]) -> list[Row]:
    """The pairs of a graph's nodes that a link is predicted for, with the answer."""
    table = data.cache.tables(row.index).get("links")
    if table is None:
        return []
    return [row.part(a, edge, NAMES[split], b) for a, b, split, edge in table.T.tolist() if NAMES[split] in splits]


class Links(Classifying):
    """The pairs are those that `modality.graph.hold_out` takes out of every graph; the rest as in `Classifying`."""

    parts = True
    protocols: ClassVar[tuple[str, ...]] = ("finetune", "linear", "svm", "knn")
    metric: Literal["auroc", "auprc", "accuracy", "balanced_accuracy", "brier", "ece"] = "auroc"  # type: ignore[assignment]

    def check(self, recipe: TaskRecipe) -> list[str]:
        if getattr(recipe.modality.options, "hold_out", None) is None:
            return ["predicting links needs graphs without the edges that are asked for: set "
                    "modality.graph.hold_out=[0.05,0.1], in pretraining too"]
        return super().check(recipe)

    def cases(self, data: Data, split: str | Sequence[str]) -> list[Row]:
        """The pairs of a split, of all graphs: every graph has some of each."""
        wanted = (split,) if isinstance(split, str) else tuple(split)
        return [pair for row in data.rows() for pair in asked(data, row, wanted)]

    def scope(self, data: Data) -> Scope:
        if not any("links" in data.cache.tables(row.index) for row in data.rows()):
            raise DataError("label", "no edges are held out of these graphs", "Set modality.graph.hold_out=[0.05,0.1].")
        return self.fits(CLASSES)

    def spoiled(self, recipe: TaskRecipe, pretraining: Mapping[str, Any]) -> str:
        options = next(iter(pretraining["modality"].values()))
        held = recipe.modality.options.hold_out
        if list(options.get("hold_out") or ()) == list(held):
            return ""
        return "pretraining saw the edges that are asked for here; pretrain with the same modality.graph.hold_out"

    def build(self, assembly: Assembly, classes: int) -> LinkObjective:
        return LinkObjective(assembly, self, classes)
