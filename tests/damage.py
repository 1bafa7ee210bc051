"""Ways to break a file: bits, numbers, structure, what archives hold, and what a folder may have in a file's place."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MOST = 4 << 20  # bytes of a damaged file
WORDS = (b"NaN", b"-inf", b"1e999", b"-1", b"0", b"1e-320", b"9" * 5000, b"18446744073709551616", b"2147483648", b"0x41",
         b"-9223372036854775809", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f\x92\xa9", b"\r", b"\n\n", b",", b"\t", b'"',
         b"'", b"{", b"[", b"null", b"true", b"../../outside/kept.txt", b"/etc/passwd", b"/dev/zero", b"file:///etc/passwd",
         b"http://127.0.0.1:9/x", b"%s%n", b"$(touch harmed)", b"!!python/object/apply:os.system ['touch harmed']",
         b"cos\nsystem\n(S'touch harmed'\ntR.", b"A" * 100_000, b"1 " * 50_000, b"[" * 100_000, b'{"a":' * 50_000, b"(" * 3000)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, -0.5, 1e308, float("nan"), float("inf"), "", "a", "NaN", "\0", "\ud800",
    "../../outside/kept.txt", "/etc/passwd", "A" * 10_000, [], {}, [[]], [None], {"": None}, [1, 2, 3], list(range(2000)),
    ["a", 1, None])
LAUGHS = (b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "' + b"x" * 1000 + b'">'
          + b"".join(b'<!ENTITY b%d "%s">' % (i, b"&b%d;" % (i - 1) * 20 if i else b"&b;" * 20) for i in range(9)))
OUTSIDE = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b8 SYSTEM "file:///etc/passwd">'
BILLION = b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12))


def damaged(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """The bytes of a file with one or a few things wrong. others: files to take pieces from."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if len(data) > 1 << 18:
            break  # a bomb, perhaps
        inside = next((change for start, change in PACKED if data.startswith(start)), None)
        if inside is not None and rng.random() < 0.7:
            data = inside(data, others, rng)
        else:
            ways = [*BYTES, *BYTES, *(TEXT if _is_text(data) else ())]
            data = rng.choice(ways)(data, others, rng)
    return data[:MOST]


Change = Callable[[bytes, Sequence[bytes], random.Random], bytes]


def _is_text(data: bytes) -> bool:
    return sum(b < 9 or b > 126 for b in data[:400]) < 8


def _place(data: bytes, rng: random.Random) -> int:
    """Somewhere; half of the time where headers are."""
    return rng.randrange(max(min(len(data), 400) if rng.random() < 0.5 else len(data), 1))


# ---- bytes


def bits(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if out else 0):
        out[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def some_bytes(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    at = _place(data, rng)
    n = rng.choice((1, 2, 4, 16, 200))
    return data[:at] + rng.choice((rng.randbytes(n), bytes(n), b"\xff" * n)) + data[at + n:]


def cut(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return data[:_place(data, rng)]


def gone(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 7, 64, 500)):]


def again(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    at, n = _place(data, rng), rng.choice((1, 8, 64, 1000))
    return data[:at] + data[at:at + n] * rng.choice((2, 3, 50, 1000)) + data[at + n:]


def spliced(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    other = rng.choice(others) if others else data
    return data[:_place(data, rng)] + other[_place(other, rng):]


def number(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """An integer or float field set to an extreme."""
    form = rng.choice("bBhHiIqQfd")
    order, size = rng.choice("<>"), struct.calcsize(form)
    if form in "fd":
        value: float = rng.choice((float("nan"), float("inf"), -1.0, 0.0, 3e38, 1e-38))
    else:
        top = 1 << 8 * size - (1 if form.islower() else 0)
        value = rng.choice((0, 1, top - 1, top // 2, top // 3, -1 if form.islower() else 2, -top if form.islower() else 255))
    at = _place(data, rng)
    at -= at % rng.choice((1, size))
    return data[:at] + struct.pack(order + form, value) + data[at + size:]


def hostile(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Something else altogether."""
    return rng.choice((b"", bytes(1000), b"\xff" * 300, b"[" * 200_000, b'{"a":' * 100_000, LAUGHS + b"]><a>&b8;</a>",
                       OUTSIDE + b"]><a>&b8;</a>", BILLION, b"A" * 1_000_000, rng.randbytes(500), *others))


# ---- text


def word(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.choice(WORDS) + data[at + rng.choice((0, 0, 1, 5)):]


def numeral(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A number in a text replaced."""
    found = list(re.finditer(rb"[-+]?\d[\d.eE+-]*", data[:200_000]))
    if not found:
        return word(data, others, rng)
    one = rng.choice(found)
    return data[:one.start()] + rng.choice(WORDS) + data[one.end():]


def line(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A line left out, doubled, moved, joined, or many of it."""
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    how = rng.randrange(5)
    if how == 0:
        del lines[i]
    elif how == 1:
        lines.insert(j, lines[i])
    elif how == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif how == 3:
        lines[i - 1] += lines[i]
        del lines[i]
    else:
        lines[i:i] = [lines[i]] * min(3000, MOST // (len(lines[i]) + 1))
    return b"\n".join(lines)


def entities(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """XML with entities that grow, or that name a file."""
    at = data.find(b"<", _place(data, rng))
    body = data[data.find(b"?>") + 2:] if data.startswith(b"<?xml") else data
    at = body.find(b"</", rng.randrange(max(len(body), 1)))
    return rng.choice((LAUGHS, OUTSIDE)) + b"]>" + body[:at] + b"&b8;" + body[at:]


def document(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """JSON with a value or a key exchanged."""
    try:
        return changed(json.loads(data), rng)
    except (ValueError, RecursionError):
        return numeral(data, others, rng)


def changed(about: Any, rng: random.Random) -> bytes:
    places: list[tuple[Any, Any]] = []

    def walk(x: Any) -> None:
        for key, value in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
            places.append((x, key))
            walk(value)

    walk(about)
    if not places:
        return json.dumps(rng.choice(VALUES)).encode()
    inside, key = rng.choice(places)
    how = rng.random()
    if how < 0.15:
        del inside[key]
    elif how < 0.25 and isinstance(inside, dict):
        inside[str(rng.choice(VALUES))] = inside.pop(key)
    elif how < 0.35:
        other, place = rng.choice(places)
        try:
            inside[key] = json.loads(json.dumps(other[place]))
        except (KeyError, IndexError):
            inside[key] = None
    else:
        inside[key] = rng.choice(VALUES)
    return json.dumps(about).encode()


BYTES: tuple[Change, ...] = (bits, some_bytes, cut, gone, again, spliced, number, number, hostile)
TEXT: tuple[Change, ...] = (word, numeral, numeral, numeral, line, document, document, entities)


# ---- what is compressed: a flipped bit outside would only break the checksum


def gzipped(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    if rng.random() < 0.03:
        return _bomb(gzip.compress)
    try:
        plain = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return bits(data, others, rng)
    return gzip.compress(damaged(plain, others, rng), 1)


def xzed(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    if rng.random() < 0.05:
        return _bomb(lzma.compress)
    try:
        plain = lzma.decompress(data)
    except (lzma.LZMAError, EOFError):
        return bits(data, others, rng)
    return lzma.compress(damaged(plain, others, rng), preset=0)


_bombs: dict[str, bytes] = {}


def _bomb(compress: Callable[[bytes], bytes], start: bytes = b"") -> bytes:
    """Three gigabytes of the same in as little as it takes."""
    name = compress.__module__
    if name not in _bombs:
        many = compress(b"0," * (1 << 19))
        _bombs[name] = many * 3000
    return _bombs[name]


def zipped(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A zip with a member broken, missing, renamed, added outside, doubled, encrypted by its flags, or a bomb."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            members = [(i.filename, old.read(i)) for i in old.infolist()]
            kind = old.infolist()[0].compress_type if members else zipfile.ZIP_DEFLATED
        how, i = rng.random(), rng.randrange(max(len(members), 1))
        name, inside = members[i]
        if how < 0.6:
            members[i] = name, _array(inside, rng) if inside.startswith(b"\x93NUMPY") and rng.random() < 0.5 else damaged(
                inside, [m for _, m in members], rng)
        elif how < 0.65:
            del members[i]
        elif how < 0.7:
            members[i] = rng.choice([*(n for n, _ in members), "../../harmed.npy", "/harmed.npy", "a" * 300, ""]), inside
        elif how < 0.8:
            members.append((rng.choice(("../../harmed.txt", "../harmed.npy", "/harmed", "..\\harmed", name)), b"harm"))
        elif how < 0.81:
            members[i] = name, _array(inside, rng, bomb=True)
        else:
            members *= 2
        with zipfile.ZipFile(out, "w", kind if rng.random() < 0.8 else zipfile.ZIP_DEFLATED) as new:
            for member, content in members:
                link = zipfile.ZipInfo(member)
                link.compress_type = new.compression
                if rng.random() < 0.02:
                    link.external_attr = 0o120777 << 16  # a symbolic link
                new.writestr(link, content)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, zlib.error, IndexError, KeyError, RuntimeError,
            UnicodeError, struct.error, OSError, lzma.LZMAError, OverflowError):
        return bits(data, others, rng)
    return out.getvalue()


def _array(data: bytes, rng: random.Random, bomb: bool = False) -> bytes:
    """A .npy whose header says something else."""
    try:
        size, = struct.unpack("<H", data[8:10])
        head, body = data[10:10 + size].decode("latin1"), data[10 + size:]
    except (struct.error, UnicodeDecodeError):
        return data
    shape = rng.choice(("(1000000000000,)", "(-1, 3)", "(0, 3)", "()", "(3, 0)", "(99999999, 99999999)", "(3,)", "(1,)" * 40,
                        "(True, 3)", "(2, 3, 4, 5, 6)", "__import__('os').system('touch harmed')", "(1e9, 3)", "'a'",
                        "(" * 300 + ")" * 300))
    kind = rng.choice(("'|O'", "'<f2'", "'<c16'", "'|b1'", "'<U9'", "'<M8[s]'", "[('a', '<f4')]", "'<i8'", "'|V7'", "'>f8'",
                       "'<f16'"))
    if bomb:
        head, body = re.sub(r"'shape': \([^)]*\)", "'shape': (7000000, 3)", head), bytes(168_000_000)
    elif rng.random() < 0.6:
        head = re.sub(r"'shape': \([^)]*\)", f"'shape': {shape}", head)
    else:
        head = re.sub(r"'descr': '[^']*'", f"'descr': {kind}", head)
    return data[:8] + struct.pack("<H", len(head) & 0xFFFF) + head.encode("latin1") + body


def array(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return _array(data, rng)


def png(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A PNG whose checksums are right again: of a chunk broken, or whose pixels are a bomb."""
    out, at, target = [data[:8]], 8, rng.randrange(4)
    k = 0
    while at + 12 <= len(data) and k < 100:
        n, = struct.unpack(">I", data[at:at + 4])
        kind, body = data[at + 4:at + 8], data[at + 8:at + 8 + n]
        if k == target:
            if kind == b"IDAT" and rng.random() < 0.7:
                try:
                    body = zlib.compress(damaged(zlib.decompress(body), (), rng))
                except zlib.error:
                    body = bits(body, (), rng)
            elif kind == b"IHDR" and rng.random() < 0.7:
                size = rng.choice((0, 1, 8000, 60_000, 2**31 - 1, 2**32 - 1))
                body = struct.pack(">II", size, rng.choice((size, 1))) + body[8:]
            else:
                body = rng.choice((bits, some_bytes, cut))(body, (), rng)
        out.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
        at, k = at + 12 + n, k + 1
    return b"".join(out)


PACKED: tuple[tuple[bytes, Change], ...] = (
    (b"\x1f\x8b", gzipped), (b"\xfd7zXZ", xzed), (b"PK\x03\x04", zipped), (b"\x89PNG", png), (b"\x93NUMPY", array))


# ---- folders


def misplaced(file: Path, rng: random.Random) -> str:
    """Puts something that is no plain file where a file was; what it is."""
    how = rng.choice(("outside", "nowhere", "itself", "pipe", "folder", "zeros", "unreadable", "upwards", "odd name"))
    content = file.read_bytes()
    file.unlink()
    if how == "outside":
        file.symlink_to("/etc/passwd")
    elif how == "nowhere":
        file.symlink_to(file.with_name("nowhere"))
    elif how == "itself":
        file.symlink_to(file)
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how == "zeros":
        file.symlink_to("/dev/zero")
    elif how == "upwards":
        file.symlink_to(file.parent)
    elif how == "odd name":
        file.write_bytes(content)
        file.rename(file.with_name(os.fsdecode(b"\xff\xfe #") + file.name))
    else:
        file.write_bytes(content)
        file.chmod(0)
    return how
