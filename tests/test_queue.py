"""A queue of keys and keys without gradient, in whole recipes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.platform.assembly import Assembly, total
from meristem.platform.contrastive.queue import Queue
from meristem.platform.objectives import Items, Loss, Units
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

TINY = ("encoder.transformer.width=24", "encoder.transformer.depth=1", "encoder.transformer.heads=2", "views.v.size=[16, 16]",
        "modality.image.patch=[8, 8]", "train.seed=1")
MOCO = ("heads.predictor=null", "objectives.contrast.contrastive.predictor=null", "objectives.contrast.contrastive.queue=20",
        "heads.projector.mlp.norm=layer", "heads.projector.mlp.last_norm=false")
SIMSIAM = ("teacher=null", "objectives.contrast.contrastive.by=encoder", "objectives.contrast.contrastive.stop_gradient=true",
           "objectives.contrast.contrastive.loss={cosine: {}}", "objectives.contrast.contrastive.negatives=null")
LINE = "objectives.contrast.contrastive"


def assemble(*more: str) -> Assembly:
    torch.manual_seed(0)
    return Assembly(load("image/moco-v3", [*TINY, *more]))


def draw(assembly: Assembly, first: int = 0, n: int = 4, rows: Sequence[int] | None = None) -> Batch:
    """n samples of noise, two looks each."""
    g = torch.Generator().manual_seed(first)
    frame = Frame(torch.eye(3).expand(2 * n, -1, -1), (16, 16), torch.ones(2 * n, 2), ("px", "px"))
    view = View("v", torch.randn(2 * n, assembly.recipe.modality.channels, 16, 16, generator=g), frame,
                torch.arange(n).repeat_interleave(2), torch.arange(2).repeat(n))
    cursor = torch.arange(first, first + n)
    return Batch(Items(cursor if rows is None else torch.tensor(rows), cursor), {"v": view})


def mean(loss: Loss) -> float:
    return float(loss.total.detach() / loss.count)


def keys(assembly: Assembly, batch: Batch) -> Units:
    return Step(assembly, batch, 0.0, 1).units("v", "teacher", head="projector")


def run(assembly: Assembly, batches: Sequence[Batch], progress: float) -> None:
    for batch in batches:
        assembly(batch, progress)
    assembly.after(progress)


def units(values: Sequence[float]) -> Units:
    x = torch.tensor(values)
    return Units(x[:, None], {"item": x.long(), "view": x.long() % 2}, torch.ones(len(x)))


def test_it_holds_the_last_keys_first_in_first_out() -> None:
    queue, pushed = Queue(5, 1, ("item", "view")), list(range(1, 4))
    for step, count in enumerate((3, 1, 4, 2, 7)):
        pushed = list(range(10 * step, 10 * step + count))
        queue.note(units(pushed[:1]), step / 9)
        if count > 1:
            queue.note(units(pushed[1:]), step / 9)
        queue.after()
        queue.after()  # a second call has nothing new to add
        kept = sorted(queue.units().key["item"][queue.weight > 0].tolist())
        past = [10 * s + i for s, c in enumerate((3, 1, 4, 2, 7)[:step + 1]) for i in range(c)]
        assert kept == sorted(past[-5:])
    assert torch.equal(queue.units().z[:, 0].long(), queue.units().key["item"])
    assert torch.equal(queue.units().key["view"], queue.units().key["item"] % 2)


def test_a_skipped_step_is_forgotten() -> None:
    queue = Queue(5, 1, ("item", "view"))
    queue.note(units([1, 2]), 0.1)  # not finite: the loop does not call after()
    queue.note(units([3]), 0.2)
    queue.after()
    assert queue.units().key["item"].tolist() == [3, -1, -1, -1, -1]


def test_queued_keys_repel_as_in_moco() -> None:
    """He et al. 2020, algorithm 1, but that the batch's other keys repel too."""
    assembly, tau = assemble(*MOCO), 0.2
    first, second = draw(assembly), draw(assembly, 4)
    before = keys(assembly, first)
    with_empty = mean(assembly(first, 0.0)["contrast"])
    alone = mean(assemble(*MOCO, f"{LINE}.queue=null")(first, 0.0)["contrast"])
    assert with_empty == pytest.approx(alone, rel=1e-6)  # empty places weigh nothing
    assembly.after(0.0)
    q = F.normalize(Step(assembly, second, 0.0, 1).units("v", head="projector").z, dim=1)
    k = F.normalize(keys(assembly, second).z, dim=1)
    old, expected, look = F.normalize(before.z, dim=1), 0.0, second.views["v"].look
    for i in range(8):
        others = [j for j in range(8) if look[j] != look[i]]  # negatives: ~same(view), and below for the queue
        queued = [j for j in range(8) if before.key["view"][j] != look[i]]
        logits = torch.cat([k[others] @ q[i], old[queued] @ q[i]]) / tau
        expected += float((logits.logsumexp(0) - k[i ^ 1] @ q[i] / tau).detach()) / 8
    assert mean(assembly(second, 0.1)["contrast"]) == pytest.approx(expected, rel=1e-4)


def test_it_is_filled_once_per_optimiser_step_from_all_micro_batches() -> None:
    whole, parts = assemble(*MOCO), assemble(*MOCO)
    batch = draw(whole)
    run(whole, [batch], 0.0)
    run(parts, batch.split(2), 0.0)
    for name, x in whole.state_dict().items():
        if ".queue." in name:
            torch.testing.assert_close(x, parts.state_dict()[name], atol=1e-5, rtol=1e-4)
    queue = parts.objectives["contrast"].queue
    assert int(queue.place) == 8 and queue.weight.sum() == 8
    parts(batch, 0.1)
    assert int(queue.place) == 8  # not before the optimiser's step
    parts.eval()(batch, 0.2)
    parts.after(0.2)
    assert int(queue.place) == 16  # what evaluation met stays out; the noted keys of the last training pass enter


def test_keys_of_every_rank_enter_every_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = assemble(*MOCO)
    other = keys(assembly, draw(assembly, 4))
    monkeypatch.setattr(Step, "gather", lambda step, k, even: Units.cat([k, other]))
    run(assembly, [draw(assembly)], 0.0)
    assert sorted(set(assembly.objectives["contrast"].queue.units().key["item"].tolist())) == [-1, *range(8)]


def test_it_is_saved_and_resumed() -> None:
    going, resumed = assemble(*MOCO), assemble(*MOCO)
    run(going, [draw(going)], 0.0)
    run(going, [draw(going, 4)], 0.1)
    resumed.load_state_dict(going.state_dict())
    third = draw(going, 8)
    assert mean(going(third, 0.2)["contrast"]) == mean(resumed(third, 0.2)["contrast"])
    assert mean(assemble(*MOCO)(third, 0.2)["contrast"]) != mean(going(third, 0.2)["contrast"])


def test_older_looks_at_a_sample_can_be_kept_from_repelling_it() -> None:
    """An epoch later the queue still holds a small data set's own samples."""
    blind, aware = assemble(*MOCO), assemble(*MOCO, f"{LINE}.negatives=~same(row)")
    losses = {}
    for name, assembly in (("blind", blind), ("aware", aware)):
        run(assembly, [draw(assembly, n=1, rows=[0])], 0.0)
        losses[name] = [mean(assembly(draw(assembly, 1, n=1, rows=[row]), 0.1)["contrast"]) for row in (0, 1)]
    assert losses["aware"][0] == pytest.approx(0, abs=1e-6)  # nobody else is there to repel
    assert min(losses["aware"][1], *losses["blind"]) > 0.01


def test_drawn_whole_numbers_and_rows_are_keys_of_units() -> None:
    assembly = assemble()
    batch = draw(assembly, 4, rows=[9, 8, 7, 6])
    view = batch.views["v"]
    view.params |= {"speed": torch.arange(8) % 3, "noise_key": torch.arange(8), "zoom": torch.rand(8),
                    "flip": torch.zeros(8, 2, dtype=torch.int64)}
    key = Step(assembly, batch, 0.0, 1).units("v").key
    assert key.keys() == {"item", "row", "view", "look", "speed"} and key["look"].tolist() == [0, 1] * 4
    assert torch.equal(key["speed"], view.params["speed"])
    assert key["row"].tolist() == [9, 9, 8, 8, 7, 7, 6, 6] and key["item"].tolist() == [4, 4, 5, 5, 6, 6, 7, 7]
    dense = Step(assembly, batch, 0.0, 1).units("v", level="dense").key
    assert torch.equal(dense["speed"], view.params["speed"].repeat_interleave(4))


def test_simsiam_by_hand() -> None:
    assembly = assemble(*SIMSIAM)
    batch = draw(assembly)
    step, look = Step(assembly, batch, 0.0, 1), batch.views["v"].look
    z, p = step.units("v", head="projector").z, step.units("v", head="predictor").z
    p1, p2, z1, z2 = (x[look == i] for x in (p, z) for i in (0, 1))
    expected = sum(-F.cosine_similarity(a, b.detach(), dim=1).mean() / 2 for a, b in ((p1, z2), (p2, z1)))
    params = list(assembly.parameters())
    by_hand = torch.autograd.grad(expected, params, allow_unused=True)
    assembly.zero_grad()
    loss = assembly(batch, 0.0)["contrast"]
    assert mean(loss) == pytest.approx(2 + 2 * float(expected.detach()), rel=1e-5)
    (loss.total / loss.count / 2).backward()
    for x, g in zip(params, by_hand, strict=True):
        assert (x.grad is None) == (g is None)
        if g is not None:
            torch.testing.assert_close(x.grad, g, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("changes", "says"), [
    ((*SIMSIAM, f"{LINE}.stop_gradient=false"), "would make all units alike; set by: teacher, or stop_gradient: true"),
    (("teacher=null", f"{LINE}.by=encoder", f"{LINE}.queue=8"), "queued keys have no gradient"),
    ((*SIMSIAM, f"{LINE}.queue=8"), "does not repel"),
    ((f"{LINE}.queue=0",), "greater than or equal to 1"),
    ((f"{LINE}.loss={{margin: {{}}}}",), "margin"),
])
def test_what_cannot_be_is_refused_with_the_reason(changes: tuple[str, ...], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        load("image/moco-v3", changes)
    assert says in str(error.value)


def test_a_queue_serves_keys_without_gradient_too() -> None:
    assembly = assemble("teacher=null", f"{LINE}.by=encoder", f"{LINE}.stop_gradient=true", f"{LINE}.queue=8")
    run(assembly, [draw(assembly)], 0.0)
    losses = assembly(draw(assembly, 4), 0.1)
    total(losses).backward()
    assert all(p.grad is not None for p in assembly.heads.parameters())
    assert not assembly.objectives["contrast"].queue.z.requires_grad
