"""Region proposal network. B images, A anchors a cell, N anchors in all levels together.

Source: Ren et al., Faster R-CNN; rpn.py and proposal.py of the 2017 release; rpn_head.py of
mmdetection.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdet import boxes as box_ops
from dcdet.errors import require
from dcdet.models.anchors import Rule, cell_anchors, grid_anchors
from dcdet.models.init import init_layers
from dcdet.models.targets import rpn_targets, smooth_l1, subsample
from dcdet.ops.nms import batched_nms, nms
from dcdet.structures import Batch


@dataclass(frozen=True)
class ProposalSpec:
    """How many proposals: `pre_nms` best anchors go into NMS at `nms_iou`, `post_nms` come out.

    Boxes with a side below `min_size` original pixels are dropped. `levels` "joined" count as one,
    as in the 2017 release. Otherwise `pre_nms` anchors are chosen in each, and levels do not
    suppress each other's boxes: "separate" as in torchvision and detectron2, "shifted" as in
    mmdetection (see ops.batched_nms).
    """

    pre_nms: int
    post_nms: int
    nms_iou: float
    min_size: float
    levels: Literal["joined", "separate", "shifted"] = "joined"

    def __post_init__(self) -> None:
        require(self.pre_nms >= 1, "pre_nms", "at least 1", self.pre_nms)
        require(self.post_nms >= 1, "post_nms", "at least 1", self.post_nms)
        require(0 < self.nms_iou <= 1, "nms_iou", "in (0, 1]", self.nms_iou)
        require(self.min_size >= 0, "min_size", "at least 0", self.min_size)


@dataclass(frozen=True)
class RPNOutput:
    """scores (B, N, 2) background and object logits, deltas (B, N, 4), anchors (N, 4), the
    anchors' cells (N, 3) int64 = stride, row, column, and how many anchors each level has."""

    scores: Tensor
    deltas: Tensor
    anchors: Tensor
    cells: Tensor
    counts: tuple[int, ...]


class RPNHead(nn.Module):
    """A shared 3x3 convolution, then object scores and box deltas for every anchor.

    Args:
        in_channels, strides: of the maps named by `in_features`; supplied by code.
        pixels, delta_limit: see boxes.clip and boxes.decode; supplied by code.
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
        scores: "softmax" of two channels an anchor, or "sigmoid" of one.
        anchor_rule: see anchors.cell_anchors. "torchvision" also puts anchors of coarse maps as
            many whole pixels apart as fit into the padded image, which may be fewer than the
            stride.
        claim_iou: see targets.rpn_targets.
        box_beta: of the box loss, smooth L1; 0 is L1.
        average: of losses. "image": the score loss over the samples of each image, the box loss
            over the wanted number, then both over images. "batch": both over all samples of the
            batch, as mmdetection, where no positive or no negative ones in an image count as one.
        learn_multiple: only cells that begin in the image, padded to multiples of this, learn;
            None: all of the batch's padded size.
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
        delta_limit: box_ops.DeltaLimit = "none",
        scores: Literal["softmax", "sigmoid"] = "softmax",
        anchor_rule: Rule = "release",
        claim_iou: float | None = None,
        box_beta: float = 1 / 9,
        average: Literal["image", "batch"] = "image",
        learn_multiple: int | None = None,
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
        require(claim_iou is None or 0 <= claim_iou <= 1, "claim_iou", "in [0, 1]", claim_iou)
        require(box_beta >= 0, "box_beta", "at least 0", box_beta)
        wanted = "at least 1, or null"
        require(learn_multiple is None or learn_multiple >= 1, "learn_multiple", wanted,
                learn_multiple)  # fmt: skip
        anchors = len(anchor_scales) * len(anchor_ratios)
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.score = nn.Conv2d(channels, (2 if scores == "softmax" else 1) * anchors, 1)
        self.delta = nn.Conv2d(channels, 4 * anchors, 1)
        init_layers(self.conv, self.score, self.delta, std=init_std)
        for stride in strides:
            cell = cell_anchors(stride, anchor_scales, anchor_ratios, anchor_rule).float()
            self.register_buffer(f"anchors_{stride}", cell, persistent=False)
        self.strides = strides
        self.pixels, self.delta_limit = pixels, delta_limit
        self.in_features = in_features
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.samples, self.positive_fraction = samples, positive_fraction
        self.allowed_border, self.whole_cells = allowed_border, whole_cells
        self.ignore_coverage, self.claim_iou = ignore_coverage, claim_iou
        self.train_spec, self.test_spec = train, test
        self.sigmoid, self.fitted = scores == "sigmoid", anchor_rule == "torchvision"
        self.box_beta, self.average, self.learn_multiple = box_beta, average, learn_multiple

    def forward(self, features: dict[str, Tensor]) -> RPNOutput:
        """Raw outputs of all levels; inside a level the order is row, column, anchor."""
        scores, deltas, anchors, cells, counts = [], [], [], [], []
        for name, stride in zip(self.in_features, self.strides, strict=True):
            hidden = F.relu(self.conv(features[name]))
            batch, _, height, width = hidden.shape
            # Channels: all background scores first, then all object scores.
            score = self.score(hidden).view(batch, 1 if self.sigmoid else 2, -1, height, width)
            delta = self.delta(hidden).view(batch, -1, 4, height, width)
            scores.append(score.permute(0, 3, 4, 2, 1).reshape(batch, -1, score.shape[1]))
            deltas.append(delta.permute(0, 3, 4, 1, 2).reshape(batch, -1, 4))
            step = self._fitted(features, height, width) if self.fitted else (stride, stride)
            grid = grid_anchors(getattr(self, f"anchors_{stride}"), step, (height, width))
            anchors.append(grid.view(-1, 4))
            row = torch.arange(height, device=hidden.device).view(-1, 1, 1)
            column = torch.arange(width, device=hidden.device).view(1, -1, 1)
            place = torch.broadcast_tensors(row.new_tensor(stride), row, column)
            cells.append(
                torch.stack(place, -1).expand(height, width, grid.shape[2], 3).reshape(-1, 3)
            )
            counts.append(len(cells[-1]))
        logits = torch.cat(scores, 1).float()
        if self.sigmoid:  # of x is the softmax of 0 and x
            logits = F.pad(logits, (1, 0))
        return RPNOutput(
            logits, torch.cat(deltas, 1).float(), torch.cat(anchors), torch.cat(cells),
            tuple(counts),
        )  # fmt: skip

    def losses(self, raw: RPNOutput, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy over the sampled anchors and smooth L1 over the positive ones."""
        score_losses, delta_losses, drawn = [], [], []
        for image, target in enumerate(batch.targets):
            labels, deltas = rpn_targets(
                raw.anchors, target, self._usable(raw, batch.sizes[image]), self.positive_iou,
                self.negative_iou, self.ignore_coverage, self.claim_iou,
            )  # fmt: skip
            labels = subsample(labels, self.samples, self.positive_fraction, batch.seeds[image])
            taken, positive = (labels >= 0).nonzero().squeeze(1), labels == 1
            score_losses.append(
                F.cross_entropy(raw.scores[image, taken], labels[taken], reduction="sum")
            )
            difference = raw.deltas[image, positive] - deltas[positive]
            delta_losses.append(smooth_l1(difference, self.box_beta).sum())
            drawn.append((len(difference), len(taken) - len(difference)))
        if self.average == "image":
            score_numbers = [len(drawn) * max(1, sum(numbers)) for numbers in drawn]
            delta_number = len(drawn) * self.samples
        else:
            delta_number = sum(max(1, number) for numbers in drawn for number in numbers)
            score_numbers = [delta_number] * len(drawn)
        scores = torch.stack(score_losses)
        return {
            "rpn_score": (scores / scores.new_tensor(score_numbers)).sum(),
            "rpn_box": torch.stack(delta_losses).sum() / delta_number,
        }

    @torch.no_grad()
    def proposals(
        self, raw: RPNOutput, sizes: list[tuple[int, int]], scales: list[box_ops.Scale]
    ) -> list[Tensor]:
        """Boxes (P, 4) for each image, best first, P <= post_nms; they carry no gradient."""
        spec = self.train_spec if self.training else self.test_spec
        objectness = raw.scores.softmax(dim=-1)[..., 1]
        result = []
        for image, size in enumerate(sizes):
            picked, levels = self._candidates(raw, objectness[image], size, spec)
            scores = objectness[image, picked]
            boxes = box_ops.decode(raw.anchors[picked], raw.deltas[image, picked], self.delta_limit)
            boxes = box_ops.clip(boxes, size, self.pixels)
            sides = boxes[:, 2:] - boxes[:, :2]
            least = spec.min_size * sides.new_tensor(box_ops.per_axis(scales[image])).flip(0)
            large = (sides >= least).all(dim=1)
            boxes, scores, levels = boxes[large], scores[large], levels[large]
            if spec.levels == "joined":
                order = scores.argsort(descending=True, stable=True)[: spec.pre_nms]
                boxes, scores = boxes[order], scores[order]
                kept = nms(boxes, scores, spec.nms_iou)
            else:
                shift = spec.levels == "shifted"
                kept = batched_nms(boxes, scores, levels, spec.nms_iou, shift=shift)
            result.append(boxes[kept[: spec.post_nms]])
        return result

    def _fitted(self, features: dict[str, Tensor], height: int, width: int) -> tuple[int, int]:
        """How far apart torchvision puts the cells of a map (height, width): (y, x)."""
        rows, columns = features[self.in_features[0]].shape[2:]
        return rows * self.strides[0] // height, columns * self.strides[0] // width

    def _candidates(
        self, raw: RPNOutput, scores: Tensor, size: tuple[int, int], spec: ProposalSpec
    ) -> tuple[Tensor, Tensor]:
        """The anchors (n,) of an image of `size` (h, w) that may become proposals; their levels."""
        levels = torch.arange(len(scores), device=scores.device).split(raw.counts)
        if self.whole_cells:
            stride, row, column = raw.cells.unbind(1)
            rows, columns = ((side // stride).clamp(min=1) for side in size)
            inside = (row < rows) & (column < columns)
            levels = [level[inside[level]] for level in levels]
        if spec.levels != "joined":
            levels = [
                level[scores[level].argsort(descending=True, stable=True)[: spec.pre_nms]]
                for level in levels
            ]
        numbers = [torch.full_like(level, number) for number, level in enumerate(levels)]
        return torch.cat(levels), torch.cat(numbers)

    def _usable(self, raw: RPNOutput, size: tuple[int, int]) -> Tensor:
        """Which anchors (N,) bool may learn in an image of `size` (h, w)."""
        usable = torch.ones(len(raw.anchors), dtype=torch.bool, device=raw.anchors.device)
        if self.learn_multiple is not None:
            stride, row, column = raw.cells.unbind(1)
            height, width = (-(-side // self.learn_multiple) * self.learn_multiple for side in size)
            usable &= (row * stride < height) & (column * stride < width)
        if self.allowed_border is not None:
            x1, y1, x2, y2 = raw.anchors.unbind(1)
            # Inclusive corners: x2 - 1 < width + border.
            right, bottom = (1 + side + self.allowed_border for side in size[::-1])
            usable &= (torch.minimum(x1, y1) >= -self.allowed_border) & (x2 < right) & (y2 < bottom)
        return usable
