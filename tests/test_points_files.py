"""Files of points: each kind read as it was written, and refused with the reason where it is broken."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from plyfile import PlyData, PlyElement

from meristem.errors import DataError
from meristem.modalities.base import Sample
from meristem.modalities.points import Points
from meristem.modalities.points.options import PointsOptions
from meristem.platform.data.manifest import Manifest

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
    assert error.value.what and error.value.remedy and path.name not in error.value.what
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
    (tmp_path / "cut.bin").write_bytes(four.tobytes()[:-3])
    assert refused(tmp_path / "cut.bin") == "truncated"


def test_semantic_kitti_labels_are_found_beside(tmp_path: Path) -> None:
    rng, labels = np.random.default_rng(0), {}
    for sequence in ("00", "08"):
        for folder in ("velodyne", "labels"):
            (tmp_path / "sequences" / sequence / folder).mkdir(parents=True)
        for i in range(2):
            here = tmp_path / "sequences" / sequence
            rng.normal(size=(N, 4)).astype("<f4").tofile(here / "velodyne" / f"{i:06d}.bin")
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
