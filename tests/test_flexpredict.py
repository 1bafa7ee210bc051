"""Stochastic places: the predictor is the authors', its noise is what was asked for, and it alone is uncertain."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import Axis
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream
from meristem.platform.assembly import Assembly, total
from meristem.platform.masked.predictors import blind
from meristem.platform.masked.stochastic import SinCos, Stochastic, StochasticPredictor
from meristem.platform.objectives import Encoded, Items, Plan
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

PREDICTOR = "objectives.features.masked.predictor.stochastic"
SMALL = ["modality.image={channels: 1, patch: 4}", "views.x.size=[24,24]", "masking.x.block.min_block=4",
         "encoder.transformer={width: 48, depth: 1, heads: 4}", f"{PREDICTOR}={{depth: 1, width: 32, heads: 2}}"]


def step(*more: str, first: int = 0) -> Step:
    recipe = load("image/flexpredict", [*SMALL, *more])
    number = torch.arange(3)
    torch.manual_seed(0)
    view = recipe.modality.example((24, 24), Rng.of(5, number))
    return Step(Assembly(recipe), Batch(Items(number, number + first), {"x": view}), 0.5, 0)


def wave(*shape: int, k: int = 0) -> Tensor:
    n = torch.arange(math.prod(shape))
    return torch.sin(n * 0.7 + n % 13 + k).reshape(shape)


def test_the_predictor_is_that_of_the_authors() -> None:
    """Sum of |outputs| and smooth L1 that `VisionTransformerPredictor` of amirbar/StoP at 72206b3 gives for weights, tokens,
    noise and targets made as here: a lattice of 4 × 4, ten tokens of each of two rows predicted; its sines go by column first.
    """
    settings = Stochastic(depth=2, width=16, heads=2)
    axes = tuple(Axis(name, "px", 1.0, 10000 ** (3 / 4)) for name in "xy")
    encoder: Any = SimpleNamespace(width=20)
    net = StochasticPredictor(settings, encoder, axes, {"content": 20}, everywhere=False)
    parts: list[Any] = [net.enter]
    for block in net.blocks.blocks:
        parts += [block.norm1, block.attn.qkv, block.attn.proj, block.norm2, block.mlp.fc1, block.mlp.fc2]
    with torch.no_grad():
        for k, part in enumerate([*parts, net.blocks.norm, net.heads["content"]]):
            part.weight.copy_(0.3 * wave(*part.weight.shape, k=k) + isinstance(part, nn.LayerNorm))
            part.bias.copy_(0.1 * wave(*part.bias.shape, k=k + 50))
    keep = torch.tensor([[0, 3, 5, 9, 12, 15], [1, 2, 6, 7, 8, 14]])
    hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, keep, False)
    drawn: Any = SimpleNamespace(normal=lambda purpose, *shape: wave(2, *shape, k=7))
    place = torch.arange(16)
    position = torch.stack([place % 4, place // 4], -1).float().expand(2, -1, -1)
    stream = TokenStream(torch.zeros(2, 16, 1), position, torch.ones(2, 16, dtype=torch.bool), None)
    encoded = Encoded(wave(2, 6, 20, k=3), {}, torch.ones(2, 6, dtype=torch.bool), index=keep)
    with torch.no_grad():
        made = net(encoded, stream, Plan(hidden, hidden.float(), keep, rng=drawn))["content"]
    assert torch.equal(made.index, torch.stack([row.nonzero()[:, 0] for row in hidden]))
    assert float(made.value.abs().sum()) == pytest.approx(506.01703, abs=1e-3)
    target = F.layer_norm(wave(2, 10, 20, k=9), (20,))
    assert float(F.smooth_l1_loss(made.value, target)) == pytest.approx(0.526822, abs=2e-6)


def test_a_query_is_its_position_with_noise_of_the_covariance_that_the_context_is_taken_in_by() -> None:
    """Without blocks a query is ψ + A n + b: over many draws its mean is ψ + b and its covariance σ² A Aᵀ."""
    made = step(f"{PREDICTOR}.std=0.5")
    net = made.assembly.objectives["features"].predictor
    caught: list[Tensor] = []
    net.blocks.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    stream, plan = blind(made.stream("x")), made.plan("x")
    assert plan.keep is not None and plan.rng is not None
    tokens = torch.zeros(3, plan.keep.shape[1], 48)
    with torch.no_grad():
        nn.init.normal_(net.enter.bias)
        for k in range(400):
            drawn = replace(plan, rng=plan.rng.fork(str(k)))
            net(Encoded(tokens, {}, torch.ones(tokens.shape[:2], dtype=torch.bool), index=plan.keep), stream, drawn)
        index = (~plan.hidden).to(torch.uint8).argsort(dim=1, stable=True)[:, :18]
        assert stream.position is not None
        place = net.place(stream.position.gather(1, index[..., None].expand(-1, -1, 2)))
        off = torch.stack(caught)[:, :, -18:] - place - net.enter.bias  # (400, 3, 18, 32): 21,600 draws
        covariance = 0.25 * net.enter.weight @ net.enter.weight.T
        found = off.flatten(0, 2).T.cov()
    scale = covariance.diagonal().mean().sqrt()
    assert off.mean((0, 1, 2)).abs().max() < 5 * scale / 21600**0.5
    assert (found - covariance).abs().max() < 0.06 * scale**2
    context = torch.stack(caught)[:, :, :-18]
    assert torch.equal(context[0], context[-1])  # what was seen lies where it lies


def test_noise_is_drawn_anew_in_every_step_and_the_same_when_a_step_is_made_again() -> None:
    def loss(first: int, *more: str) -> float:
        made = step(*more, first=first)
        with torch.no_grad():
            return float(total(made.assembly(made.batch, 0.5)))

    assert loss(0) == loss(0)
    assert loss(0) != loss(0, f"{PREDICTOR}.std=0.0")
    quiet = step(f"{PREDICTOR}.std=0.0")
    plan = quiet.plan("x")
    assert plan.rng is not None
    other = step(first=9).plan("x")
    assert other.rng is not None and not torch.equal(plan.rng.normal("n", 4), other.rng.normal("n", 4))


def test_sines_are_the_double_loop() -> None:
    axes = (Axis("y", "mm", 0.5, 50.0), Axis("x", "mm", 1.0, 1.0))
    made = SinCos(11, axes)(torch.tensor([[[3.0, -2.0]]]))[0, 0]
    expected = [f(3.0 / s) for f in (math.sin, math.cos) for s in (0.5, 50.0)]
    expected += [f(-2.0 / s) for f in (math.sin, math.cos) for s in (1.0, 1.0)]
    torch.testing.assert_close(made, torch.tensor([*expected, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize(("over", "says"), [
    (["encoder.transformer.sees=[]"], "puts noise on positions; add position"),
    (["masking.x.block.corruption=replace"], "works on masked tokens that are dropped"),
    (["teacher=null"], "is made by a teacher, and there is none")])
def test_what_it_cannot_work_on_is_refused(over: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load("image/flexpredict", over)
