"""The figures of `bench`: where a step's time goes, what workers and batches are worth, how cost grows."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from meristem.platform.benching.growth import ATTENTION, Exponent
from meristem.platform.benching.results import WAIT, Feed, Size, Sweep, Training
from meristem.platform.report.figures import BASELINE, PRETRAINED, Plot, draw, sentence

MIB = 2**20
OURS, OTHER = PRETRAINED[0], PRETRAINED[1]


def phases(training: Training) -> Plot:
    """Where the time of a step goes."""
    shown = {name: 1000 * seconds for name, seconds in training.phases.items()}

    def paint(ax: Axes) -> None:
        names = list(shown)[::-1]
        colours = [OTHER if name == "load" else OURS for name in names]
        ax.barh(names, [shown[name] for name in names], color=colours, height=0.62)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("milliseconds of a step")

    told = ", ".join(f"{name} {ms:.1f} ms" for name, ms in shown.items())
    return draw(paint, f"Parts of a step: {told}.", "A step by its parts; load is what it waits for its batch.",
                size=(4.2, 2.5))


def workers(samples: int, feeds: tuple[Feed, ...]) -> Plot:
    """Samples a second against the number of loader processes."""
    ordered = sorted(feeds, key=lambda f: f.workers)
    at = np.arange(len(ordered))

    def paint(ax: Axes) -> None:
        ax.plot(at, [samples / f.alone for f in ordered], marker="o", markersize=4.5, linestyle="--", color=BASELINE[0],
                label="loader alone")
        ax.plot(at, [samples / f.step for f in ordered], marker="s", markersize=4, linestyle=":", color=OTHER,
                label="step, never waiting")
        ax.plot(at, [samples / f.seconds for f in ordered], marker="o", markersize=4.5, color=OURS, label="training")
        ax.set_xticks(at, [str(f.workers) for f in ordered])
        ax.set_ylim(bottom=0)
        ax.set_xlabel("workers")
        ax.set_ylabel("samples a second")
        ax.legend()

    told = "; ".join(f"{f.workers} workers: {samples / f.seconds:.4g}, waiting {f.waiting:.0%}" for f in ordered)
    return draw(paint, f"Samples a second against workers. {told}.", "Training is as fast as the slower of loader and step, "
                f"beside each other; a wait under {WAIT:.0%} counts as none.", size=(4.2, 2.9))


def batches(sizes: tuple[Size, ...]) -> Plot:
    """Samples a second against the micro-batch."""
    known = [s for s in sizes if s.seconds]

    def paint(ax: Axes) -> None:
        ax.set_xscale("log", base=2)
        ax.plot([s.samples for s in known], [s.rate for s in known], marker="o", markersize=4.5, color=OURS)
        ax.set_xticks([s.samples for s in known], [str(s.samples) for s in known])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_ylim(bottom=0)
        ax.set_xlabel("samples worked at once")
        ax.set_ylabel("samples a second")

    told = "; ".join(f"{s.samples}: {s.rate:.4g}" for s in known)
    return draw(paint, f"Samples a second against the batch: {told}.",
                "Of the step alone. Where the line is flat, a larger batch is not faster.", size=(4.2, 2.9))


def growth(sweep: Sweep) -> list[Plot]:
    """Time and memory of a step against the number of tokens, with the fitted lines."""
    tokens = np.array([p.tokens for p in sweep.points], float)
    time = np.array([p.seconds for p in sweep.points])
    memory = np.array([p.bytes for p in sweep.points]) / MIB
    return [_growth(sweep, "time", "seconds a step", tokens, time, sweep.time, 1.0),
            _growth(sweep, "memory", "MiB of tensors in a step", tokens, memory, sweep.memory, 1 / MIB)]


def _growth(sweep: Sweep, what: str, label: str, tokens: np.ndarray, cost: np.ndarray, fit: Exponent | None, unit: float
            ) -> Plot:
    sizes = [(p.batch if sweep.axis == "batch" else "×".join(map(str, p.size))) for p in sweep.points]

    def paint(ax: Axes) -> None:
        ax.set_xscale("log")
        ax.set_yscale("log")
        if fit is not None:
            line = np.array([tokens[-fit.points], tokens[-1]])
            ax.plot(line, unit * fit.factor * line**fit.value, color=OTHER if fit.worse else OURS,
                    label=f"tokens$^{{{fit.value:.2f} ± {fit.error:.2f}}}$")
            ax.plot(line, cost[-1] * (line / tokens[-1]) ** ATTENTION, color=BASELINE[0], linestyle=":", linewidth=1,
                    label="tokens$^2$, attention's")
        ax.plot(tokens, cost, "o", markersize=5, color=OURS)
        ax.xaxis.set_major_locator(FixedLocator(list(tokens)))
        ax.set_xticks(list(tokens), [f"{n:,.0f}\n{size}" for n, size in zip(tokens, sizes, strict=True)], fontsize=7)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xlabel(f"tokens in a batch, and {'samples' if sweep.axis == 'batch' else 'size of a view'}")
        ax.set_ylabel(label)
        if fit is not None:
            ax.legend()

    told = "; ".join(f"{size}: {n:,.0f} tokens, {y:.3g}" for size, n, y in zip(sizes, tokens, cost, strict=True))
    grows = "no exponent from so few sizes" if fit is None else \
        f"exponent {fit.value:.2f} ± {fit.error:.2f} over the {fit.points} largest"
    return draw(paint, f"{label} against {sweep.axis}: {told}; {grows}.", f"{sentence(what)} against {sweep.axis}: {grows}.",
                size=(4.8, 3.2))
