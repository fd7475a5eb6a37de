"""From scored boxes to detections. R boxes, K classes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dcdet.errors import require
from dcdet.ops.nms import batched_nms
from dcdet.ops.soft_nms import Method, batched_soft_nms


@dataclass(frozen=True)
class SoftNMSSpec:
    """Scores fall with the overlap: "gaussian" uses `sigma`, "linear" `iou` (ops/soft_nms.py)."""

    method: Method
    sigma: float = 0.5
    iou: float = 0.3

    def __post_init__(self) -> None:
        require(self.sigma > 0, "sigma", "positive", self.sigma)
        require(0 <= self.iou <= 1, "iou", "in [0, 1]", self.iou)


@dataclass(frozen=True)
class PostprocessSpec:
    """Scores above `score_threshold` enter a class-wise NMS; the best `max_per_image` remain.

    With `soft_nms` that takes the place of the NMS at `nms_iou`, and no threshold cuts the lowered
    scores, as in the 2017 release. Boxes with a side below `min_size` original pixels are dropped.
    `shift`: see ops.batched_nms.
    """

    score_threshold: float
    nms_iou: float
    max_per_image: int
    soft_nms: SoftNMSSpec | None = None
    min_size: float = 0.0
    shift: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.score_threshold < 1, "score_threshold", "in [0, 1)", self.score_threshold)
        require(0 < self.nms_iou <= 1, "nms_iou", "in (0, 1]", self.nms_iou)
        require(self.max_per_image >= 1, "max_per_image", "at least 1", self.max_per_image)
        require(self.min_size >= 0, "min_size", "at least 0", self.min_size)


def select(boxes: Tensor, scores: Tensor, spec: PostprocessSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of one image: boxes (R, 4) or (R, K, 4), scores (R, K) ->
    boxes (N, 4), scores (N,), labels (N,), best first."""
    roi, label = (scores > spec.score_threshold).nonzero(as_tuple=True)
    scores = scores[roi, label]
    boxes = boxes[roi] if boxes.dim() == 2 else boxes[roi, label]
    if spec.min_size > 0:
        large = (boxes[:, 2:] - boxes[:, :2] >= spec.min_size).all(dim=1)
        boxes, scores, label = boxes[large], scores[large], label[large]
    if soft := spec.soft_nms:
        kept, scores = batched_soft_nms(
            boxes, scores, label, soft.method, soft.sigma, soft.iou, spec.max_per_image
        )
        return boxes[kept], scores, label[kept]
    kept = batched_nms(boxes, scores, label, spec.nms_iou, shift=spec.shift)
    kept = kept[torch.argsort(scores[kept], descending=True, stable=True)][: spec.max_per_image]
    return boxes[kept], scores[kept], label[kept]
