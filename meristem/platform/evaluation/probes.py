"""What frozen embeddings know: nearest neighbours and a linear classifier, tuned on validation, never on test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from meristem.errors import MeristemError
from meristem.modalities.base import Settings
from meristem.platform.evaluation.metrics import brier

Array = NDArray[Any]


@dataclass(frozen=True)
class Split:
    """Embeddings (n, D) and targets (n,) of one split."""

    embedding: Array
    target: Array


@dataclass(frozen=True)
class Probed:
    """probabilities: (n_test, classes). chosen: the setting picked. validation: Brier score of every candidate."""

    probabilities: Array
    chosen: float
    validation: dict[float, float]


class KNN(Settings):
    """Weighted nearest neighbours on the sphere (Wu et al. 2018, as in DINO).

    p(c) ∝ Σ over the k nearest by cosine of exp(cos/temperature)·[y = c]. k: candidates; those above the number of training
    cases are cut to it. The best Brier score on validation wins, the larger k on a tie.
    """

    k: tuple[int, ...] = (1, 5, 10, 20, 50, 100)
    temperature: float = 0.07

    def __call__(self, train: Split, validation: Split, test: Array, classes: int) -> Probed:
        ks = sorted({min(k, len(train.target)) for k in self.k}, reverse=True)
        on_validation = self.votes(train, validation.embedding, ks, classes)
        scores = {float(k): float(brier(validation.target, p)) for k, p in zip(ks, on_validation, strict=True)}
        best = _best(scores)
        return Probed(self.votes(train, test, [int(best)], classes)[0], best, scores)

    def votes(self, train: Split, query: Array, ks: list[int], classes: int) -> list[Array]:
        """Probabilities (n, classes) of the queries for each k."""
        cosine = _unit(query) @ _unit(train.embedding).T
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :max(ks)]
        similarity = np.take_along_axis(cosine, nearest, 1)
        weight = np.exp((similarity - similarity[:, :1]) / self.temperature)  # relative to the nearest: no overflow
        vote = weight[..., None] * np.eye(classes)[train.target[nearest]]
        return [vote[:, :k].sum(1) / weight[:, :k].sum(1, keepdims=True) for k in ks]


class Linear(Settings):
    """Multinomial logistic regression with an L2 penalty on embeddings standardised by the training split.

    c: candidates for scikit-learn's inverse penalty C. The best Brier score on validation wins, the stronger penalty on a tie.
    The winner is the model fitted on the training split; validation cases are never added.
    """

    c: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    iterations: int = 2000

    def __call__(self, train: Split, validation: Split, test: Array, classes: int) -> Probed:
        present = np.unique(train.target)
        if len(present) < 2:
            raise MeristemError("a linear probe needs labelled training cases of at least two classes, here there is one",
                                "Take more labelled subjects, or a split stratified by class.")
        scale = StandardScaler().fit(train.embedding)
        x = scale.transform(train.embedding)

        def predict(model: LogisticRegression, embedding: Array) -> Array:
            p = np.zeros((len(embedding), classes))
            p[:, present] = model.predict_proba(scale.transform(embedding))
            return p

        models = {float(c): LogisticRegression(C=c, max_iter=self.iterations).fit(x, train.target) for c in sorted(self.c)}
        scores = {c: float(brier(validation.target, predict(model, validation.embedding))) for c, model in models.items()}
        best = _best(scores)
        return Probed(predict(models[best], test), best, scores)


def _best(scores: dict[float, float]) -> float:
    """The key of the smallest value; of equals, the first."""
    return min(scores, key=scores.__getitem__)


def _unit(x: Array) -> Array:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
