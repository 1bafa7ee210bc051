"""The masked engine: losses against double loops, hidden content stays hidden, only visible tokens are worked on, it learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import einops
import pytest
import torch
from torch import Tensor, nn

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.modalities.stream import LatticeStream, TokenStream
from meristem.platform.assembly import Assembly, total
from meristem.platform.encoders.base import Encoder
from meristem.platform.masked.masking import informative
from meristem.platform.masked.objective import MaskedObjective
from meristem.platform.masked.predictors import LinearPredictor, Prediction, blind
from meristem.platform.masked.targets import Content
from meristem.platform.objectives import Encoded, Items, Plan
from meristem.platform.recipe import Recipe, build, override, read
from meristem.platform.step import Batch, Step

SMALL = ["modality.image={channels: 2, patch: 4}", "views.x={size: [16, 24]}",
         "encoder.transformer={width: 48, depth: 2, heads: 4}"]
DECODER = "objectives.pixels.masked.predictor.decoder={depth: 1, width: 24, heads: 2}"
CELL = "masking.x.random.decode={running_cell: {ratio: 0.5, cell: [null, 2]}}"
UNET = ["encoder.unet={widths: [4, 8, 8], blocks: [1, 1, 1]}", "masking.x.random.corruption=replace",
        "objectives.pixels.masked.predictor=dense"]
KINDS = {"decoder": ("image/mae", [DECODER]), "dual": ("image/mae", [DECODER, CELL]), "linear": ("image/simmim", []),
         "dense": ("image/mae", UNET)}


def make(kind: str, *assignments: str) -> Assembly:
    name, extra = KINDS[kind]
    return Assembly(build(override(read(name), [*SMALL, *extra, *assignments]), Recipe))


def batch(array: Tensor, weight: Tensor | None = None, start: int = 0) -> Batch:
    b, shape = len(array), tuple(array.shape[2:])
    rows = torch.arange(b)
    frame = Frame(torch.eye(len(shape) + 1).repeat(b, 1, 1), shape, torch.ones(b, len(shape)), ("px",) * len(shape))
    view = View("x", array, frame, rows, torch.zeros_like(rows), weight=weight)
    return Batch(Items(rows, rows + start), {"x": view})


def predictions(assembly: Assembly, data: Batch) -> tuple[dict[str, Any], dict[str, Prediction], Step]:
    """Losses, and what the predictor returned on the way."""
    caught: dict[str, Prediction] = {}
    objective = assembly.objectives["pixels"]
    handle = objective.predictor.register_forward_hook(lambda module, inputs, output: caught.update(output))
    losses = assembly(data, 0.0)
    handle.remove()
    assert assembly.last_step is not None
    return losses, caught, assembly.last_step


def patch_of(array: Tensor, token: int, columns: int, patch: int) -> Tensor:
    y, x = token // columns * patch, token % columns * patch
    return array[:, y:y + patch, x:x + patch].reshape(-1)


@pytest.mark.parametrize("normalise", ["token", "channel", "none"])
@pytest.mark.parametrize("padded", [False, True])
def test_mae_loss_is_the_double_loop_over_hidden_patches(normalise: str, padded: bool) -> None:
    assembly = make("decoder", f"objectives.pixels.masked.target.content.normalise={normalise}")
    array = torch.randn(3, 2, 16, 24)
    weight = torch.ones(3, 1, 16, 24)
    if padded:
        weight[1, :, 10:] = 0  # cuts patches in two
    losses, caught, step = predictions(assembly, batch(array, weight if padded else None))
    hidden, (prediction,) = step.plan("x").hidden, caught.values()
    assert prediction.index is not None
    sums, count = 0.0, 0
    for row in range(3):
        place = {int(t): k for k, t in enumerate(prediction.index[row])}
        for token in range(24):
            there = patch_of(weight[row].expand(2, -1, -1), token, 6, 4) > 0
            if not hidden[row, token] or not there.any():
                continue
            x = patch_of(array[row], token, 6, 4)[there]
            groups = {"none": [], "token": [x], "channel": x.chunk(2)}[normalise]  # of two channels
            if groups:  # torch's var has n − 1, as the authors' code
                x = torch.cat([(g - g.mean()) / (g.var() + 1e-6).sqrt() for g in groups])
            sums += float((prediction.value[row, place[token]][there].detach() - x).square().sum())
            count += len(x)
    loss = losses["pixels"]
    assert count == pytest.approx(float(loss.count))
    torch.testing.assert_close(loss.total / loss.count, torch.tensor(sums / count))


def test_dual_masking_counts_what_is_decoded_and_hidden() -> None:
    assembly = make("dual")
    array = torch.randn(3, 2, 16, 24)
    losses, caught, step = predictions(assembly, batch(array))
    plan, (prediction,) = step.plan("x"), caught.values()
    assert plan.decode is not None and torch.equal(prediction.index, plan.decode)
    sums, count = 0.0, 0
    for row in range(3):
        for k, token in enumerate(plan.decode[row].tolist()):
            if plan.hidden[row, token]:
                x = patch_of(array[row], token, 6, 4)
                sums += float((prediction.value[row, k].detach() - (x - x.mean()) / (x.var() + 1e-6).sqrt()).square().sum())
                count += len(x)
    assert 0 < count == float(losses["pixels"].count) < float(plan.hidden.sum() * 32)
    torch.testing.assert_close(losses["pixels"].total / losses["pixels"].count, torch.tensor(sums / count))


def test_to_decode_all_that_is_hidden_is_to_decode_without_a_plan() -> None:
    assembly = make("decoder")
    predictor = assembly.objectives["pixels"].predictor
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    step = Step(assembly, batch(torch.randn(3, 2, 16, 24)), 0.0, 0)
    plain = step.plan("x")
    hidden = torch.nonzero(plain.hidden)[:, 1].reshape(3, -1)
    losses = []
    for plan in (plain, replace(plain, decode=hidden)):
        step._plans["x"] = plan
        loss = assembly.objectives["pixels"](step)[""]
        gradient = torch.autograd.grad(loss.total, predictor.parameters())
        losses.append((loss.total, loss.count, *gradient))
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_decoder_works_on_visible_and_decoded_places_alone() -> None:
    assembly, seen = make("dual"), []
    for block in assembly.objectives["pixels"].predictor.blocks.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    assembly(batch(torch.randn(2, 2, 16, 24)), 0.0)
    assert seen == [6 + 12]  # of 24 tokens a quarter is visible, a half decoded


def test_a_readout_of_what_is_not_decoded_is_refused() -> None:
    readouts = "{a: {target: content, region: all}}"
    with pytest.raises(RecipeError, match="readout 'a' is of the all region, but only some places are decoded"):
        make("dual", "objectives.pixels.masked.target=null", f"objectives.pixels.masked.readouts={readouts}")


def test_simmim_loss_is_the_published_formula() -> None:
    assembly = make("linear")
    array = torch.randn(3, 2, 16, 24)
    losses, caught, step = predictions(assembly, batch(array))
    (prediction,) = caught.values()
    picture = einops.rearrange(prediction.value, "b (h w) (c p q) -> b c (h p) (w q)", h=4, c=2, p=4)
    mask = einops.repeat(step.plan("x").hidden.float(), "b (h w) -> b 1 (h p) (w q)", h=4, p=4, q=4)
    published = ((array - picture).abs() * mask).sum() / (mask.sum() + 1e-5) / 2
    torch.testing.assert_close(losses["pixels"].total / losses["pixels"].count, published)


def test_dense_loss_is_the_mean_over_hidden_voxels() -> None:
    assembly = make("dense", "objectives.pixels.masked.target.content.normalise=none")
    array = torch.randn(2, 2, 16, 24)
    losses, _, step = predictions(assembly, batch(array))
    hidden = einops.repeat(step.plan("x").hidden, "b (h w) -> b 1 (h p) (w q)", h=4, p=4, q=4).expand_as(array)
    dense = step.encode("x", masked=True, want=frozenset({"dense"})).dense
    picture = assembly.objectives["pixels"].predictor.heads["content"](dense)
    expected = (picture - array)[hidden].square().mean()
    torch.testing.assert_close(losses["pixels"].total / losses["pixels"].count, expected)


@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1"])
def test_each_element_loss_against_its_definition(loss: str) -> None:
    step = Step(make("linear"), batch(torch.randn(2, 2, 16, 24)), 0.0, 0)
    prediction, weight, content = torch.randn(2, 5, 32), torch.rand(2, 5), step.stream("x").content
    index = torch.stack([torch.randperm(24)[:5] for _ in range(2)])
    target = Content.model_validate({"loss": loss, "beta": 0.5})
    sums, count = target.compare(step, "x", index, prediction, weight)
    by_hand = 0.0
    for b in range(2):
        for n in range(5):
            for p in range(32):
                d = abs(float(prediction[b, n, p] - content[b, index[b, n], p]))
                e = {"mse": d * d, "l1": d, "smooth_l1": d * d / (2 * 0.5) if d < 0.5 else d - 0.25}[loss]
                by_hand += float(weight[b, n]) * e
    assert float(sums) == pytest.approx(by_hand, rel=1e-5)
    assert float(count) == pytest.approx(32 * float(weight.sum()), rel=1e-5)


def test_what_lies_outside_the_sample_changes_no_target() -> None:
    weight = torch.ones(2, 1, 16, 24)
    weight[0, :, 5:] = 0
    array = torch.randn(2, 2, 16, 24)
    other = torch.where(weight > 0, array, 1e3 * torch.randn_like(array))
    prediction, assembly = torch.randn(2, 24, 32), make("linear")
    for target in (Content(normalise="token"), Content(normalise="channel")):
        results = [target.compare(Step(assembly, batch(x, weight), 0.0, 0), "x", None, prediction, torch.ones(2, 24))
                   for x in (array, other)]
        assert results[0] == results[1]


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_do_not_depend_on_what_is_hidden_or_unseen(kind: str) -> None:
    assembly = make(kind).eval()
    array = torch.randn(2, 2, 16, 24)
    _, before, step = predictions(assembly, batch(array))
    hidden = einops.repeat(step.plan("x").hidden, "b (h w) -> b 1 (h p) (w q)", h=4, p=4, q=4)
    data = batch(torch.where(hidden, 1e2 * torch.randn_like(array), array), torch.rand(2, 1, 16, 24) + 0.1)
    view = data.views["x"]
    view.frame = view.frame.compose(torch.tensor([[2.0, 0.3, 7.0], [-0.3, 2.0, 1.0], [0.0, 0.0, 1.0]]).expand(2, 3, 3))
    view.params["angle"] = torch.randn(2)
    _, after, _ = predictions(assembly, data)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name].value, after[name].value)


def test_a_blind_stream_has_places_and_no_content() -> None:
    stream = batch(torch.randn(2, 2, 16, 24)).views["x"]
    lattice = LatticeStream(stream.array, (4, 4), stream.frame, stream.item)
    assert not blind(lattice).content.any()
    assert torch.equal(blind(lattice).position, lattice.position)
    plain = TokenStream(torch.randn(2, 3, 4), torch.randn(2, 3, 2), torch.ones(2, 3, dtype=torch.bool), None)
    assert not blind(plain).content.any() and torch.equal(blind(plain).position, plain.position)


def test_only_visible_tokens_are_embedded_and_encoded_and_only_hidden_ones_predicted() -> None:
    assembly = make("decoder", "views.x={size: [32, 32]}")
    seen: list[tuple[str, int]] = []

    def count(name: str) -> Any:
        return lambda module, inputs, output: seen.append((name, (output[0] if name == "encode" else output).shape[1]))

    encoder, predictor = assembly.encoder, assembly.objectives["pixels"].predictor
    encoder.embed.register_forward_hook(count("embed"))
    for block in encoder.blocks.blocks:
        block.register_forward_hook(count("encode"))
    predictor.heads["content"].register_forward_hook(count("predict"))
    assembly(batch(torch.randn(2, 2, 32, 32)), 0.0)
    assert seen == [("embed", 16), ("encode", 17), ("encode", 17), ("predict", 48)]  # of 64 tokens; one class token
    assert assembly.last_step is not None and assembly.last_step.passes == ["encoder(x, plan)"]


def test_a_coarse_encoder_predicts_its_whole_cell_by_pixel_shuffle() -> None:
    class Coarse(Encoder):
        width, takes, pyramid_strides = 7, frozenset({"replace"}), ((8, 8),)

    predictor = LinearPredictor(Coarse(), voxels=16, sizes={"content": 3 * 16})
    tokens, array = torch.randn(2, 6, 7), torch.randn(2, 3, 16, 20)  # 20: the encoder padded the view to 24
    stream = LatticeStream(array, (4, 4), None, None)
    encoded = Encoded(tokens, {}, torch.ones(2, 6, dtype=torch.bool), lattice=(2, 3))
    plan = Plan(torch.zeros(2, 20, dtype=torch.bool), torch.zeros(2, 20))
    cells = einops.rearrange(predictor.heads["content"](tokens), "b (h w) c -> b c h w", h=2)
    picture = nn.functional.pixel_shuffle(cells, 8)[..., :20]
    expected = nn.functional.unfold(picture, 4, stride=4).transpose(1, 2)
    torch.testing.assert_close(predictor(encoded, stream, plan)["content"].value, expected)


@pytest.mark.parametrize("encoder", ["unet: {widths: [4, 8, 8], blocks: [1, 1, 1]}", "timm: {model: resnet18}"])
def test_linear_read_out_of_array_encoders(encoder: str) -> None:
    """Stride 4 on patches of 4, and 32 on patches of 4: the coarsest map is read out over the whole view."""
    assembly = make("linear", "views.x={size: [64, 32]}", f"encoder={{{encoder}}}")
    loss = total(assembly(batch(torch.randn(2, 2, 64, 32)), 0.0))
    loss.backward()
    assert torch.isfinite(loss) and assembly.objectives["pixels"].predictor.heads["content"].weight.grad.abs().sum() > 0


def test_regions_add_up_and_each_readout_has_its_own_loss() -> None:
    content = "target: {content: {loss: l1}}"
    assembly = make("decoder", "objectives.pixels.masked.target=null", "objectives.pixels.masked.readouts="
                    f"{{h: {{{content}}}, v: {{{content}, region: visible, weight: 0.5}}, a: {{{content}, region: all}}}}")
    heads = assembly.objectives["pixels"].predictor.heads
    for name in ("v", "a"):
        heads[name].load_state_dict(heads["h"].state_dict())
    weight = torch.ones(2, 1, 16, 24)
    weight[1, :, :, 12:] = 0
    losses = assembly(batch(torch.randn(2, 2, 16, 24), weight), 0.0)
    assert set(losses) == {"pixels.h", "pixels.v", "pixels.a"}
    h, v, a = (losses[f"pixels.{name}"] for name in "hva")
    torch.testing.assert_close(h.total + v.total, a.total)
    assert float(h.count + v.count) == float(a.count) == 2 * float(weight.sum())
    assert (h.weight, v.weight) == (1.0, 0.5)


def test_a_batch_without_a_masked_row_has_no_loss() -> None:
    assembly = make("linear", "masking.x={block: {ratio: [0.1, 0.5], min_block: 1, prob: 0.000001, corruption: replace}}")
    loss = total(assembly(batch(torch.randn(2, 2, 16, 24)), 0.0))
    assert loss.item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_shows_visible_patches_as_they_are(kind: str) -> None:
    assembly = make(kind, "objectives.pixels.masked.target.content.normalise=token").eval()
    array = 3 + 2 * torch.randn(2, 2, 16, 24)
    assembly(batch(array), 0.0)
    step, objective = assembly.last_step, assembly.objectives["pixels"]
    assert step is not None and isinstance(objective, MaskedObjective)
    pictures = objective.reconstruct(step)
    hidden = einops.repeat(step.plan("x").hidden, "b (h w) -> b 1 (h p) (w q)", h=4, p=4, q=4).expand_as(array)
    assert torch.equal(pictures["original"], array)
    assert torch.equal(pictures["masked"].isnan(), hidden) and torch.equal(pictures["masked"][~hidden], array[~hidden])
    assert torch.equal(pictures["prediction"][~hidden], array[~hidden])
    assert not torch.equal(pictures["prediction"], array)

    class Perfect(nn.Module):
        """Answers with the truth, normalised by hand."""

        def forward(self, encoded: Encoded, stream: TokenStream, plan: Plan) -> dict[str, Prediction]:
            x = einops.rearrange(array, "b c (h p) (w q) -> b (h w) (c p q)", p=4, q=4)
            return {"content": Prediction((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt())}

    objective.predictor = Perfect()
    torch.testing.assert_close(objective.reconstruct(step)["prediction"], array)


def fields(rows: int, start: int, size: int = 16) -> Tensor:
    """Smooth random fields (rows, 1, size, size): three long waves each, of mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(start)
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).float() / size
    wave = torch.rand(rows, 3, 2, generator=generator) * 2 - 1
    phase = torch.rand(rows, 3, 1, 1, generator=generator) * 6.283
    array = (6.283 * torch.einsum("rwa,ahk->rwhk", wave, grid) + phase).sin().sum(1, keepdim=True)
    return (array - array.mean((2, 3), keepdim=True)) / array.std((2, 3), keepdim=True)


@pytest.mark.parametrize("smooth", [True, False])
def test_it_learns_smooth_fields_and_nothing_of_noise(smooth: bool) -> None:
    """Fresh fields every step. The mean as prediction scores 1; on noise nothing can do better, and nothing may."""
    torch.manual_seed(0)
    assembly = make("decoder", "modality.image.channels=1", "views.x={size: [16, 16]}", "masking.x.random.ratio=0.5",
                    "objectives.pixels.masked.target.content.normalise=none",
                    "objectives.pixels.masked.predictor.decoder={depth: 1, width: 48, heads: 4}")

    def draw(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        array = fields(32, step) if smooth else torch.randn(32, 1, 16, 16, generator=generator)
        return batch(array, start=32 * step)

    optimiser = torch.optim.AdamW(assembly.parameters(), 3e-3)
    for step in range(100):
        loss = total(assembly(draw(step), 0.0))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(assembly.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        fresh = torch.stack([total(assembly(draw(1000 + i), 0.0)) for i in range(4)]).mean()
    assert fresh < 0.6 if smooth else fresh > 0.97


def test_informative_follows_weight_and_validity() -> None:
    weight = torch.tensor([[[0.0, 0.0], [0.0, 0.1], [1.0, 1.0]]])
    stream = TokenStream(torch.zeros(1, 3, 2), None, torch.tensor([[True, True, False]]), None, weight=weight)
    assert informative(stream).tolist() == [[False, True, False]]
