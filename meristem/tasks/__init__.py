"""Downstream tasks: one module each."""

from meristem.tasks.base import TASKS, TaskObjective, TaskRecipe, TaskSettings
from meristem.tasks.classification import Classification
from meristem.tasks.detection import Detection
from meristem.tasks.links import Links
from meristem.tasks.nodes import Nodes
from meristem.tasks.parts import PartSegmentation, SemanticSegmentation
from meristem.tasks.point_detection import PointDetection
from meristem.tasks.propagation import Keypoints, Propagation
from meristem.tasks.segmentation import Segmentation
from meristem.tasks.temporal import Temporal

TASKS.update(segmentation=Segmentation, classification=Classification, propagation=Propagation, keypoints=Keypoints,
             parts=PartSegmentation, semantic=SemanticSegmentation, nodes=Nodes, links=Links, detection=Detection,
             detection3d=PointDetection, temporal=Temporal)

__all__ = ["TASKS", "TaskObjective", "TaskRecipe", "TaskSettings"]
