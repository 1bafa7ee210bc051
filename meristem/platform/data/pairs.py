"""Samples that are pairs: two pictures of one scene, as a list's column `pair` names them."""

from __future__ import annotations

from meristem.platform.data.layouts import Search


def partners(search: Search) -> list[tuple[int, ...]]:
    """Of each sample found, the numbers of its other halves: a pair is one of either to the other."""
    at = {f.paths[0]: i for i, f in enumerate(search.found)}
    found: list[set[int]] = [set() for _ in search.found]
    for a, b in search.pairs:
        if a in at and b in at:
            found[at[a]].add(at[b])
            found[at[b]].add(at[a])
    return [tuple(sorted(numbers)) for numbers in found]


def join_subjects(search: Search) -> None:
    """Let samples be of one subject that pairs link, however long the chain: no split may tear a pair."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while above.get(name, name) != name:
            name = above[name]
        return name

    numbers = partners(search)
    for f, others in zip(search.found, numbers, strict=True):
        for other in others:
            low, high = sorted((top(f.subject), top(search.found[other].subject)))
            above[high] = low
    for f in search.found:
        f.subject = top(f.subject)
