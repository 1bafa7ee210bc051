"""Files of scanners and their programs: PLY, PCD, LAS and LAZ."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np

from meristem.errors import DataError
from meristem.modalities.documents import MISSHAPEN, opened
from meristem.modalities.npy import plausible
from meristem.modalities.points.cloud import Cloud, of_columns
from meristem.modalities.points.meshes import from_faces

AGAIN = "Copy or export it again."
BYTES = {"char": 1, "uchar": 1, "int8": 1, "uint8": 1, "short": 2, "ushort": 2, "int16": 2, "uint16": 2, "int": 4, "uint": 4,
         "int32": 4, "uint32": 4, "float": 4, "float32": 4, "double": 8, "float64": 8}  # of PLY's types
LASZIP, VARYING, USUAL = b"laszip encoded", 0xFFFFFFFF, 1 << 20  # whose record it is; chunks of no fixed size; points in one
HEADER = 1 << 16  # bytes within which a header ends


def read_ply(path: Path, sampled: int) -> Cloud:
    """The vertices, or `sampled` points on the faces where there are any; 0: never. Raises DataError."""
    from plyfile import PlyData, PlyParseError

    _check_ply(path)
    try:
        with path.open("rb") as file:
            data = PlyData.read(file)
        vertex = data["vertex"]
        columns = {p.name: np.asarray(vertex[p.name]) for p in vertex.properties if vertex[p.name].dtype.kind in "fiu"}
        polygons = next((data["face"][p.name] for p in data["face"].properties if p.name.startswith("vertex_ind")), ()) if (
            sampled and "face" in data) else ()
    except (PlyParseError, *MISSHAPEN, OSError, EOFError) as error:
        raise DataError("unreadable", f"is no PLY that can be read ({type(error).__name__})", AGAIN) from None
    cloud = of_columns(columns)
    if not len(polygons):
        return cloud
    faces = [(p[0], p[i], p[i + 1]) for p in polygons for i in range(1, len(p) - 1)]
    return from_faces(cloud.xyz, np.array(faces, np.int64).reshape(-1, 3), sampled)


def _check_ply(path: Path) -> None:
    """A header may claim any number of elements: no more than there are bytes for."""
    with path.open("rb") as file:
        start = file.read(HEADER)
    head, found, _ = start.partition(b"end_header")
    if not start.startswith(b"ply") or not found:
        raise DataError("unreadable", "has no PLY header", AGAIN)
    text, least, count, each = b"format ascii" in head, 0, 0, 0
    for line in [*head.decode("ascii", "replace").splitlines(), "element end 0"]:
        words = line.split()
        if words[:1] == ["element"] and len(words) == 3:
            least += count * each
            count, each = int(words[2]) if words[2].isdecimal() else 0, 0
        elif words[:1] == ["property"]:
            each += 2 if text else BYTES.get(words[1], 1)  # a list: at least its length
    left = path.stat().st_size - len(head) - len("end_header") - (0 if text else 1)
    if least > left:
        raise DataError("truncated", f"its header announces at least {least} bytes of elements, {left} are there", AGAIN)


def read_las(path: Path) -> Cloud:
    """LAS or LAZ: coordinates by their scale and offset in float64, class as label. Raises DataError."""
    import laspy

    _check_las(path)
    try:
        with laspy.open(path) as file:
            header = file.header
            claimed, size = header.point_count, header.point_format.size
            room = path.stat().st_size - header.offset_to_point_data
            if path.suffix.lower() == ".las" and claimed * size > room:
                raise DataError("truncated", f"announces {claimed} points of {size} bytes, {room} bytes are there", AGAIN)
            plausible(claimed * size, room, "its points")
            data = file.read()
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # laspy raises what it likes, and a panic of its decompressor is no Exception
        raise DataError("unreadable", f"is no LAS that can be read ({type(error).__name__})", AGAIN) from None
    if len(data.points) != claimed:
        raise DataError("truncated", f"announces {claimed} points, {len(data.points)} are there", AGAIN)
    here = set(data.point_format.dimension_names)
    wanted = here & {"red", "green", "blue", "intensity", "gps_time", "classification"}
    columns = {name: np.asarray(data[name]) for name in wanted}
    return of_columns({**{name: np.asarray(data[name], np.float64) for name in "xyz"}, **columns})


def _check_las(path: Path) -> None:
    """Counts of records and of chunks, for which laspy and its decompressor take time and memory before they look.

    Raises DataError. Places: LAS 1.4 R15, tables 3 and 5; LAZ: the offset of the table of chunks stands before the points, in
    the table its version and how many there are, in the record of laszip how many points each has.
    """
    try:
        with opened(path) as data:
            header, points, records = struct.unpack_from("<HII", data, 94)
            kind, width, count = struct.unpack_from("<BHI", data, 104)
            later, extended = struct.unpack_from("<QI", data, 235) if header >= 375 else (0, 0)
            count = struct.unpack_from("<Q", data, 247)[0] if header >= 375 else count
            sound = data[:4] == b"LASF" and header + 54 * records <= points <= len(data) and (
                later + 60 * extended <= len(data)) and width > 0
            if sound and kind & 128:
                table, = struct.unpack_from("<q", data, points)
                table = table if table >= 0 else struct.unpack_from("<q", data, len(data) - 8)[0]  # it was written last
                chunks, = struct.unpack_from("<I", data, table + 4)
                laszip = data.find(LASZIP, header, points) - 2 + 54
                each, = struct.unpack_from("<I", data, laszip + 12)
                sound = 0 < table < len(data) and chunks <= len(data) and laszip > header and (
                    each == VARYING or each <= max(count, USUAL))
    except (struct.error, ValueError, OSError):
        sound = False
    if not sound:
        raise DataError("unreadable", "its LAS header is damaged, or announces more than the file has room for", AGAIN)


def read_pcd(path: Path) -> Cloud:
    """PCD 0.6 and 0.7: ascii, binary, binary_compressed; `rgb` unpacked. Raises DataError."""
    raw = path.read_bytes()
    found = re.search(rb"^DATA[ \t]+(\w+)[ \t]*\r?\n", raw[:HEADER], re.MULTILINE)
    if not found:
        raise DataError("unreadable", "has no PCD header", AGAIN)
    lines = [line.split() for line in raw[:found.start()].decode("ascii", "replace").splitlines()]
    head = {words[0]: words[1:] for words in lines if words and not words[0].startswith("#")}
    body, how = raw[found.end():], found[1].decode()
    try:
        names = head["FIELDS"]
        sizes, kinds = [int(s) for s in head["SIZE"]], head["TYPE"]
        counts = [int(c) for c in head.get("COUNT", ["1"] * len(names))]
        points = int(head["POINTS"][0]) if "POINTS" in head else int(head["WIDTH"][0]) * int(head["HEIGHT"][0])
        fields = zip(kinds, sizes, counts, strict=True)
        row = np.dtype([(f"{i}", f"<{kind.lower()}{size}", (count,)) for i, (kind, size, count) in enumerate(fields)])
        assert len(kinds) == len(names) and points >= 0
    except (KeyError, ValueError, TypeError, IndexError, AssertionError):
        raise DataError("unreadable", "its PCD header is incomplete or contradicts itself", AGAIN) from None
    if how == "binary":
        _room(points * row.itemsize, len(body))
        table = np.frombuffer(body, row, points)
        columns = {n: table[f"{i}"] for i, n in enumerate(names)}
    elif how == "binary_compressed":
        packed, size = (int(n) for n in np.frombuffer(body[:8].ljust(8, b"\0"), "<u4"))
        _room(packed, len(body) - 8)
        if size != points * row.itemsize:
            raise DataError("unreadable", f"holds {size} bytes where {points} points take {points * row.itemsize}", AGAIN)
        plain, columns, at = lzf(body[8:8 + packed], size), {}, 0
        for i, name in enumerate(names):  # field by field
            kind = row[f"{i}"]
            columns[name] = np.frombuffer(plain, kind.base, points * kind.shape[0], at).reshape(points, -1)
            at += points * kind.itemsize
    elif how == "ascii":
        _room(points * 2 * sum(counts), len(body) + 1)
        columns = _pcd_text(body, points, names, counts, row)
    else:
        raise DataError("unreadable", f"PCD data '{how}' is not known", "Save it as binary or ascii.")
    columns = {n: c[:, 0] for n, c in columns.items() if c.shape[1] == 1}
    packed_colour = columns.pop("rgb", columns.pop("rgba", None))
    if packed_colour is not None:
        bits = np.ascontiguousarray(packed_colour).view(np.uint32)
        columns |= {n: ((bits >> s) & 255).astype(np.uint8) for n, s in (("red", 16), ("green", 8), ("blue", 0))}
    return of_columns(columns)


def _pcd_text(body: bytes, points: int, names: list[str], counts: list[int], row: np.dtype) -> dict[str, np.ndarray]:
    words = body.split()
    if len(words) != points * sum(counts):
        raise DataError("truncated", f"announces {points} points of {sum(counts)} numbers, holds {len(words)} numbers", AGAIN)
    table = np.array(words).reshape(points, -1)
    ends = np.cumsum(counts)
    try:
        return {n: table[:, end - c:end].astype(row[f"{i}"].base)
                for i, (n, c, end) in enumerate(zip(names, counts, ends, strict=True))}
    except (ValueError, OverflowError):
        raise DataError("unreadable", "its PCD data are not all numbers that their type holds", AGAIN) from None


def _room(wanted: int, there: int) -> None:
    if wanted > there:
        raise DataError("truncated", f"announces {wanted} bytes of points, {there} are there", AGAIN)


def lzf(data: bytes, size: int) -> bytes:
    """Decompress LZF (Lehmann's liblzf): literal runs, and copies of what was written before. Raises DataError."""
    out, at = bytearray(), 0
    try:
        while at < len(data):
            control = data[at]
            at += 1
            if control < 32:
                out += data[at:at + control + 1]
                at += control + 1
                continue
            length = control >> 5
            if length == 7:
                length += data[at]
                at += 1
            start = len(out) - ((control & 31) << 8) - data[at] - 1
            at += 1
            length += 2
            if start < 0:
                raise IndexError
            while length > 0:  # a copy may run into itself
                piece = out[start:start + length]
                out += piece
                start, length = start + len(piece), length - len(piece)
    except IndexError:
        raise DataError("unreadable", "its compressed data are damaged", AGAIN) from None
    if len(out) != size:
        raise DataError("truncated", f"unpacks to {len(out)} bytes instead of {size}", AGAIN)
    return bytes(out)
