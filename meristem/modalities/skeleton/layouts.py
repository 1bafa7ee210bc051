"""Which joints a recording has, and how they hang together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Name = Literal["ntu", "openpose", "cmu"]


@dataclass(frozen=True)
class Layout:
    """joints: their names. parent: of each joint, the one at the other end of its bone; its own number where it has none.
    mirror: of each joint, the one on the other side of the body, itself in the middle. centre: the joint that places a person.
    dims, unit: of coordinates. fps: of files that do not tell theirs. people: most at a time.
    """

    joints: tuple[str, ...]
    parent: tuple[int, ...]
    centre: int
    dims: int
    unit: str
    fps: float
    people: int

    @property
    def mirror(self) -> tuple[int, ...]:
        other = {"left": "right", "right": "left"}
        return tuple(self.joints.index(" ".join(other.get(word, word) for word in name.split())) for name in self.joints)

    def __len__(self) -> int:
        return len(self.joints)


def _sided(side: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{side} {name}" for name in names)


ARM, LEG = ("shoulder", "elbow", "wrist", "hand"), ("hip", "knee", "ankle", "foot")
NTU = Layout(
    ("base of spine", "middle of spine", "neck", "head", *_sided("left", *ARM), *_sided("right", *ARM), *_sided("left", *LEG),
     *_sided("right", *LEG), "top of spine", *_sided("left", "tip", "thumb"), *_sided("right", "tip", "thumb")),
    (1, 20, 20, 2, 20, 4, 5, 6, 20, 8, 9, 10, 0, 12, 13, 14, 0, 16, 17, 18, 20, 22, 7, 24, 11), 1, 3, "m", 30.0, 2)
"""Kinect v2 (Shahroudy et al. 2016); bones as Shi et al. 2019 (2s-AGCN) draw them."""

LIMBS = (*ARM[:3], *LEG[:3])
OPENPOSE = Layout(
    ("nose", "neck", *_sided("right", *ARM[:3]), *_sided("left", *ARM[:3]), *_sided("right", *LEG[:3]),
     *_sided("left", *LEG[:3]), "right eye", "left eye", "right ear", "left ear"),
    (1, 1, 1, 2, 3, 1, 5, 6, 2, 8, 9, 5, 11, 12, 0, 0, 14, 15), 1, 2, "px", 30.0, 2)
"""The 18 joints of OpenPose (Cao et al. 2017), as Kinetics-skeleton has them (Yan et al. 2018, ST-GCN)."""

CMU = Layout(
    ("root", *_sided("left", *LEG, "toes"), *_sided("right", *LEG, "toes"), "lower back", "upper back", "neck", "upper neck",
     "head", *_sided("left", *ARM, "tip", "thumb"), *_sided("right", *ARM, "tip", "thumb")),
    (0, 0, 1, 2, 3, 4, 0, 6, 7, 8, 9, 0, 11, 12, 13, 14, 12, 16, 17, 18, 19, 18, 12, 22, 23, 24, 25, 24), 0, 3, "m", 120.0, 1)
"""The 28 distinct ones of the 38 joints of the motion-prediction field's CMU mocap (Li et al. 2018)."""

LAYOUTS: dict[Name, Layout] = {"ntu": NTU, "openpose": OPENPOSE, "cmu": CMU}
