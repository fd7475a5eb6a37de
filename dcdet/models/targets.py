"""Assignment and sampling: which anchor or RoI learns what. Pure functions.

N anchors or RoIs, M objects of one image. Label -1 means: takes no part in the loss.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdet import boxes as box_ops
from dcdet.errors import require
from dcdet.structures import Target

# Pairs of boxes compared at once: bounds the memory of an image with thousands of objects.
PAIRS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class SampleSpec:
    """How many RoIs an image learns from: `number`, drawn at random.

    At most `foreground_fraction` of them are foreground, background fills the rest. Where both are
    too few, `fill` draws from all RoIs, and takes those for background whatever they overlap, as
    the 2017 release does; a RoI can come twice.
    """

    number: int
    foreground_fraction: float
    fill: bool

    def __post_init__(self) -> None:
        require(self.number >= 1, "number", "at least 1", self.number)
        share = self.foreground_fraction
        require(0 <= share <= 1, "foreground_fraction", "in [0, 1]", share)


@dataclass(frozen=True)
class RoISamples:
    """RoIs of a batch with what they learn.

    Shapes: rois (R, 5) image index and box, labels (R,) with 0 = background, deltas (R, 4) in
    units of the head's standard deviations, zero on background, objects (R,) which of its image's
    objects each RoI learns, without meaning on background.
    """

    rois: Tensor
    labels: Tensor
    deltas: Tensor
    objects: Tensor

    def foreground(self) -> "RoISamples":
        """Those that are not background."""
        place = (self.labels > 0).nonzero().squeeze(1)
        return RoISamples(
            self.rois[place], self.labels[place], self.deltas[place], self.objects[place]
        )


def best_object(
    boxes: Tensor, objects: Tensor, claim_iou: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """For each box (N, 4) its best object (M, 4): IoU (N,), index (N,); and claimed (N,): the last
    object of which the box is the best, or as good as the best, else -1. M must be > 0.

    An object claims boxes only where the best overlaps it, by an IoU of at least `claim_iou`.
    """
    step = max(1, PAIRS_AT_ONCE // len(objects))
    chunks = [box_ops.iou(chunk, objects) for chunk in boxes.split(step)]
    best, index = (torch.cat(x) for x in zip(*(chunk.max(dim=1) for chunk in chunks), strict=True))
    best_of_object = torch.stack([chunk.amax(dim=0) for chunk in chunks]).amax(dim=0)
    claims = (best_of_object > 0) & (best_of_object >= claim_iou)
    number = torch.arange(len(objects), device=boxes.device)
    claimed = [
        torch.where((chunk == best_of_object) & claims, number, -1).amax(dim=1) for chunk in chunks
    ]
    return best, index, torch.cat(claimed)


def _covered(boxes: Tensor, regions: Tensor, threshold: float | None) -> Tensor | None:
    if threshold is None or len(regions) == 0:
        return None
    return box_ops.coverage(boxes, regions).amax(dim=1) >= threshold


def rpn_targets(
    anchors: Tensor,
    target: Target,
    usable: Tensor,
    positive_iou: float,
    negative_iou: float,
    ignore_coverage: float | None,
    claim_iou: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Labels (N,) int64: 1 object, 0 background, -1 neither; and deltas (N, 4) to the best object.

    An anchor is positive from IoU `positive_iou` on, or when no anchor fits some object better.
    `usable` (N,) bool tells which anchors may learn at all. Anchors covered by an ignored region
    to at least `ignore_coverage` learn nothing, unless positive. Source: lib/rpn/rpn.py of the
    2017 release; there an object that no usable anchor touches makes every untouched anchor
    positive, here none. With `claim_iou` an object claims its best anchors only if their IoU is at
    least that, and they learn that object, the last that claims them, even where another fits
    better: max_iou_assigner.py of mmdetection.
    """
    labels = anchors.new_full((len(anchors),), -1, dtype=torch.int64)
    deltas = torch.zeros_like(anchors)
    inside = usable.nonzero().squeeze(1)
    if len(inside) == 0:
        return labels, deltas
    candidates = anchors[inside]
    inside_labels = labels[inside]
    if len(target.boxes) == 0:
        inside_labels[:] = 0
    else:
        best, index, claimed = best_object(candidates, target.boxes, claim_iou or 0.0)
        inside_labels[best < negative_iou] = 0
        inside_labels[(claimed >= 0) | (best >= positive_iou)] = 1
        if claim_iou is not None:
            index = torch.where(claimed >= 0, claimed, index)
        deltas[inside] = box_ops.encode(candidates, target.boxes[index])
    covered = _covered(candidates, target.ignored, ignore_coverage)
    if covered is not None:
        inside_labels[covered & (inside_labels == 0)] = -1
    labels[inside] = inside_labels
    return labels, deltas


def subsample(labels: Tensor, number: int, positive_fraction: float, seed: int) -> Tensor:
    """Labels (N,) with all but `number` of them set to -1, at random; at most
    `positive_fraction` of the number stay positive, background fills the rest."""
    generator = torch.Generator().manual_seed(seed)
    labels = labels.clone()
    positive = (labels > 0).nonzero().squeeze(1)
    background = (labels == 0).nonzero().squeeze(1)
    keep = min(len(positive), int(number * positive_fraction))
    for candidates, kept in ((positive, keep), (background, number - keep)):
        if len(candidates) > kept:
            order = torch.randperm(len(candidates), generator=generator)
            labels[candidates[order[kept:].to(labels.device)]] = -1
    return labels


def roi_targets(
    proposals: Tensor,
    target: Target,
    foreground_iou: float,
    background_iou: tuple[float, float],
    ignore_coverage: float | None,
    spec: SampleSpec | None = None,
    seed: int = 0,
    claim_iou: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RoIs (R, 4) of one image, their labels (R,) (0 background, else 1 + class), deltas (R, 4),
    and the objects (R,) that they learn.

    The objects' own boxes join the proposals (P, 4). Foreground comes first, then background,
    each in the order of the input; RoIs in neither range are left out, and so is background
    covered by an ignored region. `spec` draws from them, None takes all. `claim_iou`, for the
    proposals, as in rpn_targets. Source: rfcn/core/rcnn.py of the 2017 release.
    """
    rois = torch.cat([proposals, target.boxes])
    labels = rois.new_zeros((len(rois),), dtype=torch.int64)
    deltas = torch.zeros_like(rois)
    best = rois.new_zeros((len(rois),))
    index = torch.zeros_like(labels)
    if len(target.boxes) and len(rois):
        best, index, _ = best_object(rois, target.boxes)
        if claim_iou is not None and len(proposals):
            _, _, claimed = best_object(proposals, target.boxes, claim_iou)
            claimed = F.pad(claimed, (0, len(target.boxes)), value=-1)
            index = torch.where(claimed >= 0, claimed, index)
            best = torch.where(claimed >= 0, 1.0, best)  # foreground, whatever their IoU
        foreground = best >= foreground_iou
        labels[foreground] = target.labels[index[foreground]] + 1
        deltas[foreground] = box_ops.encode(rois, target.boxes[index])[foreground]
    low, high = background_iou
    labels[(labels == 0) & ~((best >= low) & (best < high))] = -1
    covered = _covered(rois, target.ignored, ignore_coverage)
    if covered is not None:
        free = (labels > 0) | ~covered
        rois, labels, deltas, index = rois[free], labels[free], deltas[free], index[free]
    if spec is not None:
        # Not the RPN's random numbers once more.
        labels = subsample(labels, spec.number, spec.foreground_fraction, seed + 1)
    order = torch.cat([(labels > 0).nonzero(), (labels == 0).nonzero()]).squeeze(1)
    labels, deltas = labels[order], deltas[order]
    missing = spec.number - len(order) if spec is not None and spec.fill and len(rois) else 0
    if missing > 0:
        order = torch.cat([order, _draw(len(rois), missing, seed + 2).to(order.device)])
        labels, deltas = F.pad(labels, (0, missing)), F.pad(deltas, (0, 0, 0, missing))
    return rois[order], labels, deltas, index[order]


def _draw(number: int, wanted: int, seed: int) -> Tensor:
    """`wanted` of the indices below `number`, at random, none twice before all have come."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-wanted // number)
    drawn = [torch.randperm(number, generator=generator) for _ in range(rounds)]
    return torch.cat(drawn)[:wanted]


def hardest(losses: Tensor, images: Tensor, number: int) -> Tensor:
    """(R,) bool: the `number` RoIs of largest loss (R,) in each image; `images` (R,) is the image
    of each RoI. Source: Shrivastava et al., OHEM; box_annotator_ohem.py of the 2017 release."""
    kept = torch.zeros_like(losses, dtype=torch.bool)
    for image in images.unique():
        rois = (images == image).nonzero().squeeze(1)
        kept[rois[losses[rois].argsort(descending=True, stable=True)[:number]]] = True
    return kept


def smooth_l1(difference: Tensor, beta: float) -> Tensor:
    """Elementwise smooth L1: quadratic below `beta`, L1 for 0. Source: Girshick, Fast R-CNN, (3);
    the 2017 release's sigma is beta^-0.5."""
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none", beta=beta)
