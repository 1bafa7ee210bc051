"""Masked frequency modelling: what is hidden, what is compared, and the loss of the authors' own code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.platform.assembly import Assembly, total
from meristem.platform.derived.frequency import radius
from meristem.platform.masked.spectrum import Spectrum
from meristem.platform.objectives import Items
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

SMALL = ["views.x.size=[32,32]", "modality.image.patch=4", "derived.filtered.frequency.radius=5"]
NETS = {"image/mfm": "encoder.transformer={width: 48, depth: 2, heads: 4}",
        "image/mfm-cnn": "encoder.unet={widths: [8, 16], blocks: [1, 1]}"}
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 3, 1, 1)


def batch(array: Tensor, recipe_name: str = "image/mfm") -> Batch:
    recipe, rows = load(recipe_name, SMALL), torch.arange(len(array))
    view = recipe.modality.example(tuple(array.shape[2:]), Rng.of(0, rows, "mfm"))
    return Batch(Items(rows, rows), {"x": replace(view, name="x", array=array)})


def patches(step: Step, array: Tensor) -> Tensor:
    return step.assembly.tokenizer.stream(replace(step.view("x"), array=array)).content


def test_the_loss_is_that_of_the_authors_code() -> None:
    """models/mfm.py and data/data_mfm.py of Jiahao000/MFM at c9194b1, circle of 5 in 32×32, for x = rand(4, 3, 32, 32) and a
    decoder that returned randn(4, 3, 32, 32) of torch.Generator().manual_seed(0), rows low, high, high, low: 1.43831825. What
    their frequency_transform made of 0.5 + 0.1 (x − 0.5) in the low rows has the sum of squares 1536.8538."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 32, 32, generator=generator)
    prediction = torch.randn(4, 3, 32, 32, generator=generator)
    assembly = Assembly(load("image/mfm", SMALL))
    step = Step(assembly, batch((x - IMAGENET[0]) / IMAGENET[1]), 0.0, 0)
    kept = {"kept": torch.tensor([0, 1, 1, 0])}
    step._views["filtered"] = replace(step.view("filtered"), params=kept)
    tokens = patches(step, prediction)
    loss, count = Spectrum(missing_in="filtered").compare(step, "filtered", None, tokens, torch.ones(4, 64))
    assert float(loss / count) == pytest.approx(1.4383182525634766, rel=1e-6)
    filtering = assembly.recipe.derived["filtered"]
    inside = filtering.kept(step.view("filtered"))[0]
    low = torch.fft.ifftn(torch.fft.fftn(0.5 + 0.1 * (x - 0.5), dim=(2, 3)) * inside, dim=(2, 3)).real
    assert float(low[[0, 3]].square().sum()) == pytest.approx(1536.853759765625, rel=1e-6)


@pytest.mark.parametrize("recipe", list(NETS))
def test_the_encoder_sees_nothing_of_the_missing_frequencies_and_the_loss_nothing_else(recipe: str) -> None:
    assembly = Assembly(load(recipe, [*SMALL, NETS[recipe]])).eval()
    array = torch.randn(6, 3, 32, 32)
    step = Step(assembly, batch(array), 0.0, 0)
    kept = assembly.recipe.derived["filtered"].kept(step.view("filtered"))[:, None]
    assert {*step.view("filtered").params["kept"].tolist()} == {0, 1}
    noise = torch.fft.fftn(torch.randn_like(array), dim=(2, 3))

    def only(bins: Tensor) -> Tensor:
        return torch.fft.ifftn(noise * bins, dim=(2, 3)).real

    other = Step(assembly, batch(array + only(~kept)), 0.0, 0)
    torch.testing.assert_close(other.encode("filtered", masked=True).tokens, step.encode("filtered", masked=True).tokens,
                               atol=1e-4, rtol=1e-4)
    target, weight, prediction = Spectrum(missing_in="filtered"), torch.ones(6, 64), torch.randn(6, 3, 32, 32)
    losses = [target.compare(step, "filtered", None, patches(step, prediction + change), weight)[0]
              for change in (0, only(kept), only(~kept))]
    torch.testing.assert_close(losses[1], losses[0])
    assert abs(float(losses[2] - losses[0])) > 1


def test_the_loss_is_the_double_loop_over_missing_bins() -> None:
    assembly = Assembly(load("image/mfm", SMALL))
    step = Step(assembly, batch(torch.randn(2, 3, 32, 32)), 0.0, 0)
    prediction = torch.randn(2, 3, 32, 32)
    total, count = Spectrum(missing_in="filtered").compare(step, "filtered", None, patches(step, prediction), torch.ones(2, 64))
    inside, sums, bins = radius((32, 32)) < 5, 0.0, 0
    for row, high in enumerate(step.view("filtered").params["kept"].tolist()):
        missing = inside if high else ~inside
        for channel in range(3):
            far = torch.fft.fft2(prediction[row, channel]) - torch.fft.fft2(step.view("x").array[row, channel])
            sums, bins = sums + float(far.abs()[missing].double().sum()) / 32, bins + int(missing.sum())
    assert int(count) == bins and float(total) == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("recipe", list(NETS))
def test_it_learns_and_leaves_the_batch_as_it_was(recipe: str) -> None:
    assembly = Assembly(load(recipe, [*SMALL, NETS[recipe]]))
    data = batch(torch.randn(8, 3, 32, 32).cumsum(2).cumsum(3) / 16)
    optimiser, losses = torch.optim.AdamW(assembly.parameters(), lr=3e-3), []
    for _ in range(30):
        loss = total(assembly(data, 0.0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0] and set(data.views) == {"x"}


def test_the_share_of_low_passes_is_the_one_asked_for() -> None:
    assembly = Assembly(load("image/mfm", [*SMALL, "derived.filtered.frequency.low=0.3"]))
    step = Step(assembly, batch(torch.randn(2000, 1, 8, 8)), 0.0, 0)
    assert float((step.view("filtered").params["kept"] == 0).float().mean()) == pytest.approx(0.3, abs=0.03)


REGION = "objectives.frequencies.masked.readouts.missing"


@pytest.mark.parametrize(("recipe", "over", "says"), [
    ("points/mae", ["derived={filtered: {frequency: {of: x}}}",
                    "objectives.points.masked.target={spectrum: {missing_in: filtered}}"], "points data are sets"),
    ("image/mfm", [f"{REGION}.target.spectrum.missing_in=x"], "'x' lacks, which is no view derived by `frequency`"),
    ("image/mfm", [f"{REGION}.region=hidden"], "'missing' compares whole views; set its region to all"),
    ("image/mfm", ["views.x.size=[60, 64]"], r"leave a rest of \[60, 64\]"),
    ("image/mfm", [f"{REGION}.of=y"], "'missing' is of 'y': there is no such view"),
    ("image/mfm", ["views.y.size=[32, 32]", f"{REGION}.of=y"], "whose tokens are not those of 'filtered'")])
def test_what_has_no_frequencies_is_refused(recipe: str, over: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, over)
