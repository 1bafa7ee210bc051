"""Tokens of single channels: their number, order and kind are free, and what pads them has no influence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cross import drawn, step_of, wave
from torch import Tensor

import meristem
from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.lattice import LatticeTokenizer
from meristem.modalities.lattice.channels import ChannelTokenizer
from meristem.platform.assembly import Assembly
from meristem.platform.contrastive.losses import DINOLoss
from meristem.platform.contrastive.relations import Relation
from meristem.platform.data.loader import whole
from meristem.platform.data.source import open_data
from meristem.platform.objectives import Units
from meristem.platform.recipe import build, load, override, read
from meristem.tasks.base import TaskRecipe

SMALL = ["modality.image={channels: 3, patch: 8}", "encoder.transformer={width: 48, depth: 2, heads: 4}"]


def of_kinds(array: Tensor, kinds: list[list[int]], name: str = "g") -> View:
    return replace(drawn(name, array), params={"channel": torch.tensor(kinds)})


def encoded(assembly: Assembly, view: View) -> Tensor:
    step = step_of(assembly, view)
    summary: Tensor = step.encode("g").summary["cls"]
    return summary


def test_a_token_is_a_patch_of_one_channel() -> None:
    array, tokenizer = torch.randn(2, 3, 8, 12), ChannelTokenizer(5, (4, 4))
    stream = tokenizer.stream(of_kinds(array, [[4, 0, 2], [1, -1, -1]]))
    assert stream.content.shape == (2, 18, 16) and stream.lattice == (3, 2, 3)
    for channel in range(3):
        for row in range(2):
            for column in range(3):
                token = (channel * 2 + row) * 3 + column
                patch = array[:, channel, 4 * row:4 * row + 4, 4 * column:4 * column + 4].flatten(1)
                assert torch.equal(stream.content[:, token], patch)
                assert stream.position[0, token].tolist() == [4 * row + 1.5, 4 * column + 1.5]
    assert stream.kind["channel"][0].tolist() == [4] * 6 + [0] * 6 + [2] * 6
    assert stream.valid.tolist() == [[True] * 18, [True] * 6 + [False] * 12]
    assert torch.equal(tokenizer.fold(stream.content, stream.lattice), array)
    plain = LatticeTokenizer(3, (4, 4)).stream(drawn("g", array))
    assert torch.equal(tokenizer.stream(drawn("g", array)).source[:, :6], plain.source)


def test_order_is_free_and_kinds_are_told() -> None:
    assembly = Assembly(load("image/chada-vit", SMALL)).eval()
    torch.nn.init.normal_(assembly.encoder.embed.kind.weight)
    array = torch.randn(4, 3, 32, 32)
    before = encoded(assembly, of_kinds(array, [[0, 1, 2]] * 4))
    order = [2, 0, 1]
    torch.testing.assert_close(encoded(assembly, of_kinds(array[:, order], [order] * 4)), before, atol=1e-4, rtol=1e-4)
    for other in ([0, 1, 2], [1, 0, 2]):  # the same channels under other names
        assert (encoded(assembly, of_kinds(array[:, order], [other] * 4)) - before).abs().max() > 0.05


def test_unseen_kinds_have_no_influence() -> None:
    assembly = Assembly(load("image/chada-vit", [*SMALL, "encoder.transformer.sees=[position]"])).eval()
    array = torch.randn(2, 3, 32, 32)
    assert torch.equal(*(encoded(assembly, of_kinds(array, [kinds] * 2)) for kinds in ([0, 1, 2], [2, 2, 0])))


def test_what_pads_a_row_and_its_batch_mates_have_no_influence() -> None:
    assembly = Assembly(load("image/chada-vit", SMALL)).eval()
    array = torch.randn(2, 3, 32, 32)
    array[1, 1:] = torch.nan
    both = encoded(assembly, of_kinds(array, [[0, 1, 2], [1, -1, -1]]))
    torch.testing.assert_close(both[1:], encoded(assembly, of_kinds(array[1:, :1], [[1]])), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[:1], encoded(assembly, of_kinds(array[:1], [[0, 1, 2]])), atol=1e-5, rtol=1e-4)


def test_some_channels_in_some_order() -> None:
    five = ["modality.image.channels=5", "derived.c.channels={of: g, least: 2, most: 3}"]
    assembly = Assembly(load("image/chada-vit", [*SMALL, *five]))
    array = torch.randn(300, 5, 8, 8)
    there = torch.tensor([[0, 1, 2, 3, 4], [3, 1, -1, -1, -1], [4, -1, -1, -1, -1]]).repeat(100, 1)
    made = step_of(assembly, replace(drawn("g", array), params={"channel": there})).view("c")
    kinds, seen = made.params["channel"], set()
    assert made.array.shape == (300, 3, 8, 8)
    for row in range(300):
        kept = [k for k in kinds[row].tolist() if k >= 0]
        seen.add((row % 3, tuple(kept)))
        assert kinds[row].tolist()[len(kept):] == [-1] * (3 - len(kept)) and not made.array[row, len(kept):].any()
        for place, kind in enumerate(kept):
            assert torch.equal(made.array[row, place], array[row, there[row].tolist().index(kind)])
    assert {x[1] for x in seen if x[0] == 1} == {(3, 1), (1, 3)} and {x[1] for x in seen if x[0] == 2} == {(4,)}
    full = [x[1] for x in seen if x[0] == 0]
    assert {len(x) for x in full} == {2, 3} and len(full) > 35 and all(len(set(x)) == len(x) for x in full)


def test_files_may_have_fewer_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, channels in (("colour", 3), ("grey", None)):
        pixels = rng.integers(0, 256, (32, 32) if channels is None else (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    views = {}
    for name in ("image/chada-vit", "image/dino"):
        made = load(name, SMALL[:1])
        data = open_data(tmp_path, made.modality, quiet=True)
        views[name] = whole(data.cache, data.rows(), made.modality, made.views["g"].plain())
    single, together = views.values()
    assert single.params["channel"].tolist() == [[0, 1, 2], [0, -1, -1]] and "channel" not in together.params
    assert torch.equal(single.array[1, 0], together.array[1, 2])  # grey is replicated where tokens hold all channels


def test_it_trains_and_resumes_bit_for_bit(image_folder: Path, tmp_path: Path) -> None:
    changes = [*SMALL, "views.g.size=[32,32]", "train.batch=4", "train.steps=4", "train.checkpoint_every=2", "train.workers=0",
               "heads.head.prototypes={hidden: 32, out: 16, count: 12}"]
    for name in ("whole", "torn"):
        meristem.pretrain("image/chada-vit", image_folder, tmp_path / name, changes, quiet=True)
    (last,) = (tmp_path / "torn" / "checkpoints").glob("step-*4")
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink()
    last.rmdir()
    meristem.pretrain("image/chada-vit", image_folder, tmp_path / "torn", changes, resume=True, quiet=True)
    weights = [(tmp_path / name / "checkpoints" / last.name / "weights.safetensors").read_bytes() for name in ("whole", "torn")]
    assert weights[0] == weights[1]


def test_tokens_and_their_padding_are_those_of_their_code() -> None:
    """nicoboou/chadavit at 9da56be: ChAdaViT(img_size=[8], embed_dim=6, patch_size=4, max_number_channels=3), its projection
    wave(·, 1), the bias wave(·, 2), channel tokens wave(·, 3), positions 0; `channel_aware_tokenization` of the channels
    5 wave((3, 1, 8, 8), 101), the first image with two of them, the second with one: 12 of 24 tokens are not padding."""
    embedding = ChannelTokenizer(3, (4, 4)).embedding(6)
    with torch.no_grad():
        embedding.linear.weight.copy_(wave((6, 16), 1))
        embedding.linear.bias.copy_(wave((6,), 2))
        embedding.kind.weight.copy_(wave((3, 6), 3))
    x = 5 * wave((3, 8, 8), 101)
    array = torch.zeros(2, 3, 8, 8)
    array[0, :2], array[1, 0] = x[:2], x[2]
    stream = ChannelTokenizer(3, (4, 4)).stream(of_kinds(array, [[0, 1, -1], [0, -1, -1]]))
    assert stream.valid.tolist() == [[True] * 8 + [False] * 4, [True] * 4 + [False] * 8]
    tokens = embedding(stream)[stream.valid]
    assert tokens.sum().item() == pytest.approx(-6.725912094116211, rel=1e-5)
    assert tokens.square().sum().item() == pytest.approx(5.151158809661865, rel=1e-5)
    theirs = [0.5095782279968262, 0.4050484895706177, 0.011042039841413498, -0.392689049243927, -0.5181388258934021,
              -0.2972601354122162]
    torch.testing.assert_close(tokens[5], torch.tensor(theirs), atol=1e-6, rtol=1e-5)


def test_the_loss_is_that_of_their_code() -> None:
    """nicoboou/chadavit at 9da56be, DINOLoss(7 prototypes, teacher temperature 0.04, student 0.1), centre wave((1, 7), 4), of
    student logits 5 wave((8, 7), 5) and teacher logits 5 wave((8, 7), 6) of two crops of four pictures: 10.360342, and the
    centre after it."""
    made = load("image/chada-vit", ["objectives.cls.contrastive.loss.dino.teacher_temperature=0.04"])
    loss = made.objectives["cls"].loss.build(7)
    assert isinstance(loss, DINOLoss)
    loss.centre.copy_(wave((1, 7), 4).reshape(loss.centre.shape))
    keys = {"item": torch.arange(4).repeat(2), "view": torch.arange(2).repeat_interleave(4)}
    student, teacher = (Units(5 * wave((8, 7), k), keys, torch.ones(8)) for k in (5, 6))
    step = step_of(Assembly(load("image/chada-vit", SMALL)), drawn("g", torch.zeros(1, 3, 32, 32)))
    loss.train()
    found = loss(student, teacher, Relation("same(item) - same(view)"), step)
    assert (found.total / found.count).item() == pytest.approx(10.360342025756836, rel=1e-5)
    loss.after()
    centre = [-0.15808828175067902, -0.21014152467250824, -0.14032499492168427, 0.010854259133338928, 0.1556636244058609,
              0.21011501550674438, 0.1427297741174698]
    torch.testing.assert_close(loss.centre.flatten(), torch.tensor(centre), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("recipe", "changes", "says"), [
    ("image/chada-vit", ["encoder={unet: {widths: [8, 16], blocks: [1, 1]}}"], "tokens of channels are no array"),
    ("image/chada-vit", ["derived.c.channels={of: g, least: 4}"], "keeps 4 to 3 of 3 channels"),
    ("image/chada-vit", ["modality.image.tokens=patch"], "a token here holds all channels of a patch"),
    ("image/chada-vit", ["modality.image.normalise=imagenet"], "is for red, green and blue"),
    ("image/mae", ["modality.image.tokens=channel"], "a predictor is told places alone"),
    ("video/videomae", ["modality.video.tokens=channel"], "modality.video.tokens")])
def test_what_channels_cannot_give_is_refused(recipe: str, changes: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, changes)


@pytest.mark.parametrize("task", ["image/segmentation", "image/detection"])
def test_tasks_of_places_are_refused(task: str) -> None:
    with pytest.raises(RecipeError, match="needs one token for each place"):
        build(override(read(task), ["modality.image.tokens=channel", "encoder={transformer: {size: tiny}}"]), TaskRecipe)
