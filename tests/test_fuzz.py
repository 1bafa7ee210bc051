"""The short form of `make fuzz`, what its findings have led to, and folders of which one file in a hundred is broken."""

from __future__ import annotations

import csv
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import inputs
import made_files
import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_skeletons import mocap
from PIL import Image
from pydantic import ValidationError
from test_graph_files import connectome, planetoid, tudataset

from meristem import api
from meristem.errors import DataError, MeristemError
from meristem.modalities import npy
from meristem.modalities.base import natural
from meristem.modalities.image import png
from meristem.modalities.image.files import decode
from meristem.platform import recipe as recipes
from meristem.platform.data.guess import guess_modality
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.names import telling
from meristem.platform.data.source import open_data
from meristem.platform.evaluation.results import Boxes


def reason(call: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as refused:
        call()
    assert refused.value.what and refused.value.remedy
    return refused.value.reason


def modality(name: str, **options: Any) -> Any:
    kind = inputs.modality_class(name)
    return kind(kind.Options.model_validate(options))


def test_broken_files_are_read_or_refused(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, Path(__file__).with_name("fuzz.py"), "--seconds", "8", "--seed", "1", "--blind",
                            "--keep", tmp_path / "found"], capture_output=True, text=True, timeout=900, cwd=tmp_path,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    counts = json.loads(ended.stdout.splitlines()[-1])
    assert counts["findings"] == 0 and counts["targets"].keys() == set(inputs.TARGETS)
    assert all(counts["targets"].values()) and counts["refused"] and counts["accepted"]


# ---- what was found


def test_a_damaged_png_of_16_bits_ends_no_process(tmp_path: Path) -> None:
    whole = inputs._deep(b"\x89PNG\r\n\x1a\n")
    at = whole.index(b"IDAT")
    size, = struct.unpack(">I", whole[at - 4:at])
    for bad in (whole[:at + 4 + size - 2] + b"\0\0", whole[:at + 4] + zlib.compress(b"\7" * 10)):  # another sum; too little
        body = bad[at + 4:]
        broken = whole[:at - 4] + struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
        (tmp_path / "a.png").write_bytes(broken + whole[-12:])
        assert reason(lambda: decode(tmp_path / "a.png", 3, 1 << 20)) == "truncated"
    assert png.sound(whole) == whole


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(-1, 3)", "(99999999, 99999999)", "(" * 300 + ")" * 300])
def test_an_array_is_believed_as_far_as_there_are_bytes(tmp_path: Path, shape: str) -> None:
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    raw = b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + bytes(48)
    (tmp_path / "a.npy").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("points.npy", raw)
    assert reason(lambda: npy.read(tmp_path / "a.npy")) in ("truncated", "unreadable")
    assert reason(lambda: npy.read(tmp_path / "b.npz", "points")) in ("truncated", "unreadable")


@pytest.mark.parametrize("kind", ["<c16", "|V7", "<U9", "<M8[s]", [("a", "<f4")], "<f16"])
def test_an_array_of_no_numbers_is_refused(tmp_path: Path, kind: Any) -> None:
    np.save(tmp_path / "a.npy", np.zeros((9, 3), np.dtype(kind)))
    assert reason(lambda: npy.read(tmp_path / "a.npy")) == "unreadable"


@pytest.mark.parametrize("wrong", [{"label": (0,)}, {"label": (0, -1)}, {"score": (0.5,)}, {"level": (1,)},
                                   {"box": ((0.0, 1.0), (0.0,))}])
def test_boxes_of_a_report_are_counted(wrong: dict[str, Any]) -> None:
    whole: dict[str, Any] = {"box": ((0.0, 1.0), (2.0, 3.0)), "label": (0, 1)}
    assert Boxes(**whole)
    with pytest.raises(ValidationError):
        Boxes(**{**whole, **wrong})


def test_an_archive_that_unpacks_to_far_more_is_a_bomb_and_its_members_go_nowhere(tmp_path: Path) -> None:
    plain = io.BytesIO()
    np.save(plain, np.zeros(npy.SMALL, np.uint8))
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("points.npy", plain.getvalue())
        archive.writestr("../../harmed.npy", b"harm")
    assert reason(lambda: npy.read(tmp_path / "b.npz", "points")) == "bomb"
    assert [f.name for f in tmp_path.iterdir()] == ["b.npz"]
    with lzma.open(tmp_path / "walk_1.txt.xz", "wb", preset=0) as file:
        for _ in range(300):
            file.write(b"0," * (1 << 19))
    with pytest.raises(DataError, match="unpacks to more"):
        inputs.modality_class("skeleton")(inputs.modality_class("skeleton").Options()).read([tmp_path / "walk_1.txt.xz"])


def test_a_list_of_clouds_that_claims_terabytes_or_leads_elsewhere(tmp_path: Path) -> None:
    points = modality("points")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("data", (10**9, 1000, 3), "f4", chunks=(1, 1000, 3))
    assert reason(lambda: points.elements(tmp_path / "a.h5")) == "bomb"
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["data"] = h5py.ExternalLink("a.h5", "data")
    assert reason(lambda: points.elements(tmp_path / "b.h5")) == "points"
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_dataset("data", (8, 4, 3), "u1", external=[("/etc/passwd", 0, 96)])
    assert reason(lambda: points.elements(tmp_path / "c.h5")) == "unreadable"


def test_a_unit_of_no_known_code_is_no_affine(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4))
    image.header["xyzt_units"] = 4
    nib.save(image, tmp_path / "a.nii.gz")
    assert reason(lambda: modality("volume").read([tmp_path / "a.nii.gz"])) == "no-affine"


def test_vertices_of_two_coordinates_and_numbers_that_no_type_holds_are_unreadable(tmp_path: Path) -> None:
    (tmp_path / "flat.obj").write_text("v 0 0\nv 1 0\nv 0 1\nf 1 2 3\n")
    (tmp_path / "large.pcd").write_text("VERSION 0.7\nFIELDS x y z label\nSIZE 4 4 4 4\nTYPE F F F U\nCOUNT 1 1 1 1\nWIDTH 1\n"
                                        f"HEIGHT 1\nPOINTS 1\nDATA ascii\n0 0 0 {10**30}\n")
    for name in ("flat.obj", "large.pcd"):
        assert reason(lambda name=name: modality("points").read([tmp_path / name])) == "unreadable"  # type: ignore[misc]


def test_pipes_among_pictures_and_annotations_are_not_waited_for(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16), 9 * i, np.uint8)).save(tmp_path / "a" / f"{i:03d}.png")
    (tmp_path / "a" / "004.png").unlink()
    os.mkfifo(tmp_path / "a" / "004.png")
    guess_modality(tmp_path)
    os.mkfifo(tmp_path / "a" / "000.xml")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox>"
    (tmp_path / "a" / "001.xml").write_text(f"<annotation><object><name>x</name>{box}</object></annotation>")
    found = Manifest.discover(tmp_path, modality("image", channels=1))
    assert found.object_names == ("x",) and "unreadable" in {p.reason for p in found.problems}


def test_a_name_of_a_hundred_thousand_letters_is_told_from_others_at_once() -> None:
    assert telling("A" * 100_000) and telling("7" * 100_000) and not telling("A" * 200)


def test_numbers_of_graphs_and_nodes_that_nothing_stands_behind(tmp_path: Path) -> None:
    tudataset(tmp_path / "DS", A="1, 2\n", graph_indicator="1\n1000000000000000\n")
    planetoid(tmp_path / "P")
    (tmp_path / "P" / "ind.toy.test.index").write_text("8\n7\n10000000000000\n")
    graph = modality("graph")
    assert reason(lambda: graph.elements(tmp_path / "DS" / "DS_A.txt")) == "unreadable"
    assert reason(lambda: graph.read([tmp_path / "P" / "ind.toy.graph"])) == "unreadable"
    assert natural("a" + "9" * 9000)[1] > 10**3999


def test_what_is_no_file_is_listed_and_never_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    made_files.images(folder)
    os.mkfifo(folder / "pipe.png")
    (folder / "zeros.png").symlink_to("/dev/zero")
    (folder / "lost.png").symlink_to(folder / "nowhere")
    (folder / os.fsdecode(b"\xff\xfe.png")).write_bytes((folder / "0.png").read_bytes()[:200])
    data = open_data(folder, modality("image", channels=1), cache=tmp_path / "cache", quiet=True)
    assert len(data.cache) == 8
    assert sorted(p.reason for p in data.cache.quarantine) == ["missing"] * 3 + ["truncated"]
    assert guess_modality(folder) == "image"


def test_a_list_with_a_field_without_end_is_no_list(tmp_path: Path) -> None:
    made_files.images(tmp_path)
    (tmp_path / "train.txt").write_text('"' + "a" * 200_000)
    assert len(Manifest.discover(tmp_path, modality("image", channels=1))) == 8


def test_a_pipe_that_is_named_as_data_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npz")
    assert reason(lambda: Manifest.discover(tmp_path / "a.npz", modality("image", channels=1))) == "missing"
    assert reason(lambda: guess_modality(tmp_path / "a.npz")) == "missing"


def test_a_pipe_among_frames_makes_the_film_unusable(tmp_path: Path) -> None:
    made_files.films(tmp_path)
    (tmp_path / "2" / "5.png").unlink()
    os.mkfifo(tmp_path / "2" / "5.png")
    found = Manifest.discover(tmp_path, modality("video"))
    assert len(found) == 5 and [p.reason for p in found.problems] == ["missing"]


def test_counts_of_a_las_header_are_checked_before_room_is_made(tmp_path: Path) -> None:
    inputs.las(tmp_path)
    points, whole = modality("points"), {s: (tmp_path / f"{inputs.CANARY}.{s}").read_bytes() for s in ("las", "laz")}
    at, = struct.unpack_from("<I", whole["laz"], 96)
    table, = struct.unpack_from("<q", whole["laz"], at)
    for suffix, place, form, value in (
            ("las", 100, "<I", 2**32 - 1), ("laz", 100, "<I", 2**32 - 1), ("laz", table + 4, "<I", 2**31),
            ("laz", at, "<q", 2**60), ("las", 96, "<I", 2**31), ("laz", 96, "<I", 2**31)):
        raw = bytearray(whole[suffix])
        struct.pack_into(form, raw, place, value)
        (file := tmp_path / f"broken.{suffix}").write_bytes(raw)
        assert reason(lambda file=file: points.read([file])) == "unreadable"
    for suffix in whole:
        assert points.read([tmp_path / f"{inputs.CANARY}.{suffix}"]).array is not None


def test_an_element_of_four_gigabytes_in_a_small_dicom_file(tmp_path: Path) -> None:
    inputs.dicom(tmp_path)
    raw = bytearray((tmp_path / f"{inputs.CANARY}-a.dcm").read_bytes())
    at = raw.index(b"\xe0\x7f\x10\x00") + 8  # the length of the pixels
    struct.pack_into("<I", raw, at, 2**32 - 16)
    (tmp_path / "b.dcm").write_bytes(raw)
    tracemalloc.start()
    decode(tmp_path / "b.dcm", 1, 1 << 20)  # what is there is enough for the rows and columns
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " + "{b: " * 3000, "a0: &a0 [x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)), "a: " + "9" * 5000,
    "!!python/object/apply:os.system [echo]"], ids=["brackets", "braces", "aliases", "digits", "object"])
def test_no_recipe_is_endless(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(MeristemError) as refused:
        recipes.load(tmp_path / "mine.yaml")
    assert refused.value.remedy
    with pytest.raises(MeristemError):
        recipes.load("volume/mae", ["train.steps=" + "[" * 100_000])


def test_a_table_of_nodes_without_lines_is_refused(tmp_path: Path) -> None:
    inputs.edges(tmp_path)
    (tmp_path / "nodes.csv").write_text("size\n")
    assert reason(lambda: modality("graph").read([tmp_path / "edges.csv"])) == "shape"
    (tmp_path / "edges.csv").write_text("source,target\n" + "a" * 200_000)
    assert reason(lambda: guess_modality(tmp_path / "edges.csv")) == "empty"


ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("a.nii") | st.just("1.png"),
                   lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
                       st.sampled_from(["images", "annotations", "categories", "id", "file_name", "image_id", "bbox", "name",
                                        "labels", "training", "image", "label", "box", "scenes", "classes", "file", "boxes",
                                        "database", "channel_names", "segment", "duration", "0", "1"]), inner, max_size=5),
                   max_leaves=12)


@pytest.mark.parametrize(("target", "file", "kind"), [
    ("coco", "instances_train.json", "image"), ("msd", "dataset.json", "volume"), ("nnunet", "dataset.json", "volume"),
    ("monai", "boxes.json", "volume"), ("scenes", "boxes.json", "points"), ("activitynet", "annotations.json", "video")])
def test_whatever_a_description_says_it_is_used_or_refused(tmp_path_factory: pytest.TempPathFactory, target: str, file: str,
                                                           kind: str) -> None:
    folder = tmp_path_factory.mktemp(target)
    inputs.TARGETS[target].write(folder)
    whole, reader = json.loads((folder / file).read_text()), modality(kind)

    @settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        about = json.loads(json.dumps(whole))
        inside: Any = about
        while isinstance(inside, dict | list) and inside:  # a place somewhere in it gets another value
            key = data.draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
            if not isinstance(inside[key], dict | list) or not inside[key] or data.draw(st.booleans()):
                inside[key] = data.draw(ANY)
                break
            inside = inside[key]
        (folder / file).write_text(json.dumps(about))
        try:
            Manifest.discover(folder, reader)
        except MeristemError as error:
            assert error.what and error.remedy

    holds()
    for text in ("[" * 200_000, '{"a":' * 100_000, '"\\ud800"', "\xff", "9" * 5000, ""):
        (folder / file).write_text(text, encoding="latin1")
        try:
            Manifest.discover(folder, reader)
        except MeristemError as error:
            assert error.what and error.remedy


# ---- one file in a hundred


def pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(100):
        Image.fromarray(rng.integers(0, 255, (16, 16), np.uint8)).save(folder / f"{i:02d}.png")


def volumes(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(100):
        nib.save(nib.Nifti1Image(rng.integers(0, 99, (8, 8, 8)).astype(np.int16), np.eye(4)), folder / f"{i:02d}.nii.gz")


def films(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(100):
        (folder / f"{i:02d}").mkdir()
        for t in range(8):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{i:02d}" / f"{t}.png")


def clouds(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(100):
        np.save(folder / f"{i:02d}.npy", rng.standard_normal((70, 3)).astype(np.float32))


def matrices(folder: Path) -> None:
    for i in range(100):
        np.save(folder / f"{i:02d}.npy", connectome(6, i))


def motions(folder: Path) -> None:
    for i in range(100):
        mocap(folder / f"{i:02d}.txt", 40, seed=i)


@pytest.mark.parametrize(("kind", "write", "broken"), [
    ("image", pictures, "07.png"), ("volume", volumes, "07.nii.gz"), ("video", films, "07/3.png"), ("points", clouds, "07.npy"),
    ("graph", matrices, "07.npy"), ("skeleton", motions, "07.txt")])
def test_one_broken_file_in_a_hundred_is_listed_and_the_others_train(tmp_path: Path, kind: str, write: Callable[[Path], None],
                                                                     broken: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    file = folder / broken
    file.write_bytes(file.read_bytes()[:-max(file.stat().st_size // 3, 20)])
    made = made_files.MADE[kind]
    run = api.pretrain(made.recipe, folder, tmp_path / "run", [*made.over, made_files.NET, "train.steps=2", "train.batch=4",
                                                               "train.workers=0"], cache=tmp_path / "cache", quiet=True)
    lost = list(csv.DictReader((tmp_path / "run" / "quarantine.csv").open()))
    assert run and len(lost) == 1 and lost[0]["reason"] and lost[0]["case"].startswith("case-")
    data = open_data(folder, inputs.recipes.load(made.recipe, [*made.over, made_files.NET]).modality, cache=tmp_path / "cache",
                     quiet=True)
    assert len(data.cache) == 99
