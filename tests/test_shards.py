"""Samples from shards are those of the files, each once an epoch, well mixed, to the same bits when resumed or divided."""

from __future__ import annotations

import contextlib
import gzip
import io
import multiprocessing
import os
import tarfile
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_skeletons import mocap
from npy_modality import Npy, NpyOptions, NpyView, ramp
from resuming import goes_on_to_the_same_bits
from test_loader import same

import meristem
from meristem.errors import CheckpointError, DataError
from meristem.modalities.base import Header, modality_class
from meristem.modalities.objects import Objects, Raster
from meristem.platform.data import cache as cache_module
from meristem.platform.data.loader import loader
from meristem.platform.data.manifest import Row
from meristem.platform.data.samples import Block, Entry, Samples
from meristem.platform.data.shards import index, remote, shards, write
from meristem.platform.data.shards.index import Shard
from meristem.platform.data.shards.remote import Remote
from meristem.platform.data.shards.shards import AHEAD, Shards
from meristem.platform.data.shards.store import Store
from meristem.platform.data.source import Data, open_data
from meristem.platform.recipe import TrainSettings

N = 24
SIZE = 8000  # bytes: three or four samples


@pytest.fixture(autouse=True)
def _keyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERISTEM_KEY", "of the tests")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 volumes of 13 subjects: every second with a mask, every third with a class; one broken, one a copy."""
    root = tmp_path_factory.mktemp("Zebraquagga")
    (root / "m").mkdir()
    lines = ["path,mask,class,subject"]
    for i in range(N):
        x = ramp((9 + i % 3, 6, 8))
        x[0, 0, 0] = -i
        name = f"Zebraquagga{(7 * i) % N:02d}"  # names in another order than rows
        np.save(root / f"{name}.npy", x.astype(float) * np.nan if i == 5 else x)
        np.save(root / f"m/{name}.npy", (np.arange(x.size).reshape(x.shape) + i) % 3)
        lines.append(f"{name}.npy,{f'm/{name}.npy' if i % 2 else ''},{i % 2 if i % 3 == 0 else ''},p{i // 2}")
    (root / f"Zebraquagga{(7 * 8) % N:02d}.npy").write_bytes((root / f"Zebraquagga{(7 * 9) % N:02d}.npy").read_bytes())
    (root / "t.csv").write_text("\n".join(lines))
    return root / "t.csv"


@pytest.fixture(scope="module")
def url(files: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = f"file://{tmp_path_factory.mktemp('shards')}/set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERISTEM_KEY", "of the tests")
        write.write(files, Npy(), place, SIZE, tmp_path_factory.mktemp("writing"))
    return place


def recipe(batch: int = 4, window: int = 3, **views: NpyView) -> Any:
    return SimpleNamespace(modality=Npy(), views=views or {"x": NpyView(), "y": NpyView(size=(2, 4, 3), count=3, reach=3)},
                           train=TrainSettings(batch=batch, window=window), compose=None)


def opened(place: str | Path, cache: Path, split: str = "auto") -> Data:
    return open_data(place, Npy(), split, cache, quiet=True)


def batches(data: Data, plan: Any = None, **more: Any) -> list[Any]:
    return list(loader(data.cache, data.rows(), plan or recipe(), **{"steps": 8, "workers": 0, "fields": ("mask",), **more}))


@pytest.mark.parametrize("large", [1 << 22, 0], ids=["packed", "chunked"])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_read_comes_back(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int,
                                  workers: int) -> None:
    monkeypatch.setattr(cache_module, "LARGE", large)
    done = write.write(files, Npy(), f"file://{tmp_path}/s", SIZE, tmp_path / "w", workers=workers)
    here, there = opened(files, tmp_path / "c"), opened(f"file://{tmp_path}/s", tmp_path / "c")
    assert len(done.shards) > 4 and len(there.cache) == len(here.cache) == N - 2 == len(done.lines)
    assert all(b.chunked == (large == 0) for e in there.cache.entries.values() for b in e.blocks().values())
    for row in here.rows():
        i = row.index
        assert np.array_equal(there.cache.array(i), here.cache.array(i))
        assert there.cache.header(i) == here.cache.header(i) and there.cache.content(i) == here.cache.content(i)
        assert there.cache.fields(i) == here.cache.fields(i) and there.cache.counts(i) == here.cache.counts(i)
        for name in here.cache.fields(i):
            assert np.array_equal(there.cache.field(i, name), here.cache.field(i, name))
    assert {(p.case, p.reason) for p in there.cache.quarantine} == {(p.case, p.reason) for p in here.cache.quarantine}
    assert len(there.cache.quarantine) == 2


@pytest.mark.parametrize("split", ["auto", "0.5,0.25,0.25", "every:4:1"])
def test_rows_and_splits_are_those_of_the_files(files: Path, url: str, tmp_path: Path, split: str) -> None:
    here, there = opened(files, tmp_path, split), opened(url, tmp_path, split)
    assert [(r.index, r.case, r.subject, r.split, r.labels, sorted(r.fields)) for r in here.manifest.rows] == [
        (r.index, r.case, r.subject, r.split, r.labels, sorted(r.fields)) for r in there.manifest.rows]
    assert len({r.split for r in here.rows()}) == 3
    assert here.identities(here.rows("train")) == there.identities(there.rows("train"))
    assert (here.manifest.hash, here.manifest.class_names) == (there.manifest.hash, there.manifest.class_names)


def test_shards_are_plain_tar_files_and_the_index_knows_the_bytes(url: str) -> None:
    folder, held = Path(url.removeprefix("file://")), index.load(url)
    for shard in held.shards:
        groups: dict[str, set[str]] = {}
        with tarfile.open(folder / shard.name) as tar:
            for member in tar:
                key, _, end = member.name.partition(".")
                groups.setdefault(key, set()).add(end)
        for key, ends in groups.items():
            entry, data = held.entries[int(key)], (folder / shard.name).read_bytes()
            assert ends == {"json", "x.npy", *(f"{name}.npy" for name in entry.fields)}
            with tarfile.open(folder / shard.name) as tar:
                file = tar.extractfile(f"{key}.x.npy")
                assert file is not None
                x = np.load(io.BytesIO(file.read()))
            b = entry.array
            assert b.file == shard.name and x.tobytes() == data[b.offset:b.offset + b.nbytes] and b.offset % 64 == 0


def test_shards_name_nobody(url: str) -> None:
    for file in Path(url.removeprefix("file://")).iterdir():
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        assert b"zebraquagga" not in data.lower() and b"Zebraquagga" not in file.name.encode()


def test_labelled_samples_have_shards_of_their_own(url: str) -> None:
    held = index.load(url)
    labelled = {row.index for row in held.manifest.rows if row.labelled}
    kinds = [{i in labelled for i, e in held.entries.items() if e.array.file == s.name} for s in held.shards]
    assert all(len(kind) == 1 for kind in kinds) and len(set(map(tuple, kinds))) == 2


@pytest.mark.parametrize("wrong", [
    lambda about, sample: about["shards"][0].update(name="../../elsewhere.tar"), lambda about, sample: about.pop("shards"),
    lambda about, sample: sample["entry"]["array"].update(offset=10**9),
    lambda about, sample: sample["entry"]["array"].update(dtype="|O"), lambda about, sample: sample["row"].update(case="../x"),
    lambda about, sample: sample["entry"].update(content="/x"),
    lambda about, sample: sample.update(row=7), lambda about, sample: sample["entry"]["header"].pop("affine")])
def test_an_index_that_is_not_as_it_is_written_is_refused(url: str, tmp_path: Path, wrong: Any) -> None:
    lines = list(index.unpacked(Remote(url).read(index.NAME), ""))
    wrong(*lines[:2])
    (tmp_path / index.NAME).write_bytes(index.packed(lines))
    with pytest.raises(DataError, match="cut or damaged"):
        index.load(f"file://{tmp_path}")


# ---- order

COUNTS = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def made(counts: list[int]) -> tuple[Shards, list[int]]:
    """Shards that hold nothing, of so many samples each; rows dealt out in turn."""
    header, names = Header((1, 1), ((1.0,),), (1.0,)), [f"s{i}" for i, n in enumerate(counts) for _ in range(n)]
    entries = {i: Entry(str(i), "", header, Block(name, "|u1", (1, 1)), {}, {}, {}) for i, name in enumerate(names)}
    made = Shards.__new__(Shards)
    made.entries, made._largest, made.store = entries, 1, SimpleNamespace(room=1 << 40)  # type: ignore[assignment]
    return made, list(entries)


@given(COUNTS, st.integers(1, 12), st.integers(0, 3), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_sees_every_sample_once_and_few_shards_at_a_time(counts: list[int], window: int, seed: int,
                                                                      epoch: int) -> None:
    held, rows = made(counts)
    order = held.order(rows, seed, epoch, window)
    again = held.order(rows, seed, epoch, window)
    assert sorted(order.place.tolist()) == rows and torch.equal(order.place, again.place)
    names = [held.entries[i].array.file for i in order.place.tolist()]
    assert torch.equal(order.lane, again.lane) and int(order.lane.max()) < min(window, len(counts))
    seam = set()
    if window < len(counts):  # every shard lies within one stretch, but for those at which the circle closes
        for name in set(names):
            at = [i for i, n in enumerate(names) if n == name]
            between = set(names[at[0]:at[-1] + 1])
            if len(between) >= 2 * window:
                seam.add(name)
    assert len(seam) <= window


def test_neighbours_are_seldom_of_one_shard() -> None:
    held, rows = made([50] * 40)
    share = {}
    for window in (1, 4, 8, 40):
        names = [held.entries[i].array.file for i in held.order(rows, 0, 1, window).place.tolist()]
        share[window] = np.mean([a == b for a, b in pairwise(names)])
    assert share[1] > 0.9
    for window in (4, 8, 40):
        assert share[window] == pytest.approx(1 / window, rel=0.35)


def test_a_window_of_all_shards_is_a_plain_shuffle() -> None:
    """Each sample is as likely in each tenth of the epoch, wherever its shard stands."""
    held, rows = made([10] * 10)
    tenth = np.zeros((10, 10))
    for epoch in range(200):
        place = held.order(rows, 0, epoch, 10).place.numpy()
        np.add.at(tenth, (place // 10, np.arange(100) // 10), 1)
    assert np.abs(tenth / 200 - 1).max() < 0.25  # of 2,000 draws, each expected 200 times


def test_one_epoch_goes_over_into_the_next_without_new_shards() -> None:
    held, rows = made([20] * 30)
    for epoch in range(3):
        last = held.order(rows, 3, epoch, 5).place.tolist()[-60:]
        first = held.order(rows, 3, epoch + 1, 5).place.tolist()[:20]
        name = {i: held.entries[i].array.file for i in rows}
        assert len({name[i] for i in first} - {name[i] for i in last}) <= 2 < len({name[i] for i in first})


def test_a_rank_reads_few_of_the_shards() -> None:
    """Dealt in the order of their lanes, samples of a shard go to one of eight ranks and to its neighbours."""
    held, rows = made([100] * 128)
    order = held.order(rows, 0, 0, 16)
    names = np.array([held.entries[i].array.file for i in order.place.tolist()])
    lanes = order.lane.numpy()[:12800].reshape(-1, 128)
    dealt = np.take_along_axis(names.reshape(-1, 128), lanes.argsort(1, kind="stable"), 1).reshape(-1, 8, 16)
    shares = [len(set(dealt[:, rank].ravel())) / 128 for rank in range(8)]
    assert max(shares) < 0.4 and np.mean(shares) < 0.33  # 1/8 where borders would not waver; 1 without lanes


# ---- training

def test_views_are_those_of_the_files_to_the_bit(files: Path, url: str, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shards, "order", Samples.order)
    here, there = batches(opened(files, tmp_path)), batches(opened(url, tmp_path))
    assert len(here) == 8 and all(same(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_tail_whoever_reads(url: str, tmp_path: Path, workers: int) -> None:
    whole = batches(opened(url, tmp_path / "a"))
    tail = batches(opened(url, tmp_path / "b"), start=3, workers=workers)
    assert all(same(a, b) for a, b in zip(whole[3:], tail, strict=True))


def test_ranks_divide_the_global_batch(url: str, tmp_path: Path) -> None:
    data = opened(url, tmp_path)
    whole = batches(data, recipe(8))
    parts = [batches(data, recipe(8), rank=rank, world=2) for rank in range(2)]
    for one, *two in zip(whole, *parts, strict=True):
        assert torch.equal(one.items.row, torch.cat([b.items.row for b in two]))
        assert torch.equal(one.views["x"].array, torch.cat([b.views["x"].array for b in two]))


def test_an_epoch_of_batches_shows_every_row_once(url: str, tmp_path: Path) -> None:
    data = opened(url, tmp_path)
    seen = [row for batch in batches(data, recipe(2), steps=2 * (N - 2) // 2) for row in batch.items.row.tolist()]
    for epoch in (seen[:N - 2], seen[N - 2:]):
        assert Counter(epoch) == Counter(data.cache.rows)
    assert seen[:N - 2] != seen[N - 2:]


def test_shards_are_fetched_before_they_are_needed(url: str, tmp_path: Path) -> None:
    data = opened(url, tmp_path)
    assert isinstance(data.cache, Shards)
    row = data.cache.rows[0]
    data.cache.expect([row])
    file = data.cache.store.home / data.cache.entries[row].array.file
    until = time.monotonic() + 30
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert file.exists() and data.cache.ahead(data.cache.rows) >= AHEAD


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """24 grey pictures in two class folders, and their shards."""
    from PIL import Image
    rng, root = np.random.default_rng(1), tmp_path_factory.mktemp("pictures")
    for name, level in (("dark", 60), ("light", 160)):
        (root / "in" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.normal(level, 20, (32, 40)).clip(0, 255).astype(np.uint8)).save(root / "in" / name / f"{i}.png")
    place = f"file://{root}/out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERISTEM_KEY", "of the tests")
        meristem.shard_data(root / "in", place, size=0.01, cache=root / "w", quiet=True)
    return root / "in", place


TINY = ["views.x.size=[16,16]", "modality.image.patch=8", "encoder.transformer.size=tiny",
        "train.batch=4", "train.log_every=1", "train.workers=1", "train.window=2"]


def test_a_run_from_shards_resumes_to_the_same_bits_and_not_from_others(pictures: tuple[Path, str], tmp_path: Path) -> None:
    place, cache = pictures[1], tmp_path / "c"

    def run(directory: Path, resume: bool) -> None:
        meristem.pretrain("mae", place, directory, [*TINY, "train.steps=6", "train.checkpoint_every=3"], cache=cache,
                          resume=resume, quiet=True)

    goes_on_to_the_same_bits(run, tmp_path, 3, 6)
    with pytest.raises(CheckpointError, match="shards differ"):
        meristem.pretrain("mae", pictures[0], tmp_path / "whole", [*TINY, "train.steps=6", "train.checkpoint_every=3"],
                          cache=cache, resume=True, quiet=True)


def test_a_classifier_tunes_from_shards_as_from_files(pictures: tuple[Path, str], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shards, "order", Samples.order)
    scores = []
    for name, place in zip(("files", "shards"), pictures, strict=True):
        out = tmp_path / name
        meristem.finetune("classification", place, out, [*TINY, "train.steps=4"], cache=tmp_path / "c", quiet=True)
        scores.append((out / "cases.json").read_text())
        meristem.embed(out, place, out, quiet=True)
    a, b = (np.load(tmp_path / name / "embeddings.npz") for name in ("files", "shards"))
    assert scores[0] == scores[1] and np.array_equal(a["embedding"], b["embedding"]) and np.array_equal(a["case"], b["case"])


OTHERWISE = {"image": {"patch": 4, "scales": (1.0, 9.0)}, "volume": {"patch": (4, 4, 4)},
             "points": {"tokens": "serial", "count": 8, "size": 4, "cell": 0.5, "places": True},
             "skeleton": {"segment": 2, "seconds": (0.1, 5.0)},
             "video": {"patch": (1, 8, 8), "scales": (1.0, 9.0), "seconds": (0.1, 5.0)}}


@pytest.mark.parametrize("name", OTHERWISE)
def test_samples_serve_however_tokens_are_cut(name: str, image_folder: Path, volume_folder: Path, tmp_path: Path) -> None:
    """`later` options change no sample that is read, and no key under which it is stored."""
    kind = modality_class(name)
    np.save(tmp_path / "cloud.npy", np.random.default_rng(0).normal(size=(50, 3)))
    paths = {"image": image_folder / "dark" / "00.png", "volume": volume_folder / "imagesTr" / "case_00.nii.gz",
             "points": tmp_path / "cloud.npy", "video": image_folder / "dark"}
    path = paths[name] if name in paths else mocap(tmp_path / "walking_1.txt", 30)
    options = {"store": "decoded"} if name == "video" else {}
    assert set(OTHERWISE[name]) == set(kind.later)  # type: ignore[attr-defined]
    one, two = (kind(kind.Options.model_validate({**options, **more})) for more in ({}, OTHERWISE[name]))
    a, b = one.read([path]), two.read([path])
    assert a.array is not None and np.array_equal(a.array, b.array) and repr(a.header) == repr(b.header)
    assert cache_module.fingerprint(one) == cache_module.fingerprint(two)


# ---- writing

def test_a_stopped_writing_goes_on_to_the_same_set(files: Path, url: str, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    place, put, given = f"file://{tmp_path}/s", Remote.put, []

    def stops(self: Remote, path: Path, name: str) -> str:
        given.append(name)
        if len(given) == 3:
            path.with_name(name).rename(tmp_path / "half")  # as a kill in the middle: a shard without its lines
            (tmp_path / "s" / name).write_bytes((tmp_path / "half").read_bytes()[:700])
            raise KeyboardInterrupt
        return put(self, path, name)

    monkeypatch.setattr(Remote, "put", stops)
    with pytest.raises(KeyboardInterrupt):
        write.write(files, Npy(), place, SIZE, tmp_path / "w")
    monkeypatch.setattr(Remote, "put", put)
    with pytest.raises(DataError, match=r"no index\.jsonl\.gz"):
        index.load(place)
    Npy.reads.clear()
    done = write.write(files, Npy(), place, SIZE, tmp_path / "w")
    assert done.reused == 2 and len(Npy.reads) < N - 2
    whole = Path(url.removeprefix("file://"))
    assert {f.name: f.read_bytes() for f in (tmp_path / "s").iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}
    Npy.reads.clear()
    assert write.write(files, Npy(), place, SIZE, tmp_path / "w").reused == len(done.shards) and not Npy.reads


def test_damage_that_a_stop_left_is_written_again(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, out = f"file://{tmp_path}/s", tmp_path / "s"
    monkeypatch.setattr(Remote, "remove", lambda self, name: None)
    first = write.write(files, Npy(), place, SIZE, tmp_path / "w")
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    for name, reused in (("shard-00002.jsonl.gz", 2), ("shard-00001.tar", 1)):
        for file in (out / index.NAME, out / name):
            file.write_bytes(file.read_bytes()[:-20])
        again = write.write(files, Npy(), place, SIZE, tmp_path / "w")
        assert again.reused == reused and again.shards == first.shards
        assert {f.name: f.read_bytes() for f in out.iterdir()} == before


def test_shards_of_other_data_or_settings_are_not_written_over(files: Path, url: str, tmp_path: Path) -> None:
    for modality, size in ((Npy(NpyOptions(scale=2.0)), SIZE), (Npy(), SIZE // 2)):
        with pytest.raises(DataError, match="other data, or of other settings"):
            write.write(files, modality, url, size, tmp_path)


def test_samples_that_stay_in_their_files_are_refused(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Npy.read

    def outside(self: Npy, *arguments: Any) -> Any:
        sample = read(self, *arguments)
        sample.array = None
        return sample

    monkeypatch.setattr(Npy, "read", outside)
    with pytest.raises(DataError, match=r"stays in its own file[\s\S]*store=decoded"):
        write.write(files, Npy(), f"file://{tmp_path}/s", SIZE, tmp_path / "w")


def test_other_options_than_the_recipes_are_refused_with_those_to_set(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"scale[\s\S]*modality\.npy\.scale=0\.5"):
        open_data(url, Npy(NpyOptions(scale=2.0)), cache=tmp_path, quiet=True)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_line_tells_all_of_a_sample(data: st.DataObject) -> None:
    number, count = st.integers(-2**40, 2**40), data.draw(st.integers(0, 3))
    numbers = st.lists(st.floats(-1e6, 1e6), min_size=4 * count, max_size=4 * count)
    masks = [Raster(np.array(data.draw(st.lists(st.booleans(), min_size=15, max_size=15))).reshape(3, 5), (i, 2))
             for i in range(count)]
    objects = data.draw(st.sampled_from([None, Objects(np.array(data.draw(numbers)).reshape(count, 4), np.arange(count),
                                                       np.arange(count) % 2 == 0, np.arange(count), masks)]))
    row = Row(data.draw(st.integers(0, 10**9)), "case-1", "sub-1", (Path("a"),), "a", {"mask": Path("b")},
              data.draw(st.dictionaries(st.sampled_from(["class", "grade"]), st.integers(-1, 9))),
              data.draw(st.sampled_from(["", "train", "test"])), rank=4, fold=data.draw(st.integers(-1, 9)), objects=objects,
              partners=tuple(data.draw(st.lists(st.integers(0, 99), max_size=3))))
    shape = tuple(data.draw(st.lists(st.integers(1, 400), min_size=2, max_size=4)))
    header = Header(shape, ((1.0, data.draw(st.floats(-9, 9))), (0.0, 1.0)), (0.1,), (1e-7,), (-3.0,), (0.0,),
                    {"shape": [data.draw(number)]}, ((1, 2), (3, 4)))
    block = Block("shard-00000.tar", "<i2", shape, data.draw(st.integers(0, 2**40)), data.draw(st.booleans()))
    entry = Entry("k", "c", header, block, {"mask": block}, {"pairs": block}, {"mask": {0: 5, -1: 7}}, "Zg==")
    (back,) = index.unpacked(index.packed([index.line(row, entry)]), "x")
    assert Entry.load(back["entry"]) == entry
    found = index._row(back["row"])
    assert found == Row(row.index, row.case, row.subject, found.paths, row.case, found.fields, row.labels, row.split, rank=4,
                        fold=row.fold, partners=row.partners) and set(found.fields) == {"mask"}
    assert (found.objects is None) == (objects is None)
    if objects is not None and found.objects is not None:
        for name in ("box", "label", "ignore", "level"):
            a, b = getattr(objects, name), getattr(found.objects, name)
            assert np.array_equal(a, b) and a.dtype == b.dtype and a.shape == b.shape
        assert [m.key() for m in found.objects.masks] == [m.key() for m in masks]


# ---- the store

def fetching(store: Store, seed: int, told: Any) -> None:
    """Reads files at random and checks what it gets."""
    rng = np.random.default_rng(seed)
    for number in rng.integers(0, 12, 60).tolist():
        def fetch(into: Path, number: int = number) -> None:
            with into.open("wb") as file:
                for _ in range(10):
                    file.write(bytes([number]) * 100)
                    time.sleep(0.0005)
        try:
            found = store.get(f"f{number}", 1000, fetch).read_bytes()
        except FileNotFoundError:
            continue  # gone between finding and reading: the caller asks again
        told.put(found == bytes([number]) * 1000)


def test_processes_share_a_store_that_keeps_its_bound(tmp_path: Path) -> None:
    context, store = multiprocessing.get_context("fork"), Store(tmp_path, "set", 4000)
    told = context.Queue()
    workers = [context.Process(target=fetching, args=(store, seed, told)) for seed in range(4)]
    for worker in workers:
        worker.start()
    most, answers = 0, []
    while any(w.is_alive() for w in workers) or not told.empty():
        with contextlib.suppress(FileNotFoundError):  # one was removed while they were counted
            most = max(most, sum(f.stat().st_size for f in (tmp_path / "set").iterdir() if f.is_file()))
        while not told.empty():
            answers.append(told.get())
    assert all(w.exitcode == 0 for w in workers) and len(answers) > 150 and all(answers)
    assert 2000 < most <= 4000
    assert not [f for f in (tmp_path / "set").iterdir() if f.is_file() and f.name.startswith(".")]


def thousand(into: Path) -> None:
    into.write_bytes(bytes(1000))


def test_the_longest_unused_goes_first_and_beginnings_of_dead_processes_with_it(tmp_path: Path) -> None:
    store = Store(tmp_path, "set", 3000)
    for name in "abc":
        store.get(name, 1000, thousand)
        os.utime(store.home / name, (0, ord(name)))
    (store.home / ".x.900").write_bytes(b"half")
    store.use("a")
    store.get("d", 1000, thousand)
    assert sorted(f.name for f in store.home.iterdir() if f.is_file()) == ["a", "c", "d"]


def test_batches_come_right_from_a_store_that_holds_few_shards(url: str, tmp_path: Path) -> None:
    held = index.load(url)
    largest = max(s.size for s in held.shards)
    narrow = Shards(held, Remote(url), tmp_path / "narrow", largest * (2 + 1 + AHEAD))
    wide = opened(url, tmp_path)
    rows = wide.rows()
    few = list(loader(narrow, rows, recipe(window=2), steps=12, workers=2))
    assert all(same(a, b) for a, b in zip(few, loader(wide.cache, rows, recipe(window=2), steps=12, workers=0), strict=True))
    assert 0 < sum(f.stat().st_size for f in narrow.store.home.iterdir() if f.is_file()) <= narrow.store.room
    with pytest.raises(DataError, match=r"too little to mix[\s\S]*--room"):
        list(loader(narrow, rows, recipe(window=3), steps=1, workers=0))
    with pytest.raises(DataError, match="too little"):
        Shards(held, Remote(url), tmp_path / "none", largest)


def test_a_damaged_local_copy_is_never_read(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched is checked before it gets its name."""
    monkeypatch.setattr(shards, "AHEAD", 0)
    held = index.load(url)
    wrong = [Shard(s.name, s.size, "0" * 64) for s in held.shards]
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    data = Shards(replace(held, shards=tuple(wrong)), Remote(url), tmp_path, 10**9)
    with pytest.raises(DataError, match="another checksum"):
        data.array(data.rows[0])
    assert not [f for f in data.store.home.iterdir() if f.is_file()]
