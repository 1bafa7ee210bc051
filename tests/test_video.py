"""Clips: which frames they show and where these lie, in seconds and pixels; that files and caches show the same."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from pydantic import ValidationError
from scipy.stats import chisquare, kstest
from torch import Tensor

from meristem.errors import DataError
from meristem.modalities.base import Header, Look, View
from meristem.modalities.video import Video, VideoOptions, VideoViewOptions, readers
from meristem.modalities.video import timeline as timelines
from meristem.modalities.video import video as module
from meristem.modalities.video.readers import open_video
from meristem.modalities.video.sampling import frames as choose
from meristem.modalities.video.timeline import timeline as scanned
from meristem.platform.data.cache import Cache
from meristem.platform.data.loader import loader, whole
from meristem.platform.data.manifest import Manifest

T, H, W = 40, 48, 64


def video(**options: object) -> Video:
    return Video(VideoOptions.model_validate({"normalise": "unit", **options}))


def look(cursor: int = 0, number: int = 0, view: str = "x", seed: int = 0) -> Look:
    return Look(seed, cursor, number, view)


def options(size: Sequence[int] = (8, 16, 16), **keys: object) -> VideoViewOptions:
    return VideoViewOptions.model_validate({"size": size, **keys})


def header(total: int = T, period: float = 0.04, size: tuple[int, int] = (H, W), times: Sequence[float] = ()) -> Header:
    rows = ((period, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    source = {"shape": [total, *size], "levels": [0, 255], "reader": "made", **({"times": list(times)} if len(times) else {})}
    return Header((3, total, *size), rows, (period, 1.0, 1.0), (1 / 255,) * 3, (0.0,) * 3, (0.0,) * 3, source)


def shown(view: VideoViewOptions, head: Header, at: Look) -> list[int]:
    return choose(view, head, at)[0].tolist()


def coded(total: int = T, size: tuple[int, int] = (H, W)) -> np.ndarray:
    """(T, H, W, 3): every pixel says where it lies: its frame, row and column."""
    return np.stack(np.meshgrid(*(np.arange(n) for n in (total, *size)), indexing="ij"), -1).astype(np.uint8)


def folder(path: Path, pixels: np.ndarray, first: int = 0) -> Path:
    path.mkdir(parents=True)
    for i, frame in enumerate(pixels, first):
        Pillow.fromarray(frame).save(path / f"{i:05d}.png")
    return path


def film(path: Path, pixels: np.ndarray, rate: int = 25) -> Path:
    """H.264, with frames that look ahead."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate)
        stream.width, stream.height, stream.pix_fmt = pixels.shape[2], pixels.shape[1], "yuv420p"
        stream.options = {"crf": "10", "bf": "2", "g": "12"}
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


def reason(call: Any) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return caught.value.reason


class Made:
    """A reader of an array that counts what is decoded."""

    reader = "made"

    def __init__(self, pixels: np.ndarray, times: np.ndarray | None = None, spacing: tuple[float, float] | None = None) -> None:
        self.pixels, self.spacing, self.size = pixels, spacing, pixels.shape[1:3]
        self.times = np.arange(len(pixels)) * 0.04 if times is None else times
        self.names = [str(i) for i in range(len(pixels))]
        self.opened, self.closed, self.decoded = 0, 0, Counter[int]()

    def read(self, indices: Sequence[int]) -> np.ndarray:
        self.decoded.update(indices)
        return self.pixels[list(indices)]

    def all(self) -> Iterator[np.ndarray | None]:
        yield from self.pixels

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has every path open the given reader."""
    def use(made: Made) -> Made:
        def open_made(*_: object) -> Made:
            made.opened += 1
            return made

        monkeypatch.setattr(module, "open_video", open_made)
        return made

    return use


# ---- which frames

@given(stride=st.integers(1, 4), n=st.integers(1, 9), total=st.integers(1, 40), cursor=st.integers(0, 1000))
def test_dense_frames_follow_each_other_at_the_stride(stride: int, n: int, total: int, cursor: int) -> None:
    index, step, labels = choose(options((n, 8, 8), sample={"stride": stride}), header(total), look(cursor))
    assert step == pytest.approx(stride * 0.04)
    assert labels == {}
    if (n - 1) * stride < total:
        assert (np.diff(index) == stride).all()
        assert 0 <= index[0] <= index[-1] < total
    else:
        assert (index == np.arange(n) * stride % total).all()


def test_every_start_is_as_likely() -> None:
    starts = Counter(shown(options((8, 8, 8), sample={"stride": 2}), header(20), look(i))[0] for i in range(1200))
    assert sorted(starts) == list(range(6))  # 5 + 7 · 2 is the last frame
    assert chisquare(list(starts.values())).pvalue > 1e-3


@pytest.mark.parametrize("short, expected", [("loop", [0, 1, 2, 0, 1]), ("hold", [0, 1, 2, 2, 2]), ("pad", [0, 1, 2, -1, -1])])
@pytest.mark.parametrize("sample", [{"stride": 1}, {"fps": 25}])
def test_a_video_shorter_than_the_clip(short: str, expected: list[int], sample: dict[str, int]) -> None:
    assert shown(options((5, 8, 8), sample=sample, short=short), header(3), look()) == expected


def test_frames_by_rate_are_those_on_screen() -> None:
    """A frame stays until the next one comes; each moment of a file whose rate varies shows the right one."""
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.3, 60))
    times -= times[0]
    head = header(60, float(np.median(np.diff(times))), times=times)
    view = options((12, 8, 8), sample={"fps": 10})
    for i in range(50):
        index, step, _ = choose(view, head, look(i))
        assert step == pytest.approx(0.1)
        # a start exists from which the clip, walked in seconds, meets exactly these frames
        ends = np.append(times[1:], times[-1] + head.spacing[0])
        low = (times[index] - np.arange(12) * step).max()
        high = (ends[index] - np.arange(12) * step).min()
        assert low < high + 1e-6


def test_the_rate_does_not_depend_on_the_files_own() -> None:
    view = options((4, 8, 8), sample={"fps": 5})
    for rate in (5, 10, 25, 29.97, 60):
        head = header(int(10 * rate), 1 / rate)
        index, step, _ = choose(view, head, look(3))
        assert step == 0.2
        assert np.abs(np.diff(index) / rate - 0.2).max() < 1 / rate


def test_uniform_shows_one_frame_of_each_part() -> None:
    view, seen = options((8, 8, 8), sample="uniform"), set()
    for i in range(200):
        index, step, _ = choose(view, header(40), look(i))
        assert (index // 5 == np.arange(8)).all()
        assert step == pytest.approx(5 * 0.04)
        seen.add(int(index[0]))
    assert seen == set(range(5))
    assert shown(view, header(4), look()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert shown(view.plain(), header(40), look()) == list(range(2, 40, 5))


# ---- the second look

def gaps(draws: int = 2000, **keys: object) -> np.ndarray:
    """Intervals between the starts of two looks, as a fraction of the longest."""
    view = options((1, 8, 8), count=2, **keys)
    head = header(100_001)
    pairs = np.array([[shown(view, head, look(i, n))[0] for n in range(2)] for i in range(draws)])
    return (pairs[:, 1] - pairs[:, 0]) / 100_000


def test_the_interval_of_two_looks_falls_linearly() -> None:
    """Density 2 (1 − x), CVRL's: distribution function x (2 − x). Two independent starts would not do: they go both ways."""
    drawn = gaps(apart="linear")
    assert kstest(drawn, lambda x: x * (2 - x)).pvalue > 1e-3
    assert kstest(drawn, "uniform").pvalue < 1e-9


def test_the_interval_of_two_looks_lies_between_its_bounds() -> None:
    assert kstest(gaps(800, apart=(0.25, 0.75)), "uniform", (0.25, 0.5)).pvalue > 1e-3
    assert gaps(50, apart=(1.0, 1.0)) == pytest.approx(1)  # first frame and last
    assert np.abs(gaps(50, apart=(0.0, 0.0))).max() == 0


def test_independent_looks_go_both_ways() -> None:
    difference = gaps(800)
    assert kstest(difference, lambda x: np.where(x < 0, (1 + x) ** 2 / 2, 1 - (1 - x) ** 2 / 2)).pvalue > 1e-3


def test_two_looks_by_rate_stay_inside_the_video() -> None:
    view = options((4, 8, 8), count=2, apart=(1.0, 1.0), sample={"fps": 5})
    first, second = (shown(view, header(100), look(7, n)) for n in range(2))
    assert (first[0], second[-1]) == (0, 95)


# ---- how it plays

def test_speed_skips_frames_and_is_told() -> None:
    view, seen = options((6, 8, 8), speed=(1, 2, 4)), Counter[int]()
    for i in range(300):
        index, _, labels = choose(view, header(), look(i))
        assert (np.diff(index) == (1, 2, 4)[labels["speed"]]).all()
        seen[labels["speed"]] += 1
    assert chisquare(list(seen.values())).pvalue > 1e-3


def test_speeds_of_a_samples_views_are_same_other_or_own() -> None:
    same, other, own = (options(speed=(1, 2, 4), pace=pace, count=2) for pace in ("same", "other", "own"))
    pairs = Counter[tuple[int, int]]()
    for i in range(300):
        a = [choose(same, header(), look(i, n, view))[2]["speed"] for n in range(2) for view in ("a", "b")]
        b = [choose(other, header(), look(i, n, "c"))[2]["speed"] for n in range(2)]
        assert len(set(a)) == 1
        assert a[0] not in b
        pairs[a[0], b[0]] += 1
    assert len(pairs) == 6
    assert chisquare(list(pairs.values())).pvalue > 1e-3
    assert len({tuple(choose(own, header(), look(i, n))[2]["speed"] for n in range(2)) for i in range(60)}) == 9


def test_a_clip_plays_backwards_as_often_as_asked() -> None:
    view, back = options(direction=0.3), 0
    for i in range(600):
        index, _, labels = choose(view, header(), look(i))
        assert (np.diff(index) == (-1 if labels["direction"] else 1)).all()
        back += labels["direction"]
    assert 0.24 < back / 600 < 0.36


def test_parts_are_shuffled_as_told() -> None:
    view, seen = options((9, 8, 8), order=3), Counter[int]()
    assert view.permutations == 6
    for i in range(600):
        index, _, labels = choose(view, header(), look(i))
        start = index.min()
        parts = (index - start).reshape(3, 3)
        assert tuple(parts[:, 0] // 3) == list(permutations(range(3)))[labels["order"]]
        assert (np.sort(index) == start + np.arange(9)).all()
        seen[labels["order"]] += 1
    assert chisquare(list(seen.values())).pvalue > 1e-3


@given(cursor=st.integers(0, 500), number=st.integers(0, 3), speed=st.sampled_from([(0.5, 2), (1, 1.5, 4), ()]),
       direction=st.sampled_from([None, 0.5]), order=st.sampled_from([None, 2, 4]), residual=st.booleans(),
       short=st.sampled_from(["loop", "hold", "pad"]), total=st.integers(1, 60),
       sample=st.sampled_from([{"stride": 2}, {"fps": 12}]))
def test_seconds_are_the_views_own(cursor: int, number: int, speed: Any, direction: Any, order: Any, residual: bool, short: str,
                                   total: int, sample: Any) -> None:
    """They say at what rate the clip is shown, never what was done to it; and every place exists."""
    view = options((8, 16, 16), speed=speed, direction=direction, order=order, residual=residual, short=short, sample=sample)
    d = video().draw(view, header(total), look(cursor, number))
    assert d.spacing == ((0.08 if "stride" in sample else 1 / 12), 1.0, 1.0)
    assert len(d.index) == d.shape[0] == 8 + residual
    assert min(d.index) >= (-1 if short == "pad" else 0)
    assert 0 <= max(d.index) < total
    assert {k for k, v in d.params.items() if v.dtype == np.int64} == {
        name for name, on in (("speed", speed), ("direction", direction), ("order", order)) if on}


# ---- test views

@pytest.mark.parametrize("sample", [{"stride": 2}, {"fps": 8}, "uniform"])
def test_plain_views_are_a_grid_of_clips_and_crops(sample: Any) -> None:
    view = options((8, 16, 16), sample=sample, clips=4, crops=3, flip=[0, 0, 0.5], direction=None, turn=True).plain()
    assert view.count == 12
    draws = [video().draw(view, header(100), look(5, n)) for n in range(12)]
    others = [video().draw(view, header(100), look(77, n, "other", 3)) for n in range(12)]
    assert [(d.index, d.start, d.size) for d in draws] == [(d.index, d.start, d.size) for d in others]  # nothing random
    for clip in range(4):
        mine = draws[3 * clip:3 * clip + 3]
        assert len({d.index for d in mine}) == 1
        assert [d.start[1:] for d in mine] == [(0, 0), (0, 8), (0, 16)]
        assert {d.size[1:] for d in mine} == {(48, 48)}
    starts = np.array([d.index[0] for d in draws[::3]])
    assert len(set(starts)) == 4
    assert np.ptp(np.diff(starts)) <= 1
    if sample != "uniform":
        assert starts[0] == 0
        assert draws[-1].index[-1] == {"stride": 99, "fps": 96}[next(iter(sample))]
    assert set(draws[0].params) == {"pad", "black", "white"}


def test_one_clip_and_one_crop_are_the_middle() -> None:
    d = video().draw(options().plain(), header(), look())
    assert (d.index, d.start[1:], d.size[1:]) == (tuple(range(16, 24)), (0, 8), (48, 48))
    tall = video().draw(options(crops=3).plain(), header(size=(W, H)), look(0, 2))
    assert (tall.start[1:], tall.size[1:]) == ((16, 0), (48, 48))


@pytest.mark.parametrize("wrong", [
    {"turn": True, "size": (8, 16, 24)}, {"order": 3}, {"pace": "other"}, {"apart": "linear"},
    {"apart": (0.8, 0.2), "count": 2}, {"flip": (0.5, 0, 0)}, {"affine": {"rotate": 5}}, {"margin": 2},
    {"sample": "uniform", "speed": (1, 2)}, {"sample": "uniform", "apart": "linear", "count": 2}])
def test_views_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        options(**{"size": (8, 16, 16), **wrong})


# ---- where it lies

def drawn(pixels: np.ndarray, view: VideoViewOptions, modality: Video, opens: Any, times: np.ndarray | None = None,
          count: int = 12) -> View:
    """Views of one video as the loader draws them."""
    opens(Made(pixels, times))
    head = modality.read([Path("x")]).header
    cache: Any = SimpleNamespace(header=lambda row: head, tables=lambda row: {}, fields=lambda row: (),
                                 windows=lambda row, draws: modality.fetch([Path("x")], head, draws))
    rows: Any = [SimpleNamespace(index=i) for i in range(count)]
    return whole(cache, rows, modality, view)


def augmented(pixels: np.ndarray, view: VideoViewOptions, modality: Video, opens: Any, times: np.ndarray | None = None,
              count: int = 12) -> View:
    """The same as the device makes them."""
    return modality.augment(drawn(pixels, view, modality, opens, times, count), view)


def places(view: View) -> tuple[Tensor, Tensor]:
    """Of every element of every view, where the frame says that it lies, in source seconds and pixels; and its values."""
    index = torch.cartesian_prod(*(torch.arange(float(n)) for n in view.frame.shape)).expand(len(view), -1, -1)
    return view.frame.to_source(index), view.array.flatten(2).transpose(1, 2) * 255


@pytest.mark.parametrize("keys", [
    {}, {"sample": {"stride": 3}}, {"flip": [0, 0.5, 0.5]}, {"turn": True}, {"direction": 0.5},
    {"turn": True, "flip": [0, 0.5, 0.5], "speed": [1, 2], "direction": 0.5, "sample": {"stride": 2}}])
def test_the_frame_says_where_each_pixel_lies(keys: dict[str, Any], opens: Any) -> None:
    """The video's values are its places; a window of exact size keeps them, through turns, flips and playing backwards."""
    view = augmented(coded(), options((6, 16, 16), window="crop", **keys), video(), opens)
    source, values = places(view)
    np.testing.assert_allclose(source / torch.tensor([0.04, 1, 1]), values, atol=2e-3)


@pytest.mark.parametrize("keys", [{"area": [0.5, 1.0]}, {"area": [0.05, 0.2]}, {"turn": True, "flip": [0, 0.5, 0.5]}])
def test_the_frame_knows_of_resizing(keys: dict[str, Any], opens: Any) -> None:
    """Up and down: ramps stay ramps, but for the rounding of 8 bits and the outermost pixels, where a filter is cut."""
    view = augmented(coded(), options((4, 20, 20), window="area", **keys), video(), opens)
    source, values = places(view)
    error = (source / torch.tensor([0.04, 1, 1]) - values).abs().unflatten(1, (4, 20, 20))
    assert error[..., 0].max() < 2e-3
    assert error[:, :, 2:-2, 2:-2].max() < 0.6


@pytest.mark.parametrize("keys", [{}, {"turn": True}, {"direction": 0.5}])
def test_differences_lie_between_their_frames(keys: dict[str, Any], opens: Any) -> None:
    """x(t) = t (t + 1) / 2 has x(t + 1) − x(t) = (t + ½) + ½; forwards from t, backwards from t + 1."""
    pixels = coded(22)
    pixels[..., 0] = (np.arange(22) * np.arange(1, 23) // 2)[:, None, None]
    view = augmented(pixels, options((6, 12, 12), window="crop", residual=True, **keys), video(), opens)
    assert view.array.shape == (12, 3, 6, 12, 12)
    source, values = places(view)
    np.testing.assert_allclose(source[..., 0] / 0.04 + 0.5, values[..., 0].abs(), atol=2e-3)
    assert values[..., 1:].abs().max() < 1e-3


def test_stored_small_it_lies_where_it_lay(opens: Any, tmp_path: Path) -> None:
    """A decoded store of half the size: the affine still leads to pixels of the file."""
    modality = video(store="decoded", resize=24)
    opens(Made(coded()))
    sample = modality.read([Path("x")])
    assert sample.array is not None and sample.array.shape == sample.header.shape == (3, T, 24, 32)
    affine, y, x = np.array(sample.header.affine), np.arange(2, 22), np.arange(2, 30)
    np.testing.assert_allclose(affine[1, 1] * y + affine[1, 3], sample.array[1, 0, 2:-2, 5], atol=0.51)
    np.testing.assert_allclose(affine[2, 2] * x + affine[2, 3], sample.array[2, 0, 5, 2:-2], atol=0.51)
    assert sample.header.spacing == (0.04, 1.0, 1.0)


def test_millimetres_follow_the_file_and_are_refused_without(opens: Any) -> None:
    opens(Made(coded(), spacing=(0.5, 0.25)))
    head = video(unit="mm").read([Path("x")]).header
    assert head.spacing == (0.04, 0.5, 0.25)
    assert np.diag(head.affine).tolist() == [0.04, 0.5, 0.25, 1.0]
    assert video().read([Path("x")]).header.spacing == (0.04, 1.0, 1.0)
    opens(Made(coded()))
    assert reason(lambda: video(unit="mm").read([Path("x")])) == "no-spacing"


def test_uneven_times_are_kept_and_even_ones_are_not(opens: Any) -> None:
    """Times rounded to milliseconds, as Matroska's, are even; their mean is the period, which does not drift."""
    rounded = np.round(np.arange(300) / 29.97, 3)
    opens(Made(np.zeros((300, 4, 4, 3), np.uint8), rounded))
    head = video().read([Path("x")]).header
    assert "times" not in head.source
    assert head.spacing[0] == pytest.approx(1 / 29.97, rel=1e-4)
    uneven = np.array([0, 0.04, 0.08, 0.5, 0.54, 0.58])
    opens(Made(np.zeros((6, 4, 4, 3), np.uint8), uneven))
    head = video().read([Path("x")]).header
    assert head.source["times"] == uneven.tolist()
    assert head.spacing[0] == pytest.approx(0.04)
    assert shown(options((7, 4, 4), sample={"fps": 10}), head, look()) in ([0, 2, 2, 2, 2, 3, 5], [0, 2, 2, 2, 2, 4, 5])


def test_a_single_frame_is_a_video(opens: Any) -> None:
    view = augmented(coded(1), options((4, 16, 16), window="crop"), video(fps=10.0), opens, count=2)
    assert view.array.shape == (2, 3, 4, 16, 16)
    assert view.frame.spacing[:, 0].tolist() == pytest.approx([0.1, 0.1])


def test_padding_weighs_nothing(opens: Any) -> None:
    view = options((8, 16, 16), window="crop", short="pad")
    padded = augmented(coded(5), view, video(normalise="imagenet"), opens, count=2)
    assert padded.weight is not None
    assert padded.weight[:, 0, :, 0, 0].tolist() == [[1.0] * 5 + [0.0] * 3] * 2
    assert padded.array[:, :, 5:].abs().max() < 0.01  # the mean colour
    differences = augmented(coded(5), options((7, 16, 16), window="crop", short="pad", residual=True), video(), opens, count=2)
    assert differences.weight is not None
    assert differences.weight[:, 0, :, 0, 0].tolist() == [[1.0] * 4 + [0.0] * 3] * 2
    whole_view = augmented(coded(), view, video(), opens, count=2)
    assert whole_view.weight is None


def test_a_clips_colours_change_as_one(opens: Any) -> None:
    """One draw for all frames: a still stays still, whatever is done to its colours."""
    still = np.broadcast_to(np.random.default_rng(0).integers(0, 256, (1, H, W, 3), np.uint8), (T, H, W, 3))
    chance = {"brightness": {"range": [0.5, 1.5]}, "contrast": {"range": [0.5, 1.5]}, "saturation": {"range": [0.5, 1.5]},
              "hue": {"range": [-0.2, 0.2]}, "blur": {"range": [0.5, 1.5]}, "grayscale": 0.3}
    changed = augmented(still, options((6, 16, 16), window="crop", **chance), video(), opens)
    plain = augmented(still, options((6, 16, 16), window="crop"), video(), opens)
    assert (changed.array - changed.array[:, :, :1]).abs().max() < 1e-5
    assert ((changed.array - plain.array).abs().amax((1, 2, 3, 4)) > 0.05).all()


def test_blur_stays_within_frames(opens: Any) -> None:
    flicker = np.zeros((T, H, W, 3), np.uint8)
    flicker[::2] = 255
    view = augmented(flicker, options((6, 16, 16), window="crop", blur={"range": [2.0, 2.0]}), video(), opens, count=3)
    assert ((view.array < 1e-3) | (view.array > 1 - 1e-3)).all()


def test_a_clip_does_not_depend_on_its_batch_mates(opens: Any) -> None:
    keys: dict[str, Any] = {"turn": True, "flip": [0, 0.5, 0.5], "speed": [1, 2], "direction": 0.5, "residual": True,
                            "order": 2, "hue": {"range": [-0.2, 0.2], "probability": 0.5},
                            "blur": {"range": [0.5, 2], "probability": 0.5},
                            "noise": {"range": [0.01, 0.1], "probability": 0.5}, "short": "pad"}
    view, modality = options((16, 12, 12), **keys), video()
    pixels = np.random.default_rng(0).integers(0, 256, (20, H, W, 3), np.uint8)
    batch = drawn(pixels, view, modality, opens, count=6)
    assert batch.weight is not None
    together = modality.augment(batch, view)
    for i in range(6):
        alone = modality.augment(batch.select(torch.tensor([i])), view)
        assert torch.equal(alone.array[0], together.array[i])
        assert torch.equal(alone.frame.affine[0], together.frame.affine[i])
        assert alone.weight is not None and together.weight is not None
        assert torch.equal(alone.weight[0], together.weight[i])


# ---- reading

def test_one_decoding_serves_all_looks_and_test_views(opens: Any) -> None:
    made, modality = opens(Made(coded(100))), video()
    head = modality.read([Path("x")]).header
    made.opened = made.closed = 0
    views = [options((8, 16, 16), sample={"stride": 4}, clips=5, crops=3).plain(), options((8, 16, 16), count=2)]
    draws = [modality.draw(v, head, look(1, n)) for v in views for n in range(v.count)]
    windows = modality.fetch([Path("x")], head, draws)
    assert (made.opened, made.closed) == (1, 1)
    assert set(made.decoded.values()) == {1}
    assert set(made.decoded) == {i for d in draws for i in d.index}
    for d, window in zip(draws, windows, strict=True):
        alone, = modality.fetch([Path("x")], head, [d])
        assert window.shape == (3, *d.shape)
        assert (window == alone).all()
        assert (np.abs(window[0].astype(int) - np.array(d.index)[:, None, None]) == 0).all()


def test_a_reader_is_closed_when_decoding_fails(opens: Any) -> None:
    made, modality = opens(Made(coded())), video()
    head = modality.read([Path("x")]).header

    def broken(indices: Sequence[int]) -> np.ndarray:
        raise DataError("truncated", "frame 3 cannot be decoded")

    made.read = broken
    assert reason(lambda: modality.fetch([Path("x")], head, [modality.draw(options(), head, look())])) == "truncated"
    assert made.closed == made.opened == 2


def test_outside_the_frame_is_the_mean_colour(opens: Any) -> None:
    modality = video(normalise="imagenet")
    view = augmented(np.full((T, 10, 12, 3), 200, np.uint8), options((4, 16, 16), window="whole"), modality, opens, count=2)
    assert view.weight is not None
    outside = (view.weight == 0).expand_as(view.array)
    assert view.array[outside].abs().max() < 0.01
    assert view.array[~outside].min() > 0.5
    assert (~outside).float().mean() == pytest.approx(10 * 12 / 256)


def test_normalisation(opens: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (T, 8, 8, 3), np.uint8) // np.array([1, 2, 3], np.uint8)
    opens(Made(pixels))
    head = video(normalise="zscore").read([Path("x")]).header
    x = pixels * np.array(head.scale) + np.array(head.offset)
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=1e-6)
    np.testing.assert_allclose(video().statistics(pixels.transpose(3, 0, 1, 2)), (head.scale, head.offset), rtol=1e-9)
    black, white = (np.array(video(normalise="imagenet").read([Path("x")]).header.offset),
                    np.array(video(normalise="imagenet").span(video(normalise="imagenet").read([Path("x")]).header)[1]))
    np.testing.assert_allclose(black, -np.array([0.485, 0.456, 0.406]) / np.array([0.229, 0.224, 0.225]), rtol=1e-6)
    np.testing.assert_allclose(white, (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225]), rtol=1e-6)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Three films of moving blobs and a folder of frames."""
    rng, root = np.random.default_rng(4), tmp_path / "clips"
    for i in range(3):
        coarse = rng.integers(0, 256, (H // 8 + 8, W // 8 + 8, 3), np.uint8)
        big = np.asarray(Pillow.fromarray(coarse).resize((W + 64, H + 64), Pillow.Resampling.BICUBIC))
        pixels = np.stack([big[t:t + H, 2 * (t % 24):2 * (t % 24) + W] for t in range(30 + i)])
        root.mkdir(exist_ok=True)
        if i:
            film(root / f"clip{i}.mp4", pixels)
        else:
            folder(root / "frames", pixels)
    return root


def view_of(data: Path, modality: Video, view: VideoViewOptions, home: Path) -> View:
    manifest = Manifest.discover(data, modality)
    cache = Cache.build(manifest, modality, home)
    assert not cache.quarantine
    assert len(cache) == 3
    return whole(cache, [manifest.rows[i] for i in cache.rows], modality, view)


def test_files_and_store_show_the_same(clips: Path, tmp_path: Path) -> None:
    files, stored = video(), video(store="decoded")
    for view in (options((6, 20, 20), count=3), options((6, 16, 16), window="crop", short="pad", direction=0.5, count=2),
                 options((6, 20, 28), window="contain", sample="uniform")):
        a, b = (view_of(clips, m, view, tmp_path / "cache") for m in (files, stored))
        assert a.array.dtype == torch.uint8
        assert torch.equal(a.array, b.array)
        assert torch.equal(a.frame.affine, b.frame.affine)
        assert (a.weight is None) == (b.weight is None)
        if a.weight is not None and b.weight is not None:
            assert torch.equal(a.weight, b.weight)


def test_a_smaller_store_shows_nearly_the_same(clips: Path, tmp_path: Path) -> None:
    view = options((6, 24, 24)).plain()
    a, b = (view_of(clips, m, view, tmp_path / "cache") for m in (video(), video(store="decoded", resize=36)))
    assert (a.array.float() - b.array.float()).abs().mean() < 4
    torch.testing.assert_close(a.frame.boxes(), b.frame.boxes(), atol=1e-3, rtol=0)


def test_frames_of_a_film_are_the_readers(clips: Path) -> None:
    modality = video()
    sample = modality.read([clips / "clip1.mp4"])
    assert sample.array is None
    reader = open_video(clips / "clip1.mp4")
    d = modality.draw(options((6, 16, 16), window="crop"), sample.header, look(2))
    expected = reader.read(d.index)[:, d.start[1]:d.start[1] + 16, d.start[2]:d.start[2] + 16]
    reader.close()
    window, = modality.fetch([clips / "clip1.mp4"], sample.header, [d])
    assert (window == expected.transpose(3, 0, 1, 2)).all()


def test_a_files_packets_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it changes; and a process does not remember without end."""
    read: list[Path] = []

    def counted(path: Path, max_pixels: int) -> Any:
        read.append(path)
        return scanned(path, max_pixels)

    monkeypatch.setattr(timelines, "timeline", counted)
    monkeypatch.setattr(readers, "_timelines", OrderedDict())
    a, b = (film(tmp_path / f"{name}.mp4", coded(10)) for name in "ab")
    for path in (a, b, a, b):
        open_video(path).close()
    assert read == [a, b]
    film(a, coded(12))
    again = open_video(a)
    assert len(again.times) == 12
    again.close()
    assert read == [a, b, a]
    monkeypatch.setattr(readers, "HELD", 15)
    for path in (film(tmp_path / "c.mp4", coded(10)), a):
        open_video(path).close()
    assert len(readers._timelines) == 1


def test_long_films_are_not_left_to_a_reader_that_reads_them_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.mp4", coded(10))
    monkeypatch.setattr(readers, "LONG", 9)
    for asked, serves in (("auto", "pyav"), ("decord", "decord")):
        opened = open_video(path, asked)
        assert opened.reader == serves
        opened.close()


# ---- masks

@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """Two sequences of 6 frames with masks of the first frame and of all, as DAVIS lays them out."""
    for name, masks in (("bear", range(6)), ("canary", range(1))):
        folder(tmp_path / "JPEGImages" / "480p" / name, coded(6) + np.uint8(name == "canary"))
        labels = tmp_path / "Annotations" / "480p" / name
        labels.mkdir(parents=True)
        for i in masks:
            mask = np.zeros((H, W), np.uint8)
            mask[10 + i:30, 20:40] = 255
            Pillow.fromarray(mask).save(labels / f"{i:05d}.png")
    return tmp_path


def test_masks_go_with_their_frames(davis: Path, tmp_path: Path) -> None:
    modality = video(mask_values={0: 0, 255: 1})
    frames, labels = davis / "JPEGImages/480p", davis / "Annotations/480p"
    full = modality.read([frames / "bear"], {"mask": labels / "bear"}).fields["mask"]
    assert full.shape == (6, H, W)
    assert [int(m.sum()) for m in full] == [(20 - i) * 20 for i in range(6)]
    first = modality.read([frames / "canary"], {"mask": labels / "canary"}).fields["mask"]
    assert (first[0] == full[0]).all()
    assert (first[1:] == -1).all()
    small = video(mask_values={0: 0, 255: 1}, store="decoded", resize=24)
    assert small.read([frames / "bear"], {"mask": labels / "bear"}).fields["mask"].shape == (6, 24, 32)


def test_masks_that_do_not_fit_are_refused_without_names(davis: Path) -> None:
    frames, labels = davis / "JPEGImages/480p/canary", davis / "Annotations/480p/canary"
    calls = {}
    calls["missing"] = lambda: video().read([frames], {"mask": labels.parent / "absent"})
    calls["mask"] = lambda: video(mask_values={0: 0}).read([frames], {"mask": labels})
    for expected, call in calls.items():
        with pytest.raises(DataError) as caught:
            call()
        assert caught.value.reason == expected
        assert "canary" not in str(caught.value)
    for name, size, expected in (("00001", (W, H), "shape"), ("00017", (H, W), "mask"), ("0", (H, W), "mask"),
                                 ("notes", (H, W), "mask")):
        file = labels / f"{name}.png"
        Pillow.fromarray(np.zeros(size, np.uint8)).save(file)
        with pytest.raises(DataError) as caught:
            video().read([frames], {"mask": labels})
        assert caught.value.reason == expected, name
        assert "canary" not in str(caught.value)
        assert name == "0" or name not in str(caught.value)
        file.unlink()
    (labels / "00000.png").unlink()
    assert reason(lambda: video().read([frames], {"mask": labels})) == "mask"


@pytest.mark.parametrize("first", [0, 1, 7])
def test_written_masks_read_back(first: int, tmp_path: Path) -> None:
    modality = video(mask_values={0: 0, 40: 1, 200: 2}, store="decoded", resize=24)
    frames = folder(tmp_path / "frames", coded(6), first)
    head = modality.read([frames]).header
    labels = np.random.default_rng(0).integers(0, 3, (6, 24, 32))
    written = modality.write(labels, head, tmp_path / "out" / "frames")
    assert written == tmp_path / "out" / "frames"
    again = modality.read([frames], {"mask": written}).fields["mask"]
    assert (again == labels).all()
    assert np.asarray(Pillow.open(written / f"{first:05d}.png")).shape == (H, W)
    assert reason(lambda: modality.write(labels + 1, head, tmp_path / "other")) == "mask"


def test_masks_follow_their_clip(davis: Path, tmp_path: Path) -> None:
    """Through window, turn, flip and playing backwards, the mask stays on its pixels."""
    modality = video(mask_values={0: 0, 255: 1})
    manifest = Manifest.discover(davis, modality)
    cache = Cache.build(manifest, modality, tmp_path / "cache")
    rows = [r for r in manifest.rows if (cache.field(r.index, "mask") >= 0).all()]
    assert len(rows) == 1
    settings_ = options((4, 24, 24), window="crop", turn=True, flip=[0, 0.5, 0.5], direction=0.5, count=8)
    recipe: Any = SimpleNamespace(train=SimpleNamespace(batch=1, seed=0, workers=0, window=8), modality=modality,
                                  views={"x": settings_}, compose=None)
    batch, = loader(cache, rows, recipe, fields=["mask"], steps=1)
    view = modality.augment(batch.views["x"], settings_)
    t, y, x = (view.array * 255).round().unbind(1)
    inside = (y >= 10 + t) & (y < 30) & (x >= 20) & (x < 40)
    assert torch.equal(view.fields["mask"], inside.long())
    assert inside.any()


# ---- what is damaged

def test_broken_clips_are_quarantined_without_their_names(clips: Path, tmp_path: Path) -> None:
    (clips / "canary.mp4").write_bytes(b"")
    (clips / "canary2.mp4").write_text("not a video")
    whole_file = (clips / "clip1.mp4").read_bytes()
    (clips / "canary3.mp4").write_bytes(whole_file[:len(whole_file) // 2])
    modality = video()
    cache = Cache.build(Manifest.discover(clips, modality), modality, tmp_path / "cache")
    assert len(cache) == 3
    assert sorted(p.reason for p in cache.quarantine) == ["empty", "truncated", "unreadable"]
    assert not any("canary" in f"{p.case}{p.message}{p.remedy}" for p in cache.quarantine)


@settings(max_examples=30)
@given(short=st.integers(4, 60), height=st.integers(1, 80), width=st.integers(1, 80))
def test_the_short_side_shrinks_and_never_grows(short: int, height: int, width: int) -> None:
    h, w = module._short_side((height, width), short)
    assert (h, w) == (height, width) if min(height, width) <= short else min(h, w) == short
    assert h / w == pytest.approx(height / width, rel=0.6 / min(h, w))
