"""Objects in volumes: MONAI's lists, masks' parts, MONAI's RetinaNet, boxes across windows and orientations, a sanity set."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff
from torch import nn

from meristem import api
from meristem.errors import DataError
from meristem.modalities.base import Header
from meristem.modalities.objects import Objects
from meristem.modalities.volume import Volume
from meristem.modalities.volume.pasted import write_pasted
from meristem.platform.assembly import total
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.source import Data, open_data
from meristem.platform.training.precision import sound
from meristem.tasks.base import objective
from meristem.tasks.detection import DetectionObjective, source, stored
from meristem.tasks.detectors import DETECTORS, Boxed, DetectorSettings, fusion
from meristem.tasks.detectors.fusion import cluster, suppress, together
from meristem.tasks.detectors.instances import of_mask
from meristem.tasks.finetune import resolve
from meristem.tasks.inspection import noise

VOLUME = Volume(Volume.Options())
SHAPE, SPACING = (24, 20, 16), np.array([1.0, 1.5, 2.0])
CUBOIDS = [[3, 4, 2, 11, 12, 8], [14, 9, 6, 22, 18, 13]]  # voxels, RAS: lower and upper corner
CODES = ["RAS", "RPI", "LAS", "LPI", "SAR", "PIL"]


def scene(path: Path, codes: str = "RAS", shape: tuple[int, ...] = SHAPE, cuboids: list[list[int]] = CUBOIDS
          ) -> np.ndarray:
    """A volume with bright cuboids, stored in an orientation; returns their world boxes (K, 6), RAS millimetres."""
    array = np.random.default_rng(ord(path.name[0])).normal(100, 10, shape).astype(np.float32)
    for box in cuboids:
        array[tuple(map(slice, box[:3], box[3:]))] += 150
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = 7, -30, 11
    turn = nib.orientations.ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(apply_orientation(array, turn), affine @ inv_ornt_aff(turn, shape)), path)
    return (np.array(cuboids).reshape(-1, 2, 3) * SPACING - SPACING / 2 + affine[:3, 3]).reshape(-1, 6)


def as_monai(box: np.ndarray, mode: str, coordinates: str) -> list[list[float]]:
    """The same by hand: a loop over boxes and axes."""
    rows = []
    for low_high in box.tolist():
        low, high = low_high[:3], low_high[3:]
        for axis in (0, 1) if coordinates == "LPS" else ():
            low[axis], high[axis] = -high[axis], -low[axis]
        centre, size = [(a + b) / 2 for a, b in zip(low, high, strict=True)], [b - a for a, b in zip(low, high, strict=True)]
        rows.append(centre + size if mode == "cccwhd" else low + high)
    return rows


def listed(root: Path, *, mode: str = "cccwhd", coordinates: str = "LPS", codes: str = "RAS", **more: Any) -> np.ndarray:
    box = scene(root / "images" / "a.nii.gz", codes)
    said: dict[str, Any] = {} if (mode, coordinates) == ("cccwhd", "LPS") else {"box_mode": mode, "coordinates": coordinates}
    (root / "boxes.json").write_text(json.dumps(
        {"labels": {"0": "nodule", "3": "node"}, **said,
         "training": [{"image": "a.nii.gz", "box": as_monai(box, mode, coordinates), "label": [3, 0]}], **more}))
    return box


def opened(path: Path, tmp_path: Path) -> Data:
    return open_data(path, VOLUME, cache=tmp_path / "cache", quiet=True)


# ---- MONAI's lists

@pytest.mark.parametrize("mode", ["cccwhd", "xyzxyz"])
@pytest.mark.parametrize("coordinates", ["LPS", "RAS"])
def test_a_list_is_read_in_either_mode_and_system(mode: str, coordinates: str, tmp_path: Path) -> None:
    box = listed(tmp_path / "d", mode=mode, coordinates=coordinates)
    data = opened(tmp_path / "d", tmp_path)
    row, = data.rows()
    assert data.manifest.layout == "MONAI boxes" and data.manifest.object_names == ("nodule", "node")
    assert row.objects is not None and row.objects.label.tolist() == [1, 0]
    assert np.allclose(row.objects.box, box)


@pytest.mark.parametrize("codes", CODES)
def test_boxes_do_not_depend_on_how_a_volume_is_stored(codes: str, tmp_path: Path) -> None:
    box = listed(tmp_path / "d", codes=codes)
    data = opened(tmp_path / "d", tmp_path)
    row, = data.rows()
    header = data.cache.header(row.index)
    assert row.objects is not None and np.allclose(row.objects.box, box)
    own = stored(row.objects, header)
    array = data.cache.array(row.index)[0].astype(float)
    for corners, other in zip(own.round().astype(int), own, strict=True):
        assert np.allclose(corners, other)
        inside = tuple(map(slice, corners[:3], corners[3:]))
        around = array.copy()
        around[inside] = np.nan
        assert array[inside].min() > np.nanmedian(around) + 20
    assert (array > np.median(array) + (array.max() - np.median(array)) / 2).sum() == sum(
        np.prod(b[3:] - b[:3]) for b in own.round().astype(int))
    assert np.allclose(VOLUME.annotated(source(own, header), header), box)


def test_splits_are_the_lists_and_what_nobody_looked_at_has_no_objects(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for name in ("b", "c"):
        scene(root / "images" / f"{name}.nii.gz")
    listed(root, validation=[{"image": "images/b.nii.gz", "box": [], "label": []}], test=[{"image": "images/c.nii.gz"}])
    rows = {Path(row.local).name[0]: row for row in opened(root / "boxes.json", tmp_path).manifest.rows}
    assert [rows[n].split for n in "abc"] == ["train", "val", "test"]
    assert rows["b"].objects is not None and len(rows["b"].objects) == 0 and rows["c"].objects is None


WRONG = {"class": ([[0, 0, 0, 2, 2, 2]], [7], "class", "unknown class 7"),
         "labels": ([[0, 0, 0, 2, 2, 2]], [], "class", "0 labels"),
         "flat": ([[0, 0, 0, 2, 0, 2]], [0], "box", "zero area"), "five": ([[0, 0, 0, 2, 2]], [0], "box", "six numbers"),
         "far": ([[500, 0, 0, 2, 2, 2]], [0], "box", "outside")}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_box_is_named_and_its_volume_stays(case: str, tmp_path: Path) -> None:
    box, label, reason, message = WRONG[case]
    root = tmp_path / "d"
    scene(root / "images" / "b.nii.gz")
    listed(root, validation=[{"image": "b.nii.gz", "box": box, "label": label}])
    data = opened(root, tmp_path)
    row = next(row for row in data.rows() if "b.nii" in row.local)
    assert row.objects is None and len(data.rows()) == 2
    problem, = [p for p in data.cache.quarantine if message in p.message]
    assert problem.reason == reason and "b.nii" not in problem.message


def test_boxes_in_the_other_system_are_refused_with_the_key_that_says_so(tmp_path: Path) -> None:
    root = tmp_path / "d"
    box = listed(root)
    about = json.loads((root / "boxes.json").read_text()) | {"coordinates": "RAS"}  # as LPS wrote them
    (root / "boxes.json").write_text(json.dumps(about))
    data = opened(root, tmp_path)
    assert data.rows()[0].objects is None and box[0, 0] > 0
    assert any("LPS" in p.remedy and p.reason == "box" for p in data.cache.quarantine)


def test_folds_are_asked_for_and_a_list_of_masks_stays_msd(volume_folder: Path, tmp_path: Path) -> None:
    assert Manifest.discover(volume_folder, VOLUME).layout == "MSD"
    listed(tmp_path / "d")
    (tmp_path / "d" / "fold1.json").write_text((tmp_path / "d" / "boxes.json").read_text())
    with pytest.raises(DataError, match="folds"):
        Manifest.discover(tmp_path / "d", VOLUME)
    with pytest.raises(DataError, match="box_mode"):
        (tmp_path / "d" / "fold1.json").unlink()
        listed(tmp_path / "d", box_mode="xyxy")
        Manifest.discover(tmp_path / "d", VOLUME)


# ---- objects of masks

def flooded(mask: np.ndarray) -> set[tuple[int, frozenset[tuple[int, ...]]]]:
    """(value, elements) of each part, found by walking from neighbour to neighbour."""
    left = {tuple(map(int, at)) for at in np.argwhere(mask > 0)}
    parts = set()
    while left:
        first = left.pop()
        part, edge = {first}, [first]
        while edge:
            at = edge.pop()
            for step in itertools.product((-1, 0, 1), repeat=mask.ndim):
                to = tuple(a + s for a, s in zip(at, step, strict=True))
                if to in left and mask[to] == mask[first]:
                    left.remove(to)
                    part.add(to)
                    edge.append(to)
        parts.add((int(mask[first]), frozenset(part)))
    return parts


@pytest.mark.parametrize("shape", [(14, 17), (9, 7, 8)])
@pytest.mark.parametrize("smallest", [1, 4])
def test_parts_of_a_mask_are_those_of_a_walk(shape: tuple[int, ...], smallest: int) -> None:
    rng, dims = np.random.default_rng(len(shape)), len(shape)
    mask = rng.choice([-1, 0, 0, 0, 0, 0, 0, 0, 1, 3], shape)
    affine = np.eye(dims + 1)
    affine[:dims, :dims] = np.diag([-1.5, 2.0, 0.5][:dims])[::-1]
    affine[:dims, -1] = rng.normal(size=dims)
    header = Header((1, *shape), tuple(map(tuple, affine.tolist())), (1.0,) * dims)
    found = of_mask(mask, header, "components", smallest)
    want = [p for p in flooded(mask) if len(p[1]) >= smallest]
    assert len(found) == len(want) > 3
    got = set()
    for i, raster in enumerate(found.masks):
        cells = frozenset(tuple(int(a + s) for a, s in zip(at, raster.start, strict=True)) for at in np.argwhere(raster.cells))
        got.add((int(found.label[i]) + 1, cells))
        corners = np.array([[a + d for a, d in zip(at, step, strict=True)] for at in cells
                            for step in itertools.product((-0.5, 0.5), repeat=dims)])
        points = corners @ affine[:dims, :dims].T + affine[:dims, -1]
        assert np.allclose(found.box[i], [*points.min(0), *points.max(0)])
    assert got == set(want)


def test_numbered_instances_are_one_object_each_and_an_empty_mask_has_none() -> None:
    header = Header((1, 6, 6), tuple(map(tuple, np.eye(3).tolist())), (1.0, 1.0))
    mask = np.zeros((6, 6), int)
    mask[0, 0] = mask[4, 5] = 2  # torn by what lies before it
    mask[2:4, 1:3] = 9
    found = of_mask(mask, header, "values")
    assert found.box.tolist() == [[-0.5, -0.5, 4.5, 5.5], [1.5, 0.5, 3.5, 2.5]] and found.label.tolist() == [0, 0]
    assert [m.cells.sum() for m in found.masks] == [2, 4]
    assert of_mask(np.zeros((6, 6), int), header, "components").box.shape == (0, 4)


# ---- the detector

def retinanet(**options: Any) -> DetectorSettings:
    return DETECTORS["monai-retinanet"](**options)


def test_anchors_stand_in_the_middle_of_cells_also_of_odd_strides_and_views_that_none_divides() -> None:
    strides, shapes = [(2, 3, 1), (4, 6, 5)], ((2.0, 2.0, 2.0), (1.5, 3.0, 2.5))
    size = (11, 13, 7)
    maps = [torch.zeros(1, 32, *(-(-n // s) for n, s in zip(size, stride, strict=True))) for stride in strides]
    model: Any = retinanet(anchors=shapes).build(32, strides, 2).model
    anchors = model.anchor_generator(torch.zeros(1, 1, *size), maps)[0]
    want = [[(i + 0.5) * t + sign * w * t / 2 for sign in (-1, 1) for i, t, w in zip(cell, stride, shape, strict=True)]
            for stride, x in zip(strides, maps, strict=True)
            for cell in itertools.product(*map(range, x.shape[2:])) for shape in shapes]
    assert torch.allclose(anchors, torch.tensor(want))
    box = torch.rand(len(anchors), 6) * 5
    box[:, 3:] += box[:, :3] + 0.5
    assert torch.allclose(model.box_coder.decode_single(model.box_coder.encode_single(box, anchors), anchors), box, atol=1e-4)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU(),
                                  nn.Conv3d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.ReLU())
        self.down = nn.Conv3d(32, 32, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        fine = self.stem(x)
        return [fine, self.down(fine)]


@pytest.mark.parametrize(("negatives", "regression"), [("hard", "l1"), ("all", "giou")])
def test_the_detector_learns_a_volume_by_heart(negatives: str, regression: str) -> None:
    """Three cuboids of two classes, each found at an IoU over 0.5 before anything false: average precision 1."""
    size = (29, 33, 22)  # no multiple of any stride
    box = torch.tensor([[3.0, 4, 2, 11, 14, 10], [15, 18, 8, 26, 28, 19], [2, 21, 10, 10, 31, 20]])
    label = torch.tensor([0, 1, 0])
    x = torch.randn(1, 1, *size) * 0.3
    for (a, b, c, d, e, f), kind in zip(box.int().tolist(), label.tolist(), strict=True):
        x[0, 0, a:d, b:e, c:f] += 2 - 4 * kind
    backbone, detector = Backbone(), retinanet(negatives=negatives, regression=regression).build(32, [(4,) * 3, (8,) * 3], 2)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *detector.parameters()], 3e-3)
    for _ in range(100):
        losses = detector.losses(backbone(x), size, [Boxed(box, label)])
        optimizer.zero_grad()
        torch.stack([loss.total / loss.count for loss in losses.values()]).sum().backward()
        optimizer.step()
    with torch.no_grad():
        found, = detector.detect(backbone(x), size)
    assert found.score is not None and (found.score.diff() <= 0).all()
    hits = set()
    for own, kind in zip(found.box[:3].tolist(), found.label[:3].tolist(), strict=True):
        hits |= {i for i in range(3) if kind == label[i] and iou(own, box[i].tolist()) > 0.5}
    assert hits == {0, 1, 2}


def test_views_without_objects_and_low_precision_teach_too_and_what_is_not_finite_is_passed_on() -> None:
    detector = retinanet().build(32, [(4,) * 3, (8,) * 3], 1)
    sound(detector)
    maps = [torch.randn(2, 32, 4, 4, 4), torch.randn(2, 32, 2, 2, 2)]
    nothing = Boxed(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.losses(maps, (16, 16, 16), [nothing] * 2)
        with torch.no_grad():
            found = detector.detect(maps, (16, 16, 16))
    torch.stack([loss.total for loss in losses.values()]).sum().backward()
    assert losses["boxes"].total == 0 and losses["classes"].total > 0 and len(found) == 2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    assert all(f.box.dtype == torch.float32 for f in found)
    losses = detector.losses([maps[0] * torch.inf, maps[1]], (16, 16, 16), [nothing] * 2)
    assert all(loss.total.isnan() for loss in losses.values())  # for the loop to skip and count


@pytest.mark.parametrize("encoder", ["{transformer: {width: 24, depth: 1, heads: 2}}", "{unet: {widths: [8, 8, 16], "
                                     "blocks: [1, 1, 1], strides: [[2, 2, 1], [2, 2, 2]], decoder: false}}"])
def test_it_stands_on_any_encoder_with_views_that_no_stride_divides(encoder: str) -> None:
    recipe = resolve("detection", "volume", [f"encoder={encoder}", "views.x.size=[24,40,24]", "train.batch=2"])
    assembly, batch = recipe.assemble(1), noise(recipe)
    task = objective(assembly)
    assert isinstance(task, DetectionObjective)
    task.known = {int(row): (Objects(np.array([[4.0, 4, 4, 14, 16, 12]]), np.zeros(1, np.int64)), torch.eye(4))
                  for row in batch.items.row}
    loss = total(assembly(batch, 0.0))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in task.parameters() if p.requires_grad)
    step = assembly.last_step
    assert step is not None
    maps = task.pyramid(step.encode("x", want=task.pyramid.want), step.stream("x"))  # type: ignore[arg-type]
    size = batch.views["x"].array.shape[2:]
    for x, stride in zip(maps, task.pyramid.strides, strict=True):
        assert all(abs(n / s - m) < 1 for n, s, m in zip(size, stride, x.shape[2:], strict=True))


# ---- boxes of windows

def iou(a: list[float], b: list[float]) -> float:
    dims = len(a) // 2
    common, size = 1.0, [1.0, 1.0]
    for i in range(dims):
        common *= max(min(a[i + dims], b[i + dims]) - max(a[i], b[i]), 0)
        size = [n * (x[i + dims] - x[i]) for n, x in zip(size, (a, b), strict=True)]
    return common / (sum(size) - common)


def boxes(dims: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low = torch.rand(count, dims) * 12
    return torch.cat([low, low + 3 + torch.rand(count, dims) * 6], 1), torch.rand(count), torch.randint(0, 2, (count,))


@pytest.mark.parametrize("dims", [2, 3])
def test_suppression_is_that_of_a_double_loop(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "BLOCK", 16)
    box, score, label = boxes(dims, 40)
    kept: list[int] = []
    for i in score.argsort(descending=True).tolist():
        if all(label[i] != label[j] or iou(box[i].tolist(), box[j].tolist()) <= 0.3 for j in kept):
            kept.append(i)
    assert suppress(box, score, label, 0.3).tolist() == kept and 3 < len(kept) < 40
    assert suppress(box, score, label, 0.3, 3).tolist() == kept[:3]


def test_boxes_without_size_suppress_nothing() -> None:
    flat = torch.tensor([[1.0, 1, 1, 1, 1, 1]]).repeat(2, 1)
    assert suppress(flat, torch.tensor([0.5, 0.9]), torch.zeros(2, dtype=torch.long), 0.3).tolist() == [1, 0]


def middling(point: list[float], window: list[float]) -> float:
    dims = len(point)
    away = max(abs(2 * p - window[i] - window[i + dims]) / (window[i + dims] - window[i]) for i, p in enumerate(point))
    return 0.0 if away > 1 else min(max(2 - 2 * away, 0.1), 1.0)


@pytest.mark.parametrize("dims", [2, 3])
def test_clusters_are_those_of_a_double_loop(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "BLOCK", 16)
    box, score, label = boxes(dims, 40)
    low = torch.tensor([[0] * dims, [5] * dims, [0] * (dims - 1) + [8]])
    window = torch.cat([low, low + 16], 1)
    middle = [[(b[i] + b[i + dims]) / 2 for i in range(dims)] for b in box.tolist()]
    number = torch.arange(40) % 3
    left, want = score.argsort(descending=True).tolist(), []
    while left:
        best, some = left[0], [i for i in left if i == left[0] or (label[i] == label[left[0]]
                                                                     and iou(box[i].tolist(), box[left[0]].tolist()) > 0.3)]
        left = [i for i in left if i not in some]
        weight = {i: max(middling(middle[i], window[number[i]].tolist()), 0.1) for i in some}
        silent = sum(middling(middle[best], window[w].tolist()) for w in range(3) if w not in {int(number[i]) for i in some}
                     and all(window[w, k] <= box[best, k] and box[best, k + dims] <= window[w, k + dims] for k in range(dims)))
        total = sum(float(score[i]) * weight[i] for i in some)
        mean = [sum(float(score[i]) * weight[i] * float(box[i, k]) for i in some) / total for k in range(2 * dims)]
        want.append((total / (sum(weight.values()) + silent), best, mean))
    want.sort(key=lambda w: -w[0])
    best, fused, scores = cluster(box, score, label, number, window, 0.3)
    assert best.tolist() == [w[1] for w in want] and 3 < len(want) < 40
    assert np.allclose(fused.numpy(), [w[2] for w in want], atol=1e-4)
    assert np.allclose(scores.numpy(), [w[0] for w in want], atol=1e-6)


def test_windows_that_see_a_place_and_find_nothing_lower_its_score() -> None:
    one = Boxed(torch.tensor([[10.0, 10, 10, 20, 20, 20]]), torch.tensor([0]), torch.tensor([0.8]))
    none = Boxed(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    starts, size, shape = [(0, 0, 0), (0, 0, 4)], (32, 32, 32), (32, 32, 36)
    alone = together([one, none], starts, size, shape, 0.2, 10, "cluster")
    both = together([one, one], starts, size, shape, 0.2, 10, "cluster")
    assert alone.score is not None and both.score is not None
    assert len(alone) == len(both) == 1 and both.score.item() == pytest.approx(0.8) and alone.score.item() < 0.45
    assert torch.allclose(both.box, one.box)
    assert len(together([none, none], starts, size, shape, 0.2, 10, "cluster")) == 0


# ---- the whole way

SMALL = ["encoder={unet: {widths: [8, 16, 32], blocks: [1, 1, 1], decoder: false}}", "views.x.size=[24,24,16]",
         "views.x.affine=null", "views.x.flip=[0,0,0]", "views.x.brightness=null", "views.x.contrast=null",
         "views.x.noise=null", "train.batch=2", "train.workers=0", "train.log_every=50", "train.ema=null", "train.warmup=0.1",
         "train.lr=3e-3", "train.steps=150", "train.precision=fp32"]


def test_a_volume_larger_than_a_window_is_learnt_by_heart_and_written_in_world_millimetres(tmp_path: Path) -> None:
    """Average precision 1 at an IoU of 0.5, from the file to the file."""
    cuboids = [[3, 4, 2, 11, 13, 9], [14, 17, 10, 23, 26, 17], [2, 18, 8, 10, 27, 15]]
    root = tmp_path / "d"
    box = scene(root / "a.nii.gz", "PIL", (28, 30, 20), cuboids)
    entry = {"image": "a.nii.gz", "box": as_monai(box, "cccwhd", "LPS"), "label": [0] * 3}
    scene(root / "b.nii.gz", "LAS", (28, 30, 20), [[4, 4, 4, 12, 13, 11]])
    scene(root / "c.nii.gz", cuboids=[])
    held_out = [{"image": "b.nii.gz", "box": [], "label": []}, {"image": "c.nii.gz", "box": [], "label": []}]
    (root / "boxes.json").write_text(json.dumps({"labels": {"0": "cuboid"}, "training": [entry], "test": held_out}))
    run = api.finetune("volume/detection", root / "boxes.json", tmp_path / "run", SMALL, cache=tmp_path / "cache", quiet=True)
    tested = json.loads((tmp_path / "run" / "cases.json").read_text())
    assert run and [case["truth"]["box"] for case in tested] == [[], []] and any(case["found"]["box"] for case in tested)
    file, = api.predict(tmp_path / "run", root / "a.nii.gz", tmp_path / "out", quiet=True)
    about = json.loads(file.read_text())
    assert (about["box_mode"], about["coordinates"], about["labels"]) == ("xyzxyz", "RAS", {"0": "cuboid"})
    found, = about["test"]
    assert found["image"].startswith("case-") and found["score"] == sorted(found["score"], reverse=True)
    hits = {i for own in found["box"][:3] for i in range(3) if iou(own, box[i].tolist()) > 0.5}
    assert hits == {0, 1, 2}, found


# ---- the sanity set

def test_pasted_volumes_are_the_same_again_and_boxes_are_those_of_the_structures(volume_folder: Path, tmp_path: Path) -> None:
    shape = (64, 64, 48)
    listing = write_pasted(volume_folder, tmp_path / "a", 10, 3, shape)
    write_pasted(volume_folder, tmp_path / "b", 10, 3, shape)
    assert listing.read_text() == (tmp_path / "b" / "boxes.json").read_text()
    about = json.loads(listing.read_text())
    assert [len(about[name]) for name in ("training", "validation", "test")] == [6, 2, 2]
    images = [nib.load(tmp_path / "a" / e["image"]) for e in about["training"]]
    again = nib.load(tmp_path / "b" / about["training"][0]["image"])
    assert np.array_equal(images[0].get_fdata(), again.get_fdata()) and np.allclose(images[0].affine, again.affine)
    assert len({nib.aff2axcodes(image.affine) for image in images}) > 2
    sizes = set()
    for file in sorted((volume_folder / "labelsTr").glob("*.nii.gz")):
        inside = np.argwhere(np.asarray(nib.load(file).dataobj) > 0)
        sizes.add(tuple(np.round((np.ptp(inside, axis=0) + 1) * (1.0, 0.8, 1.5), 3)))
    data = opened(listing, tmp_path)
    kept = [row.objects for row in data.rows() if row.objects is not None]
    assert len(kept) == 10 and not data.cache.quarantine and sum(map(len, kept)) > 8
    for objects in kept:
        assert all(tuple(np.round(b[3:] - b[:3], 3)) in sizes for b in objects.box)


@pytest.mark.data
def test_structures_of_real_scans_can_be_pasted(data_root: Path, tmp_path: Path) -> None:
    listing = write_pasted(data_root / "msd-task04-hippocampus", tmp_path / "made", 4, 0, (80, 80, 64))
    data = opened(listing, tmp_path)
    found = [row.objects for row in data.rows()]
    assert len(found) == 4 and not data.cache.quarantine and any(objects is not None and len(objects) for objects in found)
