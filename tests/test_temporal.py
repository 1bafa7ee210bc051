"""Segments of time in untrimmed videos: how they are read, where they lie in views, how they are found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import meristem
from meristem.errors import RecipeError
from meristem.modalities.base import Header, Look, modality_class
from meristem.modalities.frame import Frame
from meristem.modalities.objects import Objects
from meristem.modalities.video.untrimmed import write_untrimmed
from meristem.platform.data.loader import whole
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.source import open_data
from meristem.tasks.detectors.temporal import Level, Segments, TemporalHead, decode, distance_loss, losses, suppress, targets
from meristem.tasks.finetune import resolve, tune
from meristem.tasks.temporal import in_view, to_source

SEGMENTS = [("sweep", 2.0, 5.0), ("flash", 7.0, 9.0), ("sweep", 11.5, 14.5), ("flash", 17.0, 20.0)]
SECONDS, RATE = 22, 8
SMALL = ["modality.video.patch=[2,16,16]", "views.x.size=[64,32,32]", "views.x.window=cover", "views.x.area=null",
         "views.x.flip=null", "views.x.brightness=null", "views.x.contrast=null", "train.layer_decay=1",
         "encoder={transformer: {width: 64, depth: 2, heads: 2}}", "task.temporal.width=64", "task.temporal.levels=4"]


def untrimmed(path: Path, seed: int = 0) -> Path:
    """A film of a dim street with a bar that sweeps through it, and flashes, at the seconds of SEGMENTS."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", RATE)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(SECONDS * RATE):
            pixels = rng.integers(60, 80, (32, 32, 3), dtype=np.uint8)
            for name, start, end in SEGMENTS:
                if start <= i / RATE < end:
                    if name == "flash":
                        pixels[::, :, 0] = 255 if i % 2 else 120
                    else:
                        pixels[:, 4 * i % 32:4 * i % 32 + 8] = (20, 200, 250)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


def listed(root: Path, **entries: Any) -> Path:
    path = root / "annotations.json"
    path.write_text(json.dumps({"version": "1.3", "database": entries}))
    return path


def entry(subset: str = "training", segments: Any = SEGMENTS, duration: float = SECONDS) -> dict[str, Any]:
    return {"subset": subset, "duration": duration,
            "annotations": [{"label": name, "segment": [start, end]} for name, start, end in segments]}


def video(**options: Any) -> Any:
    cls = modality_class("video")
    return cls(cls.Options(**options))


# ---- files


def test_segments_are_read_with_their_split_and_classes(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for name in ("videos/v_a.mp4", "validation/b.webm", "c.mkv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    listed(tmp_path / "annotations", a=entry(), b=entry("validation", []), c={"subset": "testing", "duration": 9.0})
    found = Manifest.discover(tmp_path, video())
    assert found.layout == "ActivityNet" and found.object_names == ("flash", "sweep")
    a, b, c = sorted(found.rows, key=lambda row: Path(row.local).name.removeprefix("v_"))
    assert [a.split, b.split, c.split] == ["train", "val", "test"]
    assert a.objects is not None and a.objects.box.tolist() == [[s, e] for _, s, e in SEGMENTS]
    assert a.objects.label.tolist() == [1, 0, 1, 0]
    assert b.objects is not None and len(b.objects) == 0 and c.objects is None  # nothing happens, and nobody says
    assert not found.problems


def test_the_taxonomy_s_leaves_are_the_classes(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    nodes = [{"nodeName": "Root", "parentName": None}, {"nodeName": "Sports", "parentName": "Root"},
             *({"nodeName": name, "parentName": "Sports"} for name in ("sweep", "flash", "jump"))]
    about = {"version": "1.3", "taxonomy": nodes, "database": {"a": entry()}}
    (tmp_path / "list.json").write_text(json.dumps(about))
    assert Manifest.discover(tmp_path / "list.json", video()).object_names == ("flash", "jump", "sweep")


@pytest.mark.parametrize(("segment", "reason", "says"), [
    (("sweep", 5.0, 5.0), "box", "ends before it starts"), (("sweep", 18.0, 30.0), "box", "outside the video's 22 s"),
    (("sweep", 22.0, 22.5), "box", "outside"), (("sweep", 1.0, math.nan), "box", "finite"),
    (("leap", 1.0, 2.0), "class", "leap")])
def test_a_wrong_segment_is_named_and_its_video_stays(tmp_path: Path, segment: tuple[str, float, float], reason: str,
                                                      says: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "list.json").write_text(json.dumps({"classes": ["sweep"], "database": {"a": entry(segments=[segment])}}))
    found = Manifest.discover(tmp_path, video())
    assert [(p.reason, says in p.message) for p in found.problems] == [(reason, True)]
    assert len(found) == 1 and found.rows[0].objects is None


def test_a_small_overrun_is_cut_and_a_missing_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    listed(tmp_path, a=entry(segments=[("sweep", 20.0, 22.4)]), gone=entry())
    found = Manifest.discover(tmp_path, video())
    assert found.rows[0].objects is not None and found.rows[0].objects.box.tolist() == [[20.0, 22.0]]
    assert [p.reason for p in found.problems] == ["missing"]


# ---- time


def header(times: list[float] | None = None, frames: int = 100, period: float = 0.04) -> Header:
    affine = ((period, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    return Header((3, frames, 8, 8), affine, (period, 1.0, 1.0), source={"times": times} if times else {})


def test_seconds_follow_the_frames_where_these_come_unevenly() -> None:
    objects = Objects(np.array([[1.0, 2.0]]), np.zeros(1, np.int64))
    assert video().placed(objects, header()).box.tolist() == [[1.0, 2.0]]
    uneven = header([0.0, 0.04, 0.08, 1.08, 1.12, 1.16], frames=6)  # a second's pause after the third frame
    placed = video().placed(Objects(np.array([[0.04, 1.12]]), np.zeros(1, np.int64)), uneven).box
    np.testing.assert_allclose(placed, [[0.04, 0.16]])  # frames 1 to 4, 0.04 s each
    np.testing.assert_allclose(video().annotated(placed, uneven), [[0.04, 1.12]])


def test_a_segment_after_the_last_frame_is_refused() -> None:
    cut = video().placed(Objects(np.array([[3.0, 4.5]]), np.zeros(1, np.int64)), header())
    np.testing.assert_allclose(cut.box, [[3.0, 4.0]])
    for segment in ([3.0, 5.5], [4.0, 4.5]):
        with pytest.raises(meristem.errors.DataError, match="decoded"):
            video().placed(Objects(np.array([segment]), np.zeros(1, np.int64)), header())


@pytest.mark.parametrize("sample", [{"stride": 2}, {"fps": 10}])
def test_a_look_about_a_frame_shows_it(sample: dict[str, float]) -> None:
    modality = video()
    view = modality.ViewOptions(size=(16, 8, 8), sample=sample, short="pad", window="cover")
    starts = set()
    for about in (0, 3, 50, 99):
        for cursor in range(20):
            draw = modality.draw(view, header(), Look(0, cursor, 0, "x", about))
            assert draw.index[0] <= about < draw.index[-1] + 3  # the next place would be so far off
            starts.add(draw.index[0])
    assert len(starts) > 12


def test_segments_follow_a_view_that_is_sped_up_and_played_backwards(tmp_path: Path) -> None:
    modality = video(patch=(2, 16, 16))
    data = open_data(untrimmed(tmp_path / "a.mp4"), modality, cache=tmp_path / "cache", quiet=True)
    objects = Objects(np.array([[s, e] for _, s, e in SEGMENTS]), np.array([1, 0, 1, 0]))
    for speed, direction in ((1.0, 0.0), (2.0, 0.0), (1.0, 1.0), (2.0, 1.0)):
        view = modality.ViewOptions(size=(64, 32, 32), sample={"fps": 8}, short="pad", window="cover", speed=(speed,),
                                    direction=direction)
        seen = whole(data.cache, data.rows(), modality, view)
        true, silent = in_view(objects, seen.frame, 32, 0.5)
        assert len(true.span) and (true.span[:, 1] > true.span[:, 0]).all()
        red = seen.array[0, 0].float().mean((1, 2))  # flashes are the only red there is
        for span, label in zip(true.span, true.label, strict=True):
            inside = slice(math.ceil(span[0] * 2 + 1), math.floor(span[1] * 2))
            assert (red[inside] > 100).all() == bool(label == 0) and inside.stop - inside.start > 4
        back = to_source(true.span, seen.frame, 32)
        whole_ones = [(b, s) for b, s in zip(back, true.span, strict=True) if s[0] > 0 and s[1] < 31]
        assert whole_ones and all(np.abs(objects.box - b).max(1).min() < 1e-3 for b, _ in whole_ones)
        assert len(true.span) + len(silent) <= len(objects)


def test_what_a_view_cuts_teaches_where_half_of_it_shows() -> None:
    frame = Frame(torch.diag(torch.tensor([0.125, 1.0, 1.0, 1.0]))[None], (64, 8, 8), torch.ones(1, 3), ("s", "px", "px"))
    objects = Objects(np.array([[7.0, 8.5], [-1.0, 0.5], [20.0, 21.0], [2.0, 3.0]]), np.arange(4), np.array([0, 0, 0, 1], bool))
    true, silent = in_view(objects, frame, 32, 0.5)
    assert true.label.tolist() == [0]
    np.testing.assert_allclose(true.span, [[27.75, 31.5]], atol=1e-4)  # (7 s · 8 Hz − ½) / 2, to the border
    np.testing.assert_allclose(silent, [[-0.5, 1.75], [7.75, 11.75]], atol=1e-4)


# ---- the head


def test_soft_suppression_is_what_a_plain_loop_makes_of_it() -> None:
    rng = np.random.default_rng(3)
    start = rng.uniform(0, 20, 40)
    span, label, score = np.stack([start, start + rng.uniform(1, 6, 40)], 1), rng.integers(0, 3, 40), rng.uniform(0.05, 1, 40)
    rest, wanted = [(s, tuple(b), c) for b, c, s in zip(span, label, score, strict=True)], []
    while rest:
        rest.sort(key=lambda x: x[0])
        s, (a, b), c = rest.pop()
        if s <= 1e-3:
            break
        wanted.append((a, b, c, s))
        weakened = []
        for t, (d, e), k in rest:
            iou = max(0.0, min(b, e) - max(a, d)) / (max(b, e) - min(a, d)) if min(b, e) > max(a, d) else 0.0
            weakened.append((t * math.exp(-iou * iou / 0.3) if k == c else t, (d, e), k))
        rest = weakened
    got_span, got_label, got_score = suppress(span, label, score, 0.3, 1000)
    np.testing.assert_allclose(np.column_stack([got_span, got_label, got_score]), wanted, rtol=1e-9)
    assert (got_score < np.sort(score)[::-1][:len(got_score)] - 1e-9).any()
    assert len(suppress(span, label, score, 0.3, 5)[0]) == 5


def test_the_distance_loss_is_its_closed_form() -> None:
    wanted = torch.tensor([[2.0, 2.0], [2.0, 2.0], [1.0, 3.0]])
    reach = torch.tensor([[2.0, 2.0], [1.0, 3.0], [2.0, 6.0]], requires_grad=True)
    # the same; [-1, 3] against [-2, 2]: IoU 3/5, middles 1 of 5 apart; [-2, 6] against [-1, 3]: IoU 4/8, middles 1 of 8
    loss = distance_loss(reach, wanted)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1 - 3 / 5 + 1 / 25, 1 - 4 / 8 + 1 / 64]))
    loss.sum().backward()
    assert reach.grad is not None and reach.grad.isfinite().all()


def test_points_answer_for_the_shortest_action_around_them_of_their_level() -> None:
    span = torch.tensor([[2.0, 8.0], [4.0, 6.4], [10.0, 40.0]])
    chosen, reach = targets(torch.arange(0.0, 45.0), 1, span, 0, 4.0)
    assert {i: c for i, c in enumerate(chosen.tolist()) if c >= 0} == {5: 1, 6: 1}
    assert reach[5].tolist() == pytest.approx([1.0, 1.4])
    assert (chosen != 2).all()  # too long for this level
    coarse, _ = targets(torch.arange(0.0, 48.0, 8.0), 8, span, 8.0, math.inf)
    assert coarse.tolist() == [-1, -1, 2, 2, 2, -1]  # within 12 steps of its middle, 25


def test_what_is_right_loses_little_and_is_decoded() -> None:
    span, label = torch.tensor([[3.0, 6.0], [10.0, 26.0]]), torch.tensor([2, 0])
    levels = []
    for i in range(3):
        place = torch.arange(0.0, 32.0, 2**i)
        chosen, reach = targets(place, 2**i, span, [0, 4, 8][i], [4, 8, math.inf][i])
        scores = torch.full((len(place), 3), -12.0)
        scores[chosen >= 0, label[chosen[chosen >= 0]]] = 12.0
        levels.append(Level(scores[None], reach[None], torch.ones(1, len(place), dtype=torch.bool), 2**i))
    quiet = [torch.zeros(0, 2)]
    right = losses(levels, [Segments(span, label)], quiet)
    assert right["class"].count > 1 and all(float(loss.total) < 1e-3 for loss in right.values())
    wrong = losses(levels, [Segments(span, label.flip(0))], quiet)
    assert float(wrong["class"].total) > 1
    missed = losses(levels, [Segments(span[:1], label[:1])], quiet)  # the second is found where nothing is known to be
    hushed = losses(levels, [Segments(span[:1], label[:1])], [span[1:]])
    assert float(missed["class"].total) > 1 and float(hushed["class"].total) < 1e-3
    found, = decode(levels, 100)
    assert {(int(c), *map(float, s)) for s, c in zip(found.span, found.label, strict=True)} == {(2, 3.0, 6.0), (0, 10.0, 26.0)}


def test_padding_changes_nothing() -> None:
    head = TemporalHead(24, 32, 3, 2).eval()
    x = torch.randn(1, 21, 24)
    padded = torch.cat([x, torch.randn(1, 11, 24)], 1)
    valid = torch.arange(32)[None] < 21
    with torch.no_grad():
        alone, among = head(x, valid[:, :21]), head(padded, valid)
    for a, b in zip(alone, among, strict=True):
        n = a.valid.shape[1]
        assert b.valid.sum() == n
        torch.testing.assert_close(b.scores[:, :n], a.scores, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(b.reach[:, :n], a.reach, atol=1e-5, rtol=1e-4)


# ---- the task


@pytest.mark.parametrize(("change", "says"), [("views.x.short=loop", "use pad"), ("views.x.sample=uniform", "use a rate"),
                                              ("task.temporal.clip=48", "must divide")])
def test_impossible_recipes_are_refused(change: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        resolve("temporal", "video", [change])


def test_segments_of_one_video_are_learned_by_heart(tmp_path: Path) -> None:
    """From files to segments: windows of 8 s in a film of 22 s, all four actions at a temporal IoU of 0.7 and more."""
    untrimmed(tmp_path / "v_street.mp4")
    listed(tmp_path, street=entry("testing"), other=entry())
    untrimmed(tmp_path / "other.mp4", 1)
    tuned = meristem.finetune("video/temporal", tmp_path, tmp_path / "run", [*SMALL, "train.steps=110", "train.batch=4",
                              "train.lr=3e-3"], cache=tmp_path / "cache", quiet=True)
    case, = json.loads((tmp_path / "run" / "cases.json").read_text())
    assert case["truth"]["box"] == [[s, e] for _, s, e in SEGMENTS]
    names = list(tuned.scope.values.values())
    best = list(zip(case["found"]["box"], case["found"]["label"], strict=True))[:len(SEGMENTS)]
    for name, start, end in SEGMENTS:
        ious = [max(min(b, end) - max(a, start), 0) / (max(b, end) - min(a, start)) for (a, b), c in best if names[c] == name]
        assert max(ious) >= 0.7, (name, start, best)
    files = meristem.predict(tmp_path / "run", tmp_path / "v_street.mp4", tmp_path / "out", quiet=True)
    results = json.loads(files[0].read_text())["results"]
    assert list(results) == ["street"] and {r["label"] for r in results["street"][:4]} == {"flash", "sweep"}
    assert results["street"][0]["segment"] == pytest.approx(case["found"]["box"][0], abs=1e-3)


def test_a_probe_leaves_the_encoder_as_it_was(tmp_path: Path) -> None:
    untrimmed(tmp_path / "street.mp4")
    listed(tmp_path, street=entry())
    recipe = resolve("temporal", "video", [*SMALL, "train.steps=2", "train.batch=2", "probe=true"])
    data = open_data(tmp_path, recipe.modality, cache=tmp_path / "cache", quiet=True)
    tuned = tune(recipe, data, recipe.task.cases(data, "train"), recipe.task.scope(data), None, "probe", quiet=True)
    torch.manual_seed(recipe.train.seed)
    before, after = recipe.assemble(2), tuned.outcome.assembly
    same = {name: torch.equal(a, b) for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)}
    assert all(same[name] for name in same if name.startswith("encoder."))
    assert not all(same[name] for name in same if name.startswith("objectives."))


# ---- made films


def test_made_films_hold_each_action_at_its_seconds_and_share_no_source(tmp_path: Path) -> None:
    """Clips whose red tells the action and whose blue tells the source."""
    rows, blue = [], {"s0": 0, "s1": 80, "s2": 160, "s3": 240}
    for source, b in blue.items():
        for label, red in (("act", 220), ("none", 30)):
            rows.append(f"{label}-{source}.mp4,{label},{source}")
            with av.open(str(tmp_path / f"{label}-{source}.mp4"), "w") as container:
                stream = container.add_stream("libx264", 24)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                for _ in range(36):
                    pixels = np.full((48, 64, 3), (red, 60, b), np.uint8)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
                container.mux(stream.encode())
    (tmp_path / "clips.csv").write_text("\n".join(["file,label,source", *rows]))
    listing = write_untrimmed(tmp_path, tmp_path / "films", 4, background="none", rate=12, side=32, test=0.5)
    met: dict[str, set[int]] = {"training": set(), "testing": set()}
    for name, about in json.loads(listing.read_text())["database"].items():
        with av.open(str(listing.parent / "videos" / f"{name}.mp4")) as container:
            film = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]).mean((1, 2))
        assert len(film) == round(12 * about["duration"]) and 2 <= len(about["annotations"]) <= 4
        inside = np.zeros(len(film), bool)
        for annotation in about["annotations"]:
            inside[slice(*(round(12 * t) for t in annotation["segment"]))] = True
        np.testing.assert_array_equal(film[:, 0] > 125, inside)
        met[about["subset"]] |= set((film[:, 2] / 80).round().astype(int).tolist())
    assert met["training"] and met["testing"] and not met["training"] & met["testing"]
