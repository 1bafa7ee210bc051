"""Bags of visual words: the authors' values, what a bag is, what enters the vocabulary, whole recipes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.platform.assembly import Assembly, total
from meristem.platform.contrastive import words as module
from meristem.platform.contrastive.words import Vocabulary, WordWeights, bags, distances
from meristem.platform.objectives import Items
from meristem.platform.recipe import load
from meristem.platform.step import Batch

SMALL = ("encoder.unet={widths: [8, 12], blocks: [1, 1], decoder: false}", "views.x.size=[16, 16]", "views.g.size=[12, 12]",
         "views.l.size=[8, 8]", "views.l.count=3", "modality.image.patch=[4, 4]", "train.seed=1",
         "objectives.words.bag_of_words.words=24")


def assemble(*more: str) -> Assembly:
    torch.manual_seed(0)
    return Assembly(load("image/obow", [*SMALL, *more]))


def draw(assembly: Assembly, n: int = 6, first: int = 0) -> Batch:
    views = {}
    for name, options in assembly.recipe.views.items():
        rows = n * options.count
        view = assembly.recipe.modality.example(options.size, Rng.of(first, torch.arange(rows), name))
        view.item, view.look = torch.arange(n).repeat_interleave(options.count), torch.arange(options.count).repeat(n)
        views[name] = view
    return Batch(Items(torch.arange(n), torch.arange(first, first + n)), views)


def run(assembly: Assembly, batches: Sequence[Batch], progress: float) -> dict[str, float]:
    for batch in batches:
        losses = assembly(batch, progress)
    assembly.after(progress)
    return {name: float(loss.total.detach() / loss.count) for name, loss in losses.items()}


def step(progress: float) -> SimpleNamespace:
    return SimpleNamespace(progress=progress, gather=lambda units: units)


FIRST = SimpleNamespace(integers=lambda purpose, high: torch.arange(6) % high)  # row i gives its place i


def test_three_steps_are_the_authors() -> None:
    """valeoai/obow at 3758504: BoWExtractorMultipleLevels, BoWPredictor and OBoW._bow_loss in training, 12 words of 5 and of 7
    numbers, everything drawn from one generator in this order, its random places in order; one process.
    """
    g = torch.Generator().manual_seed(0)
    vocabularies, weights = [Vocabulary(12, c, 10.0) for c in (5, 7)], [WordWeights(c, 7) for c in (5, 7)]
    for vocabulary, width in zip(vocabularies, (5, 7), strict=True):
        vocabulary.queue.z.copy_(torch.randn(12, width, generator=g).clamp(min=0))
    for w in weights:
        for p in (w.layers[0].weight, w.layers[3].weight, w.layers[3].bias):
            p.data.copy_(torch.randn(p.shape, generator=g))
    found = []
    for i in range(3):
        maps = [torch.randn(6, c, n, n, generator=g).relu() for c, n in ((5, 7), (7, 5))]
        z, each = torch.randn(12, 7, generator=g).relu(), []
        for vocabulary, w, level in zip(vocabularies, weights, maps, strict=True):
            log_p = (5.0 * z @ w(vocabulary.queue.z).T).log_softmax(1)
            bag = vocabulary(level, torch.arange(6), FIRST, step(i / 3))
            each.append(F.kl_div(log_p, bag.repeat_interleave(2, 0), reduction="batchmean"))
        for vocabulary in vocabularies:
            vocabulary.after()
        found.append(float(torch.stack(each).mean().detach()))
        if i == 2:
            assert [float(v.near) for v in vocabularies] == pytest.approx([0.51943, 0.53401], abs=1e-5)
    assert found == pytest.approx([1.01652384, 1.46766186, 1.38770986], rel=1e-5)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_bag_is_a_distribution_over_words_that_forgets_where_they_were_met(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    features, words = torch.randn(3, 7, 4, generator=g), torch.randn(9, 4, generator=g)
    d = distances(features, words)
    assert torch.allclose(d, torch.cdist(features, words.expand(3, -1, -1)).square(), atol=1e-4)
    bag = bags(d, 2.0)
    assert torch.allclose(bag.sum(1), torch.ones(3), atol=1e-5)
    assert torch.allclose(bag, bags(distances(features[:, torch.randperm(7)], words), 2.0), atol=1e-5)
    met = F.one_hot(d.argmin(2), 9).amax(1).float()  # sharp: the words that are nearest to some feature, each alike
    assert torch.allclose(bags(d.double(), 1e7), (met / met.sum(1, keepdim=True)).double(), atol=1e-3)


def test_the_vocabulary_takes_one_local_mean_of_each_picture_after_the_step() -> None:
    vocabulary, maps = Vocabulary(16, 3, 10.0), torch.randn(6, 3, 7, 5)
    before = vocabulary.queue.z.clone()
    vocabulary(maps[:2], torch.arange(2), SimpleNamespace(integers=lambda p, high: torch.arange(2) % high), step(0.1))
    vocabulary(maps[2:], torch.arange(4), SimpleNamespace(integers=lambda p, high: torch.arange(2, 6) % high), step(0.1))
    assert torch.equal(vocabulary.queue.z, before)
    vocabulary.after()
    for i in range(6):  # inside the border 5 × 3, so there are 3 × 1 means of 3 × 3
        expected = maps[i, :, 1 + i % 3:4 + i % 3, 1:4].mean((1, 2))
        assert torch.allclose(vocabulary.queue.z[i], expected, atol=1e-5)
    assert torch.equal(vocabulary.queue.z[6:], before[6:])
    vocabulary.eval()
    vocabulary(maps, torch.arange(6), FIRST, step(0.2))
    vocabulary.after()
    assert int(vocabulary.queue.place) == 6


def test_the_mean_distance_is_over_ranks_and_micro_batches_and_forgets_skipped_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, maps = Vocabulary(16, 3, 10.0), torch.randn(6, 3, 5, 5)
    nearest = distances(maps[:, :, 1:-1, 1:-1].flatten(2).transpose(1, 2), vocabulary.queue.z).amin(2).mean(1)
    vocabulary(maps * 1e3, torch.arange(6), FIRST, step(0.0))  # not finite, say: no after()
    monkeypatch.setattr(module, "all_ranks", lambda x: torch.cat([x, torch.full_like(x, 4.0)]))
    first = SimpleNamespace(integers=lambda purpose, high: torch.zeros(3, dtype=torch.int64))
    for part in (maps[:3], maps[3:]):
        vocabulary(part, torch.arange(3), first, step(0.1))
    vocabulary.after()
    assert float(vocabulary.near) == pytest.approx(0.99 * 0.5 + 0.01 * (float(nearest.mean()) + 4.0) / 2, rel=1e-5)


def test_the_recipe_shares_passes_and_teaches_only_the_student() -> None:
    assembly = assemble()
    losses = assembly(draw(assembly), 0.0)
    assert set(losses) == {"words.g", "words.l"} and [float(loss.count) for loss in losses.values()] == [12, 18]
    assert assembly.last_step is not None and sorted(assembly.last_step.passes) == ["encoder(g)", "encoder(l)", "teacher(x)"]
    total(losses).backward()
    for name, p in assembly.named_parameters():
        assert (p.grad is None) == name.startswith("teacher."), name
    assert len(assembly.objectives["words"].vocabularies) == 2
    assert [v.queue.z.shape for v in assembly.objectives["words"].vocabularies] == [(24, 8), (24, 12)]


def test_every_look_is_held_against_the_bag_of_its_own_picture() -> None:
    assembly = assemble().eval()
    batch = draw(assembly)
    whole = assembly(batch, 0.0)
    parts = [assembly(part, 0.0) for part in batch.split(3)]
    for name, loss in whole.items():
        assert sum(float(p[name].total.detach()) for p in parts) == pytest.approx(float(loss.total.detach()), rel=1e-4)
    x = batch.views["x"]
    x.array = x.array.roll(1, 0)  # each picture gets another's bag
    other = float(assembly(batch, 0.0)["words.g"].total.detach())
    assert other != pytest.approx(float(whole["words.g"].total.detach()), rel=1e-4)


def test_it_learns_and_resumes() -> None:
    assembly, batch = assemble(), draw(assemble())
    optimiser = torch.optim.AdamW([p for p in assembly.parameters() if p.requires_grad], lr=2e-3)
    for vocabulary in assembly.objectives["words"].vocabularies:
        vocabulary.eval()  # the words stand still, so that the losses can be compared
    course = []
    for _ in range(30):
        losses = assembly(batch, 0.0)
        course.append(float(total(losses).detach()))
        optimiser.zero_grad()
        total(losses).backward()
        optimiser.step()
        assembly.after(0.0)
    assert course[-1] < 0.5 * course[0]
    going, resumed = assemble(), assemble()
    for i in range(2):
        run(going, [draw(going, first=6 * i)], i / 10)
    resumed.load_state_dict(going.state_dict())
    assert run(going, [draw(going, first=12)], 0.2) == run(resumed, [draw(resumed, first=12)], 0.2)
    for name, x in going.objectives.state_dict().items():
        assert torch.equal(x, resumed.objectives.state_dict()[name])


@pytest.mark.parametrize(("changes", "says"), [
    (("encoder.transformer={width: 24, depth: 1, heads: 2}",), "this encoder has no pyramid of maps"),
    (("teacher=null",), "add 'encoder' to teacher.of"),
    (("objectives.words.bag_of_words.queries=[g, m]",), "there is no view 'm'"),
    (("views.x.count=2",), "the words of 'x' are those of one look"),
])
def test_what_cannot_be_is_refused_with_the_reason(changes: tuple[str, ...], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        load("image/obow", changes)
    assert says in str(error.value)


@pytest.mark.parametrize(("changes", "says"), [(("views.x.size=[4, 8]",), "that is all border"),
                                               (("objectives.words.bag_of_words.levels=3",), "the encoder has 2 maps")])
def test_what_the_encoder_has_no_words_for_is_refused_when_it_is_built(changes: tuple[str, ...], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        assemble(*changes)
    assert says in str(error.value)
