"""Region proposal network. B images, A anchors a cell, N anchors in all levels together.

Source: Ren et al., Faster R-CNN; rpn.py and proposal.py of the 2017 release.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdet import boxes as box_ops
from dcdet.errors import require
from dcdet.models.anchors import cell_anchors, grid_anchors
from dcdet.models.init import init_layers
from dcdet.models.targets import rpn_targets, smooth_l1, subsample
from dcdet.ops.nms import nms
from dcdet.structures import Batch


@dataclass(frozen=True)
class ProposalSpec:
    """How many proposals: `pre_nms` best anchors go into NMS at `nms_iou`, `post_nms` come out.

    Boxes with a side below `min_size` original pixels are dropped.
    """

    pre_nms: int
    post_nms: int
    nms_iou: float
    min_size: float

    def __post_init__(self) -> None:
        require(self.pre_nms >= 1, "pre_nms", "at least 1", self.pre_nms)
        require(self.post_nms >= 1, "post_nms", "at least 1", self.post_nms)
        require(0 < self.nms_iou <= 1, "nms_iou", "in (0, 1]", self.nms_iou)
        require(self.min_size >= 0, "min_size", "at least 0", self.min_size)


@dataclass(frozen=True)
class RPNOutput:
    """scores (B, N, 2) background and object logits, deltas (B, N, 4), anchors (N, 4), and the
    anchors' cells: cells (N, 3) int64 = stride, row, column."""

    scores: Tensor
    deltas: Tensor
    anchors: Tensor
    cells: Tensor


class RPNHead(nn.Module):
    """A shared 3x3 convolution, then object scores and box deltas for every anchor.

    Args:
        in_channels, strides: of the maps named by `in_features`; supplied by code.
        channels: of the shared convolution.
        init_std: of new weights.
        anchor_scales: anchor sizes in units of the stride.
        anchor_ratios: height / width.
        positive_iou, negative_iou: IoU from which an anchor is object, below which background.
        samples: anchors an image in the loss; at most `positive_fraction` of them are objects.
        allowed_border: pixels an anchor may reach over the image and still learn; None: any.
        whole_cells: only cells that lie in the image entirely propose, as in the 2017 release.
        ignore_coverage: anchors covered by an ignored region (crowd, difficult) to this share
            learn nothing; None: such regions are background, as in the 2017 release.
        train, test: the number of proposals.
    """

    def __init__(
        self,
        in_channels: int,
        strides: list[int],
        pixels: box_ops.Pixels,
        in_features: list[str],
        channels: int,
        init_std: float,
        anchor_scales: list[float],
        anchor_ratios: list[float],
        positive_iou: float,
        negative_iou: float,
        samples: int,
        positive_fraction: float,
        allowed_border: float | None,
        whole_cells: bool,
        ignore_coverage: float | None,
        train: ProposalSpec,
        test: ProposalSpec,
    ) -> None:
        super().__init__()
        require(len(in_features) >= 1, "in_features", "at least one map", in_features)
        require(channels >= 1, "channels", "at least 1", channels)
        require(init_std > 0, "init_std", "positive", init_std)
        for key, values in (("anchor_scales", anchor_scales), ("anchor_ratios", anchor_ratios)):
            require(len(values) > 0 and min(values) > 0, key, "positive numbers", values)
        require(0 < positive_iou <= 1, "positive_iou", "in (0, 1]", positive_iou)
        require(
            0 <= negative_iou <= positive_iou, "negative_iou", "in [0, positive_iou]", negative_iou
        )
        require(samples >= 1, "samples", "at least 1", samples)
        require(0 <= positive_fraction <= 1, "positive_fraction", "in [0, 1]", positive_fraction)
        anchors = len(anchor_scales) * len(anchor_ratios)
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.score = nn.Conv2d(channels, 2 * anchors, 1)
        self.delta = nn.Conv2d(channels, 4 * anchors, 1)
        init_layers(self.conv, self.score, self.delta, std=init_std)
        for stride in strides:
            cell = cell_anchors(stride, anchor_scales, anchor_ratios).float()
            self.register_buffer(f"anchors_{stride}", cell, persistent=False)
        self.strides = strides
        self.pixels = pixels
        self.in_features = in_features
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.samples, self.positive_fraction = samples, positive_fraction
        self.allowed_border, self.whole_cells = allowed_border, whole_cells
        self.ignore_coverage = ignore_coverage
        self.train_spec, self.test_spec = train, test

    def forward(self, features: dict[str, Tensor]) -> RPNOutput:
        """Raw outputs of all levels; inside a level the order is row, column, anchor."""
        scores, deltas, anchors, cells = [], [], [], []
        for name, stride in zip(self.in_features, self.strides, strict=True):
            hidden = F.relu(self.conv(features[name]))
            batch, _, height, width = hidden.shape
            # Channels: all background scores first, then all object scores.
            score = self.score(hidden).view(batch, 2, -1, height, width)
            delta = self.delta(hidden).view(batch, -1, 4, height, width)
            scores.append(score.permute(0, 3, 4, 2, 1).reshape(batch, -1, 2))
            deltas.append(delta.permute(0, 3, 4, 1, 2).reshape(batch, -1, 4))
            grid = grid_anchors(getattr(self, f"anchors_{stride}"), stride, (height, width))
            anchors.append(grid.view(-1, 4))
            row = torch.arange(height, device=hidden.device).view(-1, 1, 1)
            column = torch.arange(width, device=hidden.device).view(1, -1, 1)
            place = torch.broadcast_tensors(row.new_tensor(stride), row, column)
            cells.append(
                torch.stack(place, -1).expand(height, width, grid.shape[2], 3).reshape(-1, 3)
            )
        return RPNOutput(
            torch.cat(scores, 1).float(), torch.cat(deltas, 1).float(),
            torch.cat(anchors), torch.cat(cells),
        )  # fmt: skip

    def losses(self, raw: RPNOutput, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy over the sampled anchors and smooth L1 (sigma 3) over the positive ones,
        the latter divided by the wanted number of samples; mean over images."""
        score_losses, delta_losses = [], []
        for image, target in enumerate(batch.targets):
            labels, deltas = rpn_targets(
                raw.anchors, target, self._usable(raw.anchors, batch.sizes[image]),
                self.positive_iou, self.negative_iou, self.ignore_coverage,
            )  # fmt: skip
            labels = subsample(labels, self.samples, self.positive_fraction, batch.seeds[image])
            taken, positive = (labels >= 0).nonzero().squeeze(1), labels == 1
            score_loss = F.cross_entropy(raw.scores[image, taken], labels[taken], reduction="sum")
            score_losses.append(score_loss / max(1, len(taken)))
            difference = raw.deltas[image, positive] - deltas[positive]
            delta_losses.append(smooth_l1(difference, sigma=3.0).sum() / self.samples)
        return {
            "rpn_score": torch.stack(score_losses).mean(),
            "rpn_box": torch.stack(delta_losses).mean(),
        }

    @torch.no_grad()
    def proposals(
        self, raw: RPNOutput, sizes: list[tuple[int, int]], scales: list[float]
    ) -> list[Tensor]:
        """Boxes (P, 4) for each image, best first, P <= post_nms; they carry no gradient."""
        spec = self.train_spec if self.training else self.test_spec
        objectness = raw.scores.softmax(dim=-1)[..., 1]
        result = []
        for image, size in enumerate(sizes):
            height, width = size
            scores, deltas, anchors = objectness[image], raw.deltas[image], raw.anchors
            if self.whole_cells:
                stride, row, column = raw.cells.unbind(1)
                rows = (height // stride).clamp(min=1)
                columns = (width // stride).clamp(min=1)
                inside = (row < rows) & (column < columns)
                scores, deltas, anchors = scores[inside], deltas[inside], anchors[inside]
            boxes = box_ops.clip(box_ops.decode(anchors, deltas), size, self.pixels)
            sides = boxes[:, 2:] - boxes[:, :2]
            large = (sides >= spec.min_size * scales[image]).all(dim=1)
            boxes, scores = boxes[large], scores[large]
            order = scores.argsort(descending=True, stable=True)[: spec.pre_nms]
            boxes, scores = boxes[order], scores[order]
            result.append(boxes[nms(boxes, scores, spec.nms_iou)[: spec.post_nms]])
        return result

    def _usable(self, anchors: Tensor, size: tuple[int, int]) -> Tensor:
        if self.allowed_border is None:
            return torch.ones(len(anchors), dtype=torch.bool, device=anchors.device)
        height, width = size
        low, high = -self.allowed_border, 1 + self.allowed_border
        # Inclusive corners: x2 - 1 < width + border.
        return (
            (anchors[:, 0] >= low) & (anchors[:, 1] >= low)
            & (anchors[:, 2] < width + high) & (anchors[:, 3] < height + high)
        )  # fmt: skip
