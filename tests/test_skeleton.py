"""Skeletons: what files say, what a view shows, what tokens are, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from made_skeletons import kinect, mocap, moves, openpose

import meristem
from meristem.errors import DataError, RecipeError
from meristem.modalities.base import Header, Modality, View, modality_class
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.modalities.skeleton import Skeleton, files, kinematics
from meristem.modalities.skeleton.layouts import LAYOUTS
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly, total
from meristem.platform.data.guess import guess_modality
from meristem.platform.data.loader import loader, whole
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.source import open_data
from meristem.platform.encoders import ENCODERS
from meristem.platform.objectives import Items
from meristem.platform.step import Batch


def made(**options: Any) -> Skeleton:
    return Skeleton(Skeleton.Options.model_validate({"layout": "ntu", "bodies": 1, "centre": False, **options}))


def seen(kind: Skeleton, array: np.ndarray, **view: Any) -> View:
    """One stored sample (C, T, J) as views show it: `count` looks."""
    options = Skeleton.ViewOptions.model_validate({"size": [array.shape[1]], **view})
    period = 1 / 30
    header = Header(array.shape, ((period, 0.0, 2.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)), (period, 1.0), pad=(float("nan"),))

    class Stored:
        def header(self, row: int) -> Any:
            return header

        def tables(self, row: int) -> dict[str, np.ndarray]:
            return {}

        def fields(self, row: int) -> tuple[str, ...]:
            return ()

        def windows(self, row: int, draws: Any) -> list[np.ndarray]:
            return [array[:, d.start[0]:d.start[0] + d.size[0]] for d in draws]

    stored: Any = Stored()
    rows: Any = [SimpleNamespace(index=0)]
    return kind.augment(whole(stored, rows, kind, options), options)


# ---- files

def test_kinect_text_is_read_and_who_moves_most_comes_first(tmp_path: Path) -> None:
    still, lively = moves(6, 25, 3, seed=1) * [0.01, 0.01, 0.01], moves(6, 25, 3, seed=2)
    frames = [{"72057594037931101": still[t], "72057594037931102": lively[t]} for t in range(6)]
    del frames[3]["72057594037931102"]
    path = kinect(tmp_path / "S001C002P003R002A013.skeleton", frames)
    sample = made(bodies=2).read([path])
    assert sample.array is not None and sample.array.shape == (3, 6, 50) and sample.header.spacing == (1 / 30, 1.0)
    people = sample.array.transpose(1, 2, 0).reshape(6, 2, 25, 3)
    np.testing.assert_allclose(people[:3, 0], lively[:3], atol=1e-6)
    np.testing.assert_allclose(people[:, 1], still, atol=1e-6)
    assert np.isnan(people[3, 0]).all() and not np.isnan(people[[0, 1, 2, 4, 5], 0]).any()
    (element,) = made().elements(path) or ()
    assert (element.label, element.subject) == ("A013", "P003")


def test_what_the_device_did_not_track_is_missing(tmp_path: Path) -> None:
    path = kinect(tmp_path / "a.skeleton", [{"1": moves(1, 25, 3)[0]}], tracked=0)
    with pytest.raises(DataError, match="nobody is seen"):
        made().read([path])


def test_openpose_json_is_read_with_its_label_and_the_surest_first(tmp_path: Path) -> None:
    places = np.stack([moves(5, 18, 2, seed=i) for i in range(3)], 1)
    path = openpose(tmp_path / "clip.json", places)
    kind = made(layout=None, bodies=2).fitted([path])
    assert kind.options.layout == "openpose" and kind.channels == 2
    sample = kind.read([path])
    assert sample.array is not None
    np.testing.assert_allclose(sample.array.transpose(1, 2, 0).reshape(5, 2, 18, 2), places[:, :2], atol=1e-6)
    (element,) = kind.elements(path) or ()
    assert element.label == "juggling"
    about = json.loads(path.read_text())
    about["data"][2]["skeleton"][0]["score"][4] = 0
    del about["data"][3]
    path.write_text(json.dumps(about))
    array = kind.read([path]).array
    assert array is not None and np.isnan(array[:, 2, 4]).all() and np.isnan(array[:, 3]).all() and np.isnan(array).sum() == 74


def test_forward_kinematics_gives_what_the_fields_code_gives() -> None:
    """Figures printed by `expmap2xyz_torch_cmu` of wei-mao-2019/LearnTrajDep at b81bef953a15, on the CPU, in their unit, 1/70
    of the data base's; they leave the root's own place and turn out, so both are 0 here."""
    channels = np.random.default_rng(0).normal(0, 0.5, (5, 117))
    channels[:, :6] = 0
    place = kinematics.joints(channels) / kinematics.METRES * 70
    at = {j: i for i, j in enumerate(kinematics.DISTINCT)}
    np.testing.assert_allclose(place[2, at[19]], [-283.78467, 114.428566, 196.70847], atol=2e-3)
    np.testing.assert_allclose(place[4, at[37]], [431.6115, -118.399, -424.85635], atol=2e-3)
    np.testing.assert_allclose(place[0, at[6]], [981.11896, -463.3762, -143.65106], atol=2e-3)
    np.testing.assert_allclose(np.abs(place).sum(), 136735.84, rtol=1e-5)


def test_the_root_carries_and_turns_the_whole_body() -> None:
    channels = np.random.default_rng(1).normal(0, 0.5, (1, 117))
    channels[:, :6] = 0
    moved = channels.copy()
    moved[0, :3], moved[0, 3:6] = (1, 2, 3), (0, np.pi / 2, 0)  # rows turn by the transpose: z to −x, x to z
    a, b = kinematics.joints(channels)[0], kinematics.joints(moved)[0]
    x, y, z = a.T
    np.testing.assert_allclose(b, np.stack([-z, y, x], 1) + kinematics.METRES * np.array([1, 2, 3]), atol=1e-12)


@pytest.mark.data
def test_a_real_walker_walks(data_root: Path) -> None:
    """Metres, y up: a head over the feet, a foot on the ground at any time and at rest there, and the pace of a walk."""
    folder = data_root / "cmu-mocap-actions"
    array = made(layout="cmu").read([folder / "train" / "walking" / "walking_1.txt.xz"]).array
    assert array is not None and guess_modality(folder) == "skeleton"
    assert len(Manifest.discover(folder, made(layout="cmu")).class_names) == 8
    place, of = array.transpose(1, 2, 0), LAYOUTS["cmu"].joints.index
    assert 1.3 < np.mean(place[:, of("head"), 1] - place[:, of("left ankle"), 1]) < 1.6
    lowest = place[:, :, 1].min(1)
    assert np.ptp(lowest) < 0.12
    speed = np.linalg.norm(np.diff(place[:, of("left toes")], axis=0), axis=1) * 120
    assert np.quantile(speed, 0.2) < 0.3 < 2 < speed.max()
    assert 0.9 < np.linalg.norm(place[-1, 0] - place[0, 0]) / (len(place) / 120) < 1.6


def test_layouts_are_trees_whose_mirror_keeps_bones() -> None:
    for name, layout in LAYOUTS.items():
        assert len(layout.parent) == len(layout) and len(set(layout.joints)) == len(layout)
        for joint in range(len(layout)):
            path = {joint}
            while (joint := layout.parent[joint]) not in path:
                path.add(joint)
            assert layout.parent[joint] == joint, name  # every walk ends at the root
        for joint, other in enumerate(layout.mirror):
            assert layout.mirror[other] == joint
            assert layout.mirror[layout.parent[joint]] == layout.parent[other] or (name, joint) in {("openpose", 0)}
    sides = [name.split()[0] for name in LAYOUTS["cmu"].joints]
    assert sides.count("left") == sides.count("right") == 11
    offset = np.array([kinematics.OFFSET.get(j, (0, 0, 0)) for j in kinematics.DISTINCT])
    for joint, other in enumerate(LAYOUTS["cmu"].mirror):  # sides are where they should be: x of the rest pose
        assert offset[joint, 0] * offset[other, 0] <= 0 or joint == other
    inner = [kinematics.DISTINCT.index(_distinct(kinematics.PARENT[j])) for j in kinematics.DISTINCT[1:]]
    assert list(LAYOUTS["cmu"].parent[1:]) == inner


def _distinct(joint: int) -> int:
    while joint not in kinematics.DISTINCT:
        joint = kinematics.PARENT[joint]
    return joint


def test_windows_cover_a_recording_once_each_step_and_end_with_it() -> None:
    assert files.starts(50, 100, 10) == [0] and files.starts(100, 100, 10) == [0]
    assert files.starts(125, 100, 10) == [0, 10, 20, 25]


def test_windows_are_samples_of_one_subject_on_one_side(tmp_path: Path) -> None:
    for action in ("walking", "running"):
        for split in ("train", "test"):
            (tmp_path / split / action).mkdir(parents=True)
            for i in range(3):
                mocap(tmp_path / split / action / f"{action}_{i}.txt.xz", 50, seed=len(split) * 10 + len(action) + 100 * i)
    assert guess_modality(tmp_path) == "skeleton"
    kind = made(layout="cmu", windows={"frames": 20, "step": 10})
    manifest = Manifest.discover(tmp_path, kind)
    assert len(manifest) == 12 * 4 and manifest.class_names == ("running", "walking")
    assert len({row.subject for row in manifest.rows}) == 12  # a file of the same name in the other folder is another one
    assert {(row.split, row.labels["class"]) for row in manifest.rows} == {(s, c) for s in ("train", "test") for c in (0, 1)}
    (tmp_path / "test" / "walking").rename(tmp_path / "test" / "strolling")
    for labels, classes in (("told", ("running", "walking")), ("folder", ("running", "strolling", "walking"))):
        whole = Manifest.discover(tmp_path, made(layout="cmu", labels=labels))
        assert whole.class_names == classes and len(whole) == 12 and len({row.subject for row in whole.rows}) == 12
    first, part = (kind.read([Path(f"{tmp_path}/train/walking/walking_0.txt.xz#frames/{at}")]) for at in (20, 30))
    assert part.array is not None and first.array is not None
    np.testing.assert_allclose(part.array[:, :10], first.array[:, 10:], atol=1e-6)
    assert part.array.shape == (3, 20, 28) and part.header.affine[0][2] == pytest.approx(30 / 120)
    written = np.load(kind.write(np.ones((20, 28), np.int64), part.header, tmp_path / "walking_0.txt.xz"))
    assert written.shape == (50, 28) and (written[30:] == 1).all() and (written[:30] == -1).all()


def test_labels_and_performers_of_ntu_names_divide_the_data(tmp_path: Path) -> None:
    for person in (1, 2, 5):
        for action in (7, 8):
            kinect(tmp_path / f"S001C001P{person:03d}R001A{action:03d}.skeleton",
                   [{"1": x} for x in moves(4, 25, 3, seed=10 * person + action)])
    (tmp_path / "labels.json").write_text('{"nothing": 1}')
    assert guess_modality(tmp_path) == "skeleton"
    manifest = Manifest.discover(tmp_path, made())
    assert manifest.class_names == ("A007", "A008") and len(manifest) == 6 and len({r.subject for r in manifest.rows}) == 3


@pytest.mark.parametrize("reason,damage", [
    ("truncated", lambda lines: lines[:40]), ("truncated", lambda lines: lines[:5]),
    ("bodies", lambda lines: [lines[0], "2", *lines[2:]]), ("bodies", lambda lines: [lines[0], "0", *lines[2:]]),
    ("bodies", lambda lines: ["2", *lines[1:]]), ("joints", lambda lines: [*lines[:3], "24", *lines[4:]]),
    ("joints", lambda lines: [*lines[:4], lines[4].rsplit(" ", 1)[0], *lines[5:]]),
    ("nan", lambda lines: [*lines[:4], "nan" + lines[4][lines[4].index(" "):], *lines[5:]]),
    ("unreadable", lambda lines: [*lines[:4], "zero" + lines[4][lines[4].index(" "):], *lines[5:]]),
    ("unreadable", lambda lines: ["three", *lines[1:]]), ("empty", lambda lines: ["0"])])
def test_broken_kinect_text_is_refused(tmp_path: Path, reason: str, damage: Any) -> None:
    path = kinect(tmp_path / "a.skeleton", [{"1": x} for x in moves(3, 25, 3)])
    path.write_text("\n".join(damage(path.read_text().splitlines())))
    with pytest.raises(DataError) as refused:
        made().read([path])
    assert refused.value.reason == reason


@pytest.mark.parametrize("reason,damage", [
    ("joints", lambda a: a["data"][1]["skeleton"][0]["pose"].pop()),
    ("nan", lambda a: a["data"][1]["skeleton"][0].update(pose=[float("nan")] * 36)),
    ("unreadable", lambda a: a["data"][1].pop("skeleton")), ("empty", lambda a: a["data"].clear()),
    ("frames", lambda a: a["data"][1].update(frame_index=10**10)),
    ("unreadable", lambda a: a["data"][1]["skeleton"][0].pop("score")), ("unreadable", lambda a: a.pop("data"))])
def test_broken_json_is_refused(tmp_path: Path, reason: str, damage: Any) -> None:
    path = openpose(tmp_path / "a.json", moves(3, 18, 2)[:, None])
    about = json.loads(path.read_text())
    damage(about)
    path.write_text(json.dumps(about))
    with pytest.raises(DataError) as refused:
        made(layout="openpose").read([path])
    assert refused.value.reason == reason


def test_broken_mocap_and_foreign_layouts_are_refused(tmp_path: Path) -> None:
    good = mocap(tmp_path / "a_1.txt", 4)
    lines = good.read_text().splitlines()
    packed = mocap(tmp_path / "b_1.txt.xz", 40)
    cases = {"joints": [line.rsplit(",", 18)[0] for line in lines], "truncated": [*lines[:-1], lines[-1][:300]],
             "nan": [*lines[:-1], lines[-1].replace(lines[-1].split(",")[5], "nan")], "empty": [""],
             "unreadable": ["x," * 116 + "y"]}
    for reason, text in cases.items():
        path = tmp_path / f"{reason}_1.txt"
        path.write_text("\n".join(text))
        with pytest.raises(DataError) as refused:
            made(layout="cmu").read([path])
        assert refused.value.reason == reason
    packed.write_bytes(packed.read_bytes()[:-200])
    nothing = tmp_path / "no_1.txt"
    for path, layout, reason in ((packed, "cmu", "truncated"), (good, "ntu", "layout"), (nothing, "cmu", "unreadable")):
        with pytest.raises(DataError) as refused:
            made(layout=layout).read([path])
        assert refused.value.reason == reason


# ---- views

def test_a_resized_window_is_torch_interpolation() -> None:
    array = torch.from_numpy(moves(20, 25, 3).transpose(2, 0, 1).astype(np.float32).copy())
    for frames in (7, 20, 33):
        view = seen(made(), array.numpy(), size=[frames])
        wanted = F.interpolate(array.permute(0, 2, 1), frames, mode="linear", align_corners=False).permute(0, 2, 1)
        torch.testing.assert_close(view.array[0], wanted)
        assert view.weight is not None and view.weight.all()


@settings(max_examples=20, deadline=None)
@given(frames=st.integers(8, 40), size=st.integers(4, 40), low=st.floats(0.1, 1.0))
def test_tokens_know_the_seconds_of_what_they_show(frames: int, size: int, low: float) -> None:
    """Content that tells its own time: the middle of a token lies in its recording where its source says."""
    period, kind = 1 / 30, made(segment=2)
    clock = np.broadcast_to((2.0 + period * np.arange(frames))[None, :, None], (3, frames, 25)).astype(np.float32)
    options: dict[str, Any] = {"crop": [low, 1.0], "least": 4, "size": [size], "count": 2}
    stream = kind.tokenizer().stream(seen(kind, clock, **options))
    assert stream.source is not None and stream.position is not None
    first, last = stream.content.amin((1, 2))[:, None], stream.content.amax((1, 2))[:, None]  # shown again beyond the ends
    inside = (stream.content.amin(-1) > first) & (stream.content.amax(-1) < last)
    middle = stream.content.unflatten(-1, (3, 2)).mean((-1, -2))
    torch.testing.assert_close(middle[inside], stream.source[..., 0][inside], atol=1e-3, rtol=1e-3)
    times = torch.arange(size // 2) * 2 * period + period / 2  # a view's own seconds tell nothing of how it was cut
    torch.testing.assert_close(stream.position[..., 0], times.repeat_interleave(25).expand(2, -1))


def test_a_mirrored_body_has_its_sides_exchanged_and_its_bones_kept() -> None:
    kind, array = made(), moves(4, 25, 3).transpose(2, 0, 1).astype(np.float32)
    array[:, 2, 4] = np.nan  # the left shoulder
    plain, view = seen(kind, array), seen(kind, array, flip=1.0)
    swap = list(LAYOUTS["ntu"].mirror)
    torch.testing.assert_close(view.array[0], plain.array[0][..., swap] * torch.tensor([-1.0, 1, 1])[:, None, None])
    assert view.weight is not None and view.weight[0, 0, 2, 8] == 0 and view.weight.sum() == 99
    length = [seen(kind, array, flip=p, show="bone").array[0].norm(dim=0) for p in (0.0, 1.0)]
    torch.testing.assert_close(length[1], length[0][..., swap])


def test_bones_and_motion_are_differences_and_gaps_stay_gaps() -> None:
    kind, array = made(), moves(5, 25, 3).transpose(2, 0, 1).astype(np.float32)
    array[:, 2, 20] = np.nan
    whole = np.nan_to_num(array)
    bone, motion = seen(kind, array, show="bone"), seen(kind, array, show="motion")
    assert bone.weight is not None and motion.weight is not None
    parent = list(LAYOUTS["ntu"].parent)
    torch.testing.assert_close(bone.array[0][:, 0], torch.from_numpy(whole[:, 0] - whole[:, 0][:, parent]))
    assert (bone.weight[0, 0, 2] == 0).nonzero()[:, 0].tolist() == [j for j, p in enumerate(parent) if 20 in (j, p)]
    torch.testing.assert_close(motion.array[0][:, 0], torch.from_numpy(whole[:, 1] - whole[:, 0]))
    assert motion.weight[0, 0, :, 20].tolist() == [1, 0, 0, 1, 0] and (motion.array[0, :, 1:3, 20] == 0).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_turning_keeps_distances_and_shear_keeps_times(seed: int) -> None:
    kind, array = made(), moves(4, 25, 3, seed).transpose(2, 0, 1).astype(np.float32)
    plain = seen(kind, array)
    for options in ({"rotate": 60.0}, {"rotate": [0.0, 180.0, 0.0]}):
        view = seen(kind, array, **options)
        before, after = (v.array[0].flatten(1).double() for v in (plain, view))
        torch.testing.assert_close(after.T @ after, before.T @ before, atol=1e-5, rtol=1e-5)
    upright = seen(kind, array, rotate=[0.0, 180.0, 0.0])
    torch.testing.assert_close(upright.array[:, 1], plain.array[:, 1])
    sheared = seen(kind, array, shear=0.5).array[0].flatten(1)
    fit = sheared.double() @ torch.linalg.pinv(plain.array[0].flatten(1).double())
    torch.testing.assert_close(fit.diagonal().float(), torch.ones(3), atol=1e-4, rtol=1e-4)
    assert (fit - torch.eye(3)).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_jitter_spoils_so_many_joints_and_no_other(drop: float) -> None:
    kind, array = made(), moves(4, 25, 3).transpose(2, 0, 1).astype(np.float32)
    plain, view = seen(kind, array), seen(kind, array, jitter={"joints": 6, "drop": drop})
    changed = (view.array != plain.array).any(1).any(1)[0]
    assert changed.sum() == 6 and view.weight is not None
    assert view.weight.sum() == 4 * (19 if drop else 25)


def test_one_picture_plane_turns_in_itself() -> None:
    kind, array = made(layout="openpose"), moves(4, 18, 2).transpose(2, 0, 1).astype(np.float32)
    view = seen(kind, array, rotate=90.0, count=1)
    torch.testing.assert_close(view.array.norm(dim=1), seen(kind, array).array.norm(dim=1))
    assert not torch.equal(view.array, seen(kind, array).array)


# ---- tokens

def stream_of(kind: Skeleton, frames: int = 12, rows: int = 3) -> tuple[View, Any]:
    view = kind.example((frames,), Rng.of(0, torch.arange(rows)))
    return view, kind.tokenizer().stream(view)


def test_a_token_is_a_joint_through_a_segment_and_folds_back() -> None:
    kind = made(bodies=2, segment=4)
    view, stream = stream_of(kind, 14)
    assert stream.lattice == (3, 50) and stream.content.shape == (3, 150, 12)
    at = 50 + 30  # second segment, sixth joint of the second person
    torch.testing.assert_close(stream.content[:, at], view.array[:, :, 4:8, 30].flatten(1))
    assert stream.kind["joint"][0, at] == 5 and stream.kind["body"][0, at] == 1
    torch.testing.assert_close(kind.tokenizer().fold(stream.content, stream.lattice), view.array[:, :, :12])
    assert (stream.structure.sum(-1) == 2).all() and stream.structure.unique(dim=1).shape[1] == 50


def test_a_missing_person_is_padding_that_changes_nobody_else() -> None:
    """The same person alone, and with an empty place for a second one; and beside batch mates."""
    two = made(bodies=2)
    chosen = ENCODERS["transformer"].model_validate({"width": 32, "depth": 2, "heads": 2, "sees": ["position", "structure"]})
    net = chosen.build(two.tokenizer(), two.axes, two.channels).eval()
    view, _ = stream_of(two)
    gone = view.array.clone()
    gone[..., 25:] = torch.nan
    options = two.ViewOptions(size=(12,))
    empty, other = (two.augment(replace(view, array=a), options) for a in (gone, gone.nan_to_num(7.0)))
    other = replace(other, weight=empty.weight)
    tokenizer, sees = two.tokenizer(), frozenset({"position", "structure"})
    first = tokenizer.stream(empty)
    assert first.valid.sum(1).tolist() == [75, 75, 75]
    with torch.no_grad():
        a, b = (net(tokenizer.stream(v).seen(sees)) for v in (empty, other))
        alone = net(tokenizer.stream(empty.select(torch.tensor([1]))).seen(sees))
        rest = net(first.take(first.valid[0].nonzero()[:, 0].expand(3, -1)).seen(sees))
    torch.testing.assert_close(a.summary["mean"], b.summary["mean"])
    torch.testing.assert_close(a.summary["mean"][1:2], alone.summary["mean"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(a.summary["mean"], rest.summary["mean"], atol=1e-5, rtol=1e-4)


def moved(view: View) -> View:
    affine = torch.eye(3).repeat(len(view), 1, 1) + torch.randn(len(view), 3, 3) * torch.tensor([1.0, 1, 0])[:, None]
    return replace(view, frame=Frame(affine, view.frame.shape, view.frame.spacing, view.frame.unit))


@pytest.mark.parametrize("name", ["mae", "simclr"])
def test_losses_know_nothing_of_where_windows_were_cut(name: str) -> None:
    recipe = recipes.load(f"skeleton/{name}", [f"encoder.transformer.{k}" for k in ("depth=1", "width=24", "heads=2")])
    assembly = Assembly(recipe).eval()
    views = {}
    for view, options in recipe.views.items():
        look = recipe.modality.example((16,), Rng.of(0, torch.arange(2 * options.count), view))
        views[view] = replace(look, name=view, item=torch.arange(2).repeat_interleave(options.count),
                              look=torch.arange(options.count).repeat(2))
    items = Items(torch.arange(2), torch.arange(2))
    with torch.no_grad():
        ours, theirs = (assembly(Batch(items, v), 0.5) for v in (views, {k: moved(v) for k, v in views.items()}))
    for line, a in ours.items():
        assert torch.equal(torch.as_tensor(a.total), torch.as_tensor(theirs[line].total)), line


@pytest.mark.parametrize("name", ["mae", "simclr"])
def test_a_step_of_each_recipe_trains_on_gaps_and_missing_people(name: str, tmp_path: Path) -> None:
    for i in range(4):
        frames = [{"1": x, "2": x + 1} if i % 2 else {"1": x} for x in moves(20, 25, 3, seed=i)]
        frames[i] = {}
        kinect(tmp_path / f"{i}.skeleton", frames)
    recipe = recipes.load(f"skeleton/{name}", ["encoder.transformer={width: 24, depth: 1, heads: 2}", "train.batch=4"])
    data = open_data(tmp_path, recipe.modality, "1,0,0", tmp_path / "cache", quiet=True)
    recipe = recipe.of(data.modality)
    assembly = Assembly(recipe)
    batch = next(iter(loader(data.cache, data.rows(), recipe, start=0, steps=1, workers=0)))
    loss = total(assembly(assembly.prepare(batch), 0.5))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in assembly.parameters())


def test_pretraining_and_classification_run_from_files_to_predictions(tmp_path: Path) -> None:
    for c, speed in enumerate((0.3, 1.5)):
        (tmp_path / "data" / f"class{c}").mkdir(parents=True)
        for i in range(6):
            places = moves(24, 18, 2, seed=i) + np.sin(speed * np.arange(24))[:, None, None]
            path = openpose(tmp_path / "data" / f"class{c}" / f"{c}{i}.json", places[:, None], label=f"class{c}")
    small = ["encoder.transformer={width: 24, depth: 1, heads: 2}", "views.x.size=[16]", "train.steps=2", "train.batch=4",
             "train.workers=0"]
    run = tmp_path / "run"
    meristem.pretrain("skeleton/mae", tmp_path / "data", run, small, cache=tmp_path / "cache", quiet=True)
    meristem.finetune("skeleton/classification", tmp_path / "data", tmp_path / "task", small, init=str(run),
                      cache=tmp_path / "cache", quiet=True)
    (table,) = meristem.predict(tmp_path / "task", path.parent.parent, tmp_path / "out", quiet=True)
    assert len(table.read_text().splitlines()) == 13


def test_what_skeletons_cannot_give_is_refused_before_a_file_is_read() -> None:
    for over, why in (("derived.f={frequency: {of: x}}", "frequencies"), ("views.x.crop=[0.9,0.5]", "least to the greatest"),
                      ("modality.skeleton.layout=halo", "layout"), ("objectives.pixels.masked.target={chamfer: {}}", "points")):
        with pytest.raises(RecipeError, match=why):
            recipes.load("skeleton/mae", [over])
    unet = recipes.load("skeleton/mae", ["encoder={unet: {}}", "masking.x.random.corruption=replace",
                                         "objectives.pixels.masked.predictor=dense"])
    with pytest.raises(RecipeError):
        Assembly(unet)


def test_the_modality_is_installed_and_follows_the_protocol() -> None:
    assert modality_class("skeleton") is Skeleton and isinstance(made(), Modality)
