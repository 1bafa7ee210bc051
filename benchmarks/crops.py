"""Random crops of stored volumes: the cache's chunks beside other formats, and our loader beside MONAI's. Lines of `compare`.

    python benchmarks/crops.py [--repeats 5] [--crops 64]

formats: the same int16 volumes as the cache keeps them (blosc2, LZ4, chunks of 64³ in blocks of 32³), as one raw array mapped
into memory, and as zarr 3 in chunks of 64³ by Blosc's LZ4; zarr is installed in a folder of its own. A crop is opened, read and
closed, at random places: milliseconds with the files in the page cache, KiB that it brings from the disk when they are not,
read-ahead included; and the bytes that are stored per voxel.
loaders: processor milliseconds per 32³ crop, batches of 8 in this process, beside PersistentDataset and CacheDataset with the
transforms of loops/monai_mae.py; and the bytes held per voxel, on disk or in memory.

Made volumes of 256×256×160 int16, as benchmarks/cache.py has them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import blosc2
import cache
import numpy as np
import torch
from compare import cannot, compare
from images import HOME
from loops import monai_mae
from monai.data import DataLoader

from meristem.platform import recipe as recipes
from meristem.platform.data.loader import loader
from meristem.platform.data.source import Data, open_data

VOLUMES, SIZES, BATCH = 4, (32, 64, 96), 8
ZARR = "3.1.6"
Crop = Callable[[int, list[slice]], np.ndarray]


def size_on_disk(place: Path) -> int:
    return sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) if place.is_dir() else place.stat().st_size


def forget(place: Path) -> None:
    """Out of the page cache."""
    for file in place.rglob("*") if place.is_dir() else [place]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def from_disk() -> int:
    """Bytes that this process has had read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def installed(name: str, version: str) -> Any:
    """A package that is no dependency of ours, from a folder of its own behind ours. Raises CalledProcessError."""
    place = HOME / f"{name}-{version}"
    if not (place / "ready").exists():
        subprocess.run([sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable, "--target", place,
                        f"{name}=={version}"], check=True)
        (place / "ready").touch()
    sys.path.append(str(place))
    return importlib.import_module(name)


def formats(data: Data, home: Path, crops: int, repeats: int) -> None:
    rows = data.rows()
    arrays = [data.cache.array(row.index)[0] for row in rows]
    ways: dict[str, tuple[list[Path], Crop]] = {}

    def chunked(i: int, at: list[slice]) -> np.ndarray:
        store: Any = blosc2.open(str(ways["blosc2"][0][i]), mode="r", dparams={"nthreads": 1})
        return store[(slice(None), *at)][0]  # type: ignore[no-any-return]

    chunks = [home / f"{i}.b2nd" for i in range(len(rows))]  # copies: the cache's own files stay mapped into this process
    for path, row in zip(chunks, rows, strict=True):
        shutil.copyfile(data.cache.directory / data.cache.entries[row.index].array.file, path)
    ways["blosc2"] = chunks, chunked
    raw = [home / f"{i}.npy" for i in range(len(rows))]
    for path, array in zip(raw, arrays, strict=True):
        np.save(path, array)
    ways["raw memory map"] = raw, lambda i, at: np.array(np.load(raw[i], mmap_mode="r")[tuple(at)])
    try:
        zarr = installed("zarr", ZARR)
    except subprocess.CalledProcessError:
        cannot("crops", f"zarr {ZARR}", "it could not be installed")
    else:
        folders = [home / f"{i}.zarr" for i in range(len(rows))]
        for path, array in zip(folders, arrays, strict=True):
            lz4 = zarr.codecs.BloscCodec(cname="lz4", clevel=5)
            zarr.create_array(str(path), data=array, chunks=(64, 64, 64), compressors=lz4)
        ways[f"zarr {ZARR}"] = folders, lambda i, at: np.asarray(zarr.open_array(folders[i], mode="r")[tuple(at)])

    rng = np.random.default_rng(0)
    for size in SIZES:
        places = []
        for _ in range(crops):
            start = rng.integers(0, np.array(cache.SHAPE) - size + 1)
            places.append((int(rng.integers(len(rows))), [slice(int(a), int(a) + size) for a in start]))
        for i, at in places[:4]:
            for name, (_, crop) in ways.items():
                assert np.array_equal(crop(i, at), arrays[i][tuple(at)]), f"{name} gives other voxels"
        ms: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, (_, crop) in ways.items():
                began = time.perf_counter()
                for i, at in places:
                    crop(i, at)
                ms[name].append((time.perf_counter() - began) * 1e3 / crops)
        cold = {}
        for name, (files, crop) in ways.items():
            total = 0
            for i, at in places[:8]:
                forget(files[i])
                before = from_disk()
                crop(i, at)
                total += from_disk() - before
            cold[name] = total / len(places[:8]) / 1024
        for name in ways:
            if name != "blosc2":
                compare(f"a {size}³ crop, opened and read", name, "ms", ms["blosc2"], ms[name])
                compare(f"a {size}³ crop, from the disk", name, "KiB", [cold["blosc2"]], [cold[name]])
    stored = {name: sum(map(size_on_disk, files)) / sum(a.size for a in arrays) for name, (files, _) in ways.items()}
    for name in ways:
        if name != "blosc2":
            compare("stored", name, "bytes / voxel", [stored["blosc2"]], [stored[name]])


def forever(of: Any) -> Iterator[Any]:
    while True:
        yield from of


def loaders(folder: Path, data: Data, recipe: Any, home: Path, crops: int, repeats: int) -> None:
    batches = max(crops // BATCH, 1)
    monai = f"MONAI {version('monai')}"
    voxels = VOLUMES * int(np.prod(cache.SHAPE))
    for kind, name in (("persistent", "PersistentDataset"), ("cache", "CacheDataset")):
        theirs = forever(DataLoader(monai_mae.data(kind, folder, home, 32), batch_size=VOLUMES, shuffle=True, num_workers=0))
        for _ in range(3):
            next(theirs)  # its cache is made
        ours = iter(loader(data.cache, data.rows(), recipe, steps=(repeats + 1) * batches + 1, workers=0))
        assert next(ours).views["x"].array.shape[1:] == next(theirs)["image"].shape[1:], "crops differ"
        ms: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(repeats):
            for who, stream, count in (("ours", ours, batches), ("theirs", theirs, batches * BATCH // VOLUMES)):
                began = time.process_time()
                for _ in islice(stream, count):
                    pass
                ms[who].append((time.process_time() - began) * 1e3 / (batches * BATCH))
        held = [size / voxels for size in (size_on_disk(data.cache.directory),
                                           size_on_disk(home) if kind == "persistent" else 4 * voxels)]
        compare("a 32³ crop, drawn, read and batched", f"{monai}, {name}", "CPU ms", ms["ours"], ms["theirs"])
        compare("held for such crops", f"{monai}, {name}", "bytes / voxel", held[:1], held[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--crops", type=int, default=64, help="of each repeat")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for name in ("volumes", "raw", "monai"):
            (home / name).mkdir()
        cache.volumes(home / "volumes", VOLUMES)
        recipe = recipes.load("volume/mae", [f"train.batch={BATCH}"])
        data = open_data(home / "volumes", recipe.modality, "1,0,0", home / "cache", True)
        formats(data, home / "raw", given.crops, given.repeats)
        loaders(home / "volumes", data, recipe, home / "monai", given.crops, given.repeats)


if __name__ == "__main__":
    main()
