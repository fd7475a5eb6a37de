"""What RoI heads share: sampling, losses, decoding. B images, R RoIs, K classes.

Source: Girshick, Fast R-CNN; Shrivastava et al., OHEM; core/rcnn.py of the 2017 release.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdet import boxes as box_ops
from dcdet.errors import require
from dcdet.models.mimicking import MimickingSpec
from dcdet.models.targets import RoISamples, SampleSpec, hardest, roi_targets, smooth_l1
from dcdet.structures import Batch


@dataclass(frozen=True)
class RoIOutput:
    """logits (R, 1 + K), column 0 is background; deltas (R, 4), shared by all classes, or
    (R, 1 + K, 4), of which background's are not used; features (R, F) hidden ones, of heads that
    have them."""

    logits: Tensor
    deltas: Tensor
    features: Tensor | None = None


class RoIHead(nn.Module):
    """A head's training and decoding; a subclass adds layers, and `forward` -> RoIOutput.

    Args:
        foreground_iou, background_iou: IoU ranges [foreground_iou, 1], [low, high).
        samples: how many of these RoIs are drawn; None: all.
        hard_examples: RoIs an image in the loss, those of largest loss (OHEM); None: all.
        box_std: standard deviations that divide box deltas.
        ignore_coverage: background covered by an ignored region (crowd, difficult) to this share
            is left out; None: it is background, as in the 2017 release.
        delta_limit: see boxes.decode; supplied by code.
        box_beta: of the box loss, smooth L1; 0 is L1.
        claim_iou: see targets.roi_targets; None: no object claims proposals.
        average: of losses. "image": over each image's RoIs (of the box loss over the wanted
            number), then over images. "batch": over all RoIs of the batch.
    """

    box_std: Tensor
    mimicking: MimickingSpec | None = None

    def __init__(
        self,
        foreground_iou: float,
        background_iou: tuple[float, float],
        samples: SampleSpec | None,
        hard_examples: int | None,
        box_std: list[float],
        ignore_coverage: float | None,
        delta_limit: box_ops.DeltaLimit = "none",
        box_beta: float = 1.0,
        claim_iou: float | None = None,
        average: Literal["image", "batch"] = "image",
    ) -> None:
        super().__init__()
        require(0 < foreground_iou <= 1, "foreground_iou", "in (0, 1]", foreground_iou)
        low, high = background_iou
        require(0 <= low < high <= foreground_iou, "background_iou",
                "[low, high] with 0 <= low < high <= foreground_iou", background_iou)  # fmt: skip
        wanted = "at least 1, or null"
        require(hard_examples is None or hard_examples >= 1, "hard_examples", wanted, hard_examples)
        require(len(box_std) == 4 and min(box_std) > 0, "box_std", "4 positive numbers", box_std)
        self.register_buffer("box_std", torch.tensor(box_std), persistent=False)
        self.foreground_iou, self.background_iou = foreground_iou, background_iou
        self.samples, self.hard_examples = samples, hard_examples
        require(box_beta >= 0, "box_beta", "at least 0", box_beta)
        require(claim_iou is None or 0 <= claim_iou <= 1, "claim_iou", "in [0, 1]", claim_iou)
        self.ignore_coverage, self.claim_iou = ignore_coverage, claim_iou
        self.delta_limit, self.box_beta, self.average = delta_limit, box_beta, average

    def sample(self, proposals: list[Tensor], batch: Batch) -> RoISamples:
        """Label the proposals (P, 4) of each image for training, and draw from them."""
        parts = []
        for image, boxes in enumerate(proposals):
            rois, labels, deltas, objects = roi_targets(
                boxes, batch.targets[image], self.foreground_iou, self.background_iou,
                self.ignore_coverage, self.samples, batch.seeds[image], self.claim_iou,
            )  # fmt: skip
            parts.append((F.pad(rois, (1, 0), value=image), labels, deltas / self.box_std, objects))
        return RoISamples(*map(torch.cat, zip(*parts, strict=True)))

    def losses(
        self, raw: RoIOutput, samples: RoISamples, images: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cross-entropy and smooth L1 of each image's (hardest) RoIs; statistics.

        The box loss is never divided by how many are foreground.
        """
        labels, foreground = samples.labels, samples.labels > 0
        deltas = raw.deltas
        if deltas.dim() == 3:
            deltas = deltas[torch.arange(len(labels)), labels]
        score_loss = F.cross_entropy(raw.logits, labels, reduction="none")
        box_loss = smooth_l1(deltas - samples.deltas, self.box_beta).sum(1) * foreground
        index = samples.rois[:, 0].long()
        kept = torch.ones_like(foreground)
        if self.hard_examples is not None:
            kept = hardest((score_loss + box_loss).detach(), index, self.hard_examples)
        counts = torch.bincount(index[kept], minlength=images).clamp(min=1)
        wanted = self.hard_examples or (self.samples.number if self.samples else None)
        numbers = counts if wanted is None else counts.new_full((images,), wanted)
        if self.average == "batch":
            # Then / images below cancels.
            numbers = counts = torch.full_like(counts, len(index[kept])) / images
        losses = {
            "roi_score": (score_loss[kept] / counts[index[kept]]).sum() / images,
            "roi_box": (box_loss[kept] / numbers[index[kept]]).sum() / images,
        }
        right = raw.logits.detach().argmax(1) == labels
        stats = {
            "foreground_rois": foreground.sum() / images,
            "foreground_accuracy": right[foreground].float().mean()
            if foreground.any()
            else right.new_ones((), dtype=torch.float32),
        }
        return losses, stats

    def scores_and_boxes(self, raw: RoIOutput, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Class probabilities (R, K) without background, and boxes (R, 4) or (R, K, 4) before
        clipping, for rois (R, 5)."""
        scores = raw.logits.softmax(dim=1)[:, 1:]
        deltas = raw.deltas if raw.deltas.dim() == 2 else raw.deltas[:, 1:]
        return scores, box_ops.decode(rois[:, 1:], deltas * self.box_std, self.delta_limit)


def require_pyramid(strides: list[int], in_features: list[str]) -> None:
    """Raise ValueError unless each of the maps has twice the stride of the one before."""
    require(
        len(strides) > 0 and strides == [strides[0] << index for index in range(len(strides))],
        "in_features", "maps whose strides double one by one", in_features,
    )  # fmt: skip


def pyramid_levels(rois: Tensor, strides: list[int]) -> Tensor:
    """Which of several maps each RoI (R, 5) is pooled from: (R,) int64.

    A RoI of 224 x 224 pixels goes to stride 16, one of twice the side to twice the stride.
    Source: Lin et al., Feature Pyramid Networks, (1).
    """
    side = box_ops.area(rois[:, 1:]).clamp(min=0).sqrt()
    # In float32, which decides about sides a hair below a border, as in the release.
    level = math.log2(16 / strides[0]) + torch.log2(side / 224)
    return level.floor().clamp(0, len(strides) - 1).long()


def pool_by_level(
    maps: list[Tensor], rois: Tensor, strides: list[int],
    pool: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:  # fmt: skip
    """Every RoI (R, 5) pooled from its map (B, C, H, W) by `pool(map, rois, level)` -> (R, ...).

    A map without RoIs has a part in it all the same, so that every parameter gets a gradient.
    """
    levels = pyramid_levels(rois, strides)
    places = [(levels == level).nonzero().squeeze(1) for level in range(len(maps))]
    pooled = [pool(x, rois[places[level]], level) for level, x in enumerate(maps)]
    return torch.cat(pooled)[torch.cat(places).argsort()]


def inclusive(rois: Tensor) -> Tensor:
    """RoIs (R, 5) as the release's pooling ops count pixels: x2 and y2 are the last inside."""
    return rois - rois.new_tensor([0.0, 0.0, 0.0, 1.0, 1.0])
