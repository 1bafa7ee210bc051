"""What a frozen encoder knows: nearest neighbours, linear, attentive and support vector classifiers, few shots, retrieval.

What is tuned is tuned on validation, or within the training part, never on test.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import softmax
from sklearn.base import TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from sklearn.svm import SVC, LinearSVC
from torch import Tensor, nn

from meristem.errors import MeristemError, RecipeError
from meristem.modalities.base import Settings
from meristem.platform.evaluation.metrics import RECALLS, brier
from meristem.platform.pooling import AttentivePool, attend

Array = NDArray[Any]
Setting = TypeVar("Setting")
AT_ONCE = 1024  # queries whose nearest neighbours are looked for


@dataclass(frozen=True)
class Split:
    """Embeddings (n, D) and targets (n,) of one split."""

    embedding: Array
    target: Array

    def only(self, index: Array) -> Split:
        """Those of these places."""
        return Split(self.embedding[index], self.target[index])


@dataclass(frozen=True)
class Features:
    """Token features of samples seen in `looks` looks each: tokens (n·looks, N, D) float16, valid (n·looks, N), item-major."""

    tokens: Tensor
    valid: Tensor
    looks: int


@dataclass(frozen=True)
class Tokens:
    """The samples of one split in `Features`, by their places there (n,), and targets (n,)."""

    features: Features
    place: Array
    target: Array

    @property
    def index(self) -> Array:
        """(n·looks,) rows of the features."""
        looks = self.features.looks
        rows: Array = (self.place[:, None] * looks + np.arange(looks)).ravel()
        return rows


@dataclass(frozen=True)
class Probed(Generic[Setting]):
    """probabilities: (n_test, classes). chosen: the setting picked. validation: what was minimised, of every candidate."""

    probabilities: Array
    chosen: Setting
    validation: dict[Setting, float]


class Shallow(Settings, ABC):
    """A classifier on embeddings with one number to be chosen.

    It is chosen on the validation split; where there is none, by stratified folds of the training cases, five or as many as the
    rarest class has cases. A tie goes to the simpler model. The winner is fitted on the training split; validation cases are
    never added.
    """

    def __call__(self, train: Split, validation: Split | None, test: Array, classes: int) -> Probed[float]:
        pairs = [(train, validation)] if validation is not None else _folds(train)
        tried = [self.scores(learnt, held, classes) for learnt, held in pairs]
        share = [len(held.target) for _, held in pairs]
        common = [c for c in tried[0] if all(c in scores for scores in tried)]  # a smaller part has fewer neighbours
        scores = {c: float(np.average([of[c] for of in tried], weights=share)) for c in common}
        best = _best(scores)
        return Probed(self.predict(train, best, test, classes), best, scores)

    @abstractmethod
    def scores(self, train: Split, held: Split, classes: int) -> dict[float, float]:
        """What is to be minimised on `held` of every candidate, the simpler first."""

    @abstractmethod
    def predict(self, train: Split, candidate: float, query: Array, classes: int) -> Array:
        """Probabilities (n, classes)."""


def _folds(train: Split, most: int = 5) -> list[tuple[Split, Split]]:
    """(learnt, held) pairs in which each case is held once; of a class with one case alone, all cases are both."""
    rarest = int(np.unique(train.target, return_counts=True)[1].min())
    if rarest < 2:
        return [(train, train)]
    parts = StratifiedKFold(min(most, rarest), shuffle=True, random_state=0).split(train.embedding, train.target)
    return [(train.only(learnt), train.only(held)) for learnt, held in parts]


Scaling = Literal["standard", "unit", "none"]
SCALERS: dict[Scaling, type[TransformerMixin]] = {"standard": StandardScaler, "unit": Normalizer, "none": FunctionTransformer}


class KNN(Shallow):
    """Weighted nearest neighbours on the sphere (Wu et al. 2018, as in DINO).

    p(c) ∝ Σ over the k nearest by cosine of exp(cos/temperature)·[y = c]. k: candidates; those above the number of training
    cases are cut to it. The best Brier score wins, the larger k on a tie.
    """

    k: tuple[int, ...] = (1, 5, 10, 20, 50, 100)
    temperature: float = 0.07

    def scores(self, train: Split, held: Split, classes: int) -> dict[float, float]:
        ks = sorted({min(k, len(train.target)) for k in self.k}, reverse=True)
        return {float(k): float(brier(held.target, p)) for k, p in zip(ks, self.votes(train, held.embedding, ks, classes),
                                                                      strict=True)}

    def predict(self, train: Split, candidate: float, query: Array, classes: int) -> Array:
        return self.votes(train, query, [int(candidate)], classes)[0]

    def votes(self, train: Split, query: Array, ks: list[int], classes: int) -> list[Array]:
        """Probabilities (n, classes) of the queries for each k."""
        parts = [self._votes(train, part, ks, classes) for part in _parts(query)]
        return [np.concatenate(of) for of in zip(*parts, strict=True)]

    def _votes(self, train: Split, query: Array, ks: list[int], classes: int) -> list[Array]:
        cosine = _unit(query) @ _unit(train.embedding).T
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :max(ks)]
        similarity = np.take_along_axis(cosine, nearest, 1)
        weight = np.exp((similarity - similarity[:, :1]) / self.temperature)  # relative to the nearest: no overflow
        vote = weight[..., None] * np.eye(classes)[train.target[nearest]]
        return [vote[:, :k].sum(1) / weight[:, :k].sum(1, keepdims=True) for k in ks]


class Linear(Shallow):
    """Multinomial logistic regression with an L2 penalty.

    scale: embeddings standardised by the training split, each brought to length 1, or as they are. c: candidates for
    scikit-learn's inverse penalty C. by: the best Brier score wins, or the best accuracy; the stronger penalty on a tie.
    """

    scale: Scaling = "standard"
    by: Literal["brier", "accuracy"] = "brier"
    c: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    iterations: int = 2000

    def scores(self, train: Split, held: Split, classes: int) -> dict[float, float]:
        model = self._model(train)  # goes on from the stronger penalty
        found = {float(c): self._fitted(model, train, c, held.embedding, classes) for c in sorted(self.c)}
        if self.by == "accuracy":
            return {c: -_accuracy(held.target, p) for c, p in found.items()}
        return {c: float(brier(held.target, p)) for c, p in found.items()}

    def predict(self, train: Split, candidate: float, query: Array, classes: int) -> Array:
        return self._fitted(self._model(train), train, candidate, query, classes)

    def _model(self, train: Split) -> Pipeline:
        solver = "newton-cholesky" if len(_several(train.target)) == 2 else "lbfgs"  # few exact steps: the Hessian is small
        model = LogisticRegression(solver=solver, max_iter=self.iterations, warm_start=True)
        return make_pipeline(SCALERS[self.scale](), model)

    def _fitted(self, model: Pipeline, train: Split, c: float, query: Array, classes: int) -> Array:
        model.set_params(logisticregression__C=c).fit(train.embedding, train.target)
        p = np.zeros((len(query), classes))
        p[:, model.classes_] = model.predict_proba(query)
        return p


class SVM(Shallow):
    """A support vector machine on embeddings, as clouds (Pang et al. 2022, Point-MAE) and graphs (Hou et al. 2022) are probed.

    kernel: linear (one class against the rest) or rbf (one against one, γ = 1 / (D · variance)). scale: as in Linear. c:
    candidates for the inverse penalty C; the best accuracy wins, the stronger penalty on a tie. Probabilities are the softmax
    of decision values: their order is the machine's, their size means nothing.
    """

    kernel: Literal["linear", "rbf"] = "linear"
    scale: Scaling = "standard"
    c: tuple[Annotated[float, Field(gt=0)], ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    iterations: int = 20_000

    def scores(self, train: Split, held: Split, classes: int) -> dict[float, float]:
        cs = sorted(map(float, self.c))
        return {c: -_accuracy(held.target, p)
                for c, p in zip(cs, self._probabilities(train, held.embedding, cs, classes), strict=True)}

    def predict(self, train: Split, candidate: float, query: Array, classes: int) -> Array:
        return next(self._probabilities(train, query, [candidate], classes))

    def _probabilities(self, train: Split, query: Array, cs: Sequence[float], classes: int) -> Iterator[Array]:
        """(n, classes) of each C."""
        _several(train.target)
        scaler = SCALERS[self.scale]().fit(train.embedding)
        known, asked = (scaler.transform(x).astype(float) for x in (train.embedding, query))
        machine: LinearSVC | SVC = LinearSVC(max_iter=self.iterations, random_state=0)
        if self.kernel == "rbf":  # one table for all C: libsvm would make it anew for each, and slower
            machine, gamma = SVC(kernel="precomputed"), 1 / (known.shape[1] * (known.var() or 1.0))
            known, asked = rbf_kernel(known, gamma=gamma), rbf_kernel(asked, known, gamma=gamma)
        for c in cs:
            value = np.asarray(machine.set_params(C=c).fit(known, train.target).decision_function(asked))
            if value.ndim == 1:  # of two classes
                value = np.stack([-value, value], 1)
            p = np.zeros((len(query), classes))
            p[:, machine.classes_] = softmax(value, 1)
            yield p


class FewShot(Settings):
    """N ways, K shots (Sharma & Kaul 2020, as ModelNet40 is tested since) by a linear support vector machine on embeddings.

    A trial draws `ways` classes, `shots` training samples and up to `queries` test samples of each; the same for every
    encoder and seed. Every pair of ways and shots is tried. c: the machine's C, which so few samples cannot choose.
    """

    ways: tuple[Annotated[int, Field(ge=2)], ...] = (5, 10)
    shots: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20)
    queries: Annotated[int, Field(ge=1)] = 20
    trials: Annotated[int, Field(ge=2)] = 10
    c: Annotated[float, Field(gt=0)] = 1.0

    @property
    def settings(self) -> dict[str, tuple[int, int]]:
        """Name -> (ways, shots)."""
        return {f"{n}-way {k}-shot": (n, k) for n, k in product(sorted(set(self.ways)), sorted(set(self.shots)))}

    def __call__(self, train: Split, test: Split) -> dict[str, Array]:
        """Accuracy of each trial (trials,), by setting. Raises RecipeError where too few classes have so many samples."""
        return {name: np.array([self.trial(train, test, ways, shots, np.random.default_rng([ways, shots, i]))
                                for i in range(self.trials)]) for name, (ways, shots) in self.settings.items()}

    def trial(self, train: Split, test: Split, ways: int, shots: int, rng: np.random.Generator) -> float:
        able = [c for c in np.unique(test.target) if (train.target == c).sum() >= shots]
        if len(able) < ways:
            raise RecipeError(f"{ways} ways, {shots} shots: {len(able)} classes have so many training samples and one to test",
                              "Set few_shot.ways and few_shot.shots of the task to fewer.")
        classes = rng.choice(able, ways, replace=False)
        support = np.concatenate([rng.choice(np.flatnonzero(train.target == c), shots, replace=False) for c in classes])
        query = np.concatenate([rng.permutation(np.flatnonzero(test.target == c))[:self.queries] for c in classes])
        found = SVM().predict(train.only(support), self.c, test.embedding[query], int(max(classes)) + 1).argmax(1)
        return float((found == test.target[query]).mean())


class Attentive(Settings):
    """A query that attends to all tokens, and a linear classifier (Chen et al. 2023, CAE; Bardes et al. 2024, V-JEPA).

    One classifier for each learning rate and weight decay of a grid, all trained at once on the same batches, each as if it
    were alone: AdamW, a cosine to 0. All looks at a training sample are examples; probabilities are means over looks.
    The best Brier score on validation wins, the lower rate and the stronger decay on a tie; it alone is tested.
    steps, batch: optimiser steps, and looks in each. memory: GiB of features kept for each encoder; more lies on disk.
    """

    lr: tuple[Annotated[float, Field(gt=0)], ...] = (1e-4, 3e-4, 1e-3, 3e-3, 5e-3)
    weight_decay: tuple[Annotated[float, Field(ge=0)], ...] = (0.01, 0.1, 0.4, 0.8)
    steps: Annotated[int, Field(ge=1)] = 600
    batch: Annotated[int, Field(ge=1)] = 32
    memory: Annotated[float, Field(gt=0)] = 4.0

    def __call__(self, train: Tokens, validation: Tokens, test: Tokens, classes: int, seed: int) -> Probed[tuple[float, float]]:
        _several(train.target)
        settings = list(product(sorted(self.lr), sorted(self.weight_decay, reverse=True)))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            first = AttentiveClassifier(train.features.tokens.shape[-1], classes).to(device)
        heads = [copy.deepcopy(first) for _ in settings]
        self._fit(heads, settings, train, seed)
        found = self._predict(heads, validation)
        scores = {setting: float(brier(validation.target, p)) for setting, p in zip(settings, found, strict=True)}
        best = min(scores, key=scores.__getitem__)
        return Probed(self._predict([heads[settings.index(best)]], test)[0], best, scores)

    def _fit(self, heads: Sequence[AttentiveClassifier], settings: Sequence[tuple[float, float]], train: Tokens, seed: int
             ) -> None:
        groups: list[dict[str, Any]] = []
        for head, (lr, decay) in zip(heads, settings, strict=True):
            matrices = [p for p in head.parameters() if p.ndim == 2]
            rest = [p for p in head.parameters() if p.ndim != 2]  # norms, biases and the query (1, 1, D) do not decay
            groups += [{"params": matrices, "lr": lr, "weight_decay": decay}, {"params": rest, "lr": lr, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups)
        cosine = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / self.steps)) / 2)
        index, target = train.index, np.repeat(train.target, train.features.looks)
        for chosen in self._batches(len(index), seed):
            wanted = torch.from_numpy(target[chosen]).to(_device(heads))
            logits = _logits(heads, train.features, index[chosen])
            each = F.cross_entropy(logits.flatten(0, 1), wanted.repeat(len(heads)), reduction="sum") / len(chosen)
            optimiser.zero_grad(set_to_none=True)
            each.backward()
            optimiser.step()
            cosine.step()

    def _batches(self, n: int, seed: int) -> Iterator[Array]:
        """Places of n examples, `steps` times: epoch after epoch in a new order."""
        rng, left = np.random.default_rng(seed), np.empty(0, dtype=int)
        for _ in range(self.steps):
            if not len(left):
                left = rng.permutation(n)
            chosen, left = np.split(left, [self.batch])
            yield chosen

    @torch.no_grad()
    def _predict(self, heads: Sequence[AttentiveClassifier], some: Tokens) -> Array:
        """(G, n, classes)."""
        looks = some.features.looks
        several = max(self.batch // looks, 1) * looks
        index = some.index
        parts = [_logits(heads, some.features, index[a:a + several]).softmax(-1).cpu() for a in range(0, len(index), several)]
        mean: Array = torch.cat(parts, 1).unflatten(1, (-1, looks)).mean(2).double().numpy()
        return mean


class AttentiveClassifier(nn.Module):
    """Attentive pooling and a linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.pool = AttentivePool(width)
        self.out = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)


def _device(heads: Sequence[nn.Module]) -> torch.device:
    return next(heads[0].parameters()).device


def _logits(heads: Sequence[AttentiveClassifier], features: Features, rows: Array) -> Tensor:
    """(G, B, classes) of G heads on the same rows (B,)."""
    at, device = torch.from_numpy(rows), _device(heads)
    tokens, valid = features.tokens[at].to(device).float(), features.valid[at].to(device)
    pooled = attend([head.pool for head in heads], tokens, valid)
    weight, bias = (torch.stack([head.out.get_parameter(name) for head in heads]) for name in ("weight", "bias"))
    return torch.baddbmm(bias[:, None], pooled, weight.transpose(1, 2))


def retrieve(gallery: Split, query: Split) -> dict[str, Array]:
    """Each query's own scores (n,) when it ranks the gallery by cosine: R@1, R@5, R@10, R@20 and mAP.

    R@k: 1 where any of the k nearest has the query's class (Buchler et al. 2018, the protocol of UCF101). mAP: the query's
    average precision over the whole gallery. Of equal cosines the earlier sample of the gallery comes first. A class that the
    gallery lacks cannot be found: 0.
    """
    parts = [_retrieved(gallery, query.only(some)) for some in _parts(np.arange(len(query.target)))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _retrieved(gallery: Split, query: Split) -> dict[str, Array]:
    cosine = _unit(query.embedding) @ _unit(gallery.embedding).T
    hit = gallery.target[np.argsort(-cosine, axis=1, kind="stable")] == query.target[:, None]
    precision = np.cumsum(hit, 1) / np.arange(1, hit.shape[1] + 1)
    scores = {f"R@{k}": hit[:, :k].any(1).astype(float) for k in RECALLS}
    return {**scores, "mAP": (precision * hit).sum(1) / np.maximum(hit.sum(1), 1)}


def _parts(query: Array) -> list[Array]:
    """Some queries at a time: a table of all of them by all they are compared with may not fit into memory."""
    return [query[i:i + AT_ONCE] for i in range(0, len(query), AT_ONCE)]


def _several(target: Array) -> Array:
    """The classes that occur, at least two."""
    present: Array = np.unique(target)
    if len(present) < 2:
        raise MeristemError("a probe needs labelled training cases of at least two classes, here there is one",
                            "Take more labelled subjects, or a split stratified by class.")
    return present


def _best(scores: dict[float, float]) -> float:
    """The key of the smallest value; of equals, the first."""
    return min(scores, key=scores.__getitem__)


def _accuracy(target: Array, probabilities: Array) -> float:
    return float((probabilities.argmax(1) == target).mean())


def _unit(x: Array) -> Array:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
