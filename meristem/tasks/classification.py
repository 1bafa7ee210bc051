"""Classification of whole samples: linear, attentive or mean pooling, the encoder frozen or fine-tuned."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meristem.errors import DataError, RecipeError
from meristem.platform.assembly import Assembly
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.evaluation.metrics import set_metrics
from meristem.platform.evaluation.probes import KNN, SVM, Attentive, FewShot, Linear
from meristem.platform.evaluation.results import Case
from meristem.platform.objectives import Encoded, Loss
from meristem.platform.pooling import AttentivePool
from meristem.platform.recipe import Share
from meristem.platform.step import Step
from meristem.tasks.base import Keep, Scope, TaskObjective, TaskRecipe, TaskSettings
from meristem.tasks.embedding import encode, over_looks


class LinearObjective(TaskObjective):
    """Cross-entropy of a linear layer; what has no label (-1) does not count."""

    def __init__(self, assembly: Assembly, settings: Classifying, classes: int) -> None:
        super().__init__()
        width = assembly.encoder.width
        self.smoothing = settings.smoothing
        self.norm: nn.Module = nn.BatchNorm1d(width, affine=False) if settings.batch_norm else nn.Identity()
        self.drop = nn.Dropout(settings.dropout)
        self.out = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)

    def scores(self, z: Tensor) -> Tensor:
        """Logits (n, K) of vectors (n, D)."""
        out: Tensor = self.out(self.drop(self.norm(z)))
        return out.float()

    def loss(self, z: Tensor, target: Tensor) -> dict[str, Loss]:
        """z: (n, D), target: (n,)."""
        total = F.cross_entropy(self.scores(z), target, ignore_index=-1, reduction="sum", label_smoothing=self.smoothing)
        return {"": Loss(total, (target >= 0).sum())}

    def probabilities(self, assembly: Assembly, data: Data, rows: Sequence[Row]) -> Tensor:
        """(n, K)."""
        raise NotImplementedError

    def test(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, keep: Keep | None = None) -> list[Case]:
        found = self.probabilities(assembly, data, rows)
        return [Case(case=row.case, subject=row.subject, target=row.labels["class"], probabilities=tuple(p.tolist()))
                for row, p in zip(rows, found, strict=True)]


class ClassificationObjective(LinearObjective):
    """Of pooled features."""

    def __init__(self, assembly: Assembly, settings: Classification, classes: int) -> None:
        super().__init__(assembly, settings, classes)
        self.summary = assembly.recipe.summary if settings.pool == "auto" else settings.pool
        self.pool = AttentivePool(assembly.encoder.width) if settings.pool == "attention" else None

    def vectors(self, encoded: Encoded) -> Tensor:
        """(B, D)."""
        return self.pool(encoded.tokens, encoded.valid) if self.pool is not None else encoded.summary[self.summary]

    def logits(self, encoded: Encoded) -> Tensor:
        return self.scores(self.vectors(encoded))

    def forward(self, step: Step) -> dict[str, Loss]:
        target = step.batch.items.labels["class"][step.batch.views["x"].item]
        return self.loss(self.vectors(step.encode("x")), target)

    @torch.no_grad()
    def probabilities(self, assembly: Assembly, data: Data, rows: Sequence[Row]) -> Tensor:
        """(n, K) of whole samples at the training view's size: means over their looks (Feichtenhofer et al. 2019)."""
        looks = (self.logits(encoded).softmax(1) for encoded in encode(assembly, data, rows))
        return torch.cat([over_looks(p, assembly.recipe).cpu() for p in looks])

    def write(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, out: Path) -> list[Path]:
        """predictions.csv: file, predicted class, probability of each class."""
        path = out / "predictions.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "class", *scope.values.values()])
            for row, p in zip(rows, self.probabilities(assembly, data, rows), strict=True):
                writer.writerow([row.local, scope.values[int(p.argmax())], *(f"{x:.6f}" for x in p.tolist())])
        return [path]


class Classifying(TaskSettings):
    """What classifications of samples and of their parts share.

    metric: by which arms are compared. batch_norm: before the linear layer, without parameters (He et al. 2022, linear
    probing). smoothing: of labels. knn, linear, svm, few_shot: probes of the frozen encoder, which `evaluate` runs. features:
    summaries that they see side by side, e.g. [mean, max]; none: the recipe's.
    """

    kind = "classification"
    protocols: ClassVar[tuple[str, ...]] = ("finetune", "linear", "svm", "knn", "few-shot", "retrieval")
    metric: Literal["auroc", "auprc", "accuracy", "balanced_accuracy", "top5", "brier", "ece"] = "auroc"  # type: ignore[misc]
    batch_norm: bool = False
    dropout: Share = 0.0
    smoothing: Share = 0.0
    knn: KNN = KNN()
    linear: Linear = Linear()
    svm: SVM = SVM()
    few_shot: FewShot = FewShot()
    features: tuple[Literal["cls", "mean", "max", "sum"], ...] = ()

    def check(self, recipe: TaskRecipe) -> list[str]:
        lacking = sorted(set(self.features) - recipe.encoder.provides)
        return [f"features: this encoder has no {' or '.join(lacking)} vector"] if lacking else []

    def labelled(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if "class" in row.labels]

    def fits(self, names: tuple[str, ...]) -> Scope:
        """The scope of these classes. Raises RecipeError where the metric says nothing about them."""
        if self.metric not in set_metrics(len(names)):
            raise RecipeError(f"top-5 accuracy says nothing about {len(names)} classes", "Set the task's metric to accuracy.")
        return Scope(dict(enumerate(names)), names, "")


class Classification(Classifying):
    """Of whole samples. pool: auto is the summary that pretraining trained (the recipe's `summary`). attentive: a probe too."""

    protocols = ("finetune", "attentive", "linear", "svm", "knn", "few-shot", "retrieval")
    pool: Literal["auto", "cls", "mean", "attention"] = "auto"
    attentive: Attentive = Attentive()

    def check(self, recipe: TaskRecipe) -> list[str]:
        if self.pool == "cls" and "cls" not in recipe.encoder.provides:
            return [*super().check(recipe), "pool: cls needs an encoder with a class token; use auto, mean or attention"]
        return super().check(recipe)

    def scope(self, data: Data) -> Scope:
        names = data.manifest.class_names
        if len(names) < 2:
            raise DataError("label", f"the data has {len(names)} classes",
                            "Give one folder per class, or a CSV with a column `class`.")
        return self.fits(names)

    def build(self, assembly: Assembly, classes: int) -> ClassificationObjective:
        return ClassificationObjective(assembly, self, classes)
