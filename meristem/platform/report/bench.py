"""What `bench` measured, for people: in the terminal, and as one self-contained page."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from meristem.platform.benching.growth import Exponent
from meristem.platform.benching.results import Bench, Sweep, Training, Variant
from meristem.platform.report import costs
from meristem.platform.report.figures import Plot

NAME = "bench.html"


@dataclass(frozen=True)
class Part:
    """A table with what is said of it. figures: by the name of the file that each is written to."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    figures: tuple[str, ...] = ()


def write(bench: Bench, directory: Path) -> Path:
    """bench.html, bench.json and an SVG file for each figure, into a directory. Returns the page."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bench.json").write_text(json.dumps(bench.dump(), indent=1))
    plots = figures(bench)
    for name, plot in plots.items():
        (directory / f"{name}.svg").write_bytes(base64.b64decode(plot.source.partition(",")[2]))
    path = directory / NAME
    path.write_text(page(bench, plots), encoding="utf-8")
    return path


def page(bench: Bench, plots: dict[str, Plot]) -> str:
    """The whole page: no script, nothing loaded from elsewhere."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              undefined=StrictUndefined)
    template = environment.get_template("bench.html")
    return template.render(bench=bench, parts=parts(bench), sentences=sentences(bench), plots=plots)


def figures(bench: Bench) -> dict[str, Plot]:
    found: dict[str, Plot] = {}
    if (t := bench.training) is not None:
        found |= {"step": costs.phases(t), "workers": costs.workers(t.samples, t.feeds), "batch": costs.batches(t.sizes)}
    for sweep in bench.sweeps:
        found |= dict(zip((f"sweep-{sweep.axis}-time", f"sweep-{sweep.axis}-memory"), costs.growth(sweep), strict=True))
    return found


def show(bench: Bench, console: Console) -> None:
    """Tables on a terminal; where there is none, a line for each row."""
    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)

    for i, sentence in enumerate(sentences(bench)):
        say(sentence, "" if i else "bold")
    for part in parts(bench):
        if console.is_terminal:
            table = Table(box=None, pad_edge=False, header_style="dim", title=part.title, title_justify="left",
                          title_style="bold")
            for i, head in enumerate(part.heads):
                table.add_column(head, justify="right" if i else "left", overflow="fold")
            for row in part.rows:
                table.add_row(*row)
            console.print()
            console.print(table)
            say(part.note, "dim")
        else:
            for row in part.rows:
                told = ", ".join(f"{head} {cell}".strip() for head, cell in zip(part.heads[1:], row[1:], strict=True) if cell)
                say(f"{part.title}: {part.heads[0]} {row[0]}: {told}".replace(":  ", ": "))


def sentences(bench: Bench) -> list[str]:
    """The verdict, and what to paste."""
    said = []
    if (t := bench.training) is not None:
        a = t.advice
        said.append(t.verdict)
        now = f"{hours(a.before)} for its {t.steps:,} steps"
        if a.overrides:
            said.append(f"set: {' '.join(a.overrides)}")
            said.append(f"{hours(a.after)} for its {t.steps:,} steps, where the recipe as it is takes {hours(a.before)}")
        else:
            said.append(f"keep the recipe as it is: nothing that was tried is much faster; {now}")
        if a.larger:
            said.append(f"or learn in fewer and larger steps: {' '.join(a.larger)}: {hours(a.larger_hours)}")
        said += a.words
    for sweep in bench.sweeps:
        said.append(f"{sweep.axis}: {_grows(sweep)}")
    return said


def _grows(sweep: Sweep) -> str:
    fits = {name: fit for name, fit in (("time", sweep.time), ("memory", sweep.memory)) if fit is not None}
    if not fits:
        return f"too few sizes for an exponent ({sweep.ended})"
    said = [f"{name} grows as tokens^{fit.value:.2f} ± {fit.error:.2f}" for name, fit in fits.items()]
    unsure = [name for name, fit in fits.items() if not fit.sure]
    worse = f"{' and '.join(sweep.worse)} worse" if sweep.worse else "nothing worse"
    verdict = f"too uncertain a figure of {' and '.join(unsure)} to judge" if unsure else f"{worse} than attention's own 2"
    return f"{', '.join(said)}; {verdict}"


def parts(bench: Bench) -> list[Part]:
    found = [] if bench.training is None else _training(bench.training)
    for sweep in bench.sweeps:
        samples = sweep.axis == "batch"
        rows = [(str(p.batch) if samples else " × ".join(map(str, p.size)), f"{p.tokens:,}", clock(p.seconds), size(p.bytes))
                for p in sweep.points]
        if sweep.time is not None:
            rows.append(("exponent", "", _exponent(sweep.time), _exponent(sweep.memory)))
        note = f"{sweep.points[0].batch} samples a batch. " if not samples else ""
        ended = f"Ended: {sweep.ended}. " if sweep.ended else ""
        found.append(Part(f"Growth with {sweep.axis}", (sweep.axis, "tokens", "step", "memory"), tuple(rows),
                          f"{note}{ended}Made input, already augmented; memory of the tensors of a step.",
                          (f"sweep-{sweep.axis}-time", f"sweep-{sweep.axis}-memory")))
    return found


def _exponent(fit: Exponent | None) -> str:
    return "" if fit is None else f"{fit.value:.2f} ± {fit.error:.2f}"


def _training(t: Training) -> list[Part]:
    whole = sum(t.phases.values())
    facts = [("samples a second", f"{t.rate:,.1f}"), ("seconds a step", clock(t.feed.seconds)),
             ("waiting for data", f"{t.feed.waiting:.1%}"), ("processor seconds per 1,000 samples", f"{t.cpu:.1f}"),
             ("time to first step", clock(t.first)), ("memory, this process", size(t.host)),
             ("memory, loaders of their own", size(t.workers))]
    facts += [("memory, GPU", size(t.gpu))] if t.gpu is not None else []
    facts += [("model FLOPs of a step", f"{_scaled(t.flops)}FLOP"),
              ("achieved, step alone", f"{_scaled(t.flops / t.alone)}FLOP/s"),
              ("matrix rate of this device", f"{_scaled(t.peak)}FLOP/s"), ("MFU", f"{t.mfu:.1%}")]
    found = [Part("Training", ("", ""), tuple(facts), f"The recipe as it is, {t.feed.workers} workers."),
             Part("Step", ("", "time", "share"), tuple((name, clock(s), f"{s / whole:.0%}") for name, s in t.phases.items()),
                  figures=("step",)),
             Part("Workers", ("workers", "loader alone", "training", "wait"),
                  tuple((str(f.workers), f"{t.samples / f.alone:,.1f} /s", f"{t.samples / f.seconds:,.1f} /s",
                         f"{f.waiting:.0%}") for f in t.feeds), "Samples a second.", ("workers",)),
             Part("Precision", ("precision", "step alone", "MFU", "loss", "note"), tuple(map(_variant, t.precision)))]
    if t.compile:
        found.append(Part("Compile", ("compile", "step alone", "first step", "note"),
                          tuple((v.name, f"{v.rate:,.1f} /s", clock(v.first), v.note) for v in t.compile)))
    sizes = tuple((str(s.samples), f"{s.rate:,.1f} /s" if s.seconds else "", size(s.bytes) if s.seconds else "",
                   f"{s.mfu:.1%}" if s.seconds else "", s.note) for s in t.sizes)
    found.append(Part("Batch", ("samples", "step alone", "memory", "MFU", "note"), sizes,
                      "Samples worked at once: train.batch / train.accumulate.", ("batch",)))
    return found


def _variant(v: Variant) -> tuple[str, ...]:
    return (v.name, "", "", "", v.note) if v.note else (v.name, f"{v.rate:,.1f} /s", f"{v.mfu:.1%}", f"{v.loss:.4g}", "")


def _scaled(count: float) -> str:
    return f"{count / 1e12:.3g} T" if count >= 1e12 else f"{count / 1e9:.3g} G"


def hours(x: float) -> str:
    return f"{x:.1f} h" if x >= 1 else f"{60 * x:.1f} min"


def clock(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
