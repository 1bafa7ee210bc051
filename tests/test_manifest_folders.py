"""Folders of numbered frames are samples; lists name them; a table says whose they are; a guess mistakes neither for images."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from npy_modality import Npy
from PIL import Image
from test_manifest import touch

from meristem import api
from meristem.errors import DataError, RecipeError
from meristem.modalities.base import modality_class, natural
from meristem.platform.data.cache import contents
from meristem.platform.data.manifest import Manifest, Row
from meristem.platform.data.splits import divide


class Film(Npy):
    name = "film"
    suffixes = (".mp4", ".avi", ".dcm")
    members = (".jpg", ".png")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERISTEM_KEY", "of the tests")


def frames(folder: str, n: int = 3, name: str = "{:05d}.jpg") -> list[str]:
    return [f"{folder}/{name.format(i)}" for i in range(n)]


def found(path: Path) -> Manifest:
    return Manifest.discover(path, Film())


def named(m: Manifest) -> dict[str, str]:
    """local -> class name, '' without."""
    return {r.local: m.class_names[r.labels["class"]] if r.labels else "" for r in m.rows}


# ---- folders of frames


@pytest.mark.parametrize("name", ["{:05d}.jpg", "frame_{:04d}.png", "img_{}.JPG"])
def test_a_folder_of_numbered_frames_is_one_sample(tmp_path: Path, name: str) -> None:
    touch(tmp_path, *frames("walk", name=name), *frames("run", name=name), "walk/notes.txt", "walk/._00001.jpg")
    m = found(tmp_path)
    assert [(r.local, r.paths) for r in m.rows] == [("run", (tmp_path / "run",)), ("walk", (tmp_path / "walk",))]
    assert len({r.subject for r in m.rows}) == 2 and not m.problems and not m.select(labelled=True)


def test_what_is_no_folder_of_frames(tmp_path: Path) -> None:
    touch(tmp_path, *frames("film"), "film/whole.mp4", "one/001.jpg", "words/a.jpg", "words/b.jpg", "words/c1.jpg")
    touch(tmp_path, *frames(".bin"))
    assert [r.local for r in found(tmp_path).rows] == ["film/whole.mp4"]
    with pytest.raises(DataError, match="no npy data"):
        Manifest.discover(tmp_path, Npy())


def test_most_frames_must_be_numbered(tmp_path: Path) -> None:
    touch(tmp_path, *frames("mostly", 4), "mostly/cover.jpg", *frames("half", 4), "half/a.jpg", "half/b.jpg")
    assert [r.local for r in found(tmp_path).rows] == ["mostly"]


def test_the_folder_itself(tmp_path: Path) -> None:
    m = found(touch(tmp_path, *frames("walk")) / "walk")
    assert [(r.local, r.paths) for r in m.rows] == [("walk", (tmp_path / "walk",))] and m.layout == "numbered files"


def test_class_and_split_folders_above(tmp_path: Path) -> None:
    touch(tmp_path, *(f for s in ("train", "test") for c in ("jump", "run", "sit") for i in range(2)
                      for f in frames(f"{s}/{c}/{c}_{s}{i}")), "train/run/film.mp4")
    m = found(tmp_path)
    assert len(m) == 13 and m.class_names == ("jump", "run", "sit")
    assert all(r.local.split("/")[:2] == [r.split, named(m)[r.local]] for r in m.rows)
    assert len({r.subject for r in m.rows}) == 13


def test_frames_of_people(tmp_path: Path) -> None:
    touch(tmp_path, *frames("sub-1/rest"), *frames("sub-1/stress"), *frames("sub-2/rest"), *frames("sub-2/stress"))
    rows = found(tmp_path).rows
    assert [r.subject == rows[0].subject for r in rows] == [True, True, False, False]


@pytest.mark.parametrize(("image", "mask"), [("JPEGImages/480p/{}", "Annotations/480p/{}"), ("frames/{}", "masks/{}"),
                                             ("train/rgb/{}", "train/annotations/{}"), ("{}/images", "{}/labels")])
def test_masks_in_folders(tmp_path: Path, image: str, mask: str) -> None:
    touch(tmp_path, *(f for s in ("cow", "dog", "elk") for f in frames(image.format(s))), mask.format("dog") + "/00000.png",
          *frames(mask.format("cow"), name="{:05d}.png"))
    m = found(tmp_path)
    assert {r.local: r.fields for r in m.rows} == {
        image.format("cow"): {"mask": tmp_path / mask.format("cow")}, image.format("elk"): {},
        image.format("dog"): {"mask": tmp_path / mask.format("dog")}}  # a mask of the first frame only is a mask
    assert not m.problems and len({r.subject for r in m.rows}) == 3


def test_masks_of_what_is_not_there(tmp_path: Path) -> None:
    m = found(touch(tmp_path, *frames("images/a"), *frames("masks/a"), *frames("masks/b")))
    assert [(p.reason, p.local) for p in m.problems] == [("label", "masks/b")]


def test_the_hash_is_of_the_frames(tmp_path: Path) -> None:
    touch(tmp_path / "x", *frames("a"), *frames("b"))
    touch(tmp_path / "y", *frames("a"), *frames("b"))
    one = found(tmp_path / "x").hash
    assert one == found(tmp_path / "y").hash
    (tmp_path / "y/a/00000.jpg").write_bytes(b"longer than it was before")
    assert found(tmp_path / "y").hash != one


# ---- digests


@given(st.lists(st.integers(0, 5000), unique=True))
def test_natural_order_is_of_the_numbers(numbers: list[int]) -> None:
    assert sorted((f"img_{n}.png" for n in numbers), key=natural) == [f"img_{n}.png" for n in sorted(numbers)]


def test_the_digest_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "d", *(f"a/f{i}.jpg" for i in (1, 2, 10)), "a/.hidden1.jpg", "a/notes.txt", *frames("b"))
    rows = found(tmp_path / "d").rows

    def digests() -> dict[int, str]:
        problems: list = []
        result = {i: d[0] for i, d in contents(rows, problems, 0, tmp_path / "memory.json", Film.members).items()}
        assert not problems
        return result

    one = digests()
    parts = [f"f{i}.jpg:{hashlib.sha256(f'a/f{i}.jpg'.encode()).hexdigest()}" for i in (1, 2, 10)]
    assert one[0] == hashlib.sha256("|".join(parts).encode()).hexdigest()
    (tmp_path / "d/a/notes.txt").write_text("no frame")
    with monkeypatch.context() as patched:
        patched.setattr("meristem.platform.data.cache._file_digest", lambda path: pytest.fail("read again"))
        assert digests() == one
    (tmp_path / "d/a/f2.jpg").write_bytes(b"a/f3.jpg")
    os.utime(tmp_path / "d/a/f2.jpg", ns=(1, 1))
    two = digests()
    assert two[0] != one[0] and two[1] == one[1]
    (tmp_path / "d/a/f2.jpg").rename(tmp_path / "d/a/f11.jpg")  # the same pictures in another order
    assert digests()[0] not in (one[0], two[0])


# ---- lists


@pytest.mark.parametrize("name", ["list.txt", "set.list", "annotations.csv"])
@pytest.mark.parametrize("separator", [" ", "\t", ",", ", ", "   "])
def test_lists_of_paths_and_labels(tmp_path: Path, name: str, separator: str) -> None:
    touch(tmp_path, "v/a.mp4", "v/b.mp4", "v/two words, 3.mp4", *frames("clip 1"))
    lines = [("v/a.mp4", "10"), ("v/b.mp4", "9"), ("v/two words, 3.mp4", "9"), ("clip 1", "10")]
    (tmp_path / name).write_text("\ufeff" + "\n".join(separator.join(line) for line in lines) + "\n\n")
    m = found(tmp_path / name)
    assert named(m) == dict(lines) and m.class_names == ("9", "10") and not m.problems
    assert len({r.subject for r in m.rows}) == 4 and m.rows[3].paths == (tmp_path / "clip 1",)


def test_lists_of_other_shapes(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b c.mp4", *frames("x/1", 4), *frames("y/1", 4))
    (tmp_path / "l.txt").write_text("a.mp4\r\nb c.mp4 \r\nx/1 4 jump\ny/1,4,run\n")
    m = found(tmp_path / "l.txt")
    assert named(m) == {"a.mp4": "", "b c.mp4": "", "x/1": "jump", "y/1": "run"} and not m.problems
    assert len({r.subject for r in m.rows}) == 4  # x/1 and y/1 are not one


def test_a_list_elsewhere_has_the_samples_place_as_its_root(tmp_path: Path) -> None:
    touch(tmp_path, "data/a.mp4", "data/b.mp4", "lists/none.txt")
    (tmp_path / "lists/l.txt").write_text(f"{tmp_path}/data/a.mp4 1\n../data/b.mp4 2\n")
    assert [r.paths[0].resolve() for r in found(tmp_path / "lists/l.txt").rows] == [tmp_path / f"data/{n}.mp4" for n in "ab"]


def test_wrong_lines_are_named_and_missing_files_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "empty/x.doc")
    (tmp_path / "l.txt").write_text("a.mp4 1\n\na.mp4 7 1\nnowhere 3\nb.mp4 1\nempty 1\n" + "word " * 3000)
    m = found(tmp_path / "l.txt")
    assert len(m) == 1
    assert [p.local for p in m.problems] == ["l.txt line 3", "l.txt line 4", "b.mp4", "empty", "l.txt line 7"]
    assert [p.reason for p in m.problems] == ["line", "line", "missing", "missing", "line"]
    assert "line 3" in m.problems[0].message and not any("nowhere" in p.message for p in m.problems)
    (tmp_path / "l.txt").write_text("nothing here\n")
    with pytest.raises(DataError, match=r"no film data.*line 1"):
        found(tmp_path / "l.txt")
    (tmp_path / "l.csv").write_text("speed,label\n3,4\n")
    with pytest.raises(DataError, match="no column `path`"):
        found(tmp_path / "l.csv")
    (tmp_path / "l.txt").write_bytes(b"a.mp4 caf\xe9\n")
    with pytest.raises(DataError, match="UTF-8"):
        found(tmp_path / "l.txt")


def test_a_folder_with_lists_for_its_splits(tmp_path: Path) -> None:
    touch(tmp_path, *(f"v/{i}.mp4" for i in range(6)), "unlisted.mp4")
    (tmp_path / "train.csv").write_text("v/0.mp4 1\nv/1.mp4 0\nv/2.mp4 1\n")
    (tmp_path / "val_list.txt").write_text("v/3.mp4 0\n")
    (tmp_path / "test.csv").write_text("file,action\nv/4.mp4,1\nv/5.mp4,\n")
    (tmp_path / "testing_notes.txt").write_text("nothing to see\n")
    m = found(tmp_path)
    assert {r.local: r.split for r in m.rows} == {"v/0.mp4": "train", "v/1.mp4": "train", "v/2.mp4": "train", "v/3.mp4": "val",
                                                  "v/4.mp4": "test", "v/5.mp4": "test"}
    assert named(m)["v/4.mp4"] == "1" and named(m)["v/5.mp4"] == "" and m.class_names == ("0", "1") and not m.problems
    assert found(tmp_path / "train.csv").select("train") == []  # one list, given by itself, declares no split
    (tmp_path / "testlist02.txt").write_text("v/0.mp4\n")
    with pytest.raises(DataError, match="more than one split"):
        found(tmp_path)


def test_texts_that_list_no_samples_are_left_alone(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "train.txt").write_text("a\nb\n")  # names, not paths
    (tmp_path / "test.txt").write_text("a.mp4 1\n")  # nothing to train on
    assert [r.local for r in found(tmp_path).rows] == ["a.mp4", "b.mp4"]


# ---- tables


@pytest.mark.parametrize("path", ["path", "file", "Filename", "video", "clip"])
@pytest.mark.parametrize("subject", ["subject", "Patient", "group", "source"])
@pytest.mark.parametrize("label", ["class", "label", "action"])
def test_names_of_columns(tmp_path: Path, path: str, subject: str, label: str) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", *frames("c"))
    rows = [[path, label, "fps", subject], ["a.mp4", "x", "25", "anna"], ["b.mp4", "y", "25", "bob"], ["c", "x", "30", "anna"]]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    m = found(tmp_path / "t.csv")
    assert named(m) == {"a.mp4": "x", "b.mp4": "y", "c": "x"} and [r.meta for r in m.rows] == [{"fps": f} for f in (25, 25, 30)]
    assert m.rows[0].subject == m.rows[2].subject != m.rows[1].subject
    assert subject in m.layout and [r.rank for r in m.rows] == [0, 1, 0]


def test_subject_wins_over_source(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "t.csv").write_text("source,file,subject\nweb,a.mp4,anna\nweb,b.mp4,bob\n")
    m = found(tmp_path / "t.csv")
    assert len({r.subject for r in m.rows}) == 2 and m.rows[0].meta == {"source": "web"} and "`subject`" in m.layout


def test_a_table_without_subjects(tmp_path: Path) -> None:
    touch(tmp_path, "sub-1/a.mp4", "sub-1/b.mp4", "x/c.mp4", "y/c.mp4")
    (tmp_path / "t.csv").write_text("path\nsub-1/a.mp4\nsub-1/b.mp4\nx/c.mp4\ny/c.mp4\n")
    a, b, c, d = (r.subject for r in found(tmp_path / "t.csv").rows)
    assert a == b and len({a, c, d}) == 3


# ---- folds


def test_folds_go_by_the_name_a_table_gives(tmp_path: Path) -> None:
    people = ["uwe", "eva", "kim", "ada", "lea", "bob", "joe"]
    touch(tmp_path, *(f"{i}.mp4" for i in range(14)))
    (tmp_path / "t.csv").write_text("file,source,label\n" + "".join(f"{i}.mp4,{people[i % 7]},x\n" for i in range(14)))
    m = found(tmp_path / "t.csv")
    for fold in range(3):
        place = {name: {fold: "test", (fold + 1) % 3: "val"}.get(i % 3, "train") for i, name in enumerate(sorted(people))}
        assert [r.split for r in divide(m, f"every:3:{fold}").rows] == [place[people[i % 7]] for i in range(14)]
    assert divide(m, "every:3") == divide(m, "every:3:0")


@given(st.integers(3, 9), st.integers(9, 40))
def test_every_subject_is_tested_in_one_fold(k: int, n: int) -> None:
    m = Manifest(tuple(Row(i, "", f"sub-{i}", (), f"{i:03d}", labels={"class": 0}) for i in range(n)), "made", "", "")
    folds = [[r.split for r in divide(m, f"every:{k}:{f}").rows] for f in range(k)]
    assert all(Counter(splits) == {"test": 1, "val": 1, "train": k - 2} for splits in zip(*folds, strict=True))


@pytest.mark.parametrize("split", ["every:5:5", "every:5:-1", "every:5:x", "every:5:1:2", "every:", "every:2:0"])
def test_folds_that_are_none(split: str) -> None:
    m = Manifest(tuple(Row(i, "", f"sub-{i}", (), f"{i}", labels={"class": 0}) for i in range(9)), "made", "", "")
    with pytest.raises(RecipeError, match="cannot be read"):
        divide(m, split)


# ---- which modality


@pytest.fixture
def guess(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr("meristem.platform.data.guess.modalities", lambda: ["image", "film", "volume"])
    monkeypatch.setattr("meristem.platform.data.guess.modality_class",
                        lambda name: Film if name == "film" else modality_class(name))
    return api.guess_modality


def paint(root: Path, folder: str, n: int, *, moving: bool, seed: int) -> None:
    """Pictures of a square: on its way, or anywhere."""
    rng = np.random.default_rng(seed)
    places = np.stack([np.linspace(0, 48, n), np.full(n, 20)], 1).astype(int) if moving else rng.integers(0, 48, (n, 2))
    (root / folder).mkdir(parents=True)
    for i, (y, x) in enumerate(places):
        picture = rng.integers(0, 30, (64, 64), dtype=np.uint8)
        picture[y:y + 16, x:x + 16] = 220
        Image.fromarray(picture).save(root / folder / f"{i:04d}.png")


def test_a_folder_of_films(tmp_path: Path, guess) -> None:  # type: ignore[no-untyped-def]
    assert guess(touch(tmp_path, "x/a.mp4", "x/b.avi", "x/thumb.jpg")) == "film"
    assert guess(tmp_path / "x/a.mp4") == "film"


def test_what_both_could_read_is_an_image(tmp_path: Path, guess) -> None:  # type: ignore[no-untyped-def]
    touch(tmp_path, "a.dcm", "b.dcm")
    assert guess(tmp_path) == "image"
    assert guess(touch(tmp_path, "c.mp4")) == "film"  # reads more of it


def test_frames_below_classes_are_no_images(tmp_path: Path, guess) -> None:  # type: ignore[no-untyped-def]
    touch(tmp_path, *(f for c in "ab" for i in range(3) for f in frames(f"{c}/{i}", 9)))
    assert guess(tmp_path) == "film"


def test_numbered_images_are_no_frames(tmp_path: Path, guess) -> None:  # type: ignore[no-untyped-def]
    touch(tmp_path, *frames("one/images", 9), *frames("one/masks", 9), *frames("short/a/x", 7), *frames("short/b/y", 7))
    touch(tmp_path, *frames("gaps/a/x", 20), *frames("gaps/b/y", 20), *frames("single/all", 30))
    for i in range(5, 20, 4):
        (tmp_path / f"gaps/a/x/{i:05d}.jpg").unlink()
    assert [guess(tmp_path / name) for name in ("one", "short", "gaps", "single")] == ["image"] * 4


@pytest.mark.parametrize("moving", [True, False])
def test_numbered_folders_are_classes_unless_neighbours_look_alike(tmp_path: Path, guess, moving: bool) -> None:  # type: ignore[no-untyped-def]
    for i, folder in enumerate(("train/cat", "train/cow", "test/cat", "test/cow")):
        paint(tmp_path, folder, 24, moving=moving, seed=i)
    assert guess(tmp_path) == ("film" if moving else "image")


def test_lists_are_guessed_by_what_they_name(tmp_path: Path, guess) -> None:  # type: ignore[no-untyped-def]
    touch(tmp_path, *frames("clip 1", 9), *frames("b/c", 9))
    for text, wanted in (("x/a b.mp4 1\nc.avi 2\n", "film"), ("a.nii.gz,1\n", "volume"), ("file,label\na.png,c\n", "image"),
                         ("clip 1 9 3\nb/c 9 4\n", "film"), ("b/c,4\n", "film")):
        (tmp_path / "l.txt").write_text(text)
        assert guess(tmp_path / "l.txt") == wanted
    (tmp_path / "l.txt").unlink()
    (tmp_path / "train.csv").write_text("/elsewhere/a.mp4 1\n")  # the list says it, not the pictures beside it
    assert guess(tmp_path) == "film"
    (tmp_path / "l.txt").write_text("a.xyz 1\n")
    with pytest.raises(DataError, match="no file of a known kind"):
        guess(tmp_path / "l.txt")


# ---- real data


@pytest.mark.data
def test_real_clips(data_root: Path, guess) -> None:  # type: ignore[no-untyped-def]
    table = data_root / "surv-camera-fight" / "clips.csv"
    m = found(table)
    assert len(m) == 213 and len({r.subject for r in m.rows}) == 34 and m.class_names == ("fight", "noFight")
    assert not m.problems and "`source`" in m.layout
    with table.open() as file:
        source = {r["file"]: r["source"] for r in csv.DictReader(file)}
    order = sorted(set(source.values()))
    for fold in range(5):
        tested = {r.local for r in divide(m, f"every:5:{fold}").rows if r.split == "test"}
        assert tested == {name for name, s in source.items() if order.index(s) % 5 == fold}
    assert named(found(table.parent)) == named(m)
    assert guess(table) == guess(table.parent) == guess(data_root / "davis2016-val") == "film"
    assert guess(data_root / "bccd") == guess(data_root / "wbc-dataset1") == "image"


@pytest.mark.data
def test_real_frames_and_masks(data_root: Path) -> None:
    m = found(data_root / "davis2016-val")
    assert [Path(r.local).name for r in m.rows] == ["car-shadow", "drift-chicane", "kite-surf", "motocross-jump"]
    assert [len(list(r.paths[0].iterdir())) for r in m.rows] == [40, 52, 50, 40] and not m.problems
    assert all(r.fields["mask"] == r.paths[0].parents[2] / "Annotations/480p" / r.paths[0].name for r in m.rows)
