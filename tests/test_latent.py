"""Features as targets: the published step on the same weights, gradients, the order of passes, what is refused, it learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.platform.assembly import Assembly, total
from meristem.platform.masked.targets import Features
from meristem.platform.objectives import Items
from meristem.platform.recipe import Recipe, build, merge, override, read
from meristem.platform.step import Batch, Step

SMALL = ["modality.volume.patch=[4, 4, 4]", "views.x.size=[8, 24, 24]",
         "encoder.transformer={width: 24, depth: 2, heads: 2}",
         "objectives.features.masked.predictor.decoder={depth: 2, width: 12, heads: 1}"]
REPLACE = ["masking.x.block.corruption=replace", "objectives.features.masked.predictor=linear"]


def recipe(*assignments: str) -> Recipe:
    return build(override(merge(read("volume/base"), read("method/v-jepa")), [*SMALL, *assignments]), Recipe)


def make(*assignments: str) -> Assembly:
    """With a teacher that is not the student."""
    assembly = Assembly(recipe(*assignments))
    assert assembly.teacher is not None
    with torch.no_grad():
        for p in assembly.teacher.parameters():
            p += 0.1 * torch.randn_like(p)
    return assembly


def batch(array: Tensor) -> Batch:
    b, rows = len(array), torch.arange(len(array))
    frame = Frame(torch.eye(4).repeat(b, 1, 1), tuple(array.shape[2:]), torch.ones(b, 3), ("mm",) * 3)
    return Batch(Items(rows, rows), {"x": View("x", array, frame, rows, torch.zeros_like(rows))})


def test_the_loss_is_that_of_a_step_written_by_hand() -> None:
    """Row by row as the paper has it: targets from the whole view, normed; context tokens, then mask tokens, predicted; L1."""
    assembly, array = make(), torch.randn(3, 1, 8, 24, 24)
    losses = assembly(batch(array), 0.0)
    step = assembly.last_step
    assert step is not None
    teacher, student = assembly.teacher.copies["encoder"], assembly.encoder
    predictor = assembly.objectives["features"].predictor
    stream, hidden = step.stream("x"), step.plan("x").hidden
    assert stream.position is not None and 0 < int(hidden[0].sum()) < 72
    position, errors = stream.position, []
    with torch.no_grad():
        for row in range(3):
            gone, seen = torch.nonzero(hidden[row])[:, 0], torch.nonzero(~hidden[row])[:, 0]

            def encode(net: torch.nn.Module, tokens: Tensor, row: int = row) -> Tensor:
                x = torch.cat([net.cls, net.embed(stream.take(tokens[None].expand(3, -1)))[row:row + 1]], 1)
                return net.blocks(x, position[row:row + 1, tokens], prefix=1)[0][:, 1:]

            target = encode(teacher, torch.arange(72))[0, gone]
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            context = predictor.enter(encode(student, seen))
            x = torch.cat([context, predictor.mask_token.expand(1, len(gone), -1)], 1)
            x, _, _ = predictor.blocks(x, position[row:row + 1, torch.cat([seen, gone])])
            for k in range(len(gone)):
                errors.append((predictor.heads["content"](x[0, len(seen) + k]) - target[k]).abs().mean())
    loss = losses["features"]
    torch.testing.assert_close(loss.total / loss.count, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1"])
def test_each_loss_against_its_definition(loss: str, norm: str) -> None:
    assembly = make()
    step = Step(assembly, batch(torch.randn(2, 1, 8, 24, 24)), 0.0, 0)
    prediction, weight = torch.randn(2, 5, 24), torch.tensor([[1.0, 0.5, 0.0, 1.0, 1.0]]).expand(2, -1)
    index = torch.stack([torch.randperm(72)[:5] for _ in range(2)])
    target = Features.model_validate({"loss": loss, "norm": norm, "beta": 0.5})
    sums, count = target.compare(step, "x", index, prediction, weight)
    features, by_hand = step.encode("x", by="teacher").tokens, 0.0
    for b in range(2):
        for k in range(5):
            truth = features[b, index[b, k]]
            if norm == "layer":
                truth = (truth - truth.mean()) / (truth.var(unbiased=False) + 1e-5).sqrt()
            for d in (prediction[b, k] - truth).abs().tolist():
                e = {"mse": d * d, "l1": d, "smooth_l1": d * d / (2 * 0.5) if d < 0.5 else d - 0.25}[loss]
                by_hand += float(weight[b, k]) * e
    assert float(sums) == pytest.approx(by_hand, rel=1e-4)
    assert float(count) == pytest.approx(24 * 7.0)


@pytest.mark.parametrize("kind", ["decoder", "linear"])
def test_the_teachers_pass_comes_first_and_gradients_reach_student_and_predictor_alone(kind: str) -> None:
    assembly = make(*(REPLACE if kind == "linear" else []))
    losses = assembly(batch(torch.randn(2, 1, 8, 24, 24)), 0.0)
    assert assembly.last_step is not None and assembly.last_step.passes == ["teacher(x)", "encoder(x, plan)"]
    assert not assembly.last_step.encode("x", by="teacher").tokens.requires_grad
    total(losses).backward()
    unused = {"encoder.mask_token"} if kind == "decoder" else set()
    for name, p in assembly.named_parameters():
        if name.startswith("teacher."):
            assert p.grad is None and not p.requires_grad
        elif name not in unused:
            assert p.grad is not None and p.grad.isfinite().all(), name
            assert p.grad.any(), name


def test_the_teacher_follows_ever_more_slowly() -> None:
    assembly = make()
    assert assembly.teacher is not None
    mine, theirs = next(assembly.encoder.embed.parameters()), next(assembly.teacher.copies["encoder"].embed.parameters())
    for progress, momentum in ((0.0, 0.99), (0.5, 0.995), (1.0, 1.0)):
        before = theirs.clone()
        assembly(batch(torch.randn(2, 1, 8, 24, 24)), progress)
        assembly.after(progress)
        torch.testing.assert_close(theirs, momentum * before + (1 - momentum) * mine.detach())


def test_a_target_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(RecipeError, match="made by a teacher, and there is none"):
        recipe("teacher=null", "transfer=encoder")
    with pytest.raises(RecipeError, match="add `encoder` to teacher"):
        recipe("teacher.of=[]")
    with pytest.raises(RecipeError, match="this encoder's tokens are not those of the view"):
        recipe("encoder={unet: {widths: [4, 8, 8], blocks: [1, 1, 1]}}", *REPLACE)


def test_features_beside_content_share_the_students_pass() -> None:
    assembly = make("objectives.features.masked.target=null", "objectives.features.masked.readouts="
                    "{f: {target: features}, c: {target: content, weight: 0.5}}")
    losses = assembly(batch(torch.randn(2, 1, 8, 24, 24)), 0.0)
    assert set(losses) == {"features.f", "features.c"}
    assert assembly.last_step is not None and assembly.last_step.passes == ["teacher(x)", "encoder(x, plan)"]
    heads = assembly.objectives["features"].predictor.heads
    assert (heads["f"].out_features, heads["c"].out_features) == (24, 64)


def arrays(smooth: bool, rows: int, seed: int) -> Tensor:
    """Volumes (rows, 1, 8, 24, 24) that change slowly, so that what is hidden can be told from what is not; or noise."""
    noise = torch.randn(rows, 1, *((1, 2, 2) if smooth else (8, 24, 24)), generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (8, 24, 24), mode="trilinear")


@pytest.mark.parametrize("smooth", [True, False])
def test_it_learns_features_that_can_be_told_and_no_others(smooth: bool) -> None:
    """Against the best constant, each channel's median over the very features to be predicted. The teacher stands still."""
    assembly = make("masking.x.block={ratio: 0.5, min_block: 4, aspect: 0.75}", "teacher.momentum=1.0",
                    "objectives.features.masked.predictor.decoder={depth: 1, width: 48, heads: 2}")
    optimiser = torch.optim.AdamW(assembly.parameters(), 3e-3)
    for i in range(80):
        loss = total(assembly(batch(arrays(smooth, 16, i)), 0.0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        fresh = float(total(assembly(batch(arrays(smooth, 64, 1000)), 0.0)))
        assert assembly.last_step is not None
        features = assembly.last_step.encode("x", by="teacher").tokens
        features = F.layer_norm(features, features.shape[-1:])[assembly.last_step.plan("x").hidden]
        constant = float((features - features.median(0).values).abs().mean())
    assert fresh < 0.75 * constant if smooth else fresh > 0.98 * constant
