"""Units changed in feature space before the loss: who meets added keys, MoCHi's mixtures, whole recipes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_queue import draw, mean, run
from torch import Tensor
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.platform.assembly import Assembly, total
from meristem.platform.contrastive.losses import infonce
from meristem.platform.contrastive.parts import TRANSFORMS
from meristem.platform.contrastive.relations import ONLY, Relation
from meristem.platform.contrastive.transforms import Mix, Transform, TransformSettings, added, mixtures
from meristem.platform.objectives import Units
from meristem.platform.recipe import load
from meristem.platform.step import Step

LINE = "objectives.contrast.contrastive"
TINY = ("encoder.transformer={width: 24, depth: 1, heads: 2}", "views.v.size=[16, 16]", "modality.image.patch=[8, 8]",
        "train.seed=1", f"{LINE}.queue=20", f"{LINE}.transform.mix={{hardest: 5, pairs: 6, with_query: 3}}")


def assemble(*more: str) -> Assembly:
    torch.manual_seed(0)
    return Assembly(load("image/mochi", [*TINY, *more]))


def units(z: Tensor, **key: Tensor) -> Units:
    return Units(z, key, torch.ones(len(z)))


def moco() -> tuple[Units, Units, Relation]:
    """Six queries, the key of each, and 40 of a queue, which alone repel."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(6, 8, generator=g)
    key, queue = q + 0.5 * torch.randn(6, 8, generator=g), torch.randn(40, 8, generator=g)
    k = units(torch.cat([key, queue]), item=torch.arange(46), view=torch.ones(46, dtype=torch.int64),
              past=torch.tensor([-1] * 6 + [1] * 40))
    return (units(q, item=torch.arange(6), view=torch.zeros(6, dtype=torch.int64), past=torch.ones(6, dtype=torch.int64)), k,
            Relation("same(item)", "same(past)"))


def test_mixed_negatives_give_the_value_of_a_public_implementation() -> None:
    """davidsvy/hard-negative-mixing at 2955553 (not the authors'), its logits into a cross-entropy, on the input of `moco()`
    with our random numbers in the place of its own, its hardest negatives in order: 1.97065294; 0.99457407 without mixtures.
    """
    q, k, relation = moco()
    step = SimpleNamespace(rng=lambda purpose, of: Rng.of(0, torch.arange(6), purpose))
    assert mean(infonce(q, k, relation.pairs(q, k), 0.2)) == pytest.approx(0.99457407, rel=1e-5)
    q, keys = Mix(hardest=10, pairs=12, with_query=5).build(8)(q, k, relation, step)
    assert len(keys) == 46 + 6 * 17
    assert mean(infonce(q, keys, relation.pairs(q, keys), 0.2)) == pytest.approx(1.97065294, rel=1e-5)


@given(st.integers(0, 10**6), st.integers(2, 8))
@settings(max_examples=25, deadline=None)
def test_a_mixture_lies_on_the_arc_between_its_parents_which_are_among_the_hardest(seed: int, hardest: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(4, 5, generator=g), torch.randn(9, 5, generator=g)
    repels = (torch.rand(4, 9, generator=g) < 0.7).float() * torch.rand(4, 9, generator=g)
    z, parent, weight = mixtures(q, k, repels, hardest, 7, 4, Rng.of(seed, torch.arange(4)))
    assert torch.allclose(z.norm(dim=-1), torch.ones(4, 11), atol=1e-5)
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    for i in range(4):
        order = sorted((j for j in range(9) if repels[i, j] > 0), key=lambda j: -float(q[i] @ k[j]))[:hardest]
        for s in range(11):
            first = int(parent[i, s])
            if float(weight[i, s]) == 0:  # a parent that does not repel: there were fewer than `hardest`
                assert len(order) < hardest
                continue
            assert first in order
            partners = [q[i]] if s >= 7 else [k[j] for j in order if j != first]
            arcs = [abs(math.acos(min(1.0, float(a @ b))) - sum(math.acos(max(-1.0, min(1.0, float(c @ z[i, s]))))
                                                               for c in (a, b))) for a, b in ((k[first], p) for p in partners)]
            assert min(arcs) < 2e-3
            if s >= 7:
                assert weight[i, s] == repels[i, first] and q[i] @ z[i, s] >= q[i] @ k[first] - 1e-5
                assert k[first] @ z[i, s] >= q[i] @ z[i, s] - 1e-5  # its share of the query is less than a half


def test_added_keys_are_met_by_one_query_and_have_the_keys_of_whom_they_stand_for() -> None:
    """As a negative, and as a hallucinated positive would be."""
    z = torch.randn(4, 3)
    q = units(z, item=torch.arange(4), view=torch.zeros(4, dtype=torch.int64))
    k = units(torch.randn(4, 3), item=torch.arange(4), view=torch.ones(4, dtype=torch.int64))
    relation = Relation("same(item) - same(view)")
    of, query = torch.tensor([0, 0, 2, 3]), torch.tensor([0, 1, 2, 1])
    made = Units(torch.randn(4, 3), k.select(of).key, torch.tensor([0.5, 0.25, 1.0, 0.0]))
    keys = added(added(k, made, query), made, query)  # twice: transforms may follow one another
    assert keys.key[ONLY].tolist() == [-1] * 4 + query.tolist() * 2
    pairs, plain = relation.pairs(q, keys), relation.pairs(q, k)
    assert torch.equal(pairs.pos[:, :4], plain.pos) and torch.equal(pairs.neg[:, :4], plain.neg)
    pos, neg = torch.zeros(4, 4), torch.zeros(4, 4)
    pos[0, 0], neg[1, 1], pos[2, 2] = 0.5, 0.25, 1.0
    for start in (4, 8):
        assert torch.equal(pairs.pos[:, start:start + 4], pos) and torch.equal(pairs.neg[:, start:start + 4], neg)
    matches = relation.matches(q, keys)
    dense = torch.zeros(4, 12)
    dense[matches.q, matches.k] = matches.weight
    assert torch.equal(dense, pairs.pos)


class Towards(TransformSettings):
    """Every key half-way to the nearest one of the queue: a positive that nobody drew."""

    def build(self, width: int) -> Transform:
        return Halfway()


class Halfway(Transform):
    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> tuple[Units, Units]:
        fresh, past = k.z[:-20], k.z[-20:]
        near = past[F.normalize(fresh, dim=1).matmul(F.normalize(past, dim=1).T).argmax(1)]
        return q, k.with_z(torch.cat([fresh + near, past]))


def test_a_transform_may_move_keys_and_read_the_queue_of_all_ranks_under_a_loss_that_only_attracts(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSFORMS, "towards", Towards)
    assembly = assemble(f"{LINE}.transform=towards", f"{LINE}.loss={{cosine: {{}}}}", f"{LINE}.negatives=null")
    monkeypatch.setattr(Step, "gather", lambda step, k, even: Units.cat([k, k.with_z(-k.z)]))
    run(assembly, [draw(assembly)], 0.0)
    queue = assembly.objectives["contrast"].queue
    assert int(queue.place) == 16  # the other rank's keys too
    monkeypatch.undo()
    batch = draw(assembly, 4)
    step = Step(assembly, batch, 0.1, 1)
    q, k = (step.units("v", by, "mean", "projector").z.detach() for by in ("encoder", "teacher"))
    moved = k + queue.z[(F.normalize(k, dim=1) @ F.normalize(queue.z, dim=1).T).argmax(1)]
    expected = 2 - 2 * F.cosine_similarity(q, moved[torch.arange(8) ^ 1], dim=1).mean()
    assert mean(assembly(batch, 0.1)["contrast"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_recipe_by_hand_and_that_no_gradient_passes_through_a_mixture() -> None:
    assembly, plain = assemble(), assemble(f"{LINE}.transform=null")
    plain.load_state_dict(assembly.state_dict())
    first, second = draw(assembly), draw(assembly, 4)
    for a in (assembly, plain):
        run(a, [first], 0.0)
    step = Step(assembly, second, 0.1, 1)
    q = step.units("v", head="projector", level="mean")
    k = Units.cat([step.units("v", "teacher", head="projector", level="mean"), assembly.objectives["contrast"].queue.units()])
    repels = assembly.objectives["contrast"].relation.pairs(q, k).neg
    z, _, weight = mixtures(q.z, k.z, repels, 5, 6, 3, step.rng("mix", q))
    query, key, expected = F.normalize(q.z.detach(), dim=1), F.normalize(k.z, dim=1), 0.0
    for i in range(8):
        pos = float(query[i] @ key[i ^ 1]) / 0.2
        logits = [pos, *(float(query[i] @ key[j]) / 0.2 for j in range(len(key)) if repels[i, j] > 0)]
        logits += [float(query[i] @ z[i, s]) / 0.2 for s in range(9) if weight[i, s] > 0]
        expected += (math.log(sum(map(math.exp, logits))) - pos) / 8
    loss = assembly(second, 0.1)["contrast"]
    assert mean(loss) == pytest.approx(expected, rel=1e-4) and mean(loss) > mean(plain(second, 0.1)["contrast"]) + 0.1
    assert not z.requires_grad and q.z.requires_grad
    total({"contrast": loss}).backward()
    assert all(p.grad is not None for p in assembly.heads.parameters())
    queue = assembly.objectives["contrast"].queue
    assembly.after(0.1)
    assert int(queue.place) == 16 and queue.weight.sum() == 16  # the queue takes the batch's own keys alone


def test_mixtures_depend_on_their_own_sample_alone_so_that_a_batch_can_be_split() -> None:
    assembly = assemble()
    batch = draw(assembly)
    step = Step(assembly, batch, 0.1, 1)
    whole = step.rng("mix", step.units("v", level="mean")).uniform("alpha", 3)
    parts = [Step(assembly, part, 0.1, 1) for part in batch.split(2)]
    assert torch.equal(whole, torch.cat([p.rng("mix", p.units("v", level="mean")).uniform("alpha", 3) for p in parts]))
    dense = step.rng("mix", step.units("v", level="dense")).uniform("alpha")
    assert len(whole.unique()) == whole.numel() and len(dense.unique()) == len(dense) == 8 * 4


def test_a_run_resumes_with_its_queue_and_the_same_mixtures() -> None:
    going, resumed = assemble(), assemble()
    for i in range(2):
        run(going, [draw(going, 4 * i)], i / 10)
    resumed.load_state_dict(going.state_dict())
    third = draw(going, 8)
    assert mean(going(third, 0.2)["contrast"]) == mean(resumed(third, 0.2)["contrast"])


@pytest.mark.parametrize(("change", "says"), [
    (f"{LINE}.loss={{cosine: {{}}}}", "mix makes negatives, and this loss does not repel"),
    (f"{LINE}.transform=mixx", "no transform called 'mixx'; did you mean mix"),
    (f"{LINE}.transform.mix.hardest=1", "greater than or equal to 2"),
])
def test_what_cannot_be_is_refused_with_the_reason(change: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        load("image/mochi", [change])
    assert says in str(error.value)
