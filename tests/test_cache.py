"""A window from the cache is the window of the file; a build loses, mixes and betrays nothing."""

from __future__ import annotations

import csv
import multiprocessing
import os
import pickle
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from npy_modality import SPACING, Npy, NpyOptions, ramp

from meristem.errors import DataError, MeristemError
from meristem.modalities.base import Draw, Header, Sample, raw_pad
from meristem.platform.data import cache as module
from meristem.platform.data.cache import Cache
from meristem.platform.data.check import check
from meristem.platform.data.manifest import Manifest

CORNER = Draw((0, 0, 0), (4, 4, 4), (4, 4, 4))
SHAPES = ((7, 9, 5), (12, 6, 20), (4, 4, 4), (20, 20, 20), (9, 9, 9))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERISTEM_KEY", "of the tests")
    Npy.reads.clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


def write(root: Path) -> Path:
    """Five volumes s0 … s4, the first four with a mask of values 0 to 2."""
    (root / "images").mkdir()
    (root / "labels").mkdir()
    rng = np.random.default_rng(0)
    for i, shape in enumerate(SHAPES):
        np.save(root / f"images/s{i}.npy", ramp(shape, i))
        if i < 4:
            np.save(root / f"labels/s{i}.npy", rng.integers(0, 3, shape).astype(np.int64))
    return root


def build(data: Path, home: Path, **options: Any) -> Cache:
    modality = Npy(NpyOptions(**options))
    return Cache.build(Manifest.discover(data, modality), modality, home)


def test_large_files_are_decoded_by_all_cores_and_few_small_ones_here(data: Path, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    rows = Manifest.discover(data, Npy()).rows
    assert module.processes(rows) == 0
    monkeypatch.setattr(module, "MUCH", 1000)
    assert module.processes(rows) == 2 and module.processes(rows[:3]) == 0
    assert len(build(data, tmp_path)) == 5 and Npy.reads == []  # not in this process


class Deadly(Npy):
    """Its third volume kills who reads it, as a system that is short of memory does."""

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        if paths[0].stem == "s2":
            time.sleep(0.5)  # what it read before is handed over meanwhile, the last of it perhaps not
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(paths, fields)


def test_a_killed_decoder_is_told_in_words_and_what_was_decoded_is_kept(data: Path, tmp_path: Path) -> None:
    manifest = Manifest.discover(data, Deadly())
    with pytest.raises(MeristemError, match="process that decodes files was killed"):
        Cache.build(manifest, Deadly(), tmp_path, workers=1)
    assert Cache.build(manifest, Npy(), tmp_path, workers=0).reused in (1, 2)


@pytest.mark.parametrize("large", [1 << 22, 0], ids=["packed", "chunked"])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_read_comes_back(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int,
                                  workers: int) -> None:
    monkeypatch.setattr(module, "LARGE", large)
    seen: list[tuple[int, int]] = []
    manifest = Manifest.discover(data, Npy())
    cache = Cache.build(manifest, Npy(), tmp_path, lambda done, n: seen.append((done, n)), workers)
    assert len(cache) == 5 and cache.rows == tuple(range(5)) and not cache.quarantine and 5 not in cache
    assert seen[-1] == (5, 5)
    for row in manifest.rows:
        sample = Npy().read(row.paths, row.fields)
        stored = cache.array(row.index)
        assert stored.dtype == np.int16 and np.array_equal(stored, sample.array)
        assert cache.header(row.index) == Header(**{**vars(sample.header)})
        if row.fields:
            mask = cache.field(row.index, "mask")
            assert mask.dtype == np.uint8 and np.array_equal(mask, sample.fields["mask"])
            assert cache.counts(row.index) == {v: int((mask == v).sum()) for v in np.unique(mask)}
            assert cache.volume(row.index) == pytest.approx((mask > 0).sum() * np.prod(SPACING))
        else:
            assert cache.fields(row.index) == () and cache.counts(row.index) == {}


@pytest.fixture(scope="module")
def both(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, Cache]:
    caches = []
    for large in (1 << 22, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MERISTEM_KEY", "of the tests")
            patch.setattr(module, "LARGE", large)
            caches.append(build(data, tmp_path_factory.mktemp("cache")))
    return caches[0], caches[1]


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3), st.tuples(*[st.integers(-25, 25)] * 3), st.tuples(*[st.integers(1, 24)] * 3))
def test_a_window_equals_a_padded_array_element_by_element(both: tuple[Cache, Cache], row: int, start: tuple[int, ...],
                                                           size: tuple[int, ...]) -> None:
    whole, mask = both[0].array(row), both[0].field(row, "mask")
    expected = np.full((1, *size), 2, np.int16)  # pad 0 = 2 · 0.5 − 1
    expected_mask = np.zeros(size, np.uint8)
    for place in np.ndindex(*size):
        at = tuple(a + p for a, p in zip(start, place, strict=True))
        if all(0 <= a < n for a, n in zip(at, mask.shape, strict=True)):
            expected[(0, *place)], expected_mask[place] = whole[(0, *at)], mask[at]
    for cache in both:
        draw = Draw(start, size, size)
        (window,), field = cache.windows(row, [draw]), cache.field_window(row, "mask", draw)
        assert window.dtype == np.int16 and np.array_equal(window, expected)
        assert field.dtype == np.uint8 and np.array_equal(field, expected_mask)
        window[:] = 0  # a copy: nothing writes into the cache
        assert np.array_equal(cache.array(row), whole)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3), st.lists(st.integers(-1, 3), min_size=1, max_size=6), st.integers(-3, 3))
def test_an_index_shows_its_places_in_order_and_padding_where_it_names_none(both: tuple[Cache, Cache], row: int,
                                                                            index: list[int], start: int) -> None:
    if max(index) < 0:
        return
    size = (len(index), 3, 3)
    for cache in both:
        (window,) = cache.windows(row, [Draw((0, start, 0), size, size, index=tuple(index))])
        mask = cache.field_window(row, "mask", Draw((0, start, 0), size, size, index=tuple(index)))
        for i, place in enumerate(index):
            plane = Draw((place, start, 0), (1, 3, 3), (1, 3, 3))
            assert np.array_equal(window[:, i:i + 1], cache.windows(row, [plane])[0])
            assert np.array_equal(mask[i:i + 1], cache.field_window(row, "mask", plane))


class InFiles(Npy):
    """Leaves arrays where they are."""

    name = "in-files"

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        sample = super().read(paths, fields)
        return Sample(None, sample.header, sample.fields)

    def fetch(self, paths: Sequence[Path], header: Header, draws: Sequence[Draw]) -> list[np.ndarray]:
        self.reads.append(f"{paths[0].stem} {len(draws)}")
        whole = np.load(paths[0])[None]
        return [whole[(slice(None), *(slice(a, a + n) for a, n in zip(d.start, d.size, strict=True)))] for d in draws]


def test_a_sample_that_stays_in_its_files_is_read_there_once_for_all_looks(data: Path, tmp_path: Path) -> None:
    manifest = Manifest.discover(data, InFiles())
    stored = Cache.build(Manifest.discover(data, Npy()), Npy(), tmp_path)
    for cache in (Cache.build(manifest, InFiles(), tmp_path), Cache.build(manifest, InFiles(), tmp_path)):
        assert cache.rows == stored.rows and cache.header(0) == stored.header(0)
        assert cache.nbytes == stored.nbytes - sum(stored.entries[i].array.nbytes for i in stored.rows)
        assert np.array_equal(cache.array(0), stored.array(0))
        assert np.array_equal(cache.field(0, "mask"), stored.field(0, "mask"))
        InFiles.reads.clear()
        pair = pickle.loads(pickle.dumps(cache)).windows(0, [CORNER, CORNER])
        assert np.array_equal(pair[1], stored.windows(0, [CORNER])[0]) and InFiles.reads[0].endswith(" 2")
    assert cache.reused == len(cache)


def test_pad_is_the_nearest_stored_value_of_each_channel() -> None:
    header = Header((3, 4, 4), ((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)), (1.0, 1.0), (0.1, 0.5, 1.0), (0.0, 1.0, 0.0),
                    (0.26, -2.2, 999.0))
    assert raw_pad(header, "uint8").tolist() == [3, 0, 255] and raw_pad(header, "int16").tolist() == [3, -6, 999]


def test_channels_are_padded_each_with_its_own(tmp_path: Path) -> None:
    for c in range(2):
        np.save(tmp_path / f"c{c}.npy", ramp((4, 5, 6), 10 * c))
    (tmp_path / "t.csv").write_text("path_0,path_1\nc0.npy,c1.npy\n")
    window = build(tmp_path / "t.csv", tmp_path / "cache").windows(0, [Draw((-1, 0, 0), (2, 1, 1), (2, 1, 1))])[0]
    assert window[:, 0, 0, 0].tolist() == [2, 4] and window[:, 1, 0, 0].tolist() == [0, 10]


def test_a_second_build_reads_nothing(data: Path, tmp_path: Path) -> None:
    first = build(data, tmp_path)
    assert sorted(Npy.reads) == [f"s{i}" for i in range(5)] and first.reused == 0
    again = build(data, tmp_path)
    assert len(Npy.reads) == 5 and again.reused == 5 and again.entries == first.entries


def test_a_changed_file_is_read_again_and_only_it(tmp_path: Path) -> None:
    data = write(tmp_path)
    build(data, tmp_path / "cache")
    Npy.reads.clear()
    np.save(data / "images/s2.npy", ramp(SHAPES[2], 50))
    np.save(data / "labels/s3.npy", np.ones(SHAPES[3], np.uint8))
    cache = build(data, tmp_path / "cache")
    assert sorted(Npy.reads) == ["s2", "s3"]
    assert np.array_equal(cache.array(2)[0], ramp(SHAPES[2], 50)) and cache.counts(3) == {1: 8000}


def test_other_options_and_readers_never_mix(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = build(data, tmp_path), build(data, tmp_path, scale=0.25)
    assert len(Npy.reads) == 10 and a.directory != b.directory
    assert a.header(0).scale == (0.5,) and b.header(0).scale == (0.25,)
    monkeypatch.setattr(Npy, "version", 2, raising=False)
    assert build(data, tmp_path).directory not in (a.directory, b.directory) and len(Npy.reads) == 15


class Stopped(Npy):
    """Killed at its fourth file."""

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        if len(self.reads) == 3:
            raise KeyboardInterrupt
        return super().read(paths, fields)


@pytest.mark.parametrize("large", [1 << 22, 0], ids=["packed", "chunked"])
def test_an_interrupted_build_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    monkeypatch.setattr(module, "LARGE", large)
    with pytest.raises(KeyboardInterrupt):
        Cache.build(Manifest.discover(data, Stopped()), Stopped(), tmp_path)
    home, = tmp_path.iterdir()
    (home / ".half-written").write_bytes(b"x")
    Npy.reads.clear()
    cache = build(data, tmp_path)
    assert sorted(Npy.reads) == ["s3", "s4"] and cache.reused == 3
    assert not (home / ".half-written").exists()
    for i, shape in enumerate(SHAPES):
        assert np.array_equal(cache.array(i)[0], ramp(shape, i))


def test_an_index_without_its_data_is_not_believed(data: Path, tmp_path: Path) -> None:
    cache = build(data, tmp_path)
    packed, = cache.directory.glob("*.bin")
    packed.write_bytes(packed.read_bytes()[:3000])
    again = build(data, tmp_path)
    assert 0 < again.reused < 5
    assert all(np.array_equal(again.array(i)[0], ramp(s, i)) for i, s in enumerate(SHAPES))


def test_the_rest_goes_on_without_what_cannot_be_read(tmp_path: Path) -> None:
    data = write(tmp_path)
    np.save(data / "images/CANARY_nan.npy", np.full((4, 4, 4), np.nan))
    (data / "images/CANARY_cut.npy").write_bytes((data / "images/s0.npy").read_bytes()[:200])
    (data / "images/s9_copy.npy").write_bytes((data / "images/s1.npy").read_bytes())
    np.save(data / "images/CANARY_shape.npy", ramp((5, 5, 5), 3))
    np.save(data / "labels/CANARY_shape.npy", np.zeros((5, 5, 4), np.uint8))
    np.save(data / "labels/CANARY_alone.npy", np.zeros((5, 5, 4), np.uint8))
    np.save(data / "images/CANARY_big.npy", ramp((5, 5, 6), 3))
    np.save(data / "labels/CANARY_big.npy", np.full((5, 5, 6), 70000))
    manifest = Manifest.discover(data, Npy())
    cache = Cache.build(manifest, Npy(), tmp_path / "cache")
    assert len(cache) == 5 and [manifest.rows[i].local for i in cache.rows] == [f"images/s{i}.npy" for i in range(5)]
    reasons = {p.local.removesuffix(".npy").split("_")[-1]: p.reason for p in cache.quarantine}
    assert reasons == {"nan": "nan", "cut": "unreadable", "copy": "duplicate", "shape": "shape", "alone": "label",
                       "big": "label"}
    with cache.write_quarantine(tmp_path / "q.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6 and set(lines[0]) == {"case", "reason", "message"}
    assert all(line["case"].startswith("case-") for line in lines)
    for file in [tmp_path / "q.csv", *(tmp_path / "cache").rglob("*")]:
        assert "CANARY" not in file.name and str(tmp_path) not in file.name
        if file.is_file():
            content = file.read_bytes()
            assert b"CANARY" not in content and str(tmp_path).encode() not in content

    report = check(data, Npy())
    assert not report.ok and report.usable == 5 and report.refused == {"label": 2, "duplicate": 1, "nan": 1, "shape": 1,
                                                                       "unreadable": 1}
    first = next(r.case for r in manifest.rows if r.local == "images/s1.npy")
    assert first in next(f.what for f in report.findings if f.reason == "duplicate")
    assert "CANARY" not in str(report.dump()) and any("CANARY" in name for name in report.local.values())


def test_training_loses_its_copy_not_test(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "x.npy", ramp((4, 4, 4)))
        np.save(tmp_path / split / f"{split}.npy", ramp((4, 4, 4), len(split)))
    np.save(tmp_path / "val" / "val.npy", ramp((4, 4, 4), 77))
    manifest = Manifest.discover(tmp_path, Npy())
    cache = Cache.build(manifest, Npy(), tmp_path / ".cache")
    assert {manifest.rows[i].local for i in cache.rows} == {"test/x.npy", "test/test.npy", "val/val.npy", "train/train.npy"}


def test_elements_of_an_archive_are_told_apart(tmp_path: Path) -> None:
    class Archive(Npy):
        def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
            name, _, element = str(paths[0]).partition("#")
            key, _, index = element.partition("/")
            np.save(tmp_path / "one.npy", np.load(name)[key][int(index)])
            return super().read([tmp_path / "one.npy"])

    images = np.stack([ramp((4, 4, 4), i) for i in (0, 1, 0)])
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.array([[0], [1], [0]]))
    cache = Cache.build(Manifest.discover(tmp_path / "x.npz", Archive()), Archive(), tmp_path / "cache")
    assert cache.rows == (0, 1) and cache.array(1)[0, 0, 0, 0] == 1 and cache.quarantine[0].reason == "duplicate"


def test_nothing_usable(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((3, 3, 3), np.nan))
    with pytest.raises(DataError, match="none of 1 samples"):
        build(tmp_path, tmp_path / "cache")


def test_a_full_disk_is_an_error_that_keeps_what_is_stored(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 0)
    left = [1 << 40] * 4
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, free=left.pop() if left else 0))
        with pytest.raises(MeristemError, match="fill the disk"):
            build(data, tmp_path)
    assert build(data, tmp_path).reused >= 1


def _writing(data: Path, home: Path, large: int, workers: int, out: Any) -> None:
    module.LARGE = large
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))  # no file of more than a line: the disk is full
    try:
        Cache.build(Manifest.discover(data, Npy()), Npy(), home, workers=workers)
        out.put("built")
    except MeristemError as error:
        out.put(error.what)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("large", [1 << 22, 0], ids=["packed", "chunked"])
def test_a_disk_that_takes_no_more_is_told_in_words(data: Path, tmp_path: Path, large: int, workers: int) -> None:
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    process = context.Process(target=_writing, args=(data, tmp_path, large, workers, out))
    process.start()
    process.join(60)
    assert out.get().startswith("the cache cannot be written: ")
    assert len(build(data, tmp_path)) == 5


def _sum(cache: Cache, out: Any) -> None:
    out.put([int(cache.windows(i, [CORNER])[0].sum()) for i in cache.rows])


@pytest.mark.parametrize("kind", [0, 1], ids=["packed", "chunked"])
def test_a_cache_can_be_forked_and_sent(both: tuple[Cache, Cache], kind: int) -> None:
    cache = both[kind]
    expected = [int(cache.windows(i, [CORNER])[0].sum()) for i in cache.rows]  # handles are open now
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    process = context.Process(target=_sum, args=(cache, out))
    process.start()
    assert out.get() == expected
    process.join()
    sent = pickle.loads(pickle.dumps(cache))
    assert not sent._handles and [int(sent.windows(i, [CORNER])[0].sum()) for i in sent.rows] == expected


def test_check_sums_up(data: Path, tmp_path: Path) -> None:
    report = check(data, Npy())
    assert report.ok and report.samples == report.usable == report.subjects == 5 and report.labelled == 4
    measures = {m.name: m for m in report.measures}
    assert measures["shape x"].quantiles == pytest.approx(np.quantile([s[0] for s in SHAPES], (0, .05, .5, .95, 1)))
    assert sum(measures["shape x"].counts) == 5
    assert measures["spacing y"].quantiles == (2.0,) * 5 and measures["spacing y"].counts == (5,)
    masks = np.concatenate([np.load(data / f"labels/s{i}.npy").ravel() for i in range(4)])
    assert {v.value: v.share for v in report.labels} == pytest.approx({v: (masks == v).mean() for v in range(3)})
    assert report.dump()["layout"] == "images and masks in sibling folders"


def test_check_points_at_what_stands_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "labels").mkdir()
    (tmp_path / "images").mkdir()
    for i in range(12):
        x = rng.normal(100, 10, (6, 6, 20 if i < 11 else 200))
        np.save(tmp_path / f"images/{i}.npy", (x * (50 if i == 3 else 1)).astype(np.int16))
        np.save(tmp_path / f"labels/{i}.npy", np.full(x.shape, int(i != 5), np.uint8))
    report = check(tmp_path, Npy())
    pointed = {f.reason: {report.local[c.case] for c in f.cases} for f in report.of("doubt")}
    assert report.ok and pointed["unusual"] == {"images/3.npy", "images/11.npy"} and pointed["empty mask"] == {"images/5.npy"}
