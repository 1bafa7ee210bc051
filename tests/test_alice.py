"""Alice: partners of other patients, places that match, and the alignment of two encodings."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from resuming import goes_on_to_the_same_bits

import meristem
from meristem.errors import DataError, RecipeError
from meristem.modalities.base import Header, Look
from meristem.platform.assembly import Assembly
from meristem.platform.contrastive.alignment import CrossAttention
from meristem.platform.data.cache import Cache
from meristem.platform.data.composer import Matched, surroundings
from meristem.platform.data.loader import loader
from meristem.platform.data.source import Data, open_data
from meristem.platform.recipe import Recipe, load
from meristem.platform.training import checkpoint

SMALL = ["encoder.transformer={width: 24, depth: 1, heads: 2}", "modality.volume.patch=[4,4,4]", "train.workers=0",
         "train.batch=4", "views.a.size=[8,8,8]", "views.b.size=[8,8,8]", "compose.matched.stride=2", "train.log_every=1",
         *(f"heads.{head}.prototypes={{hidden: 16, out: 8, count: 12}}" for head in ("class", "patch")),
         "objectives.patch.contrastive.transform.align={heads: 2, hidden: 16}"]


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Six scans of one made anatomy, each shifted by its own number of voxels, 24×24×20 with noise."""
    (tmp_path / "scans").mkdir()
    rng = np.random.default_rng(5)
    anatomy = torch.nn.functional.interpolate(torch.from_numpy(rng.normal(size=(1, 1, 9, 9, 9))), size=(40, 40, 36),
                                              mode="trilinear")[0, 0].numpy()
    for i in range(6):
        a, b, c = 2 * i, 10 - 2 * i, 2 * (i % 3)
        scan = anatomy[a:a + 24, b:b + 24, c:c + 20] + rng.normal(scale=0.02, size=(24, 24, 20))
        nib.save(nib.Nifti1Image(scan.astype(np.float32), np.eye(4)), tmp_path / "scans" / f"{i}.nii.gz")
    return tmp_path / "scans"


def opened(folder: Path, cache: Path, *more: str) -> tuple[Recipe, Data]:
    recipe = load("volume/alice", [*SMALL, *more])
    return recipe, open_data(folder, recipe.modality, "auto", cache, quiet=True)


def test_surroundings_by_a_loop() -> None:
    array = np.random.default_rng(0).integers(-100, 100, (2, 9, 8, 7)).astype(np.int16)
    header = Header(array.shape, (), (1.0,) * 3, scale=(0.5, 2.0), offset=(1.0, -1.0))
    found = surroundings(array, header, stride=2, reach=2)
    assert found.shape == (54, 4, 4, 3) and found.dtype == np.float16
    x = array * np.reshape([0.5, 2.0], (2, 1, 1, 1)) + np.reshape([1.0, -1.0], (2, 1, 1, 1))
    means = np.array([[[[x[c, 2 * i:2 * i + 2, 2 * j:2 * j + 2, 2 * k:2 * k + 2].mean() for k in range(3)] for j in range(4)]
                       for i in range(4)] for c in range(2)])
    for cell in ((0, 0, 0), (1, 2, 1), (3, 3, 2)):
        around = [means[c][tuple(int(np.clip(p + 2 * d, 0, n - 1)) for p, d, n in zip(cell, step, (4, 4, 3), strict=True))]
                  for step in ((i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)) for c in range(2)]
        around = np.array(around) - np.mean(around)
        np.testing.assert_allclose(found[(slice(None), *cell)], around / np.linalg.norm(around), atol=2e-3)


def test_the_match_is_the_same_anatomy_in_another_patient(patients: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without reading a crop: the centres differ by the patients' shift, to a cell."""
    recipe, data = opened(patients, tmp_path / "c")
    assert recipe.compose is not None
    rows = sorted(data.rows(), key=lambda row: row.local)
    matching = recipe.compose.build(data.cache, [row.index for row in rows], recipe.views, 0)
    monkeypatch.setattr(Cache, "windows", lambda *_: pytest.fail("bytes were read"))
    monkeypatch.setattr(Cache, "array", lambda *_: pytest.fail("bytes were read"))
    for cursor in range(12):
        i, j = cursor % 5, cursor % 5 + 1
        centres, score = matching.places(cursor, rows[i].index, rows[j].index)
        shift = np.array([2 * (i - j), 2 * (j - i), 2 * (i % 3 - j % 3)])
        assert score >= 0.7
        assert np.abs(np.array(centres["b"]) - np.array(centres["a"]) - shift).max() <= 2
        for view in "ab":
            assert all(4 <= c <= n - 4 for c, n in zip(centres[view], (24, 24, 20), strict=True))  # the crop fits around it
    again = recipe.compose.build(data.cache, [row.index for row in rows], recipe.views, 0)
    assert again.places(3, rows[3].index, rows[4].index) == matching.places(3, rows[3].index, rows[4].index)


def test_partners_are_others_and_depend_on_nothing_but_the_cursor(patients: Path, tmp_path: Path) -> None:
    recipe, data = opened(patients, tmp_path / "c")
    rows = data.rows()
    whole = list(loader(data.cache, rows, recipe, steps=4))
    for batch in whole:
        a, b = batch.views["a"], batch.views["b"]
        for i, cursor in enumerate(batch.items.cursor.tolist()):
            same = [row for row in rows if torch.equal(_crop(recipe, data, row.index, "a", cursor), a.array[i])]
            others = [row for row in rows if torch.equal(_crop(recipe, data, row.index, "b", cursor), b.array[i])]
            assert [row.index for row in same] == [int(batch.items.row[i])] and len(others) == 1
            assert others[0].subject != same[0].subject
    late = list(loader(data.cache, rows, recipe, start=2, steps=4))
    halves = [list(loader(data.cache, rows, recipe, steps=4, rank=rank, world=2)) for rank in (0, 1)]
    for step in (2, 3):
        for view in "ab":
            assert torch.equal(late[step - 2].views[view].array, whole[step].views[view].array)
            assert torch.equal(torch.cat([half[step].views[view].array for half in halves]), whole[step].views[view].array)


def _crop(recipe: Recipe, data: Data, row: int, view: str, cursor: int) -> torch.Tensor:
    """What the view would show of a row, centred where the composer says."""
    assert recipe.compose is not None
    batches = loader(data.cache, data.rows(), recipe, steps=1)._batches
    centre, _ = batches._match(view, cursor)
    look = Look(recipe.train.seed, cursor, 0, view, -1, centre)
    draw = recipe.modality.draw(recipe.views[view], data.cache.header(row), look)
    return recipe.modality.load(data.cache.windows(row, [draw])[0], draw, True)


def test_the_block_is_that_of_the_authors_code() -> None:
    """github.com/alibaba-damo-academy/alice at d45cfcd: CrossAttentionLayer(8, 16, 2, 4, 4) of CASA/CASA_Module.py without
    dropout, all weights and then queries and context (2 × 5 × 8) standard normal from a torch generator seeded with 0, in the
    order below, gave a sum of magnitudes of 72.4424 and these last numbers.
    """
    block, g = CrossAttention(8, 2, 16), torch.Generator().manual_seed(0)
    linear = [block.query.weight, block.key.weight, block.value.weight, block.out.weight, block.enter.weight, block.enter.bias,
              block.leave.weight, block.leave.bias]
    for p in (*linear, *block.norms.parameters()):
        p.data = torch.randn(p.shape, generator=g)
    q, context = torch.randn(2, 5, 8, generator=g), torch.randn(2, 5, 8, generator=g)
    with torch.no_grad():
        y = block(q, context)
    assert float(y.abs().sum()) == pytest.approx(72.4424, abs=1e-3)
    last = torch.tensor([-1.3788, 0.2885, -1.5717, -1.6616, -0.3116, 0.6391, -0.9290, 0.7406])
    torch.testing.assert_close(y[1, 4], last, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("least", "pairs"), [(-1.0, 8), (1.0, 0)])
def test_a_failed_match_weighs_nothing(patients: Path, tmp_path: Path, least: float, pairs: int) -> None:
    recipe, data = opened(patients, tmp_path / "c", f"compose.matched.least={least}")
    assembly = Assembly(recipe)
    losses = assembly(assembly.prepare(next(iter(loader(data.cache, data.rows(), recipe, steps=1)))), 0.0)
    assert float(losses["class"].count) == pytest.approx(pairs, abs=1e-6)
    assert float(losses["patch"].count) == pytest.approx(8 * pairs, abs=1e-6)
    assert float(losses["restore-a"].count) == 4 * 8**3
    assert bool(losses["class"].total > 0) == (pairs > 0)
    assert assembly.last_step is not None and sorted(assembly.last_step.passes) == [
        "encoder(a, plan)", "encoder(b, plan)", "teacher(a)", "teacher(b)"]


def test_tokens_are_completed_by_what_their_own_view_holds(patients: Path, tmp_path: Path) -> None:
    """The patch loss by hand, view by view and row by row; and the teacher gets no gradient."""
    recipe, data = opened(patients, tmp_path / "c")
    assembly = Assembly(recipe)
    losses = assembly(assembly.prepare(next(iter(loader(data.cache, data.rows(), recipe, steps=1)))), 0.0)
    step, line = assembly.last_step, assembly.objectives["patch"]
    assert step is not None
    total = 0.0
    with torch.no_grad():
        for view in "ab":
            q, k = step.units(view, level="dense", head="patch", masked=True), step.units(view, "teacher", "dense", "patch")
            for row in range(4):
                mine, theirs = (x.z[8 * row:8 * row + 8][None] for x in (q, k))
                found, target = line.transform.block(mine, mine), line.transform.block(mine, theirs)  # type: ignore[union-attr,operator]
                total += float(-((target / 0.04).softmax(-1) * (found / 0.1).log_softmax(-1)).sum())
    assert float(losses["patch"].total.detach()) == pytest.approx(total, rel=1e-4)
    (losses["patch"].total / losses["patch"].count).backward()
    assert all(p.grad is None for p in assembly.teacher.parameters())  # type: ignore[union-attr]
    assert float(line.transform.block.query.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("recipe", "changes", "says"), [
    ("volume/alice", ["views.b.partner=false"], "'b' its partner"),
    ("volume/alice", ["views.a.window=whole"], "window: crop"),
    ("volume/alice", ["compose.matched.other=c"], "no view 'c'"),
    ("volume/alice", ["objectives.patch.contrastive.level=cls"], "set level: dense"),
    ("points/simclr", ["compose={matched: {view: v, other: v}}"], "views must be of images or volumes")])
def test_what_cannot_be_composed_is_refused(recipe: str, changes: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(recipe, changes)


def test_one_patient_has_no_partner(patients: Path, tmp_path: Path) -> None:
    recipe, data = opened(patients, tmp_path / "c")
    with pytest.raises(DataError, match="another subject"):
        loader(data.cache, data.rows()[:1], recipe, steps=1)
    assert isinstance(recipe.compose, Matched)


def test_a_run_learns_and_goes_on_exactly(patients: Path, tmp_path: Path) -> None:
    changes = [*SMALL, "train.steps=4", "train.checkpoint_every=2", "train.keep=3"]

    def run(out: Path, resume: bool) -> None:
        meristem.pretrain("volume/alice", patients, out, changes, cache=tmp_path / "c", quiet=True, resume=resume)

    whole = goes_on_to_the_same_bits(run, tmp_path, 2, 4)
    start = checkpoint.read_weights(tmp_path / "whole" / "checkpoints" / "step-00000002")
    assert not torch.equal(whole["encoder.embed.linear.weight"], start["encoder.embed.linear.weight"])
