"""Mask R-CNN's head: outlines of objects. R RoIs, K classes, masks of m x m (28) cells.

Source: He et al., Mask R-CNN; fcn_mask_head.py of mmdetection.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdet.errors import UserError, require
from dcdet.models.roi_head import pool_by_level, require_pyramid
from dcdet.models.targets import RoISamples
from dcdet.ops.deform_roi_pool import roi_align
from dcdet.structures import Batch


class MaskHead(nn.Module):
    """RoIAlign, 3x3 convolutions, a transposed one that doubles the size, then a mask a class.

    Args:
        in_channels, strides, num_classes: supplied by code.
        in_features: the maps that are read, finest first; see roi_head.pyramid_levels.
        pooled_size: of RoIAlign's grid; a mask has twice as many cells along a side.
        samples_per_part: sampling points along a side of a bin; 0: as many as the bin has pixels.
        aligned: see ops.roi_align.
        convs: how many 3x3 convolutions.
        channels: of them and of the transposed one.
        paste: how a mask is drawn into the image: see masks.paste.
    """

    def __init__(
        self,
        in_channels: int,
        strides: list[int],
        num_classes: int,
        in_features: list[str],
        pooled_size: int,
        samples_per_part: int,
        aligned: bool,
        convs: int,
        channels: int,
        paste: Literal["grid", "resize"],
    ) -> None:
        super().__init__()
        require_pyramid(strides, in_features)
        require(pooled_size >= 1, "pooled_size", "at least 1", pooled_size)
        require(samples_per_part >= 0, "samples_per_part", "at least 0", samples_per_part)
        require(convs >= 0, "convs", "at least 0", convs)
        require(channels >= 1, "channels", "at least 1", channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels if index else in_channels, channels, 3, padding=1)
            for index in range(convs)
        )
        self.upsample = nn.ConvTranspose2d(channels if convs else in_channels, channels, 2, 2)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        for layer in (*self.convs, self.upsample, self.logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.in_features, self.strides = in_features, strides
        self.pooled_size, self.samples_per_part = pooled_size, samples_per_part
        self.aligned, self.paste = aligned, paste

    def forward(self, features: dict[str, Tensor], rois: Tensor) -> Tensor:
        """rois (R, 5): image index and box -> logits (R, K, m, m)."""
        maps = [features[name] for name in self.in_features]
        x = pool_by_level(maps, rois, self.strides, self._pool)
        for conv in self.convs:
            x = F.relu(conv(x))
        logits: Tensor = self.logits(F.relu(self.upsample(x)))
        return logits.float()

    def losses(
        self, logits: Tensor, samples: RoISamples, batch: Batch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Binary cross-entropy of the class's own mask, mean over cells and RoIs; statistics.

        `samples` are foreground, one a row of `logits`.
        """
        index = torch.arange(len(logits), device=logits.device)
        own = logits[index, samples.labels - 1]
        targets = self.targets(samples, batch)
        loss = F.binary_cross_entropy_with_logits(own, targets, reduction="sum")
        right = ((own.detach() > 0) == (targets > 0.5)).float()
        return {"mask": loss / max(1, own.numel())}, {
            "mask_accuracy": right.mean() if right.numel() else right.new_ones(())
        }

    def targets(self, samples: RoISamples, batch: Batch) -> Tensor:
        """What the masks in foreground RoIs should be: (R, m, m), 0 or 1.

        A cell is 1 where at least half of it, sampled as by RoIAlign, is object.
        """
        size = 2 * self.pooled_size
        targets = samples.rois.new_zeros(len(samples.rois), size, size)
        for image, target in enumerate(batch.targets):
            place = (samples.rois[:, 0] == image).nonzero().squeeze(1)
            if len(place) == 0:
                continue
            if target.masks is None:
                raise UserError("data.train", "delivers no instance masks, which model.mask_head "
                                "learns from", "add masks: true to it")  # fmt: skip
            used, which = samples.objects[place].unique(return_inverse=True)
            rois = torch.cat([which[:, None].to(samples.rois), samples.rois[place, 1:]], dim=1)
            bitmaps = target.masks[used, None].to(samples.rois)
            targets[place] = roi_align(bitmaps, rois, size).squeeze(1)
        return (targets >= 0.5).to(targets)

    def _pool(self, x: Tensor, rois: Tensor, level: int) -> Tensor:
        scale = 1 / self.strides[level]
        return roi_align(x, rois, self.pooled_size, scale, self.samples_per_part, self.aligned)
