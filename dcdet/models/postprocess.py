"""From scored boxes to detections. R boxes, K classes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dcdet.ops.nms import batched_nms


@dataclass(frozen=True)
class PostprocessSpec:
    """Scores above `score_threshold` enter a class-wise NMS; the best `max_per_image` remain."""

    score_threshold: float
    nms_iou: float
    max_per_image: int

    def __post_init__(self) -> None:
        if not 0 <= self.score_threshold < 1:
            raise ValueError(f"score_threshold: must be in [0, 1), got {self.score_threshold}")
        if not 0 < self.nms_iou <= 1:
            raise ValueError(f"nms_iou: must be in (0, 1], got {self.nms_iou}")
        if self.max_per_image < 1:
            raise ValueError(f"max_per_image: must be at least 1, got {self.max_per_image}")


def select(boxes: Tensor, scores: Tensor, spec: PostprocessSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of one image: boxes (R, 4) or (R, K, 4), scores (R, K) ->
    boxes (N, 4), scores (N,), labels (N,), best first."""
    roi, label = (scores > spec.score_threshold).nonzero(as_tuple=True)
    scores = scores[roi, label]
    boxes = boxes[roi] if boxes.dim() == 2 else boxes[roi, label]
    kept = batched_nms(boxes, scores, label, spec.nms_iou)
    kept = kept[torch.argsort(scores[kept], descending=True, stable=True)][: spec.max_per_image]
    return boxes[kept], scores[kept], label[kept]
