"""The shortest convex combination of gradients, and training along it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from meristem.errors import MeristemError, RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.platform.assembly import Assembly
from meristem.platform.objectives import Items, Loss
from meristem.platform.recipe import Recipe, load
from meristem.platform.step import Batch
from meristem.platform.training import loop
from meristem.platform.training.combine import combined, min_norm, pareto
from meristem.platform.training.progress import Reporter


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 9), st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=60, deadline=None)
def test_no_convex_combination_is_shorter(seed: int, n: int, width: int, scale: float) -> None:
    g = np.random.default_rng(seed).normal(size=(n, width)) + 0.5
    gram = g @ g.T
    w = min_norm(gram * scale)
    assert (w >= 0).all() and w.sum() == pytest.approx(1)
    solved = minimize(lambda x: x @ gram @ x, np.full(n, 1 / n), jac=lambda x: 2 * gram @ x, method="SLSQP",
                      bounds=[(0, 1)] * n, constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
                      options={"ftol": 1e-14, "maxiter": 500})
    assert w @ gram @ w <= solved.fun + 1e-7 * gram.max()
    assert (gram @ w >= w @ gram @ w - 1e-7 * gram.max()).all()  # the condition of optimality: d · g_i ≥ |d|²


@pytest.mark.parametrize(("a", "b"), [((1.0, 0.0), (0.0, 1.0)), ((3.0, 1.0), (1.0, 0.5)), ((1.0, 2.0), (-1.0, 0.5)),
                                      ((1.0, 0.0), (-2.0, 0.0)), ((1.0, 1.0), (1.0, 1.0))])
def test_of_two_gradients_it_is_the_closed_form(a: tuple[float, float], b: tuple[float, float]) -> None:
    x, y = np.array(a), np.array(b)
    apart = ((x - y) ** 2).sum()
    first = np.clip((y - x) @ y / apart, 0, 1) if apart else 0.5  # Sener and Koltun 2018, equation 4
    g = np.stack([x, y])
    w = min_norm(g @ g.T)
    assert np.allclose(w @ g, first * x + (1 - first) * y, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_step_lowers_every_loss_whatever_its_scale(scale: float) -> None:
    shared = nn.Parameter(torch.randn(6))
    a, b, c = torch.randn(3, 6)

    def losses() -> list[torch.Tensor]:
        return [scale * (shared @ a - 1).square(), (shared - b).square().sum(), 0.01 * (shared @ c + 2).abs()]

    gradient = torch.autograd.grad(pareto(losses(), [shared]), shared)[0]
    before = losses()
    with torch.no_grad():
        shared -= 1e-6 * gradient / gradient.norm()
    assert all(after < old for after, old in zip(losses(), before, strict=True))


def test_losses_that_do_not_move_the_encoder_neither_count_nor_vanish() -> None:
    shared, own = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
    loss, head = (shared * torch.arange(4)).sum().square(), own.square().sum()
    made = pareto([loss, 0 * shared.sum(), head, torch.tensor(2.0)], [shared])
    assert torch.equal(torch.autograd.grad(made, own, retain_graph=True)[0], 2 * own.detach())
    assert torch.allclose(torch.autograd.grad(made, shared, retain_graph=True)[0], torch.autograd.grad(loss, shared)[0])
    assert torch.isnan(pareto([shared.sum() * torch.nan, shared.sum()], [shared]))  # the loop skips such a step


def test_a_sum_is_a_sum() -> None:
    x = nn.Linear(2, 2)
    losses = [x.weight.sum(), 3 * x.bias.sum()]
    assert float(combined("sum", losses, x).detach()) == pytest.approx(float((losses[0] + losses[1]).detach()))


TWO = ["modality={image: {channels: 1, patch: [4, 4]}}", "views.x.size=[8, 8]", "encoder.transformer.width=16",
       "encoder.transformer.depth=1", "encoder.transformer.heads=2", "train.batch=8", "train.steps=3", "train.clip=0"]


def batches(recipe: Recipe) -> loop.Batches:
    def stream(first: int, rank: int, world: int) -> Iterator[Batch]:
        for step in range(first, recipe.train.steps):
            views, g = {}, torch.Generator().manual_seed(step)
            for name, options in recipe.views.items():
                rows = 8 * options.count
                frame = Frame(torch.eye(3).expand(rows, -1, -1), (8, 8), torch.ones(rows, 2), ("px", "px"))
                item, look = torch.arange(8).repeat_interleave(options.count), torch.arange(options.count).repeat(8)
                views[name] = View(name, torch.rand(rows, 1, 8, 8, generator=g), frame, item, look)
            yield Batch(Items(torch.arange(8), torch.arange(8) + 8 * step), views)
    return stream


def plain(assembly: Assembly) -> Assembly:
    assembly.prepare = lambda batch: batch  # type: ignore[method-assign]
    return assembly


def test_the_loop_trains_along_it_and_does_not_mind_a_losss_scale() -> None:
    weights = []
    for scale in (0.05, 50.0):
        recipe = load("image/mae+simclr", [*TWO, "train.combine=pareto", f"objectives.contrast.contrastive.weight={scale}"])
        torch.manual_seed(0)
        assembly = plain(Assembly(recipe))
        fabric = loop.launch(recipe.train, "cpu")
        outcome = loop.train(recipe.train, assembly, batches(recipe), fabric, Reporter("test", 3, None))
        assert np.isfinite(outcome.last["loss"]) and outcome.skipped == 0
        weights.append(torch.cat([p.detach().flatten() for p in assembly.encoder.parameters()]))
    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in Assembly(recipe).encoder.parameters()])
    assert (weights[0] - start).norm() > 0.01
    assert (weights[0] - weights[1]).norm() < 0.05 * (weights[0] - start).norm()


@pytest.mark.parametrize("wrong", ["accumulate=2", "precision=bf16", "compile=true"])
def test_what_cannot_be_compared_is_refused(wrong: str) -> None:
    with pytest.raises(RecipeError, match="compares gradients"):
        load("image/mae+simclr", ["train.combine=pareto", f"train.{wrong}"])


def test_several_processes_are_refused() -> None:
    class Many:
        world_size, global_rank = 2, 0

    recipe = load("image/mae+simclr", [*TWO, "train.combine=pareto"])
    with pytest.raises(MeristemError, match="on one process"):
        loop.train(recipe.train, Assembly(recipe), batches(recipe), Many(), Reporter("test", 3, None))  # type: ignore[arg-type]


def test_loss_is_a_named_share() -> None:
    class One:
        world_size = 1

    shares, values = loop.reduce(One(), {"a": Loss(torch.tensor(6.0), 3.0, 0.5), "b": Loss(torch.tensor(4.0), 4.0)})  # type: ignore[arg-type]
    assert [float(s) for s in shares] == [1.0, 1.0] and {k: float(v) for k, v in values.items()} == {"a": 2.0, "b": 1.0}
