"""One transformer trained on several kinds of data in one run, and what becomes of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import meristem
from meristem import cli
from meristem.errors import CheckpointError, RecipeError
from meristem.platform import joint
from meristem.platform import recipe as recipes
from meristem.platform.joint import Joint, JointAssembly
from meristem.platform.training import checkpoint
from meristem.tasks.inspection import noise

TINY = ["encoder.transformer.width=24", "encoder.transformer.depth=2", "encoder.transformer.heads=2", "train.workers=0",
        *(f"members.{m}.train.batch=2" for m in ("image", "volume", "points")),
        *(f"members.{m}.objectives.pixels.masked.predictor.decoder={{depth: 1, width: 24, heads: 2}}"
          for m in ("image", "volume")),
        "members.image.views.x.size=[16,16]", "members.volume.views.x.size=[16,16,16]", "members.points.views.x.size=[64]",
        "members.points.modality.points.count=8", "members.points.modality.points.size=8"]
KINDS = ("image", "volume", "points")


def made(*more: str, members: tuple[str, ...] = KINDS) -> Joint:
    return joint.build(recipes.override(recipes.read("joint/mae"), [*TINY, *more]), members)


@pytest.fixture
def places(image_folder: Path, volume_folder: Path, tmp_path: Path) -> dict[str, Path]:
    clouds = tmp_path / "clouds"
    clouds.mkdir()
    for i in range(6):
        np.savez(clouds / f"{i}.npz", points=np.random.default_rng(i).normal(size=(100, 3)).astype(np.float32))
    return {"image": image_folder, "volume": volume_folder, "points": clouds}


def run(places: dict[str, Path], out: Path, *more: str, resume: bool = False) -> None:
    meristem.pretrain("joint/mae", places, out, [*TINY, *more], cache=out.parent / "cache", quiet=True, resume=resume)


def test_members_share_the_trunk_and_nothing_else() -> None:
    assembly = JointAssembly(made())
    first, second = assembly.of("image").encoder, assembly.of("points").encoder
    for name in ("blocks.blocks.0.attn.qkv.weight", "blocks.norm.weight", "cls", "mask_token"):
        assert dict(first.named_parameters())[name] is dict(second.named_parameters())[name]
    assert first.embed is not second.embed
    state = assembly.state_dict()
    assert sum("attn.qkv.weight" in name and "encoder" in name for name in state) == 2  # a block each, stored once
    assert len({x.data_ptr() for x in state.values()}) == len(state)


def test_weights_load_into_every_member() -> None:
    one, other = JointAssembly(made()), JointAssembly(made("train.seed=1"))
    other.load_state_dict(one.state_dict())
    for name in KINDS:
        for (n, a), b in zip(one.of(name).named_parameters(), other.of(name).parameters(), strict=True):
            assert torch.equal(a, b), n


def test_a_step_trains_the_trunk_and_its_own_member_only() -> None:
    recipe = made("members.points.weight=3.0")
    assembly = JointAssembly(recipe)
    batch = noise(recipe.members["points"].recipe)
    batch.member = "points"
    losses = assembly(batch, 0.0)
    assert all(name.startswith("points.") and loss.weight == 3.0 for name, loss in losses.items())
    torch.stack([loss.total for loss in losses.values()]).sum().backward()
    touched = {n for n, p in assembly.named_parameters() if p.grad is not None}
    assert any("members.image.encoder.blocks.blocks" in n for n in touched)  # the trunk, named by its first owner
    trunk = ("blocks.blocks", "blocks.norm", ".cls", ".mask_token")
    own = {n for n in touched if not any(part in n for part in trunk)}
    own |= {n for n in touched if "objectives" in n}
    assert own and all(n.startswith("members.points.") for n in own)


def test_turns_follow_the_ratio_and_the_seed() -> None:
    recipe = made("train.steps=4000", "members.image.ratio=3")
    count = Counter(recipe.turns())
    assert abs(count["image"] / 4000 - 0.6) < 0.03 and abs(count["points"] / 4000 - 0.2) < 0.03
    assert recipe.turns() == recipe.turns() != made("train.steps=4000", "train.seed=1").turns()


def test_a_joint_run_resumes_to_the_same_bits_and_each_member_is_a_run(places: dict[str, Path], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(places, whole, "train.steps=8", "train.checkpoint_every=4", "train.keep=5")
    (tmp_path / "parts").mkdir()
    for name in ("recipe.yaml", "metrics.jsonl"):
        (parts / name).write_bytes((whole / name).read_bytes())
    (parts / "checkpoints").mkdir()
    (whole / "checkpoints" / "step-00000004").rename(parts / "checkpoints" / "step-00000004")
    run(places, parts, "train.steps=8", "train.checkpoint_every=4", "train.keep=5", resume=True)
    a, b = checkpoint.read_weights(whole), checkpoint.read_weights(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for name in KINDS:
        card = checkpoint.read_card(whole / name)
        assert card["modality"] == name and card["recipe"]["name"] == "joint-mae"
    assert sum(checkpoint.read_card(whole / name)["step"] for name in KINDS) == 8
    with pytest.raises(CheckpointError, match=r"whole is a joint run.*\n?.*whole/points"):
        checkpoint.read_card(whole)


def test_a_member_fine_tunes_and_embeds_like_any_run(places: dict[str, Path], tmp_path: Path) -> None:
    run(places, tmp_path / "joint", "train.steps=4")
    tuned = meristem.finetune("classification", places["image"], tmp_path / "tuned", ["train.steps=2", "views.x.size=[16,16]",
                              "train.workers=0"], init=str(tmp_path / "joint" / "image"), cache=tmp_path / "cache", quiet=True)
    assert tuned.load is not None and tuned.load.coverage == 1.0 and tuned.load.similarity == pytest.approx(1.0, abs=1e-4)
    out = meristem.embed(tmp_path / "joint" / "points", places["points"], tmp_path / "embedded", quiet=True)
    assert np.load(out)["embedding"].shape == (6, 24)


def test_a_joint_recipe_says_what_is_wrong(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no member 'sound'"):
        meristem.pretrain("joint/mae", {"sound": tmp_path}, tmp_path / "x")
    with pytest.raises(RecipeError, match="wants data for each member"):
        meristem.pretrain("joint/mae", places["image"], tmp_path / "x")
    with pytest.raises(RecipeError, match="one kind of data"):
        meristem.pretrain("image/mae", {"image": places["image"]}, tmp_path / "x")
    with pytest.raises(RecipeError, match="'points' has another encoder"):
        made("members.points.encoder.transformer.depth=5")
    with pytest.raises(RecipeError, match="need a name each"):
        cli._places(["a", "b"])
    assert cli._places(["image=a", "points=b"]) == {"image": "a", "points": "b"} and cli._places(["a"]) == "a"
