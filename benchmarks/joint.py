"""One encoder for several kinds of data against a twin for each kind, at equal compute. Every line is JSON.

    python benchmarks/joint.py --data FOLDER [--kinds image points …] [--steps 300] [--seeds 3] [--out FOLDER]

The joint run (`joint/mae`) has `steps` steps for each kind on average; a twin of one kind has exactly as many steps of the same
batch, recipe, learning rate and schedule as that kind got in the joint run, so all twins together cost what the joint run did.
Each kind is then evaluated by a cheap protocol on its own test subjects: a line per kind with the joint encoder's, the twin's
and random weights' means and the differences joint − twin, joint − random and twin − random with 95 % intervals over subjects.

--data: the folder that holds the data sets named in SETS. --out: where runs are kept; the same call goes on with what is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import finished

import meristem
from meristem.platform.evaluation.results import Results, compare, summarise


@dataclass(frozen=True)
class Set:
    """place: in the data folder. task, protocol: of evaluation. recipe: overrides of the pretraining view and tokens (also of
    the twin). test: overrides of the task. labels: budget. split: of both.
    """

    place: str
    task: str
    protocol: str
    recipe: tuple[str, ...]
    test: tuple[str, ...] = ()
    labels: str = "all"
    split: str = "auto"


SETS = {
    "image": Set("pneumoniamnist", "image/classification", "linear",
                 ("modality.image.patch=4", "views.x.size=[28,28]", "train.batch=64"), ("views.x.size=[28,28]",)),
    "volume": Set("msd-task04-hippocampus", "volume/segmentation", "finetune", ("train.batch=16",),
                  ("views.x.size=[32,32,32]", "task.segmentation.decoder=light", "train.steps=100"), "20"),
    "video": Set("surv-camera-fight", "video/classification", "linear",
                 ("views.x.size=[8,64,64]", "modality.video.patch=[2,8,8]", "modality.video.store=decoded",
                  "modality.video.resize=80", "train.batch=8"), ("views.x.size=[8,64,64]",)),
    "points": Set("psb-labeled-points", "points/classification", "linear", ("train.batch=16",)),
    "graph": Set("tu-graphs/NCI1", "graph/classification", "linear", ("train.batch=32",), split="fold:0"),
}
RECIPES = {"video": "video/videomae"}


def pretrained(recipe: str, data: Any, out: Path, overrides: list[str], split: str) -> dict[str, Any]:
    """A finished run, made now or before: its metrics."""
    if not finished(out):
        meristem.pretrain(recipe, data, out, overrides, split=split, resume=out.exists())
    figures: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return figures


def line(kind: str, spec: Set, root: Path, out: Path, seeds: int) -> dict[str, Any]:
    place = out / f"evaluated-{kind}"
    joint, twin = out / "joint" / kind, out / f"twin-{kind}"
    meristem.evaluate(spec.task, root / spec.place, place, list(spec.test), inits=[str(joint), str(twin)],
                      labels=[spec.labels], seeds=seeds, protocols=[spec.protocol], split=spec.split, quiet=True)
    results = Results.load(place / "results.json")
    found = summarise(results)
    twin_name = next(arm for arm in results.arms if arm not in ("joint-mae", "scratch"))
    names = {"joint": "joint-mae", "twin": twin_name, "random": "scratch"}
    rows = {r.arm: r for r in found.rows if r.metric == results.metric}
    differences = {(c.arm, c.baseline): c.difference for c in found.primary()}
    shown = {who: round(rows[arm].mean.value, 4) for who, arm in names.items()}
    for arm in ("joint", "twin"):
        d = differences[names[arm], "scratch"]
        shown[f"{arm} - random"] = [round(x, 4) for x in (d.value, d.low, d.high)]
    cells = {who: [c for c in results.cells if c.arm == names[who]] for who in ("joint", "twin")}
    both = next(c.difference for c in compare(results, cells["joint"], cells["twin"])[0] if c.metric == results.metric)
    shown["joint - twin"] = [round(x, 4) for x in (both.value, both.low, both.high)]
    return {"kind": kind, "set": spec.place, "task": results.task, "protocol": spec.protocol, "metric": results.metric,
            "labels": spec.labels, "test subjects": rows["scratch"].subjects, "seeds": seeds, **shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        sets = {kind: SETS[kind] for kind in given.kinds}
        own = [f"members.{kind}.{change}" for kind, spec in sets.items() for change in spec.recipe]
        began = time.perf_counter()
        pretrained("joint/mae", {kind: given.data / spec.place for kind, spec in sets.items()}, out / "joint",
                   [*own, f"train.steps={given.steps * len(sets)}"], "auto")
        for kind, spec in sets.items():
            steps = json.loads((out / "joint" / kind / "metrics.json").read_text())["steps"]
            shared = ["train.lr=1e-3", "train.warmup=0.05", "train.clip=1.0", "encoder.transformer.size=tiny",
                      "encoder.transformer.depth=12"]
            pretrained(RECIPES.get(kind, f"{kind}/mae"), given.data / spec.place, out / f"twin-{kind}",
                       [*spec.recipe, *shared, f"train.steps={steps}"], "auto")
        for kind, spec in sets.items():
            print(json.dumps(line(kind, spec, given.data, out, given.seeds)), flush=True)
        minutes = round((time.perf_counter() - began) / 60, 1)
        print(json.dumps({"kinds": given.kinds, "steps a kind": given.steps, "minutes": minutes}))


if __name__ == "__main__":
    main()
