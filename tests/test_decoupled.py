"""The decoupled contrastive loss: values of public code, the loop, and what it is for: a gradient without the coupling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.platform.contrastive import decoupled as module
from meristem.platform.contrastive.decoupled import Decoupled, decoupled
from meristem.platform.contrastive.losses import infonce
from meristem.platform.contrastive.relations import Relation
from meristem.platform.objectives import Loss, Pairs, Units
from meristem.platform.recipe import load

TWO_LOOKS = Relation("same(item) - same(view)")


def looks(n: int = 9, width: int = 6, near: float = 0.7) -> Units:
    """Two looks of n items, the second the first and so much noise."""
    z = torch.randn(2, n, width, generator=torch.Generator().manual_seed(0))
    z[1] = z[0] + near * z[1]
    key = {"item": torch.arange(n).repeat(2), "view": torch.arange(2).repeat_interleave(n)}
    return Units(torch.nn.functional.normalize(z, dim=-1).flatten(0, 1), key, torch.ones(2 * n))


def mean(loss: Loss) -> float:
    return float((loss.total / loss.count).detach())


@pytest.mark.parametrize(("sigma", "both", "one"), [(None, 0.22926822, 0.48656926), (0.5, 1.73109770, 1.98839736)])
def test_it_gives_what_public_implementations_give(sigma: float | None, both: float, one: float) -> None:
    """both: lightly 1.6.0, DCLLoss and DCLWLoss(0.1). one: raminnakhli/Decoupled-Contrastive-Learning at 0b9b76d, whose loss
    goes from the first look to the second alone. Neither is the authors' own. The input is `looks()`.
    """
    u = looks()
    assert mean(decoupled(u, u, TWO_LOOKS.pairs(u, u), 0.1, sigma)) == pytest.approx(both, rel=1e-5)
    first = u.select(torch.arange(9))
    assert mean(decoupled(first, u, TWO_LOOKS.pairs(first, u), 0.1, sigma)) == pytest.approx(one, rel=1e-5)


@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from([None, 0.1, 0.5]))
@settings(max_examples=20, deadline=None)
def test_with_soft_pairs_it_is_the_double_loop(seed: int, tau: float, sigma: float | None) -> None:
    g = torch.Generator().manual_seed(seed)
    q = Units(torch.randn(5, 3, generator=g), {}, torch.rand(5, generator=g) + 0.1)
    k = Units(torch.randn(6, 3, generator=g), {}, torch.ones(6))
    pos = torch.rand(5, 6, generator=g) * (torch.rand(5, 6, generator=g) < 0.4)
    neg = torch.rand(5, 6, generator=g) * (torch.rand(5, 6, generator=g) < 0.5) * (pos == 0)
    s = torch.nn.functional.cosine_similarity(q.z.double()[:, None], k.z.double()[None], dim=-1).tolist()
    p, n, total, count = pos.tolist(), neg.tolist(), 0.0, 0.0
    cells = [(i, j) for i in range(5) for j in range(6)]
    mass = sum(p[i][j] for i, j in cells)
    share = {(i, j): 1.0 for i, j in cells}
    if sigma is not None and mass > 0:
        average = sum(p[i][j] * math.exp(s[i][j] / sigma) for i, j in cells) / mass
        share = {(i, j): 2 - math.exp(s[i][j] / sigma) / average for i, j in cells}
    for i in range(5):
        if sum(p[i]) == 0 or sum(n[i]) == 0:
            continue
        each = -sum(p[i][j] * share[i, j] * s[i][j] for j in range(6)) / tau / sum(p[i])
        each += math.log(sum(n[i][j] * math.exp(s[i][j] / tau) for j in range(6)))
        total, count = total + float(q.weight[i]) * each, count + float(q.weight[i])
    loss = decoupled(q, k, Pairs(pos, neg), tau, sigma)
    assert float(loss.total) == pytest.approx(total, rel=1e-4, abs=1e-4)
    assert float(loss.count) == pytest.approx(count, rel=1e-5)


def test_a_pair_that_agrees_is_pulled_as_hard_as_any_other() -> None:
    """Proposition 1 of the paper: InfoNCE's gradient carries the share of the denominator that is not the positive's."""
    u = looks(near=0.05)
    pairs, tau, n = TWO_LOOKS.pairs(u, u), 0.1, 18
    s = (u.z @ u.z.T / tau).double()
    share = (s.exp() * pairs.pos).sum(1) / (s.exp() * (pairs.pos + pairs.neg)).sum(1)
    gradients = []
    for loss in (infonce, decoupled):
        z = u.z.clone().requires_grad_()
        total = loss(u.with_z(z), u, pairs, tau).total
        gradients.append(torch.autograd.grad(total, z)[0].double())
    coupled, free = gradients
    assert torch.allclose(coupled, (1 - share)[:, None] * free, atol=1e-5)
    assert share.min() > 0.5 and free.norm(dim=1).mean() > 2 * coupled.norm(dim=1).mean() and len(free) == n


def test_the_weights_are_one_on_average_over_all_ranks_and_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, each with the queries of some items and the keys of all."""
    u = looks(8)
    whole = decoupled(u, u, TWO_LOOKS.pairs(u, u), 0.1, 0.3)
    halves = [u.select(torch.nonzero(half).squeeze(1)) for half in (u.key["item"] < 3, u.key["item"] >= 3)]
    sums = []
    monkeypatch.setattr(module, "all_ranks", lambda x: (sums.append(x), x)[1])
    for half in halves:
        decoupled(half, u, TWO_LOOKS.pairs(half, u), 0.1, 0.3)
    monkeypatch.setattr(module, "all_ranks", lambda x: torch.cat(sums))
    parts = [decoupled(half, u, TWO_LOOKS.pairs(half, u), 0.1, 0.3) for half in halves]
    assert sum(float(p.total) for p in parts) == pytest.approx(float(whole.total), rel=1e-5)
    monkeypatch.undo()
    pairs = TWO_LOOKS.pairs(u, u)
    weights = module._weights(u.z @ u.z.T, pairs.pos, 0.3)
    assert float((weights * pairs.pos).sum() / pairs.pos.sum()) == pytest.approx(1.0, rel=1e-5)
    z = u.z.clone().requires_grad_()
    assert not module._weights(z @ z.T, pairs.pos, 0.3).requires_grad


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_without_positives_or_negatives_it_is_nothing_with_a_finite_gradient(sigma: float | None) -> None:
    u = looks(1)
    z = u.z.clone().requires_grad_()
    loss = decoupled(u.with_z(z), u.with_z(z), TWO_LOOKS.pairs(u, u), 0.1, sigma)
    loss.total.backward()
    assert float(loss.total.detach()) == float(loss.count) == 0 and torch.equal(z.grad, torch.zeros_like(z))


def test_the_recipe_is_simclr_with_that_loss() -> None:
    mine, plain = load("image/dcl").dump(), load("image/simclr").dump()
    line = mine["objectives"]["contrast"]["contrastive"]
    assert line.pop("loss") == {"decoupled": {"temperature": 0.1, "sigma": None}}
    plain["objectives"]["contrast"]["contrastive"].pop("loss")
    names = ("name", "follows", "departs", "status")
    assert {k: v for k, v in mine.items() if k not in names} == {k: v for k, v in plain.items() if k not in names}
    assert Decoupled.repels and not Decoupled.collapses
