"""Has the pretraining, or the labelled training, seen what is tested on? By subject, by content and by likeness."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from meristem.modalities.likeness import Likeness


class Leakage(BaseModel):
    """What was found, as counts and as a sentence for the report.

    clean: nothing of the test set was seen. transductive: test subjects or images, or copies of them, were seen in pretraining,
    without their labels. contaminated: they are among the labelled training cases. unknown: what the weights were pretrained on
    is not recorded. subjects, contents: how many of the test set were met, in pretraining or with labels. near: how many more
    samples were met as a copy that was saved again, turned, trimmed or the like; None where that could not be compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    verdict: Literal["clean", "transductive", "contaminated", "unknown"]
    subjects: int
    contents: int
    near: int | None = None
    test_subjects: int
    test_contents: int
    sentence: str


def copies(tested: Mapping[str, str], known: Iterable[str], likeness: Likeness) -> set[str]:
    """Contents of the test set (content -> fingerprint in base64) that look like one of the known fingerprints."""
    names = sorted(tested)
    found = likeness.alike([base64.b64decode(tested[name]) for name in names], [base64.b64decode(code) for code in known])
    return {names[i] for i in np.flatnonzero(found.any(1))}


def audit(test_subjects: Iterable[str], test_contents: Iterable[str], seen_subjects: Iterable[str] | None,
          seen_contents: Iterable[str] | None, labelled_subjects: Iterable[str] = (), labelled_contents: Iterable[str] = (),
          same_key: bool = True, spoiled: str = "", seen_near: Iterable[str] | None = None,
          labelled_near: Iterable[str] = ()) -> Leakage:
    """Compare the test set with the pretraining set (`seen`; None: not recorded) and with the labelled training set.

    Subjects are pseudonyms, contents are hashes; `x#3` is part 3 of x, and was met where any of x was. same_key: both manifests
    made their pseudonyms with one key; otherwise subjects of pretraining cannot be compared, and only contents are. spoiled:
    what else makes a test sample known that was met in pretraining. seen_near, labelled_near: the test contents that look like
    one of them (`copies`); None: they were not compared. Of a sample that was met itself its likeness to others says no more.
    """
    subjects, contents = set(test_subjects), set(test_contents)
    size = f"{_count(subjects, 'test subject')}, {_count(contents, 'test image')}"
    with_labels = subjects & set(labelled_subjects), contents & set(labelled_contents)
    known = {*map(_whole, labelled_contents)}
    like_labelled = {name for name in labelled_near if name not in known}

    def result(verdict: Literal["clean", "transductive", "contaminated", "unknown"], met: tuple[set[str], set[str]],
               near: set[str] | None, sentence: str) -> Leakage:
        return Leakage(verdict=verdict, subjects=len(met[0]), contents=len(met[1]), near=None if near is None else len(near),
                       test_subjects=len(subjects), test_contents=len(contents), sentence=sentence)

    if any(with_labels) or like_labelled:
        return result("contaminated", with_labels, like_labelled,
                      f"Contaminated: {_count(with_labels[0], 'subject')} and {_count(with_labels[1], 'image')} of the test "
                      f"set are among the labelled training cases{_more(like_labelled)} ({size}). The figures here do not "
                      "measure generalisation.")
    if seen_subjects is None or seen_contents is None:
        return result("unknown", (set(), set()), None,
                      f"Unknown: the weights do not record what they were pretrained on, so overlap with the test set ({size}) "
                      "cannot be excluded.")
    met = _within(subjects, seen_subjects) if same_key else set[str](), _within(contents, seen_contents)
    seen = {*map(_whole, seen_contents)}
    like_seen = None if seen_near is None else {name for name in seen_near if name not in seen}
    by = [*["subject"] * same_key, "content hash", *["likeness"] * (like_seen is not None)]
    basis = f"by {' and '.join([', '.join(by[:-1]), by[-1]] if len(by) > 1 else by)}"
    if not same_key:
        basis += "; subjects could not be compared, because the two manifests made their pseudonyms with different keys"
    if like_seen is None:
        basis += "; near-duplicates could not be compared, because the weights do not record fingerprints like this data's"
    if (any(met) or like_seen) and spoiled:
        return result("contaminated", met, like_seen,
                      f"Contaminated: {spoiled} ({size}). The figures here do not measure generalisation.")
    if beside := _within(contents, labelled_contents):
        how = "in pretraining and beside labelled parts" if any(met) else "beside labelled parts, not in pretraining"
        return result("transductive", (subjects, beside), like_seen,
                      f"Transductive by nature: all that is tested is part of samples that were met without its labels, {how} "
                      f"({_count(subjects, 'test case')} in {_count({*map(_whole, contents)}, 'sample')}; compared {basis}). "
                      "The gain may not carry over to new samples.")
    if any(met) or like_seen:
        return result("transductive", met, like_seen,
                      f"Transductive: {_count(met[0], 'subject')} and {_count(met[1], 'image')} of the test set were seen in "
                      f"pretraining{_more(like_seen)}, without labels ({size}; compared {basis}). The gain may not carry over "
                      "to new subjects.")
    verdict: Literal["clean", "unknown"] = "clean" if same_key else "unknown"
    return result(verdict, met, like_seen,
                  f"{verdict.capitalize()}: none of the test set was met in pretraining ({size}; compared {basis}).")


def _more(near: set[str] | None) -> str:
    return f", and near-duplicates of {_count(near, 'more image')}" if near else ""


def _whole(name: str) -> str:
    return name.partition("#")[0]


def _within(names: set[str], others: Iterable[str]) -> set[str]:
    """Those that are of a sample that is, or has a part, among the others."""
    known = {_whole(other) for other in others}
    return {name for name in names if _whole(name) in known}


def _count(of: set[str], what: str) -> str:
    return f"{len(of)} {what}{'s' * (len(of) != 1)}"
