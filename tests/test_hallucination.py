"""HaLP: positives between a key and another prototype, none of which is nearer to that than to the key's own."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_skeletons import kinect, moves
from torch import Tensor
from torch.nn import functional as F

import meristem
from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.platform.contrastive.hallucination import Hallucinate, along, boundary, clusters
from meristem.platform.contrastive.losses import attraction
from meristem.platform.contrastive.relations import ONLY, Relation
from meristem.platform.objectives import Units
from meristem.platform.recipe import load
from meristem.platform.training import checkpoint, loop

TAU = 0.07


def spheres(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [F.normalize(torch.from_numpy(rng.normal(0, 1, shape)).float(), dim=-1) for shape in shapes]


def test_points_and_loss_are_those_of_the_authors_code() -> None:
    """Figures printed by `generate_positives_using_mixup` (λ = 1000: a hundredth before t_max) of anshulbshah/HaLP at
    ae460b420d74 with the two next prototypes of each of these keys, and by the second term of its loss: −1.438408374786377."""
    k, prototype, q = spheres(0, (6, 16), (5, 16), (6, 16))
    order = (k @ prototype.T).argsort(1, descending=True)
    own, near, far = k[:, None], prototype[order[:, :1]], prototype[order[:, 1:3]]
    made = along(own, far, boundary(own, near, far) - 1e-2)
    torch.testing.assert_close(made[0, 0, :3], torch.tensor([0.04489554092288017, -0.04805983230471611, 0.09421924501657486]))
    torch.testing.assert_close(made[5, 1, :3], torch.tensor([0.0638527199625969, -0.21941733360290527, -0.24061910808086395]))
    assert made.abs().sum().item() == pytest.approx(39.97055435180664, rel=1e-6)
    accepted = (made @ prototype.T).argmax(-1) == order[:, :1]
    assert accepted.sum() == 9 and accepted[:, 1].tolist() == [True, False, True, False, False, True]
    query = torch.arange(6)
    keys = Units(made.flatten(0, 1), {"item": query.repeat_interleave(2)}, accepted.flatten().float())
    units = Units(q, {"item": query}, torch.ones(6))
    loss = attraction(units, keys, Relation("same(item)").matches(units, keys))
    weight = 1 / (2 * TAU)  # of the recipe, with μ = 1
    assert (weight * loss.total / loss.count - 1 / TAU).item() == pytest.approx(-1.438408374786377, rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), dims=st.integers(2, 12))
def test_the_boundary_is_where_bisection_finds_it(seed: int, dims: int) -> None:
    k, prototype = spheres(seed, (1, dims), (2, dims))
    near, far = prototype[(k @ prototype.T)[0].argsort(descending=True)].double()
    k = k[0].double()
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        z = along(k, far, torch.tensor(middle, dtype=torch.float64))
        low, high = (middle, high) if z @ near > z @ far else (low, middle)
    apart = float((k * (near - far)).sum())
    if apart > 1e-5 and abs(float(k @ far)) < 0.999:
        assert boundary(k, near, far).item() == pytest.approx(low, abs=1e-4)
        before, after = (along(k, far, boundary(k, near, far) * s) for s in (0.9, min(1.1, 1 / max(low, 0.1))))
        assert before @ near > before @ far and (after @ near < after @ far or low > 0.99)


def clouds(seed: int, spread: float = 0.1, dims: int = 8) -> tuple[Tensor, Tensor]:
    """Four directions, and 200 vectors near one of them."""
    centre = torch.eye(dims)[:4]
    noise = spread * torch.randn(200, dims, generator=torch.Generator().manual_seed(seed))
    return centre, F.normalize(centre.repeat(50, 1) + noise, dim=1)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_found_whatever_the_draw(seed: int) -> None:
    centre, z = clouds(0, 0.02)
    found = clusters(z, 4, 5, Rng.of(seed, 0))
    assert ((found @ centre.T).amax(0) > 0.99).all() and torch.equal(found, clusters(z, 4, 5, Rng.of(seed, 0)))
    alike = clusters(torch.ones(6, 3) / math.sqrt(3), 4, 3, Rng.of(seed, 0))  # fewer distinct than asked for
    assert alike.isfinite().all() and alike.shape == (4, 3)


def meeting(filled: bool = True) -> tuple[Units, Units]:
    """Eight queries with a key each, and 200 keys of a queue, a part of whose places may be empty."""
    _, past = clouds(1)
    g = torch.Generator().manual_seed(2)
    own = F.normalize(past[:8] + 0.1 * torch.randn(8, 8, generator=g), dim=1)
    first = torch.zeros(8, dtype=torch.int64)
    q = Units(own + 0.1 * torch.randn(8, 8, generator=g), {"item": torch.arange(8), "view": first}, torch.ones(8))
    weight = torch.ones(208)
    if not filled:
        weight[100:] = 0
    item = torch.cat([torch.arange(8), torch.arange(1000, 1200)])
    return q, Units(torch.cat([own, past]), {"item": item, "view": torch.ones(208).long()}, weight)


def hallucinated(filled: bool = True, seed: int = 0, **options: Any) -> tuple[Units, Units, Relation, Tensor]:
    q, k = meeting(filled)
    step: Any = SimpleNamespace(rng=lambda purpose, of: Rng.of(seed, of.key["item"], purpose), gather=lambda units: units)
    relation = Relation("same(item) - same(view)")
    chosen = Hallucinate(prototypes=4, **options)
    _, made = chosen.build(8)(q, k, relation, step)
    drawn = Rng(Rng.of(seed, q.key["item"], "hallucinate").key[:1])
    prototype = clusters(F.normalize(k.z[8:], dim=1), 4, chosen.iterations, drawn)
    return q, made, relation, prototype


@pytest.mark.parametrize("seed", range(3))
def test_positives_stay_with_their_keys_prototype_and_meet_their_query_alone(seed: int) -> None:
    q, made, relation, prototype = hallucinated(seed=seed, count=30)
    k = meeting()[1]
    assert len(made) == 240 and made.key[ONLY].tolist() == torch.arange(8).repeat_interleave(30).tolist()
    nearest = (k.z[:8] @ prototype.T).argmax(1).repeat_interleave(30)
    stays = (made.z @ prototype.T).argmax(1) == nearest
    assert torch.equal(made.weight, stays.float()) and stays.float().mean() > 0.5
    assert torch.allclose(made.z.norm(dim=1), torch.ones(240), atol=1e-5)
    assert not torch.isclose(made.z, k.z[:8].repeat_interleave(30, 0), atol=1e-3).all(1).any()  # at a fifth of the way and more
    match = relation.matches(q, made)
    assert len(match.q) == 240 and torch.equal(match.q, made.key[ONLY][match.k])


def test_there_are_none_before_the_queue_is_full_and_no_loss_then() -> None:
    q, made, relation, _ = hallucinated(filled=False)
    assert (made.weight == 0).all()
    q = q.with_z(q.z.clone().requires_grad_())
    loss = attraction(q, made, relation.matches(q, made))
    (loss.total / loss.count).backward()
    assert loss.total == 0 and q.z.grad is not None and q.z.grad.isfinite().all()


def test_there_are_none_where_the_queue_holds_the_steps_own_samples_only() -> None:
    """As with fewer samples than a batch has."""
    q, k = meeting()
    step: Any = SimpleNamespace(rng=lambda purpose, of: Rng.of(0, of.key["item"], purpose), gather=lambda units: units)
    _, made = Hallucinate(prototypes=4).build(8)(q, k.select(torch.arange(8)), Relation("same(item) - same(view)"), step)
    assert len(made) and not made.weight.any()


@pytest.mark.parametrize("over,why", [
    ("objectives.halp.contrastive.queue=null", "clusters the keys of a queue"),
    ("objectives.halp.contrastive.queue=10", "20 prototypes"),
    ("objectives.halp.contrastive.relation=same(row)", "by item")])
def test_what_has_no_prototypes_is_refused(over: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        load("skeleton/halp", [over])


def test_the_recipe_trains_and_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps, and the same six with a stop after the fourth; the queue of prototypes is full from the third."""
    (tmp_path / "data").mkdir()
    for i in range(8):
        kinect(tmp_path / "data" / f"{i}.skeleton", [{"1": x} for x in moves(20, 25, 3, seed=i)])
    small = ["encoder.transformer={width: 24, depth: 1, heads: 2}", "modality.skeleton.bodies=1", "views.v.size=[16]",
             "views.v.least=8", "train.batch=8", "train.workers=0", "train.log_every=1", "train.steps=6",
             "objectives.contrast.contrastive.queue=64",
             "objectives.halp.contrastive={queue: 32, transform: {hallucinate: {prototypes: 4, count: 10}}}"]

    def run(name: str, resume: bool = False) -> dict[str, Tensor]:
        meristem.pretrain("skeleton/halp", tmp_path / "data", tmp_path / name, small, cache=tmp_path / "cache", quiet=True,
                          resume=resume)
        return checkpoint.read_weights(tmp_path / name)

    whole = run("whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss/halp"] > 0 for line in lines] == [False, False, True, True, True, True]
    step = loop.Reporter.advance

    def stopped(self: loop.Reporter, n: int) -> None:
        step(self, n)
        if n == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Reporter, "advance", stopped)
        run("cut")
    assert checkpoint.read_card(tmp_path / "cut")["step"] == 4
    resumed = run("cut", resume=True)
    assert all(torch.equal(resumed[name], x) for name, x in whole.items())
