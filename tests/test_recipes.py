"""Recipes as data: bases, overrides, hashes, errors that help, and every built-in one does a step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from meristem.catalogue import FAMILIES, family, names, rows
from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.platform.assembly import Assembly, total
from meristem.platform.objectives import Items
from meristem.platform.recipe import CONFIGS, OBJECTIVES, Recipe, build, load, merge, override, read
from meristem.platform.step import Batch
from meristem.tasks import TaskRecipe

SMALL = {"transformer": "encoder.transformer={width: 48, depth: 2, heads: 4}",
         "unet": "encoder.unet={widths: [4, 8, 8, 8], blocks: [1, 1, 1, 1]}",
         "slicewise": "encoder.slicewise.encoder.transformer={width: 48, depth: 2, heads: 4}",
         "sequence": "encoder.sequence={encoder: {unet: {widths: [4, 8, 8], blocks: [1, 1, 1], decoder: false}}, heads: 2}",
         "slicewise unet": "encoder.slicewise.encoder.unet={widths: [4, 8, 8, 8], blocks: [1, 1, 1, 1]}",
         "message_passing": "encoder.message_passing={width: 256, depth: 2}",
         "reader": "encoder.reader.encoder.transformer={width: 48, depth: 2, heads: 4}"}


def made(recipe: Recipe, rows: int) -> Batch:
    """Random views of the sizes that the recipe asks for, with labels for those that draw some."""
    views = {}
    for name, settings in recipe.views.items():
        shape, n, dims = settings.size, rows * settings.count, len(settings.size)
        item, look = torch.arange(n) // settings.count, torch.arange(n) % settings.count
        if dims == 1:  # a set: points, nodes
            rng = Rng.of(0, torch.arange(n), name)
            fields = {field: rng.integers(field, 3, *shape) for field in recipe.reads}
            view = recipe.modality.example(shape, rng)
            views[name] = replace(view, name=name, item=item, look=look, fields=view.fields | fields)
            continue
        array = torch.randn(n, recipe.modality.channels, *shape)
        unit = tuple(axis.unit for axis in recipe.modality.axes)
        frame = Frame(torch.eye(dims + 1).repeat(n, 1, 1), shape, torch.ones(n, dims), unit)
        labels = {"speed": (torch.arange(n) + len(views)) % 2, "turn": torch.arange(n) % 4}
        drawn = {label: x for label, x in labels.items() if getattr(settings, label, None)}
        views[name] = View(name, array, frame, item, look, drawn)
    return Batch(Items(torch.arange(rows), torch.arange(rows)), views)


def kind(name: str) -> type[Recipe]:
    return TaskRecipe if "task" in read(name) else Recipe


ALONE = [name for name in names() if "members" not in read(name)]  # a joint recipe is several: tests/test_joint.py


@pytest.mark.parametrize("name", ALONE)
def test_every_recipe_loads_again_from_its_dump(name: str) -> None:
    recipe = build(read(name), kind(name))
    again = build(recipe.dump(), kind(name))
    assert again.hash == recipe.hash and again.dump() == recipe.dump()
    assert recipe.name == name.split("/")[1] and recipe.follows


@pytest.mark.parametrize("name", [name for name in ALONE if kind(name) is Recipe and not read(name).get("foreign")])
def test_every_pretraining_recipe_does_a_step(name: str) -> None:
    (encoder, arguments), = load(name).dump()["encoder"].items()
    features = ["modality.graph.channels=7"] if name.startswith("graph/") else []  # of one alone the cosine is always ±1
    small = SMALL["slicewise unet" if encoder == "slicewise" and "unet" in arguments["encoder"] else encoder]
    recipe = load(name, [small, *features])
    assembly = Assembly(recipe)
    losses = assembly(made(recipe, 4), 0.0)
    assert set(line.split(".")[0] for line in losses) == set(recipe.objectives)
    loss = total(losses)
    loss.backward()
    assert torch.isfinite(loss)
    moved = sum(float(p.grad.abs().sum()) for p in assembly.encoder.parameters() if p.grad is not None)
    assert moved > 0
    assembly.after(0.0)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_each_file_says_what_it_is(path: Path) -> None:
    """A comment on top where there is something to say, and a status that is claimed in words."""
    data, name = read(path), f"{path.parent.name}/{path.stem}"
    assert data["name"] == path.stem
    if path.stem != "base":
        assert data["follows"] and data["status"] in ("verified", "tested", "expressible")
    if name.startswith("method/") or name.endswith("/base"):
        assert path.read_text().startswith("#")
        assert name not in names()


def test_merge_lays_parts_and_keys() -> None:
    base = {"encoder": {"transformer": {"size": "tiny"}}, "train": {"lr": 1, "steps": 2}, "views": {"x": {"size": 3}}}
    assert merge(base, {"train": {"steps": 5}})["train"] == {"lr": 1, "steps": 5}
    assert merge(base, {"encoder": {"transformer": {"depth": 2}}})["encoder"] == {"transformer": {"size": "tiny", "depth": 2}}
    assert merge(base, {"encoder": {"unet": {}}})["encoder"] == {"unet": {}}  # another part replaces this one
    assert merge(base, {"views": {"y": {"size": 4}}})["views"] == {"x": {"size": 3}, "y": {"size": 4}}  # these are names
    assert merge(base, {"views": {"x": {"flip": 4}}})["views"] == {"x": {"size": 3, "flip": 4}}
    assert merge(base, {"views": {"x": None, "y": {}}})["views"] == {"y": {}}
    masked = {"objectives": {"loss": {"masked": {"target": {"content": {"eps": 1}}, "encode": "x"}}}}
    over = {"objectives": {"loss": {"masked": {"target": {"content": {"loss": "l1"}}}}}}
    assert merge(masked, over)["objectives"]["loss"]["masked"]["target"] == {"content": {"eps": 1, "loss": "l1"}}
    assert merge(masked, {"objectives": {"loss": {"other": {}}}}) == {"objectives": {"loss": {"other": {}}}}
    assert base["train"] == {"lr": 1, "steps": 2}


def test_a_status_is_not_inherited(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: image/mae\n")
    assert load("image/mae").status == "tested" and load(path).status == "expressible"
    listed = {row["name"]: row["status"] for row in rows()}
    assert listed["graph/graphmae-cora"] == "verified" and listed["graph/paretognn"] == "expressible"
    assert all(listed[name] == read(name)["status"] for name in listed)


def test_a_file_extends_bases_in_order(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: [image/base, method/mae]\ntrain: {lr: 0.5}\nmasking: {x: {random: 0.6}}\n")
    recipe = load(path)
    assert recipe.name == "mine" and recipe.train.lr == 0.5
    assert recipe.train.steps == load("image/mae").train.steps
    assert recipe.train.betas == (0.9, 0.95)  # of the method, laid over the base
    assert recipe.masking["x"].ratio == 0.6  # a lone value goes to the part's own first field
    assert recipe.masking["x"].corruption == "drop"


def test_overrides_are_yaml_and_change_the_hash() -> None:
    plain = load("image/mae")
    assert load("image/mae").hash == plain.hash
    long = load("image/mae", ["train.steps=7", "views.x.size=[32, 48]", "train.ema=null"])
    assert long.train.steps == 7 and long.views["x"].size == (32, 48)
    assert long.hash != plain.hash
    assert load("image/mae", [f"train.steps={plain.train.steps}"]).hash == plain.hash
    assert override({"a": {"b": 1}}, ["a.c.d=x: 1"]) == {"a": {"b": 1, "c": {"d": {"x": 1}}}}


def test_a_dump_is_plain_data_in_one_order() -> None:
    """A set's order changes from process to process; the hash must not."""
    recipe = load("image/mae", ["encoder.transformer.sees=[weight, position, kind]"])
    assert json.loads(json.dumps(recipe.dump())) == recipe.dump()
    assert recipe.dump()["encoder"]["transformer"]["sees"] == ["kind", "position", "weight"]


@pytest.mark.parametrize(("assignment", "said"), [
    ("vews={}", "vews: no such key; did you mean views"),
    ("train.stps=3", "train.stps: no such key; did you mean steps"),
    ("encoder.transformer.szie=tiny", "encoder.transformer.szie: no such key; did you mean size"),
    ("encoder=transfomer", "no encoder called 'transfomer'; did you mean transformer"),
    ("modality.image.pach=4", "modality.image.pach: no such key; did you mean patch"),
    ("modality=imag", "no modality called 'imag'"),
    ("views.x.flp=[0, 1]", "views.x.flp: no such key; did you mean flip"),
    ("views.x.affine={rotat: 3}", "views.x.affine.rotat: no such key; did you mean rotate"),
    ("masking.x=randm", "no masking called 'randm'; did you mean random"),
    ("masking.x.random.ratoi=0.5", "masking.x.random.ratoi: no such key; did you mean ratio"),
    ("masking.x.random.ratio=2", "masking.x.random.ratio: Input should be less than 1"),
    ("objectives.pixels.masked.predictor.decoder.widht=4", "predictor.decoder.widht: no such key; did you mean width"),
    ("objectives.pixels.masked.target.content.normalise=patch",
     "content.normalise: Input should be 'none', 'token' or 'channel'"),
    ("objectives={p: {masked: {encode: x, predictor: decoder, readouts: {a: {target: content, regoin: all}}}}}",
     "readouts.a.regoin: no such key; did you mean region"),
    ("train.steps=many", "train.steps: Input should be a valid integer"),
])
def test_a_misspelt_key_is_told_where_and_what_it_may_be(assignment: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        load("image/mae", [assignment])
    assert said in error.value.what
    assert "recipes show" in error.value.remedy


@pytest.mark.parametrize(("assignments", "said"), [
    (["encoder=unet"], "masking of 'x' would drop tokens, but this encoder can only take replace"),
    (["encoder=unet", "masking.x.random.corruption=replace"], "decoder predictor works on masked tokens that are dropped"),
    (["objectives.pixels.masked.predictor=linear"], "linear predictor works on masked tokens that are replaced"),
    (["objectives.pixels.masked.predictor=dense", "masking.x.random.corruption=replace"], "needs `dense`"),
    (["encoder.transformer.sees=[]"], "cannot tell mask tokens apart without positions"),
    (["masking.x=null"], "view 'x' has no masking"),
    (["masking.y=random"], "masking of 'y': there is no such view"),
    (["objectives.pixels.masked.encode=z"], "encode names 'z': there is no such view"),
    (["masking.x={block: {ratio: [0.1, 0.5]}}"], "hides a different number of tokens in each row"),
    (["objectives.pixels.masked.readouts={a: {target: content}}"], "not both"),
    (["objectives.pixels.masked.predictor.decoder.heads=7"], "each head needs a whole, even number"),
    (["teacher={of: [encoder, projector]}"], "'projector', which is neither the encoder nor a head"),
])
def test_impossible_combinations_are_refused_with_the_reason(assignments: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        load("image/mae", assignments)
    assert said in error.value.what


@pytest.mark.parametrize(("call", "said"), [
    (lambda: load("volume/mea"), "volume/mae"),
    (lambda: load("mae"), "image/mae"),
    (lambda: load("none.yaml"), "no recipe file"),
    (lambda: load("image/mae", ["train.steps"]), "is not an override"),
    (lambda: load("image/mae", ["train.steps=[1"]), "is not YAML"),
])
def test_what_cannot_be_found_or_read(call: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        call()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1")
    with pytest.raises(RecipeError, match=r"broken\.yaml is not YAML"):
        load(path)
    path.write_text("- 1")
    with pytest.raises(RecipeError, match="must be a mapping"):
        load(path)


def test_the_catalogue_tells_the_family_of_every_recipe() -> None:
    assert set(FAMILIES) == set(OBJECTIVES)
    listed = {row["name"]: row for row in rows()}
    for name in ALONE:
        recipe = load(name, [] if kind(name) is Recipe else ["task=null"])
        assert listed[name]["family"] == family(recipe.dump()["objectives"]), name
    assert listed["joint/mae"]["family"] == "masked" and listed["image/mae+simclr"]["family"] == "contrastive + masked"
    assert [(r["modality"], r["family"]) for r in rows()] == sorted((r["modality"], r["family"]) for r in rows())


def test_what_cannot_be_names_recipes_that_can() -> None:
    with pytest.raises(RecipeError) as error:
        load("points/mae", ["derived={low: {frequency: {of: x}}}"])
    assert "points/maskfeat3d" in error.value.remedy and "points/simclr" not in error.value.remedy
    with pytest.raises(RecipeError) as error:
        load("points/mae", ["train.stepz=4"])
    assert "points/" not in error.value.remedy
