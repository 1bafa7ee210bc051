"""Has the pretraining, or the labelled training, seen what is tested on? By subject and by content."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Leakage(BaseModel):
    """What was found, as counts and as a sentence for the report.

    clean: nothing of the test set was seen. transductive: test subjects or images were seen in pretraining, without their
    labels. contaminated: test subjects or images are among the labelled training cases. unknown: what the weights were
    pretrained on is not recorded. subjects, contents: how many of the test set were met, in pretraining or with labels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    verdict: Literal["clean", "transductive", "contaminated", "unknown"]
    subjects: int
    contents: int
    test_subjects: int
    test_contents: int
    sentence: str


def audit(test_subjects: Iterable[str], test_contents: Iterable[str], seen_subjects: Iterable[str] | None,
          seen_contents: Iterable[str] | None, labelled_subjects: Iterable[str] = (), labelled_contents: Iterable[str] = (),
          same_key: bool = True, spoiled: str = "") -> Leakage:
    """Compare the test set with the pretraining set (`seen`; None: not recorded) and with the labelled training set.

    Subjects are pseudonyms, contents are hashes; `x#3` is part 3 of x, and was met where any of x was. same_key: both manifests
    made their pseudonyms with one key; otherwise subjects of pretraining cannot be compared, and only contents are. spoiled:
    what else makes a test sample known that was met in pretraining.
    """
    subjects, contents = set(test_subjects), set(test_contents)
    size = f"{_count(subjects, 'test subject')}, {_count(contents, 'test image')}"
    with_labels = subjects & set(labelled_subjects), contents & set(labelled_contents)

    def result(verdict: Literal["clean", "transductive", "contaminated", "unknown"], met: tuple[set[str], set[str]],
               sentence: str) -> Leakage:
        return Leakage(verdict=verdict, subjects=len(met[0]), contents=len(met[1]), test_subjects=len(subjects),
                       test_contents=len(contents), sentence=sentence)

    if any(with_labels):
        return result("contaminated", with_labels,
                      f"Contaminated: {_count(with_labels[0], 'subject')} and {_count(with_labels[1], 'image')} of the test "
                      f"set are among the labelled training cases ({size}). The figures here do not measure generalisation.")
    if seen_subjects is None or seen_contents is None:
        return result("unknown", (set(), set()),
                      f"Unknown: the weights do not record what they were pretrained on, so overlap with the test set ({size}) "
                      "cannot be excluded.")
    met = _within(subjects, seen_subjects) if same_key else set[str](), _within(contents, seen_contents)
    basis = "by subject and by content hash" if same_key else \
        "by content hash only: the two manifests made their pseudonyms with different keys, so subjects could not be compared"
    if any(met) and spoiled:
        return result("contaminated", met, f"Contaminated: {spoiled} ({size}). The figures here do not measure generalisation.")
    if beside := _within(contents, labelled_contents):
        how = "in pretraining and beside labelled parts" if any(met) else "beside labelled parts, not in pretraining"
        return result("transductive", (subjects, beside),
                      f"Transductive by nature: all that is tested is part of samples that were met without its labels, {how} "
                      f"({_count(subjects, 'test case')} in {_count({*map(_whole, contents)}, 'sample')}; compared {basis}). "
                      "The gain may not carry over to new samples.")
    if any(met):
        return result("transductive", met,
                      f"Transductive: {_count(met[0], 'subject')} and {_count(met[1], 'image')} of the test set were seen in "
                      f"pretraining, without labels ({size}; compared {basis}). The gain may not carry over to new subjects.")
    verdict: Literal["clean", "unknown"] = "clean" if same_key else "unknown"
    return result(verdict, met,
                  f"{verdict.capitalize()}: none of the test set was met in pretraining ({size}; compared {basis}).")


def _whole(name: str) -> str:
    return name.partition("#")[0]


def _within(names: set[str], others: Iterable[str]) -> set[str]:
    """Those that are of a sample that is, or has a part, among the others."""
    known = {_whole(other) for other in others}
    return {name for name in names if _whole(name) in known}


def _count(of: set[str], what: str) -> str:
    return f"{len(of)} {what}{'s' * (len(of) != 1)}"
