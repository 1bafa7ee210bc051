"""What the transfer report shows of an evaluation: slices, reconstructions and curves, gathered and handed to the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from meristem.modalities.base import Header
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import whole
from meristem.platform.data.source import Data
from meristem.platform.evaluation.results import Results
from meristem.platform.masked.objective import MaskedObjective
from meristem.platform.objectives import Items
from meristem.platform.recipe import Recipe, build
from meristem.platform.report.figures import Curve
from meristem.platform.report.page import write_report
from meristem.platform.report.pictures import Overlay, Pictures, Reconstruction, Slice, pick_cases, pick_slice
from meristem.platform.step import Batch, Step
from meristem.platform.training import checkpoint
from meristem.tasks.transfer import arms

SHOWN = 4  # reconstructions of each masked run


def report(directories: Sequence[Path], out: Path) -> Path:
    """Write the page of one or several evaluated directories. Raises MeristemError when one holds no results."""
    several = [Results.load(directory / "results.json") for directory in directories]
    files = [directory / "pictures.npz" for directory in directories]
    pictures = [Pictures.load(file) if file.is_file() else Pictures() for file in files]
    out.mkdir(parents=True, exist_ok=True)
    curves = [_curves(directory, results.arms) for directory, results in zip(directories, several, strict=True)]
    return write_report(several, pictures, curves, out)


def gather(directory: Path, data: Data, inits: Sequence[Path]) -> None:
    """Make the pictures of a finished evaluation and keep them beside its results; copy the pretraining logs."""
    results = Results.load(directory / "results.json")
    pretrained = {arm.name: arm.init for arm in arms([str(init) for init in inits]) if arm.init is not None}
    shown = [replace(picture, label=name) for name, init in pretrained.items() for picture in reconstructions(init, data)]
    overlays = _overlays(directory, results, data) if results.kind == "segmentation" else []
    Pictures(shown, overlays).save(directory / "pictures.npz")
    logs = directory / "logs"
    logs.mkdir(exist_ok=True)
    for name, init in pretrained.items():
        log = init / "metrics.jsonl"
        if log.is_file():
            (logs / f"pretraining {name}.jsonl").write_text(log.read_text())


def _curves(directory: Path, shown: Sequence[str]) -> list[Curve]:
    """The logs of the arms that are shown; a directory may hold those of an earlier evaluation too."""
    found = []
    for log in sorted((directory / "logs").glob("*.jsonl")):
        stage, _, arm = log.stem.partition(" ")
        arm, _, labels = arm.removesuffix(" labels").partition(", ")
        if arm in shown:
            found.append(Curve(stage, arm, [json.loads(line) for line in log.read_text().splitlines()], labels))
    return found


def _visible(array: np.ndarray, header: Header, plane: Slice) -> np.ndarray:
    """A plane of a stored array (C, *S) as a picture: (H, W, 3) with three channels, else the first."""
    each = (-1, *(1,) * (array.ndim - 1))
    values = array * np.array(header.scale).reshape(each) + np.array(header.offset).reshape(each)
    return plane.of(_picture(values))


def _picture(values: np.ndarray) -> np.ndarray:
    """(C, *S) -> (*S, 3) scaled to 0…1, or the first channel."""
    if len(values) != 3:
        first: np.ndarray = values[0]
        return first
    low, high = np.nanmin(values), np.nanmax(values)
    scaled: np.ndarray = np.moveaxis((values - low) / max(high - low, 1e-12), 0, -1)
    return scaled


def _overlays(directory: Path, results: Results, data: Data) -> list[Overlay]:
    """Worst, median and best case at the fewest labels, as the first seed's models of every arm drew them."""
    cells = [c for c in results.cells if c.protocol == "finetune" and c.seed == 0]
    if not cells:
        return []
    fewest = min(cells, key=lambda c: c.labelled_subjects).labels
    maps = {}
    for cell in cells:
        file = directory / "pictures" / f"{cell.arm}, {cell.labels} labels.npz"
        if cell.labels == fewest and file.is_file():
            with np.load(file, allow_pickle=False) as stored:
                maps[cell.arm] = {name: stored[name] for name in stored.files}
    rows = {row.case: row for row in data.manifest.rows}
    found = []
    for rank, case in pick_cases(results, "finetune", fewest).items():
        if case not in rows or any(case not in drawn for drawn in maps.values()):
            continue
        row = rows[case]
        header, truth = data.cache.header(row.index), data.cache.field(row.index, "mask")
        plane = pick_slice(truth, header.spacing)
        scores = {c.arm: float(np.mean(list(next(x for x in c.cases if x.case == case).metrics[results.metric].values())))
                  for c in cells if c.labels == fewest}
        found.append(Overlay(case, rank, _visible(data.cache.array(row.index), header, plane), plane.of(truth),
                             {arm: plane.of(drawn[case]) for arm, drawn in maps.items()}, scores, plane.aspect))
    return found


@torch.no_grad()
def reconstructions(init: Path, data: Data) -> list[Reconstruction]:
    """What a masked run fills in on test samples it has not seen; none for a run without a masked objective."""
    card = checkpoint.read_card(init)
    recipe = build({k: v for k, v in card["recipe"].items() if k not in ("task", "probe")}, Recipe)
    assembly = Assembly(recipe)
    masked = next((o for o in assembly.objectives.values() if isinstance(o, MaskedObjective)), None)
    rows = (data.rows("test") or data.rows())[:SHOWN]
    if masked is None or card["kind"] != "pretraining" or recipe.modality.options != data.modality.options:
        return []
    assembly.load_state_dict(checkpoint.read_weights(init))
    assembly.eval()
    views = {}
    for name, options in recipe.views.items():
        plain = options.plain()
        views[name] = recipe.modality.augment(whole(data.cache, rows, recipe.modality, plain), plain)
        views[name].name = name
    index = torch.tensor([row.index for row in rows])
    drawn = masked.reconstruct(Step(assembly, Batch(Items(index, index), views), 1.0, 0))
    if not drawn:
        return []
    found: list[Reconstruction] = []
    for original, hidden, filled in zip(*(drawn[k].float().numpy() for k in ("original", "masked", "prediction")), strict=True):
        plane = pick_slice(np.zeros(original.shape[1:], np.uint8), data.cache.header(rows[len(found)].index).spacing)
        if original.ndim == 3:
            plane = Slice(None, 0, 1.0)
        original, hidden, filled = (plane.of(_picture(x)) for x in (original, hidden, filled))
        found.append(Reconstruction(original, hidden, filled, plane.aspect, recipe.name))
    return found

