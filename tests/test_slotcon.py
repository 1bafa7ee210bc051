"""Levels made of whole maps: places that looks have in common, slots; and what SlotCon does with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_maps import batch, boxed, cells, rand
from torch import Tensor
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.platform.assembly import Assembly, total
from meristem.platform.contrastive.levels import Common, Slots, pooled, shared_places
from meristem.platform.contrastive.losses import DINO, InfoNCE
from meristem.platform.contrastive.relations import Relation
from meristem.platform.objectives import Encoded, Units
from meristem.platform.recipe import load
from meristem.platform.step import Step

TINY = {"transformer": ["encoder.transformer={width: 24, depth: 2, heads: 2}"],
        "unet": ["encoder={unet: {widths: [4, 8, 8], blocks: [1, 1, 1], decoder: false}}"]}
BOXES = torch.tensor([[.0, .1, .6, .9], [.2, .2, 1., .7], [.1, 0., .5, .5],  # two looks at three samples: x, y, x, y
                      [.3, .0, 1., .8], [.0, .1, .7, .9], [.2, .1, .9, .8]])
MIRRORED = (True, False, False, False, False, True)
ITEM, LOOK = torch.arange(3).repeat(2), torch.arange(2).repeat_interleave(3)
WIDTH, COUNT = 8, 40


def made(net: str = "transformer", *more: str) -> Assembly:
    torch.manual_seed(0)
    return Assembly(load("image/slotcon", [*TINY[net], "views.v.size=[16,16]", "modality.image.patch=4", *more]))


def theirs() -> Any:
    """Two looks, some mirrored, at three samples: maps (6, 8, 7, 7) of numpy's default_rng(0), (1) for the student and (2), (3)
    for the teacher, prototypes (40, 8) of seeds 4 and 5, in place of a step.
    """
    frame = boxed(BOXES, (7, 7), MIRRORED)
    maps = {by: torch.cat([rand(3, WIDTH, 7, 7, seed=first + i) for i in (0, 1)])
            for by, first in (("encoder", 0), ("teacher", 2))}
    prototypes = {"encoder": rand(COUNT, WIDTH, seed=4), "teacher": rand(COUNT, WIDTH, seed=5)}

    def units(view: str, by: str, level: str, head: str, masked: bool) -> Units:
        x = maps[by]
        z = x if head == "projector" else torch.einsum("kd,bdhw->bkhw", F.normalize(prototypes[by]), F.normalize(x))
        table = cells(z, frame, 0)
        table.key.update(item=ITEM.repeat_interleave(49), view=LOOK.repeat_interleave(49))
        return table

    def encode(view: str, by: str, masked: bool) -> Encoded:
        tokens = maps[by].flatten(2).transpose(1, 2)
        return Encoded(tokens, {}, torch.ones(6, 49, dtype=torch.bool), lattice=(7, 7), frame=frame)

    view = View("v", torch.zeros(6, 1, 7, 7), frame, ITEM, LOOK)
    return SimpleNamespace(units=units, encode=encode, view=lambda name: view, value=lambda x: x, progress=0.0)


def of(units: Units, look: int) -> Units:
    return units.select(units.key["view"] == look)


def test_places_in_common_are_those_that_the_authors_align_maps_at() -> None:
    """`invaug` of CVMI-Lab/SlotCon at 30ff33d on the first look's scores."""
    found = Common(points=7).units(theirs(), "v", "encoder", "groups", False)
    assert len(found) == 6 * 49
    aligned = of(found, 0).z.unflatten(0, (3, 7, 7))
    torch.testing.assert_close(aligned[0, 2, 5, :3], torch.tensor([-0.24721390008926392, 0.08235025405883789,
                                                                  0.04054030030965805]), atol=1e-5, rtol=1e-5)
    assert float(aligned.square().sum()) == pytest.approx(398.239501953125, rel=1e-5)


def test_the_grouping_loss_is_the_authors() -> None:
    """`self_distill` of the same, in both directions; centre 0.1 times numpy's default_rng(6)."""
    loss, step = DINO(teacher_temperature=0.07).build(COUNT), theirs()
    relation = Relation("same(item) & same(token) - same(view)")
    loss.centre.copy_(rand(1, COUNT, seed=6)[0] * 0.1)
    q, k = (Common(points=7).units(step, "v", by, "groups", False) for by in ("encoder", "teacher"))
    for look, expected in enumerate((5.9450249671936035, 5.953878402709961)):
        total, count, _ = loss(of(q, look), of(k, 1 - look), relation, step)
        assert float(count) == 3 * 49 and float(total / count) == pytest.approx(expected, rel=1e-5)


def test_the_contrast_of_slots_is_the_authors() -> None:
    """`SemanticGrouping` and `ctr_loss_filtered` of the same, without a predictor; that loss holds a factor of 2 · 0.2 more."""
    level, step, loss = Slots(groups="groups"), theirs(), InfoNCE(temperature=0.2).build(WIDTH)
    q, k = (level.units(step, "v", by, "projector", False) for by in ("encoder", "teacher"))
    assert q.weight.unflatten(0, (2, -1)).sum(1).tolist() == [81, 80]
    torch.testing.assert_close(q.z.unflatten(0, (6, COUNT))[1, 2, :3], torch.tensor([-1.165321707725525, 0.33341339230537415,
                                                                                    -0.18455542623996735]))
    relation = Relation("same(item) & same(slot) - same(view)", "~same(view)")
    for look, expected in enumerate((2.4123711585998535, 2.305096387863159)):
        total, count, _ = loss(of(q, look), of(k, 1 - look), relation, step)
        assert float(total / count) * 0.4 == pytest.approx(expected, rel=1e-5)
    both = loss(q, k, relation, step)  # the recipe's line: keys of the other look only repel
    parts = [loss(of(q, look), of(k, 1 - look), relation, step) for look in (0, 1)]
    assert float(both.total) == pytest.approx(sum(float(part.total) for part in parts), rel=1e-5)


def test_slots_by_a_double_loop() -> None:
    x, scores = rand(2, 5, 3, seed=0), rand(2, 5, 4, seed=1) * 0.2
    z, wins = pooled(x, scores, 0.1)
    for b in range(2):
        share = [[float(torch.exp(scores[b, n, k] / 0.1) / torch.exp(scores[b, n] / 0.1).sum()) + 1e-6 for k in range(4)]
                 for n in range(5)]
        for k in range(4):
            mass = sum(share[n][k] for n in range(5))
            torch.testing.assert_close(z[b, k], sum(share[n][k] * x[b, n] for n in range(5)) / mass)
            assert bool(wins[b, k]) == any(max(range(4), key=lambda j, n=n: share[n][j]) == k for n in range(5))


def test_looks_share_the_same_points_or_none() -> None:
    """A turned look, a small one inside a large one, and two that lie apart."""
    frame = boxed(torch.tensor([[0., 0., 4., 4.], [1., 1., 2., 3.], [0., 0., 1., 1.], [2., 2., 3., 3.], [0., 0., 4., 4.],
                                [0., 0., 4., 4.]]), (4, 4))
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    frame.affine[5, :2, :2] = turn
    frame.affine[5, :2, 2] = 2 - turn @ torch.tensor([1.5, 1.5])
    at, shown = shared_places(frame, torch.arange(3).repeat_interleave(2), 5)
    assert torch.equal(at[::2], at[1::2]) and torch.equal(shown[::2], shown[1::2])
    assert shown[0].all() and not shown[2].any() and 0 < int(shown[4].sum()) < 25
    assert at[0].amin(0).tolist() == pytest.approx([1.2, 1.1]) and at[0].amax(0).tolist() == pytest.approx([2.8, 1.9])
    for row in (4, 5):
        assert torch.equal(frame.from_source(at)[1][row] | ~shown[row], torch.ones(25, dtype=torch.bool))


@pytest.mark.parametrize("net", ["transformer", "unet"])
def test_the_recipe_trains_with_two_passes_and_goes_on_from_its_state(net: str) -> None:
    assembly = made(net)
    data, course = batch(assembly), []
    optimiser = torch.optim.AdamW([p for p in assembly.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(8):
        losses = assembly(data, 0.0)
        assert assembly.last_step is not None and assembly.last_step.passes == ["encoder(v)", "teacher(v)"]
        course.append(float((losses["slots"].total / losses["slots"].count).detach()))
        optimiser.zero_grad()
        total(losses).backward()
        optimiser.step()
        assembly.after(0.0)
    assert course[-1] < 0.9 * course[0]
    assert assembly.objectives["grouping"].loss.centre.abs().sum() > 0
    other = made(net)
    other.load_state_dict(assembly.state_dict())
    for a, b in zip(assembly(data, 0.0).values(), other(data, 0.0).values(), strict=True):
        assert torch.equal(a.total, b.total)


def test_looks_without_a_place_in_common_lose_nothing_and_leave_the_centre_alone() -> None:
    assembly = made()
    data = batch(assembly, 2)
    view = data.views["v"]
    frame = boxed(torch.tensor([[0., 0., 8., 8.], [9., 9., 16., 16.]]).repeat(2, 1), (16, 16))
    data.views["v"] = View("v", view.array, frame, view.item, view.look)
    losses = assembly(data, 0.0)
    loss = total(losses)
    loss.backward()
    assembly.after(0.0)
    assert float(losses["grouping"].total.detach()) == 0 and torch.isfinite(loss)
    assert (assembly.objectives["grouping"].loss.centre == 0).all()


def test_volumes_have_slots_too() -> None:
    assembly = Assembly(load("volume/slotcon", [*TINY["unet"], "views.v.size=[16,16,16]"]))
    frame = Frame(torch.eye(4).repeat(4, 1, 1), (16, 16, 16), torch.ones(4, 3), ("mm",) * 3)
    data = batch(made(), 2)
    rows = torch.arange(4)
    data.views["v"] = View("v", torch.randn(4, 1, 16, 16, 16), frame, rows // 2, rows % 2)
    losses = assembly(data, 0.0)
    assert float(losses["grouping"].count) == 4 * 7**3 and torch.isfinite(total(losses))


@pytest.mark.parametrize(("recipe", "change", "says"), [
    ("image/slotcon", ["views.v.size=[8,8]"], "the map of view 'v' is one cell"),
    ("image/slotcon", ["encoder={timm: {model: resnet18}}", "views.v.size=[28,28]"], "the map of view 'v' is one cell"),
    ("image/slotcon", ["views.v.count=1"], "has one look, which has nothing to share"),
    ("image/slotcon", ["objectives.slots.contrastive.level.slots.groups=projector"], "must name a head of `prototypes`"),
    ("image/slotcon", ["teacher.of=[encoder, projector]"], "add 'groups' to teacher.of"),
    ("image/slotcon", ["objectives.slots.contrastive.level=dense"], "compares slots; set level: slots"),
    ("image/slotcon", ["masking.v.random={}", "objectives.slots.contrastive.queries=[{view: v, masked: true}]"],
     "needs whole maps"),
    ("points/simclr", ["objectives.contrast.contrastive.level={slots: {groups: g}}"], "points data are sets, which have none"),
    ("points/simclr", ["objectives.contrast.contrastive.level=common"], "points data are sets, which have none")])
def test_what_cannot_be_is_refused_with_the_reason(recipe: str, change: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, change)


def test_slots_weigh_nothing_where_they_win_no_cell() -> None:
    assembly = made()
    step = Step(assembly, batch(assembly), 0.0, 0)
    units, scores = Slots(groups="groups").units(step, "v", "encoder", "projector", False), step.units("v", level="dense",
                                                                                                       head="groups")
    best: Tensor = scores.z.argmax(1)
    for row in range(len(units)):
        mine = (scores.key["item"] == units.key["item"][row]) & (scores.key["view"] == units.key["view"][row])
        assert float(units.weight[row]) == float((best[mine] == units.key["slot"][row]).any())
