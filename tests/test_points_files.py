"""Files of points: each kind read as it was written, and refused with the reason where it is broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import laspy
import numpy as np
import pytest
import trimesh
from PIL import Image
from plyfile import PlyData, PlyElement

from meristem.api import check_data, guess_modality
from meristem.errors import DataError
from meristem.modalities.base import Sample
from meristem.modalities.points import Points
from meristem.modalities.points.options import PointsOptions
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.source import open_data

N = 40
COLUMNS = ("x", "y", "z", "nx", "ny", "nz", "red", "green", "blue", "intensity", "time", "label")


@pytest.fixture
def table() -> dict[str, np.ndarray]:
    """N points with everything: metres around (100, −50, 3), unit normals, 8 bit colours, intensities of 8 bit, seconds."""
    rng = np.random.default_rng(0)
    xyz = rng.normal(size=(N, 3)) * (5, 3, 1) + (100, -50, 3)
    normals = rng.normal(size=(N, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    values = [*xyz.T.round(3), *normals.T, *rng.integers(0, 256, (3, N)), rng.integers(0, 256, N), 1e9 + np.arange(N) / 8,
              rng.integers(0, 5, N)]
    return dict(zip(COLUMNS, values, strict=True))


def read(path: Path, fields: Mapping[str, Path] = {}, **options: Any) -> Sample:
    return Points(PointsOptions(**options)).read([path], fields)


def metres(sample: Sample) -> np.ndarray:
    """(N, 3) float64 source coordinates of what is stored, by the header."""
    affine = np.array(sample.header.affine)
    assert sample.array is not None
    return sample.array[:3].T.astype(np.float64) @ affine[:3, :3].T + affine[:3, 3] + sample.header.source["origin"]


def holds(sample: Sample, table: Mapping[str, np.ndarray], *features: str) -> None:
    """That a sample is the table."""
    assert sample.array is not None and sample.array.dtype == np.float32 and sample.array.shape == sample.header.shape
    np.testing.assert_allclose(metres(sample), np.stack([table[c] for c in "xyz"], 1), atol=2e-3)
    expected = {"normal": [table[c] for c in ("nx", "ny", "nz")], "intensity": [table["intensity"] / 127.5 - 1],
                "colour": [table[c] / 127.5 - 1 for c in ("red", "green", "blue")],
                "time": [table["time"] - table["time"].min()]}
    rows = [row for f in features for row in expected[f]]
    np.testing.assert_allclose(sample.array[3:], np.array(rows).reshape(-1, N), atol=2e-3)


def refused(path: Path, fields: Mapping[str, Path] = {}, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        read(path, fields, **options)
    assert error.value.what and error.value.remedy and (path.parent.name.endswith("#data") or path.name not in error.value.what)
    return error.value.reason


# ---- arrays


def test_npz_with_everything(tmp_path: Path, table: dict[str, np.ndarray]) -> None:
    stack = {name: np.stack([table[c] for c in columns], 1) for name, columns in
             (("points", "xyz"), ("normals", ("nx", "ny", "nz")), ("colors", ("red", "green", "blue")))}
    np.savez(tmp_path / "cloud.npz", **stack, intensity=table["intensity"], time=table["time"], part=table["label"])
    sample = read(tmp_path / "cloud.npz", features=("colour", "normal", "time", "intensity"))
    holds(sample, table, "colour", "normal", "time", "intensity")
    assert np.array_equal(sample.fields["mask"], table["label"])


@pytest.mark.parametrize(("k", "features", "labelled"), [(3, (), False), (4, ("intensity",), False), (6, ("normal",), False),
                                                         (7, ("normal",), True)])
def test_plain_arrays_and_texts_tell_by_their_columns(tmp_path: Path, table: dict[str, np.ndarray], k: int,
                                                      features: tuple[str, ...], labelled: bool) -> None:
    names = ("x", "y", "z", "intensity") if k == 4 else (*COLUMNS[:6], "label")[:k]
    plain = np.stack([table[c] for c in names], 1)
    np.save(tmp_path / "cloud.npy", plain)
    np.savetxt(tmp_path / "cloud.txt", plain, fmt="%.6f")
    for suffix in (".npy", ".txt"):
        sample = read(tmp_path / f"cloud{suffix}", features=features)
        holds(sample, table, *features)
        assert ("mask" in sample.fields) == labelled
        if labelled:
            assert np.array_equal(sample.fields["mask"], table["label"])


def test_columns_that_are_no_unit_vectors_are_colours(tmp_path: Path, table: dict[str, np.ndarray]) -> None:
    np.savetxt(tmp_path / "room.txt", np.stack([table[c] for c in ("x", "y", "z", "red", "green", "blue")], 1), fmt="%.4f")
    holds(read(tmp_path / "room.txt", features=("colour",)), table, "colour")
    assert refused(tmp_path / "room.txt", features=("normal",)) == "feature"


def test_the_recipe_may_name_columns(tmp_path: Path, table: dict[str, np.ndarray]) -> None:
    names = ("x", "y", "z", "what", "gps_time", "reflectance")
    np.save(tmp_path / "cloud.npy", np.stack([table[c] for c in ("x", "y", "z", "nx", "time", "intensity")], 1))
    holds(read(tmp_path / "cloud.npy", features=("intensity", "time"), columns=names), table, "intensity", "time")
    assert refused(tmp_path / "cloud.npy", columns=names[:5]) == "columns"
    assert refused(tmp_path / "cloud.npy", columns=("a", "y", "z", "b", "c", "d")) == "columns"


def test_broken_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", pictures=rng.random((9, 3)))
    np.savez(tmp_path / "b.npz", points=rng.random((9, 3)), normals=rng.random((8, 3)))
    np.savez(tmp_path / "c.npz", points=rng.random((9, 2)))
    np.save(tmp_path / "d.npy", np.array([None, {}]), allow_pickle=True)
    (tmp_path / "e.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    (tmp_path / "f.npy").write_bytes(b"")
    wanted = {"a.npz": "points", "b.npz": "shape", "c.npz": "shape", "d.npy": "unreadable", "e.npz": "unreadable",
              "f.npy": "empty", "none.npy": "missing"}
    assert {name: refused(tmp_path / name) for name in wanted} == wanted


# ---- what makes a cloud unusable


def cloud(tmp_path: Path, points: np.ndarray, **more: np.ndarray) -> Path:
    np.savez(tmp_path / "cloud.npz", points=points, **more)
    return tmp_path / "cloud.npz"


def test_points_that_are_not_finite(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(10, 3))
    normals, part = np.ones((10, 3)), np.arange(10)
    points[[2, 3, 9], [0, 1, 2]] = np.nan, np.inf, -np.inf
    normals[5] = np.nan
    path = cloud(tmp_path, points, normals=normals, part=part)
    with pytest.raises(DataError, match="3 of 10 points"):
        read(path)
    assert refused(path, features=("normal",)) == "nan"
    sample = read(path, nonfinite="drop", features=("normal",))
    assert sample.fields["mask"].tolist() == [0, 1, 4, 6, 7, 8]
    np.testing.assert_allclose(metres(sample), points[[0, 1, 4, 6, 7, 8]], atol=1e-6)
    assert sample.header.source["left_out"] == [[2, 2], [5, 1], [9, 1]]
    written = Points(PointsOptions()).write(np.array([7, 6, 5, 4, 3, 2]), sample.header, tmp_path / "labels.npz")
    assert written == tmp_path / "labels.npy"
    assert np.load(written).tolist() == [7, 6, -1, -1, 5, -1, 4, 3, 2, -1]


@pytest.mark.parametrize(("points", "reason"), [
    (np.zeros((0, 3)), "empty"), (np.eye(3), "few"), (np.full((50, 3), 7.0), "degenerate"),
    (np.full((50, 3), np.nan), "few")])
def test_clouds_without_a_shape(tmp_path: Path, points: np.ndarray, reason: str) -> None:
    assert refused(cloud(tmp_path, points), nonfinite="drop") == reason


def test_far_from_the_origin_millimetres_stay(tmp_path: Path) -> None:
    points = np.random.default_rng(0).uniform(-30, 30, (200, 3)) + np.array([691_234.567, 5_334_567.891, 512.345])
    for normalise in ("sphere", "centre"):
        sample = read(cloud(tmp_path, points), normalise=normalise)
        np.testing.assert_allclose(metres(sample), points, atol=1e-4)
        offset = np.abs(np.array(sample.header.affine)[:3, 3]).max()
        assert offset < 1, "what becomes float32 in a frame is small"
    assert refused(cloud(tmp_path, points), normalise="none") == "precision"
    assert read(cloud(tmp_path, points), normalise="none", unit=0.001).header.source["origin"] == [0, 0, 0]


def test_normalisation_and_units(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(500, 3)) * 100 + (10, 20, 30)
    path = cloud(tmp_path, points)
    sphere, centre, plain = (read(path, normalise=n, unit=0.01) for n in ("sphere", "centre", "none"))
    assert sphere.array is not None and centre.array is not None and plain.array is not None
    assert np.isclose(np.linalg.norm(sphere.array, axis=0).max(), 1)
    assert np.abs(sphere.array.mean(1)).max() < 1e-6 and np.abs(centre.array.mean(1)).max() < 1e-6
    np.testing.assert_allclose(plain.array.T, points / 100, atol=1e-5)
    for sample in (sphere, centre, plain):
        np.testing.assert_allclose(metres(sample), points / 100, atol=1e-5)


def test_what_is_no_colour_or_intensity_is_refused(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(20, 3))
    assert refused(cloud(tmp_path, points, intensity=points[:, 0]), features=("intensity",)) == "intensity"
    assert refused(cloud(tmp_path, points, colors=points * 1e6), features=("colour",)) == "colour"
    bright = cloud(tmp_path, points, intensity=np.linspace(0, 40, 20))
    high = {full: read(bright, features=("intensity",), intensity=full).array[3].max() for full in (None, 40.0)}  # type: ignore[index]
    assert np.isclose(high[None], 40 / 127.5 - 1) and np.isclose(high[40.0], 1)
    assert refused(bright, features=("intensity",), intensity=30.0) == "intensity"


# ---- raw floats


def test_bin_columns(tmp_path: Path, table: dict[str, np.ndarray]) -> None:
    four = np.stack([table[c] for c in ("x", "y", "z", "intensity")], 1).astype("<f4")
    five = np.concatenate([four, np.arange(N, dtype="<f4")[:, None]], 1)
    four.tofile(tmp_path / "kitti.bin")
    five.tofile(tmp_path / "nuscenes.pcd.bin")
    for name in ("kitti.bin", "nuscenes.pcd.bin"):
        holds(read(tmp_path / name, features=("intensity",)), table, "intensity")
    assert refused(tmp_path / "kitti.bin", columns=("x", "y", "z")) == "truncated"
    six = np.random.default_rng(1).normal(size=(8, 6)).astype("<f4")  # x y z and a colour, as SUN RGB-D's
    six.tofile(tmp_path / "rooms.bin")
    assert refused(tmp_path / "rooms.bin") == "columns"
    named = read(tmp_path / "rooms.bin", columns=("x", "y", "z", "red", "green", "blue"))
    assert named.array.shape == (3, 8)
    (tmp_path / "cut.bin").write_bytes(four.tobytes()[:-3])
    assert refused(tmp_path / "cut.bin") == "truncated"


def test_semantic_kitti_labels_are_found_beside(tmp_path: Path) -> None:
    rng, labels = np.random.default_rng(0), {}
    for sequence in ("00", "08"):
        for folder in ("velodyne", "labels"):
            (tmp_path / "sequences" / sequence / folder).mkdir(parents=True)
        for i in range(2):
            here = tmp_path / "sequences" / sequence
            rng.random((N, 4)).astype("<f4").tofile(here / "velodyne" / f"{i:06d}.bin")
            labels[sequence, i] = rng.integers(0, 260, N)
            (labels[sequence, i] | rng.integers(0, 100, N) << 16).astype("<u4").tofile(here / "labels" / f"{i:06d}.label")
    points = Points(PointsOptions(normalise="none"))
    found = Manifest.discover(tmp_path, points)
    assert len(found) == 4 and not found.problems
    for row, expected in zip(found.rows, labels.values(), strict=True):
        assert np.array_equal(points.read(row.paths, row.fields).fields["mask"], expected)
    with row.fields["mask"].open("ab") as file:
        file.write(bytes(4))
    assert refused(row.paths[0], row.fields) == "shape"


# ---- PLY


def ply(path: Path, table: Mapping[str, np.ndarray], text: bool = False, order: str = "<") -> Path:
    kinds = {**{c: "f8" for c in COLUMNS}, "red": "u1", "green": "u1", "blue": "u1", "label": "i4"}
    names = {"intensity": "scalar_Intensity", "time": "scalar_GpsTime"}
    vertex = np.zeros(N, [(names.get(c, c), kinds[c]) for c in table])
    for c in table:
        vertex[names.get(c, c)] = table[c]
    PlyData([PlyElement.describe(vertex, "vertex")], text=text, byte_order=order).write(path)
    return path


@pytest.mark.parametrize(("text", "order"), [(True, "="), (False, "<"), (False, ">")])
def test_ply(tmp_path: Path, table: dict[str, np.ndarray], text: bool, order: str) -> None:
    sample = read(ply(tmp_path / "cloud.ply", table, text, order), features=("normal", "colour", "intensity", "time"))
    holds(sample, table, "normal", "colour", "intensity", "time")
    assert np.array_equal(sample.fields["mask"], table["label"])


def test_ply_that_claims_more_than_it_holds(tmp_path: Path, table: dict[str, np.ndarray]) -> None:
    whole = ply(tmp_path / "cloud.ply", table).read_bytes()
    words = ply(tmp_path / "words.ply", table, text=True).read_bytes()
    for name, data in {"huge": whole.replace(b"vertex 40", b"vertex 40000000000000"), "cut": whole[:-5],
                       "text": words.replace(b"vertex 40", b"vertex 40000000")}.items():
        (tmp_path / f"{name}.ply").write_bytes(data)
        assert refused(tmp_path / f"{name}.ply") == "truncated"
    (tmp_path / "other.ply").write_bytes(b"solid")
    assert refused(tmp_path / "other.ply") == "unreadable"


# ---- surfaces


@pytest.mark.parametrize("kind", ["off", "obj", "stl", "ply"])
def test_surfaces_are_sampled_by_area_and_the_same_each_time(tmp_path: Path, kind: str) -> None:
    box = trimesh.creation.box((8.0, 2.0, 2.0))
    path = tmp_path / f"shape.{kind}"
    box.export(path)
    sample = read(path, features=("normal",), normalise="none", sampled=4000)
    assert sample.array is not None and sample.array.shape == (6, 4000) and sample.header.source["sampled"]
    assert np.array_equal(read(path, features=("normal",), normalise="none", sampled=4000).array, sample.array)
    xyz, normals = sample.array[:3].T, sample.array[3:].T
    half = np.array([4.0, 1.0, 1.0])
    axis = np.abs(normals).argmax(1)
    assert np.allclose(np.abs(normals).max(1), 1, atol=1e-5), "normals are those of a box"
    assert np.allclose((xyz * normals).sum(1), half[axis], atol=1e-5), "points lie on the face that looks their way"
    shares = np.bincount(axis, minlength=3) / 4000
    np.testing.assert_allclose(shares, np.array([8.0, 32.0, 32.0]) / 72, atol=0.03)
    assert read(path, mesh="vertices").header.shape[1] == (36 if kind == "stl" else 8)


def test_off_as_modelnet_has_it_and_broken_surfaces(tmp_path: Path) -> None:
    body = "0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n"
    (tmp_path / "fused.off").write_text("OFF4 2 0\n" + body)
    (tmp_path / "plain.off").write_text("OFF\n4 2 0\n" + body)
    fused, plain = (read(tmp_path / f"{n}.off", sampled=100) for n in ("fused", "plain"))
    assert np.array_equal(fused.array, plain.array)  # type: ignore[arg-type]
    (tmp_path / "wrong.off").write_text("OFF\n4 2 0\n" + body.replace("0 1 3", "0 1 9"))
    (tmp_path / "flat.off").write_text("OFF\n4 2 0\n" + body.replace("0 1 2", "0 1 1").replace("0 1 3", "0 1 1"))
    (tmp_path / "none.off").write_text("a list of names")
    (tmp_path / "nan.off").write_text("OFF\n4 2 0\n" + body.replace("1 0 0", "nan 0 0", 1))
    vertex = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0)], [("x", "f4"), ("y", "f4"), ("z", "f4")])
    face = np.array([([0, 1, 2],), ([0, 1, 9],)], [("vertex_indices", "i4", (3,))])
    PlyData([PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face")]).write(tmp_path / "wrong.ply")
    wanted = {"wrong.off": "unreadable", "wrong.ply": "faces", "flat.off": "degenerate", "none.off": "unreadable",
              "nan.off": "nan"}
    assert {name: refused(tmp_path / name) for name in wanted} == wanted


# ---- PCD


def pcd(table: Mapping[str, np.ndarray], how: str) -> bytes:
    rgb = (table["red"].astype("u4") << 16 | table["green"].astype("u4") << 8 | table["blue"].astype("u4")).view("f4")
    columns = {"x": table["x"], "y": table["y"], "z": table["z"], "normal_x": table["nx"], "normal_y": table["ny"],
               "normal_z": table["nz"], "rgb": rgb, "intensity": table["intensity"], "label": table["label"]}
    kinds = {"label": "<u4"}
    rows = np.zeros(N, [(c, kinds.get(c, "<f4")) for c in columns])
    for c, values in columns.items():
        rows[c] = values
    head = (f"# .PCD v0.7\nVERSION 0.7\nFIELDS {' '.join(columns)}\nSIZE {' '.join('4' for _ in columns)}\n"
            f"TYPE {' '.join('U' if c in kinds else 'F' for c in columns)}\nCOUNT {' '.join('1' for _ in columns)}\n"
            f"WIDTH {N}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {N}\nDATA {how}\n").encode()
    if how == "ascii":
        return head + "\n".join(" ".join(repr(float(v)) if c not in kinds else str(v) for c, v in
                                         zip(columns, row, strict=True)) for row in rows.tolist()).encode()
    if how == "binary":
        return head + rows.tobytes()
    plain = b"".join(rows[c].tobytes() for c in columns)
    packed = packed_lzf(plain)
    return head + struct.pack("<II", len(packed), len(plain)) + packed


def packed_lzf(data: bytes) -> bytes:
    """A plain compressor: the longest of the last copies, else a literal."""
    out, at, literal = bytearray(), 0, bytearray()

    def flush() -> None:
        for i in range(0, len(literal), 32):
            piece = literal[i:i + 32]
            out.extend([len(piece) - 1, *piece])
        literal.clear()

    while at < len(data):
        start, length = -1, 0
        for back in range(max(at - 200, 0), at):
            n = 0
            while n < 264 and at + n < len(data) and data[back + n] == data[at + n]:
                n += 1
            if n > length:
                start, length = back, n
        if length >= 3:
            flush()
            offset, n = at - start - 1, length - 2
            out.extend([(min(n, 7) << 5) | offset >> 8, *([n - 7] if n >= 7 else []), offset & 255])
            at += length
        else:
            literal.append(data[at])
            at += 1
    flush()
    return bytes(out)


@pytest.mark.parametrize("how", ["ascii", "binary", "binary_compressed"])
def test_pcd(tmp_path: Path, table: dict[str, np.ndarray], how: str) -> None:
    data = pcd(table, how)
    (tmp_path / "cloud.pcd").write_bytes(data)
    sample = read(tmp_path / "cloud.pcd", features=("colour", "normal", "intensity"))
    holds(sample, table, "colour", "normal", "intensity")
    assert np.array_equal(sample.fields["mask"], table["label"])
    for name, broken in {"cut": data[:-50], "huge": data.replace(b"POINTS 40", b"POINTS 40000000000")}.items():
        (tmp_path / f"{name}.pcd").write_bytes(broken)
        assert refused(tmp_path / f"{name}.pcd") in ("truncated", "unreadable")
    (tmp_path / "odd.pcd").write_bytes(data.replace(b"SIZE 4", b"SIZE x", 1))
    assert refused(tmp_path / "odd.pcd") == "unreadable"


def test_runs_that_overlap_themselves_unpack(tmp_path: Path) -> None:
    from meristem.modalities.points.scans import lzf

    for plain in (b"a" * 1000, b"abcabcabcabcx" * 40, bytes(range(256)), b""):
        assert lzf(packed_lzf(plain), len(plain)) == plain
    with pytest.raises(DataError):
        lzf(b"\xe0\xff\xff", 900)


# ---- LAS


@pytest.mark.parametrize("suffix", ["las", "laz"])
def test_las_keeps_millimetres_of_utm_coordinates(tmp_path: Path, table: dict[str, np.ndarray], suffix: str) -> None:
    far = {**table, "x": table["x"] + 691_000, "y": table["y"] + 5_334_000}
    header = laspy.LasHeader(point_format=3, version="1.2")
    header.scales, header.offsets = np.full(3, 0.001), np.array([691_000.0, 5_334_000.0, 0.0])
    las = laspy.LasData(header)
    las.x, las.y, las.z = far["x"], far["y"], far["z"]
    las.red, las.green, las.blue = (far[c].astype(np.uint16) * 257 for c in ("red", "green", "blue"))
    las.intensity = far["intensity"].astype(np.uint16) * 257
    las.gps_time, las.classification = far["time"], far["label"].astype(np.uint8)
    path = tmp_path / f"cloud.{suffix}"
    las.write(path)
    sample = read(path, features=("colour", "intensity", "time"))
    holds(sample, far, "colour", "intensity", "time")
    np.testing.assert_allclose(metres(sample), np.stack([far[c] for c in "xyz"], 1), atol=1e-4)
    assert np.array_equal(sample.fields["mask"], table["label"])
    data = path.read_bytes()
    for name, broken in {"cut": data[:-60], "none": b"LASF" + data[4:90], "other": b"no" * 300}.items():
        (tmp_path / f"{name}.{suffix}").write_bytes(broken)
        assert refused(tmp_path / f"{name}.{suffix}") in ("truncated", "unreadable")


# ---- text


def test_texts_with_names_counts_and_commas(tmp_path: Path, table: dict[str, np.ndarray]) -> None:
    columns = np.stack([table[c] for c in ("x", "y", "z", "intensity", "label")], 1)
    np.savetxt(tmp_path / "a.csv", columns, delimiter=",", header="X,Y,Z,Intensity,Classification", comments="")
    np.savetxt(tmp_path / "b.asc", columns, header="//X Y Z Scalar_Intensity Scalar_Classification", comments="")
    np.savetxt(tmp_path / "c.pts", columns[:, :4], header=str(N), comments="")
    for name in ("a.csv", "b.asc", "c.pts"):
        sample = read(tmp_path / name, features=("intensity",))
        holds(sample, table, "intensity")
        assert ("mask" in sample.fields) == (name != "c.pts")
    (tmp_path / "d.pts").write_text((tmp_path / "c.pts").read_text().replace("40\n", "41\n", 1))
    (tmp_path / "e.txt").write_text("1 2 3\n4 5\n6 7 8\n9 0 1\n")
    assert refused(tmp_path / "d.pts") == "truncated" and refused(tmp_path / "e.txt") == "unreadable"


# ---- lists of clouds, and what is found in folders


def lists(root: Path, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ModelNet40's layout: two files to train on and one to test on, 4 clouds each."""
    data, label, pid = rng.normal(size=(12, 30, 3)).astype("f4"), np.arange(12) % 3, rng.integers(0, 50, (12, 30))
    for i, name in enumerate(("ply_data_train0", "ply_data_train1", "ply_data_test0")):
        part = slice(4 * i, 4 * i + 4)
        with h5py.File(root / f"{name}.h5", "w") as file:
            file["data"], file["label"], file["pid"] = data[part], label[part, None].astype("u1"), pid[part]
            file["normal"] = np.ones((4, 30, 3), "f4")
    (root / "shape_names.txt").write_text("airplane\nbathtub\nbed\n")
    (root / "train_files.txt").write_text("data/modelnet40/ply_data_train0.h5\ndata/modelnet40/ply_data_train1.h5\n")
    return data, label, pid


def test_lists_of_clouds(tmp_path: Path) -> None:
    data, label, pid = lists(tmp_path, np.random.default_rng(0))
    points = Points(PointsOptions(features=("normal",)))
    found = Manifest.discover(tmp_path, points)
    assert len(found) == 12 and found.class_names == ("airplane", "bathtub", "bed") and not found.problems
    assert [r.split for r in found.rows] == ["test"] * 4 + ["train"] * 8
    for row, i in zip(found.rows, [8, 9, 10, 11, *range(8)], strict=True):
        sample = points.read(row.paths)
        np.testing.assert_allclose(metres(sample), data[i], atol=1e-5)
        assert np.array_equal(sample.fields["mask"], pid[i]) and row.labels["class"] == label[i]
        assert np.allclose(sample.array[3:], 3**-0.5)  # type: ignore[index]
    alone = Manifest.discover(tmp_path / "ply_data_train0.h5", points)
    assert len(alone) == 4 and {r.split for r in alone.rows} == {"train"}
    assert refused(tmp_path / "ply_data_train0.h5") == "several"
    assert refused(tmp_path / "ply_data_train0.h5#data/4") == "missing"
    (tmp_path / "cut.h5").write_bytes((tmp_path / "ply_data_train0.h5").read_bytes()[:500])
    assert refused(tmp_path / "cut.h5") == "unreadable"


def classes(root: Path) -> dict[str, list[str]]:
    parts = {"Cup": ["body", "handle"], "Chair": ["seat", "back", "leg"], "Table": ["top"]}
    rng = np.random.default_rng(0)
    for name in ("Chair", "Cup"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            np.savez(root / name / f"{i}.npz", points=rng.normal(size=(N, 3)), part=np.arange(N) % len(parts[name]))
    (root / "README.md").write_text("clouds")
    (root / "notes.txt").write_text("of 3 kinds\nand more 1.5 2.5\n")
    (root / "parts.json").write_text(json.dumps(parts))
    return parts


def test_parts_are_distinct_over_classes(tmp_path: Path) -> None:
    parts = classes(tmp_path)
    points = Points(PointsOptions())
    found = Manifest.discover(tmp_path, points)
    assert found.layout == "one folder per class" and found.class_names == ("Chair", "Cup") and len(found) == 6
    assert found.mask_names == tuple(f"{c}/{p}" for c in parts for p in parts[c])
    for row in found.rows:
        name = found.class_names[row.labels["class"]]
        mask = points.read(row.paths, row.fields).fields["mask"]
        assert [found.mask_names[v] for v in mask[:len(parts[name])]] == [f"{name}/{p}" for p in parts[name]]
    np.savez(tmp_path / "Cup" / "0.npz", points=np.eye(4, 3), part=np.arange(4))
    assert refused(found.rows[3].paths[0], found.rows[3].fields) == "label"
    (tmp_path / "parts.json").write_text("[1]")
    with pytest.raises(DataError, match=r"parts\.json"):
        Manifest.discover(tmp_path, points)


def test_lists_name_clouds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        np.savetxt(tmp_path / f"{i}.txt", rng.normal(size=(9, 3)))
    (tmp_path / "train.txt").write_text("0.txt lamp\n1.txt cup\n")
    (tmp_path / "test.txt").write_text("2.txt lamp\n")
    found = Manifest.discover(tmp_path, Points(PointsOptions()))
    assert [(r.local, r.split, found.class_names[r.labels["class"]]) for r in found.rows] == [
        ("2.txt", "test", "lamp"), ("0.txt", "train", "lamp"), ("1.txt", "train", "cup")]


def test_a_check_of_clouds_tells_their_size_and_who_has_another_unit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(6):
        points = rng.uniform(0, 2, (50 + i, 3)) * (1, 1, 0.5) * (1000 if i == 4 else 1)
        np.savez(tmp_path / f"{i}.npz", points=points, part=np.zeros(50 + i, int))
    np.savez(tmp_path / "6.npz", points=np.full((9, 3), np.nan))
    report = check_data(tmp_path)
    measures = {m.name: m.quantiles for m in report.measures}
    assert report.modality == "points" and report.usable == 6 and report.refused == {"nan": 1}
    assert measures["points"][0] == 50 and 1.8 < measures["extent x (m)"][2] < 2
    assert 0.9 < measures["extent z (m)"][2] < 1 and not {"shape x", "intensity 50 %"} & measures.keys()
    unusual, = report.of("doubt")
    assert [report.local[c.case] for c in unusual.cases] == ["4.npz"] and unusual.reason == "unusual"
    label, = report.labels
    assert (label.value, label.samples, label.share) == (0, 6, 1.0)


# ---- which modality


def test_what_is_guessed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = {name: tmp_path / name for name in ("shapes", "lists", "medmnist", "texts", "scans", "matrix", "photos")}
    for folder in made.values():
        folder.mkdir()
    classes(made["shapes"])
    lists(made["lists"], rng)
    np.savez(made["medmnist"] / "pneumonia.npz", train_images=rng.integers(0, 9, (9, 8, 8)), train_labels=np.zeros((9, 1)))
    for i in range(10):
        np.savetxt(made["texts"] / f"{i}.txt", rng.normal(size=(9, 6)))
        rng.random((9, 4)).astype("f4").tofile(made["scans"] / f"{i}.bin")
        np.savetxt(made["matrix"] / f"{i}.csv", rng.random((20, 20)), delimiter=",")
        Image.fromarray(rng.integers(0, 255, (9, 9), dtype=np.uint8)).save(made["photos"] / f"{i}.png")
    (made["photos"] / "README.txt").write_text("0.5 0.5 0.5\n")
    wanted = {"shapes": "points", "lists": "points", "medmnist": "image", "texts": "points", "scans": "points",
              "matrix": "graph", "photos": "image"}
    assert {name: guess_modality(made[name]) for name in wanted} == wanted
    files = {"shapes/Cup/0.npz": "points", "lists/ply_data_test0.h5": "points", "medmnist/pneumonia.npz": "image",
             "texts/3.txt": "points", "matrix/1.csv": "graph"}
    assert {name: guess_modality(tmp_path / name) for name in files} == files
    (tmp_path / "edges.txt").write_text("0 1 0.5\n1 2 0.25\n0 2 0.125\n")
    assert not Points.recognised(tmp_path / "edges.txt"), "ends of edges are whole numbers"


# ---- real data


@pytest.mark.data
def test_real_shapes(data_root: Path, tmp_path: Path) -> None:
    points = Points(PointsOptions(features=("normal",)))
    found = open_data(data_root / "psb-labeled-points", points, cache=tmp_path, quiet=True)
    assert guess_modality(data_root / "psb-labeled-points") == "points"
    assert len(found.rows()) == 380 and len(found.manifest.class_names) == 19 and len(found.manifest.mask_names) == 94
    of: dict[str, set[str]] = {}
    for row in found.rows():
        assert found.cache.header(row.index).shape == (6, 2048)
        name = found.manifest.class_names[row.labels["class"]]
        of.setdefault(name, set()).update(found.manifest.mask_names[v] for v in found.cache.counts(row.index))
    assert all({p.split("/")[0] for p in parts} == {name} for name, parts in of.items())


@pytest.mark.data
def test_real_scans(data_root: Path) -> None:
    frames = data_root / "detection3d-frames"
    colours = ("x", "y", "z", "red", "green", "blue")
    lidar = {"normalise": "none", "features": ("intensity",)}
    kitti, nuscenes = read(frames / "kitti" / "000008.bin", **lidar), read(next((frames / "nuscenes").glob("*.bin")), **lidar)
    rooms = [read(next((frames / n).glob("*.bin")), features=("colour",), columns=colours) for n in ("sunrgbd", "scannet")]
    assert [s.header.shape for s in (kitti, nuscenes, *rooms)] == [(4, 17238), (4, 34688), (6, 50000), (6, 40684)]
    for sample in (kitti, nuscenes, *rooms):
        assert sample.array is not None and np.abs(sample.array[3:]).max() <= 1 and sample.array[3].std() > 0.1
        assert np.ptp(metres(sample), axis=0).max() < 200
    assert refused(frames / "kitti" / "000008.bin", columns=colours[:5]) == "truncated"
