"""Random numbers from a counter: pure in (seed, sample, purpose), the same on every device, rank and worker.

A sample's draws depend on nothing but its own key, so a batch can be split, resumed or re-ordered without changing them.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MULT1, _MULT2, _GOLDEN = (c - (1 << 64) if c >= 1 << 63 else c for c in
                           (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15))

Words = Any
"""int64 numbers that wrap, a tensor or an array: a processor's are numpy's, which begins an operation sooner than torch does,
and a sample draws few."""


def _words(x: Tensor) -> Words:
    return x.numpy() if x.is_cpu else x


def _tensor(x: Words) -> Tensor:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def _shift(x: Words, bits: int) -> Words:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: int64 shifts are arithmetic


def _mix(x: Words) -> Words:
    """The splitmix64 finaliser (Steele et al. 2014) on int64, wrapping."""
    x = (x ^ _shift(x, 30)) * _MULT1
    x = (x ^ _shift(x, 27)) * _MULT2
    return x ^ _shift(x, 31)


def _salted(x: Words, purpose: str) -> Words:
    return _mix(_mix(x) + zlib.crc32(purpose.encode()))


class Rng:
    """One stream of random numbers for each sample of a batch.

    key: (B,) int64. Draws have shape (B, *shape), float32 or int64, on the key's device. Each draw call must use its own
    `purpose`: two calls with one purpose give the same numbers.
    """

    def __init__(self, key: Tensor) -> None:
        self.key = key

    @classmethod
    def of(cls, seed: int, sample: Tensor | int, purpose: str = "") -> Rng:
        """seed: the run's; sample: (B,) int64 or one integer, the sample's place in the run's stream."""
        sample = torch.as_tensor(sample, dtype=torch.int64).reshape(-1)
        return cls(_tensor(_salted(_words(sample) * _GOLDEN + seed, purpose)))

    def fork(self, purpose: str) -> Rng:
        return Rng(_tensor(_salted(_words(self.key), purpose)))

    def bits(self, purpose: str, *shape: int) -> Tensor:
        return _tensor(self._bits(purpose, math.prod(shape))).reshape(-1, *shape)

    def _bits(self, purpose: str, n: int) -> Words:
        """(B, n)."""
        key = _salted(_words(self.key), purpose)
        count = np.arange(1, n + 1) if isinstance(key, np.ndarray) else torch.arange(1, n + 1, device=key.device)
        return _mix(key[:, None] + count * _GOLDEN)

    def uniform(self, purpose: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high), 24 bits of resolution."""
        u = _tensor(_shift(self._bits(purpose, math.prod(shape)), 40)).reshape(-1, *shape).float() * 2.0**-24
        return u if (low, high) == (0, 1) else low + (high - low) * u

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal by Box and Muller."""
        u = self.uniform(purpose + "/radius", *shape).clamp_min(2.0**-25)
        v = self.uniform(purpose + "/angle", *shape)
        return (-2 * u.log()).sqrt() * (2 * math.pi * v).cos()

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high)."""
        return (self.uniform(purpose, *shape).double() * high).long().clamp_max(high - 1)

    def permutation(self, purpose: str, n: int) -> Tensor:
        """(B, n): a random order of n things for each sample."""
        return self.bits(purpose, n).argsort(dim=1)
