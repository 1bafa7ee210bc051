"""Contrastive and pretext recipes of clips: what is drawn for them, their passes, their losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from meristem.modalities.base import Draw, Header
from meristem.platform.assembly import Assembly, total
from meristem.platform.data.loader import _Batches
from meristem.platform.data.samples import Samples
from meristem.platform.objectives import Loss
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

METHODS = ("cvrl", "rspnet", "vfs", "pcl-pretext-contrast")
PASSES = {"cvrl": ["encoder(v)"], "rspnet": ["encoder(query)", "teacher(key)", "teacher(other)"], "vfs": ["encoder(v)"],
          "pcl-pretext-contrast": ["encoder(v)"]}


class Clips:
    """A cache of films of noise: 60 frames of 40 × 48, each film its own."""

    order, ahead, expect = Samples.order, Samples.ahead, Samples.expect

    def header(self, row: int) -> Header:
        return Header((3, 60, 40, 48), tuple(tuple(float(i == j) for j in range(4)) for i in range(4)), (0.04, 1.0, 1.0),
                      (1 / 60,) * 3, (-2.0,) * 3, (0.0,) * 3)

    def tables(self, row: int) -> dict[str, np.ndarray]:
        return {}

    def fields(self, row: int) -> tuple[str, ...]:
        return ()

    def windows(self, row: int, draws: Sequence[Draw]) -> list[np.ndarray]:
        film = np.random.default_rng(row).integers(0, 256, (3, 60, 40, 48), np.uint8)
        return [film[(slice(None), list(d.index), *(slice(a, a + n) for a, n in zip(d.start[1:], d.size[1:], strict=True)))]
                for d in draws]


def assemble(method: str, *more: str) -> Assembly:
    recipe = load(f"video/{method}")
    frames = 1 if method == "vfs" else 4
    inner = "encoder.slicewise.encoder.transformer" if method == "vfs" else "encoder.transformer"
    tiny = [f"{inner}.{change}" for change in ("width=24", "depth=1", "heads=2")]
    sizes = [f"views.{name}.size=[{frames}, 32, 32]" for name in recipe.views]
    torch.manual_seed(0)
    return Assembly(load(f"video/{method}", [*tiny, *sizes, "train.batch=6", *more]))


def draw(assembly: Assembly, step: int = 0) -> Batch:
    recipe, cache = assembly.recipe, Clips()
    batches = _Batches(cache, [(row, -1) for row in range(12)], {}, recipe.modality, recipe.views, (), 0, 6, 0, 1)  # type: ignore[arg-type]
    return assembly.prepare(batches[step])


def mean(loss: Loss) -> float:
    return float(loss.total.detach() / loss.count)


@pytest.mark.parametrize("method", METHODS)
def test_passes_are_made_once_and_train_everything_but_the_teacher(method: str) -> None:
    assembly = assemble(method)
    losses = assembly(draw(assembly), 0.0)
    assert assembly.last_step is not None and assembly.last_step.passes == PASSES[method]
    total(losses).backward()
    for name, p in assembly.named_parameters():
        if name.startswith("teacher."):
            assert p.grad is None and not p.requires_grad
        elif not name.endswith(("cls", "mask_token")):
            assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_can_be_learnt_by_heart(method: str) -> None:
    assembly = assemble(method)
    batch = draw(assembly)
    optimiser = torch.optim.AdamW([p for p in assembly.parameters() if p.requires_grad], lr=2e-3)
    course = []
    for step in range(25):
        losses = assembly(batch, step / 25)
        course.append(float(total(losses).detach()))
        optimiser.zero_grad()
        total(losses).backward()
        optimiser.step()
        assembly.after(step / 25)
    assert course[-1] < 0.75 * course[0]


def test_rspnets_clips_play_at_one_speed_and_at_another() -> None:
    batch = draw(assemble("rspnet"))
    speed = {name: view.params["speed"] for name, view in batch.views.items()}
    assert torch.equal(speed["query"], speed["key"]) and torch.equal(speed["other"], 1 - speed["key"])
    assert len(speed["query"].unique()) == 2


def test_rspnet_by_hand() -> None:
    """Two cross-entropies against the negatives and a margin of 2 on cosines over τ, as the authors compute them."""
    assembly, tau = assemble("rspnet"), 0.07
    for p in assembly.encoder.parameters():
        p.data += 0.05 * torch.randn_like(p)  # a student that has left its teacher
    past, batch = draw(assembly), draw(assembly, 1)
    assembly(past, 0.0)
    assembly.objectives["appearance"].after(assembly.last_step)
    step, old = Step(assembly, batch, 0.1, 0), Step(assembly, past, 0.0, 0)

    def unit(s: Step, view: str, by: str, head: str) -> torch.Tensor:
        return F.normalize(s.units(view, by, "mean", head).z.detach(), dim=1)

    three = (("query", "encoder"), ("key", "teacher"), ("other", "teacher"))
    q, k, o = (unit(step, view, by, "appearance") for view, by in three)
    queue = torch.cat([unit(old, view, "teacher", "appearance") for view in ("key", "other")])
    assert not set(batch.items.row.tolist()) & set(past.items.row.tolist())
    appearance = 0.0
    for i in range(6):
        rest = [j for j in range(6) if j != i]
        negatives = torch.cat([k[rest], o[rest], queue])
        for positive in (k[i:i + 1], o[i:i + 1]):
            logits = torch.cat([positive, negatives]) @ q[i] / tau
            appearance += float(F.cross_entropy(logits[None], torch.tensor([0]))) / 6
    q, k, o = (unit(step, view, by, "motion") for view, by in three)
    speed = float(F.margin_ranking_loss((q * k).sum(1) / tau, (q * o).sum(1) / tau, torch.ones(6), margin=2.0))
    losses = assembly(batch, 0.1)
    assert losses["appearance"].weight * mean(losses["appearance"]) == pytest.approx(appearance, rel=1e-4)
    assert losses["speed"].weight * mean(losses["speed"]) == pytest.approx(speed, rel=2e-3)  # the weight is rounded


def test_a_second_clip_or_frame_lies_where_the_recipe_says() -> None:
    """Starts of the two looks, of 60 frames: near ones are likelier in CVRL, half the room apart and more in VFS."""
    apart: dict[str, Any] = {}
    for method in ("cvrl", "vfs"):
        assembly, gaps = assemble(method), []
        for step in range(20):
            starts = draw(assembly, step).views["v"].frame.affine[:, 0, 3]
            gaps += (starts[0::2] - starts[1::2]).abs().tolist()
        apart[method] = np.array(gaps) / (60 - (4 - 1) * 2 if method == "cvrl" else 60)
    assert apart["vfs"].min() >= 0.48
    third = [((apart["cvrl"] >= a / 3) & (apart["cvrl"] < (a + 1) / 3)).mean() for a in range(3)]
    assert np.allclose(third, [5 / 9, 3 / 9, 1 / 9], atol=0.15) and third[0] > third[1] > third[2]


def test_turned_differences_are_what_pcl_classifies() -> None:
    batch = draw(assemble("pcl-pretext-contrast"))
    view = batch.views["v"]
    assert view.array.shape == (12, 3, 4, 32, 32) and set(view.params["turn"].tolist()) <= {0, 1, 2, 3}
    assert abs(float(view.array.mean())) < 0.1  # frames of these films have a mean; their differences have none


@pytest.mark.parametrize("method", METHODS)
def test_recipes_say_what_they_follow_and_load_from_their_dump(method: str) -> None:
    recipe = load(f"video/{method}")
    assert recipe.name == method and recipe.follows and recipe.departs
    assert type(recipe).model_validate(recipe.dump()).hash == recipe.hash
