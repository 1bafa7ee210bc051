"""Clouds: making tokens, hiding them, and holding many points. Lines of `compare`, and of what is no comparison.

    python benchmarks/points.py [--batch 32] [--repeats 5] [--points 10000 100000 1000000]

groups: farthest-point sampling and nearest neighbours of a batch, against a loop over clouds, centres and points in numpy, and
against pytorch3d where it is importable; all find the same groups.
encoder: that of `points/mae` forward and backward, given its visible tokens only, against all of them embedded and encoded.
With 0.6 hidden, 0.4 is what tokens alone would give. step: the whole objective, decoder and loss too, beside the making of
tokens.
memory: MiB that a process holds at most while it cuts one cloud into serial tokens, beyond what it held before, and the bytes
per point; the view itself is held before.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from compare import compare
from timing import seconds, turns
from torch import Tensor

from meristem import pointops
from meristem.modalities.points import Points
from meristem.modalities.points.options import PointsOptions
from meristem.modalities.rng import Rng
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.objectives import Items
from meristem.platform.step import Batch

Groups = tuple[Tensor, Tensor]  # centres (B, G) and their neighbours (B, G, k)


# ---- groups

def ours(xyz: Tensor, count: int, size: int) -> Groups:
    valid = torch.ones_like(xyz[..., 0], dtype=torch.bool)
    centre, _ = pointops.farthest_point_sampling(xyz, valid, count)
    return centre, pointops.nearest(pointops.gather_points(xyz, centre), xyz, valid, size)[1]


def loop(xyz: Tensor, count: int, size: int) -> Groups:
    """As one writes it down: a cloud, a centre at a time, from the first point."""
    centres, groups = [], []
    for cloud in xyz.cpu().numpy():
        chosen, far = [0], np.full(len(cloud), np.inf)
        while len(chosen) < count:
            far = np.minimum(far, ((cloud - cloud[chosen[-1]]) ** 2).sum(1))
            chosen.append(int(far.argmax()))
        centres.append(chosen)
        groups.append([((cloud - cloud[i]) ** 2).sum(1).argsort(kind="stable")[:size] for i in chosen])
    return torch.tensor(centres), torch.from_numpy(np.array(groups))


def by_pytorch3d(xyz: Tensor, count: int, size: int) -> Groups:
    from pytorch3d import ops

    centre, index = ops.sample_farthest_points(xyz, K=count)  # from the first point of each cloud
    return index, ops.knn_points(centre, xyz, K=size).idx


def same(a: Groups, b: Groups) -> float:
    """The share of groups that hold the same points."""
    return (a[1].cpu().sort(-1).values == b[1].cpu().sort(-1).values).all(-1).float().mean().item()


def groups(batch: int, repeats: int, device: str) -> None:
    for points, count, size in ((1024, 64, 32), (2048, 128, 32), (8192, 512, 32)):
        rows = max(batch * 1024 // points, 1)
        xyz = Rng.of(0, torch.arange(rows, device=device)).normal("points", points, 3)
        valid = torch.ones_like(xyz[..., 0], dtype=torch.bool)
        first = pointops.farthest_point_sampling(xyz, valid, 1)[0][:, 0]
        turned = (torch.arange(points, device=device) + first[:, None]) % points
        xyz = pointops.gather_points(xyz, turned)  # so that all ways begin with the same point, the first
        jobs: dict[str, Callable[[], Groups]] = {
            "ours": lambda x=xyz, c=count, s=size: ours(x, c, s),
            "loop": lambda x=xyz, c=count, s=size: loop(x, c, s)}
        if pointops._pytorch3d() is not None:
            jobs["pytorch3d"] = lambda x=xyz, c=count, s=size: by_pytorch3d(x, c, s)
        found = {name: job() for name, job in jobs.items()}
        taken = dict(zip(jobs, turns(list(jobs.values()), repeats), strict=True))
        for name in jobs:
            if name != "ours":
                compare(f"{count} groups of {size} of {points} points, {rows} clouds", name, "s", taken["ours"], taken[name],
                        device=named(device), threads=torch.get_num_threads(),
                        same_groups=round(same(found["ours"], found[name]), 4))


# ---- hidden tokens

def masked(batch: int, repeats: int, device: str) -> None:
    recipe = recipes.load("points/mae")
    assembly = Assembly(recipe).to(device)
    view = replace(recipe.modality.example(recipe.views["x"].size, Rng.of(0, torch.arange(batch))), name="x")
    items = torch.arange(batch)
    given = Batch(Items(items, items), {"x": view}).to(device)
    tokenizer, encoder = assembly.tokenizer, assembly.encoder
    stream = tokenizer.stream(given.views["x"])
    plan = recipe.masking["x"].plan(stream, Rng.of(0, items.to(device)), encoder.mask_unit)
    seen = stream.seen(recipe.encoder.sees)

    def visible() -> None:
        encoder.zero_grad()
        encoder(seen, plan).tokens.square().mean().backward()

    def every() -> None:
        encoder.zero_grad()
        encoder(seen).tokens.square().mean().backward()

    def step() -> None:
        assembly.zero_grad()
        loss, = assembly(given, 0.5).values()
        (loss.total / loss.count).backward()

    jobs = (every, visible, step, lambda: tokenizer.stream(given.views["x"]))
    all_tokens, kept = turns(jobs[:2], repeats)
    whole_step, tokens = seconds(jobs[2:], repeats)
    about = {"batch": batch, "tokens": len(stream), "visible": plan.keep.shape[1], "device": named(device),
             "threads": torch.get_num_threads()}
    compare("points/mae's encoder, 60 % hidden", "all groups encoded", "s", kept, all_tokens, **about)
    print(json.dumps({"benchmark": "points step", **about, "step_ms": round(1e3 * whole_step, 1),
                      "tokenizer_ms": round(1e3 * tokens, 1), "ratio_to_tokenizer": round(whole_step / tokens, 1),
                      "clouds_per_s": round(batch / whole_step, 1)}), flush=True)


# ---- memory

def _peak() -> float:
    """Bytes held at most so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def arm(points: int, device: str) -> None:
    modality = Points(PointsOptions(tokens="serial"))
    tokenizer = modality.tokenizer()
    small = modality.example((1000,), Rng.of(0, torch.arange(1, device=device)))
    tokenizer.stream(small)
    view = replace(small, array=torch.randn(1, 3, points, device=device), fields={},
                   index=torch.arange(points, device=device)[None])
    before, began = _peak(), time.perf_counter()
    stream = tokenizer.stream(view)
    if device == "cuda":
        torch.cuda.synchronize()
    taken, held = time.perf_counter() - began, _peak() - before
    print(json.dumps({"benchmark": "points memory", "points": points, "tokens": len(stream), "device": named(device),
                      "mib": round(held / 2**20, 1), "bytes_per_point": round(held / points), "seconds": round(taken, 3)}))


def named(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--points", type=int, nargs="+", default=[10_000, 100_000, 1_000_000],
                        help="of the clouds that are held in memory")
    parser.add_argument("--arm", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.arm is not None:
        arm(options.arm, device)
        return
    torch.manual_seed(0)
    groups(options.batch, options.repeats, device)
    masked(options.batch, options.repeats, device)
    for points in options.points:  # each a process of its own, so that its peak is its own
        subprocess.run([sys.executable, __file__, "--arm", str(points)], check=True)


if __name__ == "__main__":
    main()
