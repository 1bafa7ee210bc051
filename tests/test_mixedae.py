"""Mixtures: each place is filled by one sample of a group, and un-mixing returns every sample its own tokens alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.platform.assembly import Assembly
from meristem.platform.masked.mixing import Mixture
from meristem.platform.objectives import Items
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

SMALL = ["modality.image={channels: 1, patch: 4}", "views.x.size=[20,20]", "train.batch=8",
         "encoder.transformer={width: 48, depth: 2, heads: 4}", "heads.homologous.mlp.hidden=32",
         "objectives.pixels.masked.predictor.decoder={depth: 1, width: 24, heads: 2}"]


def step(*more: str, rows: int = 8, first: int = 0) -> Step:
    recipe = load("image/mixedae", [*SMALL, *more])
    number = torch.arange(rows)
    torch.manual_seed(0)
    view = recipe.modality.example((20, 20), Rng.of(5, number))
    return Step(Assembly(recipe).eval(), Batch(Items(number, number + first), {"x": view}), 0.5, 0)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 60), group=st.integers(2, 4), groups=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_the_kept_tokens_of_a_group_tile_the_lattice(n: int, group: int, groups: int, seed: int) -> None:
    recipe = load("image/mixedae", SMALL)
    view = recipe.modality.example((4, 4 * n), Rng.of(1, torch.arange(group * groups)))
    stream = recipe.modality.tokenizer().stream(view)
    plan = Mixture(group=group).plan(stream, Rng.of(seed, torch.arange(group * groups), "mask"), (1, 1))
    assert plan.keep is not None and plan.keep.shape == (group * groups, n // group)
    for rows in plan.keep.split(group):
        places = rows.flatten().tolist()
        assert len(set(places)) == len(places) == n // group * group
    visible = torch.zeros_like(plan.hidden).scatter(1, plan.keep, True)
    assert torch.equal(visible, ~plan.hidden) and torch.equal(plan.predict, plan.hidden.float())


def test_unmixing_returns_each_sample_its_own_tokens() -> None:
    """Without blocks between, what comes out of the mixture is what each sample's own tokens are embedded as, in order."""
    made = step()
    encoder, plan = made.assembly.encoder, made.plan("x")
    encoder.blocks.blocks = torch.nn.ModuleList()
    with torch.no_grad():
        encoded = encoder(made.stream("x").seen(frozenset({"position"})), plan)
        assert plan.keep is not None
        alone = encoder.blocks.norm(encoder.embed(made.stream("x").take(plan.keep)))
    assert torch.equal(encoded.tokens, alone) and torch.equal(encoded.index, plan.keep)
    torch.testing.assert_close(encoded.summary["mean"], alone.mean(1))


def test_samples_of_a_group_see_each_other_and_no_other_group() -> None:
    made = step("masking.x.mixture.attend=null")
    view, before = made.view("x"), made.encode("x", masked=True).tokens.detach()
    array = view.array.clone()
    array[1] = torch.randn_like(array[1])
    other = Step(made.assembly, Batch(made.batch.items, {"x": replace(view, array=array)}), 0.5, 0)
    changed = (other.encode("x", masked=True).tokens.detach() != before).flatten(1).any(1)
    assert changed.tolist() == [True] * 4 + [False] * 4


def test_a_sequence_of_a_group_is_the_mixed_picture() -> None:
    """The brute force: the picture in which each place shows the patch of the sample that keeps it, encoded as one sample."""
    made = step("masking.x.mixture.attend=null", "views.x.size=[24,24]")  # 36 places, none left over
    view = made.assembly.recipe.modality.example((24, 24), Rng.of(5, torch.arange(8)))
    view = replace(view, frame=replace(view.frame, spacing=torch.ones(8, 2)))
    made = Step(made.assembly, Batch(made.batch.items, {"x": view}), 0.5, 0)
    plan, content = made.plan("x"), made.stream("x").content
    assert plan.keep is not None
    mixed = torch.where(plan.hidden[..., None], 0, content).unflatten(0, (2, 4)).sum(1)
    array = made.assembly.tokenizer.fold(mixed, (6, 6))
    picture = replace(view.select(torch.arange(2)), array=array)
    with torch.no_grad():
        whole = made.assembly.encoder(made.assembly.tokenizer.stream(picture).seen(frozenset({"position"})))
        mixture = made.encode("x", masked=True)
    together = whole.tokens.repeat_interleave(4, 0).gather(1, plan.keep[..., None].expand(-1, -1, 48))
    torch.testing.assert_close(mixture.tokens, together, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixture.summary["cls"], whole.summary["cls"].repeat_interleave(4, 0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attend", [0.1, 0.25, 1.0])
def test_a_token_attends_to_the_best_share_and_to_the_class_token(attend: float) -> None:
    """Against a sort of the scores of dense attention; both passes see the same input of the first block."""
    made = step(f"masking.x.mixture.attend={attend}", "encoder.transformer={width: 48, depth: 1, heads: 4}")
    plan, stream = made.plan("x"), made.stream("x").seen(frozenset({"position"}))
    with torch.no_grad():
        few = made.assembly.encoder(stream, plan, want=frozenset({"attention"})).attention
        all_ = made.assembly.encoder(stream, replace(plan, attend=None), want=frozenset({"attention"})).attention
    assert few is not None and all_ is not None and few.shape == (2, 4, 25, 25)  # 24 of 25 places, and the class token
    k = max(round(24 * attend), 1)
    best = all_[..., 1:, 1:].sort(-1, descending=True).indices[..., :k]
    chosen = torch.zeros(2, 4, 24, 24, dtype=torch.bool).scatter(-1, best, True)
    assert torch.equal(few[..., 1:, 1:] > 0, chosen)
    assert (few[..., 0] > 0).all() and (few[..., 0, :] > 0).all()
    kept = torch.where(torch.nn.functional.pad(chosen, (1, 0), value=True), all_[..., 1:, :], 0)
    torch.testing.assert_close(few[..., 1:, :], kept / kept.sum(-1, keepdim=True))


def test_the_homologous_loss_is_the_double_loop() -> None:
    """− 1/|P| Σ_{j in P} log (exp(s_ij / τ) / Σ_{m ≠ i} exp(s_im / τ)) within a mixture, P the other tokens of i's sample."""
    made = step(first=40)  # the second group of a run is told from the first by more than its place in the batch
    with torch.no_grad():
        loss = made.assembly.objectives["homologous"](made)[""]
    z = made.assembly.heads["homologous"](made.encode("x", masked=True).tokens, torch.zeros(1)).detach()
    z = torch.nn.functional.normalize(z, dim=-1)
    terms = []
    for group in z.split(4):
        rows = [(sample, vector) for sample, tokens in enumerate(group) for vector in tokens]
        for i, (sample, vector) in enumerate(rows):
            score = [float(vector @ other) / 0.25 for _, other in rows]
            bottom = math.log(sum(math.exp(s) for j, s in enumerate(score) if j != i))
            own = [bottom - s for j, s in enumerate(score) if j != i and rows[j][0] == sample]
            terms.append(sum(own) / len(own))
    assert float(loss.total / loss.count) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert loss.weight == 0.1


def test_no_gradient_of_a_sample_s_decoding_asks_for_another_s_pixels() -> None:
    """A sample is decoded from its own tokens: without blocks in the encoder, its loss depends on its own picture alone."""
    made = step()
    made.assembly.encoder.blocks.blocks = torch.nn.ModuleList()
    view = made.view("x")
    array = view.array.clone().requires_grad_()
    own = Step(made.assembly, Batch(made.batch.items, {"x": replace(view, array=array)}), 0.5, 0)
    predicted: Tensor = made.assembly.objectives["pixels"]._predict(own, own.plan("x"), "x")["content"].value
    predicted[2].sum().backward()
    assert array.grad is not None
    assert array.grad.abs().flatten(1).sum(1).gt(0).tolist() == [row == 2 for row in range(8)]


@pytest.mark.parametrize(("recipe", "over", "says"), [
    ("image/mixedae", ["train.batch=30"], "groups of 4 do not fill a batch of 30"),
    ("image/mixedae", ["train.batch=12", "train.accumulate=2"], "set train.batch to a multiple of 8"),
    ("image/mixedae", ["views.x.count=2"], "would mix a sample with itself"),
    ("image/mixedae", ["encoder={unet: {}}"], "several samples into one sequence, which this encoder cannot take"),
    ("points/mae", ["masking.x={mixture: {}}"], "points data are sets")])
def test_what_cannot_be_mixed_is_refused(recipe: str, over: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, over)


@pytest.mark.parametrize(("size", "rows", "says"), [([20, 20], 6, "no whole number of groups"),
                                                    ([4, 8], 8, "cannot be shared")])
def test_what_a_batch_cannot_give_is_refused(size: list[int], rows: int, says: str) -> None:
    recipe = load("image/mixedae", [*SMALL, f"views.x.size={size}"])
    number = torch.arange(rows)
    view = recipe.modality.example(tuple(size), Rng.of(5, number))
    with pytest.raises(RecipeError, match=says):
        Step(Assembly(recipe), Batch(Items(number, number), {"x": view}), 0.5, 0).plan("x")
