"""Clips and frames of them in one space: what a still is, what a level of frames is, and which of them attract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.platform.assembly import Assembly, total
from meristem.platform.recipe import load
from meristem.platform.step import Step
from meristem.tasks.inspection import noise

SMALL = ["encoder.transformer={width: 48, depth: 1, heads: 3}", "views.v.size=[8,32,32]", "modality.video.patch=[2,8,8]",
         "heads.projector.mlp={hidden: 32, out: 16}",
         *(f"objectives.{name}.masked.predictor.decoder={{depth: 1, width: 24, heads: 2}}" for name in ("clip", "frame"))]


@pytest.fixture
def step() -> Step:
    """A step of two films, two looks each."""
    recipe = load("video/crossvideomae", SMALL)
    batch = noise(recipe)
    batch.views["v"].array = torch.randn_like(batch.views["v"].array)  # no frame like another
    return Step(Assembly(recipe), batch, 0.0, 0)


def test_a_still_is_a_frame_of_its_clip_held_for_a_token(step: Step) -> None:
    clip, still = step.view("v"), step.view("f")
    assert still.array.shape == (4, 3, 2, 32, 32) and step.stream("f").lattice == (1, 4, 4)
    shown = []
    for row in range(4):
        (frame,) = (t for t in range(8) if torch.equal(clip.array[row, :, t], still.array[row, :, 0]))
        assert torch.equal(still.array[row, :, 0], still.array[row, :, 1]) and int(still.params["time"][row]) == frame // 2
        held, there = torch.tensor([[[0.5, 3.0, 5.0]]]), torch.tensor([[[float(frame), 3.0, 5.0]]])  # middles
        one, two = (view.frame.select(slice(row, row + 1)) for view in (still, clip))
        torch.testing.assert_close(one.to_source(held), two.to_source(there))
        shown.append(frame)
    assert len(set(shown)) > 1


def test_a_frame_is_the_mean_of_its_visible_tokens(step: Step) -> None:
    level = step.assembly.recipe.objectives["cross-frame"].level
    frames, encoded = level.units(step, "v", "encoder", None, True), step.encode("v", masked=True)
    assert len(frames) == 16 and encoded.index is not None
    for unit in range(16):
        row = 2 * int(frames.key["item"][unit]) + int(frames.key["view"][unit])
        time = frames.key["time"][unit]
        mine = [encoded.tokens[row, i] for i, token in enumerate(encoded.index[row]) if int(token) // 16 == time]
        assert 0 < len(mine) < 16
        torch.testing.assert_close(frames.z[unit], torch.stack(mine).mean(0))
    still = level.units(step, "f", "encoder", None, True)
    assert sorted(still.key["time"].tolist()) == sorted(step.view("f").params["time"].tolist())


def nt_xent(queries: list[tuple[Tensor, int, int]], keys: list[tuple[Tensor, int, int]], timed: bool) -> float:
    """Each query (vector, film, instant) against each of its own keys in turn and those of all other films, one by one."""
    losses = []
    for q, film, instant in queries:
        positive = [F.cosine_similarity(q, k, dim=0) / 0.1 for k, f, t in keys if f == film and (not timed or t == instant)]
        negative = [F.cosine_similarity(q, k, dim=0) / 0.1 for k, f, _ in keys if f != film]
        everyone = torch.stack([*positive, *negative]).exp().sum().log()
        losses.append(torch.stack([everyone - s for s in positive]).mean())
    return torch.stack(losses).mean().item()


def test_cross_modal_losses_are_the_double_loops(step: Step) -> None:
    assembly = step.assembly.eval()  # batch norm by its running statistics: rows are apart

    def projected(z: Tensor) -> Tensor:
        return assembly.heads["projector"](z, torch.zeros(len(z), dtype=torch.int64))

    def whole(view: str) -> list[tuple[Tensor, int, int]]:
        z = projected(step.encode(view, masked=True).summary["mean"])
        return [(z[row], row // 2, 0) for row in range(4)]

    def instants(view: str) -> list[tuple[Tensor, int, int]]:
        encoded, found = step.encode(view, masked=True), []
        for row in range(4):
            z, time = projected(encoded.tokens[row]), encoded.index[row] // 16
            first = int(step.view(view).params["time"][row]) if view == "f" else 0
            found += [(z[time == t].mean(0), row // 2, first + t) for t in sorted(set(time.tolist()))]
        return found

    losses = {name: assembly.objectives[name](step)[""] for name in ("cross-clip", "cross-frame")}
    found = {name: (loss.total / loss.count).item() for name, loss in losses.items()}
    assert found["cross-clip"] == pytest.approx(nt_xent(whole("v"), whole("f"), timed=False), rel=1e-4)
    assert found["cross-frame"] == pytest.approx(nt_xent(instants("f"), instants("v"), timed=True), rel=1e-4)


def test_six_losses_of_two_passes() -> None:
    recipe = load("video/crossvideomae", SMALL)
    assembly = Assembly(recipe)
    losses = assembly(noise(recipe), 0.0)
    total(losses).backward()
    assert assembly.last_step is not None and assembly.last_step.passes == ["encoder(v, plan)", "encoder(f, plan)"]
    assert set(losses) == {"clip", "frame", "intra-clip", "intra-frame", "cross-clip", "cross-frame"}
    assert all(p.grad is not None for name, p in assembly.named_parameters() if "mask_token" not in name)


@pytest.mark.parametrize(("recipe", "changes", "says"), [
    ("image/mae", ["derived={f: {still: {of: x}}}"], "takes frames out of clips, and image data have no time"),
    ("points/mae", ["derived={f: {still: {of: x}}}"], "points data are sets"),
    ("image/simclr", ["objectives.contrast.contrastive.level={frames: {}}"], "units from clips, and image data have no time")])
def test_what_has_no_time_is_refused(recipe: str, changes: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, changes)
