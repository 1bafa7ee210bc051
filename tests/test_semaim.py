"""One token after another: nobody is given a later one, whatever is drawn, and the order and its masks are the authors'."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from meristem.errors import RecipeError
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.modalities.stream import LatticeStream, TokenStream
from meristem.platform.assembly import Assembly
from meristem.platform.masked.autoregressive import Order
from meristem.platform.masked.predictors import blind
from meristem.platform.masked.targets import Content
from meristem.platform.objectives import Encoded, Items, Plan
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

PREDICTOR = "objectives.pixels.masked.predictor.autoregressive"
SMALL = ["modality.image={channels: 1, patch: 4}", "views.x.size=[16,16]",
         "encoder.transformer={width: 48, depth: 4, heads: 4}", f"{PREDICTOR}={{depth: 2, heads: 4}}"]


def step(*more: str, rows: int = 3) -> Step:
    recipe = load("image/semaim", [*SMALL, *more])
    number = torch.arange(rows)
    torch.manual_seed(0)
    view = recipe.modality.example((16, 16), Rng.of(5, number))
    return Step(Assembly(recipe).eval(), Batch(Items(number, number), {"x": view}), 0.5, 0)


def predicted(of: Step, stream: TokenStream, plan: Plan, rows: slice = slice(None)) -> Tensor:
    predictor = of.assembly.objectives["pixels"].predictor
    with torch.no_grad():
        encoded = of.assembly.encoder(stream, plan, want=frozenset({"layers"}))
        return predictor(encoded, blind(stream), plan)["content"].value[rows]


@pytest.mark.parametrize("by", ["semantic", "random"])
def test_a_prediction_is_that_of_a_model_that_was_never_given_what_comes_later(by: str) -> None:
    """The brute force: for each rank, a stream that holds the earlier tokens, and the place of this one without its content."""
    made = step(f"masking.x.order.by={by}")
    plan = made.plan("x")
    whole = made.stream("x").take(torch.arange(16).expand(3, -1)).seen(frozenset({"position"}))
    assert plan.order is not None and sorted(plan.order[0].tolist()) == list(range(16))
    together = predicted(made, whole, plan)
    for row in range(3):
        sequence = plan.order[row].argsort()
        for rank in (0, 1, 7, 15):
            few = sequence[:rank + 1][None]
            alone = replace(whole, content=whole.content[row:row + 1], valid=whole.valid[row:row + 1],
                            position=whole.position[row:row + 1]).take(few)  # type: ignore[index]
            alone.content[:, -1] = 1e3  # its own content must not matter either
            hidden = torch.zeros(1, rank + 1, dtype=torch.bool)
            small = Plan(hidden, hidden.float(), order=torch.arange(rank + 1)[None])
            last = predicted(made, alone, small)[0, -1]
            torch.testing.assert_close(last, together[row, sequence[rank]], atol=1e-5, rtol=1e-4)


def test_the_class_token_sees_no_token_and_every_token_sees_it() -> None:
    made = step("masking.x.order.by=random")
    encoded = made.encode("x", masked=True, want=frozenset({"attention"}))
    plan = made.plan("x")
    assert encoded.attention is not None and plan.order is not None
    seen = encoded.attention[:, 0] > 0
    assert seen[:, 0].sum(1).tolist() == [1, 1, 1] and seen[:, :, 0].all()
    assert torch.equal(seen[:, 1:, 1:], plan.order[:, None] <= plan.order[:, :, None])


def wave(*shape: int, k: int = 0) -> Tensor:
    n = torch.arange(math.prod(shape))
    return torch.sin(n * 0.7 + n % 13 + k).reshape(shape)


def lattice(rows: int, side: int, patch: int, array: Tensor | None = None) -> LatticeStream:
    array = torch.zeros(rows, 1, side * patch, side * patch) if array is None else array
    frame = Frame(torch.eye(3).repeat(rows, 1, 1), tuple(array.shape[2:]), torch.ones(rows, 2), ("px", "px"))
    return LatticeStream(array, (patch, patch), frame, None)


def test_order_masks_and_loss_are_those_of_the_authors() -> None:
    """Of skyoux/SemAIM at ade770f, on class and patch tokens made as here (three rows, 14 × 14 places): the places that
    `calculate_attention_cls` likes most, the ranks of `generate_attention_distance_center_permutation` with noise made as here,
    the entries of the masks of both streams, weighted, and `forward_pixel_loss` without blur."""
    tokens = torch.stack([wave(197, 24, k=2 + 3 * b) * (1 + wave(197, 1, k=b)) + 0.2 * wave(197, 24, k=b * b).flip(0)
                          for b in range(3)])
    stream = lattice(3, 14, 8)
    whole = Encoded(tokens[:, 1:], {"cls": tokens[:, 0]}, stream.valid)
    ties: Any = SimpleNamespace(uniform=lambda purpose, n: (torch.arange(3 * n) * 0.6180339887 % 1).reshape(3, n))
    fake: Any = SimpleNamespace(stream=lambda view: stream, rng=lambda purpose, view: ties, encode=lambda view, by: whole)
    plan = Order().decide(fake, "x")
    assert plan.order is not None
    assert [int((row == 0).nonzero()) for row in plan.order] == [175, 84, 136]
    assert [int((row * torch.arange(196)).sum()) for row in plan.order] == [1290000, 1951641, 1522613]

    made = step("views.x.size=[56,56]")
    masks: list[Tensor] = []
    encoder, predictor = made.assembly.encoder, made.assembly.objectives["pixels"].predictor
    predictor.blocks[0].register_forward_pre_hook(lambda module, given: masks.append(given[-1]))
    small = lattice(3, 14, 4)
    with torch.no_grad():
        encoded = encoder(small.seen(frozenset({"position"})), plan, want=frozenset({"attention", "layers"}))
        predictor(encoded, blind(small), plan)
    content, queries = encoded.attention[:, 0] > 0, masks[0][:, 0]
    weight = wave(197, 197, k=1)
    assert [float((row * weight).sum()) for row in content] == pytest.approx([-6.8182, -9.8563, -18.4571], abs=2e-3)
    both = [float((row * weight[1:]).sum() + weight[0, 0]) for row in queries]  # theirs has a row for the class token
    assert both == pytest.approx([-6.9954, -10.0335, -18.6343], abs=2e-3)

    pixels = wave(3, 3, 112, 112, k=4)
    shown: Any = SimpleNamespace(stream=lambda view: lattice(3, 14, 8, pixels),
                                 assembly=SimpleNamespace(recipe=SimpleNamespace(modality=SimpleNamespace(channels=3))))
    guess = wave(3, 197, 192, k=6)[:, 1:].unflatten(-1, (8, 8, 3)).movedim(-1, 2).flatten(2)  # channels last there
    total, count = Content(normalise="token").compare(shown, "x", None, guess, torch.ones(3, 196))
    assert float(total / count) == pytest.approx(1.492921, abs=2e-6)


@pytest.mark.parametrize(("recipe", "over", "says"), [
    ("image/semaim", ["teacher=null"], "a semantic order follows a teacher, and there is none"),
    ("image/semaim", ["encoder.transformer.cls=false"], "goes by a class token and positions"),
    ("image/semaim", ["encoder={unet: {}}"], "keeps tokens from seeing later ones, which this encoder cannot take"),
    ("image/semaim", ["objectives.pixels.masked.predictor=linear"], "would be shown what it predicts"),
    ("image/semaim", ["masking.x={random: {corruption: replace}}"], "goes by an order, and this masking decides none"),
    ("image/semaim", ["encoder.transformer.sees=[]"], "cannot tell places apart without positions")])
def test_what_has_no_order_is_refused(recipe: str, over: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, over)


def test_queries_that_cannot_stand_beside_the_encoder_s_blocks_are_refused() -> None:
    with pytest.raises(RecipeError, match="cannot stand beside an encoder of 4 blocks"):
        step(f"{PREDICTOR}.depth=3")
