"""Objects of clouds as files have them: KITTI's labels against corners by hand and counts of another tool, and boxes.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from street import kitti_frame, line, street, turned, unpickled, write_frame

from meristem.errors import DataError
from meristem.modalities.base import modality_class
from meristem.platform import boxes
from meristem.platform.data.annotated import kitti
from meristem.platform.data.guess import guess_modality
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.source import open_data

CAMERA = [(1.5, 1.6, 3.9, 1.0, 1.7, 12.0, 0.3), (1.75, 0.6, 0.8, -4.0, 1.6, 8.0, -2.9), (1.4, 1.5, 3.5, 6.0, 1.8, 30.0, 1.57)]


def points(**options: Any) -> Any:
    kind = modality_class("points")
    return kind(kind.Options.model_validate({"normalise": "none", **options}))


def discovered(root: Path, **options: Any) -> Manifest:
    return Manifest.discover(root, points(**options))


def corners_by_hand(numbers: tuple[float, ...]) -> np.ndarray:
    """(8, 3) in the camera: the bottom's middle is the origin, y points down, the turn is about y."""
    height, width, length, x, y, z, turn = numbers
    local = np.array([[a * length / 2, b, c * width / 2] for a in (-1, 1) for b in (0, -height) for c in (-1, 1)])
    c, s = np.cos(turn), np.sin(turn)
    return local @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]).T + [x, y, z]


def farthest(one: np.ndarray, other: np.ndarray) -> float:
    """How far the corners of a box lie from those of another, whatever their order."""
    return float(np.linalg.norm(one[:, None] - other[None], axis=-1).min(1).max())


@pytest.mark.parametrize(("sensor", "slack"), [(turned(0.0), 1e-9), (turned(0.0, 0.7), 1e-9), (turned(0.015, 0.0075), 0.05)],
                         ids=["straight", "turned aside", "tilted as KITTI's"])
def test_boxes_have_the_corners_of_their_labels(tmp_path: Path, sensor: np.ndarray, slack: float) -> None:
    """Exactly where the camera stands upright; a tilt is what an upright box cannot follow."""
    write_frame(tmp_path, "000001", street(0)[0], [line("Car", x) for x in CAMERA], sensor)
    row, = discovered(tmp_path).rows
    assert row.objects is not None and len(row.objects) == 3
    for box, numbers in zip(row.objects.box, CAMERA, strict=True):
        true = (corners_by_hand(numbers) - sensor[:, 3]) @ sensor[:, :3]
        assert farthest(boxes.corners(torch.from_numpy(box)).numpy(), true) < slack + 1e-6
        ahead = corners_by_hand((0, 0, 1, 0, 0, 0, numbers[6]))[-1] @ sensor[:, :3]  # where the front is, not the back
        assert [np.cos(box[6]), np.sin(box[6])] == pytest.approx((ahead[:2] / np.linalg.norm(ahead[:2])).tolist(), abs=1e-6)


def test_a_heading_is_minus_the_turn_and_a_quarter_where_the_camera_looks_along_x() -> None:
    known = kitti.Calibration(np.vstack([turned(0.0), [0, 0, 0, 1]]), np.eye(3, 4))
    turn = np.linspace(-3, 3, 7)
    labels = np.column_stack([np.zeros((7, 7)), np.ones((7, 3)), np.zeros((7, 3)), turn])
    difference = kitti.to_lidar(labels, known)[:, 6] + turn + np.pi / 2
    assert np.allclose(np.exp(1j * difference), 1)


def test_predictions_are_labels_that_read_back_as_the_same_boxes(tmp_path: Path) -> None:
    cloud, box, names = street(1)
    write_frame(tmp_path, "000001", cloud, [])
    known = kitti.calibration(tmp_path / "velodyne" / "000001.bin")
    assert known is not None
    text = kitti.text(box, names, [0.5] * len(box), known)
    (tmp_path / "label_2" / "000001.txt").write_text(text)
    manifest = discovered(tmp_path)
    objects = manifest.rows[0].objects
    assert objects is not None and manifest.object_names == ("Car", "Pedestrian")
    assert np.abs(objects.box - box).max() < 0.011  # two decimals
    for words, one in zip(map(str.split, text.splitlines()), box, strict=True):
        seen = boxes.corners(torch.from_numpy(one)).numpy() @ known.camera[:3, :3].T + known.camera[:3, 3]
        pixel = (seen @ known.image[:, :3].T + known.image[:, 3])
        flat = pixel[:, :2] / pixel[:, 2:]
        assert list(map(float, words[4:8])) == pytest.approx([*flat.min(0).clip(0), *flat.max(0)], abs=0.006)
        x, z, turn, alpha = (float(words[i]) for i in (11, 13, 14, 3))
        assert np.exp(1j * (alpha - turn + np.arctan2(x, z))) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("height", "occluded", "truncated", "level"), [
    (40, 0, 0.15, 0), (39.9, 0, 0.15, 1), (40, 1, 0.15, 1), (40, 0, 0.2, 1), (25, 2, 0.5, 2), (25, 0, 0.4, 2), (24.9, 0, 0, 3),
    (60, 3, 0, 3), (60, 0, 0.6, 3)])
def test_objects_are_graded_as_the_benchmark_does(tmp_path: Path, height: float, occluded: int, truncated: float, level: int
                                                 ) -> None:
    write_frame(tmp_path, "1", street(0)[0], [line("Car", CAMERA[0], (0, 100, 50, 100 + height), truncated, occluded)])
    objects = discovered(tmp_path).rows[0].objects
    assert objects is not None and objects.level.tolist() == [level]


NOBODY = (-1, -1, -1, -1000, -1000, -1000, -10)


def test_what_nobody_cares_for_is_ignored_where_it_has_a_box_and_dropped_where_not(tmp_path: Path) -> None:
    write_frame(tmp_path, "1", street(0)[0], [line("Car", CAMERA[0]), line("DontCare", NOBODY), line("DontCare", CAMERA[1]),
                                              line("Cyclist", CAMERA[2])])
    manifest = discovered(tmp_path)
    objects = manifest.rows[0].objects
    assert objects is not None and manifest.object_names == ("Car", "Cyclist") and not manifest.problems
    assert objects.label.tolist() == [0, 0, 1, 1] and objects.ignore.tolist() == [False, True, True, False]


def test_listed_classes_ignore_their_neighbours_and_leave_the_others_out(tmp_path: Path) -> None:
    write_frame(tmp_path, "1", street(0)[0], [line(name, CAMERA[0]) for name in ("Tram", "Van", "Person_sitting", "Car")])
    (tmp_path / "classes.txt").write_text("Car\nCyclist\nPedestrian\n")
    manifest = discovered(tmp_path)
    objects = manifest.rows[0].objects
    assert objects is not None and manifest.object_names == ("Car", "Cyclist", "Pedestrian")
    assert objects.label.tolist() == [0, 2, 0] and objects.ignore.tolist() == [True, True, False]


@pytest.mark.parametrize(("bad", "reason", "said"), [
    ("Car 0 0 0 1 2 3 4", "columns", "line 2 of its label has 8 columns"),
    (line("Car", CAMERA[0]) + " 0.5 0.5", "columns", "has 17 columns"),
    (line("Car", (1, 1, "wide", 0, 0, 0, 0)), "columns", "something else than numbers"),  # type: ignore[arg-type]
    (line("Car", (1, 1, float("nan"), 0, 0, 0, 0)), "box", "object 2 (Car) is not made of finite numbers"),
    (line("Car", (1, 0, 3, 0, 0, 9, 0)), "box", "box 2 (Car) has the sides 3, 0, 1"),
    (line("Unicorn", CAMERA[0]), "class", "unknown class 'Unicorn'")])
def test_a_wrong_label_is_named_and_its_cloud_stays_unlabelled(tmp_path: Path, bad: str, reason: str, said: str) -> None:
    for name, more in (("1", [bad]), ("2", [])):
        write_frame(tmp_path, name, street(0)[0], [line("Car", CAMERA[0]), *more])
    (tmp_path / "classes.txt").write_text("Car\n")
    manifest = discovered(tmp_path)
    problem, = manifest.problems
    assert problem.reason == reason and said in problem.message and problem.local == "velodyne/1.bin"
    assert [row.objects is None for row in manifest.rows] == [True, False]


def test_missing_and_damaged_calibrations_and_clouds_are_named(tmp_path: Path) -> None:
    for name in "1234":
        write_frame(tmp_path, name, street(0)[0], [line("Car", CAMERA[0])])
    (tmp_path / "calib" / "1.txt").unlink()
    (tmp_path / "calib" / "2.txt").write_text("P2: 1 2 3\n")
    (tmp_path / "velodyne" / "3.bin").unlink()
    manifest = discovered(tmp_path)
    assert sorted(p.reason for p in manifest.problems) == ["calibration", "calibration", "missing"]
    assert {row.local: row.objects is None for row in manifest.rows} == \
        {"velodyne/1.bin": True, "velodyne/2.bin": True, "velodyne/4.bin": False}


def test_frames_without_labels_have_nobody_looked_at_and_empty_ones_nothing_in_them(tmp_path: Path) -> None:
    write_frame(tmp_path, "1", street(0)[0], None)
    write_frame(tmp_path, "2", street(0)[0], [])
    first, second = discovered(tmp_path).rows
    assert first.objects is None and second.objects is not None and len(second.objects) == 0


def test_lists_divide_and_validation_tests_where_the_test_is_blind(tmp_path: Path) -> None:
    for name in "1234":
        write_frame(tmp_path / "training", name, street(int(name))[0], [line("Car", CAMERA[0])])
    write_frame(tmp_path / "testing", "1", street(0)[0], None)
    (tmp_path / "ImageSets").mkdir()
    for name, frames in (("train", "1\n2\n"), ("val", "3\n"), ("test", "1\n")):
        (tmp_path / "ImageSets" / f"{name}.txt").write_text(frames)
    splits = {row.local: row.split for row in discovered(tmp_path).rows}
    assert splits == {"training/velodyne/1.bin": "train", "training/velodyne/2.bin": "train", "training/velodyne/3.bin": "test",
                      "training/velodyne/4.bin": "", "testing/velodyne/1.bin": "test"}
    data = open_data(tmp_path, points(), "auto", tmp_path / "cache", quiet=True)  # the two frames called 1 are no one subject
    assert len({row.subject for row in data.rows()}) == 5
    assert [row.local for row in data.rows("test", labelled=True)] == ["training/velodyne/3.bin"]
    own = {row.local: row.split for row in discovered(tmp_path / "training").rows}
    assert set(own.values()) == {""}  # the lists are the root's
    (tmp_path / "training" / "ImageSets").mkdir()
    (tmp_path / "training" / "ImageSets" / "val.txt").write_text("3\n")
    (tmp_path / "training" / "ImageSets" / "test.txt").write_text("4\n")
    own = {row.local: row.split for row in discovered(tmp_path / "training").rows}
    assert own["velodyne/3.bin"] == "val" and own["velodyne/4.bin"] == "test"


def test_annotations_of_clouds_say_that_the_data_are_clouds(tmp_path: Path) -> None:
    """Though there are more texts than clouds, and texts may be graphs."""
    write_frame(tmp_path / "street", "1", street(0)[0], [line("Car", CAMERA[0])])
    room(tmp_path / "room", [{"file": "1.npz", "boxes": [BOX], "labels": ["chair"]}])
    assert guess_modality(tmp_path / "street") == guess_modality(tmp_path / "room") == "points"


def test_a_sector_leaves_out_what_no_camera_sees(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cloud = np.column_stack([rng.uniform(-20, 20, (500, 2)), rng.uniform(-2, 1, 500), rng.uniform(0, 1, 500)])
    write_frame(tmp_path, "1", cloud, [])
    sample = points(sector=41.0).read([tmp_path / "velodyne" / "1.bin"])
    ahead = [abs(np.degrees(np.arctan2(y, x))) <= 41 for x, y, *_ in cloud.astype("<f4").tolist()]
    assert sample.array is not None and sample.array.shape[1] == sum(ahead) == 500 - sample.notes["points left out"]
    written = np.load(points(sector=41.0).write(np.full(sum(ahead), 7), sample.header, tmp_path / "out.bin"))
    assert (written == np.where(ahead, 7, -1)).all()


# ---- any clouds


def room(root: Path, scenes: list[dict[str, Any]], classes: tuple[str, ...] = ("chair", "table")) -> None:
    for scene in scenes:
        (root / scene["file"]).parent.mkdir(parents=True, exist_ok=True)
        np.savez(root / scene["file"], points=np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32))
    (root / "boxes.json").write_text(json.dumps({"classes": classes, "scenes": scenes}))


BOX = [0.0, 0.5, 0.25, 1.0, 0.5, 0.5, 0.3]


def test_scenes_are_read_with_splits_and_subjects(tmp_path: Path) -> None:
    room(tmp_path, [{"file": "a/1.npz", "split": "train", "subject": "a", "boxes": [BOX], "labels": ["table"]},
                    {"file": "a/2.npz", "split": "train", "subject": "a", "boxes": [], "labels": []},
                    {"file": "b.npz", "split": "test"}])
    for place in (tmp_path, tmp_path / "boxes.json"):
        manifest = discovered(place)
        assert manifest.object_names == ("chair", "table") and [r.split for r in manifest.rows] == ["train", "train", "test"]
        assert len({row.subject for row in manifest.rows}) == 2
        first, second, third = (row.objects for row in manifest.rows)
        assert first is not None and first.label.tolist() == [1] and first.box.tolist() == [BOX]
        assert second is not None and len(second) == 0 and third is None


@pytest.mark.parametrize(("boxes_", "labels", "reason", "said"), [
    ([BOX[:6]], ["chair"], "box", "box 1 (chair) is not made of seven finite numbers"),
    ([BOX, [0, 0, 0, 1, -1, 1, 0]], ["chair", "table"], "box", "box 2 (table) has the sides 1, -1, 1"),
    ([BOX], ["sofa"], "class", "unknown class 'sofa'"),
    ([BOX], [], "box", "1 boxes and 0 labels")])
def test_a_wrong_scene_is_named_and_stays_unlabelled(tmp_path: Path, boxes_: Any, labels: Any, reason: str, said: str) -> None:
    right = {"file": "2.npz", "boxes": [BOX], "labels": ["chair"]}
    room(tmp_path, [{"file": "1.npz", "boxes": boxes_, "labels": labels}, right])
    manifest = discovered(tmp_path)
    problem, = manifest.problems
    assert problem.reason == reason and said in problem.message
    assert [row.objects is None for row in manifest.rows] == [True, False]


def test_a_file_that_describes_no_scenes_is_refused_in_words(tmp_path: Path) -> None:
    room(tmp_path, [{"file": "1.npz", "boxes": [BOX]}])
    with pytest.raises(DataError, match="does not describe scenes: KeyError"):
        discovered(tmp_path)


def test_boxes_lie_about_the_same_points_in_files_and_in_samples(tmp_path: Path) -> None:
    """In centimetres, 500 km from the origin."""
    rng = np.random.default_rng(0)
    far = np.array([5e7, 3e6, 200.0])
    xyz = rng.uniform(-300, 300, (400, 3)) + far
    np.savez(tmp_path / "1.npz", points=xyz)
    box = np.array([[*(far + np.array([20, -30, 10])), 250, 180, 300, 0.7]])
    (tmp_path / "boxes.json").write_text(json.dumps({"classes": ["heap"], "scenes": [
        {"file": "1.npz", "boxes": box.tolist(), "labels": ["heap"]}]}))
    data = open_data(tmp_path, points(unit=0.01, normalise="sphere"), "1,0,0", tmp_path / "cache", quiet=True)
    row, = data.rows()
    header = data.cache.header(row.index)
    assert row.objects is not None and np.abs(row.objects.box[:, :3]).max() < 10
    stored = data.cache.array(row.index)[:3].T @ np.array(header.affine)[:3, :3].T + np.array(header.affine)[:3, 3]
    inside = [boxes.inside(torch.from_numpy(x)[None].double(), torch.from_numpy(b)[None])[0, :, 0]
              for x, b in ((xyz, box), (stored, row.objects.box))]
    assert inside[0].equal(inside[1]) and 20 < int(inside[0].sum()) < 380
    assert np.allclose(data.modality.annotated(row.objects.box, header), box)  # type: ignore[attr-defined]


# ---- real frames


@pytest.mark.data
def test_the_boxes_of_a_real_frame_hold_the_points_that_another_tool_counted(tmp_path: Path, data_root: Path) -> None:
    about = kitti_frame(tmp_path, data_root)
    data = open_data(tmp_path, points(), "1,0,0", tmp_path / "cache", quiet=True)
    row, = data.rows()
    assert row.objects is not None and data.manifest.object_names == ("Car",)
    seen = torch.from_numpy(data.cache.array(row.index)[:3].T.copy())[None].double()
    counted = [one["num_lidar_pts"] for one in about["instances"] if one["bbox_label"] >= 0]
    found = boxes.inside(seen, torch.from_numpy(row.objects.box)[None])[0].sum(0).tolist()
    assert found == pytest.approx(counted, abs=1)  # 1325, 1900, 881, 659, 55, 162
    graded = [one["difficulty"] for one in about["instances"] if one["bbox_label"] >= 0]
    assert row.objects.level.tolist() == [3 if grade < 0 else grade for grade in graded]


@pytest.mark.data
def test_boxes_about_a_nuscenes_frame_hold_the_points_that_another_tool_counted(tmp_path: Path, data_root: Path) -> None:
    """All but a few of its 69 objects, by a point or two: theirs lean with the car."""
    folder = data_root / "detection3d-frames" / "nuscenes"
    about = unpickled(next(folder.glob("*.pkl")))["instances"]
    (tmp_path / "1.pcd.bin").write_bytes(next(folder.glob("*.pcd.bin")).read_bytes())
    (tmp_path / "boxes.json").write_text(json.dumps({"classes": [str(i) for i in range(-1, 10)], "scenes": [
        {"file": "1.pcd.bin", "boxes": [x["bbox_3d"] for x in about], "labels": [str(x["bbox_label"]) for x in about]}]}))
    data = open_data(tmp_path, points(), "1,0,0", tmp_path / "cache", quiet=True)
    row, = data.rows()
    assert row.objects is not None
    seen = torch.from_numpy(data.cache.array(row.index)[:3].T.copy())[None].double()
    found = boxes.inside(seen, torch.from_numpy(row.objects.box)[None])[0].sum(0).numpy()
    counted = np.array([x["num_lidar_pts"] for x in about])
    assert (found == counted).mean() > 0.85 and np.abs(found - counted).max() <= 0.1 * counted.max()
