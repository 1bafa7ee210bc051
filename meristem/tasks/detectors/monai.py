"""MONAI's RetinaNet for volumes on given feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from meristem.platform.objectives import Loss
from meristem.tasks.detectors.base import Boxed, Detector, DetectorSettings
from meristem.tasks.detectors.fusion import overlap, suppress
from meristem.tasks.detectors.torchvision import PostSettings

CANDIDATES = 1000  # places of a map that are looked at, best first


class _Heads(nn.Module):
    """In the place of MONAI's network: its two heads on maps that were made elsewhere."""

    spatial_dims, cls_key, box_reg_key = 3, "classes", "boxes"

    def __init__(self, width: int, anchors: int, classes: int) -> None:
        from monai.apps.detection.networks.retinanet_network import RetinaNetClassificationHead, RetinaNetRegressionHead

        super().__init__()
        self.num_classes, self.num_anchors, self.maps = classes, anchors, list[Tensor]()
        self.classify = RetinaNetClassificationHead(width, anchors, classes, 3)
        self.regress = RetinaNetRegressionHead(width, anchors, 3)

    def forward(self, images: Tensor) -> dict[str, list[Tensor]]:
        device = images.device.type
        with torch.autocast(device, torch.get_autocast_dtype(device), enabled=self.fast):
            found = {self.cls_key: self.classify(self.maps), self.box_reg_key: self.regress(self.maps)}
        return {key: [x.float() for x in maps] for key, maps in found.items()}

    fast = False  # whether the heads run in the precision of the caller; boxes need single precision


def _anchors(strides: Sequence[tuple[int, ...]], shapes: Sequence[Sequence[float]]) -> Any:
    """An anchor generator with boxes of `shapes` strides in the middle of each cell.

    MONAI's own takes strides from the sizes of image and map, which is wrong where the image is no multiple of them, puts an
    odd stride's anchors off the middle, and rounds their sides.
    """
    from monai.apps.detection.utils.anchor_utils import AnchorGenerator

    half = torch.tensor(shapes)[None] * torch.tensor(strides)[:, None] / 2

    class Anchors(AnchorGenerator):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.spatial_dims, self.indexing, self.cell_anchors = 3, "ij", list(torch.cat([-half, half], 2))

        def forward(self, images: Tensor, feature_maps: list[Tensor]) -> list[Tensor]:
            first = feature_maps[0]
            self.set_cell_anchors(first.dtype, first.device)
            steps = [[torch.tensor(s, device=first.device) for s in stride] for stride in strides]
            levels = self.grid_anchors([list(x.shape[2:]) for x in feature_maps], steps)
            odd = [torch.tensor([s % 2 / 2 for s in stride] * 2, device=first.device) for stride in strides]
            return [torch.cat([level + x for level, x in zip(levels, odd, strict=True)])] * len(images)

    return Anchors()


class _Focal(nn.Module):
    """Lin et al. 2017, equation 5: the sum over all anchors, per positive one."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        from torchvision.ops import sigmoid_focal_loss

        return sigmoid_focal_loss(logits, target, reduction="sum") / target.sum().clamp_min(1)


def _selector(**settings: Any) -> Any:
    """MONAI's choice of boxes, which suppresses them one by one, with ours."""
    from monai.apps.detection.utils.box_selector import BoxSelector
    from monai.data.box_utils import clip_boxes_to_image

    class Selector(BoxSelector):
        def select_boxes_per_image(self, boxes_list: list[Tensor], logits_list: list[Tensor],
                                   spatial_size: Any) -> tuple[Tensor, Tensor, Tensor]:
            parts = []
            for boxes, logits in zip(boxes_list, logits_list, strict=True):
                index, score, label = self.select_top_score_idx_per_level(logits)
                box, inside = clip_boxes_to_image(boxes[index], spatial_size, remove_empty=True)
                parts.append((box, score[inside], label[inside]))
            box, score, label = (torch.cat(part) for part in zip(*parts, strict=True))
            keep = suppress(box, score, label, self.nms_thresh, self.detections_per_img)
            return box[keep], score[keep], label[keep]

    return Selector(**settings)


class MonaiDetector(Detector):
    """A RetinaNetDetector of MONAI, fed with maps. Its boxes have our convention: corners at the edges of elements."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def _run(self, maps: list[Tensor], size: tuple[int, ...], targets: list[dict[str, Tensor]] | None) -> Any:
        heads, device = self.model.network, maps[0].device.type
        self.model.anchors = None  # it keeps those of another device
        heads.maps, heads.fast = maps, torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False):
            out = self.model(maps[0].new_zeros(1, dtype=torch.float32).expand(len(maps[0]), 1, *size), targets)
        heads.maps = []
        return out

    def losses(self, maps: list[Tensor], size: tuple[int, ...], truth: Sequence[Boxed]) -> dict[str, Loss]:
        n = len(truth)
        if not all(bool(x.isfinite().all()) for x in maps):  # MONAI would raise; training skips such a step and counts it
            lost = torch.stack([x.float().sum() for x in maps]).sum() * torch.nan
            return {"classes": Loss(lost, n), "boxes": Loss(lost, n)}
        self.model.train()
        found = self._run(maps, size, [{"boxes": t.box.float(), "labels": t.label} for t in truth])
        none = torch.stack([p.sum() for p in self.model.network.regress.parameters()]).sum() * 0  # where there is no object
        return {"classes": Loss(found["classes"] * n, n), "boxes": Loss((found["boxes"].to(none) + none) * n, n)}

    def detect(self, maps: list[Tensor], size: tuple[int, ...]) -> list[Boxed]:
        self.model.eval()
        return [Boxed(f["boxes"], f["labels"], f["labels_scores"]) for f in self._run(maps, size, None)]


class MonaiRetinaNet(PostSettings, DetectorSettings):
    """RetinaNet (Lin et al. 2017) of MONAI's detection parts, as in its LUNA16 tutorial and in nnDetection (Baumgartner et al.
    2021).

    anchors: their shapes, in strides of each map. candidates: places of each map that may learn an object (ATSS, Zhang et al.
    2020). negatives: `hard` learns from `sampled` anchors of a view, at most the share `positive` of them objects, the others
    drawn from the `pool` times as many that look most like one; `all` from all anchors by the focal loss. regression: boxes
    learn by the smooth L1 distance of their codes, or by the generalised IoU, under which some grew over the whole view and
    stayed so.
    """

    dims: ClassVar[int] = 3
    score: Annotated[float, Field(ge=0, lt=1)] = 0.02
    nms: Annotated[float, Field(gt=0, le=1)] = 0.22
    anchors: tuple[tuple[float, float, float], ...] = ((2.0, 2.0, 2.0), (3.0, 2.0, 2.0), (2.0, 3.0, 2.0), (2.0, 2.0, 3.0))
    candidates: Annotated[int, Field(ge=1)] = 4
    negatives: Literal["hard", "all"] = "hard"
    sampled: Annotated[int, Field(ge=2)] = 64
    positive: Annotated[float, Field(gt=0, lt=1)] = 0.3
    pool: Annotated[float, Field(ge=1)] = 20.0
    regression: Literal["l1", "giou"] = "l1"

    def build(self, width: int, strides: Sequence[tuple[int, ...]], classes: int) -> Detector:
        from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
        from monai.losses import BoxGIoULoss

        model = RetinaNetDetector(_Heads(width, len(self.anchors), classes), _anchors(strides, self.anchors),
                                  box_overlap_metric=overlap)  # MONAI's own checks its boxes at every call
        model.set_atss_matcher(self.candidates, center_in_gt=False)
        if self.negatives == "hard":
            model.set_hard_negative_sampler(self.sampled, self.positive, min_neg=self.sampled // 4, pool_size=self.pool)
        else:
            model.set_cls_loss(_Focal())
        if self.regression == "giou":
            model.set_box_regression_loss(BoxGIoULoss(reduction="mean"), encode_gt=False, decode_pred=True)
        model.box_selector = _selector(score_thresh=self.score, topk_candidates_per_level=CANDIDATES, nms_thresh=self.nms,
                                       detections_per_img=self.most)
        return MonaiDetector(model)
