"""Points of sequences: read from files, marked on lattices, carried by features and scored."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from torch import Tensor

import meristem
from meristem.errors import DataError
from meristem.modalities.video.points import mark, read_points
from meristem.modalities.video.video import Video
from meristem.platform.assembly import Assembly
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data, open_data
from meristem.platform.evaluation.metrics import pck
from meristem.platform.evaluation.results import Results
from meristem.tasks.base import TaskRecipe
from meristem.tasks.finetune import resolve
from meristem.tasks.propagation import KeypointObjective, Keypoints, dots, points_of

T, H, W = 9, 48, 96
NAMES = [f"{t:05d}" for t in range(1, T + 1)]  # JHMDB counts frames from 1


def moving(drift: float = 4.0) -> np.ndarray:
    """(T, 3, 2) x, y: points 0 and 1 move apart along rows, point 2 is hidden at first and in frame 5."""
    points = np.array([[[20 + drift * t, 12], [76 - drift * t, 36], [44, 20]] for t in range(T)], float)
    points[[0, 5], 2] = np.nan
    return points


def write_csv(file: Path, points: np.ndarray, names: list[str] = NAMES) -> Path:
    with file.open("w", newline="") as text:
        csv.writer(text).writerows([("frame", "point", "x", "y"), *(
            (names[t], k, *points[t, k]) for t, k in np.argwhere(np.isfinite(points[..., 0])))])
    return file


def write_npy(file: Path, points: np.ndarray) -> Path:
    np.save(file, points)
    return file


def write_mat(file: Path, points: np.ndarray) -> Path:
    savemat(file, {"pos_img": points.T + 1, "pos_world": np.zeros((2, 3))})
    return file


WRITERS: dict[str, Callable[[Path, np.ndarray], Path]] = {".csv": write_csv, ".npy": write_npy, ".mat": write_mat}


# ---- files and lattices

def test_all_kinds_of_files_say_the_same(tmp_path: Path) -> None:
    points = moving() + 0.25
    for suffix, write in WRITERS.items():
        np.testing.assert_allclose(read_points(write(tmp_path / f"joint_positions{suffix}", points), NAMES), points, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([(4, 5), (9, 7), (12, 20)]), count=st.integers(1, 12))
def test_every_point_has_the_nearest_element_that_no_earlier_one_took(seed: int, size: tuple[int, int], count: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.uniform(-2, 12, (3, count, 2)).round(1)
    points[rng.random((3, count)) < 0.2] = np.nan
    labels = mark(points, (10, 11), size)
    for t in range(3):
        expected, taken = np.zeros(size, int), set()
        for k, (x, y) in enumerate(points[t]):
            if not (-0.5 <= x < 10.5 and -0.5 <= y < 9.5):
                continue
            row, column = (y + 0.5) * size[0] / 10 - 0.5, (x + 0.5) * size[1] / 11 - 0.5
            distance = {(i, j): np.hypot(i - row, j - column) for i in range(size[0]) for j in range(size[1])
                        if (i, j) not in taken}
            (place,) = np.argwhere(labels[t] == k + 1)
            assert distance[tuple(place)] == pytest.approx(min(distance.values()))
            taken.add(tuple(place))
            expected[tuple(place)] = k + 1
        assert (labels[t] == (expected if taken else -1)).all()


def test_points_come_back_from_their_marks() -> None:
    points = moving()
    np.testing.assert_array_equal(points_of(mark(points, (H, W), (H, W)))[..., ::-1], points)
    labels = np.zeros((2, 4, 4), int)
    labels[1, :2] = 3
    with pytest.raises(DataError, match="of regions, not of points"):
        points_of(labels)


def test_pictures_show_squares_where_points_are() -> None:
    points = moving()[..., ::-1]
    labels = dots(points, (T, 480, 960))
    assert (labels[5] == 3).sum() == 0 and (labels[4] == 3).sum() == 25 ** 2
    assert labels[4, 20, 44] == 3
    assert (dots(np.full((1, 2, 2), np.nan), (1, 4, 4)) == -1).all()


def wrong(folder: Path) -> Iterator[tuple[Path, str]]:
    def table(*lines: str) -> Path:
        file = folder / f"{len(list(folder.iterdir()))} Erika Muster.csv"
        file.write_text("\n".join(lines))
        return file

    def array(value: object, suffix: str = "npy") -> Path:
        file = folder / f"{len(list(folder.iterdir()))} Erika Muster.{suffix}"
        np.save(file.with_suffix(".npy"), value, allow_pickle=True)
        return file.with_suffix(".npy").rename(file)

    head = "frame,point,x,y"
    yield array(moving()[:-1]), "points of 8 frames, the video has 9"
    yield array(moving().transpose(0, 2, 1)), "not numbers"
    yield array(moving()[:, 0]), "not numbers"
    yield array(moving()[:, :0]), "0 points"
    yield array(moving().astype(str)), "not numbers"
    yield array(np.array([{}])), "cannot be read"
    yield array(moving(), "mat"), "cannot be read"
    yield array(np.where(moving() > 70, np.inf, moving())), "infinity"
    yield array(moving(), "txt"), "neither a folder of pictures nor a file of points"
    yield table("frame,point,x", "1,0,2"), "lacks y"
    yield table(head, "1,0,2,3", "12,0,2,3"), "line 3 of the points belongs to no frame"
    yield table(head, "1,nose,2,3"), "line 2 of the points: the point is not a number"
    yield table(head, "1,0,2,left"), "line 2 of the points: x or y is not a number"
    yield table(head, "1,0,2,3", "00001,0,4,5"), "line 3 of the points is the second"
    yield table(head), "0 points"
    yield write_mat(folder / "Erika Muster.mat", moving().transpose(0, 2, 1)), "not numbers"
    savemat(folder / "Erika Muster 2.mat", {"other": np.zeros(3)})
    yield folder / "Erika Muster 2.mat", "no `pos_img`"


def test_files_that_cannot_be_points_are_refused_without_names(tmp_path: Path) -> None:
    for file, reason in wrong(tmp_path):
        with pytest.raises(DataError, match=reason) as caught:
            read_points(file, NAMES)
        assert "Muster" not in str(caught.value)
    with pytest.raises(DataError, match="two frames have one number"):
        read_points(write_csv(tmp_path / "a.csv", moving()), ["a1", "b1", *NAMES[2:]])
    with pytest.raises(DataError, match="do not fit"):
        mark(np.zeros((1, 5, 2)), (8, 8), (2, 2))


# ---- the task

SMALL = ["modality.video.patch=[2,8,8]", "encoder={transformer: {width: 24, depth: 2, heads: 2}}", "views.x.size=[2,32,32]",
         "task.keypoints.size=48", "task.keypoints.radius=3", "task.keypoints.context=2"]
EXACT = ["task.keypoints.top_k=1", "task.keypoints.strongest=1"]


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sequences, whose points each kind of file tells: two coloured dots of 8×8 that move a token a frame over grey."""
    root = tmp_path_factory.mktemp("data")
    lines = ["path,mask"]
    for i, (suffix, write) in enumerate(WRITERS.items()):
        points = np.array([[[12 + 8 * t, 12], [84 - 8 * t, 36]] for t in range(T)], float)
        (root / f"film{i}").mkdir()
        for name, places in zip(NAMES, points.astype(int), strict=True):
            frame = np.full((H, W, 3), 90, np.uint8)
            for (x, y), colour in zip(places, ((250, 20 * i, 0), (0, 40, 250)), strict=True):
                frame[y - 4:y + 4, x - 4:x + 4] = colour
            Image.fromarray(frame).save(root / f"film{i}" / f"{name}.png")
        write(root / f"points{i}{suffix}", points)
        lines.append(f"film{i},points{i}{suffix}")
    (root / "list.csv").write_text("\n".join(lines))
    return root


class Colours(KeypointObjective):
    """Mean colours of tokens instead of an encoder."""

    def features(self, assembly: Assembly, data: Data, row: Row, places: range) -> Iterator[Tensor]:
        frames = torch.from_numpy(data.cache.array(row.index).astype(np.float32))[:, places.start:].transpose(0, 1)
        yield from F.avg_pool2d(frames - 90, frames.shape[2] // 6) + 1e-3


class Still(KeypointObjective):
    """Every frame looks like the first."""

    def features(self, assembly: Assembly, data: Data, row: Row, places: range) -> Iterator[Tensor]:
        yield from torch.eye(72).reshape(72, 6, 12).expand(len(places), -1, -1, -1)


def opened(sequences: Path, *changes: str) -> tuple[TaskRecipe, Data, Assembly]:
    recipe = resolve("keypoints", "video", [*SMALL, *EXACT, *changes])
    torch.manual_seed(0)
    return (recipe, open_data(sequences / "list.csv", recipe.modality, "0,0,1", sequences / "cache", quiet=True),
            recipe.assemble(2).eval())


def test_resized_stores_keep_every_point(sequences: Path) -> None:
    _, data, _ = opened(sequences)
    _, small, _ = opened(sequences, "modality.video.store=decoded", "modality.video.resize=12")
    for row, same in zip(data.rows("test"), small.rows("test"), strict=True):
        fine, coarse = (points_of(d.cache.field(r.index, "mask")) for d, r in ((data, row), (small, same)))
        np.testing.assert_array_equal(fine, np.array([[[12, 12 + 8 * t], [36, 84 - 8 * t]] for t in range(T)]))
        assert small.cache.header(same.index).shape == (3, T, 12, 24)
        assert np.abs(coarse - ((fine + 0.5) / 4 - 0.5)).max() <= 0.5


@pytest.mark.parametrize("changes", [(), ("modality.video.store=decoded", "modality.video.resize=24")])
def test_points_follow_colours_and_stay_without(sequences: Path, changes: tuple[str, ...]) -> None:
    recipe, data, assembly = opened(sequences, *changes)
    assert isinstance(recipe.task, Keypoints)
    rows, scope, kept = data.rows("test"), recipe.task.scope(data), {}
    cases = Colours(recipe.task).test(assembly, data, rows, scope, lambda row, points: kept.__setitem__(row.case, points))
    assert [case.metrics for case in cases] == [{"PCK@0.1": {"points": 1.0}, "PCK@0.2": {"points": 1.0}}] * 3
    still = Still(recipe.task).test(assembly, data, rows, scope)
    for row, case in zip(rows, still, strict=True):
        truth = points_of(data.cache.field(row.index, "mask"))
        expected = pck(np.repeat(truth[:1], T, 0), truth, 0.1)
        assert expected < 0.5 and abs(case.metrics["PCK@0.1"]["points"] - expected) <= 1 / (T - 1)
        step = data.cache.header(row.index).shape[2] / 6
        assert np.abs(kept[row.case] - truth).max() <= step / 2  # a point is found to a token's centre


def test_a_point_that_the_first_frame_lacks_is_not_scored(sequences: Path, tmp_path: Path) -> None:
    points = np.array([[[12 + 8 * t, 12], [84 - 8 * t, 36], [50, 20]] for t in range(T)], float)
    points[0] = points[1, 2] = np.nan
    (tmp_path / "list.csv").write_text(f"path,mask\n{sequences / 'film0'},{write_npy(tmp_path / 'points.npy', points)}\n")
    recipe = resolve("keypoints", "video", [*SMALL, *EXACT])
    data = open_data(tmp_path / "list.csv", recipe.modality, "0,0,1", tmp_path, quiet=True)
    assembly, (row,) = recipe.assemble(2), data.rows("test")
    assert isinstance(recipe.task, Keypoints)
    found = Colours(recipe.task).carried(assembly, data, row)
    assert np.isnan(found[0]).all() and np.isnan(found[:, 2]).all() and np.isfinite(found[1:, :2]).all()
    (case,) = Colours(recipe.task).test(assembly, data, [row], recipe.task.scope(data))
    assert case.metrics["PCK@0.1"] == {"points": 1.0}


def test_what_cannot_be_scored_is_refused(sequences: Path, tmp_path: Path) -> None:
    recipe = resolve("keypoints", "video", SMALL)
    regions = tmp_path / "regions"
    regions.mkdir()
    mask = np.zeros((H, W), np.uint8)
    mask[:8], mask[20:] = 1, 2
    for name in NAMES:
        Image.fromarray(mask).save(regions / f"{name}.png")
    once = moving()[:, :2]
    once[1:] = np.nan
    single = write_npy(tmp_path / "single.npy", moving()[:, :1])
    for mask_file, reason in ((regions, "of regions, not of points"), (single, "has 1 points"), ("", "no sequence has points")):
        (tmp_path / "list.csv").write_text(f"path,mask\n{sequences / 'film0'},{mask_file}\n")
        data = open_data(tmp_path / "list.csv", recipe.modality, "0,0,1", tmp_path / "cache", quiet=True)
        with pytest.raises(DataError, match=reason):
            recipe.task.scope(data)
    (tmp_path / "list.csv").write_text(f"path,mask\n{sequences / 'film0'},{write_npy(tmp_path / 'once.npy', once)}\n")
    data = open_data(tmp_path / "list.csv", recipe.modality, "0,0,1", tmp_path / "cache", quiet=True)
    assert isinstance(recipe.task, Keypoints)
    with pytest.raises(DataError, match="points in one frame only"):
        Colours(recipe.task).test(recipe.assemble(2), data, data.rows("test"), recipe.task.scope(data))


def test_mask_values_are_of_pictures_only(sequences: Path) -> None:
    video = Video(Video.Options(mask_values={255: 1}))
    mask = video.read([sequences / "film0"], {"mask": sequences / "points0.csv"}).fields["mask"]
    assert set(np.unique(mask)) == {0, 1, 2}


def test_arms_are_compared_by_pck_and_predictions_are_points_again(sequences: Path, tmp_path: Path) -> None:
    changes = [*SMALL, "modality.video.store=decoded", "modality.video.resize=24"]
    meristem.evaluate("video/keypoints", sequences / "list.csv", tmp_path, changes, inits=["scratch"], seeds=1, split="0,0,1",
                      cache=sequences / "cache", quiet=True)
    results = Results.load(tmp_path / "results.json")
    (cell,) = results.cells
    assert (results.kind, results.metric, results.classes) == ("propagation", "PCK@0.1", ("points",))
    assert {frozenset(case.metrics) for case in cell.cases} == {frozenset({"PCK@0.1", "PCK@0.2"})}
    written = sorted((tmp_path / "predictions" / "scratch").glob("*.csv"))
    assert [file.stem for file in written] == sorted(case.case for case in cell.cases)
    for file in written:
        points = read_points(file, NAMES)
        assert points.shape == (T, 2, 2) and (points >= 0).all() and (points < (W, H)).all()
        assert np.abs(points[0] - [[12, 12], [84, 36]]).max() <= 1.0
    page = meristem.report([tmp_path], tmp_path / "page").read_text()
    assert "PCK@0.1" in page and "PCK@0.2" in page and "Carried labels" in page and "counts as perfect" not in page
