"""Link prediction: does an edge join two nodes? The unit is the pair; edges that are asked for are in no view."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from meristem.errors import DataError
from meristem.modalities.rng import Rng
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
    """Logistic regression on products of two nodes' tokens, element by element (Grover and Leskovec 2016, node2vec).

    It starts as the inner product, the decoder of Kipf and Welling 2016.
    """

    def __init__(self, assembly: Assembly, settings: Links, classes: int) -> None:
        super().__init__(assembly, settings, classes)
        torch.nn.init.constant_(self.out.weight[0], -0.5)
        torch.nn.init.constant_(self.out.weight[1], 0.5)
        self.pairs: dict[int, Tensor] = {}  # row of a graph -> (3, M) two nodes and whether an edge joins them

    def learn_from(self, data: Data, rows: Sequence[Row]) -> list[Row]:
        told = defaultdict(list)
        for row in rows:
            told[row.index].append((row.element, row.other, row.labels["class"]))
        self.pairs = {index: torch.tensor(pairs).T for index, pairs in told.items()}
        return data.samples(rows)

    def forward(self, step: Step) -> dict[str, Loss]:
        """Over the linked pairs whose nodes are both in a view, and as many random pairs of its nodes, drawn anew each step,
        but for those that are linked.
        """
        view, encoded, rng = step.batch.views["x"], step.encode("x"), step.rng("links", "x")
        assert view.index is not None
        products, targets = [], []
        for i, row in enumerate(step.batch.items.row[view.item].tolist()):
            linked = self._linked(row, view.index[i])
            shown = int((view.index[i] >= 0).sum())
            drawn = Rng(rng.key[i:i + 1]).integers("pairs", shown, *linked.shape)[0]
            known = torch.cat([linked[0] * shown + linked[1], linked[1] * shown + linked[0]])
            drawn = drawn[:, (drawn[0] != drawn[1]) & ~torch.isin(drawn[0] * shown + drawn[1], known)]
            products.append(encoded.tokens[i, torch.cat([linked, drawn], 1)].prod(0))
            targets.append(torch.arange(linked.shape[1] + drawn.shape[1], device=linked.device) < linked.shape[1])
        return self.loss(torch.cat(products), torch.cat(targets).long())

    def _linked(self, row: int, index: Tensor) -> Tensor:
        """(2, n) places in a view of the pairs that it was told are linked; padding is last."""
        if not self.pairs:  # a recipe that is looked at, without data
            return torch.tensor([[0], [len(index) - 1]], device=index.device)
        asked = self.pairs[row].to(index.device)
        ends = asked[:2, asked[2] == 1]
        place = torch.full((int(max(index.max(), ends.max())) + 1,), -1, device=index.device)
        place[index[index >= 0]] = torch.arange(int((index >= 0).sum()), device=index.device)
        found = place[ends]
        return found[:, (found >= 0).all(0)]

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
                names = data.called(row)
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

    counted = "pairs"
    protocols: ClassVar[tuple[str, ...]] = ("finetune", "linear", "svm", "knn")
    metric: Literal["auroc", "auprc", "accuracy", "balanced_accuracy", "brier", "ece"] = "auroc"  # type: ignore[misc]

    def check(self, recipe: TaskRecipe) -> list[str]:
        if self.features:
            return ["features: pairs have no summaries; leave it out"]
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
