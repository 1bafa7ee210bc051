"""The verbs: what the command line offers, as functions."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meristem.catalogue import names as recipe_names
from meristem.errors import DataError, MeristemError
from meristem.modalities.base import modalities, modality_class
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.data import check as checking
from meristem.platform.data.source import open_data
from meristem.platform.training import checkpoint
from meristem.platform.training.loop import Outcome
from meristem.platform.training.pretrain import pretrain as _pretrain
from meristem.tasks import finetune as tuning
from meristem.tasks import pages, transfer
from meristem.tasks.base import objective
from meristem.tasks.embedding import embed as _embed
from meristem.tasks.inspection import inspect

__all__ = ["check_data", "embed", "evaluate", "finetune", "guess_modality", "predict", "pretrain", "recipe_names", "report",
           "show_recipe"]

Pathlike = str | Path


def guess_modality(path: Pathlike) -> str:
    """The installed modality that reads most files of a data set. Raises DataError when none reads any."""
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError("missing", f"no data at {root}", "Give an existing folder, CSV, dataset.json, npz or data file.")
    if root.suffix.lower() == ".npz":
        return "image"
    if root.suffix.lower() == ".csv":
        files = root.read_text(errors="replace").lower().replace("\n", ",").split(",")
    else:
        folder = root.parent if root.suffix == ".json" else root
        files = [f.name.lower() for f in folder.rglob("*")] if folder.is_dir() else [root.name.lower()]
    counts = Counter({name: sum(f.strip().strip('"').endswith(tuple(modality_class(name).suffixes)) for f in files)
                      for name in modalities()})
    if not files or counts.most_common(1)[0][1] == 0:
        if any(f.endswith(".npz") for f in files):
            return "image"
        known = ", ".join(sorted({s for name in modalities() for s in modality_class(name).suffixes}))
        raise DataError("empty", f"no file of a known kind in {root}", f"Known: {known}.")
    return counts.most_common(1)[0][0]


def pretrain(recipe: str, data: Pathlike, out: Pathlike, overrides: Sequence[str] = (), *, split: str = "auto",
             cache: Path | None = None, resume: bool = False, quiet: bool = False) -> Outcome:
    """Learn an encoder from unlabelled data into the run directory `out`.

    recipe: a name (`volume/mae`, or `mae` where the data says which modality) or a YAML file. overrides: `key.sub=value`.
    """
    if "/" not in recipe and not recipe.endswith((".yaml", ".yml")):
        recipe = f"{guess_modality(data)}/{recipe}"
    settings = recipes.load(recipe, overrides)
    if not settings.objectives:
        raise MeristemError(f"'{recipe}' has no objective to pretrain by", "Choose one of `meristem recipes list`.")
    found = open_data(Path(data), settings.modality, split, cache, quiet)
    return _pretrain(settings, found, Path(out), resume=resume, quiet=quiet)


def finetune(task: str, data: Pathlike, out: Pathlike, overrides: Sequence[str] = (), *, init: str = tuning.SCRATCH,
             labels: str = "all", split: str = "auto", cache: Path | None = None, resume: bool = False,
             quiet: bool = False) -> tuning.Tuned:
    """Grow a task head on an encoder and score it on the test split."""
    start = None if init == tuning.SCRATCH else Path(init)
    settings = tuning.resolve(task, guess_modality(data), overrides, start)
    return tuning.finetune(settings, open_data(Path(data), settings.modality, split, cache, quiet), Path(out), init=start,
                           labels=labels, resume=resume, quiet=quiet)


def evaluate(task: str, data: Pathlike, out: Pathlike, overrides: Sequence[str] = (), *, inits: Sequence[str],
             labels: Sequence[str] = ("all",), seeds: int = 3, protocols: Sequence[str] = ("finetune",), split: str = "auto",
             cache: Path | None = None, quiet: bool = False) -> Path:
    """Compare encoders; returns the page of the transfer report. All arms share the first checkpoint's architecture."""
    first = next((Path(init) for init in inits if init != tuning.SCRATCH), None)
    settings = tuning.resolve(task, guess_modality(data), overrides, first)
    found = open_data(Path(data), settings.modality, split, cache, quiet)
    transfer.evaluate(settings, found, Path(out), inits, labels, seeds, protocols, quiet)
    pages.gather(Path(out), found, [Path(i) for i in inits if i != tuning.SCRATCH])
    return pages.report([Path(out)], Path(out))


def report(directories: Sequence[Pathlike], out: Pathlike | None = None) -> Path:
    """The transfer report of one or several evaluations."""
    paths = [Path(d) for d in directories]
    return pages.report(paths, Path(out) if out else paths[0])


def predict(checkpoint_: Pathlike, data: Pathlike, out: Pathlike, *, quiet: bool = False) -> list[Path]:
    """Predict every readable sample; a file that cannot be read is named in quarantine.csv and counted."""
    assembly, settings, scope = transfer.reload(Path(checkpoint_))
    if torch.cuda.is_available():
        assembly = assembly.cuda()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".reading-") as folder:
        found = open_data(Path(data), settings.modality, "auto", Path(folder), quiet, labels=False)
        written = objective(assembly).write(assembly, found, found.rows(), scope, out)
    if found.cache.quarantine:
        found.cache.write_quarantine(out / "quarantine.csv")
    if not quiet:
        print(f"{len(found.rows())} samples predicted into {out}", file=sys.stderr)
    return written


def embed(checkpoint_: Pathlike, data: Pathlike, out: Pathlike, *, quiet: bool = False) -> Path:
    """One vector per sample, of the transferable encoder: `embeddings.npz` with embedding (n, D), case and subject."""
    card = checkpoint.read_card(Path(checkpoint_))
    settings = recipes.build({k: v for k, v in card["recipe"].items() if k not in ("task", "probe")}, recipes.Recipe)
    assembly = Assembly(settings.model_copy(update={"objectives": {}, "teacher": None}))
    checkpoint.load_encoder(Path(checkpoint_), assembly.encoder, settings.modality, settings.encoder.sees)
    if torch.cuda.is_available():
        assembly = assembly.cuda()
    found = open_data(Path(data), settings.modality, "auto", None, quiet)
    rows = found.rows()
    path = Path(out) / "embeddings.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    vectors = _embed(assembly, found, rows)
    np.savez_compressed(path, embedding=vectors, case=[r.case for r in rows], subject=[r.subject for r in rows])
    return path


def check_data(path: Pathlike, modality: str | None = None) -> checking.Report:
    """Read every file as training would, and name each problem."""
    kind = modality_class(modality or guess_modality(path))
    return checking.check(path, kind(kind.Options()))


def show_recipe(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe with every key, its hash, its size, and the passes of one step, made on noise."""
    return inspect(name, overrides)
