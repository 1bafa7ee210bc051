"""torchvision's detectors of images on given feature maps: Faster R-CNN, Mask R-CNN, RetinaNet, FCOS."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from meristem.modalities.base import Settings
from meristem.platform.objectives import Loss
from meristem.tasks.detectors.base import Boxed, Detector, DetectorSettings

TURNED = [1, 0, 3, 2]  # ours are rows before columns
GROUPS = 8  # of the heads' group norms
OCTAVE = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # sizes of the anchors of a level (Lin et al. 2017, Focal Loss, section 4)


class _Given(nn.Module):
    """In the place of torchvision's backbone: the maps that were made elsewhere."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_channels, self.maps = width, list[Tensor]()

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(i), x) for i, x in enumerate(self.maps))


def _anchors(strides: Sequence[tuple[int, ...]], scales: Sequence[float], ratios: Sequence[float]) -> Any:
    """An anchor generator of these strides, `scales` times the stride large, in the middle of each cell."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    class Anchors(AnchorGenerator):
        def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
            first = feature_maps[0]
            self.set_cell_anchors(first.dtype, first.device)
            steps = [[torch.tensor(s, device=first.device) for s in stride] for stride in strides]
            levels = self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], steps)
            middle = [torch.tensor([x, y] * 2, device=first.device) / 2 for y, x in strides]
            anchors = torch.cat([level + half for level, half in zip(levels, middle, strict=True)])
            return [anchors] * len(image_list.image_sizes)

    sizes = tuple(tuple(scale * min(stride) for scale in scales) for stride in strides)
    return Anchors(sizes, (tuple(ratios),) * len(sizes))


class TorchvisionDetector(Detector):
    """A whole model of torchvision, fed with maps. first: the number of its first class. Computes in single precision."""

    def __init__(self, model: nn.Module, first: int) -> None:
        super().__init__()
        self.model, self.first = model, first

    def _run(self, maps: list[Tensor], size: tuple[int, ...], targets: list[dict[str, Tensor]] | None) -> Any:
        backbone = self.model.backbone
        assert isinstance(backbone, _Given)
        transform: Any = self.model.transform
        transform.min_size, transform.max_size = (min(size),), max(size)  # so that it resizes nothing
        images = list(maps[0].new_zeros(1, 1, dtype=torch.float32).expand(len(maps[0]), 1, *size))
        with torch.autocast(maps[0].device.type, enabled=False):
            backbone.maps = [x.float() for x in maps]
            out = self.model(images, targets)
            backbone.maps = []
        return out

    def losses(self, maps: list[Tensor], size: tuple[int, ...], truth: Sequence[Boxed]) -> dict[str, Loss]:
        targets = []
        for t in truth:
            target = {"boxes": t.box[:, TURNED].float(), "labels": t.label + self.first}
            if t.masks is not None:
                target["masks"] = t.masks.to(torch.uint8)
            targets.append(target)
        self.model.train()
        found = self._run(maps, size, targets)
        n = len(truth)
        return {name.removeprefix("loss_"): Loss(value * n, n) for name, value in found.items()}

    def detect(self, maps: list[Tensor], size: tuple[int, ...]) -> list[Boxed]:
        self.model.eval()
        return [Boxed(f["boxes"][:, TURNED], f["labels"] - self.first, f["scores"],
                      f["masks"][:, 0] >= 0.5 if "masks" in f else None) for f in self._run(maps, size, None)]


SIZED: dict[str, Any] = {"image_mean": [0.0], "image_std": [1.0], "size_divisible": 1, "_skip_resize": True}


class PostSettings(Settings):
    """What is kept of what was found: score above `score`, at most `most` of a view, none of whose IoU with a better one of its
    class exceeds `nms`.
    """

    score: Annotated[float, Field(ge=0, lt=1)] = 0.05
    nms: Annotated[float, Field(gt=0, le=1)] = 0.5
    most: Annotated[int, Field(ge=1)] = 100


class FCOS(PostSettings, DetectorSettings):
    """Tian et al. 2019: each place of a map gives the distances to the four sides of its box. radius: of the middle of a box,
    in strides, whose places learn. convolutions: of each branch.
    """

    dims: ClassVar[int] = 2
    radius: Annotated[float, Field(gt=0)] = 1.5
    convolutions: Annotated[int, Field(ge=1)] = 2

    def build(self, width: int, strides: Sequence[tuple[int, ...]], classes: int) -> Detector:
        from torchvision.models.detection import FCOS as Model
        from torchvision.models.detection.fcos import FCOSHead

        return TorchvisionDetector(Model(
            _Given(width), classes, anchor_generator=_anchors(strides, (1.0,), (1.0,)), score_thresh=self.score,
            head=FCOSHead(width, 1, classes, self.convolutions), center_sampling_radius=self.radius, nms_thresh=self.nms,
            detections_per_img=self.most, **SIZED), 0)


class RetinaNet(PostSettings, DetectorSettings):
    """Lin et al. 2017: anchors of three sizes (`scale` strides and two thirds of an octave more) and `ratios` at every place,
    told apart by the focal loss.
    """

    dims: ClassVar[int] = 2
    scale: Annotated[float, Field(gt=0)] = 4.0
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    def build(self, width: int, strides: Sequence[tuple[int, ...]], classes: int) -> Detector:
        from torchvision.models.detection import RetinaNet as Model
        from torchvision.models.detection.retinanet import RetinaNetHead

        anchors = _anchors(strides, [self.scale * s for s in OCTAVE], self.ratios)
        head = RetinaNetHead(width, len(OCTAVE) * len(self.ratios), classes, norm_layer=partial(nn.GroupNorm, GROUPS))
        return TorchvisionDetector(Model(
            _Given(width), classes, anchor_generator=anchors, head=head, score_thresh=self.score, nms_thresh=self.nms,
            detections_per_img=self.most, **SIZED), 0)


class FasterRCNN(PostSettings, DetectorSettings):
    """Ren et al. 2015 on a pyramid: proposals from anchors (`scale` strides, `ratios`), then a perceptron of `hidden` on the
    features of each. proposals: most of a view that are looked at; sampled: of them in training.
    """

    dims: ClassVar[int] = 2
    scale: Annotated[float, Field(gt=0)] = 4.0
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    hidden: Annotated[int, Field(ge=1)] = 512
    proposals: Annotated[int, Field(ge=1)] = 500
    sampled: Annotated[int, Field(ge=1)] = 256

    def _options(self, width: int, strides: Sequence[tuple[int, ...]], classes: int) -> dict[str, Any]:
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

        return {"rpn_anchor_generator": _anchors(strides, (self.scale,), self.ratios),
                "rpn_post_nms_top_n_train": self.proposals, "rpn_post_nms_top_n_test": self.proposals,
                "box_roi_pool": _pool(len(strides), 7), "box_head": TwoMLPHead(width * 7 * 7, self.hidden),
                "box_predictor": FastRCNNPredictor(self.hidden, classes + 1), "box_batch_size_per_image": self.sampled,
                "box_score_thresh": self.score, "box_nms_thresh": self.nms, "box_detections_per_img": self.most, **SIZED}

    def build(self, width: int, strides: Sequence[tuple[int, ...]], classes: int) -> Detector:
        from torchvision.models.detection import FasterRCNN as Model

        return TorchvisionDetector(Model(_Given(width), **self._options(width, strides, classes)), 1)


class MaskRCNN(FasterRCNN):
    """He et al. 2017: Faster R-CNN with the mask of each object; for data that has masks."""

    def build(self, width: int, strides: Sequence[tuple[int, ...]], classes: int) -> Detector:
        from torchvision.models.detection import MaskRCNN as Model
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

        return TorchvisionDetector(Model(
            _Given(width), mask_roi_pool=_pool(len(strides), 14), mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(width, width, classes + 1), **self._options(width, strides, classes)), 1)


def _pool(levels: int, size: int) -> Any:
    from torchvision.ops import MultiScaleRoIAlign

    return MultiScaleRoIAlign([str(i) for i in range(levels)], size, 2)
