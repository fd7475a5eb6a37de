"""Greedy non-maximum suppression, one class or many.

Boxes are continuous xyxy (see structures.py). A kept box suppresses every later one whose IoU with
it exceeds the threshold. Boxes count best score first, equal scores in their given order. Rows with
a NaN or infinite number are dropped before anything else, so they change nothing for the others.
A box without area (or with one beyond float32) overlaps nothing but its own duplicates.
"""

import logging

import torch
from torch import Tensor

from dcdet.ops import checks

logger = logging.getLogger("dcdet.ops")


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The indices of the kept boxes, best first: boxes (N, 4), scores (N,) -> (M,) int64.

    Computed in float32. Dropped non-finite rows are counted in the log, at level debug. Raises
    TypeError and ValueError, naming the argument.
    """
    checks.scored_boxes("nms", boxes, scores)
    return _nms(boxes, scores, None, checks.share("nms", "iou_threshold", iou_threshold))


def batched_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, *, shift: bool = False
) -> Tensor:
    """nms() among boxes of the same label: labels (N,) of an integer dtype -> (M,) int64.

    Every label is done on its own, so that no box can touch another label's result. `shift` first
    moves each by label * (largest coordinate + 1), as mmdetection, torchvision and detectron2 do:
    that rounds boxes of large labels, to 0.008 pixels for the eightieth of a 1333 pixel image,
    and decides pairs whose IoU is a hair from the threshold as they do.
    """
    checks.scored_boxes("batched_nms", boxes, scores)
    checks.labels("batched_nms", labels, boxes)
    if shift and len(boxes):
        boxes = boxes.float()
        finite = boxes.where(boxes.isfinite(), boxes.new_zeros(()))
        boxes = boxes + (labels.to(boxes) * (finite.max() + 1))[:, None]
    return _nms(boxes, scores, labels, checks.share("batched_nms", "iou_threshold", iou_threshold))


@torch.no_grad()
def _nms(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float) -> Tensor:
    boxes, scores = boxes.float() + 0.0, scores.float()  # + 0.0: a zero has one sign
    order = scores.argsort(descending=True, stable=True)
    finite = boxes.isfinite().all(1) & scores.isfinite()
    order = order[finite[order]]
    if order.shape[0] < boxes.shape[0]:
        logger.debug("nms dropped %d non-finite rows", boxes.shape[0] - order.shape[0])
    boxes = boxes[order]
    if labels is None:
        return order[_keep(boxes, iou_threshold)]
    labels = labels[order]
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        kept[members[_keep(boxes[members], iou_threshold)]] = True
    return order[kept]


def _keep(boxes: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes kept among `boxes` (N, 4), which stand best first."""
    from torchvision.ops import nms as torchvision_nms  # takes a second to import

    candidates = torch.arange(boxes.shape[0], device=boxes.device)
    size = boxes[:, 2:] - boxes[:, :2]
    area = size.prod(1)
    measurable = (size > 0).all(1) & (area > 0) & area.isfinite()
    if iou_threshold < 1 and not bool(measurable.all()):
        odd = (~measurable).nonzero()[:, 0]
        measurable[odd[_are_first(boxes[odd])]] = True
        candidates = candidates[measurable]
        boxes = boxes[candidates]
    # ranks for scores: no two are equal, so nothing hangs on how torchvision sorts
    rank = torch.arange(boxes.shape[0], 0, -1, device=boxes.device, dtype=boxes.dtype)
    return candidates[torchvision_nms(boxes, rank, iou_threshold)]


def _are_first(boxes: Tensor) -> Tensor:
    """Which boxes have no equal before them: (N, 4) -> (N,) bool."""
    unique, group = boxes.unique(dim=0, return_inverse=True)
    place = torch.arange(boxes.shape[0], device=boxes.device)
    first = place.new_full((unique.shape[0],), boxes.shape[0])
    return first.scatter_reduce(0, group, place, "amin")[group] == place
