"""Training disturbed at random moments, then resumed, beside the same training undisturbed: they must end alike, bit for bit.

    python tests/chaos.py --kills 100 [--seed 0] [--modality NAME] [--out FILE]

Each trial starts a training of one modality on made files, disturbs it once, sometimes also while it resumes, checks after
each disturbance that every checkpoint on disk can be read and that whoever started the run is told in words, lets it go on to
its end and compares the weights. Closes with one JSON line of counts. Exit status 1 if a trial was lost; its folder is kept.

The processes are forks of this one, which has loaded the libraries: a trial costs seconds, and signals, files and exits are
those of `meristem pretrain`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from made_files import MADE, NET

from meristem import cli
from meristem.platform.training import checkpoint

STEPS, EVERY, KEEP = 12, 2, 3
TRAIN = [NET, f"train.steps={STEPS}", "train.batch=4", f"train.checkpoint_every={EVERY}", f"train.keep={KEEP}",
         "train.log_every=1", "train.workers=1", "train.ema=0.9"]
PATIENCE = 300.0  # s after which a process that has not ended counts as hung
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT, "usr1": signal.SIGUSR1}
FAULTS = (*SIGNALS, "write", "disk", "data", "worker")
CALLS = ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink")  # of os: the moments between which files change


@dataclass(frozen=True)
class World:
    """Made files of one modality, decoded samples, and the end of its undisturbed training.

    seconds: it took. calls: file operations that it made in its run directory.
    """

    name: str
    files: Path
    cache: Path
    weights: dict[str, torch.Tensor]
    seconds: float
    calls: int


def command(name: str, files: Path, cache: Path, run: Path, resume: bool) -> list[str]:
    made = MADE[name]
    return ["meristem", "pretrain", made.recipe, "--data", str(files), "--cache", str(cache), "--out", str(run), *made.over,
            *TRAIN, *(["--resume"] if resume else [])]


def start(arguments: list[str], said: Path, before: Callable[[], None] = lambda: None) -> int:
    """A process of its own group that runs the command line and writes what it says to a file; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        before()
        sys.argv = arguments
        cli.main()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(pid: int) -> int:
    """Exit status, or −N of signal N. A process that hangs is killed, and raises."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the process hung")


def dying(run: Path, at: int) -> Callable[[], None]:
    """Makes a process kill itself just before its at-th file operation inside a run directory."""
    def arrange() -> None:
        watch(run, lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == at else None)
    return arrange


def watch(run: Path, tell: Callable[[int], None]) -> None:
    """tell(n) before the n-th file operation of this process inside a run directory."""
    count, own = 0, os.getpid()

    def opened(handle: int) -> Path:
        return Path(f"/proc/self/fd/{handle}").readlink()

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def told(path: Any, *more: Any, **named: Any) -> Any:
            nonlocal count
            inside = named.get("dir_fd")
            target = opened(path) if isinstance(path, int) else (Path() if inside is None else opened(inside)) / path
            if os.getpid() == own and target.is_relative_to(run):
                count += 1
                tell(count)
            return call(path, *more, **named)
        return told

    for name in CALLS:
        setattr(os, name, watched(getattr(os, name)))


def narrow(limit: int) -> Callable[[], None]:
    """Lets no file of a process grow beyond a size: whoever writes gets the kernel's error, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def build(name: str, folder: Path) -> World:
    """The files and the undisturbed training."""
    files, cache, run, said = folder / name, folder / f"{name}-cache", folder / f"{name}-whole", folder / f"{name}-whole.txt"
    files.mkdir(parents=True)
    MADE[name].write(files)
    counter = folder / f"{name}-calls"

    def arrange() -> None:
        watch(run, lambda count: counter.write_text(str(count)) and None)

    began = time.monotonic()
    if code := end(start(command(name, files, cache, run, False), said, arrange)):
        raise SystemExit(f"{name} does not train undisturbed: exit status {code}\n{said.read_text()}")
    return World(name, files, cache, checkpoint.read_weights(run), time.monotonic() - began, int(counter.read_text()))


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def disturb(fault: str, world: World, run: Path, cache: Path, said: Path, resume: bool, rng: random.Random) -> int:
    """Start the training, disturb it, and return how it ended."""
    ahead = {"write": dying(run, rng.randint(1, world.calls)), "disk": narrow(rng.randint(4096, 40_000))}  # its log is short
    pid = start(command(world.name, world.files, cache, run, resume), said, ahead.get(fault, lambda: None))
    if fault in ("write", "disk"):
        return end(pid)
    time.sleep(rng.uniform(0, 1.1 * world.seconds))
    away = world.files.with_name(f"{world.name}-away")
    try:
        if fault in SIGNALS:
            os.kill(pid, SIGNALS[fault])
        elif fault == "data":
            world.files.rename(away)
        elif workers := children(pid):
            os.kill(rng.choice(workers), signal.SIGKILL)
        return end(pid)
    except ProcessLookupError:
        return end(pid)
    finally:
        if away.exists():
            away.rename(world.files)


def sound(run: Path) -> None:
    """Every checkpoint there is can be read, whole and finite, and there are not more than were to be kept."""
    found = sorted((run / "checkpoints").glob("step-*"))
    assert len(found) <= KEEP + 1, f"{len(found)} checkpoints kept for {KEEP}"  # one more until the oldest is gone
    for folder in found:
        card, state, weights = checkpoint.read_card(folder), checkpoint.read_state(folder), checkpoint.read_weights(folder)
        assert card["step"] == state["step"] == int(folder.name.removeprefix("step-"))
        assert all(bool(x.isfinite().all()) for x in weights.values() if x.is_floating_point())


def polite(code: int, said: Path, fault: str) -> None:
    """How a disturbed process may end: by itself, with a message of status 2, or killed; never with a traceback."""
    text = said.read_text()
    killed = {"kill": {-signal.SIGKILL}, "write": {-signal.SIGKILL}, "term": {-signal.SIGTERM}, "usr1": {-signal.SIGUSR1},
              "interrupt": {130, -signal.SIGINT}}  # a request that comes before the loop listens takes its usual course
    assert code in {0, 2} | killed.get(fault, set()), f"exit status {code}: {text}"
    assert "Traceback" not in text, text
    assert code != 2 or "meristem: " in text, text


def trial(world: World, folder: Path, rng: random.Random) -> Counter[str]:
    """One training with its disturbances; counts of each. Raises AssertionError where a promise was broken."""
    run, said, counts = folder / "run", folder / "said.txt", Counter[str]()
    cache = folder / "cache" if rng.random() < 0.3 else world.cache  # also while files are being decoded
    while not counts or rng.random() < 0.3:
        fault, said = rng.choice(FAULTS), folder / f"said-{counts.total()}.txt"
        code = disturb(fault, world, run, cache, said, counts.total() > 0, rng)
        counts[fault] += 1
        polite(code, said, fault)
        sound(run)
    code = end(start(command(world.name, world.files, cache, run, True), folder / "said-end.txt"))
    assert code == 0, (folder / "said-end.txt").read_text()
    sound(run)
    weights = checkpoint.read_weights(run)
    assert weights.keys() == world.weights.keys() and all(torch.equal(weights[k], world.weights[k]) for k in weights), \
        "the weights differ from those of the undisturbed run"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1)), f"logged steps {steps}"
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="disturbances, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modality", choices=sorted(MADE), action="append", help="default: each in turn")
    parser.add_argument("--out", type=Path, help="a file for the counts too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("meristem.api", "meristem.platform.training.pretrain"):
        importlib.import_module(name)  # once for all forks
    rng, began = random.Random(given.seed), time.monotonic()
    names = given.modality or list(MADE)
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    faults, kinds, lost = Counter[str](), Counter[str](), []
    worlds: dict[str, World] = {}
    while faults.total() < given.kills:
        name = names[kinds.total() % len(names)]
        if name not in worlds:
            worlds[name] = build(name, root)
        folder = root / f"trial-{kinds.total():04d}"
        folder.mkdir()
        kinds[name] += 1
        try:
            faults += trial(worlds[name], folder, rng)
            shutil.rmtree(folder)
        except AssertionError as broken:
            lost.append(folder.name)
            faults["lost"] += 1
            print(f"{folder}, {name}: {broken}", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print(f"\r{faults.total()} of {given.kills}, {len(lost)} trials lost", end="", file=sys.stderr, flush=True)
    line = {"chaos": faults.total() - faults["lost"], "trials": kinds.total(), "lost": len(lost), "seed": given.seed,
            "faults": {k: faults[k] for k in FAULTS}, "modalities": dict(kinds), "seconds": round(time.monotonic() - began)}
    print(json.dumps(line), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(line, indent=1) + "\n")
    if lost:
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
