"""What `data check` is told of NIfTI files and DICOM series beside their voxels as they are trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from meristem.modalities.facts import Doubt, Facts, intensities
from meristem.modalities.image.identity import of_file
from meristem.modalities.volume.nifti import DAMAGED
from meristem.modalities.volume.opened import Opened, named_dicom

AIR = (-1100.0, -900.0)  # Hounsfield units that the darkest percentile of a CT lies in
OBLIQUE = 1.0  # degrees between an axis of the voxels and the nearest of the world, from which a volume is called oblique
TEXTS = ("descrip", "aux_file", "intent_name", "db_name", "data_type")
NOBODY = re.compile(r"none|[A-Za-z]*[ -]?v?\d+(\.\d+)+(:[0-9a-f]+)?")  # FSL5.0, 6.0.5:9e026117: a program's version


def facts(opened: Sequence[Opened]) -> Facts:
    """Of the channels of one volume, as they are stored: orientation, angle, intensities."""
    first = opened[0]
    affine, code = first.affine, first.placement
    dicom = code.get("files") == "dicom"
    values = first.decode()
    found = intensities(values[np.isfinite(values)])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    cosine = np.abs(affine[:3, :3] / spacing).max(0).min()
    angle = float(np.degrees(np.arccos(min(cosine, 1.0))))
    found.numbers |= {"anisotropy": float(spacing.max() / spacing.min()), "angle to the world's axes (°)": round(angle, 3)}
    found.words |= {
        "orientation": "".join(nib.aff2axcodes(affine)),
        "handedness": "right-handed" if np.linalg.det(affine[:3, :3]) > 0 else "left-handed (radiological)",
        "oblique": "yes" if angle > OBLIQUE else "no",
        "affine from": "DICOM" if dicom else "sform" if code["sform_code"] > 0 else "qform" if code["qform_code"] > 0
        else "assumed",
        "unit": code["unit"], "stored as": first.dtype,
        "channels": str(sum(1 if len(other.shape) < 4 else other.shape[3] for other in opened)),
        "values": first.values or (
            "like Hounsfield units" if AIR[0] <= found.numbers["intensity 1 %"] <= AIR[1] else "in no known unit")}
    lost = int((~np.isfinite(values)).sum())
    if lost:
        found.doubts.append(Doubt("nan", f"{lost:,} of {values.size:,} voxels are NaN or infinite", "Export it again."))
    found.doubts += [Doubt("suv", f"its PET values stay as they are stored: {other.kept}", "Keep such series apart from those "
                           "in SUV, or export them with what is missing.") for other in opened if other.kept]
    if (not dicom and code["sform_code"] > 0 and code["qform_code"] > 0
            and (apart := _apart(code, values.shape[:3])) > spacing.min()):
        found.doubts.append(Doubt("affines", f"its sform and its qform place it up to {apart:.1f} mm apart",
                                  "The sform is used. Find out which is right, and write it into both."))
    return found


def _apart(code: Mapping[str, Any], shape: tuple[int, ...]) -> float:
    """mm between the corners of the lattice by one affine and by the other."""
    corners = np.array(np.meshgrid(*((0, n - 1) for n in shape), [1], indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm(((np.array(code["sform"]) - np.array(code["qform"])) @ corners)[:3], axis=0).max())


def identity(path: Path) -> list[str]:
    """Texts of a header that hold more than a program's version or `none`, and extensions; none of a damaged file.

    Of DICOM see `identity.of_file`.
    """
    if named_dicom(path):
        return of_file(path)
    try:
        header = nib.load(path).header
    except DAMAGED:
        return []
    if not isinstance(header, nib.Nifti1Header):
        return []
    held = {name: bytes(header[name]).split(b"\0")[0].decode("latin-1").strip() for name in TEXTS if name in header}
    found = [f"NIfTI {name}" for name, text in held.items() if text and not NOBODY.fullmatch(text)]
    filled = [e.get_code() for e in header.extensions if bytes(e.content).strip(b"\0 \n")]
    kinds = {"DICOM" if code == 2 else "text or other" for code in filled}
    return found + [f"NIfTI extension ({kind})" for kind in sorted(kinds)]
