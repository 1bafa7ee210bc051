"""What pretraining is worth on real data of several kinds: grids of arms, label budgets, protocols and seeds.

    python benchmarks/transfer.py --data ../shared/data [NAME …]      # runs what is not there yet, and writes docs/transfer.md

A study is a file of benchmarks/transfer: data and split, what is pretrained on them (with what overrides; `net` are those of
all), and what is evaluated: the task, what is laid over its recipe, protocols, label budgets and seeds. Finished runs and cells
stay under --out. Prints one JSON line for each figure. --quick: a twentieth of the steps, one seed, nothing written.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import yaml
from runs import finished

import meristem
from meristem.platform.evaluation.results import PROTOCOLS, Comparison, Results, Row, Summary, summarise
from meristem.platform.evaluation.statistics import Estimate
from meristem.platform.training import checkpoint

HERE = Path(__file__).parent
STUDIES, PAGE = HERE / "transfer", HERE.parent / "docs" / "transfer.md"


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    data: str
    pretraining: dict[str, list[str]]
    net: list[str]
    task: str
    over: list[str]
    protocols: list[str]
    labels: list[str]
    split: str = "auto"
    seeds: int = 3

    @classmethod
    def read(cls, name: str) -> Study:
        return cls(name, **yaml.safe_load((STUDIES / f"{name}.yaml").read_text()))

    def commands(self) -> list[list[str]]:
        """What a user would type; $DATA is the folder of the data sets."""
        where = ["--data", f"$DATA/{self.data}", *(["--split", self.split] if self.split != "auto" else [])]
        runs = [["meristem", "pretrain", recipe, *where, "--out", f"runs/{self.name}-{name}", *self.net, *laid]
                for name, (recipe, *laid) in self.pretraining.items()]
        asked = [part for name in self.pretraining for part in ("--init", f"runs/{self.name}-{name}")]
        asked += [part for key, values in (("--protocol", self.protocols), ("--labels", self.labels)) for value in values
                  for part in (key, value)]
        return [*runs, ["meristem", "evaluate", self.task, *where, *asked, "--seeds", str(self.seeds), "--out",
                        f"runs/{self.name}-report", *self.over]]


def run(study: Study, given: argparse.Namespace) -> Results:
    inits = []
    for name, (recipe, *laid) in study.pretraining.items():
        out = given.out / f"{study.name}-{name}"
        laid = [*study.net, *laid]
        if given.quick:
            laid.append("train.steps=10")
        if not finished(out):
            meristem.pretrain(recipe, given.data / study.data, out, laid, split=study.split, resume=out.is_dir())
        inits.append(str(out))
    over = [*study.over, *(["train.steps=5"] if given.quick else [])]
    page = meristem.evaluate(study.task, given.data / study.data, given.out / f"{study.name}-report", over, inits=inits,
                             labels=study.labels, protocols=study.protocols, split=study.split,
                             seeds=1 if given.quick else study.seeds)
    print(page, file=sys.stderr)
    return Results.load(page.parent / "results.json")


def shown(e: Estimate, sign: str = "") -> str:
    return f"{e.value:{sign}.3f} [{e.low:{sign}.3f}, {e.high:{sign}.3f}]"


def pairs(summary: Summary) -> list[tuple[Row, Comparison | None]]:
    """Every arm at each protocol and budget, in the primary metric, with its difference to random weights."""
    less = {(c.arm, c.protocol, c.labels): c for c in summary.primary()}
    return [(row, less.get((row.arm, row.protocol, row.labels))) for row in summary.rows if row.metric == summary.metric]


def figures(study: Study, summary: Summary) -> list[dict[str, object]]:
    return [{"study": study.name, "arm": row.arm, "protocol": row.protocol, "labels": row.labelled_subjects,
             "metric": row.metric, "mean": [round(x, 4) for x in row.mean], "seed_sd": row.seed_sd,
             "difference": less and [round(x, 4) for x in less.difference], "p": less and less.p_holm}
            for row, less in pairs(summary)]


def section(study: Study, results: Results, summary: Summary) -> str:
    counts = results.dataset.splits
    head = ("protocol", "labels", "arm", summary.metric, "seeds' spread", "over random weights", "*p*", "Hedges' g")
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row, less in pairs(summary):
        cells = (PROTOCOLS[row.protocol], str(row.labelled_subjects), row.arm, shown(row.mean),
                 "" if row.seed_sd is None else f"{row.seed_sd:.3f}", shown(less.difference, "+") if less else "",
                 f"{less.p_holm:.3f}" if less and less.p_holm is not None else "",
                 shown(less.size, "+") if less and less.size else "")
        rows.append("| " + " | ".join(cells) + " |")
    commands = "\n".join(" ".join(word if word.startswith("$") else shlex.quote(word) for word in line)
                         for line in study.commands())
    sizes = ", ".join(f"{name} {n.subjects}" for name, n in counts.items())
    ranks = [f"- {PROTOCOLS[r.protocol]}, {r.labelled_subjects} labels: {' > '.join(r.arms)}; Kendall's τ over resampled "
             f"subjects {r.tau_subjects:.2f}, over {r.seeds} seeds {r.tau_seeds:.2f}" for r in summary.rankings]
    audit = [f"- `{arm}`: {leak.sentence}" for arm, leak in results.leakage.items()]
    return "\n\n".join([f"## {study.title}", f"Subjects: {sizes}. {' '.join(summary.verdict)}", "\n".join(rows),
                        *(["Order of the arms:\n\n" + "\n".join(ranks)] if ranks else []),
                        "Audit:\n\n" + "\n".join(audit), *(["Warnings:\n\n" + "\n".join(f"- {w}" for w in summary.warnings)]
                                                           if summary.warnings else []), f"```bash\n{commands}\n```"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of studies; none: all")
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    names = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    parts = []
    for study in map(Study.read, names):
        wanted = study.name in (given.names or names)
        file = given.out / f"{study.name}-report" / "results.json"
        if not wanted and not file.is_file():
            continue
        results = run(study, given) if wanted else Results.load(file)
        summary = summarise(results)
        parts.append(section(study, results, summary))
        for line in figures(study, summary) if wanted else []:
            print(json.dumps({"benchmark": "transfer", **line}), flush=True)
    if given.quick:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {number}" for name, number in checkpoint.versions().items())
    made = f"Made {date.today().isoformat()} on: {device}; {versions}."
    PAGE.write_text("\n\n".join(["# Transfer, measured", (STUDIES / "about.md").read_text().strip(), made, *parts]) + "\n")


if __name__ == "__main__":
    main()
