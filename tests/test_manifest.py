"""Every layout becomes rows; names stay out of what is stored; splits and budgets are by subject."""

from __future__ import annotations

import csv
import json
import shutil
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from npy_modality import Npy

from meristem.errors import DataError, RecipeError
from meristem.platform.data.manifest import Manifest, Row
from meristem.platform.data.splits import budget, divide


class Picture(Npy):
    suffixes = (".png", ".bmp", ".jpg")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERISTEM_KEY", "of the tests")


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def locals_of(rows: list[Row] | tuple[Row, ...]) -> list[str]:
    return [r.local for r in rows]


# ---- layouts


def test_images_beside_labels(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.npy", "images/b.npy", "images/._b.npy", "labels/b.npy", "labels/lost.npy", "notes.txt")
    m = Manifest.discover(tmp_path, Npy())
    assert locals_of(m.rows) == ["images/a.npy", "images/b.npy"]
    assert [r.fields for r in m.rows] == [{}, {"mask": tmp_path / "labels/b.npy"}]
    assert [(p.reason, p.local) for p in m.problems] == [("label", "labels/lost.npy")]
    assert locals_of(m.select(labelled=True)) == ["images/b.npy"]


def test_nested_images_and_masks_with_another_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "train/images/s1/a.jpg", "train/masks/s1/a.png", "test/images/s2/a.jpg", "test/masks/s2/a.png")
    m = Manifest.discover(tmp_path, Picture())
    assert {r.local: (r.fields["mask"].relative_to(tmp_path).as_posix(), r.split) for r in m.rows} == {
        "test/images/s2/a.jpg": ("test/masks/s2/a.png", "test"), "train/images/s1/a.jpg": ("train/masks/s1/a.png", "train")}
    assert not m.problems


def test_msd_folders_without_a_description(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a.npy", "labelsTr/a.npy", "imagesTs/b.npy")
    m = Manifest.discover(tmp_path, Npy())
    assert {r.local: (r.labelled, r.split) for r in m.rows} == {"imagesTr/a.npy": (True, ""), "imagesTs/b.npy": (False, "test")}


def test_pairs_in_one_folder(tmp_path: Path) -> None:
    touch(tmp_path, *(f"set/{i:03d}.{s}" for i in range(9) for s in ("bmp", "png")), "set/009.bmp", "set/010.png")
    m = Manifest.discover(tmp_path, Picture())
    assert [r.labelled for r in m.rows] == [True] * 9 + [False]
    assert all(r.paths[0].suffix == ".bmp" for r in m.rows)
    assert [p.local for p in m.problems] == ["set/010.png"]


def test_two_formats_that_do_not_pair_are_all_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "b.png", "c.png")
    m = Manifest.discover(tmp_path, Picture())
    assert len(m) == 4 and not m.select(labelled=True) and not m.problems


def test_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{s}/{c}/{i}.jpg" for s in ("train", "test") for c in ("cat", "dog", "cow") for i in range(3)))
    m = Manifest.discover(tmp_path, Picture())
    assert m.class_names == ("cat", "cow", "dog")
    assert all(m.class_names[r.labels["class"]] == Path(r.local).parts[1] and r.split == Path(r.local).parts[0] for r in m.rows)
    assert len({r.subject for r in m.rows}) == 18  # cat/0 and dog/0 are not one subject


@pytest.mark.parametrize("files", [[f"pat{i}/{t}.npy" for i in range(5) for t in ("t1", "t2")],
                                   [f"pat{i}/pat{i}_{t}.npy" for i in range(5) for t in ("t1", "t2")],
                                   [f"pat{i}/scan.npy" for i in range(5)],
                                   [f"sub-{i}/anat/{t}.npy" for i in range(5) for t in ("t1", "t2")]])
def test_a_folder_of_patients_is_not_a_folder_of_classes(tmp_path: Path, files: list[str]) -> None:
    m = Manifest.discover(touch(tmp_path, *files), Npy())
    assert m.class_names == () and not m.select(labelled=True)
    by_folder = {(Path(r.local).parts[0], r.subject) for r in m.rows}
    assert len(by_folder) == len({subject for _, subject in by_folder}) == 5


def test_subject_of_a_bids_name(tmp_path: Path) -> None:
    m = Manifest.discover(touch(tmp_path, "sub-01_ses-1_T1w.npy", "sub-01_ses-2_T1w.npy", "sub-02_T1w.npy"), Npy())
    assert len({r.subject for r in m.rows}) == 2 and m.rows[0].subject == m.rows[1].subject


def test_msd(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a.npy", "labelsTr/a.npy", "imagesTr/b.npy", "imagesTs/c.npy")
    about = {"modality": {"0": "FLAIR", "1": "T1"}, "labels": {"0": "background", "2": "core", "1": "edema"},
             "training": [{"image": f"./imagesTr/{n}.npy", "label": f"./labelsTr/{n}.npy"} for n in "ab"],
             "test": ["./imagesTs/c.npy"]}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    m = Manifest.discover(tmp_path, Npy())
    assert m.layout == "MSD" and m.mask_names == ("background", "edema", "core") and m.channel_names == ("FLAIR", "T1")
    assert [(r.local, r.labelled, r.split) for r in m.rows] == [("imagesTr/a.npy", True, ""), ("imagesTs/c.npy", False, "test")]
    assert [(p.reason, p.local) for p in m.problems] == [("missing", "labelsTr/b.npy")]
    assert Manifest.discover(tmp_path / "dataset.json", Npy()) == m


def test_nnunet(tmp_path: Path) -> None:
    touch(tmp_path, *(f"imagesTr/{c}_{i:04d}.npy" for c in ("x_1", "x_2") for i in range(2)), "imagesTr/x_3_0000.npy",
          "labelsTr/x_1.npy", "labelsTr/x_9.npy", "imagesTs/y_0000.npy", "imagesTs/y_0001.npy")
    about = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "tumour": 1, "whole": [1, 2]},
             "numTraining": 3, "file_ending": ".npy"}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    m = Manifest.discover(tmp_path, Npy())
    assert m.layout == "nnU-Net" and m.mask_names == ("background", "tumour")
    assert [[p.name for p in r.paths] for r in m.rows] == [[f"{c}_{i:04d}.npy" for i in range(2)] for c in ("x_1", "x_2", "y")]
    assert [(r.labelled, r.split) for r in m.rows] == [(True, ""), (False, ""), (False, "test")]
    assert sorted((p.reason, p.local) for p in m.problems) == [
        ("channel", "imagesTr/x_3_0000.npy"), ("label", "labelsTr/x_9.npy")]


def test_csv(tmp_path: Path) -> None:
    touch(tmp_path, "d/a.npy", "d/b.npy", "d/c.npy", "m/a.npy")
    table = [["path", "subject", "split", "mask", "label", "age", "site"],
             ["d/a.npy", "anna", "Training", "m/a.npy", "10", "44", "north"],
             ["d/b.npy", "anna", "train", "", "9", "", "south"],
             ["d/c.npy", "bob", "", "", "", "50.5", ""], ["d/none.npy", "eve", "", "", "9", "", ""]]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    m = Manifest.discover(tmp_path / "list.csv", Npy())
    assert m.class_names == ("9", "10")  # numbers in the order of their size
    assert [r.labels for r in m.rows] == [{"class": 1}, {"class": 0}, {}]
    assert [r.split for r in m.rows] == ["train", "train", ""]
    assert m.rows[0].meta == {"age": 44.0, "site": "north"} and m.rows[2].meta == {"age": 50.5}
    assert m.rows[0].subject == m.rows[1].subject != m.rows[2].subject
    assert [p.reason for p in m.problems] == ["missing"]


def test_csv_with_channels_and_mistakes(tmp_path: Path) -> None:
    touch(tmp_path, "a0.npy", "a1.npy")
    (tmp_path / "t.csv").write_text("path_1,path_0\na1.npy,a0.npy\n")
    assert [p.name for p in Manifest.discover(tmp_path / "t.csv", Npy()).rows[0].paths] == ["a0.npy", "a1.npy"]
    (tmp_path / "t.csv").write_text("path,split\na0.npy,holdout\n")
    with pytest.raises(DataError, match=r"line 2.*none of train"):
        Manifest.discover(tmp_path / "t.csv", Npy())
    (tmp_path / "t.csv").write_text("image\na0.npy\n")
    with pytest.raises(DataError, match="no column `path`"):
        Manifest.discover(tmp_path / "t.csv", Npy())


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", train_images=np.zeros((3, 4, 4), np.uint8), train_labels=np.array([[1], [0], [1]]),
             test_images=np.zeros((2, 4, 4), np.uint8), test_labels=np.array([[0], [2]]))
    m = Manifest.discover(tmp_path, Npy())
    assert m == Manifest.discover(tmp_path / "set.npz", Npy())
    assert [(r.local, r.labels["class"], r.split) for r in m.rows][2:4] == [
        ("set.npz#train_images/2", 1, "train"), ("set.npz#test_images/0", 0, "test")]
    assert m.class_names == ("0", "1", "2") and len({r.subject for r in m.rows}) == 5


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no npy data"):
        Manifest.discover(tmp_path, Npy())
    with pytest.raises(DataError, match="no data at"):
        Manifest.discover(tmp_path / "nowhere", Npy())


# ---- identity


def test_names_stay_out_of_the_table(tmp_path: Path) -> None:
    touch(tmp_path, "sub-CANARY/CANARY_scan.npy", "sub-other/scan.npy")
    m = Manifest.discover(tmp_path, Npy())
    assert "CANARY" not in json.dumps(m.table()) + repr(m) + repr(m.rows[0])


def test_pseudonyms_are_keyed_and_the_split_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"images/{i}.npy" for i in range(40)), *(f"labels/{i}.npy" for i in range(40)))
    a = Manifest.discover(tmp_path, Npy())
    monkeypatch.setenv("MERISTEM_KEY", "another")
    b = Manifest.discover(tmp_path, Npy())
    assert {r.case for r in a.rows}.isdisjoint(r.case for r in b.rows) and a.key_id != b.key_id and a.hash == b.hash
    assert [r.split for r in divide(a).rows] == [r.split for r in divide(b).rows]
    assert locals_of(budget(a.rows, 7)) == locals_of(budget(b.rows, 7))


def test_the_key_is_made_once_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERISTEM_KEY")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    data = touch(tmp_path / "data", "a.npy")
    assert Manifest.discover(data, Npy()).rows == Manifest.discover(data, Npy()).rows
    file, = (tmp_path / "config" / "meristem").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_hash_is_of_the_data_not_of_its_place(tmp_path: Path) -> None:
    a = touch(tmp_path / "a", "images/x.npy", "images/y.npy", "labels/x.npy")
    b = tmp_path / "elsewhere" / "b"
    shutil.copytree(a, b)
    ma, mb = Manifest.discover(a, Npy()), Manifest.discover(b, Npy())
    assert ma.hash == mb.hash and [r.case for r in ma.rows] == [r.case for r in mb.rows]
    (b / "labels/x.npy").rename(b / "labels/y.npy")
    assert Manifest.discover(b, Npy()).hash != ma.hash


# ---- splits and budgets


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    subjects = draw(st.integers(5, 60))
    rows: list[Row] = []
    for s in range(subjects):
        label = draw(st.sampled_from([None, 0, 1, 2]))
        for _ in range(draw(st.integers(1, 3))):
            i = len(rows)
            rows.append(Row(i, f"case-{i}", f"sub-{s}", (), f"{s:03d}/{i}", labels={} if label is None else {"class": label}))
    return Manifest(tuple(rows), "made", "", "")


@settings(deadline=None, max_examples=60)
@given(manifests(), st.sampled_from(["auto", "0.7,0.1,0.2", "every:5", "1,0,0"]), st.integers(0, 5))
def test_a_subject_is_in_one_split_only(m: Manifest, split: str, seed: int) -> None:
    divided = divide(m, split, seed)
    seen: dict[str, set[str]] = {}
    for r in divided.rows:
        seen.setdefault(r.subject, set()).add(r.split)
    assert all(len(s) == 1 and s <= {"train", "val", "test"} for s in seen.values())
    assert divided == divide(m, split, seed)
    shuffled = Manifest(tuple(reversed(m.rows)), "made", "", "")
    assert {r.index: r.split for r in divide(shuffled, split, seed).rows} == {r.index: r.split for r in divided.rows}
    labelled = {r.subject for r in m.rows if r.labelled}
    if labelled:
        assert all(r.split == "train" for r in divided.rows if not r.labelled)
    if split == "auto":
        many = labelled or seen.keys()
        count = Counter(next(iter(seen[s])) for s in many)
        assert all(abs(count[name] - f * len(many)) <= 1 for name, f in (("train", .6), ("val", .2), ("test", .2)))
        assert len(many) < 5 or (min(count.values()) >= 1 and len(count) == 3)


@settings(deadline=None, max_examples=60)
@given(manifests(), st.integers(0, 5))
def test_budgets_are_nested_and_by_subject(m: Manifest, seed: int) -> None:
    subjects = {r.subject for r in m.rows if r.labelled}
    smaller: set[int] = set()
    for n in range(1, len(subjects) + 1):
        rows = budget(m.rows, n, seed)
        assert len({r.subject for r in rows}) == n and all(r.labelled for r in rows)
        chosen = {r.index for r in rows}
        assert smaller < chosen
        assert all(r.index in chosen for r in m.rows if r.labelled and r.subject in {x.subject for x in rows})
        smaller = chosen
    if subjects:
        assert budget(m.rows, 1.0, seed) == [r for r in m.rows if r.labelled]


def _classes(counts: dict[int, int]) -> Manifest:
    labels = [c for c, n in counts.items() for _ in range(n)]
    return Manifest(tuple(Row(i, f"case-{i}", f"sub-{i}", (), f"{i:05d}", labels={"class": c}) for i, c in enumerate(labels)),
                    "made", "", "")


def test_splits_and_budgets_are_stratified_by_class() -> None:
    m = _classes({0: 100, 1: 50, 2: 10})
    divided = divide(m, "0.6,0.2,0.2", seed=3)
    for c, n in ((0, 100), (1, 50), (2, 10)):
        count = Counter(r.split for r in divided.rows if r.labels["class"] == c)
        assert all(abs(count[s] - f * n) <= 1.5 for s, f in (("train", .6), ("val", .2), ("test", .2)))
    count = Counter(r.labels["class"] for r in budget(m.rows, 32))
    assert count == {0: 20, 1: 10, 2: 2}


def test_seeds_differ() -> None:
    m = _classes({0: 40})
    assert divide(m, seed=0) != divide(m, seed=1) and budget(m.rows, 5, 0) != budget(m.rows, 5, 1)


def test_stratified_by_foreground_volume() -> None:
    m = Manifest(tuple(Row(i, "", f"sub-{i}", (), f"{i:03d}", {"mask": Path("m")}) for i in range(40)), "made", "", "")
    volumes = {i: float(i % 4) * 100 for i in range(40)}
    count = Counter((r.split, volumes[r.index]) for r in divide(m, "0.5,0.25,0.25", 0, volumes).rows)
    assert all(abs(count["test", v] - 2.5) <= 1 and abs(count["train", v] - 5) <= 1 for v in (0.0, 100.0, 200.0, 300.0))


def test_every_k_counts_labelled_subjects_by_name() -> None:
    rows = [Row(i, "", f"sub-{i}", (), f"{9 - i}", labels={} if i == 4 else {"class": 0}) for i in range(10)]
    divided = divide(Manifest(tuple(rows), "made", "", ""), "every:3")
    assert [r.split for r in reversed(divided.rows)] == [
        "test", "val", "train", "test", "val", "train", "train", "test", "val", "train"]  # the sixth has no label


def test_declared_splits_win() -> None:
    rows = [Row(i, "", f"sub-{i // 2}", (), f"{i:03d}", labels={"class": 0}, split="test" if i in (0, 7) else "")
            for i in range(40)]
    divided = divide(Manifest(tuple(rows), "made", "", ""))
    assert [r.index for r in divided.rows if r.split == "test"] == [0, 1, 6, 7]  # with the subjects' other rows; no others
    assert {r.split for r in divided.rows} == {"train", "val", "test"}
    torn = [Row(i, "", "sub-a", (), str(i), split=s) for i, s in enumerate(("train", "test"))]
    with pytest.raises(DataError, match="more than one split"):
        divide(Manifest(tuple(torn), "made", "", ""))


@pytest.mark.parametrize("split", ["0.5,0.5", "a,b,c", "every:x", "every:2", "-1,1,1", ""])
def test_a_split_that_cannot_be_read(split: str) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        divide(_classes({0: 10}), split)


@pytest.mark.parametrize("amount", [0, 11, 0.0, 1.5])
def test_an_impossible_budget(amount: float) -> None:
    with pytest.raises(RecipeError, match="label budget"):
        budget(_classes({0: 10}).rows, amount)


@pytest.mark.data
def test_real_layouts(data_root: Path) -> None:
    class Nifti(Npy):
        suffixes = (".nii.gz", ".nii")

    m = divide(Manifest.discover(data_root / "msd-task04-hippocampus", Nifti()), "every:5")
    assert len(m) == 209 and len(m.select(labelled=True)) == 208 and not m.problems
    assert Counter(r.split for r in m.rows) == {"train": 125, "val": 42, "test": 42}
    cells = Manifest.discover(data_root / "wbc-dataset1", Picture())
    assert len(cells.select(labelled=True)) == 300 and not cells.problems
    chest = Manifest.discover(data_root / "pneumoniamnist", Picture())
    assert Counter((r.split, r.labels["class"]) for r in chest.rows) == {
        ("train", 0): 1214, ("train", 1): 3494, ("val", 0): 135, ("val", 1): 389, ("test", 0): 234, ("test", 1): 390}
