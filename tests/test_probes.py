"""Probes against loops, torch and scikit-learn; nothing is chosen on test; overlap is found."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from meristem.errors import MeristemError
from meristem.platform.evaluation.leakage import audit
from meristem.platform.evaluation.metrics import brier
from meristem.platform.evaluation.probes import (
    KNN,
    SVM,
    Attentive,
    AttentiveClassifier,
    Features,
    Linear,
    Split,
    Tokens,
    retrieve,
)
from meristem.platform.pooling import AttentivePool, attend


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


@pytest.mark.parametrize("classes, tolerance", [(2, 1e-3), (3, 2e-2)])
def test_a_sweep_that_goes_on_from_the_stronger_penalty_ends_where_fresh_fits_end(classes: int, tolerance: float) -> None:
    train, validation, test = (split(seed, n, classes, width=12, signal=0.5) for seed, n in ((0, 80), (1, 30), (2, 10)))
    sweep = Linear()(train, validation, test.embedding, classes)
    scale = StandardScaler().fit(train.embedding)
    for c in Linear().c:
        exact = LogisticRegression(C=c, max_iter=10_000, tol=1e-9).fit(scale.transform(train.embedding), train.target)
        p, q = (exact.predict_proba(scale.transform(x.embedding)) for x in (validation, test))
        assert sweep.validation[c] == pytest.approx(float(brier(validation.target, p)), abs=tolerance)
        if c == sweep.chosen:
            assert sweep.probabilities == pytest.approx(q, abs=tolerance)


@pytest.mark.parametrize("scale, scaled", [("unit", lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)),
                                           ("none", lambda x: x)])
def test_linear_scales_each_embedding_by_itself_or_not_at_all(scale: str, scaled: Callable[[np.ndarray], np.ndarray]) -> None:
    train, test = split(0, 40), split(2, 10)
    model = LogisticRegression(C=0.1, max_iter=2000).fit(scaled(train.embedding), train.target)
    got = Linear(c=(0.1,), scale=scale)(train, split(1, 20), test.embedding, 3)
    assert got.probabilities == pytest.approx(model.predict_proba(scaled(test.embedding)), abs=1e-6)


@pytest.mark.parametrize("probe", [KNN(k=(1, 5, 30)), Linear(c=(1e-2, 1.0, 100.0)), SVM(kernel="rbf", c=(1e-2, 1.0, 100.0))])
def test_without_validation_the_choice_is_made_by_folds_of_the_training_cases(probe: KNN | Linear | SVM) -> None:
    train, test = split(0, 47, signal=0.6), split(2, 10)
    got = probe(train, None, test.embedding, 3)
    score: dict[float, list[float]] = defaultdict(list)
    for learnt, held in StratifiedKFold(5, shuffle=True, random_state=0).split(train.embedding, train.target):
        x, y = train.only(learnt), train.only(held)
        for c, value in probe(x, y, y.embedding, 3).validation.items():
            score[c] += [value] * len(held)
    assert got.validation == pytest.approx({c: np.mean(values) for c, values in score.items()})
    assert got.chosen == min(got.validation, key=got.validation.__getitem__)
    one = {"k": (int(got.chosen),)} if isinstance(probe, KNN) else {"c": (got.chosen,)}
    whole = probe.model_copy(update=one)
    assert got.probabilities == pytest.approx(whole(train, train, test.embedding, 3).probabilities)


def test_a_class_with_one_case_alone_can_still_be_chosen_for() -> None:
    train = Split(np.eye(3), np.arange(3))
    got = KNN(k=(1, 3))(train, None, train.embedding, 3)
    assert got.chosen == 1 and (got.probabilities.argmax(1) == train.target).all()


def test_linear_can_choose_by_accuracy() -> None:
    train, validation, test = split(0, 45, signal=0.5), split(1, 60, signal=0.5), split(2, 10)
    got = Linear(by="accuracy")(train, validation, test.embedding, 3)
    for c, score in got.validation.items():
        right = Linear(c=(c,))(train, validation, validation.embedding, 3).probabilities.argmax(1) == validation.target
        assert -score == pytest.approx(right.mean(), abs=0.02)  # a sweep goes on from the stronger penalty
    assert got.chosen == min(c for c, score in got.validation.items() if score == min(got.validation.values()))


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
    made = tokens(0, 6)
    single = Tokens(made.features, made.place, np.zeros(6, int))
    with pytest.raises(MeristemError, match="two classes"):
        Attentive()(single, single, single, 2, 0)


# ---- the attentive probe

def tokens(seed: int, n: int, looks: int = 1, count: int = 6, width: int = 16) -> Tokens:
    """Noise, in which one token of a random place says the class and another takes it back: the mean token knows nothing."""
    rng, target = np.random.default_rng(seed), np.arange(n) % 2
    x = rng.normal(0, 0.3, (n, looks, count, width))
    for i, look in product(range(n), range(looks)):
        a, b = rng.permutation(count)[:2]
        x[i, look, a, 0], x[i, look, b, 0] = 4.0, 4.0  # look here
        x[i, look, a, 1], x[i, look, b, 1] = 2.0 * target[i] - 1, 1 - 2.0 * target[i]
        x[i, look, b, 2] = 4.0  # not here
    features = Features(torch.from_numpy(x).half().flatten(0, 1), torch.ones(n * looks, count, dtype=torch.bool), looks)
    return Tokens(features, np.arange(n), target)


@pytest.mark.parametrize("width, heads", [(24, 1), (192, 3), (200, 2), (32, 4)])
def test_one_query_over_all_tokens_is_multi_head_attention(width: int, heads: int) -> None:
    pools = [AttentivePool(width, heads if width == 32 else None) for _ in range(3)]
    for pool in pools:
        assert pool.attention.num_heads == heads
        for p in pool.parameters():
            torch.nn.init.normal_(p, std=0.2)
    x, valid = torch.randn(4, 9, width) * 2 + 1, torch.rand(4, 9) > 0.3
    valid[:, 0] = True
    got = attend(pools, x, valid)
    for pool, out in zip(pools, got, strict=True):
        normed = pool.norm(x)
        want, _ = pool.attention(pool.query.expand(4, -1, -1), normed, normed, key_padding_mask=~valid)
        assert torch.allclose(out, want[:, 0], atol=1e-5)
        assert torch.allclose(pool(x, valid), want[:, 0], atol=1e-5)
        noise = torch.where(valid[..., None], x, torch.randn_like(x))
        assert torch.equal(pool(noise, valid), pool(x, valid))


SWEEP = Attentive(lr=(1e-3, 3e-3, 2e-2), weight_decay=(0.0, 0.5), steps=20, batch=12)


def test_a_head_of_the_grid_is_what_it_would_be_alone() -> None:
    train, validation, test = tokens(0, 30), tokens(1, 20), tokens(2, 10)
    together = SWEEP(train, validation, test, 2, seed=3)
    assert set(together.validation) == set(product(SWEEP.lr, SWEEP.weight_decay))
    for lr, decay in together.validation:
        alone = SWEEP.model_copy(update={"lr": (lr,), "weight_decay": (decay,)})(train, validation, test, 2, seed=3)
        assert alone.validation[lr, decay] == pytest.approx(together.validation[lr, decay], abs=1e-5)
        if (lr, decay) == together.chosen:
            assert alone.probabilities == pytest.approx(together.probabilities, abs=1e-5)


def test_a_head_is_trained_as_torch_would_train_it() -> None:
    """nn.MultiheadAttention, a linear layer, AdamW that spares vectors, a cosine to 0: written out."""
    probe = SWEEP.model_copy(update={"lr": (3e-3,), "weight_decay": (0.5,), "steps": 12})
    train, validation = tokens(0, 30), tokens(1, 20)
    got = probe(train, validation, validation, 2, seed=5).probabilities
    torch.manual_seed(5)
    net = AttentiveClassifier(16, 2)

    def logits(x: Tensor) -> Tensor:
        normed = net.pool.norm(x.float())
        pooled, _ = net.pool.attention(net.pool.query.expand(len(x), -1, -1), normed, normed)
        out: Tensor = net.out(pooled[:, 0])
        return out

    decayed = ("attention.in_proj_weight", "attention.out_proj.weight", "out.weight")
    named = dict(net.named_parameters())
    optimiser = torch.optim.AdamW([{"params": [p for n, p in named.items() if n.endswith(decayed) == with_decay],
                                    "weight_decay": 0.5 * with_decay} for with_decay in (True, False)], lr=3e-3)
    rng = np.random.default_rng(5)
    batches = [part for _ in range(4) for part in np.split(rng.permutation(30), [12, 24])]
    for step, chosen in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 + math.cos(math.pi * step / 12)) / 2
        optimiser.zero_grad()
        F.cross_entropy(logits(train.features.tokens[chosen]), torch.from_numpy(train.target[chosen])).backward()
        optimiser.step()
    with torch.no_grad():
        want = logits(validation.features.tokens).softmax(1).numpy()
    assert got == pytest.approx(want, abs=1e-4)


def test_the_attentive_probe_finds_what_the_mean_token_has_lost() -> None:
    train, validation, test = tokens(0, 160), tokens(1, 60), tokens(2, 80)
    probe = Attentive(lr=(1e-4, 1e-2), weight_decay=(0.01,), steps=120)
    found = probe(train, validation, test, 2, seed=0)
    assert found.chosen == min(found.validation, key=found.validation.__getitem__)
    assert (found.probabilities.argmax(1) == test.target).mean() > 0.9
    mean = [Split(x.features.tokens.float().mean(1).numpy(), x.target) for x in (train, validation, test)]
    assert abs((Linear()(mean[0], mean[1], mean[2].embedding, 2).probabilities.argmax(1) == test.target).mean() - 0.5) < 0.2


def test_the_choice_of_a_head_ignores_test() -> None:
    train, validation = tokens(0, 30), tokens(1, 20)
    one, other = (SWEEP(train, validation, tokens(seed, 10), 2, seed=0) for seed in (2, 3))
    assert one.chosen == other.chosen and one.validation == other.validation


def test_looks_are_averaged_and_samples_found_by_their_place() -> None:
    train, validation, test = tokens(0, 24), tokens(1, 12), tokens(2, 9, looks=3)
    probe = SWEEP.model_copy(update={"lr": (1e-2,), "weight_decay": (0.1,), "batch": 7})
    got = probe(train, validation, test, 2, seed=0).probabilities
    looks = Tokens(Features(test.features.tokens, test.features.valid, 1), np.arange(27), np.repeat(test.target, 3))
    each = probe(train, validation, looks, 2, seed=0).probabilities
    assert got == pytest.approx(each.reshape(9, 3, 2).mean(1), abs=1e-5)
    turned = Tokens(test.features, test.place[::-1], test.target[::-1])
    assert probe(train, validation, turned, 2, seed=0).probabilities[::-1] == pytest.approx(got, abs=1e-5)
    assert test.index.tolist() == list(range(27))


# ---- retrieval

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30))
def test_retrieval_equals_a_loop(seed: int, n: int) -> None:
    gallery, query = split(seed, n, signal=0.5), split(seed + 1, 6, classes=4, signal=0.5)
    got = retrieve(gallery, query)
    for i, q in enumerate(query.embedding):
        cosine = [float(q @ e / np.linalg.norm(q) / np.linalg.norm(e)) for e in gallery.embedding]
        ranked = [gallery.target[j] == query.target[i] for j in sorted(range(n), key=lambda j: -cosine[j])]
        for k in (1, 5, 10, 20):
            assert got[f"R@{k}"][i] == any(ranked[:k])
        hits = [place for place, hit in enumerate(ranked, 1) if hit]
        expected = np.mean([(j + 1) / place for j, place in enumerate(hits)]) if hits else 0.0
        assert got["mAP"][i] == pytest.approx(expected)
        if hits:
            truth = gallery.target == query.target[i]
            assert got["mAP"][i] == pytest.approx(average_precision_score(truth, cosine))


def test_a_sample_retrieves_itself() -> None:
    one = split(0, 20)
    assert (retrieve(one, one)["R@1"] == 1).all()


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
