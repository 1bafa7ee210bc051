"""What `data check` is told of a picture file beside its pixels as they are trained on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from meristem.errors import DataError
from meristem.modalities.facts import Doubt, Facts, intensities
from meristem.modalities.image.files import decode

SAID = ("BurnedInAnnotation", "RecognizableVisualFeatures", "RescaleType", "Modality")  # each holds one of a few fixed words
BURNED = Doubt("text", "its header says that text is burned into it (BurnedInAnnotation)",
               "Crop or blacken the text in the file: names and dates on pictures stay in all that is made of them.")
FACES = Doubt("face", "its header says that a person can be recognised in it (RecognizableVisualFeatures)",
              "Deface the pictures before they are shared.")


def facts(paths: Sequence[Path], want: int, max_pixels: int) -> Facts:
    """Of the files of one image. want: channels that the recipe asks for."""
    from meristem.modalities.image.lettering import lettering  # scipy's, which training need not wait for

    rasters = [decode(path, want, max_pixels) for path in paths]
    first = rasters[0]
    plain = first.slope == 1 and first.intercept == 0
    found = intensities(first.bare.array if plain else first.bare.array * first.slope + first.intercept)
    found.words |= {"channels": str(sum(len(r.bare.array) for r in rasters)), "stored as": first.array.dtype.name,
                    "opacity": "yes" if first.alpha else "no", "pixel size": "known" if first.spacing else "not known"}
    doubt = lettering(first.bare.array)
    if paths[0].suffix.lower() == ".dcm":
        said = dicom_words(paths[0])
        found.words |= said
        doubt = BURNED if said.get("BurnedInAnnotation") == "YES" else doubt
        found.doubts += [FACES] * (said.get("RecognizableVisualFeatures") == "YES")
    found.doubts += [doubt] if doubt else []
    return found


def dicom_words(path: Path) -> dict[str, str]:
    """The fixed words of `SAID` that a DICOM file has; `not said` of whether text is burned in, where it does not."""
    from meristem.modalities.image.dicom import dataset  # pydicom is slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote the file's values
        try:
            ds = dataset(path, SAID, pixels=False)
        except DataError:
            return {}
        words = {name: str(ds.get(name, "")).strip() for name in SAID}
    fixed = {name: word for name, word in words.items() if word.isalpha() and word.isupper() and len(word) <= 4}
    return {"BurnedInAnnotation": "not said", **fixed}
