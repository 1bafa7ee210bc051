"""Broken and hostile files given to every reader: each must be read, or refused with a reason, what is wrong and a remedy.

    python tests/fuzz.py --seconds 600 [--seed 0] [--target NAME] [--blind] [--out FILE]

The files of each target (`inputs.py`) are broken at random (`damage.py`), half of the time guided by what the readers' code has
run so far where atheris is installed. Readers run in a process of their own, with 2 GiB of memory and 20 s of its CPU for an
input. A finding is anything but an answer: another exception, a crash, a hang, more memory, a program that was run, a file
written or a connection made elsewhere, a refusal without remedy or with the name of a file. Its input is kept. Closes with one
JSON line of counts; exit status 1 if there are findings.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import importlib.util
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True
GUIDED = ("meristem", "nibabel", "pydicom", "plyfile", "laspy", "tifffile", "trimesh", "networkx", "PIL", "yaml", "av")
MEMORY = 2 << 30  # bytes beyond what a process has when it starts
CPU, WALL = 20.0, 60.0  # s for an input: of its own, and until it counts as waiting for what never comes
BATCH = 400  # inputs before a fresh process
SLICE = 15.0  # s of a target before it is the next one's turn
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn", "os.startfile",
             "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "pickle.find_class", "urllib.Request",
             "ftplib.connect", "webbrowser.open", "shelve.open", "code.__new__", "marshal.load")
CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
            "shutil.rmtree", "shutil.move", "shutil.copyfile", "shutil.unpack_archive", "os.utime")


KNOWN = {"input", "scratch", "seeds", "outside", "said.txt"}  # in the folder of a run


class Finding(BaseException):
    """Not caught by whoever catches what a decoder raises."""


class Place:
    """The folders of one run. input: what is read. scratch: what may be written. seeds: the valid files of each target."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.input, self.scratch, self.outside, self.seeds = (root / n for n in ("input", "scratch", "outside", "seeds"))
        for folder in (self.scratch, self.outside, self.seeds):
            folder.mkdir()
        self.armed = threading.Event()
        (self.outside / "kept.txt").write_text("nobody's business\n")

    def put(self, files: dict[str, bytes]) -> Path:
        """Fresh files to read, in a folder whose name says whose they are."""
        for folder in (self.input, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        home = self.input / inputs().CANARY
        home.mkdir()
        for name, data in files.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(data)
        return home

    def untouched(self) -> None:
        here = {p.name for p in self.root.iterdir() if not p.name.startswith("found-")} - KNOWN
        if here or {p.name for p in self.outside.iterdir()} != {"kept.txt"}:
            raise Finding(f"wrote outside its folders: {sorted(here)}")


def inputs() -> Any:
    return importlib.import_module("inputs")


def guard(place: Place) -> threading.Event:
    """While the event is set, running programs, connecting, unpickling classes and writing elsewhere raise `Finding`."""
    allowed, armed = (f"{place.scratch}/", "/dev/null", "/dev/shm/", "/proc/self/"), threading.Event()

    def inside(path: Any) -> bool:
        """Of what is relative to an open folder only the name is known: that folder was opened by a path before."""
        if not isinstance(path, str | bytes | os.PathLike):
            return True
        name = os.fsdecode(path)
        return os.path.realpath(name).startswith(allowed) if name.startswith("/") else "/" not in name

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not armed.is_set():
            return
        if event in FORBIDDEN:
            raise Finding(f"{event} {str(arguments[:2])[:200]}")
        if event == "open":
            path, mode, flags = arguments
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not inside(path):
                raise Finding(f"opened {path} for writing")
        elif event in CHANGING and not inside(arguments[0]):
            raise Finding(f"{event} {arguments[0]}")
        elif event == "import" and arguments[1] and str(arguments[1]).startswith(str(place.input)):
            raise Finding(f"imported {arguments[1]}")

    sys.addaudithook(hook)
    return armed


def confine() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextlib.contextmanager
def limited(armed: threading.Event) -> Iterator[None]:
    """Guarded, and with CPU seconds; whoever takes more is ended by the signal, wherever it is."""
    signal.setitimer(signal.ITIMER_PROF, CPU)
    armed.set()
    try:
        yield
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_PROF, 0)


def answer(target: Any, home: Path, place: Place, rng: random.Random) -> list[str]:
    """Reasons of what was refused; none where all was read. Raises Finding."""
    from meristem.errors import DataError, MeristemError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refused = target.load(home, place.scratch, rng)
    except DataError as error:
        refused = [(error.reason, error.what, error.remedy)]
        named = False
    except MeristemError as error:
        refused, named = [(type(error).__name__, error.what, error.remedy)], False
    except Finding:
        raise
    except MemoryError:
        raise Finding(f"more than {MEMORY >> 30} GiB: {traceback.format_exc(limit=-6)}") from None
    except BaseException as error:
        raise Finding(f"{type(error).__name__}: {str(error)[:300]}\n{traceback.format_exc()}") from None
    else:
        named = True
    for reason, what, remedy in refused:
        if reason == "memory":
            raise Finding(f"more than {MEMORY >> 30} GiB")
        if "cannot be decoded (" in what:
            raise Finding(f"not foreseen by its reader: {what}")
        if not (reason and what.strip() and remedy.strip()):
            raise Finding(f"no reason or no remedy: {reason}: {what} {remedy}")
        if named and inputs().CANARY in f"{what} {remedy}":
            raise Finding(f"names its file: {reason}: {what} {remedy}")
    return [reason for reason, *_ in refused]


def files_of(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.glob(pattern)) if f.is_file()}


def broken(files: dict[str, bytes], victims: list[str], place: Place, rng: random.Random) -> Path:
    """An input: all files, with one or two of them damaged, missing, or something else than a file."""
    from damage import damaged, misplaced

    files = dict(files)
    for name in rng.sample(victims, min(len(victims), rng.choice((1, 1, 1, 2)))):
        if rng.random() < 0.02:
            del files[name]
        else:
            files[name] = damaged(files[name], [d for n, d in files.items() if n != name], rng)
    home = place.put(files)
    if rng.random() < 0.03:
        there = [n for n in victims if n in files]
        if there:
            misplaced(home / rng.choice(there), rng)
    return home


Tell = Callable[[dict[str, Any]], None]


def attempt(target: Any, home: Path, place: Place, rng: random.Random, tell: Tell) -> None:
    """One input answered, and told of. The reader's process goes on after findings that left it whole."""
    tell({"began": 1})
    try:
        with limited(place.armed):
            refused = answer(target, home, place, rng)
        place.untouched()
        tell({"refused": sorted(set(refused))})
    except Finding as found:
        place.input.rename(kept := place.root / f"found-{time.monotonic_ns()}")
        tell({"finding": str(found), "input": str(kept)})


def blind(name: str, place: Place, seed: int, first: int, until: float, tell: Tell) -> None:
    target = inputs().TARGETS[name]
    files, victims = files_of(place.seeds / name), [*files_of(place.seeds / name, target.broken)]
    for n in range(first, first + BATCH):
        if time.monotonic() > until:
            break
        rng = random.Random(f"{seed} {name} {n}")
        attempt(target, broken(files, victims, place, rng), place, rng, tell)


def guided(name: str, place: Place, seed: int, first: int, until: float, tell: Tell) -> None:
    """libFuzzer keeps the inputs that ran new code, and breaks those again. One file of the target, another each time."""
    import atheris
    from damage import damaged

    target, rng = inputs().TARGETS[name], random.Random(f"{seed} {name} {first}")
    files, victims = files_of(place.seeds / name), [*files_of(place.seeds / name, target.broken)]
    victim = rng.choice(victims)
    corpus = place.root / "scratch" / "corpus"
    corpus.mkdir(parents=True)
    for i, other in enumerate(v for v in victims if v.rpartition(".")[2] == victim.rpartition(".")[2]):
        (corpus / str(i)).write_bytes(files[other])
    kept = place.seeds / f"{name}.corpus"
    shutil.rmtree(kept, ignore_errors=True)
    corpus.rename(kept)

    def one(data: bytes) -> None:
        if time.monotonic() > until:
            os._exit(0)
        attempt(target, place.put({**files, victim: data}), place, random.Random(zlib.crc32(data)), tell)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        dice = random.Random(number)
        return atheris.Mutate(data, most) if dice.random() < 0.4 else damaged(data, [*files.values()], dice)[:most]

    atheris.Setup([sys.argv[0], f"-seed={rng.randrange(1, 2**31)}", "-max_len=200000", "-rss_limit_mb=0", "-timeout=3600",
                   "-handle_segv=0", "-handle_abrt=0", "-handle_bus=0", "-handle_fpe=0", "-handle_ill=0", "-handle_int=0",
                   "-handle_term=0", "-verbosity=0", "-print_final_stats=0", f"-artifact_prefix={place.scratch}/",
                   f"-runs={BATCH}", str(kept)], one, custom_mutator=mutate)
    atheris.Fuzz()


class Reader:
    """A process that breaks and reads files of one target until its time is over."""

    def __init__(self, how: Callable[..., None], name: str, place: Place, seed: int, first: int, until: float) -> None:
        ear, mouth = os.pipe()
        self.ear = ear
        self.pid = os.fork()
        if self.pid:
            os.close(mouth)
            return
        code = 1
        try:
            os.close(ear)
            said = os.open(place.root / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.chdir(place.root)
            os.environ |= {"TMPDIR": str(place.scratch), "XDG_CACHE_HOME": str(place.scratch)}
            tempfile.tempdir = str(place.scratch)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            faulthandler.register(signal.SIGUSR1)
            confine()
            place.armed = guard(place)
            how(name, place, seed, first, until, lambda about: os.write(mouth, json.dumps(about).encode() + b"\n") and None)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def lines(self) -> Iterator[dict[str, Any]]:
        """What it tells; at the end {"ended": how}."""
        rest = b""
        while True:
            if not select.select([self.ear], [], [], WALL)[0]:
                os.kill(self.pid, signal.SIGUSR1)  # says where it waits
                time.sleep(1)
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                yield {"ended": f"waits: nothing came for {WALL:g} s"}
                break
            data = os.read(self.ear, 1 << 16)
            if not data:
                status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                yield {"ended": "" if status == 0 else f"more than {CPU:g} s of CPU" if status == -signal.SIGPROF else
                       f"died of {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"}
                break
            *whole, rest = (rest + data).split(b"\n")
            yield from map(json.loads, whole)
        os.close(self.ear)


class Counts:
    def __init__(self, keep: Path) -> None:
        self.accepted, self.keep = 0, keep
        self.inputs, self.reasons, self.findings, self.known = (Counter[str]() for _ in range(4))

    def found(self, name: str, what: str, where: Path, place: Place) -> None:
        """Keep the input, of each kind of finding the first few."""
        self.findings[name] += 1
        kind = "\n".join(line for line in what.splitlines() if line.strip())[-160:]
        self.known[kind] += 1
        if self.known[kind] > 2:
            shutil.rmtree(where, ignore_errors=True)
            return
        folder = self.keep / f"{name}-{self.findings[name]:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        if where.exists():
            shutil.move(where, folder / "input")
        said = place.root / "said.txt"
        end = said.read_bytes()[-3000:].decode(errors="replace") if said.exists() else ""
        (folder / "finding.txt").write_text(f"{what}\n\n{end}\n")
        print(f"{folder}: {what.splitlines()[0][:300]}", file=sys.stderr, flush=True)


def spell(how: Callable[..., None], name: str, place: Place, seed: int, first: int, until: float, counts: Counts) -> int:
    """A target's readers until a moment; how many inputs they had."""
    had = 0
    while time.monotonic() < until:
        under_way = False
        for about in Reader(how, name, place, seed, first + had, until).lines():
            if "began" in about:
                under_way, had = True, had + 1
                counts.inputs[name] += 1
            elif "refused" in about:
                under_way = False
                counts.accepted += not about["refused"]
                counts.reasons.update(about["refused"])
            elif "finding" in about:
                under_way = False
                counts.found(name, about["finding"], Path(about["input"]), place)
            elif about["ended"]:
                counts.found(name, about["ended"], place.input, place)
                if not under_way:  # not an input's fault
                    raise SystemExit(f"{name}: {about['ended']}\n{(place.root / 'said.txt').read_text()}")
    return had


def load_libraries(guide: bool) -> None:
    if guide:
        import atheris

        sink = open(os.devnull, "w")  # noqa: PTH123, SIM115 – open while atheris lists what it instruments
        with contextlib.redirect_stderr(sink), atheris.instrument_imports(include=[*GUIDED], enable_loader_override=False):
            _import()
    else:
        _import()


def _import() -> None:
    import torch

    torch.set_num_threads(1)
    inputs()
    for name in ("monai.data", "monai.transforms", "nibabel", "tifffile", "plyfile", "laspy", "trimesh", "networkx", "h5py",
                 "meristem.api", "meristem.modalities.image.dicom", "meristem.modalities.video.cine", "av", "rdkit.Chem",
                 "rdkit.Chem.Scaffolds.MurckoScaffold", "meristem.platform.training.pretrain"):
        importlib.import_module(name)
    from meristem.modalities.base import modalities, modality_class

    for name in modalities():
        modality_class(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="default: all in turn")
    parser.add_argument("--blind", action="store_true", help="without atheris")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where inputs that are findings go")
    parser.add_argument("--out", type=Path, help="a file for the counts too")
    given = parser.parse_args()
    guide = not given.blind and importlib.util.find_spec("atheris") is not None
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ |= {"MERISTEM_KEY": "of the fuzzer", "OMP_NUM_THREADS": "1", "HDF5_USE_FILE_LOCKING": "FALSE"}
    load_libraries(guide)
    known = inputs().TARGETS
    names = given.target or list(known)
    if wrong := set(names) - set(known):
        parser.error(f"no target {', '.join(wrong)}; there are {', '.join(known)}")
    place, counts, began = Place(Path(tempfile.mkdtemp(prefix="fuzz-"))), Counts(given.keep.absolute()), time.monotonic()
    for name in names:
        (place.seeds / name).mkdir()
        known[name].write(place.seeds / name)
    started, rounds, had = time.monotonic(), 0, Counter[str]()
    while (left := given.seconds - (time.monotonic() - started)) > 0:
        how, rest = (guided, 1) if guide and rounds % 2 else (blind, 1 + guide)  # each has its turn, however short the time is
        each = max(min(SLICE, left / len(names) / rest), 0.2)
        for name in names:
            had[name] += spell(how, name, place, given.seed, had[name], time.monotonic() + each, counts)
        rounds += 1
    line = {"fuzz": counts.inputs.total(), "findings": counts.findings.total(), "accepted": counts.accepted, "seed": given.seed,
            "guided": guide, "seconds": round(time.monotonic() - began), "targets": {n: counts.inputs[n] for n in names},
            "refused": dict(counts.reasons.most_common())}
    print(json.dumps(line), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(line, indent=1) + "\n")
    shutil.rmtree(place.root)
    if counts.findings:
        sys.exit(1)


if __name__ == "__main__":
    main()
