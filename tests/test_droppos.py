"""Dropped positions: nothing tells where a token lies whose place was dropped, and the loss is the authors'."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream, gather
from meristem.platform.assembly import Assembly, total
from meristem.platform.masked.places import Place, soft_places
from meristem.platform.objectives import Encoded, Items, Plan
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

SMALL = ["modality.image={channels: 1, patch: 4}", "views.x.size=[24,24]",
         "encoder.transformer={width: 48, depth: 2, heads: 4}",
         "objectives.places.masked.predictor.placeless={depth: 1, width: 32, heads: 2}"]


def step(*more: str, rows: int = 3) -> Step:
    recipe = load("image/droppos", [*SMALL, *more])
    number = torch.arange(rows)
    view = recipe.modality.example((24, 24), Rng.of(5, number))
    return Step(Assembly(recipe).eval(), Batch(Items(number, number), {"x": view}), 0.5, 0)


def encoded(of: Step, stream: TokenStream, plan: Plan) -> Tensor:
    with torch.no_grad():
        return of.assembly.encoder(stream, plan).tokens


@pytest.mark.parametrize("corruption", ["drop", "replace"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_an_encoder_is_bit_equal_wherever_the_dropped_positions_lie(corruption: str, seed: int) -> None:
    torch.manual_seed(seed)
    made = step("masking.x.random.corruption=drop")
    plan, whole = made.plan("x"), made.stream("x").take(torch.arange(36).expand(3, -1)).seen(frozenset({"position"}))
    assert plan.unlocated is not None and plan.keep is not None and whole.position is not None
    plan = plan if corruption == "drop" else replace(plan, keep=None)
    elsewhere = 1e3 * torch.randn_like(whole.position)
    lost = plan.unlocated[..., None]
    moved = replace(whole, position=torch.where(lost, elsewhere, whole.position))
    assert torch.equal(encoded(made, whole, plan), encoded(made, moved, plan))
    told = replace(whole, position=torch.where(lost | plan.hidden[..., None], whole.position, elsewhere))
    assert not torch.equal(encoded(made, whole, plan), encoded(made, told, plan))


def test_tokens_that_change_places_take_their_answers_with_them() -> None:
    """From pixels to logits: two tokens without a place exchange their patches, and nothing changes but that their answers are
    exchanged too, so that neither positions nor the order of tokens tell the place. Located ones: not."""
    made = step()
    plan, view = made.plan("x"), made.view("x")
    assert plan.unlocated is not None and plan.keep is not None

    def answers(array: Tensor) -> Tensor:
        other = Step(made.assembly, Batch(made.batch.items, {"x": replace(view, array=array)}), 0.5, 0)
        objective = made.assembly.objectives["places"]
        with torch.no_grad():
            return objective._predict(other, other.plan("x"), "x")["place"].value  # type: ignore[operator]

    def exchanged(a: int, b: int) -> Tensor:
        array = view.array.clone()
        (ya, xa), (yb, xb) = divmod(a, 6), divmod(b, 6)
        array[0, :, ya * 4:ya * 4 + 4, xa * 4:xa * 4 + 4] = view.array[0, :, yb * 4:yb * 4 + 4, xb * 4:xb * 4 + 4]
        array[0, :, yb * 4:yb * 4 + 4, xb * 4:xb * 4 + 4] = view.array[0, :, ya * 4:ya * 4 + 4, xa * 4:xa * 4 + 4]
        return array

    def swapped(x: Tensor, i: int, j: int) -> Tensor:
        order = torch.arange(x.shape[1])
        order[[i, j]] = order[[j, i]]
        return torch.cat([x[:1, order], x[1:]])

    lost = gather(plan.unlocated, plan.keep)[0]
    before = answers(view.array)
    for chosen, same in ((lost, True), (~lost, False)):
        i, j = chosen.nonzero()[:2, 0].tolist()
        after = answers(exchanged(int(plan.keep[0, i]), int(plan.keep[0, j])))
        assert torch.allclose(after, swapped(before, i, j), atol=1e-5) == same
        assert not torch.allclose(after, before, atol=1e-3)


def test_the_share_is_drawn_among_what_is_visible_and_shows_anything() -> None:
    made = step("masking.x.random={ratio: 0.5, unlocated: 0.5}")
    blank = made.view("x").array.new_ones(3, 1, 24, 24)
    blank[1, :, :12] = 0  # half of the second row
    plan = Step(made.assembly, Batch(made.batch.items, {"x": replace(made.view("x"), weight=blank)}), 0.5, 0).plan("x")
    assert plan.unlocated is not None
    assert plan.unlocated.sum(1).tolist() == [9, 5, 9]  # of 18, 9 and 18
    assert not (plan.unlocated & plan.hidden).any() and not plan.unlocated[1, :18].any()


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.5])
def test_soft_places_are_the_double_loop(sigma: float) -> None:
    table = soft_places((3, 4), sigma)
    for i in range(12):
        far = [((i // 4 - j // 4) ** 2 + (i % 4 - j % 4) ** 2) for j in range(12)]
        row = [math.exp(-d / sigma**2) if sigma else float(d == 0) for d in far]
        torch.testing.assert_close(table[i], torch.tensor(row) / sum(row))


def wave(*shape: int) -> Tensor:
    n = torch.arange(math.prod(shape))
    return (torch.sin(n * 0.7 + n % 13)).reshape(shape)


@pytest.mark.parametrize(("sigma", "attention", "theirs"), [(0.0, None, 4.942453), (0.0, 0.1, 4.497353), (1.0, None, 5.110125),
                                                            (1.0, 0.1, 4.976330)])
def test_the_loss_is_that_of_the_authors(sigma: float, attention: float | None, theirs: float) -> None:
    """What `forward_drop_pos_loss` of Haochen-Wang409/DropPos at 13f50a8 gives for logits, class and patch tokens made as here,
    three rows of 6 × 6 places with nine visible tokens, seven of them without a place; σ = 1 with its table of soft labels made
    to have rows of sum 1, which as it is has not (5.157485 and 5.078836)."""
    rows, n, k = 3, 36, 9
    keep = torch.arange(k) * 4 + torch.arange(rows)[:, None]
    lost = torch.ones(rows, k)
    lost[torch.arange(rows), torch.arange(rows)] = 0
    lost[:, 5] = 0
    whole = Encoded(wave(rows, n, 24), {"cls": wave(rows, 1, 24)[:, 0] + 0.3}, torch.ones(rows, n, dtype=torch.bool))
    fake: Any = SimpleNamespace(stream=lambda view: SimpleNamespace(lattice=(6, 6)), value=float,
                                encode=lambda view, by: whole)
    loss, count = Place(smoothing=sigma, attention=attention).compare(fake, "x", keep, 3 * wave(rows, k, n), lost)
    assert float(loss / count) == pytest.approx(theirs, abs=2e-5)


def test_similarities_are_those_of_the_encoder_as_the_last_step_left_it() -> None:
    made = step()
    assembly = made.assembly
    losses = assembly(made.batch, 0.5)
    assert assembly.last_step is not None and assembly.last_step.passes == ["teacher(x)", "encoder(x, plan)"]
    total(losses).backward()
    with torch.no_grad():
        for p in assembly.encoder.parameters():
            p.sub_(0.1 if p.grad is None else p.grad)
    assembly.after(0.5)
    assert assembly.teacher is not None
    for mine, theirs in zip(assembly.teacher.copies["encoder"].parameters(), assembly.encoder.parameters(), strict=True):
        assert torch.equal(mine, theirs)


PLACES = "objectives.places.masked"


@pytest.mark.parametrize(("recipe", "over", "says"), [
    ("image/droppos", ["encoder.transformer.unlocated=false"], "drops places of tokens, which this encoder cannot take"),
    ("image/mae", ["encoder={unet: {}}", "masking.x.random={corruption: replace, unlocated: 0.5}",
                   "objectives.pixels.masked.predictor=dense"], "drops places of tokens, which this encoder cannot take"),
    ("image/droppos", ["encoder.transformer.sees=[]"], "it sees nothing"),
    ("image/droppos", ["masking.x.random.unlocated=0"], "of the tokens whose place is dropped, and none is"),
    ("image/droppos", [f"{PLACES}.predictor={{decoder: {{}}}}"], "may be asked only where it is not told"),
    ("image/droppos", [f"{PLACES}.readouts.place.region=visible"], "may be asked only where it is not told"),
    ("image/droppos", ["teacher=null"], "a teacher's class token, and there is none"),
    ("image/droppos", ["encoder.transformer.cls=false"], "this encoder has none; set attention: null"),
    ("points/mae", ["encoder.transformer.unlocated=true", "masking.x={random: {unlocated: 0.5}}",
                    "objectives={places: {masked: {encode: x, predictor: placeless, readouts: {place: {region: unlocated, "
                    "target: place}}}}}"], "points data are sets")])
def test_what_cannot_be_asked_is_refused(recipe: str, over: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, over)
