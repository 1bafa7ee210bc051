"""Every frame by its number, whoever reads: a number is painted into each frame that survives coding."""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless, generate_uid

from meristem.errors import DataError
from meristem.modalities.video import containers
from meristem.modalities.video.readers import Frames, open_video, scan
from meristem.modalities.video.timeline import timeline

N, SIZE, BAR = 40, (64, 96), 12  # 8 bars of 12 px on top tell the frame's number in binary
DECORD = "decord" if importlib.util.find_spec("decord") else "pyav"
VARYING = np.concatenate([[0], np.cumsum(np.random.default_rng(0).integers(20, 90, N - 1))])
QUICK = {"deadline": "realtime", "cpu-used": "8"}


def picture(i: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    y, x = np.mgrid[:size[0], :size[1]]
    image = np.stack([64 + (x + 3 * i) % 128, 64 + (y + 5 * i) % 128, 64 + (x + y + 7 * i) % 128], -1).astype(np.uint8)
    image[:16] = 0
    for bit in range(8):
        image[:16, bit * BAR:(bit + 1) * BAR] = 230 if i >> bit & 1 else 20
    return image


def number(frame: np.ndarray) -> int:
    return sum(int(frame[4:12, bit * BAR + 3:bit * BAR + 9].mean() > 125) << bit for bit in range(8))


def film(path: Path, codec: str = "libx264", *, times: Sequence[int] | None = None, frames: int = N, b: int | None = None,
         pixels: str = "yuv420p", turn: tuple[int, bool] | None = None, colour: tuple[int, int] | None = None,
         container: str | None = None, muxer: dict[str, str] | None = None, **options: str) -> Path:
    """A made film, a key frame every 12 frames, 25 a second or at `times` (ms). b: B-frames. turn: degrees, mirrored."""
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"PyAV was built without the encoder {codec}")
    base = Fraction(1, 25) if times is None else Fraction(1, 1000)
    with av.open(str(path), "w", format=container, options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *SIZE, pixels
        context = stream.codec_context
        context.gop_size, context.time_base = 12, base
        if b is not None:
            context.max_b_frames = b
        if turn is not None:
            stream.set_display_rotation(turn[0], hflip=turn[1])
        if colour is not None:
            context.colorspace, context.color_range = colour
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i), "rgb24")
            if colour is not None:
                frame = frame.reformat(format=pixels, dst_colorspace=colour[0], dst_color_range=colour[1])
            frame.pts, frame.time_base = i if times is None else int(times[i]), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def replaced(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def trimmed(path: Path, frame: int) -> Path:
    """The film from `frame` on: coded from the key frame before, hidden by an edit list."""
    whole = film(path.with_name(f"whole-{path.name}"), b=2)
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(video=0) if p.size]
        step = packets[0].duration
        keep = packets[frame // 12 * 12:]
        for packet in keep:
            packet.pts, packet.dts, packet.stream = packet.pts - frame * step, packet.dts - frame * step, stream
            out.mux(packet)
    return path


def svt(path: Path) -> Path:
    return film(path, "libsvtav1", preset="12")


X264, CUES = "x264-params", b"\x1c\x53\xbb\x6b"
FILMS: dict[str, tuple[Callable[[Path], Path], str]] = {  # file -> how it is made, who must read it
    "b-frames.mp4": (partial(film, b=3), "decord"),
    "b-frames.mkv": (partial(film, b=3), "decord"),
    "quicktime.mov": (partial(film, b=3), "decord"),
    "itunes.m4v": (partial(film, b=3), "decord"),
    "fragments.mp4": (partial(film, b=3, muxer={"movflags": "frag_keyframe+empty_moov"}), "decord"),
    "closed-hevc.mp4": (partial(film, codec="libx265", **{"x265-params": "log-level=none:open-gop=0"}), "decord"),
    "vp9.webm": (partial(film, codec="libvpx-vp9", **QUICK), "decord"),
    "vp8.webm": (partial(film, codec="libvpx", **QUICK, **{"auto-alt-ref": "1", "lag-in-frames": "10"}), "decord"),
    "xvid.avi": (partial(film, codec="mpeg4", b=0), "decord"),
    "xvid-b.avi": (partial(film, codec="mpeg4", b=2), "pyav"),
    "h264-without-pts.avi": (partial(film, b=3), "pyav"),
    "varying.mkv": (partial(film, b=3, times=VARYING), "pyav"),
    "varying.mp4": (partial(film, times=VARYING), "pyav"),
    "program.mpg": (partial(film, codec="mpeg2video", b=2, container="mpeg"), "pyav"),
    "program.mpeg": (partial(film, codec="mpeg1video", b=2, container="mpeg"), "pyav"),
    "transport.ts": (partial(film, b=3), "pyav"),
    "av1.mp4": (svt, "pyav"),
    "av1.webm": (svt, "pyav"),
    "open-groups.mp4": (partial(film, b=3, **{X264: "open-gop=1"}), "pyav"),
    "open-hevc.mp4": (partial(film, codec="libx265", **{"x265-params": "log-level=none"}), "pyav"),
    "refresh.mp4": (partial(film, b=0, **{X264: "intra-refresh=1"}), "pyav"),
    "deep.mp4": (partial(film, pixels="yuv420p10le"), "pyav"),
    "no-sync-table.mp4": (lambda path: replaced(film(path, b=3), b"stss", b"free"), "pyav"),
    "no-index.avi": (lambda path: replaced(film(path, "mpeg4", b=0), b"idx1", b"JUNK"), "pyav"),
    "no-cues.webm": (lambda path: replaced(film(path, "libvpx-vp9", **QUICK), CUES, b"\x1c\x53\xbb\x6c"), "decord"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("films")

    def make(name: str) -> Path:
        path = folder / name
        return path if path.exists() else FILMS[name][0](path)

    return make


def decoded(path: Path) -> np.ndarray:
    """What plain decoding from the first frame gives."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def reason(call: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return caught.value.reason


def torchcodec(path: Path) -> Frames:
    try:
        return open_video(path, "torchcodec")
    except DataError as error:
        if "cannot be loaded" in error.what:
            pytest.skip("torchcodec does not find FFmpeg's libraries")
        raise


@pytest.mark.parametrize("name", FILMS)
def test_every_frame_in_any_order_is_the_one_of_sequential_decoding(name: str, made: Callable[[str], Path]) -> None:
    path = made(name)
    want = decoded(path)
    assert [number(frame) for frame in want] == list(range(N))
    expected = DECORD if FILMS[name][1] == "decord" else "pyav"
    times = VARYING / 1000 if "varying" in name else np.arange(N) / 25
    order = np.random.default_rng(1).permutation(N)
    for asked, got in (("auto", expected), ("pyav", "pyav")):
        video = open_video(path, asked)
        assert (video.reader, len(video.times), video.size, video.spacing) == (got, N, SIZE, None)
        np.testing.assert_allclose(video.times, times, atol=6e-4)  # Matroska counts in ms
        assert video.times[0] == 0 and (np.diff(video.times) > 0).all()
        np.testing.assert_array_equal(video.read(order), want[order])
        for i in order[:15]:
            np.testing.assert_array_equal(video.read([int(i)])[0], want[i])
        np.testing.assert_array_equal(video.read([5, 5, 39, 0, 5]), want[[5, 5, 39, 0, 5]])
        np.testing.assert_array_equal(np.stack(list(video.all())), want)
        video.close()


@pytest.mark.parametrize("name", ["b-frames.mp4", "open-groups.mp4", "varying.mkv", "av1.webm", "vp9.webm"])
def test_torchcodec_reads_the_same_frames(name: str, made: Callable[[str], Path]) -> None:
    path = made(name)
    video, order = torchcodec(path), np.random.default_rng(2).permutation(N)
    np.testing.assert_array_equal(video.read(order), decoded(path)[order])


def test_decord_is_refused_by_name_where_it_would_miss_frames(made: Callable[[str], Path]) -> None:
    with pytest.raises(DataError, match=r"exactly: its groups of pictures are open\n.*reader=auto"):
        open_video(made("open-groups.mp4"), "decord")


@pytest.mark.skipif(DECORD == "pyav", reason="decord is not installed")
def test_what_decord_is_kept_from_it_does_get_wrong(made: Callable[[str], Path]) -> None:
    """The rule is not idle: without it frames would be exchanged in silence."""
    decord = containers.load_decord()
    decord.logging.set_level(decord.logging.QUIET)
    order = np.random.default_rng(1).permutation(N)
    for name in ("open-groups.mp4", "program.mpg", "refresh.mp4", "no-sync-table.mp4", "xvid-b.avi"):
        frames = decord.VideoReader(str(made(name)), num_threads=1).get_batch(order).asnumpy()
        assert [number(frame) for frame in frames] != order.tolist(), name


def test_decord_shares_its_old_libraries_with_nobody(made: Callable[[str], Path]) -> None:
    """Shared, its zlib crashes torchvision's PNG decoder."""
    open_video(made("b-frames.mp4")).read([3])
    assert not hasattr(ctypes.CDLL(None), "DECORDGetLastError")


def test_an_edit_list_shows_what_it_shows(tmp_path: Path) -> None:
    path = trimmed(tmp_path / "trimmed.mp4", 15)
    video = open_video(path)
    assert video.reader == "pyav"
    assert [number(f) for f in video.read(range(len(video.times)))] == list(range(15, N))
    np.testing.assert_allclose(video.times, np.arange(N - 15) / 25)
    assert number(video.read([3])[0]) == 18


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=6), min_size=1, max_size=5))
@pytest.mark.parametrize("name", ["b-frames.mp4", "open-groups.mp4", "h264-without-pts.avi"])
def test_reads_depend_on_no_read_before(name: str, made: Callable[[str], Path], reads: list[list[int]]) -> None:
    video = open_video(made(name), "pyav")
    for indices in reads:
        assert [number(frame) for frame in video.read(indices)] == indices
    video.close()


@pytest.mark.parametrize("goal", [0, 10**9])
def test_a_seek_that_lies_is_found_out(goal: int, made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar:
        def __init__(self, path: Path) -> None:
            self.true, self.stream = containers_open(path)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.true, name)

        def seek(self, ticks: int, stream: Any) -> None:
            self.true.seek(goal, stream=stream)

    containers_open = containers.open_stream
    monkeypatch.setattr(containers, "open_stream", lambda path: ((liar := Liar(path)), liar.stream))
    video = open_video(made("b-frames.mkv"), "pyav")
    for i in (30, 3, 39, 20):
        assert number(video.read([i])[0]) == i


def test_indices_outside_the_video_are_an_error(made: Callable[[str], Path]) -> None:
    for reader in (DECORD, "pyav"):
        for i in (-1, N):
            with pytest.raises(IndexError, match="frames 0 to 39 exist"):
                open_video(made("b-frames.mp4"), reader).read([0, i])


@pytest.mark.parametrize("turn", [(0, False), (90, False), (180, False), (270, False), (0, True), (90, True)])
def test_pictures_are_turned_as_the_camera_was_held(turn: tuple[int, bool], tmp_path: Path) -> None:
    path = film(tmp_path / "turned.mp4", frames=3, turn=turn)
    plain = decoded(path)[1]
    want = np.rot90(plain, turn[0] // 90)
    want = want[:, ::-1] if turn[1] else want
    video = open_video(path)
    assert (video.reader, video.size) == ("pyav" if turn[1] else DECORD, want.shape[:2])
    for source in (video, open_video(path, "pyav")):
        np.testing.assert_array_equal(source.read([1])[0], want)


COLOURS: list[tuple[int, int] | None] = [(1, 1), (1, 2), (5, 1), (5, 2), (9, 1), None]


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p"])
@pytest.mark.parametrize("colour", COLOURS)
def test_decord_and_pyav_agree_on_colour(colour: tuple[int, int] | None, pixels: str, tmp_path: Path) -> None:
    """BT.709, BT.601, BT.2020 and unknown, limited and full range: equal to the bit, and true to what was painted."""
    path = film(tmp_path / "colour.mp4", frames=3, colour=colour, pixels=pixels, qp="1")
    frame = open_video(path, "pyav").read([1])
    np.testing.assert_array_equal(open_video(path, DECORD).read([1]), frame)
    assert abs(frame[0].astype(int) - picture(1)).mean() < 3


@pytest.mark.parametrize("colour", COLOURS)
def test_torchcodec_agrees_on_colour(colour: tuple[int, int] | None, tmp_path: Path) -> None:
    path = film(tmp_path / "colour.mp4", frames=3, colour=colour)
    np.testing.assert_array_equal(torchcodec(path).read([1]), open_video(path, "pyav").read([1]))


def _read_in_worker(path: Path) -> list[int]:
    return [number(frame) for reader in ("auto", "pyav") for frame in open_video(path, reader).read([7, 31])]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_workers_forked_after_use_open_their_own(made: Callable[[str], Path]) -> None:
    path = made("b-frames.mp4")
    held = open_video(path)
    assert number(held.read([20])[0]) == 20
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read_in_worker, [path] * 4) == [[7, 31, 7, 31]] * 4
    assert number(held.read([21])[0]) == 21


def test_scan_gives_exact_statistics_and_hands_on_every_frame(made: Callable[[str], Path]) -> None:
    path = made("b-frames.mp4")
    parts: list[np.ndarray] = []
    mean, std = scan(open_video(path), parts.append)
    want = decoded(path)
    np.testing.assert_array_equal(np.concatenate(parts), want)
    assert max(map(len, parts)) <= 16
    np.testing.assert_allclose(mean, want.mean((0, 1, 2), dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(std, want.std((0, 1, 2), dtype=np.float64), rtol=1e-9)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "xvid.avi"])
def test_damage_in_the_middle_is_found(name: str, tmp_path: Path) -> None:
    path = film(tmp_path / name, "mpeg4", b=0) if name == "xvid.avi" else film(tmp_path / name, b=2)
    with av.open(str(path)) as container:
        packet = next(p for p in container.demux(video=0) if p.is_keyframe and p.pts * p.time_base > 0.9)
        place, size = path.read_bytes().find(bytes(packet)), packet.size
    data = bytearray(path.read_bytes())
    start = place + size // 3
    data[start:start + size // 3] = bytes(np.random.default_rng(0).integers(0, 256, size // 3, np.uint8))
    path.write_bytes(data)
    video = open_video(path)
    assert number(video.read([3])[0]) == 3
    with pytest.raises(DataError, match=r"of 40 frames are missing or damaged, first frame 24") as caught:
        scan(video)
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("name", ["b-frames.mp4", "open-hevc.mp4", "vp9.webm", "h264-without-pts.avi", "transport.ts"])
def test_whatever_the_damage_the_error_is_one_a_user_can_act_on(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    whole, path, found = made(name).read_bytes(), tmp_path / name, set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(0, len(data), 3 + 5 * seed)] = rng.integers(0, 256, 3 + 5 * seed)
        path.write_bytes(data.tobytes())
        try:
            video = open_video(path, "pyav")
            video.read([len(video.times) // 2])
            scan(video)
        except DataError as error:
            found.add(error.reason)
    assert found and found <= {"truncated", "frames", "unreadable", "bomb"}


def test_a_hole_in_matroska_is_no_pause(tmp_path: Path) -> None:
    """Packets that are gone leave a film that is whole but for a jump in time."""
    path = film(tmp_path / "hole.webm", "libvpx-vp9", **QUICK)
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2] + data[len(data) // 2 + 300:])
    assert reason(lambda: scan(open_video(path))) == "truncated"


@pytest.mark.parametrize("name", ["b-frames.mp4", "b-frames.mkv", "xvid.avi", "vp9.webm", "fragments.mp4"])
def test_a_cut_tail_is_refused(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    data = made(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[:len(data) * 2 // 3])
    assert reason(lambda: open_video(path)) == "truncated"


def test_a_cut_tail_behind_an_early_index_is_refused(tmp_path: Path) -> None:
    path = film(tmp_path / "early.mp4", muxer={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-200])
    assert reason(lambda: open_video(path)) == "truncated"


def test_what_is_no_video_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a film\n" * 50)
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{film(tmp_path / 'real.ts')}\n#EXT-X-ENDLIST\n")
    (tmp_path / "cat.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'real.ts'}\n")
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    wanted = {"none.mp4": "missing", "empty.mp4": "empty", "text.mp4": "unreadable", "list.mp4": "unreadable",
              "cat.mp4": "unreadable", "sound.mp4": "frames"}
    assert {name: reason(lambda name=name: open_video(tmp_path / name)) for name in wanted} == wanted
    assert reason(lambda: open_video(film(tmp_path / "large.mp4", frames=1), max_pixels=SIZE[0] * SIZE[1] - 1)) == "bomb"
    with pytest.raises(DataError) as caught:
        open_video(tmp_path / "text.mp4")
    assert "text" not in str(caught.value)


def test_one_frame_is_a_video(tmp_path: Path) -> None:
    video = open_video(film(tmp_path / "one.mp4", frames=1))
    assert video.times.tolist() == [0.0] and number(video.read([0, 0])[1]) == 0


# folders of pictures


def test_a_folder_is_read_in_the_natural_order_of_its_names(tmp_path: Path) -> None:
    for i in range(12):
        Image.fromarray(picture(i)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    video = open_video(tmp_path, fps=5)
    assert (video.reader, video.size, video.spacing) == ("folder", SIZE, None)
    assert list(video.names) == [f"frame{i}" for i in range(12)]
    np.testing.assert_allclose(video.times, np.arange(12) / 5)
    np.testing.assert_array_equal(video.read([10, 2, 2]), np.stack([picture(10), picture(2), picture(2)]))
    mean, _ = scan(video)
    np.testing.assert_allclose(mean, np.stack([picture(i) for i in range(12)]).mean((0, 1, 2)))


def test_deep_pictures_go_to_8_bits_by_their_range(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "1.png")
    assert open_video(tmp_path).read([0])[0, 0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_folders_that_are_no_video_are_refused(tmp_path: Path) -> None:
    assert reason(lambda: open_video(tmp_path)) == "frames"
    for i, height in enumerate((8, 9)):
        Image.new("RGB", (8, height)).save(tmp_path / f"{i}.jpg")
    with pytest.raises(DataError, match="frame 1 is 9×8, the first 8×8"):
        scan(open_video(tmp_path))
    (tmp_path / "1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="frame 1 of 2: the file is empty"):
        scan(open_video(tmp_path))


# DICOM cine


def cine(path: Path, frames: np.ndarray, syntax: str = ExplicitVRLittleEndian, stored: int = 0, **elements: Any) -> Path:
    """frames: (n, H, W) or (n, H, W, 3), written uncompressed, as RLE, or as JPEG (RGB coded as YBR_FULL_422)."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.3.1"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.PatientName = "Canary^Carla"
    colour = frames.ndim == 4
    ds.NumberOfFrames, ds.Rows, ds.Columns = frames.shape[:3]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        ds.PlanarConfiguration = 0
    bits = 8 * frames.dtype.itemsize
    ds.BitsAllocated, ds.BitsStored = bits, stored or bits
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(frames.dtype.kind == "i")
    for name, value in elements.items():
        setattr(ds, name, value)
    if syntax == JPEGBaseline8Bit:
        parts = []
        for i, frame in enumerate(frames):
            file = path.with_name(f"{i}.jpg")
            Image.fromarray(frame).save(file, quality=95, subsampling="4:2:2")
            parts.append(file.read_bytes())
        ds.PixelData, ds.file_meta.TransferSyntaxUID = encapsulate(parts), syntax
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        ds.PhotometricInterpretation = "YBR_FULL_422"
    else:
        ds.PixelData = frames.tobytes()
        ds["PixelData"].VR = "OB" if bits == 8 else "OW"
        if syntax == RLELossless:
            ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
    return path


def region(x: float, y: float, width: int, **changes: int) -> Dataset:
    ds = Dataset()
    ds.RegionSpatialFormat, ds.PhysicalUnitsXDirection, ds.PhysicalUnitsYDirection = 1, 3, 3
    ds.RegionLocationMinX0, ds.RegionLocationMinY0, ds.RegionLocationMaxX1, ds.RegionLocationMaxY1 = 0, 0, width - 1, 9
    ds.PhysicalDeltaX, ds.PhysicalDeltaY = x, y
    for name, value in changes.items():
        setattr(ds, name, value)
    return ds


COLOURED = np.stack([picture(i) for i in range(6)])
GREY = np.random.default_rng(3).integers(0, 4096, (5, 12, 16)).astype(np.uint16)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_ultrasound_in_colour(syntax: str, tmp_path: Path) -> None:
    path = cine(tmp_path / "us.dcm", COLOURED, syntax, FrameTime=40.0, SequenceOfUltrasoundRegions=[
        region(0.5, 0.5, 5), region(0.02, -0.03, 60), region(0.1, 0.1, 90, RegionSpatialFormat=3),
        region(1.0, 1.0, 80, PhysicalUnitsXDirection=4)])
    video = open_video(path)
    assert (video.reader, video.size) == ("dicom", SIZE)
    np.testing.assert_allclose(video.spacing, (0.3, 0.2))
    np.testing.assert_allclose(video.times, np.arange(6) * 0.04)
    np.testing.assert_array_equal(video.read([4, 0, 4]), COLOURED[[4, 0, 4]])
    np.testing.assert_array_equal(np.stack(list(video.all())), COLOURED)


def test_ultrasound_as_jpeg_is_what_the_jpegs_show(tmp_path: Path) -> None:
    video = open_video(cine(tmp_path / "us.dcm", COLOURED, JPEGBaseline8Bit, CineRate=10))
    want = np.stack([np.asarray(Image.open(tmp_path / f"{i}.jpg")) for i in range(6)]).astype(int)
    assert abs(video.read(range(6)) - want).max() <= 2
    np.testing.assert_allclose(video.times, np.arange(6) / 10)


def test_angiography_of_12_bits_by_the_range_of_its_bits(tmp_path: Path) -> None:
    path = cine(tmp_path / "xa.dcm", GREY, stored=12, FrameTimeVector=[0, 30, 50, 30, 90], ImagerPixelSpacing=[0.3, 0.2])
    video = open_video(path)
    np.testing.assert_allclose(video.times, [0, 0.03, 0.08, 0.11, 0.2])
    assert video.spacing == (0.3, 0.2)
    want = np.rint(GREY / 4095 * 255).astype(np.uint8)
    np.testing.assert_array_equal(video.read(range(5)), np.repeat(want[..., None], 3, -1))
    cine(path, GREY, stored=12, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(open_video(path).read([2])[0, ..., 0], np.rint(255 - GREY[2] / 4095 * 255).astype(np.uint8))


def test_angiography_through_its_window(tmp_path: Path) -> None:
    """Against pydicom's own windowing, of signed and rescaled values too."""
    from pydicom.pixels import apply_modality_lut, apply_windowing

    for frames, more in ((GREY, {}), ((GREY - 2048.0).astype(np.int16), {"RescaleSlope": 2.0, "RescaleIntercept": 100.0})):
        for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
            path = cine(tmp_path / "xa.dcm", frames, stored=12, WindowCenter=[900, 1], WindowWidth=[700, 2],
                        VOILUTFunction=function, **more)
            ds = pydicom.dcmread(path)
            ds.WindowCenter, ds.WindowWidth = 900, 700
            shown = apply_windowing(apply_modality_lut(ds.pixel_array, ds), ds)
            low, high = (-4096 + 100, 4094 + 100) if more else (0, 4095)
            want = (shown - low) / (high - low) * 255
            assert abs(open_video(path).read(range(5))[..., 1] - want).max() <= 0.51


def test_eight_bits_stay_as_they_are(tmp_path: Path) -> None:
    frames = (GREY >> 4).astype(np.uint8)
    video = open_video(cine(tmp_path / "us.dcm", frames, WindowCenter=10, WindowWidth=5), fps=20)
    np.testing.assert_array_equal(video.read(range(5))[..., 2], frames)
    np.testing.assert_allclose(video.times, np.arange(5) / 20)


def test_cine_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = cine(tmp_path / "a.dcm", GREY, stored=12, FrameTimeVector=[0, 30, 0, 30, 90])
    assert reason(lambda: open_video(path)) == "unreadable"
    data = cine(path, GREY, stored=12).read_bytes()
    path.write_bytes(data[:-100])
    assert reason(lambda: open_video(path)) == "truncated"
    path.write_bytes(data[:200])
    assert reason(lambda: open_video(path)) in ("truncated", "frames")
    assert reason(lambda: open_video(cine(path, GREY), max_pixels=100)) == "bomb"
    path.write_bytes(b"")
    assert reason(lambda: open_video(path)) in ("empty", "unreadable")


def test_nothing_of_the_patient_is_read(tmp_path: Path) -> None:
    from meristem.modalities.video.cine import Cine

    video = open_video(cine(tmp_path / "a.dcm", GREY, stored=12))
    assert isinstance(video, Cine) and "PatientName" not in video._ds


# real films


@pytest.mark.data
def test_real_clips_are_the_same_through_every_reader(data_root: Path) -> None:
    clips = sorted((data_root / "surv-camera-fight").glob("*/*.mp4"))[::40]
    assert clips
    for clip in clips:
        video, other = open_video(clip), open_video(clip, "pyav")
        assert video.reader == DECORD
        order = np.random.default_rng(4).permutation(len(video.times))[:8]
        np.testing.assert_array_equal(video.read(order), other.read(order))
        want = decoded(clip)
        assert len(want) == len(video.times) == len(timeline(clip, 1 << 26).times)
        np.testing.assert_array_equal(other.read(order), want[order])
