"""Inside a measured program: when optimiser steps ended, and what the program had used by then. Standard library and torch.

`watch()` before the program starts notes marks in the file that the environment names (`programs.run` sets it). It works for
any program whose optimiser is torch's: ours and every peer's. Where the environment names a file for it, the steps between the
last two marks run under torch's profiler, which notes shapes where that is asked for (`profiles.py`). Where it names a folder
that holds `images.npy`, a program that set `embedding` leaves there what its encoder makes of them at each mark
(`accuracy.py`). Linux.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE, STEPS, PROFILE, SHAPES = "BENCHMARK_MARKS", "BENCHMARK_STEPS", "BENCHMARK_PROFILE", "BENCHMARK_SHAPES"
FEATURES, SEED = "BENCHMARK_FEATURES", "BENCHMARK_SEED"
TICK = os.sysconf("SC_CLK_TCK")


embedding: tuple[Any, Callable[[Any], Any]] | None = None  # a module, and what makes vectors (n, D) of images (n, 3, H, W)


def descendants(pid: int) -> list[int]:
    """The process and all that it started and that live."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:  # it ended just now
                continue
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, of its living descendants, and of those that were waited for."""
    total = 0
    for one in descendants(pid):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))
    return total / TICK


def watch() -> None:
    """Note the end of the optimiser steps that the environment lists."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    if SEED in os.environ:
        import random

        import numpy as np
        import torch

        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(int(os.environ[SEED]))
    wanted, path = [int(n) for n in os.environ[STEPS].split(",")], Path(os.environ[FILE])
    done = 0
    profiler: Any = None

    def note(*_: Any) -> None:
        nonlocal done, profiler
        done += 1
        if done == wanted[-1] and profiler is not None:
            profiler.stop()
        if done in wanted:
            with path.open("a") as file:
                file.write(json.dumps({"step": done, "at": time.time(), "cpu": cpu_seconds(os.getpid()),
                                       "own": time.process_time()}) + "\n")
            if FEATURES in os.environ and embedding is not None:
                embed(Path(os.environ[FEATURES]), done)
        if PROFILE in os.environ and done == wanted[-2]:
            import torch

            profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                              record_shapes=SHAPES in os.environ)
            profiler.start()
        elif profiler is not None and done == wanted[-1]:
            Path(os.environ[PROFILE]).write_text(json.dumps(
                [{"operator": e.key, "shapes": e.input_shapes, "count": e.count, "seconds": e.self_cpu_time_total / 1e6}
                 for e in profiler.key_averages(group_by_input_shape=SHAPES in os.environ)]))
            profiler = None

    register_optimizer_step_post_hook(note)


def embed(folder: Path, step: int) -> None:
    """Write the vectors of the folder's images in its file of this step."""
    import numpy as np

    assert embedding is not None
    module, made = embedding
    was = module.training
    module.eval()
    found = vectors(made, np.load(folder / "images.npy"))
    module.train(was)
    np.save(folder / f"{step}.npy", found)


def vectors(made: Callable[[Any], Any], images: Any) -> Any:
    """What `made` makes of images (n, H, W, 3) of 8 bits, scaled as `peers/work.py` says: an array (n, D)."""
    import torch
    from peers import work

    mean, std = torch.tensor(work.MEAN), torch.tensor(work.STD)
    with torch.no_grad():
        parts = torch.from_numpy(images).split(256)
        return torch.cat([made(((some / 255 - mean) / std).permute(0, 3, 1, 2)) for some in parts]).numpy()
