"""From scored boxes to detections. R boxes, K classes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dcdet.errors import require
from dcdet.ops.nms import batched_nms


@dataclass(frozen=True)
class PostprocessSpec:
    """Scores above `score_threshold` enter a class-wise NMS; the best `max_per_image` remain."""

    score_threshold: float
    nms_iou: float
    max_per_image: int

    def __post_init__(self) -> None:
        require(0 <= self.score_threshold < 1, "score_threshold", "in [0, 1)", self.score_threshold)
        require(0 < self.nms_iou <= 1, "nms_iou", "in (0, 1]", self.nms_iou)
        require(self.max_per_image >= 1, "max_per_image", "at least 1", self.max_per_image)


def select(boxes: Tensor, scores: Tensor, spec: PostprocessSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of one image: boxes (R, 4) or (R, K, 4), scores (R, K) ->
    boxes (N, 4), scores (N,), labels (N,), best first."""
    roi, label = (scores > spec.score_threshold).nonzero(as_tuple=True)
    scores = scores[roi, label]
    boxes = boxes[roi] if boxes.dim() == 2 else boxes[roi, label]
    kept = batched_nms(boxes, scores, label, spec.nms_iou)
    kept = kept[torch.argsort(scores[kept], descending=True, stable=True)][: spec.max_per_image]
    return boxes[kept], scores[kept], label[kept]
