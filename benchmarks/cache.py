"""A random 64³ crop from the cache beside one cut from the decoded file: a line of `compare` per data set.

    python benchmarks/cache.py [--crops 50] [--data FOLDER_OF_DATA_SETS]

Made volumes are 256x256x160 int16 (smooth anatomy and noise), as .nii.gz; the hippocampus set joins in when it is there.
Both ways open the file, and take turns; `cold_ms` is the first crop of each file from the cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from compare import compare
from scipy.ndimage import gaussian_filter, zoom

from meristem.modalities.base import Draw, modality_class
from meristem.platform.data.cache import Cache
from meristem.platform.data.manifest import Manifest, Row

SHAPE, CROP, VOLUMES = (256, 256, 160), 64, 3


def volumes(root: Path, count: int = VOLUMES) -> Path:
    """NIfTI files whose contents compress like a scan's."""
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = gaussian_filter(rng.normal(size=[n // 8 for n in SHAPE]), 2)
        body = zoom(coarse / coarse.std(), 8, order=1)
        x = np.where(body > 0, 500 + 200 * body + rng.normal(0, 20, SHAPE), 0).astype(np.int16)
        nib.save(nib.Nifti1Image(x, np.eye(4)), root / f"images/{i}.nii.gz")
    return root


def measure(name: str, data: Path, home: Path, crops: int, crop: int) -> None:
    kind = modality_class("volume")
    modality = kind(kind.Options())
    manifest = Manifest.discover(data, modality)
    began = time.perf_counter()
    cache = Cache.build(manifest, modality, home)
    built = time.perf_counter() - began
    rng = np.random.default_rng(1)
    from_cache, from_file, cold, seen = [], [], [], set()

    def cut(row: Row, start: list[int]) -> None:
        window = tuple(slice(a, a + crop) for a in start)
        np.asanyarray(nib.load(row.paths[0]).dataobj)[window].copy()

    for _ in range(crops):
        row = manifest.rows[int(rng.choice(cache.rows))]
        start = [int(rng.integers(0, max(n - crop, 0) + 1)) for n in cache.header(row.index).shape[1:]]
        taken = []
        for job in (lambda r=row, s=start: cache.windows(r.index, [Draw(s, (crop,) * 3, (crop,) * 3)]),
                    lambda r=row, s=start: cut(r, s)):
            began = time.perf_counter()
            job()
            taken.append(1e3 * (time.perf_counter() - began))
        if row.index in seen:
            from_cache.append(taken[0])
            from_file.append(taken[1])
        else:
            cold.append(taken[0])
        seen.add(row.index)
    stored = sum(f.stat().st_size for f in cache.directory.rglob("*") if f.is_file())
    compare(f"a {crop}³ crop of {name}", "nibabel, whole file", "ms", from_cache, from_file, volumes=len(cache),
            cold_ms=round(statistics.median(cold), 3), build_s=round(built, 2), stored_mib=round(stored / 2**20, 1),
            files_mib=round(sum(r.paths[0].stat().st_size for r in manifest.rows) / 2**20, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--crops", type=int, default=50)
    default = os.environ.get("MERISTEM_DATA", Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "made").mkdir()
        measure("made 256×256×160 volumes", volumes(home / "made"), home / "cache-made", arguments.crops, CROP)
        hippocampus = Path(arguments.data) / "msd-task04-hippocampus"
        if hippocampus.is_dir():
            measure("hippocampus", hippocampus, home / "cache-real", arguments.crops, CROP)


if __name__ == "__main__":
    main()
