"""Files of skeleton sequences, and what their names say. Parsing is kept: every window of a recording asks again."""

from __future__ import annotations

import lzma
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities.documents import MISSHAPEN, read_json
from meristem.modalities.skeleton import kinematics
from meristem.modalities.skeleton.layouts import LAYOUTS, NTU, OPENPOSE, Layout, Name

SUFFIXES = (".skeleton", ".json", ".txt.xz", ".txt")
KINDS: dict[str, Name] = {".skeleton": "ntu", ".json": "openpose", ".txt.xz": "cmu", ".txt": "cmu"}
NTU_NAME = re.compile(r"S\d{3}C\d{3}(P\d{3})R\d{3}(A\d{3})")
CMU_NAME = re.compile(r"(.*?)_\d+\.txt(\.xz)?")
MOST = 1_000_000  # frames: nine hours
TEXT, LINE = 1 << 28, 1 << 16  # most characters of a recording, and of a line of mocap
HEAD = 4096  # characters in which a JSON file shows that it is of skeletons


@dataclass(frozen=True)
class Recording:
    """place: (T, people, joints, dims), people by how much they matter, NaN where a joint was not seen. label: of the file."""

    place: np.ndarray
    layout: Layout
    label: str | None = None


def suffix(path: Path) -> str:
    return next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")


def kind(path: Path) -> Name | None:
    """The layout of the files that end so."""
    return KINDS.get(suffix(path))


def recognised(path: Path) -> bool:
    """Whether a file of one of `SUFFIXES` holds skeletons, as far as its beginning tells."""
    try:
        if suffix(path) == ".json":
            with path.open(encoding="utf-8") as file:
                head = file.read(HEAD)
            return '"frame_index"' in head and '"skeleton"' in head
        if suffix(path) in (".txt", ".txt.xz"):
            with _opened(path) as file:
                return file.readline(LINE).count(",") + 1 == kinematics.CHANNELS
    except (OSError, ValueError, lzma.LZMAError, EOFError):
        return False
    return True


def told(path: Path) -> tuple[str | None, str | None]:
    """(action, performer) as a file or its name tells: S001C002P003R002A013.skeleton, walking_3.txt.xz. Raises DataError."""
    if suffix(path) == ".json":
        return recording(path).label, None
    if found := NTU_NAME.match(path.name):
        return found[2], found[1]
    if found := CMU_NAME.fullmatch(path.name):
        return found[1], None
    return None, None


def recording(path: Path) -> Recording:
    """Raises DataError: unreadable, truncated, bodies, joints, frames, nan, empty."""
    try:
        at = path.stat()
        return _recording(path, (at.st_size, at.st_mtime_ns))
    except OSError as error:
        raise DataError("unreadable", f"the file cannot be read ({error.strerror})", "Check it and its permissions.") from None


@lru_cache(maxsize=4)
def _recording(path: Path, place: tuple[int, int]) -> Recording:
    """`place` changes when the file does."""
    try:
        if suffix(path) == ".skeleton":
            found = _kinect(_lines(path))
        elif suffix(path) == ".json":
            found = _openpose(read_json(path, "the file"))
        else:
            found = _mocap(_lines(path))
    except (lzma.LZMAError, EOFError):
        raise DataError("truncated", "the compressed file ends too early or is damaged", "Copy it again.") from None
    except UnicodeDecodeError:
        raise DataError("unreadable", "the file is not text", "Export it again.") from None
    except MISSHAPEN as error:
        raise DataError("unreadable", f"the file is no skeleton sequence ({type(error).__name__})",
                        "Export it again.") from None
    if np.isnan(found.place).all():
        raise DataError("empty", "nobody is seen in any frame", "Leave the file out.")
    return found


def _opened(path: Path) -> Any:
    return lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")


def _lines(path: Path) -> list[str]:
    with _opened(path) as file:
        text: str = file.read(TEXT)
        if len(text) == TEXT:
            raise DataError("bomb", f"the file unpacks to more than {TEXT:,} characters", "Cut the recording into pieces.")
    return text.splitlines()


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise DataError("nan", f"{(~np.isfinite(values)).sum()} numbers are NaN or infinite", "Export the file again.")
    return values


def _by_body(frames: Sequence[dict[str, np.ndarray]], layout: Layout, order: Sequence[str]) -> Recording:
    """frames: of each, who is seen and where (joints, dims)."""
    place = np.full((len(frames), max(len(order), 1), len(layout), layout.dims), np.nan)
    for t, frame in enumerate(frames):
        for body, joints in frame.items():
            place[t, order.index(body)] = joints
    return Recording(place, layout)


# ---- NTU RGB+D

def _kinect(lines: Sequence[str]) -> Recording:
    """Text of Kinect v2: frames; for each, people; for each, a line of ten, 25, and 25 lines of twelve numbers.

    Of a joint: x, y, z in metres, its places in the depth and the colour picture, its orientation, and whether it was tracked;
    one that was not (0) is missing. People are told apart by the number that the device gave them, and ordered by how far they
    move: the sum over coordinates of their deviations in time.
    """
    rest = iter([line for line in lines if line.strip()])
    frames = []
    for t in range(_count(rest, "the number of frames")):
        frame = {}
        for _ in range(_count(rest, f"the number of people in frame {t + 1}", "bodies")):
            head = _row(rest, f"a person in frame {t + 1}")
            if len(head) != 10:
                raise DataError("bodies", f"frame {t + 1} announces more people than it has", "Export the file again.")
            joints = _count(rest, f"the number of joints in frame {t + 1}", "joints")
            if joints != len(NTU):
                raise DataError("joints", f"a person of {joints} joints, not {len(NTU)}", "Only Kinect v2's 25 are read.")
            rows = [_row(rest, f"a joint in frame {t + 1}") for _ in range(joints)]
            if any(len(row) != 12 for row in rows):
                raise DataError("joints", f"a joint in frame {t + 1} has not 12 numbers", "Export the file again.")
            table = np.array(rows, float)
            where = _finite(table[:, :3])
            where[table[:, 11] == 0] = np.nan
            frame[head[0]] = where
        frames.append(frame)
    if next(rest, None) is not None:
        raise DataError("bodies", "the file goes on after its last frame: a frame has more people than it announces",
                        "Export the file again.")
    seen: dict[str, list[np.ndarray]] = defaultdict(list)
    for frame in frames:
        for body, where in frame.items():
            seen[body].append(where)
    motion = {body: np.ma.masked_invalid(np.array(places)).std(0).filled(0).sum() for body, places in seen.items()}
    return _by_body(frames, NTU, sorted(seen, key=lambda body: -motion[body]))


def _row(rest: Iterator[str], what: str) -> list[str]:
    line = next(rest, None)
    if line is None:
        raise DataError("truncated", f"the file ends before {what}", "Copy it again.")
    return line.split()


def _count(rest: Iterator[str], what: str, reason: str = "unreadable") -> int:
    row = _row(rest, what)
    if len(row) != 1 or not row[0].isdecimal():
        raise DataError(reason, f"where {what} should stand, there is '{' '.join(row[:4])}'", "Export the file again.")
    return int(row[0])


# ---- Kinetics-skeleton

def _openpose(about: Any) -> Recording:
    """JSON of ST-GCN: data: [{frame_index, skeleton: [{pose: [x, y, …], score: [18]}, …]}, …], label.

    Frames that are not listed show nobody. A joint of score 0 was not found. Nobody is tracked: in each frame people are
    ordered by the sum of their scores, as there.
    """
    if not isinstance(about, dict) or not isinstance(about.get("data"), list) or not about["data"]:
        raise DataError("empty" if isinstance(about, dict) and "data" in about else "unreadable",
                        "the file lists no frames under `data`", "Kinetics-skeleton's JSON is meant.")
    try:
        listed = {int(frame["frame_index"]): frame["skeleton"] for frame in about["data"]}
    except (TypeError, KeyError):
        raise DataError("unreadable", "a frame has no frame_index or no skeleton", "Export the file again.") from None
    first, last, frames = min(listed), max(listed), []
    if last - first >= MOST:
        raise DataError("frames", f"its frames are numbered from {first} to {last}", "Correct frame_index.")
    for t in range(first, last + 1):
        people = [_pose(person, t) for person in listed.get(t, [])]
        people.sort(key=lambda person: -person[1].sum())
        frames.append({str(i): np.where(score[:, None] > 0, pose, np.nan) for i, (pose, score) in enumerate(people)})
    found = _by_body(frames, OPENPOSE, [str(i) for i in range(max(map(len, frames)))])
    label = about.get("label")
    return Recording(found.place, OPENPOSE, None if label is None else str(label))


def _pose(person: Any, t: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        pose, score = (_finite(np.array(person[key], float)) for key in ("pose", "score"))
    except (TypeError, KeyError):
        raise DataError("unreadable", f"a person in frame {t} has no pose or no score", "Export the file again.") from None
    if pose.shape != (2 * len(OPENPOSE),) or score.shape != (len(OPENPOSE),):
        raise DataError("joints", f"a person of {pose.size / 2:g} places and {score.size} scores, not {len(OPENPOSE)}",
                        "Only OpenPose's 18 joints are read.")
    return pose.reshape(-1, 2), score


# ---- CMU mocap

def _mocap(lines: Sequence[str]) -> Recording:
    """A line of 117 numbers a frame, see `kinematics.joints`."""
    rows = [line.split(",") for line in lines if line.strip()]
    if not rows:
        raise DataError("empty", "the file holds no frame", "Leave it out.")
    wrong = next((row for row in rows[:-1] if len(row) != kinematics.CHANNELS), rows[0] if len(rows) == 1 else None)
    if wrong is not None and len(wrong) != kinematics.CHANNELS:
        raise DataError("joints", f"a frame of {len(wrong)} numbers, not {kinematics.CHANNELS} (the root's place and the "
                        "angles of 38 joints)", "Only the motion-prediction field's CMU mocap is read.")
    if len(rows[-1]) != kinematics.CHANNELS:
        raise DataError("truncated", f"the last of {len(rows)} frames breaks off", "Copy the file again.")
    place = kinematics.joints(_finite(np.array(rows, float)))
    return Recording(place[:, None], LAYOUTS["cmu"])


def starts(total: int, frames: int, step: int) -> list[int]:
    """Where runs of `frames` frames begin: one each `step` frames and one flush with the end; 0 of fewer frames than that."""
    return [*range(0, total - frames, step), max(total - frames, 0)]

