"""Contrastive losses against closed forms and double loops in double precision."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.platform.contrastive import losses
from meristem.platform.contrastive.losses import (
    DINO,
    Cosine,
    InfoNCE,
    Margin,
    SwAV,
    attraction,
    centred,
    cross_entropy,
    infonce,
    ranking,
    sinkhorn,
)
from meristem.platform.contrastive.relations import Relation
from meristem.platform.objectives import Pairs, Units
from meristem.platform.schedules import Ramp, value

TWO_LOOKS = Relation("same(item) - same(view)")


def looks(n: int, width: int, count: int = 2, seed: int = 0) -> Units:
    """count looks of n items, item by item within a look."""
    g = torch.Generator().manual_seed(seed)
    key = {"item": torch.arange(n).repeat(count), "view": torch.arange(count).repeat_interleave(n)}
    return Units(torch.randn(n * count, width, generator=g), key, torch.ones(n * count))


def step(progress: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(progress=progress, value=lambda x: value(x, progress))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def nt_xent(z: np.ndarray, n: int, tau: float) -> float:
    """Chen et al. 2020, algorithm 1, for z (2n, D) with i and i + n of one sample."""
    total = 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        denominator = sum(math.exp(cosine(z[i], z[m]) / tau) for m in range(2 * n) if m != i)
        total -= math.log(math.exp(cosine(z[i], z[j]) / tau) / denominator)
    return total / (2 * n)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_infonce_of_two_looks_is_nt_xent(tau: float) -> None:
    u = looks(7, 5)
    loss = infonce(u, u, TWO_LOOKS.pairs(u, u), tau)
    assert loss.count == 14
    assert float(loss.total / loss.count) == pytest.approx(nt_xent(u.z.double().numpy(), 7, tau), rel=1e-5)


def test_infonce_closed_forms() -> None:
    n, tau = 6, 0.2
    same = looks(n, 4).with_z(torch.ones(2 * n, 4))  # all alike: a guess among the 2n − 1 others
    loss = infonce(same, same, TWO_LOOKS.pairs(same, same), tau)
    assert float(loss.total / loss.count) == pytest.approx(math.log(2 * n - 1), rel=1e-6)
    perfect = same.with_z(torch.eye(n).repeat(2, 1))  # positives at cosine 1, all else at 0
    loss = infonce(perfect, perfect, TWO_LOOKS.pairs(perfect, perfect), tau)
    assert float(loss.total / loss.count) == pytest.approx(math.log1p((2 * n - 2) * math.exp(-1 / tau)), rel=1e-5)


@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.3, 1.0]))
@settings(max_examples=20, deadline=None)
def test_infonce_with_soft_pairs_is_the_double_loop(seed: int, tau: float) -> None:
    g = torch.Generator().manual_seed(seed)
    q = Units(torch.randn(5, 3, generator=g), {}, torch.rand(5, generator=g) + 0.1)
    k = Units(torch.randn(6, 3, generator=g), {}, torch.ones(6))
    pos = torch.rand(5, 6, generator=g) * (torch.rand(5, 6, generator=g) < 0.3)
    neg = torch.rand(5, 6, generator=g) * (torch.rand(5, 6, generator=g) < 0.7) * (pos == 0)
    total, count = 0.0, 0.0
    a, b, p, n = (x.double().numpy() for x in (q.z, k.z, pos, neg))
    for i in range(5):
        if p[i].sum() == 0:
            continue
        s = [cosine(a[i], b[j]) / tau for j in range(6)]
        partition = sum((p[i, j] + n[i, j]) * math.exp(s[j]) for j in range(6))
        each = -sum(p[i, j] * (s[j] - math.log(partition)) for j in range(6)) / p[i].sum()
        total, count = total + float(q.weight[i]) * each, count + float(q.weight[i])
    loss = infonce(q, k, Pairs(pos, neg), tau)
    assert float(loss.total) == pytest.approx(total, rel=1e-4, abs=1e-5)
    assert float(loss.count) == pytest.approx(count, rel=1e-5)


def test_infonce_with_labels_is_supcon() -> None:
    """L_out of Khosla et al. 2020 written out."""
    u = looks(6, 4, seed=2)
    u = Units(u.z, u.key | {"label": torch.tensor([0, 1, 2, 0, 1, 2]).repeat(2)}, u.weight)
    relation = Relation("same(label) - (same(item) & same(view))")
    z, y, tau, total = u.z.double().numpy(), u.key["label"].tolist(), 0.3, 0.0
    for i in range(12):
        others = [a for a in range(12) if a != i]
        positives = [p for p in others if y[p] == y[i]]
        denominator = sum(math.exp(cosine(z[i], z[a]) / tau) for a in others)
        total -= sum(math.log(math.exp(cosine(z[i], z[p]) / tau) / denominator) for p in positives) / len(positives)
    assert float(infonce(u, u, relation.pairs(u, u), tau).total) == pytest.approx(total, rel=1e-5)


def test_infonce_against_the_other_view_is_moco_v3() -> None:
    """ctr(q1, k2) + ctr(q2, k1), each a softmax over the batch's keys of the other look, each scaled by 2τ."""
    n, tau = 5, 0.2
    q, k = looks(n, 4, seed=3), looks(n, 4, seed=4)
    a, b, total = q.z.double().numpy(), k.z.double().numpy(), 0.0
    for first, second in ((0, n), (n, 0)):
        s = np.array([[cosine(a[first + i], b[second + j]) / tau for j in range(n)] for i in range(n)])
        total += 2 * tau * -float(np.mean([s[i, i] - math.log(np.exp(s[i]).sum()) for i in range(n)]))
    loss = infonce(q, k, Relation("same(item) - same(view)", "~same(view)").pairs(q, k), tau)
    assert 4 * tau * float(loss.total / loss.count) == pytest.approx(total, rel=1e-5)


def test_infonce_of_a_lone_sample_is_nothing_and_has_a_finite_gradient() -> None:
    u = looks(1, 4, count=1)
    z = u.z.requires_grad_()
    loss = infonce(u, u, TWO_LOOKS.pairs(u, u), 0.1)
    loss.total.backward()
    assert float(loss.total.detach()) == float(loss.count) == 0 and torch.equal(z.grad, torch.zeros_like(z))


def test_infonce_gradient() -> None:
    u = looks(4, 3)
    pairs = TWO_LOOKS.pairs(u, u)
    z = torch.nn.functional.normalize(u.z, dim=-1).requires_grad_()
    infonce(u.with_z(z), u.with_z(z), pairs, 0.5).total.backward()
    eps, numeric = 1e-3, torch.zeros_like(z)
    for i in np.ndindex(*z.shape):
        moved = [z.detach().double().clone() for _ in range(2)]
        moved[0][i] += eps
        moved[1][i] -= eps
        up, down = (8 * nt_xent(m.numpy(), 4, 0.5) for m in moved)
        numeric[i] = (up - down) / (2 * eps)
    assert torch.allclose(z.grad, numeric, atol=1e-3)


def test_infonce_with_own_denominators_takes_the_positives_in_turn() -> None:
    """RSPNet's A-VID: two cross-entropies, each of one positive against the same negatives, summed."""
    g, tau = torch.Generator().manual_seed(4), 0.07
    query, same, other, queue = (torch.nn.functional.normalize(torch.randn(n, 6, generator=g), dim=1) for n in (5, 5, 5, 9))
    target = torch.zeros(5, dtype=torch.int64)
    logits = [torch.cat([(query * k).sum(1, keepdim=True), query @ queue.T], 1) / tau for k in (same, other)]
    expected = sum(torch.nn.functional.cross_entropy(x, target) for x in logits)
    item = torch.arange(5)
    q = Units(query, {"item": item, "row": item}, torch.ones(5))
    k = Units(torch.cat([same, other, queue]), {"item": torch.cat([item, item, torch.arange(10, 19)]),
                                                "row": torch.cat([item, item, torch.arange(10, 19)])}, torch.ones(19))
    pos = (q.key["item"][:, None] == k.key["item"]).float()
    loss = infonce(q, k, Pairs(pos, (k.key["item"] >= 10).float().expand(5, -1)), tau, own=True)
    assert 2 * float(loss.total / loss.count) == pytest.approx(float(expected), rel=1e-5)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_own_and_shared_denominators_agree_on_single_positives(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q = Units(torch.randn(6, 3, generator=g).requires_grad_(), {}, torch.rand(6, generator=g) + 0.1)
    k = Units(torch.randn(7, 3, generator=g), {}, torch.ones(7))
    pos = torch.nn.functional.one_hot(torch.randint(0, 7, (6,), generator=g), 7) * torch.rand(6, 1, generator=g)
    pos[0] = 0  # a query without a positive
    neg = torch.rand(6, 7, generator=g) * (torch.rand(6, 7, generator=g) < 0.5) * (pos == 0)
    neg[1] = 0  # and one without a negative
    gradients = []
    for own in (False, True):
        loss = infonce(q, k, Pairs(pos, neg), 0.3, own)
        gradients.append((float(loss.total.detach()), float(loss.count), torch.autograd.grad(loss.total, q.z)[0]))
    assert gradients[0][:2] == pytest.approx(gradients[1][:2], rel=1e-4, abs=1e-6)
    assert torch.allclose(gradients[0][2], gradients[1][2], atol=1e-5) and gradients[1][2].isfinite().all()


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.14, 1.5]))
@settings(max_examples=20, deadline=None)
def test_ranking_is_the_triple_loop(seed: int, margin: float) -> None:
    g = torch.Generator().manual_seed(seed)
    q = Units(torch.randn(5, 3, generator=g), {}, torch.rand(5, generator=g) + 0.1)
    k = Units(torch.randn(6, 3, generator=g), {}, torch.ones(6))
    pos = torch.rand(5, 6, generator=g) * (torch.rand(5, 6, generator=g) < 0.3)
    neg = torch.rand(5, 6, generator=g) * (torch.rand(5, 6, generator=g) < 0.5)
    a, b, p, n = (x.double().numpy() for x in (q.z, k.z, pos, neg))
    total = count = 0.0
    for i in range(5):
        up = down = 0.0
        for j in range(6):
            for m in range(6):
                up += p[i, j] * n[i, m] * max(0.0, margin - (cosine(a[i], b[j]) - cosine(a[i], b[m])))
                down += p[i, j] * n[i, m]
        if down > 0:
            total, count = total + float(q.weight[i]) * up / down, count + float(q.weight[i])
    loss = ranking(q, k, Pairs(pos, neg), margin)
    assert float(loss.total) == pytest.approx(total, rel=1e-4, abs=1e-6)
    assert float(loss.count) == pytest.approx(count, rel=1e-5)


def test_ranking_of_one_pair_each_is_torchs_margin_ranking_of_scaled_logits() -> None:
    """RSPNet's relative speed line as its authors compute it: cosines over τ, margin 2, is margin 2 τ and weight 1/τ here."""
    q, k, tau = looks(8, 5, count=1, seed=1), looks(8, 5, count=2, seed=2), 0.07
    same, other = k.z[:8], k.z[8:]
    up, down = (torch.nn.functional.cosine_similarity(q.z, z) / tau for z in (same, other))
    expected = torch.nn.functional.margin_ranking_loss(up, down, torch.ones(8), margin=2.0)
    speed = torch.arange(8) % 2
    q = Units(q.z, q.key | {"speed": speed}, q.weight)
    k = Units(k.z, k.key | {"view": k.key["view"] + 1, "speed": torch.cat([speed, 1 - speed])}, k.weight)
    relation = Relation("same(item) & same(speed) - same(view)", "same(item) & ~same(speed)")
    loss = Margin(margin=2 * tau).build(5)(q, k, relation, step())
    assert loss.count == 8 and float(loss.total / loss.count) / tau == pytest.approx(float(expected), rel=1e-5)


def test_ranking_without_triplets_is_nothing_and_has_a_finite_gradient() -> None:
    u = looks(3, 4)
    z = u.z.requires_grad_()
    loss = ranking(u, u, Pairs(torch.eye(6), torch.zeros(6, 6)), 0.5)
    loss.total.backward()
    assert float(loss.total.detach()) == float(loss.count) == 0 and torch.equal(z.grad, torch.zeros_like(z))


def test_attraction_is_twice_simsiams_but_for_a_constant() -> None:
    q, k = looks(6, 5, seed=1), looks(6, 5, seed=2)
    terms = [-cosine(q.z[i].double().numpy(), k.z[j].double().numpy())
             for i in range(12) for j in range(12) if i % 6 == j % 6 and i // 6 != j // 6]
    loss = attraction(q, k, TWO_LOOKS.matches(q, k))
    assert loss.count == len(terms) == 12
    assert float(loss.total / loss.count) == pytest.approx(2 + 2 * float(np.mean(terms)), rel=1e-5)
    squared = (torch.nn.functional.normalize(q.z, dim=1) - torch.nn.functional.normalize(k.z.roll(6, 0), dim=1)).square().sum(1)
    assert float(loss.total / loss.count) == pytest.approx(float(squared.mean()), rel=1e-5)  # BYOL's eq. 2


def dino_loop(student: np.ndarray, teacher: np.ndarray, q: Units, k: Units, tau: float) -> float:
    """Mean over pairs of one sample's different looks of the cross-entropy of teacher and student."""
    terms = []
    for i in range(len(q)):
        for j in range(len(k)):
            if q.key["item"][i] == k.key["item"][j] and q.key["view"][i] != k.key["view"][j]:
                s = student[i] / tau
                terms.append(-float(teacher[j] @ (s - s.max() - math.log(np.exp(s - s.max()).sum()))))
    return float(np.mean(terms))


def test_dino_with_small_crops_is_the_double_loop() -> None:
    q, k = looks(5, 8, count=4, seed=5), looks(5, 8, count=2, seed=6)
    centre = torch.randn(8)
    logits = (k.z.double() - centre.double()).numpy() / 0.07
    teacher = np.exp(logits - logits.max(1, keepdims=True))
    teacher /= teacher.sum(1, keepdims=True)
    target = centred(k.z, centre, 0.07)
    np.testing.assert_allclose(target.numpy(), teacher, rtol=1e-4, atol=1e-6)
    loss = cross_entropy(q, target, TWO_LOOKS.matches(q, k), 0.1)
    assert float(loss.count) == 5 * (2 * 4 - 2)
    assert float(loss.total / loss.count) == pytest.approx(dino_loop(q.z.double().numpy(), teacher, q, k, 0.1), rel=1e-5)


def test_cross_entropy_closed_forms() -> None:
    q = looks(3, 16)
    matches = TWO_LOOKS.matches(q, q)
    uniform = torch.full((6, 16), 1 / 16)
    loss = cross_entropy(q.with_z(torch.zeros(6, 16)), uniform, matches, 0.1)  # no opinion about no opinion: its entropy
    assert float(loss.total / loss.count) == pytest.approx(math.log(16), rel=1e-6)
    sure = torch.eye(16)[torch.arange(3).repeat(2)]
    loss = cross_entropy(q.with_z(100 * sure), sure, matches, 0.1)
    assert float(loss.total / loss.count) == pytest.approx(0, abs=1e-6)


def test_patch_loss_counts_hidden_tokens_only() -> None:
    """iBOT's patch line: only hidden tokens, each against the teacher's view of itself."""
    n, tokens, k = 3, 5, 7
    item, token = (x.flatten() for x in torch.meshgrid(torch.arange(n), torch.arange(tokens), indexing="ij"))
    hidden = torch.rand(n * tokens) < 0.4
    key = {"item": item, "view": torch.zeros_like(item), "token": token, "hidden": hidden.long()}
    q, t = Units(torch.randn(15, k), key, torch.ones(15)), Units(torch.randn(15, k), key, torch.ones(15))
    target = centred(t.z, torch.zeros(k), 0.07)
    relation = Relation("same(item) & same(view) & same(token) & hidden")
    loss = cross_entropy(q, target, relation.matches(q, t), 0.1)
    by_hand = -(target.double() * (q.z.double() / 0.1).log_softmax(-1)).sum(-1)[hidden]
    assert float(loss.total / loss.count) == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert loss.count == hidden.sum()


def brute_sinkhorn(z: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Caron et al. 2020, as published: scale prototypes to 1/K, then samples to 1/M, in turn; float64."""
    q = np.exp(z.astype(np.float64) / epsilon).T
    q /= q.sum()
    k, m = q.shape
    for _ in range(iterations):
        for row in range(k):
            q[row] /= q[row].sum() * k
        for column in range(m):
            q[:, column] /= q[:, column].sum() * m
    return (q * m).T


@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_sinkhorn_is_the_published_iteration(iterations: int) -> None:
    z = torch.nn.functional.normalize(torch.randn(24, 6), dim=1)
    np.testing.assert_allclose(sinkhorn(z, 0.05, iterations).numpy(), brute_sinkhorn(z.numpy(), 0.05, iterations),
                               rtol=1e-3, atol=1e-6)


def test_sinkhorn_codes_use_all_prototypes_equally() -> None:
    z = torch.randn(32, 8).clamp(-1, 1)
    codes = sinkhorn(z, 0.25, 200)
    assert torch.allclose(codes.sum(1), torch.ones(32), atol=1e-5)
    assert torch.allclose(codes.sum(0), torch.full((8,), 4.0), rtol=1e-3)
    assert sinkhorn(z, 1e-4, 3).isfinite().all()  # plain exponentials would underflow


def swav_by_hand(u: Units, epsilon: float, iterations: int, tau: float) -> float:
    codes = np.concatenate([brute_sinkhorn(u.z[u.key["view"] == v].numpy(), epsilon, iterations) for v in (0, 1)])
    return dino_loop(u.z.double().numpy(), codes, u, u, tau)


def test_swav_predicts_the_other_looks_codes() -> None:
    u = looks(12, 4, seed=7)
    u = u.with_z(torch.nn.functional.normalize(u.z, dim=1))
    loss = SwAV(epsilon=0.05, iterations=3, temperature=0.1).build(4)(u, u, TWO_LOOKS, step())
    assert float(loss.total / loss.count) == pytest.approx(swav_by_hand(u, 0.05, 3, 0.1), rel=1e-4)


def test_sinkhorn_over_ranks_is_sinkhorn_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(16, 5)
    whole, half = sinkhorn(z, 0.3, 3), z[:8] / 0.3
    # the other rank's column sums, iterated beside ours
    other, sums = z[8:] / 0.3, []
    ours = half
    for _ in range(3):
        sums.append(other.logsumexp(0, keepdim=True))
        column = torch.cat([ours.logsumexp(0, keepdim=True), sums[-1]]).logsumexp(0)
        ours, other = ours - column, other - column
        ours, other = (x - x.logsumexp(1, keepdim=True) for x in (ours, other))
    queue = iter(sums)
    monkeypatch.setattr(losses, "all_ranks", lambda x: torch.cat([x, next(queue)]))
    assert torch.allclose(sinkhorn(z[:8], 0.3, 3), whole[:8], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", [InfoNCE(temperature=0.2), InfoNCE(temperature=0.2, denominator="own"), Margin(margin=0.3),
                                  Cosine(), DINO()])
def test_halves_with_all_keys_sum_to_the_whole(part: losses.LossSettings) -> None:
    """Two ranks with half of the items each, keys of both where the loss wants them."""
    q, k = looks(8, 6, seed=8), looks(8, 6, seed=9)
    loss = part.build(6)
    whole = loss(q, k, TWO_LOOKS, step())
    total = count = 0.0
    for half in (q.key["item"] < 4, q.key["item"] >= 4):
        rows = torch.nonzero(half).squeeze(1)
        keys = k if part.repels else k.select(rows)
        one = loss(q.select(rows), keys, TWO_LOOKS, step())
        total, count = total + float(one.total), count + float(one.count)
    assert total == pytest.approx(float(whole.total), rel=1e-5) and count == float(whole.count)


def test_the_centre_follows_all_keys_of_an_optimiser_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = DINO(centre_momentum=0.9).build(6)
    first, second = looks(4, 6, seed=10), looks(4, 6, seed=11)
    for micro in (first, second):  # two micro-batches
        loss(micro, micro, TWO_LOOKS, step(0.5))
        assert torch.equal(loss.centre, torch.zeros(6))
    other = torch.cat([torch.full((6,), 32.0), torch.tensor([16.0])])  # the other rank: 16 keys of mean 2
    monkeypatch.setattr(losses, "all_ranks", lambda x: torch.cat([x, other[None]]))
    loss.after()
    mean = (torch.cat([first.z, second.z]).mean(0) + 2) / 2
    assert torch.allclose(loss.centre, 0.1 * mean, atol=1e-6)


def test_a_skipped_step_leaves_no_trace_in_the_centre() -> None:
    loss, good = DINO(centre_momentum=0.0).build(6), looks(4, 6)
    bad = good.with_z(torch.full_like(good.z, math.nan))
    loss(bad, bad, TWO_LOOKS, step(0.1))  # the loop skips the update: no after()
    loss(good, good, TWO_LOOKS, step(0.2))
    loss.after()
    assert torch.allclose(loss.centre, good.z.mean(0), atol=1e-6)
    loss.eval()
    loss(bad, bad, TWO_LOOKS, step(0.3))
    loss.after()
    assert torch.allclose(loss.centre, good.z.mean(0), atol=1e-6)


def test_temperatures_may_be_schedules() -> None:
    loss = DINO(teacher_temperature=Ramp(start=0.04, end=0.07, over=0.5, shape="linear")).build(6)
    u = looks(4, 6)
    early, late = (float(loss(u, u, TWO_LOOKS, step(p)).total) for p in (0.0, 0.9))
    matches, centre = TWO_LOOKS.matches(u, u), torch.zeros(6)
    expected = [float(cross_entropy(u, centred(u.z, centre, t), matches, 0.1).total) for t in (0.04, 0.07)]
    assert [early, late] == pytest.approx(expected)


def test_losses_are_computed_in_full_precision_under_autocast() -> None:
    u = looks(6, 32)
    expected = infonce(u, u, TWO_LOOKS.pairs(u, u), 0.1).total
    rank, near = ranking(u, u, TWO_LOOKS.pairs(u, u), 0.1).total, attraction(u, u, TWO_LOOKS.matches(u, u)).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(infonce(u, u, TWO_LOOKS.pairs(u, u), 0.1).total, expected)
        assert torch.equal(ranking(u, u, TWO_LOOKS.pairs(u, u), 0.1).total, rank)
        assert torch.equal(attraction(u, u, TWO_LOOKS.matches(u, u)).total, near)
