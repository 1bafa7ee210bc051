"""Predicted boxes as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meristem.modalities.base import Header
from meristem.platform.data.manifest import Row
from meristem.tasks.base import Scope
from meristem.tasks.detectors.base import Boxed

Found = tuple[Row, Header, np.ndarray, Boxed]
"""A sample, its header, the boxes found in it as files of its kind have them, and what was found."""


def save(found: Sequence[Found], scope: Scope, path: Path) -> Path:
    path.write_text(json.dumps((coco if len(found[0][1].shape) == 3 else monai)(found, scope)))
    return path


def monai(found: Sequence[Found], scope: Scope) -> dict[str, Any]:
    """Volumes as MONAI's lists have them: world millimetres, RAS, corners; each under its case's pseudonym, with scores."""
    volumes = []
    for row, _, box, boxed in found:
        assert boxed.score is not None
        volumes.append({"image": row.case, "box": box.round(3).tolist(), "label": boxed.label.tolist(),
                        "score": [round(s, 5) for s in boxed.score.tolist()]})
    return {"box_mode": "xyzxyz", "coordinates": "RAS", "labels": {str(value): name for value, name in scope.values.items()},
            "test": volumes}


def coco(found: Sequence[Found], scope: Scope) -> dict[str, Any]:
    """COCO's data set of images, categories and annotations, each annotation with its score; masks as run lengths.

    An image keeps the id that its COCO file gave it; others are numbered.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (row, header, box, boxed) in enumerate(found, 1):
        height, width = header.source["shape"]
        images.append({"id": row.meta.get("image_id", number), "file_name": row.local, "height": height, "width": width})
        assert boxed.score is not None
        for i, (corner, label, score) in enumerate(zip(box.tolist(), boxed.label.tolist(), boxed.score.tolist(), strict=True)):
            top, left, bottom, right = corner
            annotations.append({
                "id": len(annotations) + 1, "image_id": images[-1]["id"], "category_id": label + 1, "score": round(score, 5),
                "bbox": [round(x, 2) for x in (left, top, right - left, bottom - top)], "iscrowd": 0,
                "area": round((right - left) * (bottom - top), 2),
                **({} if boxed.masks is None else {"segmentation": _runs(boxed.masks[i].cpu().numpy(), (height, width))})})
    return {"images": images, "annotations": annotations,
            "categories": [{"id": value + 1, "name": name} for value, name in scope.values.items()]}


def _runs(mask: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask (H, W), on the source's lattice."""
    from pycocotools import mask as api

    from meristem.modalities.lattice.labels import nearest

    runs = api.encode(np.asfortranarray(nearest(mask.astype(np.uint8), size)))
    return {"size": list(size), "counts": runs["counts"].decode()}
