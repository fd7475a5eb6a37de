"""R-FCN head, plain and deformable. B images, R RoIs, K classes, G the grid's side (7).

Source: Dai et al., R-FCN; Dai et al., Deformable ConvNets; rfcn/symbols/*.py of the 2017 release.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdet import boxes as box_ops
from dcdet.errors import require
from dcdet.models.init import init_layers
from dcdet.models.targets import RoISamples, hardest, roi_targets, smooth_l1
from dcdet.ops.deform_psroi_pool import deform_psroi_pool
from dcdet.ops.psroi_pool import psroi_pool
from dcdet.structures import Target


@dataclass(frozen=True)
class RoIOutput:
    """logits (R, 1 + K), column 0 is background; deltas (R, 4), shared by all classes."""

    logits: Tensor
    deltas: Tensor


class RFCNHead(nn.Module):
    """Position-sensitive score maps, pooled for each RoI and averaged over its G x G parts.

    Args:
        in_channels, stride, num_classes: supplied by code.
        in_feature: the map that is read.
        channels: of the first 1x1 convolution.
        init_std: of new weights; those of offsets start at 0.
        group_size: G.
        deformable: parts are shifted by pooled offsets, for every class its own.
        trans_std: offsets of 1 shift a part by this share of the RoI's size.
        samples_per_part: sampling points along a side of a deformable part.
        foreground_iou, background_iou: IoU ranges [foreground_iou, 1], [low, high).
        hard_examples: RoIs an image in the loss, those of largest loss (OHEM); None: all.
        box_std: standard deviations that divide box deltas.
        ignore_coverage: background covered by an ignored region (crowd, difficult) to this share
            is left out; None: it is background, as in the 2017 release.
    """

    box_std: Tensor

    def __init__(
        self,
        in_channels: int,
        stride: int,
        num_classes: int,
        in_feature: str,
        channels: int,
        init_std: float,
        group_size: int,
        deformable: bool,
        trans_std: float,
        samples_per_part: int,
        foreground_iou: float,
        background_iou: tuple[float, float],
        hard_examples: int | None,
        box_std: list[float],
        ignore_coverage: float | None,
    ) -> None:
        super().__init__()
        require(channels >= 1, "channels", "at least 1", channels)
        require(init_std > 0, "init_std", "positive", init_std)
        require(group_size >= 1, "group_size", "at least 1", group_size)
        require(samples_per_part >= 1, "samples_per_part", "at least 1", samples_per_part)
        require(0 < foreground_iou <= 1, "foreground_iou", "in (0, 1]", foreground_iou)
        low, high = background_iou
        require(0 <= low < high <= foreground_iou, "background_iou",
                "[low, high] with 0 <= low < high <= foreground_iou", background_iou)  # fmt: skip
        wanted = "at least 1, or null"
        require(hard_examples is None or hard_examples >= 1, "hard_examples", wanted, hard_examples)
        require(len(box_std) == 4 and min(box_std) > 0, "box_std", "4 positive numbers", box_std)
        parts = group_size**2
        self.reduce = nn.Conv2d(in_channels, channels, 1)
        self.score = nn.Conv2d(channels, parts * (1 + num_classes), 1)
        # Background's deltas, then the object's; only the latter are used (as in the release).
        self.delta = nn.Conv2d(channels, parts * 8, 1)
        init_layers(self.reduce, self.score, self.delta, std=init_std)
        if deformable:
            self.score_offset = nn.Conv2d(channels, parts * 2 * (1 + num_classes), 1)
            self.delta_offset = nn.Conv2d(channels, parts * 2, 1)
            init_layers(self.score_offset, self.delta_offset, std=0.0)
        self.register_buffer("box_std", torch.tensor(box_std), persistent=False)
        self.stride, self.in_feature = stride, in_feature
        self.group_size, self.deformable = group_size, deformable
        self.trans_std, self.samples_per_part = trans_std, samples_per_part
        self.foreground_iou, self.background_iou = foreground_iou, background_iou
        self.hard_examples, self.ignore_coverage = hard_examples, ignore_coverage

    def sample(self, proposals: list[Tensor], targets: list[Target]) -> RoISamples:
        """Label the proposals (P, 4) of each image for training."""
        rois, labels, deltas = [], [], []
        for image, (boxes, target) in enumerate(zip(proposals, targets, strict=True)):
            kept, kept_labels, kept_deltas = roi_targets(
                boxes, target, self.foreground_iou, self.background_iou, self.ignore_coverage
            )
            rois.append(F.pad(kept, (1, 0), value=image))
            labels.append(kept_labels)
            deltas.append(kept_deltas / self.box_std)
        return RoISamples(torch.cat(rois), torch.cat(labels), torch.cat(deltas))

    def forward(self, features: dict[str, Tensor], rois: Tensor) -> RoIOutput:
        """rois (R, 5): image index and box."""
        hidden = F.relu(self.reduce(features[self.in_feature]))
        # The pooling ops count pixels inclusively.
        rois = rois - rois.new_tensor([0.0, 0.0, 0.0, 1.0, 1.0])
        scores, deltas = self.score(hidden), self.delta(hidden).chunk(2, dim=1)[1]
        if self.deformable:
            logits = self._pool_deformed(scores, self.score_offset(hidden), rois)
            deltas = self._pool_deformed(deltas, self.delta_offset(hidden), rois)
        else:
            logits, deltas = self._pool(scores, rois), self._pool(deltas, rois)
        return RoIOutput(logits.float(), deltas.float())

    def losses(
        self, raw: RoIOutput, samples: RoISamples, images: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cross-entropy and smooth L1 of each image's hardest RoIs, mean over `images`; and stats.

        The box loss is divided by the wanted number of RoIs, not by how many are foreground.
        """
        foreground = samples.labels > 0
        score_loss = F.cross_entropy(raw.logits, samples.labels, reduction="none")
        box_loss = smooth_l1(raw.deltas - samples.deltas, sigma=1.0).sum(1) * foreground
        index = samples.rois[:, 0].long()
        kept = torch.ones_like(foreground)
        if self.hard_examples is not None:
            kept = hardest((score_loss + box_loss).detach(), index, self.hard_examples)
        counts = torch.bincount(index[kept], minlength=images).clamp(min=1)
        wanted = (
            counts if self.hard_examples is None else counts.new_full((images,), self.hard_examples)
        )
        losses = {
            "roi_score": (score_loss[kept] / counts[index[kept]]).sum() / images,
            "roi_box": (box_loss[kept] / wanted[index[kept]]).sum() / images,
        }
        right = raw.logits.detach().argmax(1) == samples.labels
        stats = {
            "foreground_rois": foreground.sum() / images,
            "foreground_accuracy": right[foreground].float().mean()
            if foreground.any()
            else right.new_ones((), dtype=torch.float32),
        }
        return losses, stats

    def scores_and_boxes(self, raw: RoIOutput, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Class probabilities (R, K) without background, and boxes (R, 4) before clipping."""
        scores = raw.logits.softmax(dim=1)[:, 1:]
        return scores, box_ops.decode(rois[:, 1:], raw.deltas * self.box_std)

    def _pool(self, maps: Tensor, rois: Tensor) -> Tensor:
        size = self.group_size
        output_dim = maps.shape[1] // size**2
        pooled = psroi_pool(maps, rois, 1 / self.stride, output_dim, size, size)
        return pooled.mean((2, 3))

    def _pool_deformed(self, maps: Tensor, offset_maps: Tensor, rois: Tensor) -> Tensor:
        def pool(x: Tensor, trans: Tensor | None) -> Tensor:
            size = self.group_size
            return deform_psroi_pool(
                x, rois, trans, 1 / self.stride, x.shape[1] // size**2, size, size, size,
                self.samples_per_part, self.trans_std,
            )  # fmt: skip

        return pool(maps, pool(offset_maps, None)).mean((2, 3))
