"""Pictures: PNG, JPEG, TIFF, BMP, DICOM frames."""

from meristem.modalities.image.image import Image, ImageOptions, ImageViewOptions, Window

__all__ = ["Image", "ImageOptions", "ImageViewOptions", "Window"]
