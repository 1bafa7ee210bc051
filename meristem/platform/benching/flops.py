"""How much one step computes and takes, and how fast this device multiplies matrices at best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from meristem.platform.assembly import Assembly
from meristem.platform.benching.clock import clocked
from meristem.platform.benching.memory import Tensors
from meristem.platform.recipe import Recipe
from meristem.platform.step import Batch

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDES = (1024, 2048, 4096, 8192, 16384)  # of the squares that are multiplied, until one takes LONG seconds
LONG = 0.1


@dataclass(frozen=True)
class Work:
    """Of one optimiser step. flops: floating-point operations of matrix products, convolutions and attention, forward and
    backward, of what is computed: where an encoder sees visible tokens only, of those. A multiplication with its addition
    counts as two; of the backward pass of fused attention, what it computes again does not count (Dao et al. 2022,
    FlashAttention, algorithm 4: one of its five products). bytes: of the tensors that the step made, at most at one time.
    """

    flops: float
    bytes: int


def _product(a: Tensor, b: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Of a matrix product; of one with a sparse matrix, what the numbers that it holds take."""
    if b.layout != torch.strided:
        return 2 * b._nnz() * a.shape[0]
    return 2 * (math.prod(a.shape) if a.layout == torch.strided else a._nnz()) * b.shape[1]


_product._get_raw = True  # type: ignore[attr-defined]  # the counter hands over tensors, not their shapes


def work(recipe: Recipe, assembly: Assembly, source: Callable[[], Iterator[Batch]], *, prepared: bool = False) -> Work:
    """Counted over the second step of a loop, whose optimiser has its state already; uncompiled, since fused kernels have no
    formulas. What checkpointing computes again does not count, and what it spares in memory does.
    """
    plain = _second(recipe, assembly, source, prepared, checkpointing=False)
    if not recipe.train.checkpointing:
        return plain
    return Work(plain.flops, _second(recipe, assembly, source, prepared, checkpointing=True).bytes)


def _second(recipe: Recipe, assembly: Assembly, source: Callable[[], Iterator[Batch]], prepared: bool, checkpointing: bool
            ) -> Work:
    train = recipe.train.model_copy(update={"compile": False, "checkpointing": checkpointing})
    counter, tensors = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mm: _product}), Tensors()
    gpu = torch.cuda.is_available()
    taken = 0

    def watched() -> Iterator[Batch]:
        nonlocal taken
        stream = source()
        yield next(stream)
        before = torch.cuda.memory_allocated() if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        with counter, tensors:  # until the loop asks for a third
            try:
                yield next(stream)
            finally:
                taken = torch.cuda.max_memory_allocated() - before if gpu else tensors.most

    clocked(recipe.model_copy(update={"train": train}), assembly, watched, 1, 0, warm=1, prepared=prepared)
    flops = 0.0
    for op, count in counter.get_flop_counts()["Global"].items():
        again = "attention" in str(op) and "backward" in str(op)
        flops += count * (4 / 5 if again else 1)
    return Work(flops, taken)


def matrix_rate(precision: str) -> float:
    """Floating-point operations per second of the fastest of some square matrix products in this precision, on the device that
    trains: what it can do at best, in the state that it is in.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    best = 0.0
    for side in SIDES:
        a, b = (torch.randn(side, side, device=device).to(KINDS[precision]) for _ in range(2))
        out = a @ b  # warms up
        taken = []
        for _ in range(5):
            _settle(device)
            began = time.perf_counter()
            torch.matmul(a, b, out=out)
            _settle(device)
            taken.append(time.perf_counter() - began)
        best = max(best, 2 * side**3 / min(taken))
        if min(taken) > LONG:
            break
    return best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
