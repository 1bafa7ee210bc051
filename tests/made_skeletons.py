"""Skeleton files as devices and data sets write them, of made movements."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np


def moves(frames: int, joints: int, dims: int, seed: int = 0) -> np.ndarray:
    """(frames, joints, dims) every joint swings about a place of its own."""
    rng = np.random.default_rng(seed)
    at, phase = rng.normal(0, 0.5, (joints, dims)), rng.uniform(0, 6, (joints, dims))
    return at + 0.1 * np.sin(np.arange(frames)[:, None, None] * 0.3 + phase)


def kinect(path: Path, people: list[dict[str, np.ndarray]], tracked: int = 2) -> Path:
    """people: of each frame, number of the device -> places (25, 3)."""
    lines = [str(len(people))]
    for frame in people:
        lines.append(str(len(frame)))
        for body, joints in frame.items():
            lines += [f"{body} 0 1 1 1 1 0 0.02 -0.1 2", str(len(joints))]
            lines += [" ".join(f"{x:.6f}" for x in (*xyz, *[0.0] * 8)) + f" {tracked}" for xyz in joints]
    path.write_text("\n".join(lines) + "\n")
    return path


def openpose(path: Path, places: np.ndarray, label: str = "juggling", score: float = 0.5) -> Path:
    """places: (frames, people, 18, 2); of several people the first is the surest."""
    frames = [{"frame_index": t + 1, "skeleton": [{"pose": person.ravel().tolist(), "score": [score / (i + 1)] * 18}
                                                  for i, person in enumerate(frame)]} for t, frame in enumerate(places)]
    path.write_text(json.dumps({"data": frames, "label": label, "label_index": 3}))
    return path


def mocap(path: Path, frames: int, seed: int = 0) -> Path:
    """Random joint angles that change slowly, compressed where the name says so."""
    channels = np.random.default_rng(seed).normal(0, 0.1, (frames, 117)).cumsum(0) * 0.1
    text = "\n".join(",".join(f"{x:.6g}" for x in row) for row in channels)
    if path.suffix == ".xz":
        path.write_bytes(lzma.compress(text.encode()))
    else:
        path.write_text(text)
    return path
