"""Batches are pure in (seed, cursor): resumed, divided among ranks or made by workers, they are the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from npy_modality import ORIGIN, SPACING, Npy, NpyView, ramp

from meristem.errors import DataError, RecipeError
from meristem.platform.data.cache import Cache
from meristem.platform.data.loader import Loader, loader
from meristem.platform.data.manifest import Manifest, Row
from meristem.platform.recipe import TrainSettings
from meristem.platform.step import Batch

SHAPE = (12, 10, 8)
N = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Cache]:
    """Ten volumes whose elements tell their own place; eight with a mask that is the same ramp, two with class labels."""
    root = tmp_path_factory.mktemp("data")
    (root / "m").mkdir()
    lines = ["path,mask,class"]
    for i in range(N):
        x = ramp(SHAPE)
        x[0, 0, 0] = -i  # no two files are the same
        np.save(root / f"{i}.npy", x)
        np.save(root / f"m/{i}.npy", ramp(SHAPE))
        lines.append(f"{i}.npy,{f'm/{i}.npy' if i < 8 else ''},{i % 2 if i < 2 else ''}")
    (root / "t.csv").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERISTEM_KEY", "of the tests")
        manifest = Manifest.discover(root / "t.csv", Npy())
        return manifest, Cache.build(manifest, Npy(), tmp_path_factory.mktemp("cache"))


def recipe(batch: int = 4, seed: int = 0, **views: NpyView) -> Any:
    return SimpleNamespace(modality=Npy(), views=views or {"x": NpyView(), "y": NpyView(size=(2, 4, 3), count=3, reach=3)},
                           train=TrainSettings(batch=batch, seed=seed), compose=None)


def load(made: tuple[Manifest, Cache], plan: Any = None, *, rows: list[Row] | None = None, steps: int = 6, workers: int = 0,
         **more: Any) -> Loader:
    manifest, cache = made
    return loader(cache, rows or manifest.rows, plan or recipe(), steps=steps, workers=workers, **more)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    found = {"row": batch.items.row, "cursor": batch.items.cursor, **{f"label {k}": v for k, v in batch.items.labels.items()}}
    for name, v in batch.views.items():
        found |= {f"{name} array": v.array, f"{name} affine": v.frame.affine, f"{name} spacing": v.frame.spacing,
                  f"{name} item": v.item, f"{name} look": v.look}
        found |= {f"{name} {k}": x for k, x in {**v.params, **v.fields}.items()}
        if v.weight is not None:
            found[f"{name} weight"] = v.weight
    return found


def same(a: Batch, b: Batch) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def test_a_resumed_run_is_the_tail(made: tuple[Manifest, Cache]) -> None:
    whole = list(load(made, fields=("mask",)))
    tail = list(load(made, fields=("mask",), start=4))
    assert len(whole) == 6 == len(load(made)) and len(tail) == 2
    assert all(same(a, b) for a, b in zip(whole[4:], tail, strict=True))
    assert not same(whole[0], whole[1])


def test_workers_change_nothing(made: tuple[Manifest, Cache]) -> None:
    alone, many = list(load(made, fields=("mask",))), list(load(made, fields=("mask",), workers=2))
    assert all(same(a, b) for a, b in zip(alone, many, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_divide_the_global_batch(made: tuple[Manifest, Cache], world: int) -> None:
    whole = list(load(made))
    parts = [list(load(made, rank=r, world=world)) for r in range(world)]
    for step, batch in enumerate(whole):
        ranks = [tensors(p[step]) for p in parts]
        for key, x in tensors(batch).items():
            if key.endswith(("item", "weight")):  # items are numbered within a rank; weights exist where they are needed
                continue
            assert torch.equal(x, torch.cat([r[key] for r in ranks])), key


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own(made: tuple[Manifest, Cache]) -> None:
    drawn = torch.cat([b.items.row for b in load(made, steps=10)])
    epochs = [drawn[i:i + N].tolist() for i in range(0, 40, N)]
    assert all(sorted(e) == list(range(N)) for e in epochs) and len({tuple(e) for e in epochs}) == 4
    cursors = torch.cat([b.items.cursor for b in load(made, steps=10)])
    assert cursors.tolist() == list(range(40))


def test_seeds_and_epochs_draw_other_windows(made: tuple[Manifest, Cache]) -> None:
    rows = [made[0].rows[0]]
    a, b = (load(made, recipe(1, seed), rows=rows, steps=4) for seed in (0, 1))
    angles = [float(batch.views["x"].params["angle"][0]) for run in (a, b) for batch in run]
    assert len(set(angles)) == 8


def test_looks_are_item_major(made: tuple[Manifest, Cache]) -> None:
    view = next(iter(load(made))).views["y"]
    assert view.item.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] and view.look.tolist() == [0, 1, 2] * 4
    assert view.array.shape == (12, 1, 2, 4, 3) and len(set(view.params["angle"].tolist())) == 12


def place(value: torch.Tensor) -> torch.Tensor:
    """Where an element of the ramp lies in the stored lattice (…, 3)."""
    return torch.stack([value // 400, value % 400 // 20, value % 20], -1).float()


@pytest.mark.parametrize("shrink", [1, 3])
def test_the_frame_tells_where_each_element_came_from(made: tuple[Manifest, Cache], shrink: int) -> None:
    plan = recipe(5, x=NpyView(size=(2, 3, 2), shrink=shrink, reach=4))
    outside = 0
    for batch in load(made, plan, fields=("mask",), rows=list(made[0].rows[:8])):
        view = batch.views["x"]
        index = torch.cartesian_prod(*(torch.arange(n) for n in view.frame.shape)).float()
        points = view.frame.to_source(index[None].expand(5, -1, -1))
        stored = (points - torch.tensor(ORIGIN)) / torch.tensor(SPACING)
        truly = ((stored > -0.5) & (stored < torch.tensor(SHAPE) - 0.5)).all(-1)
        weight = torch.ones(5, 1, 2, 3, 2) if view.weight is None else view.weight
        assert torch.equal(weight.flatten(1).bool(), truly)
        outside += int((~truly).sum())
        mask = view.fields["mask"].flatten(1)
        assert mask.dtype == torch.int64 and (mask[~truly] == 0).all()
        assert torch.equal(place(mask)[truly], stored[truly].round())
        if shrink == 1:
            values = view.array.flatten(1)
            inside = truly & (values > 0)  # the first element tells its file
            assert view.array.dtype == torch.int16 and torch.equal(place(values)[inside], stored[inside])
            assert (values[~truly] == 2).all()
        else:
            assert view.array.dtype == torch.float32
    assert outside > 0


def test_header_and_draw_reach_the_view(made: tuple[Manifest, Cache]) -> None:
    view = next(iter(load(made))).views["x"]
    assert view.params["scale"].tolist() == [[0.5]] * 4 and view.params["offset"].tolist() == [[-1.0]] * 4
    assert view.params["turn"].shape == (4, 3) and view.params["turn"].dtype == torch.float32
    assert view.frame.spacing.tolist() == [list(SPACING)] * 4 and view.frame.unit == ("mm",) * 3
    assert view.frame.affine.dtype == torch.float32 and view.weight is None


def test_what_has_no_label_says_so(made: tuple[Manifest, Cache]) -> None:
    labels, masks = {}, {}
    for batch in load(made, recipe(5), fields=("mask",), steps=2):
        for i, row in enumerate(batch.items.row.tolist()):
            labels[row], masks[row] = int(batch.items.labels["class"][i]), batch.views["x"].fields["mask"][i]
    assert labels == {0: 0, 1: 1, **{i: -1 for i in range(2, N)}}
    assert all(bool((m == -1).all()) == (row >= 8) for row, m in masks.items())
    assert next(iter(load(made, labels=()))).items.labels == {}


def test_rows_in_quarantine_are_left_out(made: tuple[Manifest, Cache]) -> None:
    manifest, cache = made
    smaller = Cache(cache.directory, {i: e for i, e in cache.entries.items() if i != 3}, Npy())
    drawn = Counter(torch.cat([b.items.row for b in load((manifest, smaller), recipe(3), steps=3)]).tolist())
    assert drawn == {i: 1 for i in range(N) if i != 3}
    with pytest.raises(DataError, match="none of 1 rows"):
        load((manifest, smaller), rows=[manifest.rows[3]])


def test_a_sample_does_not_depend_on_its_batch_mates(made: tuple[Manifest, Cache]) -> None:
    large, small = tensors(next(iter(load(made, recipe(8))))), list(load(made, recipe(2), steps=4))
    for key in ("x array", "x affine", "y array", "y angle", "row"):
        assert torch.equal(large[key], torch.cat([tensors(b)[key] for b in small]))


def test_loading_draws_nothing_from_the_global_generator(made: tuple[Manifest, Cache]) -> None:
    before = torch.get_rng_state()
    run = load(made, workers=1, steps=2)
    assert len(list(run)) == 2 and torch.equal(before, torch.get_rng_state()) and run.waited > 0


def test_a_batch_that_does_not_divide(made: tuple[Manifest, Cache]) -> None:
    with pytest.raises(RecipeError, match="cannot be divided among 3"):
        load(made, world=3)


def test_no_path_travels_with_a_batch(made: tuple[Manifest, Cache]) -> None:
    import pickle
    assert b".npy" not in pickle.dumps(load(made)._batches)


@pytest.mark.data
def test_real_cells(data_root: Path, tmp_path: Path) -> None:
    from meristem.modalities.base import modality_class
    image = modality_class("image")
    modality = image(image.Options.model_validate({"channels": 3, "mask_values": {0: 0, 128: 1, 255: 2}}))
    for f in sorted((data_root / "wbc-dataset1" / "Dataset 1").glob("00*")):
        (tmp_path / f.name).symlink_to(f)
    manifest = Manifest.discover(tmp_path, modality)
    cache = Cache.build(manifest, modality, tmp_path / "cache")
    plan: Any = SimpleNamespace(modality=modality, views={"x": modality.ViewOptions.model_validate({"size": [64, 64]})},
                                train=TrainSettings(batch=9), compose=None)
    assert len(cache) == 9 and not cache.quarantine
    batch = next(iter(loader(cache, manifest.rows, plan, fields=("mask",), steps=1, workers=0)))
    view = modality.augment(batch.views["x"], plan.views["x"])
    assert view.array.shape == (9, 3, 64, 64) and view.array.isfinite().all() and 0.1 < float(view.array.std()) < 3
    assert view.fields["mask"].unique().tolist() == [0, 1, 2]
