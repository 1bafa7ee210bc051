"""Frames of a video file through PyAV, decord or torchcodec.

All three convert by libswscale with the stream's own matrix and range (BT.601 where it names none) and turn the picture as the
display matrix says. Measured on 8-bit 4:2:0 and 4:4:4 H.264, limited and full range, BT.601, BT.709 and BT.2020: equal to the
bit. At 10 bits decord and PyAV differ by 0.2 levels on average and 19 at most, torchcodec and PyAV by 0.3 and 6.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from meristem.errors import DataError
from meristem.modalities.video.timeline import AGAIN, Key, Timeline, mirrored, open_stream, packets, upright

AUTO = "Set modality.video.reader=auto."


class VideoFile:
    """What the readers of a container share; see `Frames`."""

    reader = ""
    spacing: tuple[float, float] | None = None

    def __init__(self, path: Path, timeline: Timeline) -> None:
        self.path, self.timeline = path, timeline
        self.times, self.size = timeline.times, timeline.size

    @property
    def names(self) -> Sequence[str]:
        return [str(i) for i in range(len(self.times))]

    def read(self, indices: Sequence[int]) -> np.ndarray:
        want, place = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        if len(want) and not 0 <= want[0] <= want[-1] < len(self.times):
            raise IndexError(f"frames 0 to {len(self.times) - 1} exist, asked were {want[0]} to {want[-1]}")
        frames = self._ascending(want.tolist())
        return frames if len(place) == len(want) and (np.diff(place) > 0).all() else frames[place]

    def all(self) -> Iterator[np.ndarray | None]:
        """See `Frames`; by PyAV whoever reads: decord passes concealed damage over in silence."""
        source = PyAV(self.path, self.timeline)
        try:
            yield from source.all()
        finally:
            source.close()

    def close(self) -> None:
        raise NotImplementedError

    def _ascending(self, want: list[int]) -> np.ndarray:
        """Frames (n, H, W, 3) of unlike, rising indices."""
        raise NotImplementedError


class PyAV(VideoFile):
    """Goes to the key frame at or before, proves by its time stamp that it arrived there, and decodes forward.

    Where the proof fails, or the frame does not come out whole, an earlier key frame is tried, then the file's start.
    """

    reader = "pyav"

    def __init__(self, path: Path, timeline: Timeline) -> None:
        super().__init__(path, timeline)
        self._index = {} if timeline.pts is None else {p: i for i, p in enumerate(timeline.pts.tolist())}
        self._starts = [k.pts for k in timeline.keys]
        self._reformatter = VideoReformatter()
        self._container, self._stream = open_stream(path)
        self._at = -1  # the frame that left the decoder last
        self._walk = self._decode(packets(self._container, self._stream))

    def close(self) -> None:
        self._walk = iter(())
        self._container.close()

    def all(self) -> Iterator[np.ndarray | None]:
        """Every frame in order; None for one that is missing or damaged."""
        self._restart()
        due = 0
        for i, frame in self._walk:
            if i < due:
                continue
            yield from [None] * (i - due)
            yield None if frame.is_corrupt else self._picture(frame)
            due = i + 1
        yield from [None] * (len(self.times) - due)

    def _ascending(self, want: list[int]) -> np.ndarray:
        out = np.empty((len(want), *self.size, 3), np.uint8)
        for place, i in enumerate(want):
            out[place] = self._frame(i)
        return out

    def _frame(self, i: int) -> np.ndarray:
        for _ in self._approaches(i):
            for at, frame in self._walk:
                self._at = at
                if at == i and not frame.is_corrupt:
                    return self._picture(frame)
                if at >= i:
                    break
        raise DataError("truncated", f"frame {i} of {len(self.times)} cannot be decoded", AGAIN)

    def _approaches(self, i: int) -> Iterator[None]:
        """Puts the decoder before frame i, ever more carefully: on from here, its key frame, the one before, the start."""
        pts, keys = self.timeline.pts, self.timeline.keys
        if pts is None:
            nearest = -1
        else:
            nearest = bisect_right(self._starts, int(pts[i])) - 1
            while nearest >= 0 and keys[nearest].order > self.timeline.order[int(pts[i])]:
                nearest -= 1
        if self._at < i and (pts is None or nearest < 0 or keys[nearest].pts <= pts[self._at + 1]):
            yield
        for key in keys[max(nearest - 1, 0):nearest + 1][::-1]:
            if self._seek(key):
                yield
        self._restart()
        yield

    def _restart(self) -> None:
        self._container.close()
        self._container, self._stream = open_stream(self.path)
        self._at = -1
        self._walk = self._decode(packets(self._container, self._stream))

    def _seek(self, key: Key) -> bool:
        """Whether the next packet to be decoded is that key frame."""
        self._walk = iter(())
        self._at = len(self.times)
        try:
            self._container.seek(key.pts if key.dts is None else key.dts, stream=self._stream)
            rest = packets(self._container, self._stream)
            for packet in rest:
                if packet.pts == key.pts and packet.size:
                    self._walk = self._decode(rest, packet)
                    return True
                if packet.pts is not None and self.timeline.order.get(packet.pts, -1) > key.order:
                    return False
        except av.FFmpegError:
            pass
        return False

    def _decode(self, rest: Iterator[av.Packet], first: av.Packet | None = None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decoded pictures with their indices; those that the timeline does not show are left out."""
        count = -1
        packet = first
        while True:
            try:
                packet = next(rest) if packet is None else packet
                for frame in packet.decode():
                    count += 1
                    i = count if self.timeline.pts is None else self._index.get(frame.pts, -1)
                    if i >= 0:
                        yield i, frame
            except StopIteration:
                return
            except av.FFmpegError:
                pass  # the frame stays missing, and whoever asked for it is told
            packet = None

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        turn = self.timeline.turn
        image = upright(self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray(), turn)
        if image.shape[:2] != self.size:
            raise DataError("unreadable", "the frames change their size within the video", "Convert it to one size.")
        return image


def load_decord() -> Any:
    """decord with its libraries to itself: it asks for them to be shared, and its old zlib then crashes other users of zlib.

    (torchvision reading a 16-bit PNG, for one.) Raises ImportError.
    """
    shared = ctypes.RTLD_GLOBAL
    vars(ctypes)["RTLD_GLOBAL"] = ctypes.RTLD_LOCAL
    try:
        import decord
    finally:
        vars(ctypes)["RTLD_GLOBAL"] = shared
    return decord


class Decord(VideoFile):
    """decord, where the timeline proves it exact. Raises DataError where it does not."""

    reader = "decord"

    def __init__(self, path: Path, timeline: Timeline) -> None:
        try:
            decord = load_decord()
        except (ImportError, OSError, RuntimeError):
            raise DataError("unreadable", "decord is not installed; it has no wheels for some platforms", AUTO) from None
        super().__init__(path, timeline)
        if not timeline.exact:
            raise DataError("unreadable", f"decord cannot find this file's frames exactly: {timeline.why}", AUTO)
        decord.logging.set_level(decord.logging.QUIET)
        try:
            self._reader = decord.VideoReader(f"file:{path}", num_threads=1)
            own = np.asarray(self._reader.get_frame_timestamp(range(len(self._reader))), np.float64)[:, 0]
        except (decord.DECORDError, RuntimeError, ValueError, IndexError):
            raise DataError("unreadable", "decord cannot open the file", AUTO) from None
        gap = np.diff(self.times).min(initial=np.inf)
        if len(own) != len(self.times) or not (abs(own - own[0] - self.times) < gap / 4).all():
            raise DataError("unreadable", "decord and the container disagree on the frames' times", AUTO)

    def close(self) -> None:
        self._reader = None

    def _ascending(self, want: list[int]) -> np.ndarray:
        try:
            frames: np.ndarray = self._reader.get_batch(want).asnumpy()
        except (load_decord().DECORDError, RuntimeError):
            raise DataError("truncated", f"frames {want[0]} to {want[-1]} cannot be decoded", AGAIN) from None
        return frames


class Torchcodec(VideoFile):
    """torchcodec, where it counts and times the frames as the container does. Raises DataError where it does not."""

    reader = "torchcodec"

    def __init__(self, path: Path, timeline: Timeline) -> None:
        missing = DataError("unreadable", "torchcodec, or the FFmpeg libraries it needs, cannot be loaded",
                            f"Install meristem[torchcodec] and FFmpeg. {AUTO}")
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, RuntimeError, OSError):
            raise missing from None
        super().__init__(path, timeline)
        if mirrored(timeline.turn):
            raise DataError("unreadable", "torchcodec does not show mirrored video as it is meant", AUTO)
        try:
            self._decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
            count, self._origin = len(self._decoder), self._decoder.get_frame_at(0).pts_seconds
        except (RuntimeError, ValueError, IndexError) as error:
            if "libtorchcodec" in str(error):  # it looks for the libraries at the first use
                raise missing from None
            raise DataError("unreadable", "torchcodec cannot open the file", AUTO) from None
        if count != len(self.times):
            raise DataError("unreadable", f"torchcodec counts {count} frames, the container {len(self.times)}", AUTO)

    def close(self) -> None:
        self._decoder = None

    def _ascending(self, want: list[int]) -> np.ndarray:
        try:
            batch = self._decoder.get_frames_at(want)
        except (RuntimeError, ValueError, IndexError):
            raise DataError("truncated", f"frames {want[0]} to {want[-1]} cannot be decoded", AGAIN) from None
        gap = np.diff(self.times).min(initial=np.inf)
        if not (abs(batch.pts_seconds.numpy() - self._origin - self.times[want]) < gap / 4).all():
            raise DataError("unreadable", "torchcodec and the container disagree on the frames' times", AUTO)
        return np.asarray(batch.data.numpy())
