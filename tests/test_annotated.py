"""Annotated objects: COCO and Pascal VOC, what is refused of them, and where they lie in their samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageDraw

from meristem import api
from meristem.errors import DataError
from meristem.modalities.base import Header, modalities, modality_class
from meristem.modalities.image import Image
from meristem.modalities.objects import Objects
from meristem.platform.data.annotated import format_of
from meristem.platform.data.layouts import Search
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.source import Data, open_data

IMAGE = Image(Image.Options())


def picture(path: Path, seed: int, size: tuple[int, int] = (30, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(path)


def voc(path: Path, objects: Sequence[tuple[Any, ...]]) -> None:
    """objects: name, xmin, ymin, xmax, ymax[, difficult]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = ("xmin", "ymin", "xmax", "ymax")
    items = "".join(f"<object><name>{name}</name><difficult>{int(bool(rest))}</difficult><bndbox>"
                    + "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box, strict=True)) + "</bndbox></object>"
                    for name, *numbers in objects for box, rest in [(numbers[:4], numbers[4:])])
    path.write_text(f"<annotation><size><width>40</width><height>30</height></size>{items}</annotation>")


def opened(path: Path, tmp_path: Path) -> Data:
    return open_data(path, IMAGE, cache=tmp_path / "cache", quiet=True)


def by_name(data: Data) -> dict[str, Any]:
    return {Path(row.local).stem: row for row in data.manifest.rows}


@pytest.fixture
def voc_folder(tmp_path: Path) -> Path:
    root = tmp_path / "cells"
    for i, name in enumerate(("a", "b", "c", "d")):
        picture(root / "JPEGImages" / f"{name}.png", i)
    voc(root / "Annotations" / "a.xml", [("red", 1, 1, 40, 30), ("white", 5, 7, 20, 9, 1)])
    voc(root / "Annotations" / "b.xml", [])
    voc(root / "Annotations" / "c.xml", [("white", 0, 2, 12, 30)])
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nd\n")
    (lists / "val.txt").write_text("b\n")
    (lists / "test.txt").write_text("c\n")
    return root


def test_voc_is_read_with_its_splits_and_pixels_that_count_from_one(voc_folder: Path, tmp_path: Path) -> None:
    data = opened(voc_folder, tmp_path)
    rows = by_name(data)
    assert data.manifest.object_names == ("red", "white") and data.manifest.layout == "Pascal VOC"
    assert {name: row.split for name, row in rows.items()} == {"a": "train", "b": "val", "c": "test", "d": "train"}
    # the whole picture from edge to edge: half a pixel beyond the centres of the first and the last
    assert rows["a"].objects.box.tolist() == [[-0.5, -0.5, 29.5, 39.5], [5.5, 3.5, 8.5, 19.5]]
    assert rows["a"].objects.label.tolist() == [0, 1] and rows["a"].objects.ignore.tolist() == [False, True]
    assert len(rows["b"].objects) == 0 and rows["b"].labelled  # somebody looked and found nothing
    assert rows["c"].objects.box.tolist() == [[1.5, -0.5, 29.5, 11.5]]  # a 0: this file counts from 0
    assert rows["d"].objects is None and not rows["d"].labelled
    assert set(data.cache.header(rows["a"].index).anchors) == {(14, 20)} or \
        set(data.cache.header(rows["a"].index).anchors) == {(14, 19)}


WRONG = {"outside": ([("red", 5, 5, 60, 20)], "box", "outside"), "flat": ([("red", 9, 5, 8, 20)], "box", "zero area"),
         "unknown": ([("blue", 5, 5, 9, 9)], "class", "'blue'"), "nan": ([("red", "nan", 5, 9, 9)], "box", "finite"),
         "letters": ([("red", "x", 5, 9, 9)], "unreadable", "four numbers")}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_box_is_named_and_counted_and_its_image_stays(case: str, voc_folder: Path, tmp_path: Path) -> None:
    objects, reason, message = WRONG[case]
    (voc_folder / "classes.txt").write_text("red\nwhite\n")
    voc(voc_folder / "Annotations" / "a.xml", objects)
    data = opened(voc_folder, tmp_path)
    row = by_name(data)["a"]
    assert row.objects is None and row.index in data.cache
    problem, = data.cache.quarantine
    assert problem.reason == reason and message in problem.message and problem.case == row.case
    report = api.check_data(voc_folder, "image")
    assert not report.ok and report.refused == {reason: 1}
    assert report.local[report.of("refused")[0].cases[0].case].endswith(("a.xml", "a.png"))


def test_a_damaged_xml_and_one_without_an_image(voc_folder: Path, tmp_path: Path) -> None:
    (voc_folder / "Annotations" / "a.xml").write_text("<annotation><object>")
    voc(voc_folder / "Annotations" / "zz.xml", [("red", 1, 2, 3, 4)])
    data = opened(voc_folder, tmp_path)
    assert sorted(p.reason for p in data.cache.quarantine) == ["missing", "unreadable"]
    assert by_name(data)["a"].objects is None


def coco(boxes: dict[str, list[dict[str, Any]]], names: Sequence[str] = ("red", "white"), **image: Any) -> dict[str, Any]:
    images = [{"id": 10 + i, "file_name": f"{name}.png", "height": 30, "width": 40, **image} for i, name in enumerate(boxes)]
    found = [{"image_id": image["id"], "iscrowd": 0, **box} for image, some in zip(images, boxes.values(), strict=True)
             for box in some]
    return {"images": images, "categories": [{"id": 7 * (i + 1), "name": n} for i, n in enumerate(names)],
            "annotations": [{"id": i, **a} for i, a in enumerate(found)]}


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    root = tmp_path / "cells"
    (root / "annotations").mkdir(parents=True)
    for split, names in (("train2017", "ab"), ("val2017", "c")):
        for name in names:
            picture(root / split / f"{name}.png", ord(name))
    train = coco({"a": [{"category_id": 14, "bbox": [0, 0, 40, 30]}, {"category_id": 7, "bbox": [2.5, 4, 10, 3], "iscrowd": 1}],
                  "b": []})
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(train))
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(
        coco({"c": [{"category_id": 7, "bbox": [1, 2, 3, 4]}]})))
    return root


def test_coco_is_read_from_a_folder_and_from_a_file(coco_folder: Path, tmp_path: Path) -> None:
    data = opened(coco_folder, tmp_path)
    rows = by_name(data)
    assert data.manifest.object_names == ("red", "white") and data.manifest.layout == "COCO"
    assert {name: row.split for name, row in rows.items()} == {"a": "train", "b": "train", "c": "val"}
    assert rows["a"].objects.box.tolist() == [[-0.5, -0.5, 29.5, 39.5], [3.5, 2.0, 6.5, 12.0]]
    assert rows["a"].objects.label.tolist() == [1, 0] and rows["a"].objects.ignore.tolist() == [False, True]
    assert rows["a"].meta["image_id"] == 10 and len(rows["b"].objects) == 0
    alone = Manifest.discover(coco_folder / "annotations" / "instances_val2017.json", IMAGE)
    assert [Path(row.local).name for row in alone.rows] == ["c.png"]


def test_coco_is_of_the_modality_that_reads_its_files(coco_folder: Path) -> None:
    found = {name for name in modalities() if format_of(Search(modality_class(name)), coco_folder) is not None}
    assert found == {"image"}


def test_what_is_wrong_with_a_coco_file_is_named(coco_folder: Path, tmp_path: Path) -> None:
    file = coco_folder / "annotations" / "instances_train2017.json"
    about = coco({"a": [{"category_id": 3, "bbox": [0, 0, 4, 3]}], "b": [{"category_id": 7, "bbox": [0, 0, 4, 0]}],
                  "gone": [{"category_id": 7, "bbox": [0, 0, 4, 3]}]})
    about["annotations"].append({"id": 99, "image_id": 1234, "category_id": 7, "bbox": [0, 0, 1, 1]})
    file.write_text(json.dumps(about))
    data = opened(coco_folder, tmp_path)
    found = sorted((p.reason, p.message) for p in data.cache.quarantine)
    assert [reason for reason, _ in found] == ["box", "box", "class", "missing"]
    assert "zero area" in found[0][1] + found[1][1] and "unknown category 3" in found[2][1]
    rows = by_name(data)
    assert rows["a"].objects is None and rows["b"].objects is None and "gone" not in rows
    file.write_text(json.dumps(coco({"a": []}, names=("red", "green"))))
    with pytest.raises(DataError, match="categories"):
        Manifest.discover(coco_folder, IMAGE)


def test_polygons_and_run_lengths_draw_the_same_object(tmp_path: Path) -> None:
    picture(tmp_path / "cells" / "a.png", 0)
    corners = [(4, 3), (21, 3), (21, 17), (4, 17)]
    drawn = Pillow.new("L", (40, 30))
    ImageDraw.Draw(drawn).rectangle((4, 3, 20, 16), fill=1)
    mask = np.asarray(drawn)
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    counts = np.diff([0, *edges, len(flat)]).tolist()
    outlines = [[[float(v) for corner in corners for v in corner]], {"counts": counts, "size": [30, 40]}]
    about = coco({"a": [{"category_id": 7, "bbox": [4, 3, 17, 14], "segmentation": s} for s in outlines]})
    (tmp_path / "cells" / "boxes.json").write_text(json.dumps(about))
    row, = opened(tmp_path / "cells", tmp_path).manifest.rows
    assert row.objects is not None
    for found in row.objects.masks:
        whole = np.zeros((30, 40), bool)
        whole[tuple(slice(a, a + n) for a, n in zip(found.start, found.cells.shape, strict=True))] = found.cells
        assert (whole == mask.astype(bool)).all()


SIDE = st.integers(1, 60)


@settings(max_examples=60, deadline=None)
@given(SIDE, SIDE, st.floats(0.2, 5), st.floats(0.2, 5), st.integers(0, 99))
def test_placing_boxes_and_giving_them_back_is_the_same(rows: int, columns: int, dy: float, dx: float, seed: int) -> None:
    """Also of a picture that is stored on another lattice than its file's."""
    rng = np.random.default_rng(seed)
    stored = max(rows // 2, 1), columns * 2
    sy, sx = dy * rows / stored[0], dx * columns / stored[1]
    header = Header((3, *stored), ((sy, 0, (sy - dy) / 2), (0, sx, (sx - dx) / 2), (0, 0, 1)), (sy, sx),
                    source={"shape": [rows, columns]})
    size = np.array([rows, columns] * 2)
    box = np.sort(rng.uniform(0, 1, (5, 2, 2)), axis=1).reshape(5, 4) * size
    placed = IMAGE.placed(Objects(box, np.zeros(5, np.int64)), header)
    assert np.allclose(IMAGE.annotated(placed.box, header), box)
    edge = IMAGE.placed(Objects(np.array([[0, 0, rows, columns]], float), np.zeros(1, np.int64)), header).box[0]
    assert np.allclose(edge, [-dy / 2, -dx / 2, (rows - 0.5) * dy, (columns - 0.5) * dx])
