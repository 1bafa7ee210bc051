"""Predictors that look at another encoded view, and the pairs of views they are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.platform.assembly import Assembly, total
from meristem.platform.encoders.cross import CrossBlocks
from meristem.platform.masked.targets import Content
from meristem.platform.objectives import Items
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

SMALL = ["modality.image={channels: 2, patch: 4}", "views.g={size: [16, 24]}", "masking.l.random.ratio=0.9",
         "encoder.transformer={width: 48, depth: 2, heads: 4}",
         "objectives.pixels.masked.predictor.cross={depth: 1, width: 24, heads: 2}"]


def drawn(name: str, array: Tensor) -> View:
    b, shape, rows = len(array), tuple(array.shape[2:]), torch.arange(len(array))
    frame = Frame(torch.eye(len(shape) + 1).repeat(b, 1, 1), shape, torch.ones(b, len(shape)), ("px",) * len(shape))
    return View(name, array, frame, rows, torch.zeros_like(rows))


def step_of(assembly: Assembly, *views: View, start: int = 0) -> Step:
    rows = torch.arange(len(views[0]))
    return Step(assembly, Batch(Items(rows, rows + start), {v.name: v for v in views}), 0.0, 0)


def predicted(assembly: Assembly, step: Step) -> Tensor:
    objective = assembly.objectives["pixels"]
    view = objective.settings.encode
    (prediction,) = objective._predict(step, step.plan(view), view).values()
    value: Tensor = prediction.value
    return value


# ---- windows cut out of views

def cut(array: Tensor, **crop: Any) -> tuple[View, View]:
    whole = replace(drawn("g", array), weight=(array[:, :1] > -1).float(), fields={"mask": (10 * array[:, 0]).round().long()})
    settings = ", ".join(f"{key}: {list(value)}" for key, value in crop.items())
    step = step_of(Assembly(load("image/cropmae", [*SMALL, f"derived.l.crop={{of: g, {settings}}}"])), whole)
    return step.view("g"), step.view("l")


def test_a_crop_shows_what_its_frame_says_and_lies_inside_the_other_view() -> None:
    whole, part = cut(torch.randn(200, 2, 16, 24), area=(0.3, 0.6), flip=(0.0, 0.5))
    corners = part.frame.boxes()
    assert (corners[..., 0] >= -0.5 - 1e-4).all() and (corners[..., 1] <= torch.tensor([15.5, 23.5]) + 1e-4).all()
    sides = corners[..., 1] - corners[..., 0]
    share, aspect = sides.prod(1) / (16 * 24), sides[:, 1] / sides[:, 0] / (24 / 16)
    assert 0.3 <= share.min() < 0.35 and 0.55 < share.max() <= 0.6
    assert 0.75 <= aspect.min() < 0.8 and 1.25 < aspect.max() <= 4 / 3 + 1e-4
    flipped = part.frame.affine[:, 1, 1] < 0
    assert 70 < flipped.sum() < 130 and (part.frame.affine[:, 0, 0] > 0).all()
    index = torch.cartesian_prod(torch.arange(16.0), torch.arange(24.0)).expand(200, -1, -1)
    point = (part.frame.to_source(index) * 2 + 1) / torch.tensor([16.0, 24.0]) - 1  # elements' edges lie at ±1
    grid = point.flip(-1).unflatten(1, (16, 24))
    for mine, theirs, mode in ((part.array, whole.array, "bilinear"), (part.weight, whole.weight, "bilinear"),
                               (part.fields["mask"][:, None].float(), whole.fields["mask"][:, None].float(), "nearest")):
        sampled = F.grid_sample(theirs, grid, mode, "border", align_corners=False)
        agree = (mine - sampled).abs() < 1e-3
        assert agree.all() if mode == "bilinear" else agree.float().mean() > 0.999  # half-way places may round either way


def test_a_smaller_crop_averages_as_torch_does() -> None:
    array = torch.randn(3, 2, 16, 24)
    _, part = cut(array, size=(8, 8), area=(1.0, 1.0), aspect=(1.0, 1.0), flip=(0.0, 0.0))
    torch.testing.assert_close(part.array, F.interpolate(array, (8, 8), mode="bilinear", antialias=True))
    assert part.frame.shape == (8, 8)


# ---- the predictor

def test_two_passes_of_one_encoder() -> None:
    assembly = Assembly(load("image/cropmae", SMALL))
    loss = total(assembly(Batch(Items(torch.arange(2), torch.arange(2)), {"g": drawn("g", torch.randn(2, 2, 16, 24))}), 0.0))
    loss.backward()
    assert assembly.last_step is not None and assembly.last_step.passes == ["encoder(l, plan)", "encoder(g)"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in assembly.objectives["pixels"].predictor.parameters())


def test_predictions_know_the_context_and_nothing_of_what_is_hidden_or_where_either_view_lies() -> None:
    assembly = Assembly(load("image/cropmae", [*SMALL, "derived.l=null", "views.l={size: [16, 24]}"])).eval()
    hidden_view, context = drawn("l", torch.randn(2, 2, 16, 24)), drawn("g", torch.randn(2, 2, 16, 24))
    first = step_of(assembly, hidden_view, context)
    before, gone = predicted(assembly, first), first.plan("l").hidden
    assert gone.sum(1).tolist() == [22, 22]  # 90 % of 24 patches
    where = gone.reshape(2, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    moved = torch.eye(3).repeat(2, 1, 1) + torch.randn(2, 3, 3).mul(torch.tensor([[1.0], [1.0], [0.0]]))
    other = [replace(v, frame=v.frame.compose(moved), params={"angle": torch.randn(2)}, weight=torch.rand(2, 1, 16, 24) + 0.1)
             for v in (replace(hidden_view, array=torch.where(where, 1e2, hidden_view.array)), context)]
    assert torch.equal(predicted(assembly, step_of(assembly, *other)), before)
    changed = replace(context, array=torch.randn(2, 2, 16, 24))
    assert not torch.allclose(predicted(assembly, step_of(assembly, hidden_view, changed)), before, atol=1e-4)


@pytest.mark.parametrize("own", [True, False])
def test_what_is_hidden_here_is_found_in_the_context_and_in_no_other(own: bool) -> None:
    """Noise: what a window hides can only be told from the view it was cut from. Chance is a loss of 1."""
    torch.manual_seed(0)
    assembly = Assembly(load("image/cropmae", [
        "modality.image={channels: 1, patch: 4}", "views.g={size: [16, 16]}", "derived.l=null", "views.l={size: [16, 16]}",
        "encoder.transformer={width: 48, depth: 1, heads: 4}", "masking.l.random.ratio=0.9",
        "objectives.pixels.masked.predictor.cross={depth: 1, width: 48, heads: 4}",
        "objectives.pixels.masked.target.content.normalise=none"]))
    optimiser = torch.optim.AdamW(assembly.parameters(), 3e-3)

    def loss_of(number: int) -> Tensor:
        noise = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(number))
        step = step_of(assembly, drawn("l", noise), drawn("g", noise if own else noise.roll(1, 0)), start=24 * number)
        found: Tensor = total(assembly.objectives["pixels"](step))
        return found

    for number in range(100):
        optimiser.zero_grad()
        loss_of(number).backward()
        optimiser.step()
    with torch.no_grad():
        fresh = torch.stack([loss_of(1000 + i) for i in range(4)]).mean()
    assert fresh < 0.7 if own else fresh > 0.97


def test_padding_of_either_side_changes_nothing() -> None:
    axes = load("points/mae").modality.axes
    blocks = CrossBlocks(24, 2, 2, axes).eval()
    x, memory, a, b = torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 5, 3), torch.randn(2, 7, 3)
    plain = blocks(x, a, None, memory, b, None)

    def padded(y: Tensor) -> Tensor:
        return torch.cat([y, torch.full_like(y[:, :3], torch.nan)], 1)

    valid = [F.pad(torch.ones(2, n, dtype=torch.bool), (0, 3)) for n in (5, 7)]
    full = blocks(padded(x), padded(a), valid[0], padded(memory), padded(b), valid[1])
    torch.testing.assert_close(full[:, :5], plain)


def wave(shape: tuple[int, ...], k: int) -> Tensor:
    """Numbers that are the same everywhere: 0.2 sin(0.7 (1 + k/37) i + k)."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (0.2 * torch.sin(0.7 * i * (1 + k / 37) + k)).float().reshape(shape)


def test_the_loss_is_that_of_their_code() -> None:
    """alexandre-eymael/CropMAE at 5d0dab2, `SiameseMAE.forward_loss` with norm_pix_loss of the image 5 wave(·, 101), the
    prediction 5 wave(·, 7) (their order of a patch: row, column, channel), 14 of 16 patches hidden: 1.4601557."""
    assembly = Assembly(load("image/cropmae", ["modality.image.patch=4", "views.g={size: [16, 16]}",
                                               "encoder.transformer={width: 48, depth: 1, heads: 4}"]))
    step = step_of(assembly, drawn("g", 5 * wave((2, 3, 16, 16), 101)))
    prediction = (5 * wave((2, 16, 48), 7)).unflatten(-1, (4, 4, 3)).movedim(-1, -3).flatten(-3)
    hidden = (torch.arange(16) * 7 % 16 >= 2).float().expand(2, -1)
    target = assembly.objectives["pixels"].settings.readouts["content"].target
    assert isinstance(target, Content)
    loss, count = target.compare(step, "g", None, prediction, hidden)
    assert float(loss / count) == pytest.approx(1.460155725479126, rel=1e-5)


@pytest.mark.parametrize(("changes", "says"), [
    (["objectives.pixels.masked.context=null"], "the cross predictor looks at another view; name it as context"),
    (["objectives.pixels.masked.predictor=decoder"], "the decoder predictor looks at no other view"),
    (["objectives.pixels.masked.context=l"], "context is the view whose tokens are hidden"),
    (["objectives.pixels.masked.context=z"], "context names 'z': there is no such view"),
    (["views.z={size: [64, 64], count: 2}", "objectives.pixels.masked.context=z"], "'l' has 1 looks, its context 'z' 2"),
    (["encoder.transformer.sees=[]"], "cannot tell mask tokens apart"),
    (["masking.l.random.corruption=replace"], "works on masked tokens that are dropped"),
    (["masking.l.random.decode={running_cell: {ratio: 0.5, cell: [null, 2]}}"], "fills in every place"),
    (["derived.l.crop={of: g, size: [64, 64, 64]}"], "size has 3 entries for 2 axes"),
    (["derived.l.crop={of: g, area: [0.6, 0.3]}"], "go from low to high")])
def test_what_cannot_be_paired_is_refused(changes: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load("image/cropmae", changes)
