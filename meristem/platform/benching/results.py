"""What a measurement came to, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from meristem.platform.benching.growth import Exponent

WAIT = 0.05  # share of the time that a device may wait for data before training counts as bound by it
GAIN = 0.05  # a difference of speed that is less than this is not worth a change


@dataclass(frozen=True)
class Feed:
    """A number of loader processes, with the loader alone and with both together.

    alone: seconds a batch takes the loader when nobody trains. step: seconds of a step beside it, without the wait. wait:
    seconds of a step that it waited.
    """

    workers: int
    alone: float
    step: float
    wait: float

    @property
    def seconds(self) -> float:
        """Of a step in the long run. What is loaded ahead while the first steps start hides a loader that is too slow from a
        short measurement, so that no step can be faster than the loader alone.
        """
        return max(self.step + self.wait, self.alone)

    @property
    def waiting(self) -> float:
        """Share of the time that the device waits."""
        return 1 - self.step / self.seconds


@dataclass(frozen=True)
class Variant:
    """A precision, or compiled or not: seconds of the least disturbed step alone, of the first one, and the mean loss of the
    same batches.

    mfu: share of the rate at which this device multiplies matrices in that precision. note: why there is no figure.
    """

    name: str
    seconds: float = 0.0
    first: float = 0.0
    loss: float = 0.0
    rate: float = 0.0
    mfu: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Size:
    """A micro-batch: seconds of its least disturbed step alone, bytes that its tensors take at most. note: why there is no
    figure.
    """

    samples: int
    seconds: float = 0.0
    bytes: int = 0
    mfu: float = 0.0
    note: str = ""

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Advice:
    """overrides: that keep what is learnt. larger: others, for a batch that learns in fewer and larger steps, and only if it is
    faster. words: cautions. before, after, larger_hours: of the recipe's steps, as it is and with either.
    """

    overrides: tuple[str, ...]
    before: float
    after: float
    larger: tuple[str, ...] = ()
    larger_hours: float = 0.0
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Training:
    """A recipe on a machine and data.

    samples: of an optimiser step. feed: as the recipe is. feeds: by number of workers. phases: mean seconds of the parts of a
    step (`clock.Timing`). alone: seconds of the least disturbed step whose batch is held in memory. first: seconds from nothing
    to the end of the first step. cpu: processor seconds per 1,000 samples. host, workers, gpu: bytes held at most by this
    process, by its loaders of their own, by tensors on the GPU. flops: of one optimiser step. peak: floating-point operations
    per second of a large matrix product in the recipe's precision, measured in the same run. steps: of the recipe.
    """

    samples: int
    steps: int
    feed: Feed
    feeds: tuple[Feed, ...]
    phases: Mapping[str, float]
    alone: float
    first: float
    cpu: float
    host: int
    workers: int
    gpu: int | None
    flops: float
    peak: float
    precision: tuple[Variant, ...]
    compile: tuple[Variant, ...]
    sizes: tuple[Size, ...]
    advice: Advice

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.feed.seconds

    @property
    def bound(self) -> bool:
        """By data."""
        return self.feed.waiting >= WAIT

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation of the step alone."""
        return self.flops / self.alone / self.peak

    @property
    def verdict(self) -> str:
        if self.bound:
            gain = self.feed.seconds / self.feed.step
            return (f"data-bound: the device waits {self.feed.waiting:.0%} of the time; without waiting, training would be "
                    f"{gain:.1f} times as fast")
        room = self.feed.step / self.feed.alone
        return (f"compute-bound: the device waits {self.feed.waiting:.0%} of the time; the loader could feed a step "
                f"{room:.1f} times as fast")


@dataclass(frozen=True)
class Point:
    """A size that was tried. size: of the first view. tokens: of all views in a batch. seconds: of the least disturbed step.
    bytes: of its tensors, at most at one time.
    """

    size: tuple[int, ...]
    batch: int
    tokens: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Sweep:
    """What grew. ended: why there is no larger size."""

    axis: str
    points: tuple[Point, ...]
    time: Exponent | None
    memory: Exponent | None
    ended: str = ""

    @property
    def worse(self) -> tuple[str, ...]:
        """Which costs grow worse than attention's own."""
        return tuple(name for name in ("time", "memory") if (fit := getattr(self, name)) is not None and fit.worse)


@dataclass(frozen=True)
class Bench:
    """recipe: its name, modality and hash. machine: device, processors, versions. training: None where there was no data."""

    recipe: Mapping[str, str]
    machine: Mapping[str, str]
    training: Training | None = None
    sweeps: tuple[Sweep, ...] = field(default=())

    def dump(self) -> dict[str, Any]:
        """Plain data, with what follows from it."""
        plain = asdict(self)
        if self.training is not None:
            t = self.training
            plain["training"] |= {"samples_per_s": t.rate, "data_wait": t.feed.waiting, "data_bound": t.bound, "mfu": t.mfu,
                                  "verdict": t.verdict}
        for sweep, made in zip(plain["sweeps"], self.sweeps, strict=True):
            sweep["worse_than_attention"] = list(made.worse)
        return plain
