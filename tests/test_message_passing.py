"""Message passing: each layer against torch-geometric's own and a loop over edges, and what rows of a batch may not share."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.graph.tokenizer import GraphTokenizer
from meristem.modalities.stream import Edges, TokenStream
from meristem.platform.encoders import ENCODERS, Encoder
from meristem.platform.encoders.message_passing import Layer, Nodes, WeightedSum
from meristem.platform.objectives import Plan

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric import nn as geometric

CHANNELS, KINDS = 5, 3
CONVOLUTIONS: dict[str, dict[str, Any]] = {"gin": {}, "gat": {"heads": 2, "norm": "layer"}, "gcn": {"norm": "none"}}


def tokenizer(kinds: int = 1, walk: int = 0, values: int = 0) -> GraphTokenizer:
    made = GraphTokenizer(CHANNELS, kinds, walk, 0)
    made.edge_values = values
    return made


def encoder(conv: str, tokens: GraphTokenizer | None = None, **options: Any) -> Encoder:
    keys = {"conv": conv, "width": 8, "depth": 2, **CONVOLUTIONS[conv], **options}
    return ENCODERS["message_passing"](**keys).build(tokens or tokenizer(), (), CHANNELS).eval()


def graphs(*sizes: int, kinds: int = 1, walk: int = 0, seed: int = 0) -> TokenStream:
    """A batch of random graphs padded to the largest; padding holds NaN."""
    draw = torch.Generator().manual_seed(seed)
    n = max(sizes)
    valid = torch.arange(n) < torch.tensor(sizes)[:, None]
    table = (torch.rand(len(sizes), n, n, generator=draw) < 0.4).triu(1)
    table = (table | table.mT) & valid[:, :, None] & valid[:, None]
    row, source, target = table.nonzero(as_tuple=True)
    drawn = torch.randint(kinds, (len(sizes), n, n), generator=draw)
    kind = torch.minimum(drawn, drawn.mT)[row, source, target]
    value = torch.randn(len(row), 2, generator=draw)
    content = torch.randn(len(sizes), n, CHANNELS, generator=draw).masked_fill(~valid[..., None], torch.nan)
    structure = torch.randn(len(sizes), n, walk, generator=draw) if walk else None
    return TokenStream(content, None, valid, torch.arange(len(sizes)), structure=structure,
                       edges=Edges(torch.stack([row * n + source, row * n + target]), kind, value, len(sizes), n))


def plan(stream: TokenStream, keep: bool = False) -> Plan:
    """Hides every other node; of equally many in each row where they are dropped."""
    hidden = (torch.arange(len(stream)) % 2 == 1).expand(stream.batch, -1)
    kept = (~hidden).nonzero()[:, 1].unflatten(0, (stream.batch, -1)) if keep else None
    return Plan(hidden, hidden.float(), kept)


def loop(index: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    rows = [0 * weight.sum() * x[i] for i in range(len(x))]
    for (source, target), w in zip(index.T.tolist(), weight, strict=True):
        rows[target] = rows[target] + w * x[source]
    return torch.stack(rows)


@settings(max_examples=40, deadline=None)
@given(nodes=st.integers(1, 9), edges=st.integers(0, 30), seed=st.integers(0, 999))
def test_the_weighted_sum_and_its_gradients_are_those_of_a_loop_over_edges(nodes: int, edges: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)  # several edges between the same nodes, and loops, are allowed
    index = torch.randint(nodes, (2, edges), generator=draw)
    weight, x, grad = (torch.randn(*shape, generator=draw, dtype=torch.float64)
                       for shape in ((edges,), (nodes, 3), (nodes, 3)))
    results = []
    for sum_up in (WeightedSum.apply, loop):
        w, z = weight.clone().requires_grad_(), x.clone().requires_grad_()
        y = sum_up(index, w, z)
        y.backward(grad)
        results.append((y, torch.zeros_like(weight) if w.grad is None else w.grad, z.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kinds", [1, KINDS])
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_a_layer_is_torch_geometrics_convolution(conv: str, kinds: int) -> None:
    stream = graphs(7, kinds=kinds)
    nodes = Nodes(stream, kinds, 0)
    layer = Layer(conv, 8, kinds if kinds > 1 else 0, heads=2 if conv == "gat" else 1, last=True)  # type: ignore[arg-type]
    attributes = F.one_hot(stream.edges.kind, KINDS).float() if kinds > 1 else None
    one = layer.conv.nn if conv == "gin" else None
    reference = {"gin": lambda: geometric.GINConv(one) if kinds == 1 else geometric.GINEConv(one, edge_dim=KINDS),
                 "gat": lambda: geometric.GATConv(8, 4, 2, edge_dim=None if kinds == 1 else KINDS),
                 "gcn": lambda: geometric.GCNConv(8, 8)}[conv]()
    reference.load_state_dict(layer.conv.state_dict())
    x = torch.randn(7, 8)
    extra = () if attributes is None or conv == "gcn" else (attributes,)
    torch.testing.assert_close(layer(x, nodes), reference(x, stream.edges.index, *extra))


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_the_embedding_is_the_linear_map_that_the_first_convolution_begins_with(conv: str) -> None:
    made, stream = encoder(conv, depth=1, norm="none", activation="relu"), graphs(7)
    ours: Any = made.layers[0].conv  # type: ignore[union-attr]
    weight = made.embed.linear.weight  # type: ignore[union-attr]
    state = dict(ours.state_dict())
    if conv == "gin":
        bend, out = ours.nn
        whole = nn.Sequential(nn.Linear(CHANNELS, 8, bias=False), bend, out)
        whole[0].weight = weight
        reference: Any = geometric.GINConv(whole)
    else:
        reference = geometric.GATConv(CHANNELS, 4, 2) if conv == "gat" else geometric.GCNConv(CHANNELS, 8)
        reference.load_state_dict(state | {"lin.weight": weight})
    want = torch.relu(reference(stream.content[0], stream.edges.index))  # type: ignore[union-attr]
    torch.testing.assert_close(made(stream).tokens[0], want)


def test_graph_attention_is_the_softmax_over_neighbours_and_itself() -> None:
    stream = graphs(6)
    layer, x = Layer("gat", 8, 0, heads=2, last=True), torch.randn(6, 8)
    conv = layer.conv
    z = (x @ conv.lin.weight.T).view(6, 2, 4)
    neighbours = stream.edges.dense()[0] > 0
    expected = torch.zeros(6, 2, 4)
    for node in range(6):
        among = [node, *neighbours[node].nonzero()[:, 0].tolist()]
        for head in range(2):
            score = torch.stack([(conv.att_src[0, head] * z[j, head]).sum() + (conv.att_dst[0, head] * z[node, head]).sum()
                                 for j in among])
            share = F.leaky_relu(score, 0.2).softmax(0)
            expected[node, head] = sum(a * z[j, head] for a, j in zip(share, among, strict=True))
    torch.testing.assert_close(layer(x, Nodes(stream, 1, 0)), expected.flatten(1) + conv.bias)


@pytest.mark.parametrize("how", [None, "replace", "drop"])
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_a_graph_does_not_depend_on_its_batch_mates(conv: str, how: str | None) -> None:
    model, batch = encoder(conv, tokenizer(KINDS), sees={"edges"}), graphs(7, 3, 5, kinds=KINDS)
    masked = None if how is None else plan(batch, how == "drop")
    together = model(batch, masked, want=frozenset({"layers"}))
    for row, n in enumerate((7, 3, 5)):
        one = replace(batch, content=batch.content[[row], :n], valid=batch.valid[[row], :n], item=batch.item[[row]],
                      edges=batch.edges.select(torch.tensor([row])).take(torch.arange(n)[None]))
        alone = model(one, None if how is None else plan(one, how == "drop"))
        for name in ("sum", "mean", "max"):
            torch.testing.assert_close(together.summary[name][row], alone.summary[name][0])
        m = int(alone.valid.sum())
        torch.testing.assert_close(together.tokens[row, :m], alone.tokens[0, :m])
        assert together.layers is not None and not together.tokens[row, m:].any()


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_the_order_of_nodes_and_of_edges_means_nothing(conv: str) -> None:
    model, stream = encoder(conv, tokenizer(KINDS)), graphs(8, kinds=KINDS)
    order, mixed = torch.randperm(8), torch.randperm(len(stream.edges))
    moved = stream.take(order[None])
    moved.edges = moved.edges.where(mixed)
    torch.testing.assert_close(model(moved).tokens[0], model(stream).tokens[0, order])


def test_summaries_are_over_valid_nodes() -> None:
    encoded = encoder("gin")(graphs(4, 2))
    for row, n in enumerate((4, 2)):
        tokens = encoded.tokens[row, :n]
        torch.testing.assert_close(encoded.summary["sum"][row], tokens.sum(0))
        torch.testing.assert_close(encoded.summary["mean"][row], tokens.mean(0))
        torch.testing.assert_close(encoded.summary["max"][row], tokens.amax(0))


def test_a_node_of_a_graph_without_edges_is_encoded_by_itself() -> None:
    stream = graphs(3, 1)
    lonely = replace(stream, edges=stream.edges.where(torch.zeros(len(stream.edges), dtype=torch.bool)))
    for conv in CONVOLUTIONS:
        model = encoder(conv)
        torch.testing.assert_close(model(lonely).tokens, model(replace(stream, edges=None)).tokens)
        assert model(lonely).tokens[lonely.valid].isfinite().all()


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_hidden_content_cannot_be_told(conv: str) -> None:
    model, stream = encoder(conv), graphs(7, 5)
    for masked in (plan(stream), plan(stream, keep=True)):
        other = torch.where(masked.hidden[..., None], torch.randn_like(stream.content), stream.content)
        assert torch.equal(model(replace(stream, content=other), masked).tokens, model(stream, masked).tokens)


def test_a_swapped_node_shows_the_content_of_another() -> None:
    model, stream = encoder("gin"), graphs(6)
    hidden = torch.tensor([[False, True, True, False, False, False]])
    swapped = Plan(hidden, hidden.float(), swap=torch.tensor([[-1, 4, -1, -1, -1, 2]]))  # what is not hidden is not swapped
    content = stream.content.clone()
    content[0, 1] = content[0, 4]
    alone = torch.tensor([[False, False, True, False, False, False]])
    shown = model(replace(stream, content=content), Plan(alone, alone.float()))
    assert torch.equal(model(stream, swapped).tokens, shown.tokens)
    transformer = ENCODERS["transformer"](width=16, depth=1, heads=2, sees={"edges"}).build(tokenizer(), (), CHANNELS).eval()
    shown = transformer(replace(stream, content=content), Plan(alone, alone.float()))
    assert torch.equal(transformer(stream, swapped).tokens, shown.tokens)


def test_types_and_values_of_edges_and_structure_are_used_where_they_are_seen() -> None:
    stream = graphs(7, kinds=KINDS, walk=4)
    other = {"kinds": replace(stream, edges=replace(stream.edges, kind=(stream.edges.kind + 1) % KINDS)),
             "values": replace(stream, edges=replace(stream.edges, value=-stream.edges.value)),
             "structure": replace(stream, structure=-stream.structure)}
    used = {"gin": {"kinds", "values", "structure"}, "gat": {"kinds", "values", "structure"}, "gcn": {"structure"}}
    for conv, parts in used.items():
        model = encoder(conv, tokenizer(KINDS, 4, 2), sees={"edges", "structure"})
        changed = {name for name, changed in other.items() if not torch.equal(model(changed).tokens, model(stream).tokens)}
        assert changed == parts
        blind = encoder(conv, tokenizer(KINDS, 4, 2))
        assert not any("places" in name for name, _ in blind.named_parameters())


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_every_parameter_is_in_one_group_and_learns(conv: str) -> None:
    model = encoder(conv, tokenizer(walk=4), sees={"edges", "structure"}, activation="prelu").train()
    stream = graphs(7, 5, walk=4)
    grouped = [p for group in model.layer_groups() for p in group]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} and len(grouped) == len(list(model.parameters()))
    model(stream, plan(stream)).tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="gin has no attention"):
        ENCODERS["message_passing"](conv="gin", heads=4)
    with pytest.raises(RecipeError, match="10 channels cannot be shared out among 4 heads"):
        encoder("gat", width=10, heads=4)


@pytest.mark.parametrize("share", [0.03, 0.6])
def test_features_that_are_mostly_zero_are_embedded_and_dropped_as_others(share: float) -> None:
    stream = graphs(7, 5)
    wide = GraphTokenizer(200, 1, 0, 0)
    content = torch.rand(2, 7, 200) * (torch.rand(2, 7, 200) < share)
    stream = replace(stream, content=content)
    model = encoder("gcn", wide, dropout=0.5, depth=1)
    linear: Any = model.embed.linear  # type: ignore[union-attr]
    embedded = model.embed(stream)  # type: ignore[operator]
    torch.testing.assert_close(embedded, F.linear(content, linear.weight, linear.bias))
    given = torch.autograd.grad(embedded.square().sum(), linear.weight)
    torch.testing.assert_close(given, torch.autograd.grad(F.linear(content, linear.weight, linear.bias).square().sum(),
                                                          linear.weight))
    seen: list[Tensor] = []
    model.embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].content))  # type: ignore[union-attr]
    model.train()(stream)
    live = (content != 0) & stream.valid[..., None]
    kept = seen[0] != 0
    assert not kept[~live].any()
    torch.testing.assert_close(seen[0][kept], 2 * content[kept])
    assert abs(kept.sum() / live.sum() - 0.5) < 4 * 0.5 / float(live.sum()) ** 0.5
