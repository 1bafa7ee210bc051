"""Invented names, ids, dates, UIDs and places are planted wherever files can hold them, and searched for in all that comes out.

    python tests/canaries.py [--modality NAME] [--out FILE]

On each data set of `made_canaries` the command line checks the data, pretrains, is broken in the middle by errors whose
messages name everybody, resumes, fine-tunes, evaluates, also in two processes, writes shards, trains from them and in a joint
run, predicts, embeds and exports, in a home directory that is itself called by a planted word. Then every file below it but the
data is unpacked and searched, and so is every byte that was printed. The same search must find every planted word in the data,
or it would prove nothing. Closes with one JSON line of counts. Exit status 1 if a word was found; the folder is then kept.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import gzip
import importlib
import io
import json
import os
import pty
import re
import shutil
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from chaos import end, start
from made_canaries import PLANTED, Canaries
from made_files import MADE, NET

from meristem.platform.data.samples import Samples
from meristem.platform.training import loop

ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")  # numpy stores texts in the fourth
BASE64 = re.compile(rb"[A-Za-z0-9+/]{64,}={0,2}")
PNG = b"\x89PNG\r\n\x1a\n"
QUICK = ["train.batch=4", "train.log_every=1", "train.precision=fp32", "train.workers=1"]
PRETRAINED = "pretraining"
JOINED = ("volume/mae", "video/videomae", "points/mae", "graph/mae")  # as joint/mae has them
STEPS, BREAK = 6, 3


# ---- search

def parts(data: bytes, name: str = "") -> Iterator[tuple[str, bytes]]:
    """Bytes, and all that is packed in them: members of archives, streams of gzip, texts of PNG, base64 in pages."""
    yield name, data
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield f"{name}:comment", archive.comment
            for member in archive.infolist():
                yield f"{name}:{member.filename}", member.filename.encode() + member.comment
                yield from parts(archive.read(member), f"{name}:{member.filename}")
    elif data[:2] == b"\x1f\x8b":
        try:
            yield from parts(gzip.decompress(data), f"{name}:gzip")
        except (OSError, EOFError, zlib.error):  # cut
            return
    elif data[:8] == PNG:
        at = 8
        while at + 8 <= len(data):
            size, kind = int.from_bytes(data[at:at + 4], "big"), data[at + 4:at + 8]
            if kind in (b"zTXt", b"iTXt"):
                for packed in re.finditer(b"\x78[\x01\x5e\x9c\xda]", chunk := data[at + 8:at + 8 + size]):
                    try:
                        yield f"{name}:text", zlib.decompressobj().decompress(chunk[packed.start():])
                    except zlib.error:
                        continue
            at += size + 12
    else:
        for found in BASE64.finditer(data):
            try:
                inside = base64.b64decode(found[0] + b"=" * (-len(found[0]) % 4))
            except binascii.Error:
                continue
            yield from parts(inside, f"{name}:base64")


def hits(pieces: Iterable[tuple[str, bytes]], words: Iterable[str]) -> set[tuple[str, str]]:
    """(where, word) of the words in some bytes, in any usual encoding, in upper or lower case."""
    forms = [(word, word.lower().encode(code)) for word in words for code in ENCODINGS]
    return {(name, word) for name, data in pieces for lower in [data.lower()] for word, form in forms if form in lower}


def files(folder: Path, but: Iterable[Path] = ()) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, its relative name before its parts; not below `but`."""
    for path in sorted(folder.rglob("*")):
        if any(path.is_relative_to(b) for b in but):
            continue
        name = path.relative_to(folder).as_posix()
        yield name, name.encode()
        if path.is_file():
            yield from parts(path.read_bytes(), name)


# ---- what is done

class Home:
    """A home directory with a data set in it, and what is called there."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.planted, self.c = name, PLANTED[name], Canaries()
        self.path = root / self.c.word("home directory")
        self.data = self.path / self.c.word("folder of the data")
        self.data.mkdir(parents=True)
        self.said = root / "said"
        self.said.mkdir()
        self.place = f"{self.data.name}/{self.planted.write(self.data, self.c)}".rstrip("/")
        self.run = f"{self.c.word('folder of a run')}-{PRETRAINED}"
        self.calls = 0

    def call(self, *arguments: str, tty: bool = False, code: int = 0, before: Callable[[], None] = lambda: None) -> bytes:
        """What `meristem ...` says, called in this home; it must end with this status."""
        said = self.said / f"{self.calls:02d}-{arguments[0]}.txt"
        self.calls += 1
        leader, follower = pty.openpty() if tty else (-1, -1)

        def arrange() -> None:
            for name in ("MERISTEM_KEY", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MERISTEM_TRACEBACK"):
                os.environ.pop(name, None)
            os.environ |= {"HOME": str(self.path), "TMPDIR": str(self.path), "COLUMNS": "200"}
            tempfile.tempdir = None
            os.chdir(self.path)
            if tty:
                os.dup2(follower, 1)
                os.dup2(follower, 2)
            before()

        pid = start(["meristem", *arguments], said, arrange)
        if tty:
            os.close(follower)
            reading = threading.Thread(target=_drain, args=(leader, said))
            reading.start()
        ended = end(pid)
        if tty:
            reading.join()
            os.close(leader)
        assert ended == code, f"{self.name}: {arguments} ended with {ended}, not {code}:\n{said.read_text()}"
        return said.read_bytes()


def _drain(leader: int, said: Path) -> None:
    with said.open("ab") as file:
        while True:
            try:
                data = os.read(leader, 4096)
            except OSError:  # the other side is closed
                return
            if not data:
                return
            file.write(data)


def breaking(home: Home, what: str) -> Callable[[], None]:
    """Makes a process fail at its third batch or step, with a message that names everybody."""
    everybody, count = " ".join(home.c.words.values()), 0
    windows, combined = Samples.windows, loop.combined

    def fail() -> None:
        nonlocal count
        count += 1
        if count < BREAK or (what == "truncated" and count > BREAK):  # once: a worker may outlive its run
            return
        if what == "worker":
            raise ValueError(everybody)
        if what == "lost":
            raise FileNotFoundError(2, "No such file or directory", str(home.data / everybody.split()[0]))
        if what == "truncated":
            for file in (f for f in home.data.rglob("*") if f.is_file()):
                os.truncate(file, file.stat().st_size // 3)
            return
        raise RuntimeError(everybody)

    def reading(cache: Samples, *arguments: Any) -> Any:
        fail()
        return windows(cache, *arguments)

    def stepping(*arguments: Any) -> Any:
        fail()
        return combined(*arguments)

    def arrange() -> None:
        if what == "step":
            loop.combined = stepping
        else:
            Samples.windows = reading  # type: ignore[method-assign]
    return arrange


def through(home: Home) -> None:
    """Everything that a user does with a data set, and what may go wrong."""
    planted, made = home.planted, MADE[home.planted.of]
    data = ["--data", home.place]
    view = [o for o in made.over if o.startswith(("views.x", "modality"))]
    pretrain = ["pretrain", made.recipe, *data, *made.over, NET, *QUICK, f"train.steps={STEPS}", "train.checkpoint_every=1"]
    check = ["data", "check", home.place, "--modality", planted.of]
    home.call(*check, "--out", "checked", code=int(planted.broken))
    home.call(*check, "--json", tty=True, code=int(planted.broken))
    for what, tty in (("worker", False), ("lost", True)):
        said = home.call(*pretrain, "--out", f"broken-{what}", tty=tty, code={"worker": 1, "lost": 2}[what],
                         before=breaking(home, what))
        assert (b"ValueError" if what == "worker" else b"cannot be read now") in said, said
    said = home.call(*pretrain, "--out", home.run, code=1, before=breaking(home, "step"))
    assert b"RuntimeError" in said and b"loop.py" in said, said
    home.call(*pretrain, "--out", home.run, "--resume", tty=True)
    quarantined = (home.path / home.run / "quarantine.csv").read_text().count("\n") - 1
    assert (quarantined > 0) == planted.broken
    task = [f"{planted.of}/{planted.task}", *data, *view, *planted.over, *QUICK, "train.steps=3", "--init", home.run]
    home.call("finetune", *task, "--out", "tuned")
    home.call("evaluate", *task, "--init", "metadata", "--seeds", "1", "--protocol", "finetune", "--out", "compared",
              *(["--protocol", "linear"] if planted.task == "classification" else []), tty=True)
    home.call("report", "compared", "--out", "again")
    home.call("evaluate", *task, "--seeds", "2", "--protocol", "finetune", "--jobs", "2", "--out", "shared")
    decoded = ["modality.video.store=decoded", "modality.video.resize=16"] if planted.of == "video" else []
    options = [o for o in (*made.over, *decoded) if o.startswith("modality")]
    home.call("data", "shard", home.place, *options, "--recipe", made.recipe, "--size", "0.01", "--out", "file://shards")
    home.call("pretrain", made.recipe, "--data", "file://shards", *made.over, *decoded, NET, *QUICK, "train.steps=3",
              "--out", "streamed", tty=True)
    if made.recipe in JOINED:
        members = [f"members.{planted.of}.{o}" for o in (*made.over, "train.batch=4")]
        home.call("pretrain", "joint/mae", "--data", f"{planted.of}={home.place}", *members, NET, "train.workers=1",
                  "train.steps=3", "train.log_every=1", "--out", "joined")
    home.call("predict", "--checkpoint", "tuned", *data, "--out", "predicted")
    home.call("embed", "--checkpoint", home.run, *data, "--out", "vectors")
    if planted.of in ("image", "volume"):
        home.call("export", "--checkpoint", home.run, "--out", "exported")
    home.call("pretrain", "none/such", *data, "--out", "never", code=2)
    kept = home.data.with_name("kept")
    shutil.copytree(home.data, kept)
    try:
        said = home.call(*pretrain, "--out", "truncated", code=2 if planted.of == "video" else 0, tty=True,
                         before=breaking(home, "truncated"))
    finally:
        shutil.rmtree(home.data)
        kept.rename(home.data)


def searched(name: str, root: Path) -> dict[str, Any]:
    """The counts of one data set; `found` tells where."""
    home = Home(name, root)
    c = home.c
    through(home)
    words = list(c.words.values())
    there = {word for _, word in hits(files(home.path.parent, [home.said]), words)}
    blind = sorted(place for place, word in c.words.items() if word not in there)
    assert not blind, f"the search is blind to {blind}"

    place = {word: place for place, word in c.words.items()}
    run, predicted = home.path / home.run, home.path / "predicted"
    run = run.rename(run.with_name(PRETRAINED))  # the user's to name: it must not be repeated elsewhere
    artefacts = list(files(home.path, [home.data, predicted]))
    named = {c.words[p] for p in c.files}
    found = hits(artefacts, words) | hits(files(home.said), words)
    # a prediction goes by its file's name, as documented; nothing else of the file is carried over
    found |= {("predicted/" + n, w) for n, w in hits(files(predicted), [w for w in words if w not in named])}
    return {"planted": len(words), "files": sum(f.is_file() for f in home.path.rglob("*") if not f.is_relative_to(home.data)),
            "pieces": len(artefacts), "printed": sum(f.stat().st_size for f in home.said.iterdir()), "commands": home.calls,
            "found": sorted({f"{place[w]} in {where}" for where, w in found})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", choices=sorted(PLANTED), action="append", help="default: each")
    parser.add_argument("--out", type=Path, help="a file for the counts too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("meristem.api", "meristem.platform.training.pretrain", "meristem.tasks.finetune"):
        importlib.import_module(name)  # once for all forks
    root, began = Path(tempfile.mkdtemp(prefix="canaries-")), time.monotonic()
    counts: dict[str, dict[str, Any]] = {}
    for name in given.modality or PLANTED:
        counts[name] = searched(name, root / name)
        for found in counts[name]["found"]:
            print(f"{name}: {found}", file=sys.stderr, flush=True)
    found = sum(len(x["found"]) for x in counts.values())
    line = {"canaries": sum(x["planted"] for x in counts.values()), "found": found,
            "artefacts": sum(x["files"] for x in counts.values()), "pieces": sum(x["pieces"] for x in counts.values()),
            "commands": sum(x["commands"] for x in counts.values()),
            "printed_bytes": sum(x["printed"] for x in counts.values()),
            "modalities": {name: x["planted"] for name, x in counts.items()}, "seconds": round(time.monotonic() - began)}
    print(json.dumps(line), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(line, indent=1) + "\n")
    if found:
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
