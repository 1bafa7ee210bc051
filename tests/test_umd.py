"""Masking and diffusion in one auto-encoder: who is noised how much, what is told, and the loss of either half."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.modalities.stream import gather
from meristem.platform.assembly import Assembly, total
from meristem.platform.derived.diffusion import Diffused, remaining
from meristem.platform.encoders.conditioning import Adapted, Told
from meristem.platform.objectives import Items
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

LINES = "objectives.pixels.masked"
SMALL = ["modality.image={channels: 1, patch: 4}", "views.x.size=[16,16]",
         "encoder.transformer={width: 48, depth: 2, heads: 4}", f"{LINES}.predictor.decoder={{depth: 1, width: 24, heads: 2}}"]


def step(*more: str, rows: int = 8, moved: bool = False) -> Step:
    """moved: what starts at 0, and makes every block the identity, is drawn."""
    recipe = load("image/umd", [*SMALL, *more])
    number = torch.arange(rows)
    torch.manual_seed(0)
    assembly = Assembly(recipe).eval()
    if moved:
        for part in assembly.modules():
            if isinstance(part, Adapted):
                nn.init.normal_(part.linear.weight, std=0.3)
    return Step(assembly, Batch(Items(number, number), {"x": recipe.modality.example((16, 16), Rng.of(5, number))}), 0.5, 0)


def test_half_of_a_batch_is_clean_and_the_other_noised_and_each_is_encoded_once() -> None:
    made = step()
    made.assembly(made.batch, 0.5)
    of = made.assembly.last_step
    assert of is not None and of.passes == ["encoder(clean, plan)", "encoder(noised, plan)"]
    x, clean, noised, noise = (of.view(name) for name in ("x", "clean", "noised", "noise"))
    assert torch.equal(clean.array, x.array[:4])
    assert clean.item.tolist() == [0, 1, 2, 3] and noised.item.tolist() == [4, 5, 6, 7]
    left = remaining("cosine", 1000)[noised.params["timestep"] - 1].float()[:, None, None, None]
    torch.testing.assert_close(noised.array, left.sqrt() * x.array[4:] + (1 - left).sqrt() * noise.array)
    assert "timestep" not in clean.params
    assert of.plan("clean").hidden.sum(1).tolist() == [12] * 4 and of.plan("noised").hidden.sum(1).tolist() == [6] * 4


def test_the_losses_are_those_of_the_authors_trainer_in_loops() -> None:
    """mean(se · mask) / mean(mask) over pixels: hidden ones of the clean half; of the noised half hidden ones against the clean
    picture, and seen ones against the noise; (1/2) clean + (1/2) (image + noise) / 2."""
    made = step(moved=True)
    with torch.no_grad():
        losses = made.assembly.objectives["pixels"](made)
        outputs = {view: made.assembly.objectives["pixels"]._predict(made, made.plan(view), view)
                   for view in ("clean", "noised")}
    expected = 0.0
    for line, view, of, seen, share in (("clean", "clean", "clean", False, 0.5), ("image", "noised", "rest", False, 0.25),
                                        ("noise", "noised", "noise", True, 0.25)):
        hidden, true, guess = made.plan(view).hidden, made.view(of).array, outputs[view][line]
        place = torch.arange(16).expand(4, -1) if guess.index is None else guess.index
        errors = []
        for row in range(4):
            for k, token in enumerate(place[row].tolist()):
                if bool(hidden[row, token]) != seen:
                    y, z = token // 4 * 4, token % 4 * 4
                    errors.append((guess.value[row, k] - true[row, :, y:y + 4, z:z + 4].flatten()).square().mean())
        mean = float(torch.stack(errors).mean())
        assert float(losses[line].total / losses[line].count) == pytest.approx(mean, rel=1e-5)
        expected += share * mean
    assert float(total(losses)) == pytest.approx(expected, rel=1e-5)


def test_a_view_without_noise_is_told_0_and_the_number_matters() -> None:
    made = step(moved=True)
    stream, encoder = made.stream("clean").seen(frozenset({"position"})), made.assembly.encoder
    with torch.no_grad():
        numbers = (None, torch.zeros(4), torch.full((4,), 7))
        plain, zero, seven = (encoder(stream, condition=number).tokens for number in numbers)
        assert torch.equal(plain, zero) and not torch.allclose(plain, seven, atol=1e-3)
        assert torch.equal(made.encode("clean", masked=True).tokens, encoder(stream, made.plan("clean")).tokens)
        told = made.view("noised").params["timestep"]
        other = encoder(made.stream("noised").seen(frozenset({"position"})), made.plan("noised"), condition=told).tokens
    assert torch.equal(made.encode("noised", masked=True).tokens, other)


def test_the_decoder_goes_by_the_number_too() -> None:
    made = step(moved=True)
    predictor = made.assembly.objectives["pixels"].predictor
    encoded, plan = made.encode("noised", masked=True), made.plan("noised")
    with torch.no_grad():
        before = predictor(encoded, made.stream("noised"), plan)["image"].value
        after = predictor(replace(encoded, told=torch.zeros_like(encoded.told)), made.stream("noised"), plan)["image"].value
    assert not torch.allclose(before, after, atol=1e-4)


def test_attention_is_that_of_what_the_told_block_attends_by() -> None:
    """Weights that were asked for, applied to the values by hand, give what the block gives."""
    made = step("encoder.transformer={width: 48, depth: 1, heads: 4}", moved=True)
    blocks = made.assembly.encoder.blocks
    x, told = torch.randn(2, 5, 48), torch.randn(2, 48)
    with torch.no_grad():
        out, _, attention = blocks(x, None, want=frozenset({"attention"}), told=told)
        block, adapted = blocks.blocks[0], blocks.adapted[0]
        values = block.attn.qkv(adapted.entered(block, x, told)).chunk(3, -1)[2].unflatten(-1, (4, -1)).transpose(1, 2)
        gate, shift, scale, last = adapted.linear(told)[:, None].chunk(6, -1)[2:]
        y = x + gate * block.attn.proj((attention @ values).transpose(1, 2).flatten(2))
        y = y + last * block.mlp(block.norm2(y) * (1 + scale) + shift)
    torch.testing.assert_close(out, blocks.norm(y))


def wave(*shape: int, k: int = 0) -> Tensor:
    n = torch.arange(math.prod(shape))
    return torch.sin(n * 0.7 + n % 13 + k).reshape(shape)


def test_noise_is_that_of_the_authors() -> None:
    """ᾱ of `create_gaussian_diffusion`, and Σ|x_t| of `q_sample`, of philippe-eecs/small-vision at 3d4555b, pictures made as
    here."""
    steps = torch.tensor([0, 1, 499, 998, 999])
    assert remaining("cosine", 1000)[steps].tolist() == pytest.approx(
        [9.999587e-01, 9.999126e-01, 4.938436e-01, 2.428767e-06, 2.428767e-09], rel=1e-5)
    linear = remaining("linear", 1000)[[0, 499, 999]]
    assert linear.tolist() == pytest.approx([9.999000e-01, 7.858724e-02, 4.035830e-05], rel=1e-5)
    x, noise = wave(5, 4, 4, 3), wave(5, 4, 4, 3, k=2)
    drawn: Any = SimpleNamespace(integers=lambda purpose, most: steps, normal=lambda purpose, *shape: noise)
    fake: Any = SimpleNamespace(rng=lambda purpose, view: drawn)
    view = load("image/umd", SMALL).modality.example((4, 4), Rng.of(0, torch.arange(5)))
    view = replace(view, array=x)
    fake.view = lambda name: view
    made = Diffused(of="x").derive(view, "noised", fake)
    assert made.array.abs().flatten(1).sum(1).tolist() == pytest.approx(
        [30.39384, 30.77154, 22.89632, 29.71698, 31.07931], abs=1e-4)
    assert made.params["timestep"].tolist() == [1, 2, 500, 999, 1000]


def test_what_is_told_and_the_block_that_goes_by_it_are_the_authors() -> None:
    """Σ|·| of the conditioning vectors (`TimeEmb`, `EmbeddingTrunk`, silu) and of outputs of `Encoder1DBlock` with adaln, of
    philippe-eecs/small-vision at 3d4555b, for weights and tokens made as here; its perceptron's activation is gelu by tanh."""
    from timm.models.eva import EvaBlock

    told, adapted = Told(16), Adapted(16, 16)
    block = EvaBlock(16, 2, num_prefix_tokens=0, attn_type="rope")
    block.mlp.act = nn.GELU(approximate="tanh")

    def fill(layer: Any, weight: Tensor, bias: Tensor) -> None:
        layer.weight.copy_(weight)
        layer.bias.copy_(0.1 * bias)

    with torch.no_grad():
        fill(told.trunk[0], 0.3 * wave(16, 32, k=1).T, wave(32, k=2))
        fill(told.trunk[2], 0.3 * wave(32, 16, k=3).T, wave(16, k=4))
        fill(adapted.linear, 0.2 * wave(16, 96, k=6).T, wave(96, k=7))
        fill(block.norm1, 1 + 0.3 * wave(16, k=8), wave(16, k=9))
        fill(block.norm2, 1 + 0.3 * wave(16, k=10), wave(16, k=11))
        fill(block.attn.qkv, 0.3 * torch.cat([wave(16, 16, k=12 + i).T for i in range(3)]),
             torch.cat([wave(16, k=15 + i) for i in range(3)]))
        fill(block.attn.proj, 0.3 * wave(16, 16, k=18).T, wave(16, k=19))
        fill(block.mlp.fc1, 0.3 * wave(16, 64, k=20).T, wave(64, k=21))
        fill(block.mlp.fc2, 0.3 * wave(64, 16, k=22).T, wave(16, k=23))
        vector = told(torch.tensor([0, 7, 640]))
        out = adapted(block, wave(3, 6, 16, k=5), vector, None, None)
    assert vector.abs().sum(1).tolist() == pytest.approx([0.23575, 1.34781, 4.90622], abs=1e-4)
    assert out.abs().flatten(1).sum(1).tolist() == pytest.approx([62.89882, 64.99881, 79.23990], abs=2e-3)


def test_every_parameter_is_in_one_group_and_blocks_start_as_the_identity() -> None:
    made = step()
    encoder = made.assembly.encoder
    grouped = [p for group in encoder.layer_groups() for p in group]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(encoder.parameters()))
    stream = made.stream("clean").seen(frozenset({"position"}))
    with torch.no_grad():
        torch.testing.assert_close(encoder(stream).tokens, encoder.blocks.norm(encoder.embed(stream)))


@pytest.mark.parametrize(("recipe", "over", "says"), [
    ("image/umd", ["derived.clean.part.share=[0.5, 0.5]"], "from the lower to the higher"),
    ("points/mae", ["derived={n: {diffused: {of: x}}}"], "points data are sets"),
    ("points/mae", ["derived={n: {noise: {of: x}}}"], "points data are sets"),
    ("image/umd", ["masking.noised=null"], "view 'noised' has no masking"),
    ("image/umd", [f"{LINES}.readouts.image.of=there"], "is of 'there': there is no such view"),
    ("image/umd", [f"{LINES}.readouts.image.encode=there"], "encode names 'there'")])
def test_what_cannot_be_noised_is_refused(recipe: str, over: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, over)


def test_a_batch_of_one_has_no_half() -> None:
    with pytest.raises(RecipeError, match=r"of 1 rows the part \[0.0, 0.5\] has none"):
        step(rows=1).view("clean")


def test_tokens_lie_where_the_noised_view_s_do() -> None:
    """Rows of a part keep their frames: positions of what was selected are those of the whole batch's rows."""
    made = step()
    assert torch.equal(made.stream("noised").position, made.stream("x").position[4:])
    assert torch.equal(gather(made.stream("rest").content, made.plan("noised").keep),
                       gather(made.stream("x").content[4:], made.plan("noised").keep))
