"""Maps that know where their cells lie: places, sampling, and the cell-wise losses of PixPro and PixContrast."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_maps import batch, boxed, cells, rand
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.frame import Frame
from meristem.platform.assembly import Assembly, total
from meristem.platform.contrastive.losses import Cosine, infonce
from meristem.platform.contrastive.relations import Relation
from meristem.platform.heads import Propagate
from meristem.platform.objectives import Encoded, Units
from meristem.platform.recipe import load
from meristem.platform.step import Step

TINY = {"transformer": ["encoder.transformer={width: 24, depth: 2, heads: 2}"],
        "unet": ["encoder={unet: {widths: [4, 8, 8], blocks: [1, 1, 1], decoder: false}}"]}
PARTS = "near(0.7, cell) & same(item) - same(view)"


def made(recipe: str, net: str = "transformer", *more: str) -> Assembly:
    torch.manual_seed(0)
    return Assembly(load(recipe, [*TINY[net], "views.v.size=[16,16]", "modality.image.patch=4", *more]))


@pytest.mark.parametrize("shape", [(6,), (5, 8), (4, 6, 5)])
def test_a_coarse_frame_puts_cells_in_the_middle_of_what_they_cover(shape: tuple[int, ...]) -> None:
    dims, stride = len(shape), (2, 4, 1)[:len(shape)]
    affine = torch.eye(dims + 1)[None] + 0.1 * rand(1, dims + 1, dims + 1, seed=0)
    affine[:, -1] = torch.eye(dims + 1)[-1]
    frame = Frame(affine, tuple(n * s for n, s in zip(shape, stride, strict=True)), torch.ones(1, dims), ("mm",) * dims)
    fine, coarse = frame.centres().unflatten(1, frame.shape), frame.coarse(stride, shape).centres().unflatten(1, shape)
    for index in np.ndindex(*shape):
        covered = fine[(0, *(slice(i * s, (i + 1) * s) for i, s in zip(index, stride, strict=True)))]
        torch.testing.assert_close(coarse[(0, *index)], covered.reshape(-1, dims).mean(0))
    torch.testing.assert_close(frame.coarse(stride, shape).boxes(), frame.boxes())


@given(seed=st.integers(0, 10**6), dims=st.sampled_from([2, 3]))
@settings(max_examples=20, deadline=None)
def test_a_map_is_sampled_where_points_lie_in_the_sample(seed: int, dims: int) -> None:
    """A map that is linear in source coordinates gives them back, whatever window, mirroring and turn it lies under."""
    g = torch.Generator().manual_seed(seed)
    shape = (4, 5, 3)[:dims]
    linear = torch.linalg.qr(torch.randn(2, dims, dims, generator=g))[0] * (0.5 + torch.rand(2, 1, dims, generator=g))
    affine = torch.eye(dims + 1).repeat(2, 1, 1)
    affine[:, :dims, :dims], affine[:, :dims, dims] = linear, torch.randn(2, dims, generator=g)
    frame = Frame(affine, shape, torch.ones(2, dims), ("mm",) * dims)
    index = torch.rand(2, 7, dims, generator=g) * (torch.tensor(shape) - 1)
    points = frame.to_source(index)
    encoded = Encoded(frame.centres(), {}, torch.ones(2, math.prod(shape), dtype=torch.bool), lattice=shape, frame=frame)
    found, inside = encoded.at(points)
    torch.testing.assert_close(found, points, atol=1e-4, rtol=1e-4)
    assert inside.all() and not encoded.at(frame.to_source(torch.full((2, 1, dims), 9.0)))[1].any()


@pytest.mark.parametrize(("net", "more", "stride"), [("transformer", (), 4), ("unet", (), 4),
                                                     ("unet", ("views.v.size=[18,18]",), 4)])
def test_tokens_of_any_encoder_know_their_place(net: str, more: tuple[str, ...], stride: int) -> None:
    assembly = made("image/pixpro", net, *more)
    step = Step(assembly, batch(assembly), 0.0, 0)
    encoded, frame = step.encode("v"), step.view("v").frame
    assert encoded.frame is not None and encoded.lattice is not None
    h, w = encoded.lattice
    index = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).reshape(-1, 2) * stride + 1.5
    units = step.units("v", level="dense")
    torch.testing.assert_close(units.point, frame.to_source(index[None].expand(8, -1, -1)).flatten(0, 1))
    corner = frame.to_source(torch.tensor([[[0.0, 0.0], [stride, stride]]]).expand(8, -1, -1))
    torch.testing.assert_close(units.key["cell"], (corner[:, 1] - corner[:, 0]).norm(dim=1).repeat_interleave(h * w))


def test_an_encoder_is_not_shown_where_its_map_lies() -> None:
    assembly = made("image/pixpro")
    data = batch(assembly)
    here = Step(assembly, data, 0.0, 0).encode("v").tokens
    affine = data.views["v"].frame.affine.clone()
    affine[:, :2] *= 3
    data.views["v"].frame = Frame(affine, (16, 16), torch.ones(8, 2), ("px", "px"))
    assert torch.equal(Step(assembly, data, 0.0, 0).encode("v").tokens, here)


# ---- PixPro ----
BOXES = (torch.tensor([[.0, .1, .6, .9], [.2, .2, 1., .7], [.1, 0., .5, .5]]),
         torch.tensor([[.3, .0, 1., .8], [.0, .1, .7, .9], [.2, .1, .9, .8]]))


def theirs() -> tuple[Propagate, list[Units], list[Units]]:
    """Student's and teacher's maps (3, 8, 7, 7) of two crops, of numpy's default_rng(0 … 3); a propagation of seeds 4 and 5."""
    head = Propagate(8, 2.0)
    head.value.weight.data, head.value.bias.data = rand(8, 8, seed=4) * 0.3, rand(8, seed=5) * 0.1
    frames = [boxed(box, (7, 7)) for box in BOXES]
    return (head, *([cells(rand(3, 8, 7, 7, seed=seed + i), frames[i], i) for i in (0, 1)] for seed in (0, 2)))


def test_propagation_is_what_the_authors_module_makes() -> None:
    """`featprop` of zdaxie/PixPro at e390d6b (p 2, clamp 0, one linear layer) on the first crop's map of `theirs`."""
    head, (x, _), _ = theirs()
    found = head(x.z, x.key["view"], x.key["item"])
    torch.testing.assert_close(found[2 * 7 + 4, :3], torch.tensor([0.3969680070877075, 0.624501645565033, 0.4057704210281372]))
    assert float(found.square().sum().detach()) == pytest.approx(1060.174560546875, rel=1e-5)


def test_pixpros_loss_is_what_the_authors_code_gives() -> None:
    """Both directions of `regression_loss` of zdaxie/PixPro at e390d6b: −2 times the mean cosine of an image's positives."""
    head, x, y = theirs()
    loss, relation = Cosine(mean="maps").build(8), Relation(PARTS)
    q = [u.with_z(head(u.z, u.key["view"], u.key["item"]).detach()) for u in x]
    for i, expected in enumerate((-0.06242416426539421, 0.08391764014959335)):
        one = loss(q[i], y[1 - i], relation, SimpleNamespace())
        assert float(one.count) == pytest.approx(3) and 2 * (float(one.total / one.count) / 2 - 1) == pytest.approx(
            expected, abs=1e-6)
    both = loss(Units.cat(q), Units.cat(y), relation, SimpleNamespace())
    assert 2 * float(both.total / both.count) - 4 == pytest.approx(0.021493475884199142, abs=1e-5)


def test_propagation_is_a_double_loop_over_each_map_of_its_own_size() -> None:
    """Units of three maps of 1, 4 and 3 units, shuffled: none takes anything from another map."""
    head, g = Propagate(5, 1.5), torch.Generator().manual_seed(0)
    owner = torch.tensor([2, 0, 1, 1, 2, 1, 2, 1])
    z, item, view = torch.randn(8, 5, generator=g), torch.tensor([7, 7, 9])[owner], torch.tensor([0, 1, 0])[owner]
    found = head(z, view, item).detach()
    for i in range(8):
        expected = torch.zeros(5)
        for j in range(8):
            if owner[i] == owner[j]:
                alike = max(float(F.cosine_similarity(z[i], z[j], dim=0)), 0.0) ** 1.5
                expected += alike * F.normalize(head.value(z[j]), dim=0).detach()
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-4)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_positives_lie_within_a_share_of_the_larger_cells_diagonal(seed: int) -> None:
    """Pairs against a double loop over cells of two crops, one of which may be mirrored."""
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(2, 2, 2, generator=g)
    boxes = torch.cat([low, low + 0.3 + torch.rand(2, 2, 2, generator=g)], 2)
    frames = [boxed(boxes[0], (3, 4)), boxed(boxes[1], (2, 3), (True, False))]
    q, k = cells(rand(2, 4, 3, 4, seed=0), frames[0], 0), cells(rand(2, 4, 2, 3, seed=1), frames[1], 1)
    found = Relation(PARTS).pairs(q, k).pos
    for i in range(len(q)):
        for j in range(len(k)):
            a, b = int(q.key["item"][i]), int(k.key["item"][j])
            sides = [(boxes[look, row, 2:] - boxes[look, row, :2]) / torch.tensor(size)
                     for look, row, size in ((0, a, (4, 3)), (1, b, (3, 2)))]
            apart = float((q.point[i] - k.point[j]).norm()) / max(float(side.norm()) for side in sides)
            if abs(apart - 0.7) > 1e-4:
                assert bool(found[i, j]) == (a == b and apart < 0.7)


def test_positives_together_stand_inside_the_logarithm() -> None:
    q, k = cells(rand(2, 6, 3, 3, seed=0), boxed(BOXES[0][:2], (3, 3)), 0), cells(rand(2, 6, 3, 3, seed=1),
                                                                                  boxed(BOXES[1][:2], (3, 3)), 1)
    relation = Relation(PARTS, "same(item) - same(view)")
    loss, expected, count = infonce(q, k, relation.pairs(q, k), 0.3, together=True), 0.0, 0
    for i in range(18):
        s = torch.exp(F.cosine_similarity(q.z[i:i + 1].double(), k.z.double()) / 0.3)
        mine = k.key["item"] == q.key["item"][i]
        near = mine & ((q.point[i] - k.point).norm(dim=1) <= 0.7 * torch.maximum(q.key["cell"][i], k.key["cell"]))
        if near.any():
            expected, count = expected - math.log(float(s[near].sum() / s[mine].sum())), count + 1
    assert float(loss.count) == count > 0 and float(loss.total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("net", ["transformer", "unet"])
@pytest.mark.parametrize("recipe", ["image/pixpro", "image/pixcontrast"])
def test_a_batch_can_be_learnt_by_heart_and_goes_on_from_its_state(recipe: str, net: str) -> None:
    assembly = made(recipe, net, "teacher.momentum=0.9")
    data, course = batch(assembly), []
    optimiser = torch.optim.AdamW([p for p in assembly.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(12):
        losses = assembly(data, 0.0)
        course.append(float((losses["cells"].total / losses["cells"].count).detach()))
        optimiser.zero_grad()
        total(losses).backward()
        optimiser.step()
        assembly.after(0.0)
    assert course[-1] < 0.8 * course[0]
    other = made(recipe, net)
    other.load_state_dict(assembly.state_dict())
    a, b = assembly(data, 0.0)["cells"], other(data, 0.0)["cells"]
    assert torch.equal(a.total, b.total)


@pytest.mark.parametrize(("recipe", "change", "says"), [
    ("points/simclr", "{level: dense, relation: 'near(0.7, cell) & same(item)'}", "points data are sets, which have none"),
    ("image/simclr", "{level: mean, relation: 'near(0.7, cell)'}", "set level: dense"),
    ("image/simclr", "{level: dense, relation: 'near(0.7, pixel)'}", r"near\(0.7, cell\) for cells of maps"),
    ("image/simclr", "{loss: {infonce: {denominator: own, positives: together}}}", "set denominator: shared")])
def test_what_cannot_be_is_refused_with_the_reason(recipe: str, change: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, [f"objectives.contrast.contrastive={change}"])
