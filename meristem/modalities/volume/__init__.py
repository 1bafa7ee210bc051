"""Volumes: NIfTI files and DICOM series, positions in millimetres."""

from meristem.modalities.volume.volume import Volume, VolumeOptions, VolumeViewOptions

__all__ = ["Volume", "VolumeOptions", "VolumeViewOptions"]
