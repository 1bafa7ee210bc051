"""Maskings that follow a score: attention of a teacher (AttMask) and coloured noise (ColorMAE)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.rng import Rng
from meristem.modalities.stream import LatticeStream
from meristem.platform.assembly import Assembly, total
from meristem.platform.contrastive.losses import centred, cross_entropy
from meristem.platform.contrastive.relations import Relation
from meristem.platform.masked.guides import Attention, Guided, Noise
from meristem.platform.objectives import Items, Units
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

TINY = "encoder.transformer={width: 48, depth: 2, heads: 4}"


def lattice(shape: tuple[int, ...], batch: int) -> LatticeStream:
    return LatticeStream(torch.zeros(batch, 1, *shape), (1,) * len(shape), None, torch.arange(batch))


def rng(batch: int) -> Rng:
    return Rng.of(0, torch.arange(batch), "guided")


def batch(recipe: str, over: list[str], rows: int = 4) -> tuple[Assembly, Batch]:
    built, item = load(recipe, [TINY, *over]), torch.arange(rows)
    views: dict[str, View] = {}
    for name, asked in built.views.items():
        n = rows * asked.count
        view = built.modality.example(tuple(asked.size), Rng.of(1, torch.arange(n), name))
        views[name] = replace(view, name=name, item=torch.arange(n) // asked.count, look=torch.arange(n) % asked.count)
    return Assembly(built), Batch(Items(item, item), views)


def test_masks_and_losses_are_those_of_the_authors_code() -> None:
    """attmask.py and main_attmask.py of gkakogeorgiou/attmask at 9f62061: AttMask(rand(6, 40), 1, high or low, 0.3), and
    iBOTLoss (two crops of three pictures, temperatures 0.1, 0.04 and 0.07, centre 0) of student and teacher class tokens
    randn(6, 16) and patch tokens randn(6, 40, 16), drawn in this order of manual_seed(0): numbers of the hidden tokens summed,
    and both lines."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(6, 40, generator=generator)
    cls, cls_teacher = (torch.randn(6, 16, generator=generator) for _ in range(2))
    patch, patch_teacher = (torch.randn(6, 40, 16, generator=generator) for _ in range(2))
    hidden = {}
    for hide in ("highest", "lowest"):
        masking = Guided(guide="attention", ratio=0.3, hide=hide, corruption="replace")
        hidden[hide] = masking.follow(attention, lattice((5, 8), 6), rng(6), ()).hidden
    number = torch.arange(40)
    assert (hidden["highest"] * number).sum(1).tolist() == [276, 251, 202, 239, 236, 241]
    assert (hidden["lowest"] * number).sum(1).tolist() == [273, 210, 222, 246, 255, 227]

    key = {"item": torch.arange(6) % 3, "view": torch.arange(6) // 3}
    dense = {k: x.repeat_interleave(40) for k, x in key.items()}
    dense |= {"token": number.repeat(6), "hidden": hidden["highest"].flatten().long()}
    for q, t, keys, text, temperature, figure in (
            (cls, cls_teacher, key, "same(item) - same(view)", 0.04, 10.95650863647461),
            (patch.flatten(0, 1), patch_teacher.flatten(0, 1), dense, "same(item) & same(view) & same(token) & hidden", 0.07,
             16.432756423950195)):
        queries, targets = Units(q, keys, torch.ones(len(q))), Units(t, keys, torch.ones(len(t)))
        loss = cross_entropy(queries, centred(t, torch.zeros(16), temperature), Relation(text).matches(queries, targets), 0.1)
        assert float(loss.total / loss.count) == pytest.approx(figure, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(2, 6), min_size=1, max_size=3), ratio=st.floats(0.3, 0.7),
       hide=st.sampled_from(("highest", "lowest")))
def test_nothing_shown_scores_beyond_what_is_hidden(shape: list[int], ratio: float, hide: str) -> None:
    n = math.prod(shape)
    score = torch.rand(3, n)
    plan = Guided(guide="attention", ratio=ratio, hide=hide).follow(score, lattice(tuple(shape), 3), rng(3), ())
    assert (plan.hidden.sum(1) == math.floor(n * ratio + 0.5)).all()
    shown, gone = score.masked_fill(plan.hidden, torch.nan), score.masked_fill(~plan.hidden, torch.nan)
    for s, g in zip(shown, gone, strict=True):
        s, g = s[~s.isnan()], g[~g.isnan()]
        assert s.max() <= g.min() if hide == "highest" else s.min() >= g.max()


def test_hints_show_as_large_a_part_of_the_top_as_is_hidden() -> None:
    """Their show_hints with 200 tokens, ratio 0.3 and 0.1: 54 of 200 hidden, 70 % of the 20 attended to most."""
    score = torch.rand(200, 200)
    masking = Guided(guide="attention", ratio=0.3, hints=0.1, corruption="replace")
    hidden = masking.follow(score, lattice((10, 20), 200), rng(200), ()).hidden
    top = hidden.gather(1, score.argsort(descending=True)[:, :20])
    assert (hidden.sum(1) == 54).all() and (top.sum(1) == 14).all()
    assert len({tuple(row.tolist()) for row in top}) > 150


def test_units_padding_ranges_and_chance() -> None:
    score = torch.rand(400, 64)
    stream = lattice((8, 8), 400)
    cells = Guided(guide="attention", ratio=0.5, unit=2).follow(score, stream, rng(400), ()).hidden.reshape(-1, 4, 2, 4, 2)
    assert (cells.flatten(1).sum(1) == 32).all() and torch.equal(cells[:, :, :1, :, :1].expand_as(cells), cells)
    masking = Guided(guide="attention", ratio=(0.1, 0.5), prob=0.5, corruption="replace")
    some = masking.follow(score, stream, rng(400), ()).hidden.sum(1)
    assert float((some > 0).float().mean()) == pytest.approx(0.5, abs=0.1)
    assert some.max() == 32 and 4 <= some[some > 0].min() <= 9
    weight = torch.ones(2, 1, 8, 8)
    weight[1, :, :, 4:] = 0
    stream = LatticeStream(torch.zeros(2, 1, 8, 8), (1, 1), None, torch.arange(2), weight)
    plan = Guided(guide="attention", ratio=0.25).follow(score[:2], stream, rng(2), ())
    assert plan.hidden.sum(1).tolist() == [16, 16] and plan.predict.sum(1).tolist() == [16, 8]


def test_one_pass_of_the_teacher_tells_what_to_hide_and_what_to_learn() -> None:
    assembly, data = batch("image/attmask", [])
    losses = assembly(data, 0.0)
    assert set(losses) == {"cls", "patch"} and assembly.last_step is not None
    assert assembly.last_step.passes == ["teacher(g)", "encoder(g, plan)", "encoder(l)"]
    score = Attention().score(assembly.last_step, "g")
    attention = assembly.last_step.encode("g", by="teacher", want=frozenset({"attention"})).attention
    assert attention is not None and score.shape == (8, 64) and not score.requires_grad
    assert len(assembly.last_step.passes) == 3
    hidden = assembly.last_step.plan("g").hidden
    for row in torch.nonzero(hidden.any(1)).flatten():
        shown = (~hidden[row]) & (score[row] > score[row][hidden[row]].min())
        assert shown.sum() <= 6 * 0.5 + 1  # none but hints
    total(losses).backward()
    assert all(p.grad is None for p in assembly.teacher.parameters())


def test_attmask_resumes_from_its_state() -> None:
    """Weights, teacher and centres decide the next step: a second assembly that is given them goes on alike."""
    (going, data), (resumed, _) = batch("image/attmask", ["views.l.count=1"]), batch("image/attmask", ["views.l.count=1"])
    optimiser = torch.optim.AdamW([p for p in going.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        loss = total(going(data, 0.1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        going.after(0.1)
    assert total(going(data, 0.2)) != total(resumed(data, 0.2))
    resumed.load_state_dict(going.state_dict())
    assert total(going(data, 0.2)) == total(resumed(data, 0.2))


def test_blurs_are_those_of_a_convolution() -> None:
    """The filters beside a direct sum with sampled Gaussians, on a ring."""
    n, impulse = 32, torch.zeros(32)
    impulse[0] = 1
    far = torch.minimum(torch.arange(n), n - torch.arange(n)).float()
    gauss = {s: torch.exp(-far**2 / (2 * s**2)) / (s * math.sqrt(2 * math.pi)) for s in (1.0, 2.5)}
    made = {"red": gauss[2.5], "blue": impulse - gauss[1.0], "green": gauss[1.0] - gauss[2.5],
            "purple": impulse - gauss[1.0] + gauss[2.5]}
    for colour, expected in made.items():
        filtered = torch.fft.ifft(Noise(colour=colour, narrow=1.0, wide=2.5).gain((n,))).real
        torch.testing.assert_close(filtered, expected, atol=1e-3, rtol=0)


def alike(masks: torch.Tensor) -> float:
    """Share of neighbours that are both hidden or both shown."""
    return float((masks[:, 1:] == masks[:, :-1]).float().mean() + (masks[:, :, 1:] == masks[:, :, :-1]).float().mean()) / 2


def test_masks_of_noise_are_those_of_the_authors_code() -> None:
    """models/utils/masking_generator.py of carlosh93/ColorMAE at f0ad557: color_noise_mask of rand(4, 14, 14) of
    manual_seed(0), ratio 0.75: numbers of the hidden tokens, summed. Their stored patterns are not in the repository."""
    window = torch.rand(4, 196, generator=torch.Generator().manual_seed(0))
    hidden = Guided(guide="noise", ratio=0.75, hide="lowest").follow(window, lattice((14, 14), 4), rng(4), ()).hidden
    assert (hidden * torch.arange(196)).sum(1).tolist() == [14197, 13494, 14461, 14357]


def test_colours_make_blobs_or_keep_tokens_apart() -> None:
    masks = {}
    for colour in ("red", "green", "purple", "blue"):
        noise = Noise(colour=colour, narrow=0.5, wide=1.5).noise((14, 14), rng(200))
        masks[colour] = Guided(guide="noise", ratio=0.75, hide="lowest").follow(
            noise.flatten(1), lattice((14, 14), 200), rng(200), ()).hidden.reshape(-1, 14, 14)
    chance = 0.75**2 + 0.25**2
    assert alike(masks["red"]) > alike(masks["green"]) > chance + 0.02 and alike(masks["blue"]) < chance - 0.02
    red = Noise(colour="red", wide=1.5).noise((14, 14), rng(200))
    ends = torch.corrcoef(torch.stack([red[:, 0, 0], red[:, 0, -1], red[:, 0, 1]]))
    assert abs(ends[0, 1]) < 0.25 and ends[0, 2] > 0.7  # it does not close into a ring


@pytest.mark.parametrize("recipe", ["image/colormae", "volume/colormae"])
def test_the_noise_knows_nothing_of_the_data_and_each_sample_has_its_own(recipe: str) -> None:
    assembly, data = batch(recipe, [])
    plans = [Step(assembly, Batch(data.items, {"x": replace(data.views["x"], array=array)}), 0.0, 0).plan("x")
             for array in (data.views["x"].array, torch.zeros_like(data.views["x"].array))]
    assert torch.equal(plans[0].hidden, plans[1].hidden)
    n = plans[0].hidden.shape[1]
    assert len({tuple(row.tolist()) for row in plans[0].hidden}) == 4 and (plans[0].hidden.sum(1) == n * 3 // 4).all()
    alone = Batch(Items(torch.tensor([2]), torch.tensor([2])), {"x": data.views["x"].select(torch.tensor([2]))})
    alone.views["x"].item = torch.tensor([0])
    assert torch.equal(Step(assembly, alone, 0.0, 0).plan("x").hidden[0], plans[0].hidden[2])


@pytest.mark.parametrize(("recipe", "over", "says"), [
    ("points/mae", ["masking.x={guided: {guide: noise}}"], "points data are sets"),
    ("image/mae", ["masking.x={guided: {guide: attention}}"], "follows the attention of a teacher, and there is none"),
    ("image/mae-unet", ["masking.x={guided: {guide: attention, corruption: replace}}"], "this encoder gives no attention"),
    ("image/attmask", ["encoder.transformer.cls=false"], "this encoder gives no cls"),
    ("image/colormae", ["masking.x.guided.hints=0.1"], "hints: rows then hide different numbers"),
    ("image/colormae", ["masking.x.guided.guide.noise.wide=0.4"], "narrow 0.5 must be less than wide 0.4"),
    ("image/colormae", ["masking.x.guided.ratio=[0.1, 0.5]"], "a range of ratios"),
    ("image/colormae", ["masking.x.guided.guide=nose"], "did you mean noise")])
def test_what_cannot_be_followed_is_refused(recipe: str, over: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, over)
