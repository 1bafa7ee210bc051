"""Contrast by sorting: the network sorts, softly and exactly; the loss is the authors'."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.errors import RecipeError
from meristem.platform.contrastive.relations import Relation
from meristem.platform.contrastive.sorting import odd_even_sort, ordering
from meristem.platform.objectives import Loss, Pairs, Units
from meristem.platform.recipe import load

SIDES = Relation("same(item) - same(view)", "same(view)")
HARD = 1e9


def looks(count: int, n: int = 16, width: int = 8) -> Units:
    """`count` looks of n items, the first and the first with noise."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(n, width, generator=g)
    z = torch.cat([first, *(first + torch.randn(n, width, generator=g) for _ in range(count - 1))])
    key = {"item": torch.arange(n).repeat(count), "view": torch.arange(count).repeat_interleave(n)}
    return Units(z, key, torch.ones(n * count))


def mean(loss: Loss) -> float:
    return float((loss.total / loss.count).detach())


@pytest.mark.parametrize(("count", "hardest", "steepness", "value", "gradient"),
                         [(2, 10, 1.0, 0.19255993, 0.00120656), (3, 5, 20.0, 0.34926105, 0.06367624)])
def test_it_is_the_authors_loss_and_gradient(count: int, hardest: int, steepness: float, value: float, gradient: float) -> None:
    """ninatu/learning_by_sorting at 47c074e with Felix-Petersen/diffsort at 5c417ea: GroCo(n_augs=count, topk_neg=hardest) of
    the looks of `looks(count)`, and the norm of its gradient for them.
    """
    u = looks(count)
    z = u.z.requires_grad_()
    loss = ordering(u, u.with_z(z.detach()), SIDES.pairs(u, u), steepness, hardest)
    (loss.total / loss.count).backward()
    assert mean(loss) == pytest.approx(value, rel=1e-5) and float(z.grad.norm()) == pytest.approx(gradient, rel=1e-4)


@pytest.mark.parametrize("n", range(1, 9))
def test_the_network_sorts(n: int) -> None:
    """The 0-1 principle (Knuth 1973): a network that sorts all rows of zeros and ones sorts everything."""
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))
    assert torch.allclose(odd_even_sort(x, HARD)[0], x.sort(1).values, atol=1e-6)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=12, unique=True))
@settings(max_examples=40, deadline=None)
def test_in_its_hard_limit_the_permutation_is_argsorts(values: list[int]) -> None:
    x = torch.tensor([values]).float()
    p = odd_even_sort(x, HARD)[1]
    expected = torch.nn.functional.one_hot(x.argsort(1)[0]).T.float()  # element i at place j
    assert torch.allclose(p[0], expected, atol=1e-5)


@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.1, 100))
@settings(max_examples=40, deadline=None)
def test_at_any_steepness_it_is_doubly_stochastic_and_carries_values_to_their_places(seed: int, n: int, beta: float) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    y, p = odd_even_sort(x, beta)
    assert p.min() >= 0
    ones = torch.ones(3, n)
    assert torch.allclose(p.sum(1), ones, atol=1e-5) and torch.allclose(p.sum(2), ones, atol=1e-5)
    assert torch.allclose(y, torch.einsum("bi,bij->bj", x, p), atol=1e-4) and torch.allclose(y.sum(1), x.sum(1), atol=1e-4)


@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_the_loss_is_the_loop_over_queries_with_any_number_of_positives(seed: int, hardest: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q = Units(torch.randn(6, 3, generator=g), {}, torch.rand(6, generator=g) + 0.1)
    k = Units(torch.randn(8, 3, generator=g), {}, torch.ones(8))
    pos = (torch.rand(6, 8, generator=g) < 0.3).float()
    neg = (torch.rand(6, 8, generator=g) < 0.5).float() * (pos == 0)
    total = count = 0.0
    for i in range(6):
        s = torch.nn.functional.cosine_similarity(q.z[i][None], k.z, dim=1).tolist()
        near = sorted(s[j] for j in range(8) if pos[i, j])
        hard = sorted(s[j] for j in range(8) if neg[i, j])[-hardest:]
        if not near or not hard:
            continue
        x, n = np.array(hard + near), len(hard) + len(near)
        share = np.eye(n)
        for layer in range(n):
            for a in range(layer % 2, n - 1, 2):
                alpha = 0.5 + math.atan(4.0 * (x[a + 1] - x[a])) / math.pi
                swap = np.array([[alpha, 1 - alpha], [1 - alpha, alpha]])
                x[a:a + 2], share[:, a:a + 2] = swap @ x[a:a + 2], share[:, a:a + 2] @ swap
        each = 0.0
        for element in range(n):
            last = share[element, len(hard):].sum()
            each -= math.log(last if element >= len(hard) else 1 - last) / n
        total, count = total + float(q.weight[i]) * each, count + float(q.weight[i])
    loss = ordering(q, k, Pairs(pos, neg), 4.0, hardest)
    assert float(loss.total) == pytest.approx(total, rel=1e-4, abs=1e-5) and float(loss.count) == pytest.approx(count, rel=1e-5)


def test_order_alone_counts_in_the_hard_limit() -> None:
    """Positives behind all negatives cost nothing, in whatever order among themselves; the hundred is torch's end of a log."""
    q = Units(torch.tensor([[1.0, 0.0]]), {}, torch.ones(1))
    angles = torch.tensor([0.9, 0.8, 0.3, 0.1, 0.5]) * math.pi / 2
    k = Units(torch.stack([angles.cos(), angles.sin()], 1), {}, torch.ones(5))
    negative = torch.tensor([[1.0, 1, 0, 0, 0]])
    good = ordering(q, k, Pairs(torch.tensor([[0.0, 0, 1, 1, 1]]), negative), HARD, 10)
    bad = ordering(q, k, Pairs(negative, torch.tensor([[0.0, 0, 1, 1, 0]])), HARD, 10)
    assert mean(good) == pytest.approx(0, abs=1e-5) and mean(bad) > 10


def test_halves_with_all_keys_sum_to_the_whole_and_far_negatives_do_not_matter() -> None:
    u = looks(2)
    whole = ordering(u, u, SIDES.pairs(u, u), 5.0, 4)
    total = count = 0.0
    for half in (u.key["item"] < 5, u.key["item"] >= 5):
        mine = u.select(torch.nonzero(half).squeeze(1))
        one = ordering(mine, u, SIDES.pairs(mine, u), 5.0, 4)
        total, count = total + float(one.total), count + float(one.count)
    assert total == pytest.approx(float(whole.total), rel=1e-5) and count == float(whole.count) == 32
    pairs, s = SIDES.pairs(u, u), torch.nn.functional.cosine_similarity(u.z[:, None], u.z[None], dim=-1)
    fourth = s.masked_fill(pairs.neg == 0, -2).topk(4, 1).values[:, -1:]
    near = Pairs(pairs.pos, pairs.neg * (s >= fourth))
    assert float(ordering(u, u, near, 5.0, 4).total) == pytest.approx(float(whole.total), rel=1e-6)


def test_a_lone_sample_is_nothing_and_has_a_finite_gradient() -> None:
    u = looks(2, n=1)
    z = u.z.requires_grad_()
    loss = ordering(u, u, SIDES.pairs(u, u), 1.0, 10)
    loss.total.backward()
    assert float(loss.total.detach()) == float(loss.count) == 0 and torch.equal(z.grad, torch.zeros_like(z))


def test_a_recipe_without_negatives_to_sort_is_refused() -> None:
    with pytest.raises(RecipeError, match="greater than or equal to 1"):
        load("image/groco", ["objectives.contrast.contrastive.loss.ordering.hardest=0"])
