"""What RoI heads share: sampling, losses, decoding. B images, R RoIs, K classes.

Source: Girshick, Fast R-CNN; Shrivastava et al., OHEM; core/rcnn.py of the 2017 release.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdet import boxes as box_ops
from dcdet.errors import require
from dcdet.models.targets import RoISamples, SampleSpec, hardest, roi_targets, smooth_l1
from dcdet.structures import Batch


@dataclass(frozen=True)
class RoIOutput:
    """logits (R, 1 + K), column 0 is background; deltas (R, 4), shared by all classes, or
    (R, 1 + K, 4), of which background's are not used."""

    logits: Tensor
    deltas: Tensor


class RoIHead(nn.Module):
    """A head's training and decoding; a subclass adds layers, and `forward` -> RoIOutput.

    Args:
        foreground_iou, background_iou: IoU ranges [foreground_iou, 1], [low, high).
        samples: how many of these RoIs are drawn; None: all.
        hard_examples: RoIs an image in the loss, those of largest loss (OHEM); None: all.
        box_std: standard deviations that divide box deltas.
        ignore_coverage: background covered by an ignored region (crowd, difficult) to this share
            is left out; None: it is background, as in the 2017 release.
    """

    box_std: Tensor

    def __init__(
        self,
        foreground_iou: float,
        background_iou: tuple[float, float],
        samples: SampleSpec | None,
        hard_examples: int | None,
        box_std: list[float],
        ignore_coverage: float | None,
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
        self.ignore_coverage = ignore_coverage

    def sample(self, proposals: list[Tensor], batch: Batch) -> RoISamples:
        """Label the proposals (P, 4) of each image for training, and draw from them."""
        rois, labels, deltas = [], [], []
        for image, boxes in enumerate(proposals):
            kept, kept_labels, kept_deltas = roi_targets(
                boxes, batch.targets[image], self.foreground_iou, self.background_iou,
                self.ignore_coverage, self.samples, batch.seeds[image],
            )  # fmt: skip
            rois.append(F.pad(kept, (1, 0), value=image))
            labels.append(kept_labels)
            deltas.append(kept_deltas / self.box_std)
        return RoISamples(torch.cat(rois), torch.cat(labels), torch.cat(deltas))

    def losses(
        self, raw: RoIOutput, samples: RoISamples, images: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cross-entropy and smooth L1 of each image's (hardest) RoIs, mean over `images`; stats.

        The box loss is divided by the wanted number of RoIs, not by how many are foreground.
        """
        labels, foreground = samples.labels, samples.labels > 0
        deltas = raw.deltas
        if deltas.dim() == 3:
            deltas = deltas[torch.arange(len(labels), device=labels.device), labels]
        score_loss = F.cross_entropy(raw.logits, labels, reduction="none")
        box_loss = smooth_l1(deltas - samples.deltas, sigma=1.0).sum(1) * foreground
        index = samples.rois[:, 0].long()
        kept = torch.ones_like(foreground)
        if self.hard_examples is not None:
            kept = hardest((score_loss + box_loss).detach(), index, self.hard_examples)
        counts = torch.bincount(index[kept], minlength=images).clamp(min=1)
        wanted = self.hard_examples or (self.samples.number if self.samples else None)
        numbers = counts if wanted is None else counts.new_full((images,), wanted)
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
        return scores, box_ops.decode(rois[:, 1:], deltas * self.box_std)


def inclusive(rois: Tensor) -> Tensor:
    """RoIs (R, 5) as the release's pooling ops count pixels: x2 and y2 are the last inside."""
    return rois - rois.new_tensor([0.0, 0.0, 0.0, 1.0, 1.0])
