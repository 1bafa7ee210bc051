"""Files of points: which reader reads which, arrays, tables, lists of clouds, and labels beside a cloud."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities import npy
from meristem.modalities.base import Element, split_element
from meristem.modalities.documents import MISSHAPEN, read_json
from meristem.modalities.points import meshes, scans
from meristem.modalities.points.cloud import Cloud, of_table
from meristem.modalities.points.options import Feature, PointsOptions

ARRAYS = (".npz", ".npy")
TEXTS = (".txt", ".xyz", ".pts", ".csv", ".asc")
LISTS = (".h5", ".hdf5")
MESHES = (".off", ".obj", ".stl")
LABELS = (".label", ".seg")  # numbers for the points of another file
SUFFIXES = (*ARRAYS, ".ply", *MESHES, ".las", ".laz", ".pcd", ".pcd.bin", ".bin", *TEXTS, *LISTS, *LABELS)
POINTS = ("points", "xyz", "coords", "pos", "data", "vertices", "pc")
FEATURES: dict[Feature, tuple[str, ...]] = {"normal": ("normals", "normal"), "colour": ("colours", "colors", "color", "rgb"),
                                            "intensity": ("intensity", "intensities", "reflectance", "remission"),
                                            "time": ("time", "times", "timestamp")}
NUMBERS = ("part", "pid", "label", "labels", "seg", "segmentation", "mask")
BINARY = {".bin": ("x", "y", "z", "intensity"), ".pcd.bin": ("x", "y", "z", "intensity", "ring")}  # KITTI, nuScenes
SPLITS = ("train", "val", "test")
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
DAMAGE = "Download or export it again."


def suffix(path: Path) -> str:
    name = path.name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), "")


def read_cloud(path: Path, options: PointsOptions) -> Cloud:
    """The points of a file, or of an element of a list. Raises DataError."""
    element = split_element(path)
    if element:
        return _listed(*element)
    kind, sampled = suffix(path), options.sampled if options.mesh == "surface" else 0
    try:
        if not path.stat().st_size:
            raise DataError("empty", "the file is empty", DAMAGE)
    except OSError as error:
        raise DataError("missing", f"the file cannot be opened ({error.strerror})", "Check it and its permissions.") from None
    if kind in ARRAYS:
        return _arrays(path, options.columns)
    if kind in BINARY:
        return _binary(path, options.columns, BINARY[kind])
    if kind in TEXTS:
        return of_table(*_text(path, options.columns))
    if kind in MESHES:
        return meshes.read_mesh(path, sampled)
    if kind == ".ply":
        return scans.read_ply(path, sampled)
    if kind == ".pcd":
        return scans.read_pcd(path)
    if kind in (".las", ".laz"):
        return scans.read_las(path)
    if kind in LISTS:
        raise DataError("several", f"holds {len(elements(path) or ())} clouds", "Give the folder or the file itself as data.")
    if kind in LABELS:
        raise DataError("label", "holds labels of points that are missing",
                        "Put the clouds into a folder `velodyne` or `points` beside that of the labels.")
    raise DataError("unreadable", "is no kind of file that holds points", f"Known: {', '.join(SUFFIXES)}.")


def read_numbers(path: Path, count: int) -> np.ndarray:
    """(count,) numbers of points from a file of their own: .label (SemanticKITTI: the low 16 bits), .npy, .npz or text.

    Raises DataError.
    """
    kind = suffix(path)
    try:
        if kind == ".label":
            found = np.fromfile(path, "<u4") & 0xFFFF
        elif kind in ARRAYS:
            there = npy.names(path)
            found = npy.read(path, _first(there, NUMBERS) or there[0] if there else "")
        else:
            found = np.loadtxt(path, dtype=np.float64, ndmin=1)
    except (*DAMAGED, IndexError) as error:
        raise DataError("label", f"the labels cannot be read ({type(error).__name__})", DAMAGE) from None
    found = np.squeeze(found)
    if found.shape != (count,):
        raise DataError("shape", f"{found.size} labels for {count} points", "There must be one label for every point.")
    return found


def names_parts(path: Path) -> bool:
    """Whether this is no file of numbers but a class in `parts.json`."""
    return split_element(path) is not None


def part_numbers(path: Path, part: np.ndarray) -> np.ndarray:
    """Parts of a class (N,) as numbers that are distinct over all classes.

    path: `parts.json#Chair/17`, the class and the number of its first part in that file, which names the parts of each class:
    {"Chair": ["seat", …], …}. −1 stays. Raises DataError.
    """
    element = split_element(path)
    assert element is not None
    file, name, first = element
    try:
        count = len(read_json(file, file.name)[name])
    except MISSHAPEN:
        raise DataError("unreadable", f"{file.name} does not name the parts of its class", "Correct it.") from None
    if part.min() < -1 or part.max() >= count:
        raise DataError("label", f"a part is {part.max() if part.min() >= -1 else part.min()}, its class has {count}",
                        f"Correct the labels, or name all parts in {file.name}.")
    return np.where(part < 0, -1, part.astype(np.int64) + first)


def elements(path: Path) -> Sequence[Element] | None:
    """The clouds of a list (ModelNet40, ScanObjectNN, ShapeNetPart: `data` (M, N, 3), `label` (M,)), the split by its name.

    None: one cloud; (): no cloud at all. Raises DataError.
    """
    kind = suffix(path)
    if kind in LABELS or (kind in TEXTS and not _tabular(path)):
        return ()
    if kind not in LISTS:
        return None
    data, label, names = _list(path, "data"), _list(path, "label"), _classes(path)
    if data is None or data.ndim != 3:
        raise DataError("points", "holds no array `data` of clouds (M, N, 3)", "Store clouds in the layout of ModelNet40.")
    split = next((s for s in SPLITS if s in path.stem.lower()), "")
    told = label is not None and label.size == len(data) and bool(np.isfinite(label).all())
    classes = [_name(names, int(n)) for n in label.flat] if told and label is not None else [None] * len(data)
    return [Element(f"data/{i}", name, split=split) for i, name in enumerate(classes)]


def recognised(path: Path) -> bool:
    """Whether an array or a text looks like points; other suffixes say so themselves."""
    kind = suffix(path)
    try:
        if kind == ".npz":
            with zipfile.ZipFile(path) as archive:
                key = next((f"{p}.npy" for p in POINTS if f"{p}.npy" in archive.namelist()), None)
                return key is not None and _pointlike(archive.open(key))
        if kind == ".npy":
            with path.open("rb") as file:
                return _pointlike(file)
        if kind in TEXTS:
            return _tabular(path, fractions=True)
    except npy.DAMAGED:
        return False
    return kind not in ("", *LABELS)


def _pointlike(file: Any) -> bool:
    shape, dtype = npy.shape(file)
    return dtype.kind in "fiu" and len(shape) == 2 and 3 <= shape[1] <= 16 and shape[0] != shape[1]


def _tabular(path: Path, fractions: bool = False) -> bool:
    """Whether the first lines are 3 to 16 numbers each, after perhaps a count or a line of names.

    fractions: and not all whole in the first two columns, as the ends of edges are.
    """
    with path.open("rb") as file:
        lines = file.read(4096).decode("ascii", "replace").splitlines()[:20]
    rows = [_numbers(line) for line in lines if line.strip()]
    rows = rows[1:] if rows and (rows[0] is None or len(rows[0]) == 1) else rows
    rows = rows[:-1] if len(rows) > 2 else rows  # the last may be cut
    shapes = {len(r) if r else 0 for r in rows}
    if len(shapes) != 1 or not 3 <= shapes.pop() <= 16:
        return False
    return not fractions or any(np.isfinite(x) and x != round(x) for r in rows if r for x in r[:2])


def _numbers(line: str) -> list[float] | None:
    try:
        return [float(word) for word in line.replace(",", " ").replace(";", " ").split()]
    except ValueError:
        return None


def _arrays(path: Path, columns: Sequence[str]) -> Cloud:
    there = npy.names(path)
    if not there:
        return of_table(npy.read(path), columns)
    key = _first(there, POINTS)
    if key is None:
        raise DataError("points", f"holds no array of points but {', '.join(there)}", f"Call it one of {', '.join(POINTS)}.")
    cloud = of_table(npy.read(path, key), columns)
    n = len(cloud)
    for feature, names in FEATURES.items():
        if name := _first(there, names):
            values = _per_point(np.atleast_1d(npy.read(path, name)), name, n)
            cloud.features[feature] = values.reshape(n, -1)
    if name := _first(there, NUMBERS):
        numbers = np.squeeze(npy.read(path, name))
        cloud.label = _per_point(numbers, name, n) if numbers.size != 1 else cloud.label  # one: the class of all
    return cloud


def _per_point(values: np.ndarray, name: str, count: int) -> np.ndarray:
    if len(values) != count:
        raise DataError("shape", f"'{name}' has {len(values)} rows, the cloud {count} points", "Every point must have one.")
    return values


def _first(there: Sequence[str], names: Sequence[str]) -> str | None:
    return next((n for n in names if n in there), None)


def _binary(path: Path, named: Sequence[str], usual: Sequence[str]) -> Cloud:
    values, columns = np.fromfile(path, "<f4"), named or usual
    size = path.stat().st_size
    if size % (4 * len(columns)):
        raise DataError("truncated", f"{size} bytes are no whole number of points of {len(columns)} float32 columns "
                        f"({', '.join(columns)})", "Name the files' columns by modality.points.columns, or copy it again.")
    table = values.reshape(-1, len(columns))
    if not named and len(table) and (least := float(np.nanmin(table[:, usual.index("intensity")]))) < 0:
        raise DataError("columns", f"its points have no {', '.join(usual)}: an intensity of {least:g} would be among them",
                        "Name the files' columns by modality.points.columns, e.g. [x, y, z, red, green, blue].")
    return of_table(table, columns)


def _text(path: Path, columns: Sequence[str]) -> tuple[np.ndarray, Sequence[str]]:
    """Rows of numbers between blanks, commas or semicolons; the first line may name the columns, or count the rows (PTS)."""
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace(",", " ").replace(";", " ")
    first, _, rest = text.lstrip().partition("\n")
    leading = _numbers(first)
    claimed = int(leading[0]) if leading and len(leading) == 1 else None
    body = rest if leading is None or claimed is not None else text
    if leading is None:
        columns = columns or first.lstrip("#/ ").split()
    try:
        table = np.loadtxt(io.StringIO(body), dtype=np.float64, ndmin=2)
    except ValueError as error:
        where = re.search(r"at row \d+(, column \d+)?", str(error))  # the rest quotes the file
        raise DataError("unreadable", f"is no table of numbers{f' {where[0]}' if where else ''}", "One point a line: x y z …"
                        ) from None
    if claimed is not None and len(table) != claimed:
        raise DataError("truncated", f"announces {claimed} points and holds {len(table)}", "Copy it again.")
    if not len(table):
        raise DataError("empty", "holds no points", "Leave it out.")
    return table, columns


# ---- lists of clouds


def _listed(file: Path, name: str, number: int) -> Cloud:
    data = _list(file, name)
    if number >= len(data):
        raise DataError("missing", f"'{name}' holds {len(data)} clouds, number {number} was asked for", DAMAGE)
    cloud = of_table(np.asarray(data[number]), ())
    for feature, names in FEATURES.items():
        values = next((v for n in names if (v := _list(file, n)) is not None), None)
        if values is not None:
            cloud.features[feature] = _per_point(np.asarray(values[number]), feature, len(cloud))
    for key in NUMBERS:
        values = _list(file, key)
        if values is not None and values.ndim > 1 and values.shape[1] == len(cloud):
            cloud.label = np.asarray(values[number])
            break
    return cloud


def _list(path: Path, name: str) -> Any:
    state = path.stat()
    return _dataset(path, name, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=8)
def _dataset(path: Path, name: str, modified: int, size: int) -> np.ndarray | None:
    """A whole dataset of an HDF5 file, read once per process and version of the file; None where it has none."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if not isinstance(found := file.get(name, getlink=True), h5py.HardLink):
                return None  # a link may lead to another file
            found = file[name]
            if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual or found.dtype.kind not in "fiub":
                raise DataError("unreadable", f"'{name}' is no array of numbers in the file itself", DAMAGE)
            npy.plausible(found.nbytes, size, "the HDF5 file")
            return np.asarray(found)
    except (*DAMAGED, RuntimeError, TypeError, AttributeError, OverflowError) as error:
        raise DataError("unreadable", f"the HDF5 file is damaged ({type(error).__name__})", DAMAGE) from None


def _classes(path: Path) -> list[str]:
    """Names of a list's classes, where a file beside it tells."""
    names = path.with_name("shape_names.txt")
    return names.read_text().split() if names.is_file() else []


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if 0 <= number < len(names) else str(number)
