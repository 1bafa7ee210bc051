"""Fingerprints: a few bytes by which a sample is known again that was saved once more, turned, brightened, trimmed or thinned.

A code is the signs (or coarse levels) of a sample's lowest frequencies, as in image retrieval (Zauner 2010, pHash). Low
frequencies survive saving, resizing and windowing; of them the signs carry most of what tells two pictures apart (Oppenheim and
Lim 1981); and a mirrored or turned sample has the same numbers in another order and with other signs, so that all its
orientations can be compared without making them. What can be made of a code again is at most a blur of a few waves, in which
nobody is to be recognised; and it stands in a sorted list, in no relation to a subject. Whoever has a sample himself can tell
by it whether the weights have met it: so he can by the content hashes beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

BLOCK = 1 << 12  # codes of either side that are compared at once: 64 MB of distances


@dataclass(frozen=True)
class Likeness:
    """How the fingerprints of a kind of data are compared.

    method: its name, changed with every change of the codes: those of two methods cannot be compared. numbers: of a code.
    within: codes with so many differing signs are of one sample, or so far apart as vectors of levels. share: so many of the
    codes of the shorter of two samples must have their like in the other; of most kinds a sample has one code.
    turns: the ways a sample may have been turned, (order, sign) of its numbers; none but as it is, if empty.
    levels: numbers are −127 to 127 in bytes, not signs in bits.
    """

    method: str
    numbers: int
    within: float
    share: float = 0.5
    turns: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    levels: bool = False

    def pack(self, numbers: np.ndarray) -> bytes:
        """The fingerprint of one sample: numbers (n, numbers), n codes; of levels those in [−1, 1]."""
        if self.levels:
            return np.rint(np.clip(numbers, -1, 1) * 127).astype(np.int8).tobytes()
        return np.packbits(numbers > 0, axis=1).tobytes()

    def unpack(self, fingerprints: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(codes (n, numbers) float32 of all samples, (samples + 1,) where each one's begin)."""
        width = self.numbers if self.levels else -(-self.numbers // 8)
        first = np.cumsum([0, *(len(f) // width for f in fingerprints)])
        raw = np.frombuffer(b"".join(fingerprints), np.uint8).reshape(-1, width)
        if self.levels:
            return raw.view(np.int8).astype(np.float32) / 127, first
        return np.unpackbits(raw, axis=1, count=self.numbers).astype(np.float32) * 2 - 1, first

    def alike(self, some: Sequence[bytes], others: Sequence[bytes]) -> np.ndarray:
        """(some, others) bool: which of two sets of samples, none without a code, are copies, turned in any way."""
        (a, first), (b, start) = self.unpack(some), self.unpack(others)
        found = np.zeros((len(some), len(others)), bool)
        limit = (self.within ** 2 if self.levels else 4 * self.within) + 1e-3  # of squared distances, which are rounded
        for order, sign in self.turns or ((np.arange(self.numbers), np.ones(1, np.float32)),):
            turned = a[:, order] * sign
            for i, j in product(_blocks(first), _blocks(start)):
                x, y = turned[first[i.start]:first[i.stop]], b[start[j.start]:start[j.stop]]
                near = (x ** 2).sum(1)[:, None] + (y ** 2).sum(1) - 2 * x @ y.T <= limit
                found[i, j] |= self._shared(near, np.diff(first[i.start:i.stop + 1]), np.diff(start[j.start:j.stop + 1]))
        return found

    def _shared(self, near: np.ndarray, some: np.ndarray, others: np.ndarray) -> np.ndarray:
        """(samples, samples) bool of near (codes, codes), of which each sample has so many, in order."""
        if near.shape == (len(some), len(others)):
            return near
        rows, columns = np.cumsum(some) - some, np.cumsum(others) - others
        of_some = np.add.reduceat(np.logical_or.reduceat(near, columns, axis=1), rows, dtype=int) / some[:, None]
        of_others = np.add.reduceat(np.logical_or.reduceat(near, rows), columns, axis=1, dtype=int) / others
        shared: np.ndarray = np.where(some[:, None] <= others, of_some, of_others) >= self.share
        return shared


def _blocks(first: np.ndarray) -> Iterator[slice]:
    """Runs of whole samples, of which each begins at its code, with up to `BLOCK` codes; or of one that has more."""
    at = 0
    while at < len(first) - 1:
        upto = max(int(np.searchsorted(first, first[at] + BLOCK, "right")) - 1, at + 1)
        yield slice(at, upto)
        at = upto


def turns(count: int, dims: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """What flips and changes of axes do to the lowest `count` cosines along `dims` axes, without the constant."""
    place = np.indices((count,) * dims).reshape(dims, -1)[:, 1:]
    number = np.arange(count ** dims).reshape((count,) * dims)
    return tuple((number.transpose(axes).ravel()[1:] - 1, (1 - 2 * (np.array(flips) @ place % 2)).astype(np.float32))
                 for axes in permutations(range(dims)) for flips in product((0, 1), repeat=dims))


def cosines(x: np.ndarray, count: int) -> np.ndarray:
    """(1, count^D − 1): the lowest terms of the cosine transform (DCT-II, Ahmed et al. 1974) of x (*S), but not the mean."""
    for axis, n in enumerate(x.shape):
        basis = np.cos(np.pi / n * np.outer(np.arange(count), np.arange(n) + 0.5)).astype(np.float32)
        x = np.moveaxis(np.tensordot(basis, x, (1, axis)), 0, axis)
    return x.reshape(1, -1)[:, 1:]


def thinned(x: np.ndarray, most: int) -> np.ndarray:
    """Every so-manieth element of x (C, *S) along each axis, about the middle, so that fewer than twice `most` are left."""
    steps = [max(n // most, 1) for n in x.shape[1:]]
    return x[(slice(None), *(slice((n - 1) % s // 2, None, s) for n, s in zip(x.shape[1:], steps, strict=True)))]


def ranks(x: np.ndarray) -> np.ndarray:
    """Of integers, the share of elements below each, minus a half, float32: the same after any rising change of values."""
    above = x - np.int64(x.min())
    counts = np.bincount(above.ravel())
    table = ((np.cumsum(counts) - counts / 2) / x.size - 0.5).astype(np.float32)
    return table[above]


def scores(x: np.ndarray) -> np.ndarray:
    """Standard scores cut at ±2, float32: the same at any brightness and contrast; 0 where nothing varies."""
    x = x.astype(np.float32)
    spread = float(x.std())
    return np.clip((x - x.mean()) / spread, -2, 2) if spread > 0 else np.zeros_like(x)
