"""The contrastive engine in its recipes: passes, losses by hand, what a recipe may not ask."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.platform.assembly import Assembly, total
from meristem.platform.objectives import Items, Loss, Units
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

METHODS = ("simclr", "moco-v3", "dino", "ibot", "swav", "mae+simclr")
TINY = ("encoder.transformer.width=24", "encoder.transformer.depth=2", "encoder.transformer.heads=2", "train.seed=1")
SMALL = {"image": {"x": "[16, 16]", "v": "[16, 16]", "g": "[16, 16]", "l": "[8, 8]"},
         "volume": {"x": "[16, 16, 16]", "v": "[16, 16, 16]", "g": "[16, 16, 16]", "l": "[8, 8, 8]"}}
PATCH = {"image": "modality.image.patch=[4, 4]", "volume": "modality.volume.patch=[4, 4, 4]"}


def assemble(method: str, kind: str = "image", more: Sequence[str] = ()) -> Assembly:
    views = load(f"{kind}/{method}").views
    sizes = [f"views.{name}.size={SMALL[kind][name]}" for name in views]
    torch.manual_seed(0)
    return Assembly(load(f"{kind}/{method}", [*TINY, *sizes, PATCH[kind], *more]))


def draw(assembly: Assembly, n: int = 6, seed: int = 0, first: int = 0) -> Batch:
    """n samples of noise in every view."""
    g, views = torch.Generator().manual_seed(seed), {}
    for name, options in assembly.recipe.views.items():
        rows, size = n * options.count, options.size
        frame = Frame(torch.eye(len(size) + 1).expand(rows, -1, -1), size, torch.ones(rows, len(size)), ("mm",) * len(size))
        views[name] = View(name, torch.randn(rows, assembly.recipe.modality.channels, *size, generator=g), frame,
                           torch.arange(n).repeat_interleave(options.count), torch.arange(options.count).repeat(n))
    return Batch(Items(torch.arange(n), torch.arange(first, first + n)), views)


def mean(loss: Loss) -> float:
    return float(loss.total.detach() / loss.count)


@pytest.mark.parametrize("method", ["moco-v3", "dino"])
def test_class_tokens_alone_are_made_where_nothing_else_is_read(method: str) -> None:
    assembly = assemble(method)
    assert assembly.only_cls
    batch, found = draw(assembly), []
    for alone in (True, False):
        assembly.only_cls = alone
        loss = total(assembly(batch, 0.5))
        assert assembly.last_step is not None
        assert all((encoded.tokens.shape[1] > 0) != alone for encoded in assembly.last_step._encoded.values())
        learning = [p for p in assembly.parameters() if p.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, learning, allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ibot", "mae+simclr", "simclr"])
def test_all_tokens_are_made_where_some_are_read(method: str) -> None:
    assert not assemble(method).only_cls


@pytest.mark.parametrize(("method", "passes"), [
    ("simclr", ["encoder(v)"]),
    ("moco-v3", ["encoder(v)", "teacher(v)"]),
    ("dino", ["encoder(g)", "encoder(l)", "teacher(g)"]),
    ("ibot", ["encoder(g, plan)", "encoder(l)", "teacher(g)"]),
    ("swav", ["encoder(g)", "encoder(l)"]),
    ("mae+simclr", ["encoder(x, plan)"]),
])
@pytest.mark.parametrize("kind", ["image", "volume"])
def test_passes_are_made_once_and_shared(method: str, passes: list[str], kind: str) -> None:
    assembly = assemble(method, kind)
    losses = assembly(draw(assembly), 0.0)
    assert assembly.last_step is not None and assembly.last_step.passes == passes
    assert all(torch.isfinite(loss.total) and loss.count > 0 for loss in losses.values())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_student_and_never_the_teacher(method: str) -> None:
    assembly = assemble(method)
    total(assembly(draw(assembly), 0.0)).backward()
    unused = {"encoder.cls"} if method in ("simclr", "swav") else set()  # pooled over tokens; the class token is one of them
    for name, p in assembly.named_parameters():
        if name.startswith("teacher."):
            assert p.grad is None and not p.requires_grad
        elif name not in unused and "mask_token" not in name:
            assert p.grad is not None and p.grad.isfinite().all(), name
    before = {n: p.clone() for n, p in assembly.named_parameters() if n.startswith("teacher.")}
    with torch.no_grad():
        for p in assembly.encoder.parameters():
            p += 0.1
    assembly.after(0.0)
    assert all(not torch.equal(p, before[n]) for n, p in assembly.named_parameters() if n in before and ".encoder." in n)


@pytest.mark.parametrize("method", ["simclr", "mae+simclr", "moco-v3"])
def test_a_batch_can_be_learnt_by_heart(method: str) -> None:
    assembly = assemble(method)
    batch = draw(assembly)
    optimiser = torch.optim.AdamW([p for p in assembly.parameters() if p.requires_grad], lr=2e-3)
    course = []
    for _ in range(20):
        losses = assembly(batch, 0.0)
        course.append(mean(losses["contrast"]))
        optimiser.zero_grad()
        total(losses).backward()
        optimiser.step()
        assembly.after(0.0)
    assert course[-1] < 0.5 * course[0]


def test_moco_v3_by_hand() -> None:
    assembly = assemble("moco-v3")
    for p in assembly.encoder.parameters():  # a student that has left its teacher
        p.data += 0.01 * torch.randn_like(p)
    batch, tau = draw(assembly), 0.2
    step = Step(assembly, batch, 0.0, 1)
    student, teacher = (step.encode("v", by).summary["cls"] for by in ("encoder", "teacher"))
    look = batch.views["v"].look

    def through(by: str, z: Tensor, i: int) -> Tensor:
        z = assembly.module(by, "projector").layers(z[look == i])
        return F.normalize(z if by == "teacher" else assembly.heads["predictor"].layers(z), dim=-1)

    losses = assembly(batch, 0.0)
    expected = sum(2 * tau * F.cross_entropy(through("encoder", student, i) @ through("teacher", teacher, 1 - i).T / tau,
                                             torch.arange(6)) for i in (0, 1))
    assert losses["contrast"].weight * mean(losses["contrast"]) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_ibot_by_hand() -> None:
    """Both lines from the two shared passes, pair by pair."""
    assembly = assemble("ibot")
    for objective in assembly.objectives.values():
        objective.loss.centre.normal_(std=0.1)
    batch, progress = draw(assembly), 0.05
    step = Step(assembly, batch, progress, 1)
    plan, student, teacher = step.plan("g"), step.encode("g", masked=True), step.encode("g", "teacher")
    small, g, items = step.encode("l"), batch.views["g"], batch.views["l"].item
    assert plan.hidden.any(1).any() and not plan.hidden.any(1).all()  # some rows are masked, some are not
    heads, warm = {by: assembly.module(by, "head") for by in ("encoder", "teacher")}, 0.04 + 0.03 * progress / 0.1

    def logits(by: str, z: Tensor) -> Tensor:
        return heads[by](z, torch.zeros(len(z))).detach().double()

    def term(q: Tensor, t: Tensor, line: str) -> float:
        target = ((t - assembly.objectives[line].loss.centre.double()) / warm).softmax(-1)
        return float(-(target * (q / 0.1).log_softmax(-1)).sum())

    q, s, t = (logits(by, z) for by, z in (("encoder", student.summary["cls"]), ("encoder", small.summary["cls"]),
                                           ("teacher", teacher.summary["cls"])))
    cls = [term(q[i], t[j], "cls") for i in range(12) for j in range(12) if g.item[i] == g.item[j] and g.look[i] != g.look[j]]
    cls += [term(s[i], t[j], "cls") for i in range(24) for j in range(12) if items[i] == g.item[j]]
    patch = [term(logits("encoder", student.tokens[i, n:n + 1])[0], logits("teacher", teacher.tokens[i, n:n + 1])[0], "patch")
             for i in range(12) for n in range(16) if plan.hidden[i, n]]
    losses = assembly(batch, progress)
    assert (losses["cls"].count, losses["patch"].count) == (len(cls), len(patch)) == (6 * 2 * 5, int(plan.hidden.sum()))
    assert mean(losses["cls"]) == pytest.approx(sum(cls) / len(cls), rel=1e-4)
    assert mean(losses["patch"]) == pytest.approx(sum(patch) / len(patch), rel=1e-4)


def test_ibots_centres_follow_each_its_own_line() -> None:
    assembly = assemble("ibot")
    batch = draw(assembly)
    assembly(batch, 0.0)
    step = assembly.last_step
    assert step is not None
    means = {line: step.units("g", "teacher", level, "head").z.mean(0) for line, level in (("cls", "cls"), ("patch", "dense"))}
    assembly.after(0.0)
    for line, expected in means.items():
        assert torch.allclose(assembly.objectives[line].loss.centre, 0.1 * expected, atol=1e-6)
    kept = {name: x.clone() for name, x in assembly.state_dict().items()}
    assert "objectives.cls.loss.centre" in kept  # saved and resumed
    assembly.eval()(batch, 0.0)
    assembly.after(0.0)
    assert torch.equal(kept["objectives.cls.loss.centre"], assembly.objectives["cls"].loss.centre)


@pytest.mark.parametrize("method", ["simclr", "moco-v3", "dino", "dcl", "groco", "mochi"])
def test_two_ranks_sum_to_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of a batch, keys gathered, against the whole; norms do not look at the batch here."""
    layer = [f"heads.{head}.mlp.norm=layer" for head in load(f"image/{method}").heads if head != "head"]
    assembly = assemble(method, more=layer)
    batch, gathered = draw(assembly, n=8), []

    def gather(step: Step, units: Units, even: bool = False) -> Units:
        gathered.append(units)
        return units

    monkeypatch.setattr(Step, "gather", gather)
    whole = assembly(batch, 0.0)
    monkeypatch.setattr(Step, "gather", lambda step, units, even: gathered[0])
    halves = [assembly(half, 0.0) for half in batch.split(2)]
    for name, loss in whole.items():
        assert sum(float(h[name].total.detach()) for h in halves) == pytest.approx(float(loss.total.detach()), rel=1e-4)
        assert sum(float(h[name].count) for h in halves) == float(loss.count)
    assert bool(gathered) == (method != "dino")  # a relation within samples needs no other rank


def test_a_sample_is_its_cursor_so_negatives_may_come_from_any_rank() -> None:
    assembly = assemble("simclr")
    keys = [Step(assembly, draw(assembly, first=first), 0.0, 1).units("v").key["item"] for first in (0, 6)]
    assert not set(keys[0].tolist()) & set(keys[1].tolist())


@pytest.mark.parametrize(("method", "change", "says"), [
    ("simclr", "objectives.contrast.contrastive.queries=[w]", "there is no view 'w' (views: v)"),
    ("simclr", "objectives.contrast.contrastive.queries=[{view: v, masked: true}]", "masking.v is not set"),
    ("simclr", "objectives.contrast.contrastive.head=projecter", "there is no head 'projecter' (heads: projector)"),
    ("simclr", "objectives.contrast.contrastive.by=teacher", "add 'projector' to teacher.of"),
    ("simclr", "objectives.contrast.contrastive.relation=same(item) - sam(view)", "no term called 'sam'; did you mean same"),
    ("simclr", "objectives.contrast.contrastive.relation=same(token)", "set level: dense"),
    ("simclr", "views.v.count=1", "finds no pair"),
    ("simclr", "objectives.contrast.contrastive.loss={dino: {}}", "its head must be `prototypes`"),
    ("simclr", "heads.projector.mlp.input=projector", "stands on 'projector', which is not among the heads before it"),
    ("moco-v3", "heads.predictor.mlp.input=null", "predictor 'predictor' must stand on the head"),
    ("moco-v3", "teacher.of=[encoder]", "add 'projector' to teacher.of"),
    ("dino", "encoder.transformer.cls=false", "needs an encoder with a class token"),
    ("ibot", "masking.g={random: {ratio: 0.5}}", "corruption: replace"),
    ("ibot", "objectives.patch.contrastive.level=cls", "set level: dense"),
])
def test_what_cannot_be_is_refused_with_the_reason(method: str, change: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(f"image/{method}", [change])
    assert says in str(error.value)


@pytest.mark.parametrize("kind", ["image", "volume"])
@pytest.mark.parametrize("method", METHODS)
def test_recipes_say_what_they_follow_and_load_from_their_dump(method: str, kind: str) -> None:
    recipe = load(f"{kind}/{method}")
    assert recipe.name == method and recipe.follows and recipe.departs
    assert type(recipe).model_validate(recipe.dump()).hash == recipe.hash
    assert recipe.transfer == ("teacher" if method in ("dino", "ibot") else "encoder")
