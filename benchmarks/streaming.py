"""Crops and steps from shards against the local cache, the same samples in the same run. Lines of `compare`.

    python benchmarks/streaming.py [--crops 200] [--steps 12] [--repeats 3] [--data FOLDER_OF_DATA_SETS]

Volumes are 12 made ones of 256×256×160 int16, and the hippocampus set where it is there. `cold`: nothing is fetched yet, so
that each shard comes from the place once; `warm`: all are in the local store. S3 is a server on this machine (moto), which
shares its cores. Crops are those of the loader alone, one process; samples a second and the wait for data are of a short MAE
run that starts with an empty store (ours) and of one from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from cache import volumes
from compare import compare

import meristem
from meristem.platform import recipe as recipes
from meristem.platform.data.loader import loader
from meristem.platform.data.source import open_data

PORT, PEER = 5123, "local cache"
RECIPE = ["train.batch=8", "train.workers=1", "train.log_every=10", "encoder.transformer.size=tiny"]
SIZE = {"made": 64.0, "hippocampus": 4.0}  # MB of a shard: the set has about ten
VIEW = {"made": 64, "hippocampus": 32}


@contextmanager
def s3() -> Iterator[str]:
    """The address of an empty bucket."""
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(PORT)], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
                   "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL"], timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        fsspec.filesystem("s3").mkdir("scans")
        yield "s3://scans"
    finally:
        server.terminate()
        server.wait()


def crops(place: str | Path, store: Path, view: int, count: int, workers: int) -> float:
    """Crops per second, opening the data not counted."""
    recipe = recipes.load("volume/mae", [*RECIPE, f"views.x.size=[{view},{view},{view}]"])
    data = open_data(place, recipe.modality, "1,0,0", store, quiet=True)
    steps = -(-count // recipe.train.batch)
    began = time.perf_counter()
    for _ in loader(data.cache, data.rows(), recipe, steps=steps, workers=workers):
        pass
    return steps * recipe.train.batch / (time.perf_counter() - began)


def measure(name: str, files: Path, bucket: str, home: Path, arguments: argparse.Namespace) -> None:
    places: dict[str, str | Path] = {"cache": files, "file": f"file://{home}/{name}/shards", "s3": f"{bucket}/{name}"}
    for url in (str(places["file"]), str(places["s3"])):
        done = meristem.shard_data(files, url, size=SIZE[name], cache=home / name / "writing", quiet=True)
    ways = [("cache", "warm"), *((place, way) for place in ("file", "s3") for way in ("cold", "warm"))]
    speed: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    crops(files, home / name / "cache", VIEW[name], 8, 0)
    for turn in range(arguments.repeats):
        for place, way in ways:
            store = home / name / ("cache" if place == "cache" else f"{place}-{turn}")
            speed[place, way].append(crops(places[place], store, VIEW[name], arguments.crops, 1))
    train: dict[str, dict[str, float]] = {}
    for place in places:
        out, store = home / name / f"run-{place}", home / name / ("cache" if place == "cache" else f"run-{place}-store")
        side = VIEW[name]
        meristem.pretrain("volume/mae", str(places[place]), out, [*RECIPE, f"views.x.size=[{side},{side},{side}]",
                                                                  f"train.steps={arguments.steps}"],
                          split="1,0,0", cache=store, quiet=True)
        train[place] = json.loads((out / "metrics.json").read_text())
    about = f"{name}, {len(done.lines)} volumes in {len(done.shards)} shards of {sum(x.size for x in done.shards) / 1e6:.1f} MB"
    for place, way in ways[1:]:
        compare(f"crops of {about}: {place}, {way}", PEER, "crops / s", speed[place, way], speed["cache", "warm"])
    for place in ("file", "s3"):
        for said, what, unit in (("samples_per_s", "MAE", "samples / s"), ("data_wait", "its wait for data", "of the time")):
            compare(f"{what}, {about}: {place}, cold", PEER, unit, [train[place][said]], [train["cache"][said]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--crops", type=int, default=200)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    default = os.environ.get("MERISTEM_DATA", Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3() as bucket:
        home = Path(folder)
        sets = {"hippocampus": Path(arguments.data) / "msd-task04-hippocampus"}
        (home / "files").mkdir()
        sets["made"] = volumes(home / "files", 12)
        for name, files in sets.items():
            if files.is_dir():
                measure(name, files, bucket, home, arguments)


if __name__ == "__main__":
    main()
