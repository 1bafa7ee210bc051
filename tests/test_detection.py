"""Detection in images: truth in views, windows, every detector by heart, and predictions as files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from PIL import ImageDraw

from meristem import api
from meristem.errors import RecipeError
from meristem.modalities.frame import Frame
from meristem.modalities.objects import Objects, Raster
from meristem.platform.assembly import total
from meristem.platform.data.loader import loader
from meristem.platform.data.source import open_data
from meristem.platform.recipe import load
from meristem.tasks.base import objective
from meristem.tasks.detection import Detection, DetectionObjective, in_view, source, stored, together, windows
from meristem.tasks.detectors import Boxed
from meristem.tasks.finetune import resolve
from meristem.tasks.inspection import noise

SHAPES = ("square", "disc")
SMALL = ["encoder={unet: {widths: [8, 16, 32, 32], blocks: [1, 1, 1, 1], decoder: false}}", "views.x.size=[64,64]",
         "views.x.zoom=[1,1]", "views.x.flip=[0,0]", "views.x.brightness=null", "views.x.contrast=null",
         "views.x.saturation=null",
         "task.detection.levels=2", "task.detection.width=32", "train.batch=2", "train.workers=0", "train.log_every=50",
         "train.ema=null", "train.warmup=0.1"]


def drawn(root: Path, masks: bool = True) -> list[tuple[str, tuple[int, int, int, int]]]:
    """A picture of 72×80 with two squares and two discs, in COCO's format; returns (name, (left, top, right, bottom))."""
    root.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(90, 15, (72, 80, 3)).clip(0, 255).astype(np.uint8)
    image = Pillow.fromarray(noise)
    draw = ImageDraw.Draw(image)
    placed = [("square", (6, 6, 24, 24)), ("disc", (48, 8, 68, 28)), ("disc", (14, 40, 34, 60)), ("square", (50, 46, 72, 68))]
    annotations: list[dict[str, Any]] = []
    for i, (name, (left, top, right, bottom)) in enumerate(placed):
        own = Pillow.new("L", image.size)
        for canvas, fill in ((draw, (200, 180, 60) if name == "square" else (60, 200, 190)), (ImageDraw.Draw(own), 1)):
            shape = canvas.rectangle if name == "square" else canvas.ellipse
            shape((left, top, right - 1, bottom - 1), fill=fill)  # type: ignore[arg-type]
        flat = np.asarray(own).flatten(order="F")
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
        annotations.append({"id": i, "image_id": 3, "category_id": SHAPES.index(name) + 1, "iscrowd": 0,
                            "bbox": [left, top, right - left, bottom - top],
                            **({"segmentation": {"counts": np.diff([0, *edges, len(flat)]).tolist(), "size": [72, 80]}}
                               if masks else {})})
    image.save(root / "scene.png")
    about = {"images": [{"id": 3, "file_name": "scene.png", "height": 72, "width": 80}], "annotations": annotations,
             "categories": [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)]}
    (root / "boxes.json").write_text(json.dumps(about))
    return placed


def overlap(a: Any, b: Any) -> float:
    (al, at, ar, ab), (bl, bt, br, bb) = a, b
    common = max(min(ar, br) - max(al, bl), 0) * max(min(ab, bb) - max(at, bt), 0)
    return common / ((ar - al) * (ab - at) + (br - bl) * (bb - bt) - common)


@pytest.mark.parametrize(("detector", "steps"), [("fcos", 90), ("retinanet", 130), ("faster-rcnn", 130), ("mask-rcnn", 110)])
def test_a_detector_learns_an_image_by_heart(detector: str, steps: int, tmp_path: Path) -> None:
    """Every object is found with its class at an IoU over 0.75, before anything false: average precision 1."""
    placed = drawn(tmp_path / "data")
    small = {"faster-rcnn": {"hidden": 64, "proposals": 100, "sampled": 64}}
    small["mask-rcnn"] = small["faster-rcnn"]
    options = json.dumps({detector: small.get(detector, {}) | ({"scale": 5.0} if detector != "fcos" else {})})
    api.finetune("image/detection", tmp_path / "data", tmp_path / "run",
                 [*SMALL, f"task.detection.detector={options}", f"train.steps={steps}", "train.lr=3e-3"], split="1,0,0",
                 cache=tmp_path / "cache", quiet=True)
    file, = api.predict(tmp_path / "run", tmp_path / "data" / "scene.png", tmp_path / "out", quiet=True)
    about = json.loads(file.read_text())
    assert [c["name"] for c in about["categories"]] == list(SHAPES)
    found = sorted(about["annotations"], key=lambda a: -a["score"])
    hits = set()
    for a in found[:len(placed)]:
        left, top, width, height = a["bbox"]
        hits |= {i for i, (name, box) in enumerate(placed) if name == SHAPES[a["category_id"] - 1]
                 and overlap((left, top, left + width, top + height), box) > 0.75}
    assert len(hits) == len(placed), found[:6]
    if detector == "mask-rcnn":
        from pycocotools import mask as api_

        runs = found[0]["segmentation"]
        shown, (_, box) = api_.decode(runs).astype(bool), max(placed, key=lambda p: overlap(
            (found[0]["bbox"][0], found[0]["bbox"][1], found[0]["bbox"][0] + found[0]["bbox"][2],
             found[0]["bbox"][1] + found[0]["bbox"][3]), p[1]))
        inside = np.zeros((72, 80), bool)
        inside[box[1]:box[3], box[0]:box[2]] = True
        assert shown.shape == (72, 80) and (shown & inside).sum() > 0.6 * inside.sum() and (shown & ~inside).sum() < 40


def cells(seed: int, tmp_path: Path) -> tuple[Any, Any, Objects]:
    """A sample of 40×56 whose mask numbers three far objects, and the same three as annotated objects with masks."""
    rng, root = np.random.default_rng(seed), tmp_path / "pairs"
    mask, rasters, boxes = np.zeros((40, 56), np.uint8), [], []
    for i, (row, column) in enumerate(((3, 4), (22, 8), (9, 36))):
        shape = np.ones(tuple(rng.integers(6, 14, 2)), bool)
        shape[2:4, 2:5] = False
        mask[row:row + shape.shape[0], column:column + shape.shape[1]] = (i + 1) * shape
        rasters.append(Raster(shape, (row, column)))
        boxes.append([row - 0.5, column - 0.5, row + shape.shape[0] - 0.5, column + shape.shape[1] - 0.5])
    for folder, array in (("images", rng.integers(0, 255, (40, 56, 3), np.uint8)), ("masks", mask)):
        (root / folder).mkdir(parents=True)
        Pillow.fromarray(array).save(root / folder / "a.png")
    recipe = load("image/mae", ["views.x.size=[24,32]", "views.x.zoom=[0.7,1.4]", "views.x.flip=[0.5,0.5]", "train.batch=8",
                                "views.x.margin=8", "views.x.window=crop",
                                "views.x.affine={rotate: 0.0, zoom: [0.8, 1.2], shift: 3.0}"])
    data = open_data(root, recipe.modality, "1,0,0", tmp_path / "cache", quiet=True)
    return recipe, data, Objects(np.array(boxes), np.arange(3), masks=tuple(rasters))


@pytest.mark.parametrize("seed", range(3))
def test_truth_goes_into_a_view_as_the_mask_does(seed: int, tmp_path: Path) -> None:
    """A mask carried by the loader through window, resizing, flips and zoom shows each object where `in_view` says."""
    recipe, data, objects = cells(seed, tmp_path)
    row = data.rows()[0]
    inverse = torch.linalg.inv(torch.tensor(data.cache.header(row.index).affine).double())
    batch = next(iter(loader(data.cache, [row], recipe, fields=("mask",), steps=1, workers=0)))
    view = recipe.modality.augment(batch.views["x"], recipe.views["x"])
    seen = 0
    for i in range(len(view)):
        found = in_view(objects, view.frame.select(slice(i, i + 1)), inverse, 0.01)
        mostly = in_view(objects, view.frame.select(slice(i, i + 1)), inverse, 0.6).label.tolist()
        assert found.masks is not None
        for box, label, own in zip(found.box, found.label.tolist(), found.masks, strict=True):
            shown = view.fields["mask"][i] == label + 1
            assert (own != shown).float().mean() < 0.04  # borders, where the loader resamples twice
            where = shown.nonzero()
            if label in mostly:
                tight = torch.cat([where.amin(0), where.amax(0) + 1]).float()
                assert (box - tight).abs().max() <= 1.5
                seen += 1
        gone = set(range(3)) - set(found.label.tolist())
        assert all((view.fields["mask"][i] == label + 1).sum() <= 3 for label in gone)
    assert seen > 6


def test_truth_that_is_hardly_seen_or_ignored_teaches_nothing() -> None:
    frame = Frame(torch.eye(3)[None], (10, 10), torch.ones(1, 2), ("px", "px"))
    box = np.array([[-4.5, 2, 5.5, 6], [-8.5, 2, 1.5, 6], [2, 2, 5, 5], [20, 20, 30, 30]], float)
    objects = Objects(box, np.arange(4), np.array([False, False, True, False]))
    found = in_view(objects, frame, torch.eye(3), 0.5)
    assert found.label.tolist() == [0] and found.box.tolist() == [[0.0, 2.5, 6.0, 6.5]]
    assert in_view(objects, frame, torch.eye(3), 0.0).label.tolist() == [0, 1]


def test_stored_boxes_and_back_under_an_oblique_affine() -> None:
    affine = ((0.0, -2.0, 0.0, 5.0), (1.5, 0.0, 0.0, -3.0), (0.0, 0.0, 3.0, 1.0), (0.0, 0.0, 0.0, 1.0))
    header: Any = type("H", (), {"affine": affine, "shape": (1, 20, 30, 10)})
    box = np.array([[2.0, 3, 1, 8, 13, 5], [0, 0, 0, 20, 30, 10]])
    assert np.allclose(stored(Objects(source(box, header), np.zeros(2, np.int64)), header), box)


@pytest.mark.parametrize(("shape", "size", "overlap"), [((64, 50), (32, 32), 0.25), ((20, 100), (32, 32), 0.5),
                                                        ((33, 31, 7), (16, 16, 16), 0.0)])
def test_windows_cover_everything(shape: tuple[int, ...], size: tuple[int, ...], overlap: float) -> None:
    seen = np.zeros(shape, int)
    starts = windows(shape, size, overlap)
    for start in starts:
        seen[tuple(slice(max(a, 0), a + n) for a, n in zip(start, size, strict=True))] += 1
    assert seen.min() >= 1 and len(set(starts)) == len(starts)
    for axis, (n, w) in enumerate(zip(shape, size, strict=True)):
        line = sorted({start[axis] for start in starts})
        assert all(w - (b - a) >= int(overlap * w) for a, b in itertools.pairwise(line)), line
        assert n > w or line == [-((w - n) // 2)]


def test_a_box_cut_by_its_window_gives_way_to_the_whole_one() -> None:
    whole = Boxed(torch.tensor([[4.0, 6, 14, 24]]), torch.tensor([0]), torch.tensor([0.6]))
    cut = Boxed(torch.tensor([[4.0, 16, 14, 24], [20, 20, 30, 30], [4.5, 16, 14, 24]]), torch.tensor([0, 0, 1]),
                torch.tensor([0.9, 0.5, 0.4]))
    found = together([whole, cut], [(0, 0), (0, 16)], (32, 32), (32, 48), 0.5, 100)
    assert found.score is not None and found.score.tolist() == pytest.approx([0.6, 0.5, 0.4])
    twice = together([whole, whole], [(0, 0), (0, 16)], (32, 32), (32, 48), 0.5, 100)
    assert len(twice) == 1


@pytest.mark.parametrize(("changes", "message"), [
    (["views.x.elastic={amplitude: [1, 2]}"], "elastic"), (["views.x.window=area"], "window"),
    (["task.detection.width=40"], "multiple of 32"), (["task.detection.detector=yolo"], "no detector called")])
def test_what_cannot_be_is_refused_before_a_file_is_read(changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve("detection", "image", changes)


@pytest.mark.parametrize(("base", "other"), [("points/segmentation", "detection3d"), ("video/classification", "temporal")])
def test_what_has_no_boxes_along_its_axes_is_sent_to_its_own_task(base: str, other: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"extends: {base}\ntask: {{detection: {{detector: fcos}}}}\n")
    with pytest.raises(RecipeError, match=other):
        resolve(str(tmp_path / "a.yaml"), base.split("/")[0], [])


@pytest.mark.parametrize("encoder", ["{transformer: {width: 24, depth: 2, heads: 2}}", "{timm: {model: resnet10t}}",
                                     "{timm: {model: vit_tiny_patch16_224}}"])
@pytest.mark.parametrize("levels", [2, 4])
def test_a_pyramid_stands_on_any_encoder(encoder: str, levels: int) -> None:
    """Maps of the strides that they claim, also of views that no stride divides, and a gradient in all that was used."""
    patch = ["modality.image.patch=16", "views.x.size=[80,112]"] if "patch16" in encoder else ["views.x.size=[72,104]"]
    recipe = resolve("detection", "image", [f"encoder={encoder}", f"task.detection.levels={levels}", *patch,
                                            "task.detection.width=32"])
    assembly = recipe.assemble(2)
    task, batch = objective(assembly), noise(recipe)
    assert isinstance(task, DetectionObjective)
    size = batch.views["x"].array.shape[2:]
    task.known = {int(row): (Objects(np.array([[10, 10, 40, 50]], float), np.zeros(1, np.int64)), torch.eye(3))
                  for row in batch.items.row}
    total(assembly(batch, 0.0)).backward()
    step = assembly.last_step
    assert step is not None
    maps = task.pyramid(step.encode("x", want=task.pyramid.want), step.stream("x"))  # type: ignore[arg-type]
    for x, stride in zip(maps, task.pyramid.strides, strict=True):
        assert x.shape[1] == 32 and all(abs(n / s - m) < 1 for n, s, m in zip(size, stride, x.shape[2:], strict=True))
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)


def test_masks_give_objects_where_nobody_drew_boxes(tmp_path: Path) -> None:
    """Each connected part of a value is an object of its class; all are found again by heart, with names from the data."""
    _, data, objects = cells(0, tmp_path)
    recipe = resolve("detection", "image", ["task.detection.objects=components"])
    assert isinstance(recipe.task, Detection)
    row, = recipe.task.cases(data, "train")
    found = recipe.task.truth(data, row)
    assert recipe.task.scope(data).scored == ("class 1", "class 2", "class 3")
    assert found.label.tolist() == [0, 1, 2] and np.allclose(found.box, objects.box)
    assert all((a.cells == b.cells).all() and a.start == b.start for a, b in zip(found.masks, objects.masks, strict=True))
    each = recipe.task.model_copy(update={"objects": "values"})
    assert each.truth(data, row).label.tolist() == [0, 0, 0] and each.scope(data).scored == ("object",)


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster-rcnn"])
def test_an_image_without_objects_teaches_too(detector: str) -> None:
    recipe = resolve("detection", "image", [*SMALL, f"task.detection.detector={detector}"])
    assembly = recipe.assemble(2)
    loss = total(assembly(noise(recipe), 0.0))
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.abs().sum() > 0 for p in assembly.encoder.parameters())
