"""Views that are made of drawn ones on the device."""

from __future__ import annotations

import pytest
import torch

from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.platform.assembly import Assembly
from meristem.platform.derived.frequency import radius
from meristem.platform.objectives import Items
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step


def _step(recipe_name: str, overrides: list[str]) -> Step:
    recipe = load(recipe_name, overrides)
    size = tuple(next(iter(recipe.views.values())).size)
    view = recipe.modality.example(size, Rng.of(3, torch.arange(6), "derived"))
    rows = torch.arange(6)
    return Step(Assembly(recipe), Batch(Items(rows, rows), {"x": view}), 0.5, 0)


def test_low_and_high_frequencies_add_up_and_share_none() -> None:
    made = "derived={low: {frequency: {of: x, radius: 5, low: 1}}, high: {frequency: {of: x, radius: 5, low: 0}}}"
    step = _step("image/mae", [made, "views.x.size=[24,32]"])
    low, high, x = step.view("low").array, step.view("high").array, step.view("x").array
    torch.testing.assert_close(low + high, x, atol=1e-5, rtol=0)
    inner = radius((24, 32)) < 5
    assert torch.fft.fftn(low, dim=(2, 3)).abs()[..., ~inner].max() < 1e-3
    assert torch.fft.fftn(high, dim=(2, 3)).abs()[..., inner].max() < 1e-3
    assert (step.view("low").params["kept"] == 0).all() and (step.view("high").params["kept"] == 1).all()


def test_the_radius_is_that_of_a_centred_spectrum_with_the_constant_at_0() -> None:
    rows, columns = torch.meshgrid(torch.arange(8.0) - 4, torch.arange(6.0) - 3, indexing="ij")
    assert torch.equal(radius((8, 6)), torch.fft.ifftshift((rows**2 + columns**2).sqrt()))


def test_a_derived_view_has_a_stream_a_masking_and_looks_of_its_own() -> None:
    step = _step("image/mae", ["derived={low: {frequency: {of: x}}}", "masking.low.nothing={}",
                               "objectives.pixels.masked={encode: low, predictor: linear, target: content}", "masking.x=null"])
    step.assembly(step.batch, 0.5)
    assert step.assembly.last_step is not None and step.assembly.last_step.passes == ["encoder(low, plan)"]
    assert set(step.units("low").key["view"].tolist()).isdisjoint(step.units("x").key["view"].tolist())
    assert set(step.batch.views) == {"x"}


@pytest.mark.parametrize(("recipe", "derived", "says"), [
    ("points/mae", "{low: {frequency: {of: x}}}", "points data are sets"),
    ("image/mae", "{low: {frequency: {of: y}}}", "'y', which is no view before it"),
    ("image/mae", "{a: {frequency: {of: b}}, b: {frequency: {of: x}}}", "'b', which is no view before it"),
    ("image/mae", "{x: {frequency: {of: x}}}", "has the name of a drawn one")])
def test_what_cannot_be_derived_is_refused(recipe: str, derived: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, [f"derived={derived}"])
