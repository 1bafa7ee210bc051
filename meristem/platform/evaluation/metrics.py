"""Metrics of a case (segmentation, parts of shapes, propagated masks and points) and of a set (classification); set metrics
take case weights, so resampling is one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt

from meristem.platform.evaluation.detection import RATES, SCORINGS

Array = NDArray[Any]
SetMetric = Callable[..., Array]  # (target, probabilities, weight=None, **own settings) -> (…)

BINS = 15  # of the calibration error; the usual choice since Guo et al. 2017
TOP = 5  # guesses that the lenient accuracy allows; the usual choice since ImageNet (Russakovsky et al. 2015)
ALPHAS = (0.1, 0.2)  # of the PCK, as JHMDB is scored (Wang et al. 2019; Jabri et al. 2020)
RECALLS = (1, 5, 10, 20)  # neighbours looked at by clip retrieval on UCF101 (Buchler et al. 2018; Xu et al. 2019)
BOUND = 0.008  # of the contour accuracy: tolerance as a fraction of the image's diagonal (Perazzi et al. 2016)


def segmentation(prediction: Array, truth: Array, spacing: Sequence[float], classes: Mapping[int, str], tolerance: float
                 ) -> dict[str, dict[str, float]]:
    """Dice, HD95 and NSD of one case, for each class: {"dice": {class: value}, "hd95": …, "nsd": …}.

    prediction, truth: (*S) integer label maps on one grid. spacing: size of a voxel per axis. classes: label value -> name.
    tolerance: of the NSD, in the unit of `spacing`; so is HD95.

    Dice = 2|A∩B| / (|A|+|B|). A surface is the set of voxels of a mask with a face neighbour outside it (or outside the
    image); distances run between voxel centres. HD95 is the larger of the two directed 95th percentiles of surface distances.
    NSD (Nikolov et al. 2021, voxels counted, not areas) is the share of both surfaces within `tolerance` of the other.

    Empty masks, where the formulas are undefined: both empty is a perfect case (Dice 1, HD95 0, NSD 1); one empty is a
    complete miss (Dice 0, HD95 = the diagonal of the image, NSD 0). Raises ValueError when shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} are not on one grid")
    if len(spacing) != truth.ndim:
        raise ValueError(f"spacing has {len(spacing)} axes, the label map {truth.ndim}")
    scores: dict[str, dict[str, float]] = {"dice": {}, "hd95": {}, "nsd": {}}
    for value, name in classes.items():
        a, b = prediction == value, truth == value
        size = int(a.sum()) + int(b.sum())
        scores["dice"][name] = 2.0 * int((a & b).sum()) / size if size else 1.0
        if not a.any() or not b.any():
            diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
            scores["hd95"][name], scores["nsd"][name] = (diagonal, 0.0) if size else (0.0, 1.0)
            continue
        there, back = surface_distances(a, b, spacing)
        scores["hd95"][name] = float(max(np.percentile(there, 95), np.percentile(back, 95)))
        within = int((there <= tolerance).sum()) + int((back <= tolerance).sum())
        scores["nsd"][name] = within / (there.size + back.size)
    return scores


def surface_distances(a: Array, b: Array, spacing: Sequence[float]) -> tuple[Array, Array]:
    """Distances from each surface voxel of `a` to the surface of `b`, and back. a, b: (*S) bool, neither empty."""
    joint = np.argwhere(a | b)
    box = tuple(slice(low, high + 1) for low, high in zip(joint.min(0), joint.max(0), strict=True))
    a, b = np.pad(a[box], 1), np.pad(b[box], 1)  # the rim keeps a mask that touches the image's edge a closed surface
    edge_a, edge_b = a & ~binary_erosion(a), b & ~binary_erosion(b)
    to_a, to_b = (distance_transform_edt(~edge, sampling=spacing) for edge in (edge_a, edge_b))
    return to_b[edge_a], to_a[edge_b]


def jaccard(prediction: Array, truth: Array) -> float:
    """Region similarity J of two masks (*S) bool: |A∩B| / |A∪B|; both empty is 1 (Perazzi et al. 2016, DAVIS)."""
    union = int((prediction | truth).sum())
    return int((prediction & truth).sum()) / union if union else 1.0


def contour(prediction: Array, truth: Array, bound: float = BOUND) -> float:
    """Contour accuracy F of two masks (H, W) bool: the harmonic mean of the shares of each contour near the other (DAVIS).

    A contour is the elements that differ from the next one along either axis or the diagonal (Martin's seg2bmap); near is
    within ⌈bound · diagonal⌉ elements, that is, under the other's dilation by a disk. Both without contour is 1, one is 0.
    """
    a, b = _contour(prediction), _contour(truth)
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    joint = np.argwhere(a | b)
    box = tuple(slice(low, high + 1) for low, high in zip(joint.min(0), joint.max(0), strict=True))
    a, b, reach = a[box], b[box], np.ceil(bound * np.linalg.norm(truth.shape))
    precision = float((distance_transform_edt(~b)[a] <= reach).mean())
    recall = float((distance_transform_edt(~a)[b] <= reach).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _contour(mask: Array) -> Array:
    next_ = np.pad(mask, ((0, 1), (0, 1)), mode="edge")  # the image's edge is no contour
    return np.asarray((mask != next_[:-1, 1:]) | (mask != next_[1:, :-1]) | (mask != next_[1:, 1:]))


def tracking(prediction: Array, truth: Array, objects: Sequence[int]) -> dict[str, float]:
    """Scores of the label maps of one sequence (T, H, W), means over `objects` (label values), as DAVIS semi-supervised does.

    J and F are means over frames, "J&F" the mean of both; "recall" is the share of frames over 0.5, "decay" the mean over the
    first quarter of frames minus that over the last. The first frame is given, and the last is left out by the protocol
    (Perazzi et al. 2016; Pont-Tuset et al. 2017), which knows every frame; where truth is −1 throughout some, all known ones
    after the first count. An element of −1 in a known frame counts nowhere. Raises ValueError when shapes differ or no frame is
    left.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} are not on one grid")
    known = np.asarray((truth >= 0).any((1, 2)))
    scored = np.flatnonzero(known)
    scored = scored[(scored > 0) & (scored < len(truth) - bool(known.all()))]
    if not len(scored):
        raise ValueError(f"{int(known.sum())} known frames: none is left beside the first and the last")
    scores: dict[str, float] = {}
    pairs = [(np.where(truth[i] < 0, -1, prediction[i]), truth[i]) for i in scored]
    for name, metric in (("J", jaccard), ("F", contour)):
        frames = np.array([[metric(p == value, t == value) for p, t in pairs] for value in objects])
        edge = np.floor(np.linspace(0, frames.shape[1] - 1, 5) + 0.5).astype(int)  # quarters that share their ends
        early, late = frames[:, :edge[1] + 1], frames[:, edge[3]:]
        scores |= {name: float(frames.mean()), f"{name} recall": float((frames > 0.5).mean()),
                   f"{name} decay": float(early.mean() - late.mean())}
    return {"J&F": (scores["J"] + scores["F"]) / 2, **scores}


def pck(prediction: Array, truth: Array, alpha: float) -> float:
    """Share of correct keypoints of one sequence: those within alpha · size of the truth, averaged over keypoints.

    prediction, truth: (T, K, 2), NaN where a point is not there: it is not scored where the truth lacks it, and wrong where the
    prediction does. size: 0.6 times the diagonal of the box around the frame's true points, as JHMDB is scored (Wang et al.
    2019; Jabri et al. 2020). The first frame is given and not scored. Raises ValueError when no point is left.
    """
    known = np.asarray(~np.isnan(truth[1:]).any(-1))
    if not known.any():
        raise ValueError("no keypoint is known after the first frame")
    filled = np.where(known[..., None], truth[1:], np.nan)
    seen = known.any(1)
    size = np.full(len(known), np.nan)
    size[seen] = 0.6 * np.linalg.norm(np.nanmax(filled[seen], 1) - np.nanmin(filled[seen], 1), axis=-1)
    right = np.linalg.norm(prediction[1:] - filled, axis=-1) <= alpha * size[:, None]
    scored = known.any(0)
    return float(((right & known).sum(0)[scored] / known.sum(0)[scored]).mean())


def part_iou(prediction: Array, truth: Array, parts: Sequence[int]) -> float:
    """Mean IoU of one shape over the parts of its category: |A∩B| / |A∪B|, 1 for a part that neither has (Yi et al. 2016).

    prediction, truth: (N,) part of each point; where the truth is −1 a point does not count. parts: of the category, values.
    """
    known = truth >= 0
    return float(np.mean([jaccard(prediction[known] == part, truth[known] == part) for part in parts]))


def point_counts(prediction: Array, truth: Array, classes: Mapping[int, str]) -> dict[str, dict[str, float]]:
    """What `RATIOS` are made of, of one scene and each class: points of the intersection, the union, the truth.

    prediction, truth: (N,) class of each point; where the truth is −1 a point does not count.
    """
    known = truth >= 0
    prediction, truth = prediction[known], truth[known]
    counts: dict[str, dict[str, float]] = {name: {} for name in COUNTS}
    for value, name in classes.items():
        a, b = prediction == value, truth == value
        for key, mask in zip(COUNTS, (a & b, a | b, b), strict=True):
            counts[key][name] = float(mask.sum())
    return counts


def ratio(above: Array, below: Array, pooled: bool = False) -> Array:
    """Counts (…, C) of classes to one figure (…): pooled, Σ above / Σ below; else the mean of above / below over the classes
    that have any below; NaN where none has.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        if pooled:
            return np.asarray(above.sum(-1) / below.sum(-1))
        known = below > 0
        return np.asarray(np.where(known, above / below, 0.0).sum(-1) / known.sum(-1))


def means(cases: Sequence[Mapping[str, Mapping[str, float]]], categories: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of scored cases: metric -> {"": over all classes, class: of it alone}; `RATIOS` in place of their counts.

    cases: metric -> class -> value. categories: of each case, for `BY_CATEGORY`. A class of which a set has none is left out.
    """
    classes = list(next(iter(cases[0].values())))
    table = {name: np.array([[case[name][c] for c in classes] for case in cases]) for name in cases[0]}
    member = (np.array(categories)[:, None] == np.unique(categories)).astype(float)
    found: dict[str, dict[str, float]] = {}
    if set(COUNTS) <= set(table):
        sums = {name: table.pop(name).sum(0) for name in COUNTS}
        for name, (above, below, pooled) in RATIOS.items():
            each = {c: float(a / b) for c, a, b in zip(classes, sums[above], sums[below], strict=True) if b}
            found[name] = {"": float(ratio(sums[above], sums[below], pooled)), **each}
    for name, values in table.items():
        one = ratio(member.T @ values.mean(1), member.sum(0)) if name in BY_CATEGORY else values.mean()
        found[name] = {"": float(one), **dict(zip(classes, values.mean(0).tolist(), strict=True))}
        if name == "few-shot":
            found["few-shot SD"] = {"": float(values.mean(1).std(ddof=1)),
                                    **dict(zip(classes, values.std(0, ddof=1).tolist(), strict=True))}
    return found


# Set metrics: target (n,) integers; probabilities (n, K) with optional weights (…, n) of the cases, as a bootstrap needs, or
# (…, n, K) without weights, as a permutation test needs. All return (…).

def _ties(score: Array) -> tuple[Array, Array, Array]:
    """Order (…, n) by falling score, and in that order the first and the last place of each element's group of equals."""
    order = np.argsort(-score, axis=-1, kind="stable")
    ranked = np.take_along_axis(score, order, -1)
    n = score.shape[-1]
    place = np.arange(n)
    change = ranked[..., 1:] != ranked[..., :-1]
    edge = np.ones((*score.shape[:-1], 1), dtype=bool)
    first = np.maximum.accumulate(np.where(np.concatenate([edge, change], -1), place, 0), -1)
    last = np.minimum.accumulate(np.where(np.concatenate([change, edge], -1), place, n - 1)[..., ::-1], -1)[..., ::-1]
    return order, first, last


def _running(positive: Array, score: Array, weight: Array | None) -> tuple[Array, Array, Array, Array, Array, Array]:
    """For each positive: its weight, then of positives and of all cases the weight above its group of ties and with it.

    Returns own, positives above, positives with, all above, all with (…, positives), and the weight of everything (…, 1).
    """
    order, first, last = _ties(score)
    if weight is None:
        sign = positive[order].astype(float)  # one entry for every case: those that are no positive weigh nothing
        hits = np.cumsum(sign, -1)
        return (sign, np.take_along_axis(hits - sign, first, -1), np.take_along_axis(hits, last, -1), first, last + 1,
                np.array([float(score.shape[-1])]))
    at = np.flatnonzero(positive[order])
    ordered = weight[..., order]
    total, own = np.cumsum(ordered, -1), ordered[..., at]
    hits = np.concatenate([np.zeros((*own.shape[:-1], 1)), np.cumsum(own, -1)], -1)
    return (own, hits[..., np.searchsorted(at, first[at])], hits[..., np.searchsorted(at, last[at], "right")],
            total[..., first[at]] - ordered[..., first[at]], total[..., last[at]], total[..., -1:])


def binary_auroc(positive: Array, score: Array, weight: Array | None = None) -> Array:
    """Area under the ROC curve, ties counted half: P(s⁺ > s⁻) + ½ P(s⁺ = s⁻); NaN when a class has no weight.

    positive: (n,) bool. score: (n,), with weight (…, n) or without; or (…, n) without. Returns (…).
    """
    own, above, through, all_above, all_through, total = _running(positive, score, weight)
    plus = own.sum(-1)
    minus = total[..., 0] - plus
    beaten = minus[..., None] - (all_above - above + all_through - through) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(plus * minus > 0, (own * beaten).sum(-1) / (plus * minus), np.nan)


def binary_auprc(positive: Array, score: Array, weight: Array | None = None) -> Array:
    """Average precision, Σ (R_k − R_{k−1}) P_k over distinct scores; NaN without positives. Shapes as in binary_auroc."""
    own, _, through, _, all_through, _ = _running(positive, score, weight)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((own * np.nan_to_num(through / all_through)).sum(-1) / own.sum(-1))


def _macro(binary: Callable[..., Array], target: Array, probabilities: Array, weight: Array | None) -> Array:
    """The positive class (index 1) of two; else the mean of one-vs-rest over the classes that occur."""
    classes = probabilities.shape[-1]
    if classes == 2:
        return binary(target == 1, probabilities[..., 1], weight)
    each = np.stack([binary(target == c, probabilities[..., c], weight) for c in range(classes)])
    known = ~np.isnan(each)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, each, 0.0).sum(0) / known.sum(0))


def _mean(value: Array, weight: Array | None) -> Array:
    return np.asarray(value.mean(-1) if weight is None else weight @ value / weight.sum(-1))


def auroc(target: Array, probabilities: Array, weight: Array | None = None) -> Array:
    """Area under the ROC curve; macro one-vs-rest for more than two classes. NaN when only one class occurs."""
    return _macro(binary_auroc, target, probabilities, weight)


def auprc(target: Array, probabilities: Array, weight: Array | None = None) -> Array:
    """Average precision; macro one-vs-rest for more than two classes."""
    return _macro(binary_auprc, target, probabilities, weight)


def accuracy(target: Array, probabilities: Array, weight: Array | None = None) -> Array:
    return _mean(_hit(target, probabilities), weight)


def _hit(target: Array, probabilities: Array) -> Array:
    return np.asarray((probabilities.argmax(-1) == target).astype(float))


def top5(target: Array, probabilities: Array, weight: Array | None = None) -> Array:
    """Share of cases whose class is among the five most probable; of equals the first class counts as the more probable."""
    return _mean(_among(target, probabilities), weight)


def _among(target: Array, probabilities: Array) -> Array:
    own = np.take_along_axis(probabilities, np.broadcast_to(target[:, None], (*probabilities.shape[:-1], 1)), -1)
    before = np.arange(probabilities.shape[-1]) < target[:, None]
    rank = ((probabilities > own) | (before & (probabilities == own))).sum(-1)
    return np.asarray((rank < TOP).astype(float))


def recall(target: Array, probabilities: Array, label: int, weight: Array | None = None) -> Array:
    """Accuracy on the cases of one class; NaN when it has no weight. The mean over classes is the balanced accuracy."""
    mine = target == label
    hit = (probabilities[..., mine, :].argmax(-1) == label).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        if weight is None:
            return np.asarray(hit.mean(-1) if mine.any() else np.full(hit.shape[:-1], np.nan))
        return np.asarray(weight[..., mine] @ hit / weight[..., mine].sum(-1))


def balanced_accuracy(target: Array, probabilities: Array, weight: Array | None = None) -> Array:
    """Mean recall over the classes that occur."""
    hit = _hit(target, probabilities)
    member = np.eye(probabilities.shape[-1])[target]
    right = hit @ member if weight is None else weight @ (hit[:, None] * member)
    mass = member.sum(0) if weight is None else weight @ member
    return np.asarray((right / np.where(mass > 0, mass, 1)).sum(-1) / (mass > 0).sum(-1))


def ece(target: Array, probabilities: Array, weight: Array | None = None, bins: int = BINS) -> Array:
    """Expected calibration error (Guo et al. 2017): Σ_b (n_b/n) |accuracy_b − confidence_b|.

    Confidence is the largest probability; `bins` bins of equal width on (0, 1], closed above.
    """
    hit, confidence, place = _confidence(target, probabilities, bins)
    gap = hit - confidence
    if weight is None:
        return np.asarray(sum(np.abs((gap * (place == b)).sum(-1)) for b in range(bins)) / len(target))
    return np.asarray(np.abs(weight @ (gap[:, None] * np.eye(bins)[place])).sum(-1) / weight.sum(-1))


def brier(target: Array, probabilities: Array, weight: Array | None = None) -> Array:
    """Mean over cases of Σ_c (p_c − [c is the target])²: 0 is perfect, 2 the worst (Brier's own form, over all classes)."""
    return _mean(_squares(target, probabilities), weight)


def _squares(target: Array, probabilities: Array) -> Array:
    truth = np.eye(probabilities.shape[-1])[target]
    return np.asarray(((probabilities - truth) ** 2).sum(-1))


def _confidence(target: Array, probabilities: Array, bins: int) -> tuple[Array, Array, Array]:
    hit = _hit(target, probabilities)
    confidence = probabilities.max(-1)
    return hit, confidence, np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def reliability(target: Array, probabilities: Array, bins: int = BINS) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, cases) of every bin of `ece` that holds cases. probabilities: (n, K)."""
    hit, confidence, place = _confidence(target, probabilities, bins)
    return [(float(confidence[place == b].mean()), float(hit[place == b].mean()), int((place == b).sum()))
            for b in range(bins) if (place == b).any()]


def confusion(target: ArrayLike, predicted: ArrayLike, classes: int) -> Array:
    """(classes, classes) counts; rows are the truth."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (np.asarray(target), np.asarray(predicted)), 1)
    return table


SET_METRICS: dict[str, SetMetric] = {"auroc": auroc, "auprc": auprc, "accuracy": accuracy, "top5": top5,
                                     "balanced_accuracy": balanced_accuracy, "ece": ece, "brier": brier}
RANK_METRICS = ("auroc", "auprc")  # depend on the order of scores only
CASE_METRICS: dict[str, Callable[[Array, Array], Array]] = {  # means of one value per case, (…, n)
    "accuracy": _hit, "top5": _among, "brier": _squares}
COUNTS = ("intersection", "union", "truth")
RATIOS: dict[str, tuple[str, str, bool]] = {  # of sums over the set: above, below, pooled over classes
    "miou": ("intersection", "union", False), "oa": ("intersection", "truth", True), "macc": ("intersection", "truth", False)}
BY_CATEGORY = ("class_miou",)  # means over the categories of the means over their cases
HIGHER = {"dice": True, "hd95": False, "nsd": True, "auroc": True, "auprc": True, "accuracy": True, "top5": True,
          "balanced_accuracy": True, "ece": False, "brier": False, "J&F": True, "J": True, "F": True, "J recall": True,
          "F recall": True, "J decay": False, "F decay": False, "mAP": True, **{f"PCK@{a}": True for a in ALPHAS},
          **{f"R@{k}": True for k in RECALLS}, "instance_miou": True, "class_miou": True, "point_accuracy": True, "miou": True,
          "oa": True, "macc": True, "few-shot": True, **{name: True for scoring in SCORINGS.values() for name in scoring}}
LABELS = {"dice": "Dice", "hd95": "HD95", "nsd": "NSD", "auroc": "AUROC", "auprc": "AUPRC", "accuracy": "accuracy",
          "top5": "top-5 accuracy", "balanced_accuracy": "balanced accuracy", "ece": "calibration error",
          "brier": "Brier score", "J&F": "J&F", "J": "J (region)", "F": "F (contour)", "J recall": "J recall",
          "F recall": "F recall", "J decay": "J decay", "F decay": "F decay", "mAP": "mAP",
          **{f"PCK@{a}": f"PCK@{a}" for a in ALPHAS}, **{f"R@{k}": f"R@{k}" for k in RECALLS},
          "instance_miou": "instance mIoU", "class_miou": "class mIoU", "point_accuracy": "share of points right",
          "miou": "mIoU", "oa": "overall accuracy", "macc": "mean class accuracy", "few-shot": "few-shot accuracy",
          "ap": "AP", "ap10": "AP10", "ap25": "AP25", "ap50": "AP50", "ap75": "AP75", "ap small": "AP small",
          "ap medium": "AP medium", "ap large": "AP large", "ar100": "AR100", "froc": "FROC score", "mask ap": "mask AP",
          "mask ap50": "mask AP50", "map": "mAP", "ap40": "AP40", "ap40 bev": "AP40 from above", "ap40 easy": "AP40 easy",
          "ap40 hard": "AP40 hard", "tmap": "mAP over time",
          **{f"sensitivity@{rate}": f"sensitivity at {rate}" for rate in RATES},
          **{name: f"mAP at tIoU {name[5:]}" for name in SCORINGS["temporal"] if "@" in name}}


def set_metrics(classes: int) -> dict[str, SetMetric]:
    """Those that say something of so many classes: of up to five, the five most probable are all."""
    return {name: metric for name, metric in SET_METRICS.items() if name != "top5" or classes > TOP}


def classification(target: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """The set metrics of a test set. target: (n,) integers; probabilities: (n, K), rows sum to 1. NaN where undefined."""
    t, p = np.asarray(target), np.asarray(probabilities, dtype=float)
    if p.ndim != 2 or t.shape != p.shape[:1]:
        raise ValueError(f"target {t.shape} and probabilities {p.shape} do not fit; wanted (n,) and (n, classes)")
    return {name: float(metric(t, p)) for name, metric in set_metrics(p.shape[1]).items()}
