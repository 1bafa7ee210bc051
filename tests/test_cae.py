"""The context autoencoder: latents of hidden patches by cross-attention, aligned, and decoded without the visible ones."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.rng import Rng
from meristem.platform.assembly import Assembly, total
from meristem.platform.masked.predictors import Prediction
from meristem.platform.objectives import Items
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

SMALL = ["views.x.size=[24,32]", "modality.image.patch=4", "encoder.transformer={width: 48, depth: 2, heads: 4}",
         "objectives.context.masked.predictor.regressor={depth: 1, decoder: 1, width: 32, heads: 4}"]


def make(*over: str) -> Assembly:
    torch.manual_seed(0)
    return Assembly(load("image/cae", [*SMALL, *over]))


def batch(assembly: Assembly, array: Tensor) -> Batch:
    rows = torch.arange(len(array))
    view: View = assembly.recipe.modality.example(tuple(array.shape[2:]), Rng.of(0, rows, "cae"))
    return Batch(Items(rows, rows), {"x": replace(view, name="x", array=array)})


def run(assembly: Assembly, array: Tensor) -> tuple[dict[str, Tensor], dict[str, Prediction], Step]:
    caught: dict[str, Prediction] = {}
    predictor = assembly.objectives["context"].predictor
    handle = predictor.register_forward_hook(lambda module, inputs, output: caught.update(output))
    losses = assembly(batch(assembly, array), 0.0)
    handle.remove()
    assert assembly.last_step is not None
    return {name: loss.total / loss.count for name, loss in losses.items()}, caught, assembly.last_step


def test_one_pass_of_the_visible_half_and_one_of_the_hidden_half() -> None:
    _, caught, step = run(make(), torch.randn(3, 3, 24, 32))
    assert step.passes == ["encoder(rest, plan)", "encoder(x, plan)"]
    seen, rest = step.plan("x"), step.plan("rest")
    assert torch.equal(rest.hidden, ~seen.hidden) and seen.hidden.sum(1).tolist() == [24] * 3
    assert torch.equal(rest.keep, caught["latent"].index)
    assert caught["latent"].value.shape == (3, 24, 48) and caught["pixels"].value.shape == (3, 24, 48)


def test_losses_are_loops_beside_a_copy_of_the_encoder_and_align_moves_no_target() -> None:
    """With the encoder frozen in a copy for the target, loss and gradient stay the same: none flows through the target."""
    assembly, array = make(), torch.randn(3, 3, 24, 32)
    twin = copy.deepcopy(assembly.encoder)
    losses, caught, step = run(assembly, array)
    with torch.no_grad():
        target = twin(step.stream("x").seen(assembly.recipe.encoder.sees), step.plan("rest")).tokens
    alignment = F.mse_loss(caught["latent"].value, target)
    torch.testing.assert_close(losses["context.latents"], alignment)
    patches = step.stream("x").content
    sums = []
    for row in range(3):
        for k, token in enumerate(caught["pixels"].index[row].tolist()):
            x = patches[row, token]
            sums.append(((x - x.mean()) / (x.var() + 1e-6).sqrt() - caught["pixels"].value[row, k]).square().mean())
    torch.testing.assert_close(losses["context.pixels"], torch.stack(sums).mean())
    parameters = list(assembly.encoder.parameters())
    ours = torch.autograd.grad(losses["context.latents"], parameters, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(alignment, parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)
    assert assembly.recipe.objectives["context"].readouts["latents"].weight == 2


def test_the_decoder_knows_the_visible_patches_by_predicted_latents_alone() -> None:
    """Its pixels are a function of the latents and their places: other pictures with the same latents give the same."""
    assembly = make().eval()
    predictor = assembly.objectives["context"].predictor
    fixed = torch.randn(3, 24, 48)
    for other in (False, True):
        _, caught, _ = run(assembly, torch.randn(3, 3, 24, 32))
        if not other:
            first = caught
    assert not torch.allclose(first["pixels"].value, caught["pixels"].value, atol=1e-4)
    handle = predictor.leave.register_forward_hook(lambda module, inputs, output: fixed)
    made = [run(assembly, torch.randn(3, 3, 24, 32))[1]["pixels"].value for _ in range(2)]
    handle.remove()
    assert torch.equal(*made)


def test_nothing_of_the_hidden_patches_reaches_a_prediction() -> None:
    assembly, array = make().eval(), torch.randn(3, 3, 24, 32)
    _, caught, step = run(assembly, array)
    pixels = step.plan("x").hidden.reshape(3, 1, 6, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    _, again, _ = run(assembly, array.where(~pixels, torch.randn_like(array)))
    for name in ("latent", "pixels"):
        assert torch.equal(again[name].value, caught[name].value)


def test_it_learns() -> None:
    assembly = make()
    data = batch(assembly, torch.randn(8, 3, 24, 32).cumsum(2).cumsum(3) / 16)
    optimiser, losses = torch.optim.AdamW(assembly.parameters(), lr=2e-3), []
    for _ in range(40):
        lines = assembly(data, 0.0)
        loss = total(lines)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float((lines["context.pixels"].total / lines["context.pixels"].count).detach()))
    assert losses[-1] < 0.8 * losses[0]


PART = "objectives.context.masked"


@pytest.mark.parametrize(("recipe", "over", "says"), [
    ("image/cae", [f"{PART}.readouts.pixels.region=all"], "'pixels' is of the all region, and the regressor predictor"),
    ("image/cae", [f"{PART}.readouts.latents.output=codes"], "output 'codes', which the regressor predictor does not have"),
    ("image/cae", [f"{PART}.predictor=decoder"], "output 'latent', which the decoder predictor does not have"),
    ("image/cae", ["encoder.transformer.sees=[]"], "the regressor predictor cannot tell mask tokens apart"),
    ("image/cae", ["masking.rest=null"], "the features target is of 'rest' masked; set masking.rest"),
    ("image/cae", ["masking.rest.complement.of=y"], "it shows what masking.y hides, which is no token"),
    ("image/cae", ["masking.rest.complement.of=rest"], "masking.rest is a complement itself"),
    ("image/cae", ["encoder={unet: {}}"], "would drop tokens, but this encoder can only take replace")])
def test_what_cannot_be_regressed_is_refused(recipe: str, over: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, [*SMALL[:2], *over])


def test_an_output_without_a_head_must_have_the_targets_width() -> None:
    with pytest.raises(RecipeError, match="compares 48 numbers per token with an output of 32"):
        make("encoder.transformer={width: 32, depth: 1, heads: 4}", f"{PART}.readouts.pixels.output=latent")
