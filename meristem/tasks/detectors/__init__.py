"""Heads that find boxes in feature maps, upright boxes among tokens of points, and segments of time."""

from meristem.tasks.detectors.base import DETECTORS, Boxed, Detector, DetectorSettings
from meristem.tasks.detectors.monai import MonaiRetinaNet
from meristem.tasks.detectors.torchvision import FCOS, FasterRCNN, MaskRCNN, RetinaNet

DETECTORS.update({"faster-rcnn": FasterRCNN, "mask-rcnn": MaskRCNN, "retinanet": RetinaNet, "fcos": FCOS,
                  "monai-retinanet": MonaiRetinaNet})

__all__ = ["DETECTORS", "Boxed", "Detector", "DetectorSettings"]
