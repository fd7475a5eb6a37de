"""R-CNN feature mimicking: a RoI's features should be those of the RoI's pixels alone.

In training, objects are cut out of the image and go through the network once more, each alone; the
box head's hidden features of the RoI learn to point the way that those of the cut-out do. Testing
has none of it. B images, R RoIs, M cut-outs, F hidden features, K classes.

Source: Zhu et al., Deformable ConvNets v2, section 3.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdet.errors import require
from dcdet.models.targets import RoISamples
from dcdet.ops.deform_roi_pool import roi_align


@dataclass(frozen=True)
class MimickingSpec:
    """How much is mimicked; the defaults are the paper's.

    At most `rois` foreground RoIs an image, drawn at random, are cut out and resized to `size` x
    `size` pixels. `feature_weight` and `score_weight` multiply the loss of features, and that of
    classes told from the cut-outs.
    """

    rois: int = 32
    size: int = 224
    feature_weight: float = 0.1
    score_weight: float = 0.1

    def __post_init__(self) -> None:
        require(self.rois >= 1, "rois", "at least 1", self.rois)
        require(self.size >= 32, "size", "at least 32", self.size)
        require(self.feature_weight >= 0, "feature_weight", "at least 0", self.feature_weight)
        require(self.score_weight >= 0, "score_weight", "at least 0", self.score_weight)


def draw_foreground(samples: RoISamples, seeds: Sequence[int], number: int) -> Tensor:
    """Which RoIs are cut out, (M,): at most `number` of each image's foreground, at random."""
    drawn = []
    for image, seed in enumerate(seeds):
        mine = (samples.rois[:, 0] == image) & (samples.labels > 0)
        places = mine.nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed + 3))
        drawn.append(places[order[:number].to(places.device)])
    return torch.cat(drawn)


def cut_out(images: Tensor, rois: Tensor, size: int) -> Tensor:
    """The pixels of images (B, 3, H, W) in rois (M, 5), resized: (M, 3, size, size).

    Bilinear, and averaged where a RoI shrinks.
    """
    return roi_align(images, rois, size)


def whole_patches(number: int, size: int, like: Tensor) -> Tensor:
    """The RoIs (M, 5) that cover `number` cut-outs."""
    corners = like.new_tensor([0.0, 0.0, size, size]).expand(number, 4)
    return torch.cat([torch.arange(number).to(like)[:, None], corners], dim=1)


def mimicking_losses(
    features: Tensor, alone: Tensor, classifier: nn.Module, labels: Tensor, spec: MimickingSpec
) -> dict[str, Tensor]:
    """1 - cosine of RoIs' features (M, F) and of those of their cut-outs (M, F), and cross-entropy
    of the cut-outs' classes `labels` (M,), 1 + class; means over RoIs."""
    number = max(1, len(labels))
    distance = 1 - F.cosine_similarity(features.float(), alone.float(), dim=1)
    scores = F.cross_entropy(classifier(alone).float(), labels, reduction="sum")
    return {
        "mimic": spec.feature_weight * distance.sum() / number,
        "mimic_score": spec.score_weight * scores / number,
    }
