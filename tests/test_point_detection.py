"""Boxes in clouds: through the frames of views, found by heart from files to files, ignored where nobody looks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from street import kitti_frame, street, surfaces, unpickled, write_frame
from torch import Tensor

import meristem
from meristem.errors import DataError, RecipeError
from meristem.modalities.base import modality_class
from meristem.modalities.objects import Objects
from meristem.modalities.rng import Rng
from meristem.platform import boxes
from meristem.platform.data.annotated import kitti
from meristem.platform.data.loader import loader
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.source import Data, open_data
from meristem.platform.evaluation.results import Case
from meristem.platform.objectives import Encoded
from meristem.tasks.base import TaskRecipe, objective
from meristem.tasks.detectors.points import Centres, Queries, Truth
from meristem.tasks.finetune import resolve, score, tune
from meristem.tasks.point_detection import PointDetectionObjective

STILL = "views.x={size: [8192], rotate: 0, scale: [1, 1], flip: [0, 0], take: even}"
SMALL = ["encoder={transformer: {width: 48, depth: 2, heads: 2, cls: false}}", "train.workers=0", "train.batch=1",
         "train.ema=null", "train.layer_decay=1.0", "train.log_every=50"]
STREET = [*SMALL, STILL, "task.detection3d.head={centres: {low: [0, -12], high: [40, 12], cell: 0.5, width: 48, depth: 4}}"]
ROOM = [*SMALL, STILL, "modality.points.count=128", "modality.points.size=16",
        "task.detection3d.head={queries: {queries: 32, depth: 2, heads: 2}}"]


def perfect(case: Case, least: float) -> bool:
    """Whether AP is 1 at this IoU: of every class the best boxes are the true ones, each once, and the rest score less."""
    assert case.truth is not None and case.found is not None
    truth, found = (torch.tensor(x.box, dtype=torch.float64).reshape(-1, 7) for x in (case.truth, case.found))
    for label in set(case.truth.label):
        t, f = (torch.tensor(x.label) == label for x in (case.truth, case.found))
        right = boxes.iou(truth[t], found[f][:int(t.sum())])[0] >= least
        scores = torch.tensor(case.found.score)[f]
        best, rest = scores.tensor_split([int(t.sum())])
        if not (right.any(1).all() and right.any(0).all() and (best.min() > rest).all()):
            return False
    return True


def opened(root: Path, tmp_path: Path, task: str, changes: Sequence[str]) -> tuple[TaskRecipe, Data]:
    recipe = resolve(task, "points", changes)
    return recipe, open_data(root, recipe.modality, "1,0,0", tmp_path / "cache", quiet=True)


def by_heart(root: Path, tmp_path: Path, task: str, changes: Sequence[str]) -> Case:
    """The only sample, tested after training on it."""
    recipe, data = opened(root, tmp_path, task, changes)
    rows = recipe.task.cases(data, "train")
    scope = recipe.task.scope(data)
    tuned = tune(recipe, data, rows, scope, None, "by heart", quiet=True)
    case, = score(tuned.outcome.assembly, data, rows, scope)
    return case


def make_street(root: Path, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    cloud, box, names = street(seed)
    write_frame(root, "000000", cloud, [])
    known = kitti.calibration(root / "velodyne" / "000000.bin")
    assert known is not None
    labels = [x.rsplit(" ", 1)[0] for x in kitti.text(box, names, [1.0] * len(box), known).splitlines()]
    write_frame(root, "000000", cloud, labels)
    return box, names


def make_room(root: Path) -> np.ndarray:
    """Four pieces of furniture of two classes in a room of 5 m, with the floor."""
    rng = np.random.default_rng(0)
    box = np.array([[1.2, 1.0, 0.4, 1.4, 0.7, 0.8, 0.4], [3.8, 1.2, 0.45, 0.5, 0.5, 0.9, -0.5],
                    [1.5, 3.9, 0.45, 0.55, 0.5, 0.9, 1.0], [3.6, 3.6, 0.35, 1.2, 0.8, 0.7, -1.0]])
    floor = np.column_stack([rng.uniform(0, 5, (600, 2)), rng.normal(0, 0.01, 600)])
    root.mkdir(exist_ok=True)
    np.savez(root / "1.npz", points=np.concatenate([floor, surfaces(box, 250, rng)]))
    (root / "boxes.json").write_text(json.dumps({"classes": ["chair", "table"], "scenes": [
        {"file": "1.npz", "boxes": box.tolist(), "labels": ["table", "chair", "chair", "table"]}]}))
    return box


# ---- boxes through maps and frames


@pytest.mark.parametrize("seed", range(6))
def test_moved_boxes_have_the_moved_corners(seed: int) -> None:
    rng = np.random.default_rng(seed)
    turn = rng.uniform(-4, 4)
    mirror = np.diag([rng.choice([-1, 1]), rng.choice([-1, 1]), 1])
    affine = np.eye(4)
    affine[:3, :3] = rng.uniform(0.5, 2) * np.array([[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0],
                                                     [0, 0, 1]]) @ mirror
    affine[:3, 3] = rng.normal(size=3)
    box = torch.from_numpy(np.column_stack([rng.normal(size=(5, 3)), rng.uniform(0.5, 4, (5, 3)), rng.uniform(-4, 4, 5)]))
    map_ = torch.from_numpy(affine)
    there = boxes.corners(box) @ map_[:3, :3].T + map_[:3, 3]
    own = boxes.corners(boxes.moved(box, map_))
    assert torch.cdist(there, own).amin(2).max() < 1e-6 and torch.cdist(own, there).amin(2).max() < 1e-6
    front = box[:, :3] + torch.stack([box[:, 6].cos(), box[:, 6].sin(), 0 * box[:, 6]], -1)  # ahead stays ahead
    moved = boxes.moved(box, map_)
    ahead = (front @ map_[:3, :3].T + map_[:3, 3]) - moved[:, :3]
    assert torch.allclose(torch.atan2(ahead[:, 1], ahead[:, 0]).sin(), moved[:, 6].sin(), atol=1e-6)
    assert torch.allclose(boxes.moved(moved, torch.linalg.inv(map_))[:, :6], box[:, :6])


def test_of_boxes_that_overlap_the_better_of_a_class_is_kept() -> None:
    def box(x: float, z: float = 0.0) -> list[float]:
        return [x, 0, z, 4, 2, 1, 0.3 if x else 0.0]

    rows, label = torch.tensor([box(0), box(0.5), box(0.2, 3), box(9), box(0), box(0.9)]), torch.tensor([0, 0, 0, 0, 1, 0])
    assert boxes.distinct(rows, label, 0.3, flat=True).tolist() == [True, False, False, True, True, False]
    assert boxes.distinct(rows, label, 0.3, flat=False).tolist() == [True, False, True, True, True, False]
    chain = torch.tensor([[float(x), 0, 0, 4, 2, 1, 0] for x in (0, 2, 4)])  # the first drops the second, which drops nothing
    assert boxes.distinct(chain, torch.zeros(3, dtype=torch.int64), 0.3, flat=True).tolist() == [True, False, True]
    assert boxes.distinct(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), 0.3, flat=True).shape == (0,)


def seen(recipe: TaskRecipe, data: Data) -> tuple[Any, PointDetectionObjective, Objects, Truth]:
    """A drawn view of the first row, and what it is said to hold."""
    row = data.rows()[0]
    task = objective(recipe.assemble(recipe.task.scope(data).classes))
    assert isinstance(task, PointDetectionObjective) and row.objects is not None
    task.learn_from(data, [row])
    batch = next(iter(loader(data.cache, [row], recipe, steps=1)))
    view = recipe.modality.augment(batch.views["x"], recipe.views["x"])
    return view, task, row.objects, task._truth(row.objects, view.frame.affine[0], view.array[0, :3].T)


def test_boxes_of_an_augmented_view_lie_about_the_same_points(tmp_path: Path) -> None:
    make_street(tmp_path / "data")
    recipe, data = opened(tmp_path / "data", tmp_path, "points/detection-lidar", [
        *STREET, "views.x={size: [1500], rotate: 180, scale: [0.8, 1.3], flip: [1, 0.5], shift: 2, drop: [0.1, 0.2]}"])
    view, _, objects, truth = seen(recipe, data)
    stored = torch.from_numpy(data.cache.array(data.rows()[0].index)[:3].T.copy()).double()
    real = view.index[0] >= 0
    before = boxes.inside(stored[view.index[0][real]][None], torch.from_numpy(objects.box)[None])[0]
    after = boxes.inside(view.array[0, :3].T[real][None].double(), truth.box[None].double())[0]
    assert len(truth.box) == len(objects) and before.sum(0).min() > 50
    assert (before == after).float().mean() > 0.999  # float32 at the faces
    assert (torch.from_numpy(objects.box[:, :3]) - truth.box[:, :3]).abs().max() > 1


def test_objects_that_a_view_does_not_show_are_not_taught(tmp_path: Path) -> None:
    make_street(tmp_path / "data")
    for least, left in ((100, 5), (200, 0)):
        changes = [*STREET, f"task.detection3d.least={least}"]
        recipe, data = opened(tmp_path / "data", tmp_path, "points/detection-lidar", changes)
        *_, truth = seen(recipe, data)
        assert len(truth.box) == left


# ---- what is ignored


def tokens(cloud: Tensor) -> tuple[Any, Encoded]:
    """Points (N, 3) as a stream of tokens, and a pass that says nothing of them."""
    kind = modality_class("points")
    modality: Any = kind(kind.Options.model_validate({"normalise": "none", "count": 32, "size": 8}))
    view = modality.example((len(cloud),), Rng.of(0, 0, "example"))
    stream = modality.tokenizer().stream(replace(view, array=cloud.T[None]))
    return stream, Encoded(torch.randn(1, stream.valid.shape[1], 24), {}, stream.valid)


def test_an_ignored_box_teaches_the_ground_below_it_nothing() -> None:
    cloud = torch.rand(300, 3) * torch.tensor([12.0, 12.0, 1.0]) - torch.tensor([6.0, 6.0, 0.0])
    stream, encoded = tokens(cloud)
    head = Centres(low=(-6, -6), high=(6, 6), cell=0.5).build(24, 2)
    box = torch.tensor([[0.0, 0, 0.5, 4, 2, 1, 0.5], [4.0, 4, 0.5, 1, 1, 1, 0]])
    made = head(encoded, stream)
    made["heat"].retain_grad()
    truth = Truth(box, torch.tensor([1, 0]), torch.tensor([True, False]))
    head.losses(made, [truth])["heat"].total.backward()
    grad = made["heat"].grad
    middles = torch.cartesian_prod(*[torch.arange(24) * 0.5 - 5.75] * 2)
    below = boxes.inside(torch.cat([middles, torch.full((576, 1), 0.5)], 1)[None], box[None, :1])[0, :, 0].view(24, 24)
    assert 20 < int(below.sum()) < 40
    assert (grad[0, 1][below] == 0).all() and (grad[0, 1][~below] != 0).all()  # of its own class alone
    assert (grad[0, 0] != 0).all()


def test_a_query_that_finds_an_ignored_box_is_neither_right_nor_wrong() -> None:
    stream, encoded = tokens(torch.randn(200, 3))
    head = Queries(queries=8, depth=1, heads=2).build(24, 2)
    made = head(encoded, stream)
    made["logits"].retain_grad()
    made["code"].retain_grad()
    box = torch.tensor([[0.0, 0, 0, 1, 1, 1, 0], [1.0, 1, 0, 1, 1, 1, 0]])
    losses = head.losses(made, [Truth(box, torch.tensor([0, 1]), torch.tensor([True, False]))])
    (losses["class"].total + losses["box"].total).backward()
    assert (made["logits"].grad[0].abs().sum(-1) == 0).sum() == 1
    assert (made["code"].grad[0].abs().sum(-1) > 0).sum() == 1


# ---- from files to files


def test_a_street_is_learnt_by_heart_and_written_as_kitti_has_it(tmp_path: Path) -> None:
    """Trained by the public verb, predicted into label files, read back: every object at KITTI's IoU."""
    box, names = make_street(tmp_path / "data")
    changes = [*STREET, "train.steps=60"]
    meristem.finetune("points/detection-lidar", tmp_path / "data", tmp_path / "run", changes, split="1,0,0", quiet=True)
    written = meristem.predict(tmp_path / "run", tmp_path / "data", tmp_path / "out", quiet=True)
    assert [path.relative_to(tmp_path / "out").as_posix() for path in written] == ["000000.txt"]
    lines = written[0].read_text().splitlines()
    scores = [float(line.split()[15]) for line in lines]
    assert scores == sorted(scores, reverse=True) and all(len(line.split()) == 16 for line in lines)
    (tmp_path / "data" / "label_2" / "000000.txt").write_text("\n".join(lines[:len(box)]))
    recipe = resolve("points/detection-lidar", "points", changes)
    objects = Manifest.discover(tmp_path / "data", recipe.modality).rows[0].objects
    assert objects is not None
    overlap = boxes.iou(torch.from_numpy(box), torch.from_numpy(objects.box))[0].numpy()
    alike = np.array([name == "Pedestrian" for name in names])[:, None] == objects.label[None]
    least = np.where(np.array(names) == "Car", 0.7, 0.5)
    assert ((overlap * alike).max(1) >= least).all() and len(set((overlap * alike).argmax(1))) == len(box)
    assert len(lines) == len(box) or scores[len(box)] < 0.5 * scores[len(box) - 1]


def test_a_room_is_learnt_by_heart_and_written_as_boxes(tmp_path: Path) -> None:
    box = make_room(tmp_path / "data")
    recipe, data = opened(tmp_path / "data", tmp_path, "points/detection-room", [*ROOM, "train.steps=90", "train.lr=2e-3"])
    scope = recipe.task.scope(data)
    assembly = tune(recipe, data, data.rows(), scope, None, "room", quiet=True).outcome.assembly
    case, = score(assembly, data, data.rows(), scope)
    assert perfect(case, 0.5)
    assert case.truth is not None and np.allclose(case.truth.box, box, atol=1e-4)
    assert case.truth.size == pytest.approx(box[:, 3:6].prod(1).tolist(), abs=1e-4)
    path, = objective(assembly).write(assembly, data, data.rows(), scope, tmp_path)
    scene, = json.loads(path.read_text())["scenes"]
    assert case.found is not None and scene["file"] == "1.npz" and np.allclose(scene["boxes"], case.found.box, atol=1e-3)
    assert scene["labels"] == [scope.values[i] for i in case.found.label]
    (tmp_path / "data" / "boxes.json").write_text(path.read_text())
    again = Manifest.discover(tmp_path / "data", recipe.modality)  # what is written can be read
    assert again.object_names == ("chair", "table")
    assert again.rows[0].objects is not None and len(again.rows[0].objects) == len(scene["boxes"])


def test_frames_without_a_calibration_are_written_as_scenes(tmp_path: Path) -> None:
    make_street(tmp_path / "data")
    recipe, data = opened(tmp_path / "data", tmp_path, "points/detection-lidar", [*STREET, "train.steps=1"])
    (tmp_path / "data" / "calib" / "000000.txt").unlink()
    assembly, scope = recipe.assemble(2), recipe.task.scope(data)
    path, = objective(assembly).write(assembly, data, data.rows(), scope, tmp_path)
    assert path.name == "boxes.json" and json.loads(path.read_text())["classes"] == ["Car", "Pedestrian"]


def test_a_recipe_can_be_looked_at_without_data() -> None:
    for name, passes in (("points/detection-lidar", ["encoder(x)"]), ("points/detection-room", ["encoder(x)"])):
        recipe = resolve(name, "points", ["views.x.size=[512]", *SMALL])
        assert recipe.task.metric == ("ap40" if name.endswith("lidar") else "ap50")
        assert recipe.task.scoring == ("kitti" if name.endswith("lidar") else "room")
        assert meristem.show_recipe(name)["passes"] == passes


@pytest.mark.parametrize(("changes", "said"), [
    (["views.x.axis=any", "views.x.rotate=20"], "boxes stay upright only in views that turn about z"),
    (["modality.points.normalise=sphere"], "every cloud is scaled to a sphere of its own"),
    (["task.detection3d.head.centres.high=[70, -40]"], "there is no ground between low"),
    (["task.detection3d.head=centers"], "no head called 'centers'; did you mean centres")])
def test_what_cannot_work_is_refused_before_a_file_is_read(changes: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        resolve("points/detection-lidar", "points", changes)


def test_pictures_are_no_clouds(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("modality: {image: {patch: [8, 8]}}\nviews: {x: {size: [32, 32]}}\n"
                                        "encoder: transformer\ntask: {detection3d: {head: queries}}\n"
                                        "train: {steps: 1, batch: 1}\n")
    with pytest.raises(RecipeError, match="upright boxes are found among points; the modality is image"):
        resolve(str(tmp_path / "mine.yaml"), "points", [])


def test_clouds_without_an_object_are_refused_in_words(tmp_path: Path) -> None:
    write_frame(tmp_path / "data", "1", street(0)[0], [])
    recipe, data = opened(tmp_path / "data", tmp_path, "points/detection-lidar", STREET)
    with pytest.raises(DataError, match="no object is annotated in any cloud"):
        recipe.task.scope(data)


# ---- real frames


@pytest.mark.data
def test_the_cars_of_a_kitti_frame_are_learnt_by_heart(tmp_path: Path, data_root: Path) -> None:
    """All six, at KITTI's IoU of 0.7, the one of 55 points among them."""
    kitti_frame(tmp_path / "data", data_root)
    case = by_heart(tmp_path / "data", tmp_path, "points/detection-lidar", [*STREET, "train.steps=80"])
    assert case.truth is not None and len(case.truth.box) == 6
    assert perfect(case, 0.7)


@pytest.mark.data
def test_the_furniture_of_a_sun_rgb_d_frame_is_learnt_by_heart(tmp_path: Path, data_root: Path) -> None:
    folder = data_root / "detection3d-frames" / "sunrgbd"
    about = unpickled(folder / "sunrgbd_000017_infos.pkl")["instances"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.bin").write_bytes((folder / "000017.bin").read_bytes())
    (tmp_path / "data" / "boxes.json").write_text(json.dumps({"classes": ["a", "b"], "scenes": [
        {"file": "1.bin", "boxes": [x["bbox_3d"] for x in about], "labels": ["a", "b"]}]}))
    changes = [*ROOM, "modality.points.columns=[x, y, z, red, green, blue]", "modality.points.features=[colour]",
               "views.x.size=[4096]", "train.steps=80", "train.lr=2e-3"]
    assert perfect(by_heart(tmp_path / "data", tmp_path, "points/detection-room", changes), 0.5)
