"""What `data check` is told of a video file beside its frames as they are trained on."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from meristem.modalities.facts import Doubt, Facts, intensities
from meristem.modalities.image import identity as pictures
from meristem.modalities.image.intake import BURNED, dicom_words
from meristem.modalities.image.lettering import lettering
from meristem.modalities.video.timeline import DEMUXERS

TECHNICAL = frozenset(("major_brand", "minor_version", "compatible_brands", "encoder", "handler_name", "vendor_id", "language",
                       "duration", "number_of_bytes", "number_of_frames", "bps", "rotate", "software", "_statistics_tags",
                       "_statistics_writing_app", "timecode"))
TELLING = ("artist", "author", "comment", "copyright", "creation_time", "date", "description", "location", "make", "model",
           "synopsis", "title", "_statistics_writing_date_utc")


def facts(path: Path, frames: np.ndarray, times: np.ndarray, steady: bool, size: tuple[int, int]) -> Facts:
    """frames: some of them, (3, n, H, W). times: s of all. steady: whether they are evenly spaced. size: (H, W) of the file."""
    found = intensities(frames)
    period = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    found.numbers |= {"seconds": float(times[-1]) + period, "file height (px)": float(size[0]),
                      "file width (px)": float(size[1]), **({"frames per second": 1 / period} if period else {})}
    found.words |= {"frame rate": "constant" if steady else "varies",
                    "kind": "folder of pictures" if path.is_dir() else path.suffix.lower().removeprefix(".")}
    if not steady:
        found.doubts.append(Doubt("rate", "its frame rate varies", "Frames are taken by their times, so that nothing need be "
                                  "done; other programs may count them instead."))
    hints = [doubt for i in range(frames.shape[1]) if (doubt := lettering(frames[:, i]))]
    said = dicom_words(path) if path.suffix.lower() == ".dcm" else {}
    found.words |= said
    found.doubts += [BURNED] if said.get("BurnedInAnnotation") == "YES" else hints[:1]
    return found


def identity(path: Path) -> list[str]:
    """The metadata keys of a container, or see `pictures.of_file`, that are not known to be harmless."""
    if path.suffix.lower() == ".dcm" or path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"):
        return pictures.of_file(path)
    try:
        with av.open(f"file:{path}", container_options={"format_whitelist": DEMUXERS, "protocol_whitelist": "file"},
                     metadata_errors="replace") as container:
            held = [container.metadata, *(stream.metadata for stream in container.streams)]
    except (av.FFmpegError, ValueError):
        return []
    keys = {key.lower() for part in held for key, value in part.items() if value.strip()}
    kinds = {key.rsplit(".", 1)[-1].split("-")[0] for key in keys if key not in TECHNICAL}
    return sorted({f"video {key}" if key in TELLING else "video metadata of another key" for key in kinds - TECHNICAL})
