"""One 2D net for images and for slices of volumes: slices alone, hidden slices, whole volumes, and what is shared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_maps import rand
from resuming import goes_on_to_the_same_bits
from torch.nn import functional as F

import meristem
from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.platform import joint
from meristem.platform.assembly import Assembly, total
from meristem.platform.contrastive.losses import SwAV
from meristem.platform.contrastive.relations import Relation
from meristem.platform.joint import JointAssembly
from meristem.platform.masked.slices import Slices
from meristem.platform.objectives import Items, Units
from meristem.platform.recipe import load, override, read
from meristem.platform.step import Batch, Step
from meristem.tasks.inspection import noise

UNET = "{unet: {widths: [4, 8, 8], blocks: [1, 1, 1], decoder: false}}"
HALF = "masking.g.random.ratio=0.5"
SMALL = [f"encoder={UNET}", "members.volume.encoder.sequence={depth: 1, heads: 2}", "train.workers=0",
         "members.image.modality.image.channels=1", "members.image.views.g.size=[16,16]",
         "members.volume.views.g.size=[6,16,16]", *(f"members.{m}.train.batch=3" for m in ("image", "volume"))]


def made(*more: str) -> Assembly:
    torch.manual_seed(0)
    return Assembly(load("volume/joint-2d3d", [f"encoder.sequence={{encoder: {UNET}, depth: 2, heads: 2}}",
                                               "views.g.size=[6,16,16]", HALF, *more]))


def batch(n: int = 3) -> Batch:
    """Two looks of n volumes of noise; their frames put all slices of one volume at the same heights."""
    rows = torch.arange(2 * n)
    frame = Frame(torch.eye(4).repeat(2 * n, 1, 1), (6, 16, 16), torch.ones(2 * n, 3), ("mm",) * 3)
    view = View("g", rand(2 * n, 1, 6, 16, 16, seed=0), frame, rows // 2, rows % 2)
    return Batch(Items(torch.arange(n), torch.arange(n)), {"g": view})


def test_the_swapped_prediction_is_the_authors() -> None:
    """Codes and loss of ssl_swav_3D.py, duyhominhnguyen/Self-supervised-Image-Volume-Intra-Inter-Contrastive at 2cc652e:
    cosines of numpy's default_rng(0) and (1), (6, 8) for each look, with 5 prototypes of default_rng(2)."""
    prototypes = F.normalize(rand(5, 8, seed=2))
    scores = torch.cat([F.normalize(rand(6, 8, seed=i)) @ prototypes.T for i in (0, 1)])
    units = Units(scores, {"item": torch.arange(6).repeat(2), "view": torch.arange(2).repeat_interleave(6)}, torch.ones(12))
    loss = SwAV().build(5)(units, units, Relation("same(item) - same(view)"), SimpleNamespace(value=lambda x: x))
    assert float(loss.total / loss.count) == pytest.approx(3.988691806793213, rel=1e-5)


def test_one_masked_pass_serves_slices_hidden_slices_and_volumes() -> None:
    assembly, data = made(), batch()
    losses = assembly(data, 0.0)
    step = assembly.last_step
    assert step is not None and step.passes == ["encoder(g, plan)"] and set(losses) == {"intra", "masked", "inter"}
    assert (float(losses["intra"].count), float(losses["masked"].count), float(losses["inter"].count)) == (36, 18, 6)
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in assembly.encoder.named_parameters())
    relation = Relation("same(item) & same(token) - same(view)")
    units = step.units("g", level="slices", head="slice", masked=True)
    pairs = relation.matches(units, units)
    height = units.point[:, 0]
    assert torch.equal(height[pairs.q], height[pairs.k]) and len(pairs.q) == 36


def test_a_hidden_slice_is_told_from_the_others_and_not_from_itself() -> None:
    assembly, data = made(), batch()
    assembly.eval()

    def predicted(data: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        step = Step(assembly, data, 0.0, 0)
        encoded = step.encode("g", masked=True)
        return encoded.tokens, step.plan("g").hidden.unflatten(1, (6, -1)).all(2)

    tokens, hidden = predicted(data)
    assert hidden.sum(1).tolist() == [3] * 6
    unseen, seen = data.views["g"].array.clone(), data.views["g"].array.clone()
    for row in range(6):
        unseen[row, :, hidden[row]] = 7 * rand(3, 16, 16, seed=row)
        seen[row, :, ~hidden[row]] = 7 * rand(3, 16, 16, seed=row)
    array = data.views["g"].array
    data.views["g"].array = unseen
    assert torch.equal(predicted(data)[0], tokens)
    data.views["g"].array = seen
    assert not torch.isclose(predicted(data)[0], tokens, atol=1e-4).all(-1).any()
    data.views["g"].array = array


def test_the_loss_of_hidden_slices_is_a_loop_over_them() -> None:
    assembly, data = made(), batch()
    step = Step(assembly, data, 0.0, 0)
    alone, plan = step.encode("g", masked=True).slices, step.plan("g")
    assert alone is not None
    prediction = rand(*alone.shape, seed=3)
    found = Slices().compare(step, "g", None, prediction, plan.predict)
    expected = [float((prediction[b, t] - alone[b, t]).square().mean().detach()) for b in range(6) for t in range(6)
                if plan.hidden.unflatten(1, (6, -1))[b, t].all()]
    assert float(found[1]) == len(expected) == 18 and float(found[0].detach()) == pytest.approx(sum(expected), rel=1e-5)
    assert not found[0].requires_grad  # the target is as if constant


def test_a_slice_alone_is_the_image_of_it() -> None:
    """The net inside gives a slice of a volume the vector that it gives that slice as an image."""
    assembly, data = made(), batch()
    alone = Step(assembly, data, 0.0, 0).encode("g").slices
    image = Assembly(load("image/joint-2d3d", [f"encoder={UNET}", "modality.image.channels=1", "views.g.size=[16,16]"]))
    image.encoder.load_state_dict(assembly.encoder.inner.state_dict())
    rows = torch.arange(36)
    frame = Frame(torch.eye(3).repeat(36, 1, 1), (16, 16), torch.ones(36, 2), ("px", "px"))
    view = View("g", data.views["g"].array.transpose(1, 2).flatten(0, 1), frame, rows, 0 * rows)
    single = Step(image, Batch(Items(rows, rows), {"g": view}), 0.0, 0).encode("g").summary["mean"]
    torch.testing.assert_close(alone.flatten(0, 1), single)


def test_images_and_volumes_train_one_net_which_is_stored_once() -> None:
    recipe = joint.build(override(read("joint/joint-2d3d"), SMALL))
    one = JointAssembly(recipe)
    net = one.of("image").encoder
    assert one.of("volume").encoder.inner is net
    state = one.state_dict()
    assert len({x.data_ptr() for x in state.values()}) == len(state)
    assert not any(n.startswith("members.volume.encoder.inner") for n in state)
    other = JointAssembly(joint.build(override(read("joint/joint-2d3d"), [*SMALL, "train.seed=1"])))
    other.load_state_dict(state)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for member in ("image", "volume"):
        data = noise(recipe.members[member].recipe)
        data.member = member
        before = [p.detach().clone() for p in net.parameters()]
        optimiser = torch.optim.SGD(one.parameters(), lr=0.1)
        optimiser.zero_grad()
        total(one(data, 0.0)).backward()
        optimiser.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_joint_run_resumes_and_its_volumes_can_be_probed(image_folder: Path, volume_folder: Path, tmp_path: Path) -> None:
    def run(out: Path, resume: bool) -> None:
        meristem.pretrain("joint/joint-2d3d", {"image": image_folder, "volume": volume_folder}, out,
                          [*SMALL, "train.steps=6", "train.checkpoint_every=3", "train.keep=3"], cache=tmp_path / "cache",
                          quiet=True, resume=resume)

    goes_on_to_the_same_bits(run, tmp_path, 3, 6)
    meristem.embed(tmp_path / "whole" / "volume", volume_folder, tmp_path / "embedded", quiet=True)
    meristem.embed(tmp_path / "whole" / "image", image_folder, tmp_path / "embedded-images", quiet=True)


def test_volumes_read_whole_cannot_share_a_net_with_images() -> None:
    with pytest.raises(RecipeError, match="read volumes slice by slice"):
        JointAssembly(joint.build(override(read("joint/mae"), [f"encoder={UNET}", *(
            f"members.{m}.{line}" for m in ("image", "volume") for line in (
                "masking.x.random.corruption=replace", "objectives.pixels.masked.predictor=linear"))]), ["image", "volume"]))


@pytest.mark.parametrize(("recipe", "change", "says"), [
    ("volume/mae", ["objectives.pixels.masked.target=slices"], "choose encoder: sequence"),
    ("volume/simclr", ["objectives.contrast.contrastive.level=slices"], "choose encoder: sequence"),
    ("volume/joint-2d3d", ["masking.g.random.corruption=drop"], "can only take replace")])
def test_what_cannot_be_is_refused_with_the_reason(recipe: str, change: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, change)


@pytest.mark.parametrize(("change", "says"), [("modality.volume.patch=[2,8,8]", r"patch to \[1, 8, 8\]"),
                                              ("encoder.sequence.heads=3", "3 heads cannot share"),
                                              ("masking.g.random.unit=1", "hides parts of some")])
def test_slices_must_be_whole(change: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        made(change)(batch(), 0.0)
