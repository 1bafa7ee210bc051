"""Data sets whose objects are annotated: each format says whether a place holds it, and adds its samples to a search.

What is wrong with an annotation takes a sample's objects away and is counted; the sample itself stays, unlabelled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from meristem.errors import DataError
from meristem.modalities.documents import MISSHAPEN
from meristem.platform.data.annotated import activitynet, coco, kitti, monai, scenes, voc
from meristem.platform.data.layouts import Search


class Format(Protocol):
    def recognised(self, search: Search, path: Path) -> bool:
        """Whether a folder or file is a data set of this format, of samples that the search's modality reads."""
        ...

    def read(self, search: Search, path: Path) -> Path:
        """Add its samples; returns the folder that names are relative to. Raises DataError where it cannot be used at all."""
        ...


FORMATS: tuple[Format, ...] = (coco, monai, voc, kitti, scenes, activitynet)


def format_of(search: Search, path: Path) -> Format | None:
    return next((f for f in FORMATS if _recognises(f, search, path)), None)


def _recognises(form: Format, search: Search, path: Path) -> bool:
    """What is no file of a format, or too broken to tell, is of another; then its images count as not annotated."""
    try:
        return form.recognised(search, path)
    except (*MISSHAPEN, DataError, OSError):
        return False
