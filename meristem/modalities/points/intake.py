"""What `data check` is told of a cloud beside its points as they are trained on."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from meristem.modalities.facts import Doubt, Facts
from meristem.modalities.points.cloud import Cloud

ASKED = 2048  # points whose nearest neighbour is looked for
REPEATED = 0.1  # share of points that are another's copy from which a cloud is doubtful
FLAT = 1e-6  # of the longest extent


def facts(cloud: Cloud, unit: float) -> Facts:
    """unit: metres of the file's unit."""
    xyz = cloud.xyz[np.isfinite(cloud.xyz).all(1)] * unit
    repeated = 1 - len(np.unique(xyz, axis=0)) / len(xyz)
    extent = np.ptp(xyz, 0)
    distance = cKDTree(xyz).query(xyz[::max(len(xyz) // ASKED, 1)], 2)[0][:, 1]
    found = Facts({"distance to the next point (m)": float(np.median(distance)), "repeated points": repeated},
                  {"attributes": ", ".join(sorted(cloud.features)) or "none", "labels": "no" if cloud.label is None else "yes"})
    if repeated > REPEATED:
        found.doubts.append(Doubt("repeated", f"{repeated:.0%} of its points are copies of others", "Remove them."))
    if extent.min() <= FLAT * extent.max():
        found.doubts.append(Doubt("flat", f"all points lie in one plane (extents {', '.join(f'{e:.3g}' for e in extent)} m)",
                                  "Was a coordinate lost when it was exported?"))
    return found
