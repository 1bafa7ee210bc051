"""What `data check` is told of a recording beside its joints as they are trained on."""

from __future__ import annotations

import numpy as np

from meristem.modalities.facts import Doubt, Facts
from meristem.modalities.skeleton.files import Recording

STILL = 1e-9  # of the farthest place of a joint: where none moves more from frame to frame, nothing moves


def facts(recording: Recording, fps: float | None) -> Facts:
    """fps: of the recipe; None: of the layout."""
    place, layout = recording.place, recording.layout
    seen = ~np.isnan(place[..., 0])
    people = seen.any((0, 2))
    found = Facts({"people": float(people.sum()), "frames without anybody": float((~seen.any((1, 2))).mean()),
                   "people in a frame": float(seen.any(2).sum(1).mean())},
                  {"joints": str(len(layout)), "coordinates": f"{layout.dims}, {layout.unit}",
                   "frames per second": f"{fps or layout.fps:g}"})
    never = [layout.joints[j] for j in np.flatnonzero(~seen[:, people].any((0, 1)))]
    if never:
        found.doubts.append(Doubt("joints", f"{len(never)} of {len(layout)} joints are never seen: {', '.join(never)}",
                                  "Was another layout of joints meant, or a part of the body out of sight?"))
    steps = np.abs(np.diff(place, axis=0))
    if not np.isnan(steps).all() and np.nanmax(steps) <= STILL * np.nanmax(np.abs(place)):
        found.doubts.append(Doubt("still", "nothing moves in it", "Was one frame exported again and again?"))
    return found
