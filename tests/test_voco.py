"""VoCo: shares of overlap against counted voxels, its losses against the authors' code, what its encoder may see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resuming import goes_on_to_the_same_bits

import meristem
from meristem.errors import RecipeError
from meristem.modalities.base import Header, Look
from meristem.modalities.frame import Frame
from meristem.modalities.volume import Volume
from meristem.modalities.volume.volume import VolumeOptions, VolumeViewOptions
from meristem.platform.assembly import Assembly
from meristem.platform.contrastive.overlap import alike, overlap, voco
from meristem.platform.contrastive.relations import Relation
from meristem.platform.data.loader import affine, loader
from meristem.platform.data.source import open_data
from meristem.platform.objectives import Units
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step
from meristem.platform.training import checkpoint

SMALL = ["encoder.transformer={width: 24, depth: 2, heads: 2}", "modality.volume.patch=[4,4,4]", "train.workers=0",
         "train.batch=2", "heads.projector.mlp={hidden: 16, out: 8}"]
TILES = [f"views.{view}={{size: [8, 8, 8], tiles: [2, 3, 1], count: {count}}}" for view, count in (("base", 6), ("r", 2))]


@pytest.fixture
def oblique(tmp_path: Path) -> Path:
    """Six volumes of 21×26×9 whose axes lie askew in the scanner, three of them stored from right to left."""
    (tmp_path / "scans").mkdir()
    rng = np.random.default_rng(4)
    for i in range(6):
        turn = np.linalg.qr(np.eye(3) + 0.2 * rng.normal(size=(3, 3)))[0]
        turn = turn * np.sign(np.diag(turn))
        world = np.eye(4)
        world[:3, :3] = turn * (-1.1 if i % 2 else 1.1, 0.8, 1.5)
        nib.save(nib.Nifti1Image(rng.normal(size=(21, 26, 9)).astype(np.float32), world), tmp_path / "scans" / f"{i}.nii.gz")
    return tmp_path / "scans"


def test_the_label_is_the_share_of_voxels_that_both_crops_show(oblique: Path, tmp_path: Path) -> None:
    """Counted in the stored array, over real windows, after flips."""
    recipe = load("volume/voco", [*SMALL, *TILES, "train.seed=3"])
    data = open_data(oblique, recipe.modality, "auto", tmp_path / "c", quiet=True)
    assembly = Assembly(recipe)
    batch = assembly.prepare(next(iter(loader(data.cache, data.rows(), recipe, steps=1))))
    assert {float(x) for name in ("r", "base") for x in batch.views[name].params["flip"].unique()} == {0.0, 1.0}
    step = Step(assembly, batch, 0.0, recipe.train.seed)
    counted = []
    for row, cursor in zip(batch.items.row.tolist(), batch.items.cursor.tolist(), strict=True):
        header = data.cache.header(row)
        shown = {}
        for name, view in recipe.views.items():
            shown[name] = np.zeros((view.count, *header.shape[1:]), bool)
            for look in range(view.count):
                draw = recipe.modality.draw(view, header, Look(recipe.train.seed, cursor, look, name))
                shown[name][(look, *(slice(a, a + n) for a, n in zip(draw.start, draw.size, strict=True)))] = True
        assert (shown["base"].sum(0) == 1).all()  # the tiles tile
        counted.append([[(a & b).sum() / a.sum() for b in shown["base"]] for a in shown["r"]])
    q, k = step.units("r", level="mean"), step.units("base", level="mean")
    label = Relation("overlap & same(item)").pairs(q, k).pos
    for i, item in enumerate(counted):
        np.testing.assert_allclose(label[2 * i:2 * i + 2, 6 * i:6 * i + 6], item, atol=1e-5)
    assert label.sum(1).allclose(torch.ones(4), atol=1e-5) and label.count_nonzero(1).max() > 1


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_overlap_of_boxes_equals_counted_points(seed: int) -> None:
    """Boxes with common, oblique axes, quarter turns among them; shares of whole elements on a common lattice."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    boxes, cubes = [], []
    for _ in range(2):
        low = rng.integers(0, 6, 3)
        size = rng.integers(1, 6, 3)
        axes = rng.permutation(3)
        inner = np.zeros((3, 3))
        inner[axes, range(3)] = size[axes] * rng.choice([-1, 1], 3)
        corner = low + np.where(inner.sum(1) < 0, size, 0)
        cube = np.eye(4)
        cube[:3, :3], cube[:3, 3] = turn @ inner, turn @ corner
        boxes.append({tuple(p + low) for p in np.ndindex(*size)})
        cubes.append(torch.from_numpy(cube).float())
    assert float(overlap(*cubes)) == pytest.approx(len(boxes[0] & boxes[1]) / len(boxes[0]), abs=1e-4)


def test_losses_as_the_authors_code_gives_them() -> None:
    """github.com/Luffy03/VoCo at ba7b7bd: online_assign, ce_loss and regularization_loss of models/voco_head.py and
    get_position_label of utils/data_utils.py, on standard normal vectors of a torch generator seeded with 0 (student's crops,
    teacher's crops, student's bases, teacher's bases: 2 items of 3 crops and 16 bases, 8 wide) and numpy's seed 0, printed
    0.3804, 0.0528 and 0.0631; the centres that they drew are those given here.
    """
    g = torch.Generator().manual_seed(0)
    q, tq = (torch.randn(6, 8, generator=g).unflatten(0, (2, 3)) for _ in range(2))
    k, tk = (torch.randn(32, 8, generator=g).unflatten(0, (2, 16)) for _ in range(2))

    def cube(low: tuple[float, float]) -> torch.Tensor:
        frame = Frame(torch.tensor([[[1.0, 0, 0, low[0] + 0.5], [0, 1, 0, low[1] + 0.5], [0, 0, 1, 0.5], [0, 0, 0, 1]]]),
                      (96, 96, 96), torch.ones(1, 3), ("mm",) * 3)
        return frame.cubes()[0]

    centres = [[(220, 95), (165, 240), (299, 243)], [(57, 259), (325, 290), (135, 118)]]
    crops = torch.stack([torch.stack([cube((x - 48, y - 48)) for x, y in item]) for item in centres])
    bases = torch.stack([cube((96 * i, 96 * j)) for i in range(4) for j in range(4)])
    share = overlap(crops[:, :, None], bases)
    first = torch.zeros(16)
    first[[4, 5, 8, 9]] = torch.tensor([0.1063, 0.1020, 0.4041, 0.3876])  # as they label their first crop
    torch.testing.assert_close(share[0, 0], first, atol=1e-4, rtol=0)
    cosine = torch.nn.functional.cosine_similarity
    predicted = (cosine(q[:, :, None], tk[:, None], dim=-1).relu() + cosine(tq[:, :, None], k[:, None], dim=-1).relu()) / 2
    near, far = voco(predicted, share)
    assert [round(float(x.mean()), 4) for x in (near, far, alike(k))] == [0.3804, 0.0528, 0.0631]


def test_what_the_objective_predicts_is_the_mean_of_both_ways(oblique: Path, tmp_path: Path) -> None:
    """Item by item, crop by crop, through the head as it stands; and a gradient only where the student is."""
    recipe = load("volume/voco", [*SMALL, *TILES])
    data = open_data(oblique, recipe.modality, "auto", tmp_path / "c", quiet=True)
    assembly = Assembly(recipe).train()
    with torch.no_grad():
        for p in assembly.teacher.parameters():  # type: ignore[union-attr]
            p.add_(0.05 * torch.randn_like(p))
    batch = assembly.prepare(next(iter(loader(data.cache, data.rows(), recipe, steps=1))))
    losses = assembly(batch, 0.0)
    sum(x.total for x in losses.values()).backward()
    assert all(p.grad is None for p in assembly.teacher.parameters())  # type: ignore[union-attr]
    assert float(assembly.encoder.embed.linear.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]
    step = Step(assembly.requires_grad_(False), batch, 0.0, 0)
    z = {}
    for by in ("encoder", "teacher"):
        both = Units.cat([step.units("r", by, "mean"), step.units("base", by, "mean")])  # one batch norm over all crops
        z[by] = assembly.module(by, "projector")(both.z, both.key["view"], both.key["item"])
    share = overlap(step.units("r").cube[:, None], step.units("base").cube[None])  # type: ignore[index]
    near = far = 0.0
    for b in range(2):
        top = bottom = zero = count = 0.0
        for i in range(2 * b, 2 * b + 2):
            for j in range(6 * b, 6 * b + 6):
                cos = [torch.cosine_similarity(z[x][i], z[y][4 + j], dim=0) for x, y in
                       (("encoder", "teacher"), ("teacher", "encoder"))]
                p, y = float(sum(c.relu() for c in cos)) / 2, float(share[i, j])
                top, bottom = top - y * np.log(1 - abs(y - p) + 1e-6), bottom + y
                zero, count = (zero + p * p, count + 1) if y == 0 else (zero, count)
        near, far = near + top / bottom, far + zero / count
    assert float(losses["place.near"].total.detach()) == pytest.approx(near, rel=1e-3)
    assert float(losses["place.far"].total.detach()) == pytest.approx(far, rel=1e-3)


def test_the_encoder_does_not_see_where_a_crop_lies(oblique: Path, tmp_path: Path) -> None:
    recipe = load("volume/voco", [*SMALL, *TILES])
    data = open_data(oblique, recipe.modality, "auto", tmp_path / "c", quiet=True)
    assembly = Assembly(recipe).eval()
    batch = assembly.prepare(next(iter(loader(data.cache, data.rows(), recipe, steps=1))))
    here = Step(assembly, batch, 0.0, 0).units("r", level="mean")
    moved = batch.views["r"].frame.affine.clone()
    moved[:, :3, 3] += torch.tensor([4.0, -3.0, 2.0])
    view = replace(batch.views["r"], frame=replace(batch.views["r"].frame, affine=moved))
    there = Step(assembly, Batch(batch.items, {**batch.views, "r": view}), 0.0, 0).units("r", level="mean")
    assert torch.equal(here.z, there.z) and not torch.allclose(here.cube, there.cube)  # type: ignore[arg-type]


@pytest.mark.parametrize(("recipe", "changes", "says"), [
    ("volume/voco", ["views.r.affine={rotate: 10}"], "'r' is turned or deformed"),
    ("volume/voco", ["views.base.elastic={amplitude: [0, 2]}"], "'base' is turned or deformed"),
    ("volume/voco", ["teacher.of=[encoder]"], "add 'projector' to teacher.of"),
    ("volume/voco", ["views.base.count=9"], "9 looks for 16 tiles"),
    ("volume/voco", ["views.r.tiles=[4,4]"], "tiles: 3 numbers"),
    ("volume/voco", ["objectives.place.overlap.keys=bases"], "no view 'bases'"),
    ("points/simclr", ["objectives.contrast.contrastive.relation=overlap"], "points data are sets"),
    ("volume/simclr", ["objectives.contrast.contrastive.relation=overlap"], "'v' is turned"),
    ("volume/moco-v3", ["objectives.contrast.contrastive={relation: overlap, queue: 8}"], "without a queue")])
def test_what_has_no_boxes_is_refused(recipe: str, changes: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, changes)


def test_slices_of_a_tile_are_those_of_all_views_and_change_with_the_sample() -> None:
    modality = Volume(VolumeOptions())
    view = VolumeViewOptions(size=(1, 8, 8), window="slice", tiles=(4, 1, 1), count=4)
    header = Header((1, 22, 9, 10), tuple(map(tuple, np.eye(4))), (1.0,) * 3)
    places = set()
    for cursor in range(40):
        for number in range(4):
            a, b = (modality.draw(view, header, Look(0, cursor, number, name)) for name in "ab")
            assert a.start == b.start and a.size == (1, 9, 10)
            assert round(number * 5.5) <= a.start[0] < round((number + 1) * 5.5)
            assert affine(header, a)[0, 3] == a.start[0]
            places.add(a.start[0])
    assert places == set(range(22))


def test_a_run_learns_and_goes_on_exactly(oblique: Path, tmp_path: Path) -> None:
    changes = [*SMALL, *TILES, "train.steps=4", "train.checkpoint_every=2", "train.keep=3", "train.log_every=1"]

    def run(out: Path, resume: bool) -> None:
        meristem.pretrain("volume/voco", oblique, out, changes, cache=tmp_path / "c", quiet=True, resume=resume)

    whole = goes_on_to_the_same_bits(run, tmp_path, 2, 4)
    start = checkpoint.read_weights(tmp_path / "whole" / "checkpoints" / "step-00000002")
    assert not torch.equal(whole["encoder.embed.linear.weight"], start["encoder.embed.linear.weight"])
