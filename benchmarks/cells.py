"""What pretraining is worth to a detector of blood cells: one JSON line for each arm and label budget.

    python benchmarks/cells.py --data ../shared/data/bccd/BCCD [--budgets 0.1 all] [--seeds 2] [--out runs/cells]

Pretrained on the training and validation images without their boxes (masked pixels of a small U-Net at half the resolution of
the files), then fine-tuned as a detector (FCOS on a feature pyramid) on the official training split, beside an arm of equal
budget from random weights; tested on the official test split.
ap, ap50: COCO's, with 95 % intervals over test images, seeds averaged first; per_class: AP50. difference: in AP and AP50, to
random weights. report: the page of all arms. --quick: a tenth of all steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from runs import finished

import meristem
from meristem.platform.evaluation.results import Results, Summary, summarise
from meristem.platform.origin import SCRATCH

ENCODER = ["encoder.unet.widths=[16,32,64,128,128]", "encoder.unet.blocks=[1,1,2,2,2]"]
PRETRAINING = [*ENCODER, "views.x.size=[128,160]", "views.x.zoom=[1.5,2.5]", "train.batch=16"]
DETECTION = ["views.x.size=[240,320]", "views.x.zoom=[1.6,2.4]", "train.log_every=100"]  # a whole picture of 480×640 at a time


def estimate(e: Any) -> list[float]:
    return [round(float(x), 4) for x in e]


def lines(results: Results, summary: Summary) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for row in (r for r in summary.rows if r.metric == "ap"):
        half = summary.row(row.arm, row.protocol, row.labels, "ap50")
        assert half is not None
        less = {c.metric: estimate(c.difference) for c in summary.comparisons
                if (c.arm, c.labels) == (row.arm, row.labels) and c.metric in ("ap", "ap50")}
        budget = next(c.budget for c in results.cells if (c.arm, c.labels) == (row.arm, row.labels))
        found.append({"benchmark": "cells", "arm": row.arm, "labelled_images": row.labelled_subjects, "ap": estimate(row.mean),
                      "ap50": estimate(half.mean), "per_class": {c: estimate(e) for c, e in half.classes.items()},
                      **({"difference": less} if less else {}), "seeds": len(row.seeds), "seed_sd": row.seed_sd,
                      "steps": budget.steps, "batch": budget.batch, "seconds_a_run": budget.seconds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--budgets", nargs="+", default=["0.1", "all"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--pretraining", type=int, default=1500, help="steps")
    parser.add_argument("--steps", type=int, default=500, help="of fine-tuning")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="cells-"))
    share, run = 10 if given.quick else 1, out / "pretrained"
    if not finished(run):
        meristem.pretrain("image/mae-unet", given.data, run, [*PRETRAINING, f"train.steps={given.pretraining // share}"],
                          resume=run.is_dir())
    page = meristem.evaluate("image/detection", given.data, out / "report", [*DETECTION, f"train.steps={given.steps // share}"],
                             inits=[str(run), SCRATCH], labels=given.budgets, seeds=given.seeds)
    results = Results.load(page.parent / "results.json")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    for line in lines(results, summarise(results)):
        print(json.dumps({**line, "quick": given.quick, "device": device, "report": str(page)}), flush=True)


if __name__ == "__main__":
    main()
