"""Positron emission to standardised uptake values by body weight: SUV = activity (Bq/ml) · weight (g) / dose (Bq) at the scan.

Follows QIBA's vendor-neutral calculation for pixels in Bq/ml that are decay-corrected to the start of the scan. Whatever it
needs and does not find leaves the values as they are stored, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pydicom

TAGS = ("Units", "SUVType", "DecayCorrection", "CorrectedImage", "PatientWeight", "SeriesDate", "SeriesTime", "AcquisitionDate",
        "AcquisitionTime", "RadiopharmaceuticalInformationSequence")
SUV = "SUV by body weight"
UNITS = frozenset(("CNTS", "NONE", "CM2", "PCNT", "CPS", "BQML", "MGMINML", "UMOLMINML", "MLMING", "MLG", "1CM", "UMOLML",
                   "PROPCNTS", "PROPCPS", "MLMINML", "MLML", "GML", "STDDEV"))  # PS3.3 C.8.9.1.1.3
HALF_LIVES = 20  # between injection and scan, from which one of the times is wrong


def converted(headers: Sequence[pydicom.Dataset]) -> tuple[float, str, str]:
    """(factor, what values then are, why they stay as stored: '' where they do not)."""
    ds = headers[0]
    said = {str(h.get("Units") or "") for h in headers}
    unit = next(iter(said)) if len(said) == 1 else ""
    stored = f"PET as stored, in {unit if unit in UNITS else 'no known unit'}"
    if unit == "GML" and str(ds.get("SUVType") or "BW") == "BW":
        return 1.0, SUV, ""
    try:
        return _factor(headers, unit), SUV, ""
    except _Lacking as lacking:
        return 1.0, stored, str(lacking)


class _Lacking(Exception):
    pass


def _factor(headers: Sequence[pydicom.Dataset], unit: str) -> float:
    ds = headers[0]
    if unit != "BQML":
        raise _Lacking("its unit is not Bq/ml")
    if str(ds.get("DecayCorrection") or "") != "START":
        raise _Lacking("it is not decay-corrected to the start of the scan")
    corrected = ds.get("CorrectedImage") or ()
    if not {"ATTN", "DECY"} <= set([corrected] if isinstance(corrected, str) else corrected):
        raise _Lacking("it is not corrected for attenuation and decay")
    tracers = list(ds.get("RadiopharmaceuticalInformationSequence") or ())
    if len(tracers) != 1:
        raise _Lacking("it does not say which tracer was given")
    weight = _number(ds, "PatientWeight", "the weight")
    dose, half_life = (_number(tracers[0], name, what) for name, what in
                       (("RadionuclideTotalDose", "the dose"), ("RadionuclideHalfLife", "the half-life")))
    scan = _time(f"{ds.get('SeriesDate') or ''}{ds.get('SeriesTime') or ''}")
    acquired = [_time(f"{h.get('AcquisitionDate') or ''}{h.get('AcquisitionTime') or ''}") for h in headers]
    known = [t for t in acquired if t is not None]
    if scan is None or len(known) < len(headers):
        raise _Lacking("it does not say when it was taken")
    if scan > min(known):
        raise _Lacking("its series began after its slices were taken: it was processed, and the scan's start is not known")
    if given := _time(str(tracers[0].get("RadiopharmaceuticalStartDateTime") or "")):
        waited = scan - given
    else:
        given = _time(f"{scan:%Y%m%d}{tracers[0].get('RadiopharmaceuticalStartTime') or ''}")
        if given is None or not tracers[0].get("RadiopharmaceuticalStartTime"):
            raise _Lacking("it does not say when the tracer was given")
        waited = scan - given + (timedelta(days=1) if given > scan else timedelta())  # over midnight
    if not 0 <= waited.total_seconds() < HALF_LIVES * half_life:
        raise _Lacking("the times of injection and scan do not fit each other")
    return weight * 1000 / (dose * 2 ** (-waited.total_seconds() / half_life))


def _number(ds: pydicom.Dataset, name: str, what: str) -> float:
    value = float(ds.get(name) or 0)
    if not 0 < value < float("inf"):
        raise _Lacking(f"{what} is missing")
    return value


def _time(text: Any) -> datetime | None:
    """DICOM's YYYYMMDDHHMMSS.FFFFFF, of which seconds may be missing; a time zone's offset is left out."""
    found = re.match(r"(\d{8})(\d{2})(\d{2})?(\d{2})?(\.\d{1,6})?", str(text))
    if not found:
        return None
    try:
        day = datetime.strptime(found[1], "%Y%m%d")
        seconds = float((found[4] or "0") + (found[5] or ""))
        return day + timedelta(hours=int(found[2]), minutes=int(found[3] or 0), seconds=seconds)
    except (ValueError, OverflowError):
        return None
