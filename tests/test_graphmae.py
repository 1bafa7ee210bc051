"""GraphMAE and GraphMAE2: loss and forward pass against independent computations, and what a decoder is not given."""

from __future__ import annotations

import warnings
from typing import Any

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
from meristem.platform.masked.parts import MASKINGS
from meristem.platform.masked.predictors import Prediction
from meristem.platform.objectives import Items, Plan
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric import nn as geometric

CHANNELS = 6
DATA = [f"modality.graph.channels={CHANNELS}", "modality.graph.edge_kinds=1"]
SMALL = [*DATA, "encoder.message_passing={width: 8, depth: 2}"]
MAE = [*DATA, "encoder.transformer={width: 24, depth: 2, heads: 2}",
       "objectives.pixels.masked.predictor.decoder={width: 24, depth: 1, heads: 2}"]
HEADS = "heads={projector: {mlp: {hidden: 8, out: 8}}, predictor: {mlp: {hidden: 8, out: 8}}}"
RECIPES = {"graphmae": SMALL, "graphmae-cora": SMALL, "graphmae-citeseer": SMALL, "graphmae-mutag": SMALL,
           "graphmae-nci1": SMALL, "graphmae-imdb": SMALL, "graphmae2": [*SMALL, HEADS], "mae": MAE}


def make(name: str, *assignments: str) -> Assembly:
    return Assembly(load(f"graph/{name}", [*RECIPES[name], *assignments]))


def batch(*sizes: int, structure: int = 0, seed: int = 0, features: Tensor | None = None) -> Batch:
    """Rings with chords, padded to the largest."""
    n, draw = max(sizes), torch.Generator().manual_seed(seed)
    valid = torch.arange(n) < torch.tensor(sizes)[:, None]
    places = [torch.tensor([row * n + i, row * n + (i + step) % m]) for row, m in enumerate(sizes) for step in (1, 2)
              for i in range(m)]
    pairs = torch.stack(places, 1)
    pairs = torch.cat([pairs, pairs.flip(0)], 1).unique(dim=1)
    pairs = pairs[:, pairs[0] != pairs[1]]
    array = torch.randn(len(sizes), CHANNELS + structure, n, generator=draw) if features is None else features
    rows = torch.arange(len(sizes))
    view = View("x", array * valid[:, None], Frame(torch.ones(len(sizes), 1, 1), (n,), torch.ones(len(sizes), 0), ()), rows,
                torch.zeros_like(rows), weight=valid[:, None].float(),
                index=torch.where(valid, torch.arange(n), -1),
                edges=Edges(pairs, torch.zeros(pairs.shape[1], dtype=torch.int64), None, len(sizes), n))
    return Batch(Items(rows, rows), {"x": view})


def predicted(assembly: Assembly, data: Batch) -> tuple[dict[str, Any], Prediction, Step]:
    caught: list[Prediction] = []
    predictor: Any = assembly.objectives["features"].predictor
    handle = predictor.register_forward_hook(lambda module, inputs, output: caught.extend(output.values()))
    losses = assembly(data, 0.0)
    handle.remove()
    assert assembly.last_step is not None
    return losses, caught[0], assembly.last_step


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_on_a_ragged_batch(name: str) -> None:
    assembly = make(name).train()
    data = batch(9, 5, 12, structure=assembly.tokenizer.structure)
    optimiser = torch.optim.AdamW(assembly.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = total(assembly(data, 0.0))  # the same looks each time: the same plan
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        assembly.after(0.0)
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])


@pytest.mark.parametrize("exponent", [1, 2, 3])
def test_the_loss_is_the_scaled_cosine_error_of_hidden_nodes(exponent: int) -> None:
    assembly = make("graphmae", f"objectives.features.masked.target.cosine.exponent={exponent}").eval()
    data = batch(9, 5)
    data.views["x"].array[1, :, 2] = 0  # a node without features has no direction
    losses, prediction, step = predicted(assembly, data)
    plan, content = step.plan("x"), step.stream("x").content
    errors = []
    for row, places in enumerate(prediction.index):
        for k, node in enumerate(places.tolist()):
            if plan.hidden[row, node] and node < (9, 5)[row]:
                a, b = prediction.value[row, k].detach().numpy(), content[row, node].numpy()
                lengths = np.linalg.norm(a) * np.linalg.norm(b)
                errors.append((1 - (a @ b / lengths if lengths else 0.0)) ** exponent)
    loss = losses["features"]
    assert len(errors) == int(loss.count) == plan.hidden[:, :9].sum() - plan.hidden[1, 5:9].sum()
    assert float((loss.total / loss.count).detach()) == pytest.approx(np.mean(errors), rel=1e-5)


def test_one_forward_pass_is_torch_geometrics_layers_one_after_another() -> None:
    assembly = make("graphmae-cora").eval()
    data = batch(11)
    _, prediction, step = predicted(assembly, data)
    plan, edges = step.plan("x"), data.views["x"].edges.index
    encoder: Any = assembly.encoder
    predictor: Any = assembly.objectives["features"].predictor

    def attention(layer: Any, x: Tensor, heads: int, **first: Tensor) -> Tensor:
        conv = geometric.GATConv(x.shape[1], len(layer.conv.bias) // heads, heads)
        conv.load_state_dict(layer.conv.state_dict() | first)
        return conv(x, edges)

    x = data.views["x"].array[0].T
    x = torch.stack([x[plan.swap[0, i]] if plan.hidden[0, i] and plan.swap[0, i] >= 0 else
                     torch.zeros_like(x[0]) if plan.hidden[0, i] else x[i] for i in range(11)])  # a token begins as 0
    for i, layer in enumerate(encoder.layers):
        first = {} if i else {"lin.weight": encoder.embed.linear.weight}
        x = F.prelu(attention(layer, x, 4, **first), layer.after[0].weight)
    x = x @ predictor.enter.weight.T
    x[plan.hidden[0]] = 0
    x = attention(predictor.layers[0], x, 1)
    torch.testing.assert_close(prediction.value[0], x[prediction.index[0]])
    assert prediction.index[0].tolist() == plan.hidden[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("token", [False, True])
def test_what_a_decoder_is_not_given_is_0_or_learned(token: bool) -> None:
    assembly = make("graphmae-cora", f"objectives.features.masked.predictor.graph.token={token}").train()
    total(assembly(batch(11), 0.0)).backward()
    names = [name for name, p in assembly.named_parameters() if name.endswith("predictor.mask_token") and p.grad.any()]
    assert len(names) == token


def test_a_graphs_prediction_does_not_depend_on_its_batch_mates() -> None:
    for name in ("graphmae-mutag", "graphmae2"):
        assembly = make(name).eval()
        features = batch(9, 5).views["x"].array
        _, alone, _ = predicted(assembly, batch(9, features=features[:1]))
        _, together, _ = predicted(assembly, batch(9, 5, features=features))
        for k, place in enumerate(alone.index[0].tolist()):
            same = (together.index[0] == place).nonzero()[:, 0]
            passes = (alone.index[0, :k] == place).sum()
            torch.testing.assert_close(together.value[0, same[passes]], alone.value[0, k])


def test_a_decoder_is_given_no_hidden_node_as_the_encoder_made_it() -> None:
    assembly = make("graphmae").eval()
    step = Step(assembly, batch(9, 5), 0.0, 0)
    plan, stream = step.plan("x"), step.stream("x")
    encoded = step.encode("x", masked=True)
    predictor: Any = assembly.objectives["features"].predictor
    before = predictor(encoded, stream, plan)["content"].value
    encoded.tokens = torch.where(plan.hidden[..., None], torch.randn_like(encoded.tokens), encoded.tokens)
    assert torch.equal(predictor(encoded, stream, plan)["content"].value, before)
    encoded.tokens = torch.randn_like(encoded.tokens)
    assert not torch.equal(predictor(encoded, stream, plan)["content"].value, before)


def test_each_pass_of_graphmae2_hides_its_own_nodes_from_the_decoder() -> None:
    assembly = make("graphmae2").eval()
    step = Step(assembly, batch(12), 0.0, 0)
    plan, encoded = step.plan("x"), step.encode("x", masked=True)
    predictor: Any = assembly.objectives["features"].predictor
    assert plan.remask is not None and plan.remask.shape == (3, 1, 12)
    together = predictor(encoded, step.stream("x"), plan)["content"]
    for k in range(3):
        one = Plan(plan.hidden, plan.predict, remask=plan.remask[[k]])
        alone = predictor(encoded, step.stream("x"), one)["content"]
        n = alone.index.shape[1]
        torch.testing.assert_close(together.value[:, k * n:(k + 1) * n], alone.value)
        assert torch.equal(together.index[:, k * n:(k + 1) * n], alone.index)
    assert len({tuple(gone.flatten().tolist()) for gone in plan.remask}) == 3


def test_the_teacher_of_graphmae2_sees_the_whole_graph_once() -> None:
    assembly = make("graphmae2")
    losses = assembly(batch(9, 5), 0.0)
    assert set(losses) == {"features", "latent"}
    assert assembly.last_step is not None
    assert assembly.last_step.passes == ["encoder(x, plan)", "teacher(x)"]


def stream(sizes: list[int]) -> TokenStream:
    valid = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    return TokenStream(torch.randn(*valid.shape, 2), None, valid, torch.arange(len(sizes)))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(3, 30), min_size=1, max_size=4), ratio=st.floats(0.1, 0.9), passes=st.integers(1, 4),
       seed=st.integers(0, 999))
def test_nodes_are_masked_again_in_equal_shares_of_each_graph(sizes: list[int], ratio: float, passes: int, seed: int) -> None:
    tokens, key = stream(sizes), torch.arange(len(sizes))
    masking = MASKINGS["random"](ratio=0.5, corruption="replace", remask={"passes": passes, "ratio": ratio})
    gone = masking.plan(tokens, Rng.of(seed, key), ()).remask
    assert gone is not None and gone.shape == (passes, *tokens.valid.shape)
    assert not (gone & ~tokens.valid).any()
    for row, n in enumerate(sizes):
        assert gone[:, row].sum(1).tolist() == [int(n * ratio + 0.5)] * passes
        alone = masking.plan(stream([n]), Rng.of(seed, key[[row]]), ()).remask
        assert alone is not None and torch.equal(alone[:, 0], gone[:, row, :n])


def test_swapped_tokens_show_any_valid_token_at_the_asked_rate() -> None:
    tokens = stream([400, 300])
    plan = MASKINGS["random"](ratio=0.5, corruption="replace", swap=0.3).plan(tokens, Rng.of(0, torch.arange(2)), ())
    assert plan.swap is not None and not (plan.swap >= 0)[~tokens.valid].any()
    shown = [row[row >= 0] for row in plan.swap]
    for n, numbers in zip((400, 300), shown, strict=True):
        assert abs(len(numbers) / n - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5
        assert numbers.max() < n and len(numbers.unique()) > 0.6 * len(numbers)  # a permutation's would all differ: 1 − 0.3/2


def test_what_cannot_be_is_refused_before_data_is_opened() -> None:
    with pytest.raises(RecipeError, match="message"):
        make("graphmae", "encoder.message_passing.sees=[]")
    with pytest.raises(RecipeError, match="a token that is dropped shows nothing"):
        make("mae", "masking.x.random.swap=0.1")
    with pytest.raises(RecipeError, match="take remask out of the masking"):
        make("graphmae", "masking.x.random.remask={passes: 2}", "objectives.features.masked.predictor=linear")
    with pytest.raises(RecipeError, match="cannot take; set swap: 0"):
        load("image/simmim", ["encoder=unet", "masking.x.random.swap=0.1", "objectives.pixels.masked.predictor=dense"])


def test_a_transformer_can_be_pretrained_with_the_graph_predictor() -> None:
    assembly = make("graphmae", "encoder={transformer: {width: 16, depth: 1, heads: 2, sees: [edges]}}", "summary=mean")
    loss = total(assembly(batch(9, 5), 0.0))
    loss.backward()
    assert loss.isfinite()
