"""What `data check` is told of a graph as its file lists it, before loops and repeated edges go."""

from __future__ import annotations

from meristem.modalities.facts import Doubt, Facts
from meristem.modalities.graph.raw import Raw, both_ways

ALONE = 0.5  # share of nodes without an edge from which a graph is doubtful


def facts(raw: Raw) -> Facts:
    _, _, _, counts = both_ways(raw)
    loops, alone = counts["self-loops"], counts["isolated nodes"]
    found = Facts({}, {"numbers of a node": "0" if raw.given is None else str(raw.given.shape[1]),
                       "tags": "no" if raw.tag is None else "yes", "weights": "no" if raw.weight is None else "yes"})
    if loops:
        found.doubts.append(Doubt("loops", f"{loops} edges lead from a node to itself", "They are left out in reading."))
    if alone > ALONE * raw.nodes:
        found.doubts.append(Doubt("isolated", f"{alone} of {raw.nodes} nodes have no edge", "Are edges missing from the file?"))
    return found
