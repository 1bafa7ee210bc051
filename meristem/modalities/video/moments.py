"""By which moments a clip is known again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from meristem.modalities.image import raster

RATE = 30.0  # frames a second that are looked at
SHOWN = 128  # pixels along a side that are enough
NEWS = 24  # signs by which a frame must differ from the moment before to be the next one
ALIKE = replace(raster.ALIKE, method="moments 1")
"""The codes of pictures, one for each moment: a frame that is no longer like the one before. Any frame of a clip is then within
`NEWS` of a moment of it, wherever it is cut; where nothing moves there is one.

Measured on 213 surveillance clips of about 2 s (surv-camera-fight), 5 moments a second: of 21,753 pairs of clips of different
sources none share half of their moments. Of 825 pairs of one source 72 do: the same camera before the same scene, which is as
good as met. Of 71 that were cut at random places and saved again as H.264 (crf 30) all do. Looking takes no time that could be
measured beside decoding.
"""


class Moments:
    """Collects the codes of a clip from its frames, in order. times: (n,) seconds of all frames."""

    def __init__(self, times: np.ndarray) -> None:
        due = np.searchsorted(times, np.arange(0.0, float(times[-1]) + 1e-6, 1 / RATE), side="right") - 1
        self._due, self._next = set(due.tolist()), 0
        self._codes: list[np.ndarray] = []

    def see(self, frames: np.ndarray) -> None:
        """The next ones, (n, H, W, 3)."""
        for number, frame in enumerate(frames, self._next):
            if number in self._due and len(numbers := raster.signs(frame.transpose(2, 0, 1), SHOWN)) and (
                    not self._codes or ((numbers > 0) != (self._codes[-1] > 0)).sum() > NEWS):
                self._codes.append(numbers)
        self._next += len(frames)

    @property
    def fingerprint(self) -> bytes:
        return ALIKE.pack(np.concatenate(self._codes)) if self._codes else b""
