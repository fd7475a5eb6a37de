"""Box arithmetic. Boxes are continuous xyxy (see structures.py); R, N boxes, K classes.

The 2017 systems' inclusive formulas (width = x2 - x1 + 1) give the same numbers on boxes whose x2
and y2 are 1 larger, so one set of formulas serves both worlds. The two places where the worlds
really differ, clipping and rescaling, take `pixels`: "inclusive" or "continuous".
"""

import math
from typing import Literal

import torch
from torch import Tensor

Pixels = Literal["inclusive", "continuous"]
DeltaLimit = Literal["none", "high", "both"]
Scale = float | tuple[float, float]  # how much an image was enlarged: one factor, or (y, x)

MAX_LOG_RATIO = math.log(1000 / 16)
DELTA_LIMITS = {
    "none": (-math.inf, math.inf),
    "high": (-math.inf, MAX_LOG_RATIO),
    "both": (-MAX_LOG_RATIO, MAX_LOG_RATIO),
}


def area(boxes: Tensor) -> Tensor:
    """Areas in square pixels: boxes (N, 4) -> (N,)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair: a (N, 4), b (M, 4) -> (N, M); 0 for empty boxes."""
    inter = _intersection(a, b)
    union = area(a)[:, None] + area(b)[None, :] - inter
    return torch.where(inter > 0, inter / union, inter.new_zeros(()))


def coverage(a: Tensor, b: Tensor) -> Tensor:
    """The share of each a (N, 4) that lies in each b (M, 4) -> (N, M)."""
    inter = _intersection(a, b)
    return torch.where(inter > 0, inter / area(a)[:, None], inter.new_zeros(()))


def _centres_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    sizes = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sizes, sizes


def encode(boxes: Tensor, targets: Tensor) -> Tensor:
    """Deltas (dx, dy, dw, dh) that turn boxes (N, 4) into targets (N, 4) -> (N, 4).

    Source: Girshick et al., R-CNN, appendix C; the inverse of `decode`.
    """
    centres, sizes = _centres_and_sizes(boxes)
    target_centres, target_sizes = _centres_and_sizes(targets)
    return torch.cat([(target_centres - centres) / sizes, torch.log(target_sizes / sizes)], dim=-1)


def decode(boxes: Tensor, deltas: Tensor, limit: DeltaLimit = "none") -> Tensor:
    """Apply deltas (N, 4) or (N, K, 4) to boxes (N, 4) -> the same shape as deltas.

    `limit` bounds dw and dh: "none", as in the 2017 release, where a box may become infinite;
    "high" to at most log(1000 / 16), as torchvision and detectron2; "both" to at least its
    negative, too, as mmdetection.
    """
    if deltas.dim() == 3:
        boxes = boxes[:, None]
    centres, sizes = _centres_and_sizes(boxes)
    centres = centres + deltas[..., :2] * sizes
    low, high = DELTA_LIMITS[limit]
    half = 0.5 * sizes * deltas[..., 2:].clamp(low, high).exp()
    return torch.cat([centres - half, centres + half], dim=-1)


def clip(boxes: Tensor, size: tuple[int, int], pixels: Pixels) -> Tensor:
    """Boxes (..., 4) moved into an image of `size` (h, w).

    Inclusive pixels keep one pixel: x1 in [0, w-1], x2 in [1, w]. Continuous: both in [0, w].
    """
    height, width = size
    keep = 1.0 if pixels == "inclusive" else 0.0
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(
        [
            x1.clamp(0, width - keep),
            y1.clamp(0, height - keep),
            x2.clamp(keep, width),
            y2.clamp(keep, height),
        ],
        dim=-1,
    )


def rescale(boxes: Tensor, scale: Scale, pixels: Pixels) -> Tensor:
    """Boxes (..., 4) in an image enlarged by `scale`.

    Inclusive pixels scale the inclusive corners, as the 2017 systems do: x2' = (x2 - 1) * f + 1.
    """
    y, x = per_axis(scale)
    factor = boxes.new_tensor([x, y, x, y])
    if pixels == "continuous":
        return boxes * factor
    shift = boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    return (boxes - shift) * factor + shift


def per_axis(scale: Scale) -> tuple[float, float]:
    """The factors (y, x) of a scale."""
    return scale if isinstance(scale, tuple) else (scale, scale)


def inverse(scale: Scale) -> Scale:
    """The scale of the way back."""
    return (1 / scale[0], 1 / scale[1]) if isinstance(scale, tuple) else 1 / scale


def flip(boxes: Tensor, width: int) -> Tensor:
    """Boxes (N, 4) mirrored left to right in an image `width` pixels wide."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)
