"""Label propagation against brute force, and on sequences whose answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import meristem
from meristem.errors import DataError, RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.platform.assembly import Assembly
from meristem.platform.data.source import Data, open_data
from meristem.platform.evaluation import metrics
from meristem.platform.evaluation.propagation import decide, keypoint_maps, keypoints, label_maps, propagate
from meristem.platform.evaluation.results import Results, summarise
from meristem.tasks.base import TaskRecipe, normalised, objective
from meristem.tasks.finetune import resolve
from meristem.tasks.propagation import PropagationObjective


def brute(features: Tensor, first: Tensor, context: int, radius: int | None, top_k: int, temperature: float) -> Tensor:
    """Every frame, token, reference and neighbour by itself."""
    frames, _, h, w = features.shape
    unit = features / features.norm(dim=1, keepdim=True)
    labels = [first]
    for t in range(1, frames):
        found = torch.zeros_like(first)
        for y in range(h):
            for x in range(w):
                seen = []
                for r in sorted({0, *range(max(t - context, 0), t)}):
                    for v in range(h):
                        for u in range(w):
                            if radius is None or max(abs(v - y), abs(u - x)) <= radius:
                                seen.append((float(unit[t, :, y, x] @ unit[r, :, v, u]), labels[r][:, v, u]))
                seen = sorted(seen, key=lambda pair: -pair[0])[:top_k]
                weight = [math.exp(s / temperature) for s, _ in seen]
                for a, (_, label) in zip(weight, seen, strict=True):
                    found[:, y, x] += a / sum(weight) * label
        labels.append(found)
    return torch.stack(labels)


@pytest.mark.parametrize(("shape", "context", "radius", "top_k"), [
    ((4, 3, 5, 6), 2, 1, 3), ((5, 4, 9, 3), 1, 2, 5), ((4, 2, 3, 11), 7, None, 4), ((3, 3, 10, 9), 1, 0, 5),
    ((3, 3, 4, 4), 0, 2, 1)])
def test_equals_the_brute_force_loop(shape: tuple[int, ...], context: int, radius: int | None, top_k: int) -> None:
    features, first = torch.randn(*shape), torch.rand(3, *shape[2:])
    got = propagate(features, first, context=context, radius=radius, top_k=top_k, temperature=0.1)
    torch.testing.assert_close(got, brute(features, first, context, radius, top_k, 0.1))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), radius=st.one_of(st.none(), st.integers(0, 4)), top_k=st.integers(1, 9))
def test_labels_stay_a_distribution_and_frames_may_come_one_by_one(seed: int, radius: int | None, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(4, 5, 10, 9, generator=generator)
    first = torch.rand(3, 10, 9, generator=generator).softmax(0)
    options = {"context": 2, "radius": radius, "top_k": top_k, "temperature": 0.2}
    got = propagate(features, first, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got.sum(1), torch.ones(4, 10, 9))
    assert got.min() >= 0 and torch.equal(got[0], first)
    assert torch.equal(got, propagate(iter(features), first, **options))  # type: ignore[arg-type]
    mirrored = propagate(features.flip(-1), first.flip(-1), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(mirrored.flip(-1), got)  # tiles and borders have no side


def test_labels_follow_what_moves_within_the_radius() -> None:
    """Distinct features shifted by a column a frame: labels shift along, until a step is wider than the neighbourhood."""
    world = torch.randn(32, 12, 40)
    first = torch.zeros(2, 12, 20)
    first[1, 3:9, 8:12] = 1
    first[0] = 1 - first[1]
    for step, follows in ((2, True), (3, False)):
        features = torch.stack([world[..., 18 - step * t:38 - step * t] for t in range(4)])
        last = propagate(features, first, context=1, radius=2, top_k=1, temperature=0.1)[-1, 1]
        moved = torch.zeros(12, 20)
        moved[3:9, 8 + 3 * step:12 + 3 * step] = 1
        assert torch.equal(last[:, 9:], moved[:, 9:]) == follows


def test_the_first_frame_is_always_looked_at() -> None:
    """What hides for longer than the context comes back with its label."""
    features = torch.eye(4)[:, :, None, None].repeat(1, 1, 6, 6)[[0, 1, 1, 1, 1, 0]].contiguous()
    features[[0, 5], :, 2:4, 2:4] = torch.eye(4)[2][:, None, None]
    first = torch.zeros(2, 6, 6)
    first[1, 2:4, 2:4] = 1
    first[0] = 1 - first[1]
    got = propagate(features, first, context=2, radius=None, top_k=2, temperature=0.01)
    torch.testing.assert_close(got[5], first)
    assert got[4].std((1, 2)).max() < 1e-6  # and nothing is invented meanwhile: what ties is averaged


def test_grids_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="one grid"):
        propagate(torch.randn(2, 3, 4, 5), torch.rand(2, 4, 4), context=1, radius=1, top_k=1, temperature=1.0)


def test_label_maps_are_shares_and_decisions_give_them_back() -> None:
    mask = torch.zeros(32, 48, dtype=torch.long)
    mask[8:24, 16:40], mask[24:32, :16] = 7, 255
    shares = label_maps(mask, (0, 7, 255), (4, 6))
    torch.testing.assert_close(shares.sum(0), torch.ones(4, 6))
    assert torch.equal(shares[1] > 0.5, mask[4::8, 4::8] == 7)
    fine = decide(label_maps(mask, (0, 7, 255), (32, 48)), (32, 48), normalise=True)
    assert torch.equal(torch.tensor([0, 7, 255])[fine], mask)
    assert label_maps(mask, (0, 7), (3, 5))[1].mean() == pytest.approx(16 * 24 / (32 * 48), abs=0.03)


def test_normalising_saves_what_is_diluted() -> None:
    labels = torch.full((2, 6, 6), 0.9)
    labels[1] = 0.1
    labels[:, 2:4, 2:4] = torch.tensor([0.6, 0.4])[:, None, None]
    assert not decide(labels, (6, 6), normalise=False).any()
    found = decide(labels, (6, 6), normalise=True)
    assert found[2:4, 2:4].all() and found.sum() == 4
    assert not decide(torch.stack([torch.ones(6, 6), torch.zeros(6, 6)]), (6, 6), normalise=True).any()  # nor invents


def test_keypoints_are_read_where_they_were_put() -> None:
    points = torch.tensor([[3.0, 4.0], [7.3, 10.6], [torch.nan, torch.nan]])
    found = keypoints(keypoint_maps(points, (12, 16), 0.7), top_k=9)
    torch.testing.assert_close(found[0], points[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1], points[1], atol=0.1, rtol=0)
    assert found[2].isnan().all()


def test_keypoints_follow_what_moves() -> None:
    world = torch.randn(32, 16, 40)
    features = torch.stack([world[..., 20 - t:40 - t] for t in range(5)])
    points = torch.tensor([[4.0, 10.0], [9.0, 13.0]])
    maps = propagate(features, keypoint_maps(points, (16, 20), 0.5), context=3, radius=4, top_k=1, temperature=0.1)
    truth = torch.stack([points + torch.tensor([0.0, t]) for t in range(5)])
    torch.testing.assert_close(keypoints(maps, 5), truth, atol=0.1, rtol=0)
    assert metrics.pck(keypoints(maps, 5).numpy(), truth.numpy(), 0.1) == 1.0


@pytest.mark.data
def test_colour_follows_a_real_object_better_than_its_first_mask(data_root: Path) -> None:
    """kite-surf: J&F of colours of a coarse grid, against the first mask kept and against noise."""
    root, scores = data_root / "davis2016-val", {}
    if not root.is_dir():
        pytest.skip("no DAVIS sequences")
    files = sorted((root / "JPEGImages/480p/kite-surf").glob("*.jpg"))[::4]
    masks = [Image.open(root / "Annotations/480p/kite-surf" / f"{f.stem}.png").convert("L") for f in files]
    truth = np.stack([np.asarray(m.resize((427, 240), Image.Resampling.NEAREST)) for m in masks]).astype(int)
    images = [np.asarray(Image.open(f).resize((106, 60), Image.Resampling.BOX)) for f in files]
    colours = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    colours = (colours - colours.mean((0, 2, 3), keepdim=True)) / colours.std((0, 2, 3), keepdim=True)
    patches = F.unfold(colours, 2, stride=2).reshape(len(files), -1, 30, 53)
    first = label_maps(torch.from_numpy(truth[0]), (0, 255), (30, 53))
    for name, features in (("colour", patches), ("noise", torch.randn_like(patches))):
        soft = propagate(features, first, context=7, radius=12, top_k=5, temperature=0.1)
        found = np.stack([decide(y, truth.shape[1:], normalise=True).numpy() * 255 for y in soft])
        scores[name] = metrics.tracking(found, truth, [255])["J&F"]
    still = metrics.tracking(np.repeat(truth[:1], len(truth), 0), truth, [255])["J&F"]
    assert scores["colour"] > still > scores["noise"]


# ---- the task

SMALL = ["modality.video.patch=[2,8,8]", "encoder={transformer: {width: 24, depth: 2, heads: 2}}", "views.x.size=[2,32,32]",
         "task.propagation.size=48", "task.propagation.radius=2", "task.propagation.top_k=1"]


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sequences of 11 frames of 48x96: textured squares 3 and 7 move a token a frame over a plain ground.

    The second has object 3 only, and no mask of its first and its last two frames.
    """
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, ids in (("a", (3, 7)), ("b", (3,))):
        squares = {value: rng.integers(0, 256, (16, 16, 3), np.uint8) for value in ids}
        for kind in ("frames", "masks"):
            (root / kind / name).mkdir(parents=True)
        for t in range(11):
            frame, mask = np.full((48, 96, 3), 90, np.uint8), np.zeros((48, 96), np.uint8)
            for value, square in squares.items():
                y, x = (0, 8 * t) if value == 3 else (24, 80 - 8 * t)
                frame[y:y + 16, x:x + 16], mask[y:y + 16, x:x + 16] = square, value
            Image.fromarray(frame).save(root / "frames" / name / f"{t:05d}.png")
            if name == "a" or 0 < t < 9:
                Image.fromarray(mask).save(root / "masks" / name / f"{t:05d}.png")
    return root


@pytest.fixture(scope="module")
def made(sequences: Path) -> tuple[TaskRecipe, Data, Assembly]:
    recipe = resolve("propagation", "video", SMALL)
    data = open_data(sequences, recipe.modality, "0,0,1", sequences / "cache", quiet=True)
    torch.manual_seed(0)
    return recipe, data, recipe.assemble(2).eval()


def task_of(assembly: Assembly) -> PropagationObjective:
    task = objective(assembly)
    assert isinstance(task, PropagationObjective)
    return task


def test_a_frame_is_shown_alone_and_at_its_own_proportions(made: tuple[TaskRecipe, Data, Assembly]) -> None:
    recipe, data, assembly = made
    row, task = data.rows("test")[0], task_of(assembly)
    maps = torch.stack(list(task.features(assembly, data, row, range(11))))
    assert maps.shape == (11, 24, 6, 12)
    torch.testing.assert_close(torch.stack(list(task.features(assembly, data, row, range(3, 5)))), maps[3:5])
    header, stored = data.cache.header(row.index), data.cache.array(row.index)
    still = normalised(stored[:, [4, 4]], header, torch.device("cpu"))[None]
    frame = Frame(torch.eye(4)[None], (2, 48, 96), torch.tensor(header.spacing)[None], ("s", "px", "px"))
    view = View("x", still, frame, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    encoded = assembly.encoder(assembly.tokenizer.stream(view).seen(recipe.encoder.sees), want=frozenset({"layers"}))
    torch.testing.assert_close(encoded.tokens[0], maps[4].flatten(1).T)
    second = resolve("propagation", "video", [*SMALL, "task.propagation.layer=0"]).task.build(assembly, 2)
    assert isinstance(second, PropagationObjective)
    found = next(second.features(assembly, data, row, range(4, 5)))
    torch.testing.assert_close(encoded.layers[0][0], found.flatten(1).T)


def test_objects_are_carried_and_scored_by_their_own_masks(made: tuple[TaskRecipe, Data, Assembly]) -> None:
    recipe, data, assembly = made
    rows, task = data.rows("test"), task_of(assembly)
    kept: dict[str, np.ndarray] = {}
    cases = task.test(assembly, data, rows, recipe.task.scope(data), lambda row, labels: kept.__setitem__(row.case, labels))
    for row, case in zip(rows, cases, strict=True):
        truth, found = data.cache.field(row.index, "mask"), kept[case.case]
        start = int((truth > 0).any((1, 2)).argmax())
        objects = sorted(set(np.unique(truth)) - {-1, 0})
        assert set(np.unique(found[start:])) <= {0, *objects} and (found[:start] == -1).all()
        assert case.metrics["J"]["objects"] == pytest.approx(metrics.tracking(found[start:], truth[start:], objects)["J"])
        for t in range(start, 11 if len(objects) == 2 else 9):
            ids, whole = torch.tensor([0, *objects]), torch.from_numpy(truth[t].astype(np.int64))
            rounded = ids[decide(label_maps(whole, ids.tolist(), (6, 12)), (48, 96), True)]  # corners of tokens
            assert torch.equal(torch.from_numpy(found[t]).long(), whole if t == start else rounded)


def test_masks_are_written_on_the_sources_grid(made: tuple[TaskRecipe, Data, Assembly], tmp_path: Path) -> None:
    recipe, data, assembly = made
    row = data.rows("test")[0]
    (folder,) = task_of(assembly).write(assembly, data, [row], recipe.task.scope(data), tmp_path)
    assert folder == tmp_path / row.case
    written = np.stack([np.asarray(Image.open(f)) for f in sorted(folder.glob("*.png"))])
    assert (written == np.maximum(task_of(assembly).carried(assembly, data, row), 0)).all()


def test_arms_are_compared_without_training(sequences: Path, tmp_path: Path) -> None:
    encoder = [change for change in SMALL if not change.startswith("task")]
    brief = ["train.steps=1", "train.batch=2", "train.workers=0", "train.warmup=0", "views.x.sample={stride: 1}"]
    common = {"cache": sequences / "cache", "quiet": True}
    meristem.pretrain("video/videomae", sequences, tmp_path / "run", [*encoder, *brief], split="1,0,0", **common)
    hard = [*SMALL, "task.propagation.top_k=20", "task.propagation.temperature=1.0"]  # or every encoder is perfect
    options = {"inits": [tmp_path / "run"], "seeds": 2, "split": "0,0,1", **common}
    meristem.evaluate("propagation", sequences, tmp_path, hard, **options)
    results = Results.load(tmp_path / "results.json")
    cells = {(c.arm, c.seed): c for c in results.cells}
    assert {(c.protocol, c.labels, c.labelled_subjects, c.budget.steps) for c in cells.values()} == {("propagate", 0, 0, 0)}
    assert cells["videomae", 0].cases == cells["videomae", 1].cases  # nothing is drawn
    assert cells["scratch", 0].cases != cells["scratch", 1].cases
    assert cells["videomae", 0].cases != cells["scratch", 0].cases
    (verdict,) = summarise(results).verdict
    assert verdict.startswith("Untrained, videomae pretraining") and "J&F" in verdict and "by label propagation" in verdict
    assert len(list((tmp_path / "predictions" / "scratch").glob("case-*/*.png"))) == 22
    with pytest.raises(RecipeError, match="no label budgets"):
        meristem.evaluate("propagation", sequences, tmp_path, hard, labels=["1"], **options)
    with pytest.raises(RecipeError, match="no protocol 'knn'"):
        meristem.evaluate("propagation", sequences, tmp_path, hard, protocols=["knn"], **options)
    with pytest.raises(RecipeError, match="trains nothing"):
        meristem.finetune("propagation", sequences, tmp_path / "tuned", SMALL, cache=sequences / "cache", quiet=True)


def test_what_cannot_be_carried_is_refused(sequences: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="layer 2 does not exist"):
        resolve("propagation", "video", [*SMALL, "task.propagation.layer=2"]).assemble(2)
    task = "task={propagation: {size: 32, context: 1, radius: 1, top_k: 1, temperature: 0.1}}"
    with pytest.raises(RecipeError, match="no axis in seconds"):
        resolve("image/segmentation", "image", ["task.segmentation=null", task])
    recipe = resolve("propagation", "video", SMALL)
    data = open_data(sequences / "frames", recipe.modality, "0,0,1", tmp_path, quiet=True)
    with pytest.raises(DataError, match="no sequence has masks"):
        recipe.task.scope(data)
