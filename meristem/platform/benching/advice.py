"""What to change, from what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from meristem.platform.benching.results import GAIN, WAIT, Feed, Size, Variant

NEAR = 0.02  # relative difference of losses up to which two precisions learn alike
TINY = 1e-12


def fewest(feeds: Sequence[Feed]) -> Feed:
    """The fewest workers that keep the wait under WAIT, else the fastest; fewer where these gain less than GAIN."""
    enough = [f for f in feeds if f.waiting < WAIT]
    chosen = min(enough, key=lambda f: f.workers) if enough else min(feeds, key=lambda f: f.seconds)
    return min((f for f in feeds if f.seconds <= chosen.seconds * (1 + GAIN)), key=lambda f: f.workers)


def part(sizes: Sequence[Size], batch: int) -> Size | None:
    """The micro-batch to work a batch in: the largest that fits and divides it, but for smaller ones that are faster by more
    than GAIN. None where none was measured.
    """
    fits = sorted((s for s in sizes if s.seconds and s.samples <= batch and batch % s.samples == 0), key=lambda s: -s.samples)
    if not fits:
        return None
    best = max(s.rate for s in fits)
    return next(s for s in fits if s.rate >= best / (1 + GAIN))


def plateau(sizes: Sequence[Size]) -> Size | None:
    """Where samples a second stop growing: the smallest batch within GAIN of the fastest."""
    measured = [s for s in sizes if s.seconds]
    best = max((s.rate for s in measured), default=0.0)
    return min((s for s in measured if s.rate >= best / (1 + GAIN)), key=lambda s: s.samples, default=None)


def fastest(variants: Sequence[Variant], now: str) -> Variant:
    """The fastest whose loss is that of what the recipe has now, if it gains more than GAIN; else that."""
    current = next(v for v in variants if v.name == now)
    alike = [v for v in variants if v.seconds and not differs(v, current)]
    best = min(alike, key=lambda v: v.seconds, default=current)
    return best if best.seconds * (1 + GAIN) < current.seconds else current


def differs(variant: Variant, current: Variant) -> bool:
    """Whether two precisions learn visibly differently from the same batches; a loss that is not finite does."""
    return not abs(variant.loss - current.loss) <= NEAR * max(abs(current.loss), TINY)
