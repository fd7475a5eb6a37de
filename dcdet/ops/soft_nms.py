"""Soft non-maximum suppression, one class or many.

The best box is put out, the scores of all others are lowered the more they overlap it, the best of
those is put out, and so on: no box is dropped, and none is put out twice. Boxes, ties, rows that
are not finite and boxes without area are treated as nms.py says.
Source: Bodla et al., Soft-NMS, 2017, and the 2017 release, lib/nms/nms.py.
"""

import heapq
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dcdet.ops import checks

logger = logging.getLogger("dcdet.ops")

Method = Literal["gaussian", "linear"]


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    method: Method = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
    max_outputs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Boxes by their lowered scores, best first: boxes (N, 4), scores (N,), none negative ->
    indices (M,) int64, new scores (M,); M is `max_outputs`, or all where that is None or more.

    A score is multiplied by exp(-iou^2 / sigma) with method "gaussian"; with "linear", by
    1 - iou where the IoU is at least `iou_threshold`. Computed in float64 and, as every step is
    small and needs the one before, on the CPU; without gradients. Dropped non-finite rows are
    counted in the log, at level debug. Raises TypeError and ValueError, naming the argument.
    """
    checks.scored_boxes("soft_nms", boxes, scores)
    weigh = _weight("soft_nms", method, sigma, iou_threshold)
    return _soft_nms("soft_nms", boxes, scores, None, weigh, max_outputs)


def batched_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    method: Method = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
    max_outputs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """soft_nms() among boxes of the same label: labels (N,) of an integer dtype.

    `max_outputs` counts over all labels. The best of up to `max_outputs` boxes of each label would
    be the same ones, as a label's scores come out in falling order.
    """
    checks.scored_boxes("batched_soft_nms", boxes, scores)
    checks.labels("batched_soft_nms", labels, boxes)
    weigh = _weight("batched_soft_nms", method, sigma, iou_threshold)
    return _soft_nms("batched_soft_nms", boxes, scores, labels, weigh, max_outputs)


def _weight(
    op: str, method: str, sigma: float, iou_threshold: float
) -> Callable[[np.ndarray], np.ndarray]:
    """The function from IoU to weight."""
    if method not in ("gaussian", "linear"):
        raise checks.wrong(op, "method", "'gaussian' or 'linear'", repr(method))
    sigma = checks.number(op, "sigma", sigma)
    if sigma <= 0:
        raise checks.wrong(op, "sigma", "positive", sigma)
    threshold = checks.share(op, "iou_threshold", iou_threshold)
    if method == "gaussian":
        return lambda iou: np.exp(-iou * iou / sigma)
    return lambda iou: np.where(iou >= threshold, 1 - iou, 1)


@torch.no_grad()
def _soft_nms(
    op: str,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    weigh: Callable[[np.ndarray], np.ndarray],
    max_outputs: int | None,
) -> tuple[Tensor, Tensor]:
    if max_outputs is not None:
        checks.integer(op, "max_outputs", max_outputs, 1)
    finite = boxes.float().isfinite().all(1) & scores.isfinite()
    rows = finite.nonzero()[:, 0]
    if rows.shape[0] < boxes.shape[0]:
        logger.debug("%s dropped %d non-finite rows", op, boxes.shape[0] - rows.shape[0])
    columns = boxes[rows].float().double().T.cpu().numpy()  # as nms(), which takes float32
    values = scores[rows].double().cpu().numpy()
    if (values < 0).any():
        raise checks.wrong(op, "scores", "at least 0", values.min())
    streams = [
        _best_first(group, np.ascontiguousarray(columns[:, group]), values[group], weigh)
        for group in _groups(None if labels is None else labels[rows].cpu().numpy(), len(values))
    ]
    chosen = list(islice(heapq.merge(*streams), max_outputs))
    places = torch.tensor([place for _, place in chosen], dtype=torch.int64, device=boxes.device)
    lowered = torch.tensor([-score for score, _ in chosen], dtype=torch.float64)
    return rows[places], lowered.to(scores)


def _groups(labels: np.ndarray | None, number: int) -> list[np.ndarray]:
    """The places of the boxes of each label, in their given order."""
    if labels is None:
        return [np.arange(number)]
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _best_first(
    places: np.ndarray,
    columns: np.ndarray,
    scores: np.ndarray,
    weigh: Callable[[np.ndarray], np.ndarray],
) -> Iterator[tuple[float, int]]:
    """(-lowered score, place) of the N boxes of one label, in ascending order: columns (4, N).

    What nobody asks for is not computed.
    """
    x1, y1, x2, y2 = columns
    left = np.ones(len(places), dtype=bool)
    area = (x2 - x1).clip(0) * (y2 - y1).clip(0)
    for _ in places:
        best = scores.argmax()  # the first of equal ones
        yield -scores[best], int(places[best])
        left[best] = False
        if area[best] > 0:
            width = np.minimum(x2, x2[best]) - np.maximum(x1, x1[best])
            height = np.minimum(y2, y2[best]) - np.maximum(y1, y1[best])
            shared = width.clip(0) * height.clip(0)
            iou = shared / (area + area[best] - shared)
        else:
            iou = (columns == columns[:, best, None]).all(0).astype(float)
        scores = np.where(left, scores * weigh(iou), -1)  # below every other
