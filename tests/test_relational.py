"""Objectives over edges: what is asked of a graph, against networkx and double loops; what a recipe may not ask."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.modalities.stream import Edges, TokenStream
from meristem.platform.assembly import Assembly, total
from meristem.platform.masked.masking import HiddenEdges, Shuffle
from meristem.platform.objectives import Encoded, Items, Loss, Plan
from meristem.platform.recipe import load
from meristem.platform.relational import graphs
from meristem.platform.relational.objective import PairDecoder
from meristem.platform.step import Batch

BASE = ["modality={graph: {channels: 3}}", "views={x: {size: [64]}}", "objectives={pixels: null}", "masking={x: null}"]
NETWORK = "encoder={message_passing: {conv: gcn, width: 16, depth: 2}}"
BLOCKS = "encoder={transformer: {width: 16, depth: 1, heads: 2, sees: [edges]}}"


def edges_of(made: Sequence[nx.Graph], size: int) -> tuple[Edges, Tensor]:
    """Graphs as the rows of a batch, and (rows, size) which places hold a node."""
    pairs = [(row * size + i, row * size + j) for row, g in enumerate(made) for a, b in g.edges for i, j in ((a, b), (b, a))]
    index = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    valid = torch.tensor([[place in g for place in range(size)] for g in made])
    return Edges(index, torch.zeros(index.shape[1], dtype=torch.int64), None, len(made), size), valid


def some(seed: int, n: int = 5) -> list[nx.Graph]:
    """Sparse, dense, edgeless and complete graphs; of the first, nodes lie between padding."""
    rng = np.random.default_rng(seed)
    made = [nx.gnp_random_graph(int(rng.integers(6, 14)), p, seed=int(rng.integers(1 << 30))) for p in rng.uniform(0.1, 0.7, n)]
    made[0].remove_nodes_from([1, 3])
    return [*made, nx.empty_graph(4), nx.complete_graph(5)]


def batch_of(made: Sequence[nx.Graph], size: int, channels: int = 3, name: str = "x") -> Batch:
    edges, valid = edges_of(made, size)
    content = torch.stack([torch.randn(channels, size, generator=torch.Generator().manual_seed(i)) for i in range(len(made))])
    n = len(made)
    view = View(name, content, Frame(torch.ones(n, 1, 1), (size,), torch.ones(n, 0), ()), torch.arange(n),
                torch.zeros(n, dtype=torch.int64), weight=valid[:, None].float(),
                index=torch.where(valid, torch.arange(size), -1), edges=edges)
    return Batch(Items(torch.arange(n), torch.arange(n)), {name: view})


def rows_of(places: Tensor, size: int) -> list[list[tuple[int, int]]]:
    pairs: list[list[tuple[int, int]]] = [[] for _ in range(64)]
    for a, b in places.T.tolist():
        assert a // size == b // size
        pairs[a // size].append((a % size, b % size))
    return pairs


def value(loss: Loss) -> float:
    return float((loss.total / loss.count).detach())


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_properties_and_distances_are_those_of_networkx(seed: int) -> None:
    made, size, limit = some(seed), 16, 3
    edges, valid = edges_of(made, size)
    degree, clustering = graphs.degree(edges), graphs.clustering(edges)
    source = torch.stack([row.nonzero()[:3, 0] for row in valid])
    distance = graphs.hops(edges, source, limit)
    for row, g in enumerate(made):
        for node in g:
            assert degree[row, node] == g.degree[node]
            assert clustering[row, node] == pytest.approx(nx.clustering(g, node), abs=1e-6)
        for s in range(3):
            true = nx.single_source_shortest_path_length(g, int(source[row, s]))
            assert [int(d) for d in distance[row, list(g), s]] == [min(true.get(n, 99), limit + 1) for n in g]
    assert sorted(map(tuple, graphs.linked(edges).T.tolist())) == sorted(
        (row * size + min(e), row * size + max(e)) for row, g in enumerate(made) for e in g.edges)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_negatives_are_pairs_of_nodes_without_an_edge(seed: int) -> None:
    made, size = some(seed), 16
    edges, valid = edges_of(made, size)
    count = torch.arange(len(made)) + 7
    drawn = rows_of(graphs.unlinked(edges, valid, count, Rng.of(seed, torch.arange(len(made)))), size)
    for row, g in enumerate(made):
        free = {frozenset(p) for p in itertools.combinations(g, 2)} - {frozenset(e) for e in g.edges}
        assert len(drawn[row]) == (int(count[row]) if free else 0)
        assert {frozenset(p) for p in drawn[row]} <= free


def test_every_pair_without_an_edge_is_as_likely() -> None:
    g, size, n = nx.gnp_random_graph(9, 0.5, seed=3), 12, 40_000
    edges, valid = edges_of([g], size)
    drawn = rows_of(graphs.unlinked(edges, valid, torch.tensor([n]), Rng.of(0, 0)), size)[0]
    free = len(nx.complement(g).edges)
    times = np.unique([a * size + b for a, b in drawn], return_counts=True)[1]
    assert len(times) == free
    assert ((times - n / free) ** 2 / (n / free)).sum() < 2.5 * free  # chi-square of `free` − 1 degrees of freedom


def test_what_is_asked_of_a_graph_does_not_depend_on_its_batch() -> None:
    made = some(5)
    large, size = batch_of(made, 20).views["x"], 20
    assert large.edges is not None and large.weight is not None
    whole = Rng.of(1, torch.arange(len(made)))
    for row in range(len(made)):
        alone, valid = edges_of([made[row]], 14)
        count = torch.full((1,), 5)
        own = graphs.unlinked(alone, valid, count, Rng.of(1, row))
        counts = count + torch.arange(len(made)) // 4
        among = graphs.unlinked(large.edges, large.weight[:, 0] > 0, counts, whole)
        assert rows_of(own, 14)[0] == rows_of(among, size)[row][:5]


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_masking_hides_whole_links_exactly_as_many_and_the_same_in_any_batch(ratio: float) -> None:
    made = some(2)
    edges, valid = edges_of(made, 16)
    stream = TokenStream(torch.zeros(*valid.shape, 1), None, valid, None, edges=edges)
    plan = HiddenEdges(ratio=ratio).plan(stream, Rng.of(3, torch.arange(len(made))), ())
    assert plan.edges is not None and not plan.hidden.any()
    hidden, kept = edges.where(plan.edges), plan.shown(stream).edges
    assert kept is not None and len(kept) + len(hidden) == len(edges)
    assert not set(map(tuple, graphs.linked(hidden).T.tolist())) & set(map(tuple, graphs.linked(kept).T.tolist()))
    for row, g in enumerate(made):
        mine = graphs.linked(hidden)[:, graphs.linked(hidden)[0] // 16 == row] % 16
        assert mine.shape[1] == int(len(g.edges) * ratio + 0.5)
        alone, there = edges_of([g], 14)
        single = TokenStream(torch.zeros(1, 14, 1), None, there, None, edges=alone)
        own = HiddenEdges(ratio=ratio).plan(single, Rng.of(3, row), ())
        assert own.edges is not None and torch.equal(graphs.linked(alone.where(own.edges)), mine)


def test_a_shuffle_exchanges_the_contents_of_each_graphs_own_nodes() -> None:
    edges, valid = edges_of(some(4), 16)
    stream = TokenStream(torch.zeros(*valid.shape, 1), None, valid, None, edges=edges)
    plan = Shuffle().plan(stream, Rng.of(0, torch.arange(7)), ())
    assert plan.swap is not None and torch.equal(plan.hidden, valid)
    for row in range(len(valid)):
        assert sorted(plan.swap[row, valid[row]].tolist()) == valid[row].nonzero()[:, 0].tolist()
    assert (plan.swap[:5] != torch.arange(16)).any()


@pytest.mark.parametrize("join", ["inner", "product", "difference"])
@pytest.mark.parametrize("hidden", [None, 8])
def test_pair_decoders_do_not_mind_the_order(join: str, hidden: int | None) -> None:
    decoder, (a, b) = PairDecoder(join, 6, hidden, 4), torch.randn(2, 9, 6)
    assert torch.equal(decoder(a, b), decoder(b, a)) and decoder(a, b).shape == (9, 4)
    assert not torch.allclose(decoder(a, b), decoder(a, a))


@pytest.mark.parametrize("encoder", [NETWORK, BLOCKS])
def test_links_are_asked_of_the_hidden_edges_and_of_as_many_others(encoder: str) -> None:
    recipe = load("method/mae", [*BASE[:2], encoder, "masking={x: {edges: {ratio: 0.4}}}",
                                 "objectives={pixels: null, links: {links: {encode: x, join: difference}}}"])
    torch.manual_seed(0)
    assembly, made = Assembly(recipe).eval(), some(1)
    batch = batch_of(made, 16)
    losses = assembly(batch, 0.0)
    step = assembly.last_step
    assert step is not None and step.passes == ["encoder(x, plan)"]
    plan, stream = step.plan("x"), step.stream("x")
    assert plan.edges is not None and stream.edges is not None
    tokens = assembly.encoder(plan.shown(stream.seen(recipe.encoder.sees)), plan).tokens
    positive = graphs.linked(stream.edges.where(plan.edges))
    count = torch.bincount(positive[0] // 16, minlength=len(made))
    negative = graphs.unlinked(stream.edges, stream.valid, count, step.rng("links", "x"))
    each = []
    for truth, pairs in ((1.0, positive), (0.0, negative)):
        for a, b in pairs.T.tolist():
            x, y = tokens[a // 16, a % 16], tokens[b // 16, b % 16]
            logit = assembly.objectives["links"].decoder(x, y)[0]
            each.append(F.binary_cross_entropy_with_logits(logit, torch.tensor(truth)))
    assert value(losses["links"]) == pytest.approx(float(torch.stack(each).mean().detach()), rel=1e-5)
    assert 0 <= value(losses["links.error"]) <= 1 and losses["links.error"].weight == 0


def test_hidden_edges_do_not_reach_the_encoder() -> None:
    recipe = load("method/mae", [*BASE[:2], NETWORK, "masking={x: {edges: {ratio: 0.4}}}",
                                 "objectives={pixels: null, links: {links: {encode: x}}}"])
    assembly, made = Assembly(recipe).eval(), some(1)
    assembly(batch_of(made, 16), 0.0)
    assert assembly.last_step is not None
    plan, first = assembly.last_step.plan("x"), assembly.last_step.encode("x", masked=True).tokens
    without = batch_of(made, 16)
    edges = without.views["x"].edges
    assert edges is not None and plan.edges is not None
    without.views["x"].edges = edges.where(~plan.edges)
    assembly(without, 0.0)
    assert torch.equal(assembly.last_step.encode("x").tokens, first)


def test_hops_ask_each_source_for_one_node_at_each_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("method/mae", [*BASE, NETWORK, "objectives={pixels: null, hops: {hops: {encode: x, limit: 2, sources: 6}}}"])
    assembly, made, size = Assembly(recipe), some(7), 16

    def number(stream: TokenStream, plan: Plan | None, want: frozenset[str]) -> Encoded:
        places = torch.arange(stream.valid.numel()).reshape(-1, size, 1)
        return Encoded(places.expand(-1, -1, 16).float(), {}, stream.valid)

    monkeypatch.setattr(assembly.encoder, "forward", number)
    heard: list[tuple[Tensor, Tensor]] = []
    assembly.objectives["hops"].decoder.register_forward_hook(lambda module, given, out: heard.append(given))
    losses = assembly(batch_of(made, size), 0.0)
    asked = [(row, a % size, b % size) for row in range(len(made))
             for a, b in zip(*(x[:, 0].long().tolist() for x in heard[0]), strict=True) if a // size == b // size == row]
    wanted = 0
    for row, g in enumerate(made):
        near = {n: nx.single_source_shortest_path_length(g, n) for n in g}
        distances = [(a, min(near[a].get(b, 99), 3)) for r, a, b in asked if r == row]
        assert len(set(distances)) == len(distances) and all(d > 0 for _, d in distances)
        sources = {a for a, _ in distances}
        wanted += sum(len({min(near[a].get(b, 99), 3) for b in g if b != a}) for a in sources)
        assert len(sources) == min(6, len(g))
    assert len(asked) == wanted == losses["hops"].count


def test_a_network_learns_the_properties_and_the_distances_of_its_graphs() -> None:
    """Features tell each node's number; after some steps all three questions are answered better than by chance."""
    recipe = load("method/mae", ["modality={graph: {channels: 12}}", "views={x: {size: [64]}}",
                                 "encoder={message_passing: {conv: gin, width: 32, depth: 2, norm: none}}",
                                 "masking={x: {edges: {ratio: 0.2}}}",
                                 "objectives={pixels: null, links: {links: {encode: x, hidden: 32}}, "
                                 "degree: {property: {encode: x}}, near: {hops: {encode: x, limit: 2, hidden: 32}}}"])
    torch.manual_seed(0)
    assembly = Assembly(recipe)
    ring = nx.connected_caveman_graph(3, 4)
    optimiser = torch.optim.Adam(assembly.parameters(), 0.01)
    first: dict[str, float] = {}
    mean: dict[str, float] = {}
    for cursor in range(150):
        batch = batch_of([ring] * 4, 12, 12)
        batch.views["x"].array = torch.eye(12).expand(4, 12, 12).contiguous()
        batch.items = Items(torch.arange(4), torch.arange(4) + 4 * cursor)
        losses = assembly(batch, 0.0)
        total(losses).backward()
        optimiser.step()
        optimiser.zero_grad()
        now = {name: value(loss) for name, loss in losses.items()}
        first = first or now
        mean = {name: 0.9 * mean.get(name, x) + 0.1 * x for name, x in now.items()}  # few links are hidden in a step
    assert mean["links.error"] < 0.35 and mean["near.error"] < 0.2 and mean["degree"] < 0.05 < first["degree"], mean


def test_infomax_is_dgis_loss() -> None:
    recipe = load("method/mae", [*BASE[:2], NETWORK, "masking={x: shuffle}",
                                 "objectives={pixels: null, whole: {infomax: {encode: x}}}"])
    torch.manual_seed(0)
    assembly, made = Assembly(recipe).eval(), some(3)
    batch = batch_of(made, 16)
    losses = assembly(batch, 0.0)
    step = assembly.last_step
    assert step is not None and step.passes == ["encoder(x)", "encoder(x, plan)"]
    swap, stream = step.plan("x").swap, step.stream("x")
    assert swap is not None
    corrupted = batch_of(made, 16)
    corrupted.views["x"].array = batch.views["x"].array.gather(2, swap[:, None].expand(-1, 3, -1))
    assembly(corrupted, 0.0)
    false, true = assembly.last_step.encode("x").tokens, step.encode("x").tokens
    matrix, each = assembly.objectives["whole"].matrix, []
    for row, g in enumerate(made):
        s = true[row, list(g)].mean(0).sigmoid()
        for node in g:
            each += [-F.logsigmoid(true[row, node] @ matrix @ s), -F.logsigmoid(-(false[row, node] @ matrix @ s))]
    assert stream.valid.sum() * 2 == len(each)
    assert value(losses["whole"]) == pytest.approx(float(torch.stack(each).mean().detach()), rel=1e-5)


@pytest.mark.parametrize(("name", "more", "message"), [
    ("image/mae", ["objectives.l={links: {encode: x}}"], "has none; use it with graphs"),
    ("image/mae", ["objectives.h={hops: {encode: x}}"], "has none; use it with graphs"),
    ("image/mae", ["objectives.p={property: {encode: x}}"], "has none; use it with graphs"),
    ("image/mae", ["masking={x: {edges: {ratio: 0.1}}}"], "has none; use it with graphs"),
    ("method/mae", [*BASE, NETWORK, "objectives.l={links: {encode: x}}"], "the encoder would see the answer"),
    ("method/mae", [*BASE, NETWORK, "objectives.h={hops: {encode: y}}"], "there is no such view"),
    ("method/mae", [*BASE, NETWORK, "objectives.i={infomax: {encode: x}}"], "set masking.x: shuffle"),
    ("method/mae", [*BASE[:2], NETWORK, "masking={x: {edges: {ratio: 0.1}}}"], "hides edges and no token's content"),
    ("method/mae", [*BASE[:2], "encoder={transformer: {sees: [structure, edges]}}", "masking={x: {edges: {ratio: 0.1}}}",
                    "objectives={pixels: null}"], "would tell the hidden ones"),
    ("method/mae", [*BASE[:2], "encoder={transformer: {sees: []}}", "masking={x: {edges: {ratio: 0.1}}}",
                    "objectives={pixels: null}"], "is not given any"),
])
def test_what_cannot_be_asked_is_refused_before_any_file_is_read(name: str, more: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(name, more)
