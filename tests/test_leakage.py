"""Copies that were saved again, turned, brightened, trimmed, shuffled or thinned are found; what is merely of a kind is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import av
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_skeletons import kinect
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom

import meristem
from meristem.modalities.base import modality_class
from meristem.modalities.graph import colours
from meristem.modalities.graph.raw import Raw, both_ways
from meristem.modalities.likeness import Likeness, cosines, ranks, turns
from meristem.modalities.points import shape
from meristem.modalities.skeleton import poses
from meristem.platform.data.source import Data, open_data
from meristem.platform.evaluation.leakage import Leakage, audit, copies
from meristem.platform.evaluation.results import Results
from meristem.platform.training import checkpoint
from meristem.platform.training.pretrain import met

KINDS = ("image", "volume", "video", "points", "graph", "skeleton")


def field(seed: int, *shape: int, smooth: float = 2.0) -> np.ndarray:
    """Smooth noise from 0 to 1."""
    x = gaussian_filter(np.random.default_rng(seed).normal(size=shape), smooth)
    return (x - x.min()) / np.ptp(x)


def opened(path: Path, kind: str, cache: Path, **options: Any) -> Data:
    cls = modality_class(kind)
    return open_data(path, cls(cls.Options.model_validate(options)), "1,0,0", cache, quiet=True)


def compared(seen: Data, tested: Data, labelled: bool = False) -> Leakage:
    """Of the samples of one folder those of another."""
    mine, theirs = seen.identities(seen.rows()), tested.identities(tested.rows())
    near = copies(tested.fingerprints(tested.rows()), mine["fingerprints"]["codes"], tested.modality.likeness)  # type: ignore[attr-defined]
    with_labels = (mine["subjects"], mine["contents"], True, "", None, near) if labelled else ()
    return audit(theirs["subjects"], theirs["contents"], mine["subjects"], mine["contents"], *with_labels,
                 **{} if labelled else {"seen_near": near})


# ---- planted copies: what is written into `seen` and `tested`, names that differ


def nifti(path: Path, x: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(x, np.diag([1.0, 0.8, 1.5, 1.0]) if affine is None else affine), path)


def volume(seed: int) -> np.ndarray:
    return np.rint(field(seed, 24, 28, 20) * 1200 - 200).astype(np.int16)


def resaved_volume(path: Path) -> None:
    """As 8 bits, uncompressed, from a wide window."""
    nifti(path / "b.nii", np.rint((volume(0).clip(-100, 900) + 100) / 1000 * 255).astype(np.uint8))


def reoriented_volume(path: Path) -> None:
    """Axes in another order and one reversed, as the header says."""
    image = nib.Nifti1Image(volume(0), np.diag([1.0, 0.8, 1.5, 1.0]))
    turned = image.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
    nifti(path / "b.nii.gz", np.asarray(turned.dataobj), turned.affine)


def mislabelled_volume(path: Path) -> None:
    """Turned, and the header does not know."""
    nifti(path / "b.nii.gz", np.ascontiguousarray(volume(0).transpose(1, 2, 0)[:, ::-1]))


def rewindowed_volume(path: Path) -> None:
    nifti(path / "b.nii.gz", (volume(0).clip(0, 800).astype(np.float32) / 800) ** 0.5)


def resampled_volume(path: Path) -> None:
    nifti(path / "b.nii.gz", zoom(volume(0).astype(np.float32), 0.8, order=1))


def picture(seed: int) -> np.ndarray:
    return np.stack([field(seed * 3 + c, 96, 128, smooth=6.0) * 200 + 20 for c in range(3)], -1).astype(np.uint8)


def image_file(path: Path, x: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, **options)


def jpeg(path: Path) -> None:
    image_file(path / "b.jpg", picture(0), quality=50)


def resized(path: Path) -> None:
    image_file(path / "b.png", np.asarray(Image.fromarray(picture(0)).resize((80, 60))))


def brightened_mirror(path: Path) -> None:
    image_file(path / "b.png", (picture(0)[:, ::-1] * 0.7 + 60).astype(np.uint8))


def clip(seed: int) -> np.ndarray:
    """(50, 64, 96, 3): 2 s across a wide scene, that grows darker."""
    wide = field(seed, 64, 300, smooth=5.0)
    grey = np.stack([wide[:, 4 * t:4 * t + 96] * (250 - 2 * t) for t in range(50)])
    return np.repeat(grey[..., None], 3, -1).astype(np.uint8)


def film(path: Path, pixels: np.ndarray, crf: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", 25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 96, 64, "yuv420p", {"crf": str(crf)}
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def trimmed_film(path: Path) -> None:
    film(path / "b.mkv", clip(0)[17:43], 28)


def cloud(seed: int, n: int = 8192) -> np.ndarray:
    """Points on a lumpy surface."""
    rng = np.random.default_rng(seed)
    lumps, x = rng.normal(size=(4, 3)), rng.normal(size=(n, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return (x * (1 + 0.4 * np.sin(2 * x @ lumps.T).sum(1, keepdims=True))) * rng.uniform(0.5, 1.5, 3)


def cloud_file(path: Path, x: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, x.astype(np.float32))


def shuffled_cloud(path: Path) -> None:
    cloud_file(path / "b.npy", np.random.default_rng(9).permutation(cloud(0)))


def moved_cloud(path: Path) -> None:
    """In millimetres, elsewhere, with y up."""
    path.mkdir()
    x = np.random.default_rng(9).permutation(cloud(0))[:, [0, 2, 1]]
    np.savetxt(path / "b.txt", x * [1000, 1000, -1000] + [50, -700, 9], fmt="%.3f")


def thinned_cloud(path: Path) -> None:
    cloud_file(path / "b.npy", np.random.default_rng(9).permutation(cloud(0))[:4096])


def graph(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(tags (N,), adjacency (N, N)) of a random graph."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.random((14, 14)) < 0.25, 1)
    return rng.integers(0, 3, 14), upper | upper.T


def collection(path: Path, *graphs: tuple[np.ndarray, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [str(len(graphs))]
    for tags, near in graphs:
        lines.append(f"{len(tags)} 0")
        lines += [" ".join(map(str, [tag, row.sum(), *np.flatnonzero(row)])) for tag, row in zip(tags, near, strict=True)]
    path.write_text("\n".join(lines) + "\n")


def shuffled_graph(path: Path) -> None:
    (tags, near), order = graph(0), np.random.default_rng(9).permutation(14)
    collection(path / "B" / "B.txt", (tags[order], near[order][:, order]))


def moves(seed: int) -> np.ndarray:
    """(120, 25, 3) every joint wanders about a place of its own, never twice alike."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.5, (25, 3)) + gaussian_filter(rng.normal(size=(120, 25, 3)), (5, 0, 0))


def trimmed_skeleton(path: Path) -> None:
    """Seen from elsewhere, by a device that numbers people otherwise."""
    path.mkdir()
    kinect(path / "S002C001P009R001A001.skeleton", [{"7": frame + np.array((1.0, 0.2, 3.0))} for frame in moves(0)[31:99]])


def originals(kind: str, path: Path) -> Path:
    """Five samples, of which the first is what is copied."""
    for seed in range(5):
        if kind == "volume":
            nifti(path / f"{seed}.nii.gz", volume(seed))
        elif kind == "image":
            image_file(path / f"{seed}.png", picture(seed))
        elif kind == "video":
            film(path / f"{seed}.mp4", clip(seed), 18)
        elif kind == "points":
            cloud_file(path / f"{seed}.npy", cloud(seed))
        elif kind == "skeleton":
            path.mkdir(exist_ok=True)
            kinect(path / f"S001C001P00{seed}R001A001.skeleton", [{"1": frame} for frame in moves(seed)])
    if kind == "graph":
        collection(path / "A" / "A.txt", *(graph(seed) for seed in range(5)))
    return path


PLANTED: dict[str, tuple[Callable[[Path], None], ...]] = {
    "volume": (resaved_volume, reoriented_volume, mislabelled_volume, rewindowed_volume, resampled_volume),
    "image": (jpeg, resized, brightened_mirror), "video": (trimmed_film,),
    "points": (shuffled_cloud, moved_cloud, thinned_cloud), "graph": (shuffled_graph,), "skeleton": (trimmed_skeleton,)}


@pytest.mark.parametrize(("kind", "plant"), [(k, p) for k, plants in PLANTED.items() for p in plants])
def test_a_planted_copy_is_found(kind: str, plant: Callable[[Path], None], tmp_path: Path) -> None:
    plant(tmp_path / "tested")
    originals(kind, tmp_path / "seen")
    seen, tested = (opened(tmp_path / name, kind, tmp_path / "cache") for name in ("seen", "tested"))
    found = compared(seen, tested)
    assert (found.verdict, found.subjects, found.contents, found.near) == ("transductive", 0, 0, 1)
    assert "near-duplicates of 1 more image" in found.sentence and "by subject, content hash and likeness" in found.sentence
    with_labels = compared(seen, tested, labelled=True)
    assert (with_labels.verdict, with_labels.near) == ("contaminated", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_other_samples_of_a_kind_are_no_copies_and_a_second_reading_agrees(kind: str, tmp_path: Path) -> None:
    data = opened(originals(kind, tmp_path / "seen"), kind, tmp_path / "cache")
    rows = data.rows()
    found = data.fingerprints(rows)
    assert len(found) == 5
    for row in rows:
        mine = data.fingerprints([row])
        others = [code for name, code in found.items() if name not in mine]
        assert not copies(mine, others, data.modality.likeness)  # type: ignore[attr-defined]
        assert copies(mine, found.values(), data.modality.likeness) == set(mine)  # type: ignore[attr-defined]
    again = opened(tmp_path / "seen", kind, tmp_path / "cache")
    assert again.cache.reused == 5 and again.fingerprints(again.rows()) == found


def test_a_cut_recording_of_one_file_is_no_copy_of_its_rest(tmp_path: Path) -> None:
    """Windows of one walk: the same person, other steps."""
    for name, part in (("seen", slice(0, 60)), ("tested", slice(60, 120))):
        (tmp_path / name).mkdir()
        kinect(tmp_path / name / f"S001C001P00{len(name)}R001A001.skeleton", [{"1": frame} for frame in moves(0)[part]])
    seen, tested = (opened(tmp_path / name, "skeleton", tmp_path / "cache") for name in ("seen", "tested"))
    assert compared(seen, tested).verdict == "clean"


def test_grey_and_colour_readings_of_a_picture_agree(tmp_path: Path) -> None:
    one, three = (opened(originals("image", tmp_path / "a"), "image", tmp_path / "cache", channels=c) for c in (1, 3))
    assert copies(one.fingerprints(one.rows()), three.fingerprints(three.rows()).values(), one.modality.likeness)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_blank_pictures_are_like_nothing(kind: str, tmp_path: Path) -> None:
    for i in range(4):
        image_file(tmp_path / "data" / f"clip{i // 2}" / f"{i:03d}.png", np.full((16, 20, 3), 10 + i, np.uint8))
    data = opened(tmp_path / "data", kind, tmp_path / "cache")
    assert len(data.rows()) == (4 if kind == "image" else 2) and not data.fingerprints(data.rows())


# ---- what leaves a code as it is


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
def test_every_orientation_of_a_volume_is_one(seed: int, axes: list[int], flips: tuple[bool, ...]) -> None:
    kind = modality_class("volume").likeness  # type: ignore[attr-defined]
    x = field(seed, 10, 13, 11)
    other = x.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    assert kind.alike([kind.pack(cosines(other, 8))], [kind.pack(cosines(x, 8))]).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 50), min_size=256, max_size=256))
def test_a_rising_window_leaves_ranks_alone(seed: int, steps: list[int]) -> None:
    x = np.random.default_rng(seed).integers(-128, 128, (6, 7, 5)).astype(np.int16)
    np.testing.assert_array_equal(ranks(x), ranks(np.cumsum(steps)[x + 128]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.sampled_from(list(permutations(range(3)))))
def test_order_place_and_size_of_a_cloud_do_not_count(seed: int, scale: float, axes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    x = cloud(seed, 300)
    other = rng.permutation(x)[:, axes] * scale * rng.choice([-1, 1], 3) + rng.normal(size=3) * scale
    assert shape.ALIKE.alike([shape.fingerprint(other.T)], [shape.fingerprint(x.T)]).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_the_order_of_nodes_and_the_rounding_of_weights_do_not_count_and_one_edge_does(seed: int, weighted: bool,
                                                                                      numbered: bool) -> None:
    rng, (tags, near) = np.random.default_rng(seed), graph(seed)
    weight, numbers, order = rng.random((14, 14)), rng.normal(size=(14, 3)), rng.permutation(14)
    weight = weight + weight.T

    def code(order: np.ndarray, scale: float, near: np.ndarray = near) -> bytes:
        shuffled = near[order][:, order]
        pairs = np.stack(np.nonzero(np.triu(shuffled)))
        raw = Raw(14, pairs, weight=np.round(weight[order][:, order][tuple(pairs)] * scale, 6) if weighted else None,
                  tag=tags[order], given=(numbers[order] * scale).astype(np.float32) if numbered else None)
        pairs, kind, value, _ = both_ways(raw)
        return colours.fingerprint(raw, pairs, kind, value, ("C", "N", "O"), ())

    other = near.copy()
    other[0, 1] = other[1, 0] = not near[0, 1]
    assert code(np.arange(14), 1.0) == code(order, 3.0) != code(np.arange(14), 1.0, other)


def test_alike_agrees_with_a_double_loop_over_samples_of_many_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meristem.modalities.likeness.BLOCK", 7)  # many blocks
    kind, rng = Likeness("m", 20, within=2, share=0.5), np.random.default_rng(0)
    centres = rng.normal(size=(3, 20))

    def made(n: int) -> list[np.ndarray]:
        return [centres[rng.integers(0, 3, rng.integers(1, 6))] * rng.choice([-1, 1], (1, 20), p=[0.1, 0.9]) for _ in range(n)]

    some, others = made(9), made(7)
    expected = np.zeros((9, 7), bool)
    for i, a in enumerate(some):
        for j, b in enumerate(others):
            short, long = (a, b) if len(a) <= len(b) else (b, a)
            expected[i, j] = np.mean([min(((x > 0) != (y > 0)).sum() for y in long) <= 2 for x in short]) >= 0.5
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(kind.alike([kind.pack(a) for a in some], [kind.pack(b) for b in others]), expected)


def test_turns_are_what_flips_and_axes_do_to_cosines() -> None:
    x = np.random.default_rng(0).normal(size=(9, 9))
    made = {np.round(cosines(y, 4)[0], 4).tobytes() for y in (x, x.T) for y in (y, y[::-1], y[:, ::-1], y[::-1, ::-1])}
    plain = cosines(x, 4)
    assert {(np.round(plain[0, order] * sign, 4) + 0.0).tobytes() for order, sign in turns(4, 2)} == made and len(made) == 8


# ---- the whole way


def test_a_copy_is_on_the_page_and_an_older_checkpoint_cannot_say(tmp_path: Path) -> None:
    """Eight subjects; the fourth's picture is also, mirrored and as JPEG, what another data set was pretrained on."""
    cache = tmp_path / "c"
    size = ["encoder.transformer={width: 24, depth: 1, heads: 2}", "views.x.size=[32,32]", "train.workers=0"]
    for seed in range(8):
        image_file(tmp_path / "task" / "ab"[seed % 2] / f"{seed}.png", picture(seed))
    for seed in range(20, 24):
        image_file(tmp_path / "others" / f"{seed}.png", picture(seed))
    for seed in (3, 4):
        image_file(tmp_path / "others" / f"x{seed}.jpg", np.ascontiguousarray(picture(seed)[:, ::-1]), quality=70)
    meristem.pretrain("image/mae", tmp_path / "others", tmp_path / "pre", [
        *size, "train.steps=1", "train.batch=2", "objectives.pixels.masked.predictor.decoder={depth: 1, width: 24, heads: 2}"],
        split="1,0,0", cache=cache, quiet=True)
    run: dict[str, Any] = dict(inits=[str(tmp_path / "pre")], labels=["all"], seeds=1, protocols=["knn"], split="0.25,0.25,0.5",
                               cache=cache, quiet=True)
    page = meristem.evaluate("image/classification", tmp_path / "task", tmp_path / "eval", size, **run)
    found = Results.load(tmp_path / "eval" / "results.json").leakage["mae"]
    data = open_data(tmp_path / "task", opened(tmp_path / "task", "image", cache).modality, "0.25,0.25,0.5", cache, quiet=True)
    planted = sum(row.local.startswith(("b/3", "a/4")) for row in data.rows("test"))
    assert planted and found.near == planted and found.verdict == "transductive"
    assert found.sentence.split(": ", 1)[1] in page.read_text()

    for file in (tmp_path / "pre").rglob("card.json"):
        card = json.loads(file.read_text())
        assert len(card["seen"]["fingerprints"]["codes"]) == 6 and max(map(len, card["seen"]["fingerprints"]["codes"])) < 50
        del card["seen"]["fingerprints"]  # as it was before there were any
        file.write_text(json.dumps(card))
    meristem.evaluate("image/classification", tmp_path / "task", tmp_path / "old", size, **run)
    old = Results.load(tmp_path / "old" / "results.json").leakage["mae"]
    assert old.near is None and "near-duplicates could not be compared" in old.sentence and "likeness" not in old.sentence


def test_a_second_stage_has_met_what_the_first_one_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine: dict[str, Any] = {"subjects": ["s"], "contents": ["c"], "key_id": "k",
                            "fingerprints": {"method": "m", "codes": ["b"]}}
    for there, expected in (({"method": "m", "codes": ["a"]}, {"method": "m", "codes": ["a", "b"]}),
                            ({"method": "n", "codes": ["a"]}, None), (None, None)):
        card = {"seen": {**mine, "fingerprints": there}}
        monkeypatch.setattr(checkpoint, "read_card", lambda path, card=card: card)
        assert met(mine, tmp_path)["fingerprints"] == expected


def test_what_was_met_itself_is_not_counted_again_as_a_copy() -> None:
    found = audit(["t"], ["x", "y"], ["p"], ["x"], seen_near={"x", "y"})
    assert (found.contents, found.near, found.verdict) == (1, 1, "transductive")
    parts = audit(["t#1"], ["x#1"], ["p"], ["z"], ["t#2"], ["x#2"], seen_near=set(), labelled_near={"x"})
    assert parts.verdict == "transductive"  # a part beside a labelled part, not a copy of it
    assert audit(["t"], ["x"], ["p"], ["z"], seen_near={"x"}, spoiled="it saw them").verdict == "contaminated"
    assert audit(["t"], ["x"], None, None, labelled_near={"x"}).verdict == "contaminated"
    assert audit(["t"], ["x"], ["p"], ["z"]).near is None


# ---- real data


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "where", "known"), [
    ("volume", "msd-task04-hippocampus/images", 0), ("points", "psb-labeled-points", 0),
    ("image", "wbc-dataset1", 6)])  # looked at: three pairs show the same cell, moved by some pixels
def test_no_two_real_samples_are_called_copies(kind: str, where: str, known: int, data_root: Path, tmp_path: Path) -> None:
    data = opened(data_root / where, kind, tmp_path)
    codes = data.fingerprints(data.rows())
    like = 0
    for name in codes:
        like += bool(copies({name: codes[name]}, [code for other, code in codes.items() if other != name],
                            data.modality.likeness))  # type: ignore[attr-defined]
    assert like == known and len(codes) > 200


@pytest.mark.data
def test_real_walks_are_told_apart_and_a_trimmed_one_is_known(data_root: Path) -> None:
    kind = modality_class("skeleton")(modality_class("skeleton").Options.model_validate({"layout": "cmu"}))
    files = sorted((data_root / "cmu-mocap-actions" / "train" / "walking_extra").glob("*"))[:12]
    arrays = [kind.read([file]).array for file in files]
    whole, cut = ([poses.fingerprint(a[:, part], 28, 1 / 120, kind.likeness) for a in arrays]  # type: ignore[attr-defined,index]
                  for part in (slice(None), slice(70, 300)))
    np.testing.assert_array_equal(kind.likeness.alike(cut, whole), np.eye(len(files), dtype=bool))  # type: ignore[attr-defined]
