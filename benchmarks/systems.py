"""Each published system beside random weights and the plain method at the same budget, on real data of its modality.

    python benchmarks/systems.py --data ../shared/data [NAME …]            # trained and probed; docs/systems/NAME.json
    python benchmarks/systems.py --data ../shared/data --time [NAME …]     # seconds of a step, while nothing else runs
    python benchmarks/systems.py --table                                   # docs/systems.md, of what was measured

A system is a file of benchmarks/systems: its recipe, the study it is run in, the plain method (mae or simclr) that has as many
steps of as many samples, what is laid over the recipe there, and what its value was held against. Finished runs and cells are
not run again. --steps: fewer, to look whether it works; nothing is written then.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from runs import finished
from timing import seconds

import meristem
from meristem import catalogue
from meristem.modalities.points.options import PointsOptions
from meristem.modalities.points.pictures import write_pictures
from meristem.modalities.points.points import Points
from meristem.platform import joint as joints
from meristem.platform.assembly import Assembly, total
from meristem.platform.data.loader import loader
from meristem.platform.data.source import open_data
from meristem.platform.evaluation.results import Results, summarise
from meristem.platform.origin import SCRATCH
from meristem.platform.recipe import Recipe, digest, load, override, read
from meristem.platform.step import Batch
from meristem.projections import Projection
from meristem.tasks.transfer import named

RANDOM, SEEDS, PICTURES, TURNS = "random", 1, 48, 24
HERE = Path(__file__).parent
SYSTEMS, FIGURES, TABLE = HERE / "systems", HERE.parent / "docs" / "systems", HERE.parent / "docs" / "systems.md"


@dataclass(frozen=True)
class Study:
    """Real data, what is laid over every recipe pretrained on them, and how what was learnt is probed.

    title, data: what it is, and where under --data. split: of the data. steps: of pretraining. task, probes, over: what is
    evaluated, by which protocols, and what is laid over the task's recipe. on: other data to evaluate on, and their split.
    members: of joint recipes, the data of each; those of the member that is probed are `data`, and what is laid over a recipe
    names members. alone: the study whose settings hold for a plain recipe of that member alone, which has as many steps there
    as the member has in a joint run, on average.
    listed: writes a list of samples where the data have none: of the folder under --data, into the one for runs.
    """

    title: str
    data: str
    pretraining: tuple[str, ...]
    steps: int
    task: str
    probes: tuple[str, ...]
    over: tuple[str, ...] = ()
    split: str = "auto"
    on: tuple[str, str] | None = None
    members: tuple[tuple[str, str], ...] = ()
    alone: str = ""
    listed: Callable[[Path, Path], Path] | None = None

    @property
    def probed(self) -> str:
        """The member whose encoder is probed; '' where there are none."""
        return next((name for name, place in self.members if place == self.data), "")

    def place(self, given: argparse.Namespace) -> Path:
        folder: Path = given.data / self.data
        return folder if self.listed is None else self.listed(folder, given.out)


def white_cells(folder: Path, out: Path) -> Path:
    """Pictures with their classes, which a table tells by number; without the one basophil."""
    table = csv.DictReader((folder / "Class Labels of Dataset 1.csv").open())
    lines = [f"{folder.resolve() / 'Dataset 1' / line['image ID'].zfill(3)}.bmp,{line['class label']}" for line in table
             if line["class label"] != "5"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "white-cells.csv").write_text("\n".join(["path,class", *lines]) + "\n")
    return out / "white-cells.csv"


def turntables(folder: Path, out: Path) -> Path:
    """Films of shapes that turn once about the vertical axis: pictures of depth in a folder each, in those of their classes."""
    modality, angle = Points(PointsOptions()), torch.arange(TURNS) * (2 * torch.pi / TURNS)
    turn = torch.zeros(TURNS, 3, 3)
    turn[:, 0, 0], turn[:, 0, 2], turn[:, 1, 1], turn[:, 2, 0], turn[:, 2, 2] = (
        angle.cos(), angle.sin(), torch.ones(TURNS), -angle.sin(), angle.cos())
    for file in sorted(folder.rglob("*.npz")):
        place = out / "turntables" / file.parent.name / file.stem
        if (place / f"{TURNS - 1:02d}.png").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        array = modality.read([file]).array
        assert array is not None
        xyz = torch.from_numpy(array[:3]).T @ turn  # (TURNS, N, 3)
        live = torch.ones(xyz.shape[:2], dtype=torch.bool)
        whole = Projection.of(xyz.reshape(1, -1, 3), live.reshape(1, -1), PICTURES)  # of one scale all the way round
        shown = Projection(*(x.expand(TURNS, *x.shape[1:]) for x in (whole.low, whole.pixel, whole.first)), PICTURES)
        pictures = shown.pictures(xyz, live, spread=1, merge="nearest")[:, 0]
        for n, picture in enumerate((pictures.transpose(1, 2).flip(1) * 255).round().byte().numpy()):
            Image.fromarray(picture).save(place / f"{n:02d}.png")
    return out / "turntables"


SMALL_DECODER = "objectives.pixels.masked.predictor.decoder={depth: 2, width: 96, heads: 3}"
CHEST, HIPPOCAMPUS = "pneumoniamnist/pneumoniamnist_union.npz", "msd-task04-hippocampus"
SECONDS = ("modality.skeleton.windows={frames: 120, step: 60}", "modality.skeleton.segment=8",
           "train.workers=0")  # windows of one second, as many again between them; a sequence is on one side only
LINEARLY = ("task.segmentation.decoder=linear", "train.freeze={encoder: 1.0}", "views.x.size=[24,24,24]", "train.steps=100",
                 "train.batch=4", "train.lr=1.0e-2", "train.ema=null", "train.precision=fp32", "train.workers=0")
STUDIES = {
    "cells": Study("WBC-Dataset 1, 298 white blood cells of four classes, tokens of single channels", "wbc-dataset1",
                   ("modality.image={patch: 16, tokens: channel}", "train.batch=32", "train.workers=0"), 300,
                   "image/classification", ("linear", "knn"), ("train.workers=0",), "0.4,0.1,0.5", listed=white_cells),
    "clips": Study("Surveillance clips, whether they show a fight; looks of eight frames", "surv-camera-fight/clips.csv",
                   ("modality.video={patch: [1, 8, 8], store: decoded, resize: 112}", "train.batch=16", "train.workers=0"), 300,
                   "video/classification", ("linear", "knn"), ("views.x={size: [8, 64, 64], clips: 2, crops: 1}",
                                                               "train.workers=0"), "0.4,0.1,0.5"),
    "films": Study("Surveillance clips, whether they show a fight; looks of one frame", "surv-camera-fight/clips.csv",
                   ("modality.video={patch: [1, 8, 8], store: decoded, resize: 112}", "train.batch=64", "train.workers=0"), 300,
                   "video/classification", ("linear", "knn"),
                   ("views.x={size: [1, 64, 64], sample: {stride: 1}, clips: 4, crops: 1}", "train.workers=0"), "0.4,0.1,0.5"),
    "chest": Study("PneumoniaMNIST, chest X-rays of 28×28", CHEST,
                   ("modality.image.channels=1", "modality.image.patch=4", "train.batch=64", "train.workers=0"), 300,
                   "image/classification", ("linear", "knn"), ("views.x.size=[28,28]", "train.workers=0")),
    "hippocampus": Study("Medical Decathlon, hippocampus in brain MR; a linear decoder on frozen tokens",
                         HIPPOCAMPUS, ("modality.volume.patch=[6,6,6]", "train.batch=8", "train.workers=0",
                                       "train.log_every=5"), 800, "volume/segmentation", ("finetune",), LINEARLY),
    "hippocampus-levels": Study("Hippocampus in brain MR; a linear decoder on the frozen levels of a U-Net's way down",
                                HIPPOCAMPUS, ("modality.volume.patch=[6,6,6]", "train.batch=8", "train.workers=0",
                                              "train.log_every=5"), 160, "volume/segmentation", ("finetune",), LINEARLY),
    "hippocampus-slices": Study(
        "Hippocampus in brain MR, slice by slice from behind to the front; a linear decoder on the frozen levels", HIPPOCAMPUS,
        ("modality.volume.patch=[1,4,4]", "modality.volume.orientation=ARS", "train.batch=8", "train.workers=0",
         "train.log_every=5"), 250,
        "volume/segmentation", ("finetune",),
        ("task.segmentation.decoder=linear", "train.freeze={encoder: 1.0}", "views.x.size=[48,32,32]", "train.steps=100",
         "train.batch=2", "train.lr=1.0e-2", "train.ema=null", "train.precision=fp32", "train.workers=0")),
    # half of the shapes are tested, so that they can tell encoders apart; those of a class stand alike: looks turn little
    "shapes": Study("Princeton shapes of 19 classes, 512 points in 32 groups of 16", "psb-labeled-points",
                    ("modality.points.count=32", "modality.points.size=16", "train.batch=32", "train.workers=0"), 300,
                    "points/classification", ("svm", "linear", "knn"), ("views.x.size=[512]", "train.workers=0"),
                    "0.4,0.1,0.5"),
    "turntables": Study("Princeton shapes of 19 classes as films of depth that turn once; looks of one frame",
                        "psb-labeled-points", ("modality.video={patch: [1, 8, 8], store: decoded}", "train.batch=64",
                                               "train.workers=0"), 1000, "video/classification", ("svm", "linear", "knn"),
                        ("views.x={size: [1, 48, 48], sample: {stride: 1}, clips: 4, crops: 1}", "train.workers=0"),
                        "0.4,0.1,0.5", listed=turntables),
    "turntable-clips": Study("Princeton shapes of 19 classes as films of depth that turn once; looks of eight frames",
                             "psb-labeled-points", ("modality.video={patch: [2, 8, 8], store: decoded}", "train.batch=16",
                                                    "train.workers=0"), 300, "video/classification", ("svm", "linear", "knn"),
                             ("views.x={size: [8, 48, 48], sample: {stride: 3}, clips: 2, crops: 1}", "train.workers=0"),
                             "0.4,0.1,0.5", listed=turntables),
    "citations": Study("Cora, one graph of 2,708 nodes, public split", "planetoid-cora-citeseer/ind.cora.graph",
                       ("train.workers=0",), 100, "graph/node-classification", ("linear", "knn"), ("train.workers=0",)),
    "compounds": Study("NCI1, graphs of 4,110 compounds", "tu-graphs/NCI1", ("train.workers=0", "train.batch=64"), 200,
                       "graph/classification", ("svm", "linear"), ("train.workers=0",), "0.6,0.1,0.3"),
    "chest+hippocampus": Study("PneumoniaMNIST and MR volumes of the hippocampus in one run, probed on the former", CHEST,
                               ("members.image.modality.image.channels=1", "members.image.modality.image.patch=4",
                                "members.image.train.batch=64", "members.volume.train.batch=16", "train.workers=0"), 600,
                               "image/classification", ("linear", "knn"), ("views.x.size=[28,28]", "train.workers=0"),
                               members=(("image", CHEST), ("volume", HIPPOCAMPUS)), alone="chest"),
    "mocap": Study("CMU mocap of the motion-prediction field, seven actions in windows of a second",
                   "cmu-mocap-actions/train", (*SECONDS, "train.batch=32", "train.log_every=5"), 480,
                   "skeleton/classification", ("linear", "knn"), (*SECONDS, "views.x.size=[32]"), split="0.5,0.1,0.4"),
}
SHARP = ("objectives.cls.contrastive.loss.dino.teacher_temperature=0.02",
         "objectives.patch.contrastive.loss.dino.teacher_temperature=0.02")  # at 0.04, 300 steps end at uniform assignments
PLAIN = {  # what the plain method is, by study and name
    ("cells", "dino"): ("image/dino", ("views.l=null", "objectives.cls.contrastive.queries=[g]",
                                     "heads.head.prototypes={hidden: 256, out: 64, count: 256}")),
    ("clips", "mae"): ("video/videomae", ("views.x={size: [8, 64, 64]}", SMALL_DECODER)),
    ("films", "mae"): ("video/saycam-videomae", ("views.x={size: [1, 64, 64], sample: {stride: 1}}", SMALL_DECODER,
                                                 "masking.x.random.ratio=0.75")),
    ("turntables", "mae"): ("video/saycam-videomae", ("views.x={size: [1, 48, 48], sample: {stride: 1}}", SMALL_DECODER,
                                                      "masking.x.random.ratio=0.75")),
    ("turntable-clips", "mae"): ("video/videomae", ("views.x={size: [8, 48, 48], sample: {stride: 3}}", SMALL_DECODER)),
    ("chest", "mae"): ("image/mae", ("views.x.size=[28,28]", SMALL_DECODER)),
    ("chest", "mae-unet"): ("image/mae-unet", ("views.x.size=[28,28]", "masking.x.random.unit=1",
                                               "objectives.pixels.masked.predictor=linear")),
    ("chest", "ibot"): ("image/ibot", ("views.g.size=[28,28]", "views.l={size: [16,16], count: 2}",
                                     "heads.head.prototypes={hidden: 256, out: 64, count: 256}", *SHARP)),
    ("chest", "simclr"): ("image/simclr", ("views.v.size=[28,28]",)),
    ("hippocampus", "mae"): ("volume/mae", ("views.x.size=[36,36,36]", SMALL_DECODER)),
    ("hippocampus", "simclr"): ("volume/simclr", ("views.v.size=[24,24,24]",)),
    ("hippocampus-levels", "mae"): ("volume/mae-unet", ("views.x.size=[24,24,24]", "masking.x.random.unit=1",
                                                      "objectives.pixels.masked.predictor=linear", "train.precision=fp32")),
    ("hippocampus-levels", "simclr"): ("volume/simclr", ("views.v.size=[24,24,24]",)),
    ("hippocampus-slices", "mae"): ("volume/mae-unet", ("views.x.size=[4,32,32]", "train.precision=fp32")),
    ("hippocampus-slices", "simclr"): ("volume/simclr", ("views.v.size=[1,32,32]", "views.v.affine.rotate=[15,0,0]")),
    ("shapes", "mae"): ("points/mae", ("views.x.size=[512]",
                                     "objectives.points.masked.predictor.decoder={depth: 2, width: 96, heads: 3}")),
    ("shapes", "simclr"): ("points/simclr", ("views.v.size=[512]", "views.v.rotate=15", "views.v.crop=[0.7,1.0]")),
    ("citations", "graphmae"): ("graph/graphmae", ("train.batch=1", "train.lr=1.0e-3", "masking.x.random.swap=0.05",
                                                   "objectives.features.masked.target.cosine.exponent=3")),
    ("citations", "grace"): ("graph/grace", ()),
    ("compounds", "graphmae"): ("graph/graphmae-nci1", ()),
    ("chest+hippocampus", "mae"): ("image/mae", ("views.x.size=[28,28]", SMALL_DECODER)),
    ("chest+hippocampus", "simclr"): ("image/simclr", ("views.v.size=[28,28]",)),
    ("mocap", "mae"): ("skeleton/mae", ("views.x.size=[32]", SMALL_DECODER)),
    ("mocap", "simclr"): ("skeleton/simclr", ("views.v.size=[32]",)),
}


@dataclass(frozen=True)
class System:
    """recipe; study; against: the plain methods; net: the encoder, of all of them; laid: over the recipe beside that and what
    the study lays; probed: over the task's recipe; onlooker: over the recipe of images by which a model is pretrained on
    pictures of the training clouds, for the system's foreign model `eye`; value: what its loss was held against, in a line.
    after: the system from whose run it starts, as its second stage, with as many steps again.
    """

    name: str
    recipe: str
    study: str
    against: tuple[str, ...]
    net: tuple[str, ...] = ("encoder.transformer={width: 128, depth: 4, heads: 4}",)
    laid: tuple[str, ...] = ()
    probed: tuple[str, ...] = ()
    onlooker: tuple[str, ...] = ()
    value: str = ""
    after: str = ""

    @classmethod
    def read(cls, name: str) -> System:
        plain = yaml.safe_load((SYSTEMS / f"{name}.yaml").read_text())
        return cls(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()})


def names() -> list[str]:
    return sorted(path.stem for path in SYSTEMS.glob("*.yaml"))


def jobs(system: System) -> dict[str, tuple[str, list[str], Study]]:
    """The recipe of the system and of each plain method, what is laid over it, and the study whose settings hold for it."""
    study = STUDIES[system.study]
    found = {system.name: (system.recipe, system.laid)} | {name: PLAIN[system.study, name] for name in system.against}
    own = {name: STUDIES[study.alone] if study.alone and not recipe.startswith("joint/") else study
           for name, (recipe, _) in found.items()}
    return {name: (recipe, [*own[name].pretraining, *system.net, *laid], own[name]) for name, (recipe, laid) in found.items()}


def onlooker(system: System, study: Study, given: argparse.Namespace) -> list[str]:
    """What tells a recipe where its foreign model lies; that is pretrained on pictures of the clouds that it may see."""
    if not system.onlooker:
        return []
    recipe, *laid = system.onlooker
    out: Path = given.out / f"onlooker-{digest([study.data, study.split, *system.onlooker])}"
    if not finished(out):
        data = open_data(given.data / study.data, load(system.recipe).modality, study.split, None, quiet=True)
        folder, clouds = out.with_name(f"{out.name}-pictures"), [row.paths[0] for row in data.rows("train")]
        write_pictures(clouds, given.data / study.data, folder, data.modality, size=PICTURES)
        meristem.pretrain(recipe, folder, out, laid, split="1,0,0", resume=out.is_dir())
    return [f"foreign.eye.run.weights={out}", f"foreign.eye.run.size={PICTURES}"]


def pretrained(name: str, recipe: str, laid: list[str], study: Study, given: argparse.Namespace, after: str = "") -> Path:
    """A finished run; plain ones are shared by all systems of one study and encoder."""
    laid = [*laid, f"train.steps={given.steps or study.steps}"]
    init = str(pretrained(after, *jobs(System.read(after))[after], given)) if after else SCRATCH
    out: Path = given.out / f"{name}-{digest([recipe, laid, study.data, study.split])}"
    if not finished(out):
        places = {name: given.data / place for name, place in study.members} or study.place(given)
        meristem.pretrain(recipe, places, out, laid, init=init, split=study.split, resume=out.is_dir())
    return out / study.probed


def losses(run: Path) -> tuple[float, float]:
    """The loss over the first and over the last tenth of what was logged; of a joint run, its own."""
    run = run if (run / "metrics.jsonl").exists() else run.parent
    logged = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    few = max(len(logged) // 10, 1)
    return sum(logged[:few]) / few, sum(logged[-few:]) / few


def rounded(numbers: Iterable[float | None]) -> list[float | None]:
    return [None if x is None else round(float(x), 4) for x in numbers]


def measure(system: System, given: argparse.Namespace) -> dict[str, Any]:
    study = STUDIES[system.study]
    eye = onlooker(system, study, given)
    runs = {name: pretrained(name, recipe, [*laid, *(eye if name == system.name else ())], own, given,
                             system.after if name == system.name else "") for name, (recipe, laid, own) in jobs(system).items()}
    run = runs[system.name]
    inits = [*map(str, runs.values()), SCRATCH]
    place, split = (given.data / study.on[0], study.on[1]) if study.on else (study.place(given), study.split)
    page = meristem.evaluate(study.task, place, run / "probed", [*study.over, *system.probed], inits=inits,
                             protocols=study.probes, split=split, seeds=SEEDS)
    summary = summarise(Results.load(page.parent / "results.json"))
    called = dict(zip(named(inits).values(), (*runs, RANDOM), strict=True))
    rows = [row for row in summary.rows if row.metric == summary.metric and row.arm in called]
    less = [c for c in summary.primary() if called[c.arm] == system.name and called.get(c.baseline) == RANDOM]
    figures = json.loads((run / "metrics.json").read_text())
    return {"name": system.name, "steps": figures["steps"], "samples": figures["samples"], "loss": rounded(losses(run)),
            "metric": summary.metric,
            "probes": {p: {called[row.arm]: rounded(row.mean) for row in rows if row.protocol == p} for p in study.probes},
            "gain": {c.protocol: rounded((*c.difference, c.p)) for c in less},
            "torch": torch.__version__, "date": date.today().isoformat()}


def timed(system: System, given: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, from a batch at hand to new weights; the system and the plain methods take turns."""
    study, torch_jobs = STUDIES[system.study], jobs(system)
    torch_jobs[system.name][1].extend(onlooker(system, study, given))
    taken = seconds([job(*each, given) for each in torch_jobs.values()], repeats=10)
    return {name: round(s, 4) for name, s in zip(torch_jobs, taken, strict=True)}


def drawn(recipe: Recipe, place: Path, study: Study) -> tuple[Recipe, Batch]:
    """A recipe as the data settle it, and its first batch."""
    data = open_data(place, recipe.modality, study.split, None, quiet=True)
    recipe = recipe.of(data.modality)
    return recipe, next(iter(loader(data.cache, data.rows("train"), recipe, fields=recipe.reads, start=0, steps=1, rank=0,
                                    world=1, workers=0)))


def job(name: str, laid: list[str], study: Study, given: argparse.Namespace) -> Callable[[], None]:
    """One step; of a joint recipe, one of each member."""
    laid = [*laid, "train.steps=1"]
    if study.members:
        joint = joints.build(override(read(name), laid))
        found = {m: drawn(joint.members[m].recipe, given.data / place, study) for m, place in study.members}
        members = {m: joint.members[m].model_copy(update={"recipe": recipe}) for m, (recipe, _) in found.items()}
        assembly: Assembly = joints.JointAssembly(joint.model_copy(update={"members": members}))
        batches = [batch for _, batch in found.values()]
        for batch, member in zip(batches, found, strict=True):
            batch.member = member
    else:
        recipe, batch = drawn(load(name, laid), study.place(given), study)
        assembly, batches = Assembly(recipe), [batch]
    optimiser = torch.optim.AdamW([p for p in assembly.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        for batch in batches:
            loss = total(assembly(assembly.prepare(batch), 0.5))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            assembly.after(0.5)

    return step


HEAD = ("recipe", "status", "loss", "probe", "itself", "plain method", "random weights", "gain over random weights",
        "seconds a step")


def shown(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def lines(system: System, status: str) -> list[str]:
    """Rows of the table, one for each probe."""
    figures = json.loads((FIGURES / f"{system.name}.json").read_text())
    rows = []
    for probe, found in figures["probes"].items():
        difference, low, high, _ = figures["gain"][probe]
        cells = (f"`{system.recipe}`", status, f"{figures['loss'][0]:.3f} → {figures['loss'][1]:.3f}",
                 f"{probe}, {figures['metric']}", shown(*found[system.name]),
                 "; ".join(f"{name} {shown(*found[name])}" for name in system.against), shown(*found[RANDOM]),
                 f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]",
                 "; ".join(f"{name} {s:.3f}" for name, s in figures.get("seconds", {}).items()))
        rows.append("| " + " | ".join(cells if not rows else ("", "", "", *cells[3:8], "")) + " |")
    return rows


def table() -> str:
    """docs/systems.md."""
    catalogued = {row["name"]: row for row in catalogue.rows()}
    measured = [System.read(name) for name in names() if (FIGURES / f"{name}.json").exists()]
    parts = ["# Published systems, measured", (SYSTEMS / "about.md").read_text().strip()]
    for key, study in STUDIES.items():
        mine = [system for system in measured if system.study == key]
        if not mine:
            continue
        rows = [row for system in mine for row in lines(system, catalogued[system.recipe]["status"])]
        parts += [f"## {study.title}", f"{study.steps} steps; probed by `{study.task}`.",
                  "\n".join(["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|", *rows]),
                  "\n".join(f"- `{s.recipe}`: {catalogued[s.recipe]['follows']}. Held against: {s.value}." for s in mine)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of systems; none: all")
    parser.add_argument("--data", type=Path, help="the folder that holds the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/systems"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        TABLE.write_text(table())
        return
    for system in map(System.read, given.names or names()):
        file = FIGURES / f"{system.name}.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        found = {"seconds": timed(system, given)} if given.time else measure(system, given)
        print(json.dumps({"benchmark": "systems", **found}), flush=True)
        if given.steps is None:
            file.write_text(json.dumps({**before, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
