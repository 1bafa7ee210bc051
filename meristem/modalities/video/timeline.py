"""What a container says of its pictures before they are decoded: times, key frames, and who may be trusted to seek."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.video.stream import VideoStream

from meristem.errors import DataError

DEMUXERS = "mov,matroska,avi,mpeg,mpegts"  # no playlist, which would open other files or the network
MAGIC = ((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"wide"), (0, b"\x1aE\xdf\xa3"), (8, b"AVI "), (0, b"\0\0\1\xba"),
         (188, b"G"))
AGAIN = "Copy or export the file again."


@dataclass(frozen=True)
class Key:
    """A picture that decodes by itself. pts, dts: ticks; order: place among the packets."""

    pts: int
    dts: int | None
    order: int


@dataclass(frozen=True)
class Timeline:
    """The shown pictures of one file in order of presentation.

    times: (n,) s from the first. pts: (n,) ticks, or None where the container's are missing or false: then a picture is known
    by its count alone. order: tick -> place among the packets. keys: in order of the packets. size: (H, W) as it is looked at.
    turn: the display matrix's (a, b, c, d), or None. exact: nothing here that a reader must know of to find a frame
    (constant rate, closed groups of pictures, sound index, no edits, 8 bits); else `why` not.
    """

    container: str
    codec: str
    times: np.ndarray
    pts: np.ndarray | None
    order: dict[int, int]
    keys: tuple[Key, ...]
    size: tuple[int, int]
    turn: tuple[int, int, int, int] | None
    why: str

    @property
    def exact(self) -> bool:
        return not self.why


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream, set to decode on one thread. Raises DataError."""
    container, stream = open_stream(path)
    try:
        yield container, stream
    finally:
        container.close()


def open_stream(path: Path) -> tuple[InputContainer, VideoStream]:
    """See `opened`; the caller closes the container."""
    try:
        container = av.open(f"file:{path}", container_options={"format_whitelist": DEMUXERS, "protocol_whitelist": "file"},
                            metadata_errors="replace")
    except (av.FFmpegError, ValueError):
        raise _refusal(path) from None
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams or streams[0].codec_context is None:
        container.close()
        raise DataError("frames", "the file holds no video that can be decoded", "Leave it out, or convert it to H.264.")
    streams[0].thread_type = "NONE"
    streams[0].codec_context.thread_count = 1
    return container, streams[0]


def packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The stream's packets from here on, the last one empty."""
    with suppress(IndexError):  # PyAV 18.1 trips at the end over streams that appeared on the way (MPEG-TS)
        yield from container.demux(stream)


def _refusal(path: Path) -> DataError:
    try:
        with path.open("rb") as file:
            head = file.read(192)
    except OSError:
        return DataError("missing", "the file does not exist or cannot be opened", "Check it and its permissions.")
    if not head:
        return DataError("empty", "the file is empty (0 bytes)", AGAIN)
    if any(head[at:].startswith(mark) for at, mark in MAGIC):
        return DataError("truncated", "the container's header is cut off or damaged", AGAIN)
    return DataError("unreadable", "not an MP4, Matroska, WebM, AVI, QuickTime or MPEG file", "Convert it to H.264 in MP4.")


def timeline(path: Path, max_pixels: int) -> Timeline:
    """Read every packet and decode the first picture; where the packets do not tell the times, decode all.

    Raises DataError (missing, empty, truncated, unreadable, bomb, frames).
    """
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as log, opened(path) as (container, stream):
            return _scan(path, container, stream, max_pixels, log)
    except av.FFmpegError:
        raise DataError("truncated", "the container's tables are damaged", AGAIN) from None
    finally:
        av.logging.set_level(level)


def _scan(path: Path, container: InputContainer, stream: VideoStream, max_pixels: int,
          log: list[tuple[int, str, str]]) -> Timeline:
    context, kind, tick = stream.codec_context, container.format.name, float(stream.time_base or 1)
    codec = "av1" if "av1" in context.codec.name or "dav1d" in context.codec.name else context.codec.name
    if context.width * context.height > max_pixels:
        raise DataError("bomb", f"the video claims {context.width * context.height:,} pixels a frame, more than the limit of "
                        f"{max_pixels:,}", "If it is genuine, raise modality.video.max_pixels.")
    index = [(e.pos + e.size, e.is_keyframe) for e in stream.index_entries]  # now: demuxing moves the table
    prefix, extra = 0, context.extradata or b""
    if codec in ("h264", "hevc") and extra[:1] == b"\1":  # avcC, hvcC: lengths instead of start codes
        prefix = extra[4 if codec == "h264" else 21] % 4 + 1
    first, shown, order, keys, purity, marks = None, [], {}, [], [], []
    sound, broken = True, False
    for packet in packets(container, stream):
        first = _first(packet) if first is None else first
        if not packet.size:
            sound &= packet.dts is None and packet.pts is None  # the last, empty packet ends the stream
            continue
        broken |= packet.is_corrupt
        marks.append(packet.is_keyframe)
        if codec == "vp8" and not memoryview(packet)[0] >> 4 & 1:
            continue  # an invisible reference
        pts = packet.pts
        sound &= pts is not None and pts not in order and not (codec == "mpeg4" and packet.size <= 8)
        if pts is None:
            continue
        order[pts] = len(marks) - 1
        if packet.is_keyframe:
            keys.append(Key(pts, packet.dts, len(marks) - 1))
            purity.append(_purity(packet, codec, prefix))
        if not packet.is_discard:
            shown.append(pts)
    if first is None or not marks:
        raise DataError("frames", "no frame of the video can be decoded", AGAIN)
    promised = max([end for end, _ in index] + [_segment_end(path) if "matroska" in kind else 0])
    complaints = any(level <= av.logging.ERROR and name in (kind, *kind.split(",")) for level, name, _ in log)
    lost = "avi" in kind and stream.frames > len(marks)
    if broken or lost or complaints or promised > path.stat().st_size:
        raise DataError("truncated", "the video data end early or are damaged", AGAIN)
    sound &= bool(keys) and keys[0].order == 0 and min(shown, default=-1) >= keys[0].pts
    sound &= not ("avi" in kind and codec in ("h264", "hevc") and context.has_b_frames)  # AVI holds no pts: these are counted
    sound &= not (kind in ("mpeg", "mpegts") and context.field_order > 1)  # a packet may be one field
    ticks = np.array(sorted(shown), np.int64) if sound else None
    times = (ticks - ticks[0]) * tick if ticks is not None else _decoded_times(path, tick)
    if any(p != "start" for p in purity):
        keys = [k for k, p in zip(keys, purity, strict=True) if p == "start" or (p == "intra" and "inter" not in purity)]
    turn, height, width = _turn(first), first.height, first.width
    why = _doubt(kind, codec, times, ticks, order, keys)
    if not why and _unindexed(kind, [key for _, key in index], marks):
        why = "its index is missing or false"
    elif not why and any(p != "start" for p in purity):
        why = "its index names pictures that do not stand alone"
    elif not why and any(c.bits > 8 for c in first.format.components):
        why = "it has more than 8 bits"
    elif not why and mirrored(turn):
        why = "it is shown mirrored"
    size = (width, height) if turn is not None and turn[0] == 0 else (height, width)
    return Timeline(kind, codec, times, ticks, order, tuple(keys), size, turn, why)


def _segment_end(path: Path) -> int:
    """Where a Matroska file says that it ends (RFC 8794: identifier, then length); 0 where it does not say."""
    with path.open("rb") as file:
        data = file.read(4096)
    at = 0
    for _ in range(2):  # the EBML head, the segment
        at += 4  # both identifiers have 4 bytes
        width = 9 - data[at].bit_length() if data[at:] else 9
        value = int.from_bytes(data[at:at + width], "big") & (1 << 7 * width) - 1
        at += width
        end = 0 if width > 8 or value == (1 << 7 * width) - 1 else at + value
        at = end
    return end


def _first(packet: av.Packet) -> av.VideoFrame | None:
    try:
        return next(iter(packet.decode()), None)
    except av.FFmpegError:
        return None


def _decoded_times(path: Path, tick: float) -> np.ndarray:
    """Times of the pictures as they leave the decoder; by the nominal rate where those do not rise."""
    with opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        pts: list[float] = []
        for packet in packets(container, stream):
            with suppress(av.FFmpegError):
                pts += [math.nan if frame.pts is None else frame.pts for frame in packet.decode()]
    if not pts:
        raise DataError("frames", "no frame of the video can be decoded", AGAIN)
    if all(a < b for a, b in pairwise(pts)) and not math.isnan(pts[0]):
        return (np.array(pts, np.float64) - pts[0]) * tick
    if not rate:
        raise DataError("unreadable", "the video says neither when its frames are shown nor their rate", AGAIN)
    return np.arange(len(pts)) / float(rate)


def constant_rate(times: np.ndarray) -> bool:
    """Whether every frame lies within a quarter of an interval of even spacing."""
    step = times[-1] / max(len(times) - 1, 1)
    return bool((abs(times - step * np.arange(len(times))) <= step / 4).all())


def _doubt(kind: str, codec: str, times: np.ndarray, pts: np.ndarray | None, order: dict[int, int], keys: list[Key]) -> str:
    if kind in ("mpeg", "mpegts"):
        return "its container is an MPEG stream"
    if codec == "av1":
        return "its codec is AV1"
    if pts is None:
        return "its time stamps are missing or false"
    if len(order) != len(pts):
        return "frames are dropped by an edit list"
    if not constant_rate(times):
        return "its frame rate varies"
    starts = np.array([k.order for k in keys])
    latest = np.array([k.pts for k in keys])
    places = np.array([order[p] for p in pts.tolist()])
    return "its groups of pictures are open" if (pts < latest[np.searchsorted(starts, places, "right") - 1]).any() else ""


def _unindexed(kind: str, index: list[bool], marks: list[bool]) -> bool:
    """Whether the index says otherwise than the packets which of them are key frames; Matroska's is read at the first seek."""
    if "matroska" in kind:
        return False
    return index != marks[:len(index)] or ("avi" in kind and len(index) < len(marks))


def _turn(frame: av.VideoFrame) -> tuple[int, int, int, int] | None:
    """Signs (a, b, c, d) of the display matrix: x' = a x + c y, y' = b x + d y; None where it only scales or tilts."""
    data = next((bytes(s) for s in frame.side_data if s.type == Type.DISPLAYMATRIX), None)
    if data is None:
        return None
    m = np.sign(np.frombuffer(data, np.int32).reshape(3, 3)[:2, :2])
    a, b, c, d = (int(v) for v in m.flat)
    if (a, b, c, d) == (1, 0, 0, 1) or (a != 0) == (b != 0) or (a != 0) != (d != 0) or (b != 0) != (c != 0):
        return None
    return a, b, c, d


def upright(image: np.ndarray, turn: tuple[int, int, int, int] | None) -> np.ndarray:
    """A decoded picture (H, W, 3) as the display matrix shows it."""
    if turn is None:
        return image
    a, b, c, d = turn
    if a == 0:
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def mirrored(turn: tuple[int, int, int, int] | None) -> bool:
    return turn is not None and turn[0] * turn[3] - turn[1] * turn[2] < 0


def _purity(packet: av.Packet, codec: str, prefix: int) -> str:
    """What a packet marked as key frame is: `start` (nothing after it looks back), `intra` or `inter`.

    From the NAL units of H.264 (ITU-T H.264 7.3.1, 7.4.1) and H.265 (7.4.2.2); other codecs are believed. prefix: bytes of a
    unit's length, 0 for start codes.
    """
    if codec not in ("h264", "hevc"):
        return "start"
    for unit in _units(bytes(packet), prefix):
        if codec == "hevc":
            kind = unit[0] >> 1 & 63
            if kind < 32:
                return "start" if 16 <= kind <= 21 else "inter"
        elif unit[0] & 31 == 5:
            return "start"
        elif unit[0] & 31 == 1:
            bits = "".join(f"{byte:08b}" for byte in unit[1:9])
            for _ in range(2):  # first_mb_in_slice, slice_type: Exp-Golomb codes
                zeros = bits.find("1")
                value, bits = int(bits[zeros:2 * zeros + 1] or "0", 2) - 1, bits[2 * zeros + 1:]
            return "intra" if value % 5 in (2, 4) else "inter"
    return "inter"


def _units(data: bytes, prefix: int) -> Iterator[bytes]:
    if not prefix:
        for part in data.split(b"\0\0\1")[1:]:
            yield part or b"\0"
        return
    at = 0
    while at + prefix < len(data):
        length = int.from_bytes(data[at:at + prefix], "big")
        yield data[at + prefix:at + prefix + 64]
        at += prefix + length
