"""Contrast of slices and of regions of a decoder's map, and a stage that starts from another's run."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch

import meristem
from meristem.errors import CheckpointError, RecipeError
from meristem.platform.assembly import Assembly
from meristem.platform.contrastive.losses import infonce
from meristem.platform.contrastive.regions import Regions
from meristem.platform.contrastive.relations import Relation
from meristem.platform.data.loader import loader
from meristem.platform.data.source import open_data
from meristem.platform.objectives import Units
from meristem.platform.recipe import load
from meristem.platform.step import Step
from meristem.platform.training import checkpoint

SMALL = ["encoder.slicewise.encoder.unet={widths: [4, 8], blocks: [1, 1]}", "modality.volume.patch=[1,4,4]", "train.workers=0",
         "train.batch=3", "views.a.size=[1,16,16]", "views.b.size=[1,16,16]", "train.log_every=1"]


def step_of(recipe_name: str, folder: Path, cache: Path) -> Step:
    recipe = load(recipe_name, SMALL)
    data = open_data(folder, recipe.modality, "auto", cache, quiet=True)
    assembly = Assembly(recipe)
    batch = assembly.prepare(next(iter(loader(data.cache, data.rows(), recipe, steps=1))))
    assembly(batch, 0.0)
    assert assembly.last_step is not None
    return assembly.last_step


def test_the_loss_is_that_of_the_authors_code() -> None:
    """github.com/krishnabits001/domain_specific_cl at e5aae80: the lines of models.py under global_loss_exp_no == 1 (G^{D-})
    gave 427.06680878 over 48 ordered pairs, with numpy in TensorFlow's place, for standard normal vectors of a torch generator
    seeded with 0 (24 × 6): three looks at 4 partitions of 2 volumes each, temperature 0.1.
    """
    z = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    place = torch.arange(24) % 8
    units = Units(z, {"item": place // 4, "look": place % 4, "view": torch.arange(24) // 8 * 4 + place % 4}, torch.ones(24))
    relation = Relation("same(item, look) - same(view)", "~same(look)")
    loss = infonce(units, units, relation.pairs(units, units), 0.1, own=True)
    assert float(loss.total / loss.count) == pytest.approx(427.06680878 / 48, abs=1e-5)


def test_slices_attract_within_their_quarter_and_repel_others(volume_folder: Path, tmp_path: Path) -> None:
    """Every pair, by the place that its slices have in their volumes; and the loss by a double loop."""
    step = step_of("volume/global-local-cl", volume_folder, tmp_path / "c")
    objective = step.assembly.objectives["slices"]
    units = Units.cat(step.units(view, level="mean", head="projector") for view in "ab")
    pairs = objective.relation.pairs(units, units)  # type: ignore[union-attr]
    quarter = []
    for view in "ab":
        frame, rows = step.view(view).frame, step.batch.items.row
        for i, item in enumerate(step.view(view).item.tolist()):
            header = open_data(volume_folder, step.assembly.recipe.modality, "auto", tmp_path / "c", quiet=True).cache.header(
                int(rows[item]))
            centre = frame.to_source(torch.tensor([[[0.0, 7.5, 7.5]]]).expand(len(frame.affine), -1, -1))[i, 0]
            inverse = torch.linalg.inv(torch.tensor(header.affine))
            place = float((inverse @ torch.tensor([*centre.tolist(), 1.0]))[0])
            quarter.append(int((place + 0.5) / header.shape[1] * 4))
    for i, j in itertools.product(range(24), repeat=2):
        assert bool(pairs.pos[i, j]) == (quarter[i] == quarter[j] and i != j)
        assert bool(pairs.neg[i, j]) == (quarter[i] != quarter[j])
    z = torch.nn.functional.normalize(units.z, dim=1)
    s, total = (z @ z.T / 0.1).tolist(), 0.0
    for i in range(24):
        against = sum(math.exp(s[i][m]) for m in range(24) if quarter[m] != quarter[i])
        mine = [j for j in range(24) if quarter[j] == quarter[i] and j != i]
        total += sum(-math.log(math.exp(s[i][j]) / (math.exp(s[i][j]) + against)) for j in mine) / len(mine)
    (loss,) = objective(step).values()
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-4) and float(loss.count) == 24


def test_regions_agree_over_intensities_and_repel_within_their_slice(volume_folder: Path, tmp_path: Path) -> None:
    step = step_of("volume/global-local-cl-local", volume_folder, tmp_path / "c")
    assert torch.equal(step.view("a").frame.affine, step.view("b").frame.affine)
    assert not torch.equal(step.view("a").array, step.view("b").array)
    encoded = step.encode("a", want=frozenset({"dense"}))
    assert encoded.dense is not None and encoded.dense.shape == (12, 4, 1, 16, 16)
    units, other = (Regions().units(step, view, "encoder", None, False) for view in "ab")
    assert step.passes == ["encoder(a)", "encoder(b)"]
    regions = [encoded.dense[i, :, 0, 4 * r:4 * r + 4, 4 * c:4 * c + 4].mean((1, 2))
               for i in range(12) for r in range(4) for c in range(4)]
    torch.testing.assert_close(units.z, torch.stack(regions), atol=1e-5, rtol=0)
    both = Units.cat([units, other])
    pairs = step.assembly.objectives["regions"].relation.pairs(both, both)  # type: ignore[union-attr]
    for i in (0, 5, 16, 191, 200):
        slice_, region = i % 192 // 16, i % 16
        assert pairs.pos[i].nonzero()[:, 0].tolist() == [(i + 192) % 384]
        assert pairs.neg[i].nonzero()[:, 0].tolist() == [
            v * 192 + slice_ * 16 + r for v in range(2) for r in range(16) if r != region]


def test_the_second_stage_starts_from_the_first_and_leaves_its_encoder(volume_folder: Path, tmp_path: Path) -> None:
    options = {"cache": tmp_path / "c", "quiet": True}
    short = [*SMALL, "train.steps=2", "train.checkpoint_every=1", "train.keep=3"]
    meristem.pretrain("volume/global-local-cl", volume_folder, tmp_path / "one", short, **options)  # type: ignore[arg-type]
    start = {"init": str(tmp_path / "one"), **options}
    meristem.pretrain("volume/global-local-cl-local", volume_folder, tmp_path / "two", short, **start)  # type: ignore[arg-type]
    one, two = (checkpoint.read_weights(tmp_path / name) for name in ("one", "two"))
    moved = {name for name in two if not torch.equal(one[name], two[name])}
    assert moved and all(name.startswith(("encoder.inner.ups", "encoder.inner.merges")) for name in moved)
    card = checkpoint.read_card(tmp_path / "two")
    assert card["init"] == checkpoint.identity(tmp_path / "one")
    assert set(card["seen"]["contents"]) >= set(checkpoint.read_card(tmp_path / "one")["seen"]["contents"])
    shutil.copytree(tmp_path / "two", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000002")
    with pytest.raises(CheckpointError, match="initial weights differ"):
        meristem.pretrain("volume/global-local-cl-local", volume_folder, tmp_path / "cut", short, resume=True,
                          **options)  # type: ignore[arg-type]
    meristem.pretrain("volume/global-local-cl-local", volume_folder, tmp_path / "cut", short, resume=True,
                      **start)  # type: ignore[arg-type]
    again = checkpoint.read_weights(tmp_path / "cut")
    assert all(torch.equal(two[name], again[name]) for name in two)


def test_a_teacher_starts_where_its_student_does(volume_folder: Path, tmp_path: Path) -> None:
    tiny = ["encoder.transformer={width: 24, depth: 1, heads: 2}", "train.workers=0", "train.batch=2", "train.steps=1",
            "train.lr=1.0e-9", "views.v.size=[8,8,8]"]
    options = {"cache": tmp_path / "c", "quiet": True}
    meristem.pretrain("volume/simclr", volume_folder, tmp_path / "one", tiny, **options)  # type: ignore[arg-type]
    meristem.pretrain("volume/moco-v3", volume_folder, tmp_path / "two", tiny, init=str(tmp_path / "one"),
                      **options)  # type: ignore[arg-type]
    one, two = (checkpoint.read_weights(tmp_path / name) for name in ("one", "two"))
    for name, weight in one.items():
        if name.startswith("encoder."):
            torch.testing.assert_close(two[f"teacher.copies.{name}"], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("changes", "says"), [
    (["encoder={slicewise: {encoder: {transformer: {size: tiny}}}}"], "no dense map"),
    (["heads={p: mlp}", "objectives.regions.contrastive.head=p"], "made for the width of tokens"),
    (["views.a.tiles=[2,1,1]"], "4 looks for 2 tiles")])
def test_what_has_no_regions_is_refused(changes: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load("volume/global-local-cl-local", changes)
