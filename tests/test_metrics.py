"""Metrics against brute force, MONAI and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from meristem.platform.evaluation import metrics
from meristem.platform.evaluation.detection import SCORINGS

CLASSES = {1: "anterior", 2: "posterior"}


def blobs(rng: np.random.Generator, shape: tuple[int, ...] = (14, 12, 9)) -> np.ndarray:
    """A label map with two boxes of labels 1 and 2, one of which may touch the border, and some specks."""
    label = np.zeros(shape, dtype=np.int64)
    for value in (1, 2):
        low = [int(rng.integers(0, n // 2)) for n in shape]
        label[tuple(slice(a, a + int(rng.integers(2, 6))) for a in low)] = value
    label[rng.random(shape) < 0.01] = 1
    return label


def brute(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Surface distances by looking at every neighbour and every pair."""
    def surface(mask: np.ndarray) -> np.ndarray:
        points = []
        for index in np.argwhere(mask):
            for axis in range(mask.ndim):
                for step in (-1, 1):
                    near = index.copy()
                    near[axis] += step
                    if not (0 <= near[axis] < mask.shape[axis]) or not mask[tuple(near)]:
                        points.append(tuple(index))
        return np.array(sorted(set(points))) * np.array(spacing)

    p, q = surface(a), surface(b)
    pairs = np.linalg.norm(p[:, None] - q[None], axis=-1)
    return pairs.min(1), pairs.min(0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.5, 3.0)])
def test_segmentation_equals_brute_force_and_monai(seed: int, spacing: tuple[float, ...]) -> None:
    rng = np.random.default_rng(seed)
    truth, prediction = blobs(rng), blobs(rng)
    got = metrics.segmentation(prediction, truth, spacing, CLASSES, tolerance=2.0)
    for value, name in CLASSES.items():
        a, b = prediction == value, truth == value
        there, back = brute(a, b, spacing)
        assert got["dice"][name] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert got["hd95"][name] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
        assert got["nsd"][name] == pytest.approx(((there <= 2).sum() + (back <= 2).sum()) / (len(there) + len(back)))
        one, two = (torch.as_tensor(x)[None, None].float() for x in (a, b))
        hd = compute_hausdorff_distance(one, two, include_background=True, percentile=95, spacing=spacing)
        nsd = compute_surface_dice(one, two, [2.0], include_background=True, spacing=spacing)
        assert got["hd95"][name] == pytest.approx(float(hd), abs=1e-4)
        assert got["nsd"][name] == pytest.approx(float(nsd), abs=1e-6)


def test_two_dimensional_closed_form() -> None:
    truth, prediction = np.zeros((20, 20), int), np.zeros((20, 20), int)
    truth[5:10, 5:10], prediction[8:13, 5:10] = 1, 1  # shifted by three rows
    got = metrics.segmentation(prediction, truth, (2.0, 1.0), {1: "cell"}, tolerance=0.5)
    assert got["dice"]["cell"] == pytest.approx(0.4)
    assert got["hd95"]["cell"] == pytest.approx(6.0)


def test_empty_masks_follow_the_stated_rule() -> None:
    none, some = np.zeros((4, 6, 8), int), np.zeros((4, 6, 8), int)
    some[1:3, 2:4, 2:4] = 1
    spacing = (3.0, 2.0, 1.0)
    diagonal = float(np.sqrt(12**2 + 12**2 + 8**2))
    both = metrics.segmentation(none, none, spacing, {1: "x"}, 1.0)
    assert (both["dice"]["x"], both["hd95"]["x"], both["nsd"]["x"]) == (1.0, 0.0, 1.0)
    for prediction, truth in ((none, some), (some, none)):
        one = metrics.segmentation(prediction, truth, spacing, {1: "x"}, 1.0)
        assert (one["dice"]["x"], one["nsd"]["x"]) == (0.0, 0.0)
        assert one["hd95"]["x"] == pytest.approx(diagonal)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="one grid"):
        metrics.segmentation(np.zeros((3, 3)), np.zeros((3, 4)), (1, 1), {1: "x"}, 1.0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_segmentation_is_symmetric_and_perfect_on_itself(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = blobs(rng, (8, 7, 6)), blobs(rng, (8, 7, 6))
    there = metrics.segmentation(a, b, (1.0, 2.0, 0.7), CLASSES, 1.0)
    back = metrics.segmentation(b, a, (1.0, 2.0, 0.7), CLASSES, 1.0)
    for name in there:
        assert there[name] == pytest.approx(back[name])
    same = metrics.segmentation(a, a, (1.0, 2.0, 0.7), CLASSES, 0.0)
    assert set(same["dice"].values()) == {1.0} and set(same["hd95"].values()) == {0.0} and set(same["nsd"].values()) == {1.0}


def predictions(seed: int, n: int, classes: int, coarse: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = np.arange(n) % classes
    logits = rng.normal(size=(n, classes)) + 1.2 * np.eye(classes)[target]
    if coarse:
        logits = np.round(logits)  # many ties
    p = np.exp(logits)
    return target, p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("coarse", [False, True])
def test_classification_equals_sklearn(classes: int, coarse: bool) -> None:
    target, p = predictions(3, 61, classes, coarse)
    got = metrics.classification(target, p)
    truth = np.eye(classes)[target]
    if classes == 2:
        assert got["auroc"] == pytest.approx(roc_auc_score(target, p[:, 1]))
        assert got["auprc"] == pytest.approx(average_precision_score(target, p[:, 1]))
    else:
        assert got["auroc"] == pytest.approx(roc_auc_score(target, p, multi_class="ovr", average="macro"))
        assert got["auprc"] == pytest.approx(average_precision_score(truth, p, average="macro"))
    assert got["accuracy"] == pytest.approx(accuracy_score(target, p.argmax(1)))
    assert got["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(target, p.argmax(1)))
    assert got["brier"] == pytest.approx(sum((p[i, c] - (target[i] == c))**2 for i in range(61) for c in range(classes)) / 61)


def test_top_five_of_many_classes_and_the_recall_of_each() -> None:
    target, p = predictions(4, 120, 9, coarse=False)
    got = metrics.classification(target, p)
    assert got["top5"] == pytest.approx(top_k_accuracy_score(target, p, k=5))
    assert "top5" not in metrics.classification(*predictions(4, 60, 5, coarse=False))  # where it would be 1 whatever is guessed
    recalls = recall_score(target, p.argmax(1), average=None)
    assert [float(metrics.recall(target, p, c)) for c in range(9)] == pytest.approx(recalls)
    assert np.mean(recalls) == pytest.approx(got["balanced_accuracy"])
    weight = np.random.default_rng(1).integers(0, 3, (4, 120)).astype(float)
    expected = [[recall_score(target, p.argmax(1), sample_weight=w, average=None)[c] for w in weight] for c in range(9)]
    assert np.array([metrics.recall(target, p, c, weight) for c in range(9)]) == pytest.approx(np.array(expected))
    assert np.isnan(metrics.recall(target[target != 2], p[target != 2], 2))


def test_a_constant_guess_is_lenient_to_five_classes_only() -> None:
    target = np.arange(70) % 7
    assert float(metrics.top5(target, np.full((70, 7), 1 / 7))) == pytest.approx(5 / 7)


@pytest.mark.parametrize("name", metrics.CASE_METRICS)
def test_case_metrics_are_means_of_their_cases(name: str) -> None:
    target, p = predictions(8, 40, 7, coarse=True)
    values = metrics.CASE_METRICS[name](target, np.stack([p, p[::-1]]))
    assert values.shape == (2, 40)
    assert values.mean(1) == pytest.approx(metrics.SET_METRICS[name](target, np.stack([p, p[::-1]])))


def test_calibration_error_by_hand() -> None:
    p = np.array([[0.3, 0.7], [0.3, 0.7], [0.05, 0.95], [0.9, 0.1]])
    target = np.array([1, 0, 1, 0])
    # bins of width 1/10: {0.7, 0.7} accuracy 0.5; {0.95} accuracy 1; {0.9} accuracy 1
    assert float(metrics.ece(target, p, bins=10)) == pytest.approx((2 * 0.2 + 0.05 + 0.1) / 4)
    assert metrics.reliability(target, p, bins=10) == [(pytest.approx(0.7), 0.5, 2), (0.9, 1.0, 1), (0.95, 1.0, 1)]


@pytest.mark.parametrize("name", metrics.SET_METRICS)
@pytest.mark.parametrize("classes", [2, 3])
def test_weights_mean_repetition(name: str, classes: int) -> None:
    """A case of weight w counts as w copies: what makes a bootstrap one vectorised call."""
    target, p = predictions(5, 30, classes, coarse=True)
    weight = np.random.default_rng(1).integers(0, 4, (6, 30)).astype(float)
    got = metrics.SET_METRICS[name](target, p, weight)
    for row, w in zip(got, weight, strict=True):
        repeated = np.repeat(np.arange(30), w.astype(int))
        assert row == pytest.approx(float(metrics.SET_METRICS[name](target[repeated], p[repeated])))


@pytest.mark.parametrize("name", metrics.SET_METRICS)
def test_leading_dimensions_of_predictions(name: str) -> None:
    target, p = predictions(6, 24, 3, coarse=True)
    many = np.stack([p, p[:, ::-1], p**2 / (p**2).sum(1, keepdims=True)])
    got = metrics.SET_METRICS[name](target, np.stack([many, many]))
    assert got.shape == (2, 3)
    for j in range(3):
        assert got[1, j] == pytest.approx(float(metrics.SET_METRICS[name](target, many[j])))


def test_one_class_only_has_no_auroc() -> None:
    assert np.isnan(metrics.classification([1, 1, 1], [[0.2, 0.8]] * 3)["auroc"])


def test_confusion_counts() -> None:
    assert metrics.confusion([0, 0, 1, 2], [0, 1, 1, 0], 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_every_metric_has_a_direction_and_a_label() -> None:
    tracked = metrics.tracking(np.eye(4)[None].repeat(3, 0), np.eye(4)[None].repeat(3, 0), [1])
    names = {*metrics.SET_METRICS, "dice", "hd95", "nsd", *tracked, "mAP", *(f"R@{k}" for k in metrics.RECALLS),
             *(f"PCK@{a}" for a in metrics.ALPHAS), *metrics.RATIOS, *metrics.BY_CATEGORY, "instance_miou", "point_accuracy",
             "few-shot", *(name for scoring in SCORINGS.values() for name in scoring)}
    assert names == set(metrics.HIGHER) == set(metrics.LABELS)


def test_region_similarity_by_hand() -> None:
    a, b, none = np.zeros((6, 6), bool), np.zeros((6, 6), bool), np.zeros((6, 6), bool)
    a[1:4, 1:4], b[2:5, 1:4] = True, True
    assert metrics.jaccard(a, b) == pytest.approx(6 / 12)
    assert (metrics.jaccard(none, none), metrics.jaccard(a, none)) == (1.0, 0.0)


def contour_by_hand(prediction: np.ndarray, truth: np.ndarray, bound: float) -> float:
    """Each contour element against each of the other contour."""
    def points(mask: np.ndarray) -> np.ndarray:
        height, width = mask.shape
        found = [(y, x) for y in range(height) for x in range(width)
                 if any(mask[min(y + v, height - 1), min(x + u, width - 1)] != mask[y, x] for v, u in ((0, 1), (1, 0), (1, 1)))]
        return np.array(found, dtype=float).reshape(-1, 2)

    p, t = points(prediction), points(truth)
    if not len(p) or not len(t):
        return float(len(p) == len(t))
    near = np.linalg.norm(p[:, None] - t[None], axis=-1) <= np.ceil(bound * np.hypot(*truth.shape))
    precision, recall = near.any(1).mean(), near.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bound=st.sampled_from([0.008, 0.1, 0.2]))
def test_contour_accuracy_equals_all_pairs(seed: int, bound: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = (np.zeros((17, 13), bool) for _ in range(2))
    for mask in (a, b):
        for _ in range(rng.integers(0, 3)):
            y, x = rng.integers(0, 12), rng.integers(0, 9)
            mask[y:y + rng.integers(1, 9), x:x + rng.integers(1, 9)] = True
    assert metrics.contour(a, b, bound) == pytest.approx(contour_by_hand(a, b, bound))
    assert metrics.contour(a, a) == 1.0


def test_tracking_scores_the_inner_frames_of_every_object() -> None:
    """Figures of davis2017-evaluation's own functions on these very masks."""
    rng = np.random.default_rng(4)
    truth, found = (rng.integers(1, 3, (11, 40, 50)) * (rng.random((11, 40, 50)) < 0.01) for _ in range(2))
    for t in range(11):
        truth[t, 5:25, 4 + 2 * t:20 + 2 * t], found[t, 5:25, 4 + t:20 + t] = 1, 1
        truth[t, 26:36, 30:45], found[t, 26:36, 30 - t // 2:45 - t // 2] = 2, 2
    got = metrics.tracking(found, truth, [1, 2])
    expected = {"J&F": 0.520536869, "J": 0.610388491, "J recall": 0.777777778, "J decay": 0.356199858,
                "F": 0.430685246, "F recall": 0.222222222, "F decay": 0.262236646}
    assert got == pytest.approx(expected)
    swapped = found.copy()
    swapped[[0, -1]] = 0  # given, and left out
    assert metrics.tracking(swapped, truth, [1, 2]) == got
    with pytest.raises(ValueError, match="2 known frames"):
        metrics.tracking(found[:2], truth[:2], [1])


def test_tracking_looks_at_known_elements_only() -> None:
    truth = np.zeros((6, 12, 12), int)
    truth[:, 2:8, 2:8] = 1
    found = truth.copy()
    truth[[1, 3]], found[[1, 3, 4]] = -1, 0
    got = metrics.tracking(found, truth, [1])
    assert (got["J"], got["F"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))  # frames 2, 4 and 5; 4 is lost
    found[2, 5:] = 1
    truth[2, 8:], truth[2, 5:8, :2], truth[2, 5:8, 8:] = -1, -1, -1
    assert metrics.tracking(found, truth, [1])["J"] == pytest.approx(2 / 3)


def test_keypoints_count_within_a_share_of_the_person() -> None:
    truth = np.zeros((3, 3, 2))
    truth[:, 1], truth[:, 2] = (30.0, 0.0), (0.0, 40.0)  # a box of diagonal 50: size 30
    found = truth.copy()
    found[1, 0] += (2.9, 0.0)
    found[2, 0] += (3.1, 0.0)
    found[1, 1] = np.nan  # lost is wrong
    found[0] += 100.0  # given
    assert metrics.pck(found, truth, 0.1) == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    truth[2, 0] = np.nan  # not there is not scored, and the box is still that of the others
    assert metrics.pck(found, truth, 0.1) == pytest.approx((1.0 + 0.5 + 1.0) / 3)
    with pytest.raises(ValueError, match="no keypoint"):
        metrics.pck(found[:1], truth[:1], 0.1)
