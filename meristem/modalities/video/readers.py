"""Frames by number from whatever holds them: video files, folders of pictures, DICOM cine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from meristem.errors import DataError

if TYPE_CHECKING:
    from meristem.modalities.video.timeline import Timeline

BATCH = 16  # frames handed on at once by `scan`
LONG = 1500  # frames: decord reads the whole file whenever it opens it, which beyond a minute costs more than decoding a clip
HELD = 1 << 18  # frames whose timelines one process remembers: some 30 MB

_timelines: OrderedDict[tuple[Path, int, int, int], Timeline] = OrderedDict()  # numbers, no handles: harmless in a fork


class Frames(Protocol):
    """An open source of n frames. Open it in the process that reads; it does not outlive a fork.

    times: (n,) float64 s, strictly rising from 0. size: (H, W) as it is looked at. spacing: mm along y and x, or None.
    names: of each frame its picture's name without suffix, or its number. reader: who reads (decord, pyav, torchcodec,
    folder, dicom).
    """

    times: np.ndarray
    size: tuple[int, int]
    spacing: tuple[float, float] | None
    reader: str

    @property
    def names(self) -> Sequence[str]: ...

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """(len, H, W, 3) uint8 RGB in the order asked; repeats are allowed. Raises DataError, IndexError."""
        ...

    def all(self) -> Iterator[np.ndarray | None]:
        """Every frame (H, W, 3) in order, decoded from the first; None for one that is missing or damaged."""
        ...

    def close(self) -> None: ...


def open_video(path: Path, reader: str = "auto", fps: float = 25.0, max_pixels: int = 1 << 26) -> Frames:
    """Open a video file, a folder of pictures, or a DICOM cine.

    reader: of video files: decord, pyav, torchcodec, or auto: decord where the packets prove that it finds every frame
    (`Timeline.exact`), its own count and times agree and the film is not long, else PyAV. fps: of what does not say its times
    (folders, some cine). max_pixels: larger frames are refused. Raises DataError (missing, empty, truncated, unreadable, bomb,
    frames).
    """
    if path.is_dir():
        from meristem.modalities.video.folder import Folder

        return Folder(path, fps, max_pixels)
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        raise DataError("missing", "the file does not exist or cannot be opened", "Check it and its permissions.") from None
    if head[128:] == b"DICM" or (path.suffix.lower() == ".dcm" and head):
        from meristem.modalities.video.cine import Cine  # pydicom is slow to import

        return Cine(path, fps, max_pixels)
    from meristem.modalities.video.containers import Decord, PyAV, Torchcodec

    line = _timeline(path, max_pixels)
    if reader == "pyav":
        return PyAV(path, line)
    if reader == "torchcodec":
        return Torchcodec(path, line)
    if reader == "decord" or (line.exact and len(line.times) <= LONG):
        try:
            return Decord(path, line)
        except DataError:
            if reader == "decord":
                raise
    return PyAV(path, line)


def _timeline(path: Path, max_pixels: int) -> Timeline:
    """A file's timeline, of which reading the packets takes a fifth of the time of a clip, more in a long film."""
    from meristem.modalities.video.timeline import timeline

    stat = path.stat()
    key = path, stat.st_size, stat.st_mtime_ns, max_pixels
    if key in _timelines:
        _timelines.move_to_end(key)
        return _timelines[key]
    line = _timelines[key] = timeline(path, max_pixels)
    while sum(len(t.times) for t in _timelines.values()) > HELD and len(_timelines) > 1:
        _timelines.popitem(last=False)
    return line


def scan(frames: Frames, keep: Callable[[np.ndarray], None] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Decode everything once: mean and standard deviation of each channel, float64 (3,), exact.

    keep: is handed the frames in order, (≤ 16, H, W, 3) at a time. Raises DataError (truncated) where frames are missing or the
    decoder concealed damage. What a codec cannot notice (a flipped bit in VP9 or HEVC makes another valid picture) stays
    unseen.
    """
    histogram = np.zeros((3, 256), np.int64)
    damaged, count, batch = [], 0, []
    for i, frame in enumerate(frames.all()):
        count += 1
        if frame is None:
            damaged.append(i)
            continue
        for channel in range(3):
            histogram[channel] += np.bincount(frame[..., channel].ravel(), minlength=256)
        if keep is not None and not damaged:
            batch.append(frame)
            if len(batch) == BATCH:
                keep(np.stack(batch))
                batch = []
    if damaged:
        raise DataError("truncated", f"{len(damaged)} of {count} frames are missing or damaged, first frame {damaged[0]}",
                        "Copy or export the file again, or leave it out.")
    if keep is not None and batch:
        keep(np.stack(batch))
    levels, total = np.arange(256), histogram.sum(1)
    mean = histogram @ levels / total
    return mean, np.sqrt((histogram * (levels - mean[:, None]) ** 2).sum(1) / total)
