"""What the transfer report shows of an evaluation: pictures, reconstructions, attention and curves, gathered for the page.

Samples whose first axis is time are shown as strips of frames, others as one slice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from meristem.errors import DataError, MeristemError
from meristem.modalities.base import Draw, Header, View
from meristem.modalities.stream import LatticeStream
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import loader, whole
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.evaluation.detection import Detections
from meristem.platform.evaluation.folds import pooled
from meristem.platform.evaluation.results import Cell, Results
from meristem.platform.masked.objective import MaskedObjective
from meristem.platform.objectives import Encoded, Items
from meristem.platform.recipe import TASK_ONLY, Recipe, build
from meristem.platform.report.difference import read as read_report
from meristem.platform.report.difference import write_difference
from meristem.platform.report.figures import Curve, found_of
from meristem.platform.report.page import write_report
from meristem.platform.report.pictures import (
    Attention,
    Cloud,
    Overlay,
    Pictures,
    Rank,
    Reconstruction,
    Scene,
    Slice,
    Strip,
    pick_cases,
    pick_samples,
    pick_slice,
    sample_groups,
)
from meristem.platform.step import Batch, Step
from meristem.platform.training import checkpoint
from meristem.tasks import features
from meristem.tasks.looks import POINTS, picture, spread, thin, timed, varied
from meristem.tasks.probing import untrained
from meristem.tasks.propagation import Keypoints, dots, points_of
from meristem.tasks.transfer import Arm, Entrant, arms
from meristem.tasks.ways import kept

SHOWN = 4  # reconstructions of each masked run
ATTENDED = 3  # samples whose attention is shown
SEEN = 20_000  # points from above


def report(directories: Sequence[Path], out: Path, folds: bool = False) -> Path:
    """Write the page of one or several evaluated directories. Raises MeristemError when one holds no results.

    folds: they are the folds of one evaluation; `out` becomes an evaluated directory of them all.
    """
    if folds:
        _pool(directories, out)
        directories = [out]
    several = [Results.load(directory / "results.json") for directory in directories]
    files = [directory / "pictures.npz" for directory in directories]
    pictures = [Pictures.load(file) if file.is_file() else Pictures() for file in files]
    out.mkdir(parents=True, exist_ok=True)
    curves = [_curves(directory, results.arms) for directory, results in zip(directories, several, strict=True)]
    return write_report(several, pictures, curves, out)


def difference(before: Path, after: Path, out: Path) -> Path:
    """Write the difference page of two directories that hold a report or an evaluation. Raises MeristemError."""
    return write_difference(read_report(before), read_report(after), out)


def _pool(directories: Sequence[Path], out: Path) -> None:
    """Keep the pooled results of folds, their pictures, and the first one's logs.

    The extreme cases of all are extreme in their fold too, so that they were drawn there; the median of all seldom was.
    """
    if len(directories) < 2 or out.resolve() in [directory.resolve() for directory in directories]:
        raise MeristemError("folds are pooled from two evaluated directories or more into another one",
                            "`meristem report FOLD-0 FOLD-1 … --folds --out POOLED`.")
    pool = pooled([Results.load(directory / "results.json") for directory in directories])
    out.mkdir(parents=True, exist_ok=True)
    pool.save(out / "results.json")
    found = [Pictures.load(file) for directory in directories if (file := directory / "pictures.npz").is_file()]
    if found:
        protocol = pool.cells[0].protocol
        fewest = min((c for c in pool.cells if c.protocol == protocol), key=lambda c: c.labelled_subjects).labels
        overlays = [overlay for each in found for overlay in each.overlays]
        scenes = [scene for each in found for scene in each.scenes]
        picked = pick_cases(pool, protocol, fewest) if overlays or scenes else {}
        replace(found[0], overlays=[o for o in overlays if o.case == picked[o.rank]],
                scenes=[s for s in scenes if s.case == picked[s.rank]],
                strips=[strip for each in found for strip in each.strips]).save(out / "pictures.npz")
    if (directories[0] / "logs").is_dir():
        shutil.copytree(directories[0] / "logs", out / "logs", dirs_exist_ok=True)


def gather(directory: Path, entrants: Sequence[Entrant]) -> None:
    """Make the pictures of a finished evaluation and keep them beside its results; copy the pretraining logs."""
    results, data, contestants = Results.load(directory / "results.json"), entrants[0].data, arms(entrants)
    pretrained = {arm.name: arm.init for arm in contestants if arm.init is not None}
    shown = [replace(found, label=name) for name, init in pretrained.items() for found in reconstructions(init, data)]
    overlays = _overlays(directory, results, data) if results.kind in ("segmentation", "propagation") else []
    points = _clouds(directory, results, data) if results.kind in ("parts", "semantic") else []
    strips = _strips(results, data) if timed(data.modality) else []
    seen = attentions(contestants) if timed(data.modality) else []
    scenes = _scenes(results, data) if results.kind == "detection" else []
    Pictures(shown, overlays, strips, seen, points, scenes, *features.gather(contestants)).save(directory / "pictures.npz")
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
    return plane.of(picture(values))


def _frames(values: np.ndarray, places: Sequence[int], header: Header) -> np.ndarray:
    """Frames of normalised values (C, T, H, W) as they are stored: (n, H, W, 3) or (n, H, W), thinned."""
    each = (-1, 1, 1, 1)
    stored = (values[:, list(places)] - np.array(header.offset).reshape(each)) / np.array(header.scale).reshape(each)
    return picture(thin(stored)).astype(np.float32)


def _stored(data: Data, row: Row, places: Sequence[int]) -> tuple[np.ndarray, tuple[float, ...]]:
    """Whole stored frames (n, H, W[, 3]) at some places and their seconds."""
    header = data.cache.header(row.index)
    size = header.shape[2:]
    draw = Draw((0, 0, 0), (len(places), *size), (len(places), *size), index=tuple(places))
    (window,) = data.cache.windows(row.index, [draw])
    return picture(thin(window)), tuple(header.affine[0][0] * i + header.affine[0][3] for i in places)


def _strips(results: Results, data: Data) -> list[Strip]:
    """Frames over the whole of every sample that a contact sheet shows."""
    rows = {row.case: row for row in data.rows()}
    chosen = {group.cases[i]: None for group in sample_groups(results).values()
              for places in pick_samples(group).values() for i in places}
    found = []
    for case in (case for case in chosen if case in rows):
        header = data.cache.header(rows[case].index)
        shown, times = _stored(data, rows[case], spread(0, header.shape[1] - 1))
        found.append(Strip(case, shown, times, header.spacing[1] / header.spacing[2]))
    return found


@dataclass(frozen=True)
class _Drawn:
    """What the first seed's models of every arm said of a case at the fewest labels: label maps and scores by arm."""

    rank: Rank
    row: Row
    maps: dict[str, np.ndarray]
    scores: dict[str, float]


def _first(results: Results) -> list[Cell]:
    """The first seed's cells at the fewest labels."""
    cells = [c for c in results.cells if c.protocol == results.cells[0].protocol and c.seed == 0]
    fewest = min(cells, key=lambda c: c.labelled_subjects, default=None)
    return [c for c in cells if fewest is not None and c.labels == fewest.labels]


def _drawn(directory: Path, results: Results, data: Data) -> list[_Drawn]:
    """Of the worst, the median and the best case."""
    cells = _first(results)
    maps = {}
    for cell in cells:
        file = directory / "pictures" / f"{kept(cell.protocol, cell.arm, cell.labels)}.npz"
        if file.is_file():
            with np.load(file, allow_pickle=False) as stored:
                maps[cell.arm] = {name: stored[name] for name in stored.files}
    rows = {row.case: row for row in data.manifest.rows}
    scored = {c.arm: results.group([c]) for c in cells}
    return [_Drawn(rank, rows[case], {arm: of[case] for arm, of in maps.items()},
                   {a: float(np.nanmean(g.case_values(results.metric)[0, :, g.cases.index(case)])) for a, g in scored.items()})
            for rank, case in (pick_cases(results, cells[0].protocol, cells[0].labels) if maps else {}).items()
            if case in rows and all(case in of for of in maps.values())]


def _scenes(results: Results, data: Data) -> list[Scene]:
    """What the first seed's models of every arm found in the cases of `_drawn`."""
    cells, rows = _first(results), {row.case: row for row in data.manifest.rows}
    groups = {cell.arm: results.group([cell]) for cell in cells}
    found = []
    for rank, case in (pick_cases(results, cells[0].protocol, cells[0].labels) if cells else {}).items():
        if case not in rows:
            continue
        marks, scores = {}, {}
        for arm, group in groups.items():
            at = group.cases.index(case)
            marks[arm], scores[arm] = _marks(found_of(group), at), float(group.case_values(results.metric)[0, 0, at])
        backdrop, marks, aspect = _behind(results.scoring, data, rows[case].index, marks)
        found.append(Scene(case, rank, backdrop, marks, dict(enumerate(results.classes)), scores, aspect))
    return found


def _marks(made: Detections, at: int) -> np.ndarray:
    """(K, n + 2) boxes of one case, found and true, as they are kept, with the label and the state of each."""
    case = made.cases[0][at]
    assert case.found is not None and case.truth is not None
    told = [(*boxes.box[row], label, state) for boxes, rows in zip((case.found, case.truth), made.marks(0, at), strict=True)
            for row, label, state in rows.tolist()]
    return np.array(told, float).reshape(len(told), len(told[0]) if told else 7 + 2)  # no box: as wide as any


def _behind(scoring: str, data: Data, index: int, marks: Mapping[str, np.ndarray]
            ) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """Of a stored sample and its marks: what they are drawn on, the marks there, and its aspect, as `Scene` has them."""
    header = data.cache.header(index)
    affine = np.array(header.affine)
    if scoring == "temporal":
        ends = affine[0, -1] + affine[0, 0] * np.array([0, header.shape[1]])
        return ends, {arm: x[:, [0, 1, -2, -1]] for arm, x in marks.items()}, 1.0
    stored = data.cache.array(index)
    if scoring in ("kitti", "room"):
        shown = np.linspace(0, stored.shape[1] - 1, min(stored.shape[1], SEEN)).round().astype(int)
        points = stored[:3, shown].T @ affine[:3, :3].T + affine[:3, 3]
        return points[:, :2].astype(np.float32), {arm: x[:, [0, 1, 3, 4, 6, -2, -1]] for arm, x in marks.items()}, 1.0
    dims = len(header.spacing)
    boxes = {arm: np.concatenate([x[:, :2 * dims] / np.tile(header.spacing, 2), x[:, -2:]], 1) for arm, x in marks.items()}
    if dims == 2:
        plane = Slice(None, 0, header.spacing[0] / header.spacing[1])
        return _visible(stored, header, plane), {arm: x[:, [1, 0, 3, 2, -2, -1]] for arm, x in boxes.items()}, plane.aspect
    height, top = np.arange(stored.shape[3]) + 0.5, stored.shape[2]
    there = {arm: (x[:, 2, None] <= height) & (height < x[:, 5, None]) for arm, x in boxes.items()}
    crossed = np.concatenate(list(there.values())).sum(0)
    level = int(crossed.argmax()) if crossed.any() else len(height) // 2
    plane = Slice(2, level, header.spacing[1] / header.spacing[0])
    cut = {arm: x[there[arm][:, level]] for arm, x in boxes.items()}
    return _visible(stored, header, plane), {arm: np.stack(  # the second axis points up
        [x[:, 0], top - x[:, 4], x[:, 3], top - x[:, 1], x[:, -2], x[:, -1]], 1) for arm, x in cut.items()}, plane.aspect


def _clouds(directory: Path, results: Results, data: Data) -> list[Cloud]:
    """Points of the cases of `_drawn`, at most `POINTS` of each."""
    found = []
    names = data.manifest.mask_names
    for case in _drawn(directory, results, data):
        row = case.row
        stored, truth = data.cache.array(row.index)[:3].T, data.cache.field(row.index, "mask").astype(int)
        shown = np.linspace(0, len(truth) - 1, min(len(truth), POINTS)).round().astype(int)
        maps = {arm: x[shown] for arm, x in case.maps.items()}
        values = np.unique(np.concatenate([truth[shown], *maps.values()])).tolist()
        found.append(Cloud(row.case, case.rank, stored[shown].astype(np.float32), truth[shown].astype(np.int32), maps,
                           {v: names[v].rpartition("/")[2] if v < len(names) and names[v] else f"class {v}" for v in values
                            if v >= 0}, case.scores,
                           data.manifest.class_names[row.labels["class"]] if "class" in row.labels else ""))
    return found


def _overlays(directory: Path, results: Results, data: Data) -> list[Overlay]:
    """Slices or strips of the cases of `_drawn`."""
    found = []
    for case in _drawn(directory, results, data):
        row, rank, drawn, scores = case.row, case.rank, case.maps, case.scores
        header, truth = data.cache.header(row.index), data.cache.field(row.index, "mask")
        if results.metric == Keypoints.metric:
            truth = dots(points_of(truth), truth.shape)
            drawn = {arm: dots(x, truth.shape) for arm, x in drawn.items()}
        if timed(data.modality):
            known = np.flatnonzero((truth.astype(int) >= 0).any((1, 2)))  # frames that somebody labelled
            places = [int(known[i]) for i in spread(0, len(known) - 1)]
            image, times = _stored(data, row, places)
            found.append(Overlay(row.case, rank, image, thin(truth[places]),
                                 {arm: thin(x[places]) for arm, x in drawn.items()}, scores,
                                 header.spacing[1] / header.spacing[2], times))
            continue
        plane = pick_slice(truth, header.spacing)
        found.append(Overlay(row.case, rank, _visible(data.cache.array(row.index), header, plane), plane.of(truth),
                             {arm: plane.of(x) for arm, x in drawn.items()}, scores, plane.aspect))
    return found


def _first_look(data: Data, rows: Sequence[Row], recipe: Recipe, name: str) -> View:
    """The first plain look of a view at each row."""
    plain = recipe.views[name].plain().model_copy(update={"count": 1})
    view = recipe.modality.augment(whole(data.cache, rows, recipe.modality, plain), plain)
    view.name = name
    return view


def _looks(data: Data, assembly: Assembly, paired: bool) -> Batch:
    """Some test samples: first plain looks, or looks as training draws them, since plain ones of a pair would be one."""
    rows, recipe = data.rows("test") or data.rows(), assembly.recipe
    if paired:
        train = recipe.train.model_copy(update={"batch": min(SHOWN, len(rows))})
        some = loader(data.cache, rows, recipe.model_copy(update={"train": train}), steps=1, workers=0, labels=())
        return assembly.prepare(next(iter(some)))
    index = torch.tensor([row.index for row in rows[:SHOWN]])
    return Batch(Items(index, index), {name: _first_look(data, rows[:SHOWN], recipe, name) for name in recipe.views})


@torch.no_grad()
def attentions(contestants: Sequence[Arm]) -> list[Attention]:
    """Where pretrained encoders attend in some test samples, one per class as far as that goes; none of those that do not
    tell.
    """
    found = []
    for arm in contestants:
        recipe, data = arm.recipe, arm.data
        rows = varied(data.rows("test") or data.rows(), ATTENDED)
        if arm.init is None or "attention" not in recipe.encoder.provides or not rows:
            continue
        assembly = untrained(recipe, arm.init).eval()
        view = _first_look(data, rows, recipe, "x").to(next(assembly.parameters()).device)
        stream = assembly.tokenizer.stream(view)
        if not isinstance(stream, LatticeStream) or stream.position is None or stream.lattice is None:
            continue
        for i, row in enumerate(rows):
            one = assembly.tokenizer.stream(view.select(torch.tensor([i], device=view.array.device)))
            weight = attended(assembly.encoder(one.seen(recipe.encoder.sees), want=frozenset({"attention"}))).cpu()
            heat = weight[0].reshape(stream.lattice)
            seconds = stream.position[i, :, 0].reshape(stream.lattice)[:, 0, 0].cpu()
            picks = spread(0, len(heat) - 1)
            places = [t * stream.patch[0] + stream.patch[0] // 2 for t in picks]
            shown = _frames(view.array[i].float().cpu().numpy(), places, data.cache.header(row.index))
            spacing = view.frame.spacing[i]
            found.append(Attention(row.case, arm.name, shown, tuple(seconds[picks].tolist()),
                                   (heat[picks] * heat.numel()).numpy(), tuple(heat.sum((1, 2)).tolist()),
                                   tuple(seconds.tolist()), float(spacing[1] / spacing[2])))
    return found


def attended(encoded: Encoded) -> torch.Tensor:
    """(B, n) share of the last block's attention that each token gets, heads averaged, rows summing to 1: from the class token
    where there is one, else the mean over all tokens.
    """
    assert encoded.attention is not None
    mean = encoded.attention.float().mean(1)
    prefix = mean.shape[-1] - encoded.tokens.shape[1]
    given = mean[:, 0, prefix:] if "cls" in encoded.summary else mean[:, prefix:, prefix:].mean(1)
    given = given * encoded.valid
    return given / given.sum(1, keepdim=True)


@torch.no_grad()
def reconstructions(init: Path, data: Data) -> list[Reconstruction]:
    """What a masked run fills in on test samples it has not seen; none for a run without a masked objective, or beside a
    foreign model: where that lies a run does not know.
    """
    card = checkpoint.read_card(init)
    recipe = build({k: v for k, v in card["recipe"].items() if k not in TASK_ONLY}, Recipe)
    if recipe.foreign:
        return []
    assembly = Assembly(recipe)
    masked = next((o for o in assembly.objectives.values() if isinstance(o, MaskedObjective)), None)
    if masked is None or card["kind"] != "pretraining" or recipe.modality.options != data.modality.options:
        return []
    assembly.load_state_dict(checkpoint.read_weights(init))
    assembly.eval()
    try:
        batch = _looks(data, assembly, paired=masked.settings.context is not None)
    except DataError:  # no sample has a partner here
        return []
    step = Step(assembly, batch, 1.0, 0)
    drawn = masked.reconstruct(step)
    if not drawn:
        return []
    view = step.view(masked.settings.encode)
    headers = [data.cache.header(int(row)) for row in batch.items.row[view.item]]
    found: list[Reconstruction] = []
    for i, parts in enumerate(zip(*(drawn[k].float().numpy() for k in ("original", "masked", "prediction")), strict=True)):
        original = parts[0]
        if timed(recipe.modality):
            frame = view.frame
            places = spread(0, original.shape[1] - 1)
            index = torch.tensor([[float(t), 0.0, 0.0] for t in places])
            times = frame.select(slice(i, i + 1)).local(index[None])[0, :, 0]
            aspect = float(frame.spacing[i, 1] / frame.spacing[i, 2])
            shown = [_frames(x, places, headers[i]) for x in parts]
            found.append(Reconstruction(shown[0], shown[1], shown[2], aspect, recipe.name, tuple(times.tolist())))
            continue
        plane = pick_slice(np.zeros(original.shape[1:], np.uint8), headers[i].spacing)
        if original.ndim == 3:
            plane = Slice(None, 0, 1.0)
        shown = [plane.of(picture(x)) for x in parts]
        found.append(Reconstruction(shown[0], shown[1], shown[2], plane.aspect, recipe.name))
    return found
