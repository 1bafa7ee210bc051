"""Relations against double loops over units."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meristem.errors import RecipeError
from meristem.platform.contrastive.relations import Relation, parse
from meristem.platform.objectives import Units


def table(n: int, seed: int, label: bool = False) -> Units:
    g = torch.Generator().manual_seed(seed)
    keys = {"item": 3, "view": 3, "token": 2, "hidden": 2}
    key = {name: torch.randint(high, (n,), generator=g) for name, high in keys.items()}
    if label:
        key["label"] = torch.randint(-1, 3, (n,), generator=g)
    return Units(torch.randn(n, 4, generator=g), key, torch.rand(n, generator=g) + 0.5)


def loop(q: Units, k: Units, holds) -> tuple[Tensor, Tensor]:
    """pos and neg, unit by unit, from a Python predicate of two dictionaries."""
    pos, neg = torch.zeros(len(q), len(k)), torch.zeros(len(q), len(k))
    for i in range(len(q)):
        for j in range(len(k)):
            a, b = ({name: int(x[m]) for name, x in t.key.items()} for t, m in ((q, i), (k, j)))
            itself = all(a[name] == b[name] for name in ("item", "view", "token"))
            if holds(a, b):
                pos[i, j] = k.weight[j]
            elif not itself:
                neg[i, j] = k.weight[j]
    return pos, neg


EXPRESSIONS = {
    "same(item) - same(view)": lambda a, b: a["item"] == b["item"] and a["view"] != b["view"],
    "same(item, token)": lambda a, b: a["item"] == b["item"] and a["token"] == b["token"],
    "same(item) & same(view) & same(token) & hidden": lambda a, b: all(
        a[n] == b[n] for n in ("item", "view", "token")) and a["hidden"] == 1,
    "same(item) | same(token) & ~same(view)": lambda a, b: a["item"] == b["item"] or (
        a["token"] == b["token"] and a["view"] != b["view"]),
    "(same(item) | same(token)) - hidden": lambda a, b: (
        a["item"] == b["item"] or a["token"] == b["token"]) and a["hidden"] == 0,
    "same(item) & same(view) | same(item) & same(token)": lambda a, b: a["item"] == b["item"] and (
        a["view"] == b["view"] or a["token"] == b["token"]),
    "hidden": lambda a, b: a["hidden"] == 1,
}


@pytest.mark.parametrize("text", EXPRESSIONS)
@given(nq=st.integers(0, 12), nk=st.integers(0, 12), seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_pairs_and_matches_equal_a_double_loop(text: str, nq: int, nk: int, seed: int) -> None:
    q, k, relation = table(nq, seed), table(nk, seed + 1), Relation(text)
    pos, neg = loop(q, k, EXPRESSIONS[text])
    pairs = relation.pairs(q, k)
    assert torch.equal(pairs.pos, pos) and torch.equal(pairs.neg, neg)
    matches = relation.matches(q, k)
    listed = torch.zeros(nq, nk).index_put((matches.q, matches.k), matches.weight, accumulate=True)
    assert torch.equal(listed, pos * q.weight[:, None])
    assert torch.equal(matches.q, matches.q.sort().values)


def test_a_condition_on_negatives_drops_those_that_do_not_meet_it() -> None:
    q, k = table(9, 3), table(7, 4)
    plain, other_view = Relation("same(item) - same(view)"), Relation("same(item) - same(view)", "~same(view)")
    differ = q.key["view"][:, None] != k.key["view"][None]
    assert torch.equal(other_view.pairs(q, k).neg, plain.pairs(q, k).neg * differ)
    assert torch.equal(other_view.pairs(q, k).pos, plain.pairs(q, k).pos)


def test_an_unknown_label_is_nobodys() -> None:
    q = table(20, 5, label=True)
    pos = Relation("same(label)").pairs(q, q).pos > 0
    label = q.key["label"]
    assert (label < 0).any() and not pos[label < 0].any()
    assert torch.equal(pos, (label[:, None] == label) & (label[:, None] >= 0))


def test_matching_tokens_to_themselves_needs_no_table_of_all_pairs() -> None:
    b, n = 100, 1000  # a table would hold 10^10 pairs
    item, token = (x.flatten() for x in torch.meshgrid(torch.arange(b), torch.arange(n), indexing="ij"))
    key = {"item": item, "view": torch.zeros_like(item), "token": token, "hidden": (token % 3 == 0).long()}
    units = Units(torch.zeros(b * n, 1), key, torch.ones(b * n))
    shuffled = units.select(torch.randperm(b * n))
    matches = Relation("same(item) & same(view) & same(token) & hidden").matches(units, shuffled)
    assert torch.equal(matches.q, torch.nonzero(key["hidden"]).squeeze(1))
    for name in ("item", "token"):
        assert torch.equal(units.key[name][matches.q], shuffled.key[name][matches.k])


@pytest.mark.parametrize(("text", "says"), [
    ("simlar(item)", "no term called 'simlar'"), ("same()", "one key"), ("hidden(item)", "takes no key"),
    ("same(item) + same(view)", "is not a term"), ("same('item')", "is not a term"), ("same(item", "not an expression"),
    ("", "not an expression"), ("__import__('os').system('true')", "is not a term"), ("same(item).x", "is not a term"),
])
def test_a_wrong_expression_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("(", r"\(").replace(")", r"\)")):
        parse(text)


def test_a_key_that_units_lack_is_named() -> None:
    q = table(3, 0)
    with pytest.raises(RecipeError, match=r"needs the key 'label'.*\n.*hidden, item, token, view"):
        Relation("same(item) - same(label)").matches(q, q)


def test_drawn_speeds_pair_the_looks_of_a_sample() -> None:
    """Relative speed perception: the same sample at the same speed attracts, at another speed repels, other samples neither."""
    q = Units(torch.zeros(2, 1), {"item": torch.tensor([0, 1]), "view": torch.tensor([0, 0]), "speed": torch.tensor([0, 1])},
              torch.ones(2))
    k = Units(torch.zeros(4, 1), {"item": torch.tensor([0, 0, 1, 1]), "view": torch.tensor([1, 2, 1, 2]),
                                  "speed": torch.tensor([0, 1, 1, 0])}, torch.ones(4))
    pairs = Relation("same(item) & same(speed) - same(view)", "same(item) & ~same(speed)").pairs(q, k)
    assert pairs.pos.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert pairs.neg.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_a_sample_met_before_repels_unless_its_row_is_named() -> None:
    """Under same(item) a key of an earlier epoch is another item; `~same(row)` keeps it out of the negatives."""
    key = {"item": torch.tensor([12]), "view": torch.tensor([0]), "row": torch.tensor([3])}
    q = Units(torch.zeros(1, 1), key, torch.ones(1))
    k = Units(torch.zeros(3, 1), {"item": torch.tensor([12, 2, 5]), "view": torch.tensor([1, 0, 0]),
                                  "row": torch.tensor([3, 3, 4])}, torch.tensor([1.0, 1.0, 0.5]))
    assert Relation("same(item) - same(view)").pairs(q, k).neg.tolist() == [[0, 1, 0.5]]
    assert Relation("same(item) - same(view)", "~same(row)").pairs(q, k).neg.tolist() == [[0, 0, 0.5]]
