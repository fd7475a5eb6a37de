"""Fast R-CNN's head with two fully connected layers, on one map or a pyramid.

B images, R RoIs, K classes, C channels of the maps, p the grid's side (7).
Source: Girshick, Fast R-CNN; Lin et al., Feature Pyramid Networks; Dai et al., Deformable ConvNets;
faster_rcnn/symbols and fpn/operator_py/fpn_roi_pooling.py of the 2017 release.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_pool

from dcdet import boxes as box_ops
from dcdet.errors import require
from dcdet.models.init import init_layers
from dcdet.models.roi_head import RoIHead, RoIOutput, inclusive
from dcdet.models.targets import SampleSpec
from dcdet.ops.deform_psroi_pool import deform_psroi_pool, shifted_parts


class BoxHead(RoIHead):
    """Each RoI is pooled to p x p bins; two hidden layers, then scores and each class's own box.

    Args:
        in_channels, strides, num_classes: supplied by code.
        in_features: the maps that are read, finest first, each of twice the last one's stride.
            Of several, the RoI's size decides: see `levels`.
        reduce_channels: of a 1x1 convolution with ReLU before pooling; None: there is none.
        pooling: "max", or "deformable": each RoI is pooled twice, and the first result moves the
            second's bins, by offsets that every map has its own layer for.
        pooled_size: p.
        trans_std: offsets of 1 move a bin by this share of the RoI's size.
        samples_per_part: sampling points along a side of a deformable bin.
        hidden_channels: of the hidden layers.
        init_std: of new weights; those of offsets start at 0.
        The others: see RoIHead.
    """

    def __init__(
        self,
        in_channels: int,
        strides: list[int],
        num_classes: int,
        in_features: list[str],
        reduce_channels: int | None,
        pooling: Literal["max", "deformable"],
        pooled_size: int,
        trans_std: float,
        samples_per_part: int,
        hidden_channels: int,
        init_std: float,
        foreground_iou: float,
        background_iou: tuple[float, float],
        samples: SampleSpec | None,
        hard_examples: int | None,
        box_std: list[float],
        ignore_coverage: float | None,
    ) -> None:
        super().__init__(
            foreground_iou, background_iou, samples, hard_examples, box_std, ignore_coverage
        )
        require(
            len(strides) > 0 and strides == [strides[0] << index for index in range(len(strides))],
            "in_features", "maps whose strides double one by one", in_features,
        )  # fmt: skip
        channels = in_channels if reduce_channels is None else reduce_channels
        require(channels >= 1, "reduce_channels", "at least 1, or null", channels)
        require(pooled_size >= 1, "pooled_size", "at least 1", pooled_size)
        require(samples_per_part >= 1, "samples_per_part", "at least 1", samples_per_part)
        require(hidden_channels >= 1, "hidden_channels", "at least 1", hidden_channels)
        require(init_std > 0, "init_std", "positive", init_std)
        if reduce_channels is not None:
            self.reduce = nn.Conv2d(in_channels, channels, 1)
            init_layers(self.reduce, std=init_std)
        inputs = channels * pooled_size**2
        self.fc1 = nn.Linear(inputs, hidden_channels)
        self.fc2 = nn.Linear(hidden_channels, hidden_channels)
        self.score = nn.Linear(hidden_channels, 1 + num_classes)
        # Background's four deltas come first; they are not used (as in the release).
        self.delta = nn.Linear(hidden_channels, 4 * (1 + num_classes))
        init_layers(self.fc1, self.fc2, self.score, self.delta, std=init_std)
        if pooling == "deformable":
            self.offset = nn.ModuleDict(
                {name: nn.Linear(inputs, 2 * pooled_size**2) for name in in_features}
            )
            init_layers(*self.offset.values(), std=0.0)
        self.strides, self.in_features = strides, in_features
        self.reduced, self.deformable = reduce_channels is not None, pooling == "deformable"
        self.pooled_size, self.trans_std = pooled_size, trans_std
        self.samples_per_part = samples_per_part

    def forward(self, features: dict[str, Tensor], rois: Tensor) -> RoIOutput:
        """rois (R, 5): image index and box. A map without RoIs has a part in it all the same, so
        that every parameter gets a gradient."""
        levels = self.levels(rois)
        places, pooled = [], []
        for level, name in enumerate(self.in_features):
            places.append((levels == level).nonzero().squeeze(1))
            pooled.append(self._pool(features[name], inclusive(rois[places[-1]]), level))
        x = torch.cat(pooled)[torch.cat(places).argsort()].flatten(1)
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        logits, deltas = self.score(x).float(), self.delta(x).float()
        return RoIOutput(logits, deltas.unflatten(1, (-1, 4)))

    def levels(self, rois: Tensor) -> Tensor:
        """Which of the maps each RoI (R, 5) is pooled from: (R,) int64.

        A RoI of 224 x 224 pixels goes to stride 16, one of twice the side to twice the stride.
        """
        side = box_ops.area(rois[:, 1:]).clamp(min=0).sqrt()
        # In float32, which decides about sides a hair below a border, as in the release.
        level = math.log2(16 / self.strides[0]) + torch.log2(side / 224)
        return level.floor().clamp(0, len(self.strides) - 1).long()

    def parts(self, features: dict[str, Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Where a deformable head reads RoIs (R, 5): boxes (R, p, p, 4) in the rois' pixels.

        `labels` (R,) make no difference here: all classes share their parts.
        """
        size = self.pooled_size
        levels, parts = self.levels(rois), rois.new_empty(len(rois), size, size, 4)
        for level, name in enumerate(self.in_features):
            place = levels == level
            there = inclusive(rois[place])
            shifts = self._shifts(self._reduce(features[name]), there, level).float()
            parts[place] = shifted_parts(there, shifts, 1 / self.strides[level], self.trans_std)
        return parts

    def _reduce(self, x: Tensor) -> Tensor:
        return F.relu(self.reduce(x)) if self.reduced else x

    def _pool(self, x: Tensor, rois: Tensor, level: int) -> Tensor:
        """x (B, C, H, W), inclusive rois (r, 5) -> (r, C, p, p)."""
        x = self._reduce(x)
        if not self.deformable:
            return roi_pool(x.float(), rois, self.pooled_size, 1 / self.strides[level])
        return self._pool_parts(x, rois, self._shifts(x, rois, level), level)

    def _shifts(self, x: Tensor, rois: Tensor, level: int) -> Tensor:
        """How far deformable pooling moves the bins, in units of trans_std: (r, 2, p, p)."""
        pooled = self._pool_parts(x, rois, None, level).flatten(1)
        offset: Tensor = self.offset[self.in_features[level]](pooled)
        return offset.view(-1, 2, self.pooled_size, self.pooled_size)

    def _pool_parts(self, x: Tensor, rois: Tensor, shifts: Tensor | None, level: int) -> Tensor:
        size, samples = self.pooled_size, self.samples_per_part
        return deform_psroi_pool(
            x, rois, shifts, 1 / self.strides[level], x.shape[1], 1, size, size, samples,
            self.trans_std,
        )  # fmt: skip
