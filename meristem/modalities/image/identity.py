"""Where picture files may say whose they are. Only names of header elements leave this module, never what they hold."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, TiffTags
from PIL import Image as Pillow

from meristem.modalities.image.files import FORMATS

if TYPE_CHECKING:
    from pydicom import DataElement

PATIENT, OVERLAYS = 0x0010, range(0x6000, 0x6100)  # groups
NUMERIC = ("AT", "CS", "DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV")  # PS3.5 6.2: no room for a name
FINE = frozenset((
    "BluePaletteColorLookupTableData", "CodeMeaning", "CodeValue", "CodingSchemeDesignator", "CodingSchemeVersion",
    "ContextUID", "ConvolutionKernel", "DataSetType", "DeidentificationMethod", "DoubleFloatPixelData",
    "FileMetaInformationVersion", "FloatPixelData", "GreenPaletteColorLookupTableData", "ICCProfile", "ImagedNucleus",
    "ImplementationClassUID", "ImplementationVersionName", "LUTData", "LUTExplanation", "LongCodeValue",
    "MRAcquisitionType", "MagneticFieldStrength", "Manufacturer", "ManufacturerModelName", "MappingResourceUID",
    "MediaStorageSOPClassUID", "ModalityLUTType", "PixelData", "PixelDataProviderURL", "PixelPaddingValue",
    "PulseSequenceName", "ReceiveCoilName", "RedPaletteColorLookupTableData", "ReferencedSOPClassUID", "RescaleType",
    "SOPClassUID", "SequenceName", "SequenceVariant", "SoftwareVersions", "TimezoneOffsetFromUTC", "TransferSyntaxUID",
    "TransmitCoilName", "WindowCenterWidthExplanation"))
NUMBERED = frozenset(("OtherStudyNumbers",))  # numeric, and yet of a study
EXIF_FINE = frozenset((
    "ApertureValue", "BitsPerSample", "BrightnessValue", "ColorMap", "ColorSpace", "ComponentsConfiguration",
    "CompressedBitsPerPixel", "Compression", "Contrast", "CustomRendered", "DigitalZoomRatio", "ExifImageHeight",
    "ExifImageWidth", "ExifInteroperabilityOffset", "ExifOffset", "ExifVersion", "ExposureBiasValue", "ExposureMode",
    "ExposureProgram", "ExposureTime", "ExtraSamples", "FNumber", "FileSource", "FillOrder", "Flash", "FlashPixVersion",
    "FocalLength", "FocalLengthIn35mmFilm", "FocalPlaneResolutionUnit", "FocalPlaneXResolution", "FocalPlaneYResolution",
    "GainControl", "ISOSpeedRatings", "ImageLength", "ImageWidth", "InterColorProfile", "InteropIndex", "InteropVersion",
    "JPEGInterchangeFormat", "JPEGInterchangeFormatLength", "JpegIFByteCount", "JpegIFOffset", "LightSource", "Make",
    "MaxApertureValue", "MaxSampleValue", "MeteringMode", "MinSampleValue", "Model", "NewSubfileType", "Orientation",
    "PhotometricInterpretation", "PlanarConfiguration", "Predictor", "PrimaryChromaticities", "ReferenceBlackWhite",
    "ResolutionUnit", "RowsPerStrip", "SMaxSampleValue", "SMinSampleValue", "SampleFormat", "SamplesPerPixel", "Saturation",
    "SceneCaptureType", "SceneType", "SensingMethod", "Sharpness", "ShutterSpeedValue", "Software", "StripByteCounts",
    "StripOffsets", "StripRowCounts", "SubfileType", "SubjectDistance", "SubjectDistanceRange", "TileByteCounts",
    "TileLength", "TileOffsets", "TileWidth", "TransferFunction", "WhiteBalance", "WhitePoint", "XResolution",
    "YCbCrCoefficients", "YCbCrPositioning", "YCbCrSubSampling", "YResolution"))
SHAPED = re.compile(r'\s*(\{"shape": [^A-Za-z"]*\}|ImageJ=[\d.a-z]+\n'
                    r'((images|channels|slices|frames|hyperstack|mode|unit|spacing|loop|min|max)=[\w.\\]*\n?)*)\s*')
DERIVED = "2.25."  # a UID made of random numbers (PS3.5 B.2), which says nothing of who made it and when
PNG_KEYWORDS = ("Title", "Author", "Description", "Copyright", "Creation Time", "Disclaimer", "Warning", "Source", "Comment")
PNG_FINE = ("Software", "date:create", "date:modify", "date:timestamp")


def of_file(path: Path) -> list[str]:
    """The elements of a DICOM or picture file that hold something and are not known to be harmless; none of a damaged file."""
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        return []
    return _dicom(path) if head[128:] == b"DICM" or path.suffix.lower() == ".dcm" else _picture(path)


def _dicom(path: Path) -> list[str]:
    """Fine are numbers and code strings outside the patient's group, UIDs of random numbers, and the elements of `FINE`; at
    every depth of sequences.

    Everything else is named: free text, persons, dates, times, identifiers, ages, bytes (overlays are pictures of text).
    """
    import pydicom  # slow

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote the file's values
        try:
            ds = pydicom.dcmread(path, stop_before_pixels=True)
            found = {_named(element) for part in (ds.file_meta, ds) for element in part.iterall() if _holds(element)}
        except Exception:  # a header may be broken in any way; `read` refuses the file for it
            return []
    return sorted(found)


def _holds(element: DataElement) -> bool:
    if element.VR == "SQ" or element.is_empty or not str(element.value).strip():
        return False
    group = element.tag.group
    if group in OVERLAYS:
        return element.VR not in NUMERIC
    if element.tag.is_private or group == PATIENT:
        return True
    if element.tag.element == 0:  # the length of a group
        return False
    if element.VR == "UI" and all(str(uid).startswith(DERIVED) for uid in np.atleast_1d(element.value)):
        return False
    return element.keyword not in FINE and (element.VR not in NUMERIC or element.keyword in NUMBERED or not element.keyword)


def _named(element: DataElement) -> str:
    if element.tag.is_private:
        return "DICOM private elements"
    if element.tag.group in OVERLAYS:
        return "DICOM OverlayData"
    return f"DICOM {element.keyword or 'elements of no dictionary'}"


def _picture(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Pillow.open(path, formats=FORMATS) as image:
                exif, info, kind = image.getexif(), dict(image.info), image.format
                tags = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
                found = {f"EXIF {_tag(number)}" for number, value in tags.items() if not _harmless(number, value)}
                if exif.get_ifd(ExifTags.IFD.GPSInfo):
                    found.add("EXIF GPSInfo")
        except Exception:  # see `_dicom`
            return []
    if info.get("comment"):
        found.add(f"{kind} comment")
    if info.get("xmp") or info.get("XML:com.adobe.xmp") or info.get("photoshop"):
        found.add("XMP or IPTC")
    texts = [key for key, value in info.items() if kind == "PNG" and isinstance(value, str) and value.strip()]
    found |= {f"PNG text {key}" if key in PNG_KEYWORDS else "PNG text of another keyword" for key in texts
              if key not in PNG_FINE and key != "XML:com.adobe.xmp"}
    return sorted(found)


def _tag(number: int) -> str:
    name = ExifTags.TAGS.get(number) or TiffTags.lookup(number).name
    return name if name != "unknown" else "tags of no dictionary"


def _harmless(number: int, value: object) -> bool:
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    if _tag(number) == "ImageDescription" and SHAPED.fullmatch(text):
        return True
    return _tag(number) in EXIF_FINE or not text.strip("\0 \n")
