"""What `data check` is told of NIfTI files beside their voxels as they are trained on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np

from meristem.modalities.facts import Doubt, Facts, intensities
from meristem.modalities.volume.nifti import DAMAGED, decode, open_nifti

AIR = (-1100.0, -900.0)  # Hounsfield units that the darkest percentile of a CT lies in
OBLIQUE = 1.0  # degrees between an axis of the voxels and the nearest of the world, from which a volume is called oblique
TEXTS = ("descrip", "aux_file", "intent_name", "db_name", "data_type")
NOBODY = re.compile(r"none|[A-Za-z]*[ -]?v?\d+(\.\d+)+(:[0-9a-f]+)?")  # FSL5.0, 6.0.5:9e026117: a program's version


def facts(paths: Sequence[Path], assume: Literal["identity"] | None, most: int) -> Facts:
    """Of the files of one volume, as they are stored: orientation, angle, intensities."""
    opened = [open_nifti(path, "the volume", assume, most) for path in paths]
    image, affine = opened[0]
    values = decode(image, "the volume")
    found = intensities(values[np.isfinite(values)])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    cosine = np.abs(affine[:3, :3] / spacing).max(0).min()
    angle = float(np.degrees(np.arccos(min(cosine, 1.0))))
    found.numbers |= {"anisotropy": float(spacing.max() / spacing.min()), "angle to the world's axes (°)": round(angle, 3)}
    code = image.header
    found.words |= {
        "orientation": "".join(nib.aff2axcodes(affine)),
        "handedness": "right-handed" if np.linalg.det(affine[:3, :3]) > 0 else "left-handed (radiological)",
        "oblique": "yes" if angle > OBLIQUE else "no",
        "affine from": "sform" if code["sform_code"] > 0 else "qform" if code["qform_code"] > 0 else "assumed",
        "unit": code.get_xyzt_units()[0], "stored as": image.get_data_dtype().name,
        "channels": str(sum(1 if other.ndim < 4 else other.shape[3] for other, _ in opened)),
        "values": "like Hounsfield units" if AIR[0] <= found.numbers["intensity 1 %"] <= AIR[1] else "in no known unit"}
    lost = int((~np.isfinite(values)).sum())
    if lost:
        found.doubts.append(Doubt("nan", f"{lost:,} of {values.size:,} voxels are NaN or infinite", "Export it again."))
    if code["sform_code"] > 0 and code["qform_code"] > 0 and (apart := _apart(code, values.shape[:3])) > spacing.min():
        found.doubts.append(Doubt("affines", f"its sform and its qform place it up to {apart:.1f} mm apart",
                                  "The sform is used. Find out which is right, and write it into both."))
    return found


def _apart(header: nib.Nifti1Header, shape: tuple[int, ...]) -> float:
    """mm between the corners of the lattice by one affine and by the other."""
    corners = np.array(np.meshgrid(*((0, n - 1) for n in shape), [1], indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm(((header.get_sform() - header.get_qform()) @ corners)[:3], axis=0).max())


def identity(path: Path) -> list[str]:
    """Texts of a header that hold more than a program's version or `none`, and extensions; none of a damaged file."""
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
