"""Samples that are pairs: two pictures of one scene in a list, two frames of one film."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cross import drawn, wave
from torch import Tensor

import meristem
from meristem.errors import DataError, RecipeError
from meristem.modalities.base import modality_class
from meristem.platform.assembly import Assembly, total
from meristem.platform.data.loader import loader
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.source import Data, open_data
from meristem.platform.objectives import Items
from meristem.platform.recipe import Recipe, load
from meristem.platform.step import Batch, Step
from meristem.tasks.inspection import noise

LEVELS = {"a1": 10, "a2": 20, "a3": 30, "b1": 110, "b2": 120, "c1": 210}  # scenes a, b; c is alone
PAIRS = ["a1,a2", "a1,a3", "b2,b1", "c1,"]


def pictures(folder: Path, lines: list[str], header: str = "path,pair") -> Path:
    """A picture of one level each, and the list of the pairs."""
    folder.mkdir(exist_ok=True)
    for name, level in LEVELS.items():
        Image.fromarray(np.full((24, 24), level, np.uint8)).save(folder / f"{name}.png")
    rows = [",".join(f"{cell}.png" if cell in LEVELS else cell for cell in line.split(",")) for line in lines]
    (folder / "pairs.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "pairs.csv"


def recipe(*more: str) -> Recipe:
    plain = "brightness: null, contrast: null, saturation: null, size: [16, 16]"
    return load("image/croco", ["modality.image={channels: 1, patch: 4, normalise: unit}", f"views.left={{{plain}}}",
                                f"views.right={{{plain}}}", "encoder.transformer={width: 48, depth: 1, heads: 4}",
                                "train.batch=6", "train.workers=0", *more])


def opened(path: Path, split: str = "1,0,0") -> Data:
    return open_data(path, recipe().modality, split, quiet=True)


def levels(data: Data, made: Recipe, steps: int, split: str = "train") -> list[tuple[int, int]]:
    """What the two views of each sample showed."""
    return [two for batch in loader(data.cache, data.rows(split), made, steps=steps) for two in of_batch(made, batch)]


def of_batch(made: Recipe, batch: Batch) -> list[tuple[int, int]]:
    views = Assembly(made).prepare(batch).views
    left, right = ((views[name].array.mean((1, 2, 3)) * 255).round().int().tolist() for name in ("left", "right"))
    return list(zip(left, right, strict=True))


def test_a_list_names_pairs_each_way_and_keeps_what_they_link_together(tmp_path: Path) -> None:
    manifest = Manifest.discover(pictures(tmp_path / "p", PAIRS), modality_class("image")(recipe().modality.options))
    rows = {Path(row.local).stem: row for row in manifest.rows}
    assert set(rows) == set(LEVELS) and len(manifest.rows) == 6  # a1 is named by two lines, a2, a3 and b1 as pairs only
    partners = {name: {next(n for n, r in rows.items() if r.index == i) for i in row.partners} for name, row in rows.items()}
    assert partners == {"a1": {"a2", "a3"}, "a2": {"a1"}, "a3": {"a1"}, "b1": {"b2"}, "b2": {"b1"}, "c1": set()}
    scene = {name: row.subject for name, row in rows.items()}
    assert scene["a1"] == scene["a2"] == scene["a3"] and scene["b1"] == scene["b2"] and len(set(scene.values())) == 3
    assert all("pair" not in row.meta for row in manifest.rows)
    other = Manifest.discover(pictures(tmp_path / "p", ["a1,a3", "a1,a3", "a2,", "b2,b1", "c1,"]),
                              modality_class("image")(recipe().modality.options))
    assert other.hash != manifest.hash


def test_views_show_a_sample_and_its_partner_whatever_the_order_or_the_step(tmp_path: Path) -> None:
    data, made = opened(pictures(tmp_path / "p", PAIRS)), recipe()
    seen = levels(data, made, 20)
    assert set(seen) == {(10, 20), (10, 30), (20, 10), (30, 10), (110, 120), (120, 110)}  # each way, c1 never
    (eighth,) = loader(data.cache, data.rows("train"), made, start=7, steps=8)
    assert seen[6 * 7:6 * 8] == of_batch(made, eighth)


def test_nobody_of_another_split_is_shown(tmp_path: Path) -> None:
    lines = ["a1,a2,s1,train", "a1,a3,s1,train", "a3,,s2,test", "b1,b2,s3,train", "c1,b1,s4,test"]
    data = opened(pictures(tmp_path / "p", lines, "path,pair,subject,split"), "auto")
    assert set(levels(data, recipe(), 10)) == {(10, 20), (20, 10), (110, 120), (120, 110)}
    with pytest.raises(DataError, match="none of 2 rows has one"):
        levels(data, recipe(), 1, "test")


def test_a_pair_recipe_trains_and_its_report_shows_pairs(tmp_path: Path) -> None:
    path = pictures(tmp_path / "p", PAIRS)
    changes = [f"views.{view}={{size: [16, 16]}}" for view in ("left", "right")]
    changes += ["modality.image={channels: 1, patch: 4}", "encoder.transformer={width: 48, depth: 1, heads: 4}",
                "train.batch=4", "train.steps=2", "train.workers=0"]
    meristem.pretrain("image/croco", path, tmp_path / "run", changes, quiet=True)
    from meristem.tasks.pages import reconstructions

    shown = reconstructions(tmp_path / "run", open_data(path, load("image/croco", changes).modality, quiet=True))
    assert len(shown) > 0 and all(np.isnan(one.masked).any() for one in shown)


def test_without_pairs_it_is_said_before_anything_is_trained(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shows the partner of a sample, and none of"):
        meristem.pretrain("image/croco", image_folder, tmp_path / "run", ["train.workers=0"], quiet=True)


def test_two_looks_of_a_film_are_left_and_right() -> None:
    made = load("video/croco", ["views.v.size=[1,32,32]", "encoder.transformer={width: 48, depth: 1, heads: 2}"])
    assembly, batch = Assembly(made), noise(made)
    loss = total(assembly(batch, 0.0))
    step, both = assembly.last_step, batch.views["v"].array.unflatten(0, (2, 2))
    assert torch.isfinite(loss) and step is not None and step.passes == ["encoder(left, plan)", "encoder(right)"]
    assert torch.equal(step.view("left").array, both[:, 0]) and torch.equal(step.view("right").array, both[:, 1])
    keys = [set(step.units(name).key["view"].tolist()) for name in ("left", "right", "v")]
    assert [len(k) for k in keys] == [1, 1, 2] and len(set.union(*keys)) == 4
    with pytest.raises(RecipeError, match="'v' has 2 looks, and none of number 2"):
        load("video/croco", ["derived.right.look={of: v, number: 2}"])
    with pytest.raises(RecipeError, match="'z', which is no view before it"):
        load("video/croco", ["derived.right.look={of: z, number: 1}"])


def test_places_in_two_samples_are_not_compared() -> None:
    objective = ("objectives={near: {contrastive: {queries: [left], keys: [right], level: dense, stop_gradient: true, "
                 "relation: near(2), loss: cosine}}}")
    load("image/croco", [objective, "objectives.completion=null", "views.right.partner=false"])
    with pytest.raises(RecipeError, match="compares places in one sample, and a partner is another"):
        load("image/croco", [objective, "objectives.completion=null"])


def theirs(name: str) -> Tensor | None:
    """The parameter of CroCoNet that stands where ours of this name does; the index is that of `CroCoNet.named_parameters`."""
    index, shapes = 0, {}

    def add(key: str, *shape: int) -> None:
        nonlocal index
        shapes[key] = wave(shape, index) + (key.endswith("weight") and "norm" in key)
        index += 1

    def linear(key: str, out: int, size: int) -> None:
        add(f"{key}.weight", out, size)
        add(f"{key}.bias", out)

    def norm(key: str, width: int) -> None:
        add(f"{key}.weight", width)
        add(f"{key}.bias", width)

    add("mask_token", 16)
    linear("patch_embed", 24, 48)
    for i in range(2):
        norm(f"enc_blocks.{i}.norm1", 24)
        linear(f"enc_blocks.{i}.attn.qkv", 72, 24)
        linear(f"enc_blocks.{i}.attn.proj", 24, 24)
        norm(f"enc_blocks.{i}.norm2", 24)
        linear(f"enc_blocks.{i}.mlp.fc1", 96, 24)
        linear(f"enc_blocks.{i}.mlp.fc2", 24, 96)
    norm("enc_norm", 24)
    linear("decoder_embed", 16, 24)
    for i in range(2):
        norm(f"dec_blocks.{i}.norm1", 16)
        linear(f"dec_blocks.{i}.attn.qkv", 48, 16)
        linear(f"dec_blocks.{i}.attn.proj", 16, 16)
        for part in ("projq", "projk", "projv", "proj"):
            linear(f"dec_blocks.{i}.cross_attn.{part}", 16, 16)
        norm(f"dec_blocks.{i}.norm2", 16)
        norm(f"dec_blocks.{i}.norm3", 16)
        linear(f"dec_blocks.{i}.mlp.fc1", 64, 16)
        linear(f"dec_blocks.{i}.mlp.fc2", 16, 64)
        norm(f"dec_blocks.{i}.norm_y", 16)
    norm("dec_norm", 16)
    linear("prediction_head", 48, 16)
    ours = {"encoder.embed.linear": "patch_embed", "encoder.blocks.blocks": "enc_blocks", "encoder.blocks.norm": "enc_norm"}
    inside = {"mask_token": "mask_token", "enter": "decoder_embed", "blocks.blocks": "dec_blocks", "blocks.norm": "dec_norm",
              "heads.content": "prediction_head"}
    ours |= {f"objectives.completion.predictor.{key}": value for key, value in inside.items()}
    prefix = max((p for p in ours if name.startswith(p)), key=len, default=None)
    if prefix is None:
        return None
    key = ours[prefix] + name[len(prefix):]
    for mine, yours in ((".own.norm2", ".norm3"), (".own", ""), (".memory_norm", ".norm_y"),
                        (".cross.q.", ".cross_attn.projq."), (".cross.proj", ".cross_attn.proj")):
        key = key.replace(mine, yours)
    if key.startswith("dec_blocks") and ".norm." in key:
        key = key.replace(".norm.", ".norm2.")
    if ".cross.kv" in key:
        return torch.cat([shapes[key.replace(".cross.kv", f".cross_attn.{part}")] for part in ("projk", "projv")])
    if key.startswith("prediction_head"):  # a patch is row, column, channel there, and channel, row, column here
        return shapes[key].unflatten(0, (4, 4, 3)).movedim(2, 0).flatten(0, 2)
    return shapes[key]


def test_the_loss_of_the_whole_network_is_that_of_their_code() -> None:
    """naver/croco at d7de070: CroCoNet(img_size=16, patch_size=4, enc_embed_dim=24, enc_depth=2, enc_num_heads=2,
    dec_embed_dim=16, dec_depth=2, dec_num_heads=2), position embeddings None, its k-th parameter `wave(shape, k)` (norms'
    weights 1 more), patch i hidden where 7 i mod 16 ≥ 2, images 5 wave(·, 101) and 5 wave(·, 102): the loss of its MaskedMSE
    with norm_pix_loss is 1.1104057."""
    made = load("image/croco", ["modality.image.patch=4", "views.left.size=[16,16]", "views.right.size=[16,16]",
                                "encoder.transformer={width: 24, depth: 2, heads: 2, cls: false}",
                                "objectives.completion.masked.predictor.cross={depth: 2, width: 16, heads: 2}"])
    assembly = Assembly(made)
    copied = 0
    with torch.no_grad():
        for name, parameter in assembly.named_parameters():
            if (value := theirs(name)) is not None:
                parameter.copy_(value)
                copied += value.numel()
    assert copied == sum(p.numel() for p in assembly.parameters()) - 24  # the encoder's own mask token is not used
    views = {name: drawn(name, 5 * wave((2, 3, 16, 16), k)) for name, k in (("left", 101), ("right", 102))}
    for view in views.values():
        view.frame.spacing.zero_()  # all positions 0: nothing is rotated
    step = Step(assembly, Batch(Items(torch.arange(2), torch.arange(2)), views), 0.0, 0)
    hidden = (torch.arange(16) * 7 % 16 >= 2).expand(2, -1)
    plan = step.plan("left")
    step._plans["left"] = type(plan)(hidden, hidden.float(), (~hidden).nonzero()[:, 1].unflatten(0, (2, -1)))
    loss = assembly.objectives["completion"](step)[""]
    assert (loss.total / loss.count).item() == pytest.approx(1.110405683517456, rel=1e-5)
