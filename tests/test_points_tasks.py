"""Tasks on clouds of points: scores against loops, every point predicted, parts learned, probes, the page."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

import meristem
from meristem.errors import MeristemError, RecipeError
from meristem.modalities.rng import Rng
from meristem.platform.data.source import Data, open_data
from meristem.platform.evaluation import metrics
from meristem.platform.evaluation.probes import SVM, FewShot, Split
from meristem.platform.evaluation.results import FEW, SHAPES, Budget, Case, Cell, Counts, Dataset, Group, Results, summarise
from meristem.platform.report.page import Study, write_report
from meristem.platform.report.pictures import Cloud, Pictures
from meristem.tasks.base import TaskRecipe, objective
from meristem.tasks.finetune import mean_scores, resolve
from meristem.tasks.inspection import noise
from meristem.tasks.parts import PointObjective, _looks, _shown

TINY = ["encoder={transformer: {width: 32, depth: 2, heads: 2}}", "modality.points.count=16", "modality.points.size=8",
        "views.x.size=[96]", "train.workers=0", "train.batch=4", "train.log_every=5"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 clouds of 128 points of each of two classes: three balls upright are its parts 0 to 2, two lying are 3 and 4."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("shapes")
    for kind, axis, parts in (("bell", 2, ((0, -1.0), (1, 0.0), (2, 1.0))), ("rod", 0, ((3, -0.7), (4, 0.7)))):
        (root / kind).mkdir()
        for i in range(10):
            part = np.array(parts)[rng.integers(0, len(parts), 128)]
            points = 0.15 * rng.normal(size=(128, 3))
            points[:, axis] = part[:, 1] + 0.2 * rng.uniform(-1, 1, 128)
            np.savez(root / kind / f"{i:02d}.npz", points=points.astype(np.float32), part=part[:, 0].astype(np.uint8))
    return root


def opened(shapes: Path, tmp_path: Path, task: str = "points/parts", *changes: str) -> tuple[TaskRecipe, Data]:
    recipe = resolve(task, "points", [*TINY, *changes])
    return recipe, open_data(shapes, recipe.modality, "0.5,0.2,0.3", tmp_path / "cache", quiet=True)


# ---- scores

def test_iou_of_parts_equals_a_loop_and_a_part_that_is_nowhere_counts_as_perfect() -> None:
    rng = np.random.default_rng(0)
    prediction, truth = rng.integers(2, 5, 60), rng.integers(2, 5, 60)
    truth[:7] = -1
    prediction[:7] = 3
    each = []
    for part in (2, 3, 4, 5):
        both = sum(p == part and t == part for p, t in zip(prediction, truth, strict=True) if t >= 0)
        either = sum(p == part or t == part for p, t in zip(prediction, truth, strict=True) if t >= 0)
        each.append(both / either if either else 1.0)
    assert each[-1] == 1.0
    assert metrics.part_iou(prediction, truth, (2, 3, 4, 5)) == pytest.approx(np.mean(each))
    assert metrics.part_iou(truth, truth, (2, 3, 4)) == 1.0


@given(st.integers(1, 5), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_set_miou_of_any_scenes_equals_scikit_learn_on_all_their_points(scenes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = [rng.integers(0, 3, rng.integers(5, 40)) for _ in range(scenes)]
    found = [np.where(rng.random(len(t)) < 0.6, t, rng.integers(0, 3, len(t))) for t in truth]
    names = {0: "floor", 1: "wall", 2: "door"}
    cases = [Case(case=str(i), subject=str(i), metrics=metrics.point_counts(p, t, names))
             for i, (p, t) in enumerate(zip(found, truth, strict=True))]
    group = Group.of([cell("scratch", cases)], tuple(names.values()))
    p, t = np.concatenate(found), np.concatenate(truth)
    present = np.union1d(p, t)
    assert group.per_seed("miou")[0] == pytest.approx(jaccard_score(t, p, labels=present, average="macro", zero_division=0))
    assert group.per_seed("oa")[0] == pytest.approx((p == t).mean())
    assert group.per_seed("macc")[0] == pytest.approx(np.mean([(p[t == c] == c).mean() for c in np.unique(t)]))
    assert float(group.statistic("miou")(np.ones((1, scenes)))[0]) == pytest.approx(group.per_seed("miou")[0])
    assert mean_scores(cases)["miou"] == pytest.approx(group.per_seed("miou")[0], abs=1e-6)
    twice = group.statistic("oa")(np.eye(scenes)[:1] * 2)[0]  # one scene alone, whatever its weight
    assert twice == pytest.approx((found[0] == truth[0]).mean())


def test_points_without_a_label_count_nowhere() -> None:
    truth, found = np.array([0, 0, 1, -1, -1]), np.array([0, 1, 1, 0, 1])
    counts = metrics.point_counts(found, truth, {0: "a", 1: "b"})
    assert counts == {"intersection": {"a": 1, "b": 1}, "union": {"a": 2, "b": 2}, "truth": {"a": 2, "b": 1}}


def cell(arm: str, cases: list[Case], init: str | None = None, protocol: str = "finetune") -> Cell:
    return Cell(arm=arm, init=init, protocol=protocol, labels="all", labelled_subjects=10, seed=0, cases=tuple(cases),
                budget=Budget(steps=1, batch=1, trainable=1, seconds=1.0))


def results(cells: list[Cell], kind: str, metric: str, classes: tuple[str, ...]) -> Results:
    return Results(task="made", kind=kind, metric=metric, classes=classes, cells=tuple(cells),
                   dataset=Dataset(name="made", manifest="0", splits={"test": Counts(subjects=1, cases=1)}))


def part_cases(iou: dict[str, list[float]]) -> list[Case]:
    return [Case(case=f"{category}-{i}", subject=f"{category}-{i}", category=category,
                 metrics={name: {SHAPES: value} for name in ("instance_miou", "class_miou", "point_accuracy")})
            for category, values in iou.items() for i, value in enumerate(values)]


def test_class_miou_is_the_mean_of_the_means_of_categories_and_instance_miou_that_of_shapes() -> None:
    worse, better = {"mug": [0.2, 0.4, 0.6, 0.4], "plane": [0.8]}, {"mug": [0.3, 0.5, 0.6, 0.5], "plane": [0.9]}
    summary = summarise(results([cell("scratch", part_cases(worse)), cell("mae", part_cases(better), "x")], "parts",
                                "instance_miou", (SHAPES,)), replicates=200)
    row = summary.row("scratch", "finetune", "all", "class_miou")
    assert row is not None and row.mean.value == pytest.approx((0.4 + 0.8) / 2) == row.seeds[0]
    assert row.classes["mug"].value == pytest.approx(0.4) and row.classes["mug"].low < 0.4 < row.classes["mug"].high
    assert np.isnan(row.classes["plane"].low)  # one shape gives no interval
    instance = summary.row("scratch", "finetune", "all")
    assert instance is not None and instance.mean.value == pytest.approx(2.4 / 5)
    assert mean_scores(part_cases(worse)) == {"instance_miou": 0.48, "class_miou": 0.6, "point_accuracy": 0.48}
    gains = {c.metric: c.difference.value for c in summary.comparisons}
    assert gains["instance_miou"] == pytest.approx(0.4 / 5) and gains["class_miou"] == pytest.approx((0.075 + 0.1) / 2)


def test_arms_on_scenes_are_compared_by_trading_scenes() -> None:
    rng, names = np.random.default_rng(1), {0: "a", 1: "b"}
    truth = [rng.integers(0, 2, 200) for _ in range(9)]

    def cases(right: float) -> list[Case]:
        return [Case(case=str(i), subject=str(i), metrics=metrics.point_counts(
            np.where(rng.random(200) < right, t, 1 - t), t, names)) for i, t in enumerate(truth)]

    summary = summarise(results([cell("scratch", cases(0.6)), cell("mae", cases(0.9), "x")], "semantic", "miou", ("a", "b")),
                        replicates=600)
    (primary,) = summary.primary()
    assert primary.difference.low > 0 and primary.p == pytest.approx(2 / 2**9)  # every scene is better: the extreme of all
    row = summary.row("mae", "finetune", "all")
    assert row is not None and set(row.classes) == {"a", "b"}
    assert row.mean.value == pytest.approx(np.mean([row.classes[c].value for c in "ab"]))


# ---- prediction

@pytest.mark.parametrize("count", [50, 96, 97, 300])
def test_looks_together_hold_every_point_and_none_twice(count: int, shapes: Path, tmp_path: Path) -> None:
    recipe, _ = opened(shapes, tmp_path)
    view = recipe.modality.example((count,), Rng.of(0, torch.arange(1), "x"))
    looks = _looks(count, 96)
    assert looks.shape[1] == min(count, 96)
    assert sorted(set(looks.flatten().tolist())) == list(range(count))
    assert all(len(set(look)) == len(look) for look in looks.tolist())
    shown = _shown(view, looks)
    assert shown.index is not None and torch.equal(shown.index, looks)
    assert torch.equal(shown.array[-1], view.array[0][:, looks[-1]])
    assert torch.equal(shown.fields["mask"][-1], view.fields["mask"][0][looks[-1]])


def test_a_cloud_is_predicted_the_same_in_every_order_and_beside_others(shapes: Path, tmp_path: Path) -> None:
    recipe, data = opened(shapes, tmp_path)
    assembly = recipe.assemble(5).eval()
    task = objective(assembly)
    assert isinstance(task, PointObjective)
    rows = data.rows()[:3]
    found = [task.predict(assembly, data, row) for row in rows]
    assert all(len(x) == 128 and x.dtype == np.int32 for x in found)
    again = [task.predict(assembly, data, row) for row in reversed(rows)][::-1]
    assert all((a == b).all() for a, b in zip(found, again, strict=True))


def test_only_parts_of_the_category_are_predicted(shapes: Path, tmp_path: Path) -> None:
    recipe, data = opened(shapes, tmp_path)
    task = objective(assembly := recipe.assemble(5).eval())
    assert isinstance(task, PointObjective)
    assert task.settings.allowed(data) == {0: (0, 1, 2), 1: (3, 4)}
    for row in data.rows():
        allowed = task.settings.allowed(data)[row.labels["class"]]
        assert set(task.predict(assembly, data, row, allowed).tolist()) <= set(allowed)


def test_the_head_is_told_the_category_of_some_training_shapes_only(shapes: Path, tmp_path: Path) -> None:
    batch = noise(resolve("points/parts", "points", TINY))

    def loss(*changes: str) -> float:
        torch.manual_seed(0)
        assembly = resolve("points/parts", "points", [*TINY, *changes]).assemble(2).eval()
        with torch.no_grad():
            (loss,) = assembly(batch, 0.0).values()
        return float(loss.total / loss.count)

    assert loss("task.parts.told=1.0") != loss("task.parts.told=0.0")
    with pytest.raises(RecipeError, match="2 classes of shapes, the head can be told 1"):
        recipe, data = opened(shapes, tmp_path, "points/parts", "task.parts.categories=1")
        recipe.task.scope(data)


def test_layers_of_the_head_are_those_of_point_mae() -> None:
    from meristem.tasks.parts import _spread

    assert _spread(12, 3) == [3, 7, 11] and _spread(6, 3) == [1, 3, 5] and _spread(2, 3) == [0, 1]


def test_parts_need_points() -> None:
    with pytest.raises(RecipeError, match="a modality of points is needed"):
        resolve("image/classification", "image", ["task={parts: {}}"])


def test_parts_are_learned_and_come_back_for_every_point_of_the_file(shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    quick = [*TINY, "train.steps=60", "train.lr=5e-3", "train.ema=0.9", "task.parts.told=0.5", "views.x.rotate=0"]
    meristem.finetune("points/parts", shapes, out, quick, split="0.5,0.2,0.3", cache=tmp_path / "cache", quiet=True)
    scores = json.loads((out / "metrics.json").read_text())["test"]
    assert scores["instance_miou"] > 0.8 and set(scores) == {"instance_miou", "class_miou", "point_accuracy"}
    written = meristem.predict(out, shapes, tmp_path / "found", quiet=True)
    assert len(written) == 20
    right = []
    for kind in ("bell", "rod"):
        with np.load(shapes / kind / "03.npz") as truth:
            file = next(p for p in written if p.parent.name == kind and p.stem.startswith("03"))
            right.append((np.load(file) == truth["part"]).mean())
    assert np.mean(right) > 0.8  # nor is the class told here


# ---- probes

def split(seed: int, n: int, classes: int = 4, width: int = 12, noise: float = 1.0) -> Split:
    centre = np.random.default_rng(9).normal(size=(classes, width))
    target = np.arange(n) % classes
    return Split(centre[target] + noise * np.random.default_rng(seed).normal(size=(n, width)), target)


@pytest.mark.parametrize("kernel, machine", [("linear", LinearSVC(C=0.1, random_state=0, max_iter=20_000)),
                                             ("rbf", SVC(C=0.1))])
def test_svm_equals_scikit_learn(kernel: str, machine: SVC) -> None:
    train, test = split(0, 60, noise=2.0), split(2, 40, noise=2.0)
    scale = StandardScaler().fit(train.embedding)
    expected = machine.fit(scale.transform(train.embedding), train.target).predict(scale.transform(test.embedding))
    found = SVM(kernel=kernel, c=(0.1,))(train, split(1, 20), test.embedding, 4).probabilities
    assert (found.argmax(1) == expected).all()
    assert found.sum(1) == pytest.approx(np.ones(40))


def test_svm_chooses_by_accuracy_on_validation_never_on_test() -> None:
    train, validation = split(0, 40, noise=2.5), split(1, 40, noise=2.5)
    one, other = (SVM()(train, validation, split(seed, 20).embedding, 4) for seed in (2, 3))
    assert one.chosen == other.chosen == min(one.validation, key=one.validation.__getitem__)
    for c, score in one.validation.items():
        right = SVM(c=(c,))(train, validation, validation.embedding, 4).probabilities.argmax(1) == validation.target
        assert -score == pytest.approx(right.mean())


def test_svm_of_two_classes_and_of_classes_that_do_not_train() -> None:
    train, test = split(0, 40, classes=2), split(2, 30, classes=2)
    found = SVM()(train, test, test.embedding, 5).probabilities
    assert (found[:, 2:] == 0).all() and (found.argmax(1) == test.target).mean() > 0.8
    with pytest.raises(MeristemError, match="at least two classes"):
        SVM()(Split(train.embedding, np.zeros(40, int)), test, test.embedding, 2)


def test_few_shots_draw_what_they_say_and_the_same_for_every_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = split(0, 80, classes=8), split(1, 160, classes=8)
    predict, seen = SVM.predict, []

    def watched(self: SVM, train: Split, *rest: Any) -> np.ndarray:
        seen.append(train.target.tolist())
        return predict(self, train, *rest)

    monkeypatch.setattr(SVM, "predict", watched)
    protocol = FewShot(ways=(3,), shots=(5,), queries=4, trials=6)
    found = protocol(train, test)
    assert list(found) == ["3-way 5-shot"] and found["3-way 5-shot"].shape == (6,)
    assert found["3-way 5-shot"] * 12 % 1 == pytest.approx(0, abs=1e-9)  # of 3 · 4 queries
    assert all(len(set(t)) == 3 and all(t.count(c) == 5 for c in t) for t in seen)
    assert len({tuple(sorted(set(t))) for t in seen}) > 1
    first, seen[:] = list(seen), []
    protocol(Split(-train.embedding, train.target), test)
    assert seen == first


def test_few_shots_find_signal_and_stay_at_chance_on_noise() -> None:
    protocol = FewShot(ways=(5,), shots=(10,), trials=40)
    signal, chance = (protocol(split(0, 160, 8, noise=noise), split(1, 160, 8, noise=noise))["5-way 10-shot"]
                      for noise in (1.0, 1e6))
    assert signal.mean() > 0.75 and abs(chance.mean() - 0.2) < 0.05
    with pytest.raises(RecipeError, match="9 ways, 10 shots: 8 classes"):
        FewShot(ways=(9,), shots=(10,))(split(0, 160, 8), split(1, 160, 8))


def test_classes_with_too_few_samples_are_not_drawn() -> None:
    train = split(0, 80, classes=4)
    few = Split(train.embedding[: 44], np.where(np.arange(44) < 40, np.arange(44) % 4, 4))  # 10 each, 4 of the last
    test = split(1, 50, classes=5)
    assert FewShot(ways=(4,), shots=(10,), trials=2)(few, test)["4-way 10-shot"].shape == (2,)
    with pytest.raises(RecipeError, match="5 ways"):
        FewShot(ways=(5,), shots=(10,), trials=2)(few, test)


def test_probes_of_clouds_from_features_to_the_page(shapes: Path, tmp_path: Path) -> None:
    changes = [*TINY, "task.classification.features=[mean,max]", "task.classification.few_shot.ways=[2]",
               "task.classification.few_shot.shots=[3,5]"]
    out = {}
    for protocol in ("svm", "few-shot"):
        meristem.evaluate("points/classification", shapes, tmp_path / protocol, changes, inits=["scratch"], seeds=2,
                          protocols=[protocol], split="0.5,0.2,0.3", cache=tmp_path / "cache", quiet=True)
        out[protocol] = Results.load(tmp_path / protocol / "results.json")
    assert out["svm"].kind == "classification" and "C" in out["svm"].cells[0].chosen
    few = out["few-shot"]
    assert few.classes == ("2-way 3-shot", "2-way 5-shot") and few.metric == FEW and len(few.cells[0].cases) == 10
    row = summarise(few, replicates=50).row("scratch", "few-shot", "all")
    assert row is not None
    values = [np.mean([c.cases[i].metrics[FEW]["2-way 5-shot"] for c in few.cells]) for i in range(10)]
    assert row.trial_sd["2-way 5-shot"] == pytest.approx(np.std(values, ddof=1))
    page = (tmp_path / "few-shot" / "report.html").read_text()
    assert "10 trials" in page and "test subjects ·" not in page and f"± {row.trial_sd['2-way 5-shot']:.3f}" in page
    with pytest.raises(RecipeError, match="few-shot is scored by few-shot accuracy"):
        meristem.evaluate("points/classification", shapes, tmp_path / "both", changes, inits=["scratch"], seeds=1,
                          protocols=["few-shot", "svm"], cache=tmp_path / "cache", quiet=True)


def test_features_that_an_encoder_lacks_are_refused() -> None:
    with pytest.raises(RecipeError, match="this encoder has no sum vector"):
        resolve("points/classification", "points", [*TINY, "task.classification.features=[mean,sum]"])


# ---- the page

def test_pictures_of_points_are_kept_and_shown(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points, truth = rng.normal(size=(80, 3)), np.repeat([0, 3], 40)
    shown = Cloud("case-1", "worst", points, truth, {"scratch": np.roll(truth, 4)}, {0: "wing", 3: "body"}, {"scratch": 0.8},
                  "Airplane")
    (loaded,) = Pictures.load(Pictures(clouds=[shown]).save(tmp_path / "pictures.npz")).clouds
    assert (loaded.points == points).all() and loaded.names == shown.names and loaded.category == "Airplane"
    made = results([cell("scratch", part_cases({"Airplane": [0.5, 0.6, 0.7], "Cup": [0.9, 0.8]}))], "parts", "instance_miou",
                   (SHAPES,))
    heads, rows = Study(made, Pictures(), []).classes
    assert heads == ["instance mIoU, scratch"] and [(name, n) for name, n, _ in rows] == [("Airplane", "3"), ("Cup", "2")]
    page = write_report(made, Pictures(clouds=[loaded]), [], tmp_path).read_text()
    assert "Points and their labels" in page and "Worst case, Airplane" in page and "wing" in page
    assert "10% of them wrong" in page
    first = page.index("rasters clouds")
    png = base64.b64decode(page[page.index("base64,", first) + 7:page.index('"', page.index("base64,", first))])
    assert png.startswith(b"\x89PNG")


def test_parts_are_evaluated_and_drawn_from_end_to_end(shapes: Path, tmp_path: Path) -> None:
    page = meristem.evaluate("points/parts", shapes, tmp_path / "out", [*TINY, "train.steps=4"], inits=["scratch"], seeds=1,
                             split="0.5,0.2,0.3", cache=tmp_path / "cache", quiet=True)
    found = Results.load(tmp_path / "out" / "results.json")
    assert found.kind == "parts" and {c.category for c in found.cells[0].cases} == {"bell", "rod"}
    pictures = Pictures.load(tmp_path / "out" / "pictures.npz")
    assert [c.rank for c in pictures.clouds] == ["worst", "median", "best"] and len(pictures.clouds[0].points) == 128
    assert "class mIoU" in Path(page).read_text()


def test_scenes_are_told_apart_and_predicted_whole(tmp_path: Path) -> None:
    """A floor, a wall on it and a box: 700 points, seen 128 at a time."""
    rng, root = np.random.default_rng(0), tmp_path / "scenes"
    root.mkdir()
    for i in range(8):
        floor = rng.uniform(0, 4, (300, 3)) * (1, 1, 0)
        wall = rng.uniform(0, 4, (250, 3)) * (1, 0, 0.75)
        box = rng.uniform(0, 0.5, (150, 3)) + np.append(rng.uniform(1, 3, 2), 0.2)
        part = np.repeat([0, 1, 2], [300, 250, 150])
        order = rng.permutation(700)
        np.savez(root / f"{i}.npz", points=np.concatenate([floor, wall, box])[order].astype(np.float32),
                 part=part[order].astype(np.uint8))
    quick = ["encoder={transformer: {width: 32, depth: 2, heads: 2}}", "modality.points.size=16", "train.workers=0",
             "train.batch=4", "views.x.size=[128]", "train.steps=80", "train.lr=3e-3", "train.ema=0.9"]
    meristem.evaluate("points/segmentation", root, tmp_path / "out", quick, inits=["scratch"], seeds=1, split="0.5,0,0.5",
                      cache=tmp_path / "cache", quiet=True)
    found = Results.load(tmp_path / "out" / "results.json")
    assert found.kind == "semantic" and len(found.classes) == 3
    assert all(sum(case.metrics["truth"].values()) == 700 for case in found.cells[0].cases)
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())[0]
    assert scores["miou"] > 0.6 and scores["oa"] > 0.75
    assert "overall accuracy" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.data
def test_parts_of_real_shapes_are_those_that_their_class_names(data_root: Path, tmp_path: Path) -> None:
    root = data_root / "psb-labeled-points"
    if not root.is_dir():
        pytest.skip("no psb-labeled-points")
    recipe = resolve("points/parts", "points", [*TINY, "views.x.size=[1024]"])
    data = open_data(root, recipe.modality, "auto", tmp_path / "cache", quiet=True)
    scope = recipe.task.scope(data)
    task = objective(assembly := recipe.assemble(scope.classes).eval())
    assert isinstance(task, PointObjective) and scope.classes == 94
    allowed, names = task.settings.allowed(data), data.manifest.class_names
    assert len(allowed) == 19 and sum(map(len, allowed.values())) == 94
    assert all(scope.values[v].startswith(names[label] + "/") for label, values in allowed.items() for v in values)
    (case,) = task.test(assembly, data, data.rows("test")[:1], scope)
    assert case.category in names and 0 <= case.metrics["instance_miou"][SHAPES] <= 1
