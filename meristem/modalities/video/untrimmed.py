"""Untrimmed videos made of trimmed ones: clips of actions between clips of none, at seconds that are known."""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F

from meristem.errors import DataError
from meristem.modalities.video.readers import open_video

TABLE = "clips.csv"  # file, label, and the source that a clip was cut from


def write_untrimmed(clips: Path, root: Path, count: int, seed: int = 0, background: str = "noFight", rate: int = 12,
                    side: int = 128, actions: tuple[int, int] = (2, 4), test: float = 0.3) -> Path:
    """Write `count` films `videos/film_00.mp4`, … and their `annotations.json` in ActivityNet's format; returns that.

    clips: a folder with `TABLE`. A film has so many actions, from and to, each with 1 to 3 clips of `background` before it and
    behind the last. Clips of one source go to training or to testing, about the share `test` of the films; a film draws them
    with replacement. rate: frames a second; side: of the square frames, whose content keeps no proportions.
    """
    rng = np.random.default_rng(seed)
    with (clips / TABLE).open(newline="") as file:
        table = [row for row in csv.DictReader(file) if (clips / row["file"]).is_file()]
    sources = sorted({row["source"] for row in table})
    held_out = set(rng.permutation(sources)[:round(test * len(sources))].tolist())
    (root / "videos").mkdir(parents=True, exist_ok=True)
    database: dict[str, Any] = {}
    for number in range(count):
        testing = number >= count - round(test * count)
        by_label: dict[str, list[Path]] = defaultdict(list)
        for row in table:
            if (row["source"] in held_out) == testing:
                by_label[row["label"]].append(clips / row["file"])
        names = sorted(by_label.keys() - {background})
        if not names or background not in by_label:
            raise DataError("label", f"the {'test' if testing else 'training'} sources have no action or no {background}",
                            "Choose another seed, or another background.")
        plan: list[str] = []
        for _ in range(int(rng.integers(*actions, endpoint=True))):
            plan += [background] * int(rng.integers(1, 3, endpoint=True)) + [names[int(rng.integers(len(names)))]]
        plan += [background] * int(rng.integers(1, 3, endpoint=True))
        chosen = [by_label[name][int(rng.integers(len(by_label[name])))] for name in plan]
        lengths = _film(root / "videos" / f"film_{number:02d}.mp4", chosen, rate, side)
        ends = np.cumsum(lengths) / rate
        segments = [{"label": name, "segment": [round(float(end - n / rate), 4), round(float(end), 4)]}
                    for name, end, n in zip(plan, ends, lengths, strict=True) if name != background]
        database[f"film_{number:02d}"] = {"subset": "testing" if testing else "training", "duration": round(float(ends[-1]), 4),
                                          "annotations": segments}
    path = root / "annotations.json"
    path.write_text(json.dumps({"version": "made", "database": database}, indent=1))
    return path


def _film(path: Path, clips: Sequence[Path], rate: int, side: int) -> list[int]:
    """Write one film of all clips at `rate`; returns how many frames each came to."""
    lengths = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        stream.options = {"crf": "23", "g": str(rate)}
        for clip in clips:
            lengths.append(0)
            for frame in _frames(clip, rate, side):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
                lengths[-1] += 1
        container.mux(stream.encode())
    return lengths


def _frames(clip: Path, rate: int, side: int) -> Iterator[np.ndarray]:
    """The frames (side, side, 3) on screen `rate` times a second."""
    video = open_video(clip, "auto", 25.0, 1 << 26)
    try:
        seconds = np.arange(0, video.times[-1] + 1e-6, 1 / rate)
        frames = video.read((np.searchsorted(video.times, seconds + 1e-6, "right") - 1).tolist())
    finally:
        video.close()
    x = F.interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2), (side, side), mode="bilinear", antialias=True)
    yield from x.permute(0, 2, 3, 1).contiguous().numpy()


def main() -> None:
    """`python -m meristem.modalities.video.untrimmed SOURCE OUT [--count N] [--seed N] [--background LABEL]`."""
    parser = argparse.ArgumentParser(description="Make untrimmed films, with known seconds, of the clips of a folder.")
    parser.add_argument("clips", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--background", default="noFight", help="label of the clips in which nothing is sought")
    given = parser.parse_args()
    write_untrimmed(given.clips, given.directory, given.count, given.seed, given.background)


if __name__ == "__main__":
    main()
