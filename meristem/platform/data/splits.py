"""Who trains, who validates, who tests: always whole subjects, seeded, stratified; and nested label budgets."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from meristem.errors import DataError, RecipeError
from meristem.modalities.rng import Rng
from meristem.platform.data.manifest import Manifest, Row

NAMES = ("train", "val", "test")
AUTO = "0.6,0.2,0.2"
BINS = 4  # quantile bins of foreground volume: enough to keep small and large apart in a test set of 20 subjects


def divide(manifest: Manifest, split: str = "auto", seed: int = 0,
           volumes: Mapping[int, float] | None = None) -> Manifest:
    """The manifest with every row in train, val or test; a subject is in one of them only.

    split: fractions `train,val,test` of the subjects; `auto`: 0.6,0.2,0.2; `every:k:f`: of the labelled subjects sorted by
    name, i % k == f to test, == (f + 1) % k to val; `every:k` is fold 0; `fold:f`: of the folds that the data declares, f to
    test, the next to val, the rest and what is in no fold to train; `fold:f:only`: f to test and all others to train. A split
    the manifest declares wins, for the subject's other rows too; the rest is drawn, leaving out val or test where labelled rows
    of it are declared. Where some subjects are labelled, unlabelled ones can only train.
    volumes: row index -> foreground volume, to stratify by where there are no classes.
    Raises DataError when a subject is declared in two splits, RecipeError when `split` cannot be read.
    """
    subjects = _by_subject(manifest.rows)
    declared = {s: {r.split for r in rows if r.split} for s, rows in subjects.items()}
    torn = [s for s, splits in declared.items() if len(splits) > 1]
    if torn:
        raise DataError("split", f"{len(torn)} subjects are declared in more than one split, the first is {torn[0]}",
                        "A subject's files must share a split: correct the split or the subject column.")
    chosen = {s: next(iter(splits)) for s, splits in declared.items() if splits}
    labelled = {s for s, rows in subjects.items() if any(r.labelled for r in rows)}
    open_ = [s for s in subjects if s not in chosen and (s in labelled or not labelled)]
    chosen |= {s: "train" for s in subjects if s not in chosen and s not in open_}
    done = {chosen[s] for s in labelled if declared[s]} if labelled else {s for s in chosen.values()}
    if split.startswith("every:"):
        chosen |= _every(split, open_)
    elif split.startswith("fold:"):
        chosen |= _declared(split, {s: {r.fold for r in subjects[s]} for s in open_})
    else:
        fractions = [0.0 if name in done and name != "train" else f for name, f in zip(NAMES, _fractions(split), strict=True)]
        chosen |= drawn([row for s in open_ for row in subjects[s]], fractions, seed, volumes)
    return manifest.with_splits({r.index: chosen[r.subject] for r in manifest.rows})


def drawn(rows: Sequence[Row], fractions: Sequence[float], seed: int = 0, volumes: Mapping[int, float] | None = None
          ) -> dict[str, str]:
    """subject -> train, val or test, at random in these proportions; stratified as `divide`."""
    strata = _strata(_by_subject(rows), volumes)
    order = [s for stratum in sorted(strata) for s in _shuffled(strata[stratum], seed, f"split {stratum}")]
    return dict(zip(order, (NAMES[i] for i in _spread(_quota(len(order), fractions))), strict=True))


def budget(rows: Sequence[Row], amount: int | float, seed: int = 0, volumes: Mapping[int, float] | None = None) -> list[Row]:
    """The labelled rows of so many subjects: amount as an int counts them, as a float is a fraction of them (1.0: all).

    Stratified by class; for one seed a smaller budget is contained in every larger one. Keeps the order of `rows`.
    Raises RecipeError when there are fewer subjects than asked for.
    """
    subjects = _by_subject([r for r in rows if r.labelled])
    n = amount if isinstance(amount, int) else math.ceil(amount * len(subjects) - 1e-9)
    if not 1 <= n <= len(subjects):
        raise RecipeError(f"a label budget of {amount} asks for {n} of {len(subjects)} labelled subjects",
                          "Ask for at least one and at most all of them.")
    strata = _strata(subjects, volumes)
    names = sorted(strata)
    waiting = [_shuffled(strata[name], seed, f"budget {name}") for name in names]
    order = [waiting[i].pop() for i in _spread([len(w) for w in waiting])]
    kept = set(order[:n])
    return [r for r in rows if r.labelled and r.subject in kept]


def _by_subject(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """In the order of true names: a subject's own where a table gives it, else its first file's.

    An order by pseudonym would make the split depend on the user's key.
    """
    subjects: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: (r.rank, r.local)):
        subjects[row.subject].append(row)
    return dict(subjects)


def _strata(subjects: Mapping[str, list[Row]], volumes: Mapping[int, float] | None) -> dict[str, list[str]]:
    """stratum -> subjects: by the commonest class of a subject's rows, else by quantile of its mean foreground volume."""
    kind: dict[str, Hashable] = {}
    for s, rows in subjects.items():
        classes = Counter(r.labels["class"] for r in rows if "class" in r.labels)
        if classes:
            kind[s] = f"class {max(sorted(classes), key=classes.__getitem__):06d}"
    sizes = {s: float(np.mean([volumes[r.index] for r in rows if r.index in volumes]))
             for s, rows in subjects.items() if volumes and s not in kind and any(r.index in volumes for r in rows)}
    edges = np.quantile(list(sizes.values()), np.linspace(0, 1, BINS + 1)[1:-1]) if sizes else np.empty(0)
    strata: dict[str, list[str]] = defaultdict(list)
    for s, rows in subjects.items():
        bin_ = f"volume {np.searchsorted(edges, sizes[s], side='right')}" if s in sizes else None
        strata[str(kind.get(s) or bin_ or ("labelled" if any(r.labelled for r in rows) else "unlabelled"))].append(s)
    return dict(strata)


def _shuffled(names: Sequence[str], seed: int, purpose: str) -> list[str]:
    return [names[i] for i in Rng.of(seed, 0, purpose).permutation("order", len(names))[0].tolist()]


def _fractions(split: str) -> list[float]:
    try:
        fractions = [float(part) for part in (AUTO if split == "auto" else split).split(",")]
    except ValueError:
        fractions = []
    if len(fractions) != 3 or min(fractions) < 0 or sum(fractions) <= 0:
        raise RecipeError(f"split '{split}' cannot be read", "Write auto, fractions train,val,test as 0.6,0.2,0.2, or every:5.")
    return fractions


def _quota(n: int, fractions: Sequence[float]) -> list[int]:
    """n divided by largest remainder; every part with a positive fraction gets one where n allows."""
    share = [f / sum(fractions) * n if sum(fractions) else 0.0 for f in fractions]
    quota = [math.floor(s) for s in share]
    for i in sorted(range(len(share)), key=lambda i: quota[i] - share[i])[:n - sum(quota)]:
        quota[i] += 1
    for i, f in enumerate(fractions):
        largest = quota.index(max(quota))
        if f > 0 and quota[i] == 0 and quota[largest] > 1:
            quota[i] += 1
            quota[largest] -= 1
    return quota


def _spread(quota: Sequence[int]) -> list[int]:
    """Part i exactly quota[i] times, in an order whose every stretch holds them in about that proportion."""
    n, left = sum(quota), list(quota)
    order = []
    for step in range(1, n + 1):
        behind = [(q * step / n - (q - rest), -q) if rest else (-math.inf, 0) for q, rest in zip(quota, left, strict=True)]
        i = behind.index(max(behind))  # the smaller quota where two are level
        order.append(i)
        left[i] -= 1
    return order


def _declared(split: str, folds: Mapping[str, set[int]]) -> dict[str, str]:
    """By the folds that the data declares; what is in none trains. Raises DataError where there are none, or a subject is in
    several.
    """
    count = 1 + max((max(f) for f in folds.values()), default=-1)
    fold, *only = split.removeprefix("fold:").split(":")
    if count < 3 or any(len(f) > 1 for f in folds.values()):
        raise DataError("split", "the data does not declare folds, each subject in one", "Use --split every:10:0 … every:10:9.")
    if not fold.isdigit() or int(fold) >= count or only not in ([], ["only"]):
        raise RecipeError(f"split '{split}' cannot be read", f"The data declares folds fold:0 to fold:{count - 1}; without "
                                                             "validation, fold:0:only.")
    held = {0: "test"} if only else {0: "test", 1: "val"}
    return {s: held.get((min(f) - int(fold)) % count, "train") if min(f) >= 0 else "train"
            for s, f in folds.items()}


def _every(split: str, open_: Sequence[str]) -> dict[str, str]:
    try:
        k, fold = (int(part) for part in f"{split}:0".split(":")[1:3])
    except ValueError:
        k = fold = 0
    if k < 3 or not 0 <= fold < k or split.count(":") > 2:
        raise RecipeError(f"split '{split}' cannot be read",
                          "Write every:5, or any whole number from 3; every:5:0 to every:5:4 are its folds.")
    return {s: {0: "test", 1: "val"}.get((i - fold) % k, "train") for i, s in enumerate(open_)}
