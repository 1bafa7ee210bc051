"""What `data check` found, for people: in the terminal, and as one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from meristem.platform.data.findings import Intake, Level, Measure

NAME = "check.html"
LEVELS: dict[Level, tuple[str, str, str]] = {
    "refused": ("Refused", "red", "Training would leave these out, or not start."),
    "identity": ("Identity", "magenta", "These may say who somebody is. Named is where, never what."),
    "doubt": ("Doubts", "yellow", "Usable, and worth a look.")}
BARS = " ▁▂▃▄▅▆▇█"
FIRST = 5  # cases of a finding that the terminal names


def write(intake: Intake, directory: Path) -> Path:
    """check.html and check.json into a directory. Returns the page."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "check.json").write_text(json.dumps(intake.dump(), indent=1))
    path = directory / NAME
    path.write_text(page(intake), encoding="utf-8")
    return path


def page(intake: Intake) -> str:
    """The whole page: no script, nothing loaded from elsewhere."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              undefined=StrictUndefined)
    environment.filters["figure"] = figure
    return environment.get_template("intake.html").render(intake=intake, levels=LEVELS)


def figure(x: float) -> str:
    """Four digits; whole numbers, and what is far above them, whole."""
    return f"{x:,.0f}" if 1e3 <= abs(x) < 1e9 or x == int(x) else f"{x:.4g}"


def span(measure: Measure) -> str:
    low, _, middle, _, high = measure.quantiles
    return figure(middle) if low == high else f"{figure(middle)}  ({figure(low)} to {figure(high)})"


def bars(measure: Measure) -> str:
    """A histogram one line high; '' where all are the same."""
    most = max(measure.counts)
    return "".join(BARS[-(-n * (len(BARS) - 1) // most)] for n in measure.counts) if len(measure.counts) > 1 else ""


def show(intake: Intake, console: Console, local: Mapping[str, str] = {}) -> None:
    """local: true name of each case, where these are to be shown."""
    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, soft_wrap=True)

    say(f"[bold]{intake.modality}[/], {escape(intake.layout)}: {intake.samples} samples, {intake.labelled} labelled, "
        f"{intake.subjects} subjects")
    for level, (title, colour, about) in LEVELS.items():
        if found := intake.of(level):
            say(f"\n[bold {colour}]{title}[/]  [dim]{about}[/]")
        for f in found:
            say(f"[{colour}]{f.reason}[/]  {f.count}  {escape(f.what)}")
            for part, n in f.parts.items():
                say(f"    {n:>6}  {escape(part)}")
            for case in f.cases[:FIRST]:
                named = f" {local[case.case]}" if case.case in local else ""
                say(f"    {escape(case.case + named)}{escape(f': {case.what}') if case.what else ''}")
            if f.cases and f.count > FIRST:
                say(f"    and {f.count - FIRST} more", "dim")
            if f.remedy:
                say(f"    {escape(f.remedy)}", "dim")
    for table in _tables(intake):
        console.print()
        console.print(table)
    console.print()
    for i, sentence in enumerate(intake.verdict):
        say(escape(sentence), "" if i else "green" if intake.ok else "bold red")


def _tables(intake: Intake) -> list[Table]:
    tables = []

    def table(*heads: str, numbers: tuple[int, ...] = ()) -> Table:
        made = Table(box=None, pad_edge=False, header_style="dim")
        for i, head in enumerate(heads):
            made.add_column(head, justify="right" if i in numbers else "left", overflow="fold")
        tables.append(made)
        return made

    if intake.measures:
        made = table("measure", "median (range)", "samples by value")
        for m in intake.measures:
            made.add_row(escape(m.name), span(m), bars(m))
    if intake.mixes:
        made = table("property", "samples")
        for name, mix in intake.mixes.items():
            made.add_row(escape(name), escape(", ".join(f"{word} {n}" for word, n in mix.items())))
    if intake.splits:
        made = table("split", "subjects", "samples", "labelled", "classes", numbers=(1, 2, 3))
        for s in intake.splits:
            made.add_row(s.name, str(s.subjects), str(s.samples), str(s.labelled),
                         escape(", ".join(f"{name} {n}" for name, n in s.classes.items())))
    if intake.labels:
        made = table("label", "name", "subjects", "samples", "share of elements", numbers=(0, 2, 3, 4))
        for v in intake.labels:
            made.add_row(str(v.value), escape(v.name), str(v.subjects), str(v.samples), f"{v.share:.2%}")
    if intake.objects:
        made = table("objects", "count", numbers=(1,))
        for name, n in intake.objects.items():
            made.add_row(escape(name), str(n))
    if intake.blank:
        made = table("column", "lines without a value", numbers=(1,))
        for name, n in intake.blank.items():
            made.add_row(escape(name), str(n))
    return tables
