"""MAMP: what moves is hidden rather than what stands still, and motion is predicted where joints are hidden."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made_skeletons import kinect, moves

import meristem
from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.modalities.skeleton import Skeleton
from meristem.modalities.stream import TokenStream
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.derived.difference import Difference
from meristem.platform.masked.guides import Guided, Motion, motion
from meristem.platform.masked.targets import Content
from meristem.platform.objectives import Items
from meristem.platform.step import Batch, Step

KIND = Skeleton(Skeleton.Options.model_validate({"layout": "ntu", "bodies": 1, "segment": 4}))
SMALL = ["encoder.transformer={width: 24, depth: 1, heads: 2}", "modality.skeleton.bodies=1", "views.x.size=[24]",
         "objectives.motion.masked.predictor.decoder={depth: 1, width: 24, heads: 2}"]


def view_of(array: torch.Tensor, weight: torch.Tensor | None = None) -> View:
    """(B, 3, T, J)."""
    b, _, t, j = array.shape
    frame = Frame(torch.eye(3).expand(b, -1, -1), (t, j), torch.ones(b, 2), ("s",))
    return View("x", array, frame, torch.arange(b), torch.zeros(b, dtype=torch.int64),
                weight=torch.ones(b, 1, t, j) if weight is None else weight)


def walks(seed: int = 0, rows: int = 2, frames: int = 24) -> tuple[View, np.random.Generator]:
    rng = np.random.default_rng(seed)
    array = torch.from_numpy(rng.normal(0, 1, (rows, frames, 25, 3)).cumsum(1)).float()
    return view_of(array.permute(0, 3, 1, 2).contiguous()), rng


def derived(view: View, stride: int = 1) -> View:
    step: Any = None
    return Difference(of="x", stride=stride).derive(view, "motion", step)


@pytest.mark.parametrize("normalise,theirs", [("token", 1.9470933675765991), ("none", 1.9629193544387817)])
def test_the_loss_is_that_of_the_authors_code(normalise: Any, theirs: float) -> None:
    """Figures printed by `forward_loss(extract_motion(x, 1), pred, mask)` of maoyunyao/MAMP at 09e6252a5c7d, 24 frames of 25
    joints in segments of 4, on the numbers made here; theirs order a token's numbers frame by frame, ours by
    coordinate."""
    view, rng = walks()
    prediction = torch.from_numpy(rng.normal(0, 1, (2, 150, 12))).float()
    hidden = torch.from_numpy(rng.uniform(size=(2, 150)) < 0.9).float()
    prediction = prediction.unflatten(-1, (4, 3)).transpose(-1, -2).flatten(-2)
    stream = KIND.tokenizer().stream(derived(view))
    step: Any = SimpleNamespace(stream=lambda name: stream, assembly=SimpleNamespace(recipe=SimpleNamespace(modality=KIND)))
    total, count = Content(normalise=normalise).compare(step, "motion", None, prediction, hidden)
    assert (total / count).item() == pytest.approx(theirs, rel=1e-6)


def test_what_is_kept_is_what_the_authors_code_keeps() -> None:
    """Kept tokens printed by `motion_aware_random_masking` of the same code at ratio 0.5 and temperature 0.8, with these
    uniform numbers for `torch.rand`."""
    view, _ = walks()
    stream = KIND.tokenizer().stream(view)
    rng = Rng.of(0, torch.arange(2))
    guide = Motion(temperature=0.8)
    plan = Guided(guide=guide, ratio=0.5).follow(guide.drawn(stream, rng), stream, rng, ())
    assert plan.keep is not None and plan.keep.shape == (2, 75)
    assert plan.keep[0, :12].tolist() == [2, 3, 6, 7, 8, 12, 15, 19, 20, 23, 24, 25]
    assert plan.keep[1, -11:].tolist() == [128, 133, 134, 135, 136, 140, 141, 142, 144, 148, 149]
    assert plan.keep.sum(1).tolist() == [5746, 5593] and plan.keep.square().sum(1).tolist() == [570026, 559911]


def test_what_moves_is_hidden_first_and_what_stands_still_is_not_safe() -> None:
    array = torch.zeros(400, 3, 8, 25)
    array[:, :, 4:, :5] = 1.0  # of two segments the second differs in five joints
    stream = KIND.tokenizer().stream(view_of(array))
    assert motion(stream).unflatten(1, (2, 25)).sum((1, 2)).eq(10).all()
    rng = Rng.of(0, torch.arange(400))
    guide = Motion(temperature=0.8)
    first = guide.drawn(stream, rng).argmax(1)
    moving = (first % 25 < 5).float().mean().item()
    odds = np.exp(1 / 0.8)
    assert moving == pytest.approx(10 * odds / (10 * odds + 40), abs=0.07)  # softmax of what 10 and 40 tokens do


def test_motion_is_the_change_to_the_next_frame_and_gaps_have_none() -> None:
    view, _ = walks(rows=1, frames=8)
    weight = torch.ones(1, 1, 8, 25)
    weight[0, 0, 3, 7] = 0
    made = derived(replace(view, weight=weight), stride=2)
    torch.testing.assert_close(made.array[..., :6, :7], view.array[..., 2:, :7] - view.array[..., :6, :7])
    assert (made.array[..., 6:, :] == 0).all() and made.weight is not None
    assert made.weight[0, 0, :, 7].tolist() == [1, 0, 1, 0, 1, 1, 1, 1] and made.weight.sum() == 198
    assert (made.array[0, :, [1, 3], 7] == 0).all()


def stepped(assembly: Assembly, view: View) -> float:
    batch = Batch(Items(torch.arange(len(view)), torch.arange(len(view))), {"x": view})
    with torch.no_grad():
        return float(assembly(batch, 0.5)["motion"].total)


def test_a_still_body_has_no_motion_to_predict_and_none_of_the_hidden_content_is_seen() -> None:
    torch.manual_seed(0)
    raw = "objectives.motion.masked.readouts.motion.target.content.normalise=none"
    assembly = Assembly(recipes.load("skeleton/mamp", [*SMALL, raw]))
    head = assembly.objectives["motion"].predictor.heads["motion"]  # type: ignore[union-attr, index]
    head.weight.data.zero_(), head.bias.data.zero_()
    still = view_of(torch.randn(2, 3, 1, 25).expand(-1, -1, 24, -1).contiguous())
    assert stepped(assembly, still) == 0.0
    lively, _ = walks()
    assert stepped(assembly, lively) > 0.0
    batch = Batch(Items(torch.arange(2), torch.arange(2)), {"x": lively})
    step = Step(assembly, batch, 0.5, 0)
    plan = step.plan("x")
    stream: TokenStream = step.stream("x")
    spoiled = replace(stream, content=torch.where(plan.hidden[..., None], torch.full_like(stream.content, 9.0), stream.content))
    sees = assembly.recipe.encoder.sees
    with torch.no_grad():
        a, b = (assembly.encoder(s.seen(sees), plan).tokens for s in (stream, spoiled))
    assert torch.equal(a, b) and plan.hidden.sum(1).tolist() == [135, 135]


@pytest.mark.parametrize("recipe,over,why", [
    ("image/mae", ["masking.x={guided: {guide: {motion: {}}, ratio: 0.75}}"], "no axis of time"),
    ("points/mae", ["derived.motion={difference: {of: x}}"], "no axis of time"),
    ("skeleton/mamp", ["objectives.motion.masked.readouts.motion.of=shadow"], "shadow")])
def test_motion_is_asked_only_of_what_has_time(recipe: str, over: list[str], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        recipes.load(recipe, over)


def test_a_step_of_the_recipe_trains_on_files_with_gaps(tmp_path: Path) -> None:
    for i in range(4):
        kinect(tmp_path / f"{i}.skeleton", [{"1": x} if t != 7 else {} for t, x in enumerate(moves(30, 25, 3, seed=i))])
    run = tmp_path / "run"
    meristem.pretrain("skeleton/mamp", tmp_path, run, [*SMALL, "train.batch=4", "train.workers=0", "train.steps=2",
                                                       "train.log_every=1"], cache=tmp_path / "cache", quiet=True)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and np.isfinite(losses).all() and losses[0] != losses[1]
