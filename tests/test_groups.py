"""Group masked model learning: groups that show noise, nothing or another sample, and the loss where they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.modalities.stream import LatticeStream, TokenStream
from meristem.platform.assembly import Assembly, total
from meristem.platform.masked.groups import Groups
from meristem.platform.masked.targets import Content
from meristem.platform.objectives import Items, Plan
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

SMALL = ["views.x.size=[24,32]", "modality.image.patch=4", "encoder.transformer={width: 48, depth: 2, heads: 4}"]


def lattice(shape: tuple[int, ...], batch: int, patch: int = 1) -> LatticeStream:
    array = torch.randn(batch, 2, *(n * patch for n in shape))
    return LatticeStream(array, (patch,) * len(shape), None, torch.arange(batch))


def rng(batch: int) -> Rng:
    return Rng.of(0, torch.arange(batch), "groups")


def batch(array: Tensor) -> Batch:
    recipe, rows = load("image/gmml", SMALL), torch.arange(len(array))
    view = recipe.modality.example(tuple(array.shape[2:]), Rng.of(0, rows, "gmml"))
    return Batch(Items(rows, rows), {"x": replace(view, name="x", array=array)})


def alike(masks: Tensor) -> float:
    """Share of neighbours that are both hidden or both shown."""
    return float((masks[:, 1:] == masks[:, :-1]).float().mean() + (masks[:, :, 1:] == masks[:, :, :-1]).float().mean()) / 2


def test_the_loss_is_that_of_the_authors_code() -> None:
    """main.py of Sara-Ahmed/GMML at 1882712, its two lines of the loss (drop_only 1) for clean and reconstructed pictures
    randn(4, 3, 16, 16) and a mask of 4×4 squares where rand(4, 1, 4, 4) < 0.5, of manual_seed(0) in this order: 1.12265313."""
    generator = torch.Generator().manual_seed(0)
    clean, made = (torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2))
    hidden = torch.rand(4, 1, 4, 4, generator=generator).flatten(1) < 0.5
    assert int(hidden.sum()) == 38
    assembly = Assembly(load("image/gmml", [*SMALL, "views.x.size=[16,16]"]))
    step = Step(assembly, batch(clean), 0.0, 0)
    prediction = step.stream("x").with_array(made).content
    loss, count = Content(loss="l1").compare(step, "x", None, prediction, hidden.float())
    assert float(loss / count) == pytest.approx(1.1226531267166138, rel=1e-6)


@pytest.mark.parametrize(("shows", "share", "together"), [({"noise": (0.5, 0.75)}, 0.640, 0.769),
                                                          ({"other": 0.3}, 0.314, 0.802)])
def test_groups_are_as_large_as_those_of_the_authors_code(shows: dict[str, object], share: float, together: float) -> None:
    """Their GMML_drop_rand_patches, 400 times on 14×14 patches: the mean hidden share, a little more than was drawn since the
    last group is whole, and the share of neighbours that are both hidden or both shown; scattered tokens: 0.53 and 0.58."""
    hidden = Groups(shows=shows).plan(lattice((14, 14), 400), rng(400), ()).hidden.reshape(-1, 14, 14)
    assert share - 0.03 < float(hidden.float().mean()) < share + 0.005
    assert alike(hidden) == pytest.approx(together, abs=0.02)


def test_what_is_hidden_shows_noise_or_nothing_or_another_sample() -> None:
    n, stream = 300, lattice((4, 6), 300, patch=2)
    plan = Groups(shows={"noise": 0.5, "zeros": 0.25, "other": 0.125}, largest=0.5).plan(stream, rng(n), ())
    count, shown = plan.hidden.sum(1), plan.shown(stream).content
    assert {*count.tolist()} == {12, 6, 3} and all(60 < int((count == c).sum()) < 140 for c in (12, 6, 3))
    assert torch.equal(shown[~plan.hidden], stream.content[~plan.hidden])
    of = {c: plan.hidden & (count == c)[:, None] for c in (12, 6, 3)}
    assert (shown[of[6]] == 0).all()
    noise = shown[of[12]]
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1, abs=0.05)
    same = (shown[:, None] == stream.content[None]).all(-1)  # (row, row it was taken from, token)
    for row in torch.nonzero(count == 3).flatten():
        assert same[row].logical_or(~plan.hidden[row]).all(-1).any()  # one row has them all, at the same places
    assert torch.equal(plan.predict, plan.hidden.float())


def test_an_array_that_patches_do_not_fill_keeps_its_rest() -> None:
    stream = LatticeStream(torch.randn(2, 1, 5, 7), (2, 2), None, torch.arange(2))
    hidden = torch.ones(2, 6, dtype=torch.bool)
    shown = Plan(hidden, hidden.float(), fill=torch.zeros(2, 6, 4)).shown(stream)
    assert isinstance(shown, LatticeStream) and (shown.array[..., :4, :6] == 0).all()
    assert torch.equal(shown.array[..., 4:, :], stream.array[..., 4:, :])
    assert torch.equal(shown.array[..., 6], stream.array[..., 6])
    points = TokenStream(torch.randn(2, 6, 4), None, hidden, None)
    assert (Plan(hidden, hidden.float(), fill=torch.zeros(2, 6, 4)).shown(points).content == 0).all()


@pytest.mark.parametrize("net", [SMALL[2], "encoder.unet={widths: [8, 16], blocks: [1, 1]}"])
def test_an_encoder_gets_all_tokens_and_nothing_of_the_hidden_ones(net: str) -> None:
    assembly = Assembly(load("image/gmml", [*SMALL[:2], net, "masking.x.groups.shows={noise: 0.5, other: null}"])).eval()
    array = torch.randn(3, 3, 24, 32)
    step = Step(assembly, batch(array), 0.0, 0)
    encoded, hidden = step.encode("x", masked=True), step.plan("x").hidden
    assert encoded.index is None and step.passes == ["encoder(x, plan)"]
    pixels = hidden.reshape(3, 1, 6, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = Step(assembly, batch(array.where(~pixels, torch.randn_like(array))), 0.0, 0)
    assert torch.equal(other.encode("x", masked=True).tokens, encoded.tokens)
    seen = Step(assembly, batch(array.where(pixels, torch.randn_like(array))), 0.0, 0)
    assert not torch.equal(seen.encode("x", masked=True).tokens, encoded.tokens)


def test_it_learns() -> None:
    assembly = Assembly(load("image/gmml", SMALL))
    data, optimiser, losses = batch(torch.randn(8, 3, 24, 32).cumsum(2).cumsum(3) / 16), None, []
    optimiser = torch.optim.AdamW(assembly.parameters(), lr=3e-3)
    for _ in range(40):
        loss = total(assembly(data, 0.0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("recipe", "over", "says"), [
    ("points/mae", ["masking.x={groups: {}}"], "points data are sets"),
    ("image/mae", ["masking.x={groups: {}}"], "the decoder predictor works on masked tokens that are dropped"),
    ("image/gmml", ["masking.x.groups.corruption=drop"], "corruption"),
    ("image/gmml", ["masking.x.groups.swap=0.1"], "swap: what is hidden shows something already"),
    ("image/gmml", ["masking.x.groups.shows={noise: null, other: null}"], "shows"),
    ("image/gmml", ["masking.x.groups.shows={nose: 0.5}"], "shows")])
def test_what_cannot_be_grouped_is_refused(recipe: str, over: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, over)
