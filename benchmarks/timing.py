"""How long jobs take, for the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def turns(jobs: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each job in each repeat; they take turns, so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in jobs]
    for repeat in range(repeats + 1):  # the first warms up
        for job, taken in zip(jobs, times, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                taken.append(time.perf_counter() - began)
    return times


def seconds(jobs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each job, in turns."""
    return [statistics.median(taken) for taken in turns(jobs, repeats)]
