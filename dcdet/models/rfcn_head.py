"""R-FCN head, plain and deformable. B images, R RoIs, K classes, G the grid's side (7).

Source: Dai et al., R-FCN; Dai et al., Deformable ConvNets; rfcn/symbols/*.py of the 2017 release.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdet.boxes import DeltaLimit
from dcdet.errors import require
from dcdet.models.init import init_layers
from dcdet.models.roi_head import RoIHead, RoIOutput, inclusive
from dcdet.ops.deform_psroi_pool import deform_psroi_pool, shifted_parts
from dcdet.ops.psroi_pool import psroi_pool


class RFCNHead(RoIHead):
    """Position-sensitive score maps, pooled for each RoI and averaged over its G x G parts.

    Args:
        in_channels, stride, num_classes, delta_limit: supplied by code.
        in_feature: the map that is read.
        channels: of the first 1x1 convolution.
        init_std: of new weights; those of offsets start at 0.
        group_size: G.
        deformable: parts are shifted by pooled offsets, for every class its own.
        trans_std: offsets of 1 shift a part by this share of the RoI's size.
        samples_per_part: sampling points along a side of a deformable part.
        The others: see RoIHead.
    """

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
        delta_limit: DeltaLimit = "none",
    ) -> None:
        super().__init__(
            foreground_iou, background_iou, None, hard_examples, box_std, ignore_coverage,
            delta_limit,
        )  # fmt: skip
        require(channels >= 1, "channels", "at least 1", channels)
        require(init_std > 0, "init_std", "positive", init_std)
        require(group_size >= 1, "group_size", "at least 1", group_size)
        require(samples_per_part >= 1, "samples_per_part", "at least 1", samples_per_part)
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
        self.stride, self.in_feature = stride, in_feature
        self.group_size, self.deformable = group_size, deformable
        self.trans_std, self.samples_per_part = trans_std, samples_per_part

    def forward(self, features: dict[str, Tensor], rois: Tensor) -> RoIOutput:
        """rois (R, 5): image index and box."""
        hidden = F.relu(self.reduce(features[self.in_feature]))
        rois = inclusive(rois)
        scores, deltas = self.score(hidden), self.delta(hidden).chunk(2, dim=1)[1]
        if self.deformable:
            logits = self._pool_deformed(scores, self.score_offset(hidden), rois)
            deltas = self._pool_deformed(deltas, self.delta_offset(hidden), rois)
        else:
            logits, deltas = self._pool(scores, rois), self._pool(deltas, rois)
        return RoIOutput(logits.float(), deltas.float())

    def parts(self, features: dict[str, Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Where a deformable head reads the score of class `labels` (R,): boxes (R, G, G, 4).

        rois (R, 5) as in `forward`; the boxes are in the same pixels.
        """
        hidden = F.relu(self.reduce(features[self.in_feature]))
        rois = inclusive(rois)
        trans = self._pool_parts(self.score_offset(hidden), None, rois)
        index = torch.arange(len(rois), device=rois.device)
        shifts = trans.unflatten(1, (-1, 2))[index, 1 + labels]
        return shifted_parts(rois, shifts.float(), 1 / self.stride, self.trans_std)

    def _pool(self, maps: Tensor, rois: Tensor) -> Tensor:
        size = self.group_size
        output_dim = maps.shape[1] // size**2
        pooled = psroi_pool(maps, rois, 1 / self.stride, output_dim, size, size)
        return pooled.mean((2, 3))

    def _pool_deformed(self, maps: Tensor, offset_maps: Tensor, rois: Tensor) -> Tensor:
        trans = self._pool_parts(offset_maps, None, rois)
        return self._pool_parts(maps, trans, rois).mean((2, 3))

    def _pool_parts(self, maps: Tensor, trans: Tensor | None, rois: Tensor) -> Tensor:
        size = self.group_size
        return deform_psroi_pool(
            maps, rois, trans, 1 / self.stride, maps.shape[1] // size**2, size, size, size,
            self.samples_per_part, self.trans_std,
        )  # fmt: skip
