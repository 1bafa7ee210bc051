"""Probes against loops and scikit-learn; nothing is chosen on test; overlap is found."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from meristem.errors import MeristemError
from meristem.platform.evaluation.leakage import audit
from meristem.platform.evaluation.metrics import brier
from meristem.platform.evaluation.probes import KNN, Linear, Split


def split(seed: int, n: int, classes: int = 3, width: int = 8, signal: float = 1.0) -> Split:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    target = np.arange(n) % classes
    return Split(signal * centres[target] + rng.normal(size=(n, width)), target)


def test_knn_equals_a_loop() -> None:
    train, test = split(0, 30), split(1, 7)
    got = KNN(temperature=0.1).votes(train, test.embedding, [5], 3)[0]
    for i, q in enumerate(test.embedding):
        cosine = [float(q @ e / np.linalg.norm(q) / np.linalg.norm(e)) for e in train.embedding]
        votes = np.zeros(3)
        for j in sorted(range(30), key=lambda j: -cosine[j])[:5]:
            votes[train.target[j]] += np.exp(cosine[j] / 0.1)
        assert got[i] == pytest.approx(votes / votes.sum())


def test_knn_is_stable_at_extreme_temperatures_and_small_sets() -> None:
    train, validation = split(0, 4), split(1, 9)
    probed = KNN(k=(1, 200), temperature=1e-3)(train, validation, validation.embedding, 3)
    assert np.isfinite(probed.probabilities).all()
    assert set(probed.validation) == {1.0, 4.0}


@pytest.mark.parametrize("probe", [KNN(), Linear()])
def test_choice_is_the_best_on_validation_and_ignores_test(probe: KNN | Linear) -> None:
    train, validation = split(0, 45), split(1, 30)
    one, other = (probe(train, validation, split(seed, 20).embedding, 3) for seed in (2, 3))
    assert one.chosen == other.chosen == min(one.validation, key=one.validation.__getitem__)
    assert one.validation == other.validation
    assert one.probabilities.sum(1) == pytest.approx(np.ones(20))


@pytest.mark.parametrize("probe", [KNN(), Linear()])
def test_signal_is_found_and_noise_stays_at_chance(probe: KNN | Linear) -> None:
    found = probe(split(0, 90, signal=1.5), split(1, 60, signal=1.5), split(2, 300, signal=1.5).embedding, 3)
    assert (found.probabilities.argmax(1) == split(2, 300).target).mean() > 0.85
    noise = probe(split(0, 90, signal=0), split(1, 60, signal=0), split(2, 300, signal=0).embedding, 3)
    assert abs((noise.probabilities.argmax(1) == split(2, 300).target).mean() - 1 / 3) < 0.09


def test_linear_standardises_on_train_only() -> None:
    train, validation, test = split(0, 40), split(1, 20), split(2, 10)
    mean, std = train.embedding.mean(0), train.embedding.std(0)
    model = LogisticRegression(C=0.1, max_iter=2000).fit((train.embedding - mean) / std, train.target)
    got = Linear(c=(0.1,))(train, validation, test.embedding, 3)
    assert got.probabilities == pytest.approx(model.predict_proba((test.embedding - mean) / std), abs=1e-6)
    assert got.validation[0.1] == pytest.approx(
        float(brier(validation.target, model.predict_proba((validation.embedding - mean) / std))), abs=1e-6)


def test_rescaled_features_change_nothing_for_linear() -> None:
    train, validation, test = split(0, 40), split(1, 20), split(2, 10)
    stretch = np.geomspace(1e-3, 1e3, 8)
    plain = Linear()(train, validation, test.embedding, 3)
    scaled = Linear()(Split(train.embedding * stretch, train.target), Split(validation.embedding * stretch, validation.target),
                      test.embedding * stretch, 3)
    assert scaled.probabilities == pytest.approx(plain.probabilities, abs=1e-4)


@pytest.mark.parametrize("probe", [KNN(), Linear()])
def test_a_class_without_training_cases_gets_probability_zero(probe: KNN | Linear) -> None:
    train, validation = split(0, 45), split(1, 30)
    few = Split(train.embedding[train.target != 1], train.target[train.target != 1])
    p = probe(few, validation, validation.embedding, 3).probabilities
    assert (p[:, 1] == 0).all() and p.sum(1) == pytest.approx(np.ones(30))


def test_one_class_is_refused_with_the_reason() -> None:
    one = Split(np.random.default_rng(0).normal(size=(5, 3)), np.zeros(5, int))
    with pytest.raises(MeristemError, match="two classes"):
        Linear()(one, one, one.embedding, 2)


@pytest.mark.parametrize("seen, contents, labelled, same_key, verdict, counts", [
    (["p1"], ["h1"], [], True, "clean", (0, 0)),
    (["t1", "p1"], ["h1"], [], True, "transductive", (1, 0)),       # another scan of a test subject
    (["p1"], ["x1", "x2"], [], True, "transductive", (0, 2)),       # the same scans under other names
    (["t1"], ["x1"], ["t2"], True, "contaminated", (1, 0)),         # labels outweigh images
    (None, None, [], True, "unknown", (0, 0)),
    (["t1"], ["h1"], [], False, "unknown", (0, 0)),                 # pseudonyms of another key mean nothing
    (["p1"], ["x1"], [], False, "transductive", (0, 1)),
])
def test_leakage(seen: list[str] | None, contents: list[str] | None, labelled: list[str], same_key: bool, verdict: str,
                 counts: tuple[int, int]) -> None:
    found = audit(["t1", "t2", "t2"], ["x1", "x2", "x3"], seen, contents, labelled, same_key=same_key)
    assert found.verdict == verdict
    assert (found.subjects, found.contents) == counts
    assert (found.test_subjects, found.test_contents) == (2, 3)
    assert found.sentence.lower().startswith(verdict)
