"""Processes that share a grid: each on a GPU of its own where there are several, else on its part of the cores."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from meristem.errors import MeristemError, unforeseen
from meristem.tasks.transfer import Share


def in_parallel(work: Callable[..., None], jobs: int, arguments: tuple[Any, ...], quiet: bool) -> None:
    """Call `work(share, *arguments, quiet)` in so many processes. Raises MeristemError when one of them fails; the others
    finish what they have, so that a second call has less to do.
    """
    context = multiprocessing.get_context("spawn")  # CUDA and torch's threads do not live through a fork
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    own = [devices[number % len(devices)] if devices else "" for number in range(jobs)]
    processes = [context.Process(target=_one, args=(work, Share(number, jobs), device, arguments, quiet))
                 for number, device in enumerate(own)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    failed = sum(process.exitcode != 0 for process in processes)
    if failed:
        raise MeristemError(f"{failed} of {jobs} processes did not finish their part of the grid",
                            "Their messages stand above; the same command goes on with what is left.")


def _one(work: Callable[..., None], share: Share, device: str, arguments: tuple[Any, ...], quiet: bool) -> None:
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before torch looks for one
    torch.set_num_threads(max((os.cpu_count() or 1) // share.of, 1))
    try:
        work(share, *arguments, quiet)
    except MeristemError as error:
        print(f"meristem: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        print(f"meristem: {unforeseen(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
