"""The verbs: what the command line offers, as functions. Each imports its own parts: no run waits for those of another."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meristem.catalogue import names as recipe_names
from meristem.errors import DataError, RecipeError
from meristem.modalities.base import modality_class
from meristem.platform import recipe as recipes
from meristem.platform.data.guess import guess_modality
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.shards.remote import is_url
from meristem.platform.data.source import ROOM, Data, open_data
from meristem.platform.origin import METADATA, SCRATCH, origin
from meristem.platform.step import first_rank
from meristem.platform.training import checkpoint

if TYPE_CHECKING:
    from meristem.platform.benching.results import Bench
    from meristem.platform.data.findings import Intake
    from meristem.platform.data.shards.write import Written
    from meristem.platform.training.loop import Outcome
    from meristem.tasks import transfer
    from meristem.tasks.finetune import Tuned

__all__ = ["adopt", "bench", "check_data", "embed", "evaluate", "export", "finetune", "guess_modality", "predict", "pretrain",
           "recipe_names", "report", "shard_data", "show_recipe"]

Pathlike = str | Path
SIZE = 256.0  # MB of a shard


def _modality(named: str, data: Pathlike, overrides: Sequence[str], init: Path | None = None) -> str:
    """Of which kind the data is: what the recipe or task itself says, or the overrides; else what the run it starts from was
    trained on, where that reads any of the data; else a guess.
    """
    plain = recipes.read(named) if _is_recipe(named) else {}
    said = recipes.override(plain, overrides).get("modality")
    if isinstance(said, str):
        return said
    if isinstance(said, Mapping) and len(said) == 1:
        return str(next(iter(said)))
    if is_url(data):
        from meristem.platform.data.shards import index

        return index.kind(str(data))
    if init is not None:
        kind = modality_class(checkpoint.read_card(init)["modality"])
        try:
            Manifest.discover(data, kind(kind.Options()))
            return kind.name
        except DataError as error:
            if error.reason != "empty":
                raise
    return guess_modality(data)


def _is_recipe(name: str) -> bool:
    """Whether this names one recipe, and not a method or task of every modality."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def pretrain(recipe: str, data: Pathlike | Mapping[str, Pathlike], out: Pathlike, overrides: Sequence[str] = (), *,
             init: str = SCRATCH, split: str = "auto", cache: Path | None = None, room: float = ROOM, resume: bool = False,
             quiet: bool = False) -> Outcome:
    """Learn an encoder from unlabelled data into the run directory `out`.

    recipe: a name (`volume/mae`, or `mae` where the data's files say which modality) or a YAML file. data: a folder, an MSD or
    nnU-Net dataset, a CSV, a list of paths and labels, a MedMNIST npz or the URL of shards (`shard_data`); for a joint recipe
    (`joint/mae`) such a place for each member that takes part; only rows of the training split are seen. overrides:
    `key.sub=value`. init: a pretraining run whose encoder this one goes on from, as the second stage of a method does, or
    `scratch`. split: `auto` (the data's own, else 60/20/20 by patient; data without any label all trains), fractions
    `0.6,0.2,0.2`, `every:5:1`: fold 1 of 5 (0 to 4) tests, the next validates; folds share no subject; or `fold:1` of those
    that the data declares (`fold:1:only`: none validates). cache: where decoded samples are kept (None: the user's cache).
    room: GB of it for fetched shards. resume: go on from the newest checkpoint in `out`, exactly.
    Returns the weights and figures; writes recipe.yaml, metrics.jsonl, metrics.json, quarantine.csv and checkpoints.
    Under torchrun every process calls it alike. Raises MeristemError.
    """
    from meristem.platform.training.pretrain import pretrain as _pretrain

    quiet, start = quiet or not first_rank(), origin(init)
    if isinstance(data, Mapping):
        if start is not None:
            raise RecipeError("a joint run starts from random weights", "Leave --init out.")
        return _pretrain_jointly(recipe, data, out, overrides, split, cache, room, resume, quiet)
    if not _is_recipe(recipe):
        recipe = f"{_modality(recipe, data, overrides)}/{recipe}"
    plain = recipes.override(recipes.read(recipe), overrides)
    if "members" in plain:
        raise RecipeError(f"'{recipe}' is a joint recipe: it wants data for each member that takes part",
                          f"Give --data several times: {' '.join(f'--data {m}=…' for m in plain['members'])}.")
    if not plain.get("objectives"):
        remedy = "Use `meristem finetune`." if "task" in plain else "Choose one of `meristem recipes list`."
        raise RecipeError(f"'{recipe}' has no objective to pretrain by", remedy)
    settings = recipes.build(plain, recipes.Recipe)
    found = open_data(data, settings.modality, split, cache, quiet, room=room)
    return _pretrain(settings.of(found.modality), found, Path(out), init=start, resume=resume, quiet=quiet)


def _pretrain_jointly(recipe: str, data: Mapping[str, Pathlike], out: Pathlike, overrides: Sequence[str], split: str,
                      cache: Path | None, room: float, resume: bool, quiet: bool) -> Outcome:
    from meristem.platform import joint
    from meristem.platform.training.joint import pretrain as _pretrain

    plain = recipes.override(recipes.read(recipe), overrides)
    if "members" not in plain:
        raise RecipeError(f"'{recipe}' is a recipe of one kind of data, and data of {len(data)} were named",
                          "Use joint/mae, or give one --data without a name.")
    settings = joint.build(plain, list(data))
    found = {name: open_data(place, settings.members[name].recipe.modality, split, cache, quiet, room=room)
             for name, place in data.items()}
    members = {name: m.model_copy(update={"recipe": m.recipe.of(found[name].modality)}) for name, m in settings.members.items()}
    settings = settings.model_copy(update={"members": members})
    return _pretrain(settings, found, Path(out), resume=resume, quiet=quiet)


def bench(recipe: str, data: Pathlike | None = None, overrides: Sequence[str] = (), *, steps: int = 20,
          sweep: Sequence[str] = (), out: Pathlike | None = None, split: str = "auto", cache: Path | None = None,
          quiet: bool = False) -> Bench:
    """What a pretraining recipe costs on this machine and data, what bounds it, and what to set before a long run.

    recipe, data, overrides, split, cache: as in `pretrain`. steps: that each measurement takes, fewer where they are slow.
    sweep: what to grow made input by (size, frames, points, nodes, batch, as the modality has them; `all`), which needs no
    data: without `data` nothing else is measured. `train.compile=true` compares compiled and uncompiled. out: a directory for
    bench.json, bench.html and the figures; nothing else is written. Raises MeristemError.
    """
    from meristem.platform.benching import bench as benching
    from meristem.platform.benching.results import Bench
    from meristem.platform.benching.sweep import chosen
    from meristem.platform.benching.sweep import sweep as grow
    from meristem.platform.benching.voice import telling
    from meristem.platform.report import bench as pages

    if data is None and not sweep:
        raise RecipeError("there is nothing to measure", "Give --data, or --sweep, which makes its own input.")
    if not _is_recipe(recipe):
        if data is None:
            raise RecipeError(f"'{recipe}' is a method of several kinds of data", f"Name one, e.g. volume/{recipe}.")
        recipe = f"{_modality(recipe, data, overrides)}/{recipe}"
    plain = recipes.override(recipes.read(recipe), overrides)
    if "members" in plain or not plain.get("objectives"):
        raise RecipeError(f"'{recipe}' {'is a joint recipe' if 'members' in plain else 'has no objective to pretrain by'}",
                          "Bench measures recipes of one kind of data; choose one of `meristem recipes list`.")
    settings = recipes.build(plain, recipes.Recipe)
    grown = chosen(settings, sweep)
    training = None
    if data is not None:
        found = open_data(data, settings.modality, split, cache, quiet)
        settings = settings.of(found.modality)
    with telling(quiet) as say:
        if data is not None:
            training = benching.bench(settings, found, steps, say)
        sweeps = tuple(grow(settings, axis, steps, say) for axis in grown)
    made = Bench({"name": settings.name, "modality": settings.modality.name, "hash": settings.hash}, benching.machine(),
                 training, sweeps)
    if out is not None:
        pages.write(made, Path(out))
    return made


def finetune(task: str, data: Pathlike, out: Pathlike, overrides: Sequence[str] = (), *, init: str = SCRATCH,
             labels: str = "all", train_on: Sequence[str] = ("train",), split: str = "auto", cache: Path | None = None,
             room: float = ROOM, resume: bool = False, quiet: bool = False) -> Tuned:
    """Grow a task head on an encoder, and score it on the labelled samples of the test split.

    task: `segmentation`, `classification` or `detection`, or a recipe name or YAML file: these say of which
    modality the data is; else the run of `init` does, where it reads any of the data, else the files. init: a pretraining run,
    whose modality and encoder settings are taken over, or `scratch`. labels: labelled subjects to use, as a count, a fraction
    or `all`. train_on: splits to learn from; validation subjects join once nothing is tuned on them any more. The rest as in
    `pretrain`. Writes metrics.json (key `test`) and cases.json beside the checkpoints; a run that was asked to stop is saved
    and not scored, and resume=True goes on with it. Raises MeristemError.
    """
    from meristem.tasks import finetune as tuning

    quiet = quiet or not first_rank()
    start = origin(init)
    settings = tuning.resolve(task, _modality(task, data, overrides, start), overrides, start)
    found = open_data(data, settings.modality, split, cache, quiet, room=room)
    return tuning.finetune(settings.of(found.modality), found, Path(out), init=start, labels=labels, train_on=train_on,
                           resume=resume, quiet=quiet)


def evaluate(task: str, data: Pathlike, out: Pathlike, overrides: Sequence[str] = (), *, inits: Sequence[str],
             labels: Sequence[str] = ("all",), seeds: int = 3, protocols: Sequence[str] = (), split: str = "auto",
             cache: Path | None = None, room: float = ROOM, jobs: int | None = None, quiet: bool = False) -> Path:
    """Compare encoders by what they are worth to a task; returns the page of the transfer report.

    task: as in `finetune`, `propagation` or `keypoints`. inits: pretraining runs; `metadata` is what files say before any
    pixel. Each network among them gets an arm from random weights, of its own settings. labels: budgets as in
    `finetune`. seeds: draws of labels and trainings per cell. protocols: ways to train on labels (finetune, frozen, warmup,
    sawtooth, lora), and those the task has (classification: attentive, linear, svm, knn; or few-shot or retrieval alone).
    split: as in `pretrain`; evaluations of all folds, into a directory each, can be pooled by `report`. jobs: processes that
    share the grid; None: one for each GPU. Finished cells stay in `out`/cells: the same call goes on where one was stopped.
    Raises MeristemError, before any training where it can.
    """
    import torch

    from meristem.tasks import pages, transfer
    from meristem.tasks.parallel import in_parallel

    quiet = quiet or not first_rank()
    jobs = jobs or max(torch.cuda.device_count(), 1)
    entrants = _entrants(task, data, overrides, inits, split, cache, room, quiet)
    alone = jobs == 1 or "WORLD_SIZE" in os.environ  # torchrun has its own processes
    asked = (task, data, out, overrides, inits, labels, seeds, protocols, split, cache, room)
    others = None if alone else partial(in_parallel, _share, jobs, asked, quiet)
    transfer.evaluate(entrants, Path(out), labels, seeds, protocols, quiet, others=others)
    if not first_rank():
        return Path(out) / "report.html"
    pages.gather(Path(out), entrants)
    return pages.report([Path(out)], Path(out))


def _entrants(task: str, data: Pathlike, overrides: Sequence[str], inits: Sequence[str], split: str, cache: Path | None,
              room: float, quiet: bool) -> list[transfer.Entrant]:
    """Every arm's recipe and data. Those without a run are like the first run."""
    from meristem.tasks import finetune as tuning
    from meristem.tasks import transfer

    runs = [init for init in inits if init not in (SCRATCH, METADATA)]
    kind = _modality(task, data, overrides, Path(runs[0]) if runs else None)
    opened: dict[str, Data] = {}
    found: dict[str, transfer.Entrant] = {}
    for init in runs or [SCRATCH]:
        settings = tuning.resolve(task, kind, overrides, origin(init))
        options = settings.modality.options.model_dump_json()
        if options not in opened:
            opened[options] = open_data(data, settings.modality, split, cache, quiet, room=room)
        found[init] = transfer.Entrant(init, settings.of(opened[options].modality), opened[options])
    first = next(iter(found.values()))
    return [found.get(init) or replace(first, init=init) for init in inits]


def _share(share: transfer.Share, task: str, data: Pathlike, out: Pathlike, overrides: Sequence[str], inits: Sequence[str],
           labels: Sequence[str], seeds: int, protocols: Sequence[str], split: str, cache: Path | None, room: float,
           quiet: bool) -> None:
    from meristem.tasks import transfer

    entrants = _entrants(task, data, overrides, inits, split, cache, room, True)
    transfer.evaluate(entrants, Path(out), labels, seeds, protocols, quiet, share)


def report(directories: Sequence[Pathlike], out: Pathlike | None = None, *, folds: bool = False,
           against: Pathlike | None = None) -> Path:
    """The transfer report of one or several evaluations, or the difference page of two; returns the page.

    out: where the page goes; None: the first directory. folds: the directories are evaluations of disjoint test folds
    (`--split every:5:0` … `every:5:4`) and become one, in which every subject was tested once; `out` must then be another
    directory, which holds results.json, pictures and logs like any evaluation. against: an earlier report; `directories` then
    is the later one, and difference.html tells what changed. Raises MeristemError.
    """
    from meristem.tasks import pages

    paths = [Path(d) for d in directories]
    if against is not None:
        if len(paths) > 1 or folds:
            raise RecipeError("an earlier report is compared with one later one",
                              "`meristem report AFTER --against BEFORE`; put several evaluations on one page first.")
        return pages.difference(Path(against), paths[0], Path(out) if out else paths[0])
    return pages.report(paths, Path(out) if out else paths[0], folds)


def adopt(weights: Pathlike, modality: str, out: Pathlike, overrides: Sequence[str] = ()) -> checkpoint.LoadReport:
    """Make weights that were trained elsewhere a run, for `finetune`, `evaluate`, `embed`, `export` and `pretrain`'s `init`.

    weights: a .safetensors file, or a state dict that torch saved: of timm (encoder.timm.model says which), of MONAI
    (segresnet, swin), or any whose names end as the encoder's do. modality: image, volume, …; overrides: what the weights
    were trained with, of encoder and modality (`encoder.timm.model=vit_small_patch14_dinov2`,
    `modality.image={patch: 14, normalise: imagenet}`), and `name=`, for reports. Tells the fate of every tensor.
    What the weights have met is unknown, and reports say so. Raises MeristemError.
    """
    from meristem.platform.training.adopt import adopt as _adopt

    plain = recipes.override(recipes.read(f"{modality}/base"), ["name=adopted", *overrides])
    return _adopt(recipes.build(plain, recipes.Recipe), Path(weights), Path(out))


def predict(checkpoint_: Pathlike, data: Pathlike, out: Pathlike, *, quiet: bool = False) -> list[Path]:
    """Predict every readable sample; a file that cannot be read is named in quarantine.csv and counted.

    checkpoint_: a fine-tuned run. Segmentation writes a label file per sample on its source grid, under its own name (in
    sub-folders where names repeat), and of a DICOM series a DICOM SEG beside the NIfTI file, with the patient's identity as the
    archive wants it; classification writes predictions.csv; detection writes predictions.json, as annotations
    of such data are (COCO of images). Labels in `data` are not looked at.
    Returns the files written. Raises MeristemError.
    """
    import torch

    from meristem.tasks import transfer
    from meristem.tasks.base import objective

    assembly, settings, scope = transfer.reload(Path(checkpoint_))
    if torch.cuda.is_available():
        assembly = assembly.cuda()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".reading-") as folder:
        found = open_data(data, settings.modality, "auto", Path(folder), quiet, labels=False)
        lost = len(found.cache.quarantine)
        written = objective(assembly).write(assembly, found, found.rows(), scope, out)
    if found.cache.quarantine:
        found.cache.write_quarantine(out / "quarantine.csv")
    if not quiet:
        less = len(found.cache.quarantine) - lost
        told = f"; {less} without a DICOM SEG: quarantine.csv says why" if less else ""
        print(f"{len(found.rows())} samples predicted{told}", file=sys.stderr)
    return written


def embed(checkpoint_: Pathlike, data: Pathlike, out: Pathlike, *, quiet: bool = False) -> Path:
    """One vector per sample, of the encoder that transfers (the teacher's, where the recipe says so).

    Writes and returns `out`/embeddings.npz: embedding (n, D) float32, case and subject (pseudonyms) in the order of the files.
    Labels in `data` are not looked at. Raises MeristemError.
    """
    import numpy as np
    import torch

    from meristem.platform.training.restore import restored
    from meristem.tasks.embedding import embed as _embed

    assembly = restored(Path(checkpoint_))
    if torch.cuda.is_available():
        assembly = assembly.cuda()
    found = open_data(data, assembly.recipe.modality, "auto", None, quiet, labels=False)
    rows = found.rows()
    path = Path(out) / "embeddings.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    if found.cache.quarantine:
        found.cache.write_quarantine(path.parent / "quarantine.csv")
    vectors = _embed(assembly, found, rows)
    np.savez_compressed(path, embedding=vectors, case=[r.case for r in rows], subject=[r.subject for r in rows])
    return path


def export(checkpoint_: Pathlike, out: Pathlike, form: str = "torch", size: Sequence[int] | None = None) -> Path:
    """Write the encoder of a run that transfers into a new folder, for others to read; returns the folder.

    form: `torch` (a program for torch.export.load), `onnx`, `timm` (weights of a timm model, where the encoder is one) or
    `monai` (a bundle). size: of the arrays that it will be given; None: of the recipe's first view. about.json says how arrays
    are normalised and what comes out. Raises MeristemError.
    """
    from meristem.platform.export import export as _export

    return _export(Path(checkpoint_), Path(out), form, size)


def check_data(path: Pathlike, modality: str | None = None, out: Pathlike | None = None, *, quiet: bool = True) -> Intake:
    """Read every file as training would, and tell what is in it, what is wrong and what is doubtful.

    modality: None to guess it, as a bare task name does. out: a directory for check.html and check.json, which hold
    pseudonyms only. Raises DataError where there is no data.
    """
    from meristem.platform.data import check as checking
    from meristem.platform.data.bar import counting
    from meristem.platform.report import intake

    kind = modality_class(modality or guess_modality(path))
    with counting("reading files", quiet) as progress:
        found = checking.check(path, kind(kind.Options()), progress=progress)
    if out is not None:
        intake.write(found, Path(out))
    return found


def shard_data(path: Pathlike, url: str, overrides: Sequence[str] = (), *, recipe: str | None = None, size: float = SIZE,
               cache: Path | None = None, workers: int = 0, quiet: bool = False) -> Written:
    """Decode samples as training would, and write them as shards that `pretrain` and the other verbs stream from a URL.

    path: as `data` of `pretrain`. url: a folder of any file system that fsspec knows (s3://, gs://, file://). recipe: the one
    that they are for, whose `modality` says how files are read; None: that of the data's kind. overrides:
    `modality.volume.spacing=[1,1,1]`; whoever streams must want the same. size: MB of a shard. cache: a folder for one shard at
    a time, and the hashes of files. workers: processes that decode.
    The same call goes on where one was stopped. Shards hold pseudonyms and no name of any file. Raises MeristemError.
    """
    from meristem.platform.data.bar import counting
    from meristem.platform.data.shards.write import write

    named = recipe or f"{_modality('', path, overrides)}/base"
    settings = recipes.build(recipes.override(recipes.read(named), overrides), recipes.Recipe)
    with counting("writing shards", quiet) as progress:
        return write(Path(path), settings.modality, str(url), round(size * 1e6), cache, progress, workers)


def show_recipe(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe with every key, its hash, its size, and the passes of one step, made on noise."""
    from meristem.tasks.inspection import inspect

    return inspect(name, overrides)
